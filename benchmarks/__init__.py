"""What snnlstm is measured with: `python -m benchmarks` (the suite), `python -m benchmarks.demo`."""
