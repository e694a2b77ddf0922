"""Does to an embedded run what happens to runs, and compares what comes out with a run that nothing happened to.

    python tests/harness.py --kills 40 --folder NEW_FOLDER [--seed N]

kills it with SIGKILL at random moments, each kill followed by a resume. A run is a child forked from this process, which
has imported everything and started no backend, and its programs are in a compile cache: a kill and its resume take
seconds. Where a kill fell is read from the child's own stack, dumped on a signal right before: by the section of
`train.py` that was running, and by whether a checkpoint was being written behind it. `tests/test_faults.py` runs a few of
them, and the other faults (`--faults`), whose runs it looks at; exit code 1 and a line where a killed run differs.
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
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"

import jax
import numpy as np
import orbax.checkpoint as ocp
import transformers  # noqa: F401 (imported here once, so that no child has to)

from crpo_jax import cli, train

LOOP = "CRPO, reward design"  # the run's opening words: what comes after is its loop
SETTINGS = [
    *("--mesh", "1x1"),
    *(
        "model.shape.hidden_size=32",
        "model.shape.num_hidden_layers=1",
        "model.shape.num_attention_heads=2",
        "model.shape.intermediate_size=32",
    ),
    *("data.vignettes=64", "data.eval_questions=8", "rollout.max_new_tokens=48", "rollout.chunk=12"),
    *(
        "crpo.prompts_per_step=8",
        "crpo.mini_batch_prompts=4",
        "crpo.group_size=3",
        "reward.workers=1",
        "parallel.unroll=false",
    ),
    *(
        "sft.steps=2",
        "sft.batch_size=8",
        "sft.optimizer.algorithm=adamw",
        "run.eval_every=3",
        "run.save_every=2",
        "optimizer.learning_rate=0.01",
    ),
]


class Child:
    """A run of `steps` in a process of its own; what it says goes to a file."""

    def __init__(self, workdir: Path, steps: int, *overrides: str, largest_file: int = 0) -> None:
        self.said, self.stacks = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115 (they end with the child)
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            os.dup2(self.said.fileno(), 1)
            os.dup2(self.said.fileno(), 2)
            faulthandler.register(signal.SIGUSR1, file=self.stacks, all_threads=True)
            if largest_file:  # stands for a full disk
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            arguments = ["--workdir", str(workdir), *SETTINGS, f"crpo.steps={steps}", *overrides]
            try:
                cli.run_command("train", lambda: train.main(arguments))
            except SystemExit as done:  # as the interpreter would end, were this not a copy of its parent
                if isinstance(done.code, str):
                    os.write(2, f"{done.code}\n".encode())
                os._exit(1 if isinstance(done.code, str) else done.code or 0)
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(70)

    def text(self) -> str:
        return os.pread(self.said.fileno(), 1 << 20, 0).decode(errors="replace")

    def ended(self) -> bool:
        """Whether the run is over; SystemExit where it did not end well."""
        done, status = os.waitpid(self.pid, os.WNOHANG)
        if done and os.waitstatus_to_exitcode(status):
            raise SystemExit(f"a run ended with exit code {os.waitstatus_to_exitcode(status)}:\n{self.text()}")
        return bool(done)

    def end(self) -> dict[str, Any]:
        """Waits for the run: its exit code and what it said."""
        return {"code": os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]), "said": self.text()}

    def reached(self, words: str) -> None:
        assert self.wait_for(lambda: words in self.text()), f"the run ended before it said {words!r}"

    def wait_for(self, seen: Any) -> bool:
        """Whether `seen()` came true before the run ended."""
        while not seen():
            if self.ended():
                return False
            time.sleep(0.002)
        return True

    def kill(self) -> tuple[str, ...]:
        """SIGKILL; the parts of a run that were at work."""
        os.kill(self.pid, signal.SIGUSR1)
        time.sleep(0.002)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return where(os.pread(self.stacks.fileno(), 1 << 20, 0).decode(errors="replace"))


def sections() -> dict[int, str]:
    """The section of train.py that each of its lines belongs to."""
    found, name = {}, "start"
    for number, line in enumerate(Path(train.__file__).read_text(encoding="utf-8").splitlines(), start=1):
        mark = re.match(r"\s*# ---- ([\w-]+(?: \w+)*)", line)
        name = mark[1] if mark else name
        found[number] = name
    return found


def where(stacks: str) -> tuple[str, ...]:
    """The section of train.py in the dumped stacks, `cold start` inside it, and `save` where a checkpoint is being written."""
    line = re.search(r'/train\.py", line (\d+) in train\n', stacks)
    parts = [sections()[int(line[1])]] if line else ["before train"]
    if "/fine_tuning.py" in stacks:
        parts = ["cold start"]
    if "/checkpoint.py" in stacks and "in _finish" in stacks:
        parts.append("save in the background")
    elif re.search(r'/checkpoint\.py", line \d+ in save', stacks):
        parts.append("save")
    return tuple(parts)


def state_of(workdir: Path) -> str:
    """A digest of every tensor in the last checkpoint, read by a child: this process must stay without a backend."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        last = max((path for path in (workdir / "checkpoints").iterdir()), key=lambda path: int(path.name))
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


def outcome(workdir: Path) -> dict[str, Any]:
    """Everything a run leaves that does not depend on the clock."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "metrics.jsonl": [{name: value for name, value in row.items() if not name.startswith("time/")} for row in rows],
        "samples.jsonl": (workdir / "samples.jsonl").read_bytes(),
        "held-out responses": {path.name: path.read_bytes() for path in sorted((workdir / "report").glob("*.jsonl"))},
        "start model": (workdir / "coldstart" / "model.safetensors").read_bytes(),
        "masters, moments and step": state_of(workdir),
    }


def one_kill(draw: random.Random, child: Child, workdir: Path, start: float, step: float) -> tuple[str, ...] | None:
    """Kills the child at a random moment of its start, of its loop, or while it saves; None where it had ended by then."""
    aim = draw.choices(["start", "loop", "save"], [1, 4, 2])[0]
    if aim == "start":
        time.sleep(draw.uniform(0, start))
    elif not child.wait_for(lambda: LOOP in child.text()):
        return None
    elif aim == "loop":
        time.sleep(draw.uniform(0, 2.5 * step))
    elif child.wait_for(lambda: any((workdir / "checkpoints").glob("*.unfinished*"))):
        time.sleep(draw.uniform(0, 0.1))
    else:
        return None
    return None if child.ended() else child.kill()


def kills(folder: Path, count: int, steps: int, seed: int) -> None:
    """Kills and resumes until there were `count` kills; every run that reaches its end is compared with one never stopped."""
    draw, fell, expected = random.Random(seed), collections.Counter[str](), outcome(folder / "whole")
    child = Child(folder / "again", steps)
    child.reached(LOOP)
    start = time.monotonic() - child.began
    child.end()
    step = (time.monotonic() - child.began - start) / steps
    assert outcome(folder / "again") == expected, "two runs that nobody stopped differ"
    print(f"a run takes {start:.1f} s to its loop and {step:.2f} s a step", flush=True)

    runs, damaged, began = 0, 0, time.monotonic()
    while fell.total() < count:
        workdir, finished = folder / f"killed{seed}-{runs}", False
        while not finished:
            child = Child(workdir, steps)
            where_it_was = one_kill(draw, child, workdir, start, step) if fell.total() < count else child.end() and None
            finished = where_it_was is None
            fell.update([" + ".join(where_it_was)] if where_it_was else [])
            damaged += child.text().count("passed over")
        found = outcome(workdir)
        for name, value in expected.items():
            if found[name] != value:
                raise SystemExit(
                    f"{workdir}: {name} differ from those of the run never stopped, after kills in {dict(fell)}"
                )
        runs += 1
    seconds = (time.monotonic() - began) / fell.total()
    print(f"{fell.total()} kills, each followed by a resume, over {runs} runs of {steps} steps; {seconds:.1f} s a kill")
    for name, times in fell.most_common():
        print(f"{times:4d}  {name}")
    print(f"{damaged:4d}  checkpoints reported as damaged")
    print("metrics, samples, held-out responses, masters, moments: bitwise those of the run never stopped")


def faults(folder: Path, steps: int) -> dict[str, Any]:
    """What runs said and how they ended that were stopped, doubled, starved of disk, or sent astray; several ended like the whole one."""
    found: dict[str, Any] = {}

    first = Child(folder / "stopped", steps)
    first.reached(LOOP)
    found["second run"] = Child(folder / "stopped", steps).end()
    os.kill(first.pid, signal.SIGTERM)
    found["SIGTERM"] = first.end()
    again, samples = Child(folder / "stopped", steps), folder / "stopped" / "samples.jsonl"
    again.reached(LOOP)
    before = samples.stat().st_size
    assert again.wait_for(lambda: samples.stat().st_size > before)  # by now they have started
    children = Path(f"/proc/{again.pid}/task/{again.pid}/children")
    for worker in children.read_text().split() if children.exists() else ():
        os.kill(int(worker), signal.SIGKILL)
    found["its scoring processes killed"] = again.end()

    twice = Child(folder / "twice", steps)
    twice.reached(LOOP)
    os.kill(twice.pid, signal.SIGINT)
    twice.reached("SIGINT: finishing")
    os.kill(twice.pid, signal.SIGINT)
    found["SIGINT twice"] = twice.end()
    found["disk full"] = Child(folder / "twice", steps, largest_file=100_000).end()
    found["disk free again"] = Child(folder / "twice", steps).end()
    found["same"] = {name: outcome(folder / name) == outcome(folder / "whole") for name in ("stopped", "twice")}

    start = f"model.path={folder / 'whole' / 'coldstart'}"
    found["not finite"] = Child(folder / "astray", steps, start, "optimizer.learning_rate=1e30").end()
    found["replay"] = Child(folder / "astray", steps, start, "optimizer.learning_rate=1e30", "--replay", "0").end()
    found["no replay"] = Child(folder / "astray", steps, start, "optimizer.learning_rate=1e30", "--replay", "77").end()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--faults", action="store_true", help="the other faults too, told in FOLDER/faults.json")
    args = parser.parse_args()
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(args.folder / "programs"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_disable_most_optimizations", True)
    if not (args.folder / "whole").exists():
        ended = Child(args.folder / "whole", args.steps).end()
        assert ended["code"] == 0, ended["said"]
    if args.faults:
        (args.folder / "faults.json").write_text(json.dumps(faults(args.folder, args.steps), indent=2))
    if args.kills:
        kills(args.folder, args.kills, args.steps, args.seed)


if __name__ == "__main__":
    main()
