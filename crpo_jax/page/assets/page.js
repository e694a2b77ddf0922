// The head of the page, its keys, and its server if it has one; the last of the files.

const QUIET = 8000; // milliseconds without a touch of keys, mouse or screen, after which nobody is taken to be reading

function showHead() {
  document.title = `${data.run.name} · responses`;
  byId("name").textContent = data.run.name;
  byId("facts").textContent = [
    ...data.run.facts.map(([name, value]) => `${name} ${value}`),
    `written ${data.run.written.slice(0, 16).replace("T", " ")} UTC`,
  ].join(" · ");
  const {step, question} = data.selection;
  const chosen = [step == null ? null : `step ${step}`, question == null ? null : `question ${question}`]
    .filter(Boolean)
    .join(", ");
  const sum = (sets) =>
    sets.reduce(({shown, total}, set) => ({shown: shown + set.shown, total: total + set.total}), {shown: 0, total: 0});
  const named = (name, {shown, total}) =>
    total
      ? [`${name}: ${shown === total ? `all ${digits(total)}` : `${digits(shown)} of ${digits(total)}, evenly spread`}`]
      : [];
  const heldOut = data.sets.filter((set) => set.step != null && set.total);
  const sets = [
    ...data.sets.filter((set) => set.step == null).flatMap((set) => named(set.name, set)),
    ...named(`${heldOut.length} evaluations of held-out questions`, sum(heldOut)),
  ];
  byId("shown").append(`${chosen ? `Only ${chosen}. ` : ""}In this page: ${sets.join("; ") || "none"}.`);
  if (data.sets.every((set) => set.shown === set.total) && !chosen) return;
  if (!location.protocol.startsWith("http"))
    return byId("shown").append(" python -m crpo_jax.view shows every response of a step or of a question.");
  const form = node(
    "form",
    {id: "select", method: "get"},
    ...[
      ["step", step],
      ["question", question],
    ].map(([name, value]) => node("label", {}, `All of ${name}`, node("input", {name, value}))),
    node("button", {}, "Show"),
  );
  form.addEventListener("submit", (event) => {
    // not by the form itself, which the page's policy forbids
    event.preventDefault();
    location.href = `?${new URLSearchParams([...new FormData(form)].filter(([, value]) => value !== ""))}`;
  });
  byId("shown").after(form);
}

const KEYS = {
  j: () => move(1),
  ArrowDown: () => move(1),
  k: () => move(-1),
  ArrowUp: () => move(-1),
  "[": () => moveWithinQuestion(-1),
  "]": () => moveWithinQuestion(1),
  c: toggleCompare,
  "/": () => byId("filters").elements.search.focus(),
  Escape: () => {
    state.filters = {};
    state.compare = false;
    state.length = LIST_LENGTH;
    refresh();
    document.activeElement?.blur();
  },
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
  // Loads the page again when the run's files have changed and nobody is reading; the address keeps what was chosen.
  try {
    const answer = await fetch("state", {cache: "no-store"});
    const current = await answer.text();
    if (answer.ok) known ??= current;
    if (answer.ok && current !== known && Date.now() - state.touched > QUIET) return location.reload();
  } catch {
    /* the server has ended: the page stays as it is */
  }
  setTimeout(follow, 3000, known);
}

showHead();
showCurves();
showTables();
buildFilters();
readAddress();
refresh();
byId("more").addEventListener("click", () => {
  state.length += LIST_LENGTH;
  showList();
});
document.addEventListener("keydown", pressed);
for (const link of document.querySelectorAll("nav a")) link.hidden = byId(link.hash.slice(1)).hidden;
document.querySelector("nav").addEventListener("click", (event) => {
  // the address holds filters, not a place
  const target = event.target.hash && byId(event.target.hash.slice(1));
  if (target) {
    event.preventDefault();
    target.scrollIntoView();
  }
});
for (const touch of ["keydown", "pointermove", "pointerdown", "wheel", "touchmove"])
  document.addEventListener(
    touch,
    () => {
      state.touched = Date.now();
    },
    {passive: true},
  );
if (location.protocol.startsWith("http")) follow(null);
