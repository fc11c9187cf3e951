"""Tiny models of the real classes with weights that are the same on every machine, for tests on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    JanusConfig,
    JanusForConditionalGeneration,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.method.lcdm import map_logits
from dcdd_core.models.backbones.flux_fill.inference import of_text_stream
from dcdd_core.models.bundle import save_bundle
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.janus.masked_start import TEMPLATE, start_from_janus
from dcdd_core.models.masked.files import save_masked
from dcdd_core.models.prior import PriorDifference
from dcdd_core.types import Calibration, Codebook, Condition, TokenLogits
from dcdd_pico.build_context import BuildContext, Recipe
from dcdd_pico.embedded import PRIOR, PROGRESSIVE
from dcdd_pico.export import export
from dcdd_pico.models import load_pico
from dcdd_pico.progressive import SAMPLING, TOKENIZER
from dcdd_pico.reader import SceneReader
from dcdd_pico.train_autoencoder import autoencoder_config
from dcdd_pico.train_decoder import transformer_config
from dcdd_pico.train_janus import janus_config, pico_tokenizer, save_tokenizer
from dcdd_pico.train_llamagen import pico_words, save_llamagen, start
from dcdd_pico.train_tokenizer import tokenizer_config

SPECIAL = ("<|begin_of_sentence|>", "<pad>", "<unk>", "<|User|>", "<|Assistant|>", "<begin_of_image>")
WORDS = (":", ",", "a", "and", "on", "red", "green", "blue", "circle", "square", "left", "right", "of", "the", "ground")


def fill(module: nn.Module, seed: int = 0) -> nn.Module:
    """Draws every weight from a generator of its own: normal at 1/sqrt(fan-in), embeddings at 1, norms near 1."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            for name, weight in part.named_parameters(recurse=False):
                values = torch.randn(weight.shape, generator=draw)
                if name == "bias":
                    values = 0.1 * values
                elif weight.ndim == 1:
                    values = 1 + 0.1 * values
                elif not isinstance(part, nn.Embedding):
                    values = values / weight[0].numel() ** 0.5
                weight.copy_(values)
    return module.eval()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of `SPECIAL` and `WORDS`; it does not add BOS by itself."""
    vocabulary = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<|begin_of_sentence|>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<|User|>", "<|Assistant|>", "<begin_of_image>"],
    )


def tiny_janus(seed: int = 0) -> tuple[JanusForConditionalGeneration, PreTrainedTokenizerFast]:
    """4 x 4 tokens of 64 codes in 8-D for 16 x 16 pixels; a Llama of 2 layers, width 32, 4 query and 2 key heads."""
    tokenizer = tiny_tokenizer()
    config = JanusConfig(
        text_config=LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,  # transformers 4 reads it here, 5 has it by default in the whole
        ),
        vision_config=JanusVisionConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
            projection_dim=32,
            num_image_tokens=16,
        ),
        vq_config=JanusVQVAEConfig(
            embed_dim=8,
            num_embeddings=64,
            latent_channels=16,
            base_channels=32,
            channel_multiplier=[1, 1, 1],
            num_res_blocks=1,
            projection_dim=32,
            image_token_embed_dim=32,
        ),
        image_token_id=tokenizer.unk_token_id,
    )
    return fill(JanusForConditionalGeneration(config), seed), tokenizer


def save_janus(folder: Path, seed: int = 0) -> Path:
    """`tiny_janus` as a folder in the transformers layout."""
    model, tokenizer = tiny_janus(seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_vq(seed: int = 0) -> JanusVQVAE:
    """The tokenizer of `tiny_janus`: 4 pixels a token, 64 codes in 8-D."""
    return tiny_janus(seed)[0].model.vqmodel


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """2 pixels a latent position, 16 channels, with a shift and a scale that matter."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 8],
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        shift_factor=0.1,
        scaling_factor=0.5,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return fill(vae, seed)


def tiny_flux_config() -> dict:
    """One double and one single block of width 32 in FLUX.1-Fill's layout over `tiny_vae`."""
    return {
        "patch_size": 1,
        "in_channels": 64 + 64 + 4 * 2**2,
        "out_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "guidance_embeds": True,
        "axes_dims_rope": [4, 6, 6],
    }


def tiny_card(**changes) -> DecoderCard:
    """For `tiny_vq` and `tiny_vae`: a token becomes 4 pixels, 2 x 2 latents, one packed token."""
    values = {
        "base": "tiny",
        "base_config": tiny_flux_config(),
        "tokenizer": "tiny",
        "codebook": Codebook(tiny_vq().quantize.embedding.weight).fingerprint,
        "code_dim": 8,
        "width": 16,
        "calibration": Calibration(scale=25.0, smoothing=0.01),
        "resolution": 16,
        "pixels_per_token": 4,
        "vae_factor": 2,
        "vae_shift": 0.1,
        "vae_scale": 0.5,
        "steps": 3,
    }
    return DecoderCard(**(values | changes))


def tiny_decoder(seed: int = 0, **changes) -> DistributionConditionedDecoder:
    """A decoder with random weights, its adapter's last layer included, so that the condition matters."""
    card = tiny_card(**changes)
    return fill(DistributionConditionedDecoder.build(card), seed)


def assert_same_without_text(whole: DistributionConditionedDecoder, loaded: DistributionConditionedDecoder) -> None:
    """Bit by bit, in the same order; the loaded one has no text stream."""
    kept = {name: value for name, value in whole.state_dict().items() if not of_text_stream(name)}
    assert len(kept) < len(whole.state_dict())
    for (name, a), (other, b) in zip(kept.items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b), (name, other)


def random_pico(folder: Path) -> Path:
    """The embedded models' shapes and files with random weights: for what must run, not for what must look right."""
    vq = fill(JanusVQVAE(tokenizer_config()), 1)
    with torch.no_grad():
        vq.quantize.embedding.weight.copy_(F.normalize(vq.quantize.embedding.weight, dim=1))
    words = pico_tokenizer()
    janus = fill(JanusForConditionalGeneration(janus_config(vq, words)), 2)
    vae = fill(AutoencoderKL(**autoencoder_config()), 3)
    codebook = Codebook(vq.quantize.embedding.weight)
    card = DecoderCard(
        base="random",
        base_config=transformer_config(4),
        tokenizer="random",
        codebook=codebook.fingerprint,
        code_dim=8,
        width=64,
        calibration=Calibration(scale=25.0, smoothing=0.01, anchor=2.0, guidance=3.0, codebook=codebook.fingerprint),
        resolution=96,
        pixels_per_token=8,
        vae_factor=4,
        vae_shift=0.0,
        vae_scale=1.0,
        steps=4,
    )
    decoder = fill(DistributionConditionedDecoder.build(card), 4)
    reader = fill(SceneReader(), 5)
    export(folder, janus=janus, words=words, vq=vq, vae=vae, decoder=decoder, reader=reader, recipe=Recipe())
    fill(PriorDifference(decoder, 2), 6).save(folder / PRIOR)
    save_masked(
        folder / PROGRESSIVE,
        fill(start_from_janus(janus, 7, layers=Recipe.progressive_layers), 7),
        codebook,
        name="random progressive",
        template=TEMPLATE,
        tokenizer=TOKENIZER,
        sampling=SAMPLING,
        int8=True,
    )
    save_tokenizer(words, folder / PROGRESSIVE)
    return folder


def random_llamagen(weights: Path) -> Path:
    """pico's LlamaGen with random weights, beside those of `random_pico`."""
    tokenizer = load_pico(weights=weights, with_sampler=False).tokenizer
    network = fill(start(tokenizer.codebook, tokenizer.grid, len(pico_words()), 0), 8)
    work = weights.with_name("llamagen-work")
    return save_llamagen(BuildContext(folder=work, device=torch.device("cpu"), recipe=Recipe()), weights, network)


def save_flux_like(bundle: Path, vae_folder: Path, card: Mapping[str, Any]) -> None:
    """A decoder of a card's tokens that paints latents as FLUX's are, 16 channels at 1/8, and a tiny autoencoder of
    such; of random weights."""
    config = tiny_flux_config() | {"in_channels": 64 + 64 + 4 * 8**2}
    taken = {name: card[name] for name in ("base", "tokenizer", "codebook", "code_dim", "resolution")}
    calibration = Calibration.from_dict(card["calibration"])
    made = DecoderCard(**taken, base_config=config, width=16, calibration=calibration, pixels_per_token=8, steps=3)
    save_bundle(bundle, fill(DistributionConditionedDecoder.build(made)))
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[8] * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        shift_factor=made.vae_shift,
        scaling_factor=made.vae_scale,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    fill(vae).save_pretrained(vae_folder)


def tiny_condition(batch: int = 2, grid: tuple[int, int] = (4, 4), seed: int = 0) -> Condition:
    """A condition of random distributions over the codebook of `tiny_vq`."""
    draw = torch.Generator().manual_seed(seed)
    codebook = Codebook(tiny_vq().quantize.embedding.weight)
    logits = 3 * torch.randn(batch, grid[0] * grid[1], codebook.size, generator=draw)
    return map_logits(TokenLogits(logits, logits.argmax(-1), grid, codebook=codebook.fingerprint), codebook)
