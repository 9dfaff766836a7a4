"""A world of occurrences with planted rocks, four kinds of decoy with the same sum of divergence, and a background.

Every planted type has about the same sum of divergence, so the aggregate score cannot distinguish them:

- rocks diverge strongly before and after training, in a few recurring surroundings;
- "scattered" types diverge as strongly, in surroundings that do not recur;
- "learned" types diverged strongly before, and now do in only four occurrences;
- "rare" types occur a few times, with an extreme divergence;
- "common" types occur often, each time with a small divergence, in the background's surroundings.
"""

from dataclasses import dataclass

import numpy as np

from trl_opd.artefacts.occurrences import write_occurrences

KINDS = ("rock", "scattered", "learned", "rare", "common")
OCCURRENCES = {"rock": 80, "scattered": 80, "learned": 80, "rare": 6, "common": 600}
EACH = 20  # number of types of a kind
TOTAL = 120.0  # sum of the divergence of a type, nats
NOISE = 0.15  # share of the tokens of a recurring surrounding that is replaced


@dataclass(frozen=True)
class World:
    """Tokens and divergences, `(rollouts, length)` each, and the ids of every kind."""

    tokens: np.ndarray
    kl: np.ndarray
    kl_pre: np.ndarray
    ids: dict[str, np.ndarray]


def make_world(
    seed: int,
    *,
    vocab: int = 400,
    rollouts: int = 1000,
    length: int = 120,
    window: int = 2,
    surroundings: int = 3,
    shuffled: bool = False,
) -> World:
    """Return a world whose planted tokens are apart from each other, in a background with Zipf's frequencies.

    A recurring type has this number of surroundings. With `shuffled` the tokens of a surrounding change places.
    """
    rng = np.random.default_rng(seed)
    ids = rng.permutation(vocab)
    kinds = {kind: ids[place * EACH : (place + 1) * EACH] for place, kind in enumerate(KINDS)}
    background = ids[len(KINDS) * EACH :]
    shares = 1.0 / np.arange(1, len(background) + 1)
    shares /= shares.sum()
    tokens = rng.choice(background, size=(rollouts, length), p=shares)
    kl, kl_pre = rng.exponential(0.05, tokens.shape), rng.exponential(0.08, tokens.shape)
    # Six positions separate planted tokens, so the windows of two do not overlap.
    slots = [(row, place) for row in range(rollouts) for place in range(3, length - 3, 6)]
    rng.shuffle(slots)
    offsets = [offset for offset in range(-window, window + 1) if offset]
    for kind in KINDS:
        for type in kinds[kind]:
            count = round(OCCURRENCES[kind] * rng.uniform(0.8, 1.2))
            rows, places = np.array([slots.pop() for _ in range(count)]).T
            tokens[rows, places] = type
            parts = rng.gamma(4.0, size=count)
            parts *= rng.uniform(0.9, 1.1) * TOTAL / parts.sum()
            kl[rows, places], kl_pre[rows, places] = parts, parts * 1.3
            if kind in ("rock", "learned"):
                known = rng.choice(background, size=(surroundings, len(offsets)), p=shares)
                around = known[rng.integers(surroundings, size=count)]
                if shuffled:
                    around = rng.permuted(around, axis=1)
                other = rng.random(around.shape) < NOISE
                around[other] = rng.choice(background, size=other.sum(), p=shares)
                for column, offset in enumerate(offsets):
                    tokens[rows, places + offset] = around[:, column]
            if kind == "learned":
                after = np.full(count, 0.02)
                after[:4] += (parts.sum() - after.sum()) / 4
                kl[rows, places] = after
    return World(tokens, kl.astype(np.float32), kl_pre.astype(np.float32), kinds)


def save_world(world: World, path, **metadata) -> str:
    """Write a world as a file of occurrences in which each rollout has another prompt, and return the path."""
    rollouts, length = world.tokens.shape
    columns = {
        "rollout": np.repeat(np.arange(rollouts), length),
        "position": np.tile(np.arange(length), rollouts),
        "token_id": world.tokens.ravel(),
        "kl": world.kl.ravel(),
        "kl_pre": world.kl_pre.ravel(),
        "prompt": np.repeat(np.arange(rollouts), length),
    }
    write_occurrences(path, columns, metadata)
    return str(path)
