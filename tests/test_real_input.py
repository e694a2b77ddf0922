"""The same commands on real input: MedQA, the Qwen2.5 tokenizer, and a Qwen2.5 folder with random weights."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest

from crpo_jax.store.metrics import read_metrics

export = import_module("crpo_jax.export")
train = import_module("crpo_jax.train")

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
def test_medqa_with_a_qwen25_folder_runs_stops_resumes_and_exports(tmp_path, capfd):
    torch = pytest.importorskip("torch", reason="builds the folder with transformers and compares logits: needs torch")
    if not (SHARED / "medqa").is_dir():
        pytest.skip("needs the published MedQA files and the Qwen2.5 tokenizer in ../shared/data")
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 128,
    }
    model = Qwen2ForCausalLM(
        Qwen2Config(vocab_size=151936, rope_theta=1e6, rms_norm_eps=1e-6, tie_word_embeddings=True, **sizes)
    )
    model.save_pretrained(tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SHARED / "qwen2.5" / name, tmp_path / "model" / name)

    def run(steps: int) -> list[dict[str, float]]:
        settings = {
            "model.path": tmp_path / "model",
            "model.dtype": "float32",
            "data.path": SHARED / "medqa" / "dev.jsonl",
            "data.eval_path": SHARED / "medqa" / "test.jsonl",
            "data.split": "dev",
            "data.eval_questions": 4,
            "data.prompt": "brief",  # every token costs 151,936 logits, so only the shortest questions are taken
            "data.max_prompt_tokens": 112,
            "data.max_dropped_share": 1.0,
            "rollout.max_new_tokens": 16,
            "rollout.chunk": 8,
            "crpo.steps": steps,
            "crpo.prompts_per_step": 2,
            "crpo.mini_batch_prompts": 2,
            "crpo.group_size": 2,
            "optimizer.learning_rate": 1e-4,
            "parallel.micro_batch_tokens": 512,
            "parallel.length_multiple": 128,
            "parallel.logprob_chunk": 64,
            "run.save_every": 1,
            "run.eval_every": 0,
        }
        config = Path(__file__).parents[1] / "configs" / "clinical_r1_3b.yaml"
        arguments = ["--config", str(config), "--mesh", "4x2", "--workdir", str(tmp_path / "run")]
        train.main([*arguments, *(f"{key}={value}" for key, value in settings.items())])
        return read_metrics(tmp_path / "run")

    run(1)
    metrics = run(2)
    assert [row["step"] for row in metrics] == [0, 1, 2]
    assert "resuming after step 1" in capfd.readouterr().err
    assert max(row["policy/sampler_difference_max"] for row in metrics[:-1]) < 1e-4
    rows = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 2 * 2 * 2
    assert all(row["id"].startswith("medqa-dev") for row in rows)

    export.main(["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "policy"), "--dtype", "float32"])
    policy = Qwen2ForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(tmp_path / "policy")("A 45-year-old man has chest pain.")["input_ids"]
    tokens = torch.tensor([ids])
    with torch.no_grad():
        theirs = policy(tokens).logits[0].numpy()
        before = model.eval()(tokens).logits[0].numpy()
    assert abs(theirs - our_logits(tmp_path / "policy", tokens.numpy())).max() < 1e-4
    assert abs(theirs - before).max() > 1e-4, "two steps changed nothing"


def our_logits(folder: Path, tokens):
    import jax
    import numpy as np

    from crpo_jax.model.huggingface import load_model
    from crpo_jax.parallel.layout import TENSOR
    from crpo_jax.parallel.mesh import make_mesh

    model = load_model(str(folder), make_mesh("8x1"), TENSOR)
    return np.asarray(jax.jit(lambda model, tokens: model.logits(model(tokens)))(model, tokens)[0])
