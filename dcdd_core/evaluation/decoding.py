"""Decodes token logits with both decoders: the VLM's own (VQ-VAE), and the diffusion decoder if there is one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.card import MOST_STRENGTH, DecoderCard
from ..models.checkpoints import fingerprint_of
from ..pipelines.condition import condition_for
from ..pipelines.decode import decode, decode_tokens
from ..pipelines.guided import GuidanceOptions, TokenGuide, token_guide
from ..pipelines.load import Models
from ..settings import require_number
from ..types import Condition, TokenLogits

#: Decoder path, as named in files and JSON -> its row in tables.
PATHS = {"vq": "VQ-VAE decode", "dcdd": "DCDD decode"}

#: Further fields of the card that decoding depends on.
_CARD_FIELDS = ("guidance", "resolution", "pixels_per_token", "vae_factor", "vae_shift", "vae_scale")


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """The decoders under evaluation.

    Attributes:
        models: with a tokenizer, and for the path "dcdd" a decoder and its codec.
        card: the decoder's, as served; None without a decoder.
        steps: Euler steps of the decoder; the bundle's default if None.
        shift: mu of the time shift; the bundle's default if None.
        condition_guidance: see `pipelines.decode.paint`; the bundle's default if None.
        strength: eta of the decoder's distribution guidance; 0 is off, whatever the card says.

    Raises:
        ValueError: for a strength out of range, and one above 0 without a calibration.
    """

    models: Models
    card: DecoderCard | None = None
    steps: int | None = None
    shift: float | None = None
    condition_guidance: float | None = None
    strength: float = 0.0

    def __post_init__(self):
        require_number("strength", self.strength, least=0, most=MOST_STRENGTH, remedy="0 is off")
        if self.strength > 0 and (self.card is None or self.card.calibration is None):
            raise ValueError(
                f"a strength of {self.strength:g} needs a decoder and a calibration, whose distributions guidance "
                "compares: give a card with a calibration, or strength 0"
            )

    @property
    def paths(self) -> tuple[str, ...]:
        """The available decoder paths, in the tables' order."""
        return tuple(PATHS) if self.card is not None else ("vq",)

    @property
    def size(self) -> int:
        """Side in pixels of the VLM's own images, which its tokenizer reads and decodes."""
        return self.models.tokenizer.grid[0] * self.models.tokenizer.factor

    @property
    def painted(self) -> dict[str, int]:
        """Path -> side in pixels of the images decoded from the VLM's token grid."""
        sides = {"vq": self.size}
        if self.card is not None:
            sides["dcdd"], _ = self.models.decoder.card.painted_size(self.models.tokenizer.grid)
        return sides

    @property
    def measured(self) -> int:
        """Default side in pixels for comparisons: that of the diffusion decoder's images, or else the VQ-VAE's."""
        return self.painted[self.paths[-1]]

    @property
    def served_shift(self) -> float | None:
        """Mu of the time shift; None for the backbone's own, and without a decoder."""
        decoder = self.models.decoder
        return decoder.card.shift if self.shift is None and decoder is not None else self.shift

    def paint(self, token_logits: TokenLogits, seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        """Path -> images [B, 3, H, W] in -1..1, decoded from the same tokens and logits."""
        models = self.models
        painted = {"vq": decode_tokens(models.tokenizer, token_logits)}
        if self.card is not None:
            condition = condition_for(self.card, token_logits, models.tokenizer.codebook)
            options = {name: getattr(self, name) for name in ("steps", "shift", "condition_guidance")}
            options["guide"] = self._guide_of(condition)
            painted["dcdd"] = decode(models.decoder, models.codec, condition, seeds=seeds, **options).pixels
        return painted

    def _guide_of(self, condition: Condition) -> TokenGuide | None:
        """The guide of these images; None without guidance."""
        if self.strength == 0:
            return None
        models = self.models
        return token_guide(
            models.tokenizer,
            models.codec,
            condition,
            scale=self.card.calibration.sharpness,
            options=GuidanceOptions(strength=self.strength, pull=0.0),
            size=models.decoder.painted_size(condition.grid),
        )

    def settings(self) -> dict[str, Any]:
        """Everything besides tokens and seeds that the images depend on, as plain JSON values."""
        models, card = self.models, self.card
        settings: dict[str, Any] = {"tokenizer": fingerprint_of(models.tokenizer.model.state_dict())}
        if card is not None:
            calibration = card.calibration
            served = ("scale", "affine_scale", "smoothing", "anchor", "anchor_temperature")
            settings |= {
                "decoder": fingerprint_of(models.decoder.state_dict()),
                "decoder dtype": str(next(models.decoder.parameters()).dtype).removeprefix("torch."),
                "autoencoder": fingerprint_of(models.codec.model.state_dict()),
                "variant": card.variant,
                "reads": card.reads,
                "calibration": calibration and {k: v for k, v in calibration.to_dict().items() if k in served},
                "steps": card.steps if self.steps is None else self.steps,
                "shift": self.served_shift,
                **{name: getattr(models.decoder.card, name) for name in _CARD_FIELDS},
            }
            # Results from before this guidance existed do not name it.
            if (w := models.decoder.card.condition_guidance_of(self.condition_guidance)) != 1:
                settings["condition_guidance"] = w
            if self.strength > 0:
                settings["distribution_guidance"] = self.strength
        return settings


def guidance_told(strength: float, shift: float | None) -> str:
    """Distribution guidance in words: "distribution guidance of strength 0.1 at shift 1.5"; empty where it is off.

    Args:
        shift: mu of the time shift; None for the backbone's own.
    """
    at = "" if shift is None else f" at shift {shift:g}"
    return f"distribution guidance of strength {strength:g}{at}" if strength > 0 else ""


def seed_of(seed: int, name: str) -> int:
    """A 48-bit seed for one image, derived from its name, so that it does not depend on the other images."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogateescape")).digest()[:6], "big")
