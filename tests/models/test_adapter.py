"""The adapter's geometry: which token's condition reaches which packed latent."""

import torch

from dcdd_core.models.adapter import ConditionEncoder
from dcdd_core.types import Condition
from tests.tiny import fill, tiny_condition


def test_it_starts_at_zero():
    tokens = ConditionEncoder(8, 16, 32)(tiny_condition(), (8, 8))
    assert tokens.shape == (2, 16, 32) and not tokens.any()


def test_the_null_condition_is_one_token_everywhere_and_starts_as_the_base_model():
    encoder = ConditionEncoder(8, 16, 32, null=True)
    assert not encoder.null(tiny_condition(), (8, 8)).any()
    with torch.no_grad():
        encoder.null.token.copy_(torch.arange(32))
    assert encoder.null(tiny_condition(3), (4, 8)).tolist() == [[list(range(32))] * 8] * 3
    encoder.keep_null(True)
    assert encoder.null.token.tolist() == list(range(32))
    encoder.keep_null(False)
    assert encoder.null is None and set(encoder.state_dict()) == set(ConditionEncoder(8, 16, 32).state_dict())
    encoder.keep_null(True)
    assert not encoder.null.token.any() and encoder.null.token.requires_grad


@torch.no_grad()
def test_a_token_reaches_its_own_patch_and_its_neighbours_only():
    encoder = fill(ConditionEncoder(8, 16, 32))
    encoder.norm = torch.nn.Identity()  # a norm over the picture would reach everywhere, as it should
    condition = tiny_condition(1)
    changed = condition.code_vectors.clone()
    changed[0, 5] *= -1
    other = Condition(changed, condition.uncertainty, condition.grid)
    moved = (encoder(condition, (8, 8)) - encoder(other, (8, 8))).abs().sum(-1)[0].reshape(4, 4)
    near = torch.zeros(4, 4, dtype=torch.bool)
    near[0:3, 0:3] = True
    assert bool((moved[near] > 0).all()) and not moved[~near].any()


@torch.no_grad()
def test_uncertainty_and_code_vectors_both_matter():
    encoder, condition = fill(ConditionEncoder(8, 16, 32)), tiny_condition(1)
    plain = encoder(condition, (8, 8))
    for c, u in (
        (condition.code_vectors * 0, condition.uncertainty),
        (condition.code_vectors, condition.uncertainty * 0),
    ):
        assert (encoder(Condition(c, u, condition.grid), (8, 8)) - plain).abs().max() > 0.01


@torch.no_grad()
def test_it_paints_larger_than_the_grid():
    """Latents finer than two a token: the same condition, spread."""
    assert fill(ConditionEncoder(8, 16, 32))(tiny_condition(1), (16, 16)).shape == (1, 64, 32)
