"""Pools compute what torch's do, and whatever records a network finds torch's functions."""
