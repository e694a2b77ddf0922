"""The embedded worlds' tokenizers, rebuilt to the byte; of the vignettes': size, lossless, short texts, Qwen's chat
format."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from crpo_jax.data.vignettes import DRIFT, FINDINGS, VIGNETTE_SPLITS, teacher_response, vignettes

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "configs" / "tiny_tokenizer"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(FOLDER))


def prompt(tokenizer, question):
    text = "\n".join([question.question, *(f"{letter}) {option}" for letter, option in question.options.items())])
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def count(tokenizer, text):
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_building_again_gives_the_committed_bytes(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "build_tokenizer.py"), "--out", str(tmp_path)],
        check=True,
        env=environment,
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arithmetic_tokenizer", "tiny_tokenizer"]
    for folder in tmp_path.iterdir():
        assert sorted(path.name for path in folder.iterdir()) == [
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        ]
        for path in folder.iterdir():
            assert path.read_bytes() == (FOLDER.parent / folder.name / path.name).read_bytes(), path


def test_size_and_special_tokens(tokenizer):
    assert len(tokenizer) == 1280
    assert tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", "<|im_end|>"]) == [1277, 1278, 1279]
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    assert tokenizer.decode(tokenizer("a<|im_end|>b<|endoftext|>")["input_ids"], skip_special_tokens=True) == "ab"
    assert tokenizer("gout")["input_ids"] == tokenizer("gout", add_special_tokens=False)["input_ids"]


def test_every_text_comes_back_as_it_was(tokenizer):
    texts = [bytes(range(32, 127)).decode(), "  two  spaces \n\n\ttab\r\n", "naïve é é 漢字 🩺 ½ −", *DRIFT]
    for split in VIGNETTE_SPLITS:
        for question in vignettes(split, 300):
            texts += [question.question, teacher_response(question, 0), prompt(tokenizer, question)]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_marks_of_the_format_take_few_tokens_and_are_not_special(tokenizer):
    for mark, most in {
        "<dx>": 1,
        "</dx>": 1,
        "<conclusion>": 1,
        "</conclusion>": 1,
        " \\boxed{": 1,
        "(System 1: Intuitive)": 1,
    }.items():
        assert count(tokenizer, mark) <= most, mark
        assert tokenizer.decode(tokenizer(mark)["input_ids"], skip_special_tokens=True) == mark
    assert count(tokenizer, "4821") == 4


def test_no_finding_is_split_inside_a_letter(tokenizer):
    for finding in (finding for findings in FINDINGS.values() for finding in findings):
        pieces = [tokenizer.decode([token]) for token in tokenizer(" " + finding)["input_ids"]]
        assert "".join(pieces) == " " + finding
        assert "\ufffd" not in "".join(pieces)


def test_prompts_and_responses_are_short(tokenizer):
    for split in ("train", "test"):
        questions = vignettes(split, 2000)
        lengths = {
            "prompt": sorted(count(tokenizer, prompt(tokenizer, question)) for question in questions),
            "response": sorted(count(tokenizer, teacher_response(question, 0)) for question in questions),
        }
        middle = {name: values[len(values) // 2] for name, values in lengths.items()}
        for name, values in lengths.items():
            print(f"{split} {name}: p50 {middle[name]}, p99 {values[len(values) * 99 // 100]}, max {values[-1]}")
        assert middle["prompt"] <= 115
        assert lengths["prompt"][-1] <= 160
        assert 60 <= middle["response"] <= 110
        assert lengths["response"][len(questions) * 99 // 100] <= 150
        assert lengths["response"][-1] <= 180


def test_chat_template_renders_as_qwen_does_and_adds_no_system_turn(tokenizer):
    user, assistant = {"role": "user", "content": "Which?\nA) gout"}, {"role": "assistant", "content": "\\boxed{A}"}
    system = {"role": "system", "content": "Be brief."}
    render = tokenizer.apply_chat_template
    assert render([user], tokenize=False) == "<|im_start|>user\nWhich?\nA) gout<|im_end|>\n"
    assert render([system, user], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhich?\nA) gout<|im_end|>\n<|im_start|>assistant\n"
    )
    assert render([user, assistant], tokenize=False) == (
        "<|im_start|>user\nWhich?\nA) gout<|im_end|>\n<|im_start|>assistant\n\\boxed{A}<|im_end|>\n"
    )
