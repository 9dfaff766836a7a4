"""The table that `trl-opd probe` prints: rocks against controls first, then every arm by its effect."""

from __future__ import annotations

from ..statistics import interval_text
from ..studies.effects import count_tests, problems_needed
from .detect import show_token

# Columns of an arm, below the head of the table.
ROW = (
    "{effect:>+7.3f}  {interval:<18}{better:>4}{worse:>5}  {p:>8.2g}  {p_bh:>8}  {p_holm:>8}  {label:<10}"
    "{published:<14}{name}"
)
MEASURES = {"log_count": "log count", "mean_kl": "mean KL", "entropy": "entropy"}


def format_result(result: dict) -> list[str]:
    """Return the table of a result, a line each: rocks against controls first, then every arm by its effect."""
    lines = [
        _format_comparison(result["rocks_against_controls"]),
        _format_baseline(result),
        "",
        f"{'effect':>7}  {'95 % interval':<18}{'+':>4}{'-':>5}  {'p':>8}  {'BH':>8}  {'Holm':>8}  {'label':<10}"
        f"{'as published':<14}arm",
    ]
    lines += map(_format_arm, result["arms"])
    for name, found in result["correlations"].items():
        if found is not None:
            lines.append(
                f"Effect and {MEASURES[name]}: Spearman's rho {found['rho']:+.2f}, p = {found['p']:.2g}, "
                f"{found['n']} tokens."
            )
    lines += [
        f"Labels are corrected over {count_tests(result)} tests (Benjamini-Hochberg, 0.05); as published: bootstrap, "
        "uncorrected.",
        f"Found with power 0.8: effects of at least {result['minimal_effect']:.3f} (discordance "
        f"{result['discordance']:.3f} in the mean); smaller ones may be there unseen.",
    ]
    asked = result["settings"]["effect"]
    needed = problems_needed(result, asked)
    if needed is not None:
        lines.append(
            f"For an effect of {asked} there are too few problems: {result['problems']}, and about {needed} would do."
        )
    if result["unstable_share"] is not None:
        lines.append(
            f"In this precision {result['unstable_share']:.0%} of up to 64 completions change with the shape of the "
            "batch alone: small effects may be that. --dtype float32 is exact."
        )
    reuse = "." if result["exact_reuse"] else ": top_p, top_k and min_p allow no reuse."
    lines.append(f"Decoded {result['decoded_tokens']} tokens of {result['naive_tokens']} from scratch{reuse}")
    return lines


def _format_comparison(comparison: dict) -> str:
    if comparison["p"] is None:
        return (
            "Rocks are not compared with controls, because one of the two is missing: forbidding anything may disturb."
        )
    return (
        f"Rocks ({comparison['rocks']}) against mass-matched controls ({comparison['controls']}): their effects differ "
        f"with p = {comparison['p']:.3g} (Mann-Whitney)."
    )


def _format_baseline(result: dict) -> str:
    baseline = result["baseline"]
    interval = interval_text(baseline["ci95"], ".3f")
    return f"Baseline {baseline['reward']:.3f} {interval} on {result['problems']} problems."


def _format_arm(arm: dict) -> str:
    interval = ""
    if arm["ci95"] is not None:
        interval = interval_text(arm["ci95"], "+.3f")
    cells = {
        "interval": interval,
        "p_bh": _format_number(arm["p_bh"]),
        "p_holm": _format_number(arm["p_holm"]),
        "label": arm["label"] or "",
        "published": arm["label_as_published"] or "",
        "name": _name_arm(arm),
    }
    return ROW.format_map(arm | cells)


def _format_number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2g}"


def _name_arm(arm: dict) -> str:
    kind = arm["kind"]
    ids = arm["ids"]
    if len(ids) > 1:
        return f"all {len(ids)} {kind}"
    text = show_token(arm["texts"][0])
    return f"{kind} {text} ({ids[0]})"
