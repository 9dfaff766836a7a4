"""Renders a report as one self-contained HTML file.

`visible` escapes hidden characters in every text, and the template escapes HTML; only the SVGs from `canvas.to_svg` are
inserted unchanged. The page requests nothing and runs no script except its own.
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

EDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # divergences in nats at which the shade of a token gets darker
# Most characters of each text: enough for text that people write, and a bound on text that a model wrote.
LINE = 300
TOKEN = 100
CELL = 300
PROMPT = 4000
TEXT = 4000
# Characters and line breaks up to which a prompt is shown at once; a longer one is folded.
SHORT_PROMPT = 240
SHORT_LINES = 4
LONG_TABLE = 20  # rows; a longer table scrolls inside a box
UNKNOWN = "–"
# JSON escapes for characters that could end a script element or a line of JavaScript.
IN_A_SCRIPT = {ord(sign): f"\\u{ord(sign):04x}" for sign in "<>&\u2028\u2029"}


def render(page: Page) -> str:
    """Return a report as the text of one HTML file; equal reports give equal texts.

    Args:
        page (`Page`): The report.

    Raises:
        `ValueError`: if an anchor is used twice or has other characters than ASCII letters, or if a table's row has
            more or fewer cells than the table has columns.
        `TypeError`: if a section holds something that is not a block.
    """
    _require_anchors([section.anchor for section in page.sections])
    sections = []
    for section in page.sections:
        title = visible(section.title, LINE)
        blocks = [_view(block) for block in section.blocks]
        sections.append({"anchor": section.anchor, "title": title, "blocks": blocks})

    tints = ["0"]
    tints += [f"{edge:g}" for edge in EDGES]
    script = _read_template("page.js")
    digest = hashlib.sha256(script.encode()).digest()
    template = _environment().get_template("page.html.jinja")
    return template.render(
        title=visible(page.title, LINE),
        lead=visible(page.lead, TEXT),
        sections=sections,
        tints=tints,
        style=Markup(_read_template("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(digest).decode(),
    )


def _require_anchors(anchors: list[str]) -> None:
    for anchor in anchors:
        if not (anchor.isascii() and anchor.isalpha()):
            raise ValueError(f"{anchor!r} cannot be an anchor: it becomes an id, so only ASCII letters are allowed.")
        if anchors.count(anchor) > 1:
            raise ValueError(
                f"Two sections have the anchor {anchor!r}, so a link would lead to the first only: give each section "
                "another anchor."
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
def _read_template(name: str) -> str:
    return resources.files(__package__).joinpath("templates", name).read_text(encoding="utf-8")


def _view(block: Block) -> dict:
    """Return what the template shows of a block, with hidden characters escaped but HTML not escaped yet."""
    match block:
        case Note():
            return {"kind": "note", "text": visible(block.text, TEXT)}
        case Facts():
            rows = []
            for name, value in block.rows:
                rows.append((visible(name, LINE), named(value, TEXT) or UNKNOWN))
            return {"kind": "facts", "rows": rows}
        case Table():
            return _table(block)
        case Plot():
            # UTF-8 has no lone surrogates: one in a label would make the whole file impossible to write.
            svg = block.svg.encode("utf-8", "replace").decode()
            label = visible(block.label, TEXT)
            return {"kind": "plot", "svg": Markup(svg), "label": label, "note": visible(block.note, TEXT)}
        case Rollouts():
            return _rollouts(block)
    raise TypeError(f"A page is made of notes, facts, tables, plots and rollouts, not of {type(block).__name__}.")


# Tables


def _table(block: Table) -> dict:
    forms = list(block.columns.values())
    rows = []
    for row in block.rows:
        if len(row) != len(forms):
            raise ValueError(f"A row of the table {block.caption!r} has {len(row)} cells for {len(forms)} columns.")
        cells = list(map(_cell, row, forms))
        rows.append(cells)

    heads = []
    for head, form in block.columns.items():
        heads.append({"text": visible(head, LINE), "is_number": bool(form)})
    return {
        "kind": "table",
        "caption": visible(block.caption, TEXT),
        "heads": heads,
        "rows": rows,
        "is_tool": block.tool,
        "is_long": len(rows) > LONG_TABLE,
    }


def _cell(value: str | float | int | None, form: str) -> dict:
    """Return a table cell: its text, and for a known number the value that it is sorted by."""
    cell = {"text": UNKNOWN, "value": None, "is_number": bool(form)}
    if isinstance(value, str):
        cell["text"] = named(value, CELL)
    elif value is not None and not math.isnan(value):
        cell["text"] = _formatted(value, form)
        number = repr(float(value))
        cell["value"] = number.replace("inf", "Infinity")
    return cell


def _formatted(value: float, form: str) -> str:
    if math.isfinite(value):
        return format(value, form)
    return str(value).replace("inf", "∞")


# Rollouts


def _rollouts(block: Rollouts) -> dict:
    """Return rollouts by step with shaded tokens, and the metrics of their tokens as JSON."""
    steps: dict[int | None, list[dict]] = {}
    for place, rollout in enumerate(block.rollouts):
        of_step = steps.setdefault(rollout.step, [])
        of_step.append(_rollout(rollout, place, block))
    by_step = [{"step": step, "rollouts": rollouts} for step, rollouts in steps.items()]
    return {"kind": "rollouts", "steps": by_step, "data": _data(block)}


def _rollout(rollout: ShownRollout, place: int, block: Rollouts) -> dict:
    ids = rollout.token_ids.tolist()
    kl = np.asarray(rollout.kl, dtype=np.float64)
    unmeasured = np.isnan(kl)
    measured = kl[~unmeasured]
    tints = np.searchsorted(EDGES, kl, side="right").astype(str)
    tints[unmeasured] = "x"
    frozen = [False] * len(ids)
    if rollout.weight is not None:
        frozen = np.equal(rollout.weight, 0).tolist()

    tokens = []
    rocks = 0
    for id_, tint, is_frozen in zip(ids, tints.tolist(), frozen, strict=True):
        classes = f"d{tint}"
        if id_ in block.rocks:
            classes += " rock"
            rocks += 1
        if is_frozen:
            classes += " frozen"
        shown = f"⟨{id_}⟩"
        text = block.texts.get(id_)
        if text:  # a special token may decode to an empty text, so we show its id
            shown = visible(text, TOKEN, newline="↵\n")
        tokens.append((classes, shown))
    return _prompt(rollout.prompt) | {
        "name": f"Rollout {rollout.rollout}",
        "place": place,
        "mean_kl": _formatted(measured.mean(), ".4f") if measured.size else UNKNOWN,
        "rocks": rocks,
        "frozen": sum(frozen),
        "tokens": tokens,
    }


def _prompt(prompt: str | None) -> dict:
    """Return a prompt, its start, which is shown while it is folded, and whether it is long enough to fold."""
    if prompt is None:
        return {"prompt": None, "start": None, "is_long": False}
    start = visible(prompt[:100], newline=" ")
    return {
        "prompt": visible(prompt, PROMPT, newline="\n"),
        "start": " ".join(start.split()),
        "is_long": len(prompt) > SHORT_PROMPT or prompt.count("\n") > SHORT_LINES,
    }


def _data(block: Rollouts) -> Markup:
    """Return the content of every token's tooltip as JSON that is safe inside a script element."""
    ids: set[int] = set()
    for rollout in block.rollouts:
        ids |= rollout.shown_ids()

    texts = {}
    for id_ in sorted(ids):
        text = block.texts.get(id_)
        if text:
            texts[id_] = named(text, TOKEN)
    rollouts = ",".join(map(_columns, block.rollouts))
    text = f'{{"top":{TOP},"texts":{json.dumps(texts, ensure_ascii=False)},"rollouts":[{rollouts}]}}'
    return Markup(text.translate(IN_A_SCRIPT))


def _columns(rollout: ShownRollout) -> str:
    """Return the known columns of a rollout as a JSON object; each token has five entries in those of likely tokens."""
    columns = {"id": rollout.token_ids}
    for name in MEASURES:
        columns[name] = getattr(rollout, name)
    for who in ("student", "teacher"):
        top = getattr(rollout, f"{who}_top")
        if top is not None:
            columns[f"{who}_top_id"], columns[f"{who}_top_p"] = top

    members = []
    for name, column in columns.items():
        if column is not None:
            members.append(f'"{name}":{_array(column)}')
    return f"{{{','.join(members)}}}"


def _array(column: np.ndarray) -> str:
    numbers = map(_number, np.ravel(column).tolist())
    return f"[{','.join(numbers)}]"


def _number(value: int | float) -> str:
    """Return a number as JSON with four significant digits; infinity, which JSON lacks, becomes `1e999`."""
    if isinstance(value, int):
        return str(value)
    if math.isnan(value):
        return "null"
    return f"{value:.4g}".replace("inf", "1e999")
