"""What the processes of a run must have resolved and read alike: settings, files, questions, the workdir.

Each comparison names the setting or the file in the line by which all processes refuse to start, before anything is
computed or written. A single process compares nothing and reads nothing for it.
"""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from crpo_jax.config import Config, setting_fields
from crpo_jax.data.question import Question
from crpo_jax.model.huggingface import TOKENIZER_FILES
from crpo_jax.parallel.agreement import short_digest
from crpo_jax.parallel.processes import is_single_process, require_agreement

MAY_DIFFER = ("run.compile_cache",)
"""Settings that may differ between processes: a folder on each host's own disk."""

MODEL_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def require_same_settings(settings: Config) -> None:
    """InputError where a resolved setting differs between processes, or the file of a module that a setting names."""
    if is_single_process():
        return
    facts = {key: shown(attrgetter(key)(settings)) for key in setting_fields() if key not in MAY_DIFFER}
    for key in ("reward.design", "parallel.layout"):
        for module in re.findall(r"([\w.]+):[\w.]+", attrgetter(key)(settings)):
            facts[f"{key}: module {module}"] = module_digest(module)
    for key in ("data.prompt", "data.system_prompt"):
        path = Path(attrgetter(key)(settings).removeprefix("file:")).expanduser()
        facts[f"{key}: {path.name}"] = short_digest(path) if path.is_file() else "no file"
    if rubric := settings.reward.judge.rubric:
        path = Path(rubric).expanduser()
        facts["reward.judge.rubric: the file"] = short_digest(path) if path.is_file() else "no such file"
    require_agreement(facts)


def shown(value: Any) -> str:
    """A setting's value, a long one by its beginning and its digest."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:100]}... (SHA-256 {hashlib.sha256(text.encode()).hexdigest()[:12]})"


def module_digest(name: str) -> str:
    """The digest of the file that an import of this module reads."""
    try:
        spec = importlib.util.find_spec(name)
    except Exception as error:  # noqa: BLE001 (a parent package runs any code; who uses the module reports the error)
        return f"{type(error).__name__}"
    return short_digest(Path(spec.origin)) if spec and spec.origin else "no such module"


def require_same_files(model: str | Path, tokenizer: Path, adapter: str) -> None:
    """InputError where a file that this run reads from these folders differs between processes; "" is no folder."""
    if is_single_process():
        return
    folders = [
        ("model.path", model, MODEL_FILES),
        ("tokenizer.path", tokenizer, (*TOKENIZER_FILES, "generation_config.json")),
        ("model.adapter", adapter, ("adapter_*",)),
    ]
    require_agreement(
        {
            f"{key}: {path.name}": short_digest(path)
            for key, folder, patterns in folders
            if folder
            for pattern in patterns
            for path in sorted(Path(folder).expanduser().glob(pattern))
        }
    )


def require_same_questions(name: str, questions: Sequence[Question]) -> None:
    """InputError where the processes have read other questions or traces; `name` says which of them."""
    if is_single_process():
        return
    rows = json.dumps([dataclasses.asdict(question) for question in questions], sort_keys=True, default=repr)
    digest = hashlib.sha256(rows.encode()).hexdigest()
    require_agreement({name: f"{len(questions)} (SHA-256 {digest[:12]})"})


def require_same_workdir(workdir: Path) -> None:
    """InputError where the processes would write into folders of different names, or what is there differs: then they
    are on different disks."""
    if is_single_process():
        return
    config, checkpoints = workdir / "config.yaml", workdir / "checkpoints"
    steps = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.is_dir() else []
    require_agreement(
        {
            "--workdir": os.path.abspath(workdir),
            "--workdir: config.yaml": short_digest(config) if config.is_file() else "no file",
            "--workdir: coldstart": "a folder" if (workdir / "coldstart").is_dir() else "no folder",
            "--workdir: checkpoints": ", ".join(steps) or "none",
        }
    )
