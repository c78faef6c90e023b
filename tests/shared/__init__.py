"""The tables and helpers of all tests: calls, the oracle, comparisons, files."""
