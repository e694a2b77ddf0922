"""Two processes of one run that differ in something, by the command line: what both say, and after how many seconds.

    python tests/mismatches.py NEW_FOLDER [CASE ...]

runs the given cases, by default all, and prints a line for each. The processes are forked from this one, which has
imported everything and started no backend, so the seconds are those from when they join. Where "the same" file differs,
each process has a working directory of its own and the paths are relative: two hosts with their own disks. Exit code 1
where a case is not refused as it should be: exit code 2 in both processes, one line with the key, nothing written.
"""

import dataclasses
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"

import orbax.checkpoint  # noqa: F401 (imported here once, so that no child has to)
import transformers  # noqa: F401
from question_file import write_jsonl

from crpo_jax import cli
from crpo_jax.config import default_config_path, load_config
from crpo_jax.data.vignettes import teacher_response, vignettes
from crpo_jax.parallel import agreement
from crpo_jax.runtime.runtime import open_runtime

COMMON = [
    *("model.shape.hidden_size=32", "model.shape.intermediate_size=32"),
    *("model.shape.num_hidden_layers=1", "model.shape.num_attention_heads=2"),
    *("data.vignettes=64", "data.eval_questions=8", "rollout.max_new_tokens=48", "run.compile_cache="),
    *("crpo.prompts_per_step=8", "crpo.mini_batch_prompts=4", "crpo.group_size=3", "crpo.steps=2"),
]
QUESTIONS = ["data.source=jsonl", "data.path=train.jsonl", "data.eval_path=test.jsonl"]


class Case(NamedTuple):
    """What both processes are given, what the second one is given besides, and how the line begins that refuses it."""

    line: str
    second: tuple[str, ...] = ()
    both: tuple[str, ...] = ()
    before: Callable[[Path], None] = lambda folder: None
    """Runs in the second process, with the folder that it stands in."""
    command: str = "train"
    second_command: str = "train"


def overwrite_end(name: str, data: bytes) -> Callable[[Path], None]:
    """Changes the last bytes of a file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: -len(data)] + data)

    return change


def other_version(folder: Path) -> None:
    version = metadata.version
    metadata.version = lambda package: "0.1" if package == "optax" else version(package)


def other_code(folder: Path) -> None:
    digest = agreement.short_digest
    agreement.short_digest = lambda path: "SHA-256 000000000000" if path.name == "losses.py" else digest(path)


def other_flags(folder: Path) -> None:
    os.environ["XLA_FLAGS"] += " --xla_cpu_enable_fast_math=true"


def other_question(folder: Path) -> None:
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    row = json.loads(lines[0])
    row["question"] += " The patient is afebrile."
    (folder / "train.jsonl").write_text("\n".join([json.dumps(row), *lines[1:]]) + "\n", encoding="utf-8")


def shorten(path: Path) -> None:
    """Takes the last line away."""
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


CASES = {
    "learning rate": Case("optimizer.learning_rate: ", ("optimizer.learning_rate=1e-4",)),
    "seed": Case("run.seed: ", ("run.seed=1",)),
    "reward design": Case("reward.design: ", ("reward.design=released",)),
    "temperature": Case("rollout.temperature: ", ("rollout.temperature=0.7",)),
    "steps": Case("crpo.steps: ", ("crpo.steps=3",)),
    "save_every": Case("run.save_every: ", ("run.save_every=7",)),
    "eval_every": Case("run.eval_every: ", ("run.eval_every=7",)),
    "number of questions": Case("data.vignettes: ", ("data.vignettes=65",)),
    "layout": Case("parallel.layout: ", ("parallel.layout=fsdp",)),
    "system prompt": Case("data.system_prompt: ", ("data.system_prompt=Think.",)),
    "mesh": Case("parallel.mesh: ", ("--mesh", "4x1")),
    "config file": Case("", ("--config", str(default_config_path("gpu")))),
    "workdir": Case("--workdir: ", ("--workdir", "elsewhere")),
    "flag": Case("--allow-changes: ", ("--allow-changes",)),
    "command": Case("command: ", second_command="sft"),
    "training questions": Case(
        "train.jsonl: training questions: ", both=(*QUESTIONS, "model.path=model"), before=other_question
    ),
    "held-out questions": Case(
        "test.jsonl: held-out questions: ",
        both=(*QUESTIONS, "model.path=model"),
        before=lambda folder: shorten(folder / "test.jsonl"),
    ),
    "teacher traces": Case(
        "traces.jsonl: teacher traces: ",
        both=("sft.path=traces.jsonl",),
        before=lambda folder: shorten(folder / "traces.jsonl"),
        command="sft",
        second_command="sft",
    ),
    "model": Case(
        "model.path: model.safetensors: ",
        both=("model.path=model",),
        before=overwrite_end("model/model.safetensors", b"\1\2"),
    ),
    "tokenizer": Case(
        "tokenizer.path: tokenizer_config.json: ",
        both=("model.path=model", "tokenizer.path="),
        before=overwrite_end("model/tokenizer_config.json", b"\n}"),
    ),
    "reward function": Case(
        "reward.design: module short: ", both=("reward.design=short:rate",), before=overwrite_end("short.py", b"2\n")
    ),
    "package version": Case("version of optax: ", before=other_version),
    "code": Case("crpo_jax/update/losses.py: ", before=other_code),
    "compiler flag": Case("XLA_FLAGS --xla_cpu_enable_fast_math: ", before=other_flags),
}


def prepare(folder: Path) -> None:
    """The files of one host."""
    folder.mkdir(parents=True)
    write_jsonl(folder / "train.jsonl", vignettes("train", 64))
    write_jsonl(folder / "test.jsonl", vignettes("test", 8))
    traces = [
        dataclasses.replace(question, columns={"response": teacher_response(question, 0)})
        for question in vignettes("train", 16)
    ]
    write_jsonl(folder / "traces.jsonl", traces)
    (folder / "short.py").write_text(
        "def rate(prompts, completions, **columns):\n    return [-len(text) for text in completions]\nscale = 1\n"
    )
    settings = load_config(default_config_path("cpu"), COMMON)
    runtime = open_runtime(settings)
    runtime.export(runtime.start_weights(None, runtime.layout.master, "float32"), None, folder / "model")


def forked(body: Callable[[], None], output: Path) -> int:
    """The id of a child that runs `body` and prints into a file."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        with output.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        body()
        code = 0
    except SystemExit as ending:
        code = ending.code if isinstance(ending.code, int) else 1
    finally:
        sys.stderr.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def refusal(case: Case, files: Path, folder: Path) -> tuple[float, list[int], list[str]]:
    """Seconds until both had ended, their exit codes and what they printed."""
    folder.mkdir()
    flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]

    def run(process: int) -> None:
        own = folder / f"host{process}"
        shutil.copytree(files, own)
        os.chdir(own)
        sys.path.insert(0, str(own))
        if process:
            case.before(own)
        command = case.second_command if process else case.command
        main = import_module(f"crpo_jax.{command}").main
        arguments = ["--workdir", str(folder / "run"), *flags, "--process", str(process), *COMMON, *case.both]
        cli.run_command(command, lambda: main([*arguments, *(case.second if process else ())]))

    began = time.monotonic()
    children = [forked(lambda process=process: run(process), folder / f"{process}.txt") for process in range(2)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    seconds = time.monotonic() - began
    return seconds, codes, [(folder / f"{process}.txt").read_text() for process in range(2)]


def main(arguments: list[str]) -> int:
    folder, names = Path(arguments[0]).resolve(), arguments[1:] or list(CASES)
    folder.mkdir(parents=True)
    for name in ("train", "sft"):
        import_module(f"crpo_jax.{name}")
    child = forked(lambda: prepare(folder / "files"), folder / "prepare.txt")
    if os.waitpid(child, 0)[1]:
        raise SystemExit((folder / "prepare.txt").read_text())
    failed = [name for name in names if not is_refused(CASES[name], name, folder)]
    return len(failed) > 0


def is_refused(case: Case, name: str, folder: Path) -> bool:
    """Whether both processes end as they should; prints what the second one says."""
    own = folder / name.replace(" ", "_")
    seconds, codes, texts = refusal(case, folder / "files", own)
    lines = [text.strip().splitlines()[-1] for text in texts]
    right = codes == [2, 2] and not (own / "run").exists()
    for process, (command, line) in enumerate(zip((case.command, case.second_command), lines, strict=True)):
        right &= line.startswith(f"crpo_jax.{command}: process {process} of 2")
        right &= all(part in line for part in (f": {case.line}", "in process 0", "in process 1"))
    print(f"{seconds:5.1f} s  {'refused' if right else f'NOT REFUSED {codes} {lines}'}  {name}: {lines[1]}", flush=True)
    return right


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
