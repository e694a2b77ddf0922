"""The report: the right numbers in the right cells, all figures, one file that fetches and runs nothing."""

import json
import re
import shutil
from html.parser import HTMLParser
from importlib import import_module

import numpy as np
import pytest

from crpo_jax import config
from crpo_jax.answer.records import Answer, answer_to_row
from crpo_jax.answer.statistics import summarize
from crpo_jax.data.question import Question
from crpo_jax.data.vignettes import TeacherNoise, teacher_response, vignettes
from crpo_jax.errors import InputError
from crpo_jax.judge import report
from crpo_jax.judge.measures import MEASURES
from crpo_jax.judge.methods import Column, Method, Seed, find_best, questions_path
from crpo_jax.reward import terms

evaluate = import_module("crpo_jax.evaluate")

QUESTIONS = vignettes("test", 20)
SETTINGS = config.load_config(None, ["reward.workers=0"], model=False)
EVIL = "<script>alert(1)</script><img src=http://evil/x.png onerror=alert(2)>"


def evaluated(folder, cites: float, seed: int = 0, judges: bool = False) -> str:
    """An evaluation's workdir inside a run's, as the commands leave them."""
    noise = TeacherNoise(cites=cites, cites_a_word=0, cites_twice=0, missing_part=0, drift=0)
    answers = [Answer(question, 0, teacher_response(question, seed, noise)) for question in QUESTIONS]
    answers.append(
        Answer(Question("evil", EVIL, {"A": EVIL, "B": "b"}, "A", columns=dict(QUESTIONS[0].columns)), 0, EVIL)
    )
    inner = folder / "evaluation"
    (inner / "responses").mkdir(parents=True)
    (inner / "responses" / "vignettes.jsonl").write_text(
        "".join(json.dumps(answer_to_row(answer)) + "\n" for answer in answers), encoding="utf-8"
    )
    summary, questions = summarize(answers, SETTINGS)
    if judges:
        count = {"mean": 2.0, "low": 1.0, "high": 3.0, "judged": 21, "unparsed": 4, "missing": 1}
        summary["judges"] = {"llama": dict.fromkeys(MEASURES, count)}
    evaluate.write_questions(inner, "vignettes", questions)
    (inner / "summary.json").write_text(json.dumps({"model": "m", "data": {"vignettes": summary}}), encoding="utf-8")
    steps = [
        {
            "step": n,
            "response/length": 90 + seed,
            "reward/mean": n,
            "reward/format": 0.5,
            "eval/format": 0.4 if n % 4 == 0 else None,
        }
        for n in range(9)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf-8")
    return str(folder)


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


def test_a_report_does_not_replace_the_page_of_a_run(tmp_path):
    """Both are report/index.html: the report over models used to write where it was told, whatever stood there."""
    run = tmp_path / "run"
    (run / "report").mkdir(parents=True)
    (run / "config.yaml").touch()
    (run / "report" / "index.html").write_text("the page")
    with pytest.raises(InputError, match=r"--workdir .*run: expected another folder than a run's"):
        evaluate.main(["--report", f"A={evaluated(tmp_path / 'a', 0.0)}", "--workdir", str(run)])
    assert (run / "report" / "index.html").read_text() == "the page"


def test_a_report_over_seeds_and_methods(tmp_path, capsys):
    rows = [f"GRPO={evaluated(tmp_path / f'g{seed}', 0.0, seed)}" for seed in (0, 1)]
    rows += [f"CRPO={evaluated(tmp_path / f'c{seed}', 1.0, seed, judges=True)}" for seed in (0, 1)]
    evaluate.main(["--report", *rows, "--workdir", str(tmp_path)])
    output = capsys.readouterr().out
    cites = next(line for line in output.splitlines() if line.startswith("cites %"))
    assert re.fullmatch(r"cites %\s+0\.0 ± 0\.0\s+9[0-9]\.\d ± \d\.\d \*", cites)
    assert re.search(r"Backtracking\s+-\s+2\.00 ± 0\.00", output)
    folder = tmp_path / "report"
    assert {path.name for path in folder.iterdir()} == {
        "index.html",
        "accuracy.png",
        "reasoning_vignettes.png",
        "training.png",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in folder.glob("*.png"))

    text = (folder / "index.html").read_text(encoding="utf-8")
    tags = Tags(text).tags
    assert [dict(attrs)["src"][:22] for tag, attrs in tags if tag == "img"] == ["data:image/png;base64,"] * 3
    assert not {"script", "link", "iframe"} & {tag for tag, _ in tags}
    assert not [attrs for _, attrs in tags if any(name.startswith("on") or name == "href" for name in attrs)]
    assert "21 questions x 1 samples" in text
    assert "judge llama: 336 counts, 64 replies unparsed, 16 missing" in text
    assert text.count("<section>") == report.MAX_CASES
    assert re.search(r"<mark>\w+</mark> <mark>\w+</mark>", text), "cited findings are marked"


ACCURACY = Column("accuracy %", ("accuracy",), digits=1, scale=100)


def right(count: int) -> str:
    """The first `count` of a hundred questions."""
    return "1" * count + "0" * (100 - count)


def method(name: str, *seeds: str) -> Method:
    """A row whose seeds answer questions right (1) and wrong (0), as the texts say."""

    def seed(text: str) -> Seed:
        rows = [{"id": str(place), "digest": "", "accuracy": float(answer)} for place, answer in enumerate(text)]
        mean = sum(map(int, text)) / len(text)
        return Seed(name, {"data": {"d": {"accuracy": {"mean": mean}}}}, {"d": rows}, {}, ())

    return Method(name, [seed(text) for text in seeds])


@pytest.mark.parametrize(
    ("methods", "bold"),
    [
        # Bold was whatever had the largest printed mean, by a single question of a hundred too.
        ([method("a", right(50)), method("b", right(51))], set()),
        ([method("a", right(20)), method("b", right(60))], {"b"}),
        ([method("a", "0" * 100), method("b", right(59)), method("c", right(60))], {"b", "c"}),
        # The same means: on the same questions a difference of ten is none of chance, on others it is.
        ([method("a", right(50)), method("b", right(60))], {"b"}),
        ([method("a", right(50)), method("b", "0" * 40 + "1" * 60)], set()),
        ([method("a", "0" * 5), method("b", "1" * 5)], set()),
        ([method("a", "0" * 6), method("b", "1" * 6)], {"b"}),
        ([method("a", "1" * 10)], set()),
        ([method("a", "01" * 10), method("b", "01" * 10)], set()),
        # Seeds that differ among themselves by as much as the methods do.
        (
            [
                method("a", "1" * 40 + "0" * 60, right(60)),
                method("b", right(60), "1" * 64 + "0" * 36),
            ],
            set(),
        ),
        (
            [
                method("a", "1" * 40 + "0" * 60, "1" * 41 + "0" * 59),
                method("b", right(60), "1" * 61 + "0" * 39),
            ],
            {"b"},
        ),
    ],
)
def test_bold_is_what_chance_does_not_explain(methods, bold):
    assert find_best(methods, "d", ACCURACY) == bold


def test_the_test_behind_bold_against_scipy():
    """With a seed each it is the paired t test."""
    from scipy.stats import ttest_rel

    verdicts, random = set(), np.random.default_rng(0)
    for _ in range(30):
        ours, theirs = (random.random((2, 60)) < [[0.5], [0.65]]).astype(int)
        told_apart = bool(ttest_rel(ours, theirs).pvalue < 0.05)
        methods = [method(name, "".join(map(str, answers))) for name, answers in (("a", ours), ("b", theirs))]
        assert bool(find_best(methods, "d", ACCURACY)) == told_apart
        verdicts.add(told_apart)
    assert verdicts == {True, False}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda rows: rows[:-3], "got 21 questions in A=.*a and 18 in B=.*b: 3 only in A=.*a .such as "),
        (lambda rows: [{**rows[0], "id": "new"}, *rows[1:]], "1 only in A=.*, 1 only in B=.*b .such as new.$"),
        (lambda rows: [{**rows[0], "digest": "other"}, *rows[1:]], "1 of another wording .such as "),
    ],
)
def test_evaluations_of_other_questions_are_refused_by_name(tmp_path, change, expected):
    """They stood in one table, the best of them bold."""
    folders = [f"{name.upper()}={evaluated(tmp_path / name, 1.0)}" for name in "ab"]
    path = questions_path(tmp_path / "b" / "evaluation", "vignettes")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in change(rows)), encoding="utf-8")
    with pytest.raises(InputError, match=f"expected answers to the same questions of vignettes, .*{expected}"):
        evaluate.main(["--report", *folders, "--workdir", str(tmp_path / "out")])
    path.unlink()
    with pytest.raises(
        InputError, match=r"--report B=.*expected .*vignettes.jsonl, which earlier .* --workdir .*evaluation`"
    ):
        evaluate.main(["--report", *folders, "--workdir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_summary_that_is_none_is_named(tmp_path):
    """A damaged one was a traceback, in a report and in an evaluation that goes on."""
    evaluated(tmp_path / "a", 1.0)
    responses, workdir = tmp_path / "a" / "evaluation" / "responses" / "vignettes.jsonl", tmp_path / "again"
    evaluate.main(["--responses", str(responses), "--workdir", str(workdir), "reward.workers=0"])
    expected = r"again/summary\.json: .*expected .*, got .*; delete it, and crpo_jax\.evaluate"
    for content in ("", "[", "[]", "{}", '{"data": 1}', '{"data": {"d": 1}}'):
        (workdir / "summary.json").write_text(content)
        for arguments in (["--report", f"A={workdir}"], ["--workdir", str(workdir), "reward.workers=0"]):
            with pytest.raises(InputError, match=expected):
                evaluate.main(arguments)
    (workdir / "summary.json").unlink()
    evaluate.main(["--workdir", str(workdir), "reward.workers=0"])
    evaluate.main(["--report", f"A={workdir}", "--workdir", str(tmp_path)])


def test_training_runs_are_compared_by_their_held_out_questions(tmp_path, capsys):
    """A run's workdir was refused, although it holds answers to the same questions as the run beside it."""
    for name, cites in (("grpo", 0.0), ("crpo", 1.0)):
        evaluated(tmp_path / name, cites)
        (tmp_path / name / "report").mkdir()
        responses = tmp_path / name / "evaluation" / "responses" / "vignettes.jsonl"
        for step in (0, 20):
            shutil.copy(responses, tmp_path / name / "report" / f"held_out_{step:06d}.jsonl")
        shutil.rmtree(tmp_path / name / "evaluation")
        (tmp_path / name / "config.yaml").write_text("reward: {workers: 0}\n")
    rows = [f"{name.upper()}={tmp_path / name}" for name in ("grpo", "crpo")]
    evaluate.main(["--report", *rows, "--workdir", str(tmp_path)])
    output = capsys.readouterr().out
    assert re.search(r"^held_out +GRPO +CRPO", output)
    assert re.search(r"cites % +0\.0 +9\d\.\d \*", output)
    assert f"GRPO={tmp_path / 'grpo'}: a training run, its held-out questions after step 20." in output


def test_judges_counts_by_question_outlive_an_evaluation_without_them(tmp_path):
    rows = [{"id": "a", "digest": "1", "accuracy": 1.0}, {"id": "b", "digest": "2", "accuracy": 0.0}]
    evaluate.write_questions(tmp_path, "d", rows, {"a": {"llama": {"subgoal": 2.0}}})
    evaluate.write_questions(tmp_path, "d", [{**row, "accuracy": 0.5} for row in rows])
    stored = [json.loads(line) for line in questions_path(tmp_path, "d").read_text(encoding="utf-8").splitlines()]
    assert stored[0] == {"id": "a", "digest": "1", "accuracy": 0.5, "judges": {"llama": {"subgoal": 2.0}}}
    assert Column("Subgoal", ("judges", "llama", "subgoal")).of_question(stored[0]) == 2.0
    assert Column("Subgoal", ("judges", "llama", "subgoal")).of_question(stored[1]) is None


def test_lengths_in_tokens_and_in_words_are_two_columns():
    methods = [method("a", "1"), method("b", "1")]
    for row, length in zip(methods, ({"unit": "words", "mean": 90.0}, {"unit": "tokens", "mean": 130.0}), strict=True):
        row.seeds[0].summary["data"]["d"]["length"] = length
    columns = {column.title: column for column in report.table_columns(methods, "d")}
    cells = [
        [report.format_cell(row, "d", columns[f"length, {unit}"]) for row in methods] for unit in ("words", "tokens")
    ]
    assert cells == [["90", "-"], ["-", "130"]]


def test_text_of_a_model_is_text():
    answer = Answer(Question("evil", EVIL, {"A": EVIL, "B": "b"}, "A"), 0, EVIL)
    score = report.score_response(answer.question, answer.response, SETTINGS.reward)
    page = report.case_html("d", [report.Sample("<b>me</b>", answer, score)] * 2)
    assert {tag for tag, _ in Tags(page).tags} <= {"section", "h3", "p", "ul", "li", "div", "h4", "pre", "mark"}


def test_marking_keeps_every_character():
    text = "İstanbul: white ear tophi & <dx> 9.8 mg/dL; WHITE."
    marked = report.mark_citations(text, {terms.term_of("white"), terms.term_of("9.8 mg/dl")})
    assert marked.count("<mark>") == 3
    assert report.html.unescape(re.sub("</?mark>", "", marked)) == text


@pytest.mark.parametrize(
    ("row", "expected"),
    [("nothing", "expected NAME=FOLDER"), ("A=/nowhere", "expected the workdir of a finished evaluation")],
)
def test_bad_rows_are_named_and_write_nothing(tmp_path, row, expected):
    with pytest.raises(InputError, match=expected):
        evaluate.main(["--report", row, "--workdir", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
