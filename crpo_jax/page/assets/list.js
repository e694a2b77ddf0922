// The list of the responses that match.

const SIGNS = {right: "✓", wrong: "✗", none: "∅", failed: "!"};

function sign(response) {
  const answer = answerOf(response);
  return node("i", {class: answer === "right" ? "right" : "wrong", title: ANSWERS[answer]}, SIGNS[answer]);
}

function showList() {
  const list = byId("list");
  const place = matching.findIndex((response) => response.key === state.selected);
  while (place >= state.length) state.length += LIST_LENGTH;
  list.replaceChildren(
    ...matching.slice(0, state.length).map((response) => {
      const where = [
        response.step == null ? null : `step ${response.step}`,
        response.asked.id,
        response.sample == null ? null : `#${response.sample}`,
      ]
        .filter(Boolean)
        .join(" · ");
      const ordered = ["gained", "lost"].includes(state.filters.order)
        ? signed(gain(response), 2)
        : digits(response.total, 2);
      const row = node(
        "li",
        {"aria-current": response.key === state.selected, title: response.set},
        node("b", {}, ordered),
        sign(response),
        node("span", {}, where),
      );
      row.addEventListener("click", () => choose(response));
      return row;
    }),
  );
  byId("count").textContent = matching.length
    ? `${digits(place + 1)} of ${digits(matching.length)} that match, ${digits(responses.length)} in all`
    : `none of ${digits(responses.length)} matches`;
  byId("more").hidden = matching.length <= state.length;
  byId("more").textContent = `${digits(matching.length - state.length)} more`;
}

function choose(response) {
  state.selected = response.key;
  if (!matching.includes(response)) {
    state.filters = {};
    state.compare = false;
    refresh();
  } else {
    showList();
    showDetail();
    keepInAddress();
  }
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
