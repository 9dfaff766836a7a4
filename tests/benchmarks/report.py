"""Time, memory and file size of the report of many rollouts, each measured in a separate process.

python -m tests.benchmarks.report --rollouts 10000
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from trl_opd.artefacts.fingerprint import fingerprint
from trl_opd.artefacts.occurrences import write_occurrences
from trl_opd.artefacts.sampled_rollouts import join_parts, write_part
from trl_opd.report.build import write_report

from tests.benchmarks.measuring import in_a_process, machine
from tests.helpers.run_records import record

STEPS = 50


def make_samples(folder: Path, rollouts: int, tokens: int, vocabulary: int) -> None:
    """Write `rollout_samples.parquet` of a run with 50 logging steps, and the run's record."""
    rng = np.random.default_rng(0)
    of_step = max(1, rollouts // STEPS)
    content = record()
    content["measure"]["tokenizer"] = save_tokenizer(folder, vocabulary)
    (folder / "opd_run.json").write_text(json.dumps(content))
    count = of_step * tokens
    for step in range(1, STEPS + 1):
        names = ("kl", "kl_pre", "entropy", "weight", "student_p", "teacher_p")
        columns = {name: rng.random(count, dtype=np.float32) for name in names}
        columns["step"] = np.full(count, step)
        columns["rollout"] = np.repeat(np.arange(of_step), tokens)
        columns["prompt"] = columns["rollout"]
        columns["position"] = np.tile(np.arange(tokens), of_step)
        columns["token_id"] = draw(rng, count, vocabulary)
        for who in ("student", "teacher"):
            columns[f"{who}_top_ids"] = rng.integers(0, vocabulary, (count, 5))
            columns[f"{who}_top_p"] = rng.random((count, 5), dtype=np.float32)
        write_part(folder, step, columns, {"prompts": {f"{step}/{i}": [1, 2, 3] for i in range(of_step)}})
    join_parts(folder)


def make_collection(folder: Path, rollouts: int, tokens: int, vocabulary: int) -> None:
    """Write `occurrences.parquet` of a collection with this many rollouts."""
    rng = np.random.default_rng(0)
    count = rollouts * tokens
    columns = {"rollout": np.repeat(np.arange(rollouts), tokens), "position": np.tile(np.arange(tokens), rollouts)}
    columns |= {"prompt": columns["rollout"], "token_id": draw(rng, count, vocabulary)}
    columns |= {name: rng.random(count, dtype=np.float32) for name in ("kl", "kl_pre", "entropy")}
    metadata = {"num_rollouts": rollouts, "tokenizer": save_tokenizer(folder, vocabulary)}
    write_occurrences(folder / "occurrences.parquet", columns, metadata)


def save_tokenizer(folder: Path, vocabulary: int) -> dict:
    """Save a tokenizer with this many words, because texts are much of a page; return how files refer to it."""
    words = Tokenizer(models.WordLevel({f" word{id}": id for id in range(vocabulary)}, unk_token=" word0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    tokenizer.save_pretrained(folder)
    return {"name": None, "vocab_size": vocabulary, "fingerprint": fingerprint(tokenizer)}


def draw(rng: np.random.Generator, count: int, vocabulary: int) -> np.ndarray:
    """Return token ids whose frequencies follow Zipf's law."""
    return np.minimum(rng.zipf(1.2, count), vocabulary) - 1


def measure(folder: Path) -> dict[str, float]:
    """Return seconds, peak memory (MiB), size (MiB) and shown rollouts of the report, written by another process.

    On Linux the peak of a process includes that of its parent at the start, so the parent should be small.
    """
    command = [sys.executable, "-m", "tests.benchmarks.report", "--of", str(folder)]
    seconds, memory = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    page = folder / "report.html"
    shown = len(re.findall(r'class="rollout"', page.read_text(encoding="utf-8")))
    return {"seconds": float(seconds), "memory": float(memory), "size": page.stat().st_size / 2**20, "shown": shown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollouts", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.of is not None:
        start = time.perf_counter()
        write_report(options.of, options.of / "report.html")
        print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)
        return
    print(machine())
    print(f"{options.rollouts} rollouts of {options.tokens} tokens, {options.vocabulary} vocabulary entries")
    print("| folder | seconds | peak memory (MiB) | page (MiB) | rollouts shown |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (("a run's samples", make_samples), ("a collection", make_collection)):
            path = Path(folder) / make.__name__
            in_a_process(make, path, options.rollouts, options.tokens, options.vocabulary)
            found = measure(path)
            numbers = f"{found['seconds']:.1f} | {found['memory']:.0f} | {found['size']:.1f} | {found['shown']:.0f}"
            print(f"| {name} | {numbers} |")


if __name__ == "__main__":
    main()
