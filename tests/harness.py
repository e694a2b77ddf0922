"""Kills and disturbs embedded runs, resumes them, and compares the results with a run that nothing happened to.

    python tests/harness.py --kills 40 --folder NEW_FOLDER [--seed N]

sends SIGKILL at random moments and resumes after each. A run is a child forked from this process, which has imported
everything and started no backend, and compiled programs are cached: a kill and its resume take seconds. The child dumps
its stack right before a kill, which shows the section of `train.py` that it was in and whether a checkpoint was being
written in the background. Exit code 1 and one line where a killed run differs. `tests/test_faults.py` runs a few kills
and all other faults (`--faults`).
"""

import argparse
import collections
import faulthandler
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

import jax
import matplotlib.pyplot  # noqa: F401 (imported here once, as transformers, so that no child has to)
import numpy as np
import orbax.checkpoint as ocp
import transformers  # noqa: F401

from crpo_jax import cli

train = import_module("crpo_jax.train")

ODD_NAME = "-odd {a,b} $HOME ~ 'b' \"c\" %d 100% ü\nx"
LOOP = "CRPO, reward design"  # the run's opening words, printed right before its loop
SETTINGS = [
    *("--mesh", "1x1"),
    *("model.shape.hidden_size=32", "model.shape.intermediate_size=32"),
    *("model.shape.num_hidden_layers=1", "model.shape.num_attention_heads=2"),
    *("data.vignettes=64", "data.eval_questions=8", "rollout.max_new_tokens=48", "rollout.chunk=12"),
    *("crpo.prompts_per_step=8", "crpo.mini_batch_prompts=4", "crpo.group_size=3", "optimizer.learning_rate=0.01"),
    *("sft.steps=2", "sft.batch_size=8", "sft.previews=0", "sft.optimizer.algorithm=adamw"),
    *("reward.workers=1", "parallel.unroll=false", "run.eval_every=3", "run.save_every=2"),
]


class Child:
    """A run of `steps` in a forked process; what it prints goes to a file."""

    def __init__(self, workdir: Path, steps: int, *overrides: str, largest_file: int = 0) -> None:
        self.output, self.stacks = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (closed at exit)
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(self.output.fileno(), 1)
            os.dup2(self.output.fileno(), 2)
            faulthandler.register(signal.SIGUSR1, file=self.stacks, all_threads=True)
            if largest_file:  # stands for a full disk
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            arguments = ["--workdir", str(workdir), *SETTINGS, f"crpo.steps={steps}", *overrides]
            try:
                cli.run_command("train", lambda: train.main(arguments))
            except SystemExit as ending:  # handled as the interpreter would, without the parent's exit handlers
                if isinstance(ending.code, str):
                    os.write(2, f"{ending.code}\n".encode())
                os._exit(1 if isinstance(ending.code, str) else ending.code or 0)
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(70)

    def text(self) -> str:
        return os.pread(self.output.fileno(), 1 << 20, 0).decode(errors="replace")

    def ended(self) -> bool:
        """Whether the run is over; SystemExit if it failed."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if done and os.waitstatus_to_exitcode(status):
            raise SystemExit(f"a run ended with exit code {os.waitstatus_to_exitcode(status)}:\n{self.text()}")
        return bool(done)

    def end(self) -> dict[str, Any]:
        """Waits for the run; its exit code and its output."""
        return {"code": os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), "said": self.text()}

    def wait_for_output(self, words: str) -> None:
        assert self.wait_until(lambda: words in self.text()), f"the run ended before it printed {words!r}"

    def wait_until(self, condition: Callable[[], bool]) -> bool:
        """Whether the condition came true before the run ended."""
        while not condition():
            if self.ended():
                return False
            time.sleep(0.002)
        return True

    def kill(self) -> tuple[str, ...]:
        """Sends SIGKILL; the parts of the run that were active."""
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return active_parts(os.pread(self.stacks.fileno(), 1 << 20, 0).decode(errors="replace"))


def train_sections() -> dict[int, str]:
    """The section of train.py by line number, from its `# ---- NAME` comments."""
    sections, name = {}, "start"
    for number, line in enumerate(Path(train.__file__).read_text(encoding="utf-8").splitlines(), start=1):
        mark = re.match(r"\s*# ---- ([\w-]+(?: \w+)*)", line)
        name = mark[1] if mark else name
        sections[number] = name
    return sections


def active_parts(stacks: str) -> tuple[str, ...]:
    """What the dumped stacks show: the section of train.py, or the cold start, and whether a checkpoint is written."""
    line = re.search(r'/train\.py", line (\d+) in train\n', stacks)
    parts = [train_sections()[int(line[1])]] if line else ["before train"]
    if "/fine_tuning.py" in stacks:
        parts = ["cold start"]
    if "/checkpoint.py" in stacks and "in _finish" in stacks:
        parts.append("save in the background")
    elif re.search(r'/checkpoint\.py", line \d+ in save', stacks):
        parts.append("save")
    return tuple(parts)


def state_of(workdir: Path) -> str:
    """A digest of every tensor in the last checkpoint, read by a child: this process must start no backend."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        last = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
        tree = ocp.StandardCheckpointer().restore(last.resolve())
        total = hashlib.sha256()
        for name, leaf in sorted(tree.items()):
            values = np.asarray(leaf)
            total.update(f"{last.name} {name} {values.dtype} {values.shape}".encode() + values.tobytes())
        os.write(writing, total.hexdigest().encode())
        os._exit(0)
    os.close(writing)
    os.waitpid(pid, 0)
    digest = os.read(reading, 64).decode()
    os.close(reading)
    if len(digest) != 64:
        raise SystemExit(f"{workdir}: the last checkpoint could not be read")
    return digest


def outcome(workdir: Path, start: Path | None = None) -> dict[str, Any]:
    """Everything that a run leaves, times excluded; `start` is its model's folder where that is not its cold start."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "metrics.jsonl": [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows],
        "samples.jsonl": (workdir / "samples.jsonl").read_bytes(),
        "held-out responses": {path.name: path.read_bytes() for path in sorted((workdir / "report").glob("*.jsonl"))},
        "start model": ((start or workdir / "coldstart") / "model.safetensors").read_bytes(),
        "masters, moments and step": state_of(workdir),
    }


def kill_at_random(
    rng: random.Random, child: Child, workdir: Path, start: float, step: float
) -> tuple[str, ...] | None:
    """Kills the child at a random moment of its start, its loop or a save, and returns its active parts; None if it had
    ended before. `start` and `step` are the seconds that those take."""
    aim = rng.choices(["start", "loop", "save"], [1, 4, 2])[0]
    if aim == "start":
        time.sleep(rng.uniform(0, start))
    elif not child.wait_until(lambda: LOOP in child.text()):
        return None
    elif aim == "loop":
        time.sleep(rng.uniform(0, 2.5 * step))
    elif child.wait_until(lambda: any((workdir / "checkpoints").glob("*.unfinished*"))):
        time.sleep(rng.uniform(0, 0.1))
    else:
        return None
    return None if child.ended() else child.kill()


def kill_runs(folder: Path, count: int, steps: int, seed: int) -> None:
    """Kills runs `count` times, resumes after each kill, and compares each finished run with one never stopped."""
    rng, kills, expected = random.Random(seed), collections.Counter[str](), outcome(folder / "whole")
    child = Child(folder / "again", steps)
    child.wait_for_output(LOOP)
    start = time.monotonic() - child.began
    child.end()
    step = (time.monotonic() - child.began - start) / steps
    assert outcome(folder / "again") == expected, "two runs differ though neither was stopped"
    print(f"a run takes {start:.1f} s until its loop and {step:.2f} s per step", flush=True)

    runs, damaged, began = 0, 0, time.monotonic()
    while kills.total() < count:
        workdir, finished = folder / f"killed{seed}-{runs}", False
        while not finished:
            child, parts = Child(workdir, steps), None
            if kills.total() < count:
                parts = kill_at_random(rng, child, workdir, start, step)
            else:
                child.end()
            finished = parts is None
            kills.update([" + ".join(parts)] if parts else [])
            damaged += child.text().count("passed over")
        for name, value in outcome(workdir).items():
            if value != expected[name]:
                raise SystemExit(
                    f"{workdir}: {name} differ from those of the run never stopped, after kills in {dict(kills)}"
                )
        runs += 1
    seconds = (time.monotonic() - began) / kills.total()
    print(f"{count} kills, each followed by a resume, over {runs} runs of {steps} steps; {seconds:.1f} s a kill")
    for name, times in kills.most_common():
        print(f"{times:4d}  {name}")
    print(f"{damaged:4d}  checkpoints reported as damaged")
    print("metrics, samples, held-out responses, masters, moments: bitwise those of the run never stopped")


def disturb_runs(folder: Path, steps: int) -> dict[str, Any]:
    """Exit code and output of runs that are stopped, started twice, out of disk, or diverge; `same` says which of them
    still end with the outcome of the whole run. All but the first begin with that run's start model."""
    results, start = dict[str, Any](), folder / "whole" / "coldstart"
    model = f"model.path={start}"

    first = Child(folder / "stopped", steps)
    first.wait_for_output(LOOP)
    results["second run"] = Child(folder / "stopped", steps).end()
    os.kill(first.pid, signal.SIGTERM)
    results["SIGTERM"] = first.end()
    again, samples = Child(folder / "stopped", steps), folder / "stopped" / "samples.jsonl"
    again.wait_for_output(LOOP)
    before = samples.stat().st_size
    assert again.wait_until(lambda: samples.stat().st_size > before)  # by now the scoring processes have started
    children = Path(f"/proc/{again.pid}/task/{again.pid}/children")
    for worker in children.read_text().split() if children.exists() else ():
        os.kill(int(worker), signal.SIGKILL)
    results["its scoring processes killed"] = again.end()

    twice = Child(folder / "twice", steps, model)
    twice.wait_for_output(LOOP)
    os.kill(twice.pid, signal.SIGINT)
    twice.wait_for_output("SIGINT: finishing")
    os.kill(twice.pid, signal.SIGINT)
    results["SIGINT twice"] = twice.end()
    results["disk full"] = Child(folder / "twice", steps, model, largest_file=100_000).end()
    results["disk free again"] = Child(folder / "twice", steps, model).end()

    odd = folder / ODD_NAME
    moved = Child(odd, steps, model)
    moved.wait_for_output(LOOP)
    odd.rename(folder / "moved")
    results["moved"] = moved.end() | {"left": odd.exists()}
    (folder / "moved").rename(odd)
    results["moved back"] = Child(odd, steps, model).end()
    ended = {
        "stopped": outcome(folder / "stopped"),
        "twice": outcome(folder / "twice", start),
        "moved back": outcome(odd, start),
    }
    results["same"] = {name: left == outcome(folder / "whole") for name, left in ended.items()}
    deleted = Child(folder / "deleted", steps, model)
    deleted.wait_for_output(LOOP)
    shutil.rmtree(folder / "deleted")
    results["deleted"] = deleted.end() | {"left": (folder / "deleted").exists()}

    diverging = [model, "optimizer.learning_rate=1e30"]
    results["not finite"] = Child(folder / "astray", steps, *diverging).end()
    results["replay"] = Child(folder / "astray", steps, *diverging, "--replay", "0").end()
    results["no replay"] = Child(folder / "astray", steps, *diverging, "--replay", "77").end()
    return results


def set_up_compilation(folder: Path) -> None:
    """Quick compiles, cached in `folder` unless the environment says where."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)


def run_whole(folder: Path, steps: int, *overrides: str) -> None:
    """The run that nothing happens to, in folder/whole."""
    if not (folder / "whole").exists():
        result = Child(folder / "whole", steps, *overrides).end()
        assert result["code"] == 0, result["said"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--faults", action="store_true", help="the other faults as well, into FOLDER/faults.json")
    args = parser.parse_args()
    set_up_compilation(args.folder)
    run_whole(args.folder, args.steps)
    if args.faults:
        (args.folder / "faults.json").write_text(json.dumps(disturb_runs(args.folder, args.steps), indent=2))
    if args.kills:
        kill_runs(args.folder, args.kills, args.steps, args.seed)


if __name__ == "__main__":
    main()
