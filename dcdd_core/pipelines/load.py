"""The models of one generation, from files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from .. import registry
from ..models.bundle import DecoderOptions, load_decoder
from ..models.decoder import DistributionConditionedDecoder
from ..protocols import ImageTokenizer, LatentCodec, TokenSampler
from ..types import same_codebook


@dataclass(frozen=True, kw_only=True)
class ModelPaths:
    """Where the models lie.

    Attributes:
        vlm: what a `SamplerFamily` reads; its tokenizer is read from there too.
        decoder, vae: a decoder bundle and the autoencoder, both or neither.
        base: the decoder's base model, where the bundle does not hold every weight.

    Raises:
        ValueError: for one of decoder and vae without the other.
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
        device: where they compute.
        dtype: of the language model and the diffusion backbone; tokenizer and autoencoder stay in float32.
        sampler_int8: the language model's linear weights in 8 bits.
        eight_bit, streamed, compiled: of the diffusion decoder (`DecoderOptions`).
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    sampler_int8: bool = False
    eight_bit: bool = False
    streamed: bool = False
    compiled: bool = False


@dataclass(frozen=True, kw_only=True)
class Models:
    """From a prompt to an image. What was not asked for is None: the sampler, or `decoder` and `codec` on the VQ path.

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
        card = self.decoder.card
        if not same_codebook(card.codebook, self.tokenizer.codebook.fingerprint):
            raise ValueError(
                f"the decoder was trained for the codebook of {card.tokenizer}, but {self.tokenizer.name} has another: "
                "use the decoder bundle made for this VLM"
            )
        check_codec(self.codec, self.decoder)


def check_codec(
    codec: LatentCodec,
    decoder: DistributionConditionedDecoder,
    *,
    remedy: str = "use the autoencoder that the decoder was trained with (for FLUX.1-Fill, ae.safetensors)",
) -> None:
    """Refuses an autoencoder whose latents are not those the decoder paints.

    Args:
        remedy: the way out, in the words of the caller's user.

    Raises:
        ValueError: naming the values of both.
    """
    card = decoder.card
    found = (codec.channels, codec.factor, codec.shift, codec.scale)
    needed = (decoder.backbone.latent_channels, card.vae_factor, card.vae_shift, card.vae_scale)
    if found != needed:
        raise ValueError(
            "this autoencoder's latents are not those the decoder paints ({} channels at 1/{} of the image size, shift "
            "{}, scale {}; expected {} at 1/{}, shift {}, scale {}): {}".format(*found, *needed, remedy)
        )


def load_models(
    paths: ModelPaths, options: LoadOptions | None = None, *, name: str | None = None, with_sampler: bool = True
) -> Models:
    """Loads real models, each by the family that reads its files.

    Args:
        name: what the sampler and the tokenizer are called; None for the name of their folder.
        with_sampler: False leaves the language model on the disk: images need only its tokenizer.

    Raises:
        ValueError: as the loaders.
    """
    options = options or LoadOptions()
    family, device = registry.sampler_family(paths.vlm), options.device
    tokenizer = family.load_tokenizer(str(paths.vlm), device=device, dtype=torch.float32)
    sampler = codec = decoder = None
    if with_sampler:
        sampler = family.load_sampler(str(paths.vlm), device=device, dtype=options.dtype, int8=options.sampler_int8)
    for model in (tokenizer, sampler):
        if name is not None and model is not None:
            model.name = name
    if paths.decoder is not None:
        codec = registry.load_codec(paths.vae, device=device, dtype=torch.float32)
        held = DecoderOptions(
            device=device,
            dtype=options.dtype,
            eight_bit=options.eight_bit,
            streamed=options.streamed,
            compiled=options.compiled,
        )
        decoder = load_decoder(paths.decoder, paths.base, held)
    return Models(tokenizer=tokenizer, sampler=sampler, codec=codec, decoder=decoder)
