"""`python -m benchmarks.demo`: one network learns moving digits with either library's cell."""
