"""The Mamba block as a ``torch.nn.Module``, with the parameters and the call of mamba_ssm's."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional

from sscan.torch._mamba_inner import applied, composed, mamba_inner
from sscan.torch.ops import causal_conv1d_update, selective_state_update

States = tuple[Any, Any]


class Mamba(nn.Module):  # type: ignore[misc]
    """A Mamba block (section 3.4 of the paper): (batch, length, d_model) to the same.

    Constructor, initial values, names of parameters, ``forward``, ``step`` and ``allocate_inference_cache`` are those
    of ``mamba_ssm.Mamba``, so that checkpoints and code carry over. Beyond it: initial states and packed sequences,
    the CPU, ``torch.compile(fullgraph=True)``, second derivatives, and ``bias=True`` trains.

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
        True keeps only the output of the input projection for the backward, which makes the rest again. False keeps
        the inputs of every op: more memory, less time.
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

    def forward(
        self,
        hidden_states: Any,
        inference_params: Any = None,
        *,
        initial_states: States | None = None,
        return_final_states: bool = False,
        seq_idx: Any = None,
        cu_seqlens: Any = None,
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
        x, z = self._project_in(hidden_states)
        conv_state, ssm_state = (None, None) if initial_states is None else initial_states
        if conv_state is not None:
            conv_state = conv_state[..., conv_state.shape[-1] - (self.d_conv - 1) :]
        inner = mamba_inner if self.use_fast_path else composed
        out, *final_states = inner(
            x, z, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.x_proj.weight, self.dt_proj.weight,
            self.out_proj.weight, self.out_proj.bias, self._A(), self.D, self.dt_proj.bias,
            conv_state, ssm_state, seq_idx, cu_seqlens, True, return_final_states,
        )  # fmt: skip
        return (out, tuple(final_states)) if return_final_states else out

    def _project_in(self, hidden: Any) -> list[Any]:
        """x and z, (batch, d_inner, length) each, from two products: their gradients need not be joined."""
        weight, bias, device = self.in_proj.weight, self.in_proj.bias, hidden.device.type
        if torch.is_autocast_enabled(device) and hidden.dtype is not torch.float64:
            # Before autocast would, which casts each operand of each product anew, and an expanded one row by row.
            dtype = torch.get_autocast_dtype(device)
            hidden, weight, bias = (None if t is None else t.to(dtype) for t in (hidden, weight, bias))
        biases = (None, None) if bias is None else bias.chunk(2)
        return [applied(w, hidden.mT, b) for w, b in zip(weight.chunk(2), biases, strict=True)]

    def _A(self) -> Any:
        """The diagonal of the state matrix: always negative, so that no state grows by itself."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _infer(self, hidden_states: Any, inference_params: Any, seq_idx: Any, cu_seqlens: Any) -> Any:
        cache, begins = inference_params.key_value_memory_dict, inference_params.seqlen_offset == 0
        if self.layer_idx is None:
            raise ValueError("Mamba: inference_params need a layer_idx, the layer's key in them; got None")
        if self.layer_idx not in cache:
            cache[self.layer_idx] = self.allocate_inference_cache(hidden_states.shape[0], hidden_states.shape[1])
        states = cache[self.layer_idx]
        if hidden_states.shape[1] == 1 and not begins:
            return self.step(hidden_states, *states)[0]
        out, final_states = self(
            hidden_states, initial_states=None if begins else states, return_final_states=True,
            seq_idx=seq_idx, cu_seqlens=cu_seqlens,
        )  # fmt: skip
        with torch.no_grad():
            conv_state, ssm_state = states
            conv_state[..., : conv_state.shape[-1] - (self.d_conv - 1)] = 0
            conv_state[..., conv_state.shape[-1] - (self.d_conv - 1) :] = final_states[0]
            ssm_state.copy_(final_states[1])
        return out

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def step(self, hidden_states: Any, conv_state: Any, ssm_state: Any) -> tuple[Any, Any, Any]:
        """One token, hidden_states (batch, 1, d_model): its output, and the states, which are updated in place.

        Not differentiable. conv_state (batch, d_inner, d_conv - 1 or more) and ssm_state (batch, d_inner, d_state) are
        what ``allocate_inference_cache`` gave, or the final states of ``forward``.
        """
        if hidden_states.ndim != 3 or hidden_states.shape[1] != 1:
            raise ValueError(
                f"Mamba.step: hidden_states must have shape (batch, 1, d_model), got {tuple(hidden_states.shape)}"
            )
        x, z = self.in_proj(hidden_states[:, 0]).chunk(2, 1)
        x = causal_conv1d_update(x, conv_state, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], 1)
        dt = functional.linear(dt, self.dt_proj.weight)
        y = selective_state_update(ssm_state, x, dt, self._A(), B, C, self.D, z, self.dt_proj.bias, True)
        return self.out_proj(y)[:, None], conv_state, ssm_state

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: Any = None, **kwargs: Any
    ) -> tuple[Any, Any]:
        """The states before the first token, zeros: conv_state (.., d_conv) and ssm_state (.., d_state).

        Their size does not depend on ``max_seqlen``. Without a ``dtype``, conv_state has that of the weights, and
        ssm_state is at least float32, because its rounding errors add up over a sequence.
        """
        weight, A_log = self.conv1d.weight, self.A_log
        conv_state = weight.new_zeros((batch_size, self.d_inner, self.d_conv), dtype=dtype or weight.dtype)
        wide = torch.promote_types(A_log.dtype, torch.float32)
        return conv_state, A_log.new_zeros((batch_size, self.d_inner, self.d_state), dtype=dtype or wide)
