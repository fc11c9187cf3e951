"""The memory that samplers ask a host for is what sampling takes, with the embedded models."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peak import Peak
from dcdd_core import registry
from dcdd_core.protocols import SamplingOptions
from dcdd_pico.embedded import JANUS, LLAMAGEN, PROGRESSIVE, WEIGHTS

PROMPTS = ["a red circle on the left", "a blue square"]


@pytest.mark.parametrize(
    ("name", "dtype", "least"),
    [
        (JANUS, torch.float32, 0.8),
        (JANUS, torch.bfloat16, 0.8),
        (PROGRESSIVE, torch.float32, 0.5),
        (LLAMAGEN, torch.float32, 0.4),  # counts all slots of a caption, of which these need few
    ],
)
def test_it_is_estimated(name, dtype, least):
    folder = str(WEIGHTS / name)
    sampler = registry.sampler_family(folder).load_sampler(folder, dtype=dtype)
    for prompts, guidance in ((PROMPTS, 4.0), (PROMPTS[:1], 1.0)):
        options = SamplingOptions(guidance=guidance)
        with Peak() as found:
            sampler.sample(prompts, seeds=range(len(prompts)), options=options, parallel=1)
        estimate = sampler.working_memory(prompts, options=options)
        assert least * estimate < found.peak < estimate, f"{found.peak / estimate:.2f} at guidance {guidance}"


@pytest.mark.parametrize("name", [JANUS, PROGRESSIVE])
def test_in_half_precision_the_head_s_float32_copy_is_taken_once(name):
    folder, once = str(WEIGHTS / name), {}
    for dtype in (torch.float32, torch.bfloat16):
        sampler = registry.sampler_family(folder).load_sampler(folder, dtype=dtype)
        one, two = (sampler.working_memory(PROMPTS[:1] * count) for count in (1, 2))
        once[dtype] = 2 * one - two  # whatever does not grow with the number of images
    if name == JANUS:
        weights = sum(weight.numel() for weight in sampler.model.model.generation_head.parameters())
    else:
        weights = sampler.model.head_out.weight.numel()
    assert once[torch.bfloat16] - once[torch.float32] == 4 * weights
