"""Seconds and tokens per second of rollouts: transformers' `generate` as TRL calls it, and continuous batching.

    python -m tests.benchmarks.generation [--rollouts 16 64] [--longest 192] [--rounds 3]

The student is a random Phi (its head has a bias) whose end token has a constant probability, so the lengths of rollouts
are skewed as in training: most are short, and some run up to the limit. Both take turns to sample in this process.
"""

import argparse
import logging
import math
import os
import statistics
import tempfile
import time
import warnings

import torch
from transformers import PhiConfig, PhiForCausalLM

from trl_opd import OPDConfig, OPDTrainer

from tests.benchmarks.workload import MEAN_SHARE, PROMPTS, STUDENT, TEACHER, machine, make_model
from tests.helpers.tiny import make_dataset, make_tokenizer

END = 2


def make_student(vocab: int, mean_length: float) -> PhiForCausalLM:
    """Return a student that ends a rollout after `mean_length` tokens in the mean."""
    torch.manual_seed(0)
    fields = {"vocab_size": vocab, **STUDENT, "intermediate_size": 768, "initializer_range": 0.02}
    student = PhiForCausalLM(PhiConfig(**fields, bos_token_id=None, eos_token_id=END, pad_token_id=0))
    with torch.no_grad():
        student.lm_head.weight[END] = 0.0
        student.lm_head.bias[END] = math.log(vocab / (mean_length - 1))
    return student


def make_sampler(vocab: int, longest: int, engine: bool) -> OPDTrainer:
    """Return a trainer that samples with the engine, or with `generate`."""
    settings = {"use_cpu": not torch.cuda.is_available(), "bf16": torch.cuda.is_available(), "report_to": "none"}
    args = OPDConfig(
        tempfile.mkdtemp(),
        **settings,
        gradient_checkpointing=False,
        max_completion_length=longest,
        use_transformers_continuous_batching=engine,
    )
    models = make_student(vocab, longest * MEAN_SHARE), make_model(vocab, TEACHER, 1)
    if torch.cuda.is_available():
        models = tuple(model.to(torch.bfloat16) for model in models)
    return OPDTrainer(*models, args, make_dataset(), processing_class=make_tokenizer())


def timed(trainer: OPDTrainer, prompts: list[list[int]], seed: int) -> tuple[float, list[int]]:
    """Return the seconds of a generation, and the lengths of its rollouts."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    completions = trainer._generate_single_turn(prompts, None, {})
    return time.perf_counter() - start, [len(ids) for ids in completions]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--longest", type=int, default=192)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{machine()}; load average {os.getloadavg()[0]:.2f}")
    print(
        "| rollouts | mean length | generate, s | tokens/s | continuous, s | tokens/s | ratio of tokens/s |\n|"
        + "---|" * 7
    )
    samplers = [make_sampler(options.vocab, options.longest, engine) for engine in (False, True)]
    draw = torch.Generator().manual_seed(0)
    for number in options.rollouts:
        lengths = torch.randint(PROMPTS[0], PROMPTS[1] + 1, (number,), generator=draw).tolist()
        prompts = [torch.randint(3, options.vocab, (length,), generator=draw).tolist() for length in lengths]
        turns = [[timed(sampler, prompts, seed) for sampler in samplers] for seed in range(options.rounds + 1)][1:]
        seconds = [statistics.median(turn[place][0] for turn in turns) for place in (0, 1)]
        rates = [[sum(turn[place][1]) / turn[place][0] for turn in turns] for place in (0, 1)]
        mean = statistics.mean(length for turn in turns for length in turn[0][1])
        ratio = statistics.median(mine / its for its, mine in zip(*rates, strict=True))
        cells = (
            number,
            f"{mean:.0f}",
            *(
                f"{value:.2f}" if place == 0 else f"{value:.0f}"
                for engine in (0, 1)
                for place, value in enumerate((seconds[engine], statistics.median(rates[engine])))
            ),
            f"{ratio:.2f}",
        )
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
