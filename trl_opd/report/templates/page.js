"use strict";
// Everything that comes from a model is written with textContent only.
(() => {
  const $ = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.getElementById("opd-tip");
  const live = document.getElementById("opd-live");

  function make(name, className, ...children) {
    const element = document.createElement(name);
    if (className) element.className = className;
    element.append(...children); // a string becomes a text node
    return element;
  }

  // Light and dark

  function startTheme() {
    const button = document.getElementById("opd-theme");
    button.hidden = false;
    button.addEventListener("click", () => {
      const root = document.documentElement;
      const now = root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
      root.dataset.theme = now === "dark" ? "light" : "dark";
    });
  }

  // Marks in the table of contents the section that is being read

  function startContents() {
    const links = new Map($("nav a").map((link) => [link.hash.slice(1), link]));
    const seen = new Set();
    const watch = new IntersectionObserver((changes) => {
      for (const change of changes) {
        if (change.isIntersecting) seen.add(change.target.id);
        else seen.delete(change.target.id);
      }
      const current = [...links.keys()].find((id) => seen.has(id));
      for (const [id, link] of links) {
        if (id === current) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }, { rootMargin: "-10% 0px -60% 0px" });
    for (const section of $("main > section")) watch.observe(section);
  }

  // Tables

  function startTable(box) {
    const body = box.querySelector("tbody");
    const heads = $("thead th", box);
    for (const head of heads) {
      const button = make("button", "", ...head.childNodes);
      button.type = "button";
      button.addEventListener("click", () => sortRows(body, heads, head));
      head.replaceChildren(button);
    }
    const search = box.querySelector(".search");
    const input = search.querySelector("input");
    const output = search.querySelector("output");
    search.hidden = false;
    const plain = (text) => text.replaceAll("␣", " ").toLowerCase();
    const texts = new Map([...body.rows].map((row) => [row, plain([...row.cells].map((c) => c.textContent).join(" "))]));
    const filter = () => {
      let shown = 0;
      for (const [row, text] of texts) {
        row.hidden = !text.includes(plain(input.value));
        shown += !row.hidden;
      }
      output.textContent = `${shown} of ${texts.size} rows`;
    };
    input.addEventListener("input", filter);
    filter();
  }

  // Sorts numbers from the largest and texts from A; a second click reverses the order. Unknown values stay last.
  function sortRows(body, heads, head) {
    const column = heads.indexOf(head);
    const first = head.classList.contains("number") ? "descending" : "ascending";
    const second = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? second : first;
    for (const other of heads) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", order);
    const turn = order === "ascending" ? 1 : -1;
    const isNumber = head.classList.contains("number");
    const key = (cell) => (!isNumber ? cell.textContent : "value" in cell.dataset ? Number(cell.dataset.value) : null);
    const isUnknown = (value) => value === null || value === "–";
    const rows = [...body.rows].map((row) => [key(row.cells[column]), row]);
    rows.sort(([a], [b]) => {
      if (isUnknown(a) || isUnknown(b)) return isUnknown(a) - isUnknown(b);
      return a === b ? 0 : turn * (isNumber ? (a < b ? -1 : 1) : a.localeCompare(b, "en", { numeric: true }));
    });
    body.append(...rows.map(([, row]) => row));
  }

  // Tokens: data[index of the block], parsed when it is first needed

  const parsed = new Map();
  function dataOf(block) {
    if (!parsed.has(block)) parsed.set(block, JSON.parse(block.querySelector("script").textContent));
    return parsed.get(block);
  }

  const tokenAt = (node) => (node instanceof Element ? node.closest(".tokens > span") : null);
  const nameOf = (id, data) => data.texts[id] ?? `⟨${id}⟩`;

  function show(value) {
    if (value === null) return "–";
    if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
    return value !== 0 && Math.abs(value) < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
  }

  const FIGURES = [
    ["kl", "KL", "nats"],
    ["student_p", "student", ""],
    ["kl_pre", "KL before", "nats"],
    ["teacher_p", "teacher", ""],
    ["entropy", "entropy", "nats"],
    ["weight", "weight", ""],
  ];

  // Returns the content of a token's tooltip: {name, id, marks, figures: [[label, text]], tops: [[who, [[text, p, isEmitted]]]]}
  function facts(token) {
    const list = token.parentElement;
    const data = dataOf(list.closest(".rollouts"));
    const rollout = data.rollouts[list.dataset.place];
    const place = [...list.children].indexOf(token);
    const id = rollout.id[place];
    const figures = FIGURES.filter(([key]) => key in rollout && (rollout[key][place] !== null || key === "kl")).map(
      ([key, label, unit]) => {
        const value = rollout[key][place];
        const text = value === null ? "not measured" : `${show(value)} ${unit}`.trimEnd();
        return [key.endsWith("_p") ? `P(${label})` : label, text];
      },
    );
    const tops = [];
    for (const who of ["student", "teacher"]) {
      const rows = [];
      for (let at = place * data.top; `${who}_top_id` in rollout && at < (place + 1) * data.top; at++) {
        const [other, p] = [rollout[`${who}_top_id`][at], rollout[`${who}_top_p`][at]];
        if (p !== null) rows.push([nameOf(other, data), p, other === id]);
      }
      if (rows.length) tops.push([who, rows]);
    }
    const marks = ["rock", "frozen"].filter((mark) => token.classList.contains(mark));
    return { name: nameOf(id, data), id, marks, figures, tops };
  }

  function draw(known) {
    const head = make("p", "head", make("b", "", known.name), make("span", "", `id ${known.id}`));
    head.append(...known.marks.map((mark) => make("span", "", mark)));
    const list = make("dl", "");
    for (const [label, text] of known.figures) list.append(make("div", "", make("dt", "", label), make("dd", "", text)));
    tip.replaceChildren(head, list);
    if (!known.tops.length) return;
    const tops = make("div", "tops");
    for (const [who, rows] of known.tops) {
      const items = make("ul", "");
      for (const [text, p, isEmitted] of rows) {
        const item = make("li", isEmitted ? "emitted" : "", make("span", "", text), make("span", "", show(p)));
        item.style.setProperty("--p", p);
        items.append(item);
      }
      tops.append(make("div", "", make("p", "", `${who}’s likeliest`), items));
    }
    tip.append(tops);
  }

  function spoken(known) {
    const parts = [[`${known.name}, id ${known.id}`, ...known.marks].join(", ")];
    parts.push(known.figures.map(([label, text]) => `${label} ${text}`).join(", "));
    for (const [who, rows] of known.tops) {
      parts.push(`${who}’s likeliest: ${rows.map(([text, p]) => `${text} ${show(p)}`).join(", ")}`);
    }
    return parts.join(". ");
  }

  let current = null; // the token whose tooltip is open
  let leaving = 0;
  let byKeys = false; // the page scrolls under a resting pointer while one walks with the keys

  function place() {
    if (!current) return;
    const gap = 8;
    const box = current.getClientRects()[0] ?? current.getBoundingClientRect(); // of a token on two lines the first
    const [width, height] = [document.documentElement.clientWidth, window.innerHeight];
    tip.hidden = box.bottom < 0 || box.top > height; // scrolled away, for as long as it is
    if (tip.hidden) return;
    const left = Math.min(Math.max(box.left + box.width / 2 - tip.offsetWidth / 2, gap), width - tip.offsetWidth - gap);
    // Above the token, where the reader has been already, unless there is no room.
    const above = box.top - tip.offsetHeight - gap;
    const below = Math.min(box.bottom + gap, height - tip.offsetHeight - gap);
    tip.style.left = `${Math.max(left, 0)}px`;
    tip.style.top = `${above >= gap ? above : Math.max(below, 0)}px`;
  }

  function open(token) {
    clearTimeout(leaving);
    if (token === current) return;
    close();
    current = token;
    token.classList.add("shown");
    draw(facts(token));
    place();
  }

  function close() {
    clearTimeout(leaving);
    current?.classList.remove("shown");
    current = null;
    tip.hidden = true;
  }

  // Each rollout has one tab stop: the token that was visited last.
  function rove(token) {
    for (const other of $("[tabindex]", token.parentElement)) {
      for (const name of ["tabindex", "role", "aria-label"]) other.removeAttribute(name);
    }
    token.tabIndex = 0;
    token.setAttribute("role", "button");
    const list = token.parentElement;
    const index = [...list.children].indexOf(token);
    // Parsing the data of all tokens only for a name would be slow, so we use the shown text, with spaces made visible.
    token.setAttribute("aria-label", `token ${index + 1}: ${token.textContent.trim() || "space"}`);
  }

  function visit(token) {
    rove(token);
    token.focus({ preventScroll: true });
    token.scrollIntoView({ block: "nearest", behavior: "instant" });
    open(token);
  }

  // Returns the nearest token in the line above (step -1) or below (step 1).
  function lineBeside(token, step) {
    const middle = (box) => (box.left + box.right) / 2;
    const from = token.getBoundingClientRect();
    let [best, line] = [null, null];
    for (let next = token; (next = step < 0 ? next.previousElementSibling : next.nextElementSibling); ) {
      const box = next.getBoundingClientRect();
      if (step < 0 ? box.bottom > from.top + 4 : box.top < from.bottom - 4) continue;
      line ??= box;
      if (step < 0 ? box.bottom <= line.top + 4 : box.top >= line.bottom - 4) break;
      const distance = Math.abs(middle(box) - middle(from));
      if (!best || distance < best.distance) best = { distance, next };
    }
    return best?.next;
  }

  const MOVES = {
    ArrowLeft: (token) => token.previousElementSibling,
    ArrowRight: (token) => token.nextElementSibling,
    ArrowUp: (token) => lineBeside(token, -1),
    ArrowDown: (token) => lineBeside(token, 1),
    Home: (token) => token.parentElement.firstElementChild,
    End: (token) => token.parentElement.lastElementChild,
    Enter: (token) => token,
    " ": (token) => token,
  };

  function onKey(event) {
    byKeys = true;
    if (event.key === "Escape") return close();
    const token = tokenAt(event.target);
    if (!token || !(event.key in MOVES) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    const next = MOVES[event.key](token);
    if (next) visit(next);
  }

  function startTokens() {
    for (const list of $(".tokens")) if (list.firstElementChild) rove(list.firstElementChild);
    document.addEventListener("keydown", onKey);
    document.addEventListener("pointermove", () => { byKeys = false; }, { passive: true });
    document.addEventListener("mouseover", (event) => {
      if (byKeys) return;
      const token = tokenAt(event.target);
      if (token) open(token);
      else if (tip.contains(event.target)) clearTimeout(leaving);
      else if (current) {
        clearTimeout(leaving);
        const focused = tokenAt(document.activeElement);
        leaving = setTimeout(() => (focused ? open(focused) : close()), 150);
      }
    });
    document.addEventListener("focusin", (event) => {
      const token = tokenAt(event.target);
      if (!token) return;
      open(token);
      live.textContent = spoken(facts(token));
    });
    document.addEventListener("focusout", (event) => {
      if (tokenAt(event.target)) close();
    });
    document.addEventListener("click", (event) => {
      const token = tokenAt(event.target);
      if (token) visit(token);
      else if (!tip.contains(event.target)) close();
    });
    document.addEventListener("scroll", place, { capture: true, passive: true });
    window.addEventListener("resize", place);
  }

  function startSteps(block) {
    const box = block.querySelector(".switch");
    if (!box) return;
    const select = box.querySelector("select");
    const steps = $(".step", block);
    const change = () => {
      close();
      steps.forEach((step, index) => { step.hidden = index !== select.selectedIndex; });
    };
    select.selectedIndex = steps.length - 1; // what the student is now
    select.addEventListener("change", change);
    box.hidden = false;
    change();
  }

  startTheme();
  startContents();
  $(".tool").forEach(startTable);
  $(".rollouts").forEach(startSteps);
  startTokens();
})();
