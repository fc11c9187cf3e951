"""The models of one generation, from folders or embedded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.flux import DistributionConditionedDecoder, load_decoder
from ..models.janus import ImageTokenSampler, JanusSampler
from ..models.vae import KLAutoencoder, load_vae
from ..models.vq import VQTokenizer
from ..types import same_codebook

#: Folder of the embedded models.
PICO_WEIGHTS = Path(__file__).parent.parent / "pico" / "weights"


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


def load_pico(
    *,
    device: torch.device | str = "cpu",
    weights: Path | None = None,
    with_sampler: bool = True,
    compiled: bool = False,
) -> Models:
    """The embedded models, in float32.

    Args:
        weights: their folder, where it is not `PICO_WEIGHTS`.
        with_sampler, compiled: see `load_models`.

    Raises:
        ValueError: if the weights are not there.
    """
    weights = weights or PICO_WEIGHTS
    if not weights.is_dir():
        raise ValueError(
            f"the embedded models are not at {weights}: install the pack again, or in a git clone "
            "`git checkout -- dcdd_core/pico/weights`"
        )
    models = load_models(
        janus=weights / "janus",
        decoder=weights / "decoder.safetensors",
        vae=weights / "vae",
        device=device,
        with_sampler=with_sampler,
        compiled=compiled,
    )
    models.vq.name = "pico"
    if models.sampler is not None:
        models.sampler.name = "pico"
    return models


def load_models(
    *,
    janus: str | Path,
    decoder: str | Path | None = None,
    vae: str | Path | None = None,
    base: str | Path | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    with_sampler: bool = True,
    int8: bool = False,
    eight_bit: bool = False,
    streamed: bool = False,
    compiled: bool = False,
) -> Models:
    """Loads real models.

    Args:
        janus: transformers-layout folder; its VQ part is the tokenizer.
        decoder, vae: a decoder bundle and the autoencoder, both or neither.
        base: the FLUX.1-Fill transformer, where the bundle does not hold every weight. It and the autoencoder may be
            diffusers folders or single files (`models.flux_files`).
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
    return Models(
        vq=VQTokenizer.load(janus, device=device, dtype=torch.float32),
        sampler=JanusSampler.load(janus, device=device, dtype=dtype, int8=int8) if with_sampler else None,
        vae=KLAutoencoder(load_vae(vae, device=device, dtype=torch.float32)) if vae is not None else None,
        decoder=load_decoder(
            decoder, base, device=device, dtype=dtype, eight_bit=eight_bit, streamed=streamed, compiled=compiled
        )
        if decoder is not None
        else None,
    )
