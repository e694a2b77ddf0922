"""The planner: what it counts against the real programs and arrays, its estimates against compiled figures, the command."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest
from conftest import SHAPE, mesh_of

from crpo_jax import config, plan
from crpo_jax.errors import InputError
from crpo_jax.model.transformer import abstract, parameter_count
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.planner import compiled, hlo, report
from crpo_jax.planner.cost import works
from crpo_jax.planner.job import PUBLISHED, Job, job_for, planned_shape
from crpo_jax.planner.memory import PHASES, estimated, held, resident, set_aside
from crpo_jax.planner.plan import all_jobs, from_shapes, remedy, search
from crpo_jax.planner.targets import GIB, parse_target, plug_in_missing
from crpo_jax.update.trainer import trainer

PAPER = config.config_folder() / "clinical_r1_3b.yaml"
FIGURES = json.loads((Path(__file__).parent / "plan_figures.json").read_text(encoding="utf-8"))


def paper(target: str, mesh: str = "", *overrides: str) -> Job:
    return job_for(config.load_config(PAPER, list(overrides)), parse_target(target), mesh)


def small(data: int, model: int, *overrides: str) -> Job:
    """The tests' model and a batch to match, for as many GPUs as there are virtual devices."""
    sizes = (
        "rollout.max_new_tokens=32",
        "data.max_prompt_tokens=16",
        "rollout.slots=8",
        "rollout.chunk=8",
        "crpo.group_size=2",
    )
    batch = (
        "crpo.prompts_per_step=64",
        "crpo.mini_batch_prompts=32",
        "parallel.micro_batch_tokens=96",
        "parallel.length_multiple=16",
    )
    settings = config.load_config(PAPER, [*sizes, *batch, "parallel.logprob_chunk=16", *overrides])
    return Job(settings, SHAPE, parse_target(f"{data * model}xh100"), data, model)


# ---- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"), [("0.5B", 494_032_768), ("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512)]
)
def test_published_sizes_have_their_published_parameters(size: str, count: int):
    """The safetensors of these models on the hub hold this many."""
    shape = planned_shape(config.load_config(PAPER, [f"model.path=Qwen/Qwen2.5-{size}-Instruct"]))
    assert parameter_count(shape) == report.parameters(shape) == count
    assert size in PUBLISHED


def test_a_model_that_is_nowhere_is_refused():
    with pytest.raises(InputError, match=r"model.path: expected a folder with config.json or one of Qwen/Qwen2.5-0.5B"):
        planned_shape(config.load_config(PAPER, ["model.path=Qwen/Qwen2.5-9B"]))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "model"), [(4, 2), (1, 8)])
@pytest.mark.parametrize(("layout", "algorithm"), [(layout, "adamw") for layout in LAYOUTS] + [("zero1", "muon")])
def test_state_is_as_large_as_the_trainers(data: int, model: int, layout: str, algorithm: str):
    """Masters and moments of the real state in its real shardings, muon's two kinds of moments included."""
    job = small(data, model, f"parallel.layout={layout}", f"optimizer.algorithm={algorithm}")
    run = trainer(SHAPE, mesh_of(data, model), job.settings, job.settings.optimizer, 1, loss="crpo")
    state = jax.eval_shape(run.begin, abstract(SHAPE))
    parts = resident(job)["decode"]
    assert held(state.master, run.states.master) == parts["master"]
    counters = held(state.optimizer, run.states.optimizer) - parts["moments"]
    assert 0 <= counters <= 32


ARGUMENTS = {
    "sampling copy": ("master",),
    "prefill": ("weights",),
    "decode": ("weights", "KV cache"),
    "compute copy": ("master",),
    "reference log-probs": ("reference",),
    "old log-probs": ("weights",),
    "accumulate": ("weights", "gradients"),
    "optimizer step": ("master", "moments", "gradients"),
}


@pytest.mark.parametrize(("data", "model"), [(4, 2)])
def test_programs_take_the_arrays_that_are_counted(data: int, model: int):
    """What a device holds of the arguments that are compiled for: the parts named here, and of tokens and scalars little more."""
    job, mesh = small(data, model, "model.dtype=float32"), mesh_of(data, model)
    found = {}
    for one in [*compiled.update_programs(job, mesh), *compiled.rollout_programs(job, mesh)]:
        found[one.phase] = held(one.arguments, jax.tree.map(lambda x: x.sharding, one.arguments))
        one.lower()  # the real program accepts them
    assert set(found) == set(PHASES)
    for phase, parts in ARGUMENTS.items():
        counted = sum(resident(job)[phase][part] for part in parts) - (set_aside(job) if phase == "decode" else 0)
        assert counted <= found[phase] <= counted + 8192, phase


def test_one_optimizer_step_needs_no_old_logprobs():
    assert "old log-probs" not in {
        phase.name for phase in from_shapes(paper("8xa6000", "8x1", "crpo.mini_batch_prompts=512")).phases
    }


@pytest.mark.parametrize("recorded", FIGURES, ids=lambda one: f"{one['target']}-{one['mesh']}-{one['layout']}")
def test_the_estimate_is_within_a_tenth_of_what_was_compiled(recorded: dict[str, Any]):
    """Recorded by `python -m crpo_jax.plan --json` with the compilers installed."""
    job = paper(recorded["target"], recorded["mesh"], f"parallel.layout={recorded['layout']}", *recorded["overrides"])
    guessed = from_shapes(job)
    aside = {"decode": set_aside(job)}  # beside the programs: exact, and not the compiler's to say
    totals = {phase.name: phase.total - aside.get(phase.name, 0.0) for phase in guessed.phases}
    assert totals == pytest.approx({name: gib * GIB for name, gib in recorded["gib"].items()}, rel=0.1)


def test_a_chunk_more_of_anything_costs_memory():
    """The estimate follows every knob that the verdict can name."""
    job = paper("8xa6000", "8x1")
    for phase, changed in {
        "decode": {"rollout.slots": 64},
        "accumulate": {"parallel.micro_batch_tokens": 4096},
    }.items():
        assert sum(estimated(job.having(changed))[phase].values()) < sum(estimated(job)[phase].values())
    assert sum(estimated(job.having({"parallel.remat": False}))["accumulate"].values()) > sum(
        estimated(job)["accumulate"].values()
    )


# ---- collectives -----------------------------------------------------------------------------------------------------

PROGRAM = """HloModule jit_step

%body (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %x = f32[8,4]{1,0} get-tuple-element(%arg), index=1
  %ar = f32[8,4]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  ROOT %t = (s32[], f32[8,4]) tuple(%i, %ar)
}

%condition (arg: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[] constant(12)
  %i = s32[] get-tuple-element(%arg), index=0
  ROOT %lt = pred[] compare(%i, %limit), direction=LT
}

%until_done (arg: (s32[], f32[8,4])) -> pred[] {
  %limit = s32[] constant(4096)
  ROOT %and = pred[] and(%a, %b)
}

%noted (arg: (s32[], f32[8,4])) -> pred[] {
  ROOT %f = pred[] fusion(%arg), kind=kLoop, calls=%fused
}

%parts (p: bf16[4,16]) -> bf16[16,16] {
  %ag = bf16[16,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

%more_parts (p: bf16[4,16]) -> bf16[16,16] {
  %ag.1 = bf16[16,16]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}
}

ENTRY %main (p: f32[8,4]) -> f32[8,4] {
  %w1 = (s32[], f32[8,4]) while(%init), condition=%condition, body=%body
  %w2 = (s32[], f32[8,4]) while(%init), condition=%until_done, body=%body_2
  %w3 = (s32[], f32[8,4]) while(%init), condition=%noted, body=%body_3, backend_config={"known_trip_count":{"n":"5"}}
  %f1 = bf16[16,16]{1,0} fusion(%p), kind=kCustom, calls=%parts
  %f2 = bf16[16,16]{1,0} fusion(%p), kind=kCustom, calls=%more_parts
  %alone = f32[] all-reduce(%s), channel_id=9, replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
}

%body_2 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %rs = (f32[64]{0}, f32[16]{0}) reduce-scatter-start(%x), channel_id=2, replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, dimensions={0}
}

%body_3 (arg: (s32[], f32[8,4])) -> (s32[], f32[8,4]) {
  %cp = (f32[10]{0}, f32[10]{0}) collective-permute-start(%x), channel_id=3, source_target_pairs={{0,2},{2,4}}
  %all = (f32[4]{0}, bf16[2,2]{1,0}) all-reduce-start(%x, %y), channel_id=4, replica_groups=mesh['a'=4,'b'=2] {'a','b'}, to_apply=%add
}
"""


def test_collectives_are_read_with_their_loops_axes_and_bytes():
    found = {(one.kind, one.axis): (one.sent, one.times) for one in hlo.collectives(PROGRAM, 4, 2)}
    assert found == {
        ("all-reduce", "model"): (12 * 2 * 1 / 2 * 8 * 4 * 4, 12),
        ("reduce-scatter", "data"): (3 / 4 * 64 * 4, 1),
        ("collective-permute", "data"): (5 * 40, 5),
        ("all-reduce", "data, model"): (5 * 2 * 7 / 8 * (4 * 4 + 4 * 2), 5),
        ("all-gather", "data"): (3 / 4 * 16 * 16 * 2, 1),  # one channel, split over two fusions
    }


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_arithmetic_is_what_the_field_counts():
    """6 operations a parameter and token for a step, 8 with remat, plus attention; halved by a second model shard."""
    job = paper("8xa6000", "8x1", "parallel.remat=false")
    tokens = 512 * 5 / 8 * (job.prompt_tokens + job.response_tokens)
    again = 2 * 151936 * 2048  # the logits are made again whatever remat says
    parameters = report.parameters(job.shape)
    assert works(job)["accumulate"].flops == pytest.approx(tokens * (6 * parameters + again), rel=0.06)
    assert works(job)["accumulate"].flops > tokens * (6 * parameters + again)
    remat = works(paper("8xa6000", "8x1"))["accumulate"].flops
    assert remat == pytest.approx(works(job)["accumulate"].flops * 8 / 6, rel=0.06)
    assert works(paper("8xa6000", "4x2"))["accumulate"].flops == pytest.approx(remat)


def test_more_slots_read_the_weights_less_often():
    few, many = (works(paper("h200", "", f"rollout.slots={slots}"))["decode"] for slots in (40, 160))
    assert few.runs == pytest.approx(4 * many.runs)
    assert few.flops == pytest.approx(many.flops)
    assert few.moved > many.moved


# ---- search and remedies ---------------------------------------------------------------------------------------------


def test_a_remedy_makes_it_fit():
    job = paper("v5e-16", "16x1")
    assert not from_shapes(job).fits
    changed = remedy(job)
    assert changed
    assert from_shapes(job.having(changed)).fits
    assert remedy(paper("rtx4090")) is None  # 46 GiB of masters, moments and gradients fit by no batch size


def test_search_ranks_every_possible_mesh_and_layout():
    settings, target = config.load_config(PAPER), parse_target("v5e-16")
    fitting, others, refused = search(settings, target)
    assert [plan.bound for plan in fitting] == sorted(plan.bound for plan in fitting)
    assert all(plan.fits for plan in fitting)
    assert not any(plan.fits for plan in others)
    assert (
        len(fitting) + len(others) == len(all_jobs(settings, target)[0]) == 4 * len(LAYOUTS) + 1
    )  # 1x16 has no data axis to split over
    assert not refused
    refused = search(config.load_config(PAPER, ["model.path=Qwen/Qwen2.5-0.5B"]), parse_target("4xh100"))[2]
    assert "expected a model axis that divides the 14 query heads" in refused["1x4 zero1"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_plan_prints_tables_and_a_verdict(capsys: pytest.CaptureFixture[str]):
    assert plan.main(["--target", "8xa6000", "--mesh", "8x1", "--fast"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("Qwen/Qwen2.5-3B-Instruct, 3,085,938,688 parameters, on 8xa6000 as 8x1")
    assert lines[-1].startswith("fits: decode needs the most")
    assert "estimated from shapes; usable 44.54 of 47.54" in out
    rows = [line for line in lines if line.startswith(tuple(PHASES))]
    assert len(rows) >= 2 * len(PHASES)
    assert max(map(len, lines)) <= 150


def test_what_does_not_fit_names_a_setting_and_exits_with_1(capsys: pytest.CaptureFixture[str]):
    assert plan.main(["--target", "v5e-16", "--mesh", "16x1", "--fast", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] is False
    assert told["peak_bytes"] > told["usable_bytes"] == int(15.75 * GIB)
    assert plan.main(["--target", "v5e-16", "--mesh", "16x1", "--fast"]) == 1
    assert "it would fit with rollout.slots=" in capsys.readouterr().out.splitlines()[-1]
    assert plan.main(["--target", "8xa6000", "--layout", "replicated", "--fast"]) == 1
    assert "it would fit with --mesh 8x1 parallel.layout=fsdp" in capsys.readouterr().out.splitlines()[-1]
    assert plan.main(["--target", "rtx4090", "--fast"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("of rtx4090 does: more devices")


def test_json_adds_up(capsys: pytest.CaptureFixture[str]):
    plan.main(["--target", "h100x8", "--mesh", "4x2", "--layout", "fsdp", "--fast", "--json", "--search"][:8])
    told = json.loads(capsys.readouterr().out)
    assert told["layout"] == "fsdp"
    for phase in told["phases"]:
        assert sum(phase["memory_bytes"].values()) == pytest.approx(phase["total_bytes"])
        assert phase["seconds"]["bound"] == max(phase["seconds"].values())
    assert told["peak_bytes"] == max(phase["total_bytes"] for phase in told["phases"])
    assert told["bound_seconds"] == pytest.approx(sum(phase["seconds"]["bound"] for phase in told["phases"]))


def test_search_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "plan.png"
    assert plan.main(["--target", "v6e-8", "--search", "--fast", "--plot", str(picture)]) == 0
    assert "meshes and layouts by the least time of a step" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--target", "8xa600"], "did you mean 8xa6000?"),
        (
            ["--target", "8xa6000", "--mesh", "4x1"],
            "--mesh 4x1: expected data x model = the 8 devices of 8xa6000, got 4 x 1 = 4",
        ),
        (["--target", "8xa6000", "--mesh", "1x3"], "got 1 x 3 = 3"),
        (["--target", "8xa6000", "--mesh", "eight"], "--mesh: expected DxM in devices"),
        (["--target", "8xa6000", "--layout", "zero9"], "parallel.layout: expected zero1, fsdp, replicated"),
        (["--target", "8xa6000", "--mesh", "8x1", "--search"], "--search: expected no --mesh beside it"),
        (["--target", "8xa6000", "--plot", "x.pdf"], "--plot: expected a file that ends in .png"),
        (["--target", "8xa6000", "--plot", "nowhere/x.png"], "--plot nowhere/x.png: no such folder"),
        (["--target", "8xa6000", "--fast", "model.path=Qwen/Qwen3-1B"], "model.path: expected a folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        plan.main(arguments)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_a_compiler_it_says_which_to_install_and_estimates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        plan, "plug_in_missing", lambda target: f"needs its compiler: pip install 'crpo_jax[{target.extra}]'"
    )
    assert plan.main(["--target", "v6e-8", "--mesh", "4x2"]) == 0
    told = capsys.readouterr()
    assert "crpo_jax[plan-tpu]" in told.err
    assert "estimated from shapes" in told.out


def test_the_estimate_loads_nothing_heavy():
    """Under five seconds on a busy machine means: jax and flax, and no tokenizer, checkpoint or reader of data."""
    check = (
        "import sys\nfrom crpo_jax import plan\nplan.main(['--target', '8xa6000', '--fast'])\n"
        "print(sorted({'orbax', 'transformers', 'datasets', 'grain', 'matplotlib'} & set(sys.modules)))"
    )
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, timeout=120, check=False, env=clean
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.slow
def test_a_small_model_compiles_for_a_gpu_that_is_not_here():
    """Every phase through the real compiler, where it is installed; a process of its own, since plug-ins load once."""
    target = parse_target("2xh100")
    if missing := plug_in_missing(target):
        pytest.skip(missing)
    sizes = [
        "model.path=",
        "tokenizer.path=unused",
        "rollout.max_new_tokens=64",
        "data.max_prompt_tokens=64",
        "rollout.slots=8",
        "rollout.chunk=32",
    ]
    batch = [
        "crpo.prompts_per_step=8",
        "crpo.mini_batch_prompts=4",
        "crpo.group_size=2",
        "parallel.micro_batch_tokens=256",
        "parallel.length_multiple=64",
    ]
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    command = [sys.executable, "-m", "crpo_jax.plan", "--target", "2xh100", "--mesh", "1x2", "--json", *sizes, *batch]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False, env=clean)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["source"] == "compiled"
    assert {phase["name"] for phase in told["phases"]} == set(PHASES)
    decode = next(phase for phase in told["phases"] if phase["name"] == "decode")
    assert any(one["kind"] == "all-reduce" and one["axis"] == "model" for one in decode["collectives"])
