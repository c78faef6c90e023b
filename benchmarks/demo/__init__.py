"""`python -m benchmarks.demo` trains one network on moving digits with either library's cell."""
