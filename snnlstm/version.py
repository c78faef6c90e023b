"""The version: the only place that states it (setup.py reads this file)."""

__version__ = "0.1.0"
