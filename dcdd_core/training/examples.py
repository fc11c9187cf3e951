"""From encodings to training examples: the condition, the latents to paint, and the mask.

Shapes: B batch, N tokens, D code dimension, C latent channels, h' w' latent grid, R resolution.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace

import torch

from ..method.calibration import proxy_logits
from ..models.card import DecoderCard
from ..pipelines.condition import condition_for
from ..protocols import ImageTokenizer, LatentCodec
from ..settings import require_number
from ..types import Codebook, Condition, TokenLogits
from .encoded_batch import EncodedBatch, device_of, encode, normalized_latents
from .image_batch import Geometry, ImageBatch
from .vlm_conditions import VLMConditions, choice, mixed, with_conditions


@dataclass(frozen=True, kw_only=True)
class Example:
    """One batch of training examples.

    Attributes:
        latents: [B, C, h', w'], normalised.
        condition: of the same images.
        masked_latents: [B, C, h', w'], normalised latents of the images, blank where the mask is 1; [1, C, h', w'] of a
            blank image if every mask is 1 everywhere.
        mask: [B or 1, 1, R, R], 1 where the decoder paints.
    """

    latents: torch.Tensor
    condition: Condition
    masked_latents: torch.Tensor
    mask: torch.Tensor


class ExampleMaker:
    """Makes a decoder's examples from batches of a `Source`.

    Args:
        card: the decoder's; its variant and calibration define the condition.
        tokenizer, codec: the encoders; the examples are made on the codec's device.
        geometry: the sizes of the batches.
        localised: fraction of the images that train localised decoding: the decoder paints a box and is given the rest.
            Needs the images' pixels.
        vlm_share: fraction of the images that get the VLM's conditions instead of proxies, if they have a caption.
        conditions: makes the VLM's conditions; None if the batches have them.

    Raises:
        ValueError: for fractions outside 0..1.
    """

    def __init__(
        self,
        card: DecoderCard,
        tokenizer: ImageTokenizer,
        codec: LatentCodec,
        geometry: Geometry,
        *,
        localised: float = 0.0,
        vlm_share: float = 0.0,
        conditions: VLMConditions | None = None,
    ):
        if not 0 <= localised <= 1:
            raise ValueError(f"the fraction of localised images must lie in 0..1, got {localised!r}")
        require_number("the share of the VLM's conditions", vlm_share, least=0, most=1)
        self.card = card
        self.tokenizer = tokenizer
        self.codec = codec
        self.geometry = geometry
        self.localised = localised
        self.vlm_share, self.conditions = vlm_share, conditions
        side, device = geometry.resolution, device_of(codec)
        self._blank = normalized_latents(codec, torch.zeros(1, 3, side, side, device=device))
        self._everywhere = torch.ones(1, 1, side, side, device=device)

    def __call__(self, batch: ImageBatch | EncodedBatch, generator: torch.Generator) -> Example:
        """Makes the example of a batch.

        Args:
            generator: draws which images are localised, and their boxes; its seed determines which images get the VLM's
                conditions.

        Raises:
            ValueError: if an image should be localised but the batch has no pixels, or if an image should get the VLM's
                conditions but nothing provides them.
        """
        encoded = encode(batch, self.tokenizer, self.codec)
        condition = proxy_condition(encoded.features, self.card, self.tokenizer.codebook, self.geometry.grid)
        if self.vlm_share:
            chosen = choice(self.vlm_share, len(encoded.features), generator)
            condition = mixed(condition, self._with_vlm(encoded, chosen), chosen)
        example = Example(
            latents=encoded.latents, condition=condition, masked_latents=self._blank, mask=self._everywhere
        )
        return self._localise(example, encoded.pixels, generator) if self.localised else example

    def with_share(self, vlm_share: float) -> ExampleMaker:
        """A copy with another share of the VLM's conditions."""
        other = copy(self)
        other.vlm_share = vlm_share
        return other

    def _with_vlm(self, encoded: EncodedBatch, chosen: torch.Tensor) -> EncodedBatch:
        if encoded.vlm_known is not None:
            return encoded
        if self.conditions is None or encoded.captions is None:
            raise ValueError(
                "the VLM's conditions need captions and the VLM: use images with captions, or a cache that was written "
                "with --vlm-conditions"
            )
        return with_conditions(encoded, self.conditions, chosen)

    def _localise(self, example: Example, pixels: torch.Tensor | None, generator: torch.Generator) -> Example:
        count = len(example.latents)
        local = (torch.rand(count, generator=generator) < self.localised).nonzero().squeeze(1)
        if not len(local):
            return example
        if pixels is None:
            raise ValueError(
                "localised training masks the images: use a cache that keeps their pixels, or --localised 0"
            )
        masked, mask = (part.repeat(count, 1, 1, 1) for part in (example.masked_latents, example.mask))
        mask[local] = boxes(len(local), self.geometry.resolution, generator).to(mask)
        masked[local] = normalized_latents(self.codec, pixels[local], mask[local])
        return replace(example, masked_latents=masked, mask=mask)


def proxy_condition(features: torch.Tensor, card: DecoderCard, codebook: Codebook, grid: tuple[int, int]) -> Condition:
    """The training condition of features [B, N, D] (Eqs. 9-15), made by the code that serves proxies at inference."""
    logits = proxy_logits(features, codebook)
    proxies = TokenLogits(logits, logits.argmax(-1), grid, source="proxy", codebook=card.codebook)
    return condition_for(card, proxies, codebook)


def boxes(count: int, size: int, generator: torch.Generator) -> torch.Tensor:
    """Masks [count, 1, size, size], 1 inside a box, 0 outside.

    Height and width are uniform between a quarter and three quarters of the image's side. The position is uniform too,
    but a box never touches the last row or column, since positions are rounded down.
    """
    sides = (size * (0.25 + 0.5 * torch.rand(count, 2, generator=generator))).long()
    corners = ((size - sides) * torch.rand(count, 2, generator=generator)).long()
    line = torch.arange(size)
    inside = [(line >= corners[:, k, None]) & (line < corners[:, k, None] + sides[:, k, None]) for k in (0, 1)]
    return (inside[0][:, :, None] & inside[1][:, None, :]).float()[:, None]
