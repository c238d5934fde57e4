"""Several devices in JAX. A program of its own, because JAX counts its devices once: see test_jax.py."""

from __future__ import annotations

import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import DTYPES, conv_problem, error_of, scan_problem
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import sscan.jax
from sscan.jax import distributed

if hasattr(jax, "shard_map"):
    shard_map, CHECKS = jax.shard_map, (True, False)
else:  # before JAX 0.6.1; it has checks too, but they know no foreign functions
    from jax.experimental.shard_map import shard_map as shard_map_without_types

    def shard_map(function: Any, *, check_vma: bool = False, **options: Any) -> Any:
        return shard_map_without_types(function, check_rep=check_vma, **options)

    CHECKS = (False,)
jax.config.update("jax_enable_x64", True)
MESH = Mesh(np.array(jax.devices()), ("devices",))
SIZES = {"dim": 6, "state": 3, "dtype": "float64"}
BATCH, TIME = P("devices"), P(None, None, "devices")


def results_and_gradients(function: Any) -> Any:
    """The results, and the gradients of the sum of their squares."""

    def loss(arrays: Any) -> Any:
        results = function(arrays)
        return sum(jnp.sum(jnp.abs(x) ** 2) for x in results), results

    return jax.jit(jax.grad(loss, has_aux=True))


def split(arguments: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    arrays = {name: x for name, x in arguments.items() if isinstance(x, np.ndarray)}
    return arrays, {name: x for name, x in arguments.items() if name not in arrays}


def assert_equal_to_one_device(one: Any, several: Any, arrays: Any, places: Any, results: Any, **options: Any) -> None:
    expected = results_and_gradients(one)(arrays)
    shared = shard_map(several, mesh=MESH, in_specs=(places,), out_specs=results, **options)
    found = results_and_gradients(shared)(arrays)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error_of(np.asarray(x), np.asarray(y)) < 1e-13


# Whether JAX keeps track of what varies over devices.
checks = pytest.mark.parametrize("check_vma", CHECKS)


@checks
def test_batch_over_devices(check_vma: bool) -> None:
    """Gradients of parameters, which all devices share, are summed over them."""
    arguments = scan_problem(np.random.default_rng(0), **SIZES, batch=8, length=20, initial_state=True)
    arrays, options = split(arguments)
    places = {name: BATCH if x.ndim == 3 else P() for name, x in arrays.items()}

    def scan(arrays: Any) -> Any:
        return sscan.jax.selective_scan(**arrays, **options, return_last_state=True)

    assert_equal_to_one_device(scan, scan, arrays, places, (BATCH, BATCH), check_vma=check_vma)


@pytest.mark.parametrize("mesh", [MESH, jax.make_mesh((4,), ("devices",))], ids=["auto", "default"])
def test_sharded_arrays_without_shard_map(mesh: Any) -> None:
    """They are gathered; axes of a mesh are "explicit" by default in new versions of JAX."""
    arrays, options = split(scan_problem(np.random.default_rng(0), **SIZES, batch=8, length=20))
    place = {name: NamedSharding(mesh, BATCH if x.ndim == 3 else P()) for name, x in arrays.items()}
    scan = results_and_gradients(lambda x: (sscan.jax.selective_scan(**x, **options),))
    found, expected = scan(jax.device_put(arrays, place)), scan(arrays)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert error_of(np.asarray(x), np.asarray(y)) < 1e-13


SCANS = {
    "base": {"initial_state": True},
    "groups, constant C, zoh": {"B": "2", "C": "constant", "discretization": "zoh", "initial_state": True},
    "complex": {"is_complex": True, "C": "shared complex", "initial_state": True},
    "bare": {"z": False, "D": False, "delta_bias": False, "delta": "positive", "delta_softplus": False},
}


@pytest.mark.parametrize("name", SCANS)
@checks
def test_time_over_devices(name: str, check_vma: bool) -> None:
    arrays, options = split(scan_problem(np.random.default_rng(0), batch=2, length=24, **SIZES, **SCANS[name]))
    waves = {"u", "delta", "z", "B", "C"}
    places = {n: P(*[None] * (x.ndim - 1), "devices") if n in waves and x.ndim > 2 else P() for n, x in arrays.items()}
    assert_equal_to_one_device(
        lambda x: sscan.jax.selective_scan(**x, **options, return_last_state=True),
        lambda x: distributed.selective_scan(**x, **options, return_last_state=True, axis_name="devices"),
        arrays, places, (TIME, P()), check_vma=check_vma,
    )  # fmt: skip


@pytest.mark.parametrize("initial_state", [True, False])
@checks
def test_convolution_over_devices(initial_state: bool, check_vma: bool) -> None:
    arguments = conv_problem(np.random.default_rng(0), dtype="float64", length=24, initial_state=initial_state)
    arrays, options = split(arguments)
    places = {name: TIME if name == "x" else P() for name in arrays}
    assert_equal_to_one_device(
        lambda x: sscan.jax.causal_conv1d(**x, **options, return_final_state=True),
        lambda x: distributed.causal_conv1d(**x, **options, return_final_state=True, axis_name="devices"),
        arrays, places, (TIME, P()), check_vma=check_vma,
    )  # fmt: skip


def test_half_precision_over_devices() -> None:
    """The states cross in the accumulation dtype: as good as one device."""
    arrays, options = split(scan_problem(np.random.default_rng(0), dim=6, length=400, dtype="bfloat16", z=False))
    places = {n: TIME if x.ndim == 3 else P() for n, x in arrays.items()}
    scan = partial(distributed.selective_scan, axis_name="devices", **options)
    found = jax.jit(shard_map(lambda x: scan(**x), mesh=MESH, in_specs=(places,), out_specs=TIME))(arrays)
    expected = sscan.selective_scan(**arrays, **options)
    assert found.dtype == DTYPES["bfloat16"]
    assert error_of(np.asarray(found), expected.astype(np.float64)) < 2**-8  # a unit in the last place here and there


def test_parts_shorter_than_the_window() -> None:
    arrays, options = split(conv_problem(np.random.default_rng(0), length=8, width=4))
    convolve = partial(distributed.causal_conv1d, axis_name="devices", **options)
    places = {name: TIME if name == "x" else P() for name in arrays}
    with pytest.raises(ValueError, match="causal_conv1d: parts must have at least width - 1 = 3 steps, got 2"):
        shard_map(lambda x: convolve(**x), mesh=MESH, in_specs=(places,), out_specs=TIME)(arrays)
