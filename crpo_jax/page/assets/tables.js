// Tables of the evaluations.

const COLUMNS = {
  "eval/mean": "reward",
  "eval/accuracy": "right answer",
  "eval/cross_reference": "cross-reference",
  "eval/failed": "not scored",
  "eval/length": "tokens",
};

function tableOf(table) {
  const intervals = table.rows.some((row) => row.cells.some((value) => value?.low != null));
  const exact = (value) => digits(value, Math.abs(value) < 10 ? 3 : 1);
  const cell = (value) =>
    value == null
      ? node("td", {}, "–")
      : node(
          "td",
          {},
          exact(value.mean),
          value.low == null ? null : node("small", {}, `${exact(value.low)} to ${exact(value.high)}`),
        );
  return node(
    "div",
    {},
    node("h3", {}, table.title),
    node("p", {class: "note"}, intervals ? "Means, with intervals of 95% over questions." : "Means."),
    node(
      "div",
      {class: "scroll"},
      node(
        "table",
        {},
        node(
          "thead",
          {},
          node(
            "tr",
            {},
            node("th", {}, table.first),
            ...table.columns.map((name) =>
              node("th", {}, COLUMNS[name] ?? name.replace("eval/", "").replaceAll("_", " ")),
            ),
          ),
        ),
        node("tbody", {}, ...table.rows.map((row) => node("tr", {}, node("td", {}, row.name), ...row.cells.map(cell)))),
      ),
    ),
  );
}

function showTables() {
  byId("evaluations").hidden = !data.tables.length;
  byId("tables").append(...data.tables.map(tableOf));
}
