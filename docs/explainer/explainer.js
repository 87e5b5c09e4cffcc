// What the explainer pages share: a frame with navigation, controls that a keyboard reaches, and plots as SVG.
// The pages compute nothing: every number comes from numbers.js, which build.py writes.
"use strict";

const PAGES = [
  ["pipeline.html", "One prompt, three models", "What pre-training, fine-tuning and PPO make of the same questions."],
  ["sft.html", "The loss of every token", "Fine-tuning asks: how surprised was the model?"],
  ["discount.html", "Discounting", "What a reward is worth before it arrives."],
  ["line.html", "A policy that learns to walk", "REINFORCE in the one-dimensional world, update by update."],
  ["clip.html", "The clip of PPO", "Where the objective goes flat, and why only on one side."],
  ["kl.html", "The leash", "KL against beta, and the reference tilted by the reward, exactly."],
  ["bradley_terry.html", "From comparisons to a score", "Bradley-Terry: a sigmoid of a difference."],
  ["iteration.html", "One iteration of PPO", "Four models, every tensor, real numbers."],
  ["group.html", "A group around its mean", "GRPO's baseline is the other answers."],
  ["dpo.html", "DPO: loss and gradient", "A preference pulls two log-probabilities apart."],
  ["ppo_dpo.html", "PPO against DPO", "The same optimum; who arrives, and why."],
  ["goodhart.html", "Proxy and gold", "Over-optimisation, and where to stop."],
  ["formulas.html", "Formulas and notation", "Every symbol, the function that computes it, and where lectures slip."],
];

/** An element: tag, attributes (functions are listeners), children. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null));
  return node;
}

const byId = (id) => document.getElementById(id);

/** A number with so many decimals, with a real minus sign. */
const num = (value, places = 2) => {
  const text = Number(value).toFixed(places);
  return (Number(text) === 0 ? text.replace("-", "") : text).replace("-", "\u2212");
};

/** Replace what an element holds. */
const fill = (node, ...children) => node.replaceChildren(...children.flat(Infinity).filter((child) => child != null));

// -- the keyboard ---------------------------------------------------------------------------------------------

const keys = { step: null, choose: null };

addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey) return;
  const inRange = event.target.matches?.("input[type=range], select");
  const here = PAGES.findIndex(([file]) => location.pathname.split("/").at(-1) === file);
  if (event.key === "n" && PAGES[here + 1]) location.href = PAGES[here + 1][0];
  else if (event.key === "p") location.href = here > 0 ? PAGES[here - 1][0] : "index.html";
  else if (/^[1-9]$/.test(event.key) && keys.choose) keys.choose(Number(event.key) - 1);
  else if (inRange || !keys.step) return;
  else if (event.key === "ArrowRight") keys.step(1);
  else if (event.key === "ArrowLeft") keys.step(-1);
  else if (event.key === "Home") keys.step(-Infinity);
  else if (event.key === "End") keys.step(Infinity);
  else if (event.key === " " && keys.play && !event.target.matches?.("button, a")) keys.play();
  else return;
  event.preventDefault();
});

/** A slider over a list of values. The first one of a page also obeys the arrow keys wherever the focus is. */
function slider(into, label, values, start, show, change) {
  const input = el("input", { type: "range", min: 0, max: values.length - 1, step: 1, value: start, "aria-label": label });
  const output = el("output");
  const update = () => {
    const at = Number(input.value);
    output.textContent = show(values[at]);
    input.setAttribute("aria-valuetext", output.textContent);
    change(at);
  };
  input.addEventListener("input", update);
  output.textContent = show(values[start]);
  into.append(el("label", {}, el("span", {}, label), input, output));
  const step = (by) => {
    const at = Math.min(Math.max(Number(input.value) + by, 0), values.length - 1);
    input.value = at;
    update();
  };
  keys.step ??= step;
  return { update, set: (at) => ((input.value = at), update()), get at() { return Number(input.value); } };
}

/** Buttons of which one is chosen; also by the number keys. */
function tabs(into, label, names, change) {
  const buttons = names.map((name, i) => el("button", { type: "button", "aria-pressed": "false", click: () => choose(i) }, name));
  const choose = (i) => {
    if (!buttons[i]) return;
    buttons.forEach((button, k) => button.setAttribute("aria-pressed", String(k === i)));
    state.at = i;
    change(i);
  };
  const state = { at: 0, choose };
  into.append(el("div", { class: "tabs", role: "group", "aria-label": label }, buttons));
  keys.choose ??= choose;
  return state;
}

/** Back, forward and play through frames; arrow keys, Home, End and the space bar do the same. */
function stepper(into, count, show, name = (i) => `${i + 1} of ${count}`, pause = 450) {
  let at = 0, timer = null;
  const output = el("output", { "aria-live": "polite" });
  const back = el("button", { type: "button", click: () => step(-1), "aria-label": "Back" }, "\u2190");
  const on = el("button", { type: "button", click: () => step(1), "aria-label": "Forward" }, "\u2192");
  const play = el("button", { type: "button", click: () => toggle() }, "Play");
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  };
  const toggle = () => {
    if (timer) return stop();
    if (at === count - 1) at = -1;
    play.textContent = "Pause";
    const tick = () => (at < count - 1 ? go(at + 1) : stop());
    tick();
    timer = setInterval(tick, pause);
  };
  const go = (i) => {
    at = Math.min(Math.max(i, 0), count - 1);
    output.textContent = name(at);
    back.disabled = at === 0;
    on.disabled = at === count - 1;
    show(at);
  };
  const step = (by) => {
    stop();
    go(at + by);
  };
  keys.step = step;
  keys.play = toggle;
  into.append(el("div", { class: "stepper" }, back, output, on, play));
  return { go, get at() { return at; } };
}

// -- pictures -------------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";
function shape(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  if (text != null) node.textContent = text;
  return node;
}

/** Round numbers that divide a range. */
function ticks([low, high], count = 5) {
  const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
  const size = [1, 2, 2.5, 5, 10].find((k) => k * power >= raw * 0.999) * power;
  const found = [];
  for (let t = Math.ceil(low / size - 1e-9) * size; t <= high + size * 1e-9; t += size) found.push(Number(t.toFixed(10)));
  return found;
}

const plots = new Map();
addEventListener("resize", () => plots.forEach((draw) => draw()));

/**
 * Lines, dots and areas on two axes, drawn for the width that there is.
 * x, y: {label, domain, ticks?, show?, log?}; lines: {points, colour, name?, dash?, width?, at?}; dots: {x, y, colour, name?, r?, side?};
 * rules: {x or y, colour, name?}; areas: {from, to, colour} along x.
 */
function plot(into, spec) {
  const draw = () => drawPlot(into, spec);
  plots.set(into, draw);
  draw();
}

function drawPlot(into, { x, y, lines = [], dots = [], rules = [], areas = [], height = 300, label = "" }) {
  const marks = y.ticks ?? ticks(y.domain, 4), written = (t) => (y.show ?? String)(t).replace("-", "\u2212");
  const width = Math.max(into.clientWidth, 240), left = 32 + 8 * Math.max(...marks.map((t) => written(t).length)), right = 14, top = 16, bottom = 46;
  const svg = shape("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  const along = (v) => (x.log ? Math.log(v) : v);
  const [x0, x1] = x.domain.map(along), [y0, y1] = y.domain;
  const px = (v) => left + ((along(v) - x0) / (x1 - x0)) * (width - left - right);
  const py = (v) => top + (1 - (v - y0) / (y1 - y0)) * (height - top - bottom);
  for (const { from, to, colour } of areas)
    svg.append(shape("rect", { x: px(from), y: top, width: Math.max(px(to) - px(from), 0), height: height - top - bottom, fill: `var(--${colour})` }));
  for (const t of marks) {
    svg.append(shape("line", { class: "grid", x1: left, x2: width - right, y1: py(t), y2: py(t) }));
    svg.append(shape("text", { x: left - 8, y: py(t) + 4, "text-anchor": "end" }, written(t)));
  }
  const many = width < 460 ? 4 : 7;
  for (const t of x.ticks ?? ticks(x.domain, many)) {
    svg.append(shape("line", { class: "axis", x1: px(t), x2: px(t), y1: height - bottom, y2: height - bottom + 5 }));
    svg.append(shape("text", { x: px(t), y: height - bottom + 20, "text-anchor": "middle" }, (x.show ?? String)(t).replace("-", "\u2212")));
  }
  svg.append(shape("line", { class: "axis", x1: left, x2: width - right, y1: height - bottom, y2: height - bottom }));
  svg.append(shape("text", { x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle" }, x.label));
  svg.append(shape("text", { x: 0, y: 0, transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, y.label));
  for (const rule of rules) {
    const upright = rule.x != null, at = upright ? px(rule.x) : py(rule.y);
    const ends = upright ? { x1: at, x2: at, y1: top, y2: height - bottom } : { x1: left, x2: width - right, y1: at, y2: at };
    svg.append(shape("line", { ...ends, stroke: `var(--${rule.colour ?? "grey"})`, "stroke-dasharray": "5 4", "stroke-width": 1.5 }));
    if (rule.name) {
      const late = upright && at > width * 0.62;
      const place = upright ? { x: at + (late ? -7 : 7), y: top + 12, "text-anchor": late ? "end" : "start" } : { x: width - right - 4, y: at - 6, "text-anchor": "end" };
      svg.append(shape("text", { ...place, class: "name", style: `fill: var(--${rule.colour ?? "grey"})` }, rule.name));
    }
  }
  for (const line of lines) {
    const path = line.points.map(([a, b], i) => `${i ? "L" : "M"}${px(a).toFixed(1)} ${py(Math.min(Math.max(b, y0), y1)).toFixed(1)}`).join("");
    svg.append(shape("path", { d: path, fill: "none", stroke: `var(--${line.colour})`, "stroke-width": line.width ?? 2.5, "stroke-dasharray": line.dash ? "6 5" : null, "stroke-linejoin": "round" }));
  }
  for (const dot of dots) {
    svg.append(shape("circle", { cx: px(dot.x), cy: py(Math.min(Math.max(dot.y, y0), y1)), r: dot.r ?? 6, fill: dot.hollow ? "var(--raised)" : `var(--${dot.colour})`, stroke: dot.hollow ? `var(--${dot.colour})` : "var(--raised)", "stroke-width": dot.hollow ? 2.5 : 1.5 }));
    if (dot.name) {
      const late = dot.side ? dot.side === "left" : px(dot.x) > width * 0.66;
      svg.append(shape("text", { class: "name", x: px(dot.x) + (late ? -11 : 11), y: py(dot.y) + (dot.dy ?? -9), "text-anchor": late ? "end" : "start", style: `fill: var(--${dot.colour})` }, dot.name));
    }
  }
  fill(into, svg);
  const named = lines.filter((line) => line.name);
  if (named.length) into.append(el("div", { class: "legend" }, named.map((line) => el("span", {}, el("i", { class: "swatch", style: `background: var(--${line.colour})` }), line.name))));
}

/** Rows of a label, a bar and a value; `mark` is a thin line on the same scale, `zero` where bars begin (0 by default). */
function bars(into, rows, { low = 0, high = 1, labels = "" } = {}) {
  const at = (v) => Math.min(Math.max((v - low) / (high - low), 0), 1) * 100;
  const zero = Math.min(Math.max(0, low), high);
  fill(into, el("div", { class: "bars", role: "img", "aria-label": labels }, rows.map(({ label, value, colour = "blue", text, mark }) => {
    const from = Math.min(at(zero), at(value)), to = Math.max(at(zero), at(value));
    return el("div", { class: "row" },
      el("div", { class: "label" }, label),
      el("div", { class: "track" },
        el("div", { class: "fill", style: `left: ${from}%; width: ${to - from}%; background: var(--${colour})` }),
        mark == null ? null : el("div", { class: "mark", style: `left: ${at(mark)}%` })),
      el("div", { class: "value" }, text ?? num(value)));
  })));
}

/** Large figures with what they are below. */
const facts = (into, pairs) =>
  fill(into, pairs.map(([value, what]) => el("div", {}, el("b", {}, value), el("span", {}, what))));

/** The background of a probability, red over yellow to green, as in the report of tokens. */
function heat(p) {
  const scale = [[232, 106, 90], [246, 165, 106], [250, 221, 133], [178, 216, 134], [104, 190, 117]];
  const place = Math.min(Math.max(p, 0), 1) * 4, i = Math.min(Math.floor(place), 3), part = place - i;
  return `rgb(${scale[i].map((c, k) => Math.round(c + (scale[i + 1][k] - c) * part)).join(" ")})`;
}

// -- the frame ------------------------------------------------------------------------------------------------

/** Where a function is shown: in the site its place in the reference, in the repository its file. */
const REFERENCE = {
  "agents.algorithms.maths": "equations", "agents.offline.preference_losses": "equations", "agents.algorithms.importance": "equations",
  "reward_models.bradley_terry": "rewards", "textrl_env.embedded.raters": "rewards", "textrl_env.embedded.rubric": "rewards", "reward_models.rules": "rewards",
  "textrl_env.exact.solver": "exact", "textrl_env.exact.token_mdp": "exact", "textrl_env.kl": "environments", "textrl_env.core": "environments",
  "agents.offline.sft": "offline", "agents.offline.dpo": "offline", "agents.offline.reward_model": "offline", "agents.preferences.collection": "offline",
  "agents.evaluation.evaluation": "evaluation", "agents.evaluation.verdict": "evaluation", "agents.evaluation.best_of_n": "evaluation",
  "agents.evaluation.diversity": "evaluation", "agents.evaluation.token_heatmap": "evaluation",
  "agents.base": "agents", "agents.algorithms.reinforce": "agents", "agents.algorithms.ppo": "agents", "agents.algorithms.grpo": "agents",
  "agents.policies.base": "agents", "agents.rollouts.rollout": "agents", "textrl_env.envs.text_rlhf": "environments", "textrl_env.envs.line_world": "environments",
  "reward_models.classifier": "rewards", "textrl_env.lm.sequences": "language_models", "textrl_env.lm.decoding": "language_models", "textrl_env.lm.causal_lm": "language_models",
};
function functionLink(path) {
  const [module, name] = path.split(":");
  const inRepository = location.pathname.includes("/docs/explainer/");
  const page = REFERENCE[module];
  const href = inRepository || !page ? `../../${module.replaceAll(".", "/")}.py` : `../reference/${page}.html#${module}.${name}`;
  const parts = `${module}.${name}`.split(".").flatMap((part, i) => (i ? [el("wbr"), `.${part}`] : [part]));
  const shown = el("code", {}, parts);
  return inRepository || page ? el("a", { href }, shown) : shown;
}

/** Header, "made by" and navigation around what a page has written itself. */
function frame() {
  const here = PAGES.findIndex(([file]) => location.pathname.split("/").at(-1) === file);
  document.body.prepend(el("header", {}, el("a", { href: "index.html" }, "How language models learn from feedback"),
    here < 0 ? el("span", {}, "textrl-env") : el("span", {}, `${here + 1} of ${PAGES.length}`)));
  for (const node of document.querySelectorAll("[data-function]")) fill(node, functionLink(node.dataset.function));
  // On a narrow screen a table of this class is a list, and what a column held stands before each of its cells.
  for (const table of document.querySelectorAll("table.stack.labelled")) {
    const heads = [...table.querySelectorAll("th")].map((th) => th.textContent);
    for (const row of table.querySelectorAll("tr")) row.querySelectorAll("td").forEach((td, i) => { td.dataset.label = heads[i]; });
  }
  const made = document.querySelector("main").dataset.made;
  const foot = [];
  if (made) foot.push(el("section", { class: "made" }, el("h2", {}, "Made by"), el("ul", {}, made.split(" ").map((path) => el("li", {}, functionLink(path))))));
  if (document.querySelector("main").dataset.command) foot.push(el("p", { class: "quiet" }, "On your own machine: ", el("code", {}, document.querySelector("main").dataset.command)));
  if (here >= 0)
    foot.push(el("nav", { class: "foot", "aria-label": "Pages" },
      here > 0 ? el("a", { href: PAGES[here - 1][0], rel: "prev" }, `\u2190 ${PAGES[here - 1][1]}`) : el("a", { href: "index.html" }, "\u2190 All pages"),
      PAGES[here + 1] ? el("a", { href: PAGES[here + 1][0], rel: "next" }, `${PAGES[here + 1][1]} \u2192`) : el("a", { href: "index.html" }, "All pages")));
  const hints = [];
  if (keys.step) hints.push(el("span", {}, el("kbd", {}, "\u2190"), " ", el("kbd", {}, "\u2192"), " step  "));
  if (keys.play) hints.push(el("span", {}, el("kbd", {}, "space"), " play  "));
  if (keys.choose) hints.push(el("span", {}, el("kbd", {}, "1"), " \u2026 choose  "));
  hints.push(el("span", {}, el("kbd", {}, "n"), " ", el("kbd", {}, "p"), " next and previous page"));
  document.body.append(el("footer", {}, foot, el("p", { class: "keys" }, hints)));
}
