"use strict";
// Texts of models and files reach the page as text nodes and attribute values alone, never as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const LABELS = {accuracy: "right answer", cross_reference: "cross-reference", summary: "summary"};
const MARKS = {
  format: "breaks the format", language: "not in the scripts of English prose", box: "the answer's box",
  fact: "case fact, cited whole", cited: "cited term", tag: "tag",
};
const PRIORITY = ["format", "language", "box", "fact", "cited"]; // the first of these that covers a place colours it
const QUIET = 8000; // milliseconds without a touch of keys, mouse or screen, after which nobody is taken to be reading
const LIST_LENGTH = 100; // rows that are added to the list at a time

const byId = (id) => document.getElementById(id);
const label = (name) => LABELS[name] ?? name;
const digits = (value, most = 3) => value == null ? "–" : value.toLocaleString("en", {maximumFractionDigits: most});
const short = (value) => Math.abs(value) >= 1e5 || (value && Math.abs(value) < 1e-2) ? value.toExponential(1) : String(Number(value.toPrecision(3)));
const signed = (value, most) => `${digits(value, most)}`.match(/[1-9]/) ? `${value < 0 ? "−" : "+"}${digits(Math.abs(value), most)}` : "0";
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

function node(name, attributes = {}, ...children) {
  const element = name.startsWith("svg:")
    ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value != null) element.setAttribute(key, value);
  element.append(...children.filter((child) => child != null).map((child) => child instanceof Node ? child : String(child)));
  return element;
}

// ---- the responses and what is known of each ----------------------------------------------------------------------

const responses = data.responses;
const byQuestion = new Map();
for (const response of responses) {
  response.asked = data.questions[response.question];
  response.key = [response.set, response.step ?? "", response.asked.id, response.sample ?? ""].join("/");
  const id = response.asked.id || response.asked.text;
  if (!byQuestion.has(id)) byQuestion.set(id, []);
  byQuestion.get(id).push(response);
  response.related = byQuestion.get(id);
}
for (const related of byQuestion.values()) related.sort((a, b) => (a.step ?? 0) - (b.step ?? 0) || (a.sample ?? 0) - (b.sample ?? 0));

function before_and_after(response) {
  // The first and the last of the same kind: held-out responses among themselves, training steps among themselves.
  const held = (other) => other.set.startsWith("held out");
  const same = response.related.filter((other) => held(other) === held(response));
  const [first, last] = [same[0], same[same.length - 1]];
  return first && first.step !== last.step ? [first, last] : null;
}

function gain(response) {
  const pair = before_and_after(response);
  return pair && pair[1] === response && pair[0].total != null && pair[1].total != null ? pair[1].total - pair[0].total : null;
}

const answerOf = (response) => response.error != null ? "failed" : response.right === true ? "right"
  : response.right === false ? (response.answer == null ? "none" : "wrong") : "unknown";

function earned(response, name) {
  const value = response.parts?.find((part) => part.name === name)?.value;
  return value == null ? "no value" : value >= 1 ? "earned" : value > 0 ? "partly" : value < 0 ? "negative" : "not earned";
}

function searchable(response) {
  response.haystack ??= [response.asked.id, response.asked.text, ...response.asked.options.flat(), response.text ?? ""].join("\n").toLowerCase();
  return response.haystack;
}

// ---- filters ------------------------------------------------------------------------------------------------------

const ANSWERS = {right: "right", wrong: "wrong", none: "no readable answer", failed: "could not be scored"};
const ORDERS = {
  "": "as sampled", lowest: "lowest reward first", highest: "highest reward first", longest: "longest first",
  gained: "gained most, before to after", lost: "lost most, before to after",
};
const state = {filters: {}, selected: null, compare: false, length: LIST_LENGTH, touched: 0};
let matching = [];

function filterList() {
  const names = [...new Set(responses.flatMap((response) => (response.parts ?? []).filter((part) => part.value != null).map((part) => part.name)))];
  const steps = [...new Set(responses.map((response) => response.step).filter((step) => step != null))].sort((a, b) => a - b);
  const filters = [
    ["set", "Responses of", Object.fromEntries(data.sets.filter((set) => set.shown).map((set) => [set.name, set.name])), (response, value) => response.set === value],
    ["step", "Step", Object.fromEntries(steps.map((step) => [step, step])), (response, value) => String(response.step) === value, steps],
    ["answer", "Answer", present(ANSWERS, answerOf), (response, value) => answerOf(response) === value],
  ];
  for (const name of names.filter((name) => name !== "accuracy")) {
    const values = present({earned: "earned", partly: "partly earned", "not earned": "not earned", negative: "negative", "no value": "no value"}, (response) => earned(response, name));
    filters.push([`part:${name}`, capital(label(name)), values, (response, value) => earned(response, name) === value]);
  }
  const ends = {whole: "ended by itself", cut: "truncated", left: "not trained on"};
  const ending = {whole: (r) => r.stopped === true, cut: (r) => r.stopped === false, left: (r) => r.trained === false};
  filters.push(["end", "Ending", Object.fromEntries(Object.entries(ends).filter(([end]) => responses.some(ending[end]))), (response, value) => ending[value](response)]);
  return filters.filter(([, , values]) => Object.keys(values).length > 1 || (Object.keys(values).length === 1 && values.left));
}

function present(labels, valueOf) {
  const values = new Set(responses.map(valueOf));
  return Object.fromEntries(Object.entries(labels).filter(([value]) => values.has(value)));
}

const FILTERS = filterList();

function buildFilters() {
  const form = byId("filters");
  for (const [name, title, values, , order] of FILTERS) {
    const select = node("select", {name});
    select.append(node("option", {value: ""}, "all"), ...(order ?? Object.keys(values)).map((value) => node("option", {value}, values[value])));
    form.append(node("label", {}, title, select));
  }
  const pairs = responses.some((response) => gain(response) != null);
  const orders = Object.entries(ORDERS).filter(([order]) => pairs || !["gained", "lost"].includes(order));
  form.append(node("label", {}, "Order", node("select", {name: "order"}, ...orders.map(([value, text]) => node("option", {value}, text)))));
  form.append(node("label", {}, "Search", node("input", {type: "search", name: "search", placeholder: "question, response, id"})));
  form.addEventListener("input", () => { readFilters(); refresh(); });
  form.addEventListener("submit", (event) => event.preventDefault());
}

function readFilters() {
  state.filters = Object.fromEntries([...new FormData(byId("filters"))].filter(([, value]) => value !== ""));
  state.length = LIST_LENGTH;
  state.compare = ["gained", "lost"].includes(state.filters.order);
}

function showFilters() {
  for (const field of byId("filters").elements) {
    field.value = state.filters[field.name] ?? "";
    if (field.value !== (state.filters[field.name] ?? "")) { delete state.filters[field.name]; field.value = ""; }
    field.classList.toggle("set", field.value !== "");
  }
}

function select_matching() {
  const active = FILTERS.filter(([name]) => state.filters[name]);
  const words = (state.filters.search ?? "").toLowerCase();
  matching = responses.filter((response) => active.every(([name, , , test]) => test(response, state.filters[name])) && (!words || searchable(response).includes(words)));
  const {order} = state.filters, total = (response) => response.total ?? -Infinity;
  if (order === "lowest") matching = matching.filter((response) => response.total != null).sort((a, b) => a.total - b.total);
  if (order === "highest") matching.sort((a, b) => total(b) - total(a));
  if (order === "longest") matching.sort((a, b) => (b.tokens ?? 0) - (a.tokens ?? 0));
  if (order === "gained" || order === "lost") {
    const way = order === "gained" ? 1 : -1;
    matching = matching.filter((response) => gain(response) != null).sort((a, b) => way * (gain(b) - gain(a)));
  }
}

function refresh() {
  showFilters();
  select_matching();
  if (!matching.some((response) => response.key === state.selected)) state.selected = matching[0]?.key ?? null;
  showList();
  showDetail();
  keepInAddress();
}

function keepInAddress() {
  const address = new URLSearchParams(state.filters);
  if (state.selected) address.set("response", state.selected);
  if (state.compare) address.set("compare", "1");
  history.replaceState(null, "", `#${address}`);
}

function readAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  state.selected = address.get("response");
  state.compare = address.has("compare");
  for (const name of ["response", "compare"]) address.delete(name);
  state.filters = Object.fromEntries(address);
}

// ---- the list -----------------------------------------------------------------------------------------------------

function sign(response) {
  const answer = answerOf(response);
  return answer === "right" ? node("i", {class: "right", title: "right"}, "✓")
    : answer === "unknown" ? node("i") : node("i", {class: "wrong", title: ANSWERS[answer]}, answer === "wrong" ? "✗" : answer === "none" ? "∅" : "!");
}

function showList() {
  const list = byId("list");
  const place = matching.findIndex((response) => response.key === state.selected);
  while (place >= state.length) state.length += LIST_LENGTH;
  list.replaceChildren(...matching.slice(0, state.length).map((response) => {
    const where = [response.step == null ? null : `step ${response.step}`, response.asked.id, response.sample == null ? null : `#${response.sample}`].filter(Boolean).join(" · ");
    const ordered = ["gained", "lost"].includes(state.filters.order) ? signed(gain(response), 2) : digits(response.total, 2);
    const row = node("li", {"aria-current": response.key === state.selected, title: response.set}, node("b", {}, ordered), sign(response), node("span", {}, where));
    row.addEventListener("click", () => choose(response));
    return row;
  }));
  byId("count").textContent = matching.length ? `${digits(place + 1)} of ${digits(matching.length)} that match, ${digits(responses.length)} in all` : `none of ${digits(responses.length)} matches`;
  byId("more").hidden = matching.length <= state.length;
  byId("more").textContent = `${digits(matching.length - state.length)} more`;
}

function choose(response) {
  state.selected = response.key;
  if (!matching.includes(response)) { state.filters = {}; state.compare = false; refresh(); } else { showList(); showDetail(); keepInAddress(); }
  byId("list").querySelector("[aria-current=true]")?.scrollIntoView({block: "nearest"});
}

function move(by) {
  const place = matching.findIndex((response) => response.key === state.selected);
  const next = matching[Math.min(Math.max(place + by, 0), matching.length - 1)];
  if (next) choose(next);
}

function moveWithinQuestion(by) {
  const current = responses.find((response) => response.key === state.selected);
  const next = current && current.related[current.related.indexOf(current) + by];
  if (next) choose(next);
}

// ---- one response -------------------------------------------------------------------------------------------------

function marked(text, marks, right) {
  // Marks may overlap: the text is cut where any of them starts or ends, and a piece has the first kind of PRIORITY.
  const edges = [...new Set([0, text.length, ...marks.flatMap(([start, end]) => [start, end])])].filter((edge) => edge <= text.length).sort((a, b) => a - b);
  const starts = [...marks].sort((a, b) => a[0] - b[0]);
  const pieces = [];
  let open = [], next = 0;
  for (let i = 0; i + 1 < edges.length; i++) {
    const [start, end] = [edges[i], edges[i + 1]];
    open = open.filter((mark) => mark[1] > start);
    while (next < starts.length && starts[next][0] <= start) open.push(starts[next++]);
    const kinds = [...new Set(open.map((mark) => mark[2]))];
    const piece = text.slice(start, end);
    pieces.push(kinds.length ? node("mark", {class: markClass(kinds, right), title: kinds.map((kind) => MARKS[kind] ?? kind).join(", ")}, piece) : piece);
  }
  return pieces;
}

function markClass(kinds, right) {
  const first = PRIORITY.find((kind) => kinds.includes(kind));
  if (first === "box") return right ? "box-right" : "box-wrong";
  return first ?? (kinds.every((kind) => kind === "tag") ? "tag" : "other");
}

function legend(...lists) {
  const kinds = [...new Set(lists.flat().map((mark) => mark[2]))].filter((kind) => !["tag", "box"].includes(kind));
  return kinds.length ? node("p", {class: "legend"}, ...kinds.map((kind) => node("mark", {class: markClass([kind])}, MARKS[kind] ?? kind))) : null;
}

function questionBox(response) {
  const {asked} = response, chosen = response.answer;
  const turns = asked.turns.map(([role, content]) => node("p", {class: "text turn"}, `${role}: ${content}`));
  const options = asked.options.map(([name, text]) => {
    const right = name === asked.answer, taken = name === chosen;
    const notes = [right ? "right" : null, taken ? "chosen" : null].filter(Boolean).join(", ");
    return node("li", {class: `${right ? "is-right" : ""} ${taken ? "is-chosen" : ""}`}, `${name}) ${text}`, notes ? node("small", {}, notes) : null);
  });
  const answer = options.length || !asked.answer ? null
    : node("p", {}, "Right answer: ", node("b", {}, asked.answer), chosen == null ? " (no answer found)" : ", found: ", chosen == null ? null : node("b", {}, chosen));
  return node("section", {class: "box question"}, node("h3", {}, "Question"), ...turns,
    node("p", {class: "text"}, ...marked(asked.text, response.question_marks ?? [], false)),
    options.length ? node("ul", {class: "options"}, ...options) : null, answer);
}

function responseBox(response, title) {
  const text = response.text ?? "", marks = response.marks ?? [];
  return node("section", {class: "box response"}, node("h3", {}, title),
    node("div", {class: "long"}, node("p", {class: "text"}, ...(text ? marked(text, marks, response.right) : ["(empty)"]))),
    legend(marks, response.question_marks ?? []));
}

function rewardBox(response) {
  if (response.error != null) {
    return node("section", {class: "box error"}, node("h3", {}, "Could not be scored"), node("p", {class: "text"}, response.error),
      response.traceback ? node("details", {}, node("summary", {}, "traceback"), node("p", {class: "text"}, response.traceback)) : null);
  }
  if (response.total == null && !response.parts) return null;
  const counted = (response.parts ?? []).filter((part) => part.points != null);
  const rows = (response.parts ?? []).map((part) => node("tr", {},
    node("td", {}, label(part.name)), node("td", {}, digits(part.value)), node("td", {}, part.points == null ? "" : signed(part.points)),
    node("td", {}, node("ul", {}, ...part.why.map((reason) => node("li", {}, reason))))));
  const sum = counted.map((part) => digits(part.points)).join(" + ").replaceAll("+ -", "− ");
  return node("section", {class: "box"}, node("h3", {}, "Why this reward"), node("div", {class: "scroll"}, node("table", {class: "reward"},
    node("thead", {}, node("tr", {}, ...["part", "value", "points", "why"].map((head) => node("th", {}, head)))),
    node("tbody", {}, ...rows),
    node("tfoot", {}, node("tr", {}, node("td", {}, "reward"), node("td"), node("td", {}, digits(response.total)), node("td", {}, sum ? `= ${sum}` : ""))))));
}

function titleOf(response) {
  const facts = [response.set, response.set.endsWith(`step ${response.step}`) || response.step == null ? null : `step ${response.step}`,
    response.asked.id, response.asked.source, response.sample == null ? null : `sample ${response.sample}`,
    response.tokens == null ? null : `${digits(response.tokens)} tokens`, response.stopped === false ? "truncated" : null,
    response.advantage == null ? null : `advantage ${digits(response.advantage, 2)}`, response.trained === false ? "not trained on" : null];
  const answer = answerOf(response);
  return node("p", {class: "title"}, node("b", {}, response.total == null ? "no reward" : `reward ${digits(response.total)}`),
    answer === "unknown" ? null : node("span", {class: answer === "right" ? "right" : "wrong"}, answer === "wrong" || answer === "right" ? `${answer} answer` : ANSWERS[answer]),
    ...facts.filter(Boolean).map((fact) => node("span", {}, fact)));
}

function elsewhere(response) {
  if (response.related.length < 2) return null;
  const buttons = response.related.slice(0, 60).map((other) => {
    const place = [other.step == null ? null : `step ${other.step}`, other.sample == null ? null : `#${other.sample}`].filter(Boolean).join(" ");
    const button = node("button", {type: "button", "aria-pressed": other === response, title: other.set}, `${place}: ${digits(other.total, 2)} `, sign(other));
    button.addEventListener("click", () => choose(other));
    return button;
  });
  let compare = null;
  if (before_and_after(response)) {
    compare = node("button", {type: "button", id: "compare", "aria-pressed": state.compare}, "before and after");
    compare.addEventListener("click", toggleCompare);
  }
  return node("div", {class: "elsewhere"}, "Same question:", compare, ...buttons);
}

function toggleCompare() {
  state.compare = !state.compare;
  showDetail();
  keepInAddress();
}

function showDetail() {
  const response = responses.find((each) => each.key === state.selected), detail = byId("detail");
  if (!response) return detail.replaceChildren(node("p", {class: "note"}, responses.length ? "No response matches these filters." : "There are no responses yet."));
  const pair = state.compare ? before_and_after(response) : null;
  const parts = [elsewhere(response)];
  if (pair) {
    parts.push(questionBox(pair[1]));
    const columns = pair.map((each, place) => node("div", {}, titleOf(each), responseBox(each, place ? "After" : "Before"), rewardBox(each)));
    parts.push(node("div", {class: "pair even"}, ...columns));
  } else {
    const teacher = response.teacher ? node("section", {class: "box response"}, node("h3", {}, "Teacher"), node("p", {class: "text"}, response.teacher)) : null;
    parts.unshift(titleOf(response));
    parts.push(node("div", {class: "pair"}, questionBox(response), responseBox(response, "Response")), rewardBox(response), teacher);
  }
  detail.replaceChildren(...parts.filter(Boolean));
}

// ---- curves -------------------------------------------------------------------------------------------------------

const CHARTS = [
  ["Reward", [["reward/mean", "eval/mean", "reward"]]],
  ["Its parts", [["reward/accuracy", "eval/accuracy", "right answer"], ["reward/format", "eval/format", "format"],
    ["reward/cross_reference", "eval/cross_reference", "cross-reference"], ["reward/consistency", "eval/consistency", "consistency"]]],
  ["KL from the start", [["kl/mean", null, "nats per token"]]],
  ["Response length", [["response/length", "eval/length", "tokens"]]],
  ["Fine-tuning loss", [["loss/total", "eval/loss", "nats per token"]]],
];

function points(trained, measured) {
  const {curves} = data, pairs = (steps, values) => (values ?? []).map((value, i) => [steps[i], value]).filter(([, value]) => value != null);
  return {line: pairs(curves.steps, curves.metrics[trained]), dots: measured ? pairs(curves.evaluated, curves.measured[measured]) : []};
}

function chart(title, series, small) {
  const drawn = series.map(([trained, measured, name], i) => ({name, colour: `c${i % 4 + 1}`, ...points(trained, measured)})).filter(({line, dots}) => line.length + dots.length);
  if (!drawn.length) return null;
  const width = small ? 230 : 340, height = small ? 90 : 150, [left, right, top, bottom] = [50, 8, 8, 18];
  const all = drawn.flatMap(({line, dots}) => [...line, ...dots]);
  const range = (i) => all.reduce(([low, high], point) => [Math.min(low, point[i]), Math.max(high, point[i])], [Infinity, -Infinity]);
  const [x0, x1] = range(0), [low, high] = range(1), margin = (high - low || Math.abs(high) || 1) * 0.06;
  const [y0, y1] = [low - margin, high + margin];
  const x = (step) => left + (width - left - right) * (step - x0) / (x1 - x0 || 1), y = (value) => top + (height - top - bottom) * (y1 - value) / (y1 - y0);
  const svg = node("svg:svg", {viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${drawn.map(({name, line, dots}) => `${name} ${digits((line.length ? line : dots).at(-1)[1], 4)}`).join(", ")}`});
  for (const value of low === high ? [low] : [low, (low + high) / 2, high]) {
    svg.append(node("svg:line", {class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value)}),
      node("svg:text", {x: left - 5, y: y(value) + 4, "text-anchor": "end"}, short(value)));
  }
  svg.append(node("svg:text", {x: left, y: height - 4}, x0), x1 > x0 ? node("svg:text", {x: width - right, y: height - 4, "text-anchor": "end"}, `step ${x1}`) : "");
  for (const {colour, line, dots} of drawn) {
    if (line.length > 1) svg.append(node("svg:path", {class: colour, d: line.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("")}));
    for (const [step, value] of line.length === 1 ? [...line, ...dots] : dots) svg.append(node("svg:circle", {class: colour, cx: x(step), cy: y(value), r: 3.5}));
  }
  const cursor = node("svg:line", {class: "cursor", y1: top, y2: height - bottom, visibility: "hidden"});
  svg.append(cursor);
  const caption = node("figcaption");
  const read = (step) => {
    const nearest = (list) => list.reduce((best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
    const values = drawn.map(({name, colour, line, dots}) => node("span", {class: colour}, `${series.length > 1 || name !== title ? `${name} ` : ""}${short(nearest(line.length ? line : dots)[1])}`));
    caption.replaceChildren(node("b", {}, title), ...values, step === x1 ? "" : node("span", {}, `at step ${Math.round(step)}`));
  };
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect(), at = (event.clientX - area.left) / area.width * width;
    const step = Math.min(Math.max(x0 + (at - left) / (width - left - right) * (x1 - x0), x0), x1);
    cursor.setAttribute("x1", x(step)); cursor.setAttribute("x2", x(step)); cursor.setAttribute("visibility", "visible");
    read(step);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); read(x1); });
  read(x1);
  return node("figure", {}, caption, svg);
}

function showCurves() {
  const {curves} = data;
  const fineTuned = "eval/loss" in curves.measured; // loss/total is something else in RL, and stands with the others there
  const charts = CHARTS.filter(([title]) => fineTuned || title !== "Fine-tuning loss");
  const main = charts.map(([title, series]) => chart(title, series)).filter(Boolean);
  const used = new Set(charts.flatMap(([, series]) => series.flat()));
  const others = Object.keys(curves.metrics).filter((name) => !used.has(name));
  byId("curves").hidden = !main.length && !others.length;
  byId("charts").append(...main);
  const every = curves.every > 1 ? `A point of a line is the mean of ${curves.every} steps. ` : "";
  byId("curves-note").textContent = `${every}Lines: training. Dots: held-out questions.`;
  const details = byId("other-curves");
  details.hidden = !others.length;
  details.addEventListener("toggle", () => { // drawn when they are first asked for
    if (!byId("other-charts").childElementCount) byId("other-charts").append(...others.sort().map((name) => chart(name, [[name, null, name]], true)).filter(Boolean));
  });
}

// ---- tables -------------------------------------------------------------------------------------------------------

const COLUMNS = {"eval/mean": "reward", "eval/accuracy": "right answer", "eval/cross_reference": "cross-reference", "eval/failed": "not scored", "eval/length": "tokens"};

function tableOf(table) {
  const intervals = table.rows.some((row) => row.cells.some((value) => value?.low != null));
  const exact = (value) => digits(value, Math.abs(value) < 10 ? 3 : 1);
  const cell = (value) => value == null ? node("td", {}, "–") : node("td", {}, exact(value.mean), value.low == null ? null : node("small", {}, `${exact(value.low)} to ${exact(value.high)}`));
  return node("div", {}, node("h3", {}, table.title), node("p", {class: "note"}, intervals ? "Means, with intervals of 95% over questions." : "Means."), node("div", {class: "scroll"}, node("table", {},
    node("thead", {}, node("tr", {}, node("th", {}, table.first), ...table.columns.map((name) => node("th", {}, COLUMNS[name] ?? name.replace("eval/", "").replaceAll("_", " "))))),
    node("tbody", {}, ...table.rows.map((row) => node("tr", {}, node("td", {}, row.name), ...row.cells.map(cell)))))));
}

function showTables() {
  byId("evaluations").hidden = !data.tables.length;
  byId("tables").append(...data.tables.map(tableOf));
}

// ---- the head, the keys, the server -------------------------------------------------------------------------------

function showHead() {
  document.title = `${data.run.name} · responses`;
  byId("name").textContent = data.run.name;
  byId("facts").textContent = [...data.run.facts.map(([name, value]) => `${name} ${value}`), `written ${data.run.written.slice(0, 16).replace("T", " ")} UTC`].join(" · ");
  const {step, question} = data.selection;
  const chosen = [step == null ? null : `step ${step}`, question == null ? null : `question ${question}`].filter(Boolean).join(", ");
  const sum = (sets) => sets.reduce(({shown, total}, set) => ({shown: shown + set.shown, total: total + set.total}), {shown: 0, total: 0});
  const named = (name, {shown, total}) => total ? [`${name}: ${shown === total ? `all ${digits(total)}` : `${digits(shown)} of ${digits(total)}, evenly spread`}`] : [];
  const heldOut = data.sets.filter((set) => set.step != null && set.total);
  const sets = [...data.sets.filter((set) => set.step == null).flatMap((set) => named(set.name, set)), ...named(`${heldOut.length} evaluations of held-out questions`, sum(heldOut))];
  byId("shown").append(`${chosen ? `Only ${chosen}. ` : ""}In this page: ${sets.join("; ") || "none"}.`);
  if (data.sets.every((set) => set.shown === set.total) && !chosen) return;
  if (!location.protocol.startsWith("http")) return byId("shown").append(" python -m crpo_jax.view shows every response of a step or of a question.");
  const form = node("form", {id: "select", method: "get"}, ...[["step", step], ["question", question]].map(([name, value]) => node("label", {}, `All of ${name}`, node("input", {name, value}))), node("button", {}, "Show"));
  form.addEventListener("submit", (event) => { // not by the form itself, which the page's policy forbids
    event.preventDefault();
    location.href = `?${new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""))}`;
  });
  byId("shown").after(form);
}

const KEYS = {
  j: () => move(1), ArrowDown: () => move(1), k: () => move(-1), ArrowUp: () => move(-1),
  "[": () => moveWithinQuestion(-1), "]": () => moveWithinQuestion(1), c: toggleCompare,
  "/": () => byId("filters").elements.search.focus(),
  Escape: () => { state.filters = {}; state.compare = false; state.length = LIST_LENGTH; refresh(); document.activeElement?.blur(); },
};

function pressed(event) {
  const typing = event.target.matches("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey || (typing && event.key !== "Escape")) return;
  const arrow = event.key.startsWith("Arrow");
  if (!KEYS[event.key] || (arrow && !byId("responses").contains(document.activeElement))) return;
  event.preventDefault();
  KEYS[event.key]();
}

async function follow(known) {
  // The page is read again when the run's files have changed and nobody is reading; the address has filters and response.
  try {
    const answer = await fetch("state", {cache: "no-store"});
    const current = await answer.text();
    if (answer.ok) known ??= current;
    if (answer.ok && current !== known && Date.now() - state.touched > QUIET) return location.reload();
  } catch { /* the server has ended: the page stays as it is */ }
  setTimeout(follow, 3000, known);
}

showHead();
showCurves();
showTables();
buildFilters();
readAddress();
refresh();
byId("more").addEventListener("click", () => { state.length += LIST_LENGTH; showList(); });
document.addEventListener("keydown", pressed);
for (const link of document.querySelectorAll("nav a")) link.hidden = byId(link.hash.slice(1)).hidden;
document.querySelector("nav").addEventListener("click", (event) => { // the address holds filters, not a place
  const target = event.target.hash && byId(event.target.hash.slice(1));
  if (target) { event.preventDefault(); target.scrollIntoView(); }
});
for (const touch of ["keydown", "pointermove", "pointerdown", "wheel", "touchmove"]) document.addEventListener(touch, () => { state.touched = Date.now(); }, {passive: true});
if (location.protocol.startsWith("http")) follow(null);
