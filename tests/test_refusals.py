"""Invalid or contradicting settings are a one-line error before any work is done."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import ProcessorMixin
from trl import DistillationConfig

from trl_opd import Controls, LMHead, OPDConfig, OPDTrainer, RockSet, token_weights, weighted_divergence
from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.training.preflight import default_config, ids_to_suppress, warn_of_float32

from tests.helpers.rock_sets import rock_file
from tests.helpers.tiny import config_kwargs, make_config, make_dataset, make_model, make_tokenizer
from tests.helpers.trainers import build


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"token_weighting": "rocks"}, "token_weighting must be one of 'uniform', 'rock', 'control', 'random'"),
        ({"weight_normalization": "sum"}, "weight_normalization must be one of 'tokens', 'weights'"),
        ({"micro_batching": "loose"}, "micro_batching must be one of"),
        ({"token_weighting": "rock"}, "token_weighting='rock' needs a rock set"),
        ({"rock_weight": 1.5}, r"rock_weight must be in \[0, 1\]"),
        ({"rock_weight": -0.1}, r"rock_weight must be in \[0, 1\]"),
        ({"rock_weight": float("nan")}, r"rock_weight must be in \[0, 1\]"),
        ({"rock_window": -1}, "rock_window must be a whole number of at least 0"),
        ({"num_generations": 2.0}, "num_generations must be a whole number of at least 1, got 2.0"),
        ({"rock_window": 1.5}, "rock_window must be a whole number"),
        ({"rock_weight": "0.5"}, "rock_weight must be a number, got '0.5'"),
        ({"num_generations": 0}, "num_generations must be a whole number of at least 1"),
        ({"num_generations": 3}, r"4 rollouts of an optimizer step .* do not divide into groups of num_generations=3"),
        ({"temperature": 0.7, "generation_kwargs": {"do_sample": False}}, "Greedy rollouts"),
        ({"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, "no effect on a teacher that is already instantiated"),
        ({"teacher_tokenizer_name_or_path": "./nowhere"}, "'./nowhere' holds no tokenizer"),
    ],
)
def test_contradicting_settings_are_an_error(tokenizer, tmp_path, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(tmp_path, tokenizer=tokenizer, **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rock_set": "nowhere/rocks.json"}, r"No rock set at nowhere/rocks\.json"),
        ({"teacher": "./nowhere"}, r"There is no teacher in \./nowhere"),
    ],
)
def test_missing_file_or_folder_is_an_os_error_with_its_path(tokenizer, tmp_path, changes, sentence):
    with pytest.raises(OSError, match=sentence):
        build(tmp_path, tokenizer=tokenizer, **changes)


def test_tokenizer_without_an_end_token_is_an_error(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="tokenizer has no eos_token"):
        build(tmp_path, tokenizer=tokenizer)


@pytest.mark.parametrize("weighting", ["uniform", "random"])
def test_rock_window_without_effect_is_a_warning(tmp_path, weighting):
    with pytest.warns(UserWarning, match="rock_window=3 has no effect"):
        make_config(tmp_path, rock_window=3, token_weighting=weighting, rock_set="rocks.json")


def test_rock_set_can_be_a_path_object(tokenizer, tmp_path):
    trainer = build(tmp_path, tokenizer=tokenizer, rock_set=Path(rock_file(tmp_path / "rocks.json", [60])))
    assert json.loads(trainer.args.to_json_string())["rock_set"] == str(tmp_path / "rocks.json")


def test_config_of_trl_is_a_type_error(tokenizer, tmp_path):
    config = DistillationConfig(**config_kwargs(tmp_path))
    with pytest.raises(TypeError, match="takes an OPDConfig, got a DistillationConfig"):
        OPDTrainer(make_model(), make_model(seed=1), config, make_dataset(), processing_class=tokenizer)


NOT_MATCHED = Controls(ids=[200], mass_ratio=0.4, matched=False)
FOREIGN = {"name": "some/other-model", "vocab_size": 9, "fingerprint": "sha256:" + "0" * 64}


@pytest.mark.parametrize(
    ("ids", "fields", "weighting", "sentence"),
    [
        ([60], {"controls": None}, "control", "token_weighting='random'"),
        ([60], {"controls": NOT_MATCHED}, "control", "token_weighting='random'"),
        ([5], {"tokenizer": FOREIGN}, "uniform", r"some/other-model.*TokenizersBackend"),
        ([300], {}, "uniform", "token id 300, but student and teacher share only 300 ids"),
    ],
    ids=["no controls", "controls not matched", "of another tokenizer", "outside the shared vocabulary"],
)
def test_rock_set_that_does_not_fit_is_an_error(tokenizer, tmp_path, ids, fields, weighting, sentence):
    rocks = rock_file(tmp_path / "rocks.json", ids, **fields)
    with pytest.raises(ValueError, match=sentence):
        build(tmp_path, tokenizer=tokenizer, token_weighting=weighting, rock_set=rocks)


def test_rock_set_of_the_students_tokenizer_is_accepted(tokenizer, tmp_path):
    own = {"name": "own", "vocab_size": len(tokenizer), "fingerprint": fingerprint(tokenizer)}
    trainer = build(tmp_path, tokenizer=tokenizer, rock_set=rock_file(tmp_path / "rocks.json", [5, 9], tokenizer=own))
    assert isinstance(trainer.rock_set, RockSet)
    assert trainer.rock_set.ids.tolist() == [5, 9]
    assert build(tmp_path, tokenizer=tokenizer).rock_set is None


def test_frozen_float32_weights_on_a_gpu_are_a_warning():
    gpu, student, teacher = torch.device("cuda"), make_model(), make_model(seed=1).requires_grad_(False)
    with pytest.warns(UserWarning, match="frozen weights of the teacher are in float32"):
        warn_of_float32(gpu, student, teacher)
    lora = get_peft_model(make_model(), LoraConfig(r=4))
    with pytest.warns(UserWarning, match="frozen weights of the student are in float32"):
        warn_of_float32(gpu, lora, teacher.bfloat16())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_float32(gpu, student, teacher)  # a fully trained student needs float32 for its updates
        warn_of_float32(torch.device("cpu"), lora, make_model())


def test_machine_without_bfloat16_gets_an_error_with_the_flags_to_pass(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"`fp16=True, bf16=False` on a GPU.*`use_cpu=True`"):
        OPDConfig(output_dir=str(tmp_path))


def test_vision_language_student_is_an_error(tokenizer, tmp_path):
    class Processor(ProcessorMixin):
        """A processor like those of vision-language models; its text half is enough to be recognised."""

        attributes = ("tokenizer",)
        tokenizer_class = "AutoTokenizer"

        def __init__(self, tokenizer=None):
            super().__init__(tokenizer)

    student = make_model()
    student.config.image_token_id = 1
    with pytest.raises(ValueError, match="distils text models only"):
        build(tmp_path, tokenizer=Processor(tokenizer), student=student)


def test_ids_that_the_teacher_cannot_embed_are_suppressed_but_not_with_vllm():
    with pytest.raises(ValueError, match="The student has 8 vocabulary entries that the teacher cannot embed, and vLL"):
        ids_to_suppress(64, 72, [2], use_vllm=True)
    with pytest.warns(UserWarning, match="Every end of a rollout"):
        found = ids_to_suppress(64, 72, [70], use_vllm=False)
    assert found == range(64, 72)


# Arguments of the two public functions


IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rock_weight": 1.5}, r"rock_weight must be in \[0, 1\]"),
        ({"window": -1}, "window counts positions on each side of a rock and cannot be negative, got -1"),
        ({"window": 1, "token_ids": IDS[0]}, r"A window needs token ids of shape \(B, C\)"),
        ({"mask": torch.ones(2, 2)}, r"mask has shape \(2, 2\), token ids have \(2, 3\)"),
        ({"rock_ids": torch.tensor([-1])}, "rock_ids are indices into a vocabulary and cannot be negative, got -1"),
    ],
)
def test_token_weights_raise_an_error_for_invalid_arguments(changes, sentence):
    given = {"token_ids": IDS, "rock_ids": torch.tensor([2]), "rock_weight": 0.5} | changes
    with pytest.raises(ValueError, match=sentence):
        token_weights(given.pop("token_ids"), given.pop("rock_ids"), **given)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"student_hidden": torch.ones(2, 3, 4)}, r"takes hidden states of shape \(N, H\) and weights of shape \(N,\)"),
        ({"weights": torch.ones(2)}, "must describe the same N positions; got 3, 3 and 2"),
        ({"beta": 1.5}, r"beta must be in \[0, 1\]"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"student_hidden": torch.ones(3, 2)}, "The student's hidden states have width"),
        ({"teacher_hidden": torch.ones(3, 2)}, "The teacher's hidden states have width"),
    ],
)
def test_weighted_divergence_raises_an_error_for_invalid_arguments(changes, sentence):
    given = {"student_hidden": torch.ones(3, 4), "teacher_hidden": torch.ones(3, 4), "weights": torch.ones(3)}
    given |= {"student_head": LMHead(torch.ones(5, 4)), "teacher_head": LMHead(torch.ones(5, 4))}
    given |= {"denominator": 1.0, "beta": 1.0, "temperature": 1.0} | changes
    with pytest.raises(ValueError, match=sentence):
        weighted_divergence(**given)


@pytest.mark.parametrize(
    "student", ["somebody/student", SimpleNamespace(config=SimpleNamespace(name_or_path="student"))]
)
def test_default_output_folder_is_named_after_the_student(monkeypatch, student):
    # The default of OPDConfig needs a GPU with bfloat16.
    monkeypatch.setattr("trl_opd.training.preflight.OPDConfig", lambda folder: folder)
    assert default_config(student) == "student-OPD"
