"""What the benchmarks run on: rollouts of skewed lengths, and trainers that replay them instead of sampling."""

import multiprocessing
import os
import platform
import resource
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, DistillationTrainer

from trl_opd import OPDConfig, OPDTrainer, Rock, RockSet

from tests.helpers.tiny import make_tokenizer

PER_DEVICE, ACCUMULATION = 2, 8
PROMPTS, LONGEST, MEAN_SHARE = (32, 96), 192, 0.4
# Of every ten tokens three are of the first hundred types, which are the rocks.
ROCKS, ROCK_SHARE = 100, 0.3
STUDENT = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4}
TEACHER = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}


@dataclass(frozen=True)
class Rollouts:
    """Token ids of the prompts and completions of one generation batch."""

    prompts: list[list[int]]
    completions: list[list[int]]


def make_rollouts(
    vocab: int, seed: int, *, number: int = PER_DEVICE * ACCUMULATION, longest: int = LONGEST
) -> Rollouts:
    """Return rollouts whose completions are 0.4 of the longest in the mean, most of them short and one the longest."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(PROMPTS[0], PROMPTS[1] + 1, (number,), generator=draw).tolist()
    lengths = -torch.rand(number, generator=draw).log()
    for _ in range(20):  # cutting at the longest lowers the mean: go on until it is met
        lengths = (lengths * MEAN_SHARE / lengths.mean()).clamp(max=1.0)
    lengths[lengths.argmax()] = 1.0
    lengths = (lengths * longest).round().clamp(min=1).long().tolist()

    def tokens(length: int) -> list[int]:
        rock = torch.rand(length, generator=draw) < ROCK_SHARE
        ids = torch.randint(ROCKS, vocab, (length,), generator=draw)
        return ids.where(~rock, torch.randint(3, ROCKS, (length,), generator=draw)).tolist()

    return Rollouts([tokens(length) for length in prompts], [tokens(length) for length in lengths])


def make_model(vocab: int, size: dict, seed: int, **changes) -> Qwen3ForCausalLM:
    """Return a random Qwen3 of a size, with a head that is not tied."""
    torch.manual_seed(seed)
    width = size["hidden_size"]
    fields = {"intermediate_size": 3 * width, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False}
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, **size, **fields, **ends, **changes))


def make_trainer(
    ours: bool, vocab: int, *, lora: bool = False, freeze: bool = False, models=None, peft_config=None, **settings
):
    """Return TRL's trainer or ours on the same models, which gets its rollouts from `replay`."""
    student, teacher = models or (make_model(vocab, STUDENT, 0), make_model(vocab, TEACHER, 1))
    adapter = LoraConfig(r=16, target_modules="all-linear") if lora else peft_config
    settings = {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": PER_DEVICE,
        "gradient_accumulation_steps": ACCUMULATION,
        "max_completion_length": LONGEST,
        "report_to": "none",
        "disable_tqdm": True,
        **settings,
    }
    if freeze and ours:
        settings |= {"token_weighting": "rock", "rock_set": _rock_file(settings["output_dir"])}
    trainer = (OPDTrainer if ours else DistillationTrainer)(
        model=student,
        teacher_model=teacher,
        args=(OPDConfig if ours else DistillationConfig)(**settings),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
        processing_class=make_tokenizer(),
        peft_config=adapter,
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    return trainer


def replay(trainer, rollouts: Rollouts) -> list[dict]:
    """Give a trainer these rollouts as its next generation batch, and return the rows to call `training_step` with."""
    trainer._tokenize_prompts = lambda prompts: (rollouts.prompts, None, {})
    trainer._generate_single_turn = lambda *_, **__: rollouts.completions
    return [{"prompt": "a"}] * len(rollouts.prompts)


def step(trainer, rows: list[dict]) -> None:
    """Run the forwards and backwards of an optimizer step, without the optimizer."""
    accumulation = trainer.args.gradient_accumulation_steps
    for micro in range(accumulation):
        trainer.accelerator.gradient_state._set_sync_gradients(micro == accumulation - 1)
        trainer.training_step(trainer.model, rows, None)


def machine() -> str:
    """Return date, hardware and versions, for the head of a table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return (
        f"{date.today()}, {name}, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def in_a_process(function: Callable, *arguments):
    """Return what a function returns in a process of its own, which is gone before the next measurement."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_bytes(function: Callable, *arguments) -> int:
    """Return the most memory that a call held above what there was before, of this process or of its GPU."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function(*arguments)
        return torch.cuda.max_memory_allocated() - before
    return host_peak_bytes(function, *arguments)


def host_peak_bytes(function: Callable, *arguments) -> int:
    """Return the most memory of this process that a call held above what there was before."""
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    function(*arguments)
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    return peak - before


def _rock_file(folder: str) -> str:
    rocks = [Rock(id=id, text=None, count=10, mean_kl=1.0, score=10.0) for id in range(ROCKS)]
    path = os.path.join(folder, "rock_set.json")
    RockSet(
        rocks=rocks,
        tokenizer={"name": None, "vocab_size": None, "fingerprint": None},
        measure={"divergence": "reverse_kl", "temperature": 1.0},
        method={"score": "aggregate", "top_k": ROCKS},
        corpus={"rollouts": 16, "tokens": 10_000, "kl_sum": 1000.0},
    ).save(path)
    return path
