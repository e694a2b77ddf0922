"""CRPO: sample, score, update, on one mesh. `python -m crpo_jax.train --help` lists every setting."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from crpo_jax import cli
from crpo_jax.answer import evaluation
from crpo_jax.answer.rollout import draw
from crpo_jax.config import Config
from crpo_jax.data.batches import Batches
from crpo_jax.data.question import Question
from crpo_jax.errors import InputError
from crpo_jax.model import lora
from crpo_jax.model.placement import to_sampling
from crpo_jax.parallel import processes
from crpo_jax.parallel.mesh import data_size, make_mesh
from crpo_jax.reward.scorer import Scorer, ScoringError
from crpo_jax.runtime import fine_tuning, report, setup, start
from crpo_jax.runtime.compilations import Compilations, keep_programs
from crpo_jax.runtime.limits import Guard, one_line
from crpo_jax.runtime.progress import Progress
from crpo_jax.runtime.replay import replay
from crpo_jax.runtime.signals import Stop
from crpo_jax.store.checkpoint import Checkpoints
from crpo_jax.store.logs import Log
from crpo_jax.store.workdir import check_inputs, open_workdir
from crpo_jax.update.batches import Row, aligned, micro_batches, of_rows
from crpo_jax.update.losses import group_advantages, row_weights
from crpo_jax.update.trainer import on_devices, trainer

EVALUATION = 2**31 - 1
"""Stands for the step in the keys of held-out evaluations: all of them draw the same random numbers."""


def train(settings: Config, workdir: Path, *, changes: bool = False) -> None:
    """Runs CRPO to its last step, or resumes it; everything it leaves is in `workdir`. `changes` lets another config go on there."""
    if settings.rollout.temperature == 0:
        raise InputError(
            "rollout.temperature: expected more than 0 to train, got 0: all responses of a group would be the same"
        )
    crpo, parallel, seed = settings.crpo, settings.parallel, jax.random.key(settings.run.seed)

    # ---- what the run starts from ----------------------------------------------------------------------------------
    mesh = make_mesh(parallel.mesh)
    settings, shape = setup.shape_for(settings, mesh)
    text = setup.text_for(settings, shape)
    training, held_out = setup.training_questions(settings, text), setup.evaluation_questions(settings, text)
    prompt_of = {question.id: prompt for question, prompt in zip(training.questions, training.prompts, strict=True)}
    batches = Batches(training.questions, crpo.prompts_per_step, settings.run.seed)
    further = Batches(
        training.questions, crpo.prompts_per_step, settings.run.seed, stream="further"
    )  # to replace groups that teach nothing
    steps, updates_per_step = crpo.steps or batches.steps(crpo.epochs), crpo.prompts_per_step // crpo.mini_batch_prompts
    scorer = Scorer(settings.reward, text.effective)
    examiner = Scorer(
        dataclasses.replace(settings.reward, design="crpo"), text.effective
    )  # designs are compared by one measure
    writer = jax.process_index() == 0
    if not settings.model.path and not (workdir / "coldstart").is_dir():
        setup.teacher_traces(settings, text)  # bad ones are refused before anything is made
    held = open_workdir(workdir, settings, writer=writer, allow_changes=changes)
    start.wait_for_workdir(workdir)
    folder = fine_tuning.start_folder(settings, shape, mesh, text, workdir, changes=changes)
    if folder is None:  # asked to stop in the cold start, which goes on from there
        return held.close()
    digests = setup.digests(training, held_out) | setup.model_digests(settings, text, folder)
    check_inputs(workdir, digests, writer=writer, allow_changes=changes)

    # ---- programs and state ----------------------------------------------------------------------------------------
    run = trainer(
        shape, mesh, settings, settings.optimizer, steps * updates_per_step, loss="crpo", adapters=settings.lora
    )
    engine, gather = setup.sampler(settings, shape, mesh, text), to_sampling(shape, mesh, settings.model.dtype)
    masters, frozen = start.trainee(folder, settings, shape, mesh, settings.lora)
    reference, state = run.reference(masters) if frozen is None else frozen, run.begin(masters)
    checkpoints = Checkpoints(workdir / "checkpoints", settings.run.keep, settings.run.keep_best)
    done, logged = checkpoints.find_resume_point()
    if done > steps:
        raise InputError(f"crpo.steps: expected at least the {done} that {workdir} has done, got {steps}")
    if done:
        state = checkpoints.restore(done, state)
    log, progress, stop = Log(workdir, done, logged, writer=writer), Progress(steps, done, speaks=writer), Stop()
    guard, compilations = Guard(settings, workdir, progress.keep), Compilations()
    progress.keep(report.opening(settings, shape, mesh, (done, steps), (training, held_out), folder, workdir))

    finished = False
    with stop, held, log, scorer, examiner, checkpoints:
        for step in range(done, steps + 1):
            if stop.requested:
                break
            # ---- evaluate: the policy after `step` steps -----------------------------------------------------------
            measured: dict[str, float] = {}
            if step in (0, steps) or (settings.run.eval_every and step % settings.run.eval_every == 0):
                key = jax.random.fold_in(seed, EVALUATION)
                answered, means = evaluation.answer(
                    engine,
                    gather(lora.policy(state.master, frozen)),
                    held_out,
                    examiner,
                    text,
                    key,
                    report.sampling(progress, step),
                )
                measured |= {f"eval/{name.split('/')[1]}": value for name, value in means.items()}
                if writer:
                    report.keep_answers(workdir, step, answered)
                progress.keep(f"step {step}/{steps}  {len(answered)} held-out questions: {report.line(means)}")
                if stop.requested and step < steps:  # it is measured again, the same
                    break
            if step == steps:
                log.step(step, measured)
                finished = True
                break

            # ---- sample and score; further questions while too few groups differ in reward, if asked for -------------
            def turn_of(turn: int, step: int = step) -> list[Question]:
                return further.batch(step * crpo.dynamic_sampling + turn - 1) if turn else batches.batch(step)

            policy, key, told = (
                gather(lora.policy(state.master, frozen)),
                jax.random.fold_in(seed, step),
                report.sampling(progress, step),
            )
            drawn = draw(engine, policy, turn_of, prompt_of, scorer, text, key, crpo, stop=stop, progress=told)
            if drawn is None:  # asked to stop: the state is that after `step` steps, and this one comes again the same
                break
            del policy  # its memory is the update's now
            responses, trained, seconds, began = drawn.responses, drawn.trained, drawn.seconds, time.perf_counter()
            advantages = group_advantages(drawn.rewards, drawn.valid, crpo.advantage).reshape(-1)
            counted = drawn.valid.reshape(-1) & np.array(
                [response.stopped or crpo.truncated == "keep" for response in responses]
            )

            # ---- mini-batches, with the log-probs of the reference and of the policy that sampled --------------------
            rows = [
                Row(prompt_of[question.id], response.tokens.tolist())
                for question, response in zip(drawn.questions, responses, strict=True)
            ]
            lengths = np.array([len(response.tokens) for response in responses])
            weights, minis, size, places = (
                run.compute_weights(lora.policy(state.master, frozen)),
                [],
                crpo.mini_batch_prompts * crpo.group_size,
                0,
            )
            for first in range(0, len(trained), size):
                part = trained[first : first + size]
                logprobs, mini = [responses[i].logprobs for i in part], [rows[i] for i in part]
                per_token = row_weights(lengths[part], counted[part], crpo.aggregation, settings.rollout.max_new_tokens)
                micros = micro_batches(
                    mini, budget=parallel.micro_batch_tokens, multiple=parallel.length_multiple, shards=data_size(mesh)
                )
                minis.append([])
                for micro in micros:
                    places += micro.tokens.size
                    batch = on_devices(
                        micro,
                        mesh,
                        sampler=aligned(logprobs, micro),
                        advantages=of_rows(advantages[part], micro.rows),
                        weights=of_rows(per_token, micro.rows),
                    )
                    batch["reference"] = run.logprobs(reference, batch)
                    if updates_per_step > 1:
                        batch["old"] = run.logprobs(weights, batch)
                    minis[-1].append(batch)

            # ---- one optimizer step per mini-batch -------------------------------------------------------------------
            updates = []
            for mini in minis:
                weights = run.compute_weights(lora.policy(state.master, frozen)) if weights is None else weights
                gradients, totals = run.zero()
                for batch in mini:
                    gradients, totals = run.accumulate(gradients, totals, weights, batch, state.kl_coef)
                weights = None  # old and new ones never stand side by side
                state, norm, applied = run.apply(state, gradients, totals)
                del gradients
                updates.append((totals, norm, applied))
            updates, kl_coef = jax.device_get((updates, state.kl_coef))
            seconds["update"] = time.perf_counter() - began

            # ---- keep ------------------------------------------------------------------------------------------------
            measured |= report.step_metrics(drawn.scored, responses, drawn.rewards, updates) | {
                "kl/coef": float(kl_coef)
            }
            useful = [len(rows[i].prompt) + len(rows[i].response) for i in trained]
            passes = (
                5 if updates_per_step > 1 else 4
            )  # forward and backward, the reference's forward, and the old policy's if needed
            measured |= report.timings(seconds, int(lengths.sum()), sum(useful), places)
            measured |= report.utilization(shape, mesh, useful, passes, seconds["update"]) | report.memory(mesh)
            measured["time/compilations"] = compilations.new()
            log.samples(report.sample_rows(step, drawn, advantages))
            log.step(step, measured)
            progress.show(step + 1, report.line(measured))
            guard.updates(step, updates, minis, run, state, frozen)
            guard.measures(step, measured)
            done = step + 1
            if done == steps or (settings.run.save_every and done % settings.run.save_every == 0):
                checkpoints.save(done, state)
            checkpoints.raise_failure()
        if done:
            checkpoints.save(done, state)
    if writer:
        progress.keep(report.closing(workdir, len(held_out.questions)) if finished else report.stopped(done, steps))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = cli.parser("train", __doc__ or "")
    parser.add_argument(
        "--allow-changes",
        action="store_true",
        help="go on in a workdir that holds a run of another config or other data",
    )
    parser.add_argument(
        "--replay",
        type=int,
        metavar="STEP",
        help="look again at the batch of a step that was skipped, and train nothing",
    )
    processes.add_flags(parser)
    args = parser.parse_args(arguments)
    with processes.joined("train", args):
        settings, name = cli.for_platform(args, jax.default_backend())
        workdir = Path(args.workdir or f"runs/{name}")
        keep_programs(settings.run.compile_cache)
        try:
            with one_line("crpo_jax.train"):
                if args.replay is None:
                    train(settings, workdir, changes=args.allow_changes)
                elif (found := replay(settings, workdir, args.replay)) and jax.process_index() == 0:
                    print(found)
        except ScoringError as error:
            raise SystemExit(f"crpo_jax.train: stopped, the reward is at fault: {error}") from None


if __name__ == "__main__":
    cli.run_command("train", main)
