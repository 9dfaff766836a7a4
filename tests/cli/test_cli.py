"""`trl-opd`: help without torch, every option in the table, and bad usage."""

import dataclasses
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl import DistillationConfig

import trl_opd
from trl_opd import OPDConfig
from trl_opd.cli import COMMANDS, fit, main, probe
from trl_opd.cli.collect import CollectArguments
from trl_opd.cli.demo import DemoArguments
from trl_opd.cli.detect import DetectArguments
from trl_opd.cli.env import describe_environment
from trl_opd.cli.fit import FitArguments
from trl_opd.cli.gradients import GradientArguments
from trl_opd.cli.options import Option, options_of, options_of_config, show_default
from trl_opd.cli.probe import ProbeArguments
from trl_opd.cli.report import ReportArguments

from tests.helpers.command_line import flags


@pytest.mark.processes
def test_version_and_help_of_every_command_are_printed_without_torch():
    code = (
        "import sys; from trl_opd.cli import COMMANDS, main; main(['--version']); main(['--help']); "
        "[main([command, '--help']) for command in COMMANDS]; "
        "sys.exit(len({'torch', 'transformers', 'trl', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    version, overview, *pages = run.stdout.split("usage: ")
    assert version == f"trl-opd {trl_opd.__version__}\n"
    assert all(f"\n  {name} " in overview for name in COMMANDS)
    assert [page.split()[:2] for page in pages] == [["trl-opd", name] for name in COMMANDS]
    assert max(map(len, run.stdout.splitlines())) <= 120


def test_env_prints_versions_and_devices_and_nothing_private(capsys):
    assert main(["env"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert lines["trl_opd"] == trl_opd.__version__
    assert lines["torch"] == torch.__version__
    assert lines["Python"] == platform.python_version()
    assert {"trl", "transformers", "peft", "bitsandbytes", "platform", "CPU cores", "CUDA of torch"} <= lines.keys()
    assert any(name.startswith("GPU") for name in lines)
    private = [platform.node(), str(Path.home()), sys.executable]
    assert not [value for value in lines.values() for word in private if word in value]


def test_env_names_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr("trl_opd.cli.env.PACKAGES", ("trl", "no-such-package"))
    assert describe_environment()["no-such-package"] == "not installed"


def test_env_takes_no_arguments(capsys):
    assert main(["env", "--all"]) == 1
    assert "trl-opd env takes no arguments, got --all." in capsys.readouterr().err


OPTIONS = {
    "env": [],
    "collect": options_of(CollectArguments),
    "demo": options_of(DemoArguments),
    "detect": options_of(DetectArguments),
    "fit": options_of(FitArguments),
    "gradients": options_of(GradientArguments),
    "probe": options_of(ProbeArguments),
    "report": options_of(ReportArguments),
    "train": options_of_config(),
}


REQUIRED = {"fit": fit.REQUIRED, "probe": probe.REQUIRED}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_option_with_its_default_and_its_documentation(command, capsys):
    assert main([command, "--help"]) == 0
    page = capsys.readouterr().out
    words = " ".join(page.split())
    for option in OPTIONS[command]:
        default = "required" if option.name in REQUIRED.get(command, ()) else show_default(option)
        assert option.help.endswith(".")
        assert " ".join(option.help.split()) in words, option.name
        row = next(line for line in page.splitlines() if line.startswith(f"  --{option.name} "))
        assert f" {default} " in f"{row} "


def test_options_that_help_reads_are_the_fields_of_the_config():
    inherited = {field.name for field in dataclasses.fields(DistillationConfig)}
    new = [field for field in dataclasses.fields(OPDConfig) if field.name not in inherited]
    assert options_of_config() == [Option(field.name, field.default, field.metadata["help"]) for field in new]


def test_docstring_of_the_config_documents_every_field():
    words = " ".join(OPDConfig.__doc__.split())
    for option in options_of_config():
        assert re.search(rf"^    {option.name} \(`\w+`.*, \*optional\*", OPDConfig.__doc__, re.MULTILINE)
        assert f": {' '.join(option.help.split())} " in f"{words} "
    assert OPDConfig.__doc__.count("\n    > Parameters that ") == 4
    assert "rock_weight (`float`, *optional*, defaults to `0.0`):" in OPDConfig.__doc__
    assert 'micro_batching (`str`, *optional*, defaults to `"tight"`):' in OPDConfig.__doc__


def test_help_all_lists_the_options_of_trl_and_ours(capsys):
    assert main(["train", "--help_all"]) == 0
    printed = capsys.readouterr().out
    ours = [option.name for option in OPTIONS["train"]]
    assert all(f"--{name}" in printed for name in (*ours, "lora_r", "dataset_name", "max_completion_length"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "commands:"),
        ("distil", "there is no command 'distil'"),
        ("demo --step x", "invalid int value: 'x'"),
        ("demo --colour red", "unrecognized arguments: --colour red"),
        ("demo surplus", "unrecognized arguments: surplus"),
        ("detect --output r.json", "the following arguments are required: occurrences"),
        ("fit --gpu 24GB", "the following arguments are required: --model_name_or_path"),
        ("report", "the following arguments are required: folder"),
        ("train --config", "argument --config: expected one argument"),
        ("train --no_such_option 1", "unrecognized arguments: --no_such_option 1"),
    ],
)
def test_bad_usage_is_exit_code_two(line, message, world, tmp_path, capsys):
    argv = line.split()
    if "--no_such_option" in argv:
        argv += flags(world, tmp_path)
    try:
        code = main(argv)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    printed = capsys.readouterr().err
    assert "usage: trl-opd" in printed
    assert message in printed
    assert len(printed.splitlines()) < 20
