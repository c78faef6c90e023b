"""What a call is: options, tensors, lengths, the user's algorithm, and the keys of like calls."""
