"""The columns of a small file of occurrences."""

import numpy as np


def columns(rows: int = 8) -> dict:
    """Return the columns of a small good file: two rollouts of each of two prompts."""
    return {
        "rollout": np.arange(rows) // 2,
        "position": np.arange(rows) % 2,
        "token_id": np.arange(rows) % 3,
        "kl": np.linspace(0.1, 1.0, rows).astype(np.float32),
        "prompt": np.arange(rows) // 4,
    }
