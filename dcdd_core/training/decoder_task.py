"""The decoder's training as the task of a `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..models.decoder import DistributionConditionedDecoder
from .config import OptimizationConfig
from .examples import Example
from .loss import decoder_loss
from .trainable import decoder_optimizers
from .trainer import Averaged


class DecoderTask:
    """See `trainer.Task`.

    Args:
        examples: (batch, generator) -> the batch's example; all random draws come from the generator.
    """

    remedy = (
        "make a bundle of it (`train.py --bundle-now`, with the options of this run), and start another run from that "
        "bundle (--bundle) with a lower learning rate"
    )

    def __init__(self, decoder: DistributionConditionedDecoder, examples: Callable[[Any, torch.Generator], Example]):
        self.network, self.examples = decoder, examples
        self.settings: Mapping[str, Any] = {"card": decoder.card.to_dict()}

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The backbone's blocks."""
        return self.network.backbone.blocks

    def optimizers(self, config: OptimizationConfig, *, sharded: bool) -> list[torch.optim.Optimizer]:
        """See `trainable.decoder_optimizers`."""
        return decoder_optimizers(self.network, config, sharded=sharded)

    def example(self, batch: Any, generator: torch.Generator, averaged: Averaged) -> Example:
        """See `trainer.Task`; the averaged weights are not used."""
        return self.examples(batch, generator)

    def update(
        self, examples: Iterable[Any], total: Callable[[torch.Tensor], torch.Tensor], *, parts: int
    ) -> Iterable[Any]:
        """See `trainer.Task`; the mean of micro-batches of as many images each is the mean over the images."""
        return examples

    def losses(
        self,
        network: DistributionConditionedDecoder,
        example: Example,
        generator: torch.Generator,
        config: OptimizationConfig,
    ) -> dict[str, torch.Tensor]:
        """See `loss.decoder_loss`; conditions are left out at the rate on the card."""
        return {"loss": decoder_loss(network, example, generator, config, drop=network.card.condition_dropout)}
