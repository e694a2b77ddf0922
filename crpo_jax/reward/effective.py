"""Which characters and tokens are effective: in the scripts that English medical prose is written in.

Effective characters are Latin letters (basic, Latin-1 and Latin Extended-A, for Sjögren and Behçet), Greek letters
without accents (α, β, Δ, as medicine uses them), digits, punctuation, symbols (°, µ, ≥, ±, arrows) and white space.
Not effective are other scripts, full-width forms, emoji, zero-width and other format characters, control characters,
unassigned code points, lone surrogates and the replacement character. The rule knows scripts, not languages: Spanish in
plain Latin letters is effective.
"""

import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from crpo_jax.config import Config, config_folder
from crpo_jax.errors import InputError

EFFECTIVE_RANGES = (
    (0x0021, 0x007E),  # ASCII
    (0x00A1, 0x00AC), (0x00AE, 0x017F),  # Latin-1 without the soft hyphen, Latin Extended-A
    (0x0218, 0x021B),  # Ș ș Ț ț, as in Babeș
    (0x02B9, 0x02BC), (0x02C6, 0x02C6), (0x02DA, 0x02DA), (0x02DC, 0x02DC),  # primes, ˆ, ˚ and ˜
    (0x0300, 0x030C), (0x0327, 0x0328),  # accents written as marks of their own
    (0x0391, 0x03A1), (0x03A3, 0x03A9), (0x03B1, 0x03C9), (0x03D1, 0x03D1),  # Greek without accents, and the
    (0x03D5, 0x03D6), (0x03F0, 0x03F1), (0x03F5, 0x03F5),  # forms of its letters used as symbols
    (0x2010, 0x2027), (0x2030, 0x205E),  # general punctuation between its format characters
    (0x2070, 0x2071), (0x2074, 0x208E), (0x2090, 0x209C),  # superscripts and subscripts
    (0x20A0, 0x20C0), (0x2100, 0x218B),  # currency, letter-like symbols (℃, ™), number forms
    (0x2190, 0x2328), (0x232B, 0x23FF), (0x2460, 0x24FF),  # arrows, mathematics, circled numbers
    (0x2500, 0x27BF), (0x27C0, 0x27FF), (0x2900, 0x2B73),  # lines, shapes, ticks; more arrows and mathematics
)  # fmt: skip
WHITE_SPACE = (0x09, 0x0A, 0x0B, 0x0C, 0x0D, 0x20, 0x85, 0xA0, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F)
NOT_EFFECTIVE, EFFECTIVE, WHITE = 0, 1, 2
PLAIN = bytes((*b" \t\n\r", *range(0x21, 0x7F)))  # ASCII, all of it effective or white space
BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


@cache
def character_classes() -> np.ndarray:
    """NOT_EFFECTIVE, EFFECTIVE or WHITE for every code point."""
    classes = np.zeros(0x110000, np.uint8)
    for low, high in EFFECTIVE_RANGES:
        classes[low : high + 1] = EFFECTIVE
    classes[list(WHITE_SPACE)] = WHITE
    return classes


def effective_characters(text: str) -> tuple[int, int]:
    """How many characters of `text` are effective, and how many there are; white space is not counted."""
    if not text:
        return 0, 0
    codes = np.array([text]).view(np.uint32)  # numpy stores code points; encoding would fail on lone surrogates
    counts = np.bincount(character_classes()[codes], minlength=3)
    return int(counts[EFFECTIVE]), int(counts[EFFECTIVE] + counts[NOT_EFFECTIVE])


def all_effective(text: str) -> bool:
    classes = character_classes()
    return all(classes[ord(character)] != NOT_EFFECTIVE for character in text)


@cache
def byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level BPE vocabulary stands for (GPT-2's table)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


def effective_bytes(token: bytes) -> bool:
    """Whether a token is effective, given that it may hold only a part of a character.

    Whole characters are judged as they are. A character cut off at the token's end is effective when its first bytes
    may begin an effective one. Bytes at the start that continue a character of the token before:
    - A single one is effective. The character's first byte was judged there, and English medical text needs such
      tokens: under Qwen2.5's vocabulary 363 characters of MedQA, MedMCQA, MedXpertQA and English traces (2.5 million
      tokens) are cut, and 272 of them are effective, such as thin spaces, º, ≈ and ₃.
    - Two or more in one token are not. In that vocabulary these 68 tokens are tails of Chinese, Japanese and Korean
      characters; of effective ones only rare symbols use them (₨, ⌀, and ♂ after a space), and that text has none.
    This wrongly passes some hundreds of characters that the vocabulary spells in bytes and no model writes, such as
    Coptic letters, and the zero-width joiner; zero-width spaces and all scripts in use are caught.
    """
    start = 0
    while start < len(token) and 0x80 <= token[start] < 0xC0:
        start += 1
    if start > 1:
        return False
    for end in range(len(token), max(start, len(token) - 4), -1):
        try:
            text = token[start:end].decode()
        except UnicodeDecodeError:
            continue
        return all_effective(text) and (end == len(token) or may_begin_effective(token[end:]))
    return start == len(token) or may_begin_effective(token[start:])


def may_begin_effective(cut: bytes) -> bool:
    """Whether an effective character's UTF-8 form starts with `cut`, at least one byte short of the whole."""
    lead = cut[0]
    length = 2 if 0xC2 <= lead < 0xE0 else 3 if 0xE0 <= lead < 0xF0 else 4 if 0xF0 <= lead < 0xF5 else 0
    if len(cut) >= length or any(not 0x80 <= byte < 0xC0 for byte in cut[1:]):
        return False
    start = lead & (0x7F >> length)
    for byte in cut[1:]:
        start = start << 6 | byte & 0x3F
    missing = 6 * (length - len(cut))
    shortest = {2: 0x80, 3: 0x800, 4: 0x10000}[length]  # below it a shorter form is the only valid one
    return bool((character_classes()[max(start << missing, shortest) : (start + 1) << missing] != NOT_EFFECTIVE).any())


# ---- tokenizer.json --------------------------------------------------------------------------------------------------


class TokenizerFile(NamedTuple):
    """The vocabulary of a tokenizer.json, its added tokens by id, and the bytes that a token of the vocabulary stands
    for (None: no text)."""

    vocabulary: Mapping[str, int]
    added: Mapping[int, Mapping[str, Any]]
    spell: Callable[[str], bytes | None]


def spell_byte_level(token: str) -> bytes | None:
    """A token of a byte-level BPE (GPT-2, Qwen, Llama 3), in which a character stands for a byte."""
    try:
        return bytes(map(byte_alphabet().__getitem__, token))
    except KeyError:
        return None


def spell_piece(piece: str) -> bytes | None:
    """A piece of a SentencePiece vocabulary (Llama 2, Mistral, Gemma): text with ▁ for spaces, or a byte as <0x0A>."""
    if BYTE_PIECE.fullmatch(piece):
        return bytes.fromhex(piece[3:5])
    return piece.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode("utf-8", "surrogatepass")


def read_tokenizer(tokenizer_json: str | Path) -> TokenizerFile:
    """A tokenizer.json of one of the two kinds that language models have, as BPE or Unigram."""
    try:
        tokenizer = json.loads(Path(tokenizer_json).read_bytes())
    except OSError as error:
        raise InputError(f"{tokenizer_json}: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{tokenizer_json}: expected a tokenizer in JSON: {error}") from None
    model = tokenizer.get("model") if isinstance(tokenizer, Mapping) else None
    vocabulary = model.get("vocab") if isinstance(model, Mapping) else None
    if isinstance(vocabulary, list) and all(isinstance(entry, list) and len(entry) == 2 for entry in vocabulary):
        # Unigram: pieces with their scores, in the order of their ids
        vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
    decoder = json.dumps(tokenizer.get("decoder"), ensure_ascii=False) if isinstance(vocabulary, Mapping) else ""
    if not isinstance(vocabulary, Mapping) or not ("ByteLevel" in decoder or "\N{LOWER ONE EIGHTH BLOCK}" in decoder):
        raise InputError(
            f"{tokenizer_json}: expected a byte-level BPE tokenizer, with model.vocab and a ByteLevel decoder, or a "
            "SentencePiece vocabulary, with model.vocab and a decoder of \N{LOWER ONE EIGHTH BLOCK}"
        )
    added = {token["id"]: token for token in tokenizer.get("added_tokens") or ()}
    return TokenizerFile(vocabulary, added, spell_byte_level if "ByteLevel" in decoder else spell_piece)


def read_vocabulary(tokenizer_json: str | Path) -> dict[str, int]:
    """The id of every token, including those added to the vocabulary."""
    file = read_tokenizer(tokenizer_json)
    return {**file.vocabulary, **{token["content"]: index for index, token in file.added.items()}}


def effective_table(tokenizer_json: str | Path, vocab_size: int) -> np.ndarray:
    """Whether each token id of a tokenizer is effective; shape [vocab_size], bool.

    Special tokens and those written `<|...|>` are not effective, nor are rows of the embedding that no token uses.
    """
    file = read_tokenizer(tokenizer_json)
    largest = max((*file.vocabulary.values(), *file.added), default=-1)
    if largest >= vocab_size:
        raise InputError(f"{tokenizer_json}: expected token ids below the vocabulary size {vocab_size}, got {largest}")
    table = np.zeros(vocab_size, bool)
    for token, index in file.vocabulary.items():
        spelled = file.spell(token)
        if spelled is not None:  # most of a vocabulary is plain ASCII
            table[index] = not spelled.translate(None, PLAIN) or effective_bytes(spelled)
    for index, token in file.added.items():
        text = token["content"]
        special = token.get("special") or (text.startswith("<|") and text.endswith("|>"))
        table[index] = not special and all_effective(text)
    return table


def find_effective_table(settings: Config) -> np.ndarray | None:
    """The table of tokenizer.path or the model's folder; None if neither is on this machine.

    It has a row for every id that the model can draw: embeddings often have more rows than there are tokens.
    """
    for path in filter(None, (settings.tokenizer.path, settings.model.path)):
        for folder in (Path(path).expanduser(), config_folder().parent / path):
            file = folder / "tokenizer.json"
            if file.is_file():
                tokens = max(read_vocabulary(file).values()) + 1
                return effective_table(file, max(tokens, embedding_rows(settings.model.path)))
    return None


def embedding_rows(model: str) -> int:
    """The vocab_size in a model folder's config.json; 0 where there is none."""
    try:
        content = json.loads((Path(model).expanduser() / "config.json").read_bytes())
    except (OSError, ValueError):
        return 0
    rows = content.get("vocab_size") if isinstance(content, Mapping) else None
    return rows if isinstance(rows, int) else 0
