"""sscan's Mamba block in the place of the mixers of transformers' Mamba models (transformers 5.15 and later)."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from sscan.torch.mamba import Mamba

if TYPE_CHECKING:
    from torch import nn

OLDEST = "5.15"  # that is tested; caches of 5.13 and before keep their states in another form


class Mixer(Mamba):
    """:class:`sscan.torch.Mamba`, called as ``MambaBlock`` of transformers calls its mixer."""

    def forward(  # type: ignore[override]
        self, hidden_states: Any, cache: Any = None, attention_mask: Any = None, *, cache_params: Any = None
    ) -> Any:
        """Apply the block, from the states in ``cache`` and into them; ``cache_params`` is its name up to 5.23.

        As in transformers, tokens whose ``attention_mask`` is 0 enter neither convolution nor scan, wherever they are.
        A mask (batch, length or more) counts for the last ``length`` tokens. There are no other arguments, so what a
        later release gives is an error rather than ignored.
        """
        if cache is not None and cache_params is not None:
            raise TypeError("Mixer: cache and cache_params are one argument under two names; give one of them")
        cache = cache_params if cache is None else cache
        mask = None if attention_mask is None else self._of_last_tokens(attention_mask, hidden_states)
        if cache is None:
            return self._mix(hidden_states, None, False, mask=mask)[0]
        layer = cache.layers[self.layer_idx]
        if layer.record_past:
            raise ValueError("Mixer: a cache that records its past, to be cropped, cannot take back states of a scan")
        states = (layer.conv_states[0], layer.recurrent_states[0]) if layer.has_previous_state[0] else None
        if states is not None and torch.is_grad_enabled():
            states = tuple(state.clone() for state in states)  # the cache changes its own in place
        elif states is not None and mask is None and hidden_states.shape[1] == 1:
            return self.step(hidden_states, *states)[0]
        out, (conv_state, ssm_state) = self._mix(hidden_states, states, True, mask=mask)
        cache.update_conv_state(  # which keeps d_conv columns, one more than matter
            functional.pad(conv_state, (1, 0)), self.layer_idx, conv_kernel_size=self.d_conv
        )
        cache.update_recurrent_state(ssm_state, self.layer_idx)
        return out

    def _of_last_tokens(self, mask: Any, hidden: Any) -> Any:
        batch, length, _ = hidden.shape
        if mask.ndim != 2 or mask.shape[0] not in (1, batch) or mask.shape[1] < length:
            raise ValueError(
                f"Mixer: attention_mask must have shape (batch or 1, length or more) = ({batch}, {length} or more), "
                f"got {tuple(mask.shape)}"
            )
        return mask[:, mask.shape[1] - length :].expand(batch, -1)


def replace_mixers(model: nn.Module) -> int:
    """Make every ``MambaMixer`` of a model a :class:`Mixer`; how many there were.

    They stay the same objects, with the same parameters in the same order, and with whatever adapters, quantised layers
    or hooks there are in them. No other class of mixers is touched, not even one that is derived from it.
    """
    mixers = [module for module in model.modules() if type(module).__name__ == "MambaMixer"]
    for mixer in mixers:
        _check(mixer)
    for mixer in mixers:
        _make_ours(mixer)
    return len(mixers)


def _check(mixer: Any) -> None:
    installed = version("transformers")
    if [int(part) for part in installed.split(".")[:2]] < [int(part) for part in OLDEST.split(".")]:
        raise RuntimeError(f"replace_mixers: transformers must be {OLDEST} or later, got {installed}")
    if mixer.activation not in ("silu", "swish"):
        raise ValueError(f"replace_mixers: the activation of a mixer must be 'silu', got {mixer.activation!r}")
    if "forward" in mixer.__dict__ and not hasattr(mixer, "_hf_hook"):
        raise ValueError("replace_mixers: the forward of a mixer was replaced by something else; replace mixers first")


def _make_ours(mixer: Any) -> None:
    mixer.d_model, mixer.d_state, mixer.d_conv = mixer.hidden_size, mixer.ssm_state_size, mixer.conv_kernel_size
    mixer.d_inner, mixer.dt_rank = mixer.intermediate_size, mixer.time_step_rank
    mixer.expand, mixer.use_fast_path = mixer.d_inner / mixer.d_model, True
    mixer.__class__ = Mixer
    if hasattr(mixer, "_hf_hook"):  # accelerate's, which keeps there what it calls between its own
        mixer._old_forward = Mixer.forward.__get__(mixer)
