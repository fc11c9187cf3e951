"""Scenes by the ten thousand: rendered once, kept as one memory-mapped array."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..files import whole_file
from .scenes import Split, render_scene


def scene_images(folder: Path, split: Split, count: int, *, size: int = 96) -> np.ndarray:
    """The first `count` scenes of a split as a read-only memory map [count, size, size, 3] uint8.

    Rendered on all cores the first time, into `folder`.
    """
    path = folder / f"scenes-{split}-{count}-{size}.npy"
    if not path.exists():
        chunk = 500
        jobs = [(split, start, min(count, start + chunk), size) for start in range(0, count, chunk)]
        with whole_file(path) as temporary:
            images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=(count, size, size, 3))
            with ProcessPoolExecutor(os.cpu_count()) as pool:
                for (_, start, stop, _), block in zip(jobs, pool.map(_render_range, jobs)):
                    images[start:stop] = block
            images.flush()
            del images
    return np.load(path, mmap_mode="r")


def scene_pixels(images: np.ndarray, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, H, W] in -1..1."""
    pixels = torch.from_numpy(np.array(images)).to(device)
    return pixels.permute(0, 3, 1, 2).contiguous().float().div_(127.5).sub_(1.0)


def _render_range(job: tuple[Split, int, int, int]) -> np.ndarray:
    split, start, stop, size = job
    return np.stack([render_scene(split, index, size=size).image for index in range(start, stop)])
