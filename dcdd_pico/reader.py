"""The scene reader: a small convolutional classifier of a scene's facts.

It is trained twice, from different seeds. One copy is the metric network (facts, Frechet features, perceptual distance)
and has no part in any other training. The other is the perceptual loss of the VQ-VAE and the autoencoder. This way no
model is trained on the metric it is evaluated with.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from .scenes import (
    COLOURS,
    GROUND_COLOURS,
    GROUND_TEXTURES,
    PLACES,
    SHAPES,
    SIZES,
    TEXTURES,
    WRITING_PLACES,
    SceneFacts,
)

#: Fact -> its possible answers, in the order of the classifier's outputs.
FACTS: dict[str, tuple[str | None, ...]] = {
    "shape": SHAPES,
    "colour": tuple(COLOURS),
    "texture": TEXTURES,
    "size": SIZES,
    "place": tuple(PLACES),
    "ground_colour": tuple(GROUND_COLOURS),
    "ground_texture": GROUND_TEXTURES,
    "writing": (None, *WRITING_PLACES),
}
_WIDTHS = (32, 64, 128, 192)


class SceneReader(nn.Module):
    """Four stages of two convolutions, each halving the side, then a linear head per fact on the 6 x 6 feature map."""

    def __init__(self):
        super().__init__()
        widths = (3, *_WIDTHS)
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
                nn.Conv2d(after, after, 3, padding=1, bias=False),
                nn.BatchNorm2d(after),
                nn.ReLU(),
            )
            for before, after in zip(widths, _WIDTHS)
        )
        self.hidden = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(_WIDTHS[-1] * 36, 256), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(256, len(answers)) for name, answers in FACTS.items()})

    def stage_maps(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        """pixels [B, 3, 96, 96] in -1..1 -> the four stages' outputs, [B, C, 96 / 2^i, 96 / 2^i]."""
        maps = []
        for stage in self.stages:
            pixels = stage(pixels)
            maps.append(pixels)
        return maps

    def forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """pixels [B, 3, 96, 96] in -1..1 -> fact -> logits [B, answers]."""
        hidden = self.hidden(self.stage_maps(pixels)[-1])
        return {name: head(hidden) for name, head in self.heads.items()}

    def frechet_features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Spatial means of the last two stages: [B, 320]."""
        maps = self.stage_maps(pixels)
        return torch.cat([m.mean(dim=(2, 3)) for m in maps[-2:]], dim=1)

    def perceptual_distance(self, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """LPIPS without learned weights (Zhang et al. 2018, Eq. 1 with w = 1): [B], 0 for equal images.

        At each stage channel vectors are normalised to unit length. Their squared differences are summed over channels,
        averaged over positions, and summed over stages.
        """
        total = first.new_zeros(first.shape[0], dtype=torch.float32)
        for a, b in zip(self.stage_maps(first), self.stage_maps(second)):
            a, b = F.normalize(a.float(), dim=1, eps=1e-6), F.normalize(b.float(), dim=1, eps=1e-6)
            total = total + (a - b).square().sum(dim=1).mean(dim=(1, 2))
        return total


def fact_labels(facts: list[SceneFacts]) -> dict[str, torch.Tensor]:
    """Name of each fact -> indices [B] of the scenes' answers in `FACTS`."""
    return {name: torch.tensor([answers.index(getattr(f, name)) for f in facts]) for name, answers in FACTS.items()}
