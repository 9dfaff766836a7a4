"""A folder -> its report: parts show what the files say, a part without data is left out, and bad files are told."""

import json
import random
import re
import resource
import shutil
import time
import tracemalloc
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import LoraConfig

from trl_opd import AccuracyCallback, OPDTrainer, RockSet, RolloutSamples, TokenSignals, TokenStats
from trl_opd.artefacts.gradient_table import read_gradients
from trl_opd.artefacts.occurrences import PROMPT_SCHEMA, Occurrences, write_occurrences
from trl_opd.artefacts.run_files import ROLLOUT_SAMPLES_FILE as FILE_NAME
from trl_opd.artefacts.sampled_rollouts import join_parts, keep_up_to, write_part
from trl_opd.cli import main
from trl_opd.report.blocks import Facts, Note, Plot, Rollouts, Section, Table
from trl_opd.report.build import write_report
from trl_opd.report.contents import read_contents
from trl_opd.report.sections import rollouts as shown_rollouts
from trl_opd.report.sections.evidence import MOST_ARMS, arm_results, evidence
from trl_opd.report.sections.rocks import MOST_ROCKS, find_types, rocks
from trl_opd.report.sections.rollouts import rollouts
from trl_opd.report.sections.run import run_facts, training, what_was_run
from trl_opd.report.token_types import TokenTypes, kind_means, types_of_last_quarter
from trl_opd.rocks.families import family_of
from trl_opd.rocks.rock_set import Controls

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


class Parsed(HTMLParser):
    """What a page holds: labels of its figures and rows of its tables by section, its articles, its JSON."""

    def __init__(self, path):
        super().__init__()
        self.figures, self.tables, self.articles, self.data = {}, {}, [], []
        self._section = self._tag = self._text = self._is_json = None
        self.feed(Path(path).read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs, self._tag, self._text = dict(attrs), tag, ""
        if tag == "section":
            self._section = attrs["id"]
            self.figures[self._section], self.tables[self._section] = [], []
        elif attrs.get("class") == "plot":
            self.figures[self._section].append(attrs["aria-label"])
        elif tag == "table":
            self.tables[self._section].append([])
        elif tag == "tr":
            self.tables[self._section][-1].append([])
        self._is_json = attrs.get("type") == "application/json"

    def handle_data(self, data):
        self._text = (self._text or "") + data

    def handle_endtag(self, tag):
        if tag in ("th", "td"):
            self.tables[self._section][-1][-1].append(self._text)
        elif tag in ("h3", "h4") and self._text.startswith("Rollout "):
            self.articles.append(int(self._text.removeprefix("Rollout ")))
        elif tag == "script" and self._is_json:
            self.data += json.loads(self._text)["rollouts"]


@pytest.fixture(scope="module")
def page(run_folder, tmp_path_factory):
    """The page of that run, parsed."""
    path = tmp_path_factory.mktemp("page") / "page.html"
    write_report(run_folder, path)
    return Parsed(path)


# What a run left


def test_the_page_of_a_run_has_these_figures(page, run_folder):
    record = json.loads((run_folder / "opd_run.json").read_text())
    accuracy = [line["eval_accuracy"] for line in record["log"] if "eval_accuracy" in line][-1]
    starts = {
        "run": ["Mean seconds of an optimizer step by phase. rock: "],
        "training": [
            "Mean KL(student ‖ teacher) of rocks, controls and the rest over steps",
            f"Accuracy over steps; at the end: rock {accuracy:.3f}",
            "Entropy",
            "Length",
            "Completions cut",
            "Repetition",
            "Padding",
        ],
        "rocks": ["Mean KL over count of ", "Mean KL of each type after over before", "Share of the", "Families"],
        "rollouts": [],
    }
    assert page.figures.keys() == starts.keys()
    for part, found in page.figures.items():
        assert len(found) == len(starts[part])
        assert all(label.startswith(start) for label, start in zip(found, starts[part], strict=True))


def test_the_rows_of_the_page_are_the_rock_set(page, run_folder, tokenizer):
    (rows,) = page.tables["rocks"]
    assert rows[0] == ["rank", "token", "id", "family", "count", "mean KL", "score"]
    for rank, (row, rock) in enumerate(zip(rows[1:], RockSet.load(run_folder).rocks, strict=True), 1):
        family = family_of(tokenizer.decode([rock.id]))
        assert [row[0], *row[2:]] == [str(rank), str(rock.id), family, str(rock.count), f"{rock.mean_kl:.4f}", "10"]


def test_the_figures_of_tokens_in_the_page_are_the_rows_of_the_file(page, run_folder):
    rows = pq.read_table(run_folder / FILE_NAME).to_pandas()
    groups = list(rows.groupby(["step", "rollout"]))
    assert page.articles == [rollout for (_, rollout), _ in groups]
    for found, (_, mine) in zip(page.data, groups, strict=True):
        assert found["id"] == mine["token_id"].tolist()
        for name in ("kl", "kl_pre", "entropy", "weight", "student_p", "teacher_p"):
            np.testing.assert_allclose(found[name], mine[name], rtol=1e-3)
        assert found["student_top_id"] == np.concatenate(mine["student_top_ids"].to_list()).tolist()
        np.testing.assert_allclose(found["teacher_top_p"], np.concatenate(mine["teacher_top_p"].to_list()), rtol=1e-3)


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


def test_of_an_accuracy_that_was_measured_again_the_last_counts(copy):
    record = json.loads((copy / "opd_run.json").read_text())
    record["log"] += [{"step": 8, "eval_accuracy": 0.125}]
    (copy / "opd_run.json").write_text(json.dumps(record))
    contents = read_contents(copy)
    assert "at the end: rock 0.125" in labels(training(contents))
    assert [step for step, _ in contents.main_run.curve("eval_accuracy")] == [0, 4, 8]


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
    assert (types.source, types.before_source) == ("the rollouts of steps 7 to 8", "those of steps 1 to 2")
    only = types_of_last_quarter([(8, run_folder / "checkpoint-8" / "token_stats.safetensors")])
    assert only.before is None


def make_window(folder: Path, step: int, sums: dict[int, tuple[int, float]], frozen=(), measure="reverse_kl") -> None:
    """Write statistics: of each token how often it was measured, and its divergence each time; frozen ones were not."""
    ids = torch.tensor([*(id for id, (count, _) in sums.items() for _ in range(count)), *frozen])
    kl = torch.tensor([*(kl for count, kl in sums.values() for _ in range(count)), *[float("nan")] * len(frozen)])
    stats = TokenStats(10, {"divergence": measure})
    stats.update(TokenSignals(ids, kl, torch.ones(len(ids)), torch.ones(len(ids))))
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    stats.save(folder / f"checkpoint-{step}" / "token_stats.safetensors")


def test_the_last_quarter_is_the_sum_of_its_windows(copy):
    shutil.rmtree(copy / "checkpoint-2")
    windows = {
        4: {0: (1, 8.0), 1: (2, 4.0)},
        6: {0: (1, 9.0)},
        10: {0: (1, 2.0), 3: (5, 0.5)},
        12: {0: (3, 4.0), 2: (1, 2.0)},
    }
    for step, sums in windows.items():
        make_window(copy, step, sums, frozen=[2, 2] if step == 12 else [])
    shutil.rmtree(copy / "checkpoint-8")
    types = find_types(read_contents(copy))
    assert types.count.tolist() == [4, 0, 3, 5, 0, 0, 0, 0, 0, 0]
    assert (types.mean_kl[0], types.mean_kl[2], types.mean_kl[3]) == (14.0 / 4, 2.0, 0.5)
    assert (types.before[0], types.before[1]) == (8.0, 4.0)
    assert (types.source, types.before_source) == ("the rollouts of steps 7 to 12", "those of steps 1 to 4")
    points = kind_means(read_contents(copy).main_run.windows, [0, 2], [3])
    assert points == [(4, 8.0, None, 4.0), (6, 9.0, None, None), (10, 2.0, 0.5, None), (12, 3.0, None, None)]


@pytest.mark.parametrize("step", [2, 7])
def test_windows_of_another_divergence_or_vocabulary_are_told_by_their_file(copy, step):
    for at in (2, 4, 6, 8):
        make_window(copy, at, {0: (1, 1.0)})
    make_window(copy, step, {0: (1, 1.0)}, measure="forward_kl")
    with pytest.raises(ValueError, match=f"checkpoint-{step}/token_stats.*divergence is "):
        find_types(read_contents(copy))
    make_window(copy, step, {0: (1, 1.0)})
    TokenStats(11, {"divergence": "reverse_kl"}).save(copy / f"checkpoint-{step}" / "token_stats.safetensors")
    with pytest.raises(ValueError, match=f"checkpoint-{step}/token_stats.* of 11 vocabulary entries"):
        find_types(read_contents(copy))


def test_families_of_a_large_vocabulary_take_no_minute():
    count = np.arange(1, 150_001, dtype=float)
    types = TokenTypes(count, np.ones(len(count)), None, "", "", "reverse_kl")
    start = time.perf_counter()
    families = types.families(lambda id: "7" if id % 2 else "So")
    assert time.perf_counter() - start < 10  # it took a minute while sums were formed again for every type
    largest = count[-20_000:]
    assert families["digit"][1] == pytest.approx(largest[1::2].sum() / count.sum())


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


def test_a_run_that_went_on_from_before_its_first_rollouts_has_none(copy):
    table = pq.read_table(copy / FILE_NAME)
    pq.write_table(table.filter(pa.compute.greater(table["step"], 4)), copy / FILE_NAME)
    keep_up_to(copy, 2)
    assert write_report(copy, copy / "report.html") == ["What was run", "Training", "Rocks"]


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


def test_a_rollout_as_long_as_what_is_shown_is_not_cut(copy):
    (copy / FILE_NAME).unlink()
    make_samples(copy, steps=1, rollouts_of_step=2, tokens=shown_rollouts.MOST_OF_ONE)
    assert not any("only the first" in note.text for note in of_kind(rollouts(read_contents(copy)), Note))


def test_rows_are_found_in_any_row_groups(run_folder, copy):
    expected = of_kind(rollouts(read_contents(run_folder)), Rollouts)[0].rollouts
    pq.write_table(pq.read_table(copy / FILE_NAME), copy / FILE_NAME, row_group_size=5)
    found = of_kind(rollouts(read_contents(copy)), Rollouts)[0].rollouts
    for one, other in zip(found, expected, strict=True):
        assert (one.step, one.rollout, one.prompt) == (other.step, other.rollout, other.prompt)
        np.testing.assert_array_equal(one.token_ids, other.token_ids)
        np.testing.assert_array_equal(one.student_top[0], other.student_top[0])


def test_of_a_rollout_that_lies_far_behind_only_what_is_near_is_read(tmp_path):
    size = 4 * 2**20
    columns = {"rollout": np.repeat([0, 1], size), "position": np.tile(np.arange(size), 2)}
    columns |= {"token_id": np.repeat([5, 6], size), "kl": np.repeat(np.float32([0.5, 1.5]), size)}
    write_occurrences(tmp_path / "o.parquet", columns, {})
    tracemalloc.start()
    shown = shown_rollouts.shown_of_collection(tmp_path / "o.parquet", tmp_path / "none", lambda ids: None).rollouts
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * size  # bytes: a column of its rows is 64 MB
    assert [(one.rollout, set(one.token_ids.tolist()), set(one.kl.tolist())) for one in shown] == [
        (0, {5}, {0.5}),
        (1, {6}, {1.5}),
    ]


# Arms


def test_arms_of_long_rollouts_share_what_a_page_shows(run_folder, tmp_path):
    arms = ("uniform", "rock", "control", "random")
    for arm in arms:
        (tmp_path / arm).mkdir()
        shutil.copy(run_folder / "opd_run.json", tmp_path / arm)
        make_samples(tmp_path / arm, steps=20, rollouts_of_step=2, tokens=1000)
        join_parts(tmp_path / arm)
    section = rollouts(read_contents(tmp_path))
    blocks = of_kind(section, Rollouts)
    assert [{one.step for one in block.rollouts} for block in blocks] == [{1, 7, 14, 20}] * 4
    assert sum(len(one.token_ids) for block in blocks for one in block.rollouts) <= shown_rollouts.MOST_TOKENS
    notes = [note.text for note in of_kind(section, Note)]
    assert notes[0].startswith("Rollouts of the arm uniform. A sample: 4 of 40 rollouts of 4 of 20 steps")
    assert sum("Of 4 only the first 600 tokens" in note for note in notes) == 4


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


def test_arms_are_told_apart_and_compared(run_folder, tmp_path):
    for arm in ("uniform", "rock"):
        shutil.copytree(run_folder, tmp_path / arm)
    shutil.copy(run_folder / "rock_set.json", tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
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
    from trl_opd.artefacts.fingerprint import fingerprint

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


def test_without_a_tokenizer_names_are_those_of_the_rock_set(collection, tmp_path):
    shutil.copytree(collection, tmp_path / "c")
    content = json.loads((tmp_path / "c" / "rock_set.json").read_text())
    for rock in content["rocks"]:
        rock["text"] = f"t{rock['id']}"
    content["controls"]["texts"] = [f"c{id}" for id in content["controls"]["ids"]]
    (tmp_path / "c" / "rock_set.json").write_text(json.dumps(content))
    contents = read_contents(tmp_path / "c")
    section = rocks(contents)
    assert [row["token"] for row in table(section)] == [f"t{row['id']}" for row in table(section)]
    control = content["controls"]["ids"][0]
    others = set(range(300)) - {rock["id"] for rock in content["rocks"]} - {*content["controls"]["ids"]}
    assert contents.names.text_of(control) == f"c{control}"
    assert {contents.names.text_of(id) for id in others} == {None}
    assert of_kind(section, Plot)[-1].note.startswith("Only types whose text the rock set names")


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


def knockout_without(name: str) -> dict:
    content = knockout()
    del content["arms"][0][name]
    return content


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


def test_of_many_rocks_and_knockouts_the_first_and_the_ends_are_listed_and_it_says_so(tmp_path):
    rock_file(tmp_path / "rock_set.json", list(range(MOST_ROCKS + 500)))
    content = knockout()
    content["arms"] = [content["arms"][0] | {"ids": [id], "effect": id * 1e-4} for id in range(MOST_ARMS + 500)]
    (tmp_path / "knockout.json").write_text(json.dumps(content))
    contents = read_contents(tmp_path)
    section = rocks(contents)
    assert [row["id"] for row in table(section)] == list(range(MOST_ROCKS))
    assert of_kind(section, Table)[0].caption.startswith(f"The first {MOST_ROCKS} of {MOST_ROCKS + 500} rocks in rank")
    effects = [row["effect"] for row in table(evidence(contents))]
    assert len(effects) == MOST_ARMS
    assert (effects[0], effects[-1]) == (0.0, pytest.approx((MOST_ARMS + 499) * 1e-4))
    assert of_kind(evidence(contents), Table)[0].caption.endswith(f"{MOST_ARMS // 2} at each end of {MOST_ARMS + 500}")


def test_what_probe_and_gradients_really_write_can_be_read(tmp_path):
    from trl_opd.artefacts.gradient_table import Study, write_table

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
        "gradients.parquet: there must be one column 'count'",
    ),
    "samples of others": (
        lambda folder: pq.write_table(pa.table({"step": [1], "rollout": [0]}), folder / FILE_NAME),
        "there must be one column 'position'",
    ),
    "steps in words": (
        lambda folder: break_file(folder, "opd_run.json", lambda content: content.update(steps=["x"])),
        "opd_run.json: not the record of a run: run.steps is ['x'], not a whole number",
    ),
    "uncountable parameters": (
        lambda folder: break_file(
            folder, "opd_run.json", lambda content: content["student"].update(parameters=10**400)
        ),
        "student.parameters is a number of too many digits",
    ),
    "summary of others": (lambda folder: break_file(folder, "summary.json", "[]"), "not the summary of a demo"),
    "newer summary": (lambda folder: break_file(folder, "summary.json", '{"version": 2}'), "version 2, this trl_opd"),
    "knockout without labels": (
        lambda folder: break_file(folder, "knockout.json", json.dumps(knockout_without("label"))),
        'knockout.json: not the result of a probe: "arms[0].label" is missing',
    ),
    "knockout without intervals": (
        lambda folder: break_file(folder, "knockout.json", json.dumps(knockout_without("ci95"))),
        '"arms[0].ci95" is missing',
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


def changed(table: pa.Table, name: str, values, kind=None) -> pa.Table:
    """Return a table with other values in a column, of another type where one is named."""
    place = table.schema.names.index(name)
    kind = kind or table.schema.field(name).type
    return table.set_column(place, pa.field(name, kind), pa.array(values, kind))


def make_collection(folder: Path) -> None:
    """Write a small collection and its prompts."""
    columns = {
        "rollout": np.repeat(np.arange(9), 4),
        "position": np.tile(np.arange(4), 9),
        "prompt": np.arange(36) // 8,
    }
    columns |= {"token_id": np.arange(36) % 5} | {name: np.linspace(0, 1, 36) for name in ("kl", "kl_pre", "entropy")}
    write_occurrences(folder / "occurrences.parquet", columns, {"student": "s"})
    arrays = [pa.array(range(5), pa.int32()), pa.array([[1, 2]] * 5, PROMPT_SCHEMA.field(1).type), pa.array(range(5))]
    pq.write_table(pa.Table.from_arrays(arrays, schema=PROMPT_SCHEMA), folder / "prompts.parquet")


def first(table: pa.Table, name: str, value) -> pa.Table:
    return changed(table, name, [value, *table[name].to_pylist()[1:]])


def newer(table: pa.Table) -> pa.Table:
    return table.replace_schema_metadata({"trl_opd": '{"version": 99}'})


SAMPLES = {
    "newer": (newer, "has version 99, and this trl_opd reads up to 1: upgrade it"),
    "infinite": (lambda table: first(table, "kl", float("inf")), "row 0 has a kl that is not finite"),
    "infinite top": (
        lambda table: first(table, "teacher_top_p", [float("inf")] * 5),
        "row 0 has a teacher_top_p that is not finite",
    ),
    "null step": (lambda table: first(table, "step", None), "row 0 has no step"),
    "null list": (lambda table: first(table, "student_top_ids", None), "row 0 has no student_top_ids"),
    "null in a list": (
        lambda table: first(table, "student_top_ids", [1, None, 2, 3, 4]),
        "row 0 has no student_top_ids",
    ),
    "huge id": (
        lambda table: first(table, "token_id", 2**31 - 1),
        "row 0 has token_id 2147483647, outside of 0..4194303",
    ),
    "negative step": (lambda table: first(table, "step", -1), "row 0 has step -1, outside of 0..2147483647"),
    "prompts in words": (
        lambda table: changed(table, "prompt", ["a"] * len(table), pa.string()),
        "column 'prompt' holds string, not whole numbers",
    ),
    "two prompts": (lambda table: table.append_column("prompt", table["prompt"]), "there must be one column 'prompt'"),
    "lists of three": (
        lambda table: changed(table, "teacher_top_ids", [[1, 2, 3]] * len(table), pa.list_(pa.int32(), 3)),
        "column 'teacher_top_ids' must be lists of 5",
    ),
    "no entropy": (lambda table: table.drop_columns("entropy"), "there must be one column 'entropy'"),
    "rows apart": (lambda table: table.take([*range(1, len(table)), 0]), "the rows of a rollout do not stand together"),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_samples_that_cannot_be_are_one_sentence(run_folder, tmp_path, capsys, case):
    record = json.loads((run_folder / "opd_run.json").read_text())
    (tmp_path / "opd_run.json").write_text(json.dumps(record | {"log": []}))
    damage, sentence = SAMPLES[case]
    pq.write_table(damage(pq.read_table(run_folder / FILE_NAME)), tmp_path / FILE_NAME)
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{tmp_path / FILE_NAME}" in error
    assert sentence in error
    assert {path.name for path in tmp_path.iterdir()} == {"opd_run.json", FILE_NAME}


COLLECTIONS = {
    "negative position": ("occurrences", lambda table: first(table, "position", -1), "row 0 has position -1"),
    "no kl": ("occurrences", lambda table: first(table, "kl", None), "row 0 has no kl"),
    "newer": ("occurrences", newer, "has version 99"),
    "infinite entropy": ("occurrences", lambda table: first(table, "entropy", float("inf")), "row 0 has a entropy"),
    "prompts of others": (
        "prompts",
        lambda table: table.drop_columns("token_ids"),
        "prompts.parquet: there must be one column 'token_ids'",
    ),
    "prompts in words": (
        "prompts",
        lambda table: changed(table, "prompt", [[1]] * len(table), pa.list_(pa.int32())),
        "column 'prompt' holds list",
    ),
}


@pytest.mark.parametrize("case", COLLECTIONS)
def test_a_collection_that_cannot_be_is_one_sentence(tmp_path, capsys, case):
    make_collection(tmp_path)
    name, damage, sentence = COLLECTIONS[case]
    path = tmp_path / f"{name}.parquet"
    pq.write_table(damage(pq.read_table(path)), path)
    assert main(["report", str(tmp_path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(path) in error
    assert sentence in error
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("kind", [pa.list_(pa.string()), pa.list_(pa.float64())])
def test_gradients_of_lists_are_one_sentence(tmp_path, kind):
    name, values = ("group", ["rock"]) if kind.value_type == pa.string() else ("norm", [0.5])
    pq.write_table(changed(gradients(), name, [values] * 4, kind), tmp_path / "gradients.parquet")
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "gradients.parquet"))):
        read_gradients(tmp_path / "gradients.parquet")


@pytest.mark.parametrize(
    "sweep", [{"cutoffs": [10**400]}, {"coverage": [10**400]}, {"stability": {"50": ["nan"]}}, {"cutoffs": [0]}]
)
def test_a_sweep_that_cannot_be_is_none(collection, tmp_path, sweep):
    shutil.copytree(collection, tmp_path / "c")
    content = json.loads((tmp_path / "c" / "rock_set.json").read_text())
    content["method"]["sweep"] = {"cutoffs": [10], "coverage": [0.25], "stability": {"50": [0.875]}} | sweep
    (tmp_path / "c" / "rock_set.json").write_text(json.dumps(content))
    plots = of_kind(rocks(read_contents(tmp_path / "c")), Plot)
    assert not any("overlap (Jaccard)" in plot.svg for plot in plots)


def test_a_folder_of_nothing_and_an_output_of_nowhere_are_one_sentence(run_folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "notes.txt").write_text("mine")
    for flags, sentence in (
        ([tmp_path / "nowhere"], "There is no folder"),
        ([tmp_path / "empty"], "holds nothing to report"),
        ([tmp_path / "foreign"], "holds nothing to report"),
        ([run_folder, "--output", tmp_path / "nowhere" / "a.html"], "There is no folder"),
        ([run_folder, "--output", tmp_path / "foreign" / "notes.txt" / "a.html"], "There is no folder"),
        ([run_folder, "--output", tmp_path], "is a folder: name a file"),
        ([run_folder, "--output", run_folder / "opd_run.json"], "is an HTML file: name one that ends in .html"),
        ([run_folder, "--output", ""], "--output takes a path"),
    ):
        assert main(["report", *map(str, flags)]) == 1
        assert sentence in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "foreign").iterdir()] == ["notes.txt"]
    with pytest.raises(SystemExit) as stopped:
        main(["report"])
    assert stopped.value.code == 2


def test_where_the_page_does_not_fit_the_old_one_stays(tmp_path, capsys):
    (tmp_path / "knockout.json").write_text(json.dumps(knockout()))
    (tmp_path / "report.html").write_text("old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**12, limits[1]))  # as on a full disk, a write of more fails
    try:
        assert main(["report", str(tmp_path)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in capsys.readouterr().err
    assert (tmp_path / "report.html").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"knockout.json", "report.html"}


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


VALUES = (None, -1, 1e999, 1e300, "x", "", [], {}, True, 2**70, 10**400, "\ud800", [[1]], {"a": None})
NUMBERS = (None, -1, 0, 2**22, 2**31 - 1, -(2**31), float("nan"), float("inf"), 1e30, -1e30)
TYPES = (pa.string(), pa.list_(pa.int32()), pa.float64(), pa.uint64(), pa.bool_(), pa.list_(pa.int32(), 3))


def mutate_json(data: bytes, draw: random.Random) -> bytes:
    """Return a file of JSON with a value swapped, or gone."""
    content = json.loads(data)
    places, holders = [], [content]
    while holders:
        holder = holders.pop()
        keys = list(holder) if isinstance(holder, dict) else range(min(len(holder), 4))
        places += [(holder, key) for key in keys]
        holders += [holder[key] for key in keys if isinstance(holder[key], (dict, list))]
    holder, key = draw.choice(places)
    if draw.random() < 0.2:
        del holder[key]
    else:
        holder[key] = draw.choice(VALUES)
    return json.dumps(content).encode("utf-8", "surrogatepass")


def mutate_table(data: bytes, draw: random.Random) -> bytes:
    """Return a Parquet file with a column dropped, doubled, renamed, of another type, or with values that cannot be."""
    table = pq.read_table(pa.BufferReader(data))
    name = draw.choice(table.schema.names)
    kind, place = table.schema.field(name).type, table.schema.names.index(name)
    match draw.randrange(6):
        case 0:
            table = table.remove_column(place)
        case 1:
            table = table.append_column(name, table[name])
        case 2:
            table = table.rename_columns(["else" if other == name else other for other in table.schema.names])
        case 3:
            kind = draw.choice(TYPES)
            value = [1, 1, 1] if pa.types.is_nested(kind) else "1" if kind == pa.string() else 1
            table = changed(table, name, [bool(value) if kind == pa.bool_() else value] * len(table), kind)
        case _:
            values, value = table[name].to_pylist(), draw.choice(NUMBERS)
            if pa.types.is_nested(kind) and value is not None:
                value = [value] * 5
            values[draw.randrange(len(values))] = value
            try:
                table = changed(table, name, values)
            except (pa.ArrowException, OverflowError, TypeError):  # no value of this type
                table = table.slice(0, 0)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def mutate(data: bytes, name: str, draw: random.Random) -> bytes:
    """Return a damaged copy of a file's bytes."""
    kind = draw.randrange(5)
    if kind == 0:
        return data[: draw.randrange(len(data))]
    if kind > 1 and name.endswith(".json"):
        return mutate_json(data, draw)
    if kind > 1 and name.endswith(".parquet"):
        return mutate_table(data, draw)
    changed_bytes = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        changed_bytes[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed_bytes)


def read_everything(folder) -> None:
    """Read what a report reads, without drawing it."""
    contents = read_contents(folder)
    find_types(contents)
    rollouts(contents)
    if contents.summary is not None:
        arm_results(contents)
    if contents.main_run is not None:
        run_facts(contents.main_run)
    if contents.gradients is not None:
        read_gradients(contents.gradients)


def fuzzed_folders(run_folder, folder) -> dict[Path, list[str]]:
    """Make folders of a run and of a collection, with all that a report takes, and return the files in each."""
    run, collected = folder / "run", folder / "collected"
    shutil.copytree(run_folder, run)
    (run / "knockout.json").write_text(json.dumps(knockout()))
    pq.write_table(gradients(), run / "gradients.parquet")
    for step in (2, 4, 6):
        shutil.rmtree(run / f"checkpoint-{step}")
    collected.mkdir()
    make_collection(collected)
    (collected / "summary.json").write_text(json.dumps(SUMMARY))
    names = ["opd_run.json", "rock_set.json", "knockout.json", "gradients.parquet", FILE_NAME]
    names += ["checkpoint-8/token_stats.safetensors"]
    return {run: names, collected: ["occurrences.parquet", "prompts.parquet", "summary.json"]}


def test_damaged_files_are_read_or_told(run_folder, tmp_path):
    folders = fuzzed_folders(run_folder, tmp_path)
    places = [(folder, name) for folder, names in folders.items() for name in names]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    draw, told = random.Random(7), []
    for turn in range(270):
        folder, name = places[turn % len(places)]
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(mutate(data, name, draw))
        try:
            if turn % 30:
                read_everything(folder)
            else:
                write_report(folder, tmp_path / "page.html")
        except (ValueError, OSError) as error:
            told.append((Path(name).name, str(error)))
        finally:
            (folder / name).write_bytes(data)
    assert 90 < len(told) < 250
    assert not [sentence for name, sentence in told if name not in sentence]
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
