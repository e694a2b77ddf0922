"""Cuts the power under runs: what was on the disk at random moments is repaired, mounted and resumed, and the results
are compared with those of a run never stopped.

    python tests/power_cuts.py --cuts 50 --folder NEW_FOLDER [--seed N] [section.key=value ...]

A run works on an ext4 image behind a loop device. Copied at a random moment without a sync, the image holds what the
file system had written until then, which is what a cut leaves; a SIGKILL shows nothing of it, since the kernel still
writes what the process had handed over. The file system commits names every second and data later, and does not guess
which renames should wait for their data (`noauto_da_alloc`): what is not synced in the right order is lost. Needs root,
loop devices, mkfs.ext4 and fsck.ext4. Exit code 1 and one line where a resumed run is refused or differs.
"""

import argparse
import collections
import contextlib
import random
import re
import time
from pathlib import Path

import harness
from ext4_image import command, copy_image, make_image, missing_means, mounted
from harness import LOOP, Child, outcome


def state_at_cut(workdir: Path) -> str:
    """What the repaired image holds, as a line of the tally."""
    checkpoints = workdir / "checkpoints"
    if checkpoints.is_dir() and any(path.name.isdecimal() for path in checkpoints.iterdir()):
        return "with a checkpoint"
    if (workdir / "coldstart").is_dir():
        return "with a cold start"
    return "with a workdir" if workdir.is_dir() else "with nothing yet"


def resume_copy(copy: Path, place: Path, steps: int, overrides: list[str]) -> tuple[str, str, dict[str, object]]:
    """Repairs and resumes what a cut left: what it held, a failure in one line ("" for none), and the outcome."""
    command("fsck.ext4", "-f", "-y", copy, codes=(0, 1))  # 1: repaired, which replaying the journal counts as
    with mounted(copy, place) as folder:
        held = state_at_cut(folder / "run")
        ending = Child(folder / "run", steps, *overrides).end()
        lines = ending["said"].splitlines()
        said = " | ".join(line for line in lines if re.search("passed over|expected|missing|stopped", line))
        if ending["code"]:
            return held, f"exit code {ending['code']}: {said or lines[-1]}", {}
        return held, said, outcome(folder / "run")


def take_cuts(folder: Path, count: int, steps: int, rng: random.Random, overrides: list[str]) -> list[Path]:
    """Up to `count` copies of the image of one run, about a second apart: one of its beginning, the others of its
    loop."""
    image, copies = folder / "disk.img", []
    make_image(image)
    with mounted(image, folder / "disk") as disk:
        child = Child(disk / "run", steps, *overrides)

        def in_loop() -> bool:
            return LOOP in child.text()

        time.sleep(rng.uniform(0, 2))
        while len(copies) < count and (not copies or child.wait_until(in_loop)) and not child.ended():
            copies.append(folder / f"cut_{rng.getrandbits(32):08x}.img")
            copy_image(image, copies[-1], child.pid)
            time.sleep(rng.uniform(0, 2))
        if len(copies) == count:
            with contextlib.suppress(ChildProcessError):  # it may have ended
                child.kill()
    return copies


def cut_runs(folder: Path, count: int, steps: int, seed: int, overrides: list[str]) -> None:
    """Cuts the power `count` times, resumes what each cut left, and compares with the run never stopped."""
    rng, expected = random.Random(seed), outcome(folder / "whole")
    tally, failures = collections.Counter[str](), list[str]()
    while tally.total() < count:
        for copy in take_cuts(folder, count - tally.total(), steps, rng, overrides):
            held, failure, result = resume_copy(copy, folder / "copy", steps, overrides)
            failure = failure or ", ".join(f"other {name}" for name in result if result[name] != expected[name])
            failures += [f"{held}: {failure}"] if failure else []
            tally[f"{held}, {'NOT ' if failure else ''}resumed as if never stopped"] += 1
            copy.unlink()
            print(f"cut {tally.total()} of {count}: {held}: {failure or 'resumed as if never stopped'}", flush=True)
    print(f"{count} cuts with {' '.join(overrides) or 'the default settings'}")
    for name, times in sorted(tally.items()):
        print(f"{times:4d}  {name}")
    for failure, times in collections.Counter(re.sub(r"\d[\d,]*", "N", failure) for failure in failures).most_common(5):
        print(f"{times:4d}  {failure[:300]}")
    if failures:
        raise SystemExit(f"{len(failures)} of {count} cuts lost something")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if lack := missing_means():
        raise SystemExit(f"cannot mount images here: {lack}")
    overrides = ["run.save_every=1", *args.overrides]
    harness.set_up_compilation(args.folder)
    harness.run_whole(args.folder, args.steps, *overrides)
    cut_runs(args.folder, args.cuts, args.steps, args.seed, overrides)


if __name__ == "__main__":
    main()
