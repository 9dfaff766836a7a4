"""`trl-opd COMMAND`: parsing that imports no torch, and errors that are one sentence."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

PATIENCE = 5.0  # seconds; torch's launcher needs a tenth of one to end the others

# Command -> its module here and what it does, in the order of `trl-opd --help`.
COMMANDS = {
    "collect": ("collect", "let a student write completions, and score every token of them"),
    "demo": ("demo", "distil tiny models on this machine, find their rock tokens, and freeze them"),
    "detect": ("detect", "find the tokens that did not converge, in rollouts that were collected"),
    "fit": ("fit", "predict whether a distillation fits on a card, from two configurations"),
    "gradients": ("gradients", "norm and direction of the gradient of each token type, on collected rollouts"),
    "probe": ("probe", "forbid tokens while decoding, and see whether it matters"),
    "report": ("report", "one HTML page of what a run, a demo or a collection wrote"),
    "train": ("train", "distil a teacher into a student, on the student's own rollouts"),
}

USAGE = """usage: trl-opd COMMAND [options]

On-policy distillation with TRL that sees rock tokens.

commands:
{commands}

`trl-opd COMMAND --help` lists the options of a command."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 after a user's error, 2 on bad usage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        commands = "\n".join(f"  {name:<11}{text}" for name, (_, text) in COMMANDS.items())
        wanted = bool(argv) and argv[0] in ("-h", "--help")
        print(USAGE.format(commands=commands), file=sys.stdout if wanted else sys.stderr)
        if argv and not wanted:
            print(f"\ntrl-opd: error: there is no command {argv[0]!r}", file=sys.stderr)
        return 0 if wanted else 2
    name, module = argv[0], import_module(f".{COMMANDS[argv[0]][0]}", __name__)
    try:
        if any(flag in argv[1:] for flag in ("-h", "--help")):
            print(module.HELP, flush=True)
            return 0
        with _ended_by_sigterm(), warnings.catch_warnings():
            # What transformers is about to rename is no news for somebody at a command line.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.showwarning = _show_warning
            module.run(argv[1:])
    except KeyboardInterrupt as error:
        ended = isinstance(error, Terminated)
        if os.environ.get("RANK", "0") == "0":
            how = "terminated" if ended else "interrupted"
            print(f"\ntrl-opd {name}: {how}{getattr(module, 'INTERRUPTED', '')}.", file=sys.stderr)
        return 128 + (signal.SIGTERM if ended else signal.SIGINT)  # as shells have it
    except BrokenPipeError:  # the reader has seen enough: `trl-opd detect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # Hub errors are OSErrors
        return _fail(name, error)
    except ImportError as error:
        # TRL and transformers raise it without a name for an optional package that a flag asks for (vLLM, flash_attn).
        if error.name not in (None, "trl"):
            raise
        return _fail(name, error)
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM came: a scheduler, or the launcher of several processes, ends this one."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: temporary files go, and a sentence says how to go on.

    Not one of several processes, where a launcher sends it to those that wait for one that has failed: Python would
    hear it only when they have waited enough.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone or threading.current_thread() is not threading.main_thread():  # only that one may
        yield
        return

    owner = os.getpid()

    def end(*_):
        if os.getpid() == owner:
            raise Terminated
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a process that was forked ends as it would without us
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(name: str, error: Exception) -> int:
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        # Most errors are those of every process: the first speaks for all, and the launcher ends the others meanwhile.
        time.sleep(PATIENCE)
    sentence = " ".join(str(error).split()) or type(error).__name__
    print(f"trl-opd {name}: error{'' if rank == '0' else f' on process {rank}'}: {sentence}", file=sys.stderr)
    return 1


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)
