"""A cell's options, states, surrogates, quantisers and errors do what the documentation says."""
