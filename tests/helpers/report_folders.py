"""What a report reads from a folder: windows, sampled rollouts, a collection, results of studies and of a demo."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from trl_opd import TokenSignals, TokenStats
from trl_opd.artefacts.occurrences import PROMPT_SCHEMA, write_occurrences
from trl_opd.artefacts.sampled_rollouts import write_part

ROCKS, CONTROLS = list(range(60, 160)), list(range(200, 240))
ARM = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "seconds": 1.0, "steps": 8, "frozen_token_share": 0.25}
SUMMARY = {
    "version": 1,
    "task": "sums",
    "eval_problems": 500,
    "start": {"accuracy": 0.125},
    "teacher": {"accuracy": 1.0},
    "arms": {"uniform": ARM | {"accuracy": 0.75}, "rock": ARM},
    "differences": {"rock": {"estimate": -0.25, "ci95": None, "over": "problems"}},
    "rocks": {},
}


def make_window(folder: Path, step: int, sums: dict[int, tuple[int, float]], frozen=(), measure="reverse_kl") -> None:
    """Write statistics: of each token how often it was measured, and its divergence each time; frozen ones were not."""
    ids = torch.tensor([*(id for id, (count, _) in sums.items() for _ in range(count)), *frozen])
    kl = torch.tensor([*(kl for count, kl in sums.values() for _ in range(count)), *[float("nan")] * len(frozen)])
    stats = TokenStats(10, {"divergence": measure})
    stats.update(TokenSignals(ids, kl, torch.ones(len(ids)), torch.ones(len(ids))))
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    stats.save(folder / f"checkpoint-{step}" / "token_stats.safetensors")


def make_samples(folder, steps: int, rollouts_of_step: int, tokens: int) -> None:
    """Write a file of sampled rollouts, a part for each step."""
    rng = np.random.default_rng(0)
    count = rollouts_of_step * tokens
    for step in range(1, steps + 1):
        measures = ("kl", "entropy", "weight", "student_p", "teacher_p")
        columns = {name: rng.random(count, dtype=np.float32) for name in measures}
        columns["kl_pre"] = np.full(count, np.nan, np.float32)
        columns["step"] = np.full(count, step)
        columns["rollout"] = np.repeat(np.arange(rollouts_of_step), tokens)
        columns["position"] = np.tile(np.arange(tokens), rollouts_of_step)
        columns["prompt"] = columns["rollout"]
        columns["token_id"] = rng.integers(0, 300, count)
        for who in ("student", "teacher"):
            columns[f"{who}_top_ids"] = rng.integers(0, 300, (count, 5))
            columns[f"{who}_top_p"] = rng.random((count, 5), dtype=np.float32)
        write_part(folder, step, columns, {"prompts": {}})


def knockout() -> dict:
    """Return the result of a probe of one rock, and of two rocks at once."""
    rock = {"kind": "rock", "ids": [60], "texts": ["So"], "effect": -0.25, "ci95": [-0.3, -0.2], "better": 1}
    rock |= {"worse": 26, "arm": "token 60", "p": 0.001, "p_bh": 0.002, "p_holm": 0.003}
    rock |= {"label": "pillar", "label_as_published": "pillar"}
    unknown = dict.fromkeys(("p_bh", "p_holm", "label"))
    both = rock | unknown | {"kind": "rocks", "ids": [60, 61], "texts": ["So", "Now"]}
    return {
        "format": "trl_opd.knockout",
        "version": 1,
        "problems": 100,
        "discordance": 0.05,
        "minimal_effect": 0.1,
        "baseline": {"reward": 0.5, "ci95": None},
        "rocks_against_controls": {"p": None, "rocks": 1, "controls": 0},
        "arms": [rock, both],
    }


def knockout_without(name: str) -> dict:
    content = knockout()
    del content["arms"][0][name]
    return content


def gradients() -> pa.Table:
    names = ("norm", "norm_unbiased", "norm_matched", "cos_balanced", "cos_balanced_without", "cos_matched", "mean_kl")
    columns = {"token_id": pa.array([1, 2, 3, 4], pa.int32()), "group": pa.array(["rock", "rock", "rare", "random"])}
    columns |= {"count": pa.array([10, 20, 3, 5], pa.int64())}
    return pa.table(columns | {name: pa.array([0.1, 0.3, None, 0.5], pa.float64()) for name in names})


def changed(table: pa.Table, name: str, values, kind=None) -> pa.Table:
    """Return a table with other values in a column, of another type where one is named."""
    place = table.schema.names.index(name)
    kind = kind or table.schema.field(name).type
    return table.set_column(place, pa.field(name, kind), pa.array(values, kind))


def make_collection(folder: Path) -> None:
    """Write a small collection and its prompts."""
    columns = {"rollout": np.repeat(np.arange(9), 4), "position": np.tile(np.arange(4), 9)}
    columns |= {"prompt": np.arange(36) // 8, "token_id": np.arange(36) % 5}
    columns |= {name: np.linspace(0, 1, 36) for name in ("kl", "kl_pre", "entropy")}
    write_occurrences(folder / "occurrences.parquet", columns, {"student": "s"})
    arrays = [pa.array(range(5), pa.int32()), pa.array([[1, 2]] * 5, PROMPT_SCHEMA.field(1).type), pa.array(range(5))]
    pq.write_table(pa.Table.from_arrays(arrays, schema=PROMPT_SCHEMA), folder / "prompts.parquet")
