"""`trl-opd detect`: the rock set it writes, the halves, and a sentence for every file and value that cannot be."""

import json
import os
import re
import shlex
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
from trl_opd.cli import detect, main
from trl_opd.demo.arithmetic import PLANTED_PILLARS, PLANTED_ROCKS
from trl_opd.rocks.from_occurrences import detect_from_occurrences
from trl_opd.rocks.recurrence import ContextSettings

from tests.helpers.occurrence_columns import columns
from tests.helpers.paths import ROOT
from tests.helpers.planted import EACH, make_world, save_world
from tests.helpers.tiny import make_tokenizer

NO_CONTEXT = ["--score", "aggregate"]


@pytest.fixture(scope="module")
def world():
    return make_world(0)


@pytest.fixture(scope="module")
def path(world, tmp_path_factory):
    return save_world(world, tmp_path_factory.mktemp("world") / "occurrences.parquet", student="s", temperature=1.0)


def run(arguments: list[str], capsys) -> tuple[int, str, str]:
    code = main(["detect", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


# What it writes


def test_the_rock_set_has_the_fields_that_are_promised(path, world, tmp_path, capsys):
    output = tmp_path / "rock_set.json"
    code, printed, _ = run([path, "--output", output, "--top_k", EACH], capsys)
    assert code == 0
    content = json.loads(output.read_text())
    assert {"score": "context", "top_k": EACH, "window": 2, "gamma": 0.5, "eta": 0.05}.items() <= content[
        "method"
    ].items()
    # Every rollout has a prompt of its own, and the even ones select.
    tokens, kl, kl_pre = world.tokens[::2], world.kl[::2], world.kl_pre[::2]
    assert content["method"]["tau_post"] == pytest.approx(np.quantile(kl, 0.8))
    assert content["method"]["tau_pre"] == pytest.approx(np.quantile(kl_pre, 0.7))
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


def test_the_other_half_judges(path, world):
    found = detect_from_occurrences(path, top_k=EACH).rock_set
    tokens, kl = world.tokens[1::2], world.kl[1::2].astype(float)
    is_rock = np.isin(tokens, found.ids.numpy())
    held = found.heldout
    assert held["token_share"] == pytest.approx(is_rock.mean())
    assert held["kl_share"] == pytest.approx(kl[is_rock].sum() / kl.sum())
    assert held["prompts"] == 500
    for name, (low, high) in ((name, held[f"{name}_ci95"]) for name in ("token_share", "kl_share")):
        assert low < held[name] < high
    # The interval is that of a ratio over prompts: near the one of the delta method.
    part, whole = (is_rock * kl).sum(1), kl.sum(1)
    ratio = part.sum() / whole.sum()
    error = np.sqrt(((part - ratio * whole) ** 2).sum()) / whole.sum()
    assert held["kl_share_ci95"] == pytest.approx([ratio - 1.96 * error, ratio + 1.96 * error], abs=0.3 * error)


def test_rollouts_of_one_prompt_have_no_other_half(tmp_path, capsys):
    write_occurrences(tmp_path / "a.parquet", columns() | {"prompt": np.zeros(8)}, {})
    code, printed, _ = run([tmp_path / "a.parquet", "--output", tmp_path / "r.json", *NO_CONTEXT], capsys)
    assert code == 0
    assert "There is no held-out half" in printed
    assert RockSet.load(tmp_path / "r.json").heldout is None


def test_the_joint_score_is_the_smaller_of_two(tmp_path):
    files = []
    for name, kl in (("a", [3.0, 1.0, 2.0]), ("b", [0.5, 4.0, 1.5])):
        rows = {
            "rollout": np.repeat([0, 1, 2], 3),
            "position": np.tile([0, 1, 2], 3),
            "token_id": np.tile([4, 5, 6], 3),
        }
        write_occurrences(tmp_path / name, rows | {"kl": np.tile(kl, 3)}, {})
        files.append(tmp_path / name)
    found = detect_from_occurrences(files[0], joint=files[1], score="aggregate").rock_set
    assert [(rock.id, rock.score) for rock in found.rocks] == [(6, 3.0), (5, 2.0), (4, 1.0)]
    assert [rock.mean_kl for rock in found.rocks] == [2.0, 1.0, 3.0]  # of the first file
    assert found.method["joint"] == "b"


def test_two_files_of_unlike_size_or_tokenizer_are_noted_or_refused(tmp_path, capsys):
    def write(name, rows, print_):
        section = {"name": None, "vocab_size": 3, "fingerprint": print_}
        write_occurrences(tmp_path / name, columns(rows), {"tokenizer": section})
        return tmp_path / name

    files = write("a", 8, "sha256:1"), write("b", 16, "sha256:1"), write("c", 8, "sha256:2")
    assert any(
        "differ in size (4 and 8 tokens)" in note
        for note in detect_from_occurrences(files[0], joint=files[1], score="aggregate").notes
    )
    code, _, error = run([files[0], "--joint", files[2], "--output", tmp_path / "r.json", *NO_CONTEXT], capsys)
    assert code == 1
    assert "were collected with different tokenizers" in error


def test_the_joint_context_score_is_the_smaller_of_two(worlds_of_two):
    one, two = (
        {rock.id: rock.score for rock in detect_from_occurrences(path, top_k=300).rock_set.rocks}
        for path in worlds_of_two
    )
    both = {
        rock.id: rock.score
        for rock in detect_from_occurrences(worlds_of_two[0], joint=worlds_of_two[1], top_k=300).rock_set.rocks
    }
    assert both == {id: min(one[id], two[id]) for id in one.keys() & two.keys()}


@pytest.fixture
def worlds_of_two(world, tmp_path):
    shuffled = np.random.default_rng(1).permutation(len(world.tokens))
    other = type(world)(world.tokens[shuffled], world.kl[shuffled], world.kl_pre[shuffled], world.ids)
    return [save_world(world, tmp_path / "one.parquet"), save_world(other, tmp_path / "two.parquet")]


def test_auto_prints_and_draws_the_sweep(tmp_path, capsys):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 300, (800, 40))
    kl = np.where(ids < 30, 100.0 / (1 + ids), 0.5) * rng.uniform(0.9, 1.1, ids.shape)
    rows = {"rollout": np.repeat(np.arange(800), 40), "position": np.tile(np.arange(40), 800)}
    write_occurrences(tmp_path / "o.parquet", rows | {"token_id": ids.ravel(), "kl": kl.ravel()}, {})
    output = tmp_path / "found.json"
    code, printed, _ = run([tmp_path / "o.parquet", "--output", output, "--top_k", "auto", *NO_CONTEXT], capsys)
    assert code == 0
    top_k = int(re.search(r"^K = (\d+):", printed, re.MULTILINE)[1])
    assert 20 <= top_k <= 40
    assert len(RockSet.load(output).rocks) == top_k
    method = RockSet.load(output).method
    assert method["cutoff"] == "auto"
    sweep = method["sweep"]
    assert len(sweep["cutoffs"]) == len(sweep["coverage"]) == len(sweep["stability"]["50"])
    assert (tmp_path / "found_sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_default_cutoff_is_cut_to_the_types_and_an_explicit_one_is_not(path, tmp_path, capsys):
    write_occurrences(tmp_path / "o.parquet", columns(), {})
    output = tmp_path / "r.json"
    code, printed, _ = run([tmp_path / "o.parquet", "--output", output, *NO_CONTEXT], capsys)
    assert code == 0
    assert "There are 3 token types only: --top_k 100 is cut to that." in printed
    code, printed, _ = run([path, "--output", output, "--top_k", "399"], capsys)
    assert code == 0
    assert re.search(r"No more than \d+ types have a score above 0: the list is shorter than --top_k 399\.", printed)
    code, _, error = run(
        [tmp_path / "o.parquet", "--output", tmp_path / "no.json", "--top_k", "4", *NO_CONTEXT], capsys
    )
    assert code == 1
    assert "--top_k 4 is more than the 3 token types" in error
    assert not (tmp_path / "no.json").exists()


def test_what_is_sampled_is_named(path, tmp_path, capsys):
    code, printed, _ = run([path, "--output", tmp_path / "r.json", "--max_occurrences", "30"], capsys)
    assert code == 0
    assert re.search(r"Of \d+ types 30 persistent occurrences were compared, a sample: ", printed)
    assert RockSet.load(tmp_path / "r.json").method["sampled"]


def test_the_same_seed_gives_the_same_file(path, tmp_path, capsys):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run([path, "--output", tmp_path / name, "--seed", seed], capsys)[0] == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_settings_may_come_from_a_file(path, tmp_path, capsys):
    (tmp_path / "d.yaml").write_text(f"output: {tmp_path / 'r.json'}\ntop_k: 5\ntau_pre: 0.5\ntau_post: q0.9\n")
    code, _, _ = run([path, "--config", tmp_path / "d.yaml"], capsys)
    assert code == 0
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


def test_tokens_have_their_names_and_families_and_padding_is_no_rock(named, capsys):
    folder, ids = named
    code, printed, _ = run([folder / "o.parquet", "--output", folder / "r.json", *NO_CONTEXT], capsys)
    assert code == 0
    found = RockSet.load(folder / "r.json")
    tokenizer = make_tokenizer()
    assert {rock.id for rock in found.rocks} == set(ids[:-1])
    assert all(rock.text == tokenizer.decode([rock.id]) for rock in found.rocks)
    assert {rock.family for rock in found.rocks} >= {"digit", "punctuation", "markdown"}
    assert found.tokenizer["fingerprint"] == fingerprint(tokenizer)
    found.check(tokenizer, 320)
    assert r"'\n'" in printed or r"'\n\n'" in printed


def test_the_tokenizer_is_looked_for_on_this_machine_only(named, capsys):
    folder, _ = named
    (folder / "tokenizer").rename(folder / "elsewhere")
    code, printed, _ = run([folder / "o.parquet", "--output", folder / "r.json", *NO_CONTEXT], capsys)
    assert code == 0
    assert "pass --tokenizer PATH to add names" in printed
    code, printed, _ = run(
        [folder / "o.parquet", "--output", folder / "r.json", "--tokenizer", folder / "elsewhere", *NO_CONTEXT], capsys
    )
    assert code == 0
    assert "digit" in printed


def test_a_tokenizer_that_does_not_fit_is_a_sentence(named, capsys):
    folder, _ = named
    make_tokenizer(("<added>",)).save_pretrained(folder / "other")
    output = folder / "r.json"
    arguments = [folder / "o.parquet", "--output", output, "--tokenizer"]
    code, _, error = run([*arguments, folder / "other"], capsys)
    assert code == 1
    assert "its ids name other tokens" in error
    for wrong, message in ((folder / "none", "no such folder"), (folder, "holds no tokenizer")):
        code, _, error = run([*arguments, wrong], capsys)
        assert code == 1
        assert message in error
    write_occurrences(folder / "o.parquet", columns() | {"token_id": np.full(8, 5000)}, {})
    code, _, error = run([*arguments, folder / "tokenizer"], capsys)
    assert code == 1
    assert "holds token id 5000: it is not the one of these rollouts" in error
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
def test_a_token_is_shown_unambiguously(text, shown):
    from trl_opd import Rock

    assert detect.show_token(Rock(1, text, 1, 1.0, 1.0)) == shown


# What cannot be


def changed(**changes) -> dict:
    return {name: value for name, value in (columns() | changes).items() if value is not None}


def with_value(name: str, row: int, value) -> dict:
    column = columns()[name].astype(float if name == "kl" else np.int64)
    column[row] = value
    return {name: column}


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
        (changed(prompt=np.arange(8)), "row 1 has prompt 1, but the row before it, of the same rollout, has prompt 0"),
        (changed(rollout=np.zeros(8, int), position=np.arange(8), prompt=None), "has one rollout only"),
        ({name: value[:0] for name, value in columns().items()}, "has no rows"),
    ],
)
def test_a_file_that_cannot_be_is_a_sentence_and_nothing_is_written(table, message, tmp_path, capsys):
    pq.write_table(pa.table(table), tmp_path / "o.parquet")
    code, printed, error = run([tmp_path / "o.parquet", "--output", tmp_path / "r.json"], capsys)
    assert code == 1
    assert printed == ""
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r.json").exists()


def test_the_row_is_counted_over_batches(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("trl_opd.artefacts.parquet.BATCH_ROWS", 3)
    for table, message in (
        (changed(**with_value("kl", 7, np.nan)), "row 7 has kl nan"),
        (changed(position=[0, 1, 0, 1, 0, 0, 0, 1]), "row 5 (rollout 2, position 0) occurs twice"),
        (changed(position=[0, 1, 0, 0, 0, 1, 0, 1]), "row 3 (rollout 1, position 0) occurs twice"),
    ):
        pq.write_table(pa.table(table), tmp_path / "o.parquet")
        assert message in run([tmp_path / "o.parquet", "--output", tmp_path / "r.json"], capsys)[2]


def test_a_small_negative_divergence_is_rounding(tmp_path, capsys):
    pq.write_table(pa.table(changed(**with_value("kl", 5, -5e-5))), tmp_path / "o.parquet")
    assert run([tmp_path / "o.parquet", "--output", tmp_path / "r.json", *NO_CONTEXT], capsys)[0] == 0


@pytest.mark.parametrize("content", [b"", b"PAR1", b"{}", None])
def test_a_file_that_is_cut_or_foreign_is_a_sentence(content, tmp_path, capsys):
    file = tmp_path / "o.parquet"
    write_occurrences(file, columns(), {})
    file.write_bytes(file.read_bytes()[:-40] if content is None else content)
    code, _, error = run([file, "--output", tmp_path / "r.json"], capsys)
    assert code == 1
    assert "is not a complete Parquet file" in error


def test_damage_in_the_middle_is_a_sentence(path, tmp_path, capsys):
    content = bytearray(Path(path).read_bytes())
    content[2000:60000] = bytes(58000)
    (tmp_path / "o.parquet").write_bytes(content)
    code, _, error = run([tmp_path / "o.parquet", "--output", tmp_path / "r.json"], capsys)
    assert code == 1
    assert "is cut or damaged" in error


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
def test_metadata_that_cannot_be_is_a_sentence(metadata, message, tmp_path, capsys):
    table = pa.table(columns()).replace_schema_metadata({"trl_opd": metadata})
    pq.write_table(table, tmp_path / "o.parquet")
    code, _, error = run([tmp_path / "o.parquet", "--output", tmp_path / "r.json", *NO_CONTEXT], capsys)
    assert code == 1
    assert message in error
    assert not (tmp_path / "r.json").exists()


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
def test_a_value_that_cannot_be_is_a_sentence(arguments, message, path, tmp_path, capsys):
    code, _, error = run([path, "--output", tmp_path / "r.json", *arguments], capsys)
    assert code == 1
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "r.json").exists()


def test_thresholds_that_leave_nothing_tell_what_was_left_at_each_stage(path, tmp_path, capsys):
    code, _, error = run([path, "--output", tmp_path / "r.json", "--tau_post", "1000"], capsys)
    assert code == 1
    assert "400 types in the half of the prompts that selects, 0 with at least one persistent occurrence" in error
    code, _, error = run([path, "--output", tmp_path / "r.json", "--eta", "1", "--gamma", "1"], capsys)
    assert code == 1
    assert re.search(r"[1-9]\d* with at least two persistent occurrences, 0 with a persistent occurrence in rec", error)
    assert not (tmp_path / "r.json").exists()


def test_an_output_that_cannot_be_written_is_told_first_and_an_old_one_stays(path, tmp_path, capsys):
    (tmp_path / "r.json").write_text("old")
    code, _, error = run([path, "--output", tmp_path, "--top_k", "5"], capsys)
    assert code == 1
    assert "is a folder: name a file" in error
    assert run([path, "--output", tmp_path / "r.json", "--tau_post", "1000"], capsys)[0] == 1
    assert (tmp_path / "r.json").read_text() == "old"


@pytest.mark.slow
@pytest.mark.processes
def test_a_reader_that_has_seen_enough_is_no_error(path, tmp_path):
    command = [sys.executable, "-u", "-m", "trl_opd", "detect", path, "--output", str(tmp_path / "r.json")]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    run.stdout.close()
    assert run.stderr.read() == ""
    assert run.wait() == 0


def test_no_file_is_bad_usage(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["detect", "--output", "r.json"])
    assert caught.value.code == 2


def test_the_help_lists_every_option_with_its_default():
    import dataclasses

    for option in dataclasses.fields(detect.DetectArguments):
        row = next(line for line in detect.HELP.splitlines() if line.startswith(f"  --{option.name} "))
        default = "none" if option.default is None else option.default
        assert f" {default} " in f"{row} ", option.name
    settings = ContextSettings()
    assert all(getattr(settings, name) == getattr(detect.DetectArguments(), name) for name in vars(settings))


@pytest.mark.slow
@pytest.mark.processes
def test_neither_trainers_nor_bitsandbytes_are_imported(path, tmp_path):
    code = (
        "import sys; from trl_opd.cli import main; "
        f"assert main(['detect', {path!r}, '--output', {str(tmp_path / 'r.json')!r}]) == 0; "
        "heavy = ('trl.trainer', 'bitsandbytes', 'peft', 'accelerate'); "
        "print([name for name in sys.modules if name.startswith(heavy)])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
@pytest.mark.processes
def test_the_commands_of_the_pages_find_the_demos_rocks_and_pillars(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = []
    for page in ("detection", "evidence"):
        text = (ROOT / "docs" / f"{page}.md").read_text()
        commands = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        for command in commands.strip().splitlines():
            words = shlex.split(command.replace("python examples", f"{sys.executable} {ROOT / 'examples'}"))
            run = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            assert run.returncode == 0, run.stderr[-3000:]
            printed.append(run.stdout)
    found = RockSet.load(tmp_path / "rock_set.json")
    planted = {rock.text for rock in found.rocks} & set(PLANTED_ROCKS)
    assert len(planted) / len(found.rocks) >= 0.9  # precision
    assert len(planted) / len(PLANTED_ROCKS) >= 0.9  # recall
    assert found.controls.matched
    assert 0.15 < found.heldout["token_share"] < 0.25
    assert "rocks: the highest scores" in printed[3]
    result = json.loads((tmp_path / "knockout.json").read_text())
    labels = {arm["texts"][0]: arm["label"] for arm in result["arms"] if len(arm["ids"]) == 1}
    assert {labels[token] for token in PLANTED_PILLARS} == {"pillar"}
    assert {labels[token] for token in planted} == {"neutral"}
    assert result["decoded_tokens"] <= result["naive_tokens"] / 5
    assert {rock.role for rock in RockSet.load(tmp_path / "knockout_roles.json").rocks} == {"neutral"}
    table = pq.read_table(tmp_path / "gradients.parquet").to_pydict()
    norms = {
        (group, name): np.median([v for v, own in zip(table[name], table["group"], strict=True) if own == group])
        for group in ("rock", "rare")
        for name in ("norm", "norm_matched")
    }
    assert norms["rock", "norm"] < norms["rare", "norm"] / 2  # as the paper has it
    assert norms["rock", "norm_matched"] > norms["rare", "norm_matched"]  # and from equally many positions
