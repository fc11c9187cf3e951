"""Where the models of a pipeline compute, and what happens around them."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch

from ..types import Calibration, Codebook, Condition, DCDDWarning, TokenLogits

Result = TypeVar("Result", TokenLogits, Condition, Calibration, Codebook, torch.Tensor)


class Host:
    """The plain host: every model is on its device already, and results stay where they were computed.

    A program with a memory manager of its own subclasses it (`nodes.host`).

    Attributes:
        remedy: what to do if a single image does not fit into memory.
        weights_resident: see `TokenSampler.sample`.
    """

    remedy = "use a smaller image, or hold the models in fewer bits"
    weights_resident = False

    def bring(self, memory: int = 0) -> None:
        """Called before models compute: brings them to their device.

        Args:
            memory: estimate of the bytes that the work takes besides the weights.
        """

    def check(self) -> None:
        """Called between images; may raise to stop."""

    def on_split(self, size: int) -> None:
        """Called when a batch did not fit into memory.

        Args:
            size: images that are tried together next.
        """
        warnings.warn(f"out of memory: continuing with {size} images at a time", DCDDWarning, stacklevel=4)

    def on_fallback(self, change: str) -> None:
        """Called when work that did not fit into memory continues in another way.

        Args:
            change: what is done differently now, as text.
        """
        warnings.warn(f"out of memory: {change}", DCDDWarning, stacklevel=4)

    def keep(self, result: Result) -> Result:
        """Moves a finished part to where results are kept."""
        return result


PLAIN = Host()
