"""Cells and Leaky compute what snntorch 1.0.0's do, and can take their place."""
