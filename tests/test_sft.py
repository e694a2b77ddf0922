"""Fine-tuning by its own command: whole or with adapters, stopped and resumed, the best epoch kept, its files readable."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from crpo_jax import export, sft
from crpo_jax.errors import InputError
from crpo_jax.runtime import fine_tuning_report
from crpo_jax.runtime.fine_tuning import patience_is_over
from crpo_jax.store.logs import read_metrics

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


def test_the_loss_falls_and_everything_is_left_behind(whole: Path):
    metrics = read_metrics(whole)
    evaluated = [row["step"] for row in metrics if "eval/loss" in row]
    assert evaluated == [0, 4, 8, 12, 16, 20, 23]  # 30 traces in batches of 8: the last epoch ends inside a batch
    assert metrics[-1]["eval/loss"] < metrics[0]["eval/loss"] - 1
    assert metrics[-2]["loss/total"] < metrics[0]["loss/total"] - 1
    for name in (
        "config.yaml",
        "samples.jsonl",
        "checkpoints",
        "tb",
        "report/curve.png",
        "coldstart/model.safetensors",
        "coldstart/tokenizer.json",
    ):
        assert (whole / name).exists(), name
    previews = [json.loads(line) for line in (whole / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in previews] == evaluated
    assert all({"prompt", "teacher", "response"} <= row.keys() for row in previews)
    assert "<conclusion>" in previews[0]["teacher"]


def test_updates_that_are_not_finite_end_the_run(tmp_path: Path):
    """Else it would go on to its end, and write the weights it began with as the model."""
    with pytest.raises(SystemExit, match="loss or gradient not finite, the last of 3 updates in a row"):
        tune(
            tmp_path / "astray",
            "sft.optimizer.learning_rate=1e30",
            "sft.optimizer.warmup_steps=0",
            "sft.optimizer.schedule=constant",
        )
    assert not (tmp_path / "astray" / "coldstart").exists()


def test_the_loss_is_of_the_response_alone(tmp_path: Path):
    """Another question before the same answer changes what is conditioned on, not which tokens count: their number is the same."""
    questions = [
        {"id": str(i), "question": "chest pain " * (i + 1), "options": {"A": "gout", "B": "flu"}, "answer": "A"}
        for i in range(4)
    ]
    (tmp_path / "traces.jsonl").write_text(
        "".join(json.dumps(row | {"response": "\\boxed{A}"}) + "\n" for row in questions)
    )
    metrics = tune(
        tmp_path / "run", f"sft.path={tmp_path / 'traces.jsonl'}", "sft.epochs=30", "sft.held_out=0", "sft.previews=0"
    )
    assert (
        metrics[-2]["loss/total"] < 0.1
    )  # the answer is always the same; the questions, which differ, could not be learnt to this
    assert not any("eval/loss" in row for row in metrics)


def stop_after(workdir: Path, steps: int) -> threading.Thread:
    """Sends this process SIGTERM once the run in `workdir` has written so many steps."""

    def watch() -> None:
        deadline = time.monotonic() + 120
        while len(read_metrics(workdir)) < steps and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_a_stopped_run_goes_on_as_if_it_had_never_stopped(
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
    said = capfd.readouterr().err
    assert "finished before" in said
    assert "held-out loss per token" in said
    assert (whole / "metrics.jsonl").read_bytes() == before


def test_the_best_epoch_is_kept_and_the_last_ones_are_not_waited_for(tmp_path: Path):
    """A learning rate that wrecks what it learnt: the folder holds the best epoch, not the last."""
    metrics = tune(tmp_path / "run", "sft.epochs=12", "sft.optimizer.learning_rate=0.3", "sft.patience=2", "run.keep=1")
    losses = fine_tuning_report.held_out_losses(tmp_path / "run")
    best = fine_tuning_report.best_of(losses, [step for step in losses if step])
    assert best is not None
    assert metrics[-1]["step"] == sorted(losses)[sorted(losses).index(best) + 2] or best == 4
    assert metrics[-1]["step"] < 44
    export.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "best"), "--dtype", "float32"])
    export.main(
        [
            "--workdir",
            str(tmp_path / "run"),
            "--out",
            str(tmp_path / "last"),
            "--dtype",
            "float32",
            "--step",
            str(metrics[-1]["step"]),
        ]
    )
    kept = weights(tmp_path / "run" / "coldstart")
    assert all(np.array_equal(kept[name], value) for name, value in weights(tmp_path / "best").items())
    assert not all(np.array_equal(kept[name], value) for name, value in weights(tmp_path / "last").items())


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

    # The adapter on the model it was trained on is the merged model; as a start, from which a learning rate of 0 does not move.
    tune(
        again,
        f"model.path={start}",
        f"model.adapter={run / 'adapter'}",
        "sft.optimizer.learning_rate=0",
        "sft.epochs=1",
    )
    one, two, before = (weights(folder) for folder in (run / "coldstart", again / "coldstart", start))
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-6)
        assert np.array_equal(value, before[name]) == (not ("q_proj.weight" in name or "down_proj" in name)), name
    with pytest.raises(InputError, match=r"--adapter: expected a run with LoRA"):
        export.main(["--workdir", str(again), "--out", str(tmp_path / "none"), "--adapter"])
    with pytest.raises(InputError, match=r"model.adapter: expected model.path beside it"):
        tune(tmp_path / "none", f"model.adapter={run / 'adapter'}")
    assert not (tmp_path / "none").exists()


def test_devices_are_the_eight_of_the_suite():
    assert jax.device_count() == 8
