"""8 virtual CPU devices for every test, array shapes checked at run time, small models with a different size for every
dim.

Most of the time goes into compiling: XLA's older emitters take a third of it, and modules that say
`usefixtures("quick_compiles")` go without most optimizations. CRPO_JAX_FULL_OPTIMIZATION=1 compiles everything as a run
would. JAX_COMPILATION_CACHE_DIR=FOLDER keeps programs between runs.
"""

import os
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FULL = bool(os.environ.get("CRPO_JAX_FULL_OPTIMIZATION"))
OLDER_EMITTERS = (
    ["--xla_cpu_use_fusion_emitters=false"] if version("jaxlib").startswith("0.10.") and not FULL else []
)  # 0.11 has none
FLAGS = ["--xla_force_host_platform_device_count=8", *OLDER_EMITTERS]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from jaxtyping import install_import_hook
from typeguard import check_type


def annotations_hold(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every argument and its result checked against their annotations.

    Typeguard 4's own decorator reads jaxtyping's "b t" as Python code and stops at a syntax error; its `check_type`
    does not.
    """
    signature = inspect.signature(function)
    of = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if parameter.annotation is not parameter.empty
    }

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in of:
                check_type(value, of[name])
        out = function(*args, **kwargs)
        return out if signature.return_annotation is signature.empty else check_type(out, signature.return_annotation)

    return checked


# Before anything imports these: in the tests, array shapes and types are checked with every call and every trace.
install_import_hook(
    [
        "crpo_jax.update.losses",
        "crpo_jax.update.advantages",
        "crpo_jax.update.logprobs",
        "crpo_jax.rollout.draw",
        "crpo_jax.model.attention",
    ],
    "conftest.annotations_hold",
)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, Mesh

from crpo_jax.model.architecture import Weight
from crpo_jax.model.rotary import Rope
from crpo_jax.model.shape import Shape
from crpo_jax.model.transformer import Transformer
from crpo_jax.parallel.mesh import DATA, MODEL, data_size
from crpo_jax.update.batches import MicroBatch, Row, micro_batches

settings.register_profile("same examples every time", derandomize=True, database=None, deadline=None)
settings.load_profile("same examples every time")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: the process that began one last would work alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


SHAPE = Shape(d=16, n=8, k=2, h=6, f=24, v=40, l=3, tied=False, rope=Rope(1e4), norm_eps=1e-6)
"""Every dim has a size of its own, and every mesh of 8 devices can hold it: past 2 model shards by copies of the KV
heads."""

MESHES = ((1, 1), (8, 1), (4, 2), (2, 4), (1, 8))


def mesh_of(data: int, model: int) -> Mesh:
    """A mesh over the first data * model of the 8 devices."""
    devices = jax.devices()[: data * model]
    return jax.make_mesh((data, model), (DATA, MODEL), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices)


def random_weights(shape: Shape, seed: int = 0) -> Transformer:
    """Float32 weights of a size at which every one of them matters, biases and norms included."""
    rng = np.random.default_rng(seed)

    def make(weight: Weight) -> jax.Array:
        values = rng.normal(size=shape.dims(weight.stacked_dims)) * 0.3 + ("norm" in weight.name)
        return jnp.asarray(values, jnp.float32)

    return Transformer(shape, make)


def one_micro_batch(rows: list[Row], mesh: Mesh, longest: int = 16) -> MicroBatch:
    """All rows in one micro-batch, dealt to the mesh's data shards."""
    (micro,) = micro_batches(rows, budget=1024, multiple=4, shards=data_size(mesh), longest=longest)
    return micro


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a model or of adapters by their names, "q_dnh": arrays, shapes, shardings."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return {next(part.name for part in path if "_" in getattr(part, "name", "")): leaf for path, leaf in paths}


def placed(model: Transformer, shardings: Transformer) -> Transformer:
    """A copy of the model, which may be donated without the original being lost."""
    return jax.tree.map(lambda weight, to: jax.device_put(np.array(weight), to), model, shardings)


@pytest.fixture(scope="module")
def quick_compiles() -> Iterator[None]:
    jax.config.update("jax_disable_most_optimizations", not FULL)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs_are_freed() -> Iterator[None]:
    """After every module: a process may have only so many memory maps (vm.max_map_count), and the programs of the whole
    suite need more. XLA crashes without a word beyond them."""
    yield
    jax.clear_caches()


@pytest.fixture
def strict_ranks() -> Iterator[None]:
    """No array is broadcast over a missing dim without being told: [b] against [b, t] raises, even where b = t."""
    with jax.numpy_rank_promotion("raise"):
        yield


COMPILED: list[str] = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **of: (
        COMPILED.append(of["fun_name"]) if event == "/jax/core/compile/backend_compile_duration" else None
    )
)


@pytest.fixture
def compiled() -> list[str]:
    """The names of the programs compiled since the test began, or since it cleared the list."""
    COMPILED.clear()
    return COMPILED


@pytest.fixture(scope="session")
def shape() -> Shape:
    return SHAPE


@pytest.fixture(scope="session")
def model() -> Transformer:
    return random_weights(SHAPE)


@pytest.fixture(scope="module", params=MESHES, ids=lambda sizes: f"{sizes[0]}x{sizes[1]}")
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """Each of the meshes on which the same answer must come out."""
    return mesh_of(*request.param)


@pytest.fixture(scope="session")
def one_device() -> Mesh:
    return mesh_of(1, 1)


@pytest.fixture(scope="module")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Programs that several runs of a module need, subprocesses included, are compiled by the first: each run makes
    them anew."""
    before = {
        "jax_compilation_cache_dir": None,
        "jax_persistent_cache_min_compile_time_secs": jax.config.jax_persistent_cache_min_compile_time_secs,
        "jax_disable_most_optimizations": False,
    }
    changed = dict(zip(before, (str(tmp_path_factory.mktemp("programs")), 0.0, True), strict=True))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()  # a cache that was asked before has settled where it looks
        yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
