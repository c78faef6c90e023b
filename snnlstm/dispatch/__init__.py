"""What runs a call: the look-up, and the path with its reason."""
