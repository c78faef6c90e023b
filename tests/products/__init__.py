"""Products of spikes compute what torch's do, to rounding, and torch runs all others."""
