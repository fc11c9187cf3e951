"""Prompts -> a file of text features, which a sampler reads in the place of a text encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch

from .. import registry


@runtime_checkable
class CaptionFamily(Protocol):
    """A `SamplerFamily` whose samplers read saved text features of captions where they have no text encoder."""

    def captions_file(self, path: str) -> Path:
        """Where a model's samplers look for them."""
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
        """Encodes prompts by a model's text encoder, and adds their features to a file; its others stay.

        Args:
            device: where the text encoder computes; no other part of the model is read.
            on_progress: called with (captions that are there, captions of these prompts).

        Returns:
            Captions of these prompts that are new in the file, and all that it holds.

        Raises:
            ValueError: for a model without a text encoder, prompts that cannot be encoded, and a file with features of
                another text encoder or dtype. Nothing has been encoded then.
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
