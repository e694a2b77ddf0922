"""The precision of matrix products: float32 means float32 on every platform."""

import jax
from jaxtyping import Array


def precision_of(operand: Array) -> jax.lax.Precision | None:
    """For products of this and other arrays of its type: HIGHEST for float32, the platform's default for others.

    By default GPUs multiply float32 in TF32 and TPUs in bf16, with 10 and 7 bits behind the point instead of 23.
    """
    return jax.lax.Precision.HIGHEST if operand.dtype == "float32" else None
