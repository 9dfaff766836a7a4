"""Tests of trl_opd.rock_set: the file keeps its content, what does not fit is refused with its path and the reason.

The file below is written out by hand after FORMATS, so that the format on disk cannot change unseen.
"""

import copy
import json
import re
import warnings
from dataclasses import replace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_opd import Controls, Rock, RockSet
from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.artefacts.run_files import ROCK_SET_FILE as FILE_NAME
from trl_opd.rocks.rock_set import MAX_BYTES

from tests.helpers.full_disk import full_disk
from tests.helpers.rock_sets import FILE

MISSING = object()


def edited(place: str, value) -> dict:
    """Return FILE with another value at `place` ("rocks.0.id"), or without that field."""
    content = copy.deepcopy(FILE)
    *parents, last = [int(part) if part.isdigit() else part for part in place.split(".")]
    holder = content
    for part in parents:
        holder = holder[part]
    if value is MISSING:
        del holder[last]
    else:
        holder[last] = value
    return content


def write(folder, content: dict | bytes | str):
    path = folder / "rocks.json"
    if isinstance(content, dict):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refused(path) -> str:
    """Return the reason for which the file is refused; the message is one short line that begins with the path."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        RockSet.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    start = f"{path}: not a rock set: "
    assert message.startswith(start)
    return message.removeprefix(start).removesuffix(".")


# Round trip


def test_the_file_holds_exactly_the_fields_of_the_format(tmp_path):
    saved = tmp_path / "saved.json"
    RockSet.load(write(tmp_path, FILE)).save(saved)
    assert json.loads(saved.read_text(encoding="utf-8")) == FILE


def test_a_saved_set_loads_as_the_same_set(tmp_path):
    rock_set = RockSet.load(write(tmp_path, FILE))
    rock_set.save(tmp_path / "saved.json")
    assert RockSet.load(str(tmp_path / "saved.json")) == rock_set
    assert rock_set.rocks[1] == Rock(id=7, text=None, count=40, mean_kl=0.5, score=2)
    assert rock_set.controls == Controls([5, 0, 49], 1.01, True, 3, ["\n", None, "é"])


def test_a_set_without_controls_heldout_and_tokenizer_keeps_their_nulls(tmp_path):
    path = tmp_path / "saved.json"
    unknown = {"name": None, "vocab_size": None, "fingerprint": None}
    rock_set = replace(RockSet.load(write(tmp_path, FILE)), tokenizer=unknown, controls=None, heldout=None)
    rock_set.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["controls"], content["heldout"], content["tokenizer"]) == (None, None, unknown)
    assert RockSet.load(path) == rock_set


def test_a_folder_means_the_rock_set_in_it(tmp_path):
    RockSet.load(write(tmp_path, FILE)).save(tmp_path / FILE_NAME)
    assert FILE_NAME == "rock_set.json"
    assert RockSet.load(tmp_path) == RockSet.load(tmp_path / "rock_set.json")


def test_a_repository_means_the_rock_set_in_it(tmp_path, monkeypatch):
    # A download that lies in the Hub's cache: the real client, without a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    commit, repository = 40 * "a", tmp_path / "models--someone--rocks"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / FILE_NAME).write_text(json.dumps(FILE), encoding="utf-8")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    assert RockSet.load("someone/rocks") == RockSet.load(write(tmp_path, FILE))
    with pytest.raises(OSError, match="cache"):
        RockSet.load("someone/else")


def test_ids_are_those_of_the_rocks_in_rank_order(tmp_path):
    ids = RockSet.load(write(tmp_path, FILE)).ids
    assert ids.dtype == torch.long
    assert ids.tolist() == [31, 7]
    empty = RockSet.load(write(tmp_path, edited("rocks", []))).ids
    assert (empty.dtype, empty.shape) == (torch.long, (0,))


def test_token_share_is_the_rocks_count_over_the_tokens_of_the_corpus(tmp_path):
    assert RockSet.load(write(tmp_path, FILE)).token_share == (60 + 40) / 400
    nothing = edited("rocks", []) | {"corpus": {"rollouts": 0, "tokens": 0, "kl_sum": 0.0}}
    assert RockSet.load(write(tmp_path, nothing)).token_share == 0.0


# What may be absent


@pytest.mark.parametrize("name", ["text", "mean_kl_pre", "ccr", "context_score", "family", "role", "role_uncorrected"])
def test_nullable_fields_of_a_rock_may_be_absent(tmp_path, name):
    rock = RockSet.load(write(tmp_path, edited(f"rocks.0.{name}", MISSING))).rocks[0]
    assert getattr(rock, name) is None
    assert replace(rock, **{name: FILE["rocks"][0][name]}) == RockSet.load(write(tmp_path, FILE)).rocks[0]


def test_controls_without_texts_and_seed_are_accepted(tmp_path):
    content = edited("controls.texts", MISSING)
    del content["controls"]["seed"]
    assert RockSet.load(write(tmp_path, content)).controls == Controls([5, 0, 49], 1.01, True)


@pytest.mark.parametrize("name", ["tau_pre", "tau_post", "window", "gamma", "eta"])
@pytest.mark.parametrize("value", [None, MISSING, 0, 0.5])
def test_thresholds_are_numbers_or_null(tmp_path, name, value):
    method = RockSet.load(write(tmp_path, edited(f"method.{name}", value))).method
    assert method.get(name) == (None if value is MISSING else value)


@pytest.mark.parametrize(
    ("section", "name"),
    [("tokenizer", "name"), ("tokenizer", "vocab_size"), ("tokenizer", "fingerprint"), ("corpus", "rollouts")],
)
@pytest.mark.parametrize("value", [None, MISSING])
def test_unknowns_of_another_program_are_null(tmp_path, section, name, value):
    rock_set = RockSet.load(write(tmp_path, edited(f"{section}.{name}", value)))
    assert getattr(rock_set, section)[name] is None


# What is refused

WHOLE = ["rocks.0.id", "rocks.0.count", "method.top_k", "corpus.tokens", "corpus.rollouts", "tokenizer.vocab_size"]
WHOLE += ["controls.ids.1", "controls.seed"]
NUMBER = ["rocks.0.mean_kl", "rocks.0.score", "rocks.0.mean_kl_pre", "rocks.0.ccr", "rocks.0.context_score"]
NUMBER += ["measure.temperature", "method.tau_pre", "method.window", "method.eta", "corpus.kl_sum"]
NUMBER += ["controls.mass_ratio", "heldout.token_share", "heldout.kl_share"]
TEXT = ["rocks.0.text", "rocks.0.family", "rocks.0.role", "rocks.0.role_uncorrected", "measure.divergence"]
TEXT += ["method.score", "tokenizer.name", "tokenizer.fingerprint", "controls.texts.0"]
REQUIRED = ["tokenizer", "measure", "method", "corpus", "rocks", "rocks.0.id", "rocks.0.count", "rocks.0.mean_kl"]
REQUIRED += ["rocks.0.score", "measure.divergence", "measure.temperature", "method.score", "method.top_k"]
REQUIRED += ["corpus.tokens", "corpus.kl_sum", "controls.ids", "controls.mass_ratio", "controls.matched"]
REQUIRED += ["heldout.token_share", "heldout.kl_share"]


def shown(place: str) -> str:
    """Return the place as messages write it: "rocks.0.id" as "rocks[0].id"."""
    return re.sub(r"\.(\d+)", r"[\1]", place)


@pytest.mark.parametrize("place", REQUIRED)
def test_a_missing_field_is_named(tmp_path, place):
    assert refused(write(tmp_path, edited(place, MISSING))) == f'"{shown(place)}" is missing'


@pytest.mark.parametrize("place", REQUIRED)
def test_a_required_field_is_not_null(tmp_path, place):
    assert shown(place) in refused(write(tmp_path, edited(place, None)))


@pytest.mark.parametrize("place", ["tokenizer", "measure", "method", "corpus", "controls", "heldout", "rocks.0"])
@pytest.mark.parametrize("value", [3, "text", [], True])
def test_a_section_is_an_object(tmp_path, place, value):
    reason = refused(write(tmp_path, edited(place, value)))
    assert shown(place) in reason
    assert "is not an object" in reason


@pytest.mark.parametrize("place", ["rocks", "controls.ids"])
@pytest.mark.parametrize("value", [3, "31", {}, True])
def test_rocks_and_controls_are_lists(tmp_path, place, value):
    assert refused(write(tmp_path, edited(place, value))) == f'"{place}" is not a list'


@pytest.mark.parametrize("place", WHOLE)
@pytest.mark.parametrize("value", [-1, True, False, 3.0, 3.5, "3", [3], {"a": 3}, 2**63, 10**400])
def test_ids_and_counts_are_whole_numbers_of_at_least_0(tmp_path, place, value):
    reason = refused(write(tmp_path, edited(place, value)))
    assert shown(place) in reason
    assert "not a whole number of at least 0" in reason


@pytest.mark.parametrize("place", NUMBER)
@pytest.mark.parametrize("value", [True, "0.5", [0.5], {"a": 0.5}, 10**400, -(10**400)])
def test_numbers_must_be_finite_numbers(tmp_path, place, value):
    reason = refused(write(tmp_path, edited(place, value)))
    assert shown(place) in reason
    assert "not a finite number" in reason


@pytest.mark.parametrize("place", TEXT)
@pytest.mark.parametrize("value", [True, 3, ["text"], {"a": "text"}])
def test_text_fields_must_be_strings(tmp_path, place, value):
    reason = refused(write(tmp_path, edited(place, value)))
    assert shown(place) in reason
    assert "not a string" in reason


@pytest.mark.parametrize("value", [1, 0.5, "true", []])
def test_matched_is_true_or_false(tmp_path, value):
    assert "controls.matched" in refused(write(tmp_path, edited("controls.matched", value)))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
@pytest.mark.parametrize("place", [*WHOLE, *NUMBER, "version", "method.min_persistence", "corpus.of_another_program"])
def test_non_finite_number_is_an_error_in_every_field(tmp_path, place, number):
    text = json.dumps(edited(place, "HERE")).replace('"HERE"', number)
    assert refused(write(tmp_path, text))


@pytest.mark.parametrize("place", ["version", "rocks.0.id", "rocks.0.mean_kl", "controls.ids.1", "method.of_another"])
def test_a_number_of_5000_digits_is_refused(tmp_path, place):
    assert "digits" in refused(write(tmp_path, json.dumps(edited(place, "HERE")).replace('"HERE"', 5000 * "9")))


VALID = json.dumps(FILE)
BAD_FILES = {
    "unknown format": (edited("format", "trl_opd.token_stats"), '"format" is not "trl_opd.rock_set"'),
    "format missing": (edited("format", MISSING), '"format" is not "trl_opd.rock_set"'),
    "format of another kind": (edited("format", ["trl_opd.rock_set"]), '"format" is not "trl_opd.rock_set"'),
    "unknown version": (edited("version", 2), "version 2, this trl_opd reads version 1"),
    "version missing": (edited("version", MISSING), "version None"),
    "version as text": (edited("version", "1"), "version '1'"),
    "version as truth": (edited("version", True), "version True"),
    "version of many digits": (edited("version", 10**4000), "version"),
    "version of a page": (edited("version", 5000 * "1\n"), "version"),
    "broken JSON": (VALID.replace(":", ";", 1), "Expecting ':' delimiter"),
    "cut JSON": (VALID[: len(VALID) // 2], "line 1 column"),
    "two values": (VALID + VALID, "Extra data"),
    "empty": ("", "Expecting value"),
    "UTF-16": (VALID.encode("utf-16"), "utf-8"),
    "Latin-1": (json.dumps(FILE, ensure_ascii=False).encode("latin-1"), "utf-8"),
    "binary": (bytes(range(256)), "utf-8"),
    "a list": (f"[{VALID}]", '"format" is not "trl_opd.rock_set"'),
    "a number": ("1", '"format" is not "trl_opd.rock_set"'),
    "null": ("null", '"format" is not "trl_opd.rock_set"'),
    "lists nested deeply": (100_000 * "[", "nested too deeply"),
    "objects nested deeply": (100_000 * '{"a":' + "1" + 100_000 * "}", "nested too deeply"),
    "nested deeply in a field": (VALID.replace("0.125", 100_000 * "[" + 100_000 * "]", 1), "nested too deeply"),
    "rock twice": (edited("rocks.1.id", 31), "token id 31 occurs twice in rocks"),
    "control twice": (edited("controls.ids", [5, 0, 5]), "token id 5 occurs twice in controls"),
    "rock and control": (edited("controls.ids", [5, 7, 49]), "token id 7 is a rock and a control"),
    "rock outside": (edited("rocks.0.id", 50), "token id 50 in rocks is outside the vocabulary of 50"),
    "control outside": (edited("controls.ids.1", 50), "token id 50 in controls is outside the vocabulary of 50"),
    "vocabulary of nothing": (edited("tokenizer.vocab_size", 0), "outside the vocabulary of 0"),
    "id above int32": (edited("rocks.0.id", 2**31) | {"tokenizer": {}}, "outside the vocabulary of 2147483648"),
    "rock is a list": (edited("rocks.1", [1]), "rocks[1] is not an object"),
    "unknown role": (edited("rocks.1.role", "hero"), "rocks[1].role is 'hero', known are pillar, stumbling, neutral"),
    "unknown uncorrected role": (edited("rocks.0.role_uncorrected", ""), "rocks[0].role_uncorrected is ''"),
    "role of a page": (edited("rocks.0.role", 5000 * "x"), "rocks[0].role is 'xxx"),
    "texts too short": (edited("controls.texts", ["a", "b"]), "controls.texts is not a list as long as controls.ids"),
    "texts too long": (edited("controls.texts", 4 * ["a"]), "controls.texts is not a list as long as controls.ids"),
    "texts as one text": (edited("controls.texts", "abc"), "controls.texts is not a list as long as controls.ids"),
}


@pytest.mark.parametrize(("content", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_no_rock_set_is_refused_with_its_path_and_the_reason(tmp_path, content, reason):
    assert reason in refused(write(tmp_path, content))


def test_a_file_cut_anywhere_is_refused(tmp_path):
    for length in range(len(VALID)):
        refused(write(tmp_path, VALID[:length]))


def places(value, here=()):
    """Yield the path of every value in parsed JSON."""
    if here:
        yield here
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(below, (*here, str(key)))


@pytest.mark.parametrize("place", [".".join(place) for place in places(FILE)])
def test_any_value_in_any_place_is_taken_and_kept_or_refused_in_one_line(tmp_path, place):
    for value in [None, True, 0, -1, 1, 1.5, 10**30, "", "x", [], [None], [[1]], [{}], {}, {"ids": 1}, MISSING]:
        path, reason = write(tmp_path, edited(place, value)), None
        try:
            rock_set = RockSet.load(path)
        except ValueError as error:
            reason = str(error)
        if reason is None:
            rock_set.save(tmp_path / "again.json")
            assert RockSet.load(tmp_path / "again.json") == rock_set
            assert rock_set.token_share >= 0
        else:
            assert reason.startswith(f"{path}: not a rock set: ")
            assert "\n" not in reason


def test_a_file_of_absurd_size_is_refused_unread(tmp_path):
    path = write(tmp_path, "")
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)  # a hole: it takes no room on the disk
    assert f"{MAX_BYTES + 1} bytes, at most {MAX_BYTES} are read" in refused(path)


@pytest.mark.parametrize("name", ["missing.json", "folder/missing.json", "missing", "./missing", "a/b/c"])
def test_a_missing_file_is_an_oserror_that_names_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=re.escape(name.removeprefix("./"))):
        RockSet.load(name)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
        RockSet.load(tmp_path / name)


def test_a_folder_without_a_rock_set_is_an_oserror_and_no_repository(tmp_path, monkeypatch):
    # "runs/first" has the shape of a repository's name: what lies on the disk comes first.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(OSError, match=re.escape("runs/first/rock_set.json")):
        RockSet.load("runs/first")


# Saving


def wrong_sets(right: RockSet) -> dict[str, tuple[RockSet, str]]:
    """Return sets that no file may hold, by name, each with the reason."""
    first, second = right.rocks
    return {
        "NaN score": (replace(right, rocks=[replace(first, score=float("nan")), second]), "rocks[0].score is nan"),
        "infinite mean": (replace(right, rocks=[first, replace(second, mean_kl=float("inf"))]), "rocks[1].mean_kl"),
        "NaN in a field of its own": (replace(right, method=right.method | {"own": float("nan")}), "not JSON"),
        "rock twice": (replace(right, rocks=[first, first]), "token id 31 occurs twice"),
        "float id": (replace(right, rocks=[replace(first, id=31.0), second]), "rocks[0].id is 31.0"),
        "unknown role": (replace(right, rocks=[replace(first, role="hero"), second]), "rocks[0].role is 'hero'"),
        "rock as control": (replace(right, controls=Controls([31], 1.0, True)), "token id 31 is a rock and a control"),
        "texts too short": (replace(right, controls=Controls([5], 1.0, True, texts=[])), "controls.texts"),
    }


@pytest.mark.parametrize("name", wrong_sets(RockSet([Rock(1, "", 1, 1.0, 1.0)] * 2, {}, {}, {}, {})))
def test_a_set_that_could_not_be_loaded_is_not_saved_and_leaves_the_old_file(tmp_path, name):
    path = write(tmp_path, FILE)
    wrong, reason = wrong_sets(RockSet.load(path))[name]
    with pytest.raises(ValueError, match=re.escape(reason)):
        wrong.save(path)
    assert path.read_text(encoding="utf-8") == VALID
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_breaks_off_leaves_the_old_file_and_no_part(tmp_path):
    path = write(tmp_path, FILE)
    other = replace(RockSet.load(path), heldout=None)
    with full_disk(room=200), pytest.raises(OSError, match="File too large"):
        other.save(path)
    assert path.read_text(encoding="utf-8") == VALID
    assert list(tmp_path.iterdir()) == [path]
    other.save(path)
    assert RockSet.load(path) == other
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["missing/rocks.json", "rocks.json/rocks.json", "folder"])
def test_a_place_that_cannot_be_written_is_an_oserror_and_leaves_no_part(tmp_path, name):
    path = write(tmp_path, FILE)
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"\w"):
        RockSet.load(path).save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", path]
    assert path.read_text(encoding="utf-8") == VALID


# Fitting a tokenizer


def bpe(*lines: str, name: str, added: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer: its vocabulary writes a space as Ġ, its decoder as a space."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(lines * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.name_or_path = name
    tokenizer.add_tokens(list(added))
    return tokenizer


def student(*added: str) -> PreTrainedTokenizerFast:
    return bpe("so wait, so we wait", "and so we wait again", name="a/student", added=added)


def stranger() -> PreTrainedTokenizerFast:
    return bpe("the cat sat on the mat", "the dog did not, the dog", name="a/stranger")


def rocks_of(tokenizer, rocks: dict[str, str | None], controls: dict[str, str | None] | None = None) -> RockSet:
    """Return a set for the tokenizer whose types, by vocabulary token, carry these texts."""
    vocab = tokenizer.get_vocab()
    described = {"name": tokenizer.name_or_path, "vocab_size": len(tokenizer), "fingerprint": fingerprint(tokenizer)}
    listed = [Rock(id=vocab[token], text=text, count=1, mean_kl=1.0, score=1.0) for token, text in rocks.items()]
    matched = None
    if controls is not None:
        matched = Controls([vocab[token] for token in controls], 1.0, True, 0, list(controls.values()))
    return RockSet(listed, described, FILE["measure"], FILE["method"], FILE["corpus"], matched)


def test_the_tokenizer_that_made_the_set_fits_in_silence():
    rock_set = rocks_of(student(), {"Ġso": None, "a": "a"}, {"Ġwait": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rock_set.check(student(), len(student()))


@pytest.mark.parametrize("texts", [{"Ġso": " so"}, {"Ġso": None}, {"Ġso": "Ġso", "a": "a"}])
def test_a_foreign_tokenizer_is_refused_and_both_are_named(texts):
    with pytest.raises(ValueError, match="ids name other tokens") as caught:
        rocks_of(student(), texts).check(stranger(), 280)
    assert "a/student" in str(caught.value)
    assert "a/stranger" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("known_size", [False, True])
def test_a_set_that_does_not_name_its_tokenizer_is_accepted_with_a_warning(known_size):
    unknown = {"name": None, "vocab_size": len(student()) if known_size else None, "fingerprint": None}
    rock_set = replace(rocks_of(student(), {"Ġso": None}), tokenizer=unknown)
    with pytest.warns(UserWarning, match="does not say which tokenizer .* taken as those of a/student") as caught:
        rock_set.check(student(), len(student()))
    assert len(caught) == 1


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_set_of_another_vocabulary_size_and_no_fingerprint_is_refused(difference):
    size = len(student()) + difference
    rock_set = rocks_of(student(), {"Ġso": " so"})
    rock_set = replace(rock_set, tokenizer={"name": "a/student", "vocab_size": size, "fingerprint": None})
    with pytest.raises(ValueError, match=f"a/student of {size} tokens"):
        rock_set.check(student(), len(student()) + 2)


@pytest.mark.parametrize("controls", [None, {"Ġwait": " wait", "w": "w"}, {"Ġwait": "Ġwait"}])
@pytest.mark.parametrize("text", [" so", "Ġso"])
def test_added_tokens_are_a_warning_when_every_text_is_the_same(text, controls):
    larger = student("<think>", "</think>")
    assert fingerprint(larger) != fingerprint(student())
    with pytest.warns(UserWarning, match="differ by added tokens only") as caught:
        rocks_of(student(), {"Ġso": text, "a": "a"}, controls).check(larger, len(larger))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("rocks", "controls"),
    [
        pytest.param({"Ġso": " so", "a": "b"}, None, id="a rock has another text"),
        pytest.param({"Ġso": " so", "a": None}, None, id="a rock has none"),
        pytest.param({"Ġso": "so"}, None, id="a rock lacks its space"),
        pytest.param({"Ġso": ""}, None, id="a rock's is empty"),
        pytest.param({"Ġso": " so"}, {"Ġwait": " wait", "w": "W"}, id="a control has another text"),
        pytest.param({"Ġso": " so"}, {"Ġwait": None}, id="a control has none"),
    ],
)
def test_added_tokens_are_refused_when_a_text_differs_or_is_unknown(rocks, controls):
    larger = student("<think>")
    with pytest.raises(ValueError, match="ids name other tokens"):
        rocks_of(student(), rocks, controls).check(larger, len(larger))


def test_added_tokens_are_refused_when_the_controls_have_no_texts():
    rock_set = rocks_of(student(), {"Ġso": " so"}, {"Ġwait": " wait"})
    rock_set = replace(rock_set, controls=replace(rock_set.controls, texts=None))
    larger = student("<think>")
    with pytest.raises(ValueError, match="ids name other tokens"):
        rock_set.check(larger, len(larger))


def test_an_id_that_no_token_has_is_refused_though_its_text_is_null_too():
    # A vocabulary with a hole, as after pruning: id 2 names nothing here, and nobody knows what it was.
    holed = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "d": 3, "e": 4})))
    rock_set = replace(
        rocks_of(student(), {"a": None}),
        rocks=[Rock(id=2, text=None, count=1, mean_kl=1.0, score=1.0)],
        tokenizer={"name": "a/student", "vocab_size": 4, "fingerprint": fingerprint(student())},
    )
    with pytest.raises(ValueError, match="ids name other tokens"):
        rock_set.check(holed, 5)


def test_a_smaller_tokenizer_is_refused():
    larger = student("<think>")
    with pytest.raises(ValueError, match="ids name other tokens"):
        rocks_of(larger, {"Ġso": " so"}).check(student(), len(student()))


@pytest.mark.parametrize("kind", ["rock", "control"])
def test_an_id_outside_the_range_that_both_models_share_is_refused(kind):
    tokenizer = student("<last>")
    last = len(tokenizer) - 1
    types = {"rock": ({"<last>": "<last>"}, None), "control": ({"a": "a"}, {"<last>": "<last>"})}[kind]
    rock_set = rocks_of(tokenizer, *types)
    with pytest.raises(ValueError, match=f"token id {last}, but student and teacher share only {last} ids"):
        rock_set.check(tokenizer, last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rock_set.check(tokenizer, last + 1)
