"""The modules that users make, with their attributes and states."""
