"""Results do not depend on threads and processes, and memory does not grow."""
