"""The mathematics of one position: divergence, gradient, token weights and language-modelling heads."""
