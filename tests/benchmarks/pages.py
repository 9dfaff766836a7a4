"""Runs the commands of docs/detection.md and docs/evidence.md on a full demo, and checks what they find.

    python -m tests.benchmarks.pages [--folder DIR]

Takes about two and a half minutes on two CPU cores, and exits with an error if a check fails. Of the 14 rocks that
detection finds, 13 are planted (precision and recall 0.93). The probe labels every planted pillar "pillar" and every
planted rock "neutral". The median norm of the mean gradient, as published, is 0.05 for rocks and 0.39 for rare types;
from equally many positions it is 0.63 and 0.42.
"""

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow.parquet as pq

from trl_opd import RockSet
from trl_opd.demo.arithmetic import PLANTED_PILLARS, PLANTED_ROCKS

from tests.helpers.paths import ROOT

PAGES = ("detection.md", "evidence.md")


def read_commands() -> list[list[str]]:
    """Return the commands in the bash blocks of both pages as lists of words, in order."""
    text = ""
    for page in PAGES:
        text += (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    return [shlex.split(line) for line in blocks.replace("\\\n", " ").splitlines()]


def run_command(words: list[str], folder: Path) -> None:
    """Run a command of the pages in a folder; raises `subprocess.CalledProcessError` if it fails."""
    program, name, *flags = words
    command = [sys.executable, ROOT / name] if program == "python" else [sys.executable, "-m", "trl_opd", name]
    subprocess.run([*command, *flags], cwd=folder, check=True)


def check_rocks(folder: Path) -> None:
    """Assert that detection found the planted rocks, and print its precision and recall."""
    found = RockSet.load(folder / "rock_set.json")
    planted = {rock.text for rock in found.rocks} & set(PLANTED_ROCKS)
    precision = len(planted) / len(found.rocks)
    recall = len(planted) / len(PLANTED_ROCKS)
    token_share = found.heldout["token_share"]
    print(f"rocks: precision {precision:.2f}, recall {recall:.2f}, {token_share:.1%} of the held-out tokens")
    assert precision >= 0.9
    assert recall >= 0.9
    assert found.controls.matched
    assert 0.15 < token_share < 0.25


def check_labels(folder: Path) -> None:
    """Assert that the probe found the planted pillars and no effect of a planted rock, and print its savings."""
    result = json.loads((folder / "knockout.json").read_text())
    labels = {arm["texts"][0]: arm["label"] for arm in result["arms"] if len(arm["ids"]) == 1}
    planted = set(PLANTED_ROCKS) & labels.keys()
    print(f"probe: decoded {result['decoded_tokens']} tokens of {result['naive_tokens']}")
    assert {labels[token] for token in PLANTED_PILLARS} == {"pillar"}
    assert {labels[token] for token in planted} == {"neutral"}
    assert result["decoded_tokens"] <= result["naive_tokens"] / 5
    assert {rock.role for rock in RockSet.load(folder / "knockout_roles.json").rocks} == {"neutral"}


def check_norms(folder: Path) -> None:
    """Assert how the norms of rocks and rare types compare, as published and from equally many positions."""
    table = pq.read_table(folder / "gradients.parquet").to_pandas()
    medians = table.groupby("group")[["norm", "norm_matched"]].median()
    print(f"gradients: median norms\n{medians}")
    rock = medians.loc["rock"]
    rare = medians.loc["rare"]
    assert rock["norm"] < rare["norm"] / 2
    assert rock["norm_matched"] > rare["norm_matched"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keep the files in this folder; a temporary one when omitted")
    folder = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        folder = folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for words in read_commands():
            run_command(words, folder)
        check_rocks(folder)
        check_labels(folder)
        check_norms(folder)


if __name__ == "__main__":
    main()
