"""CRPO: sample, score, update, on one mesh. `python -m crpo_jax.train --help` lists its settings."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import jax

from crpo_jax import cli
from crpo_jax.answer.evaluation import evaluate_held_out, response_means, reward_means
from crpo_jax.answer.rollout import rollout_metrics, sample_rollout, sample_rows
from crpo_jax.config import default_config_path
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.page.html import keep_page
from crpo_jax.parallel import processes
from crpo_jax.parallel.mesh import data_size
from crpo_jax.reward.design import design_of_evaluations
from crpo_jax.reward.functions import RewardFunction
from crpo_jax.reward.scorer import Scorer, ScoringError
from crpo_jax.runtime import report
from crpo_jax.runtime.compilations import enable_compilation_cache
from crpo_jax.runtime.faults import faults_end_in_one_line
from crpo_jax.runtime.fine_tuning import cold_start, cold_start_traces
from crpo_jax.runtime.inputs import TrainingQuestions, model_digests, open_questions, question_digests
from crpo_jax.runtime.replay import replay
from crpo_jax.runtime.run import TrainingRun, open_run, shared_workdir
from crpo_jax.runtime.runtime import Runtime, open_runtime
from crpo_jax.runtime.same_inputs import require_same_workdir
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.store.workdir import check_inputs
from crpo_jax.update.batches import crpo_mini_batches
from crpo_jax.update.own_loss import check_loss


def train(
    runtime: Runtime,
    workdir: Path,
    *,
    questions: Sequence[Question] | None = None,
    held_out: Sequence[Question] | None = None,
    reward_functions: Mapping[str, RewardFunction] | None = None,
    allow_changes: bool = False,
) -> None:
    """Runs CRPO to its last step, or resumes it; everything it leaves is in `workdir`.

    `questions` and `held_out` replace those of the settings; `reward_functions` are objects that reward.design names.
    """
    settings, crpo, shards = runtime.settings, runtime.settings.crpo, data_size(runtime.mesh)
    if settings.rollout.temperature == 0:
        raise InputError(
            "rollout.temperature: expected more than 0 to train, got 0: a group's responses would be equal"
        )
    check_loss(crpo)
    require_same_workdir(workdir)
    inputs, traces = open_questions(runtime, questions, held_out, workdir), cold_start_traces(runtime, workdir)
    steps = crpo.steps or inputs.batches.steps(crpo.epochs)
    scorer, examiner = open_scorers(runtime, inputs, reward_functions)
    scorer.check_questions(inputs.training.questions)
    # The scorers first: a reward function that cannot be loaded is found before anything is written or computed.
    with scorer, examiner, shared_workdir(runtime, workdir, allow_changes=allow_changes):
        start = cold_start(runtime, workdir, traces, allow_changes=allow_changes)
        if start is None:  # asked to stop during the cold start, which resumes from there
            return
        digests = question_digests(inputs) | model_digests(runtime, start) | scorer.digests()
        check_inputs(workdir, digests, writer=runtime.writes, allow_changes=allow_changes)
        scorer.keep_replies(workdir, f"{jax.process_index()}")
        examiner.keep_replies(workdir, f"held_out_{jax.process_index()}")
        trainer = runtime.trainer("crpo", steps * (crpo.prompts_per_step // crpo.mini_batch_prompts))
        checkpoints = Checkpoints(workdir / "checkpoints", settings.run.keep, settings.run.keep_best)
        state = runtime.start_state(trainer, start)
        with open_run(runtime, workdir, trainer, state, steps, checkpoints) as run:
            del state
            run.progress.write(report.opening(runtime, run.done, steps, inputs, start, workdir))
            for step in run.steps():
                # ---- evaluate: the policy after `step` steps
                policy, measures = runtime.sampler_weights(run.state.policy), {}
                if step in (0, steps) or is_due(step, settings.run.eval_every):
                    measures = evaluate_held_out(run, policy, inputs.held_out, examiner, step)
                if step == steps:
                    run.finish(step, measures)
                    break

                # ---- sample, and score the responses that have ended while the others are decoded
                rollout = None if run.stopping else sample_rollout(runtime, policy, inputs, scorer, run, step)
                if rollout is None:  # asked to stop: the state is that after `step` steps, and this step is repeated
                    break
                del policy  # its memory is the update's now

                # ---- update: one optimizer step per mini-batch
                began, updates = time.perf_counter(), []
                rows, logprobs = rollout.rows(inputs), rollout.trained_logprobs()
                advantages, counted = rollout.advantages(crpo), rollout.counted(truncated=crpo.truncated == "keep")
                batches = crpo_mini_batches(rows, logprobs, advantages, counted, settings, shards)
                batches = trainer.with_logprobs(run.state, [trainer.put_batches(batch) for batch in batches])
                if crpo.kl_in == "reward":
                    advantages = rollout.advantages(crpo, trainer.kl_penalties(run.state, batches, len(rows)))
                    batches = trainer.with_advantages(batches, advantages)
                for mini_batch in batches:
                    run.state, update = trainer.update(run.state, mini_batch)
                    updates.append(update)
                updates, kl_coef = jax.device_get((updates, run.state.kl_coef))
                seconds = {**rollout.seconds, "update": time.perf_counter() - began}

                # ---- keep
                measures |= reward_means(rollout.scores) | rollout_metrics(rollout) | response_means(rollout.responses)
                measures |= report.update_metrics(updates) | {"kl/coef": float(kl_coef)}
                measures |= report.time_metrics(runtime, rollout.responses, rows, batches, seconds)
                samples, save = sample_rows(step, rollout, advantages), is_due(step + 1, settings.run.save_every)
                run.keep(step, measures, report.step_line(measures), updates, batches, samples=samples, save=save)
                if "eval/mean" in measures:
                    renew_page(run)
    renew_page(run)
    run.conclude(lambda: report.closing(workdir, len(inputs.held_out.questions)))


def renew_page(run: TrainingRun) -> None:
    """Writes the page of the run's responses, as they are now."""
    if run.runtime.writes:
        keep_page(run.workdir, run.progress.write)


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def open_scorers(
    runtime: Runtime, inputs: TrainingQuestions, functions: Mapping[str, RewardFunction] | None
) -> tuple[Scorer, Scorer]:
    """The run's reward, and that of held-out responses."""
    reward, effective = runtime.settings.reward, runtime.vocabulary.effective
    held_out = replace(reward, design=design_of_evaluations(reward, inputs.held_out.questions))
    return Scorer(reward, effective, functions), Scorer(held_out, effective, functions)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.build_parser("train", __doc__ or "", lambda model: default_config_path(jax.default_backend(), model))
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue a workdir that holds a run of another config or other data",
    )
    parser.add_argument(
        "--replay", type=int, metavar="STEP", help="examine the batch of a step that was skipped; trains nothing"
    )
    processes.add_process_flags(parser)
    args = parser.parse_args(arguments)
    with processes.join_processes("train", args):
        settings, name = cli.load_platform_settings(args, jax.default_backend())
        workdir = Path(args.workdir or f"runs/{name}")
        enable_compilation_cache(settings.run.compile_cache)
        try:
            with faults_end_in_one_line("crpo_jax.train"):
                if args.replay is None:
                    train(open_runtime(settings), workdir, allow_changes=args.allow_changes)
                elif (lines := replay(settings, workdir, args.replay)) and jax.process_index() == 0:
                    print(lines)
        except ScoringError as error:
            raise SystemExit(f"crpo_jax.train: stopped, the reward is at fault: {error}") from None


if __name__ == "__main__":
    cli.run_command("train", main)
