"""A user's own policy loss, `crpo.loss=module:function`: found, checked before a run begins, and called inside the
compiled program."""

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from crpo_jax.config import Crpo
from crpo_jax.errors import InputError
from crpo_jax.user_code import import_user_object


class LossArrays(NamedTuple):
    """What a loss may ask for, each by the name of a parameter. Per-token arrays are 0 where the mask is."""

    logprobs: Float[Array, "b t"]  # of the policy that is trained; the only array besides entropy with a gradient
    old_logprobs: Float[Array, "b t"]  # of the policy that sampled, as crpo.old_logprobs says
    sampler_logprobs: Float[Array, "b t"]  # that the tokens were drawn with
    reference_logprobs: Float[Array, "b t"] | None  # of the frozen start model; only with crpo.kl_coef above 0
    entropy: Float[Array, "b t"]  # of the policy's distributions, in nats
    advantages: Float[Array, " b"]
    mask: Bool[Array, "b t"]  # tokens of responses that carry gradient
    weights: Float[Array, " b"]  # of each token of a response in the mini-batch's loss, by crpo.aggregation


LossFunction = Callable[..., Array]
"""The loss of every token, to be minimized; the program multiplies by mask and weights, sums, and adds KL and
entropy."""


@functools.cache
def load_loss(path: str) -> tuple[LossFunction, tuple[str, ...]]:
    """The function at `module:function` and the arrays it asks for; InputError where there is none that can be
    called."""
    expected = "crpo.loss: expected clip, cispo, sapo or a function of your own as module:function"
    named = import_user_object(path, expected)
    if not callable(named):
        raise InputError(f"{expected}; {path} is no function but of type {type(named).__name__}")
    function = cast(LossFunction, named)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of some functions that are written in C
        raise InputError(f"{expected}; {path} has no signature that names its parameters") from None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return function, LossArrays._fields
    names = []
    for parameter in parameters:
        if parameter.name in LossArrays._fields:
            names.append(parameter.name)
        elif parameter.default is parameter.empty:
            similar = difflib.get_close_matches(parameter.name, LossArrays._fields, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            legal = ", ".join(LossArrays._fields)
            raise InputError(f"crpo.loss: {path}: expected parameters among {legal}, got {parameter.name!r}{hint}")
    return function, tuple(names)


def call_loss(path: str, arrays: LossArrays) -> Float[Array, "b t"]:
    """The loss of every token by the user's function, 0 where the mask is."""
    function, names = load_loss(path)
    return jnp.where(arrays.mask, function(**{name: getattr(arrays, name) for name in names}), 0)


def check_loss(crpo: Crpo) -> None:
    """InputError, before anything is computed, where crpo.loss names a function that is not there, asks for what a run
    does not have, or does not return an array with the loss of every token."""
    if ":" not in crpo.loss:
        return
    function, names = load_loss(crpo.loss)
    if "reference_logprobs" in names and not crpo.has_reference:
        wanted = f"more than 0, since {crpo.loss} asks for reference_logprobs"
        raise InputError(f"crpo.kl_coef: expected {wanted}, got 0")
    rows, tokens = jax.ShapeDtypeStruct((2,), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    mask: Any = jax.ShapeDtypeStruct((2, 3), jnp.bool_)
    arrays: Any = [*[tokens] * 5, rows, mask, rows]
    shapes = LossArrays(*arrays)
    try:
        out = jax.eval_shape(lambda arrays: function(**{name: getattr(arrays, name) for name in names}), shapes)
    except Exception as error:  # noqa: BLE001 (a user's function may raise anything)
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise InputError(f"crpo.loss: {crpo.loss}: expected a function that jax can trace, got {reason}") from None
    if getattr(out, "shape", None) != (2, 3) or not jnp.issubdtype(out.dtype, jnp.floating):
        got = f"{out.dtype}{list(out.shape)}" if hasattr(out, "shape") else type(out).__name__
        wanted = "an array [b, t] of floats, the loss of every token"
        raise InputError(f"crpo.loss: {crpo.loss}: expected {wanted}, got {got} for b = 2, t = 3")
