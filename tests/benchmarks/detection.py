"""Time and memory of our detection, compared with a baseline: a dict per token and a pandas group-by.

The baseline does what public scripts do.

    python -m tests.benchmarks.detection [--rows 168000 1000000 10000000] [--types 20000]

Each runs in a separate process. Time is measured after the imports, and memory is the peak beyond what they use. The
baseline computes only the aggregate score, so it is compared with `--score aggregate`; the context filter, which it
does not have, is listed next to it. The baseline needs pandas, which `datasets` requires.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trl_opd.artefacts.occurrences import write_occurrences

from tests.benchmarks.measuring import host_peak_bytes, machine

LENGTH = 500  # tokens of a rollout
BASELINE_ROWS = 1_000_000  # with more rows the baseline takes too long, and too much memory


def make_file(path: Path, rows: int, types: int, seed: int = 0) -> None:
    """Write occurrences: the types have Zipf's frequencies and different mean divergences; four rollouts per prompt."""
    rng = np.random.default_rng(seed)
    rollouts = rows // LENGTH
    count = rollouts * LENGTH
    shares = 1.0 / np.arange(1, types + 1)
    cumulative = np.cumsum(shares / shares.sum())
    ids = np.searchsorted(cumulative, rng.random(count)).clip(max=types - 1)
    noise = rng.exponential(1.0, count)
    means = rng.gamma(1.0, 0.2, types)
    kl_pre = noise * means[ids]
    rollout, position = np.divmod(np.arange(count), LENGTH)
    columns = {
        "rollout": rollout,
        "position": position,
        "token_id": ids,
        "kl": kl_pre * rng.random(count),
        "kl_pre": kl_pre,
        "prompt": rollout // 4,
    }
    write_occurrences(path, columns, {"temperature": 1.0})


def ours(path: str, score: str) -> list[int]:
    """Return the ids of the rocks that our detection finds."""
    from trl_opd.rocks.from_occurrences import detect_from_occurrences

    return [rock.id for rock in detect_from_occurrences(path, score=score).rock_set.rocks]


def by_dicts(path: str) -> list[int]:
    """Return the ids of the 100 types with the highest count x mean divergence in the prompts with even numbers."""
    import pandas as pd
    import pyarrow.parquet as pq

    tokens = []
    for batch in pq.ParquetFile(path).iter_batches():
        columns = {name: column.to_numpy() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        for row in range(batch.num_rows):
            tokens.append({name: column[row].item() for name, column in columns.items()})
    table = pd.DataFrame(tokens)
    selecting = table[table["prompt"] % 2 == 0]
    types = selecting.groupby("token_id")["kl"].agg(["count", "mean"])
    scores = types["count"] * types["mean"]
    return scores.sort_values(ascending=False, kind="stable").index[:100].tolist()


def measure(what: str, path: str) -> None:
    """Run one of the three in this process, and print seconds, bytes and the rocks."""

    def find(file: str) -> list[int]:
        return by_dicts(file) if what == "dicts" else ours(file, what)

    # A small file first, so that imports inside of functions are not measured.
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small.parquet"
        make_file(small, 5000, 100)
        find(str(small))
    rocks = []
    started = time.perf_counter()
    size = host_peak_bytes(lambda: rocks.extend(find(path)))
    seconds = time.perf_counter() - started
    print(seconds, size, *rocks)


def run(what: str, path: Path) -> tuple[float, float, list[str]]:
    """Run one of the three in a new process, and return seconds, MiB and the rocks."""
    command = [sys.executable, "-m", "tests.benchmarks.detection", "--measure", what, str(path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, size, *rocks = printed.split()
    return float(seconds), int(size) / 2**20, rocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[168_000, 1_000_000, 10_000_000])
    parser.add_argument("--types", type=int, default=20_000)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure)
        return
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        for rows in options.rows:
            path = Path(folder) / "occurrences.parquet"
            make_file(path, rows, options.types)
            found = {what: run(what, path) for what in ("context", "aggregate")}
            if rows <= BASELINE_ROWS:
                found["dicts"] = run("dicts", path)
            for what, (seconds, size, _) in found.items():
                print(f"{rows:>10} rows  {what:<10}{seconds:>8.2f} s {size:>8.0f} MiB")

            if "dicts" in found:
                our_seconds, our_size, our_rocks = found["aggregate"]
                their_seconds, their_size, their_rocks = found["dicts"]
                assert their_rocks == our_rocks, "the two rank different types"
                ratios = f"{their_seconds / our_seconds:.1f} x time, {their_size / our_size:.1f} x memory"
                print(f"{rows:>10} rows  dicts / aggregate: {ratios}")


if __name__ == "__main__":
    main()
