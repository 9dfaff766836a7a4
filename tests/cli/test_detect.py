"""`trl-opd detect`: the rock set that it writes, the two halves, and one-line errors for invalid files and values."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_opd import RockSet
from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.artefacts.occurrences import write_occurrences
from trl_opd.cli import detect
from trl_opd.rocks.from_occurrences import detect_from_occurrences
from trl_opd.rocks.recurrence import ContextSettings

from tests.helpers.occurrence_columns import columns
from tests.helpers.planted import EACH, make_world, save_world
from tests.helpers.tiny import make_tokenizer

NO_CONTEXT = ["--score", "aggregate"]


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def path(world, tmp_path_factory):
    return save_world(world, tmp_path_factory.mktemp("world") / "occurrences.parquet", student="s", temperature=1.0)


# What it writes


def test_rock_set_has_the_documented_fields(path, world, tmp_path, output_of):
    output = tmp_path / "rock_set.json"
    printed = output_of("detect", path, "--output", output, "--top_k", EACH)
    content = json.loads(output.read_text())
    method = content["method"]
    assert method.items() >= {"score": "context", "top_k": EACH, "window": 2, "gamma": 0.5, "eta": 0.05}.items()
    # Each rollout has its own prompt, and the even ones select.
    tokens, kl, kl_pre = world.tokens[::2], world.kl[::2], world.kl_pre[::2]
    assert method["tau_post"] == pytest.approx(np.quantile(kl, 0.8))
    assert method["tau_pre"] == pytest.approx(np.quantile(kl_pre, 0.7))
    assert content["corpus"] == {"rollouts": 500, "tokens": tokens.size, "kl_sum": pytest.approx(kl.sum(dtype=float))}
    for rock in content["rocks"]:
        where = tokens == rock["id"]
        assert rock["count"] == where.sum()
        assert rock["mean_kl"] == pytest.approx(kl[where].mean(dtype=float))
        assert rock["mean_kl_pre"] == pytest.approx(kl_pre[where].mean(dtype=float))
        assert rock["score"] == rock["context_score"] == pytest.approx(rock["count"] * rock["mean_kl"] * rock["ccr"])
        assert rock["role"] is rock["role_uncorrected"] is rock["text"] is rock["family"] is None
    scores = [rock["score"] for rock in content["rocks"]]
    assert scores == sorted(scores, reverse=True)
    ids = [rock["id"] for rock in content["rocks"]]
    controls = content["controls"]
    assert controls["matched"]
    assert not set(controls["ids"]) & set(ids)
    mass = [np.isin(tokens, chosen).sum() for chosen in (controls["ids"], ids)]
    assert controls["mass_ratio"] == mass[0] / mass[1]
    assert len(RockSet.load(output).rocks) == EACH
    assert f"{EACH}  rocks: the highest scores" in printed
    assert printed.splitlines()[-1] == f"The rock set is in {output}"


def test_rocks_are_evaluated_on_the_other_half(path, world):
    found = detect_from_occurrences(path, top_k=EACH).rock_set
    tokens, kl = world.tokens[1::2], world.kl[1::2].astype(float)
    is_rock = np.isin(tokens, found.ids.numpy())
    held = found.heldout
    assert held["token_share"] == pytest.approx(is_rock.mean())
    assert held["kl_share"] == pytest.approx(kl[is_rock].sum() / kl.sum())
    assert held["prompts"] == 500
    for name in ("token_share", "kl_share"):
        low, high = held[f"{name}_ci95"]
        assert low < held[name] < high
    # The interval is that of a ratio over prompts: near the one of the delta method.
    part, whole = (is_rock * kl).sum(1), kl.sum(1)
    ratio = part.sum() / whole.sum()
    error = np.sqrt(((part - ratio * whole) ** 2).sum()) / whole.sum()
    assert held["kl_share_ci95"] == pytest.approx([ratio - 1.96 * error, ratio + 1.96 * error], abs=0.3 * error)


def test_rollouts_of_one_prompt_have_no_held_out_half(tmp_path, output_of):
    write_occurrences(tmp_path / "a.parquet", columns() | {"prompt": np.zeros(8)}, {})
    printed = output_of("detect", tmp_path / "a.parquet", "--output", tmp_path / "r.json", *NO_CONTEXT)
    assert "There is no held-out half" in printed
    assert RockSet.load(tmp_path / "r.json").heldout is None


def test_joint_score_is_the_smaller_of_two(tmp_path):
    rows = {
        "rollout": np.repeat([0, 1, 2], 3),
        "position": np.tile([0, 1, 2], 3),
        "token_id": np.tile([4, 5, 6], 3),
    }
    files = [tmp_path / "a", tmp_path / "b"]
    write_occurrences(files[0], rows | {"kl": np.tile([3.0, 1.0, 2.0], 3)}, {})
    write_occurrences(files[1], rows | {"kl": np.tile([0.5, 4.0, 1.5], 3)}, {})
    found = detect_from_occurrences(files[0], joint=files[1], score="aggregate").rock_set
    assert [(rock.id, rock.score) for rock in found.rocks] == [(6, 3.0), (5, 2.0), (4, 1.0)]
    assert [rock.mean_kl for rock in found.rocks] == [2.0, 1.0, 3.0]  # of the first file
    assert found.method["joint"] == "b"


def test_second_file_of_another_size_is_noted_and_of_another_tokenizer_an_error(tmp_path, error_of):
    def write(name, rows, print_):
        section = {"name": None, "vocab_size": 3, "fingerprint": print_}
        write_occurrences(tmp_path / name, columns(rows), {"tokenizer": section})
        return tmp_path / name

    files = write("a", 8, "sha256:1"), write("b", 16, "sha256:1"), write("c", 8, "sha256:2")
    notes = detect_from_occurrences(files[0], joint=files[1], score="aggregate").notes
    assert any("differ in size (4 and 8 tokens)" in note for note in notes)
    error = error_of("detect", files[0], "--joint", files[2], "--output", tmp_path / "r.json", *NO_CONTEXT)
    assert "were collected with different tokenizers" in error


def test_joint_context_score_is_the_smaller_of_two(world, tmp_path):
    shuffled = np.random.default_rng(1).permutation(len(world.tokens))
    other = type(world)(world.tokens[shuffled], world.kl[shuffled], world.kl_pre[shuffled], world.ids)
    files = [save_world(world, tmp_path / "one.parquet"), save_world(other, tmp_path / "two.parquet")]

    def scores(path, joint=None) -> dict[int, float]:
        return {rock.id: rock.score for rock in detect_from_occurrences(path, joint=joint, top_k=300).rock_set.rocks}

    one, two = map(scores, files)
    assert scores(*files) == {id: min(one[id], two[id]) for id in one.keys() & two.keys()}


def test_auto_prints_and_draws_the_sweep(tmp_path, output_of):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, (800, 40))
    kl = np.where(ids < 30, 100.0 / (1 + ids), 0.5) * rng.uniform(0.9, 1.1, ids.shape)
    rows = {"rollout": np.repeat(np.arange(800), 40), "position": np.tile(np.arange(40), 800)}
    write_occurrences(tmp_path / "o.parquet", rows | {"token_id": ids.ravel(), "kl": kl.ravel()}, {})
    output = tmp_path / "found.json"
    printed = output_of("detect", tmp_path / "o.parquet", "--output", output, "--top_k", "auto", *NO_CONTEXT)
    top_k = int(re.search(r"^K = (\d+):", printed, re.MULTILINE)[1])
    assert 20 <= top_k <= 40
    assert len(RockSet.load(output).rocks) == top_k
    method = RockSet.load(output).method
    assert method["cutoff"] == "auto"
    sweep = method["sweep"]
    assert len(sweep["cutoffs"]) == len(sweep["coverage"]) == len(sweep["stability"]["50"])
    assert (tmp_path / "found_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_default_cutoff_is_limited_to_the_types_and_an_explicit_one_is_not(path, tmp_path, output_of, error_of):
    small = tmp_path / "o.parquet"
    write_occurrences(small, columns(), {})
    printed = output_of("detect", small, "--output", tmp_path / "r.json", *NO_CONTEXT)
    assert "There are only 3 token types, so --top_k 100 is lowered to that." in printed
    printed = output_of("detect", path, "--output", tmp_path / "r.json", "--top_k", "399")
    assert re.search(r"Only \d+ types have a score above 0, so the list is shorter than --top_k 399\.", printed)
    error = error_of("detect", small, "--output", tmp_path / "no.json", "--top_k", "4", *NO_CONTEXT)
    assert "--top_k 4 is more than the 3 token types" in error
    assert not (tmp_path / "no.json").exists()


def test_sampled_types_are_counted(path, tmp_path, output_of):
    printed = output_of("detect", path, "--output", tmp_path / "r.json", "--max_occurrences", "30")
    assert re.search(r"Only a sample of 30 persistent occurrences was compared for each of \d+ types: ", printed)
    assert RockSet.load(tmp_path / "r.json").method["sampled"]


def test_same_seed_gives_the_same_file(path, tmp_path, output_of):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        output_of("detect", path, "--output", tmp_path / name, "--seed", seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_settings_may_come_from_a_file(path, tmp_path, output_of):
    (tmp_path / "d.yaml").write_text(f"output: {tmp_path / 'r.json'}\ntop_k: 5\ntau_pre: 0.5\ntau_post: q0.9\n")
    output_of("detect", path, "--config", tmp_path / "d.yaml")
    found = RockSet.load(tmp_path / "r.json")
    assert (len(found.rocks), found.method["tau_pre"]) == (5, 0.5)
    assert found.method["thresholds"] == {"tau_pre": "0.5", "tau_post": "q0.9"}


# Tokens


@pytest.fixture
def named(tmp_path):
    """A file that names its tokenizer, in a folder; its last type is a padded row."""
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    section = {"name": str(tmp_path / "tokenizer"), "vocab_size": len(tokenizer), "fingerprint": fingerprint(tokenizer)}
    ids = [*tokenizer("So the eggs, 7\n\n").input_ids, len(tokenizer) + 3]
    rows = {"rollout": np.repeat([0, 1, 2, 3], len(ids)), "position": np.tile(np.arange(len(ids)), 4)}
    rows |= {"token_id": np.tile(ids, 4), "kl": np.tile(np.linspace(1, 2, len(ids)), 4)}
    write_occurrences(tmp_path / "o.parquet", rows, {"tokenizer": section, "vocab_size": 320})
    return tmp_path, ids


def test_tokens_have_names_and_families_and_padding_is_no_rock(named, output_of):
    folder, ids = named
    printed = output_of("detect", folder / "o.parquet", "--output", folder / "r.json", *NO_CONTEXT)
    found = RockSet.load(folder / "r.json")
    tokenizer = make_tokenizer()
    assert {rock.id for rock in found.rocks} == set(ids[:-1])
    assert all(rock.text == tokenizer.decode([rock.id]) for rock in found.rocks)
    assert {rock.family for rock in found.rocks} >= {"digit", "punctuation", "markdown"}
    assert found.tokenizer["fingerprint"] == fingerprint(tokenizer)
    found.check(tokenizer, 320)
    assert r"'\n'" in printed or r"'\n\n'" in printed


def test_tokenizer_is_searched_on_this_machine_only(named, output_of):
    folder, _ = named
    (folder / "tokenizer").rename(folder / "elsewhere")
    argv = ["detect", folder / "o.parquet", "--output", folder / "r.json", *NO_CONTEXT]
    assert "pass --tokenizer PATH to add names" in output_of(*argv)
    assert "digit" in output_of(*argv, "--tokenizer", folder / "elsewhere")


def test_tokenizer_that_does_not_fit_is_a_one_line_error(named, error_of):
    folder, _ = named
    make_tokenizer(("<added>",)).save_pretrained(folder / "other")
    output = folder / "r.json"
    argv = ["detect", folder / "o.parquet", "--output", output, "--tokenizer"]
    assert "its ids name other tokens" in error_of(*argv, folder / "other")
    assert "no such folder" in error_of(*argv, folder / "none")
    assert "holds no tokenizer" in error_of(*argv, folder)
    write_occurrences(folder / "o.parquet", columns() | {"token_id": np.full(8, 5000)}, {})
    error = error_of(*argv, folder / "tokenizer")
    assert "contains token id 5000, so it is not the tokenizer of these rollouts" in error
    assert not output.exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("the", "'the'"),
        (" the", "' the'"),
        ("\n", r"'\n'"),
        ("\u200b", r"'\u200b'"),
        ("é", "'é'"),
        ("\x1b[2J", r"'\x1b[2J'"),
    ],
)
def test_token_is_shown_unambiguously(text, shown):
    assert detect.show_token(text) == shown


# Wrong input


def changed(**changes) -> dict:
    return {name: value for name, value in (columns() | changes).items() if value is not None}


def with_value(name: str, row: int, value) -> dict:
    column = columns()[name].astype(float if name == "kl" else np.int64)
    column[row] = value
    return {name: column}


@pytest.fixture
def error_of_file(tmp_path, error_of):
    """Return a function that returns the error of `trl-opd detect` for a table, which must write nothing."""

    def run(table: pa.Table, *flags) -> str:
        pq.write_table(table, tmp_path / "o.parquet")
        error = error_of("detect", tmp_path / "o.parquet", "--output", tmp_path / "r.json", *flags)
        assert not (tmp_path / "r.json").exists()
        return error

    return run


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (changed(kl=None), "there must be one column 'kl', it has rollout, position, token_id, prompt"),
        (changed(token_id=["a"] * 8), "column 'token_id' holds string, not whole numbers"),
        (changed(rollout=np.arange(8.0)), "column 'rollout' holds double, not whole numbers"),
        (changed(kl=np.arange(8)), "column 'kl' holds int64, not floating-point numbers"),
        (changed(kl_pre=["x"] * 8), "column 'kl_pre' holds string, not floating-point numbers"),
        (changed(**with_value("kl", 5, np.nan)), "row 5 has kl nan"),
        (changed(**with_value("kl", 5, np.inf)), "row 5 has kl inf"),
        (changed(**with_value("kl", 5, -0.01)), "row 5 has kl -0.0"),
        (changed(kl=[1.0] * 7 + [None]), "row 7 has no kl: the position was not measured"),
        (changed(token_id=[1] * 7 + [None]), "row 7 has no token_id"),
        (changed(**with_value("token_id", 3, -1)), "row 3 has token_id -1, outside of"),
        (changed(**with_value("token_id", 3, 2**40)), "row 3 has token_id 1099511627776, outside of"),
        (changed(**with_value("position", 1, -2)), "row 1 has position -2"),
        (changed(rollout=np.arange(8)[::-1] // 2), "row 2 (rollout 2, position 0) is out of order"),
        (changed(position=np.zeros(8, int)), "row 1 (rollout 0, position 0) occurs twice"),
        (changed(prompt=np.arange(8)), "row 1 has prompt 1, the row before it, of the same rollout, 0"),
        (changed(rollout=np.zeros(8, int), position=np.arange(8), prompt=None), "has one rollout only"),
        ({name: value[:0] for name, value in columns().items()}, "has no rows"),
    ],
)
def test_invalid_row_is_a_one_line_error_and_writes_nothing(table, message, error_of_file):
    assert message in error_of_file(pa.table(table))


def test_row_is_counted_over_batches(error_of_file, monkeypatch):
    monkeypatch.setattr("trl_opd.artefacts.parquet.BATCH_ROWS", 3)
    for table, message in (
        (changed(**with_value("kl", 7, np.nan)), "row 7 has kl nan"),
        (changed(position=[0, 1, 0, 1, 0, 0, 0, 1]), "row 5 (rollout 2, position 0) occurs twice"),
        (changed(position=[0, 1, 0, 0, 0, 1, 0, 1]), "row 3 (rollout 1, position 0) occurs twice"),
    ):
        assert message in error_of_file(pa.table(table))


def test_small_negative_divergence_counts_as_rounding(tmp_path, output_of):
    pq.write_table(pa.table(changed(**with_value("kl", 5, -5e-5))), tmp_path / "o.parquet")
    output_of("detect", tmp_path / "o.parquet", "--output", tmp_path / "r.json", *NO_CONTEXT)


def test_truncated_file_is_a_one_line_error(path, tmp_path, error_of):
    (tmp_path / "o.parquet").write_bytes(Path(path).read_bytes()[:-40])
    assert "is not a whole Parquet file" in error_of("detect", tmp_path / "o.parquet", "--output", tmp_path / "r.json")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not an object"),
        (b'{"version": 2}', "has version 2"),
        (b'{"version": "x"}', "has version 'x'"),
        (b'{"tokenizer": {"vocab_size": -1}}', "a tokenizer of vocab_size -1"),
        (b'{"temperature": "warm"}', "temperature"),
    ],
)
def test_invalid_metadata_is_a_one_line_error(metadata, message, error_of_file):
    table = pa.table(columns()).replace_schema_metadata({"trl_opd": metadata})
    assert message in error_of_file(table, *NO_CONTEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top_k", "0"], "--top_k takes a whole number above 0, or auto, got '0'"),
        (["--top_k", "many"], "--top_k takes a whole number"),
        (["--score", "best"], "--score must be context or aggregate"),
        (["--tau_pre", "-1"], "--tau_pre takes nats, at least 0, or a quantile such as q0.8, got '-1'"),
        (["--tau_post", "q1.5"], "--tau_post takes nats"),
        (["--tau_post", "nan"], "--tau_post takes nats"),
        (["--window", "0"], "--window must be a whole number from 1"),
        (["--window", "100000000"], "--window must be a whole number from 1 to 64"),
        (["--gamma", "0"], "--gamma must be above 0"),
        (["--eta", "2"], "--eta must lie between 0 and 1"),
        (["--max_occurrences", "1"], "--max_occurrences must be a whole number from 2"),
        (["--seed", "-1"], "--seed must be a whole number from 0"),
        (["--output", "/nowhere/r.json"], "There is no folder /nowhere"),
        (["--joint", "/nowhere.parquet"], "There is no file /nowhere.parquet"),
    ],
)
def test_invalid_value_is_a_one_line_error(arguments, message, path, tmp_path, error_of):
    assert message in error_of("detect", path, "--output", tmp_path / "r.json", *arguments)
    assert not (tmp_path / "r.json").exists()


def test_thresholds_that_leave_nothing_are_an_error_with_the_types_left_at_each_stage(path, tmp_path, error_of):
    (tmp_path / "r.json").write_text("old")
    argv = ["detect", path, "--output", tmp_path / "r.json"]
    error = error_of(*argv, "--tau_post", "1000")
    assert "400 types in the half of the prompts that selects, 0 with at least one persistent occurrence" in error
    error = error_of(*argv, "--eta", "1", "--gamma", "1")
    assert re.search(r"[1-9]\d* with at least two persistent occurrences, 0 with a persistent occurrence in rec", error)
    assert (tmp_path / "r.json").read_text() == "old"


def test_folder_as_output_is_a_one_line_error(path, tmp_path, error_of):
    assert "is a folder: name a file" in error_of("detect", path, "--output", tmp_path, "--top_k", "5")


@pytest.mark.slow
@pytest.mark.processes
def test_closed_pipe_is_no_error_and_no_trainer_is_imported(path, tmp_path):
    code = (
        "import sys; from trl_opd.cli import main; "
        f"code = main(['detect', {path!r}, '--output', {str(tmp_path / 'r.json')!r}]); "
        "heavy = ('trl.trainer', 'bitsandbytes', 'peft', 'accelerate'); "
        "print([name for name in sys.modules if name.startswith(heavy)], file=sys.stderr); sys.exit(code)"
    )
    run = subprocess.Popen(
        [sys.executable, "-u", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run.stdout.close()
    assert run.stderr.read() == "[]\n"
    assert run.wait() == 0
    assert (tmp_path / "r.json").is_file()


def test_defaults_are_those_of_the_python_function():
    settings = ContextSettings()
    assert all(getattr(settings, name) == getattr(detect.DetectArguments(), name) for name in vars(settings))
