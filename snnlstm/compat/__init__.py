"""Code that depends on the releases of snnTorch and torch."""
