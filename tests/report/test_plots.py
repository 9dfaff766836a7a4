"""Tests of the plots: they draw the given data, as a PNG and as an SVG for a page, for any text of a token."""

import functools
import re
import unicodedata
from itertools import combinations
from xml.etree import ElementTree

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from matplotlib.text import Text

from trl_opd.artefacts.gradient_table import Study
from trl_opd.report.plots import canvas
from trl_opd.report.plots import evidence as evidence_plots
from trl_opd.report.plots import runs as run_plots
from trl_opd.report.plots.canvas import save_png, to_svg
from trl_opd.report.plots.evidence import plot_forest, plot_gradients
from trl_opd.report.plots.rocks import plot_before_after, plot_families, plot_funnel, plot_sweep
from trl_opd.report.plots.runs import plot_accuracy, plot_arms, plot_curves, plot_divergence, plot_phases
from trl_opd.report.plots.svg import inline_svg
from trl_opd.report.text import visible
from trl_opd.rocks.cutoff import Sweep

from tests.helpers.html_tree import Html

# Plots must not warn; deprecation warnings of Matplotlib's own dependencies are hidden from users anyway.
pytestmark = pytest.mark.filterwarnings("error", "ignore::DeprecationWarning")

NAN = float("nan")
LARGEST = 150_000  # bytes of an SVG
SVG = "{http://www.w3.org/2000/svg}"
TAGS = {"svg", "g", "path", "use", "text", "defs", "clipPath", "rect", "pattern", "image"}
ATTRIBUTES = {"id", "href", "d", "x", "y", "width", "height", "transform", "fill", "stroke", "opacity", "clip-path"}
ATTRIBUTES |= {"fill-opacity", "fill-rule", "font-size", "text-anchor", "patternUnits"}
ATTRIBUTES |= {f"stroke-{what}" for what in ("width", "opacity", "linecap", "linejoin", "dasharray", "dashoffset")}
COLOURS = {colour.lower() for colour in canvas.COLOURS}
# Texts that a model can write, and the start of the label that each must become.
HOSTILE = {
    "</text><script>alert(1)</script>": "</text><script>alert…",
    "$x$": "$x$",
    "$\\frac{1": "$\\frac{1",
    "a\x00\x1b[31m": "a\\x00\\x1b[31m",
    "\u202eevil\u2066": "\\u202eevil\\u2066",
    "\ud800": "\\ud800",
    "x" * 100_000: "x" * 20 + "…",
    "\u202e" * 100_000: "\\u202e\\u202e\\u202e\\u…",
    " the\n": "␣the↵",
    "中文": "中文",
    "]]>&amp;<!--": "]]>&amp;<!--",
}


def world(types: int = 300, rocks: int = 20):
    """Return count, mean KL and whether it is a rock, for each type."""
    rng = np.random.default_rng(0)
    count = np.floor(20 * types / np.arange(1, types + 1)).astype(int)
    mean_kl = np.exp(rng.normal(-2, 1, types))
    is_rock = np.zeros(types, bool)
    is_rock[np.argsort(-count * mean_kl)[:rocks]] = True
    return count, mean_kl, is_rock


def forbidden(id: int, kind: str, effect: float, text: str = "a") -> dict:
    """Return an arm of a probe."""
    return {"kind": kind, "ids": [id], "effect": effect, "ci95": [effect - 0.1, effect + 0.2], "texts": [text]}


PROBE = {
    "problems": 50,
    "arms": [
        {**forbidden(0, "rocks", -0.5), "ids": [1, 2], "texts": ["b", "c"]},
        forbidden(1, "rock", -0.2, " b"),
        forbidden(3, "control", -0.1, "d"),
        {**forbidden(4, "other", 0.0), "ci95": None},
        forbidden(5, "other", 0.3, "�"),
    ],
}


def study(sizes=(40, 30, 50), *, early: bool = True) -> Study:
    """Return a gradient study with so many types of each group."""
    rng = np.random.default_rng(0)
    total = sum(sizes)
    columns = {"group": np.repeat(["rock", "rare", "random"], sizes), "count": rng.integers(1, 5000, total)}
    for name in ("norm", "norm_unbiased", "norm_matched", "mean_kl", "mean_kl_early"):
        columns[name] = np.exp(rng.normal(-1, 1, total))
    for name in ("cos_balanced", "cos_balanced_without", "cos_matched"):
        columns[name] = rng.normal(0, 0.1, total)
    return Study(columns, 3, early)


SWEEP = Sweep([10, 20, 30], [0.3, 0.5, 0.6], {50: [0.9, 0.8, 0.6], 100: [0.95, 0.9, 0.7]}, 20)
ACCURACY = {
    "uniform": [(0, 0.1, 0.05, 0.2), (5, 0.6, 0.5, 0.7), (10, 0.7, 0.6, 0.8)],
    "rock": [(0, 0.1, None, None), (10, 0.5, None, None)],
}
DIVERGENCE = {
    "uniform": [(5, 0.9, 0.4, 0.5), (10, 0.8, None, 0.1)],
    "control": [(5, 0.9, None, 0.4), (10, 0.7, None, 0.2)],
}
ENTROPY = {"uniform": [(1, 1.5), (2, None), (3, 1.2)], "random": [(1, 1.4), (2, 1.3), (3, 1.1)]}
PHASES = {"uniform": {"generate": 3.0, "teacher": 1.0, "student": 2.0}, "rock": {"generate": 2.5, "student": 1.5}}
RESULTS = {"uniform": (0.6, 0.5, 0.7), "rock": (0.5, 0.4, 0.6)}
DIFFERENCES = {"rock": (-0.1, -0.15, 0.01)}
FAMILIES = (["math", "digit"], [0.2, 0.5], [0.6, 0.1])
FIGURES = {
    "accuracy": lambda: plot_accuracy(ACCURACY, 100),
    "divergence": lambda: plot_divergence(DIVERGENCE, "KL(student ‖ teacher)"),
    "curves": lambda: plot_curves(ENTROPY, "Entropy of the student", "mean entropy (nats per token)"),
    "phases": lambda: plot_phases(PHASES),
    "arms": lambda: plot_arms(RESULTS, DIFFERENCES, "greedy accuracy on 500 problems"),
    "funnel": lambda: plot_funnel(*world(), texts={id: f"t{id}" for id in range(300)}),
    "before_after": lambda: plot_before_after(world()[1], world()[1] / 2, world()[2]),
    "sweep": lambda: plot_sweep(SWEEP),
    "families": lambda: plot_families(*FAMILIES),
    "forest": lambda: plot_forest(PROBE),
    "gradients": lambda: plot_gradients(study()),
}
every_figure = pytest.mark.parametrize("name", FIGURES)


@functools.cache
def figure_of(name: str):
    return FIGURES[name]()


@functools.cache
def svg_of(name: str) -> str:
    return to_svg(figure_of(name), "a")


def elements(svg: str, tag: str) -> list[ElementTree.Element]:
    return list(ElementTree.fromstring(svg).iter(f"{SVG}{tag}"))


def texts(svg: str) -> list[str]:
    return [element.text for element in elements(svg, "text")]


def rows(svg: str, names: list[str]) -> list[str]:
    """Return the names that are shown, from the top."""
    found = sorted(elements(svg, "text"), key=lambda element: float(element.get("y")))
    return [element.text for element in found if element.text in names]


def drawn(axes, label: str):
    """Return x and y of the line with this name."""
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return list(line.get_xdata()), list(line.get_ydata())


# PNG and SVG


@every_figure
@pytest.mark.slow
def test_png_is_dark_on_white_and_an_svg_is_the_same_before_and_after(name, tmp_path):
    figure = FIGURES[name]()
    save_png(figure, tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    pixels = imread(tmp_path / "plot.png")
    assert pixels.shape[:2] == tuple(int(144 * side) for side in figure.get_size_inches()[::-1])
    assert (pixels[:, 0] == 1).all(), "the left edge is white, and not transparent"
    assert (pixels[..., :3].max(-1) < 0.15).sum() > 500, "text is dark"
    assert any(len(np.unique(pixels[..., channel])) > 50 for channel in range(3))
    renamed = re.sub(r'(id="|#)b-(\d)', r"\1a-\2", to_svg(figure, "b"))
    is_same = renamed == svg_of(name)  # pytest would take minutes to show how they differ
    assert is_same


@every_figure
def test_svg_is_one_harmless_element_with_the_text_colour_of_its_page(name):
    svg = svg_of(name)
    assert svg.startswith("<svg ")
    assert svg.endswith("</svg>")
    assert len(svg.encode()) < LARGEST
    assert "<!" not in svg
    assert "<?" not in svg
    root = ElementTree.fromstring(svg)
    assert re.fullmatch(r"0 0 [\d.]+ [\d.]+", root.get("viewBox"))
    assert (root.get("width"), root.get("height")) == ("100%", None)
    assert root.get("fill") == "currentColor", "what Matplotlib leaves out because it is black"
    assert root.get("font-family") == "system-ui, sans-serif"
    assert len(texts(svg)) > 5, "text is text"
    for element in list(root.iter())[1:]:
        assert element.tag.removeprefix(SVG) in TAGS
        assert element.attrib.keys() <= ATTRIBUTES, "neither styles nor event handlers"
        for paint in {element.get("fill"), element.get("stroke")} - {None}:
            assert paint in {"none", "currentColor"} | COLOURS or re.fullmatch(r"url\(#a-\d+\)", paint)
        if element.tag == f"{SVG}text":
            assert element.get("fill") in (None, "currentColor")
    assert COLOURS & set(re.findall("#[0-9a-f]{6}", svg)), "the series have their own colours"


@every_figure
def test_every_id_of_an_svg_is_used_and_starts_with_the_prefix(name):
    svg = svg_of(name)
    ids = re.findall(r' id="([^"]*)"', svg)
    assert ids
    assert len(ids) == len(set(ids))
    assert all(id.startswith("a-") for id in ids)
    used = re.findall(r'href="#([^"]*)"', svg) + re.findall(r"url\(#([^)]*)\)", svg)
    assert set(used) == set(ids), "and none is left over"


@every_figure
def test_every_axis_has_a_label(name):
    figure = figure_of(name)
    titles = [figure.get_suptitle(), *(axes.get_title("left") for axes in figure.axes)]
    assert any(len(title) > 15 for title in titles)
    for axes in figure.axes:
        named = isinstance(axes.yaxis.get_major_formatter(), matplotlib.ticker.FixedFormatter)
        assert axes.get_ylabel() or named
        assert axes.get_xlabel() or axes.get_xticklabels()[0].get_text() == "as published"


@pytest.mark.parametrize("second", ["#0072b2", "#009e73"])
def test_markers_with_one_look_get_it_from_their_group(second):
    marker = '<use xmlns="http://www.w3.org/2000/svg" href="#m" x="1.23456" y="2" style="fill: {}; opacity: 0.5"/>'
    group = f"<g>{marker.format('#0072b2')}{marker.format(second)}</g>"
    content = f'<svg xmlns="{SVG[1:-1]}" viewBox="0 0 72 36"><path id="m" d="M 0 0"/>{group}</svg>'
    svg = inline_svg(content.encode(), "a", neutral="#000000")
    assert 'viewBox="0 0 72 36"' in svg
    uses, (group,) = elements(svg, "use"), elements(svg, "g")
    looks = [(use.get("fill") or group.get("fill"), use.get("opacity") or group.get("opacity")) for use in uses]
    assert looks == [("#0072b2", "0.5"), (second, "0.5")]
    assert [use.get("x") for use in uses] == ["1.23", "1.23"]
    assert ("fill" in group.attrib) == (second == "#0072b2")


@pytest.mark.parametrize("prefix", ["", "1a", 'a"', "a b", "é"])
def test_invalid_prefix_is_an_error(prefix):
    with pytest.raises(ValueError, match="cannot start the ids of a page"):
        inline_svg(b"", prefix, neutral="#000000")


@pytest.mark.parametrize("name", ["curves", "funnel", "arms"])
@pytest.mark.slow
def test_settings_of_a_notebook_are_ignored_and_kept(name, tmp_path):
    save_png(figure_of(name), tmp_path / "plot.png")
    with matplotlib.style.context(["dark_background", {"font.size": 20, "svg.fonttype": "path", "svg.hashsalt": "x"}]):
        before = dict(matplotlib.rcParams)
        figure = FIGURES[name]()
        svgs = [to_svg(figure, "a")]
        save_png(figure, tmp_path / "again.png")
        assert dict(matplotlib.rcParams) == before
    svgs.append(to_svg(figure, "a"))
    is_same = [svg == svg_of(name) for svg in svgs]
    is_same.append((tmp_path / "again.png").read_bytes() == (tmp_path / "plot.png").read_bytes())
    assert is_same == [True, True, True]


def test_colours_have_enough_contrast_on_white_and_on_black():
    def luminance(colour: str) -> float:
        parts = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for colour in canvas.COLOURS:
        assert 1.05 / (luminance(colour) + 0.05) >= 3, "WCAG's contrast of graphics"
        assert (luminance(colour) + 0.05) / (luminance("#121212") + 0.05) >= 3


def test_series_differ_without_colours():
    looks = [canvas.look_of(place) for place in range(25)]
    assert len(set(looks)) == 25
    for one, other in combinations(looks[:5], 2):
        assert one.marker != other.marker
        assert one.dash != other.dash
        assert one.hatch != other.hatch
    for kinds in (evidence_plots.KINDS, evidence_plots.GROUP_LOOKS):
        assert len({look[1] for look in kinds.values()}) == len(kinds)


NUMBERS = {0: "0", 0.01: "0.01", 1000: "1000", -2: "−2", 1e5: "10⁵", 2e6: "2·10⁶", 1e-7: "10⁻⁷", -1e5: "−10⁵"}


@pytest.mark.parametrize("number", NUMBERS)
def test_tick_numbers_are_plain_text(number):
    assert canvas.plain_number(number) == NUMBERS[number]


# Texts of a model


HOSTILE_POINTS = {text: [(0, 0.5, None, None)] for text in HOSTILE}
HOSTILE_PLOTS = {
    "funnel": lambda: plot_funnel(range(11, 0, -1), np.ones(11), np.ones(11), texts=dict(enumerate(HOSTILE))),
    "forest": lambda: plot_forest({"problems": 5, "arms": [forbidden(1, "rock", 0.1, text) for text in HOSTILE]}),
    "families": lambda: plot_families(list(HOSTILE), [0.5] * len(HOSTILE), [0.5] * len(HOSTILE)),
    "arms of phases": lambda: plot_phases({text: {"generate": 1.0} for text in HOSTILE}),
    "phases": lambda: plot_phases({"uniform": dict.fromkeys(HOSTILE, 1.0)}),
    "arms": lambda: plot_arms(dict.fromkeys(HOSTILE, (0.5, 0.4, 0.6)), {}, "accuracy"),
    "accuracy": lambda: plot_accuracy(HOSTILE_POINTS, None),
    "curves": lambda: plot_curves({text: [(0, 0.5)] for text in HOSTILE}, "A title", "a unit"),
    "divergence": lambda: plot_divergence(HOSTILE_POINTS, "KL"),
}


def assert_harmless(svg: str) -> None:
    assert {element.tag for element in Html(svg).root} <= {tag.lower() for tag in TAGS}
    assert not [sign for sign in svg if unicodedata.category(sign) in ("Cc", "Cf", "Cs")]


@pytest.mark.parametrize("name", HOSTILE_PLOTS)
@pytest.mark.slow
def test_hostile_texts_become_short_harmless_labels(name, tmp_path):
    figure = HOSTILE_PLOTS[name]()
    if name in ("funnel", "forest"):
        save_png(figure, tmp_path / "plot.png")
    svg = to_svg(figure, "a")
    assert_harmless(svg)
    found = set()
    for element in Html(svg).root.all("text"):
        starts = [start for start in HOSTILE.values() if element.text.startswith(start)]
        found.update(starts)
        assert not starts or len(element.text) <= 85
    missing = list(HOSTILE.values())[8:] if name == "funnel" else []  # which names eight types
    assert found == set(HOSTILE.values()) - set(missing), "each text itself is shown, not as a formula"


@pytest.mark.parametrize("plot", [lambda text: plot_arms({}, {}, text), lambda text: plot_divergence({}, text)])
def test_hostile_name_of_a_metric_becomes_a_harmless_label(plot):
    text = "".join(text[:5] for text in HOSTILE)
    svg = to_svg(plot(text), "a")
    assert_harmless(svg)
    assert any(visible(text, 60) in label for label in texts(svg))


@pytest.mark.slow
def test_png_escapes_characters_that_its_font_lacks(tmp_path):
    pictures = []
    for text in ("中", "文", "中文字中文字中文字中文字中文字中文字中文字"):
        figure = plot_families([text], [0.5], [0.5])
        before = [shown.get_text() for shown in figure.findobj(Text)]
        save_png(figure, tmp_path / "plot.png")
        assert [shown.get_text() for shown in figure.findobj(Text)] == before
        assert canvas.label(text) in texts(to_svg(figure, "a"))
        pictures.append((tmp_path / "plot.png").read_bytes())
    assert len(set(pictures)) == 3, "missing characters would be the same box"
    assert canvas._writable("中‖文") == "\\u4e2d‖\\u6587"
    assert len(canvas._writable("中" * 20)) == 32


def test_failed_write_of_a_png_keeps_the_texts_of_the_figure(tmp_path):
    figure = plot_families(["中"], [0.5], [0.5])
    with pytest.raises(FileNotFoundError):
        save_png(figure, tmp_path / "none" / "plot.png")
    assert "中" in texts(to_svg(figure, "a"))


# Runs


def test_accuracy_is_drawn_with_intervals():
    (axes,) = figure_of("accuracy").axes
    assert drawn(axes, "uniform (all weigh alike)") == ([0, 5, 10], [0.1, 0.6, 0.7])
    assert drawn(axes, "rock (rocks weigh less)") == ([0, 10], [0.1, 0.5])
    (band,) = axes.collections
    edge = {tuple(point) for point in band.get_paths()[0].vertices.round(6).tolist()}
    assert edge == {(0, 0.05), (5, 0.5), (10, 0.6), (0, 0.2), (5, 0.7), (10, 0.8)}
    assert axes.get_ylabel() == "accuracy on 100 problems"
    assert axes.get_ylim() == (-0.02, 1.02)
    assert "95 %" in axes.get_title("left")
    bare = plot_accuracy({"rock": ACCURACY["rock"]}, None).axes[0]
    assert (bare.get_ylabel(), "95 %" in bare.get_title("left"), len(bare.collections)) == ("accuracy", False, 0)
    (whisker,) = plot_accuracy({"rock": [(0, 0.5, 0.4, 0.6)]}, None).axes[0].collections[1:]
    assert whisker.get_segments()[0].tolist() == [[0, 0.4], [0, 0.6]]
    rewards = plot_accuracy({"rock": [(0, -3.0, None, None), (1, 2.0, None, None)]}, None).axes[0]
    assert rewards.get_ylim() == (-3.02, 2.02)


def test_divergence_is_drawn_by_kind_and_arm():
    (axes,) = figure_of("divergence").axes
    found = [(line.get_color(), line.get_linestyle(), line.get_ydata().tolist()) for line in axes.lines]
    found = [line for line in found if len(line[2])]
    expected = [
        (canvas.BLUE, "-", [0.9, 0.8]),
        (canvas.BLUE, ":", [0.4, NAN]),
        (canvas.BLUE, "--", [0.5, 0.1]),
        (canvas.GREEN, "-", [0.9, 0.7]),
        (canvas.GREEN, "--", [0.4, 0.2]),
    ]
    assert [line[:2] for line in found] == [line[:2] for line in expected]
    np.testing.assert_equal([line[2] for line in found], [line[2] for line in expected])
    assert axes.get_ylabel() == "mean KL(student ‖ teacher) per token (nats)"
    assert axes.get_ylim()[0] == 0
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["uniform (all weigh alike)", "control (controls weigh less)", "rocks", "controls", "the rest"]
    no_controls = plot_divergence({"uniform": [(1, 0.5, None, 0.1)]}, "KL").axes[0]
    assert no_controls.get_legend_handles_labels()[1] == ["uniform (all weigh alike)", "rocks", "the rest"]


def test_short_curves_are_drawn_as_given_and_long_ones_as_means():
    (axes,) = figure_of("curves").axes
    np.testing.assert_equal(drawn(axes, "uniform (all weigh alike)"), ([1, 2, 3], [1.5, NAN, 1.2]))
    assert (axes.get_title("left"), axes.get_ylabel()) == ("Entropy of the student", "mean entropy (nats per token)")
    points = [(step, None if step == 2 else float(step)) for step in range(1, 1001)]
    (long,) = plot_curves({"a": points}, "Long", "unit").axes
    steps, values = drawn(long, "a")
    assert (steps[:3], steps[-1]) == ([3, 6, 9], 1000)
    assert values[:2] + values[-1:] == [2.0, 5.0, 1000.0], "the mean of 1 and 3, of 4, 5 and 6, and of the last alone"
    assert "mean of 3 values" in long.get_xlabel()


@pytest.mark.parametrize(("top", "limits"), [(0.03, (-0.002, 0.102)), (0.4, (-0.01, 0.51)), (0.6, (-0.02, 1.02))])
def test_axis_of_a_share_starts_at_zero_in_percent_and_is_not_too_short(top, limits):
    (axes,) = plot_curves({"a": [(1, 0.02), (2, top)]}, "Cut", "share", share=True).axes
    assert axes.get_ylim() == pytest.approx(limits)
    assert axes.yaxis.get_major_formatter()(0.0) == "0%"


@pytest.mark.slow
def test_long_noise_stays_a_small_svg():
    points = 20_000
    rng = np.random.default_rng(0)
    noise = {arm: list(zip(range(points), rng.random(points).tolist(), strict=True)) for arm in run_plots.ARMS}
    assert len(to_svg(plot_curves(noise, "Noise", "unit"), "a")) < LARGEST
    wide = {arm: [(step, value, value - 0.1, value + 0.1) for step, value in noise[arm]] for arm in noise}
    assert len(to_svg(plot_accuracy(wide, 10), "a")) < LARGEST
    assert len(to_svg(plot_divergence(wide, "KL"), "a")) < LARGEST


def test_phases_are_stacked():
    (axes,) = figure_of("phases").axes
    bars = {c.get_label(): [(round(b.get_x(), 6), b.get_width()) for b in c] for c in axes.containers}
    assert bars == {
        "generate": [(0, 3.0), (0, 2.5)],
        "teacher": [(3.0, 1.0), (2.5, 0.0)],
        "student": [(4.0, 2.0), (2.5, 1.5)],
    }
    assert len({bar.get_hatch() for bar in axes.patches}) == 3
    assert rows(svg_of("phases"), ["uniform", "rock"]) == ["uniform", "rock"], "the first arm is at the top"
    assert axes.get_xlabel() == "mean seconds of an optimizer step"


def test_arms_are_drawn_with_intervals():
    figure = figure_of("arms")
    left, right = figure.axes
    lines = [(line.get_xdata().tolist(), line.get_ydata().tolist()) for line in left.lines]
    assert lines == [([0.5, 0.7], [0, 0]), ([0.6], [0]), ([0.4, 0.6], [1, 1]), ([0.5], [1])]
    interval, point, zero = ((list(line.get_xdata()), list(line.get_ydata())) for line in right.lines)
    assert (interval, point) == (([-0.15, 0.01], [1, 1]), ([-0.1], [1]))
    assert zero[0] == [0.0, 0.0]
    shown = texts(svg_of("arms"))
    assert {"uniform", "rock", "40%", "−10", "greedy accuracy on 500 problems"} <= set(shown)
    without = plot_arms({"uniform": (0.5, None, None)}, {}, "accuracy")
    assert len(without.axes[0].lines) == 1
    assert "95 %" in figure.get_suptitle()
    assert "95 %" not in without.get_suptitle()
    assert {"uniform", "Nothing was compared."} <= set(texts(to_svg(without, "a")))


def test_known_arms_have_a_fixed_look_and_others_take_free_ones():
    one = plot_curves({"rock": [(1, 1.0)]}, "t", "y").axes[0].lines[0]
    other = plot_curves({"mine": [(1, 1.0)], "yours": [(1, 1.0)], "rock": [(1, 1.0)]}, "t", "y").axes[0].lines
    assert other[2].get_color() == one.get_color() == canvas.VERMILLION
    assert len({line.get_color() for line in other}) == 3


# Token types


def test_funnel_draws_every_type_that_occurs():
    count, mean_kl, is_rock = world()
    count[5], mean_kl[7] = 0, NAN
    (axes,) = plot_funnel(count, mean_kl, is_rock).axes
    shown = (count > 0) & np.isfinite(mean_kl)
    for name, chosen in (("rocks", is_rock), ("other types", ~is_rock)):
        assert drawn(axes, name) == (count[shown & chosen].tolist(), mean_kl[shown & chosen].tolist())
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "symlog")
    low, high = axes.get_ylim()
    assert low <= 0 < np.nanmax(mean_kl) < high
    assert axes.get_xlim()[0] < count[shown].min() <= count[shown].max() < axes.get_xlim()[1]
    assert plot_funnel([3, 4], [-0.1, -0.2], [True, False]).axes[0].get_ylim()[0] < -0.2


def test_band_of_the_funnel_is_made_of_quantiles():
    count = np.array([1] * 9 + [10] * 11 + [11] * 10 + [1000] * 4)
    mean_kl = np.arange(len(count), dtype=float)
    (axes,) = plot_funnel(count, mean_kl, np.zeros(len(count), bool)).axes
    steps, medians = drawn(axes, "their median")
    assert steps == pytest.approx([1, (10**11 * 11**10) ** (1 / 21)]), "four types are no bin"
    assert medians == [4.0, 19.0]
    (band,) = axes.collections
    edge = {tuple(point) for point in band.get_paths()[0].vertices.round(6).tolist()}
    middle = round(steps[1], 6)
    assert edge == {(1.0, 0.8), (1.0, 7.2), (middle, 11.0), (middle, 27.0)}


def test_funnel_names_the_rocks_with_the_highest_mass():
    count, mean_kl, is_rock = world()
    axes = plot_funnel(count, mean_kl, is_rock, texts={id: f"t{id}" for id in range(1, 300)}).axes[0]
    names = {note.get_text(): note.xy for note in axes.texts}
    rocks = np.flatnonzero(is_rock)
    first = rocks[np.argsort(-(count * mean_kl)[rocks])][:8].tolist()
    assert first != rocks[np.argsort(-count[rocks])][:8].tolist()
    assert names == {f"t{id}" if id else "(0)": (count[id], mean_kl[id]) for id in first}
    assert not plot_funnel(count, mean_kl, is_rock).axes[0].texts


@pytest.mark.parametrize("height", [0.0, 0.1, 5.0])
@pytest.mark.slow
def test_names_beside_the_funnel_do_not_overlap_and_stay_inside_the_figure(height):
    count, mean_kl, is_rock = world()
    mean_kl[is_rock] = height  # all at one height, also where the axis ends
    figure = plot_funnel(count, mean_kl, is_rock, texts={})
    (axes,) = figure.axes
    to_svg(figure, "a")
    boxes = [Text.get_window_extent(note) for note in axes.texts]
    assert len(boxes) == 8
    assert not any(one.overlaps(other) for one, other in combinations(boxes, 2))
    inside = figure.bbox
    assert all(inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in boxes)
    assert all(-1e-9 < note.xyann[1] <= 1 for note in axes.texts)


def test_before_and_after_are_drawn_around_the_diagonal():
    before, after = np.array([0.1, 0.2, NAN, 3.0]), np.array([0.05, 0.3, 0.1, NAN])
    (axes,) = plot_before_after(before, after, np.array([True, False, True, False])).axes
    assert drawn(axes, "rocks") == ([0.1], [0.05])
    assert drawn(axes, "other types") == ([0.2], [0.3])
    x, y = drawn(axes, "no change")
    assert x == y == list(axes.get_xlim()) == list(axes.get_ylim())
    better = plot_before_after([5.0, 0.5], [0.3, 0.02], [True, False]).axes[0]
    assert better.get_xlim() == better.get_ylim()
    assert better.get_xlim()[0] < 0.02 < 5 < better.get_xlim()[1]
    narrow = plot_before_after([0.5, 0.6], [0.4, 0.5], [True, False]).axes[0]
    assert 0.01 < narrow.get_xlim()[0] < 0.4, "far from zero it is not shown"
    assert narrow.get_xlim()[1] > 10 * narrow.get_xlim()[0]
    assert plot_before_after([0.5, 0.001], [0.4, 0.5], [True, False]).axes[0].get_xlim()[0] == 0
    rock, other = axes.lines[1], axes.lines[0]
    assert rock.get_marker() != other.get_marker()


@pytest.mark.slow
def test_svg_holds_many_types_as_a_picture_and_few_as_vectors():
    count, mean_kl, is_rock = world(60_000, 100)
    for figure in (plot_funnel(count, mean_kl, is_rock), plot_before_after(mean_kl, mean_kl[::-1], is_rock)):
        rasterized = {line.get_label(): line.get_rasterized() for line in figure.axes[0].lines}
        assert rasterized["other types"]
        assert not rasterized["rocks"]
        svg = to_svg(figure, "a")
        assert len(elements(svg, "image")) == 1
        assert elements(svg, "image")[0].get("href").startswith("data:image/png;base64,")
        assert len(svg.encode()) < LARGEST
    assert not elements(to_svg(plot_funnel(*world()), "a"), "image")
    svg = to_svg(plot_funnel(*world(1400, 100)), "a")
    assert not elements(svg, "image")
    assert len(elements(svg, "use")) > 1400
    assert len(svg.encode()) < LARGEST
    assert len(to_svg(plot_gradients(study((300, 200, 200))), "a").encode()) < LARGEST


def test_sweep_is_drawn_with_and_without_stability():
    (axes,) = figure_of("sweep").axes
    assert drawn(axes, "coverage: share of the divergence") == ([10, 20, 30], [0.3, 0.5, 0.6])
    assert drawn(axes, "overlap (Jaccard) of 50 rollouts and 50 others") == ([10, 20, 30], [0.9, 0.8, 0.6])
    assert drawn(axes, "overlap (Jaccard) of 100 rollouts and 100 others") == ([10, 20, 30], [0.95, 0.9, 0.7])
    assert drawn(axes, "chosen: K = 20")[0] == [20, 20]
    assert drawn(axes, "least overlap: 0.7")[1] == [0.7, 0.7]
    (alone,) = plot_sweep(Sweep([10, 20], [0.3, 0.5], {}, None)).axes
    assert alone.get_legend_handles_labels()[1] == ["coverage: share of the divergence"]
    assert "coverage only" in alone.get_title("left")
    assert "coverage only" not in axes.get_title("left")


def test_families_have_two_bars_each():
    (axes,) = figure_of("families").axes
    bars = {c.get_label(): [(round(b.get_y() + b.get_height() / 2), b.get_width()) for b in c] for c in axes.containers}
    assert bars == {"of the tokens": [(0, 0.2), (1, 0.5)], "of the divergence": [(0, 0.6), (1, 0.1)]}
    assert len({bar.get_hatch() for bar in axes.patches}) == 2
    assert rows(svg_of("families"), ["math", "digit"]) == ["math", "digit"]


# Evidence


def test_forest_has_a_row_for_each_arm_with_an_interval():
    (axes,) = figure_of("forest").axes
    assert drawn(axes, "all rocks at once") == ([-0.5], [0])
    assert drawn(axes, "rock") == ([-0.2], [1])
    assert drawn(axes, "control") == ([-0.1], [2])
    assert drawn(axes, "other") == ([0.3], [3])
    segments = [segment.tolist() for lines in axes.collections for segment in lines.get_segments()]
    assert [-0.6, 0] in [start for start, _ in segments]
    assert sorted(end[1] for _, end in segments) == [0, 1, 2, 3]
    np.testing.assert_allclose(sorted(end[0] for _, end in segments), [-0.3, 0.0, 0.1, 0.5], atol=1e-9)
    names = ["all rocks at once", "␣b (1)", "d (3)", "� (5)"]
    assert rows(svg_of("forest"), names) == [*names, "all rocks at once"], "and the legend"
    assert "(50 problems)" in axes.get_xlabel()


def test_long_forest_shows_both_ends_and_says_so():
    arms = [forbidden(id, "other", id / 100, f"t{id}") for id in range(100)]
    (axes,) = plot_forest({"problems": 5, "arms": arms}).axes
    effects, rows = drawn(axes, "other")
    assert effects == [id / 100 for id in (*range(30), *range(70, 100))]
    assert rows == list(range(60))
    assert "the 30 at each end of 100" in axes.get_title("left")


@pytest.mark.slow
def test_gradients_are_drawn_by_group():
    found = study()
    figure = plot_gradients(found)
    scatter, norms, cosines, change = figure.axes
    for group, name in (("rock", "rocks"), ("rare", "rare, high KL"), ("random", "random rest")):
        chosen = found.columns["group"] == group
        assert drawn(scatter, name) == (found.columns["count"][chosen].tolist(), found.of(group, "norm").tolist())
        early = found.columns["mean_kl_early"][chosen].tolist()
        assert drawn(change, name) == (early, found.columns["mean_kl"][chosen].tolist())
    x, y = scatter.lines[-1].get_data()
    assert y[0] / y[1] == pytest.approx(np.sqrt(x[1] / x[0])), "noise alone"
    for axes, column in ((norms, "norm"), (cosines, "cos_balanced")):
        medians = [line.get_ydata()[0] for line in axes.lines if len(set(line.get_ydata())) == 1]
        assert any(value == pytest.approx(np.median(found.of("rare", column))) for value in medians)
        assert len(axes.patches) == 9
    assert "No earlier occurrences were given (--early)." in texts(to_svg(plot_gradients(study(early=False)), "a"))
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["rocks", "rare, high KL", "random rest", "1/√n: what noise alone would give"]


# Little or no data


def gradients_of(value: float) -> Study:
    """Return a gradient study in which every norm and every early divergence is this value."""
    same = np.full(3, value)
    return Study({**study((1, 1, 1)).columns, "norm": same, "mean_kl_early": same}, 3, True)


NOTHING = {
    "accuracy": lambda: plot_accuracy({}, 5),
    "accuracy of no points": lambda: plot_accuracy({"uniform": []}, 5),
    "accuracy of one point": lambda: plot_accuracy({"uniform": [(0, 0.5, 0.5, 0.5)]}, 1),
    "divergence": lambda: plot_divergence({}, "KL"),
    "divergence of nothing": lambda: plot_divergence({"uniform": [(1, None, None, None)]}, "KL"),
    "divergence of zeros": lambda: plot_divergence({"uniform": [(1, 0.0, 0.0, 0.0)]}, "KL"),
    "curves": lambda: plot_curves({}, "t", "y"),
    "curves of no points": lambda: plot_curves({"uniform": []}, "t", "y"),
    "curves of NaN": lambda: plot_curves({"uniform": [(1, NAN), (2, float("inf"))]}, "t", "y", share=True),
    "curves with an infinity": lambda: plot_curves({"uniform": [(1, 1.0), (2, float("inf")), (3, 2.0)]}, "t", "y"),
    "curves of equals": lambda: plot_curves({"uniform": [(1, 2.0), (1, 2.0)]}, "t", "y"),
    "curves of many arms": lambda: plot_curves({f"arm {i}": [(1, i)] for i in range(30)}, "t", "y"),
    "phases": lambda: plot_phases({}),
    "phases of nothing": lambda: plot_phases({"uniform": {}}),
    "phases of zeros": lambda: plot_phases({"uniform": {"student": 0.0, "teacher": NAN}}),
    "arms": lambda: plot_arms({}, {}, "accuracy"),
    "arms of equals": lambda: plot_arms({"rock": (1.0, 1.0, 1.0)}, {"rock": (0.0, 0.0, 0.0)}, "accuracy"),
    "funnel": lambda: plot_funnel([], [], []),
    "funnel of one": lambda: plot_funnel([7], [0.1], [True], texts={0: "a"}),
    "funnel of no rocks": lambda: plot_funnel([7], [0.1], [False], texts={}),
    "funnel of zeros": lambda: plot_funnel([0, 0], [0.0, 0.0], [True, False]),
    "funnel of NaN": lambda: plot_funnel([3, 4], [NAN, NAN], [True, False]),
    "funnel of equals": lambda: plot_funnel([3] * 20, [0.0] * 20, [True] * 20, texts={}),
    "funnel of extremes": lambda: plot_funnel([1, 10**12], [1e-30, 1e9], [True, False]),
    "before and after": lambda: plot_before_after([], [], []),
    "before and after of one": lambda: plot_before_after([0.0], [0.0], [True]),
    "before and after of NaN": lambda: plot_before_after([NAN, 1.0], [1.0, NAN], [True, False]),
    "sweep": lambda: plot_sweep(Sweep([], [], {}, None)),
    "sweep of one": lambda: plot_sweep(Sweep([10], [0.1], {50: [0.5]}, None)),
    "families": lambda: plot_families([], [], []),
    "families of zeros": lambda: plot_families(["math"], [0.0], [NAN]),
    "forest": lambda: plot_forest({"arms": [], "problems": 1}),
    "forest without intervals": lambda: plot_forest({"arms": [PROBE["arms"][3]], "problems": 1}),
    "forest of one": lambda: plot_forest({"arms": [{**forbidden(1, "rock", 0.0), "ci95": [0.0, 0.0]}], "problems": 1}),
    "gradients": lambda: plot_gradients(study((0, 0, 0))),
    "gradients of one": lambda: plot_gradients(study((1, 0, 0))),
    "gradients of NaN": lambda: plot_gradients(gradients_of(NAN)),
    "gradients of zeros": lambda: plot_gradients(gradients_of(0.0)),
}
REASONS = {
    "accuracy": "Nothing was measured.",
    "divergence of nothing": "Nothing was measured.",
    "phases": "No time was measured.",
    "arms": "No arm has ended.",
    "funnel of zeros": "No type occurs.",
    "before and after of NaN": "No type was measured before and after.",
    "families": "No token has a family.",
    "forest without intervals": "Nothing that was forbidden changed a reward.",
    "gradients": "No type has a gradient.",
    "gradients of NaN": "No type occurs early and late.",
}


@pytest.mark.parametrize("name", NOTHING)
@pytest.mark.slow
def test_little_or_no_data_is_drawn_without_a_warning(name):
    svg = to_svg(NOTHING[name](), "a")
    assert texts(svg)
    assert REASONS.get(name) in [None, *texts(svg)], "an empty plot says why"
    assert "nan" not in svg.lower()
    assert "inf" not in svg


@pytest.mark.parametrize("name", REASONS)
@pytest.mark.slow
def test_png_without_data_is_not_blank(name, tmp_path):
    save_png(NOTHING[name](), tmp_path / "plot.png")
    assert len(np.unique(imread(tmp_path / "plot.png"))) > 1
