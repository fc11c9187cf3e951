"""Chunks cover a tensor once, in order, a bounded piece at a time."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from scipy import special

from dcdd_core.method import chunks as method
from dcdd_core.method.chunks import chunk_rows, chunks, float32_maths, logit_chunks, neg_p_ln_p, underflows
from dcdd_core.types import Calibration, Codebook, TokenLogits


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grid(logits: torch.Tensor, **fields) -> TokenLogits:
    return TokenLogits(logits, logits.argmax(-1), (1, logits.shape[1]), **fields)


def test_four_megabytes_of_float32_make_a_chunk():
    assert [chunk_rows(codes) for codes in (16384, 1024, 1024 * 1024, 3 * 1024 * 1024)] == [64, 1024, 1, 1]


@pytest.mark.parametrize("shape", [(5,), (7, 5), (2, 3, 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_views_in_row_major_order(monkeypatch, shape, contiguous):
    monkeypatch.setattr(method, "CHUNK_BYTES", 4 * 5 * 2)
    values = rand(*shape)
    if not contiguous:
        values = rand(*shape, 2)[..., 0]
    parts = list(chunks(values))
    assert all(len(part) <= 2 for part in parts) and any(len(part) == min(2, values.numel() // 5) for part in parts)
    assert torch.equal(torch.cat(parts), values.reshape(-1, 5))
    assert all(part.untyped_storage().data_ptr() == values.untyped_storage().data_ptr() for part in parts)


def test_neg_p_ln_p_is_scipys():
    p = torch.tensor([0.0, 1.0, 0.5, 1e-3, 1e-30, 2e-38, 3e-41, 1.4e-45])
    found = neg_p_ln_p(p)
    np.testing.assert_allclose(found[:6].numpy(), special.entr(p[:6].double().numpy()), rtol=1e-6)
    assert found.min() >= 0 and torch.equal(found, torch.special.entr(p))


def test_the_smallest_normal_number_does_not_underflow():
    tiny = float(np.finfo(np.float32).tiny)
    assert underflows(torch.tensor([0.0, 0.9 * tiny, tiny, 1.0])).tolist() == [True, True, False, False]


def test_float32_maths_has_neither_gradient_nor_autocast():
    @float32_maths
    def product(a: torch.Tensor, b: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Named."""
        return scale * (a @ b)

    a = rand(3, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found = product(a, a, scale=2.0)
    assert found.dtype == torch.float32 and not found.requires_grad and product.__doc__ == "Named."
    assert torch.equal(found, 2.0 * (a @ a))


def test_each_chunk_comes_with_its_grid_and_tokens(monkeypatch):
    monkeypatch.setattr(method, "CHUNK_BYTES", 4 * 9 * 2)
    grids = [grid(rand(2, 3, 9)), grid(rand(1, 5, 9, seed=1))]
    found = list(logit_chunks(iter(grids)))
    assert [len(tokens) for _, _, tokens, _ in found] == [2, 2, 2, 2, 2, 1]
    assert [owner is grids[0] for owner, *_ in found] == [True] * 3 + [False] * 3
    assert all(torch.equal(part.argmax(-1), tokens) for _, part, tokens, _ in found)
    assert torch.equal(torch.cat([part for _, part, *_ in found[3:]]), grids[1].logits[0])


def refusal(*given, **named) -> str:
    with pytest.raises(ValueError) as caught:
        list(logit_chunks(*given, **named))
    return str(caught.value)


def test_refusals_name_what_came_and_a_remedy():
    vlm, proxy = grid(rand(1, 4, 9)), grid(rand(1, 4, 9), source="proxy")
    own, other = Codebook(rand(9, 5)), Codebook(rand(9, 5, seed=1))
    assert "vlm logits, got proxy logits: give what the VLM sampled" in refusal(proxy, needs="vlm")
    assert "proxy logits, got vlm logits: give what the tokenizer encoded" in refusal(vlm, needs="proxy")
    assert "calibrated already" in refusal(grid(rand(1, 4, 9), calibrated=True), own, Calibration(scale=20))
    assert "calibrated already" in refusal(grid(rand(1, 4, 9), calibrated=True), needs="vlm")
    assert "9 codes do not fit a codebook of 8" in refusal(vlm, Codebook(rand(8, 5)))
    assert "no token logits" in refusal([])
    marked = grid(rand(1, 4, 9), codebook=other.fingerprint)
    found = refusal(marked, own)
    assert "logits and codebook do not belong together" in found
    assert f"codebook {other.fingerprint}, the other of {own.fingerprint}" in found
    elsewhere = Calibration(scale=20, codebook=other.fingerprint)
    assert "codebook and calibration do not belong together" in refusal(vlm, own, elsewhere)
    assert "logits and calibration" in refusal(grid(rand(1, 4, 9), codebook=own.fingerprint), None, elsewhere)


def test_what_is_unknown_fits_everything():
    own = Codebook(rand(9, 5))
    for item in (grid(rand(1, 4, 9)), grid(rand(1, 4, 9), codebook=own.fingerprint)):
        for calibration in (None, Calibration(scale=20), Calibration(scale=20, codebook=own.fingerprint)):
            for codebook in (None, own):
                assert len(list(logit_chunks(item, codebook, calibration))) == 1
    assert len(list(logit_chunks(grid(rand(1, 4, 9), calibrated=True)))) == 1


@pytest.mark.parametrize(
    ("sampled", "said"),
    [
        ({"model": "llamagen", "guidance": 7.5, "temperature": 0.9}, ["VLM", "guidance", "temperature"]),
        ({"model": "janus", "guidance": 7.5, "temperature": 1.0}, ["guidance"]),
        ({"model": "janus", "guidance": 5.0, "temperature": 0.9}, ["temperature"]),
        ({"model": "llamagen"}, ["VLM"]),
        ({"guidance": 5.0}, []),
        ({}, []),
    ],
)
def test_other_sampling_than_calibrated_for_is_told_once(sampled, said):
    calibration = Calibration(scale=20, vlm="janus", guidance=5.0, temperature=1.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(logit_chunks([grid(rand(1, 4, 9), **sampled)] * 3, None, calibration))
        list(logit_chunks(grid(rand(1, 4, 9), source="proxy", **sampled), None, calibration))
        list(logit_chunks(grid(rand(1, 4, 9), **sampled)))
        list(logit_chunks(grid(rand(1, 4, 9), **sampled), None, Calibration(scale=20)))
    assert len(caught) == bool(said)
    if said:
        text = str(caught[0].message)
        assert [name for name in ("VLM", "guidance", "temperature") if name in text] == said
        assert "calibrate again" in text


def test_each_difference_is_told():
    calibration = Calibration(scale=20, guidance=5.0)
    with pytest.warns(UserWarning) as caught:
        list(logit_chunks([grid(rand(1, 4, 9), guidance=g) for g in (7.5, 3.0, 7.5, 5.0)], None, calibration))
    assert ["7.5" in str(w.message) for w in caught] == [True, False]
