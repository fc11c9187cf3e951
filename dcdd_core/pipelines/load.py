"""The models of one generation, from folders or embedded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.decoder import DistributionConditionedDecoder, load_decoder
from ..models.janus.sampler import ImageTokenSampler, JanusSampler
from ..models.vae import KLAutoencoder, load_vae
from ..models.vq import VQTokenizer
from ..types import same_codebook


@dataclass(frozen=True, kw_only=True)
class Models:
    """From a prompt to a picture. What was not asked for is None: the sampler, or `decoder` and `vae` on the VQ path.

    Raises:
        ValueError: if the decoder was trained for another tokenizer.
    """

    vq: VQTokenizer
    sampler: ImageTokenSampler | None = None
    vae: KLAutoencoder | None = None
    decoder: DistributionConditionedDecoder | None = None

    def __post_init__(self):
        card = self.decoder.card if self.decoder is not None else None
        if card is not None and not same_codebook(card.codebook, self.vq.codebook.fingerprint):
            raise ValueError(
                f"the decoder was trained for the codebook of {card.tokenizer}, but {self.vq.name} has another: "
                "take the decoder bundle made for this VLM"
            )


def load_models(
    *,
    vlm: str | Path,
    decoder: str | Path | None = None,
    vae: str | Path | None = None,
    base: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    name: str | None = None,
    with_sampler: bool = True,
    int8: bool = False,
    eight_bit: bool = False,
    streamed: bool = False,
    compiled: bool = False,
) -> Models:
    """Loads real models.

    Args:
        vlm: a VLM's folder; its VQ part is the tokenizer.
        decoder, vae: a decoder bundle and the autoencoder, both or neither.
        base: the FLUX.1-Fill transformer, where the bundle does not hold every weight. It and the autoencoder may be
            diffusers folders or single files (`models.flux_files`).
        name: what the sampler and the tokenizer are called; None for the folder's name.
        with_sampler: False leaves the language model on the disk: pictures need only its VQ part.
        int8: how the language model is held (`JanusSampler.load`).
        eight_bit, streamed, compiled: how the diffusion decoder is (`load_decoder`).
        dtype: of the language model and the transformer; the VQ-VAE and the autoencoder stay in float32.

    Raises:
        ValueError: for one of decoder and vae without the other, and as the loaders.
    """
    if (decoder is None) != (vae is None):
        raise ValueError(
            "a decoder bundle paints latents and needs its autoencoder (and the other way round): give both"
        )
    tokenizer = VQTokenizer.load(vlm, device=device, dtype=torch.float32)
    sampler = JanusSampler.load(vlm, device=device, dtype=dtype, int8=int8) if with_sampler else None
    if name is not None:
        tokenizer.name = name
        if sampler is not None:
            sampler.name = name
    return Models(
        vq=tokenizer,
        sampler=sampler,
        vae=KLAutoencoder(load_vae(vae, device=device, dtype=torch.float32)) if vae is not None else None,
        decoder=load_decoder(
            decoder, base, device=device, dtype=dtype, eight_bit=eight_bit, streamed=streamed, compiled=compiled
        )
        if decoder is not None
        else None,
    )
