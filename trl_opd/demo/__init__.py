"""The embedded task: real tiny models that distil on a laptop, with rock tokens that are known beforehand."""
