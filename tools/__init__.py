"""Programs that look at the code otherwise than the tests do."""
