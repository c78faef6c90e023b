"""Cells compute what snntorch 1.0.0's do, and our layers can take the place of snnTorch's."""
