"""The documentation's code runs, its links lead somewhere, and calls go the way that it tells."""
