"""`trl-opd gradients`: sums equal to autograd through whole models, groups of types, and one-line errors."""

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_opd import RockSet
from trl_opd.cli import main
from trl_opd.loss.logits import reverse_kl_gradient
from trl_opd.studies.gradients import GradientSums, choose_types, matched_rows

from tests.helpers import reference
from tests.helpers.command_line import flags


def autograd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the divergence with respect to rows of student logits, float64, `(N, V)`."""
    logits = student.double().clone().requires_grad_()
    for row, other in zip(logits, teacher.double(), strict=True):
        reference.divergence(row, other, 1.0).backward()
    return logits.grad


def make_rows(n: int = 60, vocab: int = 40, types: int = 6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(types, (n,), generator=generator)
    ids[-1] = types  # a type that occurs once
    gradients = autograd(*torch.randn(2, n, vocab, generator=generator))
    return ids, gradients, torch.rand(n, generator=generator) < 0.4


def cosine(one, other) -> float:
    return (one @ other / (one.norm() * other.norm())).item()


def expected_measures(ids, gradients, matched, of: list[int]) -> dict[str, list[float]]:
    """Return the measures by their definitions, type by type, in float64."""
    means = {id: gradients[ids == id].mean(0) for id in set(ids.tolist())}
    balanced = sum(means.values())
    total = gradients.sum(0)
    expected: dict[str, list[float]] = {}
    for id in of:
        own = gradients[ids == id]
        chosen = gradients[(ids == id) & matched].mean(0)
        n = len(own)
        mean = means[id]
        square = (own.sum(0).square().sum() - own.square().sum()) / (n * (n - 1)) if n > 1 else torch.tensor(torch.nan)
        measures = {
            "count": n,
            "norm": mean.norm().item(),
            "norm_unbiased": square.clamp(min=0).sqrt().item(),
            "cos_balanced": cosine(mean, balanced),
            "cos_global": cosine(mean, total),
            "cos_balanced_without": cosine(mean, balanced - mean),
            "cos_global_without": cosine(mean, total - own.sum(0)),
            "contribution": n * mean.norm().item() * cosine(mean, balanced),
            "matched_count": int(((ids == id) & matched).sum()),
            "norm_matched": chosen.norm().item(),  # NaN without a matched position
            "cos_matched": cosine(chosen, balanced),
        }
        for name, value in measures.items():
            expected.setdefault(name, []).append(value)
    return expected


# The formula and its sums


def test_gradient_is_that_of_autograd_on_the_logits():
    student, teacher = torch.randn(2, 30, 500, generator=torch.Generator().manual_seed(1)) * 3
    expected = autograd(student, teacher)
    found = reverse_kl_gradient(student, teacher)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert found.sum(1).abs().max() < 1e-5  # a shift of all logits changes nothing


@pytest.mark.parametrize("block", [1, 7, 60])
def test_sums_in_blocks_give_the_measures_of_the_definition(block):
    ids, gradients, matched = make_rows()
    matched[-1] = False
    of = [4, 0, 6, 2]
    sums = GradientSums(torch.bincount(ids, minlength=40), torch.tensor(of))
    for start in range(0, len(ids), block):
        rows = slice(start, start + block)
        sums.add(ids[rows], gradients[rows].float(), matched[rows])
    found = sums.measures()
    expected = expected_measures(ids, gradients, matched, of)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.isnan(found["norm_unbiased"][2])  # one occurrence says nothing about its noise
    assert np.isnan(found["norm_matched"][2])


def test_unbiased_norm_of_noise_is_near_zero_and_the_published_norm_falls_with_n():
    generator = torch.Generator().manual_seed(0)
    ids = torch.tensor([0] * 3 + [1] * 800)
    gradients = torch.nn.functional.normalize(torch.randn(len(ids), 300, generator=generator), dim=1)
    sums = GradientSums(torch.bincount(ids, minlength=300), torch.tensor([0, 1]))
    sums.add(ids, gradients, torch.zeros(len(ids), dtype=torch.bool))
    found = sums.measures()
    np.testing.assert_allclose(found["norm"], [3**-0.5, 800**-0.5], rtol=0.15)
    assert found["norm_unbiased"].max() < 0.2
    assert found["norm"][0] / found["norm"][1] > 10


def test_groups_are_rocks_rare_types_of_high_divergence_and_random_others():
    counts = np.array([0, 5, 100, 1, 10, 11, 2, *[50] * 200])
    mean_kl = np.array([9.0, 8.0, 7.0, 9.0, 8.0, 9.0, 0.1, *[0.5] * 200])
    found = choose_types(counts, mean_kl, [100, 0, 2, 999], most=10, seed=0)
    assert found["rock"].tolist() == [100, 2]  # 0 does not occur, 999 is outside the vocabulary
    assert found["rare"].tolist() == [1, 4]
    assert len(found["random"]) == 100
    assert not set(found["random"]) & {0, 1, 2, 4, 100}
    assert len(choose_types(counts, mean_kl, [2], most=1, seed=0)["rare"]) == 1


def test_equal_numbers_of_rows_are_drawn_from_each_type():
    ids = np.array([7] * 50 + [3] * 2 + [9] * 30)
    chosen = matched_rows(ids, np.array([7, 3]), 3, seed=0)
    assert np.bincount(ids[chosen]).tolist() == [0, 0, 0, 2, 0, 0, 0, 3]
    assert not np.array_equal(chosen, matched_rows(ids, np.array([7, 3]), 3, seed=1))


# The command


@pytest.fixture(scope="module")
def collected(world):
    """Models, two collections of rollouts, and a rock set of the first one."""
    for name, seed in (("rollouts", 1), ("early", 2)):
        given = flags(world, world / name, seed=seed, num_generations=4, max_completion_length=12, max_steps=None)
        assert main(["collect", *given]) == 0
    found = ["--score", "aggregate", "--top_k", "8", "--output", str(world / "rock_set.json")]
    assert main(["detect", str(world / "rollouts" / "occurrences.parquet"), *found]) == 0
    return world


def run(collected, tmp_path, *, file="rollouts/occurrences.parquet", target="g.parquet", **changes) -> int:
    changes = {"rock_set": collected / "rock_set.json", "dataset_name": None, **changes}
    given = ["gradients", str(collected / file), "--output", str(tmp_path / target)]
    return main(given + flags(collected, tmp_path / "out", **changes))


@pytest.mark.slow
def test_table_is_that_of_autograd_through_whole_models(collected, tmp_path, capsys):
    assert run(collected, tmp_path, early=collected / "early" / "occurrences.parquet") == 0
    printed = capsys.readouterr().out
    table = pq.read_table(tmp_path / "g.parquet").to_pydict()
    rows = pq.read_table(collected / "rollouts" / "occurrences.parquet").to_pandas()
    prompts = pq.read_table(collected / "rollouts" / "prompts.parquet").to_pydict()["token_ids"]
    names = ("student", "teacher")
    models = [AutoModelForCausalLM.from_pretrained(collected / name).double().eval() for name in names]
    gradients = []
    for rollout, completion in rows.groupby("rollout")["token_id"]:
        ids = torch.tensor([[*prompts[rollout // 4], *completion]])
        with torch.no_grad():
            logits = [model(input_ids=ids).logits[0, -len(completion) - 1 : -1] for model in models]
        gradients.append(autograd(*logits))
    ids = torch.tensor(rows["token_id"].to_numpy())
    expected = expected_measures(ids, torch.cat(gradients), torch.zeros(len(ids), dtype=torch.bool), table["token_id"])
    measures = ("count", "norm", "norm_unbiased", "cos_balanced", "cos_global", "cos_balanced_without", "contribution")
    for name in measures:
        found = np.array(table[name], dtype=float)
        np.testing.assert_allclose(found, expected[name], rtol=2e-3, atol=2e-4, err_msg=name)
    assert set(table["group"]) >= {"rock", "random"}
    rock_set = RockSet.load(collected / "rock_set.json")
    assert rock_set.rocks[0].text is not None  # `detect` finds the tokenizer by the name in the collection
    assert rock_set.measure["student"] == str(collected / "student")
    rocks = rock_set.ids.tolist()
    assert table["token_id"][: len(rocks)] == rocks
    assert table["group"].count("rock") == len(rocks)
    assert max(table["matched_count"]) == 3
    assert "rocks" in printed
    assert "Mean KL, early to late (medians; Wilcoxon):" in printed
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_batch_size_changes_nothing(collected, tmp_path):
    tables = []
    for size in (2, 16):
        assert run(collected, tmp_path, per_device_eval_batch_size=size) == 0
        tables.append(pq.read_table(tmp_path / "g.parquet").to_pandas())
    for name in ("token_id", "matched_count", "norm", "norm_matched", "cos_balanced"):
        np.testing.assert_allclose(tables[0][name], tables[1][name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"prompt": range(8), "token_ids": [[5000]] * 8}, "hold token ids outside the 300 that student and teacher"),
        ({"prompt": range(8), "token_ids": ["x"] * 8}, "column 'token_ids' must hold lists of whole numbers"),
        (b"nothing", "prompts.parquet is not a whole Parquet file"),
        (None, "the gradients need the prompts"),
    ],
)
def test_broken_file_of_prompts_is_a_one_line_error(prompts, message, collected, tmp_path, capsys):
    shutil.copy(collected / "rollouts" / "occurrences.parquet", tmp_path)
    if isinstance(prompts, dict):
        pq.write_table(pa.table(prompts), tmp_path / "prompts.parquet")
    elif prompts is not None:
        (tmp_path / "prompts.parquet").write_bytes(prompts)
    require_error(run(collected, tmp_path, file=tmp_path / "occurrences.parquet"), message, tmp_path, capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rock_set": "absent.json"}, "No rock of the rock set occurs in these rollouts"),
        ({"file": "cut/occurrences.parquet"}, "Rollout 0 of"),
        ({"file": "nowhere.parquet"}, "There is no file"),
        ({"matched": 0}, "--matched must be a whole number of at least 1"),
        ({"early": "/nowhere.parquet"}, "There is no file /nowhere.parquet"),
        ({"target": "/nowhere/g.parquet"}, "There is no folder /nowhere"),
    ],
)
def test_invalid_input_is_a_one_line_error(changes, message, collected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = pq.read_table(collected / "rollouts" / "occurrences.parquet")
    content = json.loads((collected / "rock_set.json").read_text())
    absent = min(set(range(3, 300)) - set(table["token_id"].to_pylist()))
    content["rocks"] = [{**content["rocks"][0], "id": absent, "text": None}]
    content["controls"] = None
    (tmp_path / "absent.json").write_text(json.dumps(content))
    cut = shutil.copytree(collected / "rollouts", tmp_path / "cut")
    pq.write_table(table.slice(1), cut / "occurrences.parquet")
    if "file" in changes:
        changes = {"file": tmp_path / changes["file"]}
    require_error(run(collected, tmp_path, **changes), message, tmp_path, capsys)


def require_error(code: int, message: str, tmp_path, capsys) -> None:
    assert code == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd gradients: error: ")
    assert message in error
    assert not (tmp_path / "g.parquet").exists()


def test_missing_rock_set_is_bad_usage():
    with pytest.raises(SystemExit) as caught:
        main(["gradients", "o.parquet", "--use_cpu"])
    assert caught.value.code == 2
