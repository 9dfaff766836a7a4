"""How the context filter depends on its parameters: share of planted rocks among the highest scores, as a plot.

    python -m tests.benchmarks.detection_sensitivity [OCCURRENCES.parquet] [--output PLOT.png]
    python -m tests.benchmarks.detection_sensitivity --features

The second line compares what a surrounding is taken as: its tokens at their offsets (ours), or its tokens in any order.
In the first each parameter is varied alone, the others at their defaults, on ten planted worlds
(tests/helpers/planted.py) and, where occurrences of the demo's models are given (docs/detection.md), on those.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import sparse
from tqdm import tqdm

from trl_opd.demo.arithmetic import PLANTED_ROCKS
from trl_opd.demo.arms import load
from trl_opd.rocks.corpus import Corpus, window_offsets
from trl_opd.rocks.cutoff import rank_ids
from trl_opd.rocks.from_occurrences import detect_from_occurrences
from trl_opd.rocks.recurrence import ContextSettings, threshold

from tests.helpers.planted import EACH, World, make_world, save_world

QUANTILES = ("q0", "q0.3", "q0.5", "q0.6", "q0.7", "q0.8", "q0.9", "q0.95")
VALUES = {
    "tau_pre": QUANTILES,
    "tau_post": QUANTILES,
    "window": (1, 2, 3, 4, 5, 8),
    "gamma": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "eta": (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5),
}
TITLES = {
    "tau_pre": "tau_pre (quantile)",
    "tau_post": "tau_post (quantile)",
    "window": "window (tokens on each side)",
    "gamma": "gamma (least similarity)",
    "eta": "eta (least share similar)",
}
LINES = {"planted": ("#0072B2", "o", "planted worlds, least of ten"), "demo": ("#D55E00", "s", "the demo's models")}


def share(path: str, planted: set[int], count: int, settings: ContextSettings) -> float:
    """Return the share of the planted rocks among as many types of the highest score."""
    try:
        found = detect_from_occurrences(path, top_k=count, settings=settings).rock_set.rocks
    except ValueError:  # nothing is left
        return 0.0
    return len({rock.id for rock in found} & planted) / count


def sweep(files: list[tuple[str, set[int], int]]) -> dict[str, list[float]]:
    """Return, for each parameter, the least share over files at each of its values."""
    found = {}
    for name, values in tqdm(VALUES.items(), leave=False):
        settings = [replace(ContextSettings(), **{name: value}) for value in values]
        found[name] = [min(share(*file, one) for file in files) for one in settings]
    return found


def shares_by_features(world: World, settings: ContextSettings, gammas: tuple[float, ...]) -> dict[str, list[float]]:
    """Return the share of planted rocks found at each gamma with tokens at their offsets, and with tokens alone."""
    count, length = world.tokens.shape
    rows = (np.repeat(np.arange(count), length), np.tile(np.arange(length), count), world.tokens.ravel())
    corpus = Corpus(*rows, world.kl.ravel(), world.kl_pre.ravel())
    high = (corpus.kl >= threshold(settings.tau_post, corpus.kl)) & (
        corpus.kl_pre >= threshold(settings.tau_pre, corpus.kl_pre)
    )
    vocab, weights = world.tokens.max() + 1, np.array([1 / abs(offset) for offset in window_offsets(settings.window)])
    total = np.bincount(corpus.token_id, corpus.kl, vocab)
    scores = {kind: np.zeros((len(gammas), vocab)) for kind in ("offsets", "tokens")}
    for id in np.unique(corpus.token_id[high]):
        places = np.flatnonzero(high & (corpus.token_id == id))
        if len(places) < 2:
            continue
        windows = corpus.windows(places, settings.window)
        inside = windows >= 0
        for kind, columns in (("offsets", windows + vocab * np.arange(len(weights))), ("tokens", windows)):
            entries = (np.broadcast_to(weights, windows.shape)[inside], (np.nonzero(inside)[0], columns[inside]))
            vectors = sparse.csr_matrix(entries, shape=(len(places), vocab * len(weights)))
            lengths = np.sqrt(np.asarray(vectors.multiply(vectors).sum(1)).ravel())
            products = (vectors @ vectors.T).toarray() / np.maximum(np.outer(lengths, lengths), 1e-12)
            np.fill_diagonal(products, -1.0)
            for place, gamma in enumerate(gammas):
                rho = (products >= gamma - 1e-6).sum(1) / (len(places) - 1)
                kept = (rho >= settings.eta).sum() / (corpus.token_id == id).sum()
                scores[kind][place, id] = total[id] * kept
    rocks = world.ids["rock"]
    return {
        kind: [float(np.isin(rank_ids(row)[:EACH], rocks).sum() / EACH) for row in found]
        for kind, found in scores.items()
    }


def compare_features(worlds: int) -> None:
    """Print the mean share of planted rocks for both kinds of surroundings, on four kinds of world."""
    gammas = (0.4, 0.5, 0.6, 0.7, 0.8)
    kinds = {"plain": {}, "ten surroundings": {"surroundings": 10}, "small vocabulary": {"vocab": 150}}
    kinds["shuffled surroundings"] = {"shuffled": True}
    print(f"{'world':<24}{'surrounding':<12}" + "".join(f"{f'gamma {gamma}':>11}" for gamma in gammas))
    for name, changes in kinds.items():
        made = [make_world(seed, **changes) for seed in range(worlds)]
        found = [shares_by_features(world, ContextSettings(), gammas) for world in made]
        for kind in ("offsets", "tokens"):
            means = np.mean([one[kind] for one in found], axis=0)
            print(f"{name:<24}{kind:<12}" + "".join(f"{mean:>11.2f}" for mean in means))


def draw(lines: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw a panel for each parameter, its default dashed."""
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    panels = figure.subplots(1, len(VALUES), sharey=True)
    for axes, (name, values) in zip(panels, VALUES.items(), strict=True):
        places = [float(str(value).removeprefix("q")) for value in values]
        for kind, found in lines.items():
            colour, marker, label = LINES[kind]
            axes.plot(places, found[name], color=colour, marker=marker, markersize=4, label=label)
        default = float(str(getattr(ContextSettings(), name)).removeprefix("q"))
        axes.axvline(default, color="grey", linestyle="--", linewidth=0.8)
        axes.set_xlabel(TITLES[name], fontsize="small")
        axes.set_ylim(0, 1.03)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("share of planted rocks found")
    figure.suptitle("What the context filter finds when one parameter moves (default dashed)", fontsize="medium")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", nargs="?", help="occurrences of the demo's models")
    parser.add_argument("--output", type=Path, default=Path("docs/images/detection_sensitivity.png"))
    parser.add_argument("--worlds", type=int, default=10)
    parser.add_argument("--features", action="store_true", help="compare the two kinds of surroundings")
    options = parser.parse_args()
    if options.features:
        compare_features(options.worlds)
        return
    lines = {}
    with tempfile.TemporaryDirectory() as folder:
        worlds = [make_world(seed) for seed in range(options.worlds)]
        paths = [save_world(world, Path(folder) / f"{place}.parquet") for place, world in enumerate(worlds)]
        files = [(path, set(world.ids["rock"].tolist()), EACH) for path, world in zip(paths, worlds, strict=True)]
        lines["planted"] = sweep(files)
    if options.demo:
        _, tokenizer = load("teacher")
        planted = set(tokenizer.convert_tokens_to_ids(list(PLANTED_ROCKS)))
        lines["demo"] = sweep([(options.demo, planted, len(planted))])
    for name, values in VALUES.items():
        for kind, found in lines.items():
            print(
                f"{name:<9}{kind:<8}"
                + "".join(f"{value!s:>7}={one:.2f}" for value, one in zip(values, found[name], strict=True))
            )
    draw(lines, options.output)
    print(f"The plot is in {options.output}")


if __name__ == "__main__":
    main()
