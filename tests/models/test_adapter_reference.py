"""The adapter against Eqs. 19-22 written out in float64 NumPy and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.signal import correlate

from dcdd_core.models.adapter import ConditionEncoder
from dcdd_core.types import Condition


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def bilinear(map_: np.ndarray, height: int, width: int) -> np.ndarray:
    """[C, h, w] -> [C, height, width], pixel centres at half integers, the border repeated."""
    for axis, size in ((1, height), (2, width)):
        cells = map_.shape[axis]
        place = np.clip((np.arange(size) + 0.5) * cells / size - 0.5, 0, cells - 1)
        low = np.floor(place).astype(int)
        share = np.expand_dims(place - low, [0, 3 - axis])
        high = np.minimum(low + 1, cells - 1)
        map_ = np.take(map_, low, axis) * (1 - share) + np.take(map_, high, axis) * share
    return map_


def reference(encoder: ConditionEncoder, c: np.ndarray, u: np.ndarray, grid, latent_size) -> np.ndarray:
    """One sample: c [N, D], u [N, 4] -> [h' w' / p^2, M]."""
    weights = {name: tensor.double().numpy() for name, tensor in encoder.state_dict().items()}
    (h, w), (height, width), p = grid, latent_size, encoder.patch
    codes = c @ weights["project.weight"].T + weights["project.bias"]
    codes = codes.reshape(h, w, -1)[np.arange(height) * h // height][:, np.arange(width) * w // width]
    codes = np.pad(codes.transpose(2, 0, 1), ((0, 0), (1, 1), (1, 1)))
    kernels, biases = weights["refine.weight"], weights["refine.bias"]
    codes = np.stack([correlate(codes, k, mode="valid")[0] + b for k, b in zip(kernels, biases)])
    groups = codes.reshape(8, -1)
    spread = np.sqrt(groups.var(1, keepdims=True) + 1e-5)
    codes = ((groups - groups.mean(1, keepdims=True)) / spread).reshape(codes.shape)
    codes = codes * weights["norm.weight"][:, None, None] + weights["norm.bias"][:, None, None]
    codes = codes / (1 + np.exp(-codes))
    condition_map = np.concatenate([codes, bilinear(u.reshape(h, w, 4).transpose(2, 0, 1), height, width)])
    patches = [
        condition_map[:, y : y + p, x : x + p].reshape(-1) for y in range(0, height, p) for x in range(0, width, p)
    ]
    return np.stack(patches) @ weights["fuse.weight"].T + weights["fuse.bias"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("grid", "latent_size", "patch"),
    [((3, 4), (6, 8), 2), ((2, 3), (8, 12), 2), ((4, 2), (16, 4), 2), ((3, 4), (3, 4), 1), ((2, 3), (6, 9), 3)],
)
def test_it_is_equations_19_to_22(grid, latent_size, patch):
    encoder = ConditionEncoder(5, 16, 12, patch=patch)
    for seed, weight in enumerate(encoder.parameters()):
        weight.copy_(rand(*weight.shape, seed=seed) - 0.4)
    count = grid[0] * grid[1]
    condition = Condition(rand(2, count, 5, seed=50) - 0.5, rand(2, count, 4, seed=51), grid)
    found = encoder(condition, latent_size).numpy()
    for one, c, u in zip(found, condition.code_vectors, condition.uncertainty):
        expected = reference(encoder, c.double().numpy(), u.double().numpy(), grid, latent_size)
        np.testing.assert_allclose(one, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_uncertainty_alone_comes_through_bilinearly():
    """Two tokens in a row, 0 and 1: four latents at 0, 1/4, 3/4 and 1."""
    encoder = ConditionEncoder(5, 8, 16 * 3)
    encoder.fuse.weight[:].copy_(torch.eye(48))
    encoder.norm.weight.zero_()
    uncertainty = torch.zeros(1, 2, 4)
    uncertainty[0, 1] = 1.0
    found = encoder(Condition(torch.zeros(1, 2, 5), uncertainty, (1, 2)), (2, 4))
    first, second = found[0].reshape(2, 12, 2, 2)[:, 8:]
    assert first[0].tolist() == [[0, 0.25], [0, 0.25]] and second[0].tolist() == [[0.75, 1], [0.75, 1]]
    assert not found[0].reshape(2, 12, 2, 2)[:, :8].any()


def test_it_adds_nothing_before_training():
    assert not ConditionEncoder(5, 16, 12)(Condition(rand(1, 6, 5), rand(1, 6, 4), (2, 3)), (4, 6)).any()


@torch.no_grad()
def test_it_computes_in_its_own_precision():
    encoder = ConditionEncoder(5, 16, 12).bfloat16()
    condition = Condition(rand(1, 6, 5), rand(1, 6, 4), (2, 3))
    assert encoder(condition, (4, 6)).dtype == torch.bfloat16
