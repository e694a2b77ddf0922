// The responses of the page, and what is known of each.

const data = JSON.parse(document.getElementById("data").textContent);

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
for (const related of byQuestion.values())
  related.sort((a, b) => (a.step ?? 0) - (b.step ?? 0) || (a.sample ?? 0) - (b.sample ?? 0));

function beforeAndAfter(response) {
  // The first and the last of the same kind: held-out responses among themselves, training steps among themselves.
  const held = (other) => other.set.startsWith("held out");
  const same = response.related.filter((other) => held(other) === held(response));
  const [first, last] = [same[0], same[same.length - 1]];
  return first && first.step !== last.step ? [first, last] : null;
}

function gain(response) {
  const pair = beforeAndAfter(response);
  return pair && pair[1] === response && pair[0].total != null && pair[1].total != null
    ? pair[1].total - pair[0].total
    : null;
}

const answerOf = (response) =>
  response.error != null
    ? "failed"
    : response.right === true
      ? "right"
      : response.right === false
        ? response.answer == null
          ? "none"
          : "wrong"
        : "unknown";

function earned(response, name) {
  const value = response.parts?.find((part) => part.name === name)?.value;
  return value == null
    ? "no value"
    : value >= 1
      ? "earned"
      : value > 0
        ? "partly"
        : value < 0
          ? "negative"
          : "not earned";
}

function searchable(response) {
  response.haystack ??= [response.asked.id, response.asked.text, ...response.asked.options.flat(), response.text ?? ""]
    .join("\n")
    .toLowerCase();
  return response.haystack;
}
