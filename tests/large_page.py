"""Times and sizes of the page of a run with very many responses.

    python tests/large_page.py --run WORKDIR --folder NEW_FOLDER [--responses 100000]

repeats the lines of a run's samples.jsonl under further steps and ids, and its last held-out responses every 50 steps.
It prints how long the page takes to write, its bytes, the memory for it, and how long a headless Chromium takes to open
it, five times. Exit code 1 where the page is larger than 5 MB or takes longer than two seconds to open.
"""

import argparse
import itertools
import json
import resource
import shutil
import statistics
import sys
import time
from pathlib import Path

from chromium import open_chromium

from crpo_jax.page.html import write_page
from crpo_jax.page.selection import held_out_files

LARGEST, LONGEST = 5_000_000, 2.0  # bytes, seconds
EVALUATE_EVERY = 50


def enlarge(run: Path, folder: Path, responses: int) -> int:
    """Makes a workdir with so many responses of a run's; its number of steps."""
    rows = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    by_step = [list(group) for _, group in itertools.groupby(rows, lambda row: row["step"])]
    (folder / "report").mkdir(parents=True)
    shutil.copy(run / "config.yaml", folder)
    step = written = 0
    with (folder / "samples.jsonl").open("w", encoding="utf-8") as samples, (folder / "metrics.jsonl").open("w") as log:
        while written < responses:
            for row in by_step[step % len(by_step)][: responses - written]:
                row |= {"step": step, "id": f"{row['id'].partition('+')[0]}+{step // len(by_step)}"}
                samples.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
            due = step % EVALUATE_EVERY == 0
            measures = {name: value for name, value in metrics[0].items() if due or not name.startswith("eval/")}
            log.write(json.dumps(measures | {"step": step}) + "\n")
            if due:
                shutil.copy(held_out_files(run)[-1], folder / "report" / f"held_out_{step:06d}.jsonl")
            step += 1
    return step


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--responses", type=int, default=100_000)
    args = parser.parse_args()
    steps = enlarge(args.run, args.folder, args.responses)
    began, used = time.perf_counter(), time.process_time()
    page = write_page(args.folder)
    size, wall, processor = page.stat().st_size, time.perf_counter() - began, time.process_time() - used
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(
        f"{args.responses:,} responses of {steps:,} steps: {size:,} bytes, written in {wall:.2f} s ({processor:.2f} s"
    )
    print(f"of processor time), {memory:.0f} MiB at most in this process")
    with open_chromium(args.folder / "profile") as browser:
        seconds = []
        for _ in range(5):
            browser.call("Page.navigate", url="about:blank")
            browser.wait_until("location.href === 'about:blank'")
            seconds.append(browser.open(page.as_uri()))
        shown = browser.evaluate("responses.length")
    print(f"opened in {', '.join(f'{each:.2f}' for each in seconds)} s; {shown:,} responses in it")
    return int(size > LARGEST or statistics.median(seconds) > LONGEST)


if __name__ == "__main__":
    sys.exit(main())
