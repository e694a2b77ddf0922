"""The compiled programs of training: log-probs, gradient accumulation and the optimizer step, on one mesh and layout.

Masters, moments and gradients are float32 in the layout's master table; the weights that compute are a cast copy made
once per optimizer step (lr 1e-6 applied to bf16 weights would change nothing).

With LoRA the masters are the adapters alone. The frozen weights lie in the compute type and table for the whole run, so
that nothing but adapters ever moves; without the adapters they are the reference.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float
from optax.contrib import MuonDimensionNumbers

from crpo_jax import config
from crpo_jax.model import lora
from crpo_jax.model.attention import Implementation, implementation
from crpo_jax.model.lora import Adapted, Adapters
from crpo_jax.model.placement import training_placement, weight_shardings
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Qwen2, abstract, hidden_states
from crpo_jax.parallel.layout import LAYOUTS, LOGITS_BTV, ROWS_B, TOKENS_BT, WeightTable
from crpo_jax.parallel.mesh import data_size, put
from crpo_jax.update.batches import MicroBatch
from crpo_jax.update.logprobs import chunk_length, token_logprobs
from crpo_jax.update.losses import adapted, combined, crpo_loss, supervised_loss

Batch = dict[str, Array]

PER_ROW: tuple[str, ...] = ("prompt_lengths", "lengths", "advantages", "weights")
PER_TOKEN: tuple[str, ...] = ("tokens", "old", "reference", "sampler")
"""What a CRPO micro-batch holds: [b] and [b, t]."""


class TrainState(NamedTuple):
    """What an optimizer step changes."""

    master: Any  # Qwen2, or its Adapters alone
    optimizer: Any
    step: Array
    kl_coef: Array  # beta: a constant, or what the adaptive controller made of it


class Trainer(NamedTuple):
    """Jitted programs; every argument that is rebuilt by a call is donated to it.

    begin(master) -> TrainState
    compute_weights(master, or frozen weights with adapters on them) -> the same in the compute type and table
    reference(master) -> Qwen2 in the compute type and reference table
    logprobs(weights, batch) -> log-probs [b, t] of the next tokens
    zero() -> (gradients, metrics) of no rows at all, to accumulate into
    accumulate(gradients, metrics, weights, batch[, kl_coef]) -> (gradients, metrics) with one more micro-batch
    evaluate(weights, batch) -> the metrics alone
    apply(state, gradients[, metrics]) -> (state, gradient norm, 1.0 where the step was applied); metrics steer the KL coefficient
    """

    begin: Callable[..., TrainState]
    compute_weights: Callable[..., Any]
    reference: Callable[..., Qwen2]
    logprobs: Callable[..., Array]
    zero: Callable[..., tuple[Any, dict[str, Array]]]
    accumulate: Callable[..., tuple[Any, dict[str, Array]]]
    evaluate: Callable[..., dict[str, Array]]
    apply: Callable[..., tuple[TrainState, Array, Array]]
    states: TrainState  # the sharding of every part of a state, to compile for or to restore onto


def schedule(settings: config.Optimizer, total_steps: int) -> optax.Schedule:
    """The learning rate by optimizer step: a linear warm-up, then constant, cosine or linear to 0 at `total_steps`."""
    peak, warmup = settings.learning_rate, settings.warmup_steps
    rest = max(1, total_steps - warmup)
    after = {
        "constant": optax.constant_schedule(peak),
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
    }[settings.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def optimizer(settings: config.Optimizer, total_steps: int) -> optax.GradientTransformation:
    """AdamW behind a clip by global norm; weight decay on every tensor, as the authors' trainer has it.

    Muon's updates are scaled to the size of AdamW's (`consistent_rms`), so that one learning rate serves both.
    """
    clip = optax.clip_by_global_norm(settings.clip_norm) if settings.clip_norm else optax.identity()
    rate = schedule(settings, total_steps)
    if settings.algorithm == "muon":
        inner = optax.contrib.muon(
            rate,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            adam_b1=settings.beta1,
            adam_b2=settings.beta2,
            adam_weight_decay=settings.weight_decay,
            muon_weight_dimension_numbers=matrices,
            consistent_rms=0.2,
        )
    else:
        inner = optax.adamw(rate, settings.beta1, settings.beta2, settings.eps, weight_decay=settings.weight_decay)
    return optax.chain(clip, inner)


def like_masters(moments: Any, shardings: Any) -> Any:
    """The masters' shardings for the moments that there are: an optimizer made of two keeps each for its own weights."""
    absent = optax.MaskedNode
    return jax.tree.map(
        lambda part, to: part if isinstance(part, absent) else to,
        moments,
        shardings,
        is_leaf=lambda part: isinstance(part, absent),
    )


def matrices(trained: Any) -> Any:
    """Which axes of a stacked weight are its rows and columns: d, or an adapter's r, and the rest. None for what is no matrix of a block."""

    def of(dims: str, letter: str) -> Any:
        width, rest = (dims.index(letter),), tuple(i for i, other in enumerate(dims) if other not in "l" + letter)
        return MuonDimensionNumbers(*((width, rest) if dims[1] == letter else (rest, width)))

    if isinstance(trained, Adapters):
        return Adapters(lambda _, dims, __: of(dims, "r"), trained.weights, trained.scale)

    def axes(name: str, dims: str) -> Any:
        return None if dims[0] != "l" or "norm" in name or "bias" in name else of(dims, "d")

    return Qwen2(axes, tied=trained.tied)


def response_mask(batch: Batch) -> Array:
    """Where position j predicts a token of the response: prompt - 1 <= j < length - 1. From lengths, never from token ids."""
    position = jnp.arange(batch["tokens"].shape[1])
    return (position >= batch["prompt_lengths"][:, None] - 1) & (position < batch["lengths"][:, None] - 1)


def on_devices(micro: MicroBatch, mesh: Mesh, **extra: np.ndarray) -> Batch:
    """A micro-batch and per-row or per-token extras, rows split over the data axis."""
    arrays = {"tokens": micro.tokens, "prompt_lengths": micro.prompt_lengths, "lengths": micro.lengths, **extra}
    return {name: put(value, mesh, TOKENS_BT if value.ndim == 2 else ROWS_B) for name, value in arrays.items()}


FULL = config.Lora(rank=0)


def trainer(
    shape: Shape,
    mesh: Mesh,
    settings: config.Config,
    optimizer_settings: config.Optimizer,
    total_steps: int,
    *,
    loss: str,
    adapters: config.Lora = FULL,
    attention: Implementation | None = None,
) -> Trainer:
    """The programs for one model on one mesh; `loss` is "crpo" or "supervised", `adapters` of rank 0 trains every parameter, and
    `attention` is by default what parallel.attention says.

    A CRPO batch brings `old` (where a rollout has several optimizer steps), `reference`, `sampler` [b, t], `advantages` and
    `weights` [b]; a supervised one only `weights`. Entropy is a metric always and a bonus where its coefficient is not 0.
    """
    layout, parallel = LAYOUTS[settings.parallel.layout], settings.parallel
    dtype = jnp.dtype(settings.model.dtype)
    attention = attention or implementation(parallel.attention, mesh.devices.flat[0].platform, dtype, shape.h)
    place = training_placement(shape, mesh, attention)
    update: Any = optimizer(optimizer_settings, total_steps)
    temperature = settings.rollout.temperature if loss == "crpo" else 1.0
    whole = NamedSharding(mesh, jax.sharding.PartitionSpec())

    def shardings(table: WeightTable) -> Any:
        return lora.shardings(shape, adapters, table, mesh) if adapters.rank else weight_shardings(shape, table, mesh)

    master = shardings(layout.master)
    trained = lora.abstract(shape, adapters) if adapters.rank else abstract(shape)
    moments = jax.tree.map(
        lambda part: like_masters(part, master) if isinstance(part, type(trained)) else whole,
        jax.eval_shape(update.init, trained),
        is_leaf=lambda part: isinstance(part, type(trained)),
    )
    states: Any = TrainState(master, moments, cast(Any, whole), cast(Any, whole))
    crpo = settings.crpo
    by_token = crpo.ratio == "token"
    clip_low, clip_high = (
        (crpo.clip_low, crpo.clip_high) if by_token else (crpo.sequence_clip_low, crpo.sequence_clip_high)
    )

    def converted(weights: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), weights)

    def outputs(policy: Qwen2 | Adapted, batch: Batch, with_entropy: bool) -> tuple[Array, Array]:
        model, low = policy if isinstance(policy, Adapted) else (policy, None)
        weights = place.ends(model)
        b, t = batch["tokens"].shape
        how = {"placement": place, "remat": parallel.remat, "unroll": parallel.unroll}
        hidden = hidden_states(weights, batch["tokens"], shape, adapters=low, **how)
        targets = jnp.pad(batch["tokens"][:, 1:], ((0, 0), (0, 1)))
        chunk = chunk_length(t, b // data_size(mesh), parallel.logprob_chunk)
        constrain = functools.partial(jax.lax.with_sharding_constraint, shardings=NamedSharding(mesh, LOGITS_BTV))
        bonus = crpo.entropy_coef > 0
        return token_logprobs(
            weights,
            hidden,
            targets,
            temperature,
            chunk,
            with_entropy=with_entropy,
            entropy_gradient=bonus,
            constrain=constrain,
        )

    def loss_of(
        logprobs: Array, entropy: Array, batch: Batch, kl_coef: Array | float
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        mask = response_mask(batch) & (batch["weights"] > 0)[:, None]
        if loss == "supervised":
            return supervised_loss(logprobs, mask, batch["weights"])
        return crpo_loss(
            logprobs,
            entropy,
            batch.get("old", jax.lax.stop_gradient(logprobs)),  # one optimizer step per rollout: the ratio is 1
            batch["reference"],
            batch["sampler"],
            mask,
            batch["advantages"],
            batch["weights"],
            ratio=crpo.ratio,
            clip_low=clip_low,
            clip_high=clip_high,
            kl_coef=kl_coef,
            entropy_coef=crpo.entropy_coef,
        )

    def losses(
        policy: Qwen2 | Adapted, batch: Batch, kl_coef: Array | float
    ) -> tuple[Float[Array, ""], dict[str, Array]]:
        return loss_of(*outputs(policy, batch, with_entropy=loss == "crpo"), batch, kl_coef)

    def zero() -> tuple[Any, dict[str, Array]]:
        rows, tokens = jnp.zeros(0), jnp.zeros((0, 0))
        nothing: Batch = dict.fromkeys(PER_ROW, rows) | dict.fromkeys(PER_TOKEN, tokens)
        gradients = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), trained)
        return gradients, loss_of(tokens, tokens, nothing, crpo.kl_coef)[1]

    def accumulate(
        gradients: Any,
        metrics: dict[str, Array],
        policy: Qwen2 | Adapted,
        batch: Batch,
        kl_coef: Array | float = crpo.kl_coef,
    ) -> tuple[Any, dict[str, Array]]:
        own, frozen = (policy.adapters, policy.base) if isinstance(policy, Adapted) else (policy, None)
        new, measured = jax.grad(lambda own: losses(lora.policy(own, frozen), batch, kl_coef), has_aux=True)(own)
        return jax.tree.map(lambda total, part: total + part.astype(jnp.float32), gradients, new), combined(
            metrics, measured
        )

    def apply(
        state: TrainState, gradients: Any, metrics: dict[str, Array] | None = None
    ) -> tuple[TrainState, Array, Array]:
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & (True if metrics is None else jnp.isfinite(metrics["sum/loss"]))
        changes, moments = update.update(gradients, state.optimizer, state.master)
        kl_coef = state.kl_coef
        if crpo.kl_target and metrics is not None:
            kl_coef = adapted(kl_coef, metrics["sum/kl"], metrics["sum/tokens"], crpo.kl_target, crpo.kl_gain)
        new = TrainState(jax.tree.map(jnp.add, state.master, changes), moments, state.step + 1, kl_coef)
        return (
            jax.tree.map(lambda fresh, old: jnp.where(finite, fresh, old), new, state),
            norm,
            finite.astype(jnp.float32),
        )

    def jitted(function: Any, out: Any, donate: tuple[int, ...] = ()) -> Any:
        return jax.jit(function, out_shardings=out, donate_argnums=donate)

    in_compute_type = jitted(converted, shardings(layout.compute))
    return Trainer(
        begin=jitted(
            lambda weights: TrainState(weights, update.init(weights), jnp.int32(0), jnp.float32(crpo.kl_coef)),
            states,
            (0,),
        ),
        compute_weights=(lambda policy: policy._replace(adapters=in_compute_type(policy.adapters)))
        if adapters.rank
        else in_compute_type,
        reference=jitted(converted, weight_shardings(shape, layout.reference, mesh)),
        logprobs=jitted(
            lambda weights, batch: outputs(weights, batch, with_entropy=False)[0], NamedSharding(mesh, TOKENS_BT)
        ),
        zero=jitted(zero, (master, whole)),
        accumulate=jitted(accumulate, (master, whole), (0, 1)),
        evaluate=jitted(lambda weights, batch: losses(weights, batch, crpo.kl_coef)[1], whole),
        apply=jitted(apply, (states, whole, whole), (0,)),
        states=states,
    )
