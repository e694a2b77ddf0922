"""scripts/bench.py as a user runs it, on a model of a few thousand parameters."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHAPE

from crpo_jax.model.huggingface import save
from crpo_jax.model.transformer import Qwen2

SCRIPT = Path(__file__).parents[1] / "scripts" / "bench.py"


@pytest.fixture(scope="module")
def folder(model: Qwen2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    save(model, SHAPE, folder / "model", dtype="float32")
    (folder / "prompts.jsonl").write_text('{"tokens": [3, 1, 4]}\n{"tokens": [1, 5]}\n')
    return folder


def bench(folder: Path, *arguments: str, prompts: str = "prompts.jsonl") -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        str(SCRIPT),
        "rollout",
        "--model",
        str(folder / "model"),
        "--prompts",
        str(folder / prompts),
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_one_line_with_the_peers_keys_and_what_the_device_did(folder: Path):
    done = bench(folder, "--group", "2", "--max-new", "6", "--repeats", "1", "--mesh", "8x1", "--chunk", "2")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert list(found)[:6] == ["peer", "what", "first_seconds", "seconds", "useful_tokens", "tokens_per_second"]
    assert found["useful_tokens"] == 2 * 2 * 6
    assert found["steps"] == 5  # the first token is the prefill's
    assert found["tokens_per_second"] == pytest.approx(24 / found["seconds"], rel=0.1)
    embedding_of_its_own = SHAPE.v * SHAPE.d
    parameters = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors")) // 4
    row = 2 * SHAPE.l * SHAPE.k * SHAPE.h * 4  # bytes of keys and values a token
    assert found["bytes_per_step"] == pytest.approx(
        4 * (parameters - embedding_of_its_own) + row * (32 + 2 * 6), rel=0.1
    )
    assert found["bandwidth"] > 1e8
    assert 0 < found["share_of_bandwidth"] < 1.5


def test_bad_prompts_are_refused_in_one_line(folder: Path):
    (folder / "bad.jsonl").write_text('{"tokens": [3, 1, 4]}\n{"tokens": [99]}\n')
    done = bench(folder, prompts="bad.jsonl")
    assert done.returncode == 2
    assert "bad.jsonl:2: expected" in done.stderr
    assert len(done.stderr.splitlines()) == 1
