"""Broken files are read correctly or are one-line errors, and the fuzzing harness notices everything else."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import fuzz
from tests.helpers import hostile_files
from tests.helpers.hostile_files import CHECKS, MARKER, broken_file, good_files, large_files, read

# Of every kind; a report draws plots, so those are few.
FILES = {"rock_set": 130, "occurrences": 100, "prompts": 60, "token_stats": 90, "recipe": 90}
FILES |= {"run": 6, "knockout": 8, "gradients": 3, "samples": 3, "summary": 10}


@pytest.mark.parametrize("kind", CHECKS)
@pytest.mark.slow
def test_broken_files_are_read_correctly_or_are_one_line_errors(kind):
    tally = fuzz.fuzz(kind, FILES[kind], seed=0)
    assert tally.violations == []
    assert tally.files == FILES[kind] == tally.read + tally.refused
    assert tally.refused > 0
    assert tally.read > 0 or FILES[kind] < 20
    assert tally.seconds < fuzz.SECONDS
    assert tally.megabytes < 1024


def test_five_hundred_files_are_tried():
    assert sum(FILES.values()) == 500
    assert FILES.keys() == CHECKS.keys()


@pytest.mark.parametrize("kind", CHECKS)
def test_good_files_are_read(kind, tmp_path):
    for place, content in enumerate(good_files(kind)[: 1 if kind in ("gradients", "samples") else None]):
        folder = tmp_path / str(place)
        folder.mkdir()
        (folder / hostile_files.FILES[kind]).write_bytes(content)
        read(kind, folder / hostile_files.FILES[kind])


@pytest.mark.parametrize("kind", CHECKS)
def test_seed_and_number_determine_a_broken_file(kind):
    files = [broken_file(kind, 3, number) for number in range(12)]
    assert files == [broken_file(kind, 3, number) for number in range(12)]
    assert len(set(files)) > 8
    assert files[0] != broken_file(kind, 4, 0)


def test_files_that_expand_are_small_on_disk():
    assert all(len(file) < 2**20 for kind in ("occurrences", "prompts") for file in large_files(kind))


def never_ends(path):
    while True:
        pass


def takes_memory(path):
    np.ones(140 * 2**20)


def runs_code(path):
    Path(MARKER).touch()


def raises(error):
    def check(path):
        raise error

    return check


@pytest.mark.parametrize(
    ("check", "reason"),
    [
        (raises(KeyError("x")), "KeyError"),
        (raises(ValueError("a message of another library")), "a message of another library"),
        (raises(SystemExit(0)), "exit 0"),
        (raises(MemoryError()), "MemoryError"),
        (lambda path: os.abort(), "SIGABRT"),
        (lambda path: os._exit(3), "ended with 3"),
        (never_ends, "more than"),
        (takes_memory, "MB above the start"),
        (runs_code, "code of the file was run"),
    ],
)
@pytest.mark.slow
def test_harness_reports_every_other_outcome(monkeypatch, check, reason):
    monkeypatch.setitem(CHECKS, "rock_set", check)
    if check is never_ends:
        monkeypatch.setattr(fuzz, "SECONDS", 0.2)
    tally = fuzz.fuzz("rock_set", 2, seed=0)
    assert [number for number, _ in tally.violations] == [0, 1]
    assert all(reason in said for _, said in tally.violations)
    assert tally.read == tally.refused == 0
