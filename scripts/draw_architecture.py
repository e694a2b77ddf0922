"""Draws docs/images/one_step.svg, the data flow of one RL step: python scripts/draw_architecture.py [FILE.png]"""

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch, Patch

FILE = Path(__file__).parents[1] / "docs" / "images" / "one_step.svg"
HOST, DEVICE, WEIGHTS = "#fbe8cc", "#d6e6f5", "#e2efda"
WIDTH, HEIGHT = 2.5, 1.15

BOXES: dict[str, tuple[float, float, str, str, str]] = {  # name: centre, title, room, colour
    "batch": (1.5, 6.6, "questions of the step", "data/", HOST),
    "prompts": (4.5, 6.6, "prompt tokens", "data/", HOST),
    "rollout": (7.5, 6.6, "rollout", "answer/, rollout/", DEVICE),
    "rewards": (10.5, 6.6, "rewards", "reward/, worker processes", HOST),
    "advantages": (13.5, 6.6, "advantages per group", "update/", HOST),
    "micro": (13.5, 4.2, "micro-batches", "update/", HOST),
    "logprobs": (10.5, 4.2, "reference and old\nlog-probs", "update/", DEVICE),
    "gradients": (7.5, 4.2, "accumulated gradients", "update/", DEVICE),
    "optimizer": (4.5, 4.2, "optimizer step", "update/", DEVICE),
    "logs": (1.5, 4.2, "logs and checkpoint", "store/", HOST),
    "masters": (4.5, 1.8, "masters and moments\nfloat32, layout.master", "", WEIGHTS),
    "compute": (9.3, 1.8, "compute copy\nmodel.dtype, layout.compute", "", WEIGHTS),
    "reference": (13.2, 1.8, "frozen reference\nmodel.dtype, layout.reference", "", WEIGHTS),
    "sampling": (7.5, 8.6, "sampling copy\nmodel.dtype, model axis only", "", WEIGHTS),
}


def draw(axis: Any) -> None:
    for x, y, title, room, colour in BOXES.values():
        wide = WIDTH + (0.9 if colour == WEIGHTS else 0.0)
        corner = (x - wide / 2, y - HEIGHT / 2)
        axis.add_patch(
            FancyBboxPatch(
                corner, wide, HEIGHT, boxstyle="round,pad=0,rounding_size=0.12", fc=colour, ec="#555", lw=0.9
            )
        )
        axis.text(x, y + (0.16 if room else 0), title, ha="center", va="center", fontsize=9.5)
        if room:
            axis.text(x, y - 0.38, room, ha="center", va="center", fontsize=7.5, color="#555", family="monospace")


def arrow(
    axis: Any, start: tuple[float, float], end: tuple[float, float], label: str = "", at: tuple[float, float] = (0, 0)
) -> None:
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": "#333", "lw": 1.1, "shrinkA": 0, "shrinkB": 0}
    )
    if label:
        axis.text(*at, label, fontsize=8, color="#333", ha="center", va="center", style="italic")


def arrows(axis: Any) -> None:
    def beside(first: str, second: str, label: str = "") -> None:
        (x1, y, *_), (x2, *_) = BOXES[first], BOXES[second]
        half = WIDTH / 2 if x2 > x1 else -WIDTH / 2
        arrow(axis, (x1 + half, y), (x2 - half, y), label, ((x1 + x2) / 2, y + HEIGHT / 2 + 0.2))

    for pair in (("batch", "prompts"), ("prompts", "rollout"), ("rewards", "advantages")):
        beside(*pair)
    beside("rollout", "rewards", "responses,\nas they finish")
    beside("micro", "logprobs")
    beside("logprobs", "gradients")
    beside("gradients", "optimizer", "per mini-batch")
    beside("optimizer", "logs")
    half = HEIGHT / 2
    arrow(axis, (13.5, 6.6 - half), (13.5, 4.2 + half))
    arrow(axis, (4.5, 4.2 - half), (4.5, 1.8 + half), "updates", (5.05, 3.0))
    arrow(axis, (6.2, 1.8), (7.6, 1.8), "cast once per\noptimizer step", (6.9, 2.15))
    arrow(axis, (8.6, 1.8 + half), (7.9, 4.2 - half))
    arrow(axis, (9.7, 1.8 + half), (10.2, 4.2 - half), "old", (9.7, 3.05))
    arrow(axis, (12.7, 1.8 + half), (11.0, 4.2 - half))
    arrow(axis, (7.5, 8.6 - half), (7.5, 6.6 + half))
    # The sampling copy comes from the masters, around the left edge.
    axis.plot([2.8, 0.05, 0.05], [1.8, 1.8, 8.6], color="#333", lw=1.1)
    arrow(axis, (0.05, 8.6), (5.8, 8.6), "gathered and cast once per rollout; adapters merged", (2.9, 8.85))


def main() -> None:
    plt.rcParams["svg.hashsalt"] = "crpo_jax"
    figure, axis = plt.subplots(figsize=(12, 7))
    draw(axis)
    arrows(axis)
    axis.set(xlim=(-0.2, 15.2), ylim=(0.9, 9.3))
    axis.set_axis_off()
    kinds = (
        ("host (Python, NumPy)", HOST),
        ("devices (compiled programs)", DEVICE),
        ("weights on the devices", WEIGHTS),
    )
    handles = [Patch(fc=colour, ec="#555", label=label) for label, colour in kinds]
    figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.subplots_adjust(0.01, 0.05, 0.99, 0.99)
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    figure.savefig(out, dpi=130, facecolor="white", metadata={"Date": None} if out.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
