"""What runs a call: the look-up, the path with its reason, and the segments of a checkpoint."""
