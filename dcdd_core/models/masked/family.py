"""Masked samplers as a family: which folders are its, and how they are loaded."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ... import registry
from ...protocols import ImageTokenizer
from ..checkpoints import fingerprint_of, read_config
from ..int8 import store_in_int8
from .files import MODEL_TYPE, load_masked, tokenizer_folder
from .sampler import MaskedSampler


class MaskedFamily:
    """See `protocols.SamplerFamily`."""

    name = "masked"
    expected = f"the folder of a masked sampler (model_type {MODEL_TYPE!r}), as `train.py progressive` writes it"

    def reads(self, path: str) -> bool:
        """A folder whose config.json is of a masked sampler."""
        return (Path(path) / "config.json").exists() and read_config(path).get("model_type") == MODEL_TYPE

    def load_sampler(
        self,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        computes_on: torch.device | str | None = None,
    ) -> MaskedSampler:
        """See `files.load_masked`; `computes_on` makes no difference.

        Args:
            int8: the blocks' linear weights stay in 8 bits in memory too.
        """
        sampler = load_masked(path, device="cpu" if int8 else device, dtype=dtype)
        return in_int8(sampler, sampler.model.layers, device) if int8 else sampler

    def load_tokenizer(
        self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> ImageTokenizer:
        """The image tokenizer that config.json names, by the family that reads it.

        Raises:
            ValueError: if that is a masked sampler itself, and as that family's loader.
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
        """LlamaGen's, which the published masked samplers are trained on: the shapes of Janus' own."""
        return next(family for family in registry.samplers() if family.name == "janus").published_tokenizer()


def in_int8(sampler: MaskedSampler, blocks: nn.Module, device: torch.device | str) -> MaskedSampler:
    """A sampler, loaded on the CPU, moved to the device with the linear weights of its blocks in 8 bits.

    Raises:
        ValueError: without torchao.
    """
    model, fingerprint = sampler.model, f"{fingerprint_of(sampler.model.state_dict())} in int8"
    store_in_int8(blocks, device)
    model.to(device)
    return MaskedSampler(
        model, sampler.words, sampler.codebook, name=sampler.name, sampling=sampler.sampling, fingerprint=fingerprint
    )
