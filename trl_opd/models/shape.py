"""Sizes of a model's layers, read from its configuration, and the exact number of bytes of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Bytes of a number in bfloat16 and in float32.
HALF = 2
FULL = 4


@dataclass(frozen=True)
class Shape:
    """The sizes of a model from which its memory follows.

    Args:
        linear (`tuple[tuple[int, int], ...]`): Rows and columns of every linear layer except the head.
        others (`int`):
            Number of weights outside linear layers and head (embeddings that are not the head's, norms, biases).
        head (`tuple[int, int]`): Rows and columns of the head.
        tied (`bool`): Whether the head is the input embedding.
        layers, width, attention, key_value, intermediate (`int`):
            Number of layers, hidden width, width of all attention heads together, width of the keys (the values have
            the same), and width of the widest MLP that a token passes through.
    """

    linear: tuple[tuple[int, int], ...]
    others: int
    head: tuple[int, int]
    tied: bool
    layers: int
    width: int
    attention: int
    key_value: int
    intermediate: int

    @property
    def head_size(self) -> int:
        """Number of weights of the head."""
        return self.head[0] * self.head[1]

    @property
    def size(self) -> int:
        """Number of weights of the model, with a tied head counted once."""
        return sum(rows * columns for rows, columns in self.linear) + self.others + self.head_size


def read_shape(name_or_path: str) -> Shape:
    """Return the shape of a model on the Hub or in a folder; only its configuration is read.

    Raises:
        `OSError`: if there is no configuration.
        `ValueError`: if the configuration is not that of a causal language model of transformers.
    """
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).is_dir():
        raise FileNotFoundError(f"There is no model in {name_or_path}: no such folder.")
    try:
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        return shape_of(model)
    except OSError:
        raise
    except Exception as error:  # model classes raise errors of many types if sizes in a configuration do not fit
        raise ValueError(
            f"No causal language model can be made from the config.json of {name_or_path}: {error}. Pass a model that "
            "transformers can build."
        ) from error


def shape_of(model: torch.nn.Module) -> Shape:
    """Return the shape of a causal language model, whose weights may be on the meta device.

    Raises:
        `ValueError`: if the model has no output embeddings or no attention.
    """
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    if head is None or getattr(config, "num_attention_heads", None) is None:
        raise ValueError(f"a {config.model_type} model has no output embeddings, or no attention, to count")

    linear = []
    counted = {id(head.weight)}
    for layer in model.modules():
        if layer is head or not isinstance(layer, torch.nn.Linear | Conv1D):
            continue
        rows, columns = layer.weight.shape
        # GPT-2's Conv1D keeps its weight transposed.
        linear.append((columns, rows) if isinstance(layer, Conv1D) else (rows, columns))
        counted.add(id(layer.weight))

    heads = config.num_attention_heads
    width = config.hidden_size
    head_width = getattr(config, "head_dim", None) or width // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    dense_width = getattr(config, "intermediate_size", None) or 4 * width
    experts = getattr(config, "num_experts_per_tok", 1) or 1
    expert_width = getattr(config, "moe_intermediate_size", 0) or 0

    return Shape(
        linear=tuple(linear),
        others=sum(p.numel() for p in model.parameters() if id(p) not in counted),
        head=tuple(head.weight.shape),
        tied=head.weight is model.get_input_embeddings().weight,
        layers=config.num_hidden_layers,
        width=width,
        attention=heads * head_width,
        key_value=key_value_heads * head_width,
        intermediate=max(dense_width, experts * expert_width),
    )


def weight_bytes(shape: Shape, quantization: str | None, bytes_per_weight: int, *, nested: bool = True) -> int:
    """Return the bytes of a model's weights as bitsandbytes stores them, including the constants of its quantisation.

    Only linear layers are quantised; embeddings, norms, fused experts and the head stay as they are.
    """
    rest = (shape.others + shape.head_size) * bytes_per_weight
    if quantization is None:
        return rest + sum(rows * columns for rows, columns in shape.linear) * bytes_per_weight
    if quantization == "8bit":
        # One byte for each weight, and one float32 scale for each row.
        return rest + sum(rows * columns + rows * FULL for rows, columns in shape.linear)
    packed = sum((rows * columns + 1) // 2 for rows, columns in shape.linear)
    return rest + packed + quantization_constants(shape, nested=nested)


def quantization_constants(shape: Shape, *, nested: bool) -> int:
    """Return the bytes of the constants of a model in 4 bits: a scale for every block of 64, and two code tables."""
    total = 0
    for rows, columns in shape.linear:
        blocks = -(-rows * columns // 64)
        total += 16 * FULL
        if nested:
            # The scales themselves are in 8 bits, in blocks of 256, with an offset and a table of 256 numbers.
            total += blocks + (-(-blocks // 256) + 257) * FULL
        else:
            total += blocks * FULL
    return total


def context_length(model: PreTrainedModel) -> int:
    """Return the largest number of positions of a model, 2^31 if its configuration names none (Mamba, ALiBi)."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions"):
        positions = getattr(config, name, None)
        if positions is not None and positions > 0:  # XLNet's -1 is none
            return positions
    return 2**31


def rope_switch_length(model: PreTrainedModel) -> int | None:
    """Return the number of positions beyond which the rotary frequencies depend on the longest rollout of a batch.

    `None` for models whose frequencies are constant. transformers chooses the frequencies of "longrope" and "dynamic"
    for a whole batch.
    """
    config = model.config.get_text_config()
    parameters = getattr(config, "rope_parameters", None) or {}
    # Some configurations have one set of parameters for each type of layer.
    by_layer = [entry for entry in parameters.values() if isinstance(entry, dict)] or [parameters]
    for entry in by_layer:
        rope_type = entry.get("rope_type") or "default"
        if rope_type == "longrope" or "dynamic" in rope_type:
            named = entry.get("original_max_position_embeddings")
            return named or getattr(config, "original_max_position_embeddings", None) or context_length(model)
    return None
