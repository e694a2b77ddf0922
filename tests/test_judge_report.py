"""The report: the right numbers in the right cells, all figures, one file that fetches and runs nothing."""

import json
import re
from html.parser import HTMLParser
from importlib import import_module

import pytest

from crpo_jax import config
from crpo_jax.answer.records import Answer, answer_to_row
from crpo_jax.answer.statistics import summarize
from crpo_jax.data.question import Question
from crpo_jax.data.vignettes import TeacherNoise, teacher_response, vignettes
from crpo_jax.errors import InputError
from crpo_jax.judge import report
from crpo_jax.judge.measures import MEASURES
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
