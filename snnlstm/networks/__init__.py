"""Networks over time: stacks of layers, spike rates, and swaps with snnTorch."""
