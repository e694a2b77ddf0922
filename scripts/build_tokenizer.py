"""Build the embedded worlds' tokenizers: byte-level BPEs in Hugging Face format, trained on each world's questions and
the traces of its teacher.

    python scripts/build_tokenizer.py [--out DIR]

The same sources give the same bytes; a test holds the committed folders to that.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from crpo_jax.data import arithmetic
from crpo_jax.data.question import Question
from crpo_jax.data.vignettes import teacher_response, vignettes

# Above the base vocabulary and in Qwen's order.
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TRAINING_QUESTIONS = 4096

# The longest pieces that may become one token; the first match counts.
SPLIT = "|".join(
    (
        r"\(System [12]: \p{L}+\)",  # the marks of the response format: ordinary merges make each a token or two
        r"</?\p{L}+>",
        r" ?\\boxed\{",
        r"[A-Z]\)",  # an option's letter with its bracket, so that it is next to the option's name
        r" ?[\p{L}\p{M}]+(?:[-/][\p{L}\p{M}]+)*",  # words, with the hyphens and slashes of "anti-CCP" and "mg/dL"
        r" ?\p{N}",  # single digits
        r" ?[^\s\p{L}\p{M}\p{N}]+",  # runs of symbols
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def vignette_corpus() -> Iterator[str]:
    for question in vignettes("train", TRAINING_QUESTIONS):
        yield from question_texts(question, [teacher_response(question, seed) for seed in range(2)])


def problem_corpus() -> Iterator[str]:
    for question in arithmetic.problems("train", TRAINING_QUESTIONS):
        yield from question_texts(question, [arithmetic.teacher_response(question, 0)])


def question_texts(question: Question, traces: Sequence[str]) -> Iterator[str]:
    """A question as in its prompt, its traces, the names of the turns, and µ and °.

    Split into bytes, µ and ° would not look like letters of any language to a rule that judges tokens one by one.
    """
    yield question.question + "".join(f"\n{letter}) {option}" for letter, option in question.options.items())
    yield from traces
    yield "system\nuser\nassistant\nµ°"


# The folder under configs/, how many tokens it has, and what it is trained on.
TOKENIZERS = (("tiny_tokenizer", 1280, vignette_corpus), ("arithmetic_tokenizer", 512, problem_corpus))


def build(vocab_size: int, corpus: Iterator[str]) -> Tokenizer:
    """The trained tokenizer, its special tokens at the top ids."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    if tokenizer.get_vocab_size() != vocab_size:
        raise SystemExit(
            f"expected {vocab_size} tokens, got {tokenizer.get_vocab_size()}: the corpus has too few distinct words"
        )
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json in `folder`.

    As Qwen's Instruct models, one with this tokenizer ends a response with the end of a turn or of a text.
    """
    settings = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL
        },
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": ends, "pad_token_id": ends[1]}, indent=2) + "\n", encoding="utf-8"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the tokenizers of the embedded worlds.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "configs", metavar="DIR")
    out = parser.parse_args().out
    for name, vocab_size, corpus in TOKENIZERS:
        write(out / name, build(vocab_size, corpus()))
        print(f"{vocab_size} tokens in {out / name}")


if __name__ == "__main__":
    main()
