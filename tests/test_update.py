"""The optimizer step on every mesh and layout against one written out: plain forward, log_softmax, AdamW in numpy."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import SHAPE, mesh_of, one_micro_batch, placed
from jax.sharding import Mesh

from crpo_jax import config
from crpo_jax.model.lora import Policy, initial_adapters
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.layout import LAYOUTS
from crpo_jax.parallel.mesh import DATA, data_size
from crpo_jax.update.batches import (
    MicroBatch,
    Row,
    align_to_tokens,
    crpo_mini_batches,
    make_batch,
    micro_batches,
    supervised_batches,
)
from crpo_jax.update.losses import Batch, response_mask, row_weights
from crpo_jax.update.trainer import Loss, Trainer, TrainState, learning_rate, make_optimizer

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("quick_compiles")]

SETTINGS = config.load_config(
    None,
    [
        "model.dtype=float32",
        "rollout.temperature=0.8",
        "crpo.clip_low=0.1",
        "crpo.clip_high=0.15",
        "crpo.kl_coef=0.2",
        "crpo.entropy_coef=0.1",
        "optimizer.learning_rate=0.01",
        "optimizer.weight_decay=0.3",
        "optimizer.clip_norm=0.5",
        "optimizer.beta1=0.8",
        "optimizer.beta2=0.95",
        "optimizer.eps=0.01",  # beside gradients of about 0.005, so that Adam's division does not blow up rounding
        "parallel.remat=false",
        "parallel.logprob_chunk=32",
        "parallel.length_multiple=4",
        "rollout.max_new_tokens=16",
    ],
    model=False,
)
KL_COEF = np.float32(SETTINGS.crpo.kl_coef)


def settings_with(**overrides: Any) -> config.Config:
    """SETTINGS with `section__key` replaced."""
    return config.replaced(SETTINGS, {name.replace("__", "."): value for name, value in overrides.items()})


@functools.cache
def trainer_of(
    mesh: Mesh,
    settings: config.Config = SETTINGS,
    loss: Loss = "crpo",
    lora: config.Lora = config.Lora(rank=0),  # noqa: B008 (frozen)
) -> Trainer:
    return Trainer(SHAPE, mesh, settings, settings.optimizer, 100, loss=loss, lora=lora)


# --- a mini-batch -----------------------------------------------------------------------------------------------------


class Mini(NamedTuple):
    """The rows of a mini-batch with their advantages and weights, and each response's log-probs from three policies."""

    rows: list[Row]
    advantages: np.ndarray
    weights: np.ndarray
    old: list[np.ndarray]
    reference: list[np.ndarray]
    sampler: list[np.ndarray]


def mini_batch(seed: int) -> Mini:
    """7 responses, one of which does not count. The log-probs are still differences from the policy's."""
    rng = np.random.default_rng(seed)
    lengths = [(3, 4), (1, 9), (6, 1), (2, 10), (5, 5), (1, 1), (4, 12)]
    rows = [Row(rng.integers(SHAPE.v, size=p).tolist(), rng.integers(SHAPE.v, size=r).tolist()) for p, r in lengths]
    counted = np.array([True, True, True, False, True, True, True])
    weights = row_weights(np.array([r for _, r in lengths]), counted, "token_mean")

    def differences(deviation: float) -> list[np.ndarray]:
        return [np.float32(rng.normal(size=len(row.response)) * deviation) for row in rows]

    advantages = np.float32(rng.normal(size=7) * 2)
    return Mini(rows, advantages, weights, differences(0.2), differences(0.5), differences(0.01))


def with_policy_logprobs(mini: Mini, model: Transformer) -> Mini:
    """The mini-batch with its differences added to the log-probs of `model`, so that ratios lie around 1."""
    tokens, mask = padded(mini.rows)
    logprobs = np.asarray(next_token_logprobs(model, tokens))
    own = [logprobs[i][mask[i]] for i in range(len(mini.rows))]

    def absolute(differences: list[np.ndarray]) -> list[np.ndarray]:
        return [difference + base for difference, base in zip(differences, own, strict=True)]

    return mini._replace(old=absolute(mini.old), reference=absolute(mini.reference), sampler=absolute(mini.sampler))


@pytest.fixture(scope="module")
def minis(model: Transformer) -> list[Mini]:
    return [with_policy_logprobs(mini_batch(seed), model) for seed in (0, 1, 2)]


def batch_of(mini: Mini, micro: MicroBatch, mesh: Mesh) -> Batch:
    """The rows of a micro-batch on the devices, with the log-probs of all three policies."""
    batch = make_batch(micro, mini.weights, mini.advantages, align_to_tokens(mini.sampler, micro))
    reference, old = (align_to_tokens(values, micro) for values in (mini.reference, mini.old))
    (on_devices,) = trainer_of(mesh).put_batches([batch._replace(reference=reference, old=old)])
    return on_devices


def whole(mini: Mini, mesh: Mesh) -> Batch:
    """All rows of a mini-batch as one micro-batch."""
    return batch_of(mini, one_micro_batch(mini.rows, mesh), mesh)


def initial_state(trainer: Trainer, model: Transformer, mesh: Mesh, layout: str = "zero1") -> TrainState:
    return trainer.begin(placed(model, weight_shardings(SHAPE, LAYOUTS[layout].master, mesh)))


def apply(trainer: Trainer, state: TrainState, gradients: Any, metrics: Any) -> tuple[TrainState, jax.Array, jax.Array]:
    """The optimizer step on given gradients: the new state, the gradients' norm, and whether they were applied."""
    updated, norm, applied = trainer.apply(state._replace(frozen=None), gradients, metrics)
    return updated._replace(frozen=state.frozen), norm, applied


# --- the same written out ---------------------------------------------------------------------------------------------


def padded(rows: Sequence[Row]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [b, 16], and where a token of the response is predicted."""
    tokens, mask = np.zeros((len(rows), 16), np.int32), np.zeros((len(rows), 16), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row.prompt) + len(row.response)] = [*row.prompt, *row.response]
        mask[i, len(row.prompt) - 1 : len(row.prompt) - 1 + len(row.response)] = True
    return tokens, mask


def distributions(model: Transformer, tokens: Any, temperature: float = SETTINGS.rollout.temperature) -> jax.Array:
    return jax.nn.log_softmax(model.logits(model(tokens)) / temperature)


def chosen(logprobs: jax.Array, tokens: Any) -> jax.Array:
    """Of [b, t, v], those of the next tokens."""
    return jnp.take_along_axis(logprobs, jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))[..., None], axis=-1)[..., 0]


@jax.jit
def next_token_logprobs(model: Transformer, tokens: jax.Array) -> jax.Array:
    return chosen(distributions(model, tokens), tokens)


def written_out(model: Transformer, mini: Mini) -> tuple[float, Transformer]:
    """Equation 1 with PPO-clip and an entropy bonus, and its gradient; a sum over all tokens at once."""
    tokens, mask = padded(mini.rows)
    c = SETTINGS.crpo

    def scattered(parts: list[np.ndarray]) -> np.ndarray:
        out = np.zeros(mask.shape, np.float32)
        out[mask] = np.concatenate(parts)
        return out

    @jax.jit
    @jax.value_and_grad
    def loss(model: Transformer, old: jax.Array, reference: jax.Array) -> Any:
        logprobs = distributions(model, tokens)
        logprob = chosen(logprobs, tokens)
        ratio, gap, advantage = jnp.exp(logprob - old), reference - logprob, mini.advantages[:, None]
        policy = jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - c.clip_low, 1 + c.clip_high) * advantage)
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        each = policy - c.kl_coef * (jnp.exp(gap) - gap - 1) + c.entropy_coef * entropy
        return -jnp.sum(jnp.where(mask, each, 0) * mini.weights[:, None])

    value, gradient = loss(model, scattered(mini.old), scattered(mini.reference))
    return float(value), gradient


def flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in jax.tree.leaves(tree)])


def like(values: np.ndarray, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    parts = np.split(values, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return jax.tree.unflatten(
        structure, [jnp.float32(part.reshape(leaf.shape)) for part, leaf in zip(parts, leaves, strict=True)]
    )


def steps_written_out(model: Transformer, minis: Sequence[Mini]) -> tuple[list[np.ndarray], list[float], np.ndarray]:
    """Gradients, losses and the parameters after AdamW steps on them, in float64."""
    o = SETTINGS.optimizer
    parameters, first, second = flat(model), 0.0, 0.0
    gradients, losses = [], []
    for step, mini in enumerate(minis, 1):
        loss, tree = written_out(like(parameters, model), mini)
        gradient = flat(tree)
        gradients.append(gradient)
        losses.append(loss)
        clipped = gradient * min(1.0, o.clip_norm / np.linalg.norm(gradient))
        first, second = o.beta1 * first + (1 - o.beta1) * clipped, o.beta2 * second + (1 - o.beta2) * clipped**2
        change = first / (1 - o.beta1**step) / (np.sqrt(second / (1 - o.beta2**step)) + o.eps)
        parameters = parameters - o.learning_rate * (change + o.weight_decay * parameters)
    return gradients, losses, parameters


@pytest.fixture(scope="module")
def expected(model: Transformer, minis: list[Mini]) -> tuple[list[np.ndarray], list[float], np.ndarray]:
    return steps_written_out(model, minis)


def assert_same_gradient(gradient: Any, expected: np.ndarray) -> None:
    """To 1e-4 of each number, and of the largest for those that are smaller still."""
    np.testing.assert_allclose(flat(gradient), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


# --- the same answer on every mesh and layout -------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_optimizer_steps_on_every_layout(
    mesh: Mesh,
    layout: str,
    model: Transformer,
    minis: list[Mini],
    expected: tuple[list[np.ndarray], list[float], np.ndarray],
):
    """Contract 2: loss, gradients and parameters; everything stays where the layout says, float32."""
    settings = settings_with(
        parallel__layout=layout, parallel__remat=layout == "fsdp", parallel__unroll=layout == "replicated"
    )
    trainer = trainer_of(mesh, settings)
    state = initial_state(trainer, model, mesh, layout)
    expected_gradients, expected_losses, expected_parameters = expected
    shardings = jax.tree.leaves(weight_shardings(SHAPE, LAYOUTS[layout].master, mesh))
    for step, mini in enumerate(minis):
        batch = whole(mini, mesh)
        gradients, _ = trainer.gradients(state, [batch])
        if step == 0:
            assert_same_gradient(gradients, expected_gradients[0])
        assert_placed(gradients, shardings)
        state, update = trainer.update(state, [batch])
        assert float(update.metrics["sum/loss"]) == pytest.approx(expected_losses[step], rel=1e-3)
        assert float(update.norm) == pytest.approx(np.linalg.norm(expected_gradients[step]), rel=1e-3)
        assert float(update.applied) == 1
    assert float(update.norm) > SETTINGS.optimizer.clip_norm  # the clip was at work
    np.testing.assert_allclose(flat(state.master), expected_parameters, rtol=0, atol=2e-5)
    assert np.abs(expected_parameters - flat(model)).max() > 1e-3
    assert int(state.step) == 3
    assert_placed(state.master, shardings)
    assert len(named_weights(state.optimizer)) == 2 * len(shardings)
    assert_moments_beside_their_weights(state)


def assert_placed(tree: Any, shardings: Sequence[Any]) -> None:
    for leaf, sharding in zip(jax.tree.leaves(tree), shardings, strict=True):
        assert leaf.dtype == jnp.float32
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


def named_weights(tree: Any) -> list[tuple[str, jax.Array]]:
    """Every array of a tree that is a weight, or belongs to one, with the weight's name."""
    leaves = [(jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    return [(weight.name, leaf) for path, leaf in leaves for weight in SHAPE.weights if f".{weight.name}" in path]


def assert_moments_beside_their_weights(state: TrainState) -> None:
    weights = dict(named_weights(state.master))
    for name, leaf in named_weights(state.optimizer):
        assert leaf.dtype == jnp.float32, name
        assert leaf.shape == weights[name].shape, name
        assert leaf.sharding.is_equivalent_to(weights[name].sharding, leaf.ndim), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compute_and_reference_weights_are_casts_in_their_layout(layout: str, model: Transformer):
    mesh = mesh_of(4, 2)
    trainer = trainer_of(mesh, settings_with(parallel__layout=layout, model__dtype="bfloat16"))
    master = placed(model, weight_shardings(SHAPE, LAYOUTS[layout].master, mesh))
    for copy, axes in (
        (trainer.compute_copy(master), LAYOUTS[layout].compute),
        (trainer.reference_copy(master), LAYOUTS[layout].reference),
    ):
        shardings = weight_shardings(SHAPE, axes, mesh)
        for leaf, original, sharding in zip(*map(jax.tree.leaves, (copy, model, shardings)), strict=True):
            assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
            np.testing.assert_array_equal(leaf, original.astype(jnp.bfloat16))


# --- gradient accumulation --------------------------------------------------------------------------------------------


def accumulate(trainer: Trainer, policy: Policy, batches: Sequence[Batch]) -> tuple[Transformer, dict[str, float]]:
    """Gradients and metrics of all batches together."""
    gradients, metrics = trainer.zero()
    for batch in batches:
        gradients, metrics = trainer.accumulate(gradients, metrics, policy, batch, KL_COEF)
    return gradients, as_floats(metrics)


def as_floats(metrics: dict[str, jax.Array]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def renumbered(micro: MicroBatch, numbers: Sequence[int]) -> MicroBatch:
    """A micro-batch of some rows, by their numbers among all."""
    return micro._replace(rows=np.where(micro.rows >= 0, np.array(numbers)[micro.rows], -1))


def policy_on(model: Transformer, mesh: Mesh) -> Policy:
    """A copy of the model where layout zero1 computes."""
    return Policy(placed(model, weight_shardings(SHAPE, LAYOUTS["zero1"].compute, mesh)))


@pytest.mark.slow
@pytest.mark.parametrize(("sizes", "split"), [((1, 1), "by budget"), ((2, 4), "pairs")])
def test_any_split_of_the_mini_batch_gives_the_same_gradient(
    sizes: tuple[int, int],
    split: str,
    model: Transformer,
    minis: list[Mini],
    expected: tuple[list[np.ndarray], list[float], np.ndarray],
):
    """Contract 5: rows in any order and grouping, filling at the end: one gradient, one set of metrics."""
    mesh, mini = mesh_of(*sizes), minis[0]
    trainer, policy = trainer_of(mesh), policy_on(model, mesh)
    _, metrics_of_whole = accumulate(trainer, policy, [whole(mini, mesh)])
    if split == "pairs":
        pairs = ([3, 0], [5, 6], [1, 4], [2])
        micros = [renumbered(one_micro_batch([mini.rows[i] for i in pair], mesh), pair) for pair in pairs]
    else:
        micros = micro_batches(mini.rows, budget=20, multiple=4, shards=mesh.shape[DATA], longest=16)
        assert len(micros) > 2
    gradients, metrics = accumulate(trainer, policy, [batch_of(mini, micro, mesh) for micro in micros])
    assert_same_gradient(gradients, expected[0][0])
    assert metrics == pytest.approx(metrics_of_whole, rel=1e-4, abs=1e-5)


def test_rows_that_do_not_count_move_nothing(model: Transformer, minis: list[Mini], one_device: Mesh):
    """Weight 0 removes a row, whatever its advantage and log-probs are."""
    trainer, mini, policy = trainer_of(one_device), minis[0], policy_on(model, one_device)
    assert mini.weights[3] == 0
    absurd = mini._replace(
        advantages=np.where(np.arange(7) == 3, np.float32(1e30), mini.advantages),
        reference=[values * (1e30 if i == 3 else 1) for i, values in enumerate(mini.reference)],
    )
    gradients, metrics = accumulate(trainer, policy, [whole(mini, one_device)])
    absurd_gradients, absurd_metrics = accumulate(trainer, policy, [whole(absurd, one_device)])
    np.testing.assert_array_equal(flat(absurd_gradients), flat(gradients))
    assert absurd_metrics == metrics
    assert metrics["sum/tokens"] == sum(len(row.response) for i, row in enumerate(mini.rows) if i != 3)


def test_the_mask_comes_from_lengths():
    """A response of zeros, which is the id of padding too, a response of one token, and a row of filling."""
    tokens, lengths = np.array([[0, 0, 0], [0, 0, 0], [0, 0, 0]]), np.array([2, 1, 0])
    batch = Batch(jnp.int32(tokens), jnp.int32(lengths), weights=jnp.ones(3))
    assert response_mask(batch).astype(int).tolist() == [[1, 1, 0], [1, 0, 0], [0, 0, 0]]


# --- the ratio --------------------------------------------------------------------------------------------------------


def test_with_learning_rate_0_the_ratio_is_1_and_nothing_moves(model: Transformer, minis: list[Mini]):
    """Contract 3: the trainer's old log-probs are its new ones, through another program and after an optimizer step."""
    mesh = mesh_of(2, 4)
    trainer = trainer_of(mesh, settings_with(optimizer__learning_rate=0.0))
    state = initial_state(trainer, model, mesh)
    for mini in minis:
        batch = whole(mini, mesh)
        batch = batch._replace(old=trainer.logprobs(trainer.weights(state), batch))
        state, update = trainer.update(state, [batch])
        metrics = as_floats(update.metrics)
        assert metrics["sum/clipped_low"] + metrics["sum/clipped_high"] == 0
        assert abs(metrics["max/log_ratio"]) < 1e-5
        assert abs(metrics["min/log_ratio"]) < 1e-5
        assert 0 < metrics["max/sampler_difference"] < 0.1
        assert float(update.applied) == 1
    for before, after in zip(jax.tree.leaves(model), jax.tree.leaves(state.master), strict=True):
        np.testing.assert_array_equal(before, after)


def test_one_optimizer_step_per_rollout_needs_no_old_logprobs(model: Transformer, minis: list[Mini], one_device: Mesh):
    """Without `old` the ratio is exactly 1, and the gradient is the same as with the log-probs computed beforehand."""
    trainer, policy = trainer_of(one_device), policy_on(model, one_device)
    batch = whole(minis[0], one_device)._replace(old=None)
    gradients, metrics = accumulate(trainer, policy, [batch])
    for name in ("max/log_ratio", "min/log_ratio", "sum/clipped_low", "sum/clipped_high"):
        assert metrics[name] == 0, name
    with_old, _ = accumulate(trainer, policy, [batch._replace(old=trainer.logprobs(policy, batch))])
    assert_same_gradient(gradients, flat(with_old))
    assert metrics["max/sampler_difference"] > 0  # the sampler's log-probs are compared with the policy's own


def test_the_first_mini_batch_of_a_rollout_has_ratio_1_in_bf16(model: Transformer, minis: list[Mini], one_device: Mesh):
    """The program that measures old log-probs rounds bf16 in another order than the one with gradients, on a sharp
    model by 2e-2, more than GSPO's clip. The first optimizer step follows the rollout directly and needs none.
    """
    trainer = trainer_of(one_device, settings_with(model__dtype="bfloat16", optimizer__learning_rate=0.0))
    sharp = jax.tree.map(lambda x: 4 * x, model)
    state = initial_state(trainer, sharp, one_device)
    host = [whole(mini, one_device)._replace(old=None, on_policy=jnp.full(16, i == 0)) for i, mini in enumerate(minis)]
    scored, ratios = trainer.with_logprobs(state, [[batch] for batch in host]), []
    for mini_batch in scored:
        metrics = as_floats(trainer.gradients(state, mini_batch)[1])
        ratios.append(max(metrics["max/log_ratio"], -metrics["min/log_ratio"]))
    assert ratios[0] == 0
    assert 0 < max(ratios[1:]) < 0.1  # what the later ones have: the first would have it too


def test_crpo_mini_batches_mark_the_first_as_on_policy(minis: list[Mini]):
    settings = settings_with(crpo__mini_batch_prompts=1, crpo__group_size=4, parallel__micro_batch_tokens=32)
    mini = minis[0]
    batches = crpo_mini_batches(mini.rows, mini.sampler, mini.advantages, np.ones(7, bool), settings, 1)
    assert [{bool(x) for batch in mini_batch for x in batch.on_policy} for mini_batch in batches] == [{True}, {False}]


def test_the_samplers_log_probs_need_no_forward_of_the_old_policy(model: Transformer, minis: list[Mini]):
    """Neither is it run, nor is its gradient another one than with these log-probs in its place."""
    mesh = mesh_of(1, 1)
    by_sampler = trainer_of(mesh, settings_with(crpo__old_logprobs="sampler"))
    state = initial_state(by_sampler, model, mesh)
    batches = [whole(mini, mesh)._replace(old=None) for mini in minis]
    batches = [batch._replace(on_policy=jnp.full(batch.lengths.shape, i == 0)) for i, batch in enumerate(batches)]
    scored = by_sampler.with_logprobs(state, [[batch] for batch in batches])
    assert all(batch.old is None for (batch,) in scored)
    for (batch,) in scored:
        gradient = by_sampler.gradients(state, [batch])[0]
        as_old = batch._replace(old=batch.sampler, on_policy=None)
        assert_same_gradient(gradient, flat(trainer_of(mesh).gradients(state, [as_old])[0]))


@pytest.mark.parametrize("sizes", [(1, 1), (4, 2)])
def test_a_kl_in_the_reward_is_taken_off_each_response(sizes: tuple[int, int], model: Transformer, minis: list[Mini]):
    """Of the policy that sampled, whatever order the micro-batches are in; advantages go back to the same rows."""
    mesh = mesh_of(*sizes)
    settings = settings_with(crpo__kl_in="reward", crpo__mini_batch_prompts=2, crpo__group_size=2)
    trainer, mini = trainer_of(mesh, settings), minis[0]
    state, counted = initial_state(trainer, model, mesh), np.arange(7) != 3
    on_host = crpo_mini_batches(mini.rows, mini.sampler, mini.advantages, counted, settings, data_size(mesh))
    batches = trainer.with_logprobs(state, [trainer.put_batches(part) for part in on_host])
    tokens, mask = padded(mini.rows)
    reference = np.asarray(next_token_logprobs(model, tokens))
    gaps = [reference[i][mask[i]] - mini.sampler[i] for i in range(7)]
    expected = [0.2 * np.sum(np.exp(gap) - gap - 1) for gap in gaps]
    np.testing.assert_allclose(trainer.kl_penalties(state, batches, 7), expected, rtol=2e-3, atol=1e-6)
    new = np.arange(7, dtype=np.float32)
    for batch in (batch for part in trainer.with_advantages(batches, new) for batch in part):
        rows = np.asarray(batch.responses)
        np.testing.assert_array_equal(batch.advantages, np.where(rows >= 0, rows, 0))
        lengths = [len(mini.rows[row].response) if row >= 0 else 0 for row in rows]
        np.testing.assert_array_equal(batch.lengths, lengths)


def test_a_loss_of_ones_own_is_part_of_the_program(
    model: Transformer, minis: list[Mini], one_device: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Written from its documented signature, PPO's loss has PPO's gradient; masks, weights, KL, entropy are added."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_ppo.py").write_text(OWN_PPO, encoding="utf-8")
    own = trainer_of(one_device, settings_with(crpo__loss="my_ppo:clipped"))
    state, batch = initial_state(own, model, one_device), whole(minis[0], one_device)
    expected = trainer_of(one_device).gradients(state, [batch])[0]
    assert_same_gradient(own.gradients(state, [batch])[0], flat(expected))


OWN_PPO = """
import jax.numpy as jnp

def clipped(logprobs, old_logprobs, advantages, **others):
    ratio = jnp.exp(logprobs - old_logprobs)
    return -jnp.minimum(ratio * advantages[:, None], jnp.clip(ratio, 0.9, 1.15) * advantages[:, None])
"""


def test_a_loss_of_ones_own_may_reduce_over_rows_and_tokens(
    model: Transformer, minis: list[Mini], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Nothing computes it of no rows at all, of which there is no maximum."""
    code = "def scaled(logprobs, advantages):\n    return -logprobs * (advantages / advantages.max())[:, None]\n"
    (tmp_path / "my_maximum.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    mesh = mesh_of(2, 2)
    own = trainer_of(mesh, settings_with(crpo__loss="my_maximum:scaled"))
    gradients, metrics = own.gradients(initial_state(own, model, mesh), [whole(minis[0], mesh)])
    assert np.isfinite(float(metrics["sum/loss"]))
    assert float(optax.tree.norm(gradients)) > 0


def test_without_a_kl_no_reference_is_held_or_run(model: Transformer, minis: list[Mini], one_device: Mesh):
    """The gradient is that of a coefficient too small to matter, and a step needs no frozen weights."""
    gradients = []
    for beta in (1e-30, 0.0):
        trainer = trainer_of(one_device, settings_with(crpo__kl_coef=beta))
        state = initial_state(trainer, model, one_device)
        assert (state.frozen is None) == (beta == 0)
        batch = whole(minis[0], one_device)._replace(reference=None)
        ((scored,),) = trainer.with_logprobs(state, [[batch]])
        assert (scored.reference is None) == (beta == 0)
        gradients.append(trainer.gradients(state, [scored])[0])
        state, update = trainer.update(state, [scored])
        assert float(update.applied) == 1
        assert ("sum/kl" in update.metrics) == (beta > 0)
    assert_same_gradient(gradients[0], flat(gradients[1]))


def test_measure_is_accumulate_without_the_gradient(model: Transformer, minis: list[Mini], one_device: Mesh):
    trainer, policy, batch = trainer_of(one_device), policy_on(model, one_device), whole(minis[0], one_device)
    metrics = as_floats(trainer.measure(policy, batch))
    assert metrics == pytest.approx(accumulate(trainer, policy, [batch])[1], rel=1e-4, abs=1e-5)


def test_a_second_step_compiles_nothing(model: Transformer, minis: list[Mini], one_device: Mesh, compiled: list[str]):
    trainer = trainer_of(one_device, settings_with(optimizer__eps=0.011))  # programs that no other test has compiled
    state, batches = initial_state(trainer, model, one_device), [whole(mini, one_device) for mini in minis[:2]]
    for step, batch in enumerate(batches):
        compiled.clear()
        mini_batches = trainer.with_logprobs(state, [[batch, batch], [batch]])
        for mini_batch in mini_batches:  # the first micro-batch and those after it are one program
            state, _ = trainer.update(state, mini_batch)
        assert sum("accumulate" in name for name in compiled) == (1 if step == 0 else 0)
        assert (compiled == []) == (step == 1)


@pytest.mark.parametrize("loss", ["crpo", "supervised"])
@pytest.mark.parametrize("rank", [0, 2], ids=["every weight", "adapters"])
def test_a_training_step_transfers_nothing_implicitly(loss: Loss, rank: int, model: Transformer, minis: list[Mini]):
    """Once its batches are on the devices, a step needs nothing from the host: a transfer would stall it every time."""
    mesh, mini = mesh_of(2, 4), minis[0]
    settings = settings_with(crpo__kl_target=0.1, crpo__mini_batch_prompts=2, crpo__group_size=2)
    lora = config.Lora(rank=rank, targets=("q_proj", "down_proj"))
    trainer = trainer_of(mesh, settings, loss, lora)
    if rank:
        adapters = jax.device_put(initial_adapters(SHAPE, lora, jax.random.key(0)), trainer.shardings.master)
        state = trainer.begin(adapters, policy_on(model, mesh).model)
    else:
        state = initial_state(trainer, model, mesh)
    if loss == "crpo":
        counted = np.ones(7, bool)
        on_host = crpo_mini_batches(mini.rows, mini.sampler, mini.advantages, counted, settings, data_size(mesh))
        assert len(on_host) == 2
    else:
        on_host = [supervised_batches(mini.rows, settings.parallel, data_size(mesh))]
    mini_batches = [trainer.put_batches(batches) for batches in on_host]
    with jax.transfer_guard("disallow"):
        if loss == "crpo":
            mini_batches = trainer.with_logprobs(state, mini_batches)
        for batches in mini_batches:
            state, update = trainer.update(state, batches)
    assert int(state.step) == len(mini_batches)
    assert float(update.applied) == 1
    weights = trainer.weights(state)
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        trainer.logprobs(weights, on_host[0][0])  # the guard does see a transfer


def test_the_kl_coefficient_is_part_of_the_state(model: Transformer, minis: list[Mini], one_device: Mesh):
    """A KL far above its target raises the coefficient by a fiftieth a step; the loss takes it from the state, without
    another compilation."""
    trainer = trainer_of(one_device, settings_with(crpo__kl_target=1e-6))
    state, batch = initial_state(trainer, model, one_device), whole(minis[0], one_device)
    weights = trainer.weights(state)
    gradients, metrics = trainer.accumulate(*trainer.zero(), weights, batch, state.kl_coef)
    state, _, _ = apply(trainer, state, gradients, metrics)
    assert float(state.kl_coef) == pytest.approx(0.2 * 1.02)
    _, again = trainer.accumulate(*trainer.zero(), weights, batch, state.kl_coef)
    kl = (float(again["sum/loss"]) - float(metrics["sum/loss"])) / (0.2 * 0.02)
    assert kl == pytest.approx(float(metrics["sum/kl"] / metrics["sum/tokens"]), rel=1e-2)
    constant = trainer_of(one_device)
    state, _, _ = apply(constant, initial_state(constant, model, one_device), constant.zero()[0], metrics)
    assert float(state.kl_coef) == pytest.approx(0.2)


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_each_ratio_has_a_clip_range_of_its_own(ratio: str, model: Transformer, minis: list[Mini], one_device: Mesh):
    settings = settings_with(
        crpo__ratio=ratio,
        crpo__clip_low=0.9,
        crpo__clip_high=9.0,
        crpo__sequence_clip_low=1e-4,
        crpo__sequence_clip_high=1e-4,
    )
    metrics = trainer_of(one_device, settings).measure(policy_on(model, one_device), whole(minis[0], one_device))
    clipped = float(metrics["sum/clipped_low"] + metrics["sum/clipped_high"])
    assert (clipped > 0) == (ratio == "sequence")


# --- the optimizer ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_gradients_that_are_not_finite_are_not_applied(bad: float, model: Transformer, one_device: Mesh):
    """One bad value would poison every weight and moment for good. 1e30 is finite, its square is not."""
    trainer = trainer_of(one_device)
    state, (_, metrics) = initial_state(trainer, model, one_device), trainer.zero()
    gradient = like(np.full(flat(model).size, 0.01), model)
    state, _, applied = apply(trainer, state, gradient, metrics)
    assert float(applied) == 1
    before = [np.array(leaf) for leaf in jax.tree.leaves(state)]
    spoilt = like(np.where(np.arange(flat(model).size) == 77, bad, 0.01), model)
    state, norm, applied = apply(trainer, state, spoilt, metrics)
    assert float(applied) == 0
    assert not np.isfinite(norm)
    for old, new in zip(before, jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(old, new)
    state, _, applied = apply(trainer, state, gradient, metrics)
    assert float(applied) == 1
    assert int(state.step) == 2
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_loss_that_is_not_finite_is_not_applied(bad: float, model: Transformer, one_device: Mesh):
    """A bound may hide it from the gradient."""
    trainer = trainer_of(one_device)
    state, (gradients, metrics) = initial_state(trainer, model, one_device), trainer.zero()
    state, _, applied = apply(trainer, state, gradients, metrics | {"sum/loss": jnp.float32(bad)})
    assert float(applied) == 0
    np.testing.assert_array_equal(flat(state.master), flat(model))


@pytest.mark.slow
def test_master_weights_move_where_bfloat16_would_not(model: Transformer, minis: list[Mini], one_device: Mesh):
    """The paper's 1e-6 is below bf16's spacing at 0.3, which is 0.002: in bf16 every such change is lost, in float32
    they add up."""
    settings = settings_with(
        model__dtype="bfloat16", optimizer__learning_rate=1e-6, optimizer__weight_decay=0.0, optimizer__eps=1e-8
    )
    trainer = trainer_of(one_device, settings)
    state = initial_state(trainer, model, one_device)
    weights = trainer.compute_copy(state.master)
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {jnp.dtype(jnp.bfloat16)}
    start = [np.array(leaf) for leaf in jax.tree.leaves(weights)]
    gradients, metrics = trainer.gradients(state, [whole(minis[0], one_device)])
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    state, _, _ = apply(trainer, state, gradients, metrics)
    masters_and_moments = [leaf for leaf in jax.tree.leaves((state.master, state.optimizer)) if leaf.ndim]
    assert {leaf.dtype for leaf in masters_and_moments} == {jnp.dtype(jnp.float32)}
    moved = flat(state.master) - flat(model)
    assert np.median(np.abs(moved)) == pytest.approx(1e-6, rel=0.1)
    in_bfloat16 = jnp.bfloat16(0.3)
    for _ in range(300):
        in_bfloat16 = in_bfloat16 + jnp.bfloat16(1e-6)
        state, _, _ = apply(trainer, state, gradients, metrics)
    assert in_bfloat16 == jnp.bfloat16(0.3)
    end = jax.tree.leaves(trainer.compute_copy(state.master))
    assert any(not np.array_equal(old, new) for old, new in zip(start, end, strict=True))


@pytest.mark.slow
def test_muon_orthogonalizes_the_matrices_and_leaves_the_rest_to_adam(model: Transformer, minis: list[Mini]):
    """A layer's matrices, d against the rest, move by an orthogonal one of the size of AdamW's updates; all else moves
    as with AdamW and Nesterov's momentum. The same on 8 devices: rows and columns are the whole matrix's.
    """
    settings = settings_with(optimizer__algorithm="muon", optimizer__weight_decay=0.0, parallel__layout="fsdp")
    o, after = settings.optimizer, []
    for mesh in (mesh_of(1, 1), mesh_of(2, 4)):
        trainer = trainer_of(mesh, settings)
        state, _ = trainer.update(initial_state(trainer, model, mesh, "fsdp"), [whole(minis[0], mesh)])
        assert_moments_beside_their_weights(state)
        after.append(dict(named_weights(state.master)))
    adam = optax.chain(
        optax.clip_by_global_norm(o.clip_norm), optax.nadamw(o.learning_rate, o.beta1, o.beta2, o.eps, weight_decay=0.0)
    )
    changes, _ = adam.update(written_out(model, minis[0])[1], adam.init(model), model)
    before, as_adam = dict(named_weights(model)), dict(named_weights(changes))
    for name, weight in after[0].items():
        np.testing.assert_allclose(after[1][name], weight, rtol=0, atol=0.05 * o.learning_rate, err_msg=name)
        moved = np.asarray(weight, np.float64) - np.asarray(before[name], np.float64)
        if "norm" in name or "bias" in name or name in ("embed_vd", "unembed_dv"):
            np.testing.assert_allclose(moved, as_adam[name], rtol=0, atol=0.05 * o.learning_rate, err_msg=name)
            continue
        for layer in moved / o.learning_rate:
            assert 0.15 < np.sqrt(np.mean(layer**2)) < 0.25, name
            matrix = np.moveaxis(layer, SHAPE.weight(name).dims.index("d"), 0).reshape(SHAPE.d, -1)
            singular = np.linalg.svd(matrix, compute_uv=False)
            assert singular[0] / singular[-1] < 2, name  # the gradient's own are a factor of 100 apart


def test_schedules():
    """By optimizer step: a straight warm-up, then constant, or down to 0 at the last step."""

    def rates(kind: Any, warmup: int, share: float = 0.0) -> list[float]:
        optimizer = config.Optimizer(learning_rate=2.0, schedule=kind, warmup_steps=warmup, warmup_ratio=share)
        return [float(rate(step)) for rate in [learning_rate(optimizer, 10)] for step in range(11)]

    assert rates("constant", 0) == [2.0] * 11
    assert rates("constant", 4) == pytest.approx([0, 0.5, 1, 1.5, *[2] * 7])
    assert rates("linear", 0) == pytest.approx([2 - step / 5 for step in range(11)])
    assert rates("linear", 5) == pytest.approx([0, 0.4, 0.8, 1.2, 1.6, 2, 1.6, 1.2, 0.8, 0.4, 0], abs=1e-6)
    assert rates("cosine", 2) == pytest.approx([0, 1, *(1 + np.cos(np.pi * np.arange(9) / 8))], abs=1e-6)
    assert rates("cosine", 0, 0.2) == rates("cosine", 2)
    assert rates("cosine", 0, 0.29) == rates("cosine", 2), "rounded down, as in the authors' trainer"
    assert rates("cosine", 2, 0.5) == rates("cosine", 2), "warmup_steps goes first"


def test_the_cold_starts_learning_rate_is_the_authors():
    """17 steps an epoch, 20 epochs: 34 of 340 steps warm up, the rest is half a cosine down to 0."""
    rate, peak = learning_rate(config.Config().sft.optimizer, 340), 1e-4
    for step in range(341):
        authors = step / 34 if step < 34 else 0.5 * (1 + np.cos(np.pi * (step - 34) / (340 - 34)))
        assert float(rate(step)) == pytest.approx(peak * authors, abs=1e-6 * peak), step


@pytest.mark.parametrize(("clip_norm", "scale"), [(0.0, 1.0), (1.0, 1 / 13), (100.0, 1.0)])
def test_clip_by_global_norm(clip_norm: float, scale: float):
    """Of all tensors together: the norm of 3, 4 and 12 is 13; 0 turns it off. The first moment shows it: Adam's first
    step hides the scale."""
    optimizer = make_optimizer(config.Optimizer(clip_norm=clip_norm, beta1=0.5), 10)
    weights = {"a": jnp.zeros(2), "b": jnp.zeros(1)}
    _, state = optimizer.update({"a": jnp.float32([3, 4]), "b": jnp.float32([12])}, optimizer.init(weights), weights)
    (adam,) = [part for part in jax.tree.leaves(state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")]
    np.testing.assert_allclose(np.concatenate([adam.mu["a"], adam.mu["b"]]), np.array([1.5, 2, 6]) * scale, rtol=1e-5)


# --- the cold start's program -----------------------------------------------------------------------------------------


def test_supervised_gradients(model: Transformer, minis: list[Mini], one_device: Mesh):
    """Cross-entropy of the responses at temperature 1, whatever the rollout's is."""
    trainer, mini = trainer_of(one_device, loss="supervised"), minis[0]
    tokens, mask = padded(mini.rows)

    @jax.jit
    @jax.value_and_grad
    def loss(model: Transformer) -> Any:
        logprob = chosen(distributions(model, tokens, temperature=1.0), tokens)
        return -jnp.sum(jnp.where(mask, logprob, 0) * mini.weights[:, None])

    value, expected = loss(model)
    batches = trainer.put_batches([make_batch(one_micro_batch(mini.rows, one_device), mini.weights)])
    gradients, metrics = accumulate(trainer, policy_on(model, one_device), batches)
    assert_same_gradient(gradients, flat(expected))
    assert metrics["sum/loss"] == pytest.approx(float(value), rel=1e-4)
    assert metrics["sum/nll"] / metrics["sum/tokens"] == pytest.approx(float(value), rel=1e-4)
