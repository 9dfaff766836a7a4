"""`trl-opd`: help without torch, every option in the table, and bad usage."""

import dataclasses
import subprocess
import sys

import pytest
from trl import DistillationConfig

from trl_opd import OPDConfig
from trl_opd.cli import COMMANDS, main
from trl_opd.cli.options import OPD_OPTIONS

from tests.helpers.command_line import flags


def test_help_needs_no_torch_and_lists_every_command_and_option():
    code = (
        "import sys; from trl_opd.cli import main; main(['--help']); main(['train', '--help']); "
        "loaded = {'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules); sys.exit(len(loaded))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(f"\n  {command} " in run.stdout for command in COMMANDS)
    assert all(f"--{option} " in run.stdout for option in OPD_OPTIONS)


def test_the_table_of_options_is_that_of_the_dataclass():
    new = {f.name: f.default for f in dataclasses.fields(OPDConfig)}
    inherited = {f.name for f in dataclasses.fields(DistillationConfig)}
    shown = {name: "none" if value is None else str(value).lower() for name, value in new.items()}
    assert {name: default for name, (default, _) in OPD_OPTIONS.items()} == {
        name: shown[name] for name in new if name not in inherited
    }


def test_help_all_lists_the_options_of_trl_and_ours(capsys):
    assert main(["train", "--help_all"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{option}" in printed for option in (*OPD_OPTIONS, "lora_r", "dataset_name", "max_completion_length"))


@pytest.mark.parametrize("argv", [[], ["distil"], ["train", "--config"], ["train", "--no_such_option", "1"]])
def test_bad_usage_is_exit_code_two(argv, world, tmp_path, capsys):
    if "--no_such_option" in argv:
        argv = [*argv, *flags(world, tmp_path)]
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr().err
    assert "usage: trl-opd" in printed
    assert len(printed.splitlines()) < 20
