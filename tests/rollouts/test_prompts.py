"""Rows that cannot be prompts: the trainer and the command line raise a one-line error that names them."""

import json
import re

import pytest
from datasets import Dataset, IterableDataset

from trl_opd import OPDTrainer
from trl_opd.cli import main
from trl_opd.rollouts.prompts import require_embeddable, require_prompt, tokenize_prompts
from trl_opd.studies.probe import require_prompts_fit

from tests.helpers import trainers
from tests.helpers.command_line import error_of, flags
from tests.helpers.tiny import PROMPTS, TEMPLATE, make_config, make_dataset, make_model, make_tokenizer

HALF = "so \ud83d it"  # half of a surrogate pair, which is left when JavaScript cuts a text inside an emoji
IMAGE = {"type": "image", "image": "cat.png"}
RAISING = "{{ raise_exception('roles must alternate') }}"


def tokenizer_with(template: str | None):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def build(path, dataset, template=TEMPLATE, **changes) -> OPDTrainer:
    given = {"tokenizer": tokenizer_with(template), "train_dataset": dataset, "shuffle_dataset": False}
    return trainers.build(path, **given, **changes)


def chat(content, role="user"):
    return [{"role": role, "content": content}]


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
        (chat(["a"]), "with a part that is not text"),
        (chat([{"text": "a"}]), "with a part that is not text"),
        (chat([IMAGE]), "only text models can be distilled"),
        (HALF, "holds half of a surrogate pair at character 3"),
        (chat(HALF), "holds half of a surrogate pair at character 3"),
        (chat([{"type": "text", "text": HALF}]), "holds half of a surrogate pair"),
    ],
)
def test_value_that_is_no_prompt_is_an_error_with_the_reason(prompt, reason):
    with pytest.raises(ValueError, match=f"^The prompt in row 5 .*{re.escape(reason)}") as error:
        require_prompt(prompt, "row 5 of the training dataset")
    assert "\n" not in str(error.value)


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
def test_unusual_prompts_are_accepted(prompt):
    require_prompt(prompt, "row 5")


def test_token_id_that_only_one_model_has_is_an_error():
    require_embeddable([[], [5, 299]], 300, make_tokenizer())
    with pytest.raises(ValueError, match=r"token id 299 \('.*'\), which is outside the 299 ids"):
        require_embeddable([[], [5, 299]], 299, make_tokenizer())


# Datasets


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Dataset.from_dict({"prompt": []}), r"^The training dataset is empty: it has no rows\.$"),
        (Dataset.from_list([]), r"^The training dataset is empty: it has no rows\.$"),
        (make_dataset(1), r"needs 4 prompts .* and the dataset has 1 rows"),
    ],
    ids=["no rows", "no columns", "fewer rows than a step"],
)
def test_dataset_with_too_few_prompts_is_an_error(tmp_path, dataset, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path, dataset).train()


def test_training_without_a_dataset_is_an_error(tmp_path):
    trainer = OPDTrainer(make_model(), make_model(seed=1), make_config(tmp_path), processing_class=make_tokenizer())
    with pytest.raises(ValueError, match="no prompts to train on: pass `train_dataset`"):
        trainer.train()


@pytest.mark.parametrize(
    ("dataset", "changes"),
    [
        (make_dataset(1), {"num_generations": 4}),
        (Dataset.from_dict({"prompt": ["a\0b"] * 4}), {}),
        (make_dataset(chat=False), {"template": RAISING}),
    ],
    ids=["one row with four rollouts", "NUL characters", "texts and a broken template"],
)
def test_unusual_datasets_are_trained_on(tmp_path, dataset, changes):
    trainer = build(tmp_path, dataset, max_steps=1, **changes)
    trainer.train()
    assert trainer.state.global_step == 1


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
def test_bad_row_of_a_stream_stops_the_run_at_its_step_and_keeps_the_steps_before(tmp_path, bad, reason):
    rows = [{"prompt": prompt} for prompt in (*PROMPTS[:6], bad, *PROMPTS)]
    trainer = build(tmp_path, IterableDataset.from_generator(lambda: iter(rows)), max_steps=4)
    with pytest.raises(ValueError, match=reason) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert trainer.state.global_step == 1
    assert trainer.token_stats.seen.sum() > 0


# Chat templates


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the tokenizer has no chat template: set `tokenizer.chat_template`"),
        (RAISING, "cannot render a prompt of the dataset: roles must alternate."),
        ("{{ messages[0]['tool']['name'] }}", "cannot render a prompt of the dataset: 'dict object' has no attribute"),
        ("{{ messages[0]['role'] + 3 }}", "cannot render a prompt of the dataset: can only concatenate str"),
        ("{% for message in %}", "cannot render a prompt of the dataset: Expected an expression"),
        ("{{ '' }}", "The prompt in row 0 of the dataset has no tokens."),
    ],
    ids=["missing", "raises", "undefined", "type", "syntax", "empty"],
)
def test_broken_chat_template_is_an_error(tmp_path, template, reason):
    with pytest.raises(ValueError, match=re.escape(reason)) as error:
        build(tmp_path, make_dataset(), template).train()
    assert "\n" not in str(error.value)


def test_broken_chat_template_is_an_error_of_the_probe():
    with pytest.raises(ValueError, match="cannot render a prompt of the dataset: roles must alternate"):
        require_prompts_fit([{"prompt": chat("a")}], make_model(), tokenizer_with(RAISING), 8)


@pytest.mark.parametrize(("error", "prompt"), [(TypeError("a bug"), "a text"), (ValueError("another"), chat("a"))])
def test_errors_that_are_not_the_templates_pass_unchanged(error, prompt):
    def fail(prompts):
        raise error

    with pytest.raises(type(error), match=str(error)):
        tokenize_prompts(fail, [prompt])


# Files, from the command line


def lines(*prompts) -> bytes:
    return b"".join(json.dumps({"prompt": prompt}).encode() + b"\n" for prompt in prompts)


GOOD = lines(*PROMPTS)
# name: content of the file, part of the error message, part of the message for the same file as a stream
FILES = {
    "none": (lines("a", None, "b", "c"), "The prompt in row 1 of", "neither a text"),
    "numbers": (lines(1, 2, 3, 4), "The prompt in row 0 of", "neither a text"),
    "number among texts": (lines("a", "b", "c", 4), "row 3 of", "neither a text"),
    "nested": (lines(*[{"a": "b"}] * 4), "row 0 of", "neither a text"),
    "lists of texts": (lines(*[["a"], ["b"]] * 2), "row 0 of", "neither a text"),
    "chat among texts": (lines("a", chat("b"), "c", "d"), "mixes texts and lists of messages", "mixes texts and lists"),
    "parts of texts": (lines(*[chat(["a"])] * 4), "with a part that is not text", "with a part that is not text"),
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


@pytest.mark.parametrize("name", FILES)
def test_file_with_broken_rows_is_an_error_of_train_and_collect(world, tmp_path, capsys, name):
    content, message, message_of_stream = FILES[name]
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    for command in ("train", "collect"):
        expected = message.replace("FILE", str(file))
        assert expected in error_of([command, *flags(world, tmp_path / "out", dataset_name=file)], capsys)
    assert not (tmp_path / "out" / "occurrences.parquet").exists()

    streamed = flags(world, tmp_path / "out", dataset_name=file, dataset_streaming=True)
    assert message_of_stream.replace("FILE", str(file)) in error_of(["train", *streamed], capsys)
    if name in ("none", "chat among texts", "cut at the end", "not UTF-8"):
        error_of(["collect", *streamed, "--num_prompts", "4"], capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chat_template": None}, "the tokenizer has no chat template"),
        ({"chat_template": RAISING}, "cannot render a prompt of the dataset: roles must alternate."),
        ({"eos_token": None}, "The tokenizer has no eos_token, so no rollout could end"),
        ({"pad_token": "<|far|>"}, "padding token '<|far|>' (id 300) is outside the 300 ids"),
    ],
    ids=["no template", "raising template", "no end token", "padding outside"],
)
@pytest.mark.slow
def test_unusable_tokenizer_is_an_error_of_train_and_collect(world, tmp_path, capsys, changes, message):
    tokenizer = make_tokenizer(("<|far|>",))
    for attribute, value in changes.items():
        setattr(tokenizer, attribute, value)
    student = tmp_path / "student"
    make_model(seed=0).save_pretrained(student)
    tokenizer.save_pretrained(student)
    for command in ("train", "collect"):
        assert message in error_of([command, *flags(world, tmp_path / "out", model_name_or_path=student)], capsys)


@pytest.mark.parametrize("content", [b"\xef\xbb\xbf" + GOOD, json.dumps([{"prompt": p} for p in PROMPTS]).encode()])
@pytest.mark.slow
def test_file_with_a_byte_order_mark_or_a_json_array_is_read(world, tmp_path, capsys, content):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content)
    assert main(["train", *flags(world, tmp_path / "out", dataset_name=file, max_steps=1)]) == 0
    assert "Trained 1 steps" in capsys.readouterr().out
