"""The evaluate command: a small model end to end, stopped and resumed; someone else's responses without jax."""

import json
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from crpo_jax import config
from crpo_jax.answer import datasets
from crpo_jax.answer.records import Answer, answer_to_row
from crpo_jax.data.vignettes import teacher_response, vignettes
from crpo_jax.errors import InputError
from crpo_jax.runtime.runtime import open_runtime

evaluate = import_module("crpo_jax.evaluate")

pytestmark = pytest.mark.usefixtures("compiled_once")

TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"
SHAPE = [
    "model.shape.hidden_size=64",
    "model.shape.num_hidden_layers=1",
    "model.shape.num_attention_heads=8",
    "model.shape.intermediate_size=64",
]
SMALL = [
    "evaluate.max_new_tokens=12",
    "rollout.chunk=12",
    "rollout.slots=2",
    "evaluate.samples=2",
    "evaluate.questions=40",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    runtime = open_runtime(config.load_config(TINY, [*SHAPE, "parallel.mesh=8x1"]))
    folder = tmp_path_factory.mktemp("model") / "small"
    runtime.export(runtime.start_weights(None, runtime.layout.master, "float32"), None, folder)
    return str(folder)


def run(workdir: Path, model: str, *more: str, mesh: str = "8x1") -> None:
    config_ = ["--config", str(TINY)] if not (workdir / "config.yaml").exists() else []
    evaluate.main(
        [*config_, "--mesh", mesh, "--model", model, "--data", "vignettes", "--workdir", str(workdir), *SMALL, *more]
    )


def rows(workdir: Path) -> list[dict]:
    return [
        json.loads(line)
        for line in (workdir / "responses" / "vignettes.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def by_sample(responses: list[dict]) -> dict[tuple[str, int], str]:
    return {(row["id"], row["sample"]): row["response"] for row in responses}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, model, compiled_once) -> Path:
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(workdir, model)
    return workdir


def test_every_question_is_answered_and_counted(whole):
    assert len(rows(whole)) == len(by_sample(rows(whole))) == 80
    summary = json.loads((whole / "summary.json").read_text(encoding="utf-8"))["data"]["vignettes"]
    assert (summary["questions"], summary["samples"], summary["responses"], summary["dropped"]) == (40, 2, 80, 0)
    assert summary["length"]["unit"] == "tokens"
    assert summary["consistency_by"] == "tokens"
    assert set(summary["exact"]) >= {"true_claims", "case_findings", "valid_rejections", "findings_invented"}
    assert len({row["response"] for row in rows(whole)}) > 60, "samples differ"


def test_a_stop_between_waves_and_a_torn_line_change_no_response(whole, model, tmp_path, capsys):
    """Waves of 8 questions: stopped after the first, a line of it torn, then resumed on another mesh."""
    real, waves = datasets.Status.add, []

    def add(status, answers):
        real(status, answers)
        waves.append(len(answers))
        if len(waves) == 1:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.Status, "add", add)
        run(tmp_path / "run", model)
    assert "stopped; the same command resumes from there" in capsys.readouterr().err
    assert not (tmp_path / "run" / "summary.json").exists()
    path = tmp_path / "run" / "responses" / "vignettes.jsonl"
    assert len(rows(tmp_path / "run")) == waves[0] < 80
    path.write_bytes(path.read_bytes()[:-30])
    run(tmp_path / "run", model, mesh="4x2")
    assert by_sample(rows(tmp_path / "run")) == by_sample(rows(whole))
    assert len(rows(tmp_path / "run")) == 80


def test_a_finished_evaluation_samples_nothing_and_can_be_summarized_again(whole, model, monkeypatch):
    before = (whole / "responses" / "vignettes.jsonl").read_bytes()
    monkeypatch.setattr(datasets, "evaluated_weights", lambda *_: pytest.fail("the model is not needed"))
    run(whole, model)
    evaluate.main(["--workdir", str(whole), "evaluate.answer=anywhere", "evaluate.subjects=[sex]"])
    assert (whole / "responses" / "vignettes.jsonl").read_bytes() == before
    assert "sex" in json.loads((whole / "summary.json").read_text(encoding="utf-8"))["data"]["vignettes"]["subjects"]


def test_responses_to_other_questions_are_refused(whole, model, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "responses" / "vignettes.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("woman", "person"), encoding="utf-8")
    with pytest.raises(InputError, match="expected responses to the questions of --data, got a response to 'test-"):
        run(tmp_path / "run", model)


def test_someone_elses_responses_need_no_jax(tmp_path):
    question = vignettes("test", 1)[0]
    (tmp_path / "theirs.jsonl").write_text(
        json.dumps(answer_to_row(Answer(question, 0, teacher_response(question, 0)))) + "\n", encoding="utf-8"
    )
    check = (
        "import sys\nfrom crpo_jax.evaluate import main\nmain(sys.argv[1:])\n"
        "loaded = sorted({'jax', 'flax', 'torch', 'transformers'} & set(sys.modules))\nassert not loaded, loaded\n"
    )
    arguments = ["--responses", str(tmp_path / "theirs.jsonl"), "--workdir", str(tmp_path / "run"), "reward.workers=0"]
    done = subprocess.run(
        [sys.executable, "-c", check, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "accuracy" in done.stdout
    assert "theirs by condition" in done.stdout


MEASURES = """
async def words(completions, **columns):
    return [float(len(text.split())) for text in completions]

def brittle(completions, answer, **columns):
    if any("fail" in text for text in completions):
        raise ValueError("cannot read it")
    return [None if text == "skip" else 1.0 for text in completions]
"""


def test_measures_of_ones_own_apart_from_the_reward(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = f"measures_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MEASURES)
    question = {"id": "q", "question": "Which?", "options": {"A": "gout", "B": "flu"}, "answer": "A"}
    lines = [question | {"id": f"q{n // 10}", "response": "a b"} for n in range(18)]
    lines += [question | {"id": "q1", "response": "skip"}, question | {"id": "q1", "response": "fail"}]
    (tmp_path / "theirs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--responses", "theirs.jsonl", "--workdir", "run", "reward.workers=0", "evaluate.k=[1, 16]"]
    evaluate.main([*arguments, f"evaluate.measures=[{name}:words, {name}:brittle]"])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())["data"]["theirs"]
    words, brittle = summary["measures"][f"{name}:words"], summary["measures"][f"{name}:brittle"]
    assert (words["mean"], words["measured"], words["failed"]) == (pytest.approx((2 + 1.8) / 2), 20, 0)
    assert (brittle["mean"], brittle["measured"], brittle["failed"]) == (1.0, 18, 1)
    assert brittle["first_error"].endswith("ValueError: cannot read it")
    rows = [json.loads(line) for line in (tmp_path / "run" / "questions" / "theirs.jsonl").read_text().splitlines()]
    assert rows[1]["measures"] == {f"{name}:words": 1.8, f"{name}:brittle": 1.0}
    printed = capsys.readouterr().out
    assert re.search(rf"{name}:words +1.900 \[", printed)
    assert re.search(rf"{name}:brittle +1.000 \[.*\] \(1 failed\)", printed)
    assert "no pass@k and majority@k for k=16: a question has only 10 samples" in printed
    for wrong, problem in {"words": "expected module:function, each once", f"{name}:wrods": "similar: words"}.items():
        with pytest.raises(InputError, match=rf"evaluate\.measures: .*{problem}"):
            evaluate.main([*arguments[:3], "other", f"evaluate.measures=[{wrong}]"])
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "/nowhere"], "expected --model with --data"),
        (["--data", "medqa"], "expected --model with --data"),
        (["--model", "m", "--data", "nonsense"], "--data nonsense: expected vignettes, arithmetic, medqa"),
        (["--responses", "/nowhere.jsonl"], "--responses /nowhere.jsonl: expected a file"),
        ([], "expected responses to evaluate in"),
        (["--model", "/nowhere/model", "--data", "vignettes"], "model.path: expected a folder"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(tmp_path, arguments, expected):
    with pytest.raises(InputError, match=expected):
        evaluate.main([*arguments, "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "responses").exists()
