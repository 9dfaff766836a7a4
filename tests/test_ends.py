"""Where a rollout ends: the end is trained on; a warning where student and teacher end their turns differently."""

import warnings

import pytest
import torch

from trl_opd.models.vocabulary import find_turn_end, warn_of_other_ends
from trl_opd.rollouts.batches import loss_mask

from tests.helpers.tiny import TEMPLATE, make_dataset, make_model, make_tokenizer
from tests.helpers.trainers import Recorder, build, ending_student, measured, trained

END, PAD = 2, 0  # <|end|> and <|pad|> of the tiny tokenizer
RISK = "may end their turns differently"
NAMES = ("<|im_end|>", "<|endoftext|>")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)


def expected_mask(completions: torch.Tensor, ends: list[int]) -> torch.Tensor:
    """Return the mask by hand: every position up to the first end, that end included."""
    masks = []
    for ids in completions.tolist():
        first = next((place for place, id in enumerate(ids) if id in ends), len(ids) - 1)
        masks.append([place <= first for place in range(len(ids))])
    return torch.tensor(masks)


# The end in the loss


@pytest.mark.parametrize("micro_batching", ["tight", "trl"])
@pytest.mark.parametrize("pad_token", [None, "<|end|>"], ids=["no pad token", "pad is eos"])
def test_first_end_is_trained_and_padding_with_the_same_id_is_not(tmp_path, pad_token, micro_batching):
    tokenizer = make_tokenizer()
    tokenizer.pad_token = pad_token  # TRL sets one where none is given
    settings = {"micro_batching": micro_batching, "learning_rate": 0.0, "max_completion_length": 24, "max_steps": 1}
    trainer = trained(tmp_path, student=ending_student(3), tokenizer=tokenizer, cls=Recorder, **settings)
    assert trainer._tokenizer.pad_token_id == END
    ((*_, batch),) = trainer.batches
    mask = expected_mask(batch["completion_ids"], [END])
    ends = int(((batch["completion_ids"] == END) & mask).sum())
    assert ends >= 2  # else the test shows nothing
    assert int((~mask).sum()) >= 4
    assert torch.equal(loss_mask(batch).bool(), mask)
    assert batch["num_items_in_batch"] == trainer.token_stats.seen.sum() == mask.sum()
    assert trainer.token_stats.seen[END].item() == ends
    # The loss is the mean over exactly these positions, the end among them.
    ids, divergences = measured(trainer, {**batch, "completion_mask": mask})
    assert len(ids) == mask.sum()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(divergences.mean().item(), rel=1e-5)


def test_every_end_of_the_generation_config_ends_a_rollout_and_is_trained_on(tmp_path):
    other = 7
    models = {"student": ending_student(3, ends=(END, other)), "teacher": make_model(seed=1)}
    for model in models.values():
        model.generation_config.eos_token_id = [other]
    trainer = trained(tmp_path, **models, cls=Recorder, max_completion_length=24)
    assert sorted(trainer.eos_token_ids) == [END, other]
    seen = {END: 0, other: 0}
    for *_, batch in trainer.batches:
        mask = expected_mask(batch["completion_ids"], [END, other])
        assert torch.equal(loss_mask(batch).bool(), mask)
        for id in seen:
            seen[id] += int(((batch["completion_ids"] == id) & mask).sum())
    assert min(seen.values()) > 0
    assert {id: trainer.token_stats.seen[id].item() for id in seen} == seen


# Ends and padding that are no ids of the student


def test_end_that_the_student_lacks_is_an_error_if_it_has_no_other(tmp_path):
    tokenizer = make_tokenizer(("<|far|>",))
    tokenizer.eos_token = "<|far|>"
    student = make_model(seed=0)
    trainer = trained(tmp_path, student=student, tokenizer=tokenizer)
    assert trainer.eos_token_ids == [300, END]
    assert trainer.state.global_step == 2
    student.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"Every end of a rollout \('<\|far\|>' \(id 300\)\) is outside the 300 ids"):
        build(tmp_path, student=student, tokenizer=tokenizer)


def test_padding_token_that_the_student_lacks_is_an_error(tmp_path):
    tokenizer = make_tokenizer(("<|far|>",))
    tokenizer.pad_token = "<|far|>"
    with pytest.raises(ValueError, match=r"padding token '<\|far\|>' \(id 300\) is outside the 300 ids of the student"):
        build(tmp_path, tokenizer=tokenizer)


# Ends of student and teacher


def chatml_tokenizer(eos: str):
    """Return a tokenizer with Qwen's end tokens and template, that ends with `eos`; and the ids of the two ends."""
    tokenizer = make_tokenizer(("<|im_start|>", *NAMES))
    for name in ("<|im_start|>", *NAMES):
        tokenizer.add_special_tokens({"additional_special_tokens": [name]}, replace_extra_special_tokens=False)
    tokenizer.chat_template, tokenizer.eos_token = CHATML, eos
    return tokenizer, tokenizer.convert_tokens_to_ids(list(NAMES))


def warnings_of(path, *ends: list[str], eos: str, chat: bool = True) -> list[str]:
    """Return the warnings of a student and a teacher that end with the named tokens, "turn" and "text"."""
    kinds = ["turn", "text"]
    tokenizer, ids = chatml_tokenizer(NAMES[kinds.index(eos)])
    models = [make_model(seed=seed, rows=304, eos_token_id=None) for seed in (0, 1)]
    for model, names in zip(models, ends, strict=True):
        model.generation_config.eos_token_id = [ids[kinds.index(name)] for name in names] or None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(path, *models, tokenizer=tokenizer, train_dataset=make_dataset(chat=chat))
    return [str(warning.message) for warning in caught if RISK in str(warning.message)]


@pytest.mark.parametrize("chat", [True, False], ids=["chats", "texts"])
@pytest.mark.parametrize(
    ("student", "teacher", "eos"),
    [
        (["turn", "text"], ["turn", "text"], "turn"),
        (["turn"], ["turn", "text"], "turn"),
        ([], ["turn", "text"], "turn"),
        (["text"], ["turn", "text"], "turn"),
        (["turn", "text"], ["turn"], "text"),
        (["turn", "text"], ["text"], "turn"),
        (["turn"], [], "turn"),
    ],
)
def test_models_that_share_their_ends_give_no_warning(tmp_path, student, teacher, eos, chat):
    assert warnings_of(tmp_path, student, teacher, eos=eos, chat=chat) == []


def test_base_models_that_share_their_end_give_no_warning_on_plain_texts(tmp_path):
    assert warnings_of(tmp_path, ["text"], ["text"], eos="text", chat=False) == []


@pytest.mark.parametrize(
    ("student", "teacher", "eos", "chat"),
    [
        (["text"], ["turn", "text"], "text", True),  # Qwen2.5 base, taught by an instruct model
        (["text"], ["turn", "text"], "text", False),
        (["text"], ["turn"], "text", False),  # no end in common
        (["turn"], ["text"], "turn", True),
        (["text"], ["text"], "text", True),  # two base models on conversations
    ],
)
def test_pairs_that_end_differently_are_a_warning_with_both_tokens(tmp_path, student, teacher, eos, chat):
    (message,) = warnings_of(tmp_path, student, teacher, eos=eos, chat=chat)
    assert "length explosion" in message
    assert all(f"'{name}' (id {id})" in message for name, id in zip(NAMES, chatml_tokenizer(NAMES[0])[1], strict=True))


def test_teacher_without_ends_uses_those_of_its_tokenizer(tmp_path):
    tokenizer, (turn, text) = chatml_tokenizer(NAMES[1])
    make_model(seed=1, rows=304, eos_token_id=None).save_pretrained(tmp_path / "teacher")
    tokenizer.save_pretrained(tmp_path / "teacher")
    ours, _ = chatml_tokenizer(NAMES[0])
    student = make_model(seed=0, rows=304, eos_token_id=None)
    with pytest.warns(UserWarning, match=RISK) as caught:
        build(tmp_path, student=student, teacher=str(tmp_path / "teacher"), tokenizer=ours)
    (message,) = [str(warning.message) for warning in caught if RISK in str(warning.message)]
    assert f"rollouts end at '<|im_end|>' (id {turn}), the teacher ends at '<|endoftext|>' (id {text})" in message


def test_unknown_end_of_the_teacher_gives_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_ends(make_tokenizer(), [END], [], None)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (TEMPLATE, "<|end|>"),
        (CHATML, "<|im_end|>"),
        # Gemma's end contains the word "turn", and Llama 3 puts a header before the content.
        (CHATML.replace("im_end", "end_of_turn"), "<end_of_turn>"),
        ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] | trim }}<eot>{% endfor %}", "<eot>"),
        (
            "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<eot>{% endif %}{% endfor %}",
            "<eot>",
        ),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None),
        ("{{ raise_exception('no') }}", None),
        (None, None),
    ],
)
def test_the_token_that_closes_a_turn_is_read_from_the_template(template, expected):
    tokenizer = make_tokenizer(("<|im_start|>", *NAMES, "<end_of_turn>", "<eot>"))
    tokenizer.chat_template = template if template is None else template.replace("<|end_of_turn|>", "<end_of_turn>")
    found = find_turn_end(tokenizer)
    assert found == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))


def test_turn_end_uses_the_users_template_settings():
    tokenizer = make_tokenizer(("<eot>",))
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% if closed %}<eot>{% endif %}{% endfor %}"
    assert find_turn_end(tokenizer) is None
    assert find_turn_end(tokenizer, {"closed": True}) == tokenizer.convert_tokens_to_ids("<eot>")
