"""CRPO in JAX. From Python: `train`, `fine_tune`, `sample`, `score`, `evaluate` and `export` (see
`crpo_jax.api`).

Nothing is imported until one of them is used, so that commands which need no jax do not pay for it.
"""

import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from crpo_jax.api import evaluate, export, fine_tune, sample, score, train

__all__ = ["evaluate", "export", "fine_tune", "sample", "score", "train"]


class Package(types.ModuleType):
    """Keeps `crpo_jax.train` the function: importing the command of the same name would bind its module there."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from crpo_jax import api

        return getattr(api, name)


sys.modules[__name__].__class__ = Package
