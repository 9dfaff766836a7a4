"""The two models: how they are loaded, quantised, placed, compared and measured."""
