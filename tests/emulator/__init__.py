"""The CUDA kernels, emulated on the CPU, compute, wait and keep to their memory: README.md."""
