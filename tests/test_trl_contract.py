"""Tests of the seams of TRL that trl_opd overrides, calls or copies, all of them private: each is as it was in 1.16.0.

When one fails, read what TRL changed there, bring trl_opd in line, then write the row that the message prints.
"""

import ast
import hashlib
import inspect
import textwrap
from importlib.metadata import version
from typing import NamedTuple

import pytest
import trl
from trl import DistillationTrainer
from trl.kernels import chunked_divergence
from trl.models import utils as model_utils
from trl.trainer import distillation_trainer
from trl.trainer import utils as trainer_utils

from trl_opd import OPDConfig, OPDTrainer, _trl

EXPECTED_TRL = "1.16.0"


class Seam(NamedTuple):
    """A place in TRL, its parameters without annotations, and the sha256 of its source (decorators included)."""

    owner: object
    name: str
    parameters: str
    sha256: str


SEAMS = [
    Seam(
        DistillationTrainer,
        "__init__",
        "(self, model, teacher_model=None, args=None, train_dataset=None, eval_dataset=None, "
        "processing_class=None, callbacks=None, optimizers=(None, None), quantization_config=None, "
        "peft_config=None, tools=None)",
        "b5a0ad1b1031e096d42641602de674bd91027b27fd4bff4fcb6f43ebdcbbf076",
    ),
    Seam(
        DistillationTrainer,
        "get_train_dataloader",
        "(self)",
        "d3c7c32e5154088019da47afd51208f8946e26a1f48d9270b861c995b1ec4355",
    ),
    Seam(
        DistillationTrainer,
        "_get_train_sampler",
        "(self, dataset=None)",
        "f3a856a8af028a13699cca4c27198da29d4f5b570048f0b806630e80f9f6f7dd",
    ),
    Seam(
        DistillationTrainer,
        "_tokenize_prompts",
        "(self, prompts)",
        "30568810007eb3f7dc611944986f412130a15fb808370196a5c8b51a3a6613f3",
    ),
    Seam(
        DistillationTrainer,
        "_generate_single_turn",
        "(self, prompt_ids, images, multimodal_fields, has_tool_images=False)",
        "b2cc5048ef74151f967fb6aced453d129ae8623dbec5adfa6b3de7fb1d0656e3",
    ),
    Seam(
        DistillationTrainer,
        "_generate_and_score_completions",
        "(self, inputs)",
        "2416bfc479ade3424594678a1cc7496f5766ebe605b1a92cd09ca44b9e536ddb",
    ),
    Seam(
        DistillationTrainer,
        "_prepare_inputs",
        "(self, generation_batch)",
        "a0b5e05b3647e88957110e6cefd1e04449cf3fbd6fa223b5c7dbc1314bf7e386",
    ),
    Seam(
        DistillationTrainer,
        "compute_loss",
        "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
        "e5082879a718304046e810122e1208ff15189bbc14470ee17aea69f3e491b774",
    ),
    Seam(
        DistillationTrainer,
        "_compute_loss",
        "(self, unwrapped_student, inputs, num_items_in_batch)",
        "9fc0021cbcc0b5e90ee09c8afcc998e7c0db3ba2bfbedfa863fd4630c2578013",
    ),
    Seam(
        DistillationTrainer,
        "_get_last_hidden_state",
        "(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, pixel_values=None, "
        "image_grid_thw=None, pixel_attention_mask=None, spatial_shapes=None, image_sizes=None, "
        "token_type_ids=None, mm_token_type_ids=None, image_position_ids=None)",
        "12dc17e4ad4b19995ecc4bd1870a53a5f3abd6febc4b90867ffd032b004dfbd3",
    ),
    Seam(
        DistillationTrainer,
        "training_step",
        "(self, model, inputs, num_items_in_batch)",
        "9e18632f7dd8e8d8f0ebbdcc4431feb1a9e3c037a02cf8c3aec38aa68ee58814",
    ),
    Seam(
        DistillationTrainer,
        "prediction_step",
        "(self, model, inputs, prediction_loss_only, ignore_keys=None)",
        "008b555451073a5a71a59ea4fef1e38fb3c04d2e532abaf05ddc114f524e3ba3",
    ),
    Seam(
        DistillationTrainer,
        "_save_checkpoint",
        "(self, model, trial)",
        "b6ee0a370c266b6f6ada183d32719e4f689ac7a54086c1ec40a69a79e79921c6",
    ),
    Seam(
        DistillationTrainer,
        "create_model_card",
        "(self, model_name=None, dataset_name=None, tags=None)",
        "4f8a407fd9fd3f6e9d3b2300a2029bee1c742631f1ec2c62b34a6cc31841f106",
    ),
    Seam(
        DistillationTrainer,
        "log",
        "(self, logs, start_time=None)",
        "cf1ee75dd2cb9959f74520baae74017b5005c96c62063007b541dc33ceb72323",
    ),
    Seam(
        distillation_trainer,
        "_chunked_divergence_loss",
        "(student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, "
        "completion_mask, beta, num_items_in_batch=None, student_lm_head_bias=None, "
        "teacher_lm_head_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0, "
        "student_final_logit_softcapping=None, teacher_final_logit_softcapping=None, temperature=1.0)",
        "550cb45191ab1654ac65f2d7fb8ca8b81789c16b4799efaf37eadb54363077e4",
    ),
    Seam(
        chunked_divergence.ChunkedDivergenceFunction,
        "forward",
        "(ctx, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, "
        "beta, temperature=1.0, student_logit_scale=1.0, student_final_logit_softcapping=None, "
        "teacher_logit_scale=1.0, teacher_final_logit_softcapping=None)",
        "ca2ff98ab97c5c7c654f015722eaeb27e46cb4352dc1898d37bbe824023af98e",
    ),
    Seam(
        chunked_divergence.ChunkedDivergenceFunction,
        "backward",
        "(ctx, grad_divergence, _)",
        "1a9743605a3ad3e0f6fd9adc36144c6ef0a2ce60a97566972f08d50786f5eac1",
    ),
    Seam(
        trainer_utils,
        "RepeatSampler",
        "(data_source, mini_repeat_count, batch_size=1, repeat_count=1, shuffle=True, seed=None)",
        "ba139f4a43eeecd4976bc51c850039df3b53a308e5f1c372f7922e367906cd58",
    ),
    Seam(
        trainer_utils,
        "repeat_iterable_dataset",
        "(dataset, mini_repeat_count, batch_size=1, repeat_count=1)",
        "a7c27f50f208c900e7aa09016d4a16a60c6007e361df1014724c8901acdef773",
    ),
    Seam(
        trainer_utils,
        "create_model_from_path",
        "(model_id, architecture=None, **kwargs)",
        "5a78af7066b90c381583961bcc07b1470250be9de836a844de99161f0df78e41",
    ),
    Seam(
        model_utils,
        "prepare_deepspeed",
        "(model, accelerator)",
        "86d126e5d92c55d24a93f055b4c21656dbf11d26c01871518c60c2e80587ff2c",
    ),
    Seam(
        model_utils,
        "unwrap_model_for_generation",
        "(model, accelerator, gather_deepspeed3_params=True, generation_kwargs=None, "
        "gradient_checkpointing_kwargs=None)",
        "583d1303c5c55405c0c7b62819e64a1909c533a07cee740ed59b276a1b82375e",
    ),
    Seam(
        model_utils,
        "_ForwardRedirection",
        "()",
        "4956752a71f175b3cf95119c7e293c5630c77121bb9162f3b96ff8986d7cd557",
    ),
]


def seam_name(seam: Seam) -> str:
    return f"{seam.owner.__name__}.{seam.name}"


def parameters_of(function) -> str:
    signature = inspect.signature(inspect.unwrap(function))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def sha256_of(function) -> str:
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode("utf-8")).hexdigest()


def difference(seam: Seam) -> str:
    """Return what TRL changed in a seam, as the message of a failure, or an empty text."""
    where = f"TRL {version('trl')} is installed, trl_opd is built on TRL {EXPECTED_TRL}: {seam_name(seam)}"
    found = getattr(seam.owner, seam.name, None)
    if found is None:
        return f"{where} is gone."
    parameters, sha256 = parameters_of(found), sha256_of(found)
    if (parameters, sha256) == (seam.parameters, seam.sha256):
        return ""
    what = "has another body" if parameters == seam.parameters else f"has other parameters than {seam.parameters}"
    return f"{where} {what}.\nNow: {parameters!r},\n     {sha256!r}"


@pytest.mark.parametrize("seam", SEAMS, ids=seam_name)
def test_the_seam_is_the_one_that_trl_opd_is_built_on(seam):
    changed = difference(seam)
    assert not changed, changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "_gone"}, "DistillationTrainer._gone is gone"),
        ({"parameters": "(self, logs)"}, "DistillationTrainer.log has other parameters than (self, logs)."),
        ({"sha256": 64 * "0"}, "DistillationTrainer.log has another body."),
    ],
)
def test_a_changed_seam_is_named_with_both_versions(change, message):
    (seam,) = [seam for seam in SEAMS if (seam.owner, seam.name) == (DistillationTrainer, "log")]
    changed = difference(seam._replace(**change))
    assert f"TRL {version('trl')} is installed" in changed
    assert f"built on TRL {EXPECTED_TRL}" in changed
    assert message in changed


def test_every_method_of_trl_that_the_trainer_overrides_or_calls_is_pinned():
    tree = ast.parse(textwrap.dedent(inspect.getsource(OPDTrainer)))
    touched = set(vars(OPDTrainer)) | {
        node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and _is_self(node.value)
    }
    from_trl = {name for name in touched if _is_method_of_trl(getattr(DistillationTrainer, name, None))}
    assert {"__init__", "_compute_loss", "_get_last_hidden_state"} <= from_trl, "the reader of the source is blind"
    assert from_trl <= {seam.name for seam in SEAMS if seam.owner is DistillationTrainer}


def _is_self(node: ast.AST) -> bool:
    return ast.unparse(node) in ("self", "super()")


def _is_method_of_trl(value) -> bool:
    return inspect.isfunction(value) and value.__module__.split(".")[0] == "trl"


def test_everything_that_comes_through_trl_py_is_pinned():
    brought = {name for name, value in vars(_trl).items() if getattr(value, "__module__", "").split(".")[0] == "trl"}
    brought = {name for name in brought if not hasattr(trl, name)}  # a public name needs no pin
    assert "ChunkedDivergenceFunction" in brought
    assert brought <= {part for seam in SEAMS for part in (seam.owner.__name__, seam.name)}


def test_options_that_trl_reads_from_json_are_those_of_both_models_and_the_generation():
    known = set(_trl.DICT_FIELDS)
    assert known >= {"model_init_kwargs", "teacher_model_init_kwargs", "generation_kwargs"}
    *inherited, own = OPDConfig._VALID_DICT_FIELDS
    assert tuple(inherited) == _trl.DICT_FIELDS
    assert own == "transformers_continuous_batching_config"


def test_what_trl_cites_for_its_trainer_is_what_the_card_expects():
    paper = _trl.distillation_paper()
    assert paper["id"] == "2306.13649"
    assert paper["title"].startswith("On-Policy Distillation of Language Models")
    assert paper["citation"].startswith("@inproceedings{agarwal2024")


def test_the_constructor_takes_what_that_of_trl_takes():
    ours, theirs = (inspect.signature(trainer.__init__).parameters for trainer in (OPDTrainer, DistillationTrainer))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(
    "name", sorted(name for name in vars(OPDTrainer) if inspect.isfunction(getattr(DistillationTrainer, name, None)))
)
def test_an_override_can_be_called_as_the_method_that_it_replaces(name):
    ours = list(inspect.signature(getattr(OPDTrainer, name)).parameters.values())
    theirs = list(inspect.signature(getattr(DistillationTrainer, name)).parameters.values())
    if [p.kind for p in ours[-2:]] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        ours, theirs = ours[:-2], theirs[: len(ours) - 2]  # the rest is handed on as it comes
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for mine, its in zip(ours, theirs, strict=False):
        assert mine.kind == its.kind
        # What TRL may leave out, a caller leaves out; a default where TRL has none harms nobody.
        if its.default is not its.empty:
            assert mine.default == its.default
    assert all(p.default is not p.empty for p in ours[len(theirs) :]), "callers know nothing of a new parameter"


@pytest.mark.parametrize("installed", ["1.16.0", "1.16.3", "1.16.0.post1", "1.16.10"])
def test_a_supported_trl_is_accepted(installed):
    _trl.require_supported_trl(installed)


@pytest.mark.parametrize("installed", ["0.29.0", "1.2.0", "1.15.0", "1.16.0.dev0", "1.17.0.dev0", "1.17.0", "2.0.0"])
def test_another_trl_is_refused_with_both_versions(installed):
    with pytest.raises(ImportError, match=rf"TRL 1\.16 .*TRL {installed} is installed") as caught:
        _trl.require_supported_trl(installed)
    assert caught.value.name == "trl"
    assert "\n" not in str(caught.value)
    assert 'pip install "trl>=1.16,<1.17"' in str(caught.value)
