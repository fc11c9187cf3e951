"""Checks that connected values fit together, with errors in the terms of ComfyUI's users: pixels, nodes, widgets.

The library makes the same checks for its own callers, in their terms.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import comfy.sd
import torch

from ..dcdd_core.files import is_finite
from ..dcdd_core.models.card import DecoderCard
from ..dcdd_core.models.decoder import DistributionConditionedDecoder
from ..dcdd_core.protocols import ImageTokenizer, LatentCodec, TokenSampler
from ..dcdd_core.types import Calibration, Codebook, TokenLogits, same_codebook
from ..dcdd_pico.embedded import NAME, VLMS, own_calibration
from ..dcdd_pico.scenes import render_scene, scene_pixels
from . import host
from .convert import in_words
from .sockets import MappedCondition

_UNNAMED = "an unnamed model"
_UNTRAINED = "where there is none, Distribution Guidance paints with any diffusion model"
#: Side in pixels of the image that a VAE is measured on.
_SCENE = 128


def check_tokenizer(token_logits: TokenLogits, tokenizer: ImageTokenizer, *, name: str = "token_logits") -> None:
    """Refuses logits of another tokenizer.

    Raises:
        ValueError: naming both models.
    """
    if not _of(token_logits, tokenizer.codebook):
        came, wanted = _makers(token_logits, tokenizer.name, tokenizer.codebook)
        raise ValueError(
            f"{name} come from {came}, and vq_vae from {wanted}, which has another codebook: "
            f"connect the vq_vae of the Load Janus or Load VQ-VAE that made {name}"
        )


def check_tokens_of_condition(condition: MappedCondition, tokenizer: ImageTokenizer) -> None:
    """Refuses a tokenizer other than the one that the condition's tokens belong to.

    Raises:
        ValueError: naming both models.
    """
    if not same_codebook(condition.codebook, tokenizer.codebook.fingerprint):
        raise ValueError(
            f"the condition is made of tokens of {condition.model or 'an unnamed model'}, and vq_vae is "
            f"{tokenizer.name}, which has another codebook: connect the vq_vae that the LCDM Encoder has"
        )


def check_decoder(card: DecoderCard, tokenizer: ImageTokenizer) -> None:
    """Refuses a decoder that was trained for another tokenizer.

    Raises:
        ValueError: naming both models.
    """
    if not same_codebook(card.codebook, tokenizer.codebook.fingerprint):
        books = card.codebook, tokenizer.codebook.fingerprint
        wanted, came = _told_apart(card.tokenizer, tokenizer.name, books)
        raise ValueError(
            f"the decoder was trained for {wanted}, and vq_vae is {came}, which has another codebook: use {wanted} in "
            f"the Load Janus or Load VQ-VAE, or a decoder that was trained for {came}; {_UNTRAINED}"
        )


def check_edit(token_logits: TokenLogits, sampler: TokenSampler, tokenizer: ImageTokenizer) -> None:
    """Refuses tokens that the sampler cannot continue from. A wrong codebook is reported alone, all else together.

    Raises:
        ValueError: naming the nodes to add or change.
    """
    if not _of(token_logits, sampler.codebook):
        came, wanted = _makers(token_logits, sampler.name, sampler.codebook)
        raise ValueError(
            f"token_logits come from {came}, and janus is {wanted}, which has another codebook: connect token_logits "
            f"that {wanted} or its VQ-VAE made"
        )
    wrong = []
    if token_logits.source == "proxy" and not token_logits.calibrated:
        wrong.append(
            "token_logits come straight from a VQ-VAE Encode, and no sampler can go on from them: add a Logit "
            "Calibrator between the two nodes"
        )
    if token_logits.source == "vlm" and token_logits.calibrated:
        wrong.append(
            "token_logits were sampled and then calibrated: connect the node that sampled them itself, without the "
            "Logit Calibrator"
        )
    if token_logits.grid != sampler.grid:
        came, wanted = (
            in_words(*(side * tokenizer.factor for side in grid)) for grid in (token_logits.grid, sampler.grid)
        )
        shape = "a square: " if sampler.grid[0] == sampler.grid[1] else ""
        wrong.append(
            f"token_logits are of an image of {came} pixels, and {sampler.name} samples {wanted}: crop to "
            f"{shape}{wanted} before the VQ-VAE Encode, with an Upscale Image whose crop is center"
        )
    if wrong:
        raise ValueError("; ".join(wrong))


def check_fit(token_logits: TokenLogits, reference: TokenLogits, tokenizer: ImageTokenizer) -> None:
    """Refuses logits that no calibration can be fitted to.

    Raises:
        ValueError: naming the node to connect.
    """
    check_tokenizer(reference, tokenizer, name="reference")
    if token_logits.source != "proxy":
        raise ValueError(
            "to fit a calibration, token_logits have to be of images, got sampled ones: connect a VQ-VAE Encode to "
            "token_logits and the Janus Logit Sampler to reference"
        )
    if reference.source != "vlm" or reference.calibrated or reference.calibrated_at is not None:
        came = "calibrated ones" if reference.calibrated else "those of an image"
        raise ValueError(
            f"reference takes token_logits as Janus samples them, got {came}: connect a Janus Logit Sampler to it"
        )


def check_uncalibrated(token_logits: TokenLogits) -> None:
    """Refuses to calibrate twice.

    Raises:
        ValueError: naming the node to remove.
    """
    if token_logits.calibrated:
        raise ValueError("token_logits are calibrated already: take one of the two Logit Calibrators out")


def check_calibration(calibration: Calibration, tokenizer: ImageTokenizer) -> None:
    """Refuses a calibration of another tokenizer.

    Raises:
        ValueError: naming both models.
    """
    if not same_codebook(calibration.codebook, tokenizer.codebook.fingerprint):
        books = calibration.codebook, tokenizer.codebook.fingerprint
        came, wanted = _told_apart(calibration.vlm or "another model", tokenizer.name, books)
        raise ValueError(
            f"the calibration was made for {came}, and vq_vae is {wanted}, which "
            "has another codebook: use a calibration or a decoder that was made for this model"
        )


def check_condition(condition: MappedCondition, decoder: DistributionConditionedDecoder) -> None:
    """Refuses a condition that would be painted as a smear; says on the node if it was not made for this decoder.

    Raises:
        ValueError: naming what to connect.
    """
    card = decoder.card
    if not same_codebook(card.codebook, condition.codebook) or condition.code_vectors.shape[2] != card.code_dim:
        numbers = condition.code_vectors.shape[2], card.code_dim
        came, wanted = _told_apart(
            condition.model or _UNNAMED,
            card.tokenizer,
            (condition.codebook, card.codebook),
            tuple(f"{number} numbers a code" for number in numbers),
        )
        raise ValueError(
            f"the condition is made of tokens of {came}, and the decoder was trained "
            f"for {wanted}, which has another codebook: use {wanted} in the Load Janus or Load VQ-VAE, "
            f"or a decoder that was trained for {came}; {_UNTRAINED}"
        )
    made_for = condition.card
    needs_calibration = card.variant == "lcdm+lc" and card.calibration is not None
    if made_for is None and needs_calibration and condition.source == "proxy" and not condition.calibrated:
        raise ValueError(
            "the condition is of an image and was not calibrated, so only a smear would be painted: connect the "
            "decoder to the LCDM Encoder too, or add a Logit Calibrator before it"
        )
    if made_for is None and condition.source == "vlm" and (card.variant == "discrete" or card.reads != "logits"):
        host.notice(
            "the LCDM Encoder has no decoder connected, so the condition is not quite as this decoder was trained: "
            "connect the decoder to it too"
        )
    if made_for is not None and (made_for.variant, made_for.calibration) != (card.variant, card.calibration):
        host.notice(
            "the LCDM Encoder has another decoder connected than this node, and calibrated for that one: connect the "
            "same decoder to both"
        )


def without_provenance(token_logits: TokenLogits, calibration: Calibration) -> Calibration:
    """The calibration without the record of how it was measured; says on the node if these logits differ from that."""
    if token_logits.source == "vlm" and not token_logits.calibrated:
        differ = [
            f"sampled with {name} {came:g} and calibrated for {own:g}: set {name} to {own:g} in the node that samples"
            for name in ("guidance", "temperature")
            if None not in (came := getattr(token_logits, name), own := getattr(calibration, name)) and came != own
        ]
        if calibration.vlm and token_logits.model and calibration.vlm != token_logits.model:
            differ.append(
                f"sampled by {token_logits.model} and calibrated for {calibration.vlm}: if these are two models, fit "
                "a calibration of your own"
            )
        if differ:
            host.notice("; ".join(differ))
    return replace(calibration, vlm="", guidance=None, temperature=None)


def check_vae(vae: comfy.sd.VAE, decoder: DistributionConditionedDecoder, *, has_own: bool) -> None:
    """Refuses a VAE whose latents have another shape than those that the decoder paints.

    Args:
        has_own: whether the decoder has an autoencoder of its own.

    Raises:
        ValueError: naming the channels and scale of both, or saying that the VAE is for video or sound.
    """
    wanted = f"{decoder.backbone.latent_channels} at 1/{decoder.card.vae_factor}"
    factor = vae.downscale_ratio
    # For video and audio VAEs this is a tuple, or their latents have another number of dimensions.
    if not isinstance(factor, (int, float)) or getattr(vae, "latent_dim", 2) != 2:
        came = "is one for video or sound"
    elif (vae.latent_channels, factor) != (decoder.backbone.latent_channels, decoder.card.vae_factor):
        came = f"has latents of {vae.latent_channels} channels at 1/{factor:g} of the image's size"
    else:
        return
    raise ValueError(f"the connected VAE {came}, and the decoder paints {wanted}: {vae_remedy(has_own)}")


def check_vae_scale(codec: LatentCodec, card: DecoderCard, *, has_own: bool) -> None:
    """Refuses a VAE whose latents are not finite, or far smaller or larger than those that the decoder paints.

    A ComfyUI VAE does not say how its latents are normalised, and FLUX's have the same shape as Stable Diffusion 3's.
    So the spread of an image's raw latents is compared with that of raw latents whose normalised form has variance 1,
    which is 1 / card.vae_scale. These two models differ by a factor of 4.2; a factor of 3 is refused [choice]. A card
    without that number says nothing about the spread.

    Raises:
        ValueError: naming both spreads, or saying that the VAE gives NaN.
    """
    scene = render_scene("test", 0, size=_SCENE)
    found = spread_of(codec.encode(scene_pixels(scene.image[None], torch.device("cpu"))))
    if card.vae_scale is None:
        return
    wanted = 1 / card.vae_scale
    if not wanted / 3 < found < 3 * wanted:
        raise ValueError(
            f"the connected VAE is another model's: its latents have a spread of {found:.2f}, and those that the "
            f"decoder paints one of about {wanted:.2f} (scale {card.vae_scale:g}): {vae_remedy(has_own)}"
        )


def spread_of(latents: torch.Tensor) -> float:
    """The standard deviation of what the connected VAE made of an image; 0 for a single number.

    Raises:
        ValueError: for NaN or infinity.
    """
    if not is_finite(latents):
        raise ValueError(
            "the connected VAE encodes an image to NaN or infinity: load it in float32 (in ComfyUI: --fp32-vae), or "
            "use another one"
        )
    return float(latents.std()) if latents.numel() > 1 else 0.0


def vae_remedy(has_own: bool) -> str:
    """What to do about a VAE that does not fit."""
    if has_own:
        return "disconnect vae, the decoder has its own"
    return "connect the VAE that it was trained with (for FLUX.1-Fill: ae.safetensors, by Load VAE)"


def _of(token_logits: TokenLogits, codebook: Codebook) -> bool:
    same = same_codebook(token_logits.codebook, codebook.fingerprint)
    return same and token_logits.logits.shape[2] == codebook.size


def _makers(token_logits: TokenLogits, name: str, codebook: Codebook) -> tuple[str, str]:
    """What to call the model that made the logits and another one, which has this name and codebook."""
    sizes = token_logits.logits.shape[2], codebook.size
    return _told_apart(
        token_logits.model or _UNNAMED,
        name,
        (token_logits.codebook, codebook.fingerprint),
        tuple(f"{size:,} codes" for size in sizes),
    )


def _told_apart(
    first: str, second: str, books: tuple[str | None, str | None], sizes: tuple[str, ...] = ()
) -> tuple[str, str]:
    """The names of two models; if these are equal, with something that tells the models apart.

    Args:
        books: fingerprints of their codebooks.
        sizes: of both, in words; used if the fingerprints do not differ or one is missing.
    """
    if first != second:
        return first, second
    if None in books or books[0] == books[1]:
        return (f"{first} ({sizes[0]})", f"{second} ({sizes[1]})") if sizes else (first, second)
    # A fingerprint is eight numbers, which would tell a user nothing.
    short = (hashlib.sha256(book.encode()).hexdigest()[:6] for book in books)
    return tuple(f"{name} (codebook {book})" for name, book in zip((first, second), short))


def served(card: DecoderCard, token_logits: TokenLogits) -> DecoderCard:
    """The card to map these logits with; says on the node if its calibration is for logits that are sampled otherwise.

    If an embedded VLM has a calibration of its own, that one replaces the card's calibration for another VLM.
    """
    calibration = card.calibration
    if calibration is None or card.variant == "discrete":
        return card
    sampled = token_logits.source == "vlm" and not token_logits.calibrated
    if sampled and calibration.vlm != token_logits.model and same_codebook(card.codebook, token_logits.codebook):
        calibration = _own_calibration(token_logits.model) or calibration
    if card.reads != "tokens":  # proxies of tokens do not depend on how these were sampled
        calibration = without_provenance(token_logits, calibration)
    return replace(card, calibration=calibration)


def _own_calibration(model: str) -> Calibration | None:
    """The calibration of the embedded VLM of that name, if it has one of its own."""
    vlm = {f"{NAME} {folder}": folder for folder in VLMS.values()}.get(model)
    file = None if vlm is None else own_calibration(vlm=vlm)
    return None if file is None else Calibration.load(file)
