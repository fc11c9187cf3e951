"""Examples: the conditions of each variant, and what is to be painted."""

import pytest
import torch

from dcdd_core.training.examples import ExampleMaker, boxes, proxy_condition
from dcdd_core.types import Calibration, Codebook
from tests.tiny import tiny_card


def test_boxes_are_boxes():
    masks = boxes(50, 96, torch.Generator().manual_seed(0))
    assert masks.shape == (50, 1, 96, 96) and set(masks.unique().tolist()) == {0.0, 1.0}
    for mask in masks[:, 0]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns and 24 <= rows <= 72 and 24 <= columns <= 72


def test_the_variants_of_table_4():
    codebook = Codebook(torch.randn(64, 8, generator=torch.Generator().manual_seed(0)))
    features = codebook.vectors[:16].reshape(1, 16, 8) * 3
    calibration = Calibration(scale=25.0)
    cards = {
        variant: tiny_card(
            variant=variant, codebook=codebook.fingerprint, calibration=calibration if variant == "lcdm+lc" else None
        )
        for variant in ("discrete", "lcdm", "lcdm+lc")
    }
    found = {variant: proxy_condition(features, card, codebook, (4, 4)) for variant, card in cards.items()}
    assert torch.equal(found["discrete"].code_vectors[0], codebook.vectors[:16])
    confidence = {v: float(c.uncertainty[..., 0].mean()) for v, c in found.items()}
    assert confidence["discrete"] == 1 > confidence["lcdm+lc"] > 0.5 > 0.1 > confidence["lcdm"]
