"""LoRA's matrices as the forward pass reads them; `lora.py` makes and merges them."""

from collections.abc import Callable, Sequence
from typing import Any

from flax import nnx
from jaxtyping import Array

from crpo_jax.model.architecture import Weight

MakeMatrix = Callable[[str, Weight], Any]
"""What stands for A or B, from its stacked dims and the weight it adapts: ("lnhr", o_nhd)."""


class Adapters(nnx.Module):
    """A and B of every adapted weight, named after it with the dims they have: `o_a_nhr` and `o_b_rd` adapt `o_nhd`."""

    def __init__(self, weights: Sequence[Weight], scale: float, make: MakeMatrix) -> None:
        self.weights, self.scale = tuple(weights), scale
        for weight in weights:
            for name in matrix_names(weight):
                setattr(self, name, nnx.Param(make("l" + name.rsplit("_", 1)[1], weight)))

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the adapted weights."""
        return frozenset(weight.name for weight in self.weights)

    @property
    def rank(self) -> int:
        return int(self.pair(self.weights[0].name)[0].shape[-1])

    def pair(self, name: str) -> tuple[Array, Array]:
        """A and B of an adapted weight."""
        weight = next(weight for weight in self.weights if weight.name == name)
        a, b = matrix_names(weight)
        return getattr(self, a)[...], getattr(self, b)[...]


def matrix_names(weight: Weight) -> tuple[str, str]:
    stem = weight.name.rsplit("_", 1)[0]
    return f"{stem}_a_{weight.inputs}r", f"{stem}_b_r{weight.outputs}"
