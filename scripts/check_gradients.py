"""How far the bf16 gradients that training accumulates are from float64, beside torch's own bf16.

    python scripts/check_gradients.py [--loss crpo] [--tokens 2048 8192] [--untied] [--lora RANK] [key=value ...]

A small random Qwen2 computes the gradient of one mini-batch: in bf16 by the Trainer, in bf16 and in float64 by
transformers (with --lora by PEFT), all from the same weights, rounded to bf16 before. Both sum the gradients of
micro-batches in float32. The supervised loss pulls all tokens the same way, so that a sum that loses small parts shows;
`--loss crpo` is the policy gradient with random advantages, whose parts nearly cancel. Printed are relative errors in
L2 by weight, over all layers, at each number of tokens in a micro-batch, and the error of the global norm. The exit
code is 1 where a weight's error exceeds 1.5 times torch's.

Needs torch on the CPU: pip install 'crpo_jax[parity]'.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import jax
import jax.numpy as jnp
import numpy as np

from crpo_jax import cli, config
from crpo_jax.errors import InputError
from crpo_jax.model.huggingface import model_tensors, save_model
from crpo_jax.model.lora import Policy, initial_adapters, policy_of, trained_shardings
from crpo_jax.model.peft import adapter_tensors, save_adapters
from crpo_jax.model.placement import weight_shardings
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import random_model
from crpo_jax.parallel.layout import find_layout
from crpo_jax.parallel.mesh import data_size, make_mesh
from crpo_jax.update.batches import Row, make_batch, micro_batches
from crpo_jax.update.losses import row_weights
from crpo_jax.update.trainer import Loss, Trainer

BOUND = 1.5
ROWS, PROMPT, LENGTH = 32, 64, 256
SIZES: dict[str, Any] = {
    **{"d": 128, "n": 8, "k": 4, "h": 16, "f": 320, "v": 2048, "l": 3},
    **{"rope": Rope(1e4), "norm_eps": 1e-6},
}

Gradients = Mapping[str, np.ndarray]
"""By the name of a weight or of an adapter: all its layers, flat."""


def perturbed(tree: Any, seed: int) -> Any:
    """The tree with noise on every number, so that biases, norms and adapters matter, rounded to bf16."""
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [x + 0.05 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, [x.astype(jnp.bfloat16).astype(jnp.float32) for x in noisy])


def random_policy(shape: Shape, lora: config.Lora) -> Policy:
    model = perturbed(random_model(shape, jax.random.key(0)), 1)
    return Policy(model, perturbed(initial_adapters(shape, lora, jax.random.key(2)), 3) if lora.rank else None)


def random_rows(vocabulary: int, loss: Loss) -> tuple[list[Row], np.ndarray]:
    """Rows in which few tokens are frequent and many are rare, and their advantages."""
    rng = np.random.default_rng(0)
    tokens = (vocabulary * rng.random((ROWS, LENGTH)) ** 3).astype(np.int64)
    rows = [Row(row[:PROMPT].tolist(), row[PROMPT:].tolist()) for row in tokens]
    advantages = rng.normal(size=ROWS) if loss == "crpo" else np.ones(ROWS)
    return rows, advantages.astype(np.float32)


# --- ours -------------------------------------------------------------------------------------------------------------


def trainer_gradients(policy: Policy, settings: config.Config, loss: Loss, tokens: int) -> Gradients:
    """As training accumulates them, with micro-batches of `tokens` per data shard."""
    shape, mesh = policy.model.shape, make_mesh(settings.parallel.mesh)
    trainer = Trainer(shape, mesh, settings, settings.optimizer, 1, loss=loss, lora=settings.lora)
    layout = find_layout(settings.parallel.layout)
    master = policy.model if policy.adapters is None else policy.adapters
    master = copied(master, trained_shardings(shape, settings.lora, layout.master, mesh), "float32")
    frozen = copied(policy.model, weight_shardings(shape, layout.reference, mesh), settings.model.dtype)
    rows, advantages = random_rows(shape.v, loss)
    weights = row_weights(np.full(ROWS, LENGTH - PROMPT), np.ones(ROWS, bool), "token_mean")
    batches = []
    for micro in micro_batches(rows, budget=tokens, multiple=LENGTH, shards=data_size(mesh), longest=LENGTH):
        nothing = np.zeros(micro.tokens.shape, np.float32)  # the ratio is 1
        batches.append(make_batch(micro, weights, advantages, nothing))
    gradients, _ = trainer.gradients(trainer.begin(master, frozen), trainer.put_batches(batches))
    pairs = named_arrays(policy_of(gradients, policy.model))
    return {name: np.asarray(value, np.float64).ravel() for name, value in pairs}


def copied(tree: Any, shardings: Any, dtype: str) -> Any:
    """On the mesh, to be donated."""
    return jax.tree.map(lambda x, to: jax.device_put(np.array(x, jnp.dtype(dtype)), to), tree, shardings)


def named_arrays(policy: Policy) -> Iterator[tuple[str, Any]]:
    """What is trained: every weight, or A and B of every adapted one."""
    if policy.adapters is None:
        yield from ((weight.name, policy.model[weight.name]) for weight in policy.model.shape.weights)
        return
    for weight in policy.adapters.weights:
        for half, values in zip("AB", policy.adapters.pair(weight.name), strict=True):
            yield f"{weight.name} {half}", values


# --- torch's ----------------------------------------------------------------------------------------------------------


def torch_gradients(folder: Path, policy: Policy, dtype: str, loss: Loss, tokens: int) -> Gradients:
    """Of the model, and adapters, in `folder`, computed in `dtype` by transformers and PEFT."""
    import torch
    from transformers import Qwen2ForCausalLM

    model: Any = Qwen2ForCausalLM.from_pretrained(folder / "model", dtype=getattr(torch, dtype))
    if policy.adapters is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True, autocast_adapter_dtype=False)
        model = model.to(getattr(torch, dtype))
    rows, advantages = random_rows(policy.model.shape.v, loss)
    parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
    sums = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in parameters.items()}
    for first in range(0, ROWS, tokens // LENGTH):
        part = slice(first, first + tokens // LENGTH)
        ids = torch.tensor([[*row.prompt, *row.response] for row in rows[part]])
        logits = model(input_ids=ids, use_cache=False).logits[:, PROMPT - 1 : -1]
        wide = logits if dtype == "float64" else logits.float()
        logprobs = torch.log_softmax(wide, -1).gather(-1, ids[:, PROMPT:, None])[..., 0]
        objective = (logprobs * torch.tensor(advantages[part])[:, None]).sum() / (ROWS * (LENGTH - PROMPT))
        for name, gradient in zip(sums, torch.autograd.grad(-objective, list(parameters.values())), strict=True):
            sums[name] += gradient.double()
    return by_our_names({name: value.numpy() for name, value in sums.items()}, policy)


def by_our_names(gradients: Mapping[str, np.ndarray], policy: Policy) -> Gradients:
    """torch's gradients in our order of dims, the layers of a weight behind one another."""
    shape = policy.model.shape
    by_name: dict[str, list[np.ndarray]] = {}

    def put(name: str, letters: str, dims: str, stored: np.ndarray, rank: int = 0) -> None:
        sizes = [rank if letter == "r" else getattr(shape, letter) for letter in letters]
        values = stored.reshape(sizes).transpose([letters.index(letter) for letter in dims])
        by_name.setdefault(name, []).append(values.ravel())

    if policy.adapters is None:
        for key, weight, _, _ in model_tensors(shape):
            put(weight.name, weight.stored.replace(" ", ""), weight.dims, gradients[key])
    else:
        adapters = policy.adapters
        for key, (weight, half, _, _) in adapter_tensors(adapters.weights, shape, adapters.rank).items():
            stored = gradients[key.removesuffix("weight") + "default.weight"]
            a, b = (weight.inputs + "r", "r" + weight.inputs), ("r" + weight.outputs, weight.outputs + "r")
            ours, theirs = a if half == "A" else b
            put(f"{weight.name} {half}", theirs, ours, stored, adapters.rank)
    return {name: np.concatenate(parts) for name, parts in by_name.items()}


# --- the comparison ---------------------------------------------------------------------------------------------------


def relative_error(ours: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


def global_norm(gradients: Gradients) -> float:
    return float(np.sqrt(sum(np.sum(value**2) for value in gradients.values())))


def compare(shape: Shape, settings: config.Config, loss: Loss, token_counts: Sequence[int]) -> bool:
    """Prints the table; whether every weight's error is within the bound."""
    policy = random_policy(shape, settings.lora)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(policy.model, folder / "model", dtype="float32")
        if policy.adapters is not None:
            save_adapters(policy.adapters, shape, folder / "adapter", base=str(folder / "model"))
        exact = torch_gradients(folder, policy, "float64", loss, 2048)
        theirs = {tokens: torch_gradients(folder, policy, "bfloat16", loss, tokens) for tokens in token_counts}
    ours = {tokens: trainer_gradients(policy, settings, loss, tokens) for tokens in token_counts}
    print("relative error in L2, in percent       " + "".join(f"{tokens:>10,} tokens a micro-batch" for tokens in ours))
    print(f"{'gradient of':<32}" + "      ours   torch   ratio    " * len(ours))
    within = True
    for name in exact:
        line = f"{name:<32}"
        for tokens in ours:
            errors = [relative_error(gradients[tokens][name], exact[name]) for gradients in (ours, theirs)]
            within &= errors[0] <= BOUND * errors[1]
            line += f"{100 * errors[0]:>10.3f}{100 * errors[1]:>8.3f}{errors[0] / errors[1]:>8.2f}    "
        print(line)
    line, norm = f"{'global norm':<32}", global_norm(exact)
    for tokens in ours:
        line += "".join(
            f"{100 * (global_norm(gradients[tokens]) / norm - 1):>+{width}.3f}"
            for gradients, width in ((ours, 10), (theirs, 8))
        )
        line += " " * 12
    print(line)
    print(f"every gradient is within {BOUND} times torch's error" if within else f"over {BOUND} times torch's error")
    return within


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loss", choices=["supervised", "crpo"], default="supervised")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192], help="of a micro-batch")
    parser.add_argument("--untied", action="store_true", help="an output projection of its own")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="of adapters on frozen weights")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    args = parser.parse_intermixed_args()
    if any(tokens % LENGTH or not LENGTH <= tokens <= ROWS * LENGTH for tokens in args.tokens):
        raise InputError(f"--tokens: expected multiples of {LENGTH} up to {ROWS * LENGTH}, got {args.tokens}")
    fixed = ["model.dtype=bfloat16", "parallel.layout=zero1", "parallel.logprob_chunk=512"]
    fixed += ["rollout.temperature=1", "crpo.kl_coef=0", "crpo.entropy_coef=0"]  # the policy gradient alone
    settings = config.load_config(None, [*fixed, f"lora.rank={args.lora}", *args.overrides], model=False)
    return 0 if compare(Shape(**SIZES, tied=not args.untied), settings, args.loss, args.tokens) else 1


if __name__ == "__main__":
    cli.run_command("check_gradients", main)
