"""Order and checks of the prompts, sampling of the completions, and their batches."""
