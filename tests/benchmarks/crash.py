"""Runs killed with SIGKILL at random moments, started again, and compared with one that was never killed.

    python -m tests.benchmarks.crash 50
    python -m tests.benchmarks.crash 10 --what collect

A training is killed in turn while it generates, while the teacher scores, in the student's backward and while it saves;
a third of the resumed runs is killed once more. What must be equal to the bit on a CPU: parameters, optimizer, random
states, token statistics, rollouts and log lines (docs/reliability.md). Exits with 1 where anything differs.
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
LIMIT = 300  # seconds of a run


@dataclass
class Trial:
    """One run that was killed: where, how often, from which steps it went on, and what came out differently."""

    job: str
    phases: list[str]
    resumed: list[int]
    differences: list[str]


@dataclass(frozen=True)
class Moment:
    """When to kill: `after` seconds beyond the `entry`-th entry into a phase; without a phase beyond the start."""

    phase: str | None
    entry: int
    after: float


@dataclass(frozen=True)
class Whole:
    """A run that was never killed."""

    folder: Path
    seconds: float
    means: dict[str, float]
    entries: dict[str, int]


def start(job: Job, folder: Path, phases: Phases) -> int:
    """Start a job in a process of its own and return its id."""
    phases.clear()
    if pid := os.fork():
        return pid
    code = 1
    try:
        with open(folder.parent / f"{folder.name}.log", "a") as log:
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


def finish(job: Job, folder: Path, phases: Phases) -> tuple[float, dict[str, float]]:
    """Run a job to its end; return its seconds, and those that an entry into each phase takes in the mean."""
    pid, began, spent = start(job, folder, phases), time.monotonic(), Counter()
    last = began
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() - began > LIMIT:
            os.kill(pid, signal.SIGKILL)
        now = time.monotonic()
        spent[phases.now()] += now - last
        last = now
        time.sleep(0.0005)
    if os.waitstatus_to_exitcode(ended[1]) != 0:
        log = (folder.parent / f"{folder.name}.log").read_text()
        raise RuntimeError(f"{job.name} in {folder} did not end by itself:\n{log[-3000:]}")
    means = {phase: spent[phase] / max(phases.entered(phase), 1) for phase in TARGETS}
    return time.monotonic() - began, means


def kill(job: Job, folder: Path, phases: Phases, moment: Moment) -> str | None:
    """Start a job and kill it at a moment; return the phase that it was in, or `None` if it had ended before."""
    pid = start(job, folder, phases)
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if moment.phase is None or phases.entered(moment.phase) >= moment.entry:
            time.sleep(moment.after)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            return phases.now() if os.WIFSIGNALED(status) else None
        time.sleep(0.0002)
    return None


def try_once(job: Job, folder: Path, whole: Whole, draw: random.Random, target: str | None) -> Trial:
    """Kill a job once, in a third of the trials twice, let it end, and compare."""
    phases, hit, again = Phases(), [], 1 + (draw.random() < 1 / 3)
    while len(hit) < again:
        if target is None:
            moment = Moment(None, 0, draw.uniform(0, 0.9 * whole.seconds))
        else:
            entry = draw.randint(1, max(1, whole.entries[target] // (1 + len(hit))))
            moment = Moment(target, entry, draw.uniform(0, whole.means[target]))
        found = kill(job, folder, phases, moment)
        if found is None:
            break
        hit.append(found)
    finish(job, folder, phases)
    resumed = job.resumed_from(folder)
    return Trial(job.name, hit, resumed, job.differences(whole.folder, folder, resumed))


def run(count: int, what: str, seed: int, work: Path) -> list[Trial]:
    """Kill `count` runs and return what came of each."""
    draw, trials = random.Random(seed), []
    kinds = jobs(what, work)
    wholes: dict[str, Whole] = {}
    for number in range(count):
        job = kinds[number % len(kinds)]
        if job.name not in wholes:
            phases, folder = Phases(), work / f"{job.name}-whole"
            seconds, means = finish(job, folder, phases)
            entries = {phase: phases.entered(phase) for phase in TARGETS}
            wholes[job.name] = Whole(folder, seconds, means, entries)
        target = TARGETS[number % len(TARGETS)] if what == "train" else None
        trial = try_once(job, work / f"{job.name}-{number}", wholes[job.name], draw, target)
        trials.append(trial)
        came = "equal" if not trial.differences else "DIFFERENT: " + ", ".join(trial.differences)
        where = ", ".join(trial.phases) or "not at all (it had ended)"
        print(
            f"{number + 1:>4}  {trial.job:<8} killed in {where:<26} went on from {trial.resumed or 0}: {came}",
            flush=True,
        )
    return trials


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("count", type=int, help="runs to kill")
    parser.add_argument("--what", choices=("train", "collect", "probe", "demo"), default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", help="kept; a temporary folder without it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(args.work_dir or temporary)
        work.mkdir(parents=True, exist_ok=True)
        trials = run(args.count, args.what, args.seed, work)
    kills = Counter(phase for trial in trials for phase in trial.phases)
    wrong = [trial for trial in trials if trial.differences]
    print(
        f"{len(trials)} runs, {sum(kills.values())} kills ({', '.join(f'{n} in {p}' for p, n in kills.most_common())})"
    )
    print(f"{len(trials) - len(wrong)} equal, {len(wrong)} different.")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
