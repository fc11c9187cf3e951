"""What a decoder bundle says of itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..settings import require_number, require_text, shown
from ..types import Calibration

#: What a decoder can be conditioned on: the paper's Table 4.
VARIANTS = ("discrete", "lcdm", "lcdm+lc")
#: What of a VLM's output a decoder can be served.
READINGS = ("logits", "anchored", "tokens")
#: The most Euler steps; more change nothing that can be seen.
MOST_STEPS = 1000
#: The largest of a card's sizes: far beyond every network's, and small enough to be multiplied.
_LARGEST = 2**16


@dataclass(frozen=True, kw_only=True)
class DecoderCard:
    """The description in a bundle's header, stored as JSON.

    Attributes:
        base: the transformer that the trained weights go into, such as "black-forest-labs/FLUX.1-Fill-dev".
        base_config: its configuration, so that nothing is fetched to build it. Its "_class_name" says which backbone it
            is (`registry.backbone_family`); FLUX.1-Fill's has none.
        tokenizer, codebook: name and fingerprint of the tokenizer whose code vectors it reads.
        code_dim, width: of the adapter.
        variant: what it was trained on, one of `VARIANTS`.
        calibration: applied to logits before mapping; None for none.
        reads: what of a VLM's output the decoder is served by default: its "logits" (the paper), these "anchored"
            to the sampled tokens, or the sampled "tokens" alone.
        resolution: side in pixels of the images that it was trained on.
        pixels_per_token: side in pixels of the square that one token covers; not a whole number where Janus' 24 x 24
            tokens become 512 x 512 pixels.
        vae_factor, vae_shift, vae_scale: of the autoencoder whose latents it paints; shift and scale None if it
            normalises them in another way.
        steps: default number of Euler steps.
        shift: default mu of the time shift (`method.flow.shift_time`); None for the backbone's own, by resolution.
        guidance: value of the distilled guidance embedding, where the base has one; served as trained.
        licence: of the weights.

    Raises:
        ValueError: for an unknown variant or reading, values of wrong types, and numbers out of range.
    """

    base: str
    base_config: dict[str, Any]
    tokenizer: str
    codebook: str
    code_dim: int
    width: int
    variant: str = "lcdm+lc"
    calibration: Calibration | None = None
    reads: str = "logits"
    resolution: int = 384
    pixels_per_token: float = 16
    vae_factor: int = 8
    vae_shift: float | None = 0.1159
    vae_scale: float | None = 0.3611
    steps: int = 30
    shift: float | None = None
    guidance: float = 1.0
    licence: str = ""

    def __post_init__(self):
        for name in ("base", "tokenizer", "codebook", "licence"):
            require_text(name, getattr(self, name))
        if not isinstance(self.base_config, dict):
            raise ValueError(f"base_config must be an object, got {shown(self.base_config)}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {shown(self.variant)}")
        if self.reads not in READINGS:
            raise ValueError(f"reads must be one of {', '.join(READINGS)}, got {shown(self.reads)}")
        if not isinstance(self.calibration, (Calibration, type(None))):
            raise ValueError(f"calibration must be a calibration or None, got {shown(self.calibration)}")
        for name in ("code_dim", "width", "resolution", "vae_factor"):
            require_number(name, getattr(self, name), whole=True, least=1, most=_LARGEST)
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")
        require_number("pixels_per_token", self.pixels_per_token, above=0, most=_LARGEST)
        require_number("steps", self.steps, whole=True, least=1, most=MOST_STEPS)
        require_number("vae_shift", self.vae_shift, optional=True)
        require_number("vae_scale", self.vae_scale, above=0, optional=True)
        if (self.vae_shift is None) != (self.vae_scale is None):
            raise ValueError(
                f"vae_shift and vae_scale must be two numbers or both None, got {self.vae_shift} and {self.vae_scale}"
            )
        # As far as `method.flow.timesteps` goes.
        require_number("shift", self.shift, least=-100, most=100, optional=True)
        require_number("guidance", self.guidance, least=0, most=_LARGEST)

    def painted_size(self, grid: tuple[int, int], *, patch: int = 2) -> tuple[int, int]:
        """(H, W) in pixels of the image that an (h, w) grid of tokens becomes.

        `resolution` for the grid of the training; for others the nearest size that is made of whole packed latents.

        Args:
            patch: latents a side of one of the backbone's tokens.
        """
        unit = patch * self.vae_factor
        height, width = (max(1, round(n * self.pixels_per_token / unit)) * unit for n in grid)
        return height, width
