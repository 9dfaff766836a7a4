"""The page of a report is one safe file: texts are shown and never run, and it works in a browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import unicodedata
from itertools import pairwise

import numpy as np
import pytest

from trl_opd.report.blocks import Facts, Note, Page, Plot, Rollouts, Section, ShownRollout, Table
from trl_opd.report.page import render
from trl_opd.report.text import HIDDEN, named, visible

from tests.helpers.html_tree import Html

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 90"><text x="9" y="40" fill="currentColor">a</text></svg>'
)
NAN, INF = float("nan"), float("inf")
HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "-->]]></style></title></textarea>",
    '" onmouseover="alert(1)" x="',
    "' autofocus onfocus=alert(1) '",
    "&lt;b&gt; &amp; &#60;b>",
    "{{ 7 * 7 }}{% for x in y %}",
    "\x00\x07\x1b[31m\x7f\x85\r\r\n\f",
    "\u202eevil\u2066\u200f\u061c",
    "\ud800 and \udfff",
    "\ufffe\uffff\U0010ffff\u2028\u2029",
    "e" + "\u0301" * 500,
    "\u0301 first",
    "zero\u200bwidth\ufeff\u00ad\U000e0041",
    "\u202e\x00<b> " * 80,
    "x" * 100_000,
]


def rollout(size: int, *, step: int | None = 10, number: int = 0, prompt: str | None = "2 + 2 ?", vocabulary=8, seed=0):
    rng = np.random.default_rng([seed, number, step or 0])
    ids = rng.integers(0, vocabulary, size).astype(np.int32)
    top = [rng.integers(0, vocabulary, (size, 5)).astype(np.int32) for _ in range(2)]
    p = [-np.sort(-rng.dirichlet(np.full(6, 0.4), size)[:, :5], axis=1).astype(np.float32) for _ in range(2)]
    kl, kl_pre, entropy = np.exp(rng.normal(-2, 2, (3, size))).astype(np.float32)
    weight = (rng.random(size) > 0.2).astype(np.float32)
    return ShownRollout(
        step, number, prompt, ids, kl, kl_pre, entropy, weight, p[0][:, 0], p[1][:, 0], (top[0], p[0]), (top[1], p[1])
    )


def page_of(text: str) -> Page:
    """Return a page with the same text in every place that takes a text."""
    texts = dict.fromkeys(range(8), text)
    blocks = [
        Note(text),
        Facts([(text, text)]),
        Table(text, {text: "", "number": ".2f"}, [[text, 1.0], [text, text]]),
        Table(text, {text: "", "number": ".2f"}, [[text, 1.0], [text, None]] * 12, tool=True),
        Plot(SVG, text, text),
        Rollouts([rollout(5, step=1, prompt=text), rollout(5, step=2, prompt=text)], texts, frozenset({1})),
    ]
    return Page(text, text, [Section("one", text, blocks)])


def page_of_known_values() -> Page:
    """Return a page of known values for the tests in the browser."""
    rows = [[" the", 2.04, 5], ["b", None, 1], ["c", 10.0, 2], ["d", 2.01, 3], ["e", -1.5, 4], ["f", 2.04, 6]]
    small = ShownRollout(
        None,
        0,
        None,
        np.array([0, 1, 2, 3, 4, 5]),
        np.array([0.31234567, NAN, 12.0, 0.0, INF, 1e-6]),
        kl_pre=np.array([0.5, 0.25, NAN, 1.0, 1.0, 1.0]),
        entropy=np.array([1.5, 2.0, 0.1, 0.0, 0.0, 0.0]),
        weight=np.array([1.0, 0.0, 0.5, 1.0, 1.0, 1.0]),
        student_p=np.array([0.00012346, 0.5, 0.5, 0.5, 0.5, 0.5]),
        student_top=(np.tile([0, 1, 2, 3, 9], (6, 1)), np.outer([1, 1, 0.5, 1, 1, 1], [0.4, 0.3, 0.2, 0.05, 0.01])),
        teacher_top=(np.tile([2, 0, 1, 4, 5], (6, 1)), np.tile([0.9, 0.05, 0.02, 0.01, NAN], (6, 1))),
    )
    rtl = ShownRollout(None, 1, None, np.array([6, 7, 10, 7, 8]), np.full(5, 0.1))
    texts = {0: " the", 1: "  ", 2: "\n", 3: "<b>x</b>", 4: "four", 6: "ab", 7: "\u05d0\u05d1", 8: "1\u202e2", 10: "7"}
    blocks = [
        Table("Types", {"token": "", "mean KL": ".1f", "count": "d"}, rows, tool=True),
        Plot(SVG, "A plot", "Below it"),
        Rollouts([rollout(60, step=step, number=k) for step in (0, 50) for k in range(2)], texts, frozenset({1})),
        Rollouts([small, rtl], texts, frozenset({0, 2})),
        Facts([("name", "value")]),
        Note("A note."),
    ]
    sections = [Section("first", "First", blocks), Section("second", "Second", [Note("End.")])]
    return Page("Known values", "A lead", sections)


@pytest.fixture(scope="module")
def known_page() -> str:
    return render(page_of_known_values())


# The file


def test_page_is_a_whole_document_with_its_landmarks(known_page):
    page = Html(known_page)
    assert known_page.startswith("<!DOCTYPE html>\n<html lang=")
    assert page.faults == []
    for tag in ("h1", "main", "nav", "header", "title"):
        assert len(page.root.all(tag)) == 1, tag
    assert {one.text for one in page.root.all("h1", "title")} == {"Known values"}
    assert {link.attributes["href"] for link in page.root.all("a")} == {"#opd-main", "#first", "#second"}
    ids = [one.attributes["id"] for one in page.root if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    named_by = {one.attributes.get("aria-labelledby") for one in page.root} - {None}
    assert named_by | {"opd-main", "first", "second"} <= set(ids)
    assert any(meta.attributes.get("name") == "viewport" for meta in page.root.all("meta"))
    levels = [int(one.tag[1]) for one in page.root if re.fullmatch("h[1-6]", one.tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels)), levels
    assert page.root.all("caption")
    assert {head.attributes["scope"] for head in page.root.all("th")} == {"col", "row"}


def test_page_requests_nothing_and_runs_only_its_own_script(known_page):
    page = Html(known_page).root
    for element in page:
        for name, value in element.attributes.items():
            if name in ("src", "href"):
                assert value.startswith(("#", "data:")), value
            assert not name.startswith("on")
    assert not re.search(r"url\(|@import|https?:", page.all("style")[0].text)
    (script,) = [one.text for one in page.all("script") if not one.attributes]
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|import\(", script)
    (policy,) = [meta.attributes["content"] for meta in page.all("meta") if "http-equiv" in meta.attributes]
    assert "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.search("script-src ([^;]*)", policy)[1] == f"'sha256-{digest}'"


def shape(page: Html) -> list[tuple[str, list[str]]]:
    return [(element.tag, sorted(element.attributes)) for element in page.root]


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:24]))
def test_hostile_text_is_only_text_in_every_place(text):
    content = render(page_of(text))
    content.encode("utf-8")
    page = Html(content)
    assert page.faults == []
    plain = Html(render(page_of("".join("x" if sign != "\n" else "\n" for sign in text))))
    assert shape(page) == shape(plain), "an element or an attribute that the template did not write"
    categories = {unicodedata.category(sign) for sign in page.root.text.replace("\n", "")}
    assert not categories & HIDDEN
    (data,) = [one.text for one in page.root.all("script") if one.attributes]
    assert not re.search("[<>&\u2028\u2029]", data)
    assert set(json.loads(data)["texts"].values()) == {named(text, 100)}
    shown = html.escape(visible(text, 60)[:60], quote=False).replace("'", "&#39;").replace('"', "&#34;")
    assert content.count(shown) >= 20
    assert len(content) < 600_000


def page_with(*blocks, anchor: str = "a") -> Page:
    return Page("t", "l", [Section(anchor, "title", list(blocks))])


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (page_with(anchor='x" onclick="alert(1)'), "cannot be an anchor"),
        (page_with(anchor=""), "cannot be an anchor"),
        (page_with(anchor="opd-main"), "cannot be an anchor"),
        (page_with(anchor="é"), "cannot be an anchor"),
        (Page("t", "l", [Section("a", "title", []), Section("a", "title", [])]), "Two sections have the anchor 'a'"),
        (page_with(Table("c", {"x": "", "y": ""}, [["1"]])), "has 1 cells for 2 columns"),
    ],
)
def test_page_that_would_be_broken_is_an_error(page, reason):
    with pytest.raises(ValueError, match=reason):
        render(page)


def test_empty_page_is_a_page():
    empty = ShownRollout(None, 0, None, np.array([], dtype=int), np.array([]))
    blocks = [Facts([]), Table("c", {"x": ""}, [], tool=True), Rollouts([], {}, frozenset())]
    page = render(page_with(*blocks, Rollouts([empty], {}, frozenset())))
    assert Html(page).faults == []
    for text in ("Nothing to list.", "No rollouts were kept.", "No tokens.", "mean KL <b>–</b>"):
        assert text in page
    assert "<h1></h1>" in render(Page("", ""))


def test_numbers_are_formatted_and_keep_the_value_that_they_are_sorted_by():
    rows = [[1.23456, 5], [np.float32(0.5), np.int64(7)], [None, NAN], [INF, -INF], ["text", 0]]
    page = Html(render(page_with(Table("c", {"x": ".2f", "y": ""}, rows, tool=True)))).root
    cells = [cell.attributes for cell in page.all("td")]
    assert [cell.get("data-value") for cell in cells] == ["5.0", "7.0", None, "-Infinity", "0.0"]
    assert {cell.get("class") for cell in cells} == {None}
    first = [cell.attributes for cell in page.all("th") if cell.attributes["scope"] == "row"]
    assert [cell.get("data-value") for cell in first] == ["1.23456", "0.5", None, "Infinity", None]
    assert {cell.get("class") for cell in first} == {"number"}
    texts = [cell.text for cell in page.all("th", "td")]
    assert texts == ["x", "y", "1.23", "5", "0.50", "7", "–", "–", "∞", "-∞", "text", "0"]


def test_class_of_a_token_shows_divergence_rock_and_frozen(known_page):
    small = known_page[known_page.rindex('<div class="step">') :]
    classes = re.findall(r'<span class="(d[^"]+)">([^<]*)</span>', small)[:6]
    assert classes == [
        ("d4 rock", " the"),
        ("dx frozen", "  "),
        ("d7 rock", "↵\n"),
        ("d0", "&lt;b&gt;x&lt;/b&gt;"),
        ("d7", "four"),
        ("d0", "⟨5⟩"),
    ]
    assert "mean KL <b>∞</b> nats" in small
    edges = np.array([0.0, 0.0099, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, -1e-7])
    shown = ShownRollout(1, 0, None, np.zeros(10, dtype=int), edges)
    page = render(page_with(Rollouts([shown], {0: "x"}, frozenset())))
    assert re.findall(r'<span class="d(.)">x', page) == list("0012345670")


def test_metrics_in_the_page_have_four_digits_and_leave_out_unknown_columns(known_page):
    *_, data = re.findall(r'<script type="application/json">(.*?)</script>', known_page)
    small, rtl = json.loads(data)["rollouts"]
    assert small["kl"] == [0.3123, None, 12, 0, INF, 1e-6]
    assert small["student_p"][0] == 0.0001235
    assert small["student_top_id"][:5] == [0, 1, 2, 3, 9]
    assert small["teacher_top_p"][4] is None
    assert rtl == {"id": [6, 7, 10, 7, 8], "kl": [0.1] * 5}
    assert json.loads(data)["texts"]["8"] == "1\\u202e2"


def test_equal_reports_are_equal_files():
    texts = {id_: f"t{id_}" for id_ in range(8)}
    backwards = dict(reversed(texts.items()))
    blocks = [Rollouts([rollout(20)], names, frozenset({1, 2})) for names in (texts, texts, backwards)]
    assert len({render(page_with(block)) for block in blocks}) == 1


@pytest.mark.slow
def test_ten_thousand_tokens_with_their_likeliest_alternatives_take_less_than_five_megabytes():
    rng = np.random.default_rng(0)
    texts = {id_: " " + "".join(map(chr, rng.integers(97, 123, 6))) for id_ in range(152_000)}
    rollouts = [rollout(100, step=k // 10, number=k, vocabulary=152_000, prompt="word " * 200) for k in range(100)]
    page = render(page_with(Rollouts(rollouts, texts, frozenset(range(100)))))
    assert page.count('<span class="d') == 10_000
    assert len(page.encode()) < 5_000_000


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr --v=0 --dump-dom
--virtual-time-budget=20000 --window-size=1200,900"""
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: nothing shows the page")

# Runs after the page's own script and posts its findings to the page that frames it.
AROUND = """
window.faults = [];
addEventListener("error", (event) => faults.push(event.message));
addEventListener("securitypolicyviolation", (event) => faults.push(event.violatedDirective));
const all = (selector, root = document) => [...root.querySelectorAll(selector)];
const tip = document.getElementById("opd-tip");
const over = (node) => node.dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
const press = (key) => document.activeElement.dispatchEvent(
  new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
const said = () => tip.hidden ? null : tip.innerText;
const sleep = (time) => new Promise((done) => setTimeout(done, time));
addEventListener("load", async () => {
  const found = {};
  try { %s } catch (error) { faults.push(String(error.stack)); }
  found.faults = faults;
  top.postMessage(found, "*");
});
"""
HOST = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0"><pre id="found"></pre><script>
addEventListener("message", (event) => { document.getElementById("found").textContent = JSON.stringify(event.data); });
</script><iframe src="page.html" style="border:0" width="%d" height="%d"></iframe>"""


def browse(folder, page: str, script: str | None = None, *, width: int = 1200, height: int = 800):
    """Return the findings of a script on a page in a frame of that size, and the lines of the browser's console."""
    if script is not None:
        script = AROUND % script
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        page = page.replace("script-src ", f"script-src 'sha256-{digest}' ", 1)
        before, after = page.rsplit("</body>", 1)
        page = f"{before}<script>{script}</script></body>{after}"
    (folder / "page.html").write_text(page, encoding="utf-8")
    (folder / "host.html").write_text(HOST % (width, height), encoding="utf-8")
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", (folder / "host.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=180)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    if script is None:
        return None, console
    text = re.search('<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)[1]
    assert text, f"the script of the test did not end: {console}"
    return json.loads(html.unescape(text)), console


ACTIONS = """
const table = document.querySelector(".tool");
const firsts = () => all("tbody tr:not([hidden])", table).map((row) => row.cells[0].textContent).join(" ");
const [byToken, byKl] = all("thead button", table);
const order = () => all("thead th", table).map((head) => head.getAttribute("aria-sort"));
found.unsorted = firsts();
byKl.click(); found.down = firsts(); found.downOrder = order();
byKl.click(); found.up = firsts(); found.upOrder = order();
byToken.click(); found.text = firsts(); found.textOrder = order();
const input = table.querySelector("input");
const type = (text) => { input.value = text; input.dispatchEvent(new Event("input", { bubbles: true })); };
found.count = table.querySelector("output").textContent;
type(" THE"); found.searched = firsts(); found.searchedCount = table.querySelector("output").textContent;
type("none of them"); found.noneCount = table.querySelector("output").textContent;
type(""); found.cleared = firsts();

const [byStep, alone] = all(".rollouts");
const select = byStep.querySelector("select");
const steps = () => all(".step", byStep).filter((step) => step.offsetHeight).map((s) => s.firstElementChild.innerText);
found.steps = [steps()];
select.selectedIndex = 0; select.dispatchEvent(new Event("change", { bubbles: true }));
found.steps.push(steps());
found.switches = all(".switch", alone).length;

const [list, rtl] = all(".tokens", alone);
list.scrollIntoView({ block: "center", behavior: "instant" });
const tokens = [...list.children];
found.before = said();
over(tokens[0]); found.mouse = said(); found.bold = all(".emitted", tip).map((item) => item.textContent);
found.pairs = all("dl div", tip).map((pair) => [pair.children[0].textContent, pair.children[1].textContent]);
over(tip); await sleep(500); found.overTip = said() !== null;
over(document.body); await sleep(500); found.left = said();
over(tokens[1]); found.unmeasured = said();
over(tokens[3]); found.markup = [said(), all("dd b, span b", tip).length];
over(tokens[4]); found.infinite = said();
press("Escape"); found.escapedMouse = said();
tokens[2].click(); found.tap = said(); found.focused = document.activeElement === tokens[2];
document.querySelector("h1").click(); found.tapElsewhere = said();

document.activeElement.blur();
found.stops = all(".tokens", document).map((one) => all("[tabindex]", one).length);
tokens[2].focus(); found.key = said(); found.live = document.getElementById("opd-live").textContent;
const at = () => tokens.indexOf(document.activeElement);
found.walk = ["ArrowRight", "ArrowRight", "ArrowLeft", "Home", "ArrowLeft", "End", "ArrowRight"].map((key) => {
  press(key);
  return at();
});
found.walked = said();
found.stopsAfter = all("[tabindex]", list).length;
press("Escape"); found.escaped = said(); found.stays = at();
press("Enter"); found.again = said() !== null;
over(tokens[0]); found.scrolledUnder = said() === found.walked;
document.dispatchEvent(new Event("pointermove")); over(tokens[0]); over(document.body); await sleep(500);
found.back = said() === found.walked;
document.activeElement.blur(); found.blurred = said();
document.dispatchEvent(new Event("pointermove")); over(tokens[0]); found.mouseAgain = said() === found.mouse;

const long = all(".step:not([hidden]) .tokens", byStep)[0];
long.style.width = "20rem";
long.children[0].focus(); press("End"); press("Home");
const topOf = (node) => Math.round(node.getBoundingClientRect().top - long.getBoundingClientRect().top);
const lines = [...new Set([...long.children].map(topOf))].sort((a, b) => a - b);
const line = () => lines.indexOf(topOf(document.activeElement));
found.lines = lines.length;
found.downwards = lines.map(() => { press("ArrowDown"); return line(); });
found.upwards = [line(), ...lines.map(() => { press("ArrowUp"); return line(); })];
document.activeElement.blur();

const boxes = [...rtl.children].map((node) => node.getBoundingClientRect());
found.inOrder = boxes.every((box, k) => k === 0 || box.left >= boxes[k - 1].right - 1);
const lineBreak = [tokens[2], tokens[3]].map((node) => node.getBoundingClientRect().top);
found.lineBreak = lineBreak[1] > lineBreak[0] + 10;
"""

CONTRAST = """
const parse = (colour) => (colour.match(/[0-9.]+/g) ?? [0, 0, 0, 0]).map(Number);
const linear = (c) => c <= 10 ? c / 3294.6 : ((c / 255 + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
function ground(node) {
  const layers = [];
  for (let up = node; up; up = up.parentElement) layers.push(parse(getComputedStyle(up).backgroundColor));
  return layers.reverse().reduce(
    (below, [r, g, b, a = 1]) => [r, g, b].map((c, k) => a * c + (1 - a) * below[k]), [255, 255, 255]);
}
function worst() {
  let low = [99, ""];
  for (const node of all("body *")) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!text || !node.getClientRects().length || node.closest("svg, script, style")) continue;
    const pair = [light(parse(getComputedStyle(node).color)), light(ground(node))].sort((a, b) => b - a);
    const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
    if (ratio < low[0]) low = [ratio, `${node.tagName}.${node.className} ${node.textContent.slice(0, 20)}`];
  }
  return low;
}
const shown = all(".rollouts")[1].querySelector(".tokens").children[0];
shown.scrollIntoView({ block: "center", behavior: "instant" });
document.dispatchEvent(new Event("pointermove"));
over(shown);
const background = () => getComputedStyle(document.body).backgroundColor;
found.themes = [];
for (let k = 0; k < 3; k++) {
  found.themes.push([background(), ...worst(), tip.hidden]);
  document.getElementById("opd-theme").click();
  over(shown);
}
found.dark = matchMedia("(prefers-color-scheme: dark)").matches;
"""


@pytest.fixture(scope="module")
def found(known_page, tmp_path_factory) -> dict:
    found, console = browse(tmp_path_factory.mktemp("actions"), known_page, ACTIONS + CONTRAST)
    assert console == []
    assert found["faults"] == []
    return found


@needs_browser
@pytest.mark.slow
def test_table_sorts_numbers_both_ways_with_unknown_values_last(found):
    assert found["unsorted"] == "␣the b c d e f"
    assert found["down"] == "c ␣the f d e b"
    assert found["downOrder"] == [None, "descending", None]
    assert found["up"] == "e d ␣the f c b"
    assert found["upOrder"] == [None, "ascending", None]
    assert found["text"] == "␣the b c d e f"
    assert found["textOrder"] == ["ascending", None, None]


@needs_browser
def test_search_shows_matching_rows_and_their_number(found):
    assert found["count"] == "6 of 6 rows"
    assert (found["searched"], found["searchedCount"]) == ("␣the", "1 of 6 rows")
    assert found["noneCount"] == "0 of 6 rows"
    assert found["cleared"] == found["text"]


@needs_browser
def test_last_step_is_shown_until_another_is_chosen(found):
    assert found["steps"] == [["Step 50"], ["Step 0"]]
    assert found["switches"] == 0


@needs_browser
def test_tooltip_shows_every_known_metric_of_a_token(found):
    assert found["before"] is None
    assert found["pairs"] == [
        ["KL", "0.312 nats"],
        ["P(student)", "1.2e-4"],
        ["KL before", "0.5 nats"],
        ["entropy", "1.5 nats"],
        ["weight", "1"],
    ]
    lines = found["mouse"].split("\n")
    assert lines[:3] == ["␣the", "id 0", "rock"]
    assert "student’s likeliest" in lines
    assert "teacher’s likeliest" in lines
    after = [line for line in lines[lines.index("student’s likeliest") :] if line]
    assert [after[at] for at in (1, 2, 3, 4, 9, 10)] == ["␣the", "0.4", "␣␣", "0.3", "⟨9⟩", "0.01"]
    assert after[11:] == ["teacher’s likeliest", "↵", "0.9", "␣the", "0.05", "␣␣", "0.02", "four", "0.01"]
    assert found["bold"] == ["␣the0.4", "␣the0.05"]
    assert "not measured" in found["unmeasured"]
    assert "frozen" in found["unmeasured"].split("\n")
    assert found["markup"][0].startswith("<b>x</b>")
    assert found["markup"][1] == 0
    assert "∞ nats" in found["infinite"]


@needs_browser
def test_tooltip_opens_and_closes_with_the_pointer(found):
    assert found["overTip"]
    assert found["left"] is None
    assert found["escapedMouse"] is None
    assert found["tap"].startswith("↵")
    assert found["focused"]
    assert found["tapElsewhere"] is None


@needs_browser
def test_arrow_keys_move_between_tokens(found):
    assert set(found["stops"]) == {1}
    assert found["key"] == found["tap"]
    spoken = "↵, id 2, rock. KL 12 nats, P(student) 0.5, entropy 0.1 nats, weight 0.5. student’s likeliest: ␣the 0.2, "
    assert found["live"].startswith(spoken)
    assert found["walk"] == [3, 4, 3, 0, 0, 5, 5]
    assert found["walked"].startswith("⟨5⟩")
    assert found["stopsAfter"] == 1
    assert found["escaped"] is None
    assert found["stays"] == 5
    assert found["again"]
    assert found["scrolledUnder"]
    assert found["back"], "the pointer left, the focus did not"
    assert found["blurred"] is None
    assert found["mouseAgain"]


@needs_browser
def test_arrow_keys_move_between_lines(found):
    last = found["lines"] - 1
    assert last > 2
    assert found["downwards"] == [*range(1, last + 1), last]
    assert found["upwards"] == [*range(last, -1, -1), 0]


@needs_browser
def test_tokens_keep_their_order_and_line_breaks_whatever_their_text(found):
    assert found["inOrder"]
    assert found["lineBreak"]


@needs_browser
def test_both_themes_have_enough_contrast_and_the_button_switches_them(found):
    first, second, third = found["themes"]
    assert first[0] == third[0] != second[0]
    for _, ratio, where, hidden in found["themes"]:
        assert ratio >= 4.5, where
        assert not hidden


NARROW = """
found.width = [innerWidth, document.documentElement.scrollWidth];
found.outside = [];
let opened = 0;
for (const list of all(".tokens")) {
  for (const token of [...list.children]) {
    if (!token.getClientRects().length) continue;
    token.scrollIntoView({ block: opened % 2 ? "start" : "end", behavior: "instant" });
    over(token);
    const box = tip.getBoundingClientRect();
    opened += !tip.hidden;
    if (box.left < 0 || box.top < 0 || box.right > innerWidth || box.bottom > innerHeight) found.outside.push(opened);
  }
}
found.opened = opened;
found.widthOpen = document.documentElement.scrollWidth;
found.scrolls = all(".scroll, .plot").map((box) => box.scrollWidth > box.clientWidth);
"""


@needs_browser
@pytest.mark.parametrize("text", [None, HOSTILE[1], HOSTILE[-1]], ids=["plain", "tags", "long"])
@pytest.mark.slow
def test_page_fits_a_phone_without_scrolling_sideways(known_page, tmp_path, text):
    page = known_page if text is None else render(page_of(text))
    found, console = browse(tmp_path, page, NARROW, width=360, height=560)
    assert console == []
    assert found["faults"] == []
    assert found["width"][0] == 360
    assert found["width"][1] <= 360
    assert found["widthOpen"] <= 360
    assert found["opened"] >= 5
    assert found["outside"] == []
    assert any(found["scrolls"])


BARE = """
const seen = (selector) => all(selector).filter((node) => node.getClientRects().length).length;
found.seen = [".step", ".tokens span", "tbody tr", ".search", ".switch", "#opd-theme", "#opd-tip", "button"].map(seen);
"""


@needs_browser
@pytest.mark.slow
def test_page_without_its_script_is_readable_and_shows_no_dead_controls(known_page, tmp_path):
    found, _ = browse(tmp_path, known_page.replace('"use strict";', '"use  strict";', 1), BARE)
    assert found["seen"] == [3, 4 * 60 + 6 + 5, 6, 0, 0, 0, 0, 0]


@needs_browser
@pytest.mark.slow
def test_unchanged_page_writes_nothing_to_the_console(known_page, tmp_path):
    assert browse(tmp_path, known_page) == (None, [])
    _, console = browse(tmp_path, known_page.replace('"use strict";', '"use  strict";', 1))
    assert "Content Security Policy" in console[0], "this test would not see a script that is refused"
