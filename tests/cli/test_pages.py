"""The commands of docs/detection.md and docs/evidence.md run one after the other on a short demo."""

import json
import runpy
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from trl_opd import RockSet
from trl_opd.cli import main
from trl_opd.demo.arithmetic import PLANTED_ROCKS

from tests.benchmarks.pages import read_commands
from tests.helpers.paths import ROOT

# Flags that shorten a command. `tests.benchmarks.pages` runs the commands as they are, and checks what they find.
SHORT = {
    "demo": ["--steps", "2"],
    "examples/demo_models.py": ["--num_prompts", "32"],
    "probe": ["--num_prompts", "8"],
}


@pytest.mark.slow
def test_commands_of_the_pages_run_on_a_short_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    printed = {}
    for program, name, *flags in read_commands():
        name = name.removeprefix(f"{ROOT}/")
        flags += SHORT.get(name, [])
        if program == "trl-opd":
            assert main([name, *flags]) == 0, capsys.readouterr().err
        else:
            monkeypatch.setattr("sys.argv", [name, *flags])
            runpy.run_path(str(ROOT / name), run_name="__main__")
        printed[name] = capsys.readouterr().out
    assert list(printed) == ["demo", "examples/demo_models.py", "collect", "detect", "probe", "gradients"]

    summary = json.loads(Path("opd_demo/summary.json").read_text())
    assert list(summary["arms"]) == ["uniform"]
    assert summary["differences"] == {}
    found = RockSet.load("rock_set.json")
    assert len(found.rocks) == len(PLANTED_ROCKS)
    assert all(rock.text for rock in found.rocks)
    assert 0 < found.heldout["token_share"] < 1
    assert "rocks: the highest scores" in printed["detect"]
    result = json.loads(Path("knockout.json").read_text())
    single = {arm["ids"][0] for arm in result["arms"] if len(arm["ids"]) == 1}
    assert single > set(found.ids.tolist())
    assert result["decoded_tokens"] < result["naive_tokens"]
    assert f"Baseline {result['baseline']['reward']:.3f}" in printed["probe"]
    assert all(rock.role for rock in RockSet.load("knockout_roles.json").rocks)
    table = pq.read_table("gradients.parquet")
    assert {"norm", "norm_matched", "mean_kl_early"} <= set(table.column_names)
    assert {"rock", "random"} <= set(table["group"].to_pylist())
