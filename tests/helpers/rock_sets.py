"""Rock sets: a file of given ids, and the content of a whole file."""

from trl_opd import Rock, RockSet

FILE = {
    "format": "trl_opd.rock_set",
    "version": 1,
    "tokenizer": {"name": "a/student", "vocab_size": 50, "fingerprint": "sha256:" + 64 * "0"},
    "measure": {"divergence": "reverse_kl", "temperature": 1.0},
    "method": {
        "score": "context",
        "top_k": 100,
        "tau_pre": 0.25,
        "tau_post": 0.125,
        "window": 3,
        "gamma": 0.5,
        "eta": None,
        "min_persistence": 0.8,
    },
    "corpus": {"rollouts": 12, "tokens": 400, "kl_sum": 30.5},
    "rocks": [
        {
            "id": 31,
            "text": " So",
            "count": 60,
            "mean_kl": 0.75,
            "mean_kl_pre": 1.5,
            "score": 2.5,
            "ccr": 0.5,
            "context_score": 0.125,
            "family": "discourse",
            "role": "pillar",
            "role_uncorrected": "stumbling",
        },
        {
            "id": 7,
            "text": None,
            "count": 40,
            "mean_kl": 0.5,
            "mean_kl_pre": None,
            "score": 2,
            "ccr": None,
            "context_score": None,
            "family": None,
            "role": None,
            "role_uncorrected": None,
        },
    ],
    "controls": {"ids": [5, 0, 49], "texts": ["\n", None, "é"], "mass_ratio": 1.01, "matched": True, "seed": 3},
    "heldout": {"token_share": 0.2, "kl_share": 0.4},
}


def rock_file(path, ids, **changes) -> str:
    """Write a rock set of these ids and return its path."""
    rocks = [Rock(id=id, text=None, count=10, mean_kl=1.0, score=10.0) for id in ids]
    nothing_known = {"name": None, "vocab_size": None, "fingerprint": None}
    fields = {
        "tokenizer": nothing_known,
        "measure": {"divergence": "reverse_kl", "temperature": 1.0},
        "method": {"score": "aggregate", "top_k": len(rocks)},
        "corpus": {"rollouts": 4, "tokens": 100, "kl_sum": 30.0},
        **changes,
    }
    RockSet(rocks=rocks, **fields).save(path)
    return str(path)
