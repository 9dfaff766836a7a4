"""A first run prints nothing that its user cannot act on."""

import subprocess
import sys

import pytest

from tests.helpers.command_line import flags


@pytest.mark.processes
@pytest.mark.slow
def test_short_trainings_with_warnings_on_print_only_results(world, tmp_path):
    plain = ["train", *flags(world, tmp_path / "plain", max_steps=1)]
    quantized = ["train", *flags(world, tmp_path / "4bit", max_steps=1, teacher_quantization="4bit")]
    code = f"from trl_opd.cli import main; import sys; sys.exit(main({plain}) or main({quantized}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stderr == ""
    assert run.stdout.count("Trained 1 steps") == 2
