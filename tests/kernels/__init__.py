"""The core computes what float64 does, refuses what it cannot run, and packs weights in time."""
