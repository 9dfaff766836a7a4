"""Plots how the context filter depends on its parameters: the share of planted rocks among the highest scores.

    python -m tests.benchmarks.detection_sensitivity [OCCURRENCES.parquet] [--output PLOT.png]
    python -m tests.benchmarks.detection_sensitivity --features

The first command varies one parameter at a time, with the others at their defaults, on ten planted worlds
(tests/helpers/planted.py) and on occurrences of the demo's models, if they are given (docs/detection.md). The second
compares two definitions of a surrounding: its tokens at their offsets (ours), or its tokens in any order.
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
    """Return the share of planted rocks among the `count` types of the highest scores."""
    try:
        found = detect_from_occurrences(path, top_k=count, settings=settings).rock_set.rocks
    except ValueError:  # no type is left
        return 0.0
    return sum(rock.id in planted for rock in found) / count


def sweep(files: list[tuple[str, set[int], int]]) -> dict[str, list[float]]:
    """Return, for each parameter, the smallest share over the files at each of its values.

    A file is its path, the ids of its planted rocks, and how many there are.
    """
    found = {}
    for name, values in tqdm(VALUES.items(), leave=False):
        found[name] = []
        for value in values:
            settings = replace(ContextSettings(), **{name: value})
            shares = [share(path, planted, count, settings) for path, planted, count in files]
            found[name].append(min(shares))
    return found


def shares_by_features(world: World, settings: ContextSettings, gammas: tuple[float, ...]) -> dict[str, list[float]]:
    """Return the share of planted rocks found at each gamma, with tokens at their offsets and with tokens alone."""
    count, length = world.tokens.shape
    rollout, position = np.divmod(np.arange(count * length), length)
    corpus = Corpus(rollout, position, world.tokens.ravel(), world.kl.ravel(), world.kl_pre.ravel())
    high = corpus.kl >= threshold(settings.tau_post, corpus.kl)
    high &= corpus.kl_pre >= threshold(settings.tau_pre, corpus.kl_pre)
    vocab = world.tokens.max() + 1
    total = np.bincount(corpus.token_id, corpus.kl, vocab)
    counts = np.bincount(corpus.token_id, minlength=vocab)
    offsets = np.array(window_offsets(settings.window))
    first_columns = vocab * np.arange(len(offsets))  # with offsets, every offset has its own columns

    scores = {kind: np.zeros((len(gammas), vocab)) for kind in ("offsets", "tokens")}
    for id in np.unique(corpus.token_id[high]):
        places = np.flatnonzero(high & (corpus.token_id == id))
        if len(places) < 2:
            continue
        windows = corpus.windows(places, settings.window)
        for kind, columns in (("offsets", windows + first_columns), ("tokens", windows)):
            products = similarities(columns, windows >= 0, 1 / np.abs(offsets), vocab * len(offsets))
            for place, gamma in enumerate(gammas):
                rho = (products >= gamma - 1e-6).sum(1) / (len(places) - 1)
                kept = (rho >= settings.eta).sum() / counts[id]
                scores[kind][place, id] = total[id] * kept

    shares = {}
    for kind, found in scores.items():
        highest = [rank_ids(row)[:EACH] for row in found]
        shares[kind] = np.isin(highest, world.ids["rock"]).mean(1).tolist()
    return shares


def similarities(columns: np.ndarray, inside: np.ndarray, weights: np.ndarray, width: int) -> np.ndarray:
    """Return the cosine similarities between the surroundings of a type, `(n, n)`, with -1 on the diagonal.

    Args:
        columns (`np.ndarray`): Entry of the feature vector for each token of a surrounding, `(n, tokens)`.
        inside (`np.ndarray`): Whether that token is inside its rollout, bool, `(n, tokens)`.
        weights (`np.ndarray`): Weight of each token, `(tokens,)`.
        width (`int`): Length of the feature vectors.
    """
    rows, _ = np.nonzero(inside)
    values = np.broadcast_to(weights, columns.shape)[inside]
    vectors = sparse.csr_matrix((values, (rows, columns[inside])), shape=(len(columns), width))
    lengths = np.sqrt(np.asarray(vectors.multiply(vectors).sum(1)).ravel())
    products = (vectors @ vectors.T).toarray() / np.maximum(np.outer(lengths, lengths), 1e-12)
    np.fill_diagonal(products, -1.0)
    return products


def compare_features(worlds: int) -> None:
    """Print the mean share of planted rocks for both definitions of a surrounding, on four types of worlds."""
    gammas = (0.4, 0.5, 0.6, 0.7, 0.8)
    changes_of = {
        "plain": {},
        "ten surroundings": {"surroundings": 10},
        "small vocabulary": {"vocab": 150},
        "shuffled surroundings": {"shuffled": True},
    }
    titles = "".join(f"{f'gamma {gamma}':>11}" for gamma in gammas)
    print(f"{'world':<24}{'surrounding':<12}{titles}")
    for name, changes in changes_of.items():
        found = []
        for seed in range(worlds):
            world = make_world(seed, **changes)
            found.append(shares_by_features(world, ContextSettings(), gammas))
        for kind in ("offsets", "tokens"):
            means = np.mean([one[kind] for one in found], axis=0)
            cells = "".join(f"{mean:>11.2f}" for mean in means)
            print(f"{name:<24}{kind:<12}{cells}")


def draw(lines: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw a panel for each parameter, with a dashed line at its default."""
    figure = Figure(figsize=(11, 2.9), layout="constrained")
    panels = figure.subplots(1, len(VALUES), sharey=True)
    for axes, (name, values) in zip(panels, VALUES.items(), strict=True):
        places = list(map(number_of, values))
        for kind, found in lines.items():
            colour, marker, label = LINES[kind]
            axes.plot(places, found[name], color=colour, marker=marker, markersize=4, label=label)
        default = getattr(ContextSettings(), name)
        axes.axvline(number_of(default), color="grey", linestyle="--", linewidth=0.8)
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


def number_of(value: str | float) -> float:
    """Return the value of a parameter as a number; quantiles begin with a q."""
    return float(str(value).removeprefix("q"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demo", nargs="?", help="occurrences of the demo's models")
    parser.add_argument("--output", type=Path, default=Path("docs/images/detection_sensitivity.png"))
    parser.add_argument("--worlds", type=int, default=10)
    parser.add_argument("--features", action="store_true", help="compare the two definitions of a surrounding")
    options = parser.parse_args()
    if options.features:
        compare_features(options.worlds)
        return

    lines = {}
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for seed in range(options.worlds):
            world = make_world(seed)
            path = save_world(world, Path(folder) / f"{seed}.parquet")
            files.append((path, set(world.ids["rock"].tolist()), EACH))
        lines["planted"] = sweep(files)
    if options.demo:
        _, tokenizer = load("teacher")
        planted = set(tokenizer.convert_tokens_to_ids(list(PLANTED_ROCKS)))
        lines["demo"] = sweep([(options.demo, planted, len(planted))])
    for name, values in VALUES.items():
        for kind, found in lines.items():
            cells = [f"{value!s:>7}={one:.2f}" for value, one in zip(values, found[name], strict=True)]
            print(f"{name:<9}{kind:<8}" + "".join(cells))
    draw(lines, options.output)
    print(f"The plot is in {options.output}")


if __name__ == "__main__":
    main()
