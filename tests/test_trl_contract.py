"""Tests of the private parts of TRL that this package overrides, calls or copies: they are as in TRL 1.16.0.

Signatures and behaviour are pinned for all of them, and the source only where this package holds a copy. If a test
fails, read what TRL changed, adapt the package, and then write the values of the message here.
"""

import ast
import hashlib
import inspect
import textwrap
from importlib.metadata import version

import pytest
import torch
import trl
from trl import DistillationTrainer
from trl.kernels import chunked_divergence
from trl.models import utils as model_utils
from trl.trainer import distillation_trainer
from trl.trainer import utils as trainer_utils

from trl_opd import OPDConfig, OPDTrainer, _trl

from tests.helpers.trainers import build, recorder, trained

EXPECTED_TRL = "1.16.0"

# Owner -> name -> parameters without annotations.
SIGNATURES = {
    DistillationTrainer: {
        "__init__": (
            "(self, model, teacher_model=None, args=None, train_dataset=None, eval_dataset=None, "
            "processing_class=None, callbacks=None, optimizers=(None, None), quantization_config=None, "
            "peft_config=None, tools=None)"
        ),
        "get_train_dataloader": "(self)",
        "_get_train_sampler": "(self, dataset=None)",
        "_tokenize_prompts": "(self, prompts)",
        "_generate_single_turn": "(self, prompt_ids, images, multimodal_fields, has_tool_images=False)",
        "_generate_and_score_completions": "(self, inputs)",
        "_prepare_inputs": "(self, generation_batch)",
        "compute_loss": "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
        "_compute_loss": "(self, unwrapped_student, inputs, num_items_in_batch)",
        "_get_last_hidden_state": (
            "(self, unwrapped_model, input_ids, attention_mask, logits_to_keep, pixel_values=None, "
            "image_grid_thw=None, pixel_attention_mask=None, spatial_shapes=None, image_sizes=None, "
            "token_type_ids=None, mm_token_type_ids=None, image_position_ids=None)"
        ),
        "training_step": "(self, model, inputs, num_items_in_batch)",
        "prediction_step": "(self, model, inputs, prediction_loss_only, ignore_keys=None)",
        "_save_checkpoint": "(self, model, trial)",
        "create_model_card": "(self, model_name=None, dataset_name=None, tags=None)",
        "log": "(self, logs, start_time=None)",
    },
    distillation_trainer: {
        "_chunked_divergence_loss": (
            "(student_hidden_states, teacher_hidden_states, student_lm_head_weight, teacher_lm_head_weight, "
            "completion_mask, beta, num_items_in_batch=None, student_lm_head_bias=None, "
            "teacher_lm_head_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0, "
            "student_final_logit_softcapping=None, teacher_final_logit_softcapping=None, temperature=1.0)"
        ),
    },
    chunked_divergence.ChunkedDivergenceFunction: {
        "forward": (
            "(ctx, student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, "
            "beta, temperature=1.0, student_logit_scale=1.0, student_final_logit_softcapping=None, "
            "teacher_logit_scale=1.0, teacher_final_logit_softcapping=None)"
        ),
        "backward": "(ctx, grad_divergence, _)",
    },
    trainer_utils: {
        "RepeatSampler": "(data_source, mini_repeat_count, batch_size=1, repeat_count=1, shuffle=True, seed=None)",
        "repeat_iterable_dataset": "(dataset, mini_repeat_count, batch_size=1, repeat_count=1)",
        "create_model_from_path": "(model_id, architecture=None, **kwargs)",
    },
    model_utils: {
        "prepare_deepspeed": "(model, accelerator)",
        "unwrap_model_for_generation": (
            "(model, accelerator, gather_deepspeed3_params=True, generation_kwargs=None, "
            "gradient_checkpointing_kwargs=None)"
        ),
        "_ForwardRedirection": "()",
    },
}

# sha256 of the source, decorators included: `OPDTrainer.compute_loss` repeats the denominator of TRL's `compute_loss`,
# and `trl_opd.loss.lm_head` repeats how the other two find the head, its scale and its soft-capping.
COPIED = {
    (DistillationTrainer, "compute_loss"): "e5082879a718304046e810122e1208ff15189bbc14470ee17aea69f3e491b774",
    (DistillationTrainer, "_compute_loss"): "9fc0021cbcc0b5e90ee09c8afcc998e7c0db3ba2bfbedfa863fd4630c2578013",
    (
        distillation_trainer,
        "_chunked_divergence_loss",
    ): "550cb45191ab1654ac65f2d7fb8ca8b81789c16b4799efaf37eadb54363077e4",
}

SEAMS = [(owner, name) for owner, names in SIGNATURES.items() for name in names]


def seam_name(value) -> str:
    return value if isinstance(value, str) else value.__name__


def parameters_of(owner, name: str) -> str:
    """Return the parameters of a function or class without annotations, or "gone"."""
    if not hasattr(owner, name):
        return "gone"
    signature = inspect.signature(inspect.unwrap(getattr(owner, name)))
    bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


def sha256_of(function) -> str:
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode("utf-8")).hexdigest()


@pytest.mark.parametrize(("owner", "name"), SEAMS, ids=seam_name)
def test_signature_is_that_of_the_supported_trl(owner, name):
    message = f"TRL {version('trl')} is installed, trl_opd is built on TRL {EXPECTED_TRL}"
    assert parameters_of(owner, name) == SIGNATURES[owner][name], message


@pytest.mark.parametrize(("owner", "name"), COPIED, ids=seam_name)
def test_source_of_what_we_copied_is_that_of_the_supported_trl(owner, name):
    message = f"TRL {version('trl')} is installed, trl_opd has a copy from TRL {EXPECTED_TRL}"
    assert sha256_of(getattr(owner, name)) == COPIED[owner, name], message


def test_check_of_signatures_sees_a_change():
    assert parameters_of(DistillationTrainer, "_gone") == "gone"
    assert parameters_of(OPDTrainer, "log") == SIGNATURES[DistillationTrainer]["log"]
    assert parameters_of(OPDTrainer, "sample_rollouts") == "(self, rows)"


def test_trl_buffers_the_micro_batches_of_a_step_until_the_next_step(tmp_path):
    class Buffered(DistillationTrainer):
        def _prepare_inputs(self, generation_batch):
            inputs = super()._prepare_inputs(generation_batch)
            seen.append((self._step, self._buffered_inputs, inputs))
            return inputs

    seen = []
    build(tmp_path, cls=Buffered, gradient_accumulation_steps=2, max_steps=2).train()
    assert [step for step, *_ in seen] == [0, 1, 2, 3]
    for step, buffer, inputs in seen:
        assert len(buffer) == 2
        assert inputs is buffer[step % 2]
    buffers = [buffer for _, buffer, _ in seen]
    assert buffers[0] is buffers[1]
    assert buffers[1] is not buffers[2]
    assert buffers[2] is buffers[3]


def test_trl_generates_the_masks_and_the_token_count_that_we_read(tmp_path):
    ((*_, batch),) = trained(tmp_path, cls=recorder(DistillationTrainer), max_steps=1).batches
    assert batch["prompt_ids"].shape == batch["prompt_mask"].shape
    assert batch["completion_ids"].shape == batch["completion_mask"].shape
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()


def test_every_method_of_trl_that_the_trainer_overrides_or_calls_is_pinned():
    tree = ast.parse(textwrap.dedent(inspect.getsource(OPDTrainer)))
    touched = set(vars(OPDTrainer))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("self", "super()"):
            touched.add(node.attr)
    values = {name: getattr(DistillationTrainer, name, None) for name in touched}
    from_trl = {name for name, value in values.items() if inspect.isfunction(value) and _is_from_trl(value)}
    assert {"__init__", "_compute_loss", "_get_last_hidden_state"} <= from_trl, "the reader of the source is blind"
    assert from_trl <= set(SIGNATURES[DistillationTrainer])


def _is_from_trl(value) -> bool:
    return getattr(value, "__module__", "").split(".")[0] == "trl"


def test_every_private_import_from_trl_is_pinned():
    brought = {name for name, value in vars(_trl).items() if _is_from_trl(value)}
    brought = {name for name in brought if not hasattr(trl, name)}  # a public name needs no pin
    assert "ChunkedDivergenceFunction" in brought
    owners = {owner.__name__ for owner in SIGNATURES}
    assert brought <= owners | {name for _, name in SEAMS}


def test_options_that_can_be_passed_as_json_are_those_of_trl_and_the_batching_engine():
    known = set(_trl.DICT_FIELDS)
    assert known >= {"model_init_kwargs", "teacher_model_init_kwargs", "generation_kwargs"}
    *inherited, own = OPDConfig._VALID_DICT_FIELDS
    assert tuple(inherited) == _trl.DICT_FIELDS
    assert own == "transformers_continuous_batching_config"


def test_trl_cites_the_paper_that_the_model_card_expects():
    paper = _trl.distillation_paper()
    assert paper["id"] == "2306.13649"
    assert paper["title"].startswith("On-Policy Distillation of Language Models")
    assert paper["citation"].startswith("@inproceedings{agarwal2024")


def test_constructor_has_the_parameters_of_trls():
    ours, theirs = (inspect.signature(trainer.__init__).parameters for trainer in (OPDTrainer, DistillationTrainer))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(
    "name", sorted(name for name in vars(OPDTrainer) if inspect.isfunction(getattr(DistillationTrainer, name, None)))
)
def test_override_can_be_called_like_the_method_it_replaces(name):
    ours = list(inspect.signature(getattr(OPDTrainer, name)).parameters.values())
    theirs = list(inspect.signature(getattr(DistillationTrainer, name)).parameters.values())
    if [p.kind for p in ours[-2:]] == [inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD]:
        ours, theirs = ours[:-2], theirs[: len(ours) - 2]  # `*args, **kwargs` passes the rest on
    assert [p.name for p in ours[: len(theirs)]] == [p.name for p in theirs]
    for mine, its in zip(ours, theirs, strict=False):
        assert mine.kind == its.kind
        # Callers omit what has a default in TRL; a default that TRL lacks does no harm.
        if its.default is not its.empty:
            assert mine.default == its.default
    assert all(p.default is not p.empty for p in ours[len(theirs) :]), "TRL's callers do not pass new parameters"


@pytest.mark.parametrize("installed", ["1.16.0", "1.16.3", "1.16.0.post1", "1.16.10"])
def test_supported_trl_is_accepted(installed):
    _trl.require_supported_trl(installed)


@pytest.mark.parametrize("installed", ["0.29.0", "1.2.0", "1.15.0", "1.16.0.dev0", "1.17.0.dev0", "1.17.0", "2.0.0"])
def test_unsupported_trl_is_an_import_error_with_both_versions(installed):
    with pytest.raises(ImportError, match=rf"TRL 1\.16, but TRL {installed} is installed") as caught:
        _trl.require_supported_trl(installed)
    assert caught.value.name == "trl"
    assert "\n" not in str(caught.value)
    assert 'pip install "trl>=1.16,<1.17"' in str(caught.value)


def test_no_autocast_is_active_inside_trls_loss(tmp_path):
    """Our override of `_get_last_hidden_state` adds the autocast that is missing there."""
    seen = set()

    class Spy(DistillationTrainer):
        def _get_last_hidden_state(self, *args, **kwargs):
            hidden = super()._get_last_hidden_state(*args, **kwargs)
            seen.add((hidden.dtype, torch.is_autocast_enabled("cpu")))
            return hidden

    trained(tmp_path, cls=Spy, bf16=True)
    assert seen == {(torch.float32, False)}
