"""Endless fresh scenes, each seen once, for trainings that start from the shipped decoder.

Shapes: B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
from accelerate import Accelerator

from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.image_files import DEFAULT_POLICY
from dcdd_core.training.batches import Batches, DataShard, Entry, Mark
from dcdd_core.training.config import OptimizationConfig, RunConfig
from dcdd_core.training.decoder_task import DecoderTask
from dcdd_core.training.distillation_task import DistillationTask
from dcdd_core.training.image_batch import ImageBatch
from dcdd_core.training.plan import Encoders
from dcdd_core.training.trainer import Evaluation, Trainer
from dcdd_core.training.vlm_conditions import VLMConditions

from .build_context import BuildContext, digest
from .scenes import SPLIT_SIZE, Scene, Split, render_scene


class FreshScenes:
    """The scenes of a split in order, endless, as a `Source` of captioned images; rendered when they are loaded.

    Args:
        first: number of the first scene.
    """

    def __init__(self, split: Split, size: int, *, first: int = 0):
        self.name = f"fresh {split} scenes"
        self.fingerprint = f"{split} scenes of {size} pixels" + (f" from {first}" if first else "")
        self.policy = DEFAULT_POLICY
        self.split, self.size, self.first = split, size, first

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        numbers = count(self.first + start * shard.world + shard.rank, shard.world)
        return (Entry(str(k), k % SPLIT_SIZE) for k in numbers)

    def load(self, entry: Entry) -> Scene:
        """Renders the scene of an entry."""
        return render_scene(self.split, entry.data, size=self.size)

    def collate(self, items: Sequence[Scene]) -> ImageBatch:
        """Makes a batch of scenes."""
        pixels = torch.stack([torch.from_numpy(scene.image).permute(2, 0, 1) for scene in items])
        captions = tuple(scene.caption for scene in items)
        return ImageBatch(keys=captions, pixels=pixels, token_pixels=pixels, captions=captions)


def train_on_fresh_scenes(
    context: BuildContext,
    name: str,
    task: DecoderTask | DistillationTask,
    config: OptimizationConfig,
    encoders: Encoders,
    conditions: VLMConditions | None,
    *,
    vlm_share: float,
    batch: int,
    run: RunConfig,
    evaluate: Callable[[DistributionConditionedDecoder], Evaluation],
    first: int = 0,
) -> DistributionConditionedDecoder:
    """Trains the network of a task, or restores it from the work folder.

    Args:
        name: the training's folder in the work folder.
        conditions: makes Janus' own conditions; None if no example has them.
        vlm_share: share of the examples with Janus' own conditions.
        batch: B.
        first: see `FreshScenes`.

    Raises:
        ValueError: if the work folder holds a training with other settings.
    """
    return Trainer(
        context.folder / name,
        task,
        Batches(FreshScenes("train", context.recipe.size, first=first), size=batch),
        config,
        accelerator=Accelerator(cpu=context.device.type == "cpu", mixed_precision="no"),
        settings=context.settings(
            tokenizer=encoders.tokenizer.codebook.fingerprint,
            autoencoder=digest(encoders.codec.model),
            vlm_share=vlm_share,
            vlm=None if conditions is None else conditions.served.sampler,
        ),
        autocast=context.autocast,
        run=run,
        evaluate=evaluate,
    ).train()
