"""A cell does what the documentation says: options, states, errors, paths, threads, processes."""
