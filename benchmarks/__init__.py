"""Measures snnlstm: `python -m benchmarks` is the suite, `python -m benchmarks.demo` the demo."""
