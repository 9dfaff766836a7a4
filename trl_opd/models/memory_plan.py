"""Estimates the GPU memory of a distillation from the configurations of the two models alone.

For each of the three phases of a step, a plan adds up everything that is on the GPU at the same time. Weights are
counted exactly; what a forward needs besides them is estimated from the shapes, with a reason at each term.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .shape import FULL, HALF, Shape, quantization_constants, weight_bytes

# Tokens in one forward of the teacher; a test holds it equal to the constant of `training.teacher_states`.
GROUP_TOKENS = 16_384
# Rows and vocabulary entries of a tile of TRL's divergence on CUDA.
TILE_ROWS = 4096
TILE_ENTRIES = 32_768
GIB = 2**30


@dataclass(frozen=True)
class Setup:
    """Settings of a run that decide its memory: the models, how they are loaded, and batch size and lengths."""

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
        """Number of rollouts in a generation batch on this GPU."""
        return self.per_device * self.accumulation

    @property
    def length(self) -> int:
        """Number of tokens in the longest rollout, including its prompt."""
        return self.prompt_length + self.completion_length


def phases(setup: Setup) -> dict[str, dict[str, int]]:
    """Return the bytes of each item on the GPU at once, by its name, for each phase of a step."""
    teacher = setup.teacher
    quantization = "4bit" if setup.load_in_4bit else None
    always = {"student weights": weight_bytes(setup.student, quantization, setup.bytes_per_weight, nested=False)}
    count, size = _trained(setup)
    trained = count * size
    if setup.lora_r:
        always["adapters"] = trained
    always["optimizer"] = 2 * trained  # AdamW keeps two moments of each trained weight, in its dtype

    full = weight_bytes(teacher, setup.teacher_quantization, HALF)
    stays = full
    if setup.teacher_placement == "parked":
        stays = teacher.head_size * HALF
        if setup.teacher_quantization == "4bit":
            stays += quantization_constants(teacher, nested=True)

    cache = {"teacher's hidden states": setup.rollouts * setup.completion_length * teacher.width * HALF}
    tokens = min(setup.rollouts * setup.length, max(GROUP_TOKENS, setup.length))
    activations = tokens * _forward_bytes(teacher) + _dequantised(teacher, setup.teacher_quantization)
    return {
        "generation": {**always, "teacher on the GPU": stays, **_generation(setup)},
        "teacher": {
            **always,
            "teacher on the GPU": full,
            "teacher activations": activations,
            **cache,
        },
        "student": {
            **always,
            "teacher on the GPU": stays,
            "gradients": trained,
            **cache,
            "student activations": _student_activations(setup),
            "divergence buffers": _divergence_buffers(setup),
        },
    }


def peak(setup: Setup) -> int:
    """Return the bytes of the largest phase."""
    return max(sum(parts.values()) for parts in phases(setup).values())


def suggest_savings(setup: Setup, available: int) -> list[tuple[str, int]]:
    """Return changes of flags that make a run fit, smallest change first, each with the new peak in bytes.

    If single changes are enough, each of them is returned. Otherwise one combination is returned: one that is enough,
    or, if none is, all changes that lower the peak.
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
    if not chosen:
        return []
    names = " and ".join(name for name, _ in chosen)
    return [(names, _peak_after(setup, chosen))]


def _peak_after(setup: Setup, changes: list[tuple[str, dict]]) -> int:
    for _, change in changes:
        setup = replace(setup, **change)
    return peak(setup)


def parse_gigabytes(text: str) -> int:
    """Return the bytes of a GPU's memory from its advertised size; "24GB" is 24 x 2^30.

    Raises:
        `ValueError`: if the text is not a positive size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:GB|G|GiB)?\s*", str(text), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise ValueError(f"--gpu takes a size such as 24GB, got {text!r}.")
    return int(float(match[1]) * GIB)


def _changes(setup: Setup) -> list[tuple[str, dict]]:
    """Return changes by cost: first those that cost only time, then precision, then those that change the training."""
    changes = []
    if setup.teacher_placement != "parked" and setup.teacher_quantization != "8bit":
        changes.append(("--teacher_placement parked", {"teacher_placement": "parked"}))
    if setup.per_device > 1:
        rollouts = setup.rollouts
        split = {"per_device": 1, "accumulation": rollouts}
        flags = f"--per_device_train_batch_size 1 --gradient_accumulation_steps {rollouts}"
        changes.append((flags, split))
    if setup.teacher_quantization is None and _quantizable(setup.teacher):
        changes.append(("--teacher_quantization 4bit", {"teacher_quantization": "4bit"}))
    if setup.lora_r is None:
        changes.append(("--use_peft --lora_r 16", {"lora_r": 16, "bytes_per_weight": HALF}))
    if not setup.load_in_4bit and _quantizable(setup.student):
        flags = "--load_in_4bit"
        change = {"load_in_4bit": True}
        if not setup.lora_r:
            flags += " --use_peft"
            change |= {"lora_r": 16, "bytes_per_weight": HALF}
        changes.append((flags, change))
    if setup.completion_length > 256:
        half = setup.completion_length // 2
        changes.append((f"--max_completion_length {half}", {"completion_length": half}))
    return changes


def _quantizable(shape: Shape) -> bool:
    """Return whether most weights are in linear layers, which bitsandbytes quantises, and not in fused experts."""
    return sum(rows * columns for rows, columns in shape.linear) > shape.others


def _trained(setup: Setup) -> tuple[int, int]:
    """Return the number of trained weights and the bytes of each; adapters are float32, or bfloat16 on a 4-bit base."""
    if setup.lora_r is None:
        return setup.student.size, setup.bytes_per_weight
    count = sum(setup.lora_r * (rows + columns) for rows, columns in setup.student.linear)
    return count, HALF if setup.load_in_4bit else FULL


def _generation(setup: Setup) -> dict[str, int]:
    shape = setup.student
    rollouts = setup.rollouts
    size = setup.bytes_per_weight
    keys_and_values = 2 * shape.layers * shape.key_value * rollouts * setup.length * size
    # Sampling holds the logits of the next token, their float32 copy and the probabilities. The forward over the
    # prompts comes before it, so only the larger of the two counts.
    logits = rollouts * shape.head[0] * (size + 2 * FULL)
    prompts = rollouts * setup.prompt_length * _forward_bytes(shape)
    return {"KV cache": keys_and_values, "sampling": max(logits, prompts)}


def _forward_bytes(shape: Shape) -> int:
    """Return the peak bytes per token of a bfloat16 forward without gradient, which one layer needs.

    The layer holds the residual and the normalised states (float32 inside the norm), and either queries, keys and
    values (with rotary positions, keys and values repeated for every head) or the MLP's gate, its up projection and
    their product.
    """
    attention = 4 * shape.attention + 2 * shape.key_value
    return HALF * (2 * shape.width + max(attention, 3 * shape.intermediate)) + FULL * shape.width


def _dequantised(shape: Shape, quantization: str | None) -> int:
    """Return the bytes of the largest linear layer in bfloat16, because a quantised forward unpacks one at a time."""
    if quantization is None:
        return 0
    return HALF * max((rows * columns for rows, columns in shape.linear), default=0)


def _student_activations(setup: Setup) -> int:
    """Return the bytes of a micro-batch with gradient checkpointing: the input of every layer, and one layer in full.

    For that one layer, everything that its backward needs is kept (attention and MLP); the gradients double that.
    """
    shape = setup.student
    tokens = setup.per_device * setup.length
    inputs = tokens * shape.layers * shape.width * HALF
    layer = 6 * shape.width + 4 * shape.attention + 2 * shape.key_value + 4 * shape.intermediate
    quantization = "4bit" if setup.load_in_4bit else None
    return inputs + tokens * 2 * HALF * layer + _dequantised(shape, quantization)


def _divergence_buffers(setup: Setup) -> int:
    """Return the bytes of TRL's op on CUDA: two tiles of float32 logits, hidden states, and the gradients it forms."""
    student = setup.student
    teacher = setup.teacher
    positions = setup.per_device * setup.completion_length
    vocab = min(student.head[0], teacher.head[0])
    tiles = 2 * min(positions, TILE_ROWS) * min(vocab, TILE_ENTRIES) * FULL
    states = positions * (student.width * (HALF + FULL) + teacher.width * HALF)
    if setup.lora_r is not None:
        return tiles + states
    return tiles + states + student.head_size * FULL
