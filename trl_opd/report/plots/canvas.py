"""The look of every plot, and the two things a figure becomes: a PNG file, or an SVG element of a page of any theme.

Colours are those that colour-blind people can tell apart (Okabe and Ito 2008), of which only the ones that can be read
on white and on black alike; series also differ by marker, dash or hatch. In an SVG all that is neutral (text, axes,
grid, guides) takes the colour of the page's text.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, NullFormatter

from ...artefacts.atomic import complete_file
from ..text import named
from .svg import inline_svg

INK = "#16181d"  # neutral: in a PNG as it is, in an SVG `currentColor`
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#858585"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, GREY)
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
HATCHES = ("", "////", "||||", "----", "\\\\\\\\")  # of lines: Matplotlib writes one of dots as thousands of curves
STYLE = {
    "text.parse_math": False,  # a token such as "$x$" is no formula
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.color": INK,
    "hatch.linewidth": 0.5,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.titlesize": "medium",
    "axes.labelsize": "small",
    "xtick.labelsize": "small",
    "ytick.labelsize": "small",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": INK,
    "grid.alpha": 0.15,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "svg.fonttype": "none",
}
# Decorates whatever draws or saves: what a notebook has set for its own plots is left out, and left alone.
house_style = matplotlib.style.context(STYLE, after_reset=True)

MOST_VECTORS = 1500  # points of a figure that an SVG holds one by one; a layer of more is a picture in it
PNG_DPI, LAYER_DPI = 144, 110
LABEL = 20  # signs of a text of others, such as a token's
MOST_ESCAPED = 32  # characters of a text that the font of the PNG could not write
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
LINEAR_NATS = 1e-3  # below, an axis of nats is linear: it has zero, and it tells nobody 1e-9 from 1e-8


class Look(NamedTuple):
    """How a series looks; `marker`, `dash` or `hatch` tell it apart without colours."""

    colour: str
    marker: str
    dash: str | tuple
    hatch: str


def look_of(place: int) -> Look:
    """Return the look of the series at a place: 25 differ."""
    size = len(COLOURS)
    other = place + place // size
    return Look(COLOURS[place % size], *(kinds[other % size] for kinds in (MARKERS, DASHES, HATCHES)))


@house_style
def new_figure(
    title: str, x: str, y: str, *, size: tuple[float, float] = (6.4, 4.0), grid: str = "y"
) -> tuple[Figure, Axes]:
    """Return a figure and its axes.

    Args:
        title (`str`): What one sees.
        x, y (`str`): What the axes show, with units.
        size (`tuple[float, float]`, *optional*): Width and height, inches.
        grid (`str`, *optional*, defaults to `"y"`): Axis of the lines: "x", "y" or "both".
    """
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=x, ylabel=y)
    axes.grid(False)
    axes.grid(True, axis=grid)
    axes.set_title(title)
    return figure, axes


@house_style
def save_png(figure: Figure, path: str | os.PathLike) -> None:
    """Write a figure as a PNG file, dark on white; it appears under its name only when it is complete.

    A character that Matplotlib's font lacks, as of a Chinese token, is written as its escape.
    """
    with _writable_texts(figure), complete_file(path) as part:
        figure.savefig(part, format="png", dpi=PNG_DPI, facecolor="white")


@house_style
def to_svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an `<svg>` element for a page, that is as wide as it may; the same bytes each time.

    Args:
        figure (`Figure`): A figure of this package.
        prefix (`str`): Begins each id in it, so no two plots of a page share one: letters, digits, "-" and "_".

    Raises:
        `ValueError`: if the prefix is none.
    """
    content = io.BytesIO()
    with warnings.catch_warnings():
        # The browser's fonts have what the one that is measured here lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, format="svg", dpi=LAYER_DPI, facecolor="none")
    return inline_svg(content.getvalue(), prefix, neutral=INK)


def add_points(
    axes: Axes, x: np.ndarray, y: np.ndarray, *, colour: str, marker: str, label: str, size: float, alpha: float = 0.85
) -> None:
    """Draw finite points, `(N,)` each; none is no series."""
    if len(x) == 0:
        return
    lines = [line for panel in axes.figure.axes for line in panel.lines if not line.get_rasterized()]
    vectors = sum(len(line.get_xdata()) for line in lines) + len(x)
    look = {"color": colour, "markersize": size, "markeredgewidth": 0, "alpha": alpha, "label": label}
    axes.plot(x, y, marker, rasterized=vectors > MOST_VECTORS, **look)


def add_legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """Put the legend of axes below a figure, if there is anything to name."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = min(columns, len(handles))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.0)


def say_empty(axes: Axes, text: str) -> None:
    """Say in the middle of axes why nothing is drawn."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize="small")
    axes.set(xticks=[], yticks=[])


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows of axes, the first at the top."""
    axes.yaxis.set_major_locator(FixedLocator(range(len(names))))
    axes.yaxis.set_major_formatter(FixedFormatter(list(names)))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)


def log_axis(axes: Axes, *names: str) -> None:
    """Make axes ("x", "y") logarithmic, with numbers that are plain text."""
    for name in names:
        getattr(axes, f"set_{name}scale")("log")
        axis = getattr(axes, f"{name}axis")

        def minor(value: float, _, axis=axis) -> str:
            low, high = sorted(axis.get_view_interval())
            return plain_number(value) if high < 30 * low and f"{value:.0e}"[0] in "25" else ""

        axis.set_major_formatter(FuncFormatter(plain_number))
        axis.set_minor_formatter(FuncFormatter(minor))


def nats_axis(axes: Axes, *names: str) -> None:
    """Make axes ("x", "y") of nats logarithmic above a thousandth, and linear around zero."""
    for name in names:
        getattr(axes, f"set_{name}scale")("symlog", linthresh=LINEAR_NATS, linscale=0.4)
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(FuncFormatter(plain_number))
        axis.set_minor_formatter(NullFormatter())


def limit_nats(set_limits: Callable, values: np.ndarray) -> tuple[float, float]:
    """Set the limits of an axis of nats around values, `(N,)`, with zero where they come near it. Returns them."""
    low, high = values.min(), 1.4 * max(values.max(), 10 * LINEAR_NATS)
    if low < 10 * LINEAR_NATS:
        return set_limits(1.4 * low if low < 0 else 0.0, high)
    return set_limits(min(low / 1.4, high / 20), high)  # a decade at least, for two numbers on the axis


def percent(value: float, _=None) -> str:
    """Return a share as a number of an axis."""
    return f"{100 * value:.4g}%".replace("-", "−")


def plain_number(value: float, _=None) -> str:
    """Return a number of an axis as text: 0.01, 1000, 2·10⁵."""
    if value == 0 or 1e-4 < abs(value) < 1e5:
        return f"{value:g}".replace("-", "−")
    digits, _, power = f"{value:.0e}".partition("e")
    factor = {"1": "", "-1": "−"}.get(digits, f"{digits}·".replace("-", "−"))
    return f"{factor}10{str(int(power)).translate(_RAISED)}"


def label(text: str) -> str:
    """Return a text of others, such as a token's, as a label: harmless and of at most 20 signs and "…"."""
    shown = named(text[:LABEL])
    return shown if len(shown) <= LABEL and len(text) <= LABEL else f"{shown[:LABEL]}…"


@contextmanager
def _writable_texts(figure: Figure) -> Iterator[None]:
    """Replace for a while what the font cannot write."""
    texts = [(text, text.get_text()) for text in figure.findobj(Text)]
    axes = [axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)]
    ticks = [axis.get_major_formatter() for axis in axes]
    ticks = [(formatter, formatter.seq) for formatter in ticks if isinstance(formatter, FixedFormatter)]
    try:
        for text, content in texts:
            text.set_text(_writable(content))
        for formatter, names in ticks:
            formatter.seq = [_writable(name) for name in names]
        yield
    finally:
        for text, content in texts:
            text.set_text(content)
        for formatter, names in ticks:
            formatter.seq = names


def _writable(text: str) -> str:
    font = get_font(findfont("DejaVu Sans"))
    signs = [sign if sign == "\n" or font.get_char_index(ord(sign)) else ascii(sign)[1:-1] for sign in text]
    found = "".join(signs)
    return found if found == text or len(found) <= MOST_ESCAPED else f"{found[: MOST_ESCAPED - 1]}…"
