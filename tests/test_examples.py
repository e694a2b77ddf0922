"""The examples, each run as it stands on tiny random models: short files, and a step of training with each."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chat_server import ChatServer, complete, prompt_of
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer

from crpo_jax.model.config_json import config_of
from crpo_jax.model.huggingface import model_tensors
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape
from crpo_jax.store.files import read_rows
from crpo_jax.store.metrics import read_metrics

train = import_module("crpo_jax.train")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compiles")]

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny_tokenizer"
EXAMPLES = sorted(path for path in (ROOT / "examples").iterdir() if path.suffix in (".yaml", ".ipynb"))
LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n{{ message['content'] | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
QWEN3_THINKING = (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
SMALL = [
    *("model.dtype=float32", "parallel.remat=false", "run.compile_cache=", "reward.workers=0"),
    *(
        "crpo.steps=1",
        "crpo.prompts_per_step=2",
        "crpo.mini_batch_prompts=2",
        "crpo.group_size=2",
        "crpo.truncated=keep",
    ),
    *("rollout.max_new_tokens=8", "rollout.chunk=8", "rollout.slots=8", "data.eval_questions=2"),
    *("parallel.length_multiple=64", "parallel.logprob_chunk=64"),
]
"""A step in seconds; all else is as the example says."""


def model_folder(folder: Path, model_type: str) -> Path:
    """A random model of an architecture with a Qwen-like or Llama-like tokenizer and generation config."""
    tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    settings = json.loads((TINY / "tokenizer_config.json").read_text(encoding="utf-8"))
    if model_type == "llama":
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in LLAMA_TOKENS])
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": LLAMA_TOKENS[0],
            "eos_token": LLAMA_TOKENS[3],
            "chat_template": LLAMA_TEMPLATE,
        }
    if model_type == "qwen3":
        settings["chat_template"] += QWEN3_THINKING
    end = tokenizer.token_to_id(settings["eos_token"])
    vocabulary = tokenizer.get_vocab_size()
    shape = Shape(
        d=16, n=4, k=2, h=4, f=24, v=vocabulary, l=1, tied=True, rope=Rope(1e4), norm_eps=1e-6, model_type=model_type
    )
    rng = np.random.default_rng(0)
    folder.mkdir()
    weights = {
        tensor.key: rng.normal(size=tensor.sizes, scale=0.1).astype(np.float32) for tensor in model_tensors(shape)
    }
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config_of(shape, "float32", {})), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [end]}), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def write_rows(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(name: str, folder: Path, model_type: str, *overrides: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workdir of an example's run, started in the repository's root as its first lines say."""
    monkeypatch.chdir(ROOT)
    model, workdir = model_folder(folder / "model", model_type), folder / "run"
    path = ["--config", f"examples/{name}", "--workdir", str(workdir), f"model.path={model}"]
    train.main([*path, *SMALL, *overrides])
    assert [row["step"] for row in read_metrics(workdir)] == [0, 1]
    return workdir


def split_in_two(folder: Path, rows: list[dict[str, Any]]) -> list[str]:
    """Settings for the first rows to train on and the last ones held out."""
    half = len(rows) // 2
    training, held_out = write_rows(folder / "a.jsonl", *rows[:half]), write_rows(folder / "b.jsonl", *rows[half:])
    return [f"data.path={training}", f"data.eval_path={held_out}"]


def samples(workdir: Path) -> list[dict[str, Any]]:
    return read_rows(workdir / "samples.jsonl")


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_is_short_and_says_how_to_run_it(path: Path):
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    else:
        assert f"--config examples/{path.name}" in text
    assert len(text.splitlines()) < 40


def test_gsm8k_from_a_local_file_with_qwen3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    answers = ["2 + 3 = <<2+3=5>>5\n#### 5", "She has 1,000 / 4 = <<1000/4=250>>250.\n#### 250"] * 2
    rows = [{"question": f"How many are {n}?", "answer": answer} for n, answer in enumerate(answers)]
    overrides = split_in_two(tmp_path, rows)
    workdir = run("gsm8k_qwen3.yaml", tmp_path, "qwen3", *overrides, monkeypatch=monkeypatch)
    assert {row["answer"] for row in samples(workdir)} == {"5", "250"}


def test_pubmedqa_with_llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        {
            "pubid": 100 + n,
            "question": f"Does drug {n} help?",
            "context": {"contexts": ["We asked.", "It did."], "labels": ["AIM", "RESULTS"], "meshes": []},
            "long_answer": "It helped.",
            "final_decision": decision,
        }
        for n, decision in enumerate(("yes", "no", "maybe", "yes"))
    ]
    overrides = split_in_two(tmp_path, rows)
    workdir = run("pubmedqa_llama.yaml", tmp_path, "llama", *overrides, monkeypatch=monkeypatch)
    assert {row["answer"] for row in samples(workdir)} == {"yes", "no"}


def test_free_text_with_a_rubric_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def judge(request: dict[str, Any], _: int) -> Any:
        return complete(f"Fine.\nSCORE: {len(prompt_of(request)) % 11}")

    with ChatServer(judge) as server:
        overrides = (f"reward.judge.base_url={server.url}", "reward.judge.model=judge")
        workdir = run("rubric_judge.yaml", tmp_path, "qwen2", *overrides, monkeypatch=monkeypatch)
    assert all("names the diagnosis" in prompt_of(request) for request in server.requests)
    assert all(0 <= row["total"] <= 1 for row in samples(workdir))
    assert len({row["total"] for row in samples(workdir)}) > 1


def test_ones_own_reward_in_a_notebook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    cells = json.loads((ROOT / "examples" / "own_reward.ipynb").read_text(encoding="utf-8"))["cells"]
    code, names = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"], dict[str, Any]()
    small = {key: yaml.safe_load(value) for key, _, value in (text.partition("=") for text in SMALL)}
    small |= {"data.problems": 64, "sft.steps": 1, "sft.previews": 0, "run.compile_cache": ""}
    small |= {"sft.batch_size": 2, "model.shape.hidden_size": 64, "model.shape.num_hidden_layers": 1}
    for number, cell in enumerate(code):
        exec(compile(cell, f"cell {number}", "exec"), names)  # noqa: S102 (as a notebook does)
        if number == 0:
            assert names["settings"] == {"crpo.steps": 40}
            names["settings"] |= small
    assert names["closeness"](["\\boxed{8}", "\\boxed{9}", "8"], ["8"] * 3) == [1, 0.5, 0]
    assert {"reward/component/grpo", "reward/component/closeness"} <= names["rows"][0].keys()
    assert names["problem"].question in capsys.readouterr().out
