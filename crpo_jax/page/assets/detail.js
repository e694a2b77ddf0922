// One response, its question and its reward, or the same question before and after.

const MARKS = {
  format: "breaks the format",
  language: "not in the scripts of English prose",
  box: "the answer's box",
  fact: "case fact, cited whole",
  cited: "cited term",
  tag: "tag",
};
const PRIORITY = ["format", "language", "box", "fact", "cited"]; // the first of these that covers a place colours it

function marked(text, marks, right) {
  // Marks may overlap: the text is cut where any of them starts or ends, and a piece has the first kind of PRIORITY.
  const edges = [...new Set([0, text.length, ...marks.flatMap(([start, end]) => [start, end])])]
    .filter((edge) => edge <= text.length)
    .sort((a, b) => a - b);
  const starts = [...marks].sort((a, b) => a[0] - b[0]);
  const pieces = [];
  let open = [],
    next = 0;
  for (let i = 0; i + 1 < edges.length; i++) {
    const [start, end] = [edges[i], edges[i + 1]];
    open = open.filter((mark) => mark[1] > start);
    while (next < starts.length && starts[next][0] <= start) open.push(starts[next++]);
    const kinds = [...new Set(open.map((mark) => mark[2]))];
    const piece = text.slice(start, end);
    pieces.push(
      kinds.length
        ? node(
            "mark",
            {class: markClass(kinds, right), title: kinds.map((kind) => MARKS[kind] ?? kind).join(", ")},
            piece,
          )
        : piece,
    );
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
  return kinds.length
    ? node(
        "p",
        {class: "legend"},
        ...kinds.map((kind) => node("mark", {class: markClass([kind])}, MARKS[kind] ?? kind)),
      )
    : null;
}

function questionBox(response) {
  const {asked} = response,
    chosen = response.answer;
  const turns = asked.turns.map(([role, content]) => node("p", {class: "text turn"}, `${role}: ${content}`));
  const options = asked.options.map(([name, text]) => {
    const right = name === asked.answer,
      taken = name === chosen;
    const notes = [right ? "right" : null, taken ? "chosen" : null].filter(Boolean).join(", ");
    return node(
      "li",
      {class: `${right ? "is-right" : ""} ${taken ? "is-chosen" : ""}`},
      `${name}) ${text}`,
      notes ? node("small", {}, notes) : null,
    );
  });
  const answer =
    options.length || !asked.answer
      ? null
      : node(
          "p",
          {},
          "Right answer: ",
          node("b", {}, asked.answer),
          chosen == null ? " (no answer found)" : ", found: ",
          chosen == null ? null : node("b", {}, chosen),
        );
  return node(
    "section",
    {class: "box question"},
    node("h3", {}, "Question"),
    ...turns,
    node("p", {class: "text"}, ...marked(asked.text, response.question_marks ?? [], false)),
    options.length ? node("ul", {class: "options"}, ...options) : null,
    answer,
  );
}

function responseBox(response, title) {
  const text = response.text ?? "",
    marks = response.marks ?? [];
  return node(
    "section",
    {class: "box response"},
    node("h3", {}, title),
    node(
      "div",
      {class: "long"},
      node("p", {class: "text"}, ...(text ? marked(text, marks, response.right) : ["(empty)"])),
    ),
    legend(marks, response.question_marks ?? []),
  );
}

function rewardBox(response) {
  if (response.error != null) {
    return node(
      "section",
      {class: "box error"},
      node("h3", {}, "Could not be scored"),
      node("p", {class: "text"}, response.error),
      response.traceback
        ? node("details", {}, node("summary", {}, "traceback"), node("p", {class: "text"}, response.traceback))
        : null,
    );
  }
  if (response.total == null && !response.parts) return null;
  const counted = (response.parts ?? []).filter((part) => part.points != null);
  const rows = (response.parts ?? []).map((part) =>
    node(
      "tr",
      {},
      node("td", {}, label(part.name)),
      node("td", {}, digits(part.value)),
      node("td", {}, part.points == null ? "" : signed(part.points)),
      node("td", {}, node("ul", {}, ...part.why.map((reason) => node("li", {}, reason)))),
    ),
  );
  const sum = counted
    .map((part) => digits(part.points))
    .join(" + ")
    .replaceAll("+ -", "− ");
  return node(
    "section",
    {class: "box"},
    node("h3", {}, "Why this reward"),
    node(
      "div",
      {class: "scroll"},
      node(
        "table",
        {class: "reward"},
        node("thead", {}, node("tr", {}, ...["part", "value", "points", "why"].map((head) => node("th", {}, head)))),
        node("tbody", {}, ...rows),
        node(
          "tfoot",
          {},
          node(
            "tr",
            {},
            node("td", {}, "reward"),
            node("td"),
            node("td", {}, digits(response.total)),
            node("td", {}, sum ? `= ${sum}` : ""),
          ),
        ),
      ),
    ),
  );
}

function titleOf(response) {
  const facts = [
    response.set,
    response.set.endsWith(`step ${response.step}`) || response.step == null ? null : `step ${response.step}`,
    response.asked.id,
    response.asked.source,
    response.sample == null ? null : `sample ${response.sample}`,
    response.tokens == null ? null : `${digits(response.tokens)} tokens`,
    response.stopped === false ? "truncated" : null,
    response.advantage == null ? null : `advantage ${digits(response.advantage, 2)}`,
    response.trained === false ? "not trained on" : null,
  ];
  const answer = answerOf(response);
  return node(
    "p",
    {class: "title"},
    node("b", {}, response.total == null ? "no reward" : `reward ${digits(response.total)}`),
    answer === "unknown"
      ? null
      : node(
          "span",
          {class: answer === "right" ? "right" : "wrong"},
          answer === "wrong" || answer === "right" ? `${answer} answer` : ANSWERS[answer],
        ),
    ...facts.filter(Boolean).map((fact) => node("span", {}, fact)),
  );
}

function elsewhere(response) {
  if (response.related.length < 2) return null;
  const buttons = response.related.slice(0, 60).map((other) => {
    const place = [other.step == null ? null : `step ${other.step}`, other.sample == null ? null : `#${other.sample}`]
      .filter(Boolean)
      .join(" ");
    const button = node(
      "button",
      {type: "button", "aria-pressed": other === response, title: other.set},
      `${place}: ${digits(other.total, 2)} `,
      sign(other),
    );
    button.addEventListener("click", () => choose(other));
    return button;
  });
  let compare = null;
  if (beforeAndAfter(response)) {
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
  const response = responses.find((each) => each.key === state.selected),
    detail = byId("detail");
  if (!response)
    return detail.replaceChildren(
      node(
        "p",
        {class: "note"},
        responses.length ? "No response matches these filters." : "There are no responses yet.",
      ),
    );
  const pair = state.compare ? beforeAndAfter(response) : null;
  const parts = [elsewhere(response)];
  if (pair) {
    parts.push(questionBox(pair[1]));
    const columns = pair.map((each, place) =>
      node("div", {}, titleOf(each), responseBox(each, place ? "After" : "Before"), rewardBox(each)),
    );
    parts.push(node("div", {class: "pair even"}, ...columns));
  } else {
    const teacher = response.teacher
      ? node(
          "section",
          {class: "box response"},
          node("h3", {}, "Teacher"),
          node("p", {class: "text"}, response.teacher),
        )
      : null;
    parts.unshift(titleOf(response));
    parts.push(
      node("div", {class: "pair"}, questionBox(response), responseBox(response, "Response")),
      rewardBox(response),
      teacher,
    );
  }
  detail.replaceChildren(...parts.filter(Boolean));
}
