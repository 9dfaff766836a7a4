"""Compares each model with itself before a training, so that no architecture or adapter trains on wrong numbers.

The trainer never calls a model's own forward: it multiplies the backbone's hidden states by the LM head, in padded
batches. A few short forwards show whether that gives the model's own distribution, whether later tokens change earlier
ones, and whether padding changes anything. There is no list of architectures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
import transformers
from accelerate.utils import has_offloaded_params, is_peft_model
from peft import PromptLearningConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from ..loss.lm_head import lm_head
from ..loss.logits import head_logits
from .quantised import read_head
from .shape import context_length

# Length of the longer sequence, of which the last quarter is changed to see whether the model is causal. The shorter
# one has two thirds of it, and is padded.
LONG = 24
# Tokens that are generated after the shorter sequence, alone and beside the longer one.
GENERATED = 3
# Largest mean KL (nats per token) between two ways to the same distribution. bfloat16 spaces logits 0.125 apart at 16,
# and 8-bit layers choose the columns that stay in half precision by batch.
LIMIT_FLOAT32 = 1e-6
LIMIT_HALF = 2e-3
LIMIT_8BIT = 1e-2
# The same where `generate` gives one of the two, in half precision: its forwards of single tokens have other shapes,
# and it is measured on few tokens.
LIMIT_GENERATED = 1e-2
# Standard deviation of the noise on the weights of an adapter, many of which are zero at first.
NOISE = 0.05
# Names of the number of experts in configurations.
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")

logger = logging.getLogger(__name__)

# (model, ids, attention mask, number of last positions) -> last hidden states of those positions.
LastHiddenState = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class StudentTraits:
    """What the check has found out about a student.

    Args:
        scores_padded_left (`bool`): Whether padding on the left changes nothing in a forward.
        generates_padded (`bool`): Whether padding on the left changes nothing in `generate`.
        generates_together (`bool`): Whether another prompt of the same length changes nothing in `generate`.
        starts_at_base (`bool`): Whether its adapter, if it has one, changes nothing yet.
    """

    scores_padded_left: bool = True
    generates_padded: bool = True
    generates_together: bool = True
    starts_at_base: bool = True


def require_causal_lm(model: PreTrainedModel, who: str) -> None:
    """Raise `ValueError` unless a model is a decoder with an LM head that the trainer can read.

    Args:
        model (`transformers.PreTrainedModel`): A student or teacher, with or without an adapter.
        who (`str`): "student" or "teacher".

    Raises:
        `ValueError`: for an encoder-decoder, a model without an LM head, an adapter on the head, and adapters whose
            effect the backbone never sees.
    """
    kind = type(model.get_base_model() if is_peft_model(model) else model).__name__
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder or getattr(head, "weight", None) is None:
        missing = "is an encoder-decoder" if model.config.is_encoder_decoder else "has no LM head"
        raise ValueError(
            f"The {who} is a {kind}, which {missing}: on-policy distillation needs a causal language model. Load it "
            "with `AutoModelForCausalLM`."
        )
    # transformers' own `add_adapter` puts these layers into a model that is no PeftModel.
    if isinstance(head, BaseTunerLayer):
        raise ValueError(
            f"The {who} has a PEFT adapter on its LM head, whose weight the divergence reads directly, without the "
            "adapter: merge it first (`model = model.merge_and_unload()`), or leave `lm_head` out of target_modules."
        )
    if not is_peft_model(model):
        return
    configs = model.peft_config.values()
    if any(isinstance(config, PromptLearningConfig) for config in configs):
        raise ValueError(
            f"The {who} has a prompt-learning adapter, whose virtual tokens the backbone never receives: use a "
            "weight-based adapter such as LoRA."
        )
    if any(getattr(config, "alora_invocation_tokens", None) for config in configs):
        raise ValueError(
            f"The {who} has an activated LoRA (`alora_invocation_tokens`), which acts only in PEFT's own forward, so "
            "it would not be used, and nothing would be trained: use a plain LoRA."
        )


def require_causal_architecture(name: str, *, revision: str | None, trust_remote_code: bool) -> None:
    """Raise `ValueError` if the configuration of a student names a class that cannot generate.

    TRL loads the class that the configuration names, also where that is a classifier or a backbone.

    Args:
        name (`str`): A folder, or a name on the Hub.
        revision (`str`, *optional*): Revision on the Hub.
        trust_remote_code (`bool`): Whether code from the Hub may run.

    Raises:
        `OSError`: if there is no configuration.
        `ValueError`: if it names no class, or one that cannot generate.
    """
    config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    if not config.architectures:
        raise ValueError(
            f"The config.json of the student {name} names no architecture: write it with `save_pretrained`."
        )
    kind = getattr(transformers, config.architectures[0], None)  # `None` for code from the Hub
    if kind is not None and not kind.can_generate():
        raise ValueError(
            f"The student is a {kind.__name__}, which has no LM head: on-policy distillation needs a causal language "
            "model. Load it with `AutoModelForCausalLM`."
        )


def check_teacher(
    teacher: PreTrainedModel,
    who: str = "teacher",
    *,
    last_hidden_state: LastHiddenState,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    padded_left: bool = False,
) -> bool:
    """Return whether a teacher can be padded on the left; raise `ValueError` if it would score wrong distributions.

    Args:
        teacher (`transformers.PreTrainedModel`): The teacher, on its device and not wrapped.
        who (`str`): Its part, for the error: "teacher", or "reference student".
        last_hidden_state (`Callable`): Runs a model's backbone, as TRL's `_get_last_hidden_state`.
        autocast (`Callable`): Returns the context in which the trainer runs forwards.
        padded_left (`bool`): Whether its forwards are to be padded on the left, as TRL's loss does; else `True` is
            returned without a look.

    Raises:
        `ValueError`: with the mean KL by which two ways to the same distribution differ.
    """
    check = _Check(teacher, who, last_hidden_state, autocast)
    if not check.can_run():
        return True
    with check.undone():
        if not check.is_finite():
            return True
        check.require_own_distribution()
        return not padded_left or check.scores_padded_left()


def check_student(
    student: PreTrainedModel,
    *,
    last_hidden_state: LastHiddenState,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    sampling: Callable[[torch.nn.Module], AbstractContextManager] = nullcontext,
    generates: bool = True,
    padded_left: bool = False,
) -> StudentTraits:
    """Return what a student's forwards depend on; raise `ValueError` if it would be trained on wrong numbers.

    Beside the comparison of [`check_teacher`], the weights of an adapter get noise, because most adapters change
    nothing at first: with the noise, hidden states and head must still give the model's own distribution, and another
    one than before.

    Args:
        student (`transformers.PreTrainedModel`): The student on its device, not wrapped for training.
        last_hidden_state (`Callable`): Runs a model's backbone, as TRL's `_get_last_hidden_state`.
        autocast (`Callable`): Returns the context in which the trainer runs forwards.
        sampling (`Callable`): Returns the context in which the trainer lets a model generate.
        generates (`bool`): Whether the model's own `generate` samples the rollouts.
        padded_left (`bool`): Whether its forwards are to be padded on the left, as TRL's loss does.

    Raises:
        `ValueError`: with the mean KL by which two ways to the same distribution differ.
    """
    check = _Check(student, "student", last_hidden_state, autocast)
    if not check.can_run():
        return StudentTraits()
    with check.undone():
        if not check.is_finite():
            return StudentTraits()
        check.require_own_distribution()
        scores_padded_left = not padded_left or check.scores_padded_left()
        generates_padded = generates_together = True
        if generates:
            with sampling(student):
                check.require_scored_generation()
                generates_padded = check.generates_beside(longer=True)
                generates_together = generates_padded or check.generates_beside(longer=False)
        check.require_trainable_effect()  # before the adapter is switched off, which changes what is trainable
        starts_at_base = not is_peft_model(student) or check.starts_at_base()
    return StudentTraits(scores_padded_left, generates_padded, generates_together, starts_at_base)


def generates_padded(model: PreTrainedModel) -> bool:
    """Return whether padding on the left changes nothing in the `generate` of a model in eval mode."""
    check = _Check(model, "student", _no_states, nullcontext)
    with check.undone():
        return check.generates_beside(longer=True)


def _no_states(*_) -> torch.Tensor:
    raise RuntimeError("This check looks at `generate` only.")


def largest_difference(model: PreTrainedModel, *, mixed: bool = False) -> float:
    """Return the largest mean KL (nats) between two ways to the same distribution that is due to rounding alone.

    Args:
        model (`torch.nn.Module`): The model, quantised or not.
        mixed (`bool`): Whether forwards run in half precision by autocast.
    """
    if getattr(model, "is_loaded_in_8bit", False):
        return LIMIT_8BIT
    in_float32 = all(parameter.dtype == torch.float32 for parameter in model.parameters())
    rounded = mixed or torch.get_float32_matmul_precision() != "highest"  # TF32 on a GPU, bfloat16 on a CPU
    return LIMIT_FLOAT32 if in_float32 and not rounded else LIMIT_HALF


@torch.no_grad()
def mean_difference(model: PreTrainedModel, other: PreTrainedModel) -> float:
    """Return the mean KL (nats) between the distributions of two models on some tokens, each on its device.

    Args:
        model (`transformers.PreTrainedModel`): A model.
        other (`transformers.PreTrainedModel`): Another one with its vocabulary.
    """
    return kl_between(own_logits(model), own_logits(other), median=is_mixture(model))


@torch.no_grad()
def own_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the logits of a model's own forward on some tokens, without dropout, float32, `(L, V)`."""
    generator = torch.Generator().manual_seed(0)
    ids = _ordinary_ids(model)
    row = ids[torch.randint(len(ids), (1, 2 * LONG), generator=generator)].to(model.device)
    row = row[:, : context_length(model)]
    with _eval_mode(model):
        return model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0].float()


def kl_between(right: torch.Tensor, found: torch.Tensor, *, median: bool = False) -> float:
    """Return the mean or median KL (nats) between the softmax of rows of logits, `(N, V)` each.

    Rows that overflow in `right` are left out: float16 has no logits above 65 504, and the divergence is computed in
    float32. A logit of minus infinity is a probability of 0.
    """
    comparable = (right < torch.inf).all(-1)  # neither infinite nor NaN
    if not comparable.any():
        return 0.0
    right_log_p = right[comparable].double().log_softmax(-1)
    found_log_p = found.to(right.device)[comparable].double().log_softmax(-1)
    p = right_log_p.exp()
    divergence = (p * (right_log_p - found_log_p)).where(p > 0, 0.0).sum(-1)
    return float(divergence.median() if median else divergence.mean())


def is_mixture(model: PreTrainedModel) -> bool:
    """Return whether a model is a mixture of experts."""
    config = model.config.get_text_config()
    return any((getattr(config, name, None) or 0) > 1 for name in EXPERTS)


class _Check:
    """The forwards of one model on two short sequences of random tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        who: str,
        last_hidden_state: LastHiddenState,
        autocast: Callable[[], AbstractContextManager],
    ):
        self._model = model
        self._who = who
        self._kind = type(model.get_base_model() if is_peft_model(model) else model).__name__
        self._last_hidden_state = last_hidden_state
        self._autocast = autocast
        self._device = model.get_input_embeddings().weight.device
        if self._device.type == "meta":  # offloaded, and moved together with its inputs for a forward
            self._device = torch.device("cpu")
        with autocast():
            mixed = torch.is_autocast_enabled(self._device.type)
        self._limit = largest_difference(model, mixed=mixed)
        self._limit_generated = self._limit if self._limit == LIMIT_FLOAT32 else LIMIT_GENERATED

        ids = _ordinary_ids(model)
        generator = torch.Generator().manual_seed(0)
        drawn = ids[torch.randint(len(ids), (3, LONG), generator=generator)].tolist()
        longest = min(LONG, context_length(model) - GENERATED)
        self._long = drawn[0][:longest]
        self._short = drawn[1][: 2 * longest // 3]
        self._unchanged = 3 * longest // 4
        self._changed = self._long[: self._unchanged] + drawn[2][self._unchanged : longest]
        self._forced = drawn[2][:GENERATED]

    def can_run(self) -> bool:
        """Return whether this process holds the model's weights; say so if it does not."""
        held = all(_holds_weights(module) for module in self._model.modules())
        if not held:
            logger.warning(
                "The %s is not compared with its own logits, because this process does not hold all its weights.",
                self._who,
            )
        return held

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Run the block in eval mode without gradient, and restore modes, gradient flags and random states."""
        parameters = [(parameter, parameter.requires_grad) for parameter in self._model.parameters()]
        devices = [self._device] if self._device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=devices), torch.no_grad(), _eval_mode(self._model):
                yield
        finally:
            for parameter, requires_grad in parameters:  # PEFT switches them with its adapters
                parameter.requires_grad_(requires_grad)

    def is_finite(self) -> bool:
        """Return whether the logits are finite; if not, the first training step names the model."""
        return all(bool(torch.isfinite(logits).all()) for logits in self._scored([self._long]))

    def require_own_distribution(self) -> None:
        """Raise `ValueError` unless head and hidden states give the model's own distribution, causally and padded."""
        own = self._own([self._long, self._changed])
        scored = torch.stack(self._scored([self._long, self._changed]))
        if own.shape != scored.shape:
            raise ValueError(
                f"{self._subject()} cannot be used: it gives logits for {own.shape[-1]} vocabulary entries, and "
                f"its LM head has {scored.shape[-1]} rows. Use another architecture."
            )
        self._require_equal(
            own,
            scored,
            "its hidden states and its LM head do not give its own distribution (it changes the logits after the head, "
            "or the states before it)",
        )

        before = self._unchanged
        self._require_equal(
            scored[0, :before],
            scored[1, :before],
            "it is not causal, because later tokens change the distributions before them",
        )
        alone = self._scored([self._short])[0]
        padded = self._scored([self._short, self._long])[0]
        self._require_equal(alone, padded, "padding on the right changes the distributions before it")

    def scores_padded_left(self) -> bool:
        """Return whether a forward gives the same distributions when the batch is padded on the left."""
        alone = self._scored([self._short])[0]
        try:
            padded = self._scored([self._short, self._long], side="left")[0]
        except Exception:  # model classes raise errors of many types
            return False
        return self._difference(alone, padded) <= self._limit

    def require_scored_generation(self) -> None:
        """Raise `ValueError` if the model cannot generate, or samples from other distributions than are scored."""
        try:
            alone = self._generated([self._short])
        except Exception as error:  # model classes raise errors of many types
            raise ValueError(f"{self._subject()} cannot generate: {type(error).__name__}: {error}.") from error
        scored = self._scored([self._short + self._forced])[0][-GENERATED:]
        self._require_equal(
            scored[:, : alone.shape[-1]],
            alone,
            "`generate`, which keeps a cache, samples from other distributions than those of a whole forward",
            self._limit_generated,
        )

    def generates_beside(self, *, longer: bool) -> bool:
        """Return whether `generate` gives the same distributions beside another prompt, of its length or a longer one.

        Beside a longer prompt it is padded on the left.
        """
        other = self._long if longer else self._long[: len(self._short)]
        alone = self._generated([self._short])
        try:
            beside = self._generated([self._short, other])
        except Exception:  # as above
            return False
        return self._difference(alone, beside) <= self._limit_generated

    def starts_at_base(self) -> bool:
        """Return whether the model with its adapter switched off gives the same distributions."""
        with_adapter = self._scored([self._long])[0]
        with self._model.disable_adapter():
            base = self._scored([self._long])[0]
        return self._difference(with_adapter, base) <= self._limit

    def require_trainable_effect(self) -> None:
        """Raise `ValueError` unless the weights that are trained act on hidden states or head, and only there."""
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        numbers = sum(parameter.numel() for parameter in trained)
        # Weights that are trained whole are not zero, and a copy of them may not fit in memory. A student that is not
        # trained at all is studied.
        if not 0 < numbers <= self._model.num_parameters() / 2:
            return
        before = self._scored([self._long])[0]
        with _noise_on(trained):
            after = self._scored([self._long])[0]
            own = self._own([self._long])[0]
        if torch.equal(before, after):
            raise ValueError(
                f"{self._subject()} has {len(trained)} trainable tensors, but none of them changes its hidden states "
                "or its LM head, so nothing would be trained: activate the adapter that is to be trained, or use a "
                "plain LoRA."
            )
        self._require_equal(
            own,
            after,
            "its trainable weights act outside of the backbone and of the LM head's weight, where the divergence does "
            "not see them",
        )

    def _own(self, rows: list[list[int]]) -> torch.Tensor:
        """Return the logits of the model's own forward, without those after the last token, float32, `(B, L - 1, V)`.

        The rows have one length.
        """
        ids = torch.tensor(rows, device=self._device)
        try:
            # Autocast keeps its copies of weights until it ends, so each forward has its own.
            with self._autocast():
                output = self._model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # model classes raise errors of many types
            raise ValueError(
                f"{self._subject()} cannot be run on token ids alone: {type(error).__name__}: {error}. Use a causal "
                "language model."
            ) from error
        return output.logits[:, :-1].float()

    def _scored(self, rows: list[list[int]], side: str = "right") -> list[torch.Tensor]:
        """Return the logits as training computes them, after each token of a row but the last, `(L - 1, V)` each."""
        longest = max(map(len, rows))
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        columns = [range(len(row)) if side == "right" else range(longest - len(row), longest) for row in rows]
        for place, row in enumerate(rows):
            ids[place, columns[place]] = torch.tensor(row)
            mask[place, columns[place]] = 1
        try:
            with self._autocast():
                hidden = self._last_hidden_state(self._model, ids.to(self._device), mask.to(self._device), longest - 1)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # model classes raise errors of many types
            raise ValueError(
                f"The backbone of {self._subject(start=False)} cannot be run by itself: {type(error).__name__}: "
                f"{error}. Use a causal language model."
            ) from error
        head = read_head(self._model)
        if hidden.shape[-1] != head.weight.shape[1]:
            raise ValueError(
                f"{self._subject()} cannot be used: its hidden states have width {hidden.shape[-1]} and its LM head "
                f"{head.weight.shape[1]}, so another layer lies between them. Use another architecture."
            )
        hidden = hidden.to(head.weight.device)
        return [head_logits(hidden[place, columns[place][:-1]], head, len(head.weight)) for place in range(len(rows))]

    def _generated(self, rows: list[list[int]]) -> torch.Tensor:
        """Return the first row's logits for the next tokens of `generate`, which emits given tokens, `(n, V)`."""
        longest = max(map(len, rows))
        ids = torch.tensor([[self._forced[0]] * (longest - len(row)) + row for row in rows], device=self._device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=self._device)
        settings = GenerationConfig(
            max_new_tokens=GENERATED,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=self._forced[0],
            eos_token_id=None,
        )
        emit = LogitsProcessorList([_Emit(self._forced, longest)])
        with self._autocast():
            output = self._model.generate(
                input_ids=ids, attention_mask=mask, generation_config=settings, logits_processor=emit
            )
        return torch.stack([logits[0].float() for logits in output.logits])

    def _require_equal(self, right: torch.Tensor, found: torch.Tensor, what: str, limit: float | None = None) -> None:
        limit = self._limit if limit is None else limit
        difference = self._difference(right, found)
        if not difference <= limit:
            raise ValueError(
                f"{self._subject()} cannot be used: {what}. Mean KL {difference:.2g} nats per token; rounding "
                f"alone stays below {limit:.0e}. Use another architecture or adapter."
            )

    def _difference(self, right: torch.Tensor, found: torch.Tensor) -> float:
        """Return the mean KL between rows of logits; the median for experts, whose routing may flip by rounding."""
        return kl_between(right, found, median=is_mixture(self._model))

    def _subject(self, *, start: bool = True) -> str:
        return f"{'The' if start else 'the'} {self._who} ({self._kind})"


@contextmanager
def _eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Run the block in eval mode, and restore the mode of each layer, some of which may differ from the model's."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _holds_weights(module: torch.nn.Module) -> bool:
    """Return whether a process has the weights of a module: not with ZeRO-3, nor on some processes with FSDP."""
    for parameter in module.parameters(recurse=False):
        offloaded = parameter.is_meta and has_offloaded_params(module)  # by a `device_map`, and loaded for its forward
        if hasattr(parameter, "ds_id") or (parameter.is_meta and not offloaded):
            return False
    return True


class _Emit(LogitsProcessor):
    """Makes `generate` emit given tokens."""

    def __init__(self, tokens: list[int], prompt_length: int):
        self._tokens = tokens
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self._tokens[input_ids.shape[1] - self._prompt_length]] = 0.0
        return forced


@contextmanager
def _noise_on(parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """Add noise to parameters inside the block, and restore them to the bit."""
    generator = torch.Generator().manual_seed(0)
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator) * NOISE
            parameter.add_(noise.to(parameter))
        yield
    finally:
        for parameter, values in zip(parameters, kept, strict=True):
            parameter.copy_(values)


def _ordinary_ids(model: PreTrainedModel) -> torch.Tensor:
    """Return the ids that stand for text, int64: all but those that the configuration names (padding, ends, images)."""
    special = set()
    for config in (model.config, model.config.get_text_config()):
        for name, value in config.to_dict().items():
            if name.endswith(("token_id", "token_ids", "token_index")):
                values = value if isinstance(value, list) else [value]
                special.update(entry for entry in values if isinstance(entry, int))
    rows = min(len(model.get_input_embeddings().weight), len(lm_head(model).weight))
    return torch.tensor([token for token in range(rows) if token not in special])
