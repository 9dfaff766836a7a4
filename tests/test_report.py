"""A folder -> its report: parts show what the files say, a part without data is left out, and bad files are told."""

import json
import random
import re
import resource
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig

from trl_opd import AccuracyCallback, OPDTrainer, RockSet, RolloutSamples, TokenStats
from trl_opd.cli import main
from trl_opd.families import family_of
from trl_opd.occurrences import PROMPT_SCHEMA, Occurrences
from trl_opd.report import rollouts as shown_rollouts
from trl_opd.report.blocks import Facts, Note, Plot, Rollouts, Section, Table
from trl_opd.report.build import rollouts, write_report
from trl_opd.report.contents import read_contents
from trl_opd.report.evidence_section import evidence, read_gradients
from trl_opd.report.rock_section import find_types, rocks
from trl_opd.report.run_section import training, what_was_run
from trl_opd.report.token_types import kind_means, of_windows
from trl_opd.rock_set import Controls
from trl_opd.rollout_file import FILE_NAME, write_part

from .planted import make_world, save_world
from .test_accuracy import Seen, problems
from .test_laws import rock_file
from .test_rollout_samples import Stop
from .tiny import make_config, make_dataset, make_model

ROCKS, CONTROLS = list(range(60, 160)), list(range(200, 240))
ALL_PARTS = ["What was run", "Training", "Rocks", "Rollouts"]


@pytest.fixture(scope="module")
def run_folder(tokenizer, tmp_path_factory):
    """The output folder of a run with a LoRA student, frozen rocks, rollouts, accuracies and statistics."""
    folder = tmp_path_factory.mktemp("run")
    rock_set = rock_file(folder / "rocks.json", ROCKS, controls=Controls(CONTROLS, 1.0, True))
    settings = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2, "num_generations": 2}
    trainer = OPDTrainer(
        model=make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(folder / "run", token_weighting="rock", rock_set=rock_set, **settings),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        callbacks=[RolloutSamples(3), AccuracyCallback(problems(5), Seen(), eval_steps=4)],
        peft_config=LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    trainer.train()
    trainer.save_model()
    return folder / "run"


@pytest.fixture
def copy(run_folder, tmp_path):
    """A copy of that folder, to break or to empty."""
    return shutil.copytree(run_folder, tmp_path / "run")


@pytest.fixture(scope="module")
def collection(tokenizer, tmp_path_factory):
    """A folder as `trl-opd collect` leaves it, of a planted world, with prompts and a rock set chosen by `detect`."""
    folder = tmp_path_factory.mktemp("collection")
    save_world(make_world(0, vocab=300), folder / "occurrences.parquet", student="s")
    ids = [[60, 61, place] for place in range(1000)]
    columns = [pa.array(range(1000), pa.int32()), pa.array(ids, PROMPT_SCHEMA.field(1).type), pa.array(range(1000))]
    pq.write_table(pa.Table.from_arrays(columns, schema=PROMPT_SCHEMA), folder / "prompts.parquet")
    settings = ["--top_k", "20"]
    flags = ["detect", str(folder / "occurrences.parquet"), "--output", str(folder / "rock_set.json"), *settings]
    assert main(flags) == 0
    return folder


def of_kind(section: Section, kind: type) -> list:
    return [block for block in section.blocks if isinstance(block, kind)]


def table(section: Section, place: int = 0) -> list[dict]:
    found = of_kind(section, Table)[place]
    return [dict(zip(found.columns, row, strict=True)) for row in found.rows]


def labels(section: Section) -> str:
    return "\n".join(plot.label for plot in of_kind(section, Plot))


# What a run left


def test_a_run_has_every_part_that_it_has_data_for(run_folder, tmp_path):
    assert write_report(run_folder, tmp_path / "page.html") == ALL_PARTS
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    for part in ("run", "training", "rocks", "rollouts"):
        assert f'<section id="{part}"' in text
    assert 'id="evidence"' not in text
    assert len(text) < 5 * 2**20
    assert not re.search(r'(?:src|href)="(?!#|data:,)', text), "nothing is requested from anywhere"


def test_what_was_run_is_what_the_record_says(run_folder):
    record = json.loads((run_folder / "opd_run.json").read_text())
    facts = dict(of_kind(what_was_run(read_contents(run_folder)), Facts)[0].rows)
    assert facts["command"] == record["command"]
    assert "LORA of rank 4" in facts["student"]
    assert facts["steps"] == "8 of 8"
    assert facts["seed"] == "7"
    assert facts["divergence"] == "KL(student ‖ teacher)"
    assert "token_weighting rock" in facts["other settings"]
    assert f"torch {torch.__version__}" in facts["versions"]


def test_the_phases_are_means_over_the_log(run_folder):
    contents = read_contents(run_folder)
    seconds = [line["phase/generate_s"] for line in contents.main_run.log if "phase/generate_s" in line]
    assert f"generate {sum(seconds) / len(seconds):.3g} s" in labels(what_was_run(contents))


def test_training_has_a_plot_for_each_figure_and_accuracy_as_it_ended(run_folder):
    contents = read_contents(run_folder)
    text = labels(training(contents))
    last = [line["eval_accuracy"] for line in contents.main_run.log if "eval_accuracy" in line][-1]
    assert f"Accuracy over steps; at the end: rock {last:.3f}" in text
    for what in (
        "of rocks, controls and the rest",
        "Entropy",
        "Length",
        "cut at the length limit",
        "Repetition",
        "Padding",
    ):
        assert what in text


def test_a_step_that_was_done_again_counts_once(copy):
    record = json.loads((copy / "opd_run.json").read_text())
    record["log"] = [{"step": 2, "kl/mean": 9.0}, {"step": 4, "kl/mean": 1.0}, {"step": 2, "kl/mean": 2.0}]
    (copy / "opd_run.json").write_text(json.dumps(record))
    assert read_contents(copy).main_run.curve("kl/mean") == [(2, 2.0), (4, 1.0)]


def test_the_table_of_rocks_is_the_rock_set(run_folder, tokenizer):
    contents, rock_set = read_contents(run_folder), RockSet.load(run_folder)
    rows = table(rocks(contents))
    assert [(row["rank"], row["id"], row["count"], row["mean KL"]) for row in rows] == [
        (rank, rock.id, rock.count, rock.mean_kl) for rank, rock in enumerate(rock_set.rocks, 1)
    ]
    assert [row["token"] for row in rows] == [tokenizer.decode([id]) for id in ROCKS]
    assert of_kind(rocks(contents), Table)[0].tool


def test_types_are_those_of_the_last_quarter_and_before_of_the_first_window(run_folder):
    contents = read_contents(run_folder)
    windows = [TokenStats.load(run_folder / f"checkpoint-{step}") for step in (2, 4, 6, 8)]
    types = find_types(contents)
    np.testing.assert_array_equal(types.count, windows[3].seen.numpy())
    np.testing.assert_array_equal(types.mean_kl, windows[3].mean_kl.numpy())
    np.testing.assert_array_equal(types.before, windows[0].mean_kl.numpy())
    assert (types.of, types.of_before) == ("the rollouts of steps 7 to 8", "those of steps 1 to 2")
    only = of_windows([(8, run_folder / "checkpoint-8" / "token_stats.safetensors")])
    assert only.before is None


def test_coverage_and_families_are_shares_of_the_whole(run_folder):
    contents = read_contents(run_folder)
    types = find_types(contents)
    mass = np.sort(types.mass)[::-1]
    sweep = types.coverage(7)
    expected = [mass[:cutoff].sum() / mass.sum() for cutoff in sweep.cutoffs]
    np.testing.assert_allclose(sweep.coverage, expected)
    assert sweep.coverage[-1] == pytest.approx(1.0)
    families = types.families(contents.names.text_of)
    assert sum(tokens for tokens, _ in families.values()) == pytest.approx(1.0)
    assert sum(kl for _, kl in families.values()) == pytest.approx(1.0)
    digits = [id for id in range(300) if family_of(contents.names.text_of(id)) == "digit"]
    assert families["digit"][0] == pytest.approx(types.count[digits].sum() / types.count.sum())


def test_the_divergence_by_kind_comes_from_windows_where_the_log_has_none(copy):
    record = json.loads((copy / "opd_run.json").read_text())
    record["log"] = [{name: v for name, v in line.items() if "mean_kl" not in name} for line in record["log"]]
    (copy / "opd_run.json").write_text(json.dumps(record))
    contents = read_contents(copy)
    assert "of rocks, controls and the rest" in labels(training(contents))
    points = kind_means(contents.main_run.windows, ROCKS, CONTROLS)
    assert [step for step, *_ in points] == [2, 4, 6, 8]
    stats = TokenStats.load(copy / "checkpoint-8")
    measured = (stats.count > 0).double() * stats.seen
    mean = stats.mean_kl.nan_to_num(0.0)
    assert points[-1][1] == pytest.approx(float((mean * measured)[ROCKS].sum() / measured[ROCKS].sum()))


def test_rollouts_are_the_rows_of_the_file(run_folder, tokenizer):
    (block,) = of_kind(rollouts(read_contents(run_folder)), Rollouts)
    rows = pq.read_table(run_folder / FILE_NAME).to_pylist()
    assert [(one.step, one.rollout) for one in block.rollouts] == sorted(
        {(row["step"], row["rollout"]) for row in rows}
    )
    assert block.rocks == frozenset(ROCKS)
    for one in block.rollouts:
        mine = [row for row in rows if (row["step"], row["rollout"]) == (one.step, one.rollout)]
        assert one.token_ids.tolist() == [row["token_id"] for row in mine]
        for name in ("kl", "kl_pre", "entropy", "weight", "student_p", "teacher_p"):
            np.testing.assert_allclose(getattr(one, name), [row[name] for row in mine], rtol=1e-6)
        assert one.teacher_top[0].tolist() == [row["teacher_top_ids"] for row in mine]
        assert one.prompt.startswith("<|start|>user\n")
        assert all(block.texts[id] == tokenizer.decode([id]) for id in one.token_ids.tolist())


def test_a_run_that_was_killed_shows_its_parts(tokenizer, tmp_path):
    trainer = OPDTrainer(
        model=make_model(seed=0),
        teacher_model=make_model(seed=1),
        args=make_config(tmp_path, max_steps=6, save_strategy="steps", save_steps=2),
        train_dataset=make_dataset(),
        processing_class=tokenizer,
        callbacks=[RolloutSamples(1), Stop(5)],
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    parts = write_report(tmp_path, tmp_path / "report.html")
    assert parts == ["What was run", "Training", "Token types", "Rollouts"]
    (block,) = of_kind(rollouts(read_contents(tmp_path)), Rollouts)
    assert [one.step for one in block.rollouts] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("gone", "left"),
    [
        (FILE_NAME, ["What was run", "Training", "Rocks"]),
        ("rock_set.json", ["What was run", "Training", "Token types", "Rollouts"]),
        ("opd_run.json", ["Rocks"]),
    ],
)
def test_a_part_without_data_is_left_out(copy, gone, left):
    (copy / gone).unlink()
    assert write_report(copy, copy / "report.html") == left


def make_samples(folder, steps: int, rollouts_of_step: int, tokens: int) -> None:
    """Write a file of sampled rollouts, a part for each step."""
    rng = np.random.default_rng(0)
    count = rollouts_of_step * tokens
    for step in range(1, steps + 1):
        columns = {
            name: rng.random(count, dtype=np.float32) for name in ("kl", "entropy", "weight", "student_p", "teacher_p")
        }
        columns |= {"kl_pre": np.full(count, np.nan, np.float32), "step": np.full(count, step)}
        columns |= {
            "rollout": np.repeat(np.arange(rollouts_of_step), tokens),
            "position": np.tile(np.arange(tokens), rollouts_of_step),
        }
        columns |= {"prompt": columns["rollout"], "token_id": rng.integers(0, 300, count)}
        for who in ("student", "teacher"):
            columns[f"{who}_top_ids"] = rng.integers(0, 300, (count, 5))
            columns[f"{who}_top_p"] = rng.random((count, 5), dtype=np.float32)
        write_part(folder, step, columns, {"prompts": {}})


def test_of_many_rollouts_some_are_shown_the_first_and_the_last_step_among_them_and_it_says_so(copy):
    (copy / FILE_NAME).unlink()
    make_samples(copy, steps=40, rollouts_of_step=9, tokens=30)
    section = rollouts(read_contents(copy))
    (block,) = of_kind(section, Rollouts)
    steps = sorted({one.step for one in block.rollouts})
    assert (steps[0], steps[-1], len(steps)) == (1, 40, shown_rollouts.MOST_STEPS)
    assert f"A sample: {len(block.rollouts)} of 360 rollouts of 12 of 40 steps" in of_kind(section, Note)[0].text
    assert sum(len(one.token_ids) for one in block.rollouts) <= shown_rollouts.MOST_TOKENS


def test_of_a_long_rollout_the_beginning_is_shown_and_it_says_so(copy):
    (copy / FILE_NAME).unlink()
    make_samples(copy, steps=1, rollouts_of_step=2, tokens=1000)
    section = rollouts(read_contents(copy))
    (block,) = of_kind(section, Rollouts)
    assert [len(one.token_ids) for one in block.rollouts] == [shown_rollouts.MOST_OF_ONE] * 2
    assert "Of 2 only the first 600 tokens are shown." in of_kind(section, Note)[0].text


# Arms


def test_arms_are_told_apart_and_compared(run_folder, tmp_path):
    for arm in ("uniform", "rock"):
        shutil.copytree(run_folder, tmp_path / arm)
    shutil.copy(run_folder / "rock_set.json", tmp_path)
    arm = {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "seconds": 1.0, "steps": 8, "frozen_token_share": 0.25}
    summary = {
        "version": 1,
        "task": "sums",
        "eval_problems": 500,
        "start": {"accuracy": 0.125},
        "teacher": {"accuracy": 1.0},
        "arms": {"uniform": arm | {"accuracy": 0.75}, "rock": arm},
        "differences": {"rock": {"estimate": -0.25, "ci95": None, "over": "problems"}},
        "rocks": {},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert write_report(tmp_path, tmp_path / "report.html") == [*ALL_PARTS, "Evidence"]
    contents = read_contents(tmp_path)
    assert list(contents.runs) == ["uniform", "rock"]
    first, second = table(evidence(contents))
    assert (first["arm"], first["accuracy"], first["difference to uniform"]) == ("uniform", 0.75, None)
    assert (second["arm"], second["difference to uniform"], second["from "], second["tokens frozen"]) == (
        "rock",
        -0.25,
        None,
        0.25,
    )
    assert "student at the start 0.125" in of_kind(what_was_run(contents), Note)[0].text
    assert len(of_kind(rollouts(contents), Rollouts)) == 2


# Collections and evidence


def test_a_collection_shows_its_types_rocks_sweep_and_rollouts(collection, tmp_path):
    contents = read_contents(collection)
    assert write_report(collection, tmp_path / "page.html") == ["What was run", "Rocks", "Rollouts"]
    rows = pq.read_table(collection / "occurrences.parquet").to_pandas()
    types, means = find_types(contents), rows.groupby("token_id")[["kl", "kl_pre"]].mean()
    np.testing.assert_allclose(types.mean_kl[means.index], means["kl"], rtol=1e-5)
    np.testing.assert_allclose(types.before[means.index], means["kl_pre"], rtol=1e-5)
    np.testing.assert_array_equal(types.count[means.index], rows.groupby("token_id").size())
    (block,) = of_kind(rollouts(contents), Rollouts)
    for one in block.rollouts:
        mine = rows[rows["rollout"] == one.rollout]
        assert one.token_ids.tolist() == mine["token_id"].tolist()
        np.testing.assert_allclose(one.kl, mine["kl"])
    assert "No tokenizer of these ids" in of_kind(rollouts(contents), Note)[-1].text


def test_the_sweep_is_the_one_that_chose_the_cutoff_else_coverage_alone(collection, tmp_path):
    notes = " ".join(plot.note for plot in of_kind(rocks(read_contents(collection)), Plot))
    assert "How stable the list is was not measured" in notes
    shutil.copytree(collection, tmp_path / "c")
    content = json.loads((tmp_path / "c" / "rock_set.json").read_text())
    content["method"]["sweep"] = {"cutoffs": [10, 20], "coverage": [0.25, 0.5], "stability": {"50": [0.875, 0.75]}}
    (tmp_path / "c" / "rock_set.json").write_text(json.dumps(content))
    plots = of_kind(rocks(read_contents(tmp_path / "c")), Plot)
    assert any("overlap (Jaccard) of 50 rollouts" in plot.svg for plot in plots)
    content["method"]["sweep"]["coverage"] = [0.25]
    (tmp_path / "c" / "rock_set.json").write_text(json.dumps(content))
    assert not any("overlap (Jaccard)" in plot.svg for plot in of_kind(rocks(read_contents(tmp_path / "c")), Plot))


def test_a_collection_with_its_tokenizer_has_names_and_prompts(collection, tokenizer, tmp_path):
    from trl_opd.vocabulary import fingerprint

    shutil.copytree(collection, tmp_path / "c")
    tokenizer.save_pretrained(tmp_path / "c")
    section = {"name": None, "vocab_size": 300, "fingerprint": fingerprint(tokenizer)}
    save_world(make_world(0, vocab=300), tmp_path / "c" / "occurrences.parquet", tokenizer=section)
    (block,) = of_kind(rollouts(read_contents(tmp_path / "c")), Rollouts)
    assert block.rollouts[0].prompt == tokenizer.decode([60, 61, 0])
    assert block.texts[int(block.rollouts[0].token_ids[0])] == tokenizer.decode([int(block.rollouts[0].token_ids[0])])
    section["fingerprint"] = "sha256:another"
    save_world(make_world(0, vocab=300), tmp_path / "c" / "occurrences.parquet", tokenizer=section)
    assert not read_contents(tmp_path / "c").names.complete


def knockout() -> dict:
    arm = {
        "kind": "rock",
        "ids": [60],
        "texts": ["So"],
        "effect": -0.25,
        "ci95": [-0.3, -0.2],
        "better": 1,
        "worse": 26,
    }
    arm |= {
        "arm": "token 60",
        "p": 0.001,
        "p_bh": 0.002,
        "p_holm": 0.003,
        "label": "pillar",
        "label_as_published": "pillar",
    }
    return {
        "format": "trl_opd.knockout",
        "version": 1,
        "problems": 100,
        "discordance": 0.05,
        "minimal_effect": 0.1,
        "baseline": {"reward": 0.5, "ci95": None},
        "rocks_against_controls": {"p": None, "rocks": 1, "controls": 0},
        "arms": [
            arm,
            arm
            | {"kind": "rocks", "ids": [60, 61], "texts": ["So", "Now"]}
            | dict.fromkeys(("p_bh", "p_holm", "label")),
        ],
    }


def gradients() -> pa.Table:
    names = ("norm", "norm_unbiased", "norm_matched", "cos_balanced", "cos_balanced_without", "cos_matched", "mean_kl")
    columns = {"token_id": pa.array([1, 2, 3, 4], pa.int32()), "group": pa.array(["rock", "rock", "rare", "random"])}
    columns |= {"count": pa.array([10, 20, 3, 5], pa.int64())}
    return pa.table(columns | {name: pa.array([0.1, 0.3, None, 0.5], pa.float64()) for name in names})


def test_evidence_is_what_probe_and_gradients_found(copy):
    (copy / "knockout.json").write_text(json.dumps(knockout()))
    pq.write_table(gradients(), copy / "gradients.parquet")
    contents = read_contents(copy)
    section = evidence(contents)
    effects, medians = table(section, 0), table(section, 1)
    assert [(row["token"], row["effect"], row["p (BH)"], row["label"]) for row in effects] == [
        ("So", -0.25, 0.002, "pillar"),
        ("all rocks", -0.25, None, None),
    ]
    assert (medians[0]["types"], medians[0]["number"], medians[0]["norm"]) == ("rocks", 2, 0.2)
    assert medians[1]["norm"] is None
    facts = dict(of_kind(section, Facts)[0].rows)
    assert facts["do rocks differ from mass-matched controls?"].startswith("not tested")
    assert facts["baseline"] == "mean reward 0.500 (no interval) on 100 problems"
    assert [row["role"] for row in table(rocks(contents))][:2] == ["pillar", None]


def test_what_probe_and_gradients_really_write_can_be_read(tmp_path):
    from trl_opd.gradient_study import Study, write_table

    class Names:
        def decode(self, ids):
            return str(ids[0])

    names = ("norm", "norm_unbiased", "norm_matched", "cos_balanced", "cos_balanced_without", "cos_matched", "mean_kl")
    columns = {"token_id": np.array([1, 2]), "group": np.array(["rock", "rare"]), "count": np.array([5.0, 3.0])}
    columns |= {"matched_count": np.array([3.0, 3.0]), "mean_kl_early": np.array([1.0, np.nan])}
    write_table(
        Study(columns | {name: np.array([0.5, np.nan]) for name in names}, 3, True), Names(), tmp_path / "g.parquet"
    )
    found = read_gradients(tmp_path / "g.parquet")
    assert found.has_early
    assert found.of("rock", "norm").tolist() == [0.5]


# Wrong input


def break_file(folder, name: str, how) -> None:
    path = folder / name
    if callable(how):
        content = json.loads(path.read_text())
        how(content)
        how = json.dumps(content)
    path.write_bytes(how if isinstance(how, bytes) else how.encode())


def cut(folder, name: str) -> None:
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])


CASES = {
    "cut samples": (lambda folder: cut(folder, FILE_NAME), "rollout_samples.parquet is not a whole Parquet file"),
    "cut statistics": (lambda folder: cut(folder, "checkpoint-8/token_stats.safetensors"), "not token statistics"),
    "cut record": (lambda folder: cut(folder, "opd_run.json"), "opd_run.json: not the record of a run"),
    "empty record": (lambda folder: break_file(folder, "opd_run.json", ""), "not the record of a run"),
    "newer record": (
        lambda folder: break_file(folder, "opd_run.json", lambda content: content.update(version=2)),
        "version 2, this trl_opd reads version 1: upgrade it",
    ),
    "foreign record": (lambda folder: break_file(folder, "opd_run.json", "[]"), 'its "format" is not "trl_opd.run"'),
    "log without steps": (
        lambda folder: break_file(folder, "opd_run.json", lambda content: content.update(log=[{"loss": 1.0}])),
        '"log[0].step" is missing',
    ),
    "NaN": (
        lambda folder: break_file(folder, "opd_run.json", '{"format": "trl_opd.run", "version": 1, "a": NaN}'),
        "NaN",
    ),
    "deep": (lambda folder: break_file(folder, "opd_run.json", "[" * 100_000), "nested too deeply"),
    "newer rocks": (
        lambda folder: break_file(folder, "rock_set.json", lambda content: content.update(version=7)),
        "version 7",
    ),
    "knockout of others": (lambda folder: break_file(folder, "knockout.json", "{}"), "not the result of a probe"),
    "gradients of others": (
        lambda folder: pq.write_table(pa.table({"a": [1]}), folder / "gradients.parquet"),
        "gradients.parquet: not a table of `trl-opd gradients`: there must be one column 'count'",
    ),
    "samples of others": (
        lambda folder: pq.write_table(pa.table({"step": [1], "rollout": [0]}), folder / FILE_NAME),
        "there must be one column 'position'",
    ),
    "latin text": (lambda folder: break_file(folder, "opd_run.json", b'{"format": "\xe9"}'), "not the record of a run"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_is_none_is_one_sentence_and_the_old_report_stays(copy, capsys, case):
    (copy / "report.html").write_text("old")
    damage, sentence = CASES[case]
    damage(copy)
    assert main(["report", str(copy)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("trl-opd report: error: ")
    assert sentence in error
    assert (copy / "report.html").read_text() == "old"
    assert not list(copy.glob("*.part")) + list(copy.glob(".*.part"))


def test_a_folder_of_nothing_and_an_output_of_nowhere_are_one_sentence(run_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    for flags, sentence in (
        ([tmp_path / "nowhere"], "There is no folder"),
        ([tmp_path / "empty"], "holds nothing to report"),
        ([tmp_path / "foreign"], "holds nothing to report"),
        ([run_folder, "--output", tmp_path / "nowhere" / "a.html"], "There is no folder"),
        ([run_folder, "--output", tmp_path], "is a folder: name a file"),
        ([run_folder, "--output", ""], "--output takes a path"),
    ):
        assert main(["report", *map(str, flags)]) == 1
        assert sentence in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main(["report"])
    assert stopped.value.code == 2


def test_the_command_says_what_it_wrote_and_where(run_folder, tmp_path, capsys):
    assert main(["report", str(run_folder), "--output", str(tmp_path / "page.html")]) == 0
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert line.startswith("What was run, Training, Rocks, Rollouts: the report is in")
    assert str(tmp_path / "page.html") in line
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_hostile_tokens_reach_the_page_as_text_only(copy, tokenizer):
    content = json.loads((copy / "rock_set.json").read_text())
    hostile = [
        "</script><script>alert(1)</script>",
        "\u202e\u2066",
        "\ud800",
        "\x00\x1b[31m",
        "x" * 100_000,
        "<img src=x onerror=y>",
    ]
    for rock, text in zip(content["rocks"], hostile, strict=False):
        rock["text"] = text
    (copy / "rock_set.json").write_text(json.dumps(content))
    write_report(copy, copy / "report.html")
    text = (copy / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<img" not in text
    assert not {"\u202e", "\u2066", "\x00", "\x1b"} & set(text)
    assert "x" * 1000 not in text
    assert "alert(1)" in text


def mutate(data: bytes, name: str, draw: random.Random) -> bytes:
    """Return a damaged copy of a file's bytes."""
    kind = draw.randrange(4)
    if name.endswith(".json") and kind < 2:
        content = json.loads(data)
        places = [(content, key) for key in content]
        for holder in (content.get("log"), content.get("rocks"), content.get("arms")):
            places += [(line, key) for line in holder or [] if isinstance(line, dict) for key in line]
        holder, key = draw.choice(places)
        holder[key] = draw.choice([None, -1, 1e999, "x", [], {}, True, 2**70, "\ud800", [[1]], {"a": None}])
        return json.dumps(content).encode("utf-8", "surrogatepass")
    if kind == 2:
        return data[: draw.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def read_everything(folder) -> None:
    """Read what a report reads, without drawing it."""
    contents = read_contents(folder)
    find_types(contents)
    rollouts(contents)
    if contents.gradients is not None:
        read_gradients(contents.gradients)


def test_two_hundred_damaged_files_are_read_or_told(copy, tmp_path):
    (copy / "knockout.json").write_text(json.dumps(knockout()))
    pq.write_table(gradients(), copy / "gradients.parquet")
    for step in (2, 4, 6):
        shutil.rmtree(copy / f"checkpoint-{step}")
    names = ["opd_run.json", "rock_set.json", "knockout.json", "gradients.parquet", FILE_NAME]
    names += ["checkpoint-8/token_stats.safetensors"]
    draw, told, before = random.Random(7), 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in range(200):
        name = draw.choice(names)
        data = (copy / name).read_bytes()
        (copy / name).write_bytes(mutate(data, name, draw))
        try:
            if place % 25:
                read_everything(copy)
            else:
                write_report(copy, tmp_path / "page.html")
        except (ValueError, OSError):
            told += 1
        finally:
            (copy / name).write_bytes(data)
    assert 40 < told < 200
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # kB: a GB


def test_the_occurrences_of_a_collection_are_checked(collection, tmp_path, capsys):
    shutil.copytree(collection, tmp_path / "c")
    found = pq.read_table(tmp_path / "c" / "occurrences.parquet")
    column = found.schema.names.index("kl")
    broken = found.set_column(column, found.schema.field(column), pa.array([float("nan")] * len(found), pa.float32()))
    pq.write_table(broken, tmp_path / "c" / "occurrences.parquet")
    assert Occurrences(tmp_path / "c" / "occurrences.parquet").rows == len(found)
    assert main(["report", str(tmp_path / "c")]) == 1
    assert "a divergence is finite and at least 0" in capsys.readouterr().err
