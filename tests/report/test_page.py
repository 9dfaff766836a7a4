"""Tests of a report's page: one file in which every text is shown and none is obeyed, and what it does in a browser."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
import unicodedata
from html.parser import HTMLParser
from itertools import pairwise

import numpy as np
import pytest

from trl_opd.report.blocks import Facts, Note, Page, Plot, Rollouts, Section, ShownRollout, Table
from trl_opd.report.page import render
from trl_opd.report.text import HIDDEN, named, visible

SVG = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 400 90"><text x="9" y="40" fill="currentColor">a</text></svg>'
)
NAN, INF = float("nan"), float("inf")
VOID = {"meta", "link", "input", "br"}
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


class Reader(HTMLParser):
    """What a page is made of: elements with the names of their attributes, text by element, what stands in scripts."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.crooked: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.crooked.append(tag)

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def handle_comment(self, data):
        self.crooked.append(data)

    @property
    def shape(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(tag, tuple(sorted(attributes))) for tag, attributes in self.elements]

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, tag: str) -> str:
        return "".join(data for name, data in self.texts if name == tag)


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
    """Return a page that has one text in every place where a text can stand."""
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


def figures_page() -> Page:
    """Return a page of known figures, which the tests in the browser ask for."""
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
    return Page("Figures", "A lead", [Section("first", "First", blocks), Section("second", "Second", [Note("End.")])])


@pytest.fixture(scope="module")
def figures() -> str:
    return render(figures_page())


# The file


def test_a_page_is_a_whole_document_with_its_landmarks(figures):
    read = Reader(figures)
    assert figures.startswith("<!DOCTYPE html>\n<html lang=")
    assert read.crooked == []
    assert read.open == []
    for tag in ("h1", "main", "nav", "header", "title"):
        assert len(read.all(tag)) == 1, tag
    assert read.text("h1") == read.text("title") == "Figures"
    assert {link["href"] for link in read.all("a")} == {"#opd-main", "#first", "#second"}
    ids = [attributes["id"] for _, attributes in read.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    named_by = {attributes.get("aria-labelledby") for _, attributes in read.elements} - {None}
    assert named_by | {"opd-main", "first", "second"} <= set(ids)
    assert any(meta.get("name") == "viewport" for meta in read.all("meta"))
    levels = [int(tag[1]) for tag, _ in read.elements if re.fullmatch("h[1-6]", tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels)), levels
    assert read.all("caption")
    assert {head["scope"] for head in read.all("th")} == {"col", "row"}


def test_a_page_requests_nothing_and_runs_its_own_script_only(figures):
    read = Reader(figures)
    for _, attributes in read.elements:
        for name, value in attributes.items():
            if name in ("src", "href"):
                assert value.startswith(("#", "data:")), value
            assert not name.startswith("on")
    assert not re.search(r"url\(|@import|https?:", read.text("style"))
    (script,) = re.findall(r"<script>(.*?)</script>", figures, re.DOTALL)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|XMLHttp|import\(", script)
    (policy,) = [meta["content"] for meta in read.all("meta") if "http-equiv" in meta]
    assert "default-src 'none'" in policy
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert re.search("script-src ([^;]*)", policy)[1] == f"'sha256-{digest}'"


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:24]))
def test_a_hostile_text_is_text_in_every_place(text):
    page = render(page_of(text))
    page.encode("utf-8")
    read = Reader(page)
    assert read.crooked == []
    plain = Reader(render(page_of("".join("x" if sign != "\n" else "\n" for sign in text))))
    assert read.shape == plain.shape, "an element or an attribute that the template did not write"
    for _, data in read.texts:
        categories = {unicodedata.category(sign) for sign in data.replace("\n", "")}
        assert not categories & HIDDEN
    (data,) = [text for tag, text in read.texts if tag == "script" and text.startswith("{")]
    assert not re.search("[<>&\u2028\u2029]", data)
    assert set(json.loads(data)["texts"].values()) == {named(text, 100)}
    shown = html.escape(visible(text, 60)[:60], quote=False).replace("'", "&#39;").replace('"', "&#34;")
    assert page.count(shown) >= 20
    assert len(page) < 600_000


def test_a_wrong_anchor_is_refused():
    for anchor in ('x" onclick="alert(1)', "", "opd-main", "é"):
        with pytest.raises(ValueError, match="cannot be an anchor"):
            render(Page("t", "l", [Section(anchor, "title", [])]))
    with pytest.raises(ValueError, match="Two sections have the anchor 'a'"):
        render(Page("t", "l", [Section("a", "title", []), Section("a", "title", [])]))


def test_a_row_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="has 1 cells for 2 columns"):
        render(Page("t", "l", [Section("a", "title", [Table("c", {"x": "", "y": ""}, [["1"]])])]))


def test_a_page_of_nothing_is_a_page():
    empty = ShownRollout(None, 0, None, np.array([], dtype=int), np.array([]))
    blocks = [Facts([]), Table("c", {"x": ""}, [], tool=True), Rollouts([], {}, frozenset())]
    blocks.append(Rollouts([empty], {}, frozenset()))
    page = render(Page("", "", [Section("a", "", blocks)]))
    assert Reader(page).crooked == []
    for text in ("Nothing to list.", "No rollouts were kept.", "No tokens.", "mean KL <b>–</b>"):
        assert text in page
    assert "<h1></h1>" in render(Page("", ""))


def test_numbers_are_formatted_and_keep_what_they_are_sorted_by():
    rows = [[1.23456, 5], [np.float32(0.5), np.int64(7)], [None, NAN], [INF, -INF], ["text", 0]]
    table = Table("c", {"x": ".2f", "y": ""}, rows, tool=True)
    read = Reader(render(Page("t", "l", [Section("a", "title", [table])])))
    cells = [(cell.get("data-value"), cell.get("class")) for cell in read.all("td")]
    assert cells == [("5.0", None), ("7.0", None), (None, None), ("-Infinity", None), ("0.0", None)]
    first = [(cell.get("data-value"), cell.get("class")) for cell in read.all("th") if cell["scope"] == "row"]
    assert [value for value, _ in first] == ["1.23456", "0.5", None, "Infinity", None]
    assert {kind for _, kind in first} == {"number"}
    body = [data for tag, data in read.texts if tag in ("th", "td") and data.strip()]
    assert body == ["x", "y", "1.23", "5", "0.50", "7", "–", "–", "∞", "-∞", "text", "0"]


def test_a_token_says_by_its_class_what_it_is(figures):
    small = figures[figures.rindex('<div class="step">') :]
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
    page = render(Page("t", "l", [Section("a", "title", [Rollouts([shown], {0: "x"}, frozenset())])]))
    assert re.findall(r'<span class="d(.)">x', page) == list("0012345670")


def test_figures_travel_with_four_digits_and_without_what_is_not_known(figures):
    *_, data = re.findall(r'<script type="application/json">(.*?)</script>', figures)
    small, rtl = json.loads(data)["rollouts"]
    assert small["kl"] == [0.3123, None, 12, 0, INF, 1e-6]
    assert small["student_p"][0] == 0.0001235
    assert small["student_top_id"][:5] == [0, 1, 2, 3, 9]
    assert small["teacher_top_p"][4] is None
    assert rtl == {"id": [6, 7, 10, 7, 8], "kl": [0.1] * 5}
    assert json.loads(data)["texts"]["8"] == "1\\u202e2"


def test_the_same_report_is_the_same_file():
    texts = {id_: f"t{id_}" for id_ in range(8)}
    backwards = dict(reversed(texts.items()))
    pages = [
        render(Page("t", "l", [Section("a", "b", [Rollouts([rollout(20)], names, frozenset({1, 2}))])]))
        for names in (texts, texts, backwards)
    ]
    assert len(set(pages)) == 1


def test_ten_thousand_tokens_with_their_likeliest_are_below_five_megabytes():
    rng = np.random.default_rng(0)
    texts = {id_: " " + "".join(map(chr, rng.integers(97, 123, 6))) for id_ in range(152_000)}
    rollouts = [rollout(100, step=k // 10, number=k, vocabulary=152_000, prompt="word " * 200) for k in range(100)]
    page = render(Page("t", "l", [Section("a", "b", [Rollouts(rollouts, texts, frozenset(range(100)))])]))
    size = len(page.encode())
    assert page.count('<span class="d') == 10_000
    assert size < 5_000_000
    print(f"{size / 10_000:.0f} bytes a token")


# In a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr --v=0 --dump-dom
--virtual-time-budget=20000 --window-size=1200,900"""
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: nothing shows the page")

# Runs after the page's own script, and hands its findings to whoever shows the page.
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
    """Return what a script finds on a page in a frame of that size, and what the browser wrote to its console."""
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
def found(figures, tmp_path_factory) -> dict:
    found, console = browse(tmp_path_factory.mktemp("actions"), figures, ACTIONS + CONTRAST)
    assert console == []
    assert found["faults"] == []
    return found


@needs_browser
def test_a_table_sorts_by_number_both_ways_and_what_is_not_known_is_last(found):
    assert found["unsorted"] == "␣the b c d e f"
    assert found["down"] == "c ␣the f d e b"
    assert found["downOrder"] == [None, "descending", None]
    assert found["up"] == "e d ␣the f c b"
    assert found["upOrder"] == [None, "ascending", None]
    assert found["text"] == "␣the b c d e f"
    assert found["textOrder"] == ["ascending", None, None]


@needs_browser
def test_a_search_shows_the_rows_that_have_it_and_says_how_many(found):
    assert found["count"] == "6 of 6 rows"
    assert (found["searched"], found["searchedCount"]) == ("␣the", "1 of 6 rows")
    assert found["noneCount"] == "0 of 6 rows"
    assert found["cleared"] == found["text"]


@needs_browser
def test_the_last_step_is_shown_until_another_is_chosen(found):
    assert found["steps"] == [["Step 50"], ["Step 0"]]
    assert found["switches"] == 0


@needs_browser
def test_the_tooltip_says_what_is_known_of_a_token(found):
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
def test_the_tooltip_comes_and_goes_with_the_pointer(found):
    assert found["overTip"]
    assert found["left"] is None
    assert found["escapedMouse"] is None
    assert found["tap"].startswith("↵")
    assert found["focused"]
    assert found["tapElsewhere"] is None


@needs_browser
def test_the_keys_walk_over_the_tokens(found):
    assert set(found["stops"]) == {1}
    assert found["key"] == found["tap"]
    figures = "↵, id 2, rock. KL 12 nats, P(student) 0.5, entropy 0.1 nats, weight 0.5. student’s likeliest: ␣the 0.2, "
    assert found["live"].startswith(figures)
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
def test_the_keys_walk_over_the_lines(found):
    last = found["lines"] - 1
    assert last > 2
    assert found["downwards"] == [*range(1, last + 1), last]
    assert found["upwards"] == [*range(last, -1, -1), 0]


@needs_browser
def test_a_token_stays_in_its_place_whatever_it_holds(found):
    assert found["inOrder"]
    assert found["lineBreak"]


@needs_browser
def test_both_themes_can_be_read_and_the_button_changes_them(found):
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
def test_a_phone_shows_the_page_without_a_step_aside(figures, tmp_path, text):
    page = figures if text is None else render(page_of(text))
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
def test_a_page_whose_script_does_not_run_can_be_read_and_offers_nothing_that_does_nothing(figures, tmp_path):
    found, _ = browse(tmp_path, figures.replace('"use strict";', '"use  strict";', 1), BARE)
    assert found["seen"] == [3, 4 * 60 + 6 + 5, 6, 0, 0, 0, 0, 0]


@needs_browser
def test_the_page_as_it_is_has_nothing_to_say_to_the_console(figures, tmp_path):
    assert browse(tmp_path, figures) == (None, [])
    _, console = browse(tmp_path, figures.replace('"use strict";', '"use  strict";', 1))
    assert "Content Security Policy" in console[0], "this test would not see a script that is refused"
