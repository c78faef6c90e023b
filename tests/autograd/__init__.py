"""Derivatives are right in unusual ways, too: graphs that run again, hooks, torch.func."""
