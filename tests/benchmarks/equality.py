"""Checks that a change of the code changes no result: the same commands before and after, compared to the bit.

    python -m tests.benchmarks.equality run before --checkout ../old
    python -m tests.benchmarks.equality run after
    python -m tests.benchmarks.equality compare before after

`run` starts every command in a process of its own, with the package of the checkout that is named: a LoRA training with
the recipe of two minutes, one that freezes rocks, a collection, two detections, gradients, a probe, the demo with three
arms, and their reports. `compare` reads parameters, optimizer states, statistics, rock sets, occurrences, logs, tables
and reports. Times and throughput are left out, and so are words: of a page and of what was printed only numbers count.
Exits with 1 where anything differs. Both folders have to come from one machine and one environment.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ON_CPU = "--use_cpu --bf16 false"
STUDENT = "--model_name_or_path runs/two_minutes"
TEACHER = "--teacher_model_name_or_path tiny/teacher"
PROMPTS = "--dataset_name tiny/prompts.jsonl"

# Name -> what is run, in this order; `trl-opd` is replaced by the module of the checkout.
COMMANDS = {
    "models": "python {root}/examples/tiny_models.py --output_dir tiny --teacher_steps 60 --student_steps 40",
    "train": "trl-opd train --config {root}/examples/recipes/two_minutes.yaml --save_occurrences 5",
    "collect": f"trl-opd collect {STUDENT} --reference_model_name_or_path adapter_off {TEACHER} {PROMPTS} "
    f"--num_prompts 60 --num_generations 2 --max_completion_length 48 {ON_CPU} --output_dir rollouts",
    "detect": "trl-opd detect rollouts/occurrences.parquet --top_k 10 --output rollouts/rock_set.json",
    "detect_aggregate": "trl-opd detect rollouts/occurrences.parquet --top_k 10 --score aggregate "
    "--output rollouts/aggregate.json",
    "gradients": f"trl-opd gradients rollouts/occurrences.parquet --rock_set rollouts/aggregate.json {STUDENT} "
    f"{TEACHER} {ON_CPU} --output rollouts/gradients.parquet",
    "train_rock": f"trl-opd train --config {{root}}/examples/recipes/two_minutes.yaml --max_steps 4 {TEACHER} "
    "--token_weighting rock --rock_set rollouts/aggregate.json --rock_window 1 --weight_normalization weights "
    "--output_dir runs/rock",
    "report": "trl-opd report rollouts",
    "report_run": "trl-opd report runs/two_minutes --output runs/two_minutes.html",
    "fit": f"trl-opd fit --model_name_or_path tiny/student {TEACHER} --gpu 8GB --use_peft",
    "demo": "trl-opd demo --output_dir demo",
    "demo_models": "python {root}/examples/demo_models.py --output_dir demo_models",
    "probe": "trl-opd probe --model_name_or_path demo_models/student --rock_set demo/rock_set.json "
    "--dataset_name demo_models/problems.jsonl --reward trl_opd.demo.arithmetic.solved --num_prompts 60 "
    "--max_completion_length 56 --temperature 0.9 --use_cpu --output demo/knockout.json",
    "report_demo": "trl-opd report demo",
}
# Not a function of the code: times, throughput, sizes of processes, paths.
TIMES = re.compile(r"(_s|seconds|runtime|per_second|step_time|date|created|version|output|path|folder|peak)$")
IGNORED = {"README.md", "training_args.bin", "opd_complete.json", "stdout.txt"}
PATTERNS = ("*.safetensors", "*.pt", "*.pth", "*.parquet", "*.json", "*.html", "*.png", "*.out")


def run(folder: Path, checkout: Path) -> None:
    """Run every command in a folder with the package of a checkout, and keep what each of them prints."""
    folder.mkdir(parents=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_CACHE": str(folder.resolve() / "cache"),
    }
    for name, command in COMMANDS.items():
        words = command.format(root=checkout).split()
        if words[0] == "trl-opd":
            words[:1] = ["python", "-m", "trl_opd"]
        words[0] = sys.executable
        print(f"{name} ...", flush=True)
        with (folder / f"{name}.out").open("w") as output, (folder / f"{name}.err").open("w") as errors:
            code = subprocess.run(words, cwd=folder, env=environment, stdout=output, stderr=errors).returncode
        if code:
            raise SystemExit(f"{name} ended with {code}: see {folder / name}.err")


def compare(before: Path, after: Path) -> list[str]:
    """Return the files that two folders do not have in common, or that hold other values."""
    names = [
        {
            str(path.relative_to(folder))
            for pattern in PATTERNS
            for path in folder.rglob(pattern)
            if path.name not in IGNORED and path.relative_to(folder).parts[0] != "cache"
        }
        for folder in (before, after)
    ]
    found = [f"{name} is in one folder only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        found += [f"{name}: {reason}" for reason in differences(before / name, after / name)]
    print(f"{len(names[0] & names[1])} files compared.")
    return found


def differences(before: Path, after: Path) -> list[str]:
    """Return how two files of one name differ, in words."""
    kind = before.suffix
    if kind == ".safetensors":
        return _different_tensors(load_file(before), load_file(after))
    if kind in (".pt", ".pth"):
        return (
            []
            if _plain(torch.load(before, weights_only=False)) == _plain(torch.load(after, weights_only=False))
            else ["state"]
        )
    if kind == ".parquet":
        return _different_tables(before, after)
    if kind == ".json":
        return _different_values(json.loads(before.read_text()), json.loads(after.read_text()), "")
    if kind == ".html":
        return _different_lists(numbers_of_page(before.read_text()), numbers_of_page(after.read_text()))
    if kind == ".out":
        return _different_lists(numbers_of_text(before.read_text()), numbers_of_text(after.read_text()))
    return [] if before.read_bytes() == after.read_bytes() else ["bytes"]


def _different_tensors(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    if before.keys() != after.keys():
        return ["other tensors"]
    return [name for name, tensor in before.items() if not _same_bits(tensor, after[name])]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return one.contiguous().numpy().tobytes() == other.contiguous().numpy().tobytes()


def _different_tables(before: Path, after: Path) -> list[str]:
    one, other = pq.read_table(before), pq.read_table(after)
    if one.schema.names != other.schema.names:
        return ["other columns"]
    found = [name for name in one.schema.names if not _same_column(one[name], other[name])]
    metadata = [json.loads((table.schema.metadata or {}).get(b"trl_opd", b"{}")) for table in (one, other)]
    return found + _different_values(*metadata, "metadata")


def _same_column(one, other) -> bool:
    # By the memory of the values, since NaN is unequal to itself.
    return one.type == other.type and str(one.to_pylist()) == str(other.to_pylist())


def _different_values(before, after, place: str) -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted(key for key in before.keys() | after.keys() if not TIMES.search(key))
        return [
            found
            for key in keys
            for found in _different_values(before.get(key, "absent"), after.get(key, "absent"), f"{place}/{key}")
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        return [
            found
            for number, (one, other) in enumerate(zip(before, after, strict=True))
            for found in _different_values(one, other, f"{place}[{number}]")
        ]
    return [] if repr(before) == repr(after) else [f"{place} is {before!r:.60} and {after!r:.60}"]


def _plain(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), str(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value.tolist()) if hasattr(value, "tolist") else repr(value)


class _Words(HTMLParser):
    """Collects the text of a page and of its plots, and what its script reads."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def numbers_of_page(text: str) -> list[str]:
    """Return the lines of a page that hold numbers, in order."""
    reader = _Words()
    reader.feed(text)
    return numbers_of_text("\n".join(reader.texts))


def numbers_of_text(text: str) -> list[str]:
    """Return the numbers of every line, joined by blanks, but for lines that hold a time."""
    found = []
    for line in text.splitlines():
        if re.search(r"\d *(s|seconds|min|it/s)\b|_s\b|runtime|per_second|step_time|seconds|20\d\d-\d\d", line):
            continue
        if numbers := re.findall(r"[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?", line):
            found.append(" ".join(numbers))
    return found


def _different_lists(before: list[str], after: list[str]) -> list[str]:
    if len(before) != len(after):
        return [f"{len(before)} and {len(after)} lines with numbers"]
    return [f"{one} and {other}" for one, other in zip(before, after, strict=True) if one != other][:5]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run the commands in a new folder")
    running.add_argument("folder", type=Path)
    running.add_argument("--checkout", type=Path, default=ROOT, help="whose package runs (default: this one)")
    comparing = commands.add_parser("compare", help="compare two folders")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    args = parser.parse_args()
    if args.command == "run":
        run(args.folder, args.checkout.resolve())
        return 0
    found = compare(args.before, args.after)
    print("\n".join(found) or "Equal.")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
