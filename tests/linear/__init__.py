"""Linear layers of spikes, where accelerate, stacks and compiled loops use them."""
