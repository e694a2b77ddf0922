"""The planner: its counts against the real programs and arrays, its estimates against compiled figures, the command."""

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
from crpo_jax.hardware import GIB
from crpo_jax.model.transformer import parameter_count
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.planner import compiled, hlo
from crpo_jax.planner.cost import count_work
from crpo_jax.planner.memory import (
    PHASES,
    count_array_bytes,
    count_resident_memory,
    count_waiting_bytes,
    estimate_memory,
    list_phases,
)
from crpo_jax.planner.plan import estimate_plan, find_changes, list_runs, rank_meshes
from crpo_jax.planner.planned_run import PlannedRun, resolve_run, resolve_shape
from crpo_jax.planner.targets import find_missing_compiler, parse_target
from crpo_jax.update.trainer import Trainer

PAPER = config.config_folder() / "clinical_r1_3b.yaml"
FIGURES = json.loads((Path(__file__).parent / "plan_figures.json").read_text(encoding="utf-8"))


def plan_paper(target: str, mesh: str = "", *overrides: str) -> PlannedRun:
    return resolve_run(config.load_config(PAPER, list(overrides)), parse_target(target), mesh)


def plan_small(data: int, model: int, *overrides: str) -> PlannedRun:
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
    return PlannedRun(settings, SHAPE, parse_target(f"{data * model}xh100"), data, model)


# ---- shapes ----------------------------------------------------------------------------------------------------------


PARAMETERS = {
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "google/gemma-3-4b-it": 3_880_263_168,
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_published_models_have_their_published_parameters(path: str):
    """The safetensors of these models on the hub hold this many, vision towers apart."""
    assert parameter_count(resolve_shape(config.load_config(PAPER, [f"model.path={path}"]))) == PARAMETERS[path]


def test_a_model_that_is_nowhere_is_refused():
    with pytest.raises(InputError, match=r"model.path: expected a folder with config.json or one of Qwen/Qwen2.5-0.5B"):
        resolve_shape(config.load_config(PAPER, ["model.path=Qwen/Qwen2.5-9B"]))


# ---- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("data", "model"), [(4, 2), (1, 8)])
@pytest.mark.parametrize(("layout", "algorithm"), [(layout, "adamw") for layout in LAYOUTS] + [("zero1", "muon")])
def test_state_is_as_large_as_the_trainers(data: int, model: int, layout: str, algorithm: str):
    """Masters and moments of the real state in its real shardings, muon's two kinds of moments included."""
    run = plan_small(data, model, f"parallel.layout={layout}", f"optimizer.algorithm={algorithm}")
    trainer = Trainer(SHAPE, mesh_of(data, model), run.settings, run.settings.optimizer, 1, loss="crpo")
    state = trainer.abstract_state()
    parts = count_resident_memory(run)["decode"]
    assert count_array_bytes(state.master, trainer.shardings.master) == parts["master"]
    counters = count_array_bytes(state.optimizer, trainer.shardings.optimizer) - parts["moments"]
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
    """A device holds the counted parts of the arguments to compile for, and beside them only tokens and scalars."""
    run, mesh = plan_small(data, model, "model.dtype=float32"), mesh_of(data, model)
    sizes = {}
    for program in [*compiled.list_update_programs(run, mesh), *compiled.list_rollout_programs(run, mesh)]:
        arguments = program.arguments
        sizes[program.phase] = count_array_bytes(arguments, jax.tree.map(lambda x: x.sharding, arguments))
        program.lower()  # the real program accepts them
    assert set(sizes) == set(PHASES)
    resident, waiting = count_resident_memory(run), {"decode": count_waiting_bytes(run)}
    tokens = 8192 + 16 * run.packed_responses * run.settings.rollout.max_new_tokens
    for phase, parts in ARGUMENTS.items():
        counted = sum(resident[phase][part] for part in parts) - waiting.get(phase, 0)
        assert counted <= sizes[phase] <= counted + tokens, phase


@pytest.mark.parametrize("rank", [0, 32], ids=["every weight", "adapters"])
def test_without_a_kl_no_reference_is_planned(rank: int):
    """Neither its pass nor its copy; the base of adapters stays."""
    plans = [
        estimate_plan(plan_paper("8xa6000", "8x1", f"crpo.kl_coef={beta}", f"lora.rank={rank}")) for beta in (0.001, 0)
    ]
    phases = [{phase.name: phase for phase in plan.phases} for plan in plans]
    assert phases[0].keys() - phases[1].keys() == {"reference log-probs"}
    for name, phase in phases[1].items():
        assert ("reference" in phase.memory) == bool(rank)
        saved = 0 if rank else phases[0][name].memory["reference"]
        assert phases[0][name].total - phase.total == pytest.approx(saved), name
    without = compiled.list_update_programs(small := plan_small(4, 2, "crpo.kl_coef=0"), mesh_of(4, 2))
    assert [program.phase for program in without] == [
        name for name in list_phases(small) if name not in ("sampling copy", "prefill", "decode")
    ]
    for program in without:
        program.lower()  # the real programs accept a batch without a reference


def test_one_optimizer_step_needs_no_old_logprobs():
    plan = estimate_plan(plan_paper("8xa6000", "8x1", "crpo.mini_batch_prompts=512"))
    assert "old log-probs" not in {phase.name for phase in plan.phases}


@pytest.mark.parametrize("recorded", FIGURES, ids=lambda row: f"{row['target']}-{row['mesh']}-{row['layout']}")
def test_the_estimate_is_within_a_tenth_of_what_was_compiled(recorded: dict[str, Any]):
    """Recorded by `python -m crpo_jax.plan --json` with the compilers installed."""
    layout = f"parallel.layout={recorded['layout']}"
    run = plan_paper(recorded["target"], recorded["mesh"], layout, *recorded["overrides"])
    waiting = {"decode": count_waiting_bytes(run)}  # exact, and beside the program that was compiled
    totals = {phase.name: phase.total - waiting.get(phase.name, 0.0) for phase in estimate_plan(run).phases}
    assert totals == pytest.approx({name: gib * GIB for name, gib in recorded["gib"].items()}, rel=0.1)


def test_larger_batches_cost_memory():
    """The estimate follows every setting that the verdict can name."""
    run = plan_paper("8xa6000", "8x1")

    def total(phase: str, changes: dict[str, Any]) -> float:
        return sum(estimate_memory(run.with_settings(changes))[phase].values())

    assert total("decode", {"rollout.slots": 64}) < total("decode", {})
    assert total("accumulate", {"parallel.micro_batch_tokens": 4096}) < total("accumulate", {})
    assert total("accumulate", {"parallel.remat": False}) > total("accumulate", {})


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
"""  # noqa: E501


def test_collectives_are_read_with_their_loops_axes_and_bytes():
    collectives = {(kind, axis): (sent, times) for kind, axis, sent, times in hlo.read_collectives(PROGRAM, 4, 2)}
    assert collectives == {
        ("all-reduce", "model"): (12 * 2 * 1 / 2 * 8 * 4 * 4, 12),
        ("reduce-scatter", "data"): (3 / 4 * 64 * 4, 1),
        ("collective-permute", "data"): (5 * 40, 5),
        ("all-reduce", "data, model"): (5 * 2 * 7 / 8 * (4 * 4 + 4 * 2), 5),
        ("all-gather", "data"): (3 / 4 * 16 * 16 * 2, 1),  # one channel, split over two fusions
    }


# ---- cost ------------------------------------------------------------------------------------------------------------


def test_arithmetic_is_what_the_field_counts():
    """6 operations a parameter and token for a step, 8 with remat, plus attention; halved by a second model shard. A
    prompt counts once for its 5 responses, and the vocabulary, 8 at any rate, for responses alone."""
    run = plan_paper("8xa6000", "8x1", "parallel.remat=false", "parallel.attention=xla")
    responses, vocabulary = 512 * 5 / 8 * run.mean_response, 151936 * 2048
    tokens = 512 / 8 * run.mean_prompt + responses
    expected = tokens * 6 * (parameter_count(run.shape) - vocabulary) + responses * 8 * vocabulary
    assert count_work(run)["accumulate"].flops == pytest.approx(expected, rel=0.08)
    assert count_work(run)["accumulate"].flops > expected
    remat = count_work(plan_paper("8xa6000", "8x1", "parallel.attention=xla"))["accumulate"].flops
    assert remat == pytest.approx(count_work(run)["accumulate"].flops * 8 / 6, rel=0.06)
    other = count_work(plan_paper("8xa6000", "4x2", "parallel.attention=xla"))
    assert other["accumulate"].flops == pytest.approx(remat)


def test_more_slots_read_the_weights_less_often():
    few, many = (count_work(plan_paper("h200", "", f"rollout.slots={slots}"))["decode"] for slots in (40, 160))
    assert few.executions == pytest.approx(4 * many.executions)
    assert few.flops == pytest.approx(many.flops)
    assert few.traffic > many.traffic


# ---- search and changes ----------------------------------------------------------------------------------------------


def test_the_changes_make_it_fit():
    run = plan_paper("v5e-16", "16x1")
    assert not estimate_plan(run).fits
    changes = find_changes(run)
    assert changes
    assert estimate_plan(run.with_settings(changes)).fits
    assert find_changes(plan_paper("rtx4090")) is None  # 46 GiB of masters, moments and gradients fit by no batch size


def test_search_ranks_every_possible_mesh_and_layout():
    settings, target = config.load_config(PAPER), parse_target("v5e-16")
    fitting, others, refused = rank_meshes(settings, target)
    assert [plan.bound for plan in fitting] == sorted(plan.bound for plan in fitting)
    assert all(plan.fits for plan in fitting)
    assert not any(plan.fits for plan in others)
    assert (
        len(fitting) + len(others) == len(list_runs(settings, target)[0]) == 4 * len(LAYOUTS) + 1
    )  # 1x16 has no data axis to split over
    assert not refused
    refused = rank_meshes(config.load_config(PAPER, ["model.path=Qwen/Qwen2.5-0.5B"]), parse_target("4xh100")).refused
    assert "expected a model axis that divides the 14 query heads" in refused["1x4 zero1"]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_plan_prints_tables_and_a_verdict(capsys: pytest.CaptureFixture[str]):
    assert plan.main(["--target", "8xa6000", "--mesh", "8x1", "--fast"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0].startswith("Qwen/Qwen2.5-3B-Instruct (3,085,938,688 parameters) on 8xa6000, mesh 8x1")
    assert lines[-1].startswith("fits: decode needs the most memory")
    assert "estimated from shapes; usable 44.54 of 47.54" in out
    rows = [line for line in lines if line.startswith(tuple(PHASES))]
    assert len(rows) >= 2 * len(PHASES)
    assert max(map(len, lines)) <= 150


def test_the_plan_of_a_text_model_says_that_its_folder_holds_more(capsys: pytest.CaptureFixture[str]):
    plan.main(["--target", "8xh100", "--fast", "model.path=google/gemma-3-4b-it"])
    said = "the text model alone: train refuses the hub's folder, which has a vision tower (model_type gemma3)"
    assert said in capsys.readouterr().out.splitlines()
    plan.main(["--target", "8xh100", "--fast", "model.path=Qwen/Qwen3-4B"])
    assert "vision" not in capsys.readouterr().out


def test_what_does_not_fit_names_a_setting_and_exits_with_1(capsys: pytest.CaptureFixture[str]):
    assert plan.main(["--target", "v5e-16", "--mesh", "16x1", "--fast", "--json"]) == 1
    planned = json.loads(capsys.readouterr().out)
    assert planned["fits"] is False
    assert planned["peak_bytes"] > planned["usable_bytes"] == int(15.75 * GIB)
    assert plan.main(["--target", "v5e-16", "--mesh", "16x1", "--fast"]) == 1
    assert "it would fit with rollout.slots=" in capsys.readouterr().out.splitlines()[-1]
    assert plan.main(["--target", "8xa6000", "--layout", "replicated", "--fast"]) == 1
    assert "it would fit with --mesh 8x1 parallel.layout=fsdp" in capsys.readouterr().out.splitlines()[-1]
    assert plan.main(["--target", "rtx4090", "--fast"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith("size fits rtx4090: use more or larger devices")


def test_json_adds_up(capsys: pytest.CaptureFixture[str]):
    plan.main(["--target", "h100x8", "--mesh", "4x2", "--layout", "fsdp", "--fast", "--json", "--search"][:8])
    planned = json.loads(capsys.readouterr().out)
    assert planned["layout"] == "fsdp"
    for phase in planned["phases"]:
        assert sum(phase["memory_bytes"].values()) == pytest.approx(phase["total_bytes"])
        assert phase["seconds"]["bound"] == max(phase["seconds"].values())
    assert planned["peak_bytes"] == max(phase["total_bytes"] for phase in planned["phases"])
    assert planned["bound_seconds"] == pytest.approx(sum(phase["seconds"]["bound"] for phase in planned["phases"]))


def test_search_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "plan.png"
    assert plan.main(["--target", "v6e-8", "--search", "--fast", "--plot", str(picture)]) == 0
    assert "meshes and layouts by least seconds per step" in capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target", "8xa600"], "did you mean 8xa6000?"),
        (
            ["--target", "8xa6000", "--mesh", "4x1"],
            "--mesh 4x1: expected data x model = the 8 devices of 8xa6000, got 4 x 1 = 4",
        ),
        (["--target", "8xa6000", "--mesh", "1x3"], "got 1 x 3 = 3"),
        (["--target", "8xa6000", "--mesh", "eight"], "--mesh: expected DxM in devices"),
        (
            ["--target", "8xa6000", "--layout", "zero9"],
            "parallel.layout: expected zero1, fsdp, replicated, auto or a layout",
        ),
        (["--target", "8xa6000", "--mesh", "8x1", "--search"], "--search: expected no --mesh, since"),
        (["--target", "8xa6000", "--plot", "x.pdf"], "--plot: expected a file that ends in .png"),
        (["--target", "8xa6000", "--plot", "nowhere/x.png"], "--plot nowhere/x.png: no such folder"),
        (["--target", "8xa6000", "--fast", "model.path=Qwen/Qwen3-1B"], "model.path: expected a folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError) as refused:
        plan.main(arguments)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_without_a_compiler_it_names_the_package_and_estimates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(
        plan, "find_missing_compiler", lambda target: f"needs its compiler: pip install 'crpo_jax[{target.extra}]'"
    )
    assert plan.main(["--target", "v6e-8", "--mesh", "4x2"]) == 0
    output = capsys.readouterr()
    assert "crpo_jax[plan-tpu]" in output.err
    assert "estimated from shapes" in output.out


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
def test_a_small_model_compiles_for_a_gpu_that_is_not_attached():
    """Every phase through the real compiler if it is installed, in a new process since plug-ins load once."""
    target = parse_target("2xh100")
    if missing := find_missing_compiler(target):
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
    planned = json.loads(done.stdout)
    assert planned["source"] == "compiled"
    assert {phase["name"] for phase in planned["phases"]} == set(PHASES)
    decode = next(phase for phase in planned["phases"] if phase["name"] == "decode")
    assert any(sent["kind"] == "all-reduce" and sent["axis"] == "model" for sent in decode["collectives"])
