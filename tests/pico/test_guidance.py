"""The gradient of distribution guidance on pico's networks: in tiles and in bfloat16, beside that in float32."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.encode import encode
from dcdd_core.pipelines.guided import token_guide
from dcdd_pico.models import load_pico
from dcdd_pico.scenes import render_scene, scene_pixels


@pytest.fixture(scope="module")
def pico():
    return load_pico(with_sampler=False)


@pytest.fixture(scope="module")
def condition(pico):
    pixels = torch.cat([scene_pixels(render_scene("calibration", k).image[None], "cpu") for k in range(2)])
    return map_logits(encode(pico.tokenizer, pixels), pico.tokenizer.codebook, pico.decoder.card.calibration)


@pytest.fixture(scope="module")
def guide(pico, condition):
    calibration = pico.decoder.card.calibration
    return token_guide(pico.tokenizer, pico.codec, condition, scale=calibration.sharpness, size=(144, 96))


@pytest.fixture(scope="module")
def gradient(guide):
    return guide.gradient(guide.soft)


def cosines(first, second):
    return torch.cosine_similarity(first.double().flatten(1), second.double().flatten(1))


def test_the_gradient_in_tiles_is_close_to_the_whole(guide, gradient):
    """36 x 24 latents."""
    in_tiles = replace(guide, tile=26).gradient(guide.soft)
    assert not torch.equal(in_tiles, gradient) and cosines(in_tiles, gradient).min() > 0.98
    assert torch.equal(replace(guide, tile=36).gradient(guide.soft), gradient)


@pytest.mark.parametrize("tile", [None, 26])
def test_weights_in_bfloat16_give_almost_the_same_gradient(pico, condition, guide, gradient, tile):
    codec = KLCodec(deepcopy(pico.codec.model).bfloat16())
    tokenizer = VQTokenizer(deepcopy(pico.tokenizer.model).bfloat16(), name="pico")
    half = token_guide(tokenizer, codec, condition, scale=guide.scale, size=(144, 96), tile=tile)
    for latents in (guide.soft, guide.soft.bfloat16()):
        found = half.gradient(latents)
        assert found.dtype == torch.float32 and found.isfinite().all() and cosines(found, gradient).min() > 0.95
    assert half.loss(guide.soft).dtype == torch.float32
