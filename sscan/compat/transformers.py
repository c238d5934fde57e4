"""sscan's Mamba block in the place of the mixers of transformers' Mamba models (transformers 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import functional

from sscan.torch.mamba import Mamba

if TYPE_CHECKING:
    from torch import nn


class Mixer(Mamba):
    """:class:`sscan.torch.Mamba`, called as ``MambaBlock`` of transformers calls its mixer."""

    def forward(  # type: ignore[override]
        self, hidden_states: Any, cache_params: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        """Apply the block, from the states in ``cache_params`` and into them.

        A mask (batch, length or more) counts for the last ``length`` tokens, and must be of padding on the left: where
        it changes, a new sequence starts.
        """
        length = hidden_states.shape[1]
        seq_idx = None if attention_mask is None else attention_mask[:, -length:].int()
        if cache_params is None:
            return super().forward(hidden_states, seq_idx=seq_idx)
        cache = cache_params.layers[self.layer_idx]
        states = (cache.conv_states[0], cache.recurrent_states[0]) if cache.has_previous_state[0] else None
        if states is not None and length == 1:
            return self.step(hidden_states, *states)[0]
        out, (conv_state, ssm_state) = super().forward(
            hidden_states, initial_states=states, return_final_states=True, seq_idx=seq_idx
        )
        cache_params.update_conv_state(  # which keeps d_conv columns, one more than matter
            functional.pad(conv_state, (1, 0)), self.layer_idx, conv_kernel_size=self.d_conv
        )
        cache_params.update_recurrent_state(ssm_state, self.layer_idx)
        return out


def replace_mixers(model: nn.Module) -> int:
    """Put a :class:`Mixer` with the same parameters in the place of every ``MambaMixer`` of a model; how many.

    The model keeps its parameters, names and checkpoints. No other class of mixers is touched, not even one that is
    derived from it.
    """
    places = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if type(child).__name__ == "MambaMixer"
    ]
    for module, name, child in places:
        setattr(module, name, _as_ours(child))
    return len(places)


def _as_ours(mixer: Any) -> Mixer:
    if mixer.activation not in ("silu", "swish"):
        raise ValueError(f"replace_mixers: the activation of a mixer must be 'silu', got {mixer.activation!r}")
    made = Mixer(
        mixer.hidden_size, mixer.ssm_state_size, mixer.conv_kernel_size,
        expand=mixer.intermediate_size / mixer.hidden_size, dt_rank=mixer.time_step_rank,
        conv_bias=mixer.use_conv_bias, bias=mixer.use_bias, layer_idx=mixer.layer_idx, device="meta",
    )  # fmt: skip
    made.load_state_dict(mixer.state_dict(keep_vars=True), assign=True)
    made.train(mixer.training)
    return made
