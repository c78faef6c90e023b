"""The modules that users create, with their attributes and states."""
