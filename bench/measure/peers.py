"""What sscan is compared with, each as a forward and a forward + backward function of the same NumPy problem.

Every peer takes a problem once, converts it to its own arrays, and returns two functions without arguments that compute
``y`` and ``(y, gradients)`` as NumPy arrays; a peer without a backward returns None for the second.
"""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from problems import cotangent

import sscan
from sscan.selective_scan import _Arguments, _prepare

DIFFERENTIABLE = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
Pair = tuple[Callable[[], Any], Callable[[], Any] | None]


def ours(problem: dict[str, Any], **options: Any) -> Pair:
    """sscan on NumPy arrays; options such as the discretisation go to the op."""
    dy, arguments = cotangent(problem), {**problem, **options}

    def both() -> Any:
        y, _, checkpoints = sscan.selective_scan_forward(**arguments)
        gradients = sscan.selective_scan_backward(dy, **arguments, checkpoints=checkpoints)
        return y, {name: getattr(gradients, f"d{name}") for name in DIFFERENTIABLE}

    return lambda: sscan.selective_scan(**arguments), both


def kernels_alone(problem: dict[str, Any], **options: Any) -> Pair:
    """sscan's kernels without checks and allocation: results go to the same arrays every time, as in the prototype."""
    given = _Arguments(*(problem[name] for name in DIFFERENTIABLE), initial_state=None, seq_idx=None, cu_seqlens=None)
    checked = _prepare("bench", given, problem["delta_softplus"], options.get("discretization", "mamba"))
    dy, inputs, where = cotangent(problem), checked.inputs, (checked.segments, checked.groups)
    y, last_state = np.empty_like(inputs.u), np.empty((len(inputs.u), *inputs.A.shape), inputs.A.dtype)
    checkpoints = checked.empty_checkpoints()
    results = {f"d{name}": np.empty_like(problem[name]) for name in DIFFERENTIABLE}
    gradients = sscan.SelectiveScanGradients(**results, dinitial_state=None)

    def forward() -> Any:
        checked.backend.selective_scan_forward(*where, inputs, None, y, last_state, None, None)
        return y

    def both() -> Any:
        checked.backend.selective_scan_forward(*where, inputs, None, y, last_state, checkpoints, None)
        checked.backend.selective_scan_backward(*where, inputs, checkpoints, dy, None, gradients, None)
        return y, {name: results[f"d{name}"] for name in DIFFERENTIABLE}

    return forward, both


def numpy_reference(problem: dict[str, Any]) -> Pair:
    """The definition, sscan/reference.py."""
    from sscan import reference

    dy = cotangent(problem)

    def both() -> Any:
        gradients = reference.selective_scan_backward(dy, **problem)
        return reference.selective_scan(**problem), {name: getattr(gradients, f"d{name}") for name in DIFFERENTIABLE}

    return lambda: reference.selective_scan(**problem), both


def jax_lax_scan(problem: dict[str, Any]) -> Pair:
    """A jitted jax.lax.scan over time, differentiated by JAX."""
    import jax
    import jax.numpy as jnp

    def scan(a: dict[str, Any]) -> Any:
        delta = jax.nn.softplus(a["delta"] + a["delta_bias"][:, None])

        def step(h: Any, x: Any) -> Any:
            delta_t, u_t, B_t, C_t = x
            h = jnp.exp(delta_t[..., None] * a["A"]) * h + (delta_t * u_t)[..., None] * B_t[:, None]
            return h, jnp.einsum("bdn,bn->bd", h, C_t)

        time_first = tuple(jnp.moveaxis(x, 2, 0) for x in (delta, a["u"], a["B"], a["C"]))
        _, y = jax.lax.scan(step, jnp.zeros((*a["u"].shape[:2], a["A"].shape[1])), time_first)
        return (jnp.moveaxis(y, 0, 2) + a["D"][:, None] * a["u"]) * jax.nn.silu(a["z"])

    arrays = {name: jnp.asarray(problem[name]) for name in DIFFERENTIABLE}
    dy = jnp.asarray(cotangent(problem))
    forward = jax.jit(scan)

    def loss(a: dict[str, Any]) -> Any:
        y = scan(a)
        return (y * dy).sum(), y

    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def both() -> Any:
        (_, y), gradients = jax.block_until_ready(gradient(arrays))
        return np.asarray(y), {name: np.asarray(g) for name, g in gradients.items()}

    return lambda: np.asarray(jax.block_until_ready(forward(arrays))), both


def torch_scan(a: dict[str, Any]) -> Any:
    """What users of mamba_ssm are left with if its extension is missing: all decays in memory, a loop over time."""
    import torch
    import torch.nn.functional as F

    delta = F.softplus(a["delta"] + a["delta_bias"][:, None])
    decays = torch.exp(torch.einsum("bdl,dn->bdln", delta, a["A"]))
    inputs = torch.einsum("bdl,bnl,bdl->bdln", delta, a["B"], a["u"])
    h, outputs = decays.new_zeros(decays[:, :, 0].shape), []
    # unbind: the backward of an index would fill an array of the size of all decays at every step
    for decay, x, C_t in zip(decays.unbind(2), inputs.unbind(2), a["C"].unbind(2), strict=True):
        h = decay * h + x
        outputs.append(torch.einsum("bdn,bn->bd", h, C_t))
    return (torch.stack(outputs, 2) + a["D"][:, None] * a["u"]) * F.silu(a["z"])


def torch_formula(problem: dict[str, Any]) -> Pair:
    """``torch_scan`` and its derivative by autograd."""
    import torch

    arrays = {name: torch.from_numpy(problem[name]).clone().requires_grad_() for name in DIFFERENTIABLE}
    dy = torch.from_numpy(cotangent(problem))

    def forward() -> Any:
        with torch.no_grad():
            return torch_scan(arrays).numpy()

    def both() -> Any:
        y = torch_scan(arrays)
        gradients = torch.autograd.grad((y * dy).sum(), [arrays[name] for name in DIFFERENTIABLE])
        return y.detach().numpy(), dict(zip(DIFFERENTIABLE, (g.numpy() for g in gradients), strict=True))

    return forward, both


def prototype(folder: Path) -> Callable[[dict[str, Any]], Pair]:
    """Our first experiment (nb_vec.py, nb_vec_bwd.py in ``folder``): AVX-512, float32, whole tiles only."""

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    forward_module, backward_module = load("nb_vec"), load("nb_vec_bwd")
    forward_module.MODE = "scalef"
    plain, keeping, backward = forward_module.make(64), backward_module.make_fwd_ck(32), backward_module.make_bwd(32)

    def bind(problem: dict[str, Any]) -> Pair:
        names = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
        inputs = [problem[name] for name in names]
        batch, dim, length = problem["u"].shape
        state = problem["A"].shape[1]
        y, last = np.empty_like(problem["u"]), np.empty((batch, dim, state), np.float32)
        checkpoints = np.empty((batch, length // 32, dim // 16, state, 16), np.float32)
        order = ("u", "delta", "z", "A", "B", "C", "D", "delta_bias")
        gradients = {name: np.empty_like(problem[name]) for name in order}
        partial = [np.empty((2, *problem["B"].shape), np.float32) for _ in range(2)]
        dy = cotangent(problem)

        def forward() -> Any:
            plain(*inputs, y, last)
            return y

        def both() -> Any:
            keeping(*inputs, y, checkpoints)
            backward(*inputs, dy, checkpoints, *gradients.values(), *partial)
            return y, gradients

        return forward, both

    return bind
