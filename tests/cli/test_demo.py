"""`trl-opd demo`: its options, from flags and from a file, and a sentence for every wrong one."""

import dataclasses
import json
import re

import pytest

from trl_opd.cli import main
from trl_opd.cli.demo import HELP, DemoArguments


def test_the_help_lists_every_option_with_its_default():
    for option in dataclasses.fields(DemoArguments):
        assert re.search(rf"^  --{option.name} \w+ +{re.escape(str(option.default))} ", HELP, re.MULTILINE), option.name


@pytest.mark.slow
def test_settings_may_come_from_a_file(tmp_path):
    (tmp_path / "demo.yaml").write_text(f"output_dir: {tmp_path / 'out'}\nsteps: 1\narms: [uniform]\n")
    assert main(["demo", "--config", str(tmp_path / "demo.yaml")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert tuple(summary["arms"]) == ("uniform",)
    assert summary["differences"] == {}


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--arms", "uniform,rocks"], "There is no arm 'rocks': --arms takes uniform, rock, control, random"),
        (["--steps", "0"], "--steps counts optimizer steps, at least 1, got 0"),
        (["--seed", "-1"], "--seed must lie in 0.."),
        (["--output_dir", __file__], "is a file: name a folder"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_wrong_flag_is_one_sentence(capsys, flags, sentence):
    assert main(["demo", *flags]) == 1
    error = capsys.readouterr().err.strip()
    assert sentence in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("steps: 1.5", "demo.yaml: steps is 1.5, and must be int"),
        ("steps: null", "demo.yaml: steps is None, and must be int"),
    ],
)
def test_a_wrong_value_in_a_file_is_one_sentence(tmp_path, capsys, line, sentence):
    (tmp_path / "demo.yaml").write_text(f"{line}\n")
    assert main(["demo", "--config", str(tmp_path / "demo.yaml")]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--step", "x"], ["--colour", "red"], ["surplus"]])
def test_bad_usage_is_two(capsys, flags):
    with pytest.raises(SystemExit) as error:
        main(["demo", *flags])
    assert error.value.code == 2
