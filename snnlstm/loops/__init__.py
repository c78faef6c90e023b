"""A backend of torch.compile, which turns the recorded steps of a loop into sequences."""
