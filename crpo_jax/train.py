"""CRPO: sample, score, update, on one mesh. `python -m crpo_jax.train --help` lists every setting."""

import time
from collections.abc import Sequence
from pathlib import Path

import jax

from crpo_jax import cli
from crpo_jax.answer.evaluation import evaluate_held_out, response_means, reward_means
from crpo_jax.answer.rollout import rollout_metrics, sample_rollout, sample_rows
from crpo_jax.config import replaced
from crpo_jax.errors import InputError
from crpo_jax.parallel import processes
from crpo_jax.parallel.mesh import data_size
from crpo_jax.reward.scorer import Scorer, ScoringError
from crpo_jax.runtime import report
from crpo_jax.runtime.compilations import keep_programs
from crpo_jax.runtime.faults import faults_end_in_one_line
from crpo_jax.runtime.fine_tuning import cold_start, cold_start_traces
from crpo_jax.runtime.inputs import model_digests, open_questions, question_digests
from crpo_jax.runtime.replay import replay
from crpo_jax.runtime.run import open_run
from crpo_jax.runtime.runtime import Runtime, open_runtime
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.store.workdir import check_inputs, open_workdir
from crpo_jax.update.batches import crpo_mini_batches
from crpo_jax.update.losses import group_advantages


def train(runtime: Runtime, workdir: Path, *, allow_changes: bool = False) -> None:
    """Runs CRPO to its last step, or resumes it; everything it leaves is in `workdir`."""
    settings, crpo, effective = runtime.settings, runtime.settings.crpo, runtime.vocabulary.effective
    if settings.rollout.temperature == 0:
        raise InputError(
            "rollout.temperature: expected more than 0 to train, got 0: a group's responses would be equal"
        )
    questions, traces = open_questions(runtime), cold_start_traces(runtime, workdir)
    steps, updates_per_step = (
        crpo.steps or questions.batches.steps(crpo.epochs),
        crpo.prompts_per_step // crpo.mini_batch_prompts,
    )
    scorer = Scorer(settings.reward, effective)
    examiner = Scorer(replaced(settings, {"reward.design": "crpo"}).reward, effective)  # all designs have one measure

    with open_workdir(workdir, settings, writes=runtime.writes, changes=allow_changes), scorer, examiner:
        start = cold_start(runtime, workdir, traces, allow_changes=allow_changes)
        if start is None:  # asked to stop during the cold start, which resumes from there
            return
        digests = question_digests(questions) | model_digests(runtime, start)
        check_inputs(workdir, digests, writes=runtime.writes, changes=allow_changes)
        trainer = runtime.trainer("crpo", steps * updates_per_step)
        checkpoints = Checkpoints(workdir / "checkpoints", settings.run.keep, settings.run.keep_best)
        with open_run(runtime, workdir, trainer, runtime.start_state(trainer, start), steps, checkpoints) as run:
            run.progress.keep(report.opening(runtime, run.done, steps, questions, start, workdir))
            for step in run.steps():
                # ---- evaluate: the policy after `step` steps
                policy, measures = runtime.sampler_weights(run.state.policy), {}
                if step in (0, steps) or (settings.run.eval_every and step % settings.run.eval_every == 0):
                    measures = evaluate_held_out(run, policy, questions.held_out, examiner, step)
                if step == steps:
                    run.finish(step, measures)
                    break

                # ---- sample, and score the responses that have ended while the others are decoded
                rollout = None if run.stopping else sample_rollout(runtime, policy, questions, scorer, run, step)
                if (
                    rollout is None
                ):  # asked to stop: the state is that after `step` steps, and this step is repeated the same
                    break
                del policy  # its memory is the update's now

                # ---- update: one optimizer step per mini-batch
                began = time.perf_counter()
                advantages = group_advantages(rollout.rewards, rollout.valid, crpo.advantage).reshape(-1)
                rows, trained = rollout.rows(questions), rollout.trained
                logprobs, counted = (
                    [rollout.responses[i].logprobs for i in trained],
                    rollout.counted(truncated=crpo.truncated == "keep"),
                )
                batches = crpo_mini_batches(
                    rows, logprobs, advantages[trained], counted, settings, data_size(runtime.mesh)
                )
                batches = trainer.with_logprobs(run.state, [trainer.put_batches(micro) for micro in batches])
                updates = []
                for mini_batch in batches:
                    run.state, update = trainer.update(run.state, mini_batch)
                    updates.append(update)
                updates, kl_coef = jax.device_get((updates, run.state.kl_coef))
                seconds = {**rollout.seconds, "update": time.perf_counter() - began}

                # ---- keep
                measures |= reward_means(rollout.scores) | rollout_metrics(rollout) | response_means(rollout.responses)
                measures |= report.update_metrics(updates) | {"kl/coef": float(kl_coef)}
                measures |= report.time_metrics(runtime, rollout.responses, rows, batches, seconds)
                samples, save = (
                    sample_rows(step, rollout, advantages),
                    bool(settings.run.save_every) and (step + 1) % settings.run.save_every == 0,
                )
                run.keep(step, measures, report.step_line(measures), updates, batches, save=save, samples=samples)
    run.conclude(lambda: report.closing(workdir, len(questions.held_out.questions)))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.parser("train", __doc__ or "")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="continue a workdir that holds a run of another config or other data",
    )
    parser.add_argument(
        "--replay", type=int, metavar="STEP", help="examine the batch of a step that was skipped; trains nothing"
    )
    processes.add_flags(parser)
    args = parser.parse_args(arguments)
    with processes.joined("train", args):
        settings, name = cli.for_platform(args, jax.default_backend())
        workdir = Path(args.workdir or f"runs/{name}")
        keep_programs(settings.run.compile_cache)
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
