"""Seconds of an optimizer step outside generation and the optimizer, ours as a ratio to TRL's, on the same rollouts.

    python -m tests.benchmarks.step_time [--vocab 32768 151936] [--rounds 5]

Both trainers run in this process and take turns on the same rollouts; the ratio is the median over the rounds. Frozen
positions (30 % of the tokens) are not measured in the timed steps, because only steps that log do so. Peak memory is
that of a step above the memory in use before it, in a separate process.
"""

import argparse
import logging
import os
import statistics
import time
import warnings

from tests.benchmarks.workload import in_a_process, machine, make_rollouts, make_trainer, peak_bytes, replay, step


def seconds(trainer, rollouts) -> float:
    """Return the time of one step; the gradients of the last are gone before."""
    rows = replay(trainer, rollouts)
    trainer.model.zero_grad()
    start = time.perf_counter()
    step(trainer, rows)
    return time.perf_counter() - start


def compare(vocab: int, rounds: int, *, lora: bool, freeze: bool) -> tuple[float, float, float]:
    """Return the medians of TRL's seconds, ours, and their ratio."""
    trainers = [make_trainer(ours, vocab, lora=lora, freeze=freeze, logging_steps=10_000) for ours in (False, True)]
    pairs = []
    for turn in range(rounds + 1):  # the first warms up
        rollouts = make_rollouts(vocab, seed=turn)
        pairs.append([seconds(trainer, rollouts) for trainer in (trainers if turn % 2 else trainers[::-1])])
        if not turn % 2:
            pairs[-1].reverse()
    theirs, ours = zip(*pairs[1:], strict=True)
    ratio = statistics.median(mine / its for its, mine in pairs[1:])
    return statistics.median(theirs), statistics.median(ours), ratio


def peak_mebibytes(ours: bool, vocab: int, lora: bool, freeze: bool) -> float:
    """Return the most memory that a second step held above what there was before it; call it in a fresh process."""
    trainer = make_trainer(ours, vocab, lora=lora, freeze=freeze, logging_steps=10_000)
    seconds(trainer, make_rollouts(200, seed=0, longest=2))  # what a first step loads
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
                cells = (vocab, "LoRA" if lora else "full", "30 % frozen" if freeze else "uniform")
                cells += (f"{theirs:.2f}", f"{ours:.2f}", f"{ratio:.3f}")
                for mine in (False, True):
                    cells += (f"{in_a_process(peak_mebibytes, mine, vocab, lora, freeze):.0f}",)
                print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    print(f"load average {os.getloadavg()[0]:.2f}")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
