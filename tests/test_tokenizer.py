"""Tokenizers of folders: tokenizer.json as it is, and exports that transformers' AutoTokenizer reads the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from crpo_jax.config import Data
from crpo_jax.data.prompts import render_prompts
from crpo_jax.data.tokenizer import comparison_texts, encode_all, load_tokenizer
from crpo_jax.data.vignettes import vignettes
from crpo_jax.errors import InputError
from crpo_jax.model.huggingface import stopping_at
from crpo_jax.runtime import exported_tokenizer as exporting
from crpo_jax.runtime.exported_tokenizer import exported_tokenizer
from crpo_jax.runtime.runtime import check_same_ids, warn_of_other_ids

ROOT = Path(__file__).parents[1]
TINY = ROOT / "configs" / "tiny_tokenizer"
QWEN = ROOT.parent / "shared" / "data" / "qwen2.5"
TEXTS = {"tiny": 10_000, "qwen": 2_000}
"""How many texts are compared; CRPO_JAX_COMPARED_TEXTS=N compares N with both."""


@pytest.fixture(params=["tiny", "qwen"])
def folder(request) -> Path:
    if request.param == "qwen" and not (QWEN / "tokenizer.json").is_file():
        pytest.skip("the published Qwen2.5 tokenizer is not here: shared/data/qwen2.5")
    return {"tiny": TINY, "qwen": QWEN}[request.param]


def exported(folder: Path, out: Path) -> Path:
    """What an export writes besides the weights."""
    with exported_tokenizer(folder, load_tokenizer(folder), "qwen2") as files:
        return Path(shutil.copytree(files, out))


def test_auto_tokenizer_reads_an_export_as_the_run_did(folder: Path, tmp_path: Path):
    """Transformers 5 takes Qwen2Tokenizer for a Qwen2 folder whatever tokenizer_class says, with another pre-tokenizer
    than the embedded world's: accuracy fell from 97% to 22%."""
    out, ours = exported(folder, tmp_path / "policy"), load_tokenizer(folder)
    theirs = AutoTokenizer.from_pretrained(str(out))
    count = int(os.environ.get("CRPO_JAX_COMPARED_TEXTS") or TEXTS["tiny" if folder == TINY else "qwen"])
    texts = list(comparison_texts(ours, count))
    assert len(set(texts)) > 0.9 * count
    assert encode_all(theirs, texts) == encode_all(ours, texts)
    assert theirs(texts[:100])["input_ids"] == encode_all(ours, texts[:100])  # nothing is added by default
    question = vignettes("test", 1)[0]
    brief = Data(prompt="brief", system_prompt="")
    [prompt] = render_prompts([question], brief, ours)
    assert render_prompts([question], brief, theirs) == [prompt]
    user = [{"role": "user", "content": "Fever?"}]
    for chat in (user, [{"role": "system", "content": ""}, *user]):
        assert theirs.apply_chat_template(chat, add_generation_prompt=True) == ours.apply_chat_template(
            chat, add_generation_prompt=True
        )
    for name in ("eos_token_id", "pad_token_id", "bos_token_id", "all_special_ids", "model_max_length"):
        assert getattr(theirs, name) == getattr(ours, name), name
    assert theirs.decode(prompt) == ours.decode(prompt)
    trusting = AutoTokenizer.from_pretrained(str(out), trust_remote_code=True)
    assert encode_all(trusting, texts[:400]) == encode_all(ours, texts[:400])


def test_files_that_are_read_alike_are_copied_unchanged(folder: Path, tmp_path: Path):
    out = exported(folder, tmp_path / "policy")
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    settings, before = (json.loads((place / "tokenizer_config.json").read_text()) for place in (out, folder))
    assert {name: value for name, value in settings.items() if name != "auto_map"} == before
    assert ("auto_map" in settings) == (out / "tokenizer_class.py").exists() == (folder == TINY)


def test_an_export_of_an_export_is_the_same(tmp_path: Path):
    first = exported(TINY, tmp_path / "first")
    second = exported(first, tmp_path / "second")
    assert {path.name: path.read_bytes() for path in first.iterdir()} == {
        path.name: path.read_bytes() for path in second.iterdir()
    }


def test_an_export_that_auto_tokenizer_reads_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(exporting, "declare_class", lambda folder: None)
    with (
        pytest.raises(
            InputError, match=r"tiny_tokenizer: expected a tokenizer that .*AutoTokenizer reads as .*, got \["
        ),
        exported_tokenizer(TINY, load_tokenizer(TINY), "qwen2"),
    ):
        pass


def test_a_folder_is_read_as_its_tokenizer_json_says_with_a_line_where_auto_tokenizer_differs(tmp_path: Path, capsys):
    """A model folder whose tokenizer is not the one that transformers takes for its model_type."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    text = "A woman aged 23 with anti-CCP antibodies.\nA) gout"
    ids = load_tokenizer(TINY).encode(text)
    warn_of_other_ids(load_tokenizer(tmp_path), tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    assert AutoTokenizer.from_pretrained(str(tmp_path)).encode(text) != ids
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(text) == ids
    warn_of_other_ids(tokenizer, tmp_path)
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}: transformers' AutoTokenizer makes other ids than tokenizer.json says, which")


def test_a_model_with_ids_of_its_own_is_not_given_others(tmp_path: Path):
    """Settings of one world and a model of another: without an error it would answer noise."""
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    ids = load_tokenizer(TINY).get_vocab()
    check_same_ids(ids, TINY, tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    vocabulary = document["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(
        InputError, match=r"tokenizer\.path: expected the ids of model\.path=.*; tokenizer\.path= takes"
    ):
        check_same_ids(ids, TINY, tmp_path)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [([2, 3], [2, 3]), ([3, 2], [3, 2]), (3, [2, 3]), (7, [2, 3, 7]), ([7, 2], [2, 3, 7]), (None, [2, 3])],
)
def test_a_served_model_stops_where_the_run_did(listed, expected):
    """A base model ends texts with <|endoftext|>; trained on turns it ends them with <|im_end|>."""
    generation = {"temperature": 0.7} | ({} if listed is None else {"eos_token_id": listed})
    assert stopping_at(generation, (2, 3)) == {"temperature": 0.7, "eos_token_id": expected}


def test_no_line_about_a_missing_torch():
    """Neither torch nor its absence concerns a user."""
    code = (
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from crpo_jax.data.tokenizer import load_tokenizer\n"
        f"load_tokenizer({str(TINY)!r})\n"
        "import transformers; assert not transformers.is_torch_available()\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout + done.stderr == ""


# ---- tokenizers that cannot be used ----------------------------------------------------------------------------------


def test_folders_without_what_a_conversation_needs(tmp_path: Path):
    with pytest.raises(InputError, match=r"tokenizer\.path: expected a folder with tokenizer\.json, got "):
        load_tokenizer(tmp_path)
    shutil.copytree(TINY, tmp_path, dirs_exist_ok=True)
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=r"tokenizer\.path: expected a chat_template in .*, got none"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.path: expected a readable tokenizer in "):
        load_tokenizer(tmp_path)
