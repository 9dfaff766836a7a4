"""Rows that cannot be prompts: named in one sentence by the trainer and by the command line, before they train."""

import json
import re
from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from trl_opd import OPDTrainer
from trl_opd.cli import main
from trl_opd.rollouts.prompts import require_prompt, tokenize_prompts
from trl_opd.studies.probe import require_prompts_fit

from tests.helpers.command_line import flags
from tests.helpers.tiny import PROMPTS, make_config, make_dataset, make_model, make_tokenizer

HALF = "so \ud83d it"  # half of a surrogate pair, as JavaScript cuts an emoji
IMAGE = {"type": "image", "image": "cat.png"}
RAISING = "{{ raise_exception('roles must alternate') }}"


def build(path, dataset, tokenizer=None, **changes):
    given = make_config(path, **{"shuffle_dataset": False, **changes})
    return OPDTrainer(make_model(), make_model(seed=1), given, dataset, processing_class=tokenizer or make_tokenizer())


def chat(content, role="user"):
    return [{"role": role, "content": content}]


def stream(prompts) -> IterableDataset:
    return IterableDataset.from_generator(lambda: ({"prompt": prompt} for prompt in prompts))


def sentence_of(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


# One prompt


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("", "is empty."),
        (" \n\t\u3000", "is empty: it is white space only."),
        (None, "is neither a text nor a list of messages with a role: 'None'."),
        (3, "is neither"),
        (b"bytes", "is neither"),
        ({"role": "user", "content": "a"}, "is neither"),
        (["a", "b"], "is neither"),
        ([["a"]], "is neither"),
        ([{"content": "a"}], "is neither"),
        (chat("a", role=3), "is neither"),
        ([], "is empty: it has no message."),
        (chat(None), "has a message of role 'user' without content."),
        (chat(3), "without content."),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "role 'assistant' without content."),
        (chat(["a"]), "with a part that is no text"),
        (chat([{"text": "a"}]), "with a part that is no text"),
        (chat([IMAGE]), "only text models are distilled"),
        (HALF, "holds half of a surrogate pair at character 3"),
        (chat(HALF), "holds half of a surrogate pair at character 3"),
        (chat([{"type": "text", "text": HALF}]), "holds half of a surrogate pair"),
    ],
)
def test_what_is_no_prompt_is_named_with_its_reason(prompt, reason):
    with pytest.raises(ValueError, match=f"^The prompt in row 5 .*{re.escape(reason)}") as error:
        require_prompt(prompt, "row 5 of the training dataset")
    sentence_of(error)


@pytest.mark.parametrize(
    "prompt",
    [
        "a\0b",
        "\ufeffa",
        chat(""),
        chat([{"type": "text", "text": "a"}]),
        [*chat("a"), {"role": "assistant", "content": None, "tool_calls": [{"function": {}}]}],
    ],
)
def test_unusual_prompts_are_prompts(prompt):
    require_prompt(prompt, "row 5")


# Datasets


@pytest.mark.parametrize("rows", [Dataset.from_dict({"prompt": []}), Dataset.from_list([])])
def test_a_dataset_without_rows_is_called_empty(tmp_path, rows):
    with pytest.raises(ValueError, match=r"^The training dataset is empty: it has no rows\.$"):
        build(tmp_path, rows)


def test_training_without_prompts_is_refused_when_it_begins(tmp_path):
    with pytest.raises(ValueError, match="no prompts to train on: pass `train_dataset`"):
        build(tmp_path, None).train()


def test_one_row_is_enough_for_its_own_rollouts(tmp_path):
    trainer = build(tmp_path, make_dataset(1), num_generations=4)
    trainer.train()
    assert trainer.state.global_step == 2


def test_one_row_is_too_few_for_a_step_of_four_prompts(tmp_path):
    with pytest.raises(ValueError, match=r"needs 4 prompts .* and the dataset has 1 rows"):
        build(tmp_path, make_dataset(1)).train()


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (None, "is neither a text"),
        (" ", "is empty"),
        (HALF, "half of a surrogate pair"),
        (chat("a"), "mixes texts and lists"),
        ("so " * 300, "has 300 tokens|more than the 256 positions"),
    ],
    ids=["none", "white space", "surrogate", "chat", "too long"],
)
def test_a_stream_that_turns_bad_stops_at_that_step_and_keeps_the_steps_before(tmp_path, bad, reason):
    trainer = build(tmp_path, stream([*PROMPTS[:6], bad, *PROMPTS]), max_steps=4)
    with pytest.raises(ValueError, match=reason) as error:
        trainer.train()
    sentence_of(error)
    assert trainer.state.global_step == 1
    assert trainer.token_stats.seen.sum() > 0


def test_nul_characters_are_text(tmp_path):
    trainer = build(tmp_path, Dataset.from_dict({"prompt": ["a\0b"] * 4}))
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_prompt_that_tokenises_to_nothing_is_named(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(ValueError, match=r"^The prompt in row 0 of the dataset has no tokens\.$"):
        build(tmp_path, make_dataset(), tokenizer).train()


# Chat templates


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the tokenizer has no chat template: set `tokenizer.chat_template`"),
        (RAISING, "cannot render a prompt of the dataset: roles must alternate."),
        ("{{ messages[0]['tool']['name'] }}", "cannot render a prompt of the dataset: 'dict object' has no attribute"),
        ("{{ messages[0]['role'] + 3 }}", "cannot render a prompt of the dataset: can only concatenate str"),
        ("{% for message in %}", "cannot render a prompt of the dataset: Expected an expression"),
    ],
    ids=["missing", "raises", "undefined", "type", "syntax"],
)
def test_a_chat_template_that_fails_is_a_sentence(tmp_path, template, reason):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        build(tmp_path, make_dataset(), tokenizer).train()
    sentence_of(error)


def test_texts_need_no_chat_template(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = RAISING
    trainer = build(tmp_path, make_dataset(chat=False), tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2


def test_the_probe_says_it_of_a_template_too():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = RAISING
    with pytest.raises(ValueError, match="cannot render a prompt of the dataset: roles must alternate"):
        require_prompts_fit([{"prompt": chat("a")}], make_model(), tokenizer, 8)


def test_an_error_that_is_not_the_templates_passes_unchanged():
    def broken(prompts):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        tokenize_prompts(broken, ["a text"])
    with pytest.raises(ValueError, match="another"):
        tokenize_prompts(lambda prompts: (_ for _ in ()).throw(ValueError("another")), [chat("a")])


# Files, from the command line


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate(("student", "teacher")):
        make_model("qwen3", seed=seed).save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return folder


def lines(*prompts) -> bytes:
    return b"".join(json.dumps({"prompt": prompt}).encode() + b"\n" for prompt in prompts)


GOOD = lines(*PROMPTS)
# name: content, what is said of the file, what is said of it as a stream
FILES = {
    "none": (lines("a", None, "b", "c"), "The prompt in row 1 of", "neither a text"),
    "numbers": (lines(1, 2, 3, 4), "The prompt in row 0 of", "neither a text"),
    "number among texts": (lines("a", "b", "c", 4), "row 3 of", "neither a text"),
    "nested": (lines(*[{"a": "b"}] * 4), "row 0 of", "neither a text"),
    "lists of texts": (lines(*[["a"], ["b"]] * 2), "row 0 of", "neither a text"),
    "chat among texts": (lines("a", chat("b"), "c", "d"), "mixes texts and lists of messages", "mixes texts and lists"),
    "parts of texts": (lines(*[chat(["a"])] * 4), "with a part that is no text", "with a part that is no text"),
    "white space": (lines("a", " ", "b", "c"), "row 1 of", "white space only"),
    "half a surrogate": (b'{"prompt": "\\ud83d"}\n' * 4, "FILE cannot be read: ", "FILE cannot be read: "),
    "other column": (b'{"question": "a"}\n' * 4, "no column 'prompt' (it has question)", "no column 'prompt'"),
    "broken in the middle": (GOOD + b'{"prompt": oops}\n' + GOOD, "FILE cannot be read: ", "FILE cannot be read: "),
    "cut at the end": (GOOD + b'{"prompt": "a', "FILE cannot be read: ", "FILE cannot be read: "),
    "not UTF-8": (b'{"prompt": "caf\xe9"}\n' * 4, "FILE cannot be read: 'utf-8' codec", "FILE cannot be read: "),
    "UTF-16": (GOOD.decode().encode("utf-16"), "FILE cannot be read: ", "FILE cannot be read: "),
    "lines of numbers": (b"1\n2\n", "FILE cannot be read: ", "FILE cannot be read: "),
    "a mark and no line": (b"\xef\xbb\xbf", "FILE cannot be read: ", "FILE cannot be read: "),
    "blank lines": (b"\n\n\n", "FILE has no rows.", "empty: it has no rows"),
    "no byte": (b"", "FILE is empty.", "FILE is empty."),
}


def error_of(command, world, tmp_path, capsys, name, **changes) -> tuple[str, str]:
    """Return the last line of a command that fails on a file, and what was to be said of that file."""
    content, said, of_stream = FILES[name]
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    assert main([command, *flags(world, tmp_path / "out", dataset_name=file, **changes)]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"trl-opd {command}: error: ")
    return last, (of_stream if changes else said).replace("FILE", str(file))


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_broken_rows_is_one_sentence_of_train(world, tmp_path, capsys, name):
    last, said = error_of("train", world, tmp_path, capsys, name)
    assert said in last


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_broken_rows_is_one_sentence_of_collect(world, tmp_path, capsys, name):
    last, said = error_of("collect", world, tmp_path, capsys, name)
    assert said in last
    assert not (tmp_path / "out" / "occurrences.parquet").exists()


@pytest.mark.parametrize("name", FILES)
def test_a_stream_of_broken_rows_is_one_sentence_of_train(world, tmp_path, capsys, name):
    last, said = error_of("train", world, tmp_path, capsys, name, dataset_streaming=True)
    assert said in last


@pytest.mark.parametrize("name", ["none", "chat among texts", "cut at the end", "not UTF-8"])
def test_a_stream_of_broken_rows_is_one_sentence_of_collect(world, tmp_path, capsys, name):
    error_of("collect", world, tmp_path, capsys, name, dataset_streaming=True, num_prompts=4)


# name: what is wrong with the student's tokenizer, what is said
TOKENIZERS = {
    "no template": ({"chat_template": None}, "the tokenizer has no chat template"),
    "raising template": ({"chat_template": RAISING}, "cannot render a prompt of the dataset: roles must alternate."),
    "no end": ({"eos_token": None}, "The tokenizer has no eos_token, so no rollout could end"),
    "padding outside": ({"pad_token": "<|far|>"}, "padding token '<|far|>' (id 300) is outside the 300 ids"),
}


@pytest.mark.parametrize("command", ["train", "collect"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_tokenizer_that_cannot_serve_is_one_sentence(world, tmp_path, capsys, name, command):
    changes, said = TOKENIZERS[name]
    tokenizer = make_tokenizer(("<|far|>",))
    for attribute, value in changes.items():
        setattr(tokenizer, attribute, value)
    make_model(seed=0).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(lines(*[chat(prompt) for prompt in PROMPTS]))
    given = {"model_name_or_path": tmp_path / "student", "dataset_name": file}
    assert main([command, *flags(world, tmp_path / "out", **given)]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    last = printed.strip().splitlines()[-1]
    assert last.startswith(f"trl-opd {command}: error: ")
    assert said in last


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + GOOD, json.dumps([{"prompt": p} for p in PROMPTS]).encode()])
@pytest.mark.slow
def test_a_byte_order_mark_and_a_json_array_are_read(world, tmp_path, capsys, content):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    assert main(["train", *flags(world, tmp_path / "out", dataset_name=file, max_steps=1)]) == 0
    assert "Trained 1 steps" in capsys.readouterr().out
