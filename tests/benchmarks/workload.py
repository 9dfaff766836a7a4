"""Rollouts of skewed lengths for the benchmarks, and trainers that replay them instead of sampling."""

import os
import tempfile
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import DistillationConfig, DistillationTrainer

from trl_opd import OPDConfig, OPDTrainer, Rock, RockSet

from tests.helpers.tiny import make_tokenizer

PER_DEVICE = 2
ACCUMULATION = 8
PROMPTS = (32, 96)  # shortest and longest prompt, in tokens
LONGEST = 192  # the length limit of completions
MEAN_SHARE = 0.4  # their mean length, as a share of the limit
ROCKS = 100  # the first token ids are the rocks
ROCK_SHARE = 0.3  # of all tokens
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
    """Return rollouts most of which are short: their mean length is 0.4 of the limit, which one of them reaches."""
    draw = torch.Generator().manual_seed(seed)
    prompts = torch.randint(PROMPTS[0], PROMPTS[1] + 1, (number,), generator=draw).tolist()
    lengths = -torch.rand(number, generator=draw).log()
    for _ in range(20):  # cutting at the limit lowers the mean, so scale and cut until the mean is right
        lengths = (lengths * MEAN_SHARE / lengths.mean()).clamp(max=1.0)
    lengths[lengths.argmax()] = 1.0
    lengths = (lengths * longest).round().clamp(min=1).long().tolist()

    def tokens(length: int) -> list[int]:
        is_rock = torch.rand(length, generator=draw) < ROCK_SHARE
        others = torch.randint(ROCKS, vocab, (length,), generator=draw)
        rocks = torch.randint(3, ROCKS, (length,), generator=draw)
        return rocks.where(is_rock, others).tolist()

    return Rollouts(prompts=list(map(tokens, prompts)), completions=list(map(tokens, lengths)))


def make_model(vocab: int, size: dict, seed: int, **changes) -> Qwen3ForCausalLM:
    """Return a random Qwen3 of a size, whose head is not tied to its embeddings."""
    torch.manual_seed(seed)
    width = size["hidden_size"]
    fields = {"intermediate_size": 3 * width, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": False}
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=vocab, **size, **fields, **ends, **changes))


def make_trainer(
    ours: bool, vocab: int, *, lora: bool = False, freeze: bool = False, models=None, peft_config=None, **settings
):
    """Return TRL's trainer or ours on the same models, without rollouts, which `replay` gives it."""
    student, teacher = models or (make_model(vocab, STUDENT, 0), make_model(vocab, TEACHER, 1))
    if lora:
        peft_config = LoraConfig(r=16, target_modules="all-linear")
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
    trainer_class = OPDTrainer if ours else DistillationTrainer
    config_class = OPDConfig if ours else DistillationConfig
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=config_class(**settings),
        train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
        processing_class=make_tokenizer(),
        peft_config=peft_config,
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
