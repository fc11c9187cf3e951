"""What every image tokenizer must do, whatever its family."""

from __future__ import annotations

import pytest
import torch

from dcdd_core import registry
from dcdd_core.protocols import ImageTokenizer
from tests.contracts.conftest import names


@pytest.fixture(params=names(registry.samplers), scope="module")
def name(request):
    return request.param


@pytest.fixture
def tokenizer(name, files):
    return registry.sampler_family(files(name)).load_tokenizer(str(files(name)))


def images(tokenizer, batch=2, grid=None):
    h, w = grid or tokenizer.grid
    size = (batch, 3, h * tokenizer.factor, w * tokenizer.factor)
    return torch.rand(size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_it_is_a_tokenizer(tokenizer, name, files):
    assert isinstance(tokenizer, ImageTokenizer) and isinstance(tokenizer.model, torch.nn.Module)
    sampler = registry.sampler_family(files(name)).load_sampler(str(files(name)))
    assert tokenizer.grid == sampler.grid and tokenizer.codebook.fingerprint == sampler.codebook.fingerprint


def test_encoding_gives_proxies_of_the_whole_grid(tokenizer):
    for grid in (tokenizer.grid, (2, 3)):
        proxies = tokenizer.encode(images(tokenizer, grid=grid))
        assert proxies.grid == grid and proxies.source == "proxy" and proxies.guidance is None
        assert proxies.logits.dtype == torch.float32 and proxies.logits.abs().max() <= 1 + 1e-5, "cosine similarities"
        assert torch.equal(proxies.tokens, proxies.logits.argmax(-1))
        assert proxies.codebook == tokenizer.codebook.fingerprint
        features = tokenizer.features(images(tokenizer, grid=grid))
        assert features.shape == (2, grid[0] * grid[1], tokenizer.codebook.dim) and features.dtype == torch.float32
        assert torch.equal(tokenizer.tokens(features), proxies.tokens)


def test_a_batch_is_its_singles(tokenizer):
    pixels = images(tokenizer)
    whole = tokenizer.encode(pixels)
    for k in range(2):
        single = tokenizer.encode(pixels[k : k + 1])
        torch.testing.assert_close(single.logits[0], whole.logits[k], rtol=1e-4, atol=1e-4)
    painted = tokenizer.decode_tokens(whole.tokens, whole.grid)
    single = tokenizer.decode_tokens(whole.tokens[1:], whole.grid)
    torch.testing.assert_close(single[0], painted[1], rtol=1e-4, atol=1e-4)


def test_tokens_are_their_code_vectors(tokenizer):
    tokens = torch.arange(2 * 6).reshape(2, 6) % tokenizer.codebook.size
    painted = tokenizer.decode_tokens(tokens, (2, 3))
    assert painted.shape == (2, 3, 2 * tokenizer.factor, 3 * tokenizer.factor)
    assert painted.dtype == torch.float32 and painted.abs().max() <= 1
    assert torch.equal(painted, tokenizer.decode_vectors(tokenizer.codebook.vectors[tokens], (2, 3)))


def test_what_does_not_fit_is_refused(tokenizer):
    f = tokenizer.factor
    with pytest.raises(ValueError, match="no whole grid"):
        tokenizer.grid_of(f, f + 1)
    with pytest.raises(ValueError, match="no whole grid"):
        tokenizer.encode(torch.zeros(1, 3, f + 1, f))
    for outside in (-1, tokenizer.codebook.size):
        with pytest.raises(ValueError, match="tokens must lie in"):
            tokenizer.decode_tokens(torch.full((1, 4), outside), (2, 2))


def test_half_precision_keeps_float32_outside(name, files):
    tokenizer = registry.sampler_family(files(name)).load_tokenizer(str(files(name)), dtype=torch.bfloat16)
    proxies = tokenizer.encode(images(tokenizer))
    assert proxies.logits.dtype == torch.float32
    assert tokenizer.decode_tokens(proxies.tokens, proxies.grid).dtype == torch.float32


def test_the_nearest_code_has_the_least_error(tokenizer):
    pixels = torch.rand(2, 3, 4 * tokenizer.factor, 4 * tokenizer.factor, generator=torch.Generator().manual_seed(0))
    features = tokenizer.features(pixels * 2 - 1)
    tokens = tokenizer.tokens(features)
    least = tokenizer.quantisation_errors(features, tokens)
    assert least.shape == tokens.shape and least.dtype == torch.float32 and float(least.min()) >= -1e-6
    for step in range(1, 8):
        others = tokenizer.quantisation_errors(features, (tokens + step) % tokenizer.codebook.size)
        assert (others >= least - 1e-5).all() and (others > least).any()


def test_hosts_can_plan(tokenizer, name):
    small, large = (tokenizer.working_memory(grid) for grid in ((2, 2), (8, 8)))
    assert isinstance(small, int) and 0 < small < large
    published = next(f for f in registry.samplers() if f.name == name).published_tokenizer()
    assert all(weight.is_meta for weight in published.model.parameters())
    assert published.grid[0] >= 1 and published.factor >= 1
