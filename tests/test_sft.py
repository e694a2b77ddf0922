"""Fine-tuning by its own command: all weights or adapters, stopped and resumed, the best epoch kept, files readable."""

import json
import os
import signal
import threading
import time
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from crpo_jax import sft
from crpo_jax.errors import InputError
from crpo_jax.runtime import exported_tokenizer, fine_tuning_report
from crpo_jax.runtime.fine_tuning import patience_is_over
from crpo_jax.store.metrics import read_metrics

export = import_module("crpo_jax.export")

pytestmark = pytest.mark.usefixtures("compiled_once")

SMALL = [
    "model.shape.hidden_size=32",
    "model.shape.num_hidden_layers=1",
    "model.shape.num_attention_heads=8",
    "model.shape.intermediate_size=48",
    "data.vignettes=64",
    "rollout.max_new_tokens=8",
    "sft.steps=0",
    "sft.epochs=6",
    "sft.batch_size=8",
    "sft.previews=1",
    "sft.optimizer.algorithm=adamw",
    "sft.optimizer.learning_rate=0.01",
    "parallel.unroll=false",
]
LORA = ["sft.lora.rank=4", "sft.lora.targets=[q_proj, down_proj]", "sft.optimizer.learning_rate=0.1"]


def tune(workdir: Path, *overrides: str) -> list[dict[str, float]]:
    sft.main(["--workdir", str(workdir), "--mesh", "8x1", *SMALL, *overrides])
    return read_metrics(workdir)


def timeless(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if not name.startswith("time/")} for row in metrics]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, compiled_once) -> Path:
    workdir = tmp_path_factory.mktemp("sft") / "whole"
    tune(workdir)
    return workdir


def test_the_loss_falls_and_the_run_leaves_its_files(whole: Path):
    metrics = read_metrics(whole)
    evaluated = [row["step"] for row in metrics if "eval/loss" in row]
    assert evaluated == [0, 4, 8, 12, 16, 20, 23]  # 30 traces in batches of 8: the last epoch ends inside a batch
    assert metrics[-1]["eval/loss"] < metrics[0]["eval/loss"] - 1
    assert metrics[-2]["loss/total"] < metrics[0]["loss/total"] - 1
    files = ("config.yaml", "samples.jsonl", "report/curve.png", "coldstart/model.safetensors")
    for name in (*files, "coldstart/tokenizer.json", "checkpoints", "tb"):
        assert (whole / name).exists(), name
    previews = [json.loads(line) for line in (whole / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in previews] == evaluated
    assert all({"prompt", "teacher", "response"} <= row.keys() for row in previews)
    assert "<conclusion>" in previews[0]["teacher"]


def test_updates_that_are_not_finite_end_the_run(tmp_path: Path):
    """Otherwise the run would reach its end and write the weights it began with as the model."""
    optimizer = {"learning_rate": 1e30, "warmup_steps": 0, "schedule": "constant"}
    diverging = [f"sft.optimizer.{name}={value}" for name, value in optimizer.items()]
    expected = (
        r"step \d+, mini-batch 0: loss or gradient not finite, .*It was the last of 3 in a row \(run.limits.skipped\)"
    )
    with pytest.raises(SystemExit, match=expected) as caught:
        tune(tmp_path / "run", *diverging)
    assert "sft.optimizer.learning_rate" in str(caught.value)
    assert not (tmp_path / "run" / "coldstart").exists()


def test_the_loss_is_of_the_response_alone(tmp_path: Path):
    """Prompts of different lengths before the same answer: a loss that counted them could not fall this far."""
    answer = {"options": {"A": "gout", "B": "flu"}, "answer": "A", "response": "\\boxed{A}"}
    rows = [{"id": str(i), "question": "chest pain " * (i + 1)} | answer for i in range(4)]
    path = tmp_path / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = tune(tmp_path / "run", f"sft.path={path}", "sft.epochs=30", "sft.held_out=0", "sft.previews=0")
    assert metrics[-2]["loss/total"] < 0.1
    assert not any("eval/loss" in row for row in metrics)


def stop_after(workdir: Path, steps: int) -> threading.Thread:
    """Sends this process SIGTERM once the run in `workdir` has logged `steps` steps."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while len(read_metrics(workdir)) < steps and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_resumed_run_equals_one_that_was_never_stopped(
    whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """Contract 6 between epochs: metrics, previews and weights, bit for bit."""
    watch = stop_after(tmp_path / "run", 6)
    stopped = tune(tmp_path / "run")
    watch.join()
    assert 6 <= len(stopped) < 23
    assert not (tmp_path / "run" / "coldstart").exists()
    assert f"stopped after step {len(stopped)} of 23" in capfd.readouterr().err
    assert timeless(tune(tmp_path / "run")) == timeless(read_metrics(whole))
    for name in ("samples.jsonl", "coldstart/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (whole / name).read_bytes(), name


def test_a_finished_run_says_so_and_changes_nothing(whole: Path, capfd: pytest.CaptureFixture[str]):
    before = (whole / "metrics.jsonl").read_bytes()
    tune(whole)
    errors = capfd.readouterr().err
    assert "this run is finished, nothing to do" in errors
    assert "held-out loss per token" in errors
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_the_best_epoch_is_kept_and_patience_ends_the_run(tmp_path: Path):
    """With a learning rate that is too large at the end, the folder holds the best epoch, not the last."""
    metrics = tune(tmp_path / "run", "sft.epochs=12", "sft.optimizer.learning_rate=0.3", "sft.patience=2", "run.keep=1")
    losses = fine_tuning_report.held_out_losses(tmp_path / "run")
    best = fine_tuning_report.best_step(losses, [step for step in losses if step])
    assert best is not None
    assert metrics[-1]["step"] == sorted(losses)[sorted(losses).index(best) + 2] or best == 4
    assert metrics[-1]["step"] < 44
    arguments = ["--workdir", str(tmp_path / "run"), "--dtype", "float32"]
    export.main([*arguments, "--out", str(tmp_path / "best")])
    export.main([*arguments, "--out", str(tmp_path / "last"), "--step", str(metrics[-1]["step"])])
    written = weights(tmp_path / "run" / "coldstart")
    assert all(np.array_equal(written[name], value) for name, value in weights(tmp_path / "best").items())
    assert not all(np.array_equal(written[name], value) for name, value in weights(tmp_path / "last").items())


@pytest.mark.parametrize(
    ("losses", "over"), [({0: 3, 4: 2, 8: 1}, False), ({0: 3, 4: 1, 8: 2}, False), ({0: 3, 4: 1, 8: 1, 12: 1}, True)]
)
def test_patience(losses: dict[int, float], over: bool):
    assert patience_is_over(losses, 2) == over
    assert not patience_is_over(losses, 0)


def test_adapters_are_merged_and_written_for_peft(whole: Path, tmp_path: Path):
    start, run, again = whole / "coldstart", tmp_path / "run", tmp_path / "again"
    metrics = tune(run, *LORA, f"model.path={start}")
    assert metrics[-1]["eval/loss"] < metrics[0]["eval/loss"]
    export.main(["--workdir", str(run), "--out", str(tmp_path / "adapter"), "--adapter"])
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter" / "adapter_model.safetensors"
    ).read_bytes()

    # model.adapter on the adapter's base is the merged model; a learning rate of 0 leaves it as it is.
    frozen = ["sft.optimizer.learning_rate=0", "sft.epochs=1"]
    tune(again, f"model.path={start}", f"model.adapter={run / 'adapter'}", *frozen)
    merged, reloaded, before = (weights(folder) for folder in (run / "coldstart", again / "coldstart", start))
    for name, value in merged.items():
        np.testing.assert_allclose(reloaded[name], value, atol=1e-6)
        assert np.array_equal(value, before[name]) == (not ("q_proj.weight" in name or "down_proj" in name)), name
    with pytest.raises(InputError, match=r"--adapter: expected a run with LoRA"):
        export.main(["--workdir", str(again), "--out", str(tmp_path / "none"), "--adapter"])
    with pytest.raises(InputError, match=r"model.adapter: expected model.path beside it"):
        tune(tmp_path / "none", f"model.adapter={run / 'adapter'}")
    assert not (tmp_path / "none").exists()


def test_devices_are_the_eight_of_the_suite():
    assert jax.device_count() == 8


def test_a_tokenizer_that_no_export_could_have_is_refused_before_training(tmp_path, monkeypatch):
    """It was refused when the cold start was written, after all its steps, and again whenever it was resumed."""
    monkeypatch.setattr(exported_tokenizer, "declare_class", lambda folder: None)
    with pytest.raises(
        InputError, match="expected a tokenizer that transformers' AutoTokenizer reads as this run does"
    ):
        tune(tmp_path / "run")
    assert not (tmp_path / "run").exists()
