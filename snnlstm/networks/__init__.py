"""Networks over time: stacks of layers, rates of spikes, and exchanges with snnTorch."""
