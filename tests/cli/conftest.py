"""Run a command in this process, and return what it printed or the error with which it ended."""

import pytest

from trl_opd.cli import main


@pytest.fixture
def output_of(capsys):
    """Return a function that runs a command, which has to succeed, and returns what it printed."""

    def run(*argv) -> str:
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out

    return run


@pytest.fixture
def error_of(capsys):
    """Return a function that runs a command, which has to print nothing but a one-line error, and returns the line."""

    def run(*argv) -> str:
        code = main([str(word) for word in argv])
        captured = capsys.readouterr()
        assert code == 1
        assert captured.out == ""
        (error,) = captured.err.splitlines()
        assert error.startswith(f"trl-opd {argv[0]}: error: ")
        return error

    return run
