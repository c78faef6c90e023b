"""Whole sequences, stacks and lengths compute what a loop over the steps computes."""
