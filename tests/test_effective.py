"""Which tokens are effective, for the tiny tokenizer and for Qwen2.5's where its files are at hand."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from model_folder import SPACE, unigram
from tokenizers import Tokenizer

from crpo_jax.config import load_config
from crpo_jax.errors import InputError
from crpo_jax.reward.effective import (
    EFFECTIVE_RANGES,
    NOT_EFFECTIVE,
    character_classes,
    effective_bytes,
    effective_table,
    find_effective_table,
    read_vocabulary,
    spell_piece,
)

TINY = Path(__file__).parents[1] / "configs" / "tiny_tokenizer" / "tokenizer.json"
QWEN = Path(__file__).parents[2] / "shared" / "data" / "qwen2.5" / "tokenizer.json"
CLINICAL = "°µμº±≥≤≈→↑↓↔×÷²³½…–—’‘“”•™®℃℉⁺⁻₂₃∞∆αβγδεκλσωΔΩΨéèöüïçßñ\u2009\u00a0"


@pytest.mark.parametrize(
    ("token", "effective"),
    [
        (b"fever", True),
        (" Sjögren".encode(), True),
        (" °C".encode(), True),
        ("痛".encode(), False),
        (" боль".encode(), False),
        ("\u200b".encode(), False),
        ("fever痛".encode(), False),
        (b"\xc2", True),  # ° ± µ and Latin-1 start so
        (b" \xc3", True),
        (b"\xce", True),  # Greek
        (b" \xe2", True),  # general punctuation, arrows, mathematics
        (b"\xe2\x89", True),  # ≤ ≥ ≈
        (b"\xe2\xba", False),  # Chinese radicals
        (b"\xd0", False),  # Cyrillic
        (b"\xe0", False),  # Indic scripts; never ASCII in an overlong form
        (b"\xe6", False),  # Chinese
        (b"\xef\xbc", False),  # full-width forms
        (b"\xf0\x9f", False),  # emoji
        (b"\x80", True),  # the rest of a character that its first byte has been judged for
        (b"\x89 and", True),
        (b"\x89\xe7", False),
        (b"\xac\xb4", False),  # the rest of a Korean one
        (b"\xc0", False),
        (b"\xff", False),
        (b"\xe2\x28", False),
        (b"a\xe2\x28b", False),
    ],
)
def test_bytes(token: bytes, effective: bool) -> None:
    assert effective_bytes(token) == effective


def test_every_effective_character_is_a_letter_number_sign_or_space() -> None:
    assert list(EFFECTIVE_RANGES) == sorted(EFFECTIVE_RANGES)
    for code in np.flatnonzero(character_classes()):
        kind = unicodedata.category(chr(code))
        assert kind[0] in "LNPSMZ" or chr(code) in "\t\n\v\f\r\x85" or kind == "Cn", hex(code)
        if kind[0] == "L":
            assert unicodedata.name(chr(code)).split()[0] in (
                "LATIN",
                "GREEK",
                "MODIFIER",
                "MICRO",
                "FEMININE",
                "MASCULINE",
                "SUPERSCRIPT",
            ) or (0x2090 <= code <= 0x218B), hex(code)


def tables() -> list[tuple[str, Path]]:
    return [("tiny", TINY), ("qwen2.5", QWEN)]


@pytest.mark.parametrize(("name", "path"), tables())
def test_table_of_a_tokenizer(name: str, path: Path) -> None:
    if not path.exists():
        pytest.skip(f"no {name} tokenizer at {path}")
    tokenizer = Tokenizer.from_file(str(path))
    size = 151936 if name == "qwen2.5" else 1280
    table = effective_table(path, size)
    assert (table.shape, table.dtype) == ((size,), np.dtype(bool))
    for token in json.loads(path.read_bytes())["added_tokens"]:
        if token["special"] or token["content"].startswith("<|"):
            assert not table[token["id"]], token
    assert not table[tokenizer.get_vocab_size(with_added_tokens=True) :].any(), "rows that no token uses"
    for text in (
        "Tophi on the ear, uric acid 9.1 mg/dL: gout.",
        "<dx>(System 1: Intuitive)</dx>\n<conclusion>\\boxed{C}</conclusion>",
        "a\tb\r\n\n  c",
    ):
        assert table[tokenizer.encode(text, add_special_tokens=False).ids].all(), text
    for character in CLINICAL:
        assert table[tokenizer.encode(f"a {character} b{character}", add_special_tokens=False).ids].all(), character
    for text in ("需要检查", "вероятно да", "ألم", "痛み", "통증", "👍", "ＡＢ"):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert not table[ids].all(), text
        if name == "qwen2.5":  # a byte-by-byte vocabulary keeps single continuation bytes effective
            assert table[ids].mean() <= 0.5, text


def test_qwen_has_few_ways_to_hide_a_character() -> None:
    """Characters whose tokens all pass though they should not: some hundreds of rare ones that begin like symbols.

    Among them are joiners and direction marks, which the vocabulary spells in bytes; other invisible ones are tokens.
    """
    if not QWEN.exists():
        pytest.skip(f"no Qwen2.5 tokenizer at {QWEN}")
    tokenizer, classes = Tokenizer.from_file(str(QWEN)), character_classes()
    table = effective_table(QWEN, 151936)
    codes = [code for code in range(0x80, 0x3000) if classes[code] == NOT_EFFECTIVE and not 0xD800 <= code < 0xE000]
    encoded = tokenizer.encode_batch([chr(code) for code in codes], add_special_tokens=False)
    hidden = {chr(code) for code, found in zip(codes, encoded, strict=True) if found.ids and table[found.ids].all()}
    assert len(hidden) < 700
    assert not hidden & set("\u00ad\u200b\u200c\u200e")
    names = {
        unicodedata.name(character, "").split(" ")[0]
        for character in hidden
        if unicodedata.category(character)[0] == "L"
    }
    assert names == {"LATIN", "MODIFIER", "GREEK", "COPTIC", "ETHIOPIC"}, "no letter of a script that models write"


@pytest.mark.parametrize(
    ("token", "spelled"),
    [
        (f"{SPACE}fever", b" fever"),
        (f"{SPACE}{SPACE}", b"  "),
        ("<0x0A>", b"\n"),
        ("<0xE2>", b"\xe2"),
        ("<0xe2>", b"<0xe2>"),  # a piece of text: bytes are written in capitals
        ("\n\n", b"\n\n"),
        ("°C", "°C".encode()),
    ],
)
def test_pieces_stand_for_text_or_a_byte(token: str, spelled: bytes) -> None:
    assert spell_piece(token) == spelled


def test_table_of_a_unigram_vocabulary(tmp_path: Path) -> None:
    tokenizer = unigram()
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    table = effective_table(tmp_path / "tokenizer.json", tokenizer.get_vocab_size() + 5)
    ids = read_vocabulary(tmp_path / "tokenizer.json")
    assert ids == tokenizer.get_vocab()
    assert not table[ids["</s>"]]
    assert not table[-5:].any()
    assert not table[ids["<0x00>"]]
    assert not table[ids["<0xE6>"]]
    for text in ("Tophi, uric acid 9.1 mg/dL.\n\\boxed{C}", "12 °C ≥ α"):
        assert table[tokenizer.encode(text, add_special_tokens=False).ids].all(), text
    for text in ("痛み", "вероятно", "👍"):
        assert not table[tokenizer.encode(text, add_special_tokens=False).ids].all(), text


def test_a_models_table_has_a_row_for_every_id_that_it_can_draw(tmp_path: Path) -> None:
    """Embeddings are often padded: a response with such an id could not be scored by an evaluation or shown by its
    page."""
    (tmp_path / "tokenizer.json").write_bytes(TINY.read_bytes())
    tokens = max(read_vocabulary(TINY).values()) + 1
    settings = load_config(None, [f"model.path={tmp_path}", "tokenizer.path="], model=False)
    for content, rows in ((f'{{"vocab_size": {tokens + 8}}}', tokens + 8), ("{", tokens), ("[]", tokens)):
        (tmp_path / "config.json").write_text(content)
        table = find_effective_table(settings)
        assert table is not None
        assert len(table) == rows
        assert not table[tokens:].any()


def test_bad_tokenizers_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match=r"tokenizer.json: No such file"):
        effective_table(path, 10)
    path.write_text("{")
    with pytest.raises(InputError, match="expected a tokenizer in JSON"):
        effective_table(path, 10)
    path.write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 0}}, "decoder": {"type": "WordPiece"}}))
    for vocabulary in ({"a": 0}, [["a", 0.0]], [["a"]], "a", None):
        path.write_text(json.dumps({"model": {"vocab": vocabulary}, "decoder": {"type": "WordPiece"}}))
        with pytest.raises(InputError, match=r"expected a byte-level BPE tokenizer, .* or a SentencePiece vocabulary"):
            effective_table(path, 10)
    path.write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 12}}, "decoder": {"type": "ByteLevel"}}))
    with pytest.raises(InputError, match="expected token ids below the vocabulary size 10, got 12"):
        effective_table(path, 10)
