"""OPDConfig: TRL's DistillationConfig with the options of this package."""

import copy
import inspect
import os
import textwrap
import warnings
from dataclasses import dataclass, field, fields
from types import NoneType
from typing import Any, ClassVar, get_args

import torch
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING
from transformers.trainer_utils import HubStrategy
from trl import DistillationConfig

from ._trl import DICT_FIELDS

TOKEN_WEIGHTINGS = ("uniform", "rock", "control", "random")
WEIGHT_NORMALIZATIONS = ("tokens", "weights")
MICRO_BATCHINGS = ("tight", "trl")
TEACHER_QUANTIZATIONS = ("8bit", "4bit")
TEACHER_PLACEMENTS = ("resident", "parked")


# First parameter of each group in the documentation -> heading above it.
PARAMETER_GROUPS = {
    "token_weighting": "Parameters that weight tokens",
    "num_generations": "Parameters that control rollouts and batches",
    "token_statistics": "Parameters that control what a run saves",
    "teacher_quantization": "Parameters that control the teacher",
}


@dataclass
class OPDConfig(DistillationConfig):
    r"""
    Configuration class for the [`OPDTrainer`].

    Extends [`~trl.DistillationConfig`]. With default options it trains with TRL's loss. Each field is documented by its
    help: `describe_parameters` appends it here, and `trl-opd train --help` prints it.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *DICT_FIELDS,
        "transformers_continuous_batching_config",
    ]

    token_weighting: str = field(
        default="uniform",
        metadata={
            "help": "Which positions get `rock_weight` in the loss: `'uniform'` (none), `'rock'` (tokens whose type "
            "is in `rock_set`), `'control'` (tokens of the control types, which are together as frequent) or "
            "`'random'` (the same share of positions as rocks, chosen by a hash of seed, step, rollout and position). "
            "Evaluation is never weighted.",
        },
    )
    rock_set: str | None = field(
        default=None,
        metadata={
            "help": "File, folder or Hub repository of a rock set. Required unless `token_weighting` is `'uniform'`; "
            "with `'uniform'` it only adds the `rock/*` metrics to the log.",
        },
    )
    rock_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the chosen positions, from 0 (they do not train) to 1 (no change)."},
    )
    rock_window: int = field(
        default=0,
        metadata={
            "help": "Number of neighbours on each side of a rock (or control), within the completion, that get the "
            "same weight.",
        },
    )
    rock_exclude_pillars: bool = field(
        default=False,
        metadata={
            "help": "Whether to leave out of the weighting the rocks that `trl-opd probe` found to be pillars (role "
            "`'pillar'` in `rock_set`). The log says how many.",
        },
    )
    weight_normalization: str = field(
        default="tokens",
        metadata={
            "help": "Denominator of the weighted sum: `'tokens'` (number of positions in the loss mask, as in TRL: "
            "freezing some positions leaves the gradient of the others unchanged) or `'weights'` (sum of the weights: "
            "the gradient of the others grows).",
        },
    )
    num_generations: int = field(
        default=1,
        metadata={
            "help": "Number of rollouts per prompt. It must divide the number of rollouts in an optimizer step, which "
            "is `per_device_train_batch_size` (it counts rollouts) x processes x `gradient_accumulation_steps`. "
            "Evaluation uses 1.",
        },
    )
    mask_truncated_completions: bool = field(
        default=False,
        metadata={
            "help": "Whether to leave rollouts that were cut off at `max_completion_length` out of the loss.",
        },
    )
    use_transformers_continuous_batching: bool = field(
        default=False,
        metadata={
            "help": "Whether to sample rollouts with transformers' continuous batching, as in TRL's `GRPOConfig`: "
            "faster than `generate` if lengths differ, and it needs no vLLM. Parameters keep their dtype.",
        },
    )
    transformers_continuous_batching_config: dict | str | None = field(
        default=None,
        metadata={
            "help": "Keyword arguments of transformers' `ContinuousBatchingConfig`, as a dictionary or JSON. "
            "`max_memory_percent` is 0.5 by default.",
        },
    )
    micro_batching: str = field(
        default="tight",
        metadata={
            "help": "How a generation batch is split into micro-batches: `'tight'` groups rollouts of similar length, "
            "the longest first, and trims each micro-batch to its own longest prompt and completion; `'trl'` splits "
            "at random as TRL does, and pads every micro-batch to the longest rollout of the generation batch.",
        },
    )
    divergence_chunk_bytes: int = field(
        default=536870912,
        metadata={
            "help": "Upper limit in bytes for the float32 logits that the divergence holds at once (512 MiB by "
            "default). One row is always held. A smaller limit is slower. Ignored on CUDA, which uses TRL's tiled "
            "kernel.",
        },
    )
    token_statistics: bool = field(
        default=True,
        metadata={
            "help": "Whether to measure the divergence of each token type and save it in every checkpoint. With "
            "`False`, `micro_batching='trl'` and defaults for the other options of this class, the loss is "
            "bit-identical to TRL's.",
        },
    )
    save_occurrences: int | None = field(
        default=None,
        metadata={
            "help": "Write the rollouts of every N-th optimizer step, one row per token, to "
            "`output_dir/occurrences/step-S.parquet` (docs/detection.md). Needs `beta=1.0`.",
        },
    )
    merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "Whether `save_model` and `push_to_hub` save a LoRA student as a whole model instead of its "
            "adapter. Checkpoints keep the adapter, and nothing is pushed before the end. Does not work with FSDP or "
            "DeepSpeed.",
        },
    )
    teacher_quantization: str | None = field(
        default=None,
        metadata={
            "help": "Quantisation of the teacher with bitsandbytes: `'4bit'` (nf4 with double quantisation, computed "
            "in bfloat16, or in float32 on a CPU) or `'8bit'`. The LM head is not quantised. For other methods, leave "
            "this out and put a `quantization_config` into `teacher_model_init_kwargs`.",
        },
    )
    teacher_placement: str = field(
        default="resident",
        metadata={
            "help": "Where the teacher's weights are: `'resident'` (always on its device) or `'parked'` (all but the "
            "LM head are offloaded to pinned CPU memory while rollouts are sampled and the student trains). "
            "`'parked'` does not work with 8-bit quantisation, FSDP or DeepSpeed.",
        },
    )
    teacher_device: str | None = field(
        default=None,
        metadata={
            "help": "Another device for the teacher, for example `'cuda:1'` or `'cpu'`. Its hidden states are copied "
            "to the student's device. Does not work with FSDP or DeepSpeed.",
        },
    )
    teacher_tokenizer_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Tokenizer of the teacher, to compare the vocabularies if the teacher model does not come with "
            "one.",
        },
    )

    def __post_init__(self):
        try:
            super().__post_init__()
        except ValueError as error:
            if "support bf16" not in str(error):
                raise
            raise ValueError(
                "bf16=True is TRL's default, and this machine does not support it: pass `fp16=True, bf16=False` on a "
                "GPU without bfloat16 (`--fp16 --bf16 false`), or `use_cpu=True` without a GPU (`--use_cpu`)."
            ) from error
        if self.rock_set is not None:
            self.rock_set = os.fspath(self.rock_set)  # a path object is not JSON
        self._check_weights()
        self._check_batches()
        self._check_sampling()
        self._check_teacher()
        # With the default strategy, adapters of checkpoints would be pushed and stay next to the merged model.
        if self.merge_adapter and self.hub_strategy == HubStrategy.EVERY_SAVE:
            self.hub_strategy = HubStrategy.END

    def __getstate__(self):
        # The Trainer pickles the arguments into training_args.bin, which is pushed; the token must not be in it.
        return {**self.__dict__, "hub_token": None}

    def __deepcopy__(self, memo):
        # By default, `copy` would call `__getstate__`, and the copy would lose the token.
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def _check_weights(self):
        require_choice("token_weighting", self.token_weighting, TOKEN_WEIGHTINGS)
        require_choice("weight_normalization", self.weight_normalization, WEIGHT_NORMALIZATIONS)
        require_whole("rock_window", self.rock_window, 0)
        if not isinstance(self.rock_weight, (int, float)):
            raise ValueError(f"rock_weight must be a number, got {self.rock_weight!r}.")
        if not 0.0 <= self.rock_weight <= 1.0:
            raise ValueError(f"rock_weight must be in [0, 1] (0 freezes, 1 changes nothing), got {self.rock_weight}.")
        if self.token_weighting != "uniform" and self.rock_set is None:
            raise ValueError(
                f"token_weighting={self.token_weighting!r} needs a rock set: pass rock_set (a file of `trl-opd detect` "
                "or a Hub repository), or leave token_weighting='uniform'."
            )
        if self.rock_window and self.token_weighting in ("uniform", "random"):
            warnings.warn(
                f"rock_window={self.rock_window} has no effect with token_weighting={self.token_weighting!r}, because "
                "windows are only put around rocks and controls.",
                stacklevel=4,
            )

    def _check_batches(self):
        require_choice("micro_batching", self.micro_batching, MICRO_BATCHINGS)
        require_whole("num_generations", self.num_generations, 1)
        require_whole("divergence_chunk_bytes", self.divergence_chunk_bytes, 1)
        if self.save_occurrences is None:
            return

        require_whole("save_occurrences", self.save_occurrences, 1)
        if self.beta != 1.0:
            raise ValueError(
                "save_occurrences writes KL(student ‖ teacher), which is computed only with beta=1.0, got "
                f"beta={self.beta}: set beta=1.0, or leave save_occurrences out."
            )

    def _check_sampling(self):
        if is_greedy(self.generation_kwargs) and self.temperature != 1.0:
            raise ValueError(
                "Greedy rollouts (`generation_kwargs={'do_sample': False}`) have no temperature, and their divergence "
                f"is computed at temperature 1: leave temperature at 1.0, got {self.temperature}."
            )
        if self.use_transformers_continuous_batching and self.use_vllm:
            raise ValueError(
                "use_vllm and use_transformers_continuous_batching are two ways to sample rollouts: choose one."
            )
        if self.transformers_continuous_batching_config is None:
            return

        if not self.use_transformers_continuous_batching:
            raise ValueError(
                "transformers_continuous_batching_config has no effect without use_transformers_continuous_batching: "
                "set that too, or remove it."
            )
        require_engine_settings(self.transformers_continuous_batching_config)

    def _check_teacher(self):
        if self.teacher_quantization is not None:
            require_choice("teacher_quantization", self.teacher_quantization, TEACHER_QUANTIZATIONS)
            if (self.teacher_model_init_kwargs or {}).get("quantization_config") is not None:
                raise ValueError(
                    "teacher_quantization and a quantization_config in teacher_model_init_kwargs are two ways to "
                    "quantise the teacher: choose one."
                )
        require_choice("teacher_placement", self.teacher_placement, TEACHER_PLACEMENTS)
        if self.teacher_placement == "parked" and self.teacher_quantization == "8bit":
            raise ValueError(
                "teacher_placement='parked' cannot move an 8-bit teacher, whose state stays on the GPU: use "
                "teacher_quantization='4bit', or leave the teacher resident."
            )
        if self.teacher_device is not None:
            require_device("teacher_device", self.teacher_device, self.device.type)

    def trains_as_trl(self) -> bool:
        """Return whether no option needs our own loss, so that TRL's is called."""
        uses_rocks = self.rock_set is not None
        moves_teacher = self.teacher_placement != "resident" or self.teacher_device is not None
        measures = self.token_statistics or self.save_occurrences is not None
        regroups = self.num_generations > 1 or self.mask_truncated_completions or self.micro_batching != "trl"
        return not (uses_rocks or moves_teacher or measures or regroups)

    def to_dict(self):
        # transformers serialises a quantisation config in `model_init_kwargs` only. TensorBoard's callback and the
        # saved arguments also need the teacher's.
        content = super().to_dict()
        kwargs = content.get("teacher_model_init_kwargs")
        if isinstance(kwargs, dict) and hasattr(kwargs.get("quantization_config"), "to_dict"):
            kwargs = {**kwargs, "quantization_config": kwargs["quantization_config"].to_dict()}
            self._dict_dtype_to_str(kwargs)
            content["teacher_model_init_kwargs"] = kwargs
        return content


def describe_parameters(config: type) -> str:
    """Return the `Parameters:` section of a config's docstring, built from the help of the fields that it declares."""
    declared = inspect.get_annotations(config)
    lines = []
    for parameter in fields(config):
        if parameter.name not in declared:
            continue
        if parameter.name in PARAMETER_GROUPS:
            lines += ["", f"    > {PARAMETER_GROUPS[parameter.name]}", ""]

        types = get_args(parameter.type) or (parameter.type,)
        names = [f"`{type_.__name__}`" for type_ in types if type_ is not NoneType]
        signature = " or ".join(names) + ", *optional*"
        if parameter.default is not None:
            default = f'"{parameter.default}"' if isinstance(parameter.default, str) else parameter.default
            signature += f", defaults to `{default}`"
        lines.append(f"    {parameter.name} ({signature}):")

        help_text = textwrap.wrap(parameter.metadata["help"], width=108, break_on_hyphens=False)
        lines.append(textwrap.indent("\n".join(help_text), " " * 8))
    return "Parameters:" + "\n".join(lines)


OPDConfig.__doc__ = f"{inspect.cleandoc(OPDConfig.__doc__)}\n\n{describe_parameters(OPDConfig)}\n"


# Integer settings of transformers' continuous batching -> smallest value that works.
ENGINE_COUNTS = {"page_size": 4, "num_blocks": 1, "max_batch_tokens": 1, "max_requests_per_batch": 1}


def require_engine_settings(engine: Any) -> None:
    """Raise `ValueError` for settings that transformers' engine ignores, hangs on, or fails on much later."""
    where = "transformers_continuous_batching_config"
    if not isinstance(engine, dict):
        raise ValueError(f"{where} takes a dictionary such as {{'page_size': 256}}, got {engine!r}.")
    try:
        config = ContinuousBatchingConfig(**engine)
    except TypeError as error:
        raise ValueError(f"{where}: {error}.") from error
    for name, least in ENGINE_COUNTS.items():
        count = getattr(config, name)
        if count is not None:
            require_whole(f"{where}: {name}", count, least)
    share = config.max_memory_percent
    if share is not None and (type(share) not in (int, float) or not 0 < share <= 1):
        raise ValueError(f"{where}: max_memory_percent must be a number in (0, 1], got {share!r}.")
    require_choice(f"{where}: scheduler_type", config.scheduler_type, tuple(SCHEDULER_MAPPING))


def is_greedy(generation_kwargs: Any) -> bool:
    """Return whether generation settings ask for greedy rollouts; raise `ValueError` unless they are a dictionary."""
    if generation_kwargs is not None and not isinstance(generation_kwargs, dict):
        raise ValueError(
            f"generation_kwargs takes a dictionary such as {{'do_sample': False}}, got {generation_kwargs!r}."
        )
    return (generation_kwargs or {}).get("do_sample") is False


def require_whole(name: str, value: Any, least: int) -> None:
    """Raise `ValueError` unless a value is a whole number of at least `least`."""
    if type(value) is not int or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}.")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise `ValueError` unless a value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")


def require_device(name: str, value: Any, own: str) -> None:
    """Raise `ValueError` unless a value names the CPU, a GPU, or a device of the type `own`."""
    try:
        device_type = torch.device(value).type
    except (RuntimeError, TypeError):
        device_type = None
    if device_type not in ("cpu", "cuda", own) or device_type == "meta":
        raise ValueError(
            f"{name} must be 'cpu', a GPU such as 'cuda:1', or of the student's device type ({own}), got {value!r}."
        )
