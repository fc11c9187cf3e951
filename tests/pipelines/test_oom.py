"""Running out of memory: smaller parts, the same result."""

from dataclasses import replace

import pytest
import torch

from dcdd_core.models.autoregressive.token_loop import TokenLoop
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.decode import decode, decode_tokens
from dcdd_core.pipelines.host import Host
from dcdd_core.pipelines.oom import in_parts
from dcdd_core.pipelines.sample import sample
from dcdd_core.protocols import SamplingOptions
from dcdd_core.types import DCDDWarning, TokenLogits
from tests.tiny import tiny_condition, tiny_decoder, tiny_janus, tiny_vae


def fails_above(most, error):
    def run(first, last):
        if last - first > most:
            raise error
        return [first, last]

    return run


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA's own"),
        MemoryError(),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.44 GB, other allocations: 1.02 GB)"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you tried"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("VRAM grow failed: 1048576 bytes"),
        RuntimeError("VRAM reservation failed"),
    ],
    ids=["cuda", "python", "mps", "linux", "windows", "cublas", "comfyui", "comfyui at first"],
)
def test_every_allocators_failure_halves_the_batch(error):
    sizes = []

    class Told(Host):
        def on_split(self, size):
            sizes.append(size)

    assert in_parts(fails_above(2, error), 7, Told()) == [[0, 2], [2, 4], [4, 6], [6, 7]]
    assert sizes == [4, 2]


def test_a_single_item_that_does_not_fit_is_told_with_the_remedy():
    with pytest.raises(RuntimeError, match=r"even for a single image: buy some"), pytest.warns(DCDDWarning):
        in_parts(fails_above(0, torch.OutOfMemoryError()), 2, remedy="buy some")


@pytest.mark.parametrize("error", [RuntimeError("sizes do not fit"), ValueError("out of memory"), KeyboardInterrupt()])
def test_other_errors_pass(error):
    with pytest.raises(type(error)):
        in_parts(fails_above(1, error), 3)


def scarce(monkeypatch, kind, name, most=1):
    """For more than so many images there is no memory, the second time that it is asked for; what was tried."""
    step, tried = getattr(kind, name), []

    def limited(self, images, *rest):
        tried.append(len(images))
        if len(images) > most and tried.count(len(images)) > 1:
            raise torch.OutOfMemoryError
        return step(self, images, *rest)

    monkeypatch.setattr(kind, name, limited)
    return tried


def test_painting_in_parts_gives_the_batch(monkeypatch):
    models, condition = (tiny_decoder(), KLCodec(tiny_vae())), tiny_condition(3)
    draw = torch.Generator().manual_seed(0)
    part = {"image": torch.rand(3, 3, 16, 16, generator=draw), "mask": torch.ones(1, 1, 16, 16)}
    whole = decode(*models, condition, seeds=[5, 6, 7], **part)
    tried, told = scarce(monkeypatch, DistributionConditionedDecoder, "forward"), []
    with pytest.warns(DCDDWarning, match="continuing with 1 images at a time"):
        split = decode(*models, condition, seeds=[5, 6, 7], on_step=lambda i, n, z: told.append((i, len(z))), **part)
    assert tried == [3, 3, 2, 2, *[1] * 9]
    assert told == [(1, 3), (1, 2), *[(i, 1) for i in (1, 2, 3)] * 3]
    torch.testing.assert_close(split.latents, whole.latents)
    torch.testing.assert_close(split.pixels, whole.pixels)


def test_sampling_in_parts_gives_the_batch(monkeypatch):
    sampler, prompts, seeds = (
        JanusSampler(*tiny_janus()),
        ["a red circle", "blue", "a green square on the left"],
        [3, 4, 5],
    )
    options = SamplingOptions(guidance=2.0, temperature=0.9, top_k=20)
    whole = sample(sampler, prompts, seeds=seeds, options=options)
    tried, told = scarce(monkeypatch, TokenLoop, "_embed", most=2), []
    with pytest.warns(DCDDWarning, match="continuing with 2 images"):
        split = sample(
            sampler,
            prompts,
            seeds=seeds,
            options=options,
            on_progress=lambda now: told.append((now.first, len(now.tokens))),
        )
    assert tried[:2] == [3, 3] and set(tried[2:]) == {1, 2}
    assert list(dict.fromkeys(told)) == [(0, 3), (0, 2), (2, 1)], "which images each part of the batch is"
    assert torch.equal(split.tokens, whole.tokens)
    torch.testing.assert_close(split.logits, whole.logits, rtol=1e-4, atol=1e-4)
    assert (split.guidance, split.temperature, split.grid) == (2.0, 0.9, whole.grid)
    hole = torch.zeros(3, whole.tokens.shape[1], dtype=torch.bool)
    hole[:2, 3:9] = True
    other = {"seeds": seeds, "options": SamplingOptions(guidance=3.0), "previous": whole, "resample": hole}
    with pytest.warns(DCDDWarning, match="continuing with 2 images"):
        edited = sample(sampler, prompts, **other)
    assert edited.record == whole.record | {"guidance": 3.0, "temperature": 1.0}, "though nothing of the third is drawn"
    assert torch.equal(edited.tokens[~hole], whole.tokens[~hole])
    image = replace(whole, source="proxy", guidance=None, temperature=None, calibrated=True)
    with pytest.warns(DCDDWarning, match="continuing with 2 images"):
        edited = sample(sampler, prompts, **other | {"previous": image})
    assert edited.record == whole.record | {"guidance": 3.0, "temperature": 1.0}
    assert torch.equal(edited.calibrated_at, ~hole), "all of the third, whose part has nothing to sample"
    with pytest.raises(ValueError, match="3 prompts came with 4 seeds"):
        sample(sampler, prompts, seeds=[1, 2, 3, 4])


def test_tokens_are_decoded_in_parts_too(monkeypatch):
    model, _ = tiny_janus()
    vq, tokens = VQTokenizer(model.model.vqmodel), torch.arange(48).reshape(3, 16)
    grid = TokenLogits(torch.zeros(3, 16, 64), tokens, (4, 4))
    whole = decode_tokens(vq, grid)
    decode_all = VQTokenizer.decode_tokens

    def limited(self, some, shape):
        if len(some) > 1:
            raise torch.OutOfMemoryError
        return decode_all(self, some, shape)

    monkeypatch.setattr(VQTokenizer, "decode_tokens", limited)
    shown = []
    with pytest.warns(DCDDWarning):
        split = decode_tokens(vq, grid, at_once=2, on_images=lambda done, pixels: shown.append((done, pixels)))
    torch.testing.assert_close(split, whole)
    assert [done for done, _ in shown] == [2, 3] and [len(pixels) for _, pixels in shown] == [2, 1]
    torch.testing.assert_close(torch.cat([pixels for _, pixels in shown]), whole)
