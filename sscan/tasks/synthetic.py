"""What the paper's synthetic tasks have in common: their options say all about them, and symbols are right or wrong."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeVar

from sscan.models.files import content_of
from sscan.tasks.task import Task

if TYPE_CHECKING:
    from pathlib import Path

SyntheticT = TypeVar("SyntheticT", bound="Synthetic")


class Synthetic(Task):
    """A task of symbols; its goal is the share of mistakes."""

    unit = "bits"
    goal = "error"

    def in_unit(self, nats: float) -> float:
        """Bits of a symbol."""
        return nats / math.log(2)

    def about(self) -> dict[str, Any]:
        """Nothing: the options say it all."""
        return {}

    @classmethod
    def again(cls: type[SyntheticT], options: Any, about: dict[str, Any], checkpoint: Path, **given: Any) -> SyntheticT:
        """The task of a run."""
        with content_of(checkpoint):
            if about or given:
                raise ValueError(f"{cls.name}: unknown {', '.join((*about, *given))}")
        return cls(options)
