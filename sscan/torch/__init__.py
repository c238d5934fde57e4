"""The ops of sscan inside PyTorch: under autograd, torch.compile, torch.export and autocast."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise ModuleNotFoundError(
        'sscan.torch needs PyTorch, which is installed by: pip install "sscan[torch]"', name="torch"
    )

from sscan.models.config import MambaConfig
from sscan.models.states import MambaState, States
from sscan.torch import _flops  # noqa: F401  # registers what PyTorch's counter asks for
from sscan.torch.bidirectional import BidirectionalMamba
from sscan.torch.language_model import MambaLM, decay_groups
from sscan.torch.mamba import Mamba
from sscan.torch.ops import (
    causal_conv1d,
    causal_conv1d_update,
    discretize,
    linear_scan,
    rms_norm,
    selective_scan,
    selective_state_update,
    ssm_convolution,
    ssm_kernel,
)

__all__ = [
    "BidirectionalMamba",
    "Mamba",
    "MambaConfig",
    "MambaLM",
    "MambaState",
    "States",
    "causal_conv1d",
    "causal_conv1d_update",
    "decay_groups",
    "discretize",
    "linear_scan",
    "rms_norm",
    "selective_scan",
    "selective_state_update",
    "ssm_convolution",
    "ssm_kernel",
]
