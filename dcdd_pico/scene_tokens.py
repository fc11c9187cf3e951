"""Endless training scenes as image tokens, rendered and encoded in blocks while training uses the previous block.

Shapes: B batch, N tokens, S scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from dcdd_core import registry
from dcdd_core.files import write_tensors
from dcdd_core.method.sampling import keyed_generator
from dcdd_core.protocols import ImageTokenizer
from dcdd_core.training.masked_loss import tokens_and_errors

from .ahead import Ahead
from .embedded import model_paths
from .scenes import SPLIT_SIZE, SPLIT_START, SceneFacts, Split, render_scene, sample_facts, scene_pixels

#: Folder in a work folder with the blocks, shared by all trainings that use them.
FOLDER = "progressive-tokens"
_BATCH = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenBatch:
    """Scenes of one update.

    Attributes:
        facts: facts of each scene, which give its caption.
        tokens: [B, N] int64.
        errors: [B, N] float32, log(1 - cosine) between a position's feature and its code.
    """

    facts: list[SceneFacts]
    tokens: torch.Tensor
    errors: torch.Tensor


class SceneTokens:
    """The training split as tokens, in files in the work folder that later runs with the same tokenizer reuse.

    A block of scenes is used `uses` times, each time in a new order, before the next block: rendering and encoding a
    scene costs about as much as half an update's share of it. After the last whole block of the split, the first block
    comes again; scenes beyond it are not used.

    Args:
        folder: folder of the files.
        weights: the embedded models, whose tokenizer encodes.
        name: identifies the tokenizer's weights in the files' names.
        block: number of scenes in a block.
        ahead: a separate process prepares the next block; False makes each block when it is asked for.
    """

    def __init__(
        self,
        folder: Path,
        weights: Path,
        name: str,
        *,
        seed: int,
        size: int,
        block: int = 2048,
        uses: int = 3,
        ahead: bool = True,
    ):
        self.folder, self.weights, self.name = folder, weights, name
        self.seed, self.size, self.block, self.uses = seed, size, block, uses
        self._blocks = Ahead(encode_block, self._job, apart=ahead)
        self._held: dict[int, dict[str, torch.Tensor]] = {}

    def batch(self, step: int, size: int) -> TokenBatch:
        """The scenes of an update; they depend on (seed, step) only."""
        indices, parts = [], []
        for position in range(step * size, (step + 1) * size):
            number, within = divmod(position, self.block * self.uses)
            use, place = divmod(within, self.block)
            # All positions of a use have the same order: it is kept until the next use.
            chosen = int(self._order(number, use)[place])
            number %= SPLIT_SIZE // self.block
            indices.append(number * self.block + chosen)
            held = self._load(number)
            parts.append((held["tokens"][chosen], held["errors"][chosen]))
        tokens, errors = (torch.stack(found) for found in zip(*parts))
        return TokenBatch(facts=scene_facts_of("train", indices), tokens=tokens.long(), errors=errors.float())

    def close(self) -> None:
        """Ends the process that prepares blocks."""
        self._blocks.close()

    def _order(self, number: int, use: int) -> torch.Tensor:
        if getattr(self, "_ordered", None) != (number, use):
            self._ordered = (number, use)
            self._places = torch.randperm(self.block, generator=keyed_generator(self.seed, 1 << 40, number, use))
        return self._places

    def _load(self, number: int) -> dict[str, torch.Tensor]:
        if number not in self._held:
            path = self._job(number)[0]
            if not path.exists():  # an existing one need not wait for the process, which may be making another
                self._blocks.result(number)
            self._blocks.ask((number + 1) % (SPLIT_SIZE // self.block))
            self._held = {number: load_file(path)}
        return self._held[number]

    def _job(self, number: int) -> tuple[Path, Path, int, int, int]:
        path = self.folder / f"train-{self.size}-{self.name}-{self.block}x{number}.safetensors"
        return path, self.weights, number * self.block, self.block, self.size


def different_scenes(drawn: int, *, block: int, uses: int) -> int:
    """Number of different scenes among the first `drawn` scenes of `SceneTokens`."""
    blocks, rest = divmod(drawn, block * uses)
    return blocks * block + min(rest, block)


def scene_facts_of(split: Split, indices: Sequence[int]) -> list[SceneFacts]:
    """The facts of scenes of a split, without rendering them."""
    return [sample_facts(np.random.default_rng(SPLIT_START[split] + index)) for index in indices]


def encode_block(path: Path, weights: Path, first: int, count: int, size: int) -> None:
    """Writes the tokens and errors of training scenes first..first + count - 1, unless the file exists."""
    if path.exists():
        return
    vlm = model_paths(weights)["vlm"]
    tokenizer = registry.sampler_family(vlm).load_tokenizer(str(vlm), dtype=torch.float32)
    tokens, errors = encode_scenes(tokenizer, "train", range(first, first + count), size=size)
    write_tensors(path, {"tokens": tokens.to(torch.int16), "errors": errors.half()}, {})


@torch.no_grad()
def encode_scenes(
    tokenizer: ImageTokenizer, split: Split, indices: Sequence[int], *, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders and encodes scenes: tokens [S, N] int64 and log(1 - cosine) of feature and code [S, N] float32."""
    found = []
    for start in range(0, len(indices), _BATCH):
        images = np.stack([render_scene(split, k, size=size).image for k in indices[start : start + _BATCH]])
        # Takes a quarter less time on a CPU than channels first.
        pixels = scene_pixels(images, tokenizer.device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(tokenizer.device.type, dtype=torch.bfloat16):
            features = tokenizer.features(pixels)
        found.append(tokens_and_errors(tokenizer, features))
    tokens, errors = (torch.cat(parts) for parts in zip(*found))
    return tokens, errors
