"""How snnlstm is measured: `python -m benchmarks`, the suite, and `python -m benchmarks.demo`."""
