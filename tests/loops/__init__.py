"""Loops over steps that torch.compile's backend "snnlstm" computes together equal eager's loops."""
