"""Peak memory of each phase on one GPU: our trainer with a parked 4-bit teacher, and TRL's with a resident one.

    python -m tests.benchmarks.memory_gpu [--student 4B] [--teacher 14B] [--gigabytes 24]

The models have Qwen3's shapes and random weights, so nothing is downloaded. The process may use `gigabytes` of the
GPU's memory. Each trainer takes one optimizer step on the same rollouts; the table compares the peak of each phase with
what `trl-opd fit` predicts. Without a CUDA device the script runs tiny shapes on the CPU and measures nothing, which
only shows that it works.
"""

import argparse
import gc
import logging
import math
import warnings
from contextlib import contextmanager

import bitsandbytes
import torch
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opd.models.memory_plan import Setup, phases
from trl_opd.models.quantised import keep_4bit_layout
from trl_opd.models.shape import shape_of

from tests.benchmarks.measuring import machine
from tests.benchmarks.workload import PROMPTS, make_rollouts, make_trainer, replay, step

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
# The public configurations of Qwen3: hidden width, layers, heads, intermediate width, whether the head is tied.
SHAPES = {
    "1.7B": (2048, 28, 16, 6144, True),
    "4B": (2560, 36, 32, 9728, True),
    "8B": (4096, 36, 32, 12288, False),
    "14B": (5120, 40, 40, 17408, False),
    "tiny": (64, 2, 4, 128, False),
}
VOCAB = 151_936 if GPU else 320
PHASES = ("generation", "teacher", "student")


def config_of(name: str) -> Qwen3Config:
    """Return the configuration of a shape."""
    width, layers, heads, intermediate, tied = SHAPES[name]
    return Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8 if GPU else 2,
        head_dim=128 if GPU else 16,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=40_960,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )


def random_model(name: str, *, four_bit: bool) -> Qwen3ForCausalLM:
    """Return a model of a shape on the device, in bfloat16 or in 4 bits, without ever holding all of it in bfloat16."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config_of(name)).to(torch.bfloat16)
    if four_bit:
        for path, module in list(model.named_modules()):
            if isinstance(module, torch.nn.Linear) and path != "lm_head":
                model.set_submodule(path, _quantised(module))
    for path, parameter in list(model.named_parameters()):
        if parameter.device.type == "meta":
            values = torch.empty(parameter.shape, dtype=torch.bfloat16, device=DEVICE).normal_(std=0.02)
            owner, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(owner), leaf, torch.nn.Parameter(values, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config).to(DEVICE)
    model.tie_weights()
    keep_4bit_layout(model)
    return model.eval()


def _quantised(linear: torch.nn.Linear) -> bitsandbytes.nn.Linear4bit:
    settings = {"quant_type": "nf4", "compress_statistics": True}
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **settings
    )
    values = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device="cpu").normal_(std=0.02)
    weight = bitsandbytes.nn.Params4bit(values, requires_grad=False, module=layer, **settings)
    layer.weight = weight.to(DEVICE)
    return layer


def predicted(options: argparse.Namespace, placement: str) -> dict[str, float]:
    """Return the memory that `trl-opd fit` predicts for a run with a 4-bit teacher, by phase, in GiB."""
    with torch.device("meta"):
        student = Qwen3ForCausalLM(config_of(options.student))
        teacher = Qwen3ForCausalLM(config_of(options.teacher))
    setup = Setup(
        student=shape_of(student),
        teacher=shape_of(teacher),
        teacher_quantization="4bit",
        teacher_placement=placement,
        lora_r=16,
        per_device=options.per_device,
        accumulation=options.accumulation,
        prompt_length=PROMPTS[1],
        completion_length=options.completion,
    )
    return {phase: sum(parts.values()) / 2**30 for phase, parts in phases(setup).items()}


class Peaks:
    """The peak memory of each phase, in GiB; NaN without a GPU."""

    def __init__(self):
        self.of = {}

    @contextmanager
    def phase(self, name: str):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        yield
        if GPU:
            peak = torch.cuda.max_memory_allocated() / 2**30
            self.of[name] = max(self.of.get(name, 0.0), peak)
        else:
            self.of[name] = math.nan


def peaks_of(ours: bool, options: argparse.Namespace, *, four_bit: bool, placement: str | None) -> dict[str, float]:
    """Return the peak memory of one optimizer step of a trainer, by phase, in GiB."""
    settings = {
        "bf16": GPU,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": options.per_device,
        "gradient_accumulation_steps": options.accumulation,
        "max_completion_length": options.completion,
    }
    if ours:
        settings["teacher_placement"] = placement
    student = random_model(options.student, four_bit=False)
    teacher = random_model(options.teacher, four_bit=four_bit)
    adapter = LoraConfig(r=16, target_modules="all-linear")
    trainer = make_trainer(ours, VOCAB, models=(student, teacher), peft_config=adapter, **settings)
    trainer.create_optimizer()
    number = options.per_device * options.accumulation
    rollouts = make_rollouts(VOCAB, 0, number=number, longest=options.completion)
    peaks = Peaks()
    with peaks.phase("generation"):
        trainer._generate_single_turn([list(ids) for ids in rollouts.prompts], None, {})
    rows = replay(trainer, rollouts)
    if ours:
        score = trainer.model_pair.teacher_states.compute_states

        def timed(batch):
            with peaks.phase("teacher"):
                states = score(batch)
            if GPU:
                torch.cuda.reset_peak_memory_stats()
            return states

        trainer.model_pair.teacher_states.compute_states = timed
    with peaks.phase("student"):
        step(trainer, rows)
        trainer.optimizer.step()
    return peaks.of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", choices=SHAPES, default="4B" if GPU else "tiny")
    parser.add_argument("--teacher", choices=SHAPES, default="14B" if GPU else "tiny")
    parser.add_argument("--gigabytes", type=float, default=24.0)
    parser.add_argument("--per_device", type=int, default=2)
    parser.add_argument("--accumulation", type=int, default=8)
    parser.add_argument("--completion", type=int, default=1024 if GPU else 24)
    options = parser.parse_args()
    print(machine() + ("" if GPU else "; no CUDA device: tiny shapes, nothing is measured"))
    if GPU:
        share = options.gigabytes * 2**30 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    print("| trainer | teacher | generation, GiB | teacher | student | peak |\n|" + "---|" * 6)
    cases = [
        (True, "4-bit, parked", {"four_bit": True, "placement": "parked"}),
        (True, "4-bit, resident", {"four_bit": True, "placement": "resident"}),
        (False, "4-bit, resident", {"four_bit": True, "placement": None}),
        (False, "bfloat16, resident", {"four_bit": False, "placement": None}),
    ]
    for ours, teacher, case in cases:
        cells = measured_cells(ours, options, case)
        print(f"| {'ours' if ours else 'TRL'} | {teacher} | {' | '.join(cells)} |", flush=True)
        if ours:
            cells = cells_of(predicted(options, case["placement"]))
            print(f"| predicted | {teacher} | {' | '.join(cells)} |", flush=True)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


def measured_cells(ours: bool, options: argparse.Namespace, case: dict) -> list[str]:
    try:
        peaks = peaks_of(ours, options, **case)
    except torch.cuda.OutOfMemoryError:
        return ["", "", "", f"more than {options.gigabytes}"]
    return cells_of(peaks) if GPU else ["not measured"] * 4


def cells_of(peaks: dict[str, float]) -> list[str]:
    """Return the peak of each phase and the highest of them; TRL's teacher runs within the student's phase."""
    cells = [f"{peaks[name]:.2f}" if name in peaks else "" for name in PHASES]
    return [*cells, f"{max(peaks.values()):.2f}"]


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
