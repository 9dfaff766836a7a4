"""Checks that a change of the code changes no result: runs the same commands before and after, and compares the bits.

    python -m tests.benchmarks.equality run before --checkout ../old
    python -m tests.benchmarks.equality run after
    python -m tests.benchmarks.equality compare before after

`run` starts each command in a separate process, with the package of the given checkout: a LoRA training with the recipe
of two minutes, one that freezes rocks, a collection, two detections, gradients, a probe, the demo with three arms, and
their reports. `compare` reads parameters, optimizer states, statistics, rock sets, occurrences, logs, tables and
reports. It ignores times and throughput, and also words: of pages and of printed text it compares the numbers only. It
exits with 1 if anything differs. Both folders must come from the same machine and environment.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
ON_CPU = "--use_cpu --bf16 false"
STUDENT = "--model_name_or_path runs/two_minutes"
TEACHER = "--teacher_model_name_or_path tiny/teacher"
PROMPTS = "--dataset_name tiny/prompts.jsonl"

# Name and command, in the order in which they run; `trl-opd` is replaced by the module of the checkout.
COMMANDS = {
    "models": "python {root}/examples/tiny_models.py --output_dir tiny --teacher_steps 60 --student_steps 40",
    "train": "trl-opd train --config {root}/examples/recipes/two_minutes.yaml --save_occurrences 5",
    "collect": f"trl-opd collect {STUDENT} --reference_model_name_or_path adapter_off {TEACHER} {PROMPTS} "
    f"--num_prompts 60 --num_generations 2 --max_completion_length 48 {ON_CPU} --output_dir rollouts",
    "detect": "trl-opd detect rollouts/occurrences.parquet --top_k 10 --output rollouts/rock_set.json",
    "detect_aggregate": "trl-opd detect rollouts/occurrences.parquet --top_k 10 --score aggregate "
    "--output rollouts/aggregate.json",
    "gradients": "trl-opd gradients rollouts/occurrences.parquet --rock_set rollouts/aggregate.json "
    f"{STUDENT} {TEACHER} {ON_CPU} --output rollouts/gradients.parquet",
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
CHECKOUT = "checkout.txt"  # holds the path of the checkout that ran, because some results contain it
# Keys whose values differ from run to run: times and throughput, and the command with its paths.
TIMES = re.compile(r"(_s|seconds|runtime|per_second|step_time|started|written|command)$")
TIMES_OF_A_LOG = re.compile(r"'[^']*(_s|runtime|per_second|step_time)': [^,}]*")
# A line of a page or table that contains a time, and the plot of the seconds of a step.
TIME_IN_TEXT = re.compile(r"\d *(s|seconds|min|minutes)\b|seconds|20\d\d-\d\d-\d\d")
PLOT_OF_TIMES = re.compile(r'<div class="plot" role="img" aria-label="Mean seconds.*?</div>', re.DOTALL)
NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
PATTERNS = ("*.safetensors", "*.pt", "*.pth", "*.parquet", "*.json", "*.html", "*.png", "*.out")
# Cards and pickled arguments contain paths of the output, and a manifest has the sizes of files that contain paths.
IGNORED = {"README.md", "training_args.bin", "opd_complete.json"}


def run(folder: Path, checkout: Path) -> None:
    """Run every command in a new folder with the package of a checkout, and save what each of them prints."""
    folder.mkdir(parents=True)
    (folder / CHECKOUT).write_text(str(checkout))
    environment = {
        **os.environ,
        "PYTHONPATH": str(checkout),
        "PYTHONHASHSEED": "0",  # otherwise PEFT writes the names of its modules in a different order each time
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
            done = subprocess.run(words, cwd=folder, env=environment, stdout=output, stderr=errors, check=False)
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}: see {folder / name}.err")


def compare(before: Path, after: Path) -> list[str]:
    """Return how the files of two folders differ, in words; empty if they are the same."""
    names_before = result_files(before)
    names_after = result_files(after)
    found = [f"{name} is in one folder only" for name in sorted(names_before ^ names_after)]
    for name in sorted(names_before & names_after):
        content_before = read_content(before / name, before)
        content_after = read_content(after / name, after)
        found += [f"{name}: {reason}" for reason in differences(content_before, content_after)]
    print(f"{len(names_before & names_after)} files compared.")
    return found


def result_files(folder: Path) -> set[str]:
    """Return the names of the files in a folder and below that are compared."""
    paths = [path.relative_to(folder) for pattern in PATTERNS for path in folder.rglob(pattern)]
    return {str(path) for path in paths if path.name not in IGNORED and path.parts[0] != "cache"}


def read_content(path: Path, folder: Path) -> Any:
    """Return the content of a file as plain values in which NaN equals NaN; tensors are given by their bytes."""
    if path.suffix == ".safetensors":
        return {name: _plain(tensor) for name, tensor in load_file(path).items()}
    if path.suffix in (".pt", ".pth"):
        return _plain(torch.load(path, weights_only=False))
    if path.suffix == ".png":
        return path.read_bytes()
    checkout = (folder / CHECKOUT).read_text()
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        metadata = (table.schema.metadata or {}).get(b"trl_opd", b"{}").decode().replace(checkout, "CHECKOUT")
        columns = {name: [str(table[name].type), str(table[name].to_pylist())] for name in table.schema.names}
        return {"columns": columns, "metadata": json.loads(metadata)}
    text = path.read_text().replace(checkout, "CHECKOUT")
    if path.suffix == ".json":
        return json.loads(text)
    return numbers_of_page(text) if path.suffix == ".html" else numbers_of_text(text)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        # We compare the bytes, because NaN is unequal to itself, and 0.0 equals -0.0.
        return [str(value.dtype), list(value.shape), value.contiguous().flatten().view(torch.uint8).numpy().tobytes()]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return str(value.tolist()) if hasattr(value, "tolist") else repr(value)


def differences(before: Any, after: Any, place: str = "") -> list[str]:
    """Return where two contents differ, in words; times are left out."""
    if isinstance(before, dict) and isinstance(after, dict):
        found = []
        for key in sorted(map(str, before.keys() | after.keys())):
            if not TIMES.search(key):
                found += differences(before.get(key, "absent"), after.get(key, "absent"), f"{place}/{key}")
        return found
    if isinstance(before, list) and isinstance(after, list):
        if len(before) != len(after):
            return [f"{place} has {len(before)} and {len(after)} entries"]
        found = []
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            found += differences(one, other, f"{place}[{number}]")
        return found
    return [] if repr(before) == repr(after) else [f"{place} is {before!r:.80} and {after!r:.80}"]


class _Words(HTMLParser):
    """Collects the text of a page, of its plots, and of the data for its script."""

    def __init__(self):
        super().__init__()
        self.texts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def numbers_of_page(text: str) -> list[str]:
    """Return the lines of numbers of a page, without times."""
    reader = _Words()
    reader.feed(PLOT_OF_TIMES.sub("", text))
    return numbers_of_text("\n".join(reader.texts))


def numbers_of_text(text: str) -> list[str]:
    """Return the numbers of each line, joined by spaces, without times and without a last column of seconds."""
    found = []
    ends_in_seconds = False
    for line in text.splitlines():
        ends_in_seconds = line.endswith("seconds") or (ends_in_seconds and bool(line.strip()))
        numbers = NUMBER.findall(TIMES_OF_A_LOG.sub("", line))
        if ends_in_seconds:
            numbers = numbers[:-1]
        elif TIME_IN_TEXT.search(line):
            continue
        if numbers:
            found.append(" ".join(numbers))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run the commands in a new folder")
    running.add_argument("folder", type=Path)
    running.add_argument("--checkout", type=Path, default=ROOT, help="checkout whose package runs (default: this one)")
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
