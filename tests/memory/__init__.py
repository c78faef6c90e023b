"""Blocks of memory are used again within a bound, and no use of a cell lets memory grow."""
