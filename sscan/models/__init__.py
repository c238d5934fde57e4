"""What models are, whatever computes them: configurations, files, sampling, generation; no framework is needed."""

from sscan.models.config import BlockConfig, MambaConfig
from sscan.models.sampling import Sampler
from sscan.models.states import MambaState, States

__all__ = ["BlockConfig", "MambaConfig", "MambaState", "Sampler", "States"]
