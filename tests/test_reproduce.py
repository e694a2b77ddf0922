"""scripts/reproduce: its plans name real settings; its jobs run in order, side by side, once, and fail in one line."""

import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from crpo_jax import config
from crpo_jax.errors import InputError

ROOT = Path(__file__).parents[1]
LOADER = importlib.machinery.SourceFileLoader("reproduce", str(ROOT / "scripts" / "reproduce"))
reproduce = importlib.util.module_from_spec(importlib.util.spec_from_loader("reproduce", LOADER))  # type: ignore[arg-type]
sys.modules["reproduce"] = reproduce
LOADER.exec_module(reproduce)

PLANS = sorted((ROOT / "configs" / "reproduce").glob("*.yaml"))


@pytest.mark.parametrize("path", PLANS, ids=lambda path: path.stem)
def test_a_plan_has_the_papers_rows_and_commands_with_known_settings(path, tmp_path):
    plan, known = reproduce.read_plan(path), config.setting_fields()
    assert list(plan["rows"]) == ["Baseline", "GRPO", "CRPO", "Cold start + GRPO", "Cold start + CRPO"]
    base = (path.parent / plan["config"]).resolve()
    jobs, rows = reproduce.plan_jobs(plan, base, ["data.vignettes=40"], tmp_path)
    assert {row.partition("=")[0] for row in rows} == set(plan["rows"])
    assert len(rows) == 1 + 4 * len(plan["seeds"])
    for job in jobs:
        assert set(job.needs) <= {other.name for other in jobs}
        for _, (command, *words) in job.stages:
            assert (ROOT / "crpo_jax" / f"{command}.py").is_file()
            config.load_config(base, [word for word in words if word.split("=")[0] in known], model=False)


def test_the_baselines_teacher_is_noisier_and_on_the_same_half(tmp_path):
    plan = reproduce.read_plan(ROOT / "configs" / "reproduce" / "world.yaml")
    reproduce.plan_jobs(plan, ROOT / "configs" / "tiny.yaml", ["data.vignettes=400"], tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "baseline_traces.jsonl").read_text(encoding="utf-8").splitlines()]
    whole = sum(all(part in row["response"] for part in ("</dx>", "\\boxed", "<conclusion>")) for row in rows)
    assert 150 < len(rows) < 250
    assert 0.5 < whole / len(rows) < 0.9


def job(name: str, *commands: list[str], needs: tuple[str, ...] = (), alone: bool = False):
    stages = [(f"{name}-{number}", command) for number, command in enumerate(commands)]
    return reproduce.Job(name, list(needs), stages, alone)


def test_jobs_run_after_what_they_need_once_and_side_by_side(tmp_path, capsys):
    jobs = [
        job("last", ["score", "--help"], needs=("first",)),
        job("first", ["score", "--help"], ["distill", "--help"], alone=True),
    ]
    runner = reproduce.Runner(tmp_path, 2)
    assert runner.run([*jobs, job("beside", ["score", "--help"])])
    stages = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert stages.index("last-0:") > max(index for index, name in enumerate(stages) if name == "first-1:")
    assert "settings, given as section.key=value" in (tmp_path / "stages" / "first-1.log").read_text(encoding="utf-8")
    assert reproduce.Runner(tmp_path, 2).run(jobs)
    assert capsys.readouterr().out == "", "finished stages are skipped"
    with pytest.raises(InputError, match=r"expected this stage's command, got score --help"):
        reproduce.Runner(tmp_path, 1).run([job("last", ["distill", "--help"])])


def test_a_stage_that_fails_is_named_and_not_marked_as_done(tmp_path):
    with pytest.raises(SystemExit, match=r"bad-0: exit code 2: .*--responses /nowhere"):
        reproduce.Runner(tmp_path, 1).run([job("bad", ["score", "--responses", "/nowhere"], ["score", "--help"])])
    assert not list((tmp_path / "stages").glob("*.done"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--plan", "/nowhere.yaml"], "--plan /nowhere.yaml: expected a plan in YAML"),
        (["crpo.stepz=3"], "crpo.stepz: unknown key; did you mean crpo.steps"),
        (["--seeds", "one"], "--seeds: expected whole numbers"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments, expected):
    command = [sys.executable, str(ROOT / "scripts" / "reproduce"), "--workdir", str(tmp_path / "run"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "run").exists()
