"""A user's own loss: what is refused before a run, in one line, and what it gets."""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from crpo_jax.config import Crpo
from crpo_jax.errors import InputError
from crpo_jax.update.own_loss import LossArrays, call_loss, check_loss

NUMBERS = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module that does not exist yet, in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return f"own_loss_{next(NUMBERS)}"


def refusal(module: str, code: str, name: str = "loss", kl_coef: float = 0.1) -> str:
    Path(f"{module}.py").write_text(f"import jax.numpy as jnp\nimport numpy as np\n{code}\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        check_loss(Crpo(loss=f"{module}:{name}", kl_coef=kl_coef))
    assert "\n" not in str(error.value)
    return str(error.value).replace(module, "MODULE")


ALL = ", ".join(LossArrays._fields)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def los(logprobs): return -logprobs", "module 'MODULE' has no attribute 'loss'; did you mean MODULE:los?"),
        ("loss = 3", "MODULE:loss is no function but of type int"),
        ("def loss(logprobs, advantage): return -logprobs", f"expected parameters among {ALL}, got 'advantage'; "),
        (
            "def loss(logprobs): return jnp.sum(logprobs)",
            "expected an array [b, t] of floats, the loss of every token, ",
        ),
        ("def loss(logprobs): return None", "got NoneType for b = 2, t = 3"),
        ("def loss(mask): return mask", "got bool[2, 3] for b = 2, t = 3"),
        ("def loss(logprobs): return np.exp(logprobs)", "expected a function that jax can trace, got Tracer"),
        ("def loss(logprobs): return logprobs + undefined", "got NameError: name 'undefined' is not defined"),
        ("def loss(logprobs: return", "cannot be imported: SyntaxError"),
        ("loss = max", "MODULE:loss has no signature that names its parameters"),
    ],
)
def test_what_is_refused(module: str, code: str, expected: str):
    assert expected in refusal(module, code)


def test_a_reference_that_no_run_holds_is_refused(module: str):
    code = "def loss(logprobs, reference_logprobs): return reference_logprobs - logprobs"
    expected = "crpo.kl_coef: expected more than 0, since MODULE:loss asks for reference_logprobs, got 0"
    assert refusal(module, code, kl_coef=0.0) == expected


def test_it_gets_what_it_asks_for_by_name(module: str):
    """In any order; parameters with a default of their own are left alone; nothing outside the mask comes back."""
    code = "def loss(weights, logprobs, *, scale=2.0): return scale * logprobs + weights[:, None] + 1 / logprobs"
    Path(f"{module}.py").write_text(code, encoding="utf-8")
    check_loss(Crpo(loss=f"{module}:loss"))
    rows, tokens, mask = jnp.ones(2), jnp.full((2, 3), 4.0), jnp.array([[True, False, True], [False] * 3])
    arrays = LossArrays(jnp.where(mask, tokens, 0), *[tokens] * 4, 3 * rows, mask, 5 * rows)
    np.testing.assert_array_equal(call_loss(f"{module}:loss", arrays), np.where(mask, 13.25, 0))
