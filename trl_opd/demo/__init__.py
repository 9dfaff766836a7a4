"""Demo task with tiny models that distil on a laptop and whose rock tokens are known in advance."""
