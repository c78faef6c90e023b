"""What depends on releases of snnTorch and of torch."""
