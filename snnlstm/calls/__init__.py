"""What describes a call: its options, tensors and lengths, the user's algorithm, and its keys."""
