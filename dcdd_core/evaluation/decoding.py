"""From token logits to pictures on both paths: the VLM's own decoder, and the diffusion decoder where there is one."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..models.card import DecoderCard
from ..models.checkpoints import fingerprint_of
from ..pipelines.condition import condition_for
from ..pipelines.decode import decode, decode_tokens
from ..pipelines.load import Models
from ..types import TokenLogits

#: Path, as files and JSON name it -> as tables do.
PATHS = {"vq": "VQ-VAE decode", "dcdd": "DCDD decode"}

#: What painting reads of a card besides.
_OF_CARD = ("guidance", "resolution", "pixels_per_token", "vae_factor", "vae_shift", "vae_scale")


@dataclass(frozen=True, kw_only=True)
class Decoders:
    """What turns tokens and logits into pictures.

    Attributes:
        models: with a tokenizer, and for the path "dcdd" a decoder and its autoencoder.
        card: the decoder's, as served; None without a decoder.
        steps: of the decoder; the bundle's own number by default.
        shift: mu of their time shift; the bundle's own by default.
    """

    models: Models
    card: DecoderCard | None = None
    steps: int | None = None
    shift: float | None = None

    @property
    def paths(self) -> tuple[str, ...]:
        """Those that can be gone, in the tables' order."""
        return tuple(PATHS) if self.card is not None else ("vq",)

    @property
    def size(self) -> int:
        """Side in pixels of the pictures that the VLM's tokenizer reads and paints."""
        vq = self.models.tokenizer
        return vq.model.config.num_patches * vq.factor

    @property
    def painted(self) -> dict[str, int]:
        """Path -> side in pixels of what is painted from the VLM's own grid of tokens."""
        sides = {"vq": self.size}
        if self.card is not None:
            sides["dcdd"], _ = self.models.decoder.card.painted_size(
                (self.models.tokenizer.model.config.num_patches,) * 2
            )
        return sides

    @property
    def measured(self) -> int:
        """Side in pixels at which pictures are compared by default: what the decoder paints, or else the tokenizer."""
        return self.painted[self.paths[-1]]

    def paint(self, token_logits: TokenLogits, seeds: Sequence[int]) -> dict[str, torch.Tensor]:
        """Path -> pictures [B, 3, H, W] in -1..1, all from the same tokens and logits."""
        models = self.models
        painted = {"vq": decode_tokens(models.tokenizer, token_logits)}
        if self.card is not None:
            condition = condition_for(self.card, token_logits, models.tokenizer.codebook)
            options = {"seeds": seeds, "steps": self.steps, "shift": self.shift}
            painted["dcdd"] = decode(models.decoder, models.codec, condition, **options).pixels
        return painted

    def settings(self) -> dict[str, Any]:
        """Of all that the pictures depend on besides tokens and seeds, as plain JSON values."""
        models, card = self.models, self.card
        settings: dict[str, Any] = {"tokenizer": fingerprint_of(models.tokenizer.model.state_dict())}
        if card is not None:
            calibration = card.calibration
            served = ("scale", "affine_scale", "smoothing", "anchor")
            settings |= {
                "decoder": fingerprint_of(models.decoder.state_dict()),
                "decoder dtype": str(next(models.decoder.parameters()).dtype).removeprefix("torch."),
                "autoencoder": fingerprint_of(models.codec.model.state_dict()),
                "variant": card.variant,
                "reads": card.reads,
                "calibration": calibration and {name: getattr(calibration, name) for name in served},
                "steps": card.steps if self.steps is None else self.steps,
                "shift": models.decoder.card.shift if self.shift is None else self.shift,
                **{name: getattr(models.decoder.card, name) for name in _OF_CARD},
            }
        return settings


def seed_of(seed: int, name: str) -> int:
    """The seed of one picture, 48 bits: it depends on its name, not on which others are in the list."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:6], "big")
