"""scripts/bench.py as a user runs it, on a model of a few thousand parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHAPE

from crpo_jax.model.huggingface import save_model
from crpo_jax.model.transformer import Transformer

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"


@pytest.fixture(scope="module")
def folder(model: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save_model(model, folder / "model", dtype="float32")
    (folder / "prompts.jsonl").write_text('{"tokens": [3, 1, 4]}\n{"tokens": [1, 5]}\n')
    return folder


def bench(part: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), part, "--model", str(folder / "model"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_rollout_is_one_line_with_the_peers_keys_and_the_devices_work(folder: Path):
    arguments = ["--group", "2", "--max-new", "6", "--repeats", "1", "--mesh", "8x1", "--chunk", "2"]
    done = bench("rollout", folder, "--prompts", str(folder / "prompts.jsonl"), *arguments)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert list(result)[:6] == ["peer", "what", "first_seconds", "seconds", "useful_tokens", "tokens_per_second"]
    assert result["useful_tokens"] == 2 * 2 * 6
    assert result["steps"] == 5  # the first token is the prefill's
    assert result["tokens_per_second"] == pytest.approx(24 / result["seconds"], rel=0.1)
    embedding_of_its_own = SHAPE.v * SHAPE.d
    parameters = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors")) // 4
    row = 2 * SHAPE.l * SHAPE.k * SHAPE.h * 4  # bytes of keys and values a token
    expected = 4 * (parameters - embedding_of_its_own) + row * (32 + 2 * 6)
    assert result["bytes_per_step"] == pytest.approx(expected, rel=0.1)
    assert result["bandwidth"] > 1e8
    assert 0 < result["share_of_bandwidth"] < 1.5


KEYS_OF_AN_UPDATE = {"peer", "what", "first_seconds", "seconds", "useful_tokens", "tokens_per_second"}
KEYS_OF_AN_UPDATE |= {"padding", "shapes", "model_gflops_per_second", "devices"}


def test_an_update_of_rows_is_one_line(folder: Path):
    lengths = folder / "lengths.json"
    lengths.write_text("[40, 9, 12, 7, 33, 5, 8, 6, 11]")
    settings = ["parallel.micro_batch_tokens=40", "parallel.length_multiple=4"]
    done = bench("update", folder, "--lengths", str(lengths), "--mesh", "2x4", "--repeats", "1", *settings)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    result = json.loads(line)
    assert result.keys() == KEYS_OF_AN_UPDATE
    assert (result["useful_tokens"], result["devices"], result["shapes"]) == (131, 8, 1)
    assert result["padding"] == pytest.approx(1 - (131 - 9) / (4 * 40), abs=1e-4)


def test_an_update_of_groups_counts_every_row(folder: Path):
    """Prompts that are shared and prompts that are not are the same work to the user, who counts tokens of rows."""
    groups = folder / "groups.json"
    groups.write_text('[{"prompt": 20, "responses": [5, 9]}, {"prompt": 3, "responses": [1, 12]}]')
    results = {}
    for flags in ([], ["--unshared"]):
        settings = ["parallel.length_multiple=4", "parallel.micro_batch_tokens=128"]
        done = bench("update", folder, "--groups", str(groups), "--mesh", "1x8", "--repeats", "1", *flags, *settings)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        results[result["peer"]] = result
    assert [result["useful_tokens"] for result in results.values()] == [73, 73]
    assert results["crpo_jax"]["padding"] == pytest.approx(1 - (19 + 14 + 2 + 13) / 48, abs=1e-4)
    assert results["crpo_jax unshared"]["padding"] == pytest.approx(1 - (73 - 4) / 72, abs=1e-4)


def test_bad_groups_are_refused_in_one_line(folder: Path):
    (folder / "bad.json").write_text('[{"prompt": 3, "responses": [4]}, {"prompt": 3, "responses": []}]')
    done = bench("update", folder, "--groups", str(folder / "bad.json"))
    assert done.returncode == 2
    assert "bad.json: group 2: expected" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_bad_questions_are_refused_in_one_line(folder: Path):
    path = folder / "bad_questions.jsonl"
    for written, expected in ((None, "expected a readable file of JSON lines"), ('{"question":', ":1: expected a")):
        if written:
            path.write_text(written + "\n", encoding="utf-8")
        done = bench("step", folder, "--questions", str(path))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert expected in done.stderr


def test_bad_prompts_are_refused_in_one_line(folder: Path):
    (folder / "bad.jsonl").write_text('{"tokens": [3, 1, 4]}\n{"tokens": [99]}\n')
    done = bench("rollout", folder, "--prompts", str(folder / "bad.jsonl"))
    assert done.returncode == 2
    assert "bad.jsonl:2: expected" in done.stderr
    assert len(done.stderr.splitlines()) == 1
