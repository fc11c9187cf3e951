"""Parts of the build with known results."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel

from dcdd_core.models.backbones.flux_fill.backbone import FluxFill
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.janus.sampler import JanusSampler, prompt_ids, unconditional_ids
from dcdd_core.protocols import SamplingOptions
from dcdd_core.training.batches import Batches, DataShard
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.scene_cache import Encodings, SceneEncodings
from dcdd_pico.scenes import scene_facts, scene_pixels
from dcdd_pico.train_decoder import _start_as_identity
from dcdd_pico.train_janus import next_token_loss, pico_tokenizer
from dcdd_pico.train_tokenizer import CodeUse
from tests.tiny import tiny_card, tiny_condition, tiny_flux_config, tiny_janus


@pytest.mark.parametrize("guidance", [1.0, 0.0])
@torch.no_grad()
def test_the_loss_reads_the_very_logits_that_sampling_draws_from(guidance):
    """Guidance 1 is the prompt alone; guidance 0 is the unconditional row that replaces dropped captions."""
    janus, tokenizer = tiny_janus()
    prompts = ["a red circle on the left", "a blue square"]
    rows = [prompt_ids(tokenizer, p) for p in prompts]
    if guidance == 0:
        rows = [unconditional_ids(ids, tokenizer) for ids in rows]
    grid = JanusSampler(janus, tokenizer).sample(prompts, seeds=[0, 1], options=SamplingOptions(guidance=guidance))
    expected = F.cross_entropy(grid.logits.transpose(1, 2), grid.tokens, reduction="none")
    torch.testing.assert_close(next_token_loss(janus, rows, grid.tokens), expected, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_knows_every_caption():
    tokenizer = pico_tokenizer()
    for facts in scene_facts("train", 200):
        ids = prompt_ids(tokenizer, facts.caption())
        assert tokenizer.unk_token_id not in ids
    assert tokenizer.unk_token_id in prompt_ids(tokenizer, "a red unicorn")


def test_codes_move_to_their_features_and_unused_ones_to_where_they_are_needed():
    draw = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(256, 3, generator=draw) * 0.05 + torch.tensor([1.0, 0.0, 0.0]), dim=1)
    vectors = F.normalize(torch.tensor([[0.9, 0.3, 0.0], [0.0, 0.0, 1.0]]), dim=1)
    use = CodeUse(2, 3)
    use.restart(vectors)
    for _ in range(300):
        vectors = use.update(features, (features @ vectors.T).argmax(1), draw)
    assert (features @ vectors.T).amax(1).mean() > 0.995
    assert (vectors @ torch.tensor([1.0, 0.0, 0.0]) > 0.98).all()  # the dead code was restarted
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))


@torch.no_grad()
def test_a_fresh_decoder_answers_zero():
    transformer = FluxTransformer2DModel(**tiny_flux_config())
    _start_as_identity(transformer)
    decoder = DistributionConditionedDecoder(FluxFill(transformer), tiny_card())
    packed, context = torch.randn(1, 16, 64), torch.randn(1, 16, transformer.config.in_channels - 64)
    condition = decoder.condition_tokens(tiny_condition(1), (8, 8))
    assert not decoder(packed, context, condition, torch.tensor([0.5]), (8, 8)).any()
    block = transformer.transformer_blocks[0]
    assert not block.norm1.linear.weight.any() and not transformer.single_transformer_blocks[0].norm.linear.weight.any()


def test_the_scenes_of_a_step_are_those_of_its_number(tmp_path):
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=Recipe(train_scenes=20, seed=3))
    numbers = np.arange(20, dtype=np.float16)
    encodings = Encodings(features=numbers[:, None, None], latents=numbers[:, None, None, None] + 100)
    source = SceneEncodings(context, encodings, 4, 3)
    batches = Batches(source, size=3)
    found = [batch for _, batch in zip(range(3), batches)]
    for step, batch in enumerate(found):
        drawn = context.batch(4, step, 3)
        assert batch.features.flatten().tolist() == drawn.tolist()
        assert batch.latents.flatten().tolist() == (drawn + 100).tolist()
        assert torch.equal(batch.pixels, scene_pixels(context.train_images[drawn]))
    again = Batches(source, size=3)
    again.load_state_dict(json.loads(json.dumps({**batches.state_dict(), "consumed": 6})))
    assert torch.equal(next(iter(again)).features, found[2].features)
    halves = [[int(e.key) for e in islice(source.entries(DataShard(rank=k, world=2), 0), 3)] for k in (0, 1)]
    assert [key for pair in zip(*halves) for key in pair] == [*context.batch(4, 0, 3), *context.batch(4, 1, 3)]
