"""The documentation's code and the examples run, links lead somewhere, and calls go as told."""
