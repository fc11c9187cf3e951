"""Cached VQ features and VAE latents of scenes, on which Janus and the decoder are trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from dcdd_core.files import whole_file
from dcdd_core.method.latents import scale_latents
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.image_files import DEFAULT_POLICY
from dcdd_core.training.batches import DataShard, Entry, Mark
from dcdd_core.training.encoded_batch import EncodedBatch

from .build_context import BuildContext, digest
from .scenes import scene_pixels
from .train_tokenizer import tokens_digest

_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Encodings:
    """VQ features [M, N, D] and scaled VAE latents [M, 16, h, w] of M scenes, both float16 memory maps."""

    features: np.ndarray
    latents: np.ndarray

    def tokens(self, vq: VQTokenizer) -> torch.Tensor:
        """Nearest codes, [M, N] int64."""
        parts = torch.from_numpy(np.array(self.features)).split(4096)
        return torch.cat([vq.tokens(part.to(vq.device)).cpu() for part in parts])


class SceneEncodings:
    """The encodings of the training scenes as an endless `Source`; a step's scenes depend on its number only.

    Args:
        stage: number of the training.
        size: batch size summed over all processes.
    """

    def __init__(self, context: BuildContext, encodings: Encodings, stage: int, size: int):
        self.name = "the training scenes"
        self.fingerprint = f"{len(encodings.features)} scenes"
        self.policy = DEFAULT_POLICY
        self.context, self.encodings, self.stage, self.size = context, encodings, stage, size

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        for position in count(start * shard.world + shard.rank, shard.world):
            step, place = divmod(position, self.size)
            index = int(self.context.batch(self.stage, step, self.size)[place])
            yield Entry(str(index), index)

    def load(self, entry: Entry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Features, latents and image of a scene."""
        arrays = (self.encodings.features, self.encodings.latents, self.context.train_images)
        return tuple(np.array(array[entry.data]) for array in arrays)

    def collate(self, items: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> EncodedBatch:
        features, latents, images = (np.stack(parts) for parts in zip(*items))
        return EncodedBatch(
            features=torch.from_numpy(features).float(),
            latents=torch.from_numpy(latents).float(),
            pixels=scene_pixels(images),
        )


def encode_scenes(
    context: BuildContext, name: str, images: np.ndarray, vq: VQTokenizer, vae: AutoencoderKL
) -> Encodings:
    """Encodes images [M, H, W, 3] uint8 into files in the work folder, unless they exist, and memory-maps them.

    File names contain a hash of the weights, so other weights use other files.
    """
    paths = {
        "features": context.folder / f"{name}-{len(images)}-features-{tokens_digest(vq.model)}.npy",
        "latents": context.folder / f"{name}-{len(images)}-latents-{digest(vae)}.npy",
    }
    if not all(path.exists() for path in paths.values()):
        _write(paths, images, vq, vae, context)
    return Encodings(**{part: np.load(path, mmap_mode="r") for part, path in paths.items()})


@torch.no_grad()
def _write(
    paths: dict[str, Path], images: np.ndarray, vq: VQTokenizer, vae: AutoencoderKL, context: BuildContext
) -> None:
    arrays: dict[str, np.ndarray] = {}
    with ExitStack() as files:
        temporary = {part: files.enter_context(whole_file(path)) for part, path in paths.items()}
        for start in range(0, len(images), _BATCH):
            pixels = scene_pixels(images[start : start + _BATCH], context.device)
            with context.autocast():
                features = vq.features(pixels)
                latents = vae.encode(pixels).latent_dist.mean.float()
            latents = scale_latents(latents, vae.config.shift_factor, vae.config.scaling_factor)
            for part, values in (("features", features), ("latents", latents)):
                if part not in arrays:
                    shape = (len(images), *values.shape[1:])
                    arrays[part] = np.lib.format.open_memmap(temporary[part], mode="w+", dtype=np.float16, shape=shape)
                arrays[part][start : start + len(values)] = values.half().cpu().numpy()
        for array in arrays.values():
            array.flush()
