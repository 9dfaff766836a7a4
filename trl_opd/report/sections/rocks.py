"""Section of a report about token types: the rocks, how they lie among all types, which families they are of."""

from __future__ import annotations

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

MOST_TYPES = 200  # of the table where no rocks were chosen
MOST_ROCKS = 1000  # of the table of rocks: each is 400 bytes of the page


def rocks(contents: Contents) -> Section | None:
    """Return the rocks, or where there are none the types that carry the most divergence, and plots of all types."""
    types = find_types(contents)
    blocks: list[Block] = []
    if contents.other_rocks:
        blocks.append(
            Note("A run here was given other rocks than those of the rock set that lies here now, if any does.")
        )
    if contents.rocks is not None:
        blocks += [Facts(_facts(contents.rocks)), _rock_table(contents)]
    elif types is not None:
        blocks += [Note("No rock set is in this folder: `trl-opd detect` chooses one."), _type_table(types, contents)]
    if types is not None:
        blocks += _plots(types, contents)
    return Section("rocks", "Rocks" if contents.rocks else "Token types", blocks) if blocks else None


def find_types(contents: Contents) -> TokenTypes | None:
    """Return what a folder says of token types: from collected rollouts, else from the statistics of its run."""
    if contents.occurrences is not None:
        return types_of_occurrences(contents.occurrences)
    if (run := contents.main_run) is None:
        return None
    if run.windows:
        return types_of_last_quarter(run.windows)
    path = run.folder / TOKEN_STATS_FILE
    return types_of_statistics(path) if path.is_file() else None


def _facts(found: RockSet) -> list[tuple[str, str]]:
    method, corpus, held, controls = found.method, found.corpus, found.heldout, found.controls
    settings = ("tau_pre", "tau_post", "window", "gamma", "eta")
    chosen = ", ".join(f"{name} {method[name]:.4g}" for name in settings if method.get(name) is not None)
    kl = sum(rock.score for rock in found.rocks) if method["score"] == "aggregate" else None
    facts = [
        ("rocks", f"{len(found.rocks)} types, by the {method['score']} score" + (f" ({chosen})" if chosen else "")),
        (
            "of the rollouts that chose them",
            f"{found.token_share:.1%} of the {corpus['tokens']} tokens"
            + (f", {kl / corpus['kl_sum']:.1%} of the divergence" if kl is not None and corpus["kl_sum"] else "")
            + " (no interval)",
        ),
    ]
    if held is not None:
        shares = [f"{_share(held, 'token_share')} of the tokens", f"{_share(held, 'kl_share')} of the divergence"]
        facts.append(("of the prompts that did not", ", ".join(shares)))
    if controls is not None:
        matched = "matched" if controls.matched else "not matched"
        facts.append(
            ("controls", f"{len(controls.ids)} types with {controls.mass_ratio:.2f} of their tokens ({matched})")
        )
    return facts


def _share(held: dict[str, Any], name: str) -> str:
    interval = held.get(f"{name}_ci95")
    known = isinstance(interval, list) and len(interval) == 2 and all(isinstance(end, float) for end in interval)
    return f"{held[name]:.1%} {interval_text(interval if known else None, '.1%')}"


def _rock_table(contents: Contents) -> Table:
    total, shown = len(contents.rocks.rocks), contents.rocks.rocks[:MOST_ROCKS]
    roles = {rock.id: rock.role for rock in shown}
    if contents.knockout is not None:
        roles |= {arm["ids"][0]: arm["label"] for arm in contents.knockout["arms"] if arm["kind"] == "rock"}
    rows = [
        (
            rank,
            contents.names.text_of(rock.id),
            rock.id,
            rock.family or family_of(contents.names.text_of(rock.id)),
            rock.count,
            rock.mean_kl,
            rock.mean_kl_pre,
            rock.ccr,
            rock.score,
            roles.get(rock.id),
        )
        for rank, rock in enumerate(shown, 1)
    ]
    columns = {"rank": "d", "token": "", "id": "d", "family": "", "count": "d", "mean KL": ".4f", "before": ".4f"}
    columns |= {"CCR": ".2f", "score": ".4g", "role": ""}
    empty = {name for place, name in enumerate(columns) if all(row[place] is None for row in rows)}
    kept = [place for place, name in enumerate(columns) if name not in empty]
    caption = "The rocks" if total == len(shown) else f"The first {len(shown)} of {total} rocks"
    caption += " in rank order. Mean KL now and before the distillation in nats per token, count and score as they "
    caption += "chose; no intervals"
    forms = {name: form for name, form in columns.items() if name not in empty}
    return Table(caption, forms, [tuple(row[place] for place in kept) for row in rows], tool=True)


def _type_table(types: TokenTypes, contents: Contents) -> Table:
    mass = types.mass
    order = [int(id) for id in np.argsort(-mass, kind="stable")[:MOST_TYPES] if mass[id] > 0]
    total = max(float(mass.sum()), np.finfo(float).tiny)
    rows = [
        (
            rank,
            contents.names.text_of(id),
            id,
            int(types.count[id]),
            float(types.mean_kl[id]),
            None if types.before is None else float(types.before[id]),
            float(mass[id]) / total,
        )
        for rank, id in enumerate(order, 1)
    ]
    caption = f"The {len(rows)} types that carry the most divergence, in {types.source}; "
    caption += "mean KL in nats per token, no intervals"
    columns = {"rank": "d", "token": "", "id": "d", "count": "d", "mean KL": ".4f", "before": ".4f"}
    return Table(caption, columns | {"share of the divergence": ".2%"}, rows, tool=True)


def _plots(types: TokenTypes, contents: Contents) -> list[Block]:
    ids = [rock.id for rock in contents.rocks.rocks] if contents.rocks else []
    is_rock, names = types.is_rock(ids), contents.names
    texts = {id: text for id in ids if (text := names.text_of(id)) is not None}
    occur = int((types.count > 0).sum())
    funnel = plot_funnel(types.count, types.mean_kl, is_rock, texts=texts or None)
    label = (
        f"Mean KL over count of {occur} token types, rocks marked, with the band of 10 to 90 % of types of like count"
    )
    blocks: list[Block] = [Plot(to_svg(funnel, "f-"), label, f"From {types.source}.")]
    if types.before is not None:
        change = plot_before_after(types.before, types.mean_kl, is_rock)
        note = f"After: {types.source}. Before: {types.before_source}."
        blocks.append(
            Plot(to_svg(change, "c-"), "Mean KL of each type after over before; on the line nothing changed", note)
        )
    sweep = _stored_sweep(contents.rocks) or types.coverage(len(ids) or None)
    note = "" if sweep.stability else "How stable the list is was not measured: `trl-opd detect --top_k auto` does."
    blocks.append(
        Plot(to_svg(plot_sweep(sweep), "k-"), "Share of the divergence that the top K types carry, over K", note)
    )
    families = types.families(names.text_of)
    if families:
        shares = list(zip(*families.values(), strict=True))
        text = ", ".join(f"{name} {tokens:.1%} and {kl:.1%}" for name, (tokens, kl) in families.items())
        note = "" if names.complete else "Only types whose text the rock set names; no tokenizer of these ids is here."
        plot = plot_families(list(families), *shares)
        blocks.append(Plot(to_svg(plot, "g-"), f"Families by share of tokens and of divergence: {text}", note))
    return blocks


def _stored_sweep(found: RockSet | None) -> Sweep | None:
    """Return the sweep that `detect --top_k auto` left in the rock set."""
    stored = found.method.get("sweep") if found is not None else None
    if not isinstance(stored, dict):
        return None
    try:
        stability = {int(size): [float(value) for value in values] for size, values in stored["stability"].items()}
        cutoffs = [int(cutoff) for cutoff in stored["cutoffs"]]
        sweep = Sweep(cutoffs, [float(value) for value in stored["coverage"]], stability, found.method["top_k"])
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return None
    series = (sweep.coverage, *stability.values())
    known = bool(cutoffs) and all(0 < cutoff < MAX_VOCABULARY for cutoff in cutoffs)
    known &= all(len(values) == len(cutoffs) and all(0.0 <= value <= 1.0001 for value in values) for values in series)
    return sweep if known else None
