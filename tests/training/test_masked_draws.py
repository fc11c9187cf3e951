"""Wrong tokens that a model draws itself: where it draws, and what it sees."""

from __future__ import annotations

import torch

from dcdd_core.training.masked_loss import Corruption
from dcdd_core.types import Codebook

CODES, POSITIONS = 64, 6


class Teller:
    """At position n of the row with caption c it is sure of code 10 c + n."""

    mask, mask_token = torch.zeros(1), CODES

    def __init__(self):
        self.seen, self.read = [], []

    def prefix(self, ids, padding):
        return ids[:, -1]

    def __call__(self, tokens, prefix):
        self.seen.append(tokens)
        return 10 * prefix[:, None] + torch.arange(POSITIONS)

    def logits(self, states):
        self.read.append(states)
        return 99.0 * torch.nn.functional.one_hot(states, CODES).float()


def test_only_chosen_positions_are_drawn_each_from_its_own_chances():
    teller, codebook = Teller(), Codebook(torch.nn.functional.normalize(torch.randn(CODES, 8), dim=1))
    tokens = torch.full((3, POSITIONS), 63)
    hidden, chosen = (torch.zeros(3, POSITIONS, dtype=torch.bool) for _ in range(2))
    hidden[:, 0] = True
    chosen[0, 2] = chosen[2, 3] = chosen[2, 5] = True
    made = Corruption(["samples"], codebook, lambda work: work(teller))
    found = made(tokens, hidden, chosen, [[1], [2], [3]], torch.Generator().manual_seed(0))
    expected = tokens.clone()
    expected[0, 2], expected[2, 3], expected[2, 5] = 12, 33, 35
    assert torch.equal(found, expected)
    assert teller.read[0].tolist() == [12, 33, 35], "no other position's logits are computed"
    (seen,) = teller.seen
    assert torch.equal(seen, tokens.masked_fill(hidden | chosen, CODES)[[0, 2]]), "and no row without"


def test_draws_are_as_frequent_as_the_model_says():
    class Unsure(Teller):
        def logits(self, states):
            return torch.tensor([0.7, 0.2, 0.1]).log().expand(len(states), 3)

    codebook = Codebook(torch.nn.functional.normalize(torch.randn(CODES, 8), dim=1))
    rows = 1000
    tokens, hidden = torch.full((rows, POSITIONS), 63), torch.zeros(rows, POSITIONS, dtype=torch.bool)
    made = Corruption(["samples"], codebook, lambda work: work(Unsure()))
    found = made(tokens, hidden, ~hidden, [[1]] * rows, torch.Generator().manual_seed(0))
    shares = found.flatten().bincount(minlength=3) / found.numel()
    torch.testing.assert_close(shares, torch.tensor([0.7, 0.2, 0.1]), atol=0.02, rtol=0)


def test_a_batch_in_which_nothing_is_chosen_asks_no_model():
    codebook = Codebook(torch.nn.functional.normalize(torch.randn(CODES, 8), dim=1))
    nothing, tokens = torch.zeros(2, POSITIONS, dtype=torch.bool), torch.zeros(2, POSITIONS, dtype=torch.int64)
    made = Corruption(["samples"], codebook, lambda work: 1 / 0)
    assert torch.equal(made(tokens, nothing, nothing, [[1], [2]], torch.Generator()), tokens)
