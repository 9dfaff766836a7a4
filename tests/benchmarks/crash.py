"""Kills runs with SIGKILL at random moments, starts them again, and compares them with a run that was never killed.

    python -m tests.benchmarks.crash 50
    python -m tests.benchmarks.crash 10 --what collect

Trainings are killed in turn while they save, generate, compute the student's backward, and while the teacher scores. A
third of the resumed runs is killed once more. On a CPU, parameters, optimizer, RNG states, token statistics, rollouts
and log lines must be bit-identical (docs/reliability.md). Exits with 1 if anything differs.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}

from tests.benchmarks.crash_runs import Job, Phases, jobs

TARGETS = ("saving", "generation", "backward", "teacher")
LIMIT = 300  # seconds after which a run that hangs is killed


@dataclass
class Trial:
    """A run that was killed: in which phases, from which steps it resumed, and which of its results differ."""

    job: str
    phases: list[str]
    resumed: list[int]
    differences: list[str]


@dataclass(frozen=True)
class Moment:
    """When to kill a run: `after` seconds after it enters a phase for the `entry`-th time, or after its start."""

    phase: str | None
    entry: int
    after: float


@dataclass(frozen=True)
class Whole:
    """A run that was never killed: its seconds, the mean seconds of each phase, and how often it entered each."""

    folder: Path
    seconds: float
    means: dict[str, float]
    entries: dict[str, int]


def start(job: Job, folder: Path, phases: Phases) -> int:
    """Start a job in a forked process, and return its process id."""
    phases.clear()
    pid = os.fork()
    if pid != 0:
        return pid
    code = 1
    try:
        with log_of(folder).open("a") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            job.run(folder, phases)
            code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def log_of(folder: Path) -> Path:
    """Return the file with what the runs in a folder print."""
    return folder.parent / f"{folder.name}.log"


def finish(job: Job, folder: Path, phases: Phases) -> Whole:
    """Run a job to its end, and return how long it took.

    Raises:
        `RuntimeError`: if it fails, or takes too long.
    """
    pid = start(job, folder, phases)
    began = time.monotonic()
    now = began
    spent = Counter()
    ended = 0
    while ended == 0:
        time.sleep(0.0005)
        before = now
        now = time.monotonic()
        spent[phases.now()] += now - before
        if now - began > LIMIT:
            os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, os.WNOHANG)
    if os.waitstatus_to_exitcode(status) != 0:
        log = log_of(folder).read_text()
        raise RuntimeError(f"{job.name} in {folder} did not end by itself:\n{log[-3000:]}")
    entries = {phase: phases.entered(phase) for phase in TARGETS}
    means = {phase: spent[phase] / max(count, 1) for phase, count in entries.items()}
    return Whole(folder, now - began, means, entries)


def kill(job: Job, folder: Path, phases: Phases, moment: Moment) -> str | None:
    """Start a job and kill it at a moment; return the phase that it was in, or `None` if it ended before."""
    pid = start(job, folder, phases)
    while True:
        ended, _ = os.waitpid(pid, os.WNOHANG)
        if ended:
            return None
        if moment.phase is None or phases.entered(moment.phase) >= moment.entry:
            time.sleep(moment.after)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return phases.now() if os.WIFSIGNALED(status) else None
        time.sleep(0.0002)


def try_once(job: Job, folder: Path, whole: Whole, draw: random.Random, target: str | None) -> Trial:
    """Kill a job once, or twice in a third of the trials, then let it end and compare it."""
    phases = Phases()
    kills = 2 if draw.random() < 1 / 3 else 1
    killed_in = []
    for number in range(1, kills + 1):
        if target is None:
            moment = Moment(None, 0, draw.uniform(0, 0.9 * whole.seconds))
        else:
            # The second time fewer entries are left.
            entry = draw.randint(1, max(1, whole.entries[target] // number))
            moment = Moment(target, entry, draw.uniform(0, whole.means[target]))
        phase = kill(job, folder, phases, moment)
        if phase is None:
            break
        killed_in.append(phase)
    finish(job, folder, phases)
    resumed = job.resumed_from(folder)
    differences = job.differences(whole.folder, folder, resumed)
    return Trial(job.name, killed_in, resumed, differences)


def run(count: int, what: str, seed: int, work: Path) -> list[Trial]:
    """Kill `count` runs, print a line for each, and return the trials."""
    draw = random.Random(seed)
    kinds = jobs(what, work)
    wholes: dict[str, Whole] = {}
    trials = []
    for number in range(count):
        job = kinds[number % len(kinds)]
        if job.name not in wholes:
            wholes[job.name] = finish(job, work / f"{job.name}-whole", Phases())
        target = TARGETS[number % len(TARGETS)] if what == "train" else None
        trial = try_once(job, work / f"{job.name}-{number}", wholes[job.name], draw, target)
        trials.append(trial)

        phases = ", ".join(trial.phases) or "not at all (it had ended)"
        result = "DIFFERENT: " + ", ".join(trial.differences) if trial.differences else "equal"
        steps = trial.resumed or 0
        print(f"{number + 1:>4}  {trial.job:<8} killed in {phases:<26} resumed from {steps}: {result}", flush=True)
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="runs to kill")
    parser.add_argument("--what", choices=("train", "collect", "probe", "demo"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", help="folder to keep; a temporary one by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work_dir or temporary)
        work.mkdir(parents=True, exist_ok=True)
        trials = run(args.count, args.what, args.seed, work)
    kills = Counter(phase for trial in trials for phase in trial.phases)
    wrong = [trial for trial in trials if trial.differences]
    by_phase = ", ".join(f"{count} in {phase}" for phase, count in kills.most_common())
    print(f"{len(trials)} runs, {kills.total()} kills ({by_phase})")
    print(f"{len(trials) - len(wrong)} equal, {len(wrong)} different.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
