"""Style, axes and labels that all plots share, and how a figure becomes a PNG file or an SVG element of a page.

The colours are the ones of Okabe and Ito (2008), which colour-blind people can distinguish, without those that are hard
to read on a white or on a black page. Series also differ in marker, dash or hatch. In an SVG, everything neutral (text,
axes, grid, guide lines) takes the text colour of the page, so a plot fits a light and a dark theme.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.text import Text
from matplotlib.ticker import FixedFormatter, FixedLocator, NullFormatter

from ...artefacts.atomic import complete_file
from ..text import named
from .svg import inline_svg

# Colour of everything neutral: an SVG replaces it by `currentColor`, a PNG keeps it.
INK = "#16181d"
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
PURPLE = "#CC79A7"
GREY = "#858585"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, GREY)
MARKERS = ("o", "s", "^", "D", "v")
DASHES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
# Hatches are made of lines, because Matplotlib writes a hatch of dots to an SVG as thousands of curves.
HATCHES = ("", "////", "||||", "----", "\\\\\\\\")
STYLE = {
    "text.parse_math": False,  # a token like "$x$" must not be read as a formula
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
# Decorator of every function that draws or saves: our plots neither use nor change the settings of a user's notebook.
house_style = matplotlib.style.context(STYLE, after_reset=True)

# Above this number of points in a figure, the SVG holds the next layer of points as a picture, to stay small.
MOST_VECTORS = 1500
PNG_DPI = 144
# Resolution of those pictures.
LAYER_DPI = 110
# Longest label, in characters, for a text that is not ours, for example a token's.
LABEL = 20
# Longest text in a PNG, in characters, after escaping what its font lacks.
MOST_ESCAPED = 32
# An axis of nats is linear below this value, so it can show zero, and does not stress that 1e-9 differs from 1e-8.
LINEAR_NATS = 1e-3
_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


class Look(NamedTuple):
    """Look of a series: its colour, and a marker, dash or hatch that identifies it without colours."""

    colour: str
    marker: str
    dash: str | tuple
    hatch: str


def look_of(place: int) -> Look:
    """Return the look of the series with this index, from 0; the first 25 looks all differ."""
    # Every fifth series repeats a colour, and then takes another marker, dash and hatch.
    repeats, colour = divmod(place, len(COLOURS))
    other = (place + repeats) % len(COLOURS)
    return Look(
        colour=COLOURS[colour],
        marker=MARKERS[other],
        dash=DASHES[other],
        hatch=HATCHES[other],
    )


@house_style
def new_figure(
    title: str, x: str, y: str, *, size: tuple[float, float] = (6.4, 4.0), grid: str = "y"
) -> tuple[Figure, Axes]:
    """Return a new figure with one set of axes, and the axes.

    Args:
        title (`str`): Title of the plot.
        x, y (`str`): Labels of the axes, with units.
        size (`tuple[float, float]`, *optional*): Width and height, inches.
        grid (`str`, *optional*, defaults to `"y"`): Axis whose ticks have grid lines: "x", "y" or "both".
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
    """Write a figure to a PNG file, dark on white; the file appears under its name only once it is complete.

    Characters that Matplotlib's font lacks, for example Chinese ones, are written as escapes ("\\u4e2d").
    """
    with _writable_texts(figure), complete_file(path) as part:
        figure.savefig(part, format="png", dpi=PNG_DPI, facecolor="white")


@house_style
def to_svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an `<svg>` element for a page; a figure gives the same text each time.

    Args:
        figure (`Figure`): A figure of this package.
        prefix (`str`):
            Start of each id in the element, which keeps the ids of a page's plots apart: a letter, then letters,
            digits, "-" and "_".

    Raises:
        `ValueError`: if the prefix is empty or has other characters.
    """
    content = io.BytesIO()
    with warnings.catch_warnings():
        # Matplotlib measures texts with its own font, but the browser shows them with fonts that have these characters.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(content, format="svg", dpi=LAYER_DPI, facecolor="none")
    return inline_svg(content.getvalue(), prefix, neutral=INK)


def add_points(
    axes: Axes, x: np.ndarray, y: np.ndarray, *, colour: str, marker: str, label: str, size: float, alpha: float = 0.85
) -> None:
    """Draw points as one series; without points there is no series.

    Args:
        axes (`Axes`): Where they are drawn.
        x, y (`np.ndarray`): Finite coordinates, `(N,)`.
        colour, marker, label (`str`): Look and name of the series.
        size (`float`): Size of the marker, points.
        alpha (`float`, *optional*, defaults to 0.85): Opacity, 0 to 1.
    """
    if len(x) == 0:
        return

    vectors = len(x)
    for panel in axes.figure.axes:
        for line in panel.lines:
            if not line.get_rasterized():
                vectors += len(line.get_xdata())

    axes.plot(
        x,
        y,
        marker,
        color=colour,
        markersize=size,
        markeredgewidth=0,
        alpha=alpha,
        label=label,
        rasterized=vectors > MOST_VECTORS,
    )


def add_legend(figure: Figure, axes: Axes, *, columns: int) -> None:
    """Put the legend of the axes below the figure, in at most so many columns, if any series has a name."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        columns = min(columns, len(handles))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, handlelength=3.0)


def say_empty(axes: Axes, text: str) -> None:
    """Write in the middle of empty axes why nothing is drawn, and remove their ticks."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize="small")
    axes.set(xticks=[], yticks=[])


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name the rows 0, 1, ... of the y axis, with row 0 at the top."""
    count = len(names)
    locator = FixedLocator(range(count))
    formatter = FixedFormatter(list(names))
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_major_formatter(formatter)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(count - 0.4, -0.6)


def log_axis(axes: Axes, *names: str) -> None:
    """Make axes ("x", "y") logarithmic, with plain text as numbers."""
    for name in names:
        set_scale = getattr(axes, f"set_{name}scale")
        set_scale("log")
        axis = getattr(axes, f"{name}axis")
        minor = partial(_minor_number, axis)
        axis.set_major_formatter(plain_number)
        axis.set_minor_formatter(minor)


def nats_axis(axes: Axes, *names: str) -> None:
    """Make axes ("x", "y") of nats logarithmic above 0.001 nats, and linear around zero."""
    for name in names:
        set_scale = getattr(axes, f"set_{name}scale")
        set_scale("symlog", linthresh=LINEAR_NATS, linscale=0.4)
        axis = getattr(axes, f"{name}axis")
        axis.set_major_formatter(plain_number)
        axis.set_minor_formatter(NullFormatter())


def limit_nats(set_limits: Callable, values: np.ndarray) -> tuple[float, float]:
    """Set the limits of an axis of nats so that it holds all values, and zero if they come near it; return the limits.

    Args:
        set_limits (`Callable`): `set_xlim` or `set_ylim` of the axes.
        values (`np.ndarray`): Finite values, nats, `(N,)`, at least one.
    """
    near_zero = 10 * LINEAR_NATS
    low = values.min()
    most = max(values.max(), near_zero)
    high = 1.4 * most
    if low < 0:
        bottom = 1.4 * low
    elif low < near_zero:
        bottom = 0.0
    else:
        # The axis spans at least a decade, so that it has two numbers.
        bottom = min(low / 1.4, high / 20)
    return set_limits(bottom, high)


def limit_both(axes: Axes, x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Give both axes of nats the same limits, which hold all of x and y, `(N,)` each; return these limits."""
    values = np.concatenate([x, y])
    limits = limit_nats(axes.set_xlim, values)
    limit_nats(axes.set_ylim, values)
    return limits


def percent(value: float, _=None) -> str:
    """Return the number of an axis tick for a share, in percent."""
    return f"{100 * value:.4g}%".replace("-", "−")


def plain_number(value: float, _=None) -> str:
    """Return the number of an axis tick as plain text: 0.01, 1000, 2·10⁵."""
    if value == 0 or 1e-4 < abs(value) < 1e5:
        return f"{value:g}".replace("-", "−")

    digits, _, exponent = f"{value:.0e}".partition("e")
    factors = {"1": "", "-1": "−"}
    factor = factors.get(digits, f"{digits}·".replace("-", "−"))
    power = str(int(exponent)).translate(_RAISED)
    return f"{factor}10{power}"


def label(text: str) -> str:
    """Return a label for a text that is not ours, for example a token's: harmless, at most 20 characters and "…"."""
    shown = named(text[:LABEL])
    if max(len(shown), len(text)) <= LABEL:
        return shown
    return f"{shown[:LABEL]}…"


def _minor_number(axis: Axis, value: float, _) -> str:
    """Return the number of a tick between two powers of ten: only 2 and 5 have one, and only where there is room."""
    low, high = sorted(axis.get_view_interval())
    has_room = high < 30 * low
    if has_room and f"{value:.0e}".startswith(("2", "5")):
        return plain_number(value)
    return ""


@contextmanager
def _writable_texts(figure: Figure) -> Iterator[None]:
    """Replace characters that the font of a PNG lacks in all texts of a figure, until the block ends."""
    texts = [(text, text.get_text()) for text in figure.findobj(Text)]
    ticks = []
    for panel in figure.axes:
        for axis in (panel.xaxis, panel.yaxis):
            formatter = axis.get_major_formatter()
            if isinstance(formatter, FixedFormatter):
                ticks.append((formatter, formatter.seq))

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
    """Return a text with escapes for the characters that the font of a PNG lacks, cut where these make it too long."""
    font = get_font(findfont("DejaVu Sans"))
    escapes = {}
    for character in text:
        code = ord(character)
        if character != "\n" and not font.get_char_index(code):
            escapes[code] = ascii(character)[1:-1]

    written = text.translate(escapes)
    if escapes and len(written) > MOST_ESCAPED:
        return f"{written[: MOST_ESCAPED - 1]}…"
    return written
