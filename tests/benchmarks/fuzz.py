"""Broken and hostile files of every format that a user may pass in: each is read, or is a one-line error.

python -m tests.benchmarks.fuzz 10000 [--seed 0] [--kinds occurrences,recipe] [--keep FOLDER]

Forked processes read some files each, with a limit of time and memory for every file. The exit code is 1 if a file
raises anything but an error message of ours, ends its process, takes too much time or memory, or has its content run as
code. Such a file is a violation and is kept.
"""

import argparse
import contextlib
import faulthandler
import io
import json
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import torch

import trl_opd

from tests.helpers.hostile_files import CHECKS, FILES, MARKER, broken_file, good_files, large_files, read, tokenizer

SECONDS = 5  # processor time for a file
GRACE = 60  # wall time for a process that does not react to the timer
MEMORY = 2**30  # bytes for a file, above those of the process at its start
ADDRESSES = 4 * 2**30  # address space for a process, above that at its start
BATCH = 40  # files per process
# Share of each kind. Reports get few files, because they draw plots; but there is at least one file of each kind.
SHARES = {"rock_set": 22, "occurrences": 24, "prompts": 10, "token_stats": 16, "recipe": 18}
SHARES |= {"run": 3, "knockout": 3, "gradients": 2, "samples": 2, "summary": 0}
PACKAGE = str(Path(trl_opd.__file__).parent)
LONGEST = 1500  # characters of an error message, which may hold a path and a list of columns


class TooSlow(BaseException):
    """A file took too long. Not an `Exception`, so that no reader takes it for an error of the file."""


@dataclass
class Tally:
    """Outcomes of the files of a kind.

    Args:
        files, read, refused (`int`): Number of files, of those read, and of those with an error message of ours.
        seconds, megabytes (`float`): Largest time, and largest memory above the start of the process.
        violations (`list[tuple[int, str]]`): Number of the file, and reason.
    """

    files: int = 0
    read: int = 0
    refused: int = 0
    seconds: float = 0.0
    megabytes: float = 0.0
    violations: list[tuple[int, str]] = field(default_factory=list)


def attempt(kind: str, content: bytes, folder: Path) -> tuple[str, str]:
    """Read a file in an empty folder; return ("read", ""), ("refused", message) or ("violation", reason)."""
    path = folder / FILES[kind]
    path.write_bytes(content)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            read(kind, path)
    except (ValueError, OSError) as error:
        return judged(kind, error)
    except SystemExit as stop:
        if stop.code == 2 and "error:" in said.getvalue():
            return "refused", said.getvalue().strip().splitlines()[-1]
        return "violation", f"exit {stop.code}: {said.getvalue()[-300:]}"
    except TooSlow:
        return "violation", f"more than {SECONDS} s: {traceback.format_exc(limit=-3)}"
    except BaseException as error:
        return "violation", f"{type(error).__name__}: {str(error)[:300]} {traceback.format_exc(limit=-4)[-1500:]}"
    return "read", ""


def judged(kind: str, error: Exception) -> tuple[str, str]:
    """Return whether an error has a message for users: raised by this package (for a recipe, also by TRL)."""
    message = " ".join(str(error).split())
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename.startswith(PACKAGE) or kind == "recipe"
    if not ours or not 10 < len(message) <= LONGEST:
        return "violation", f"{type(error).__name__} of {last.filename}:{last.lineno}: {message[:300]}"
    return "refused", message


def work(kind: str, seed: int, numbers: list[int], pipe: int) -> None:
    """Read some files, and write a line of JSON to the pipe before and after each."""
    faulthandler.disable()  # the table reports a process that ends
    torch.set_num_threads(1)  # the threads of OpenMP do not survive a fork
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, size + ADDRESSES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def ring(*_):
        raise TooSlow

    signal.signal(signal.SIGPROF, ring)
    for number in numbers:
        content = broken_file(kind, seed, number)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            os.write(pipe, json.dumps(["start", number]).encode() + b"\n")
            begun = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            outcome, reason = attempt(kind, content, Path(folder))
            signal.setitimer(signal.ITIMER_PROF, 0)
            seconds = time.process_time() - begun
            peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
            if Path(folder, MARKER).exists():
                outcome, reason = "violation", "code of the file was run"
            elif outcome != "violation" and peak > MEMORY / 2**20:
                outcome, reason = "violation", f"{peak:.0f} MB above the start"
            os.write(pipe, json.dumps(["end", number, outcome, reason, seconds, peak]).encode() + b"\n")
            os.chdir("/")
        if peak > MEMORY / 2**20:
            return  # the peak of a process does not fall: the next files need another


def in_a_fork(kind: str, seed: int, numbers: list[int]) -> tuple[list[list], str]:
    """Return the lines that a forked process wrote about its files, and how it ended if it did not end normally."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)
        code = 1
        try:
            work(kind, seed, numbers, into)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(into)
    text, ended = b"", ""
    while True:
        if not select.select([out], [], [], GRACE)[0]:
            os.kill(child, signal.SIGKILL)
            ended = f"no answer within {GRACE} s"
        part = os.read(out, 2**16)
        if not part:
            break
        text += part
    os.close(out)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status and not ended:
        ended = f"the process ended with {signal.Signals(-status).name if status < 0 else status}"
    return [json.loads(line) for line in text.splitlines()], ended


def fuzz(kind: str, count: int, seed: int, progress: bool = False) -> Tally:
    """Return the outcomes of the files 0 .. count - 1 of a kind."""
    good_files(kind)  # made once, before the forks
    if FILES[kind].endswith(".parquet"):
        large_files(kind)
    tokenizer()
    tally, waiting = Tally(), list(range(count))
    while waiting:
        lines, ended = in_a_fork(kind, seed, waiting[:BATCH])
        done = [line for line in lines if line[0] == "end"]
        if len(done) == 0 and not ended:
            ended = "the process read nothing"
        for _, number, outcome, reason, seconds, peak in done:
            tally.seconds, tally.megabytes = max(tally.seconds, seconds), max(tally.megabytes, peak)
            tally.read += outcome == "read"
            tally.refused += outcome == "refused"
            tally.violations += [(number, reason)] if outcome == "violation" else []
        tally.files += len(done)
        waiting = waiting[len(done) :]
        if ended:
            tally.violations.append((waiting[0], ended))
            tally.files += 1
            waiting = waiting[1:]
        if progress:
            print(f"\r{kind}: {tally.files} of {count}, {len(tally.violations)} kept  ", end="", file=sys.stderr)
    if progress:
        print(file=sys.stderr)
    return tally


def shares(count: int, kinds: list[str]) -> dict[str, int]:
    """Return the number of files of each kind, at least one."""
    total = sum(SHARES[kind] for kind in kinds)
    return {kind: max(1, count * SHARES[kind] // total) for kind in kinds}


def table(tallies: dict[str, Tally]) -> str:
    """Return a table of the outcomes, a line for each kind."""
    lines = [f"{'kind':<12}{'files':>7}{'read':>7}{'refused':>9}{'kept':>6}{'worst s':>9}{'peak MB':>9}"]
    for kind, found in tallies.items():
        counts = f"{found.files:>7}{found.read:>7}{found.refused:>9}{len(found.violations):>6}"
        lines.append(f"{kind:<12}{counts}{found.seconds:>9.2f}{found.megabytes:>9.0f}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(CHECKS))
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir()) / "trl_opd_fuzz")
    args = parser.parse_args()
    kinds = args.kinds.split(",")
    tallies = {kind: fuzz(kind, number, args.seed, True) for kind, number in shares(args.files, kinds).items()}
    print(table(tallies))
    for kind, found in tallies.items():
        for number, reason in found.violations:
            args.keep.mkdir(parents=True, exist_ok=True)
            path = args.keep / f"{args.seed}-{number}-{FILES[kind]}"
            path.write_bytes(broken_file(kind, args.seed, number))
            print(f"\n{path} (seed {args.seed}, file {number} of {kind}): {reason}")
    return int(any(found.violations for found in tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
