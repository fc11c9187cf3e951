"""Masked samplers as families: how they are loaded, and the family of those that are trained here."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import torch

from ... import registry
from ...protocols import ImageTokenizer
from ..checkpoints import read_config
from .files import MODEL_TYPE, load_masked, tokenizer_folder
from .sampler import MaskedSampler


class LoadsMasked(ABC):
    """How all families of masked samplers load one; see `protocols.SamplerFamily`."""

    def load_sampler(
        self,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        computes_on: torch.device | str | None = None,
    ) -> MaskedSampler:
        """Loads the sampler in a folder; `computes_on` makes no difference.

        Args:
            int8: hold the linear weights of the network's `blocks` in 8 bits in memory.

        Raises:
            ValueError: as `read_sampler`, and for int8 without torchao.
        """
        sampler = self.read_sampler(path, device="cpu" if int8 else device, dtype=dtype)
        if int8:
            sampler.store_in_int8(device)
        return sampler

    @abstractmethod
    def read_sampler(self, path: str, *, device: torch.device | str, dtype: torch.dtype) -> MaskedSampler:
        """Loads the sampler in a folder without rounding its weights to 8 bits."""


class MaskedFamily(LoadsMasked):
    """See `protocols.SamplerFamily`."""

    name = "masked"
    expected = f"the folder of a masked sampler (model_type {MODEL_TYPE!r}), as `train.py progressive` writes it"

    def reads(self, path: str) -> bool:
        """True for a folder whose config.json is of a masked sampler."""
        return (Path(path) / "config.json").exists() and read_config(path).get("model_type") == MODEL_TYPE

    def read_sampler(self, path: str, *, device: torch.device | str, dtype: torch.dtype) -> MaskedSampler:
        """See `files.load_masked`."""
        return load_masked(path, device=device, dtype=dtype)

    def load_tokenizer(
        self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> ImageTokenizer:
        """Loads the image tokenizer that config.json names, by the family that reads it.

        Raises:
            ValueError: if config.json names a masked sampler itself, and as that family's loader.
        """
        where = tokenizer_folder(path)
        family = registry.sampler_family(where)
        if family.name == self.name:
            raise ValueError(
                f"{Path(path) / 'config.json'} names {where} as its image tokenizer, which is a masked sampler and has "
                "none of its own: name the folder of the tokenizer"
            )
        return family.load_tokenizer(str(where), device=device, dtype=dtype)

    def published_tokenizer(self) -> ImageTokenizer:
        """LlamaGen's tokenizer, which the published masked samplers are trained on; it has the shapes of Janus' own."""
        return next(family for family in registry.samplers() if family.name == "janus").published_tokenizer()
