"""What the memory of a model depends on, read from its configuration, and the bytes of its weights to the byte."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

HALF, FULL = 2, 4


@dataclass(frozen=True)
class Shape:
    """What the memory of a model depends on.

    Args:
        linear (`tuple[tuple[int, int], ...]`): Rows and columns of every linear layer, the head apart.
        others (`int`): Weights outside of linear layers and head (embeddings that are not the head's, norms, biases).
        head (`tuple[int, int]`): Rows and columns of the head.
        tied (`bool`): Whether the head is the input embedding.
        layers, width, attention, key_value, intermediate (`int`):
            Layers, hidden width, width of all heads, of keys (and as wide, values), and widest MLP of a token.
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
        """Weights of the head."""
        return self.head[0] * self.head[1]

    @property
    def size(self) -> int:
        """Weights of the model, a tied head counted once."""
        return sum(rows * columns for rows, columns in self.linear) + self.others + self.head_size


def read_shape(name_or_path: str) -> Shape:
    """Return the shape of a model on the Hub or in a folder; only its configuration is read.

    Raises:
        `OSError`: if there is no configuration.
        `ValueError`: if it is not one of a causal language model of transformers.
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
    except Exception as error:  # whatever the class of the model raises for numbers that make no sense
        raise ValueError(f"{name_or_path}: no causal language model can be made of its config.json: {error}") from error


def shape_of(model: torch.nn.Module) -> Shape:
    """Return the shape of a causal language model, whose weights may lie on the meta device."""
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    if head is None or getattr(config, "num_attention_heads", None) is None:
        raise ValueError(f"a {config.model_type} model has no output embeddings, or no attention, to count")
    kinds = (torch.nn.Linear, Conv1D)
    layers = [module for module in model.modules() if isinstance(module, kinds) and module is not head]
    # GPT-2's Conv1D keeps its weight transposed.
    linear = tuple(tuple(layer.weight.shape)[:: -1 if isinstance(layer, Conv1D) else 1] for layer in layers)
    known = {id(layer.weight) for layer in layers} | {id(head.weight)}
    heads, width = config.num_attention_heads, config.hidden_size
    head_width = getattr(config, "head_dim", None) or width // heads
    experts = getattr(config, "num_experts_per_tok", 1) or 1
    return Shape(
        linear=linear,
        others=sum(p.numel() for p in model.parameters() if id(p) not in known),
        head=tuple(head.weight.shape),
        tied=head.weight is model.get_input_embeddings().weight,
        layers=config.num_hidden_layers,
        width=width,
        attention=heads * head_width,
        key_value=(getattr(config, "num_key_value_heads", None) or heads) * head_width,
        intermediate=max(
            getattr(config, "intermediate_size", None) or 4 * width,
            experts * (getattr(config, "moe_intermediate_size", 0) or 0),
        ),
    )


def weight_bytes(shape: Shape, quantization: str | None, bytes_per_weight: int, *, nested: bool = True) -> int:
    """Return the bytes of a model's weights as bitsandbytes stores them, with the constants of its quantisation.

    Linear layers only are quantised; embeddings, norms, fused experts and the head stay as they are.
    """
    rest = (shape.others + shape.head_size) * bytes_per_weight
    if quantization is None:
        return rest + sum(rows * columns for rows, columns in shape.linear) * bytes_per_weight
    if quantization == "8bit":
        return rest + sum(rows * columns + rows * FULL for rows, columns in shape.linear)  # a scale for each row
    packed = sum((rows * columns + 1) // 2 for rows, columns in shape.linear)
    return rest + packed + quantization_constants(shape, nested=nested)


def quantization_constants(shape: Shape, *, nested: bool) -> int:
    """Return the bytes of the constants of a model in 4 bits: a scale for every block of 64, and two code tables."""
    total = 0
    for rows, columns in shape.linear:
        blocks = -(-rows * columns // 64)
        # Nested: the scales themselves in 8 bits, in blocks of 256, with an offset and a table of 256 numbers.
        total += 16 * FULL + (blocks + -(-blocks // 256) * FULL + FULL + 256 * FULL if nested else blocks * FULL)
    return total


def context_length(model: PreTrainedModel) -> int:
    """Return the number of positions that a model has; a configuration that names none (Mamba, ALiBi) has no limit."""
    config = model.config.get_text_config()
    return getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2**31
