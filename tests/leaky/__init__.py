"""Leaky computes what snntorch.Leaky does, in each way to run it."""
