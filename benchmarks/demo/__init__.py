"""A spiking ConvLSTM learns moving digits: snnTorch's cell and ours. `python -m benchmarks.demo`"""
