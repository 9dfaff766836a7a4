"""`trl-opd demo`: its options, from flags and from a file, and a one-line error for each wrong one."""

import pytest

from trl_opd.demo import run as demo_run

from tests.helpers.report_folders import SUMMARY

# What a demo returns: its summary, and notes.
FINISHED = (SUMMARY | {"seconds": 1.0, "rocks": {"tokens": []}}, [])


def test_settings_may_come_from_a_file(tmp_path, monkeypatch, output_of):
    ran = []
    monkeypatch.setattr(demo_run, "run_demo", lambda folder, **settings: ran.append((folder, settings)) or FINISHED)
    (tmp_path / "demo.yaml").write_text(f"output_dir: {tmp_path / 'out'}\nsteps: 1\narms: [uniform]\n")
    printed = output_of("demo", "--config", tmp_path / "demo.yaml")
    assert ran == [(tmp_path / "out", {"seed": 0, "steps": 1, "arms": ["uniform"]})]
    assert f"Open {tmp_path / 'out' / 'report.html'} in a browser" in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--arms", "uniform,rocks"], "There is no arm 'rocks': --arms takes uniform, rock, control, random"),
        (["--steps", "0"], "--steps counts optimizer steps, at least 1, got 0"),
        (["--seed", "-1"], "--seed must lie in 0.."),
        (["--output_dir", __file__], "is a file: name a folder"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_wrong_flag_is_a_one_line_error(error_of, flags, message):
    assert message in error_of("demo", *flags)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("steps: 1.5", "demo.yaml: steps is 1.5, and must be int"),
        ("steps: null", "demo.yaml: steps is None, and must be int"),
    ],
)
def test_wrong_value_in_a_file_is_a_one_line_error(tmp_path, error_of, line, message):
    (tmp_path / "demo.yaml").write_text(f"{line}\n")
    assert message in error_of("demo", "--config", tmp_path / "demo.yaml")
