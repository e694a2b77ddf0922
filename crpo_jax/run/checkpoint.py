"""Checkpoints of a run in its workdir, by orbax: what the next step needs that does not follow from the config and the step."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from crpo_jax.config import InputError
from crpo_jax.update.step import TrainState


class Checkpoints:
    """Checkpoints by RL step in `folder`, the newest `keep` of them; written in the background, atomically.

    Batches, keys and schedules are functions of the step, so masters, optimizer and step are all there is to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._folder = folder
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def latest(self) -> int | None:
        """RL steps done at the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def chosen(self, steps_done: int | None) -> int:
        """The checkpoint asked for, or the newest one."""
        kept = list(self._manager.all_steps())
        if not kept or (steps_done is not None and steps_done not in kept):
            raise InputError(f"{self._folder}: expected a checkpoint{'' if steps_done is None else f' of step {steps_done}'}, got {kept or 'none'}")
        return max(kept) if steps_done is None else steps_done

    def save(self, steps_done: int, state: TrainState) -> None:
        if self._manager.latest_step() != steps_done:
            self._manager.save(steps_done, args=ocp.args.StandardSave(as_tree(state)))

    def restore(self, steps_done: int, like: TrainState) -> TrainState:
        """The state after `steps_done` RL steps, placed like `like` (whose memory it does not need any more)."""
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), as_tree(like))
        restored = self._manager.restore(steps_done, args=ocp.args.StandardRestore(wanted))
        return jax.tree.unflatten(jax.tree.structure(like), [restored[name] for name in sorted(restored, key=int)])

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:  # what is still being written is waited for
        self._manager.wait_until_finished()
        self._manager.close()


def as_tree(state: TrainState) -> dict[str, Any]:
    """The state's leaves by number: a form that does not depend on the classes that hold them."""
    return {str(number): leaf for number, leaf in enumerate(jax.tree.leaves(state))}
