"""What a mesh and layout cost on hardware you may not own: memory, collectives, time bound, fits or not.

Compiles the real programs at full size for the target, ahead of time, on a machine that has neither the accelerator nor the
weights: `pip install 'crpo_jax[plan-gpu]'` for GPUs, `'crpo_jax[plan-tpu]'` for TPUs. Without them, and with --fast, it
estimates from shapes alone. Exit code 0 where it fits, 1 where it does not, 2 for bad input.

    python -m crpo_jax.plan --target 8xa6000 --mesh 8x1
    python -m crpo_jax.plan --target v5e-16 --search
"""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from crpo_jax import cli, config
from crpo_jax.errors import InputError
from crpo_jax.planner.targets import parse_target, plug_in_missing, prepare


def main(arguments: Sequence[str] | None = None) -> int:
    p = cli.build_parser("plan", __doc__ or "")
    p.add_argument(
        "--target",
        metavar="NAME",
        required=True,
        help="devices to plan for: 8xa6000, h200, h100x8, v4-16, v5e-16, v5p-8, v6e-8, ...",
    )
    p.add_argument("--layout", metavar="NAME", help="sets parallel.layout")
    p.add_argument(
        "--search", action="store_true", help="rank all meshes and layouts of the target's devices, then plan the best"
    )
    p.add_argument(
        "--fast", action="store_true", help="from shapes alone, in seconds; memory within 10%% of the compiled figures"
    )
    p.add_argument("--json", action="store_true", help="print JSON instead of tables")
    p.add_argument("--plot", metavar="FILE.png", help="a picture: memory by phase and part, a panel per layout")
    args = p.parse_intermixed_args(arguments)
    if args.layout:
        args.overrides.append(f"parallel.layout={args.layout}")
    if args.search and args.mesh:
        raise InputError("--search: expected no --mesh beside it, since it ranks them all")
    if args.plot and Path(args.plot).suffix.lower() != ".png":
        raise InputError(f"--plot: expected a file that ends in .png, got {args.plot!r}")
    if args.plot and not Path(args.plot).absolute().parent.is_dir():
        raise InputError(f"--plot {args.plot}: no such folder")
    settings = cli.load_settings(args, config.default_config_path("an accelerator"))
    target = parse_target(args.target)
    prepare(target)

    from crpo_jax.planner import plan as planning  # jax, which reads the environment as it starts
    from crpo_jax.planner import report
    from crpo_jax.planner.job import job_for

    missing = "" if args.fast else plug_in_missing(target)
    fast, changed, found = args.fast or bool(missing), {}, {}
    if args.search:
        fitting, others, refused = planning.search(settings, target)
        found = {"search": [planning.as_json(one) for one in [*fitting, *others]], "refused": refused}
        if not args.json:
            print(report.ranking(fitting, others, refused), end="\n\n", flush=True)
        job, changed = (fitting or others)[0].job, (fitting or others)[0].changed
    else:
        job = job_for(settings, target, settings.parallel.mesh)
    if missing:
        print(f"{missing}; estimated from shapes instead", file=sys.stderr)
    if fast:
        plan = planning.from_shapes(job, changed)
    else:
        plan = dataclasses.replace(
            planning.by_compiling(job, lambda line: print(line, file=sys.stderr, flush=True)), changed=changed
        )
    print(json.dumps({**planning.as_json(plan), **found}, indent=1) if args.json else report.text(plan))
    if args.plot:
        jobs, _ = planning.all_jobs(job.settings, target)
        beside = [one for one in jobs if one.mesh_text == job.mesh_text and one.layout_name != job.layout_name]
        report.picture([plan, *map(planning.from_shapes, beside)], Path(args.plot))
    return 0 if plan.fits else 1


def checked() -> None:
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read standard output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    raise SystemExit(code)


if __name__ == "__main__":
    cli.run_command("plan", checked)
