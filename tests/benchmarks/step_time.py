"""Seconds of an optimizer step without generation and optimizer: our trainer and TRL's, on the same rollouts.

    python -m tests.benchmarks.step_time [--vocab 32768 151936] [--rounds 5]

Both trainers take turns in this process, and the ratio is the median over the rounds. Frozen positions (30 % of the
tokens) are not measured in the timed steps, because only steps that log do so. Peak memory is what a step uses beyond
what was in use before it, measured in a separate process.
"""

import argparse
import logging
import operator
import os
import statistics
import time
import warnings

from tests.benchmarks.measuring import in_a_process, machine, peak_bytes
from tests.benchmarks.workload import make_rollouts, make_trainer, replay, step


def seconds(trainer, rollouts) -> float:
    """Return the time of one step, which starts without gradients."""
    rows = replay(trainer, rollouts)
    trainer.model.zero_grad()
    start = time.perf_counter()
    step(trainer, rows)
    return time.perf_counter() - start


def compare(vocab: int, rounds: int, *, lora: bool, freeze: bool) -> tuple[float, float, float]:
    """Return the medians of TRL's seconds, of ours, and of their ratio."""
    settings = {"lora": lora, "freeze": freeze, "logging_steps": 10_000}
    trls = make_trainer(False, vocab, **settings)
    our = make_trainer(True, vocab, **settings)
    theirs = []
    ours = []
    for turn in range(rounds + 1):
        rollouts = make_rollouts(vocab, seed=turn)
        if turn % 2:
            theirs.append(seconds(trls, rollouts))
            ours.append(seconds(our, rollouts))
        else:
            ours.append(seconds(our, rollouts))
            theirs.append(seconds(trls, rollouts))
    # The first round warms up.
    del theirs[0], ours[0]
    ratios = map(operator.truediv, ours, theirs)
    return statistics.median(theirs), statistics.median(ours), statistics.median(ratios)


def peak_mebibytes(ours: bool, vocab: int, lora: bool, freeze: bool) -> float:
    """Return the most memory that a second step uses beyond what was in use before; to be called in a new process."""
    trainer = make_trainer(ours, vocab, lora=lora, freeze=freeze, logging_steps=10_000)
    seconds(trainer, make_rollouts(200, seed=0, longest=2))  # so that what a first step loads is not measured
    trainer.model.zero_grad()
    rows = replay(trainer, make_rollouts(vocab, seed=1))
    return peak_bytes(step, trainer, rows) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32768, 151936])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(f"{machine()}; load average {os.getloadavg()[0]:.2f}")
    print("| vocabulary | student | weights | TRL, s | ours, s | ratio | TRL, peak MiB | ours |\n|" + "---|" * 8)
    for vocab in options.vocab:
        for lora in (False, True):
            for freeze in (False, True):
                theirs, ours, ratio = compare(vocab, options.rounds, lora=lora, freeze=freeze)
                their_peak = in_a_process(peak_mebibytes, False, vocab, lora, freeze)
                our_peak = in_a_process(peak_mebibytes, True, vocab, lora, freeze)
                student = "LoRA" if lora else "full"
                weights = "30 % frozen" if freeze else "uniform"
                times = f"{theirs:.2f} | {ours:.2f} | {ratio:.3f}"
                print(f"| {vocab} | {student} | {weights} | {times} | {their_peak:.0f} | {our_peak:.0f} |", flush=True)
    print(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
