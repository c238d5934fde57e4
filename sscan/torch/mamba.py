"""The Mamba block as a ``torch.nn.Module``, with the parameters and the call of mamba_ssm's."""

from __future__ import annotations

import math
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from sscan.models.arguments import check_flag, check_integer, check_number
from sscan.torch import _registered
from sscan.torch._arithmetic import diagonal, is_planned_step
from sscan.torch._block import applied, applied_back, mamba, masked, planned_step
from sscan.torch._library import autocast_dtype, check_tensors
from sscan.torch.ops import causal_conv1d, causal_conv1d_update, selective_state_update

if TYPE_CHECKING:
    from torch import Tensor

States = tuple[torch.Tensor, torch.Tensor]
Weights = tuple[Any, Any]  # weight and bias of a part

# The parts of a block, and the class whose call sscan knows how to do without.
_PARTS = {"in_proj": nn.Linear, "conv1d": nn.Conv1d, "x_proj": nn.Linear, "dt_proj": nn.Linear, "out_proj": nn.Linear}
_TENSORS = (nn.Parameter, torch.Tensor, FakeTensor)


def _plain(part: Any, kind: Any) -> Weights | None:
    """Weight and bias of a part, if a call of it is what its class makes of them, and nothing else.

    Not so with hooks, nor with a forward of its own, as accelerate puts it there to offload weights; nor for another
    class, as adapters, quantised layers and parametrisations have; nor for a weight that computes by itself.
    """
    if (
        type(part) is kind
        and not (part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks)
        and "forward" not in part.__dict__
        and (kind is nn.Linear or (part.groups == part.in_channels and _is_causal(part)))
    ):
        parameters = part._parameters  # at a tenth of the time that the attributes take
        if "bias" in parameters and type(parameters.get("weight")) in _TENSORS:
            return parameters["weight"], parameters["bias"]
    return None


def _is_causal(conv: Any) -> bool:
    """Whether a step sees the inputs right before it, and zeros before the first."""
    (width,) = conv.kernel_size
    return bool(conv.padding == (width - 1,) and conv.stride == conv.dilation == (1,) and conv.padding_mode == "zeros")


def _in_one_dtype(*tensors: Any) -> tuple[Any, ...]:
    """The tensors in autocast's dtype, if there is one, and the first is not in float64.

    Before autocast would, which casts each operand of each product anew, and an expanded one row by row.
    """
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensors[0].dtype is torch.float64:
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if x is None else x.to(dtype) for x in tensors)


def _check_options(
    d_model: int, expand: Any, dt_rank: Any, dt_min: Any, dt_max: Any, dt_scale: Any, dt_init_floor: Any
) -> None:
    """TypeError or ValueError for numbers that a block cannot be made of, by name."""
    for name, number in (("expand", expand), ("dt_min", dt_min), ("dt_max", dt_max)):
        check_number("Mamba", name, number, positive=True)
    for name, number in (("dt_scale", dt_scale), ("dt_init_floor", dt_init_floor)):
        check_number("Mamba", name, number)
    if int(expand * d_model) < 1:
        raise ValueError(f"Mamba: expand * d_model must be at least 1, got {expand} * {d_model}")
    if dt_min > dt_max:
        raise ValueError(f"Mamba: dt_min must be at most dt_max, got {dt_min} and {dt_max}")
    if dt_rank != "auto":
        check_integer("Mamba", "dt_rank", dt_rank)


class Mamba(nn.Module):  # type: ignore[misc]
    """A Mamba block (section 3.4 of the paper): (batch, length, d_model) to the same.

    Constructor, initial values, names of parameters, ``forward``, ``step`` and ``allocate_inference_cache`` are those
    of ``mamba_ssm.Mamba``, so that checkpoints and code carry over. Beyond it: initial states and packed sequences,
    the CPU, ``torch.compile(fullgraph=True)``, second derivatives, and ``bias=True`` trains.

    Whatever stands at ``in_proj``, ``conv1d``, ``x_proj``, ``dt_proj`` and ``out_proj`` is called, in ``forward`` as in
    ``step``: adapters, quantised or offloaded layers, layers with hooks or parametrisations. Of a plain ``nn.Linear``
    or ``nn.Conv1d`` without any of these, weight and bias may be read instead.

    Parameters
    ----------
    d_model : int
        Width of the input and the output.
    d_state, d_conv, expand
        States of each channel, taps of the convolution, and d_inner / d_model.
    dt_rank : int or "auto"
        Rank of the step size; "auto" is ceil(d_model / 16).
    dt_min, dt_max, dt_init, dt_scale, dt_init_floor
        The step size starts log-uniform on [dt_min, dt_max], never below dt_init_floor; ``dt_init``, "random" or
        "constant", and ``dt_scale`` set dt_proj.weight.
    conv_bias, bias : bool
        Whether the convolution, and the projections in and out, have one.
    use_fast_path : bool
        True keeps only the output of the input projection for the backward, which makes the rest again, as long as all
        five parts are plain. False, or another part, keeps the inputs of every op: more memory, less time.
    layer_idx : int, optional
        The key of this layer in ``inference_params.key_value_memory_dict``.
    device, dtype
        Of the parameters; A_log and D are at least float32.

    Notes
    -----
    Under autocast the projections and the arrays along time are in autocast's dtype; the parameters of convolution and
    scan, sums and states stay in float32. CPU and CUDA; never waits for the GPU.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        if dt_init not in ("random", "constant"):
            raise ValueError(f"Mamba: dt_init must be 'random' or 'constant', got {dt_init!r}")
        sizes: dict[str, Any] = {"d_model": d_model, "d_state": d_state, "d_conv": d_conv}
        for name, size in sizes.items():
            if not isinstance(size, Integral) or size < 1:
                raise ValueError(f"Mamba: {name} must be a positive integer, got {size!r}")
        _check_options(d_model, expand, dt_rank, dt_min, dt_max, dt_scale, dt_init_floor)
        for name, flag in (("conv_bias", conv_bias), ("bias", bias), ("use_fast_path", use_fast_path)):
            check_flag("Mamba", name, flag)
        if dtype is not None and not dtype.is_floating_point:
            raise TypeError(f"Mamba: dtype must be a floating-point one, got {dtype}")
        super().__init__()
        made = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx

        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **made)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias, **made
        )
        self.activation, self.act = "silu", nn.SiLU()  # for subclasses with a forward of their own; not used here
        self.x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * d_state, bias=False, **made)
        self.dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **made)
        wide = torch.promote_types(self.dt_proj.weight.dtype, torch.float32)
        self.A_log = nn.Parameter(torch.empty(self.d_inner, d_state, device=device, dtype=wide))
        self.D = nn.Parameter(torch.empty(self.d_inner, device=device, dtype=wide))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **made)
        self._initialise(dt_min, dt_max, dt_init, dt_scale, dt_init_floor)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def _initialise(self, dt_min: float, dt_max: float, dt_init: str, dt_scale: float, dt_init_floor: float) -> None:
        """Values and marks of the parameters that PyTorch's own do not fit."""
        bound = dt_scale * self.dt_rank**-0.5
        if dt_init == "constant":
            nn.init.constant_(self.dt_proj.weight, bound)
        else:
            nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        log_step = torch.empty_like(self.D).uniform_(math.log(dt_min), math.log(dt_max))
        step = log_step.exp().clamp(min=dt_init_floor)
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # its softplus is the step
        self.A_log.copy_(torch.arange(1, self.d_state + 1, device=self.A_log.device).log())
        self.D.fill_(1.0)
        self.dt_proj.bias._no_reinit = True
        self.A_log._no_weight_decay = self.D._no_weight_decay = True

    @overload
    def forward(
        self, hidden_states: Tensor, inference_params: Any = None, *, initial_states: States | None = None,
        return_final_states: Literal[False] = False, seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def forward(
        self, hidden_states: Tensor, inference_params: Any = None, *, initial_states: States | None = None,
        return_final_states: Literal[True], seq_idx: Tensor | None = None, cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, States]: ...  # fmt: skip

    def forward(
        self,
        hidden_states: Tensor,
        inference_params: Any = None,
        *,
        initial_states: States | None = None,
        return_final_states: bool = False,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Any:
        """Apply the block along sequences.

        Parameters
        ----------
        hidden_states : (batch, length, d_model)
        inference_params : optional
            mamba_ssm's: states are taken from ``key_value_memory_dict[layer_idx]``, (conv_state, ssm_state) made by
            ``allocate_inference_cache`` if there is none, and updated in place. With ``seqlen_offset`` 0 the sequences
            begin here; else they go on, by any number of tokens.
        initial_states : (conv_state, ssm_state), optional
            Where the sequences go on from: (batch, d_inner, d_conv - 1), or more columns of which the last count, and
            (batch, d_inner, d_state). With ``cu_seqlens`` one for each sequence. Differentiable.
        return_final_states : bool
            Also return ``(conv_state, ssm_state)`` after the last token, differentiable, conv_state of d_conv - 1
            columns.
        seq_idx : (batch, length) integers, optional
            Numbers of the sequences packed into each row; see :func:`sscan.selective_scan`.
        cu_seqlens : (sequences + 1,) integers, optional
            Borders of the sequences packed into a batch of one.

        Returns
        -------
        (batch, length, d_model), or a pair of that and the final states.
        """
        if inference_params is not None:
            if initial_states is not None or return_final_states:
                raise ValueError("Mamba: inference_params bring states of their own; give them or initial_states")
            return self._infer(hidden_states, inference_params, seq_idx, cu_seqlens)
        out, final_states = self._mix(hidden_states, initial_states, return_final_states, seq_idx, cu_seqlens)
        return (out, final_states) if return_final_states else out

    def _mix(
        self, hidden: Any, initial_states: States | None, return_final_states: bool, seq_idx: Any = None,
        cu_seqlens: Any = None, mask: Any = None,
    ) -> tuple[Any, tuple[Any, ...]]:  # fmt: skip
        """The output, and the final states if they are asked for; nothing enters where the mask (batch, length) is 0.

        One op behind the input projection if all parts are plain, else part by part.
        """
        check_tensors("Mamba", {"hidden_states": hidden}, {"seq_idx": seq_idx, "cu_seqlens": cu_seqlens})
        if hidden.ndim != 3:
            raise ValueError(
                f"Mamba: hidden_states must have shape (batch, length, d_model), got {tuple(hidden.shape)}"
            )
        plain = self._plain_parts(hidden)
        self._check_input("Mamba", plain["in_proj"], hidden)
        if initial_states is not None or return_final_states:
            self._check_taps()
        if mask is not None:
            hidden = hidden * mask[..., None].to(hidden.dtype)
        conv_state, ssm_state = (None, None) if initial_states is None else initial_states
        if conv_state is not None:
            conv_state = self._last_inputs(conv_state)
        rest = (conv_state, ssm_state, seq_idx, cu_seqlens, mask)
        if not self.use_fast_path or None in plain.values() or plain["x_proj"][1] is not None:
            return self._part_by_part(plain, hidden, *rest)
        in_proj, conv, (x_proj_weight, _), (dt_proj_weight, delta_bias), out_proj = plain.values()
        dtype = None if hidden.dtype is torch.float64 else autocast_dtype(hidden)
        if dtype is not None:
            hidden = hidden.to(dtype)  # here, so that what is kept for the backward is as small
        out, conv_state, ssm_state, *_ = mamba(
            hidden, *in_proj, *conv, x_proj_weight, dt_proj_weight, *out_proj, self.A_log, self.D, delta_bias, *rest,
            dtype, return_final_states,
        )  # fmt: skip
        return out, (conv_state, ssm_state)

    def _check_input(self, owner: str, in_proj: Weights | None, hidden: Any) -> None:
        """ValueError or TypeError for what a plain in_proj does not take; another one knows by itself."""
        if in_proj is None:
            return
        weight, _ = in_proj
        if hidden.shape[2] != weight.shape[1]:
            raise ValueError(
                f"{owner}: hidden_states must have shape (batch, length, {weight.shape[1]}), got {tuple(hidden.shape)}"
            )
        if hidden.dtype is torch.float64 or autocast_dtype(hidden) is None:
            if hidden.dtype is not weight.dtype:
                raise TypeError(
                    f"{owner}: hidden_states must have the dtype of the weights, {weight.dtype}, got {hidden.dtype}"
                )
        elif not hidden.is_floating_point():
            raise TypeError(f"{owner}: hidden_states must have a floating-point dtype, got {hidden.dtype}")

    def _check_taps(self) -> None:
        """ValueError if states of d_conv - 1 inputs are not all that the convolution knows of the past."""
        conv = self.conv1d
        if isinstance(conv, nn.Conv1d) and not (conv.kernel_size == (self.d_conv,) and _is_causal(conv)):
            raise ValueError(
                f"Mamba: states and steps need a conv1d with d_conv = {self.d_conv} taps side by side and zeros before "
                f"the first input, got {conv}"
            )

    def _last_inputs(self, conv_state: Any) -> Any:
        """The columns that the next steps need, d_conv - 1 of those that there are."""
        kept = self.d_conv - 1
        if conv_state.shape[-1] < kept:
            raise ValueError(f"Mamba: conv_state must have {kept} columns or more, got {tuple(conv_state.shape)}")
        return conv_state[..., conv_state.shape[-1] - kept :]

    def _plain_parts(self, hidden: Any) -> dict[str, Any]:
        """Weight and bias of every part that may be read instead of called, and None for the others.

        TypeError for a parameter that is not where the input is: PyTorch multiplies with meta tensors without a word.
        """
        device = hidden.device
        if _has_any_global_hook():
            plain = dict.fromkeys(_PARTS)
        else:
            parts = self._modules
            plain = {name: _plain(parts.get(name), kind) for name, kind in _PARTS.items()}
        own = self._parameters
        for pair in (*plain.values(), (own.get("A_log"), own.get("D"))):
            if pair is not None:
                for x in pair:
                    if x is not None and x.device != device:
                        self._refuse_device(device, x)
        return plain

    def _refuse_device(self, device: Any, parameter: Any) -> None:
        name = next(name for name, x in self.named_parameters() if x is parameter)
        raise TypeError(
            f"Mamba: {name} must be on {device}, where hidden_states is, got a tensor on {parameter.device}"
        )

    def _project_in(self, weights: Weights | None, hidden: Any) -> Any:
        """x and z, (batch, d_inner, length) each, if possible from two products: their gradients need not be joined."""
        if weights is None:
            return self._product("in_proj", None, hidden.mT).chunk(2, 1)
        hidden, weight, bias = _in_one_dtype(hidden, *weights)
        biases = (None, None) if bias is None else bias.chunk(2)
        return [applied(w, hidden.mT, b) for w, b in zip(weight.chunk(2), biases, strict=True)]

    def _product(self, name: str, weights: Weights | None, x: Any) -> Any:
        """What a projection makes of x (batch, in, length): (batch, out, length), with steps of time as neighbours."""
        if weights is None:
            return getattr(self, name)(x.mT).mT.contiguous()
        x, weight, bias = _in_one_dtype(x, *weights)
        return applied(weight, x, bias)

    def _part_by_part(
        self, plain: dict[str, Any], hidden: Any, conv_state: Any, ssm_state: Any, seq_idx: Any, cu_seqlens: Any,
        mask: Any,
    ) -> tuple[Any, tuple[Any, Any]]:  # fmt: skip
        x, z = self._project_in(plain["in_proj"], hidden)
        u, conv_state = self._convolve(plain["conv1d"], x, conv_state, seq_idx, cu_seqlens)
        u = masked(u, mask)
        dt, B, C = self._split(self._product("x_proj", plain["x_proj"], u))
        dt_proj, delta_bias = plain["dt_proj"], None
        if dt_proj is not None:  # the scan adds the bias, in its own precision
            dt_proj, delta_bias = (dt_proj[0], None), dt_proj[1]
        delta = self._product("dt_proj", dt_proj, dt)
        # Without checkpoints, which can be larger than all else that is kept: the backward makes them again.
        y, ssm_state, _ = _registered.selective_scan(
            u, delta, diagonal(self.A_log), B, C, self.D, z, delta_bias, ssm_state, seq_idx, cu_seqlens, True, "mamba",
            True, False,
        )  # fmt: skip
        if plain["out_proj"] is None:
            return self.out_proj(y.mT), (conv_state, ssm_state)
        y, weight, bias = _in_one_dtype(y, *plain["out_proj"])
        return applied_back(weight, bias, y), (conv_state, ssm_state)

    def _convolve(self, weights: Weights | None, x: Any, conv_state: Any, seq_idx: Any, cu_seqlens: Any) -> Any:
        if weights is not None:
            weight, bias = weights
            return causal_conv1d(x, weight.squeeze(1), bias, "silu", conv_state, True, seq_idx, cu_seqlens)
        if seq_idx is not None or cu_seqlens is not None:
            raise ValueError("Mamba: seq_idx and cu_seqlens need a plain nn.Conv1d at conv1d, without hooks")
        length, kept = x.shape[2], self.d_conv - 1
        if conv_state is None:
            u, inputs = self.conv1d(x)[..., :length], functional.pad(x[..., max(length - kept, 0) :], (kept, 0))
        else:
            inputs = torch.cat([conv_state.to(x.dtype), x], 2)
            u = self.conv1d(inputs)[..., kept : kept + length]
        return functional.silu(u), inputs[..., inputs.shape[2] - kept :]

    def _split(self, x_dbl: Any) -> Any:
        """dt, B and C, which the projection of the channels puts one behind the other."""
        return torch.split_with_sizes(x_dbl, [self.dt_rank, self.d_state, self.d_state], 1)

    def _refuse_gradients(self, what: str, *tensors: Any) -> None:
        """TypeError if gradients are recorded: states that are updated in place carry none."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in (*tensors, *self.parameters())):
            raise TypeError(
                f"Mamba: {what} updates states in place, which loses gradients; use torch.no_grad(), or forward with "
                f"initial_states and return_final_states, which is differentiable"
            )

    def _infer(self, hidden: Any, inference_params: Any, seq_idx: Any, cu_seqlens: Any) -> Any:
        cache, begins = inference_params.key_value_memory_dict, inference_params.seqlen_offset == 0
        if self.layer_idx is None:
            raise ValueError("Mamba: inference_params need a layer_idx, the layer's key in them; got None")
        self._refuse_gradients("forward with inference_params", hidden)
        sequences = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(sequences, hidden.shape[1])
        conv_state, ssm_state = states = cache[self.layer_idx]
        if not conv_state.shape[0] == ssm_state.shape[0] == sequences:
            raise ValueError(
                f"Mamba: inference_params must have states of {sequences} sequences, as hidden_states has, got "
                f"{tuple(conv_state.shape)} and {tuple(ssm_state.shape)}"
            )
        if hidden.shape[1] == 1 and not begins and seq_idx is None and cu_seqlens is None:
            return self.step(hidden, *states)[0]
        out, (last_inputs, last_state) = self._mix(hidden, None if begins else states, True, seq_idx, cu_seqlens)
        conv_state.zero_()
        self._last_inputs(conv_state).copy_(last_inputs)
        ssm_state.copy_(last_state)
        return out

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token, hidden_states (batch, 1, d_model): its output, and the states, which are updated in place.

        conv_state (batch, d_inner, d_conv - 1 or more) and ssm_state (batch, d_inner, d_state) are what
        ``allocate_inference_cache`` gave, or the final states of ``forward``. Not differentiable: TypeError for what
        requires grad, except under ``torch.no_grad()``.
        """
        check_tensors("Mamba.step", {"hidden_states": hidden_states}, {})
        if hidden_states.ndim != 3 or hidden_states.shape[1] != 1:
            raise ValueError(
                f"Mamba.step: hidden_states must have shape (batch, 1, d_model), got {tuple(hidden_states.shape)}"
            )
        self._refuse_gradients("step", hidden_states, conv_state, ssm_state)
        self._check_taps()
        plain = self._plain_parts(hidden_states)
        self._check_input("Mamba.step", plain["in_proj"], hidden_states)
        if (out := self._planned_step(plain, hidden_states[:, 0], conv_state, ssm_state)) is not None:
            return out[:, None], conv_state, ssm_state
        x, z = self._project_next("in_proj", plain, hidden_states[:, 0]).chunk(2, 1)
        x = self._convolve_next(plain["conv1d"], x, conv_state)
        dt, B, C = self._split(self._project_next("x_proj", plain, x))
        if plain["dt_proj"] is None:
            dt, dt_bias = self.dt_proj(dt), None
        else:
            weight, dt_bias = plain["dt_proj"]
            dt = functional.linear(dt, weight)
        y = selective_state_update(ssm_state, x, dt, self.A_log, B, C, self.D, z, dt_bias, True, A_log=True)
        return self._project_next("out_proj", plain, y)[:, None], conv_state, ssm_state

    def _planned_step(self, plain: dict[str, Any], x: Any, conv_state: Any, ssm_state: Any) -> Any:
        """The output of a step that is one plan; None if it cannot be."""
        if torch.compiler.is_compiling() or None in plain.values():
            return None
        (in_proj, _), (conv, conv_bias), (x_proj, _), (dt_proj, delta_bias), (out_proj, _) = plain.values()
        biases = (plain[name][1] for name in ("in_proj", "x_proj", "out_proj"))
        if any(bias is not None for bias in biases) or not is_planned_step((x, in_proj, x_proj, dt_proj, out_proj)):
            return None
        states = conv_state, ssm_state
        weights = (in_proj, conv, conv_bias, x_proj, dt_proj, out_proj)
        out = planned_step(x, *weights, self.A_log, self.D, delta_bias, *states)
        torch.autograd.graph.increment_version(states)
        return out

    def _project_next(self, name: str, plain: dict[str, Any], x: Any) -> Any:
        """What a projection makes of one token, without the call of a module where nothing stands in its way."""
        weights = plain[name]
        return getattr(self, name)(x) if weights is None else functional.linear(x, *weights)

    def _convolve_next(self, weights: Weights | None, x: Any, conv_state: Any) -> Any:
        if weights is not None:
            weight, bias = weights
            return causal_conv1d_update(x, conv_state, weight.squeeze(1), bias, "silu")
        inputs = torch.cat([self._last_inputs(conv_state).to(x.dtype), x[..., None]], 2)
        conv_state.copy_(torch.cat([conv_state, x[..., None]], 2)[..., 1:])
        return functional.silu(self.conv1d(inputs)[..., self.d_conv - 1])

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> tuple[Tensor, Tensor]:
        """The states before the first token, zeros: conv_state (batch_size, d_inner, d_conv), ssm_state (.., d_state).

        Their size does not depend on ``max_seqlen``. Without a ``dtype``, conv_state has that of the weights, and
        ssm_state is at least float32, because its rounding errors add up over a sequence.
        """
        made, wide = self.A_log.new_zeros, torch.promote_types(self.A_log.dtype, torch.float32)
        stored = next((x.dtype for x in self.conv1d.parameters()), wide)  # whatever wraps the convolution
        conv_state = made((batch_size, self.d_inner, self.d_conv), dtype=dtype or stored)
        return conv_state, made((batch_size, self.d_inner, self.d_state), dtype=dtype or wide)
