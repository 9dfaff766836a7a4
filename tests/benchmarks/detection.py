"""Time and memory of our detection, and of one dict per token with a pandas group-by, as in public scripts.

    python -m tests.benchmarks.detection [--rows 168000 1000000 10000000] [--types 20000]

Each runs in a separate process. Time starts after the imports, and memory is the peak of the process above them. The
baseline computes only the aggregate score, so it is compared with `--score aggregate`; the context filter, which it
does not have, is listed next to it. Needs pandas for the baseline (`datasets` brings it).
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from trl_opd.artefacts.occurrences import write_occurrences

from tests.benchmarks.workload import host_peak_bytes, machine

LENGTH = 500  # tokens of a rollout
BASELINE_ROWS = 1_000_000  # above this its memory is not worth waiting for


def make_file(path: Path, rows: int, types: int, seed: int = 0) -> None:
    """Write occurrences of Zipf's frequencies, every type with a mean divergence of its own, four rollouts a prompt."""
    rng = np.random.default_rng(seed)
    rollouts = rows // LENGTH
    shares = 1.0 / np.arange(1, types + 1)
    ids = np.searchsorted(np.cumsum(shares / shares.sum()), rng.random(rollouts * LENGTH)).clip(max=types - 1)
    before = rng.exponential(1.0, len(ids)) * rng.gamma(1.0, 0.2, types)[ids]
    rollout = np.repeat(np.arange(rollouts), LENGTH)
    columns = {"rollout": rollout, "position": np.tile(np.arange(LENGTH), rollouts), "token_id": ids}
    columns |= {"kl": before * rng.random(len(ids)), "kl_pre": before, "prompt": rollout // 4}
    write_occurrences(path, columns, {"temperature": 1.0})


def ours(path: str, score: str) -> list[int]:
    """Return the ids of the rocks."""
    from trl_opd.rocks.from_occurrences import detect_from_occurrences

    return [rock.id for rock in detect_from_occurrences(path, score=score).rock_set.rocks]


def by_dicts(path: str) -> list[int]:
    """Return the ids of the 100 highest types of the even prompts by count x mean divergence."""
    import pandas as pd
    import pyarrow.parquet as pq

    tokens = []
    for batch in pq.ParquetFile(path).iter_batches():
        columns = {name: column.to_numpy() for name, column in zip(batch.schema.names, batch.columns, strict=True)}
        tokens += [{name: column[row].item() for name, column in columns.items()} for row in range(batch.num_rows)]
    table = pd.DataFrame(tokens)
    types = table[table["prompt"] % 2 == 0].groupby("token_id")["kl"].agg(["count", "mean"])
    return (types["count"] * types["mean"]).sort_values(ascending=False, kind="stable").index[:100].tolist()


def measure(what: str, path: str) -> None:
    """Do one of the three in this process and print seconds, bytes and the rocks."""

    def find(file: str) -> list[int]:
        return by_dicts(file) if what == "dicts" else ours(file, what)

    with tempfile.TemporaryDirectory() as folder:  # a small file first: what is imported on the way is not measured
        make_file(Path(folder) / "small.parquet", 5000, 100)
        find(f"{folder}/small.parquet")
    started, rocks = time.perf_counter(), []
    size = host_peak_bytes(lambda: rocks.extend(find(path)))
    print(time.perf_counter() - started, size, *rocks)


def run(what: str, path: Path) -> tuple[float, float, list[str]]:
    """Return seconds, MiB and rocks of one of the three, in a process of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.detection", "--measure", what, str(path)]
    seconds, size, *rocks = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
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
                assert found["dicts"][2] == found["aggregate"][2], "the two rank other types"
            for what, (seconds, size, _) in found.items():
                print(f"{rows:>10} rows  {what:<10}{seconds:>8.2f} s {size:>8.0f} MiB")
            if "dicts" in found:
                ratios = [found["dicts"][place] / found["aggregate"][place] for place in (0, 1)]
                print(f"{rows:>10} rows  dicts / aggregate: {ratios[0]:.1f} x time, {ratios[1]:.1f} x memory")


if __name__ == "__main__":
    main()
