"""The core computes what float64 does, refuses nonsense, and packs weights in time."""
