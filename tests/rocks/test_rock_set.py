"""A rock set's file keeps its content, and a file that is not a rock set is an error with its path and the reason.

The helper's `FILE` is written by hand in the format of a rock set, so a change of the format on disk fails here.
"""

import copy
import json
import re
import warnings
from dataclasses import replace
from functools import cache

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
VALID = json.dumps(FILE)


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


def reason_of(path) -> str:
    """Return why the file is not a rock set; the error is one short line that begins with the path."""
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        RockSet.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    start = f"{path}: not a rock set: "
    assert message.startswith(start)
    return message.removeprefix(start).removesuffix(".")


@pytest.fixture
def path(tmp_path):
    return write(tmp_path, FILE)


@pytest.fixture
def rock_set(path) -> RockSet:
    return RockSet.load(path)


# Saved and loaded


def test_saved_set_loads_as_the_same_set_and_its_file_has_exactly_the_fields_of_the_format(rock_set, tmp_path):
    rock_set.save(tmp_path / FILE_NAME)
    assert json.loads((tmp_path / "rock_set.json").read_text(encoding="utf-8")) == FILE
    assert RockSet.load(str(tmp_path / FILE_NAME)) == rock_set
    assert RockSet.load(tmp_path) == rock_set
    assert rock_set.rocks[1] == Rock(id=7, text=None, count=40, mean_kl=0.5, score=2)
    assert rock_set.controls == Controls([5, 0, 49], 1.01, True, 3, ["\n", None, "é"])


def test_unknown_controls_heldout_and_tokenizer_are_nulls_in_the_file(rock_set, path):
    unknown = {"name": None, "vocab_size": None, "fingerprint": None}
    rock_set = replace(rock_set, tokenizer=unknown, controls=None, heldout=None)
    rock_set.save(path)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["controls"], content["heldout"], content["tokenizer"]) == (None, None, unknown)
    assert RockSet.load(path) == rock_set


def test_rock_set_loads_from_a_repository_in_the_cache(rock_set, tmp_path, monkeypatch):
    # The Hub's client itself reads a download from its cache, without a network.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    repository = tmp_path / "models--someone--rocks"
    for name, text in (("snapshots/0a/rock_set.json", VALID), ("refs/main", "0a")):
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(text, encoding="utf-8")
    assert RockSet.load("someone/rocks") == rock_set
    with pytest.raises(OSError, match="cache"):
        RockSet.load("someone/else")


def test_ids_and_token_share_are_those_of_the_rocks(rock_set, tmp_path):
    assert rock_set.ids.dtype == torch.long
    assert rock_set.ids.tolist() == [31, 7]
    assert rock_set.token_share == (60 + 40) / 400
    nothing = edited("rocks", []) | {"corpus": {"rollouts": 0, "tokens": 0, "kl_sum": 0.0}}
    empty = RockSet.load(write(tmp_path, nothing))
    assert (empty.ids.dtype, empty.ids.shape) == (torch.long, (0,))
    assert empty.token_share == 0.0


# Optional fields


@pytest.mark.parametrize("name", ["text", "mean_kl_pre", "ccr", "context_score", "family", "role", "role_uncorrected"])
def test_nullable_fields_of_a_rock_may_be_absent(rock_set, tmp_path, name):
    rock = RockSet.load(write(tmp_path, edited(f"rocks.0.{name}", MISSING))).rocks[0]
    assert getattr(rock, name) is None
    assert replace(rock, **{name: FILE["rocks"][0][name]}) == rock_set.rocks[0]


def test_controls_may_lack_texts_and_seed(tmp_path):
    content = edited("controls.texts", MISSING)
    del content["controls"]["seed"]
    assert RockSet.load(write(tmp_path, content)).controls == Controls([5, 0, 49], 1.01, True)


@pytest.mark.parametrize("name", ["tau_pre", "tau_post", "window", "gamma", "eta"])
def test_thresholds_are_numbers_or_null(tmp_path, name):
    for value in (None, MISSING, 0, 0.5):
        method = RockSet.load(write(tmp_path, edited(f"method.{name}", value))).method
        assert method.get(name) == (None if value is MISSING else value)


@pytest.mark.parametrize("value", [None, MISSING])
def test_fields_that_another_program_does_not_know_are_none(tmp_path, value):
    for place in ("tokenizer.name", "tokenizer.vocab_size", "tokenizer.fingerprint", "corpus.rollouts"):
        section, name = place.split(".")
        loaded = RockSet.load(write(tmp_path, edited(place, value)))
        assert getattr(loaded, section)[name] is None


# Wrong files

WHOLE = ["rocks.0.id", "rocks.0.count", "method.top_k", "corpus.tokens", "corpus.rollouts", "tokenizer.vocab_size"]
WHOLE += ["controls.ids.1", "controls.seed"]
NUMBER = ["rocks.0.mean_kl", "rocks.0.score", "rocks.0.mean_kl_pre", "rocks.0.ccr", "rocks.0.context_score"]
NUMBER += ["measure.temperature", "method.tau_pre", "method.window", "method.eta", "corpus.kl_sum"]
NUMBER += ["controls.mass_ratio", "heldout.token_share", "heldout.kl_share"]
TEXT = ["rocks.0.text", "rocks.0.family", "rocks.0.role", "rocks.0.role_uncorrected", "measure.divergence"]
TEXT += ["method.score", "tokenizer.name", "tokenizer.fingerprint", "controls.texts.0"]
OBJECT = ["tokenizer", "measure", "method", "corpus", "controls", "heldout", "rocks.0"]
REQUIRED = ["tokenizer", "measure", "method", "corpus", "rocks", "rocks.0.id", "rocks.0.count", "rocks.0.mean_kl"]
REQUIRED += ["rocks.0.score", "measure.divergence", "measure.temperature", "method.score", "method.top_k"]
REQUIRED += ["corpus.tokens", "corpus.kl_sum", "controls.ids", "controls.mass_ratio", "controls.matched"]
REQUIRED += ["heldout.token_share", "heldout.kl_share"]
# Description of a field in errors, the fields, and values that are not allowed in them.
WRONG_VALUES = [
    ("not a whole number of at least 0", WHOLE, [-1, True, False, 3.0, 3.5, "3", [3], {"a": 3}, 2**63, 10**400]),
    ("not a finite number", NUMBER, [True, "0.5", [0.5], {"a": 0.5}, 10**400, -(10**400)]),
    ("not a string", TEXT, [True, 3, ["text"], {"a": "text"}]),
    ("not true or false", ["controls.matched"], [1, 0.5, "true", []]),
    ("is not an object", OBJECT, [3, "text", [], True]),
    ("is not a list", ["rocks", "controls.ids"], [3, "31", {}, True]),
]


def shown(place: str) -> str:
    """Return the place as errors write it: "rocks.0.id" as "rocks[0].id"."""
    return re.sub(r"\.(\d+)", r"[\1]", place)


@pytest.mark.parametrize("place", REQUIRED)
def test_missing_or_null_required_field_is_an_error_that_names_it(tmp_path, place):
    assert reason_of(write(tmp_path, edited(place, MISSING))) == f'"{shown(place)}" is missing'
    assert shown(place) in reason_of(write(tmp_path, edited(place, None)))


@pytest.mark.parametrize(("expected", "places", "values"), WRONG_VALUES, ids=[row[0] for row in WRONG_VALUES])
def test_wrong_value_is_an_error_that_names_the_field_and_what_is_expected(tmp_path, expected, places, values):
    for place in places:
        for value in values:
            reason = reason_of(write(tmp_path, edited(place, value)))
            assert shown(place) in reason
            assert expected in reason


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_non_finite_number_is_an_error_in_every_field(tmp_path, number):
    for place in [*WHOLE, *NUMBER, "version", "method.min_persistence", "corpus.of_another_program"]:
        text = json.dumps(edited(place, "HERE")).replace('"HERE"', number)
        assert reason_of(write(tmp_path, text)), place


@pytest.mark.parametrize("place", ["version", "rocks.0.id", "rocks.0.mean_kl", "controls.ids.1", "method.of_another"])
def test_number_of_5000_digits_is_an_error(tmp_path, place):
    assert "digits" in reason_of(write(tmp_path, json.dumps(edited(place, "HERE")).replace('"HERE"', 5000 * "9")))


DEEP = 100_000 * "[" + 100_000 * "]"
# Reason in the error, and files that have it.
BAD_FILES = {
    '"format" is not "trl_opd.rock_set"': [
        *(edited("format", value) for value in ("trl_opd.token_stats", MISSING, ["trl_opd.rock_set"])),
        *(f"[{VALID}]", "1", "null"),
    ],
    "version 2, this trl_opd reads version 1": [edited("version", 2)],
    "version None": [edited("version", MISSING)],
    "version '1": [edited("version", value) for value in ("1", 5000 * "1\n")],
    "version True": [edited("version", True)],
    "version": [edited("version", 10**4000)],
    "Expecting ':' delimiter": [VALID.replace(":", ";", 1)],
    "line 1 column": [VALID[: len(VALID) // 2]],
    "Extra data": [VALID + VALID],
    "Expecting value": [""],
    "utf-8": [VALID.encode("utf-16"), json.dumps(FILE, ensure_ascii=False).encode("latin-1"), bytes(range(256))],
    "nested too deeply": [DEEP, 100_000 * '{"a":' + "1" + 100_000 * "}", VALID.replace("0.125", DEEP, 1)],
    "token id 31 occurs twice in rocks": [edited("rocks.1.id", 31)],
    "token id 5 occurs twice in controls": [edited("controls.ids", [5, 0, 5])],
    "token id 7 is a rock and a control": [edited("controls.ids", [5, 7, 49])],
    "token id 50 in rocks is outside the vocabulary of 50": [edited("rocks.0.id", 50)],
    "token id 50 in controls is outside the vocabulary of 50": [edited("controls.ids.1", 50)],
    "outside the vocabulary of 0": [edited("tokenizer.vocab_size", 0)],
    "outside the vocabulary of 2147483648": [edited("rocks.0.id", 2**31) | {"tokenizer": {}}],
    "rocks[1] is not an object": [edited("rocks.1", [1])],
    "rocks[1].role is 'hero', known are pillar, stumbling, neutral": [edited("rocks.1.role", "hero")],
    "rocks[0].role_uncorrected is ''": [edited("rocks.0.role_uncorrected", "")],
    "rocks[0].role is 'xxx": [edited("rocks.0.role", 5000 * "x")],
    "controls.texts is not a list as long as controls.ids": [
        edited("controls.texts", value) for value in (["a", "b"], 4 * ["a"], "abc")
    ],
}


@pytest.mark.parametrize(("reason", "files"), BAD_FILES.items(), ids=BAD_FILES)
def test_file_that_is_not_a_rock_set_is_an_error_with_the_reason(tmp_path, reason, files):
    for content in files:
        assert reason in reason_of(write(tmp_path, content))


@pytest.mark.slow
def test_file_that_is_cut_anywhere_is_an_error(tmp_path):
    for length in range(len(VALID)):
        reason_of(write(tmp_path, VALID[:length]))


def places_in(value, here=()):
    """Yield the place of every value in parsed JSON."""
    if here:
        yield ".".join(here)
    for key, below in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places_in(below, (*here, str(key)))


@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 1, 1.5, 10**30, "", "x", [], [None], [[1]], [{}], {}, {"ids": 1}, MISSING]
)
def test_any_value_in_any_field_is_kept_or_is_a_one_line_error(tmp_path, value):
    for place in places_in(FILE):
        path = write(tmp_path, edited(place, value))
        reason = None
        try:
            rock_set = RockSet.load(path)
        except ValueError as error:
            reason = str(error)
        if reason is None:
            rock_set.save(tmp_path / "again.json")
            assert RockSet.load(tmp_path / "again.json") == rock_set, place
            assert rock_set.token_share >= 0, place
        else:
            assert reason.startswith(f"{path}: not a rock set: "), place
            assert "\n" not in reason, place


def test_file_of_absurd_size_is_an_error_before_it_is_read(path):
    with path.open("r+b") as file:
        file.truncate(MAX_BYTES + 1)  # a sparse file, which takes no space on the disk
    assert f"{MAX_BYTES + 1} bytes, at most {MAX_BYTES} are read" in reason_of(path)


@pytest.mark.parametrize("name", ["missing.json", "folder/missing.json", "missing", "./missing", "a/b/c"])
def test_missing_file_is_an_oserror_that_names_it(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=re.escape(name.removeprefix("./"))):
        RockSet.load(name)
    with pytest.raises(OSError, match=re.escape(str(tmp_path / name))):
        RockSet.load(tmp_path / name)


def test_existing_folder_without_a_rock_set_is_an_oserror_and_not_read_as_a_repository(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "first").mkdir(parents=True)
    with pytest.raises(OSError, match=re.escape("runs/first/rock_set.json")):
        RockSet.load("runs/first")


# Failed saves


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score": float("nan")}, "rocks[0].score is nan"),
        ({"mean_kl": float("inf")}, "rocks[0].mean_kl"),
        ({"id": 31.0}, "rocks[0].id is 31.0"),
        ({"role": "hero"}, "rocks[0].role is 'hero'"),
        ({"id": 7}, "token id 7 occurs twice"),
        ({"method": FILE["method"] | {"own": float("nan")}}, "not JSON"),
        ({"controls": Controls([31], 1.0, True)}, "token id 31 is a rock and a control"),
        ({"controls": Controls([5], 1.0, True, texts=[])}, "controls.texts"),
    ],
)
def test_set_that_could_not_be_loaded_is_not_saved_and_the_old_file_stays(rock_set, path, changes, reason):
    if changes.keys() <= {"method", "controls"}:
        wrong = replace(rock_set, **changes)
    else:
        wrong = replace(rock_set, rocks=[replace(rock_set.rocks[0], **changes), rock_set.rocks[1]])
    with pytest.raises(ValueError, match=re.escape(reason)):
        wrong.save(path)
    assert path.read_text(encoding="utf-8") == VALID
    assert list(path.parent.iterdir()) == [path]


def test_save_on_a_full_disk_leaves_the_old_file_and_no_partial_file(rock_set, path):
    other = replace(rock_set, heldout=None)
    with full_disk(room=200), pytest.raises(OSError, match="File too large"):
        other.save(path)
    assert path.read_text(encoding="utf-8") == VALID
    assert list(path.parent.iterdir()) == [path]
    other.save(path)
    assert RockSet.load(path) == other
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("name", ["missing/rocks.json", "rocks.json/rocks.json", "folder"])
def test_save_to_an_impossible_path_is_an_oserror_and_leaves_no_partial_file(rock_set, path, tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match=r"\w"):
        rock_set.save(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "folder", path]
    assert path.read_text(encoding="utf-8") == VALID


# The student's tokenizer


@cache
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


def rocks_of(rocks: dict[str, str | None], controls: dict[str, str | None] | None = None, *, added=()) -> RockSet:
    """Return a set of the student's tokenizer; the keys are tokens of its vocabulary, the values their texts."""
    tokenizer = student(*added)
    vocab = tokenizer.get_vocab()
    section = {"name": tokenizer.name_or_path, "vocab_size": len(tokenizer), "fingerprint": fingerprint(tokenizer)}
    listed = [Rock(id=vocab[token], text=text, count=1, mean_kl=1.0, score=1.0) for token, text in rocks.items()]
    matched = None
    if controls is not None:
        matched = Controls([vocab[token] for token in controls], 1.0, True, 0, list(controls.values()))
    return RockSet(listed, section, FILE["measure"], FILE["method"], FILE["corpus"], matched)


def assert_rejected(rock_set: RockSet, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="ids name other tokens") as caught:
        rock_set.check(tokenizer, len(tokenizer))
    assert "a/student" in str(caught.value)
    assert tokenizer.name_or_path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tokenizer_of_the_set_fits_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rocks_of({"Ġso": None, "a": "a"}, {"Ġwait": None}).check(student(), len(student()))


@pytest.mark.parametrize("texts", [{"Ġso": " so"}, {"Ġso": None}, {"Ġso": "Ġso", "a": "a"}])
def test_another_tokenizer_is_an_error_that_names_both(texts):
    assert_rejected(rocks_of(texts), bpe("the cat sat on the mat", "the dog did not, the dog", name="a/stranger"))


@pytest.mark.parametrize("known_size", [False, True])
def test_set_that_does_not_name_its_tokenizer_is_accepted_with_a_warning(known_size):
    unknown = {"name": None, "vocab_size": len(student()) if known_size else None, "fingerprint": None}
    rock_set = replace(rocks_of({"Ġso": None}), tokenizer=unknown)
    with pytest.warns(UserWarning, match="does not record which tokenizer .* taken as those of a/student") as caught:
        rock_set.check(student(), len(student()))
    assert len(caught) == 1


@pytest.mark.parametrize("difference", [-1, 1])
def test_set_without_a_fingerprint_and_of_another_vocabulary_size_is_an_error(difference):
    size = len(student()) + difference
    section = {"name": "a/student", "vocab_size": size, "fingerprint": None}
    with pytest.raises(ValueError, match=f"a/student of {size} tokens"):
        replace(rocks_of({"Ġso": " so"}), tokenizer=section).check(student(), len(student()) + 2)


@pytest.mark.parametrize("controls", [None, {"Ġwait": " wait", "w": "w"}, {"Ġwait": "Ġwait"}])
@pytest.mark.parametrize("text", [" so", "Ġso"])
def test_added_tokens_are_a_warning_if_every_text_is_the_same(text, controls):
    larger = student("<think>", "</think>")
    assert fingerprint(larger) != fingerprint(student())
    with pytest.warns(UserWarning, match="differ only by added tokens") as caught:
        rocks_of({"Ġso": text, "a": "a"}, controls).check(larger, len(larger))
    assert len(caught) == 1


@pytest.mark.parametrize(
    ("rocks", "controls"),
    [
        pytest.param({"Ġso": " so", "a": "b"}, None, id="rock with another text"),
        pytest.param({"Ġso": " so", "a": None}, None, id="rock without a text"),
        pytest.param({"Ġso": "so"}, None, id="rock without its space"),
        pytest.param({"Ġso": ""}, None, id="rock with an empty text"),
        pytest.param({"Ġso": " so"}, {"Ġwait": " wait", "w": "W"}, id="control with another text"),
        pytest.param({"Ġso": " so"}, {"Ġwait": None}, id="control without a text"),
    ],
)
def test_added_tokens_are_an_error_if_a_text_differs_or_is_unknown(rocks, controls):
    assert_rejected(rocks_of(rocks, controls), student("<think>"))


def test_added_tokens_are_an_error_if_the_controls_have_no_texts():
    rock_set = rocks_of({"Ġso": " so"}, {"Ġwait": " wait"})
    assert_rejected(replace(rock_set, controls=replace(rock_set.controls, texts=None)), student("<think>"))


def test_rock_whose_id_has_no_token_is_an_error_although_its_text_is_null():
    # The vocabulary lacks id 2, as after pruning.
    pruned = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1, "d": 3, "e": 4})))
    rock_set = replace(
        rocks_of({"a": None}),
        rocks=[Rock(id=2, text=None, count=1, mean_kl=1.0, score=1.0)],
        tokenizer={"name": "a/student", "vocab_size": 4, "fingerprint": fingerprint(student())},
    )
    with pytest.raises(ValueError, match="ids name other tokens"):
        rock_set.check(pruned, 5)


def test_smaller_tokenizer_is_an_error():
    assert_rejected(rocks_of({"Ġso": " so"}, added=("<think>",)), student())


@pytest.mark.parametrize(
    "types", [({"<last>": "<last>"}, None), ({"a": "a"}, {"<last>": "<last>"})], ids=["rock", "control"]
)
def test_id_that_student_and_teacher_do_not_share_is_an_error(types):
    tokenizer = student("<last>")
    last = len(tokenizer) - 1
    rock_set = rocks_of(*types, added=("<last>",))
    with pytest.raises(ValueError, match=f"token id {last}, but student and teacher share only {last} ids"):
        rock_set.check(tokenizer, last)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rock_set.check(tokenizer, last + 1)
