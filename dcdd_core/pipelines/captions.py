"""Prompts -> a file of text features, which a sampler reads instead of running a text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from .. import registry


@runtime_checkable
class CaptionFamily(Protocol):
    """A `SamplerFamily` whose samplers, if they have no text encoder, read saved text features of captions."""

    def captions_file(self, path: str) -> Path:
        """The file in which a model's samplers look for saved text features."""
        ...

    def encode_captions(
        self,
        path: str,
        prompts: Sequence[str],
        file: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[int, int]:
        """Encodes prompts with a model's text encoder and adds their features to a file, keeping those it already has.

        Args:
            device: device that the text encoder computes on; no other part of the model is read.
            on_progress: called with (captions of these prompts done so far, captions of these prompts).

        Returns:
            The number of captions added to the file, and the number it holds now.

        Raises:
            ValueError: for a model without a text encoder, prompts that cannot be encoded, and a file with features of
                another text encoder or dtype; in these cases nothing has been encoded.
        """
        ...


def caption_family(path: str | Path) -> CaptionFamily:
    """The family of a model that reads saved text features.

    Raises:
        ValueError: for any other model, and as `registry.sampler_family`.
    """
    family = registry.sampler_family(path)
    if not isinstance(family, CaptionFamily):
        raise ValueError(
            f"{path} is a {family.name}, which has no use for saved features of captions: give the folder of a model "
            "with a text encoder beside it, such as LlamaGen"
        )
    return family
