// What the reader has chosen: filters, order, search, one response. The address of the page keeps it.

const LIST_LENGTH = 100; // rows that are added to the list at a time

const ANSWERS = {right: "right", wrong: "wrong", none: "no readable answer", failed: "could not be scored"};
const ORDERS = {
  "": "as sampled",
  lowest: "lowest reward first",
  highest: "highest reward first",
  longest: "longest first",
  gained: "gained most, before to after",
  lost: "lost most, before to after",
};
const state = {filters: {}, selected: null, compare: false, length: LIST_LENGTH, touched: 0};
let matching = [];

function filterList() {
  const names = [
    ...new Set(
      responses.flatMap((response) =>
        (response.parts ?? []).filter((part) => part.value != null).map((part) => part.name),
      ),
    ),
  ];
  const steps = [...new Set(responses.map((response) => response.step).filter((step) => step != null))].sort(
    (a, b) => a - b,
  );
  const filters = [
    [
      "set",
      "Responses of",
      Object.fromEntries(data.sets.filter((set) => set.shown).map((set) => [set.name, set.name])),
      (response, value) => response.set === value,
    ],
    [
      "step",
      "Step",
      Object.fromEntries(steps.map((step) => [step, step])),
      (response, value) => String(response.step) === value,
      steps,
    ],
    ["answer", "Answer", present(ANSWERS, answerOf), (response, value) => answerOf(response) === value],
  ];
  for (const name of names.filter((name) => name !== "accuracy")) {
    const values = present(
      {
        earned: "earned",
        partly: "partly earned",
        "not earned": "not earned",
        negative: "negative",
        "no value": "no value",
      },
      (response) => earned(response, name),
    );
    filters.push([`part:${name}`, capital(label(name)), values, (response, value) => earned(response, name) === value]);
  }
  const ends = {whole: "ended by itself", cut: "truncated", left: "not trained on"};
  const ending = {whole: (r) => r.stopped === true, cut: (r) => r.stopped === false, left: (r) => r.trained === false};
  filters.push([
    "end",
    "Ending",
    Object.fromEntries(Object.entries(ends).filter(([end]) => responses.some(ending[end]))),
    (response, value) => ending[value](response),
  ]);
  return filters.filter(
    ([, , values]) => Object.keys(values).length > 1 || (Object.keys(values).length === 1 && values.left),
  );
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
    select.append(
      node("option", {value: ""}, "all"),
      ...(order ?? Object.keys(values)).map((value) => node("option", {value}, values[value])),
    );
    form.append(node("label", {}, title, select));
  }
  const pairs = responses.some((response) => gain(response) != null);
  const orders = Object.entries(ORDERS).filter(([order]) => pairs || !["gained", "lost"].includes(order));
  form.append(
    node(
      "label",
      {},
      "Order",
      node("select", {name: "order"}, ...orders.map(([value, text]) => node("option", {value}, text))),
    ),
  );
  form.append(
    node("label", {}, "Search", node("input", {type: "search", name: "search", placeholder: "question, response, id"})),
  );
  form.addEventListener("input", () => {
    readFilters();
    refresh();
  });
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
    if (field.value !== (state.filters[field.name] ?? "")) {
      delete state.filters[field.name];
      field.value = "";
    }
    field.classList.toggle("set", field.value !== "");
  }
}

function selectMatching() {
  const active = FILTERS.filter(([name]) => state.filters[name]);
  const words = (state.filters.search ?? "").toLowerCase();
  matching = responses.filter(
    (response) =>
      active.every(([name, , , test]) => test(response, state.filters[name])) &&
      (!words || searchable(response).includes(words)),
  );
  const {order} = state.filters,
    total = (response) => response.total ?? -Infinity;
  if (order === "lowest")
    matching = matching.filter((response) => response.total != null).sort((a, b) => a.total - b.total);
  if (order === "highest") matching.sort((a, b) => total(b) - total(a));
  if (order === "longest") matching.sort((a, b) => (b.tokens ?? 0) - (a.tokens ?? 0));
  if (order === "gained" || order === "lost") {
    const way = order === "gained" ? 1 : -1;
    matching = matching.filter((response) => gain(response) != null).sort((a, b) => way * (gain(b) - gain(a)));
  }
}

function refresh() {
  showFilters();
  selectMatching();
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
