"""The commands end to end, on a model of a few thousand parameters: run, stop, resume, change the mesh, export."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from pair import Pair
from safetensors.numpy import load_file

from crpo_jax.data.tokenizer import load_tokenizer
from crpo_jax.errors import InputError
from crpo_jax.runtime import same_inputs
from crpo_jax.store.metrics import read_metrics

export = import_module("crpo_jax.export")
score = import_module("crpo_jax.score")
train = import_module("crpo_jax.train")

pytestmark = pytest.mark.usefixtures("compiled_once")

CONFIGS = Path(__file__).parents[1] / "configs"

SMALL = [
    "model.shape.hidden_size=64",
    "model.shape.num_hidden_layers=1",
    "model.shape.num_attention_heads=8",
    "model.shape.intermediate_size=64",
    "data.vignettes=64",
    "data.eval_questions=16",
    "rollout.max_new_tokens=24",
    "rollout.chunk=12",
    "crpo.prompts_per_step=8",
    "crpo.mini_batch_prompts=4",
    "crpo.group_size=2",
    "sft.steps=2",
    "sft.batch_size=8",
    "sft.previews=0",
    "sft.optimizer.algorithm=adamw",
    "parallel.unroll=false",
    "run.eval_every=2",
    "run.save_every=2",
]


def run(workdir: Path, *overrides: str, mesh: str = "8x1") -> list[dict[str, float]]:
    train.main(["--workdir", str(workdir), "--mesh", mesh, *SMALL, *overrides])
    return read_metrics(workdir)


def timeless(metrics):
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in metrics]


def samples(workdir: Path, step: int | None = None):
    rows = [json.loads(line) for line in (workdir / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    return rows if step is None else [row for row in rows if row["step"] == step]


def policy(workdir: Path, folder: Path) -> bytes:
    export.main(["--workdir", str(workdir), "--out", str(folder), "--dtype", "float32"])
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once):
    """A run of four steps that was never stopped."""
    workdir = tmp_path_factory.mktemp("runs") / "whole"
    run(workdir, "crpo.steps=4")
    return workdir


def test_a_run_leaves_everything_a_user_looks_for(whole):
    files = ("config.yaml", "metrics.jsonl", "samples.jsonl", "coldstart/model.safetensors")
    for name in (*files, "report/curve.png", "report/index.html", "checkpoints", "tb"):
        assert (whole / name).exists(), name
    metrics = read_metrics(whole)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in metrics if "eval/accuracy" in row] == [0, 2, 4]
    rewards = {f"reward/{name}" for name in ("mean", "accuracy", "format", "cross_reference", "consistency")}
    assert rewards | {"response/length", "loss/total"} <= metrics[0].keys()
    assert len(samples(whole)) == 4 * 8 * 2
    assert {"response", "advantage", "why", "total", "answer_found"} <= samples(whole)[0].keys()


def test_the_sampler_agrees_with_the_trainer(whole):
    """Contract 3 in a real run: float32 log-probs within 1e-4, every step."""
    assert max(row["policy/sampler_difference_max"] for row in read_metrics(whole)[:-1]) < 1e-4


def test_a_resumed_run_equals_one_that_was_never_stopped(whole, tmp_path):
    """Contract 6 where a run stops between steps: metrics, samples and parameters, bit for bit."""
    run(tmp_path / "resumed", "crpo.steps=2")
    metrics = run(tmp_path / "resumed", "crpo.steps=4")
    assert timeless(metrics) == timeless(read_metrics(whole))
    assert samples(tmp_path / "resumed") == samples(whole)
    assert policy(tmp_path / "resumed", tmp_path / "a") == policy(whole, tmp_path / "b")


@pytest.mark.slow
@pytest.mark.parametrize(("mesh", "layout"), [("8x1", "fsdp"), ("4x2", "fsdp"), ("2x4", "zero1"), ("1x8", "fsdp")])
def test_another_mesh_or_layout_gives_the_same_run(whole, tmp_path, mesh, layout):
    """Contract 2, cold start included: the same samples, losses and parameters, up to float32 rounding."""
    metrics = run(tmp_path / "run", "crpo.steps=4", f"parallel.layout={layout}", mesh=mesh)
    pairs = zip(samples(tmp_path / "run"), samples(whole), strict=True)
    differing = [ours["step"] for ours, theirs in pairs if ours["response"] != theirs["response"]]
    assert len(differing) <= 2, "rounding may turn a draw on the very edge of two tokens"
    for ours, theirs in zip(metrics[:4], read_metrics(whole)[:4], strict=True):
        tolerance = 0.02 if differing and ours["step"] >= differing[0] else 1e-4
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], abs=tolerance)
    policy(tmp_path / "run", tmp_path / "a")
    policy(whole, tmp_path / "b")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-3 if differing else 1e-5, err_msg=name)


def test_one_cold_start_serves_two_designs(whole, tmp_path):
    overrides = [
        f"model.path={whole / 'coldstart'}",
        "crpo.steps=1",
        "reward.design=grpo",
        "reward.tags=[dx, conclusion]",
    ]
    metrics = run(tmp_path / "grpo", *overrides)
    assert metrics[0]["eval/accuracy"] == read_metrics(whole)[0]["eval/accuracy"]
    assert not (tmp_path / "grpo" / "coldstart").exists()


def test_crpo_trains_adapters_against_their_own_base(whole, tmp_path):
    """The reference is the start without adapters, so the first step has no KL. Resumed; exported merged and alone."""
    start = [
        f"model.path={whole / 'coldstart'}",
        "lora.rank=4",
        "lora.targets=[q_proj, up_proj]",
        "optimizer.learning_rate=0.02",
    ]
    start += ["crpo.mini_batch_prompts=8", "parallel.layout=fsdp"]
    run(tmp_path / "run", *start, "crpo.steps=1", mesh="4x2")
    metrics = run(tmp_path / "run", *start, "crpo.steps=2", mesh="4x2")
    assert metrics[0]["kl/mean"] == pytest.approx(0, abs=1e-9)
    assert metrics[1]["kl/mean"] > 1e-6
    assert max(row["policy/sampler_difference_max"] for row in metrics[:-1]) < 1e-4
    run(tmp_path / "whole", *start, "crpo.steps=2", mesh="4x2")
    assert policy(tmp_path / "run", tmp_path / "merged") == policy(tmp_path / "whole", tmp_path / "again")

    merged, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "merged", whole / "coldstart"))
    changed = {name for name, weight in before.items() if not np.array_equal(weight, merged[name])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"}
    export.main(
        ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "adapter"), "--adapter", "--dtype", "float32"]
    )
    low = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    a, b = (low[f"base_model.model.model.layers.0.mlp.up_proj.lora_{half}.weight"] for half in "AB")
    name = "model.layers.0.mlp.up_proj.weight"
    np.testing.assert_allclose(merged[name], before[name] + 16 / 4 * b @ a, atol=1e-6)


@pytest.mark.parametrize("made", ["cold start", "export"])
def test_transformers_reads_what_a_run_leaves_as_the_run_did(whole, tmp_path, made):
    """The start model and the export are Qwen2 folders, whose tokenizer transformers 5 would replace by Qwen2's."""
    from transformers import AutoTokenizer

    folder = whole / "coldstart"
    if made == "export":
        folder = tmp_path / "policy"
        export.main(["--workdir", str(whole), "--out", str(folder)])
    row = samples(whole, 0)[0]
    ours = load_tokenizer(Path(__file__).parents[1] / "configs" / "tiny_tokenizer")
    theirs = AutoTokenizer.from_pretrained(folder)
    for text in (row["response"], "(System 1: Intuitive) A man aged 23.\nB) anti-CCP 5 mg/dL <|im_end|>"):
        assert theirs.encode(text) == ours.encode(text)
    stops = ours.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == stops


def test_export_in_shards(whole, tmp_path):
    for size, name in (("5GB", "one"), ("40KB", "several")):
        export.main(["--workdir", str(whole), "--out", str(tmp_path / name), "--max-shard-size", size])
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())["weight_map"]
    parts = {
        key: value for file in set(index.values()) for key, value in load_file(tmp_path / "several" / file).items()
    }
    together = load_file(tmp_path / "one" / "model.safetensors")
    assert len(set(index.values())) > 1
    assert {key: value.tobytes() for key, value in parts.items()} == {
        key: value.tobytes() for key, value in together.items()
    }
    with pytest.raises(InputError, match=r"--max-shard-size: expected a size such as 500MB or 5GB, got '5 apples'"):
        export.main(["--workdir", str(whole), "--out", str(tmp_path / "other"), "--max-shard-size", "5 apples"])


def test_a_failing_reward_is_counted_and_carries_no_gradient(whole, tmp_path, monkeypatch):
    (tmp_path / "picky.py").write_text(
        "def rate(prompts, completions, **columns):\n"
        "    if any(len(completion) % 3 == 0 for completion in completions):\n"
        "        raise ValueError('a multiple of three')\n"
        "    return [float(len(completion)) for completion in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    start, design = [f"model.path={whole / 'coldstart'}", "crpo.steps=1"], "reward.design=crpo*0.5+picky:rate*0.01"
    metrics = run(tmp_path / "run", *start, design, "reward.max_failed_share=1.0")
    rows = samples(tmp_path / "run")
    failed = [row for row in rows if "error" in row]
    assert 0 < len(failed) < len(rows)
    assert metrics[0]["reward/failed"] == pytest.approx(len(failed) / len(rows))
    assert all("a multiple of three" in row["traceback"] and row["advantage"] == 0 for row in failed)
    assert metrics[0]["reward/component/picky:rate"] > 0
    assert metrics[0]["reward/mean"] == pytest.approx(
        0.5 * metrics[0]["reward/component/crpo"] + 0.01 * metrics[0]["reward/component/picky:rate"]
    )
    with pytest.raises(SystemExit, match="the reward is at fault"):
        run(tmp_path / "strict", *start, "reward.design=picky:rate", "reward.max_failed_share=0.01")


def test_the_variants_resume_exactly(whole, tmp_path):
    """Replacement groups follow from the step alone; the adaptive KL coefficient is in the checkpoint."""
    overrides = [
        f"model.path={whole / 'coldstart'}",
        "reward.design=grpo",
        "crpo.dynamic_sampling=2",
        "crpo.kl_target=1e-6",
    ]
    overrides += ["crpo.advantage=dr_grpo", "crpo.aggregation=constant", "crpo.ratio=sequence", "run.eval_every=0"]
    metrics = run(tmp_path / "never stopped", *overrides, "crpo.steps=2")
    run(tmp_path / "stopped", *overrides, "crpo.steps=1")
    assert timeless(run(tmp_path / "stopped", *overrides, "crpo.steps=2")) == timeless(metrics)
    assert samples(tmp_path / "stopped") == samples(tmp_path / "never stopped")
    assert metrics[0]["kl/coef"] != metrics[1]["kl/coef"]
    rows = samples(tmp_path / "stopped", 0)
    assert len(rows) == 3 * 8 * 2  # this model never answers: all rewards are equal, and two further batches are tried
    assert sum(row["trained"] for row in rows) == 8 * 2
    assert metrics[0]["reward/zero_variance_groups"] > 0.5


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (CONFIGS / "variants").iterdir()))
def test_a_published_recipe_trains(whole, tmp_path, recipe):
    """Two steps without KL and entropy in the loss; DAPO's punishment is in the rewards, and a part of them by name."""
    files = ["--config", str(CONFIGS / "tiny.yaml"), "--config", str(CONFIGS / "variants" / f"{recipe}.yaml")]
    letters = f"rollout.stop=[{', '.join('abcdefghijklmnopqrstuvwxyz')}]"  # which end some responses early
    metrics = run(tmp_path, *files, f"model.path={whole / 'coldstart'}", "crpo.steps=2", "run.eval_every=0", letters)
    for row in metrics[:2]:
        assert (row["loss/total"], row["kl/coef"]) == (row["loss/policy"], 0)
        assert row["policy/gradient_norm"] > 0
        assert ("reward/component/overlong" in row) == (recipe == "dapo")
        assert not {"kl/mean", "kl/max"} & set(row), "no start model is held to measure it against"
    if recipe == "dapo":
        rows = samples(tmp_path, 0)
        lengths, parts = np.array([row["tokens"] for row in rows]), [row["components"] for row in rows]
        assert len(set(lengths)) > 3
        expected = np.clip((0.8 * 24 - lengths) / (0.2 * 24), -1, 0)
        np.testing.assert_allclose([part["overlong"] for part in parts], expected, atol=1e-12)
        assert [row["total"] for row in rows] == [part["crpo"] + part["overlong"] for part in parts]
        assert metrics[0]["reward/component/overlong"] == pytest.approx(expected.mean())
        assert metrics[0]["reward/mean"] == pytest.approx(np.mean([row["total"] for row in rows]))


def test_a_workdir_of_another_config_is_refused(whole):
    with pytest.raises(InputError, match=r"crpo.kl_coef: 0.001 -> 0.5"):
        run(whole, "crpo.steps=4", "crpo.kl_coef=0.5")


def test_a_finished_run_says_so_and_changes_nothing(whole, capfd, monkeypatch):
    before, compared = (whole / "metrics.jsonl").read_text(), []
    monkeypatch.setattr(same_inputs, "is_single_process", lambda: False)
    monkeypatch.setattr(same_inputs, "require_agreement", compared.append)
    run(whole, "crpo.steps=4")
    assert sum("--workdir" in facts for facts in compared) == 1, "the processes compared their workdirs twice"
    assert timeless(read_metrics(whole)) == timeless([json.loads(line) for line in before.splitlines()])
    assert "resuming after step 4" in capfd.readouterr().err


@pytest.mark.slow
def test_sigterm_ends_after_the_step_and_the_run_resumes(whole, tmp_path):
    arguments = ["--workdir", str(tmp_path / "run"), "--mesh", "8x1", *SMALL, "crpo.steps=4"]
    command = [sys.executable, "-m", "crpo_jax.train", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 240
    while not read_metrics(tmp_path / "run") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "stopped after step" in errors or "resuming" in errors or len(read_metrics(tmp_path / "run")) == 5
    run(tmp_path / "run", "crpo.steps=4")
    assert timeless(read_metrics(tmp_path / "run")) == timeless(read_metrics(whole))


def assert_same(metrics, expected):
    """Equal up to the order of float32 sums, which differs between processes and threads."""
    for ours, theirs in zip(timeless(metrics), timeless(expected), strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            where = f"step {theirs['step']}: {name}"
            if value is None:  # nothing to average
                assert ours[name] is None, where
                continue
            np.testing.assert_allclose(ours[name], value, rtol=1e-3, atol=1e-5, err_msg=where)


@pytest.mark.slow
def test_two_processes_are_one_run_that_outlives_them(whole, tmp_path):
    """Two processes of four devices: one gets SIGTERM; resumed, one is killed; then one process finishes the run."""
    workdir, expected = tmp_path / "run", read_metrics(whole)
    settings = [f"model.path={whole / 'coldstart'}", "crpo.steps=4"]
    command = ["-m", "crpo_jax.train", "--workdir", str(workdir), "--mesh", "8x1", *SMALL, *settings]

    pair = Pair(*command)
    pair.wait_until(lambda: len(read_metrics(workdir)) >= 1)
    pair.processes[1].send_signal(signal.SIGTERM)
    (code, errors), (other_code, other_errors) = pair.ended()
    assert (code, other_code) == (0, 0), errors + other_errors
    assert "stopped after step" in errors
    done = len(read_metrics(workdir))
    assert 1 <= done < 4
    assert_same(read_metrics(workdir), expected[:done])

    pair = Pair(*command)
    pair.wait_until(lambda: len(read_metrics(workdir)) > done)
    pair.processes[1].kill()
    (code, errors), _ = pair.ended()
    last = errors.strip().splitlines()[-1]
    assert code != 0
    assert last.startswith("crpo_jax.train: process 0 of 2")
    assert "the same command in every process resumes from the last checkpoint" in last

    run(workdir, *settings)  # the remaining steps, in one process
    assert_same(read_metrics(workdir), expected)
    assert samples(workdir) == samples(whole)


BAD_INPUT = [
    (["crpo.stepz=3"], "crpo.stepz: unknown key; did you mean crpo.steps"),
    (["crpo.steps=many"], "crpo.steps: expected a whole number >= 0, got 'many'"),
    (["--mesh", "3x1"], "--mesh 3x1: expected data x model = the 8 cpu devices here, got 3 x 1 = 3"),
    (["--mesh", "eight"], "--mesh: expected DxM in devices, such as 8x1, got 'eight'"),
    (["--config", "nowhere.yaml"], "--config nowhere.yaml: No such file or directory"),
    (["model.path=/nowhere/model"], "model.path: expected a folder"),
    (["tokenizer.path=/nowhere/tokenizer"], "tokenizer.path: expected a folder with tokenizer.json"),
    (["data.source=medqa", "data.path=/nowhere/medqa.jsonl"], "/nowhere/medqa.jsonl"),
    (["rollout.stop=[<|nothing|>]"], "rollout.stop: expected tokens of"),
    (
        ["reward.design=crpo+elegance"],
        "reward.design: expected crpo, grpo, released or module:function, got 'elegance'",
    ),
]


@pytest.mark.parametrize(("arguments", "expected"), BAD_INPUT)
def test_bad_input_names_what_is_wrong_and_writes_nothing(tmp_path, arguments, expected):
    with pytest.raises(InputError) as caught:
        train.main(["--workdir", str(tmp_path / "run"), *arguments])
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["crpo.steps=many"], ["--frobnicate"]])
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, arguments):
    command = [sys.executable, "-m", "crpo_jax.train", "--workdir", str(tmp_path / "run"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=120, check=False)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert arguments[-1].split("=")[0] in done.stderr


def test_devices_are_the_eight_of_the_suite():
    assert jax.device_count() == 8


REWARDS = """
def brevity(prompts, completions, **columns):
    return [float("nan") if number == 3 else -len(text) / 100 for number, text in enumerate(completions)]
"""


def test_a_users_function_in_a_run_and_the_score_of_its_samples(whole, tmp_path, monkeypatch, capfd):
    """Its part stands in the samples by name, a response that it cannot score is named, and `score` reads the file."""
    (tmp_path / "users_own.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    design = "reward.design=crpo+users_own:brevity*0.5"
    with pytest.raises(InputError, match=r"users_own:brevty, got AttributeError: .* similar: brevity$"):
        run(tmp_path / "run", f"model.path={whole / 'coldstart'}", "reward.design=crpo+users_own:brevty")
    assert not (tmp_path / "run").exists(), "found before anything is written"
    metrics = run(tmp_path / "run", f"model.path={whole / 'coldstart'}", design, "crpo.steps=1")
    printed = capfd.readouterr().err
    assert re.search(
        r"step 0: 1 of 16 responses could not be scored and carry no gradient; the first, of question train-\d+: "
        r"users_own:brevity: expected a finite reward, got nan\n",
        printed,
    )
    assert "Traceback" not in printed
    rows = samples(tmp_path / "run")
    scored = [row for row in rows if "error" not in row]
    assert len(scored) == 15
    assert metrics[0]["reward/failed"] == pytest.approx(1 / 16)
    assert metrics[0]["reward/std"] == pytest.approx(np.std([row["total"] for row in scored]))
    assert all(row["components"]["users_own:brevity"] == -len(row["response"]) / 100 for row in scored)
    assert all(row["question"] and row["question"] in row["prompt"] for row in rows)

    out = tmp_path / "scores.jsonl"
    flags = ["--tokenizer", str(whole / "coldstart"), design, "reward.max_failed_share=1"]
    assert score.main(["--responses", str(tmp_path / "run" / "samples.jsonl"), "--out", str(out), *flags]) == 0
    again = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    exact = ("accuracy", "format", "cross_reference", "clinical_reasoning", "answer_found")
    for ours, theirs in zip(again, rows, strict=True):
        assert "error" in theirs or {key: ours[key] for key in exact} == {key: theirs[key] for key in exact}
