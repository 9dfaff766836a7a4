"""`trl-opd gradients`: equal to autograd on whole models, in blocks as at once, and honest about averaging."""

import json

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
from tests.helpers.tiny import PROMPTS, save

CPU = ["--use_cpu", "--bf16", "false"]


def of_autograd(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the divergence of one row of logits, float64, `(V,)`."""
    logits = student.double().clone().requires_grad_()
    reference.divergence(logits, teacher.double(), 1.0).backward()
    return logits.grad


def make_rows(n: int = 60, vocab: int = 40, types: int = 6):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(types, (n,), generator=generator)
    ids[-1] = types  # a type that occurs once
    gradients = torch.stack([of_autograd(*torch.randn(2, vocab, generator=generator)) for _ in range(n)])
    return ids, gradients, torch.rand(n, generator=generator) < 0.4


def expected_figures(ids, gradients, matched, of: list[int]) -> dict[str, list[float]]:
    """Return the figures by their definitions, type by type, in float64."""

    def cosine(one, other):
        return (one @ other / (one.norm() * other.norm())).item()

    means = {id: gradients[ids == id].mean(0) for id in set(ids.tolist())}
    balanced, total = sum(means.values()), gradients.sum(0)
    found: dict[str, list[float]] = {}
    for id in of:
        own, chosen = gradients[ids == id], gradients[(ids == id) & matched]
        n, mean = len(own), means[id]
        square = (own.sum(0).square().sum() - own.square().sum()) / (n * (n - 1)) if n > 1 else torch.tensor(torch.nan)
        figures = {
            "count": n,
            "norm": mean.norm().item(),
            "norm_unbiased": square.clamp(min=0).sqrt().item(),
            "cos_balanced": cosine(mean, balanced),
            "cos_global": cosine(mean, total),
            "cos_balanced_without": cosine(mean, balanced - mean),
            "cos_global_without": cosine(mean, total - own.sum(0)),
            "contribution": n * mean.norm().item() * cosine(mean, balanced),
            "matched_count": len(chosen),
            "norm_matched": chosen.mean(0).norm().item() if len(chosen) else np.nan,
            "cos_matched": cosine(chosen.mean(0), balanced) if len(chosen) else np.nan,
        }
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
    return found


# The formula and its sums


def test_the_gradient_is_that_of_autograd_on_the_logits():
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 30, 500, generator=generator) * 3
    expected = torch.stack([of_autograd(*rows) for rows in zip(student, teacher, strict=True)])
    found = reverse_kl_gradient(student, teacher)
    assert (found - expected).norm() < 1e-6 * expected.norm()
    assert found.sum(1).abs().max() < 1e-5  # a shift of all logits changes nothing


@pytest.mark.parametrize("block", [1, 7, 60])
def test_sums_in_blocks_give_the_figures_of_the_definition(block):
    ids, gradients, matched = make_rows()
    matched[-1] = False
    counts = torch.bincount(ids, minlength=40)
    of = [4, 0, 6, 2]
    sums = GradientSums(counts, torch.tensor(of))
    for start in range(0, len(ids), block):
        rows = slice(start, start + block)
        sums.add(ids[rows], gradients[rows].float(), matched[rows])
    found, expected = sums.measures(), expected_figures(ids, gradients, matched, of)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.isnan(found["norm_unbiased"][2])  # one occurrence tells nothing of its noise
    assert np.isnan(found["norm_matched"][2])


def test_noise_alone_has_an_unbiased_norm_near_zero_and_a_published_one_that_falls_with_n():
    generator = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.full((3,), 0), torch.full((800,), 1)])
    gradients = torch.nn.functional.normalize(torch.randn(len(ids), 300, generator=generator), dim=1)
    sums = GradientSums(torch.bincount(ids, minlength=300), torch.tensor([0, 1]))
    sums.add(ids, gradients, torch.zeros(len(ids), dtype=torch.bool))
    found = sums.measures()
    np.testing.assert_allclose(found["norm"], [3**-0.5, 800**-0.5], rtol=0.15)
    assert found["norm_unbiased"].max() < 0.2
    assert found["norm"][0] / found["norm"][1] > 10


def test_groups_are_rocks_rare_types_of_high_divergence_and_a_random_rest():
    counts = np.array([0, 5, 100, 1, 10, 11, 2, *[50] * 200])
    mean_kl = np.array([9.0, 8.0, 7.0, 9.0, 8.0, 9.0, 0.1, *[0.5] * 200])
    found = choose_types(counts, mean_kl, [2, 0, 100, 999], most=10, seed=0)
    assert found["rock"].tolist() == [2, 100]  # 0 does not occur, 999 is no entry
    assert found["rare"].tolist() == [1, 4]
    assert len(found["random"]) == 100
    assert not set(found["random"]) & {0, 1, 2, 4, 100}
    assert len(choose_types(counts, mean_kl, [2], most=1, seed=0)["rare"]) == 1


def test_as_many_rows_of_each_type_are_drawn():
    ids = np.array([7] * 50 + [3] * 2 + [9] * 30)
    chosen = matched_rows(ids, np.array([7, 3]), 3, seed=0)
    assert [int(chosen[ids == id].sum()) for id in (7, 3, 9)] == [3, 2, 0]
    assert not np.array_equal(chosen, matched_rows(ids, np.array([7, 3]), 3, seed=1))


# The command


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Models, rollouts that were collected, and a rock set of their most frequent types."""
    folder = tmp_path_factory.mktemp("world")
    for name, seed in (("student", 0), ("teacher", 1)):
        save(folder / name, seed=seed, width=32)
    rows = [{"prompt": [{"role": "user", "content": prompt}]} for prompt in PROMPTS]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    models = ["--model_name_or_path", folder / "student", "--teacher_model_name_or_path", folder / "teacher"]
    more = ["--dataset_name", folder / "prompts.jsonl", "--num_generations", 4, "--max_completion_length", 12]
    for name, seed in (("rollouts", 1), ("early", 2)):
        given = [*models, *more, "--output_dir", folder / name, "--seed", seed]
        assert main(["collect", *map(str, given), *CPU]) == 0
    assert (
        main(
            [
                "detect",
                str(folder / "rollouts" / "occurrences.parquet"),
                "--score",
                "aggregate",
                "--top_k",
                "8",
                "--output",
                str(folder / "rock_set.json"),
            ]
        )
        == 0
    )
    return folder


def arguments(world, tmp_path, *more, file="rollouts/occurrences.parquet") -> list[str]:
    models = ["--model_name_or_path", world / "student", "--teacher_model_name_or_path", world / "teacher"]
    given = [world / file, "--rock_set", world / "rock_set.json", *models, "--output", tmp_path / "g.parquet", *more]
    return ["gradients", *map(str, given), *CPU]


@pytest.mark.slow
def test_the_table_is_that_of_autograd_through_whole_models(world, tmp_path, capsys):
    assert main(arguments(world, tmp_path, "--early", world / "early" / "occurrences.parquet")) == 0
    printed = capsys.readouterr().out
    table = pq.read_table(tmp_path / "g.parquet").to_pydict()
    rows = pq.read_table(world / "rollouts" / "occurrences.parquet").to_pydict()
    prompts = pq.read_table(world / "rollouts" / "prompts.parquet").to_pydict()["token_ids"]
    models = [AutoModelForCausalLM.from_pretrained(world / name).double().eval() for name in ("student", "teacher")]
    gradients, ids = [], torch.tensor(rows["token_id"])
    for rollout in range(32):
        completion = [id for id, own in zip(rows["token_id"], rows["rollout"], strict=True) if own == rollout]
        prompt = prompts[rollout // 4]
        with torch.no_grad():
            logits = [model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0] for model in models]
        places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        gradients += [of_autograd(*(one[place] for one in logits)) for place in places]
    nobody = torch.zeros(len(ids), dtype=torch.bool)
    expected = expected_figures(ids, torch.stack(gradients), nobody, table["token_id"])
    for name in (
        "count",
        "norm",
        "norm_unbiased",
        "cos_balanced",
        "cos_global",
        "cos_balanced_without",
        "contribution",
    ):
        found = np.array(table[name], dtype=float)
        np.testing.assert_allclose(found, expected[name], rtol=2e-3, atol=2e-4, err_msg=name)
    assert set(table["group"]) >= {"rock", "random"}
    rocks = RockSet.load(world / "rock_set.json")
    assert [
        id for id, group in zip(table["token_id"], table["group"], strict=True) if group == "rock"
    ] == rocks.ids.tolist()
    assert max(table["matched_count"]) == 3
    assert "rocks" in printed
    assert "Mean KL, early to late (medians; Wilcoxon):" in printed
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")


def test_the_batch_size_changes_nothing(world, tmp_path):
    found = []
    for size in (2, 16):
        assert main(arguments(world, tmp_path, "--per_device_eval_batch_size", size)) == 0
        found.append(pq.read_table(tmp_path / "g.parquet").to_pydict())
    for name in ("token_id", "matched_count"):
        assert found[0][name] == found[1][name]
    for name in ("norm", "norm_matched", "cos_balanced"):
        np.testing.assert_allclose(*[np.array(one[name], float) for one in found], rtol=1e-3, atol=1e-5)


def test_what_cannot_be_is_a_sentence(world, tmp_path, capsys):
    content = json.loads((world / "rock_set.json").read_text())
    present = set(pq.read_table(world / "rollouts" / "occurrences.parquet")["token_id"].to_pylist())
    absent = next(id for id in range(3, 300) if id not in present)
    content["rocks"], content["controls"] = [{**content["rocks"][0], "id": absent, "text": None}], None
    (tmp_path / "absent.json").write_text(json.dumps(content))
    table = pq.read_table(world / "rollouts" / "occurrences.parquet")
    (tmp_path / "cut").mkdir()
    pq.write_table(table.slice(1), tmp_path / "cut" / "occurrences.parquet")
    (tmp_path / "cut" / "prompts.parquet").write_bytes((world / "rollouts" / "prompts.parquet").read_bytes())
    pq.write_table(table, tmp_path / "occurrences.parquet")
    (tmp_path / "broken").mkdir()
    pq.write_table(table, tmp_path / "broken" / "occurrences.parquet")
    (tmp_path / "broken" / "prompts.parquet").write_bytes(b"nothing")
    for name, ids in (("outside", [[5000]] * 8), ("texts", ["x"] * 8)):
        (tmp_path / name).mkdir()
        pq.write_table(table, tmp_path / name / "occurrences.parquet")
        pq.write_table(pa.table({"prompt": range(8), "token_ids": ids}), tmp_path / name / "prompts.parquet")
    for more, file, message in (
        ([], tmp_path / "outside" / "occurrences.parquet", "hold ids outside of the 300 that the two models share"),
        ([], tmp_path / "texts" / "occurrences.parquet", "column 'token_ids' must hold lists of whole numbers"),
        (["--rock_set", tmp_path / "absent.json"], "rollouts/occurrences.parquet", "No rock occurs in these rollouts"),
        ([], tmp_path / "cut" / "occurrences.parquet", "Rollout 0 of"),
        ([], tmp_path / "occurrences.parquet", "the gradients need the prompts"),
        ([], tmp_path / "broken" / "occurrences.parquet", "prompts.parquet is not a complete Parquet file"),
        ([], "nowhere.parquet", "There is no file"),
        (["--matched", "0"], "rollouts/occurrences.parquet", "--matched must be a whole number of at least 1"),
        (["--early", "/nowhere.parquet"], "rollouts/occurrences.parquet", "There is no file /nowhere.parquet"),
        (["--output", "/nowhere/g.parquet"], "rollouts/occurrences.parquet", "There is no folder /nowhere"),
    ):
        assert main(arguments(world, tmp_path, *more, file=file)) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("trl-opd gradients: error: ")
        assert message in error
        assert not (tmp_path / "g.parquet").exists()
    with pytest.raises(SystemExit) as caught:
        main(["gradients", "o.parquet", *CPU])
    assert caught.value.code == 2


def test_the_help_lists_every_option_with_its_default():
    import dataclasses

    from trl_opd.cli.gradients import HELP, GradientArguments

    for option in dataclasses.fields(GradientArguments):
        row = next(line for line in HELP.splitlines() if line.startswith(f"  --{option.name} "))
        assert f" {'none' if option.default is None else option.default} " in row
