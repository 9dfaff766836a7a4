"""Seconds and tokens per second of sampling: transformers' `generate` as TRL calls it, and continuous batching.

    python -m tests.benchmarks.generation [--rollouts 16 64] [--longest 192] [--rounds 3]

The student is a random Phi whose end token always has the same probability (its head has a bias), so the lengths of
rollouts are skewed as in training: most are short, and some reach the limit. Both take turns in this process.
"""

import argparse
import logging
import math
import os
import statistics
import tempfile
import time
import warnings
from dataclasses import dataclass

import torch
from transformers import PhiConfig, PhiForCausalLM

from trl_opd import OPDConfig, OPDTrainer

from tests.benchmarks.measuring import machine
from tests.benchmarks.workload import MEAN_SHARE, PROMPTS, STUDENT, TEACHER, make_model
from tests.helpers.tiny import make_dataset, make_tokenizer

END = 2


def make_student(vocab: int, mean_length: float) -> PhiForCausalLM:
    """Return a student whose rollouts have `mean_length` tokens on average."""
    torch.manual_seed(0)
    fields = {"vocab_size": vocab, **STUDENT, "intermediate_size": 768, "initializer_range": 0.02}
    student = PhiForCausalLM(PhiConfig(**fields, bos_token_id=None, eos_token_id=END, pad_token_id=0))
    with torch.no_grad():
        student.lm_head.weight[END] = 0.0
        student.lm_head.bias[END] = math.log(vocab / (mean_length - 1))
    return student


def make_sampler(vocab: int, longest: int, engine: bool) -> OPDTrainer:
    """Return a trainer that samples with the engine, or with `generate`."""
    on_gpu = torch.cuda.is_available()
    args = OPDConfig(
        tempfile.mkdtemp(),
        use_cpu=not on_gpu,
        bf16=on_gpu,
        report_to="none",
        gradient_checkpointing=False,
        max_completion_length=longest,
        use_transformers_continuous_batching=engine,
    )
    dtype = torch.bfloat16 if on_gpu else torch.float32
    student = make_student(vocab, longest * MEAN_SHARE).to(dtype)
    teacher = make_model(vocab, TEACHER, 1).to(dtype)
    return OPDTrainer(student, teacher, args, make_dataset(), processing_class=make_tokenizer())


@dataclass(frozen=True)
class Sampling:
    """The time of one generation, and the lengths of its rollouts in tokens."""

    seconds: float
    lengths: list[int]

    @property
    def tokens_per_second(self) -> float:
        return sum(self.lengths) / self.seconds


def sample(trainer: OPDTrainer, prompts: list[list[int]], seed: int) -> Sampling:
    """Generate a completion for each prompt, and measure it."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    completions = trainer._generate_single_turn(prompts, None, {})
    seconds = time.perf_counter() - start
    return Sampling(seconds, lengths=[len(ids) for ids in completions])


def make_prompts(number: int, vocab: int, draw: torch.Generator) -> list[list[int]]:
    """Return random prompts of the lengths of the workload."""
    shortest, longest = PROMPTS
    lengths = torch.randint(shortest, longest + 1, (number,), generator=draw).tolist()
    return [torch.randint(3, vocab, (length,), generator=draw).tolist() for length in lengths]


def row_of_table(generate: list[Sampling], continuous: list[Sampling]) -> str:
    """Return the cells of one row after the number of rollouts: medians over the rounds, which are paired."""
    lengths = [length for one in generate for length in one.lengths]
    pairs = zip(generate, continuous, strict=True)
    cells = [f"{statistics.mean(lengths):.0f}"]
    for found in (generate, continuous):
        seconds = statistics.median(one.seconds for one in found)
        rate = statistics.median(one.tokens_per_second for one in found)
        cells += [f"{seconds:.2f}", f"{rate:.0f}"]
    ratio = statistics.median(ours.tokens_per_second / theirs.tokens_per_second for theirs, ours in pairs)
    return " | ".join([*cells, f"{ratio:.2f}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--longest", type=int, default=192)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}; load average {os.getloadavg()[0]:.2f}")
    print("| rollouts | mean length | generate, s | tokens/s | continuous, s | tokens/s | ratio of tokens/s |")
    print("|" + "---|" * 7)
    with_generate = make_sampler(options.vocab, options.longest, engine=False)
    with_engine = make_sampler(options.vocab, options.longest, engine=True)
    draw = torch.Generator().manual_seed(0)
    for number in options.rollouts:
        prompts = make_prompts(number, options.vocab, draw)
        generate = []
        continuous = []
        for seed in range(options.rounds + 1):
            generate.append(sample(with_generate, prompts, seed))
            continuous.append(sample(with_engine, prompts, seed))
        # The first round warms up.
        print(f"| {number} | {row_of_table(generate[1:], continuous[1:])} |", flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
