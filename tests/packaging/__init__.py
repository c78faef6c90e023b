"""The package builds everywhere, and its products hold what they should, and no more."""
