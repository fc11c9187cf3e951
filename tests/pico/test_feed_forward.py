"""Feed-forward decoders: shapes, what they depend on, and their files."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import save_file

from dcdd_core.types import Calibration, Condition
from dcdd_pico.embedded import WEIGHTS
from dcdd_pico.feed_forward import (
    FEED_FORWARD,
    SHAPES,
    FeedForwardCard,
    FeedForwardDecoder,
    load_feed_forward,
    save_feed_forward,
)
from dcdd_pico.train_autoencoder import autoencoder_config
from tests.tiny import fill

CARD = FeedForwardCard(
    reads="condition",
    codebook="64x8:",
    calibration=Calibration(scale=25.0),
    grid=(2, 3),
    width=16,
    blocks=1,
    channels=(16, 8),
    images=7,
)


def condition(batch=2, grid=(2, 3), seed=0):
    draw, tokens = torch.Generator().manual_seed(seed), grid[0] * grid[1]
    return Condition(
        torch.randn(batch, tokens, 8, generator=draw), torch.rand(batch, tokens, 4, generator=draw), grid, codebook=None
    )


def decoder():
    return fill(FeedForwardDecoder(CARD))


def test_every_decoder_has_its_kind_and_what_it_reads():
    assert list(FEED_FORWARD.values()) == [(kind, reads) for kind in SHAPES for reads in ("tokens", "condition")]
    assert FEED_FORWARD["fine-feed-forward-condition"] == ("fine-feed-forward", "condition")


def test_they_are_as_large_as_the_diffusion_decoder_and_the_autoencoder_s_decoder_together():
    with safe_open(WEIGHTS / "decoder.safetensors", "pt") as file:
        ours = sum(file.get_slice(name).get_shape()[0] * _rest(file, name) for name in file.keys())
    with torch.device("meta"):
        ours += sum(weight.numel() for weight in AutoencoderKL(**autoencoder_config()).decoder.parameters())
        shape = {"reads": "tokens", "codebook": "", **SHAPES["feed-forward"]}
        size = sum(weight.numel() for weight in FeedForwardDecoder(FeedForwardCard(**shape)).parameters())
    assert ours <= size < 1.05 * ours


def _rest(file, name):
    return int(torch.tensor(file.get_slice(name).get_shape()[1:]).prod())


@torch.no_grad()
def test_an_image_has_a_square_of_pixels_for_each_token_and_batches_are_their_singles():
    network, given = decoder(), condition()
    made = network(given)
    assert made.shape == (2, 3, 4, 6) and CARD.size == (4, 6)
    for k in range(2):
        torch.testing.assert_close(network(given.part(k, k + 1)), made[k : k + 1], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_pixel_depends_on_every_token_on_code_vectors_and_on_uncertainty():
    network, given = decoder(), condition(1)
    made = network(given)
    for name in ("code_vectors", "uncertainty"):
        moved = getattr(given, name).clone()
        moved[0, 5] += 0.5  # the last token, at the lower right
        change = (network(replace(given, **{name: moved})) - made).abs().amax(1)
        assert (change > 0).all(), name
    rolled = replace(given, code_vectors=given.code_vectors.roll(1, 1), uncertainty=given.uncertainty.roll(1, 1))
    assert not torch.allclose(network(rolled), made, atol=1e-3)


@torch.no_grad()
def test_a_finer_trunk_has_more_positions_for_the_same_image():
    card = replace(CARD, channels=(16,), finer=2)
    network, given = fill(FeedForwardDecoder(card)), condition()
    seen = []
    network.blocks[0].register_forward_hook(lambda layer, args, made: seen.append(made.shape))
    assert network(given).shape == (2, 3, 4, 6) and card.size == CARD.size == (4, 6)
    assert seen == [(2, 4 * 6, 16)] and network.places.shape == (24, 16)


def test_places_are_told_apart():
    """With the same token everywhere, images of a network without biases of the convolutions' edges would be flat."""
    network = decoder()
    same = replace(condition(1), code_vectors=torch.ones(1, 6, 8), uncertainty=torch.ones(1, 6, 4))
    with torch.no_grad():
        before = network(same)
        network.places.zero_()
        assert not torch.allclose(network(same), before, atol=1e-3)


def test_muon_gets_the_matrices_of_the_trunk_alone():
    network = decoder()
    named = dict(network.named_parameters())
    assert {tuple(named[name].shape) for name in network.matrices()} == {(16, 16), (64, 16), (16, 64)}
    assert len(network.matrices()) == 6 and all(name.startswith("blocks.0.") for name in network.matrices())


@torch.no_grad()
def test_a_file_gives_the_same_decoder_in_half_precision(tmp_path):
    network, given = decoder(), condition()
    loaded = load_feed_forward(save_feed_forward(tmp_path / "a.safetensors", network))
    assert loaded.card == CARD and not any(weight.requires_grad for weight in loaded.parameters())
    torch.testing.assert_close(loaded(given), network.half().float()(given))


def test_another_grid_and_wrong_cards_are_refused():
    with pytest.raises(ValueError, match=r"reads \(2, 3\) tokens, got \(3, 2\)"):
        decoder()(condition(grid=(3, 2)))
    for wrong, said in (
        ({"reads": "pixels"}, "reads must be one of tokens, condition"),
        ({"reads": "tokens"}, "calibration belongs to conditions"),
        ({"width": 100}, "multiple of 64"),
        ({"channels": (8, 16)}, "the first of them the width 16"),
        ({"channels": (16, 12)}, "multiples of 8"),
        ({"blocks": 0}, "blocks must be a whole number"),
        ({"images": -1}, "images must be a whole number"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(CARD, **wrong)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(ValueError, match="does not exist; expected a feed-forward decoder"):
        load_feed_forward(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="train it again"):
        load_feed_forward(path)
    save_file({"weight": torch.zeros(1)}, path, {"format": "dcdd feed-forward decoder 1", "card": json.dumps({"a": 1})})
    with pytest.raises(ValueError, match=r"a.safetensors: its card has the fields \['a'\]"):
        load_feed_forward(path)
