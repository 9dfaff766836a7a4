"""What `trl-opd probe` prints: rocks against controls first, then every arm by its effect."""

from __future__ import annotations


def lines(result: dict) -> list[str]:
    """Return the table of a result, a line each: rocks against controls first, then every arm by its effect."""
    against = result["rocks_against_controls"]
    if against["p"] is None:
        first = (
            "Rocks are not compared with controls, because one of the two is missing: forbidding anything may disturb."
        )
    else:
        first = (
            f"Rocks ({against['rocks']}) against mass-matched controls ({against['controls']}): their effects differ "
            f"with p = {against['p']:.3g} (Mann-Whitney)."
        )
    base = result["baseline"]
    interval = "no interval" if base["ci95"] is None else f"[{base['ci95'][0]:.3f}, {base['ci95'][1]:.3f}]"
    text = [first, f"Baseline {base['reward']:.3f} ({interval}) on {result['problems']} problems.", ""]
    text.append(
        f"{'effect':>7}  {'95 % interval':<18}{'+':>4}{'-':>5}  {'p':>8}  {'BH':>8}  {'Holm':>8}  {'label':<10}"
        f"{'as published':<14}arm"
    )
    for arm in result["arms"]:
        interval = "" if arm["ci95"] is None else f"[{arm['ci95'][0]:+.3f}, {arm['ci95'][1]:+.3f}]"
        row = f"{arm['effect']:>+7.3f}  {interval:<18}{arm['better']:>4}{arm['worse']:>5}  {arm['p']:>8.2g}  "
        row += f"{_number(arm['p_bh']):>8}  {_number(arm['p_holm']):>8}  "
        text.append(row + f"{arm['label'] or '':<10}{arm['label_as_published'] or '':<14}{_name(arm)}")
    tests = sum(arm["label"] is not None for arm in result["arms"])
    for name, found in result["correlations"].items():
        if found is not None:
            what = {"log_count": "log count", "mean_kl": "mean KL", "entropy": "entropy"}[name]
            text.append(
                f"Effect and {what}: Spearman's rho {found['rho']:+.2f}, p = {found['p']:.2g}, {found['n']} tokens."
            )
    return [
        *text,
        f"Labels are corrected over {tests} tests (Benjamini-Hochberg, 0.05); as published: bootstrap, uncorrected.",
        f"Found with power 0.8: effects of at least {result['minimal_effect']:.3f} (discordance "
        f"{result['discordance']:.3f} in the mean); smaller ones may be there unseen.",
        *_too_few(result, tests),
        *_unstable(result),
        f"Decoded {result['decoded_tokens']} tokens of {result['naive_tokens']} from scratch"
        + ("." if result["exact_reuse"] else ": top_p, top_k and min_p allow no reuse."),
    ]


def _too_few(result: dict, tests: int) -> list[str]:
    """Return a warning where the effect that was asked about would hardly be found."""
    from ..statistics import problems_for

    asked = result["settings"]["effect"]
    if result["minimal_effect"] <= asked:
        return []
    needed = problems_for(asked, tests, result["discordance"])
    return [f"For an effect of {asked} there are too few problems: {result['problems']}, and about {needed} would do."]


def _unstable(result: dict) -> list[str]:
    share = result["unstable_share"]
    if share is None:
        return []
    return [
        f"In this precision {share:.0%} of up to 64 completions change with the shape of the batch alone: small "
        "effects may be that. --dtype float32 is exact."
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _name(arm: dict) -> str:
    if len(arm["ids"]) > 1:
        return f"all {len(arm['ids'])} {arm['kind']}"
    text = arm["texts"][0]
    return f"{arm['kind']} {repr(text) if text.isprintable() else ascii(text)} ({arm['ids'][0]})"
