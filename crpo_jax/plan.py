"""Memory, communication and least time of a run on hardware that you may not have, and whether it fits.

Compiles the real programs at full size for the target, ahead of time, without the accelerator and without the weights:
`pip install 'crpo_jax[plan-gpu]'` for GPUs, `'crpo_jax[plan-tpu]'` for TPUs. Without these packages, or with --fast, it
estimates from shapes alone. The exit code is 0 if the run fits, 1 if it does not, 2 for bad input.

    python -m crpo_jax.plan --target 8xa6000 --mesh 8x1
    python -m crpo_jax.plan --target v5e-16 --search
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from crpo_jax import cli, config
from crpo_jax.errors import InputError
from crpo_jax.planner.targets import find_missing_compiler, parse_target, prepare_environment


def parse_flags(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.build_parser("plan", __doc__ or "", lambda model: config.default_config_path("an accelerator"))
    targets = "devices to plan for: 8xa6000, h200, h100x8, v4-16, v5e-16, v5p-8, v6e-8, ..."
    search = "rank all meshes and layouts of the target's devices, then plan the best"
    fast = "estimate from shapes alone, in seconds; memory is within 10%% of the compiled figures"
    plot = "draw memory by phase and part, with one panel per layout"
    parser.add_argument("--target", metavar="NAME", required=True, help=targets)
    parser.add_argument("--layout", metavar="NAME", help="sets parallel.layout")
    parser.add_argument("--search", action="store_true", help=search)
    parser.add_argument("--fast", action="store_true", help=fast)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--plot", metavar="FILE.png", type=cli.path_of("--plot"), help=plot)
    args = parser.parse_intermixed_args(arguments)
    if args.layout:
        args.overrides.append(f"parallel.layout={args.layout}")
    if args.search and args.mesh:
        raise InputError("--search: expected no --mesh, since a search ranks all meshes")
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        raise InputError(f"--plot: expected a file that ends in .png, got {args.plot!r}")
    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise InputError(f"--plot {args.plot}: no such folder")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse_flags(arguments)
    settings = cli.load_settings(args, config.default_config_path("an accelerator"))
    target = parse_target(args.target)
    prepare_environment(target)

    from crpo_jax.planner import report  # these import jax, which reads the environment then
    from crpo_jax.planner.plan import compile_plan, estimate_plan, list_other_layouts, plan_to_json, rank_meshes
    from crpo_jax.planner.planned_run import resolve_run

    details = {}
    if args.search:
        ranking = rank_meshes(settings, target)
        plan = ranking.plans[0]
        details = {"search": [plan_to_json(ranked) for ranked in ranking.plans], "refused": ranking.refused}
        if not args.json:
            print(report.format_ranking(ranking), end="\n\n", flush=True)
    else:
        plan = estimate_plan(resolve_run(settings, target, settings.parallel.mesh))
    if not args.fast:
        if missing := find_missing_compiler(target):
            print(f"{missing}; estimated from shapes instead", file=sys.stderr)
        else:
            plan = compile_plan(plan.run, plan.changes, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps({**plan_to_json(plan), **details}, indent=1) if args.json else report.format_plan(plan))
    if args.plot:
        others = map(estimate_plan, list_other_layouts(plan.run))
        report.draw_plans([plan, *others], Path(args.plot))
    return 0 if plan.fits else 1


def run_main() -> None:
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of standard output closed it, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code)


if __name__ == "__main__":
    cli.run_command("plan", run_main)
