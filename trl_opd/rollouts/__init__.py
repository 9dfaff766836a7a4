"""Which prompts when, how completions are sampled, and how they are batched."""
