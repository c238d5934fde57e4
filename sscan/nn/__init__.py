"""Mamba blocks and language models on NumPy or CuPy arrays, with the little automatic differentiation they need."""

from sscan.models.config import MambaConfig
from sscan.models.sampling import Sampler
from sscan.models.states import MambaState, States
from sscan.nn.attention import Attention
from sscan.nn.autodiff import Tensor, defvjp, defvjp_all, no_grad, primitive
from sscan.nn.bidirectional import BidirectionalMamba
from sscan.nn.capture import capture
from sscan.nn.gated import Gated, Ungated
from sscan.nn.gradient_check import check_gradients
from sscan.nn.h3 import H3
from sscan.nn.hyena import Hyena, HyenaFilter
from sscan.nn.language_model import MambaLM
from sscan.nn.losses import cross_entropy, linear_cross_entropy
from sscan.nn.mamba import Mamba
from sscan.nn.mlp import GLU, MLP
from sscan.nn.modules import Dropout, Embedding, LayerNorm, Linear, Module, Parameter, RMSNorm
from sscan.nn.optim import AdamW, clip_gradients, decay_groups, warmup_cosine
from sscan.nn.s4d import S4D
from sscan.nn.s6 import S6
from sscan.nn.sequence_config import SequenceConfig
from sscan.nn.sequence_model import SequenceModel
from sscan.nn.sequence_ops import causal_conv1d, linear_scan, rms_norm, selective_scan, ssm_convolution, ssm_kernel
from sscan.nn.state_matrix import FixedMatrix, StateMatrix
from sscan.nn.unet import UNet

__all__ = [
    "GLU",
    "H3",
    "MLP",
    "S4D",
    "S6",
    "AdamW",
    "Attention",
    "BidirectionalMamba",
    "Dropout",
    "Embedding",
    "FixedMatrix",
    "Gated",
    "Hyena",
    "HyenaFilter",
    "LayerNorm",
    "Linear",
    "Mamba",
    "MambaConfig",
    "MambaLM",
    "MambaState",
    "Module",
    "Parameter",
    "RMSNorm",
    "Sampler",
    "SequenceConfig",
    "SequenceModel",
    "StateMatrix",
    "States",
    "Tensor",
    "UNet",
    "Ungated",
    "capture",
    "causal_conv1d",
    "check_gradients",
    "clip_gradients",
    "cross_entropy",
    "decay_groups",
    "defvjp",
    "defvjp_all",
    "linear_cross_entropy",
    "linear_scan",
    "no_grad",
    "primitive",
    "rms_norm",
    "selective_scan",
    "ssm_convolution",
    "ssm_kernel",
    "warmup_cosine",
]
