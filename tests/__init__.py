"""The tests of snnlstm, by subject; helpers are imported by their whole names."""
