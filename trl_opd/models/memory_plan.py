"""How much memory of a GPU a distillation will need, from the configurations of the two models alone.

A plan adds up, for each of the three phases of a step, what is on the card at the same time. Weights are counted
exactly; what a forward needs beside them is estimated from the shapes, with the reason beside each term.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .shape import FULL, HALF, Shape, quantization_constants, weight_bytes

# Tokens of a forward of the teacher, and the tiles of TRL's divergence on CUDA (rows and entries).
GROUP_TOKENS, TILE_ROWS, TILE_ENTRIES = 16_384, 4096, 32_768
GIB = 2**30


@dataclass(frozen=True)
class Setup:
    """A run: what is loaded how, and how many tokens of it are there at once."""

    student: Shape
    teacher: Shape
    teacher_quantization: str | None = None
    teacher_placement: str = "resident"
    lora_r: int | None = None
    load_in_4bit: bool = False
    bytes_per_weight: int = HALF
    per_device: int = 8
    accumulation: int = 1
    prompt_length: int = 512
    completion_length: int = 512

    @property
    def rollouts(self) -> int:
        """Rollouts of a generation batch on this card."""
        return self.per_device * self.accumulation

    @property
    def length(self) -> int:
        """Tokens of the longest rollout with its prompt."""
        return self.prompt_length + self.completion_length


def phases(setup: Setup) -> dict[str, dict[str, int]]:
    """Return the bytes of everything that is on the card at once, by name, for each phase of a step."""
    student, teacher, size = setup.student, setup.teacher, setup.bytes_per_weight
    always = {"student weights": weight_bytes(student, "4bit" if setup.load_in_4bit else None, size, nested=False)}
    trained, trained_size = _trained(setup)
    if setup.lora_r:
        always["adapters"] = trained * trained_size
    always["optimizer"] = 2 * trained * trained_size  # two moments of AdamW, in the dtype of what they belong to
    full = weight_bytes(teacher, setup.teacher_quantization, HALF)
    stays = full
    if setup.teacher_placement == "parked":
        stays = teacher.head_size * HALF
        if setup.teacher_quantization == "4bit":
            stays += quantization_constants(teacher, nested=True)
    cache = {"teacher's hidden states": setup.rollouts * setup.completion_length * teacher.width * HALF}
    tokens = min(setup.rollouts * setup.length, max(GROUP_TOKENS, setup.length))
    return {
        "generation": {**always, "teacher on the card": stays, **_generation(setup)},
        "teacher": {
            **always,
            "teacher on the card": full,
            "teacher activations": tokens * _forward_bytes(teacher) + _dequantised(teacher, setup.teacher_quantization),
            **cache,
        },
        "student": {
            **always,
            "teacher on the card": stays,
            "gradients": trained * trained_size,
            **cache,
            "student activations": _student_activations(setup),
            "divergence buffers": _divergence_buffers(setup),
        },
    }


def peak(setup: Setup) -> int:
    """Return the bytes of the largest phase."""
    return max(sum(parts.values()) for parts in phases(setup).values())


def suggest_savings(setup: Setup, available: int) -> list[tuple[str, int]]:
    """Return what makes a run fit, the least change first, each with its new peak in bytes.

    One change alone where one is enough; otherwise as many together as it takes, or all that help when none suffice.
    """
    changes = _changes(setup)
    alone = [(name, peak(replace(setup, **change))) for name, change in changes]
    fitting = [(name, size) for name, size in alone if size <= available]
    if fitting:
        return fitting
    chosen = []
    for change in changes:
        chosen.append(change)
        if _peak_after(setup, chosen) <= available:
            break
    # Drop the changes that the others make unnecessary, the costliest first.
    limit = max(available, _peak_after(setup, chosen))
    for change in reversed(list(chosen)):
        rest = [other for other in chosen if other is not change]
        if _peak_after(setup, rest) <= limit:
            chosen = rest
    return [(" and ".join(name for name, _ in chosen), _peak_after(setup, chosen))] if chosen else []


def _peak_after(setup: Setup, changes: list[tuple[str, dict]]) -> int:
    for _, change in changes:
        setup = replace(setup, **change)
    return peak(setup)


def parse_gigabytes(text: str) -> int:
    """Return the bytes of a card's memory as it is sold, "24GB" for 24 x 2^30."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB|G|GiB)?\s*", str(text), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--gpu takes a size such as 24GB, got {text!r}.")
    return int(float(match[1]) * GIB)


def _changes(setup: Setup) -> list[tuple[str, dict]]:
    """Return changes in the order of what they cost: nothing but time first, then precision, then what is learned."""
    changes = []
    if setup.teacher_placement != "parked" and setup.teacher_quantization != "8bit":
        changes.append(("--teacher_placement parked", {"teacher_placement": "parked"}))
    if setup.per_device > 1:
        split = {"per_device": 1, "accumulation": setup.rollouts}
        flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {setup.rollouts}"
        changes.append((flags, split))
    if setup.teacher_quantization is None and _quantizable(setup.teacher):
        changes.append(("--teacher_quantization 4bit", {"teacher_quantization": "4bit"}))
    if setup.lora_r is None:
        changes.append(("--use_peft --lora_r 16", {"lora_r": 16, "bytes_per_weight": HALF}))
    if not setup.load_in_4bit and _quantizable(setup.student):
        lora = {} if setup.lora_r else {"lora_r": 16, "bytes_per_weight": HALF}
        changes.append(("--load_in_4bit" + (" --use_peft" if lora else ""), {"load_in_4bit": True, **lora}))
    if setup.completion_length > 256:
        half = setup.completion_length // 2
        changes.append((f"--max_completion_length {half}", {"completion_length": half}))
    return changes


def _quantizable(shape: Shape) -> bool:
    """Return whether most weights are those of linear layers, not of fused experts."""
    return sum(rows * columns for rows, columns in shape.linear) > shape.others


def _trained(setup: Setup) -> tuple[int, int]:
    """Return how many weights are trained, and their bytes: adapters are float32, with a 4-bit base bfloat16."""
    if setup.lora_r is None:
        return setup.student.size, setup.bytes_per_weight
    count = sum(setup.lora_r * (rows + columns) for rows, columns in setup.student.linear)
    return count, HALF if setup.load_in_4bit else FULL


def _generation(setup: Setup) -> dict[str, int]:
    shape = setup.student
    keys_and_values = 2 * shape.layers * shape.key_value * setup.rollouts * setup.length * setup.bytes_per_weight
    # The next token's logits, a copy in float32 and the probabilities; and the forward over the prompts.
    logits = setup.rollouts * shape.head[0] * (setup.bytes_per_weight + 2 * FULL)
    prompts = setup.rollouts * setup.prompt_length * _forward_bytes(shape)
    return {"KV cache": keys_and_values, "sampling": max(logits, prompts)}


def _forward_bytes(shape: Shape) -> int:
    """Return the bytes for each token of a forward without gradient: one layer's largest moment, in bfloat16.

    The residual and the normalised states (float32 inside of the norm), and either queries, keys and values (turned by
    their positions, keys and values repeated for every head) or the MLP's gate, its other half and their product.
    """
    attention = 4 * shape.attention + 2 * shape.key_value
    return HALF * (2 * shape.width + max(attention, 3 * shape.intermediate)) + FULL * shape.width


def _dequantised(shape: Shape, quantization: str | None) -> int:
    """Return the bytes of the largest linear layer in bfloat16, which a quantised forward unpacks."""
    return 0 if quantization is None else HALF * max((rows * columns for rows, columns in shape.linear), default=0)


def _student_activations(setup: Setup) -> int:
    """Return the bytes of a micro-batch with gradient checkpointing: every layer's input, and one layer in full.

    Of that layer everything that its backward needs is kept (attention and MLP), and as much again is their gradients.
    """
    shape, tokens = setup.student, setup.per_device * setup.length
    inputs = tokens * shape.layers * shape.width * HALF
    layer = 6 * shape.width + 4 * shape.attention + 2 * shape.key_value + 4 * shape.intermediate
    quantization = "4bit" if setup.load_in_4bit else None
    return inputs + tokens * 2 * HALF * layer + _dequantised(shape, quantization)


def _divergence_buffers(setup: Setup) -> int:
    """Return the bytes of TRL's op on CUDA: two tiles of float32 logits, gradients of the states and a trained head."""
    positions, vocab = setup.per_device * setup.completion_length, min(setup.student.head[0], setup.teacher.head[0])
    tiles = 2 * min(positions, TILE_ROWS) * min(vocab, TILE_ENTRIES) * FULL
    states = positions * (setup.student.width * (HALF + FULL) + setup.teacher.width * HALF)
    return tiles + states + (setup.student.head_size * FULL if setup.lora_r is None else 0)
