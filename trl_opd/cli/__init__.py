"""`trl-opd COMMAND`: starts a command, without importing torch for `--help`, and prints errors as one line."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version

# Seconds before a process other than the first prints its error. torch's launcher ends the others within 0.1 s.
PATIENCE = 5.0
# Progress bars of libraries appear after this many seconds, so loading small models shows none. tqdm reads the variable
# when it is imported. Our bars that redraw themselves set `delay=0`, because tqdm does not clean up a delayed one.
os.environ.setdefault("TQDM_DELAY", "1")
# Importing transformers imports bitsandbytes 0.50, which warns on CPUs with avx512_bf16 that a kernel for inference in
# 4 bits is missing. We never use that kernel, because its layout has no gradient: `models.quantised.keep_4bit_layout`
# turns the layout off. This can go together with that function.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

# Command, which is also its module here -> what it does, in the order of `trl-opd --help`.
COMMANDS = {
    "collect": "let a student write completions, and score every token",
    "demo": "distil tiny models on this machine, find their rock tokens, and freeze them",
    "detect": "find the tokens that did not converge, in rollouts that were collected",
    "env": "print the versions and devices of this machine, for a bug report",
    "fit": "predict whether a distillation fits on a GPU, from two model configurations",
    "gradients": "measure the gradient of each token type on collected rollouts",
    "probe": "ban tokens during decoding, and test whether rewards change",
    "report": "write an HTML report of a run, a demo or a collection",
    "train": "distil a teacher into a student on the student's own rollouts",
}

USAGE = """usage: trl-opd COMMAND [options]

On-policy distillation with TRL that shows which tokens the training signal goes to.

commands:
{commands}

`trl-opd COMMAND --help` lists the options of a command. `trl-opd --version` prints the version."""


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code: 0, 1 after a user's error, 2 on bad usage."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv else None
    if name == "--version":
        print(f"trl-opd {version('trl_opd')}")
        return 0
    if name not in COMMANDS:
        asks_for_help = name in ("-h", "--help")
        commands = "\n".join(f"  {command:<11}{text}" for command, text in COMMANDS.items())
        print(USAGE.format(commands=commands), file=sys.stdout if asks_for_help else sys.stderr)
        if asks_for_help:
            return 0
        if name is not None:
            print(f"\ntrl-opd: error: there is no command {name!r}", file=sys.stderr)
        return 2

    module = import_module(f".{name}", __name__)
    try:
        if any(flag in argv[1:] for flag in ("-h", "--help")):
            print(module.HELP, flush=True)
            return 0
        with _ended_by_sigterm(), warnings.catch_warnings():
            # transformers warns about its own future renames. Nobody at a command line can act on these.
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
            warnings.showwarning = _show_warning
            module.run(argv[1:])
    except KeyboardInterrupt as error:
        ended = isinstance(error, Terminated)
        if os.environ.get("RANK", "0") == "0":
            how = "terminated" if ended else "interrupted"
            print(f"\ntrl-opd {name}: {how}{getattr(module, 'INTERRUPTED', '')}.", file=sys.stderr)
        return 128 + (signal.SIGTERM if ended else signal.SIGINT)  # the exit code that shells use
    except BrokenPipeError:  # the reader closed the pipe: `trl-opd detect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # Hub errors are OSErrors
        return _fail(name, error)
    except ImportError as error:
        # TRL and transformers raise it without a name when an optional package of a flag is missing (vLLM, flash_attn).
        if error.name not in (None, "trl"):
            raise
        return _fail(name, error)
    return 0


class Terminated(KeyboardInterrupt):
    """SIGTERM was received: a scheduler, or the launcher of several processes, ends this one."""


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: temporary files are removed, and a message says how to resume.

    With several processes SIGTERM keeps its default action. The launcher sends it to those that wait in a collective
    for a failed one, and Python runs a signal handler only after the collective has timed out.
    """
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    if not alone or threading.current_thread() is not threading.main_thread():  # only the main thread sets handlers
        yield
        return

    owner = os.getpid()

    def end(*_):
        if os.getpid() == owner:
            raise Terminated
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a forked process ends as it would without this handler
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(name: str, error: Exception) -> int:
    rank = os.environ.get("RANK", "0")
    where = ""
    if rank != "0":
        # Most errors hit every process: the first one prints them, and the launcher ends the others in the meantime.
        time.sleep(PATIENCE)
        where = f" on process {rank}"
    sentence = " ".join(str(error).split()) or type(error).__name__
    print(f"trl-opd {name}: error{where}: {sentence}", file=sys.stderr)
    return 1


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if os.environ.get("RANK", "0") == "0":
        text = " ".join(str(message).split())
        print(f"warning: {text}", file=file or sys.stderr)
