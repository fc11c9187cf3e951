"""Training examples: the conditions of each variant, latents and masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dcdd_core.pipelines.images import to_pixels
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.encoded_batch import encode, normalized_latents
from dcdd_core.training.examples import ExampleMaker, boxes, proxy_condition
from dcdd_core.training.sources import open_images
from dcdd_core.types import Calibration, Codebook
from tests.tiny import tiny_card
from tests.training.runs import encoders, png_folder


def test_boxes_are_boxes():
    masks = boxes(50, 96, torch.Generator().manual_seed(0))
    assert masks.shape == (50, 1, 96, 96) and set(masks.unique().tolist()) == {0.0, 1.0}
    for mask in masks[:, 0]:
        rows, columns = mask.any(1).sum(), mask.any(0).sum()
        assert mask.sum() == rows * columns and 24 <= rows <= 72 and 24 <= columns <= 72


def test_boxes_are_those_of_their_draws():
    size, masks = 96, boxes(20, 96, torch.Generator().manual_seed(4))
    draw = torch.Generator().manual_seed(4)
    lengths, places = (torch.rand(20, 2, generator=draw).double().numpy() for _ in range(2))
    for k, mask in enumerate(masks[:, 0].numpy()):
        expected = np.zeros((size, size))
        height, width = (int(size / 4 + size / 2 * u) for u in lengths[k])
        top, left = int((size - height) * places[k, 0]), int((size - width) * places[k, 1])
        expected[top : top + height, left : left + width] = 1
        np.testing.assert_array_equal(mask, expected)


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


def maker(localised):
    return ExampleMaker(tiny_card(), *encoders(), localised=localised)


@pytest.fixture(scope="module")
def batch(tmp_path_factory):
    source = open_images(png_folder(tmp_path_factory.mktemp("images") / "folder"), encoders()[2])
    return next(iter(Batches(source, size=7, shard=DataShard(seed=None))))


def test_a_fraction_of_the_images_has_a_box_to_paint_and_the_rest_given(batch):
    whole = maker(0.0)(batch, torch.Generator().manual_seed(0))
    assert whole.mask.shape == (1, 1, 16, 16) and bool((whole.mask == 1).all())
    some = maker(0.5)(batch, torch.Generator().manual_seed(0))
    boxed = (some.mask == 0).flatten(1).any(dim=1)
    assert 0 < int(boxed.sum()) < 7
    assert torch.equal(some.latents, whole.latents)
    torch.testing.assert_close(some.masked_latents[~boxed], whole.masked_latents.expand_as(some.latents)[~boxed])
    given = to_pixels(batch.pixels, "cpu") * (1 - some.mask)
    torch.testing.assert_close(some.masked_latents, normalized_latents(encoders()[1], given))


def test_what_cannot_be_masked_is_refused(batch):
    encoded = replace(encode(batch, *encoders()[:2]), pixels=None)
    assert maker(0.0)(encoded, torch.Generator()).latents.shape == (7, 16, 8, 8)
    with pytest.raises(ValueError, match="use a cache that keeps their pixels, or --localised 0"):
        maker(1.0)(encoded, torch.Generator())
    with pytest.raises(ValueError, match="must lie in 0..1, got 2"):
        maker(2)
