"""Every family of models through the commands: cold start, training stopped and resumed, evaluation, export.

What is read and checked before the first program is compiled is tested always; the runs take a minute for each family
and need CRPO_JAX_FAMILY_RUNS=1.
"""

import json
import os
from importlib import import_module
from pathlib import Path

import jax
import numpy as np
import pytest
from chat_templates import FAMILIES
from model_folder import SIZES, write_model

from crpo_jax.config import load_config
from crpo_jax.data.tokenizer import load_tokenizer
from crpo_jax.rollout.engine import Response
from crpo_jax.runtime.inputs import open_questions, open_traces
from crpo_jax.runtime.runtime import open_runtime
from crpo_jax.store.metrics import read_metrics

evaluate = import_module("crpo_jax.evaluate")
export = import_module("crpo_jax.export")
sft = import_module("crpo_jax.sft")
train = import_module("crpo_jax.train")

pytestmark = pytest.mark.usefixtures("compiled_once")

SETTINGS = [
    *(
        "--config",
        "tiny",
        "--mesh",
        f"{jax.device_count()}x1",
        "tokenizer.path=",
        "data.prompt=boxed",
        "data.max_prompt_tokens=512",
        "data.source=jsonl",
    ),
    *("data.system_prompt=", "data.eval_questions=4", "rollout.max_new_tokens=24", "rollout.chunk=12"),
    *("crpo.prompts_per_step=8", "crpo.mini_batch_prompts=8", "crpo.group_size=2", "reward.design=grpo"),
    *("sft.steps=2", "sft.batch_size=8", "sft.previews=1", "sft.optimizer.algorithm=adamw", "sft.max_tokens=512"),
    *("run.eval_every=2", "run.save_every=1", "parallel.unroll=false"),
]


def write_questions(folder: Path) -> list[str]:
    """Questions and their traces as files, and the settings that name them."""
    rows = [
        {
            "id": str(number),
            "question": f"What is the half of {2 * number}?",
            "options": {"A": str(number), "B": str(number + 1)},
            "answer": "A",
            "response": f"The half of {2 * number} is {number}. \\boxed{{A}}",
        }
        for number in range(12)
    ]
    for name, part in (("train", rows[:8]), ("test", rows[8:])):
        lines = (json.dumps({key: row[key] for key in row if key != "response"}) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text("".join(lines))
    (folder / "traces.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:8]))
    names = {"data.path": "train", "data.eval_path": "test", "sft.path": "traces"}
    return [f"{key}={folder / name}.jsonl" for key, name in names.items()]


def samples(workdir: Path) -> list[str]:
    return (workdir / "samples.jsonl").read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize("name", SIZES)
def test_a_familys_folder_is_read(name: str, tmp_path: Path):
    """Prompts, traces, the tokens that end a response, and a tokenizer that AutoTokenizer reads alike."""
    model = write_model(tmp_path / "model", name)
    settings = [*SETTINGS[4:], *write_questions(tmp_path), f"model.path={model}"]
    runtime = open_runtime(load_config("tiny", settings))
    runtime.check_export()
    tokenizer, ends = runtime.vocabulary.tokenizer, {*FAMILIES[name].stops, FAMILIES[name].end_of_turn}
    assert set(tokenizer.convert_ids_to_tokens(list(runtime.vocabulary.stop_ids))) == ends
    questions, traces = open_questions(runtime), open_traces(runtime)
    assert len(questions.held_out.prompts) == 4
    for row in traces.train:
        assert tokenizer.convert_ids_to_tokens(row.response[-1]) == FAMILIES[name].end_of_turn
        assert "\nA) " in tokenizer.decode(list(row.prompt))
        response = Response(0, 0, np.array(row.response), np.zeros(len(row.response)), stopped=True)
        assert runtime.vocabulary.decode(response).startswith("The half of ")


@pytest.mark.skipif(not os.environ.get("CRPO_JAX_FAMILY_RUNS"), reason="takes minutes: CRPO_JAX_FAMILY_RUNS=1")
@pytest.mark.parametrize("name", SIZES)
def test_a_family_goes_through_the_commands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = write_model(tmp_path / "model", name)
    settings = [*SETTINGS, *write_questions(tmp_path)]
    sft.main(["--workdir", str(tmp_path / "sft"), *settings, f"model.path={model}"])
    start = tmp_path / "sft" / "coldstart"
    stops = json.loads((start / "generation_config.json").read_text())["eos_token_id"]
    tokenizer = load_tokenizer(start)
    ends = {*FAMILIES[name].stops, FAMILIES[name].end_of_turn}
    assert set(tokenizer.convert_ids_to_tokens(stops if isinstance(stops, list) else [stops])) == ends

    def run(workdir: Path, steps: int) -> list[str]:
        train.main(["--workdir", str(workdir), *settings, f"model.path={start}", f"crpo.steps={steps}"])
        return samples(workdir)

    run(tmp_path / "run", 1)
    resumed = run(tmp_path / "run", 2)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [0, 1, 2]
    assert resumed == run(tmp_path / "whole", 2), "stopped and resumed, a run is the run it would have been"
    export.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "policy"), "--dtype", "float32"])
    answered = ["--model", str(tmp_path / "policy"), "--data", str(tmp_path / "test.jsonl")]
    evaluate.main([*answered, "--workdir", str(tmp_path / "answers"), *settings, "evaluate.samples=2"])
    assert capsys.readouterr().out


def test_every_family_is_there():
    assert {sizes["model_type"] for sizes in SIZES.values()} == {"qwen2", "qwen3", "llama", "mistral", "gemma3_text"}
