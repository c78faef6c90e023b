"""The benchmarks, the demo and `make gpu` run; users' networks train as with snnTorch."""
