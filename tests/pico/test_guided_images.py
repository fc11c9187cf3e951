"""Images that guidance is measured on: their ranges, their rows and the files that keep them."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from dcdd_core.method.guidance import WEIGHTS
from dcdd_core.models.cheap_decoder import load_cheap_decoder
from dcdd_core.pipelines.decode import decode
from dcdd_core.pipelines.guided import GuidanceOptions
from dcdd_pico import guided_images
from dcdd_pico.build_context import Recipe
from dcdd_pico.embedded import CHEAP
from dcdd_pico.guided_images import (
    FIRST,
    PHOTOGRAPHS,
    Given,
    Painters,
    Way,
    given_of,
    guide_of,
    kept,
    originals,
    paint,
    scenes_of,
    tiles,
)
from dcdd_pico.guided_sections import CHOICE, VARIED, WAYS
from dcdd_pico.models import load_pico
from dcdd_pico.scenes import SPLIT_SIZE, SPLIT_START, render_scene
from dcdd_pico.sections import TableOptions
from dcdd_pico.train_cheap_decoder import cheap_config, save_cheap_decoder
from tests.tiny import fill, random_pico

PART = slice(2, 4)


@pytest.fixture(scope="module")
def painters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("guided")
    weights = random_pico(folder / "weights")
    return Painters(pico=load_pico(weights=weights), folder=folder / "kept", weights=weights)


@pytest.fixture(scope="module")
def given(painters):
    return painters.given("reconstruction", "test", PART)


def test_no_choice_and_no_other_table_has_seen_the_range():
    """Scenes are drawn from the seed SPLIT_START + index, so that ranges of seeds that are apart share no scene."""
    count = TableOptions.scenes
    measured = range(SPLIT_START["test"] + FIRST["test"], SPLIT_START["test"] + FIRST["test"] + count)
    chosen_on = range(SPLIT_START["calibration"] + FIRST["calibration"], SPLIT_START["train"])
    others = [
        range(SPLIT_START["test"], SPLIT_START["test"] + count),  # of the other tables
        range(SPLIT_START["calibration"], SPLIT_START["train"]),  # of calibration and of settings
        range(SPLIT_START["train"], SPLIT_START["train"] + SPLIT_SIZE),
    ]
    assert all(measured.stop <= other.start or other.stop <= measured.start for other in others)
    assert chosen_on.start >= SPLIT_START["calibration"] + Recipe().held_out_scenes
    assert [scene.caption for scene in scenes_of("test", PART)] == [
        render_scene("test", FIRST["test"] + k).caption for k in (2, 3)
    ]
    assert np.array_equal(
        originals("calibration", PART)[1], render_scene("calibration", FIRST["calibration"] + 3).image
    )


def test_every_row_has_its_own_name_and_images():
    for ways in (WAYS, VARIED, CHOICE):
        assert len({way.name for way in ways}) == len({way.file for way in ways}) == len(ways)
    own = Way(name="a", paints="prior", guidance=GuidanceOptions())
    changed = [
        replace(own, paints="trained"),
        replace(own, start=0.5),
        replace(own, steps=3),
        replace(own, shift=1.5),
        replace(own, tokens_alone=True),
        replace(own, cheap=True),
        replace(own, guidance=None),
        *(
            replace(own, guidance=GuidanceOptions(**options))
            for options in (
                {"strength": 0.1},
                {"pull": 0.5},
                {"first": 0.9},
                {"last": 0.1},
                {"every": 2},
                {"gradients": 2},
                {"weight": WEIGHTS[1]},
            )
        ),
    ]
    assert len({way.file for way in (own, *changed)}) == 1 + len(changed)
    assert replace(own, name="b").file == own.file  # a row of another table takes the same images


def test_tiles_are_cut_from_the_photographs():
    assert tiles().shape == (4 * len(PHOTOGRAPHS), 96, 96, 3)
    with Image.open(guided_images.Path(guided_images.skimage.__file__).parent / "data" / "coffee.png") as image:
        coffee = np.asarray(image)
    first = 4 * PHOTOGRAPHS.index("coffee.png")
    # 400 x 600 pixels: the centres of the grid's cells are at 100 and 300, 150 and 450.
    assert np.array_equal(tiles()[first], coffee[52:148, 102:198])
    assert np.array_equal(tiles()[first + 3], coffee[252:348, 402:498])
    assert np.array_equal(originals("photographs", slice(first, first + 1))[0], tiles()[first])


def test_files_are_made_once_and_never_half(tmp_path):
    path, made = tmp_path / "a" / "part.npz", []

    def make():
        made.append(1)
        if len(made) == 1:
            raise KeyboardInterrupt
        return {"x": torch.tensor([1.5]), "n": torch.tensor([3])}

    with pytest.raises(KeyboardInterrupt):
        kept(path, make)
    assert not path.exists()
    for _ in range(2):
        found = kept(path, make)
        assert found["x"] == torch.tensor([1.5]) and found["n"].dtype == torch.int64
    assert len(made) == 2


def test_images_are_those_that_their_row_names(painters, given, monkeypatch):
    """With one Euler or gradient step each."""
    pico, condition = painters.pico, given.condition
    ways = {way.name: replace(way, steps=1) for way in WAYS}
    images = {name: paint(painters, way, given, range(2, 4)) for name, way in ways.items()}
    assert torch.equal(images["VQ-VAE decode"], pico.tokenizer.decode_tokens(given.tokens, condition.grid))
    soft = pico.tokenizer.decode_vectors(condition.code_vectors, condition.grid)
    assert torch.equal(images["VQ-VAE decode of expected codes"], soft)
    through = pico.codec.decode(pico.codec.encode(soft))
    assert torch.equal(images["expected codes through the autoencoder"], through)
    alone = decode(pico.decoder, pico.codec, condition, seeds=[2, 3], steps=1).pixels
    assert torch.equal(images["trained DCDD"], alone)
    assert not torch.equal(images["trained DCDD + guidance"], alone)
    guide = guide_of(painters, ways["SDEdit of the soft decode"], given)
    sdedit = decode(painters.prior, pico.codec, condition, seeds=[2, 3], steps=1, guide=guide, start=0.6).pixels
    assert torch.equal(images["SDEdit of the soft decode"], sdedit)
    distinct = [made for name, made in images.items()]
    assert not any(torch.equal(a, b) for i, a in enumerate(distinct) for b in distinct[:i])


def test_tokens_alone_change_the_loss_and_not_the_soft_decode(painters, given):
    way = Way(name="a", paints="prior", guidance=GuidanceOptions())
    soft, hard = guide_of(painters, way, given), guide_of(painters, replace(way, tokens_alone=True), given)
    assert torch.equal(soft.soft, hard.soft) and torch.equal(soft.condition.uncertainty, hard.condition.uncertainty)
    assert torch.equal(hard.condition.code_vectors, painters.pico.tokenizer.codebook.vectors[given.tokens])


def test_guidance_is_as_sharp_as_the_calibration(painters, given):
    """s a, as in the nodes and on the command line."""
    decoder = copy(painters.pico.decoder)
    calibration = replace(decoder.card.calibration, scale=20.0, affine_scale=1.5)
    decoder.card = replace(decoder.card, calibration=calibration)
    painters = replace(painters, pico=replace(painters.pico, decoder=decoder))
    guide = guided_images.guide_of(painters, Way(name="a", paints="trained", guidance=GuidanceOptions()), given)
    assert guide.scale == pytest.approx(30)


def test_guidance_looks_through_the_small_decoder_where_a_row_says_so(painters, given):
    tiny = AutoencoderTiny(**cheap_config(16))
    save_cheap_decoder(painters.weights, fill(tiny, 3))
    way = Way(name="a", paints="prior", guidance=GuidanceOptions(), cheap=True)
    z = given.condition.code_vectors.new_ones(1, 16, 24, 24)
    through, own = (guide_of(painters, one, given).decode(z) for one in (way, replace(way, cheap=False)))
    assert torch.equal(through, load_cheap_decoder(painters.weights / CHEAP)(z))
    assert torch.equal(own, painters.pico.codec.decode(painters.pico.codec.denormalize(z)))


def test_images_are_kept_with_their_seconds(painters, monkeypatch):
    way = WAYS[0]
    first, seconds = painters.images(way, "reconstruction", "test", PART)
    assert seconds > 0 and first.shape == (2, 3, 96, 96)
    whole = (first + 1) * 127.5
    assert torch.allclose(whole, whole.round(), atol=1e-4)
    monkeypatch.setattr(guided_images, "paint", None)  # nothing is painted a second time
    again, same = painters.images(way, "reconstruction", "test", PART)
    assert torch.equal(first, again) and same == seconds


def test_captions_are_sampled_once_with_seeds_of_their_own(painters, monkeypatch):
    asked = []
    sampler = painters.pico.sampler
    monkeypatch.setattr(
        sampler, "sample", lambda captions, **options: asked.append((captions, options)) or grid, raising=False
    )
    grid = painters.pico.tokenizer.encode(torch.zeros(2, 3, 96, 96))
    made = given_of(painters.pico, "text", "test", PART)
    ((captions, options),) = asked
    assert captions == [scene.caption for scene in scenes_of("test", PART)]
    assert list(options["seeds"]) == [2, 3]
    assert options["options"].guidance == painters.pico.decoder.card.calibration.guidance
    assert torch.equal(made["tokens"], grid.tokens)
    for _ in range(2):
        found = painters.given("text", "test", PART)
        assert isinstance(found, Given) and torch.equal(found.tokens, grid.tokens)
    assert len(asked) == 2
