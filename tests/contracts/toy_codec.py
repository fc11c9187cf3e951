"""A latent codec in one file: pixels in another order, normalised for each channel."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

FACTOR, CHANNELS = 2, 12


class ToyCodec:
    """Twelve channels at half the size. No one shift and scale normalises them."""

    factor, channels, shift, scale, comfy_format = FACTOR, CHANNELS, None, None, ""

    def __init__(self):
        self.model = nn.Identity()
        self._deviation = torch.linspace(0.5, 1.5, CHANNELS)[:, None, None]

    def encode(self, pixels):
        return F.pixel_unshuffle(pixels.float(), FACTOR)

    def decode(self, latents):
        return F.pixel_shuffle(latents.float(), FACTOR).clamp(-1, 1)

    def normalize(self, latents):
        return latents / self._deviation

    def denormalize(self, z):
        return z * self._deviation

    def preview(self, latents):
        return None

    def working_memory(self, height, width):
        return 4 * 3 * height * width


class ToyCodecFamily:
    """See `protocols.CodecFamily`."""

    name, expected = "toy codec", "the folder of a toy codec"

    def reads(self, path):
        config = Path(path) / "config.json"
        return config.is_file() and json.loads(config.read_text()).get("_class_name") == "ToyCodec"

    def load(self, path, *, device="cpu", dtype=None):
        return ToyCodec()

    def published(self):
        return ToyCodec()


def save(folder: Path) -> Path:
    """A toy codec's files."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"_class_name": "ToyCodec"}))
    return folder
