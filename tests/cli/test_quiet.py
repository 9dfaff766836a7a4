"""A first run prints nothing that its user cannot act on."""

import subprocess
import sys

import pytest

from tests.helpers.command_line import flags


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"teacher_quantization": "4bit"}], ids=["plain", "4-bit teacher"])
def test_short_training_with_warnings_on_prints_only_results(world, tmp_path, more):
    command = [sys.executable, "-m", "trl_opd", "train", *flags(world, tmp_path / "out", max_steps=1, **more)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stderr == ""
    assert "Trained 1 steps" in run.stdout
