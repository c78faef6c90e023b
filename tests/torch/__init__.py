"""torch's tools take a cell: compilers, exports, autocast, dtypes, optimizers, processes."""
