"""Peak memory on one card, by phase: ours with a parked 4-bit teacher, and TRL's trainer with the same teacher or bf16.

    python -m tests.benchmarks.memory_gpu [--student 4B] [--teacher 14B] [--gigabytes 24]

Models of Qwen3's shapes with random weights, made from their configurations: nothing is downloaded. The process may use
`gigabytes` of the card. One optimizer step of each trainer on the same rollouts, the peak of each phase beside what
`trl-opd fit` predicts. Without a CUDA device it runs tiny shapes on the CPU, where nothing is measured: that shows that
the script runs, no more.
"""

import argparse
import gc
import logging
import warnings
from contextlib import contextmanager

import bitsandbytes
import torch
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

from trl_opd.models.memory_plan import Setup, phases
from trl_opd.models.quantised import keep_4bit_layout
from trl_opd.models.shape import shape_of

from tests.benchmarks.workload import PROMPTS, machine, make_rollouts, make_trainer, replay, step

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
    """Return a model of a shape on the device, in bfloat16 or in 4 bits, without holding it all in bfloat16 before."""
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
    kind = {"quant_type": "nf4", "compress_statistics": True}
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, device="meta", **kind
    )
    weight = torch.empty(linear.weight.shape, dtype=torch.bfloat16, device="cpu").normal_(std=0.02)
    layer.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, module=layer, **kind).to(DEVICE)
    return layer


def predicted(options: argparse.Namespace, placement: str) -> dict[str, float]:
    """Return what `trl-opd fit` says of a run with a 4-bit teacher, by phase, in GiB."""
    with torch.device("meta"):
        student, teacher = (shape_of(Qwen3ForCausalLM(config_of(name))) for name in (options.student, options.teacher))
    setup = Setup(
        student=student,
        teacher=teacher,
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
    """The most memory that each phase held, in GiB."""

    def __init__(self):
        self.of = {}

    @contextmanager
    def phase(self, name: str):
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        yield
        peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else float("nan")
        self.of[name] = max(self.of.get(name, 0.0), peak) if GPU else peak


def peaks_of(ours: bool, options: argparse.Namespace, *, four_bit: bool, placement: str | None) -> dict[str, float]:
    """Return the peaks of one optimizer step of a trainer, by phase."""
    settings = {
        "bf16": GPU,
        "gradient_checkpointing": True,
        "per_device_train_batch_size": options.per_device,
        "gradient_accumulation_steps": options.accumulation,
        "max_completion_length": options.completion,
    }
    if ours:
        settings["teacher_placement"] = placement
    models = random_model(options.student, four_bit=False), random_model(options.teacher, four_bit=four_bit)
    adapter = LoraConfig(r=16, target_modules="all-linear")
    trainer = make_trainer(ours, VOCAB, models=models, peft_config=adapter, **settings)
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
    cases = {
        ("ours", "4-bit, parked"): (True, {"four_bit": True, "placement": "parked"}),
        ("ours", "4-bit, resident"): (True, {"four_bit": True, "placement": "resident"}),
        ("TRL", "4-bit, resident"): (False, {"four_bit": True, "placement": None}),
        ("TRL", "bfloat16, resident"): (False, {"four_bit": False, "placement": None}),
    }
    for names, (ours, case) in cases.items():
        try:
            peaks = peaks_of(ours, options, **case)
            peaks["peak"] = max(peaks.values())
            cells = [f"{peaks[name]:.2f}" if name in peaks else "" for name in (*PHASES, "peak")]
            cells = cells if GPU else ["not measured"] * 4
        except torch.cuda.OutOfMemoryError:
            cells = ["", "", "", f"more than {options.gigabytes}"]
        print("| " + " | ".join([*names, *cells]) + " |", flush=True)
        if ours:
            foreseen = predicted(options, case["placement"])
            cells = [f"{foreseen[phase]:.2f}" for phase in PHASES] + [f"{max(foreseen.values()):.2f}"]
            print("| " + " | ".join(["predicted", names[1], *cells]) + " |", flush=True)
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
