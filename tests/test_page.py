"""The page of responses: its marks and reasons, that texts stay texts, that it fits, and that a browser shows it."""

import errno
import json
import threading
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
from chromium import find_chromium, open_chromium

from crpo_jax import config, view
from crpo_jax.cli import run_command
from crpo_jax.data.question import Question
from crpo_jax.errors import Fault, InputError
from crpo_jax.page import content, html, selection
from crpo_jax.page.content import read_content
from crpo_jax.page.lines import Lines, spread
from crpo_jax.page.marks import Mark, clip, find_marks, in_utf16
from crpo_jax.page.parts import reward_parts
from crpo_jax.page.selection import Selection
from crpo_jax.reward.rules import score_response
from crpo_jax.store.files import encode_rows

SETTINGS = config.load_config(config.config_folder() / "tiny.yaml", model=False)
TAGS = ("dx", "conclusion")
CASE = "A man aged 31 has psoas sign and a large fecalith, with a temperature of 38.9 °C. What is most likely?"
QUESTION = Question("q1", CASE, {"A": "appendicitis", "B": "gout"}, "A", "vignettes", "train")
CITING = (
    "<dx>\n(System 1: Intuitive) large fecalith and psoas sign come to mind.\n"
    "(System 2: Analytical) the psoas sign with 38.9 °C means inflammation; joints are calm.\n</dx>\n"
    "<conclusion>\nPsoas sign, large fecalith and 38.9 °C settle it. \\boxed{A}\n</conclusion>"
)
WRONG = CITING.replace("{A}", "{B}").replace("Psoas sign, large fecalith and 38.9 °C settle", "Everything here settles")
HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2"><svg onload="window.hacked = 3">',
    "]]><!--<script>window.hacked = 4</script>",
    "a\u2028b\u2029c\0d\ud83de\udc00f \U0001f600 日本語",
    '"><a href="javascript:window.hacked=5">x</a>{{constructor.constructor("window.hacked=6")()}}',
    "x" * 1_000_000 + " \\boxed{A}",
    "",
]
LONGEST_PAGE = 5_000_000


def sample_row(question: Question, response: str, step: int, sample: int = 0, **fields: object) -> dict[str, object]:
    """A line of samples.jsonl."""
    origin = {"source": question.source, "split": question.split}
    asked = {"id": question.id, "question": question.question, "options": dict(question.options)} | origin
    row = asked | {"answer": question.answer, "response": response, "tokens": len(response.split()), "stopped": True}
    row |= {"step": step, "sample": sample, "prompt": question.question, "advantage": 0.5, "trained": True}
    score = asdict(score_response(question, response, SETTINGS.reward))
    return row | {name: value for name, value in score.items() if name != "components"} | fields


def write_run(folder: Path, rows: list[dict], held_out: dict[int, list[dict]] | None = None) -> Path:
    """The files of a run that a page is made of."""
    (folder / "report").mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump_config(SETTINGS), encoding="utf-8")
    (folder / "samples.jsonl").write_bytes(encode_rows(rows))
    for step, evaluated in (held_out or {}).items():
        (folder / "report" / f"held_out_{step:06d}.jsonl").write_bytes(encode_rows(evaluated))
    metrics = [{"step": step, "reward/mean": 1.5 + step, "kl/mean": 0.001 * step} for step in range(3)]
    metrics = [
        row | ({"eval/mean": 2.0, "eval/accuracy": 0.5} if row["step"] in (held_out or {}) else {}) for row in metrics
    ]
    (folder / "metrics.jsonl").write_bytes(encode_rows(metrics))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps, held-out questions before and after, and everything that could go wrong with a response."""
    others = [
        Question(f"evil-{number}", text[:300], {"A": text[:100], "B": "b"}, "A") for number, text in enumerate(HOSTILE)
    ]
    rows = [
        sample_row(QUESTION, text, 0, number) for number, text in enumerate([CITING, WRONG, CITING, "no format at all"])
    ]
    rows += [sample_row(question, text, 1, stopped=False) for question, text in zip(others, HOSTILE, strict=True)]
    failed = {"error": "ValueError: <b>bad</b>", "traceback": "</script>Traceback", "why": None, "total": None}
    rows.append(sample_row(QUESTION, CITING, 1, 1, accuracy=None, **failed))
    held_out = [Question(f"h{number}", CASE, QUESTION.options, "A") for number in range(3)]
    evaluations = {
        0: [sample_row(each, WRONG, 0) for each in held_out],
        2: [sample_row(each, CITING, 2) for each in held_out],
    }
    folder = write_run(tmp_path_factory.mktemp("page") / "run", rows, evaluations)
    html.write_page(folder)
    return folder


def page_data(path: Path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(text.split('id="data">')[1].split("</script>")[0])


# ---- marks and reasons -----------------------------------------------------------------------------------------------


def marked(text: str, marks: list[Mark], kind: str) -> list[str]:
    return [text[mark.start : mark.end] for mark in marks if mark.kind == kind]


def test_cited_terms_case_facts_and_the_box_are_marked_where_they_stand():
    why = score_response(QUESTION, CITING, SETTINGS.reward).why
    assert why["cross_reference"]["failed"] == []
    in_question, in_response = find_marks(CASE, CITING, why, TAGS, systems=True)
    assert marked(CASE, in_question, "fact") == ["psoas sign", "large fecalith", "38.9 °C"]
    facts = marked(CITING, in_response, "fact")
    assert facts[-3:] == ["Psoas sign", "large fecalith", "38.9 °C"]
    assert set(facts[:-3]) == {"large fecalith", "psoas sign", "38.9 °C"}  # in dx
    assert {"psoas", "sign", "Psoas", "fecalith"} <= set(marked(CITING, in_response, "cited"))
    assert marked(CITING, in_response, "box") == ["\\boxed{A}"]
    assert marked(CITING, in_response, "tag") == ["<dx>", "</dx>", "<conclusion>", "</conclusion>"]
    assert marked(CITING, in_response, "format") == []


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (f"Well. {CITING}", ["Well."]),
        (f"{CITING}\nBye <3", ["Bye <3"]),
        (CITING.replace("</dx>", "</dx> and so"), ["and so"]),
        (CITING.replace("<dx>", "<dx><dx>"), ["<dx>", "<dx>"]),
        (
            CITING.replace("(System 2", "(System 1: again) and more\n(System 2"),
            ["(System 1: Intuitive)", "(System 1: again)"],
        ),
        (CITING.replace(" large fecalith and psoas sign come to mind.", " hm."), [" hm.\n"]),
    ],
)
def test_what_broke_the_format_is_marked(response: str, expected: list[str]):
    why = score_response(QUESTION, response, SETTINGS.reward).why
    assert why["format"]
    assert marked(response, find_marks(CASE, response, why, TAGS, systems=True)[1], "format") == expected


def test_foreign_scripts_are_marked_and_offsets_are_those_of_a_browser():
    text = "a \U0001f600 日本 b 日"
    marks = find_marks("", text, {}, TAGS, systems=True)[1]
    assert marked(text, marks, "language") == ["\U0001f600", "日本", "日"]
    units = text.encode("utf-16-le")
    browser = [units[2 * start : 2 * end].decode("utf-16-le") for start, end, _ in in_utf16(text, marks)]
    assert browser == ["\U0001f600", "日本", "日"]


def test_letters_whose_lower_case_is_longer_do_not_move_the_marks():
    question = CASE.replace("A man", "İİİ A man")
    why = score_response(QUESTION, CITING, SETTINGS.reward).why
    assert "psoas sign" in marked(question, find_marks(question, CITING, why, TAGS, systems=True)[0], "fact")


def test_spans_that_a_reward_names_are_marked_if_they_fit():
    spans = [
        {"start": 0, "end": 4, "text": "<dx>", "kind": "opening"},
        {"start": 5, "end": 9, "text": "not there", "kind": "lie"},
        {"start": -1, "end": 2, "kind": "before"},
        {"start": "0", "end": 2, "kind": "text"},
    ]
    marks = find_marks(CASE, CITING, {"grounding": {"terms": spans}}, TAGS, systems=True)[1]
    assert [mark.kind for mark in marks if mark.kind not in ("tag", "box", "language")] == ["opening"]


def test_the_middle_of_a_long_text_is_left_out_and_said():
    text, marks = clip(
        "a" * 50 + "b" * 900 + "c" * 50, [Mark(0, 50, "a"), Mark(400, 450, "b"), Mark(990, 1000, "c")], 50, 50, 10
    )
    assert "900 characters are not shown" in text
    assert [text[mark.start : mark.end] for mark in marks] == ["a" * 50, "c" * 10]
    assert clip("short", [Mark(0, 5, "x")], 50, 50, 10) == ("short", [Mark(0, 5, "x")])


def test_points_add_up_to_the_reward_and_say_why():
    row = sample_row(QUESTION, WRONG, 0)
    assert row["total"] == 1.5
    parts = {part["name"]: part for part in reward_parts(row, "crpo", SETTINGS.reward)}
    assert {name: part["points"] for name, part in parts.items()} == {
        "accuracy": 0, "format": 1, "cross_reference": 0, "consistency": 0.5,
    }  # fmt: skip
    assert parts["accuracy"]["why"] == ["wrong: A is right"]
    assert "0 whole case facts, 1 needed" in parts["cross_reference"]["why"]


def test_points_are_not_claimed_where_they_do_not_add_up():
    row = sample_row(QUESTION, WRONG, 0, total=3.25)
    assert {part["points"] for part in reward_parts(row, "crpo", SETTINGS.reward)} == {None}


def test_a_sum_of_rewards_shows_each_by_its_weight():
    row = sample_row(QUESTION, WRONG, 0)
    row |= {"total": 2.5, "components": {"crpo": 1.5, "my:f": 2.0, "my:g": None}}
    row["why"] = row["why"] | {"weights": {"crpo": 1.0, "my:f": 0.5, "my:g": 1.0}, "my:f": {"note": "<b>"}, "odd": [1]}
    parts = {part["name"]: part for part in reward_parts(row, "crpo+my:f*0.5", SETTINGS.reward)}
    assert (parts["crpo"]["points"], parts["my:f"]["points"], parts["my:g"]["points"]) == (1.5, 1.0, None)
    assert parts["my:f"]["why"][-1] == '{"note": "<b>"}'
    assert parts["odd"]["why"] == ["[1]"]


def test_a_sum_of_named_parts_has_a_row_for_each():
    row = sample_row(
        QUESTION, WRONG, 0, total=1.25, components={"accuracy": 0.0, "format": 1.0, "citation": 0.0, "length": -0.5}
    )
    row["why"] = row["why"] | {"weights": {"accuracy": 10.0, "format": 1.5, "citation": 0.5, "length": 0.5}}
    row["why"] |= {"length": {"tokens": 30}}
    parts = {part["name"]: part for part in reward_parts(row, "accuracy*10+format*1.5+citation*0.5", SETTINGS.reward)}
    points = {"accuracy": 0, "format": 1.5, "cross_reference": 0, "consistency": None, "length": -0.25}
    assert {name: part["points"] for name, part in parts.items()} == points
    assert parts["length"]["why"] == ["-0.5 × weight 0.5", '{"tokens": 30}']


# ---- which responses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 1000])
def test_places_are_spread_and_each_comes_once(count: int):
    places = list(spread(count))
    assert sorted(places) == list(range(count))
    assert places[:2] == [0, count - 1][: min(count, 2)]
    if count == 1000:  # any few of them are even
        assert max(b - a for a, b in zip(sorted(places[:32]), sorted(places[:32])[1:], strict=False)) < 100


def test_lines_leave_a_torn_end_and_name_a_damaged_one(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"step": 0}\nbroken\n{"step": 2}\n{"step": 3')
    lines = Lines(path)
    assert (len(lines), lines[2]) == (3, {"step": 2})
    with pytest.raises(InputError, match=r"rows.jsonl:2: expected a JSON object, got b'broken"):
        lines[1]


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """5,000 responses of 2 KB, in groups of 4."""
    long = CITING.replace("joints are calm", "·" * 1200)
    questions = [Question(f"q{number}", f"{CASE} {number}", QUESTION.options, "A") for number in range(1250)]
    row = sample_row(QUESTION, long, 0)
    asked = [{"id": each.id, "question": each.question, "step": number // 10} for number, each in enumerate(questions)]
    rows = [row | each | {"sample": sample} for each in asked for sample in range(4)]
    folder = write_run(tmp_path_factory.mktemp("many") / "run", rows)
    html.write_page(folder)
    return folder


def test_of_many_responses_whole_groups_are_shown_and_their_number_said(many: Path):
    size = html.page_path(many).stat().st_size
    data = page_data(html.page_path(many))
    (training,) = data["sets"]
    assert training["total"] == 5000
    assert training["shown"] == len(data["responses"]) < 3000
    assert content.MAX_BYTES * 0.99 < size < LONGEST_PAGE
    steps = [response["step"] for response in data["responses"]]
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 124)
    assert len(set(steps)) > 100
    groups = [response["question"] for response in data["responses"]]
    assert all(groups.count(number) == 4 for number in set(groups))


def test_a_selection_has_every_response_of_a_step_or_to_a_question(many: Path):
    of_step = read_content(many, Selection(step=77))
    assert len(of_step["responses"]) == 40
    assert {response["step"] for response in of_step["responses"]} == {77}
    of_question = read_content(many, Selection(question="q12"))  # not q120, q1200
    assert [question["id"] for question in of_question["questions"]] == ["q12"]
    assert len(of_question["responses"]) == 4


def test_held_out_questions_are_the_same_before_and_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(content, "MAX_RESPONSES", 40)
    monkeypatch.setattr(selection, "WHOLE_HISTORIES", 2)
    asked = [Question(f"h{number}", CASE, QUESTION.options, "A") for number in range(50)]
    row = sample_row(QUESTION, WRONG, 0)
    held_out = {step: [row | {"id": each.id} for each in asked] for step in (0, 10, 20)}
    data = read_content(write_run(tmp_path / "run", [], held_out))
    shown = {
        step: {
            data["questions"][each["question"]]["id"] for each in data["responses"] if each["set"].endswith(f" {step}")
        }
        for step in (0, 10, 20)
    }
    assert shown[0] == shown[20]
    assert (len(shown[0]), len(shown[10])) == (19, 2)
    assert shown[10] <= shown[0]


# ---- the file --------------------------------------------------------------------------------------------------------


def test_texts_stay_texts_in_the_file(run: Path):
    page = html.page_path(run).read_bytes()
    assert len(page) < LONGEST_PAGE
    assert page.count(b"<script") == page.count(b"</script>") == 2
    assert b"<img" not in page
    assert b"onerror=" not in page.split(b'id="data">')[0]
    assert "\u2028" not in page.decode("utf-8")
    data = page_data(html.page_path(run))
    texts = {
        data["questions"][each["question"]]["id"]: each.get("text", "")
        for each in data["responses"]
        if each["set"] == "training"
    }
    for number, text in enumerate(HOSTILE):
        if len(text) < 10_000:
            assert texts[f"evil-{number}"] == text
    assert len(texts["evil-5"]) < 25_000
    assert texts["evil-5"].endswith("\\boxed{A}")


def test_the_policy_lets_nothing_but_the_page_s_own_program_run(run: Path):
    page = html.page_path(run).read_text(encoding="utf-8")
    policy = page.split('Content-Security-Policy" content="')[1].split('"')[0]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "connect-src 'none'" in policy


def test_the_tables_have_intervals(run: Path):
    (table,) = page_data(html.page_path(run))["tables"]
    assert [row["name"] for row in table["rows"]] == ["0", "2"]
    reward = [row["cells"][table["columns"].index("eval/mean")] for row in table["rows"]]
    assert reward[0] == {"mean": 1.5, "low": 1.5, "high": 1.5}
    assert reward[1]["mean"] > 11
    accuracy = table["rows"][1]["cells"][table["columns"].index("eval/accuracy")]
    assert accuracy["mean"] == accuracy["high"] == 1
    assert 0.3 < accuracy["low"] < 0.6  # three questions say little


def test_long_curves_are_averaged_and_many_evaluations_thinned(tmp_path: Path):
    folder = write_run(tmp_path / "run", [])
    rows = [{"step": step, "reward/mean": step % 2, "eval/mean": float(step)} for step in range(2000)]
    (folder / "metrics.jsonl").write_bytes(encode_rows(rows))
    data = read_content(folder)
    curves, (table,) = data["curves"], data["tables"]
    assert (curves["every"], len(curves["steps"])) == (5, 400)
    assert curves["metrics"]["reward/mean"][:2] == [0.4, 0.6]
    steps = [int(row["name"]) for row in table["rows"]]
    assert table["title"] == "Held-out questions, 200 of 2000 evaluations"
    assert (steps[0], steps[-1], len(steps)) == (0, 1999, 200)
    assert curves["evaluated"] == steps == curves["measured"]["eval/mean"]


def test_an_evaluation_s_responses_are_scored_for_the_page(tmp_path: Path):
    folder = write_run(tmp_path / "run", [])
    (folder / "samples.jsonl").unlink()
    (folder / "metrics.jsonl").unlink()
    (folder / "responses").mkdir()
    asked = {"id": "a", "question": CASE, "options": dict(QUESTION.options), "answer": "A", "right": "a column of it"}
    rows = [
        asked | {"sample": number, "response": text, "stopped": True} for number, text in enumerate([CITING, WRONG])
    ]
    rows.append({"id": "b", "response": "x", "sample": 0})
    (folder / "responses" / "medqa.jsonl").write_bytes(encode_rows(rows))
    estimate = {"mean": 0.5, "low": 0.1, "high": 0.9}
    summary = {"model": "m", "data": {"medqa": {"questions": 1, "accuracy": estimate, "exact": {"invented": estimate}}}}
    (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    data = read_content(folder)
    assert [(each.get("total"), each.get("right")) for each in data["responses"]] == [
        (12.0, True),
        (1.5, False),
        (None, None),
    ]
    assert "medqa.jsonl: question: expected" in data["responses"][2]["error"]
    (table,) = data["tables"]
    assert [row["name"] for row in table["rows"]] == ["accuracy", "exact / invented"]
    assert table["columns"] == ["medqa (1 questions)"]


def test_questions_of_any_kind_are_shown_as_they_are(tmp_path: Path):
    """Without options, with earlier turns, and with fields of types that nobody expects."""
    asked = {"id": 7, "question": "How many?", "options": {}, "answer": "42", "response": "41", "answer_found": "41"}
    turns = [["user", "Hi"], {"role": "assistant", "content": "Yes?"}]
    rows: list[dict] = [
        asked | {"step": 0, "accuracy": 0.0, "total": 0.0, "turns": turns},
        asked | {"step": 1, "accuracy": None, "total": 1.0, "answer": "", "turns": "none", "why": [1], "sample": {}},
        {
            "step": 2,
            "options": ["a"],
            "turns": [5],
            "why": {"format": 3, "answer": [1], "cross_reference": {"cited": 1}},
        },
    ]
    data = read_content(write_run(tmp_path / "run", rows))
    number, free, odd = data["responses"]
    assert data["questions"][number["question"]]["turns"] == [["user", "Hi"], ["assistant", "Yes?"]]
    assert (number["right"], number["answer"]) == (False, "41")
    assert "right" not in free
    assert data["questions"][odd["question"]]["turns"] == [["", "5"]]


def test_a_page_that_cannot_be_read_for_is_said_and_one_that_cannot_be_written_ends_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    damaged = write_run(tmp_path / "run", [])
    (damaged / "samples.jsonl").write_bytes(b"damaged\n")
    html.keep_page(damaged, said.append)
    assert len(said) == 1
    assert "samples.jsonl:1: expected a JSON object" in said[0]
    assert not html.page_path(damaged).exists()

    def full(path: Path, page: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = html.page_path(run).read_bytes()
    monkeypatch.setattr(html, "replace_file", full)
    with pytest.raises(Fault, match=r"index.html: cannot write: No space left on device"):
        html.keep_page(run, said.append)
    assert html.page_path(run).read_bytes() == before


# ---- view ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def address(run: Path):
    with view.open_server(run, 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def get(address: str, **headers: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode("utf-8")


def test_view_serves_the_run_as_it_is_now_to_this_machine_alone(run: Path, address: str):
    status, page = get(address)
    assert status == 200
    assert "connect-src 'self'" in page
    assert get(f"{address}?step=1")[1].count('"set":"training"') == 8
    assert get(f"{address}?step=one") == (500, "step: expected a whole number, got 'one'\n")
    assert get(f"{address}../../etc/passwd")[0] == 404
    assert get(address, Host="stranger.example:80") == (403, "expected localhost as the host\n")
    state = get(f"{address}state")
    with (run / "samples.jsonl").open("ab") as file:
        file.write(encode_rows([sample_row(QUESTION, "a further response", 2)]))
    assert get(f"{address}state") != state
    assert "a further response" in get(address)[1]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--workdir", "none"],
            "--workdir none: expected the folder of a run or an evaluation, got no config.yaml in it",
        ),
        (["--workdir", "{run}", "--port", "70000"], "--port 70000: expected a free port"),
        (["--workdir", "{run}", "--mesh", "1x1"], "--mesh: no such flag or setting"),
    ],
)
def test_bad_arguments_of_view_are_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], line: str
):
    with pytest.raises(SystemExit) as ended:
        run_command("view", lambda: view.main([word.format(run=run) for word in arguments]))
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"crpo_jax.view: {line}")
    assert error.count("\n") == 1


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    if find_chromium() is None:
        pytest.skip("no Chromium on this machine: the page is not tried in a browser")
    with open_chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


def choose(browser, **filters: str) -> list[str]:
    """Sets filters as a person does; the list as it then reads."""
    for name, value in filters.items():
        field = f"document.getElementById('filters').elements[{json.dumps(name)}]"
        browser.evaluate(
            f"{field}.value = {json.dumps(value)}, {field}.dispatchEvent(new Event('input', {{bubbles: true}}))"
        )
    return browser.evaluate(
        "[...document.querySelectorAll('#list li')].map((row) => row.innerText.replace(/\\s+/g, ' '))"
    )


def texts(browser, selector: str) -> list[str]:
    return browser.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((each) => each.textContent)")


def test_a_browser_shows_filters_and_explains(run: Path, browser):
    browser.open(html.page_path(run).as_uri())
    assert browser.messages == []
    assert browser.evaluate("document.querySelectorAll('#charts svg path').length") == 2
    assert len(choose(browser)) == len(page_data(html.page_path(run))["responses"])
    assert choose(browser, answer="wrong", **{"part:format": "earned", "set": "training"}) == ["1.5 ✗ step 0 · q1 · #1"]
    assert texts(browser, ".reward tfoot td") == ["reward", "", "1.5", "= 0 + 1 + 0 + 0.5"]
    assert "wrong: A is right" in texts(browser, ".reward li")
    assert texts(browser, ".is-right small") == ["right"]
    assert texts(browser, ".is-chosen small") == ["chosen"]

    browser.press("Escape")
    assert (
        choose(browser, answer="right", **{"part:cross_reference": "earned", "set": "held out, step 2"})[0]
        == "12 ✓ step 2 · h0 · #0"
    )
    assert texts(browser, ".question mark.fact") == ["psoas", " ", "sign", "large", " ", "fecalith", "38.9 °C"]
    assert texts(browser, ".response mark.box-right") == ["\\boxed{A}"]
    browser.press("c")
    assert texts(browser, ".pair.even h3") == ["Before", "Why this reward", "After", "Why this reward"]
    browser.press("Escape")
    assert choose(browser, answer="failed") == ["– ! step 1 · q1 · #1"]
    assert texts(browser, ".error .text")[0] == "ValueError: <b>bad</b>"
    browser.press("Escape")
    assert choose(browser, search="no FORMAT at all") == ["0.5 ∅ step 0 · q1 · #3"]


def test_keys_walk_through_the_responses(run: Path, browser):
    browser.open(html.page_path(run).as_uri())
    browser.press("Escape")
    first = browser.evaluate("state.selected")
    browser.press("j")
    assert browser.evaluate("state.selected") != first
    browser.press("k")
    assert browser.evaluate("state.selected") == first
    browser.press("]")
    assert (
        browser.evaluate("document.querySelector('#list [aria-current=true] span').textContent") == "step 0 · q1 · #1"
    )
    browser.press("/")
    assert browser.evaluate("document.activeElement.name") == "search"
    browser.press("j")  # is a letter of the search now
    assert browser.evaluate("document.activeElement.value") == "j"
    selected = browser.evaluate("(state.filters = {}, refresh(), state.selected)")
    browser.open(browser.evaluate("location.href"))  # the address remembers
    assert browser.evaluate("state.selected") == selected


def test_nothing_from_a_response_runs(run: Path, browser):
    browser.messages.clear()
    browser.open(html.page_path(run).as_uri())
    for number in range(len(HOSTILE)):
        browser.evaluate(f"choose(responses.find((each) => each.asked.id === 'evil-{number}'))")
        shown = "document.querySelector('.response .text').textContent"
        assert browser.evaluate(
            f"{shown} === (responses.find((each) => each.key === state.selected).text ?? '(empty)')"
        )
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert (
        browser.evaluate("document.querySelectorAll('#detail script, #detail img, #detail svg, #detail a').length") == 0
    )
    assert browser.messages == []
    # and if markup came in after all, the page's policy would keep it from running
    browser.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked = 9\">')")
    browser.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.hacked = 8'}))"
    )
    browser.evaluate("new Promise((done) => setTimeout(done, 100))")
    assert browser.evaluate("typeof window.hacked") == "undefined"
    assert any("Content Security Policy" in message for message in browser.messages)
    browser.messages.clear()


def test_it_is_dark_where_the_reader_s_system_is_narrow_without_scrolling_sideways_and_prints(
    run: Path, browser, tmp_path: Path
):
    browser.open(html.page_path(run).as_uri())
    grounds = []
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        grounds.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(255, 255, 255)", "rgb(20, 24, 27)"]
    browser.resize(390, 800)
    assert browser.evaluate("document.documentElement.scrollWidth") <= 390
    browser.resize(1280, 900)
    browser.print(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")


def test_a_full_page_opens_at_once(many: Path, browser):
    path = html.page_path(many)
    assert browser.open(path.as_uri()) < 10  # two seconds on an idle machine; tests share theirs
    assert browser.evaluate("responses.length") == len(page_data(path)["responses"])
    assert browser.evaluate("document.querySelectorAll('#list li').length") == 100
    assert "of 5,000, evenly spread" in texts(browser, "#shown")[0]


def test_a_served_page_follows_the_run(address: str, browser):
    browser.open(address)
    assert browser.messages == []
    browser.evaluate("document.title = 'old'")
    browser.evaluate("state.touched = Date.now(), void follow('another state')")
    browser.evaluate("new Promise((done) => setTimeout(done, 300))")
    assert browser.evaluate("document.title") == "old"  # somebody is reading
    browser.evaluate("state.touched = 0, void follow('another state')")
    browser.wait_until("document.title === 'run · responses'")
