"""LlamaGen's VQ-16 tokenizer, from the file that its authors publish or the same tensors as safetensors.

Janus' image tokenizer was trained from it: the same network, with the tensor names that DeepSeek's files use too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from ... import registry
from ...protocols import ImageTokenizer
from ...types import Codebook
from ..checkpoints import check_finite, load_renamed, open_saved, read_wanted
from ..janus.deepseek import BOOKKEEPING, deepseek_name
from ..vq import VQTokenizer

NAME = "vq_ds16_t2i"
"""Name of the published file, without its suffix."""

_PART = "gen_vision_model."
_CODES = "quantize.embedding.weight"
_AGAIN = f"take {NAME}.pt of peizesun/llamagen_t2i or llvictorll/BigFIX"


def load_codebook(file: str | Path) -> Codebook:
    """Loads only the codebook; nothing else of the file is read.

    Raises:
        ValueError: as `load_tokenizer`.
    """
    file = Path(file)
    return Codebook(_codes(_tensors(file), file))


def load_tokenizer(
    file: str | Path,
    *,
    grid: tuple[int, int],
    name: str = "",
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> VQTokenizer:
    """Loads the tokenizer in a file such as vq_ds16_t2i.pt; its sizes are read off its tensors.

    Args:
        grid: (h, w) of the images that its sampler paints.
        name: for messages and records.

    Raises:
        ValueError: for a file that is damaged, holds code or is not such a tokenizer, and for tensors that are missing,
            unexpected or of a wrong shape.
    """
    file = Path(file)
    held = _tensors(file)
    with torch.device("meta"):
        model = JanusVQVAE(vq_config(held, file))
    load_renamed(model, held, llamagen_name, file, dtype=dtype, device=device)
    tokenizer = VQTokenizer(model, name=name)
    tokenizer.grid = grid
    return tokenizer


def require_codes(codebook: Codebook, where: Path, codes: int, trained: str, repository: str) -> Codebook:
    """The codebook, if it has as many codes as a transformer was trained with.

    Args:
        where: the codebook's file, for errors.
        codes: the number of codes expected.
        trained, repository: the name of what was trained with them, and the repository that has both, for errors.

    Raises:
        ValueError: for another number of codes.
    """
    if codebook.size != codes:
        raise ValueError(
            f"{where} has {codebook.size:,} codes, and {trained} was trained with {codes:,}: take {NAME}.pt of "
            f"{repository}"
        )
    return codebook


def published_tokenizer(grid: tuple[int, int]) -> ImageTokenizer:
    """`SamplerFamily.published_tokenizer` for the families that sample these tokens: Janus' own, of the same shapes.

    Args:
        grid: (h, w) of the images that the family paints.
    """
    found = next(family for family in registry.samplers() if family.name == "janus").published_tokenizer()
    found.grid = grid
    return found


def llamagen_name(name: str) -> str:
    """LlamaGen's name for a tensor in transformers' `JanusVQVAE`."""
    return deepseek_name(f"model.vqmodel.{name}").removeprefix(_PART)


def _tensors(file: Path) -> dict[str, Any]:
    """The tensors in a file by name, without training statistics."""
    if file.suffix == ".safetensors":
        held, where = read_wanted(file, lambda name: True), ""
    else:
        held, where = open_saved(file).get("model"), " under 'model'"
    if not isinstance(held, Mapping) or _CODES not in held:
        raise ValueError(f"{file} has no tokenizer of images{where}, as LlamaGen's files have: {_AGAIN}")
    return {str(name): value for name, value in held.items() if name != BOOKKEEPING.removeprefix(_PART)}


def _codes(held: Mapping[str, Any], file: str | Path) -> torch.Tensor:
    codes = held[_CODES]
    if not isinstance(codes, torch.Tensor) or codes.ndim != 2 or not codes.is_floating_point():
        shape = list(codes.shape) if isinstance(codes, torch.Tensor) else type(codes).__name__
        raise ValueError(f"{file} holds {shape} as {_CODES}, expected floats [K, D]: {_AGAIN}")
    check_finite(codes, _CODES, Path(file))
    return codes.clone()


def vq_config(held: Mapping[str, Any], file: str | Path) -> JanusVQVAEConfig:
    """Reads a tokenizer's sizes off its tensors.

    Args:
        held: tensors by LlamaGen's names.
        file: the file, for errors.

    Raises:
        ValueError: for tensors that are missing or do not belong to such a network.
    """
    count, dim = _codes(held, file).shape
    base, latent = (_rows(held, f"encoder.{name}.weight", file) for name in ("conv_in", "conv_out"))
    widths = []
    while (name := f"encoder.conv_blocks.{len(widths)}.res.0.conv1.weight") in held:
        widths.append(_rows(held, name, file))
    blocks = 0
    while f"encoder.conv_blocks.0.res.{blocks}.conv1.weight" in held:
        blocks += 1
    # Each group normalisation has 32 groups.
    if not widths or base % 32 or any(width % base for width in widths):
        raise ValueError(
            f"{file} has an encoder of {base} channels whose levels have {widths}, expected multiples of the first, "
            f"and that of 32: {_AGAIN}"
        )
    return JanusVQVAEConfig(
        num_embeddings=count,
        embed_dim=dim,
        latent_channels=latent,
        base_channels=base,
        channel_multiplier=[width // base for width in widths],
        num_res_blocks=blocks,
    )


def _rows(held: Mapping[str, Any], name: str, file: str | Path) -> int:
    value = held.get(name)
    if not isinstance(value, torch.Tensor) or value.ndim != 4:
        raise ValueError(f"{file} has no convolution {name}, as LlamaGen's tokenizers have: {_AGAIN}")
    return value.shape[0]
