"""The tokenizer files of an exported folder, which transformers' AutoTokenizer must read as the run did."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from crpo_jax.data.tokenizer import first_difference, tokenizer_of_class
from crpo_jax.errors import InputError, brief
from crpo_jax.model.huggingface import TOKENIZER_CLASS_FILE, TOKENIZER_FILES

if TYPE_CHECKING:
    from crpo_jax.data.tokenizer import Tokenizer

CLASS = "PreTrainedTokenizerFast"
CLASS_FILE = f'''"""The class of this folder's tokenizer: tokenizer.json as it is."""

from transformers import {CLASS}

__all__ = ["{CLASS}"]
'''


@contextlib.contextmanager
def exported_tokenizer(folder: Path, tokenizer: "Tokenizer", model_type: str) -> Iterator[Path]:
    """A temporary folder with the tokenizer's files, from which AutoTokenizer gives the ids of `tokenizer`, also with a
    config.json of `model_type` beside them; InputError where it does not, with the first text that differs.

    The files are copied unchanged if that is enough. Otherwise the class is declared. Transformers 5 ignores a Qwen2
    folder's tokenizer_class unless there is an auto_map, which it resolves by tokenizer_class where remote code is not
    trusted, and by TOKENIZER_CLASS_FILE where it is.
    """
    with tempfile.TemporaryDirectory(prefix="crpo_jax-tokenizer-") as temporary:
        copy = Path(temporary)
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, copy / name)
        (copy / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
        difference = first_difference(tokenizer, tokenizer_of_class("AutoTokenizer", copy))
        if difference:
            declare_class(copy)
            difference = first_difference(tokenizer, tokenizer_of_class("AutoTokenizer", copy))
        if difference:
            raise InputError(
                f"{folder}: expected a tokenizer that transformers' AutoTokenizer reads as this run does, got "
                f"{brief(difference.other)} instead of {brief(difference.ids)} in {brief(difference.text)}"
            )
        yield copy


def declare_class(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    module = Path(TOKENIZER_CLASS_FILE).stem
    settings |= {"tokenizer_class": CLASS, "auto_map": {"AutoTokenizer": [None, f"{module}.{CLASS}"]}}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / TOKENIZER_CLASS_FILE).write_text(CLASS_FILE, encoding="utf-8")
