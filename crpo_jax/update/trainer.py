"""The compiled programs of training: log-probs, gradient accumulation and the optimizer step, on one mesh and layout.

Masters, moments and gradients are float32 in the layout's master table; the weights that compute are a copy cast before
every optimizer step (a learning rate of 1e-6 applied to bf16 weights would change nothing).

With LoRA the masters are the adapters alone, and the frozen weights stay in the compute type and table for the whole
run.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from crpo_jax.config import Config, Lora, Optimizer
from crpo_jax.model.adapters import Adapters
from crpo_jax.model.attention import AttentionKind, choose_attention
from crpo_jax.model.lora import Policy, policy_of, trained_shapes, trained_shardings
from crpo_jax.model.packed_attention import Packing
from crpo_jax.model.placement import training_placement, weight_shardings
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.layout import LOGITS_BTV, ROWS_B, TOKENS_BT, find_layout
from crpo_jax.parallel.mesh import data_size, fetch, put
from crpo_jax.update.batches import select_rows
from crpo_jax.update.logprobs import chunk_length, token_logprobs, unpack_responses
from crpo_jax.update.losses import (
    Batch,
    adapted_kl_coef,
    combine_metrics,
    crpo_loss,
    response_kl,
    supervised_loss,
)

Metrics = dict[str, Array]
Loss = Literal["crpo", "supervised"]
EVERY_WEIGHT = Lora(rank=0)


class TrainState(NamedTuple):
    """Everything that an optimizer step reads besides its batch; a checkpoint holds all of it but `frozen`."""

    master: Any  # what is trained, float32: a Transformer, or its Adapters alone
    frozen: Transformer | None  # the start in the compute type: the KL's reference, where there is one, and LoRA's base
    optimizer: Any
    step: Array
    kl_coef: Array  # beta: a constant, or the adaptive controller's current value

    @property
    def policy(self) -> Policy:
        """What the masters compute, for the sampler and for export."""
        return policy_of(self.master, self.frozen)


class Update(NamedTuple):
    """What an optimizer step measured: metrics summed over its micro-batches, the gradient norm before clipping, and 1
    where the step was applied (0: loss or gradient was not finite)."""

    metrics: Metrics
    norm: Array
    applied: Array


def packed(batch: Batch) -> tuple[Array, Array, Packing, Array]:
    """What the model reads of a batch: tokens and targets of its packed rows, what belongs together in them, and where
    responses start."""
    packing = Packing(*(cast(Array, x) for x in (batch.positions, batch.sequences, batch.prompts)))
    return cast(Array, batch.packed_tokens), cast(Array, batch.targets), packing, cast(Array, batch.starts)


def learning_rate(settings: Optimizer, total_steps: int) -> optax.Schedule:
    """The learning rate by optimizer step: a linear warm-up, then constant, cosine or linear to 0 at `total_steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps or int(total_steps * settings.warmup_ratio)
    rest = max(1, total_steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(settings: Optimizer, total_steps: int) -> optax.GradientTransformation:
    """AdamW after a clip by global norm; weight decay on every tensor, as in the authors' trainer.

    Muon's updates are scaled to the size of AdamW's (`consistent_rms`), so that one learning rate serves both.
    """
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    rate = learning_rate(settings, total_steps)
    if settings.algorithm == "muon":
        inner = optax.contrib.muon(
            rate,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            adam_b1=settings.beta1,
            adam_b2=settings.beta2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=muon_dimensions,
            consistent_rms=0.2,
        )
    else:
        inner = optax.adamw(rate, settings.beta1, settings.beta2, settings.eps, weight_decay=settings.weight_decay)
    return optax.chain(clip, inner)


def muon_dimensions(trained: Any) -> Any:
    """Rows and columns of every matrix that Muon trains, None for the others: d, or an adapter's r, against the
    rest."""

    def split(dims: str, letter: str) -> Any:
        width = (dims.index(letter),)
        rest = tuple(i for i, dim in enumerate(dims) if dim not in "l" + letter)
        return MuonDimensionNumbers(*((width, rest) if dims[1] == letter else (rest, width)))

    if isinstance(trained, Adapters):
        return Adapters(trained.weights, trained.scale, lambda dims, _: split(dims, "r"))
    return Transformer(trained.shape, lambda weight: split(weight.stacked_dims, "d") if weight.inputs else None)


class Trainer:
    """The programs for one model on one mesh. Whatever a call replaces is donated to it: state, gradients, metrics.

    `loss` is "crpo" or "supervised"; `lora` of rank 0 trains every weight; `attention` is by default what
    parallel.attention means on the mesh's devices.
    """

    def __init__(
        self,
        shape: Shape,
        mesh: Mesh,
        settings: Config,
        optimizer: Optimizer,
        total_steps: int,
        *,
        loss: Loss,
        lora: Lora = EVERY_WEIGHT,
        attention: AttentionKind | None = None,
    ) -> None:
        self.mesh, self.crpo, self.parallel = mesh, settings.crpo, settings.parallel
        self.loss: Loss = loss
        self.dtype, layout = jnp.dtype(settings.model.dtype), find_layout(settings.parallel.layout)
        kernel = attention or choose_attention(
            settings.parallel.attention, mesh.devices.flat[0].platform, self.dtype, shape.h
        )
        self.placement = training_placement(shape, mesh, kernel)
        self.optimizer = make_optimizer(optimizer, total_steps)
        self.temperature = settings.rollout.temperature if loss == "crpo" else 1.0
        self.shapes = trained_shapes(shape, lora)

        def shard(function: Any, out: Any, donate: tuple[int, ...] = ()) -> Any:
            return jax.jit(function, out_shardings=out, donate_argnums=donate)

        whole = NamedSharding(mesh, P())
        master = trained_shardings(shape, lora, layout.master, mesh)
        self.shardings = TrainState(
            master, None, self._moment_shardings(master, whole), cast(Any, whole), cast(Any, whole)
        )
        self.compute_copy = shard(self._cast, trained_shardings(shape, lora, layout.compute, mesh))
        self.reference_copy = shard(self._cast, weight_shardings(shape, layout.reference, mesh))
        self.initial_state = shard(self._initial_state, self.shardings, (0,))
        self.logprobs = shard(
            lambda policy, batch: self._forward(policy, batch, False)[0], NamedSharding(mesh, TOKENS_BT)
        )
        self.measure = shard(lambda policy, batch: self._loss(policy, batch, self.crpo.kl_coef)[1], whole)
        self.row_kl = shard(lambda batch: response_kl(batch, self.crpo.kl_estimator), whole)
        self.zero = shard(self._zero, (master, whole))
        self.accumulate = shard(self._accumulate, (master, whole), (0, 1))
        self.apply = shard(self._apply, (self.shardings, whole, whole), (0,))

    # ---- what a training loop calls ----------------------------------------------------------------------------------

    def begin(self, master: Any, frozen: Transformer | None = None) -> TrainState:
        """The state before the first step. `frozen` is the base of adapters; a full CRPO run with a KL keeps a copy of
        its start."""
        if frozen is None and self.loss == "crpo" and self.crpo.has_reference:
            frozen = self.reference_copy(master)
        return self.initial_state(master)._replace(frozen=frozen)

    def weights(self, state: TrainState) -> Policy:
        """The weights that compute until the next optimizer step."""
        return policy_of(self.compute_copy(state.master), state.frozen)

    def put_batches(self, batches: Sequence[Batch]) -> list[Batch]:
        """Batches on the devices, rows split over the data axis."""

        def place(value: Any) -> Array:
            return put(value, self.mesh, TOKENS_BT if value.ndim == 2 else ROWS_B)

        return [jax.tree.map(place, batch) for batch in batches]

    def with_logprobs(self, state: TrainState, mini_batches: Sequence[Sequence[Batch]]) -> list[list[Batch]]:
        """A rollout's mini-batches, on the devices, with the log-probs of the reference, where there is a KL, and where
        several optimizer steps follow of the policy that sampled, unless the sampler's serve: for the steps after the
        first, which is on-policy."""
        reference = Policy(cast(Transformer, state.frozen)) if self.crpo.has_reference else None
        several = len(mini_batches) > 1 and self.crpo.old_logprobs == "trainer"
        weights = self.weights(state) if several else None

        def complete(batch: Batch, first: bool) -> Batch:
            if reference is not None:
                batch = batch._replace(reference=self.logprobs(reference, batch))
            if weights is None:
                return batch
            return batch._replace(old=batch.sampler if first else self.logprobs(weights, batch))

        return [[complete(batch, mini == 0) for batch in batches] for mini, batches in enumerate(mini_batches)]

    def kl_penalties(self, state: TrainState, mini_batches: Sequence[Sequence[Batch]], count: int) -> np.ndarray:
        """What kl_in=reward takes off the rewards of a rollout's `count` trained responses, on the host."""
        kl = np.zeros(count)
        for batch in itertools.chain.from_iterable(mini_batches):
            rows, values = fetch((batch.responses, self.row_kl(batch)))
            kl[rows[rows >= 0]] = values[rows >= 0]
        return float(jax.device_get(state.kl_coef)) * kl

    def with_advantages(self, mini_batches: Sequence[Sequence[Batch]], advantages: np.ndarray) -> list[list[Batch]]:
        """The mini-batches with these advantages, one for each of the rollout's trained responses."""

        def replace(batch: Batch) -> Batch:
            new = select_rows(advantages, fetch(batch.responses))
            return batch._replace(advantages=put(new, self.mesh, ROWS_B))

        return [[replace(batch) for batch in batches] for batches in mini_batches]

    def gradients(self, state: TrainState, batches: Sequence[Batch]) -> tuple[Any, Metrics]:
        """Gradients and metrics of a mini-batch, summed over its micro-batches."""
        (gradients, metrics), weights = self.zero(), self.weights(state)
        for batch in batches:
            gradients, metrics = self.accumulate(gradients, metrics, weights, batch, state.kl_coef)
        return gradients, metrics

    def update(self, state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, Update]:
        """One optimizer step on a mini-batch. An update that is not finite changes nothing."""
        gradients, metrics = self.gradients(state, batches)
        updated, norm, applied = self.apply(state._replace(frozen=None), gradients, metrics)
        return updated._replace(frozen=state.frozen), Update(metrics, norm, applied)

    def abstract_state(self) -> TrainState:
        """Shapes and shardings of a state without `frozen`: to restore onto, or to compile for."""
        shapes = jax.eval_shape(self._initial_state, self.shapes)
        return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, self.shardings)

    # ---- the programs ------------------------------------------------------------------------------------------------

    def _moment_shardings(self, master: Any, whole: NamedSharding) -> Any:
        """The masters' shardings for their moments; Muon keeps different ones for different weights."""
        kind, absent = type(self.shapes), optax.MaskedNode

        def like_masters(moments: Any) -> Any:
            if not isinstance(moments, kind):
                return whole
            return jax.tree.map(
                lambda part, to: part if isinstance(part, absent) else to,
                moments,
                master,
                is_leaf=lambda part: isinstance(part, absent),
            )

        moments = jax.eval_shape(self.optimizer.init, self.shapes)
        return jax.tree.map(like_masters, moments, is_leaf=lambda part: isinstance(part, kind))

    def _cast(self, weights: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(self.dtype), weights)

    def _initial_state(self, master: Any) -> TrainState:
        step, kl_coef = jnp.int32(0), jnp.float32(self.crpo.kl_coef)
        return TrainState(master, None, self.optimizer.init(master), step, kl_coef)

    def _forward(self, policy: Policy, batch: Batch, with_entropy: bool) -> tuple[Array, Array]:
        """Log-probs [b, t] of the response tokens, and the entropies of the distributions they come from."""
        model, parallel, (tokens, targets, packing, starts) = (
            self.placement.ends(policy.model),
            self.parallel,
            packed(batch),
        )
        hidden = model(
            tokens,
            packing=packing,
            adapters=policy.adapters,
            placement=self.placement,
            remat=parallel.remat,
            unroll=parallel.unroll,
        )
        constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(self.mesh, LOGITS_BTV))
        measured = token_logprobs(
            model,
            hidden,
            targets,
            self.temperature,
            chunk_length(tokens.shape[1], tokens.shape[0] // data_size(self.mesh), parallel.logprob_chunk),
            with_entropy=with_entropy,
            entropy_gradient=self.crpo.entropy_coef > 0,
            constrain=constrain,
            constrain_gradient=self.placement.output_gradient,
        )
        logprobs, entropy = (unpack_responses(x, starts, batch.tokens.shape[1]) for x in measured)
        return logprobs, entropy

    def _loss(self, policy: Policy, batch: Batch, kl_coef: Array | float) -> tuple[Float[Array, ""], Metrics]:
        logprobs, entropy = self._forward(policy, batch, with_entropy=self.loss == "crpo")
        return self._loss_of(logprobs, entropy, batch, kl_coef)

    def _loss_of(self, logprobs: Array, entropy: Array, batch: Batch, kl_coef: Array | float) -> tuple[Array, Metrics]:
        with jax.named_scope("loss"):
            if self.loss == "supervised":
                return supervised_loss(logprobs, batch)
            return crpo_loss(logprobs, entropy, batch, self.crpo, kl_coef)

    def _zero(self) -> tuple[Any, Metrics]:
        """Gradients and metrics of no rows at all. A loss of one's own may not compute without one: only its metrics'
        shapes are asked for."""
        per_row, per_token = jnp.zeros(1), jnp.zeros((1, 1))
        lengths, tokens = jnp.zeros(1, jnp.int32), jnp.zeros((1, 1), jnp.int32)
        reference = per_token if self.crpo.has_reference else None
        batch = Batch(tokens, lengths, per_row, per_row, per_token, reference)
        metrics = jax.eval_shape(self._loss_of, per_token, per_token, batch, self.crpo.kl_coef)[1]
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), (self.shapes, metrics))

    def _accumulate(
        self, gradients: Any, metrics: Metrics, policy: Policy, batch: Batch, kl_coef: Array
    ) -> tuple[Any, Metrics]:
        trained = policy.model if policy.adapters is None else policy.adapters

        def loss(trained: Any) -> tuple[Array, Metrics]:
            return self._loss(policy_of(trained, policy.model), batch, kl_coef)

        new, measured = jax.grad(loss, has_aux=True)(trained)
        total = jax.tree.map(lambda total, part: total + part.astype(jnp.float32), gradients, new)
        return total, combine_metrics(metrics, measured)

    def _apply(self, state: TrainState, gradients: Any, metrics: Metrics) -> tuple[TrainState, Array, Array]:
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(metrics["sum/loss"])
        with jax.default_matmul_precision("highest" if self.dtype == jnp.float32 else None):  # Muon's products
            changes, moments = self.optimizer.update(gradients, state.optimizer, state.master)
        kl_coef, crpo = state.kl_coef, self.crpo
        if crpo.kl_target and self.loss == "crpo":
            kl_coef = adapted_kl_coef(kl_coef, metrics["sum/kl"], metrics["sum/tokens"], crpo.kl_target, crpo.kl_gain)
        new = TrainState(jax.tree.map(jnp.add, state.master, changes), None, moments, state.step + 1, kl_coef)
        changed = jax.tree.map(lambda fresh, old: jnp.where(finite, fresh, old), new, state)
        return changed, norm, finite.astype(jnp.float32)
