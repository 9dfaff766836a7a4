"""Where the time of an optimizer step goes: a table of its phases, measured in a real run of the trainer.

    python -m tests.benchmarks.profile_step [--vocab 32768] [--steps 6] [--freeze] [--lora] [--log_every 10]

With `--log_every 1` every step measures its frozen positions. The first step is left out. On a GPU the profile waits
for the end of every phase, so their sum is more than a step takes without the profile.
"""

import argparse
import dataclasses
import logging
import os
import time
import warnings
from collections import defaultdict
from collections.abc import Callable

import torch
from transformers import TrainerCallback

from trl_opd import opd_trainer

from tests.benchmarks.measuring import machine
from tests.benchmarks.workload import make_rollouts, make_trainer

PHASES = ("generation", "teacher", "student forward", "divergence", "backward", "optimizer", "statistics", "other")


class Clock:
    """A clock that adds up the seconds spent in functions, by phase."""

    def __init__(self):
        self.seconds = defaultdict(float)

    def time(self, owner: object, name: str, phase: str | None = None) -> None:
        """Replace a method or function by one that is timed; see [`Clock.timed`]."""
        setattr(owner, name, self.timed(getattr(owner, name), phase))

    def timed(self, function: Callable, phase: str | None = None) -> Callable:
        """Return a function that is timed; without a phase, its first argument is the model whose forward it is."""

        def timed(*args, **kwargs):
            start = now()
            try:
                return function(*args, **kwargs)
            finally:
                name = phase or self.phase_of(args[0])
                self.seconds[name] += now() - start

        return timed

    def phase_of(self, model: torch.nn.Module) -> str:
        return "student forward" if any(p.requires_grad for p in model.parameters()) else "teacher"


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class LeaveOutTheFirst(TrainerCallback):
    """Starts the clock after the first step, and measures the whole time of the others."""

    def __init__(self, clock: Clock):
        self._clock = clock
        self.total = 0.0

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == 0:
            self._clock.time(optimizer, "step", "optimizer")
        if state.global_step == 1:
            self._clock.seconds.clear()
            self._start = now()

    def on_train_end(self, args, state, control, **kwargs):
        self.total = now() - self._start


def profile(options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of a step, by phase."""
    settings = {"max_steps": options.steps, "logging_steps": options.log_every, "save_strategy": "no"}
    trainer = make_trainer(True, options.vocab, lora=options.lora, freeze=options.freeze, **settings)
    clock = Clock()
    prompts = make_rollouts(options.vocab, 0).prompts
    trainer._tokenize_prompts = lambda _: (prompts, None, {})
    clock.time(trainer, "_generate_single_turn", "generation")
    clock.time(trainer.model_pair.teacher_states, "_last_hidden_state")
    last_hidden_state = clock.timed(trainer.model_pair.last_hidden_state)
    trainer.model_pair = dataclasses.replace(trainer.model_pair, last_hidden_state=last_hidden_state)
    clock.time(opd_trainer, "loss_and_signals", "divergence")
    clock.time(trainer.accelerator, "backward", "backward")
    for owner, name in (
        (trainer._token_sums, "update"),
        (trainer._position_weights, "mask_and_weigh"),
        (trainer._finite_guard, "note"),
        (trainer._finite_guard, "end_step"),
        (trainer._metric_sums["train"], "add_signals"),
        (trainer._metric_sums["train"], "add_forward"),
        (opd_trainer, "locate_loss_positions"),
    ):
        clock.time(owner, name, "statistics")
    callback = LeaveOutTheFirst(clock)
    trainer.add_callback(callback)
    trainer.train()
    clock.seconds["other"] = callback.total - sum(clock.seconds.values())
    return {phase: clock.seconds[phase] / (options.steps - 1) for phase in PHASES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--log_every", type=int, default=10)
    parser.add_argument("--freeze", action="store_true")
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first is left out")
    print(f"{machine()}; load average {os.getloadavg()[0]:.2f}")
    seconds = profile(options)
    total = sum(seconds.values())
    training = total - seconds["generation"]
    print("| phase | seconds of a step | share | share without generation |\n|---|---|---|---|")
    for phase, value in seconds.items():
        rest = "" if phase == "generation" else f"{value / training:.1%}"
        print(f"| {phase} | {value:.3f} | {value / total:.1%} | {rest} |")


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    main()
