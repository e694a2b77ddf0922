"""The tokenizer of a folder, as its tokenizer.json states it, and what transformers' AutoTokenizer makes of the folder.

AutoTokenizer may choose a class by the model_type in config.json, and that class may replace the file's normalizer and
pre-tokenizer by its own (Qwen2Tokenizer of transformers 5 does): other ids for the same text. No jax.
"""

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from crpo_jax.data.chat_template import Turn, end_of_turn, write_chat
from crpo_jax.errors import InputError

if TYPE_CHECKING:  # slow to import, and not needed to read questions
    from transformers import PreTrainedTokenizerBase as Tokenizer

COMPARED_TEXTS = 400
"""On which two tokenizers are compared: some tenths of a second."""

USER_TURN, EMPTY_SYSTEM_TURN = {"role": "user", "content": "Fever, new murmur?"}, {"role": "system", "content": ""}
CHATS = ([USER_TURN], [EMPTY_SYSTEM_TURN, USER_TURN])

PIECES = [
    *" \n\r\t.,;:!?'\"()[]{}<>/\\|-_=+*&^%$#@~`",
    *("  ", "   ", "\r\n", "\u00a0", "\u2028", "\u3000", "\u200d", "\ufeff", "\x00"),
    *(
        "word",
        " Word",
        "WORD",
        "'s",
        "'LL",
        "12",
        " 7",
        "3.5",
        "anti-CCP",
        "mg/dL",
        " \\boxed{A}",
        "A) ",
        "<dx>",
        "</dx>\n",
    ),
    *("é", "e\u0301", "\ufb01", "µ", "½", "漢字", "🩺", "\u0627", "\u0939\u093f", "\U0001f468\u200d\U0001f469"),
]


def load_tokenizer(path: str | Path) -> "Tokenizer":
    """The tokenizer of a local folder; it needs a chat template that ends turns with a token."""
    folder = Path(path)
    if not (folder / "tokenizer.json").is_file():
        raise InputError(f"tokenizer.path: expected a folder with tokenizer.json, got {str(path)!r}")
    tokenizer = tokenizer_of_class("PreTrainedTokenizerFast", folder)
    if not tokenizer.chat_template:
        raise InputError(
            f"tokenizer.path: expected a chat_template in {folder}/tokenizer_config.json, got none, and no "
            "chat_template.jinja; take an Instruct model's tokenizer"
        )
    end_of_turn(tokenizer)
    return tokenizer


def tokenizer_of_class(name: str, folder: Path) -> "Tokenizer":
    """The folder's tokenizer by transformers' class of this name: PreTrainedTokenizerFast takes tokenizer.json as it
    is, AutoTokenizer what it thinks fits the model."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # "PyTorch was not found": nothing here needs it
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it would warn of every class that differs from the folder's
    try:
        of_class: Any = getattr(transformers, name)
        return of_class.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 (the Rust reader of tokenizer.json raises Exception itself)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"tokenizer.path: expected a readable tokenizer in {folder}, got: {first_line}") from None
    finally:
        transformers.logging.set_verbosity(verbosity)


# ---- comparison ------------------------------------------------------------------------------------------------------


class Difference(NamedTuple):
    """A text that two tokenizers make other ids of, and both from the first place on where they differ."""

    text: str
    ids: list[int]
    other: list[int]


def first_difference(tokenizer: "Tokenizer", other: "Tokenizer", count: int = COMPARED_TEXTS) -> Difference | None:
    """The first difference among `count` texts and two conversations in both chat templates; None where there is
    none."""
    pairs = [(text, text) for text in comparison_texts(tokenizer, count)]
    pairs += [(chat_or_error(tokenizer, turns), chat_or_error(other, turns)) for turns in CHATS]
    ids = (encode_all(each, texts) for each, texts in zip((tokenizer, other), zip(*pairs, strict=True), strict=True))
    for (text, _), own, others in zip(pairs, *ids, strict=True):
        if own != others:
            same = next((place for place, (a, b) in enumerate(zip(own, others, strict=False)) if a != b), None)
            start = min(len(own), len(others)) if same is None else same
            return Difference(text, own[start:], others[start:])
    return None


def chat_or_error(tokenizer: "Tokenizer", turns: Sequence[Turn]) -> str:
    """The conversation as the chat template writes it, or what it says where it refuses one; nothing where the
    tokenizer has no template."""
    try:
        return write_chat(tokenizer, turns) if tokenizer.chat_template else ""
    except InputError as error:
        return str(error).replace(str(tokenizer.name_or_path), "")


def encode_all(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]


def comparison_texts(tokenizer: "Tokenizer", count: int) -> Iterator[str]:
    """Texts on which tokenizers tend to differ, always the same: runs of white space, digits and marks, characters from
    all of Unicode, all sorts between special tokens, vignettes with their traces."""
    from crpo_jax.data.vignettes import teacher_response, vignettes

    rng, questions = random.Random(0), vignettes("train", max(1, count // 4))
    special = sorted(token.content for token in tokenizer.added_tokens_decoder.values())
    for number in range(count):
        question, kind = questions[number // 4 % len(questions)], number % 4
        if kind == 0:
            yield "".join(rng.choices(PIECES, k=rng.randint(1, 24)))
        elif kind == 1:
            ranges = rng.choices((range(1, 0x250), range(0x250, 0xD800), range(0xE000, 0x110000)), k=20)
            yield "".join(chr(rng.choice(points)) for points in ranges)
        elif kind == 2:
            yield "".join(rng.choice([*special, *PIECES, question.question]) for _ in range(rng.randint(2, 12)))
        else:
            yield f"{question.question}\n\n{teacher_response(question, number)}"
