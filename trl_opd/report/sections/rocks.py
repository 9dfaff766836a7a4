"""Section of a report about token types: the rocks, where they lie among all types, and the families of types."""

from __future__ import annotations

from itertools import chain
from typing import Any

import numpy as np

from ...artefacts.occurrences import MAX_VOCABULARY
from ...artefacts.run_files import TOKEN_STATS_FILE
from ...rocks.cutoff import Sweep
from ...rocks.families import family_of
from ...rocks.rock_set import RockSet
from ...statistics import interval_text
from ..blocks import Block, Facts, Note, Plot, Section, Table
from ..contents import Contents
from ..plots.canvas import to_svg
from ..plots.rocks import plot_before_after, plot_families, plot_funnel, plot_sweep
from ..token_types import TokenTypes, types_of_last_quarter, types_of_occurrences, types_of_statistics

# Longest table of token types, in a folder without a rock set.
MOST_TYPES = 200
# Longest table of rocks: a row takes about 400 bytes of the page.
MOST_ROCKS = 1000


def rocks(contents: Contents) -> Section | None:
    """Return the section about the rocks, or without a rock set about the types with the most divergence.

    Returns `None` if the folder has neither rocks nor token types.

    Raises:
        `ValueError`: if occurrences or statistics hold values that are not valid.
    """
    types = find_types(contents)
    blocks: list[Block] = []
    if contents.other_rocks:
        note = "A run in this folder was trained with other rocks than those of the rock set that is here now, if any."
        blocks.append(Note(note))
    if contents.rocks is not None:
        facts = _facts(contents.rocks)
        blocks.append(Facts(facts))
        blocks.append(_rock_table(contents))
    elif types is not None:
        blocks.append(Note("This folder has no rock set; `trl-opd detect` makes one."))
        blocks.append(_type_table(types, contents))
    if types is not None:
        blocks += _plots(types, contents)
    if not blocks:
        return None
    title = "Rocks" if contents.rocks else "Token types"
    return Section("rocks", title, blocks)


def find_types(contents: Contents) -> TokenTypes | None:
    """Return the token types of a folder: from collected rollouts, else from the statistics of its main run.

    Raises:
        `ValueError`: if occurrences or statistics hold values that are not valid.
    """
    if contents.occurrences is not None:
        return types_of_occurrences(contents.occurrences)
    run = contents.main_run
    if run is None:
        return None
    if run.windows:
        return types_of_last_quarter(run.windows)
    path = run.folder / TOKEN_STATS_FILE
    return types_of_statistics(path) if path.is_file() else None


def _facts(found: RockSet) -> list[tuple[str, str]]:
    method = found.method
    rocks = f"{len(found.rocks)} types, by the {method['score']} score"
    settings = []
    for name in ("tau_pre", "tau_post", "window", "gamma", "eta"):
        if method.get(name) is not None:
            settings.append(f"{name} {method[name]:.4g}")
    if settings:
        rocks += f" ({', '.join(settings)})"

    corpus = found.corpus
    share = f"{found.token_share:.1%} of the {corpus['tokens']} tokens"
    # Aggregate scores are sums of divergence, so their sum has a share of it; context scores are not.
    if method["score"] == "aggregate" and corpus["kl_sum"]:
        kl = sum(rock.score for rock in found.rocks)
        share += f", {kl / corpus['kl_sum']:.1%} of the divergence"
    facts = [("rocks", rocks), ("share in the rollouts that they were chosen from", f"{share} (no interval)")]

    held = found.heldout
    if held is not None:
        share = f"{_share(held, 'token_share')} of the tokens, {_share(held, 'kl_share')} of the divergence"
        facts.append(("share in rollouts of held-out prompts", share))
    controls = found.controls
    if controls is not None:
        matched = "matched" if controls.matched else "not matched"
        text = f"{len(controls.ids)} types with {controls.mass_ratio:.2f} times the tokens of the rocks ({matched})"
        facts.append(("controls", text))
    return facts


def _share(held: dict[str, Any], name: str) -> str:
    # A rock set can come from another program, and its additional keys are not checked when it is read.
    match held.get(f"{name}_ci95"):
        case [float() as low, float() as high]:
            interval = interval_text([low, high], ".1%")
        case _:
            interval = interval_text(None, ".1%")
    return f"{held[name]:.1%} {interval}"


def _rock_table(contents: Contents) -> Table:
    total = len(contents.rocks.rocks)
    shown = contents.rocks.rocks[:MOST_ROCKS]
    roles = {rock.id: rock.role for rock in shown}
    if contents.knockout is not None:
        for arm in contents.knockout["arms"]:
            if arm["kind"] == "rock":
                roles[arm["ids"][0]] = arm["label"]

    columns = {
        "rank": "d",
        "token": "",
        "id": "d",
        "family": "",
        "count": "d",
        "mean KL": ".4f",
        "before": ".4f",
        "CCR": ".2f",
        "score": ".4g",
        "role": "",
    }
    rows = []
    for rank, rock in enumerate(shown, 1):
        text = contents.names.text_of(rock.id)
        family = rock.family or family_of(text)
        measured = (rock.count, rock.mean_kl, rock.mean_kl_pre, rock.ccr, rock.score)
        role = roles.get(rock.id)
        rows.append((rank, text, rock.id, family, *measured, role))

    # Columns without any value are left out.
    forms = {}
    kept = []
    for place, (name, form) in enumerate(columns.items()):
        values = [row[place] for row in rows]
        if any(value is not None for value in values):
            forms[name] = form
            kept.append(values)

    caption = "The rocks" if total == len(shown) else f"The first {len(shown)} of {total} rocks"
    caption += " in rank order. Mean KL, now and before the distillation, is in nats per token; count and score are "
    caption += "those of the rollouts that chose them; no intervals"
    return Table(caption, forms, list(zip(*kept, strict=True)), tool=True)


def _type_table(types: TokenTypes, contents: Contents) -> Table:
    mass = types.mass
    total = max(float(mass.sum()), np.finfo(float).tiny)
    order = np.argsort(-mass, kind="stable")[:MOST_TYPES]
    rows = []
    shown = order[mass[order] > 0]
    for rank, id in enumerate(shown.tolist(), 1):
        text = contents.names.text_of(id)
        count = int(types.count[id])
        mean_kl = float(types.mean_kl[id])
        before = None if types.before is None else float(types.before[id])
        share = float(mass[id]) / total
        rows.append((rank, text, id, count, mean_kl, before, share))

    columns = {
        "rank": "d",
        "token": "",
        "id": "d",
        "count": "d",
        "mean KL": ".4f",
        "before": ".4f",
        "share of the divergence": ".2%",
    }
    caption = f"The {len(rows)} types that carry the most divergence, in {types.source}; "
    caption += "mean KL in nats per token, no intervals"
    return Table(caption, columns, rows, tool=True)


def _plots(types: TokenTypes, contents: Contents) -> list[Block]:
    ids = contents.rock_ids
    is_rock = types.is_rock(ids)
    blocks: list[Block] = [_funnel(types, contents, ids, is_rock)]
    if types.before is not None:
        figure = plot_before_after(types.before, types.mean_kl, is_rock)
        label = "Mean KL of each type after over before the distillation; types on the line did not change"
        note = f"After: {types.source}. Before: {types.before_source}."
        blocks.append(Plot(to_svg(figure, "c-"), label, note))

    sweep = _stored_sweep(contents.rocks) or types.coverage(len(ids) or None)
    note = ""
    if not sweep.stability:
        note = "The stability of this list was not measured; `trl-opd detect --top_k auto` measures it."
    figure = plot_sweep(sweep)
    label = "Share of the divergence that the top K types carry, over K"
    blocks.append(Plot(to_svg(figure, "k-"), label, note))

    families = types.families(contents.names.text_of)
    if families:
        blocks.append(_families(families, is_complete=contents.names.complete))
    return blocks


def _funnel(types: TokenTypes, contents: Contents, ids: list[int], is_rock: np.ndarray) -> Plot:
    texts = {}
    for id in ids:
        text = contents.names.text_of(id)
        if text is not None:
            texts[id] = text
    figure = plot_funnel(types.count, types.mean_kl, is_rock, texts=texts or None)
    occurring = np.count_nonzero(types.count)
    label = f"Mean KL over count of {occurring} token types, with the rocks marked and a band for 10 to 90 % of the "
    label += "types of similar count"
    return Plot(to_svg(figure, "f-"), label, f"From {types.source}.")


def _families(families: dict[str, tuple[float, float]], *, is_complete: bool) -> Plot:
    token_share = []
    kl_share = []
    texts = []
    for name, (tokens, kl) in families.items():
        token_share.append(tokens)
        kl_share.append(kl)
        texts.append(f"{name} {tokens:.1%} and {kl:.1%}")
    label = f"Families by share of tokens and of divergence: {', '.join(texts)}"
    note = ""
    if not is_complete:
        note = "Only types whose text is in the rock set, because the tokenizer of these ids is not on this machine."
    figure = plot_families(list(families), token_share, kl_share)
    return Plot(to_svg(figure, "g-"), label, note)


def _stored_sweep(found: RockSet | None) -> Sweep | None:
    """Return the sweep that `detect --top_k auto` left in the rock set; `None` if there is none or it is not valid."""
    if found is None:
        return None
    try:
        stored = found.method["sweep"]
        cutoffs = list(map(int, stored["cutoffs"]))
        coverage = list(map(float, stored["coverage"]))
        stability = {}
        for size, values in stored["stability"].items():
            stability[int(size)] = list(map(float, values))
        top_k = found.method["top_k"]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None

    if not cutoffs or min(cutoffs) <= 0 or max(cutoffs) >= MAX_VOCABULARY:
        return None
    for values in chain([coverage], stability.values()):
        if len(values) != len(cutoffs):
            return None
        if not all(0.0 <= value <= 1.0001 for value in values):  # a share may exceed 1 by rounding
            return None
    return Sweep(cutoffs, coverage, stability, top_k)
