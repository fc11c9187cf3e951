"""Feed-forward decoders: an image's tokens, or LCDM's condition made from them, to pixels in a single pass.

They are the opponents of the diffusion decoder: of its size (with the autoencoder's decoder) or of its time per image,
trained with at least its FLOPs, and with the losses usual for their kind (`gan_finetune`). Identical parts cannot
explain a difference, so the decoders share as many parts as possible. The condition is read by the same adapter and
passes through a trunk with the width, depth and heads of the FLUX transformer, but without what only diffusion needs:
time modulation and noise. The autoencoder's decoder is replaced by a convolutional upsampler, which is trained jointly
and gets all channels of the trunk. The alternative was a wider VQ-VAE decoder. Four fifths of its operations are
convolutions at half the full resolution and above, where a position sees few tokens; the trunk relates all tokens, as
the diffusion decoder does.

Shapes: B batch, h w grid of the trunk, D code dimension, M width of the trunk, H W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from einops import rearrange
from torch import nn

from dcdd_core.files import in_file, json_object, open_tensors, reading, write_tensors
from dcdd_core.models.adapter import ConditionEncoder
from dcdd_core.models.checkpoints import load_strictly, read_tensors
from dcdd_core.settings import require_number, require_text, shown
from dcdd_core.types import Calibration, Condition

#: What a decoder can read: one-hot distributions, or the condition that the diffusion decoder gets.
READS = ("tokens", "condition")
#: Kind -> shape. The first kind has as many parameters as the diffusion decoder and the autoencoder's decoder together.
#: The second is deeper, with a trunk on a grid twice as fine, so that it takes as long as ten diffusion steps.
SHAPES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "feed-forward": {"width": 256, "blocks": 8, "channels": (256, 128, 64, 32)},
        "fine-feed-forward": {"width": 256, "blocks": 18, "channels": (256, 128, 64), "finer": 2},
    }
)
#: The decoders: name -> kind, and what the decoder reads.
FEED_FORWARD: Mapping[str, tuple[str, str]] = MappingProxyType(
    {f"{kind}-{reads}": (kind, reads) for kind in SHAPES for reads in READS}
)
#: Name of the diffusion decoder that reads tokens alone.
DIFFUSION = "diffusion-tokens"
_FORMAT = "dcdd feed-forward decoder 1"
_EXPECTED = "a feed-forward decoder (.safetensors)"
_AGAIN = "train it again: `python -m dcdd_pico.train_opponents`"
#: Width of the adapter, as in pico's diffusion decoder.
_ADAPTER = 64
#: Channels of an attention head, and of a group in the convolutions' group normalisation.
_HEAD, _GROUP = 64, 8


@dataclass(frozen=True, kw_only=True)
class FeedForwardCard:
    """What a feed-forward decoder is, and how it was trained.

    Attributes:
        reads: one of `READS`.
        codebook: fingerprint of the codebook whose code vectors it reads.
        calibration: calibration of the conditions it was trained on; None for tokens.
        code_dim: D.
        grid: rows and columns of tokens.
        width, blocks: width M of the trunk, a multiple of a head's 64 channels or less than 64, and its depth.
        channels: channels of the upsampler, each a multiple of 8. The first is the trunk's width; the side doubles from
            each to the next.
        finer: positions of the trunk per side of a token.
        images: images it was trained on, counting repeated ones each time.

    Raises:
        ValueError: for values of wrong types or out of range.
    """

    reads: str
    codebook: str
    calibration: Calibration | None = None
    code_dim: int = 8
    grid: tuple[int, int] = (12, 12)
    width: int = 256
    blocks: int = 8
    channels: tuple[int, ...] = (256, 128, 64, 32)
    finer: int = 1
    images: int = 0

    def __post_init__(self):
        if self.reads not in READS:
            raise ValueError(f"reads must be one of {', '.join(READS)}, got {shown(self.reads)}")
        require_text("codebook", self.codebook)
        if (self.calibration is None) != (self.reads == "tokens"):
            raise ValueError(f"a calibration belongs to conditions alone, got {self.calibration} to read {self.reads}")
        for name in ("grid", "channels"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("code_dim", "width", "blocks", "finer"):
            require_number(name, getattr(self, name), whole=True, least=1)
        require_number("images", self.images, whole=True, least=0)
        for value in (*self.grid, *self.channels):
            require_number("a size of grid or channels", value, whole=True, least=1)
        if self.width > _HEAD and self.width % _HEAD:
            raise ValueError(f"width must be a multiple of {_HEAD}, got {self.width}")
        if self.channels[:1] != (self.width,) or any(value % _GROUP for value in self.channels):
            raise ValueError(
                f"channels must be multiples of {_GROUP}, the first of them the width {self.width}, got {self.channels}"
            )

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) of its images in pixels."""
        h, w = self.positions
        return h * 2 ** (len(self.channels) - 1), w * 2 ** (len(self.channels) - 1)

    @property
    def positions(self) -> tuple[int, int]:
        """Rows and columns of the trunk's grid."""
        return self.grid[0] * self.finer, self.grid[1] * self.finer

    def to_dict(self) -> dict[str, Any]:
        """The card as a JSON-compatible dict."""
        return asdict(self) | {"calibration": self.calibration and self.calibration.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FeedForwardCard:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for anything else.
        """
        if set(values) != set(cls.__dataclass_fields__):
            raise ValueError(f"its card has the fields {shown(sorted(values))}: {_AGAIN}")
        calibration = values["calibration"]
        return cls(**values | {"calibration": None if calibration is None else Calibration.from_dict(calibration)})


def opponent_file(name: str) -> str:
    """Path of a decoder of `FEED_FORWARD`, or of `DIFFUSION`, relative to the work folder."""
    return f"opponents/{name}.safetensors"


class FeedForwardDecoder(nn.Module):
    """Adapter, transformer trunk on the token grid, convolutional upsampler.

    Attributes:
        card: the decoder's shape.
        last: the last layer, whose gradients give the weight of the adversarial loss (`gan_finetune.adaptive_weight`).
    """

    def __init__(self, card: FeedForwardCard):
        super().__init__()
        self.card = card
        width, channels = card.width, card.channels
        heads = max(1, width // _HEAD)
        self.adapter = ConditionEncoder(card.code_dim, _ADAPTER, width)
        nn.init.xavier_uniform_(self.adapter.fuse.weight)  # not zero: there is no base model to preserve
        rows, columns = card.positions
        self.places = nn.Parameter(0.02 * torch.randn(rows * columns, width))
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(width, heads, width // heads, activation_fn="gelu-approximate", attention_bias=True)
            for _ in range(card.blocks)
        )
        self.norm = nn.LayerNorm(width)
        self.residuals = nn.ModuleList(
            ResnetBlock2D(in_channels=count, temb_channels=None, groups=count // _GROUP) for count in channels
        )
        self.expansions = nn.ModuleList(nn.Conv2d(a, 4 * b, 3, padding=1) for a, b in pairwise(channels))
        # No normalisation before the last layer: group normalisation removes the means, and colours with them.
        self.last = nn.Conv2d(channels[-1], 3, 3, padding=1)

    def forward(self, condition: Condition) -> torch.Tensor:
        """Pixels [B, 3, H, W], roughly in -1..1 and not clamped.

        Raises:
            ValueError: if the condition's grid is not the one the decoder was built for.
        """
        if condition.grid != self.card.grid:
            raise ValueError(f"this decoder reads {self.card.grid} tokens, got {condition.grid}: {_AGAIN}")
        patch, (h, w) = self.adapter.patch, self.card.positions
        tokens = self.adapter(condition, (patch * h, patch * w)) + self.places
        for block in self.blocks:
            tokens = block(tokens)
        maps = rearrange(self.norm(tokens), "b (h w) m -> b m h w", h=h)
        for residual, expansion in zip(self.residuals, self.expansions):
            maps = F.pixel_shuffle(expansion(residual(maps, None)), 2)
        return self.last(F.silu(self.residuals[-1](maps, None)))

    def matrices(self) -> list[str]:
        """Names of the trunk's matrices, which Muon updates as it does those of the diffusion decoder's blocks."""
        return [name for name, weight in self.named_parameters() if name.startswith("blocks.") and weight.ndim == 2]


def save_feed_forward(path: Path, decoder: FeedForwardDecoder) -> Path:
    """Writes a decoder with its card, in half precision like the diffusion decoder's bundle.

    Raises:
        OSError: if it cannot be written.
    """
    tensors = {name: value.half() for name, value in decoder.state_dict().items()}
    write_tensors(path, tensors, {"format": _FORMAT, "card": json.dumps(decoder.card.to_dict())})
    return path


def load_feed_forward(path: Path, *, device: torch.device | str = "cpu") -> FeedForwardDecoder:
    """Loads what `save_feed_forward` wrote, in float32, for inference.

    Raises:
        ValueError: if the file is absent, damaged or of another kind; the message names it.
    """
    with open_tensors(path, _EXPECTED, _AGAIN) as file, reading(path, _EXPECTED, _AGAIN):
        header = file.metadata() or {}
    if header.get("format") != _FORMAT:
        raise ValueError(f"{path} has no {_FORMAT!r} in its header, expected {_EXPECTED}: {_AGAIN}")
    card = json_object(header.get("card", ""), path, "the card of a feed-forward decoder", _AGAIN)
    with in_file(path), torch.device("meta"):
        decoder = FeedForwardDecoder(FeedForwardCard.from_dict(card))
    load_strictly(decoder, read_tensors(path, dtype=torch.float32, device=device), str(path))
    return decoder.eval().requires_grad_(False)
