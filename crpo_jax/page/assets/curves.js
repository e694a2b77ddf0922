// Curves of the metrics, as SVG.

const CHARTS = [
  ["Reward", [["reward/mean", "eval/mean", "reward"]]],
  [
    "Its parts",
    [
      ["reward/accuracy", "eval/accuracy", "right answer"],
      ["reward/format", "eval/format", "format"],
      ["reward/cross_reference", "eval/cross_reference", "cross-reference"],
      ["reward/consistency", "eval/consistency", "consistency"],
    ],
  ],
  ["KL from the start", [["kl/mean", null, "nats per token"]]],
  ["Response length", [["response/length", "eval/length", "tokens"]]],
  ["Fine-tuning loss", [["loss/total", "eval/loss", "nats per token"]]],
];

function points(trained, measured) {
  const {curves} = data,
    pairs = (steps, values) => (values ?? []).map((value, i) => [steps[i], value]).filter(([, value]) => value != null);
  return {
    line: pairs(curves.steps, curves.metrics[trained]),
    dots: measured ? pairs(curves.evaluated, curves.measured[measured]) : [],
  };
}

function chart(title, series, small) {
  const drawn = series
    .map(([trained, measured, name], i) => ({name, colour: `c${(i % 4) + 1}`, ...points(trained, measured)}))
    .filter(({line, dots}) => line.length + dots.length);
  if (!drawn.length) return null;
  const width = small ? 230 : 340,
    height = small ? 90 : 150,
    [left, right, top, bottom] = [50, 8, 8, 18];
  const all = drawn.flatMap(({line, dots}) => [...line, ...dots]);
  const range = (i) =>
    all.reduce(([low, high], point) => [Math.min(low, point[i]), Math.max(high, point[i])], [Infinity, -Infinity]);
  const [x0, x1] = range(0),
    [low, high] = range(1),
    margin = (high - low || Math.abs(high) || 1) * 0.06;
  const [y0, y1] = [low - margin, high + margin];
  const x = (step) => left + ((width - left - right) * (step - x0)) / (x1 - x0 || 1),
    y = (value) => top + ((height - top - bottom) * (y1 - value)) / (y1 - y0);
  const last = drawn.map(({name, line, dots}) => `${name} ${short((line.length ? line : dots).at(-1)[1])}`);
  const svg = node("svg:svg", {
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    "aria-label": `${title}: ${last.join(", ")}`,
  });
  for (const value of low === high ? [low] : [low, (low + high) / 2, high]) {
    svg.append(
      node("svg:line", {class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value)}),
      node("svg:text", {x: left - 5, y: y(value) + 4, "text-anchor": "end"}, short(value)),
    );
  }
  svg.append(
    node("svg:text", {x: left, y: height - 4}, x0),
    x1 > x0 ? node("svg:text", {x: width - right, y: height - 4, "text-anchor": "end"}, `step ${x1}`) : "",
  );
  for (const {colour, line, dots} of drawn) {
    if (line.length > 1)
      svg.append(
        node("svg:path", {
          class: colour,
          d: line.map(([step, value], i) => `${i ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join(""),
        }),
      );
    for (const [step, value] of line.length === 1 ? [...line, ...dots] : dots)
      svg.append(node("svg:circle", {class: colour, cx: x(step), cy: y(value), r: 3.5}));
  }
  const cursor = node("svg:line", {class: "cursor", y1: top, y2: height - bottom, visibility: "hidden"});
  svg.append(cursor);
  const caption = node("figcaption");
  const read = (step) => {
    const nearest = (list) =>
      list.reduce((best, point) => (Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best));
    const values = drawn.map(({name, colour, line, dots}) =>
      node(
        "span",
        {class: colour},
        `${series.length > 1 || name !== title ? `${name} ` : ""}${short(nearest(line.length ? line : dots)[1])}`,
      ),
    );
    caption.replaceChildren(
      node("b", {}, title),
      ...values,
      step === x1 ? "" : node("span", {}, `at step ${Math.round(step)}`),
    );
  };
  svg.addEventListener("pointermove", (event) => {
    const area = svg.getBoundingClientRect(),
      at = ((event.clientX - area.left) / area.width) * width;
    const step = Math.min(Math.max(x0 + ((at - left) / (width - left - right)) * (x1 - x0), x0), x1);
    cursor.setAttribute("x1", x(step));
    cursor.setAttribute("x2", x(step));
    cursor.setAttribute("visibility", "visible");
    read(step);
  });
  svg.addEventListener("pointerleave", () => {
    cursor.setAttribute("visibility", "hidden");
    read(x1);
  });
  read(x1);
  return node("figure", {}, caption, svg);
}

function showCurves() {
  const {curves} = data;
  const fineTuned = "eval/loss" in curves.measured; // in RL loss/total is something else
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
  details.addEventListener("toggle", () => {
    // drawn when they are first asked for
    if (!byId("other-charts").childElementCount)
      byId("other-charts").append(
        ...others
          .sort()
          .map((name) => chart(name, [[name, null, name]], true))
          .filter(Boolean),
      );
  });
}
