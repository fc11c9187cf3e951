"""What the trainings of the VLMs share: fresh scenes as tokens, AdamW with Muon, EMA weights, exact resume."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcdd_core.protocols import ImageTokenizer
from dcdd_core.training.ema import EMA
from dcdd_core.training.optimizers import adamw_with_muon
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine

from .build_context import BuildContext
from .scene_tokens import FOLDER, SceneTokens, TokenBatch
from .train_tokenizer import tokens_digest
from .training_loop import train

_EMA = 0.998
_BLOCK = 2048


def block_of(train_scenes: int) -> int:
    """Scenes in a block of `SceneTokens`, for a build with this many training scenes."""
    return min(_BLOCK, train_scenes)


class TokenTraining:
    """A training of a network on `SceneTokens`.

    Args:
        weights: folder of the embedded models.
        tokenizer: the image tokenizer of these models.
        trained: name -> weight to train.
        matrices: names of the weights that Muon updates; AdamW updates the others.
        uses, ahead: see `SceneTokens`.
    """

    def __init__(
        self,
        context: BuildContext,
        weights: Path,
        tokenizer: ImageTokenizer,
        network: nn.Module,
        *,
        trained: Mapping[str, nn.Parameter],
        matrices: Sequence[str],
        uses: int,
        ahead: bool,
    ):
        recipe = context.recipe
        self.context, self.network, self.trained = context, network, trained
        self.optimizers = adamw_with_muon(trained, matrices, betas=(0.9, 0.95), weight_decay=0.05)
        self.ema = EMA(trained, _EMA)
        self.digest, self.block = tokens_digest(tokenizer.model), block_of(recipe.train_scenes)
        self.scenes = SceneTokens(
            context.folder / FOLDER,  # shared by all trainings: they use the same scenes, encoded once
            weights.resolve(),
            self.digest,
            seed=recipe.seed,
            size=recipe.size,
            block=self.block,
            uses=uses,
            ahead=ahead,
        )

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Swaps the EMA weights into the network while the context is open, and gives the network."""
        with self.ema.swapped_in():
            yield self.network

    def run(
        self,
        name: str,
        losses: Callable[[int, TokenBatch], Mapping[str, torch.Tensor]],
        evaluate: Callable[[int], Mapping[str, float]],
        *,
        steps: int,
        batch: int,
        peak: float,
        warmup: int,
        settings: Mapping[str, Any],
        save_every: int,
    ) -> None:
        """Trains the network, or restores it from the work folder; afterwards it holds its EMA weights.

        Args:
            name: the training's folder in the work folder.
            losses: update number and its scenes -> values to log, of which "loss" is minimised.
            evaluate: see `training_loop.train`; called every 500 updates, or five times in a run of 50 to 2,500.
            batch: scenes per update.
            peak: peak learning rate.
            warmup: updates until the peak is reached, at most a twentieth of `steps`.
            settings: what the result depends on, besides the tokenizer, the learning rate and the block.
        """
        warmup = min(warmup, max(1, steps // 20))

        def step(i: int) -> dict[str, torch.Tensor]:
            found = losses(i, self.scenes.batch(i, batch))
            self.network.zero_grad(set_to_none=True)
            found["loss"].backward()
            nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
            for optimizer in self.optimizers.values():
                set_learning_rate(optimizer, warmup_cosine(i, steps, peak=peak, warmup=warmup))
                optimizer.step()
            self.ema.update()
            return {name: value.detach() for name, value in found.items()}

        try:
            train(
                self.context.folder / name,
                settings={**settings, "tokenizer": self.digest, "rate": peak, "block": self.block},
                steps=steps,
                step=step,
                state={"model": self.network, "ema": self.ema, **self.optimizers},
                evaluate=evaluate,
                evaluate_every=min(500, max(10, steps // 5)),
                save_every=save_every,
                log_every=25,
            )
        finally:
            self.scenes.close()
        self.ema.apply()
        self.network.eval().requires_grad_(False)
