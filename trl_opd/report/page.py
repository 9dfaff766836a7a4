"""The page of a report: blocks -> one self-contained HTML file.

Every text of every block goes through `visible` here and through the template's escaping there; only the SVGs, which
`canvas.to_svg` made, are taken as they are. The page requests nothing, and runs no script but its own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from importlib import resources

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..artefacts.sampled_rollouts import MEASURES, TOP
from .blocks import Block, Facts, Note, Page, Plot, Rollouts, ShownRollout, Table
from .text import named, visible

EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # nats: where the tint of a token deepens
# Characters of a text that are shown: enough for what is written by hand, little enough for what a model wrote.
LINE, TOKEN, CELL, PROMPT, TEXT = 300, 100, 300, 4000, 4000
SHORT_PROMPT, SHORT_LINES = 240, 4  # characters and line breaks of a prompt that stands in the open
LONG_TABLE = 20  # rows; a longer one scrolls in a box of its own
UNKNOWN = "–"
# What could end a script element, or a line of JavaScript, is written as JSON's own escape.
IN_A_SCRIPT = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def render(page: Page) -> str:
    """Return a report as the text of one HTML file, the same for the same report.

    Args:
        page (`Page`): The report.

    Raises:
        `ValueError`: If an anchor is not made of ASCII letters or is used twice, or a row does not fit its columns.
    """
    anchors = [section.anchor for section in page.sections]
    for anchor in anchors:
        if not (anchor.isascii() and anchor.isalpha()):
            raise ValueError(f"{anchor!r} cannot be an anchor: it becomes an id, so only ASCII letters are allowed.")
        if anchors.count(anchor) > 1:
            raise ValueError(f"Two sections have the anchor {anchor!r}: a link would lead to the first only.")
    sections = []
    for section in page.sections:
        blocks = [_view(block) for block in section.blocks]
        sections.append({"anchor": section.anchor, "title": visible(section.title, LINE), "blocks": blocks})
    script = _part("page.js")
    template = _environment().get_template("page.html.jinja")
    return template.render(
        title=visible(page.title, LINE),
        lead=visible(page.lead, TEXT),
        sections=sections,
        tints=["0", *(f"{edge:g}" for edge in EDGES)],
        style=Markup(_part("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("trl_opd.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


@functools.cache
def _part(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _view(block: Block) -> dict:
    """Return what the template shows of a block: texts that are visible, not yet escaped."""
    match block:
        case Note():
            return {"kind": "note", "text": visible(block.text, TEXT)}
        case Facts():
            rows = [(visible(name, LINE), named(value, TEXT) or UNKNOWN) for name, value in block.rows]
            return {"kind": "facts", "rows": rows}
        case Table():
            return _table(block)
        case Plot():
            svg = Markup(block.svg.encode("utf-8", "replace").decode())  # a lone surrogate must not cost the file
            return {"kind": "plot", "svg": svg, "label": visible(block.label, TEXT), "note": visible(block.note, TEXT)}
        case Rollouts():
            return _rollouts(block)
    raise TypeError(f"A page is made of notes, facts, tables, plots and rollouts, not of {type(block).__name__}.")


# Tables


def _table(block: Table) -> dict:
    forms = list(block.columns.values())
    for row in block.rows:
        if len(row) != len(forms):
            raise ValueError(f"A row of the table {block.caption!r} has {len(row)} cells for {len(forms)} columns.")
    return {
        "kind": "table",
        "caption": visible(block.caption, TEXT),
        "heads": [{"text": visible(head, LINE), "is_number": bool(form)} for head, form in block.columns.items()],
        "rows": [list(map(_cell, row, forms)) for row in block.rows],
        "is_tool": block.tool,
        "is_long": len(block.rows) > LONG_TABLE,
    }


def _cell(value: str | float | int | None, form: str) -> dict:
    """Return a cell: its text, and for a number that is known what it is sorted by."""
    text, key = UNKNOWN, None
    if isinstance(value, str):
        text = named(value, CELL)
    elif value is not None and not math.isnan(value):
        text, key = _formatted(value, form), repr(float(value)).replace("inf", "Infinity")
    return {"text": text, "value": key, "is_number": bool(form)}


def _formatted(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else format(value, "").replace("inf", "∞")


# Rollouts


def _rollouts(block: Rollouts) -> dict:
    """Return rollouts by step, tokens tinted, and the measures of their tokens as JSON."""
    ids = {id_ for rollout in block.rollouts for id_ in rollout.token_ids.tolist()}
    shown = {id_: visible(block.texts[id_], TOKEN, newline="↵\n") for id_ in ids if id_ in block.texts}
    steps: dict[int | None, list[dict]] = {}
    for place, rollout in enumerate(block.rollouts):
        steps.setdefault(rollout.step, []).append(_rollout(rollout, place, shown, block.rocks))
    return {
        "kind": "rollouts",
        "steps": [{"step": step, "rollouts": rollouts} for step, rollouts in steps.items()],
        "data": _data(block),
    }


def _rollout(rollout: ShownRollout, place: int, shown: dict[int, str], rocks: frozenset[int]) -> dict:
    ids, kl = rollout.token_ids.tolist(), np.asarray(rollout.kl, dtype=np.float64)
    measured = ~np.isnan(kl)
    frozen = np.zeros(len(ids), dtype=bool) if rollout.weight is None else np.asarray(rollout.weight) == 0
    tints = np.where(measured, np.searchsorted(EDGES, kl, side="right"), -1).tolist()
    tokens = []
    for id_, tint, is_frozen in zip(ids, tints, frozen.tolist(), strict=True):
        classes = f"d{'x' if tint < 0 else tint}{' rock' * (id_ in rocks)}{' frozen' * is_frozen}"
        # A special token may decode to nothing: its id is what can be seen of it.
        tokens.append((classes, shown.get(id_) or f"⟨{id_}⟩"))
    prompt = rollout.prompt
    return {
        "name": f"Rollout {rollout.rollout}",
        "place": place,
        "prompt": None if prompt is None else visible(prompt, PROMPT, newline="\n"),
        "start": None if prompt is None else " ".join(visible(prompt[:100], newline=" ").split()),
        "is_long": prompt is not None and (len(prompt) > SHORT_PROMPT or prompt.count("\n") > SHORT_LINES),
        "mean_kl": _formatted(kl[measured].mean(), ".4f") if measured.any() else UNKNOWN,
        "rocks": sum(id_ in rocks for id_ in ids),
        "frozen": int(frozen.sum()),
        "tokens": tokens,
    }


def _data(block: Rollouts) -> Markup:
    """Return what the tooltip of every token says, as JSON that can stand in a script element."""
    ids = set()
    for rollout in block.rollouts:
        ids.update(rollout.token_ids.tolist())
        for top in (rollout.student_top, rollout.teacher_top):
            ids.update([] if top is None else np.asarray(top[0]).ravel().tolist())
    texts = {str(id_): named(block.texts[id_], TOKEN) for id_ in sorted(ids) if block.texts.get(id_)}
    rollouts = ",".join(map(_columns, block.rollouts))
    text = f'{{"top":{TOP},"texts":{json.dumps(texts, ensure_ascii=False)},"rollouts":[{rollouts}]}}'
    return Markup(text.translate(IN_A_SCRIPT))


def _columns(rollout: ShownRollout) -> str:
    """Return the known columns of a rollout as a JSON object; those of the likeliest tokens are flat, five a token."""
    columns = {"id": rollout.token_ids} | {name: getattr(rollout, name) for name in MEASURES}
    for who in ("student", "teacher"):
        columns[f"{who}_top_id"], columns[f"{who}_top_p"] = getattr(rollout, f"{who}_top") or (None, None)
    return "{" + ",".join(f'"{name}":{_array(column)}' for name, column in columns.items() if column is not None) + "}"


def _array(column: np.ndarray) -> str:
    return f"[{','.join(map(_number, np.asarray(column).ravel().tolist()))}]"


def _number(value: int | float) -> str:
    """Return a number in JSON with four significant digits; JSON knows no infinity, but reads `1e999` as such."""
    if isinstance(value, int):
        return str(value)
    if math.isfinite(value):
        return f"{value:.4g}"
    return "null" if math.isnan(value) else "1e999" if value > 0 else "-1e999"
