"""Loads the models for one generation from files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .. import registry
from ..models.bundle import DecoderOptions, load_decoder, read_card
from ..models.card import DecoderCard
from ..models.decoder import DistributionConditionedDecoder
from ..protocols import ImageTokenizer, LatentCodec, TokenSampler
from ..types import same_codebook

_OWN_VAE = "use the autoencoder that the decoder was trained with (for FLUX.1-Fill, ae.safetensors)"


@dataclass(frozen=True, kw_only=True)
class ModelPaths:
    """Where the models are stored.

    Attributes:
        vlm: path that a `SamplerFamily` reads; the tokenizer is read from there too.
        decoder, vae: a decoder bundle and the autoencoder, both or neither.
        base: the decoder's base model, needed if the bundle does not hold every weight.

    Raises:
        ValueError: if only one of decoder and vae is given.
    """

    vlm: str | Path
    decoder: str | Path | None = None
    vae: str | Path | None = None
    base: str | Path | None = None

    def __post_init__(self):
        if (self.decoder is None) != (self.vae is None):
            raise ValueError(
                "a decoder bundle paints latents and needs its autoencoder (and the other way round): give both"
            )


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How the models are held.

    Attributes:
        device: device they compute on.
        dtype: dtype of the language model and the diffusion backbone; tokenizer and autoencoder stay in float32.
        sampler_int8: hold the language model's linear weights in 8 bits.
        eight_bit, streamed, compiled: options of the diffusion decoder (`DecoderOptions`).
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    sampler_int8: bool = False
    eight_bit: bool = False
    streamed: bool = False
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Models:
    """The models from prompt to image; those not asked for are None: the sampler, or on the VQ path decoder and codec.

    Raises:
        ValueError: if the decoder was trained for another tokenizer or autoencoder.
    """

    tokenizer: ImageTokenizer
    sampler: TokenSampler | None = None
    codec: LatentCodec | None = None
    decoder: DistributionConditionedDecoder | None = None

    def __post_init__(self):
        if self.decoder is None:
            return
        _check_tokenizer(self.tokenizer, self.decoder.card)
        check_codec(self.codec, self.decoder)


def _check_tokenizer(tokenizer: ImageTokenizer, card: DecoderCard) -> None:
    if not same_codebook(card.codebook, tokenizer.codebook.fingerprint):
        raise ValueError(
            f"the decoder was trained for the codebook of {card.tokenizer}, but {tokenizer.name} has another: "
            "use the decoder bundle made for this VLM"
        )


def check_codec(
    codec: LatentCodec,
    decoder: DistributionConditionedDecoder,
    *,
    remedy: str = _OWN_VAE,
) -> None:
    """Refuses an autoencoder whose latents are not those the decoder paints.

    Args:
        remedy: the way out, in the words of the caller's user.

    Raises:
        ValueError: naming the values of both, or if the decoder's network takes no masks at the autoencoder's scale.
    """
    found = (codec.channels, *_latents_of(codec))
    backbone, factor = decoder.backbone, decoder.card.vae_factor
    _require_latents(found, (backbone.latent_channels, *_latents_of(decoder.card)), remedy)
    # With the smallest canvas, a network whose mask input has another scale is refused here, not at the first step.
    side = backbone.patch
    canvas = torch.zeros(1, backbone.latent_channels, side, side), torch.zeros(1, 1, side * factor, side * factor)
    backbone.context(*canvas, factor)


def _latents_of(source: LatentCodec | DecoderCard) -> tuple[float | None, ...]:
    """Factor, shift and scale of the latents, as a codec or a decoder's card states them."""
    if isinstance(source, DecoderCard):
        return source.vae_factor, source.vae_shift, source.vae_scale
    return source.factor, source.shift, source.scale


def _require_latents(found: tuple[float | None, ...], needed: tuple[float | None, ...], remedy: str) -> None:
    """Compares channels (if both are given), factor, shift and scale."""

    def same(a: float | None, b: float | None) -> bool:
        # A configuration's numbers may have been rounded to float32.
        return a == b if a is None or b is None else math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)

    def words(*channels: float | None) -> str:
        *channels, factor, shift, scale = channels
        of = "".join(f"{number} channels " for number in channels)
        return f"{of}at 1/{factor} of the image size, shift {shift}, scale {scale}"

    if not all(same(*pair) for pair in zip(found, needed, strict=True)):
        if (found[-1] is None) != (needed[-1] is None):
            remedy = f"None is for autoencoders of a kind without these two numbers; {remedy}"
        raise ValueError(
            f"this autoencoder's latents are not those the decoder paints ({words(*found)}; expected "
            f"{words(*needed)}): {remedy}"
        )


def load_models(
    paths: ModelPaths, options: LoadOptions | None = None, *, name: str | None = None, with_sampler: bool = True
) -> Models:
    """Loads models from files, each by the family that reads them.

    Args:
        name: name of the sampler and the tokenizer; None for the name of their folder.
        with_sampler: False does not load the language model: images need only its tokenizer.

    Raises:
        ValueError: as the loaders; also for models that do not belong together, before the large ones are read.
    """
    options = options or LoadOptions()
    family, device = registry.sampler_family(paths.vlm), options.device
    card = None if paths.decoder is None else read_card(paths.decoder)
    tokenizer = family.load_tokenizer(str(paths.vlm), device=device, dtype=torch.float32)
    sampler = codec = decoder = None
    if name is not None:
        tokenizer.name = name
    if card is not None:
        _check_tokenizer(tokenizer, card)
        codec = registry.load_codec(paths.vae, device=device, dtype=torch.float32)
        _require_latents(_latents_of(codec), _latents_of(card), _OWN_VAE)
    if with_sampler:
        sampler = family.load_sampler(str(paths.vlm), device=device, dtype=options.dtype, int8=options.sampler_int8)
        if name is not None:
            sampler.name = name
    if card is not None:
        held = DecoderOptions(
            device=device,
            dtype=options.dtype,
            eight_bit=options.eight_bit,
            streamed=options.streamed,
            compiled=options.compiled,
        )
        decoder = load_decoder(paths.decoder, paths.base, held)
    return Models(tokenizer=tokenizer, sampler=sampler, codec=codec, decoder=decoder)
