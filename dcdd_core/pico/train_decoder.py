"""Trains the pico decoder, and the one on discrete codes that it is compared with."""

from __future__ import annotations

import numpy as np
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from ..evaluation.quality import psnr, ssim
from ..method.calibration import proxy_logits
from ..method.latents import scale_latents
from ..models.flux import DecoderCard, DistributionConditionedDecoder, of_text_stream
from ..models.vae import KLAutoencoder
from ..models.vq import VQTokenizer
from ..pipelines.condition import condition_for
from ..pipelines.decode import decode
from ..training.decoder import DecoderTraining, Example, train_decoder
from ..types import Calibration, Codebook, Condition, TokenLogits
from .data import to_pixels
from .encodings import Encodings
from .reader import SceneReader
from .train_tokenizer import tokens_digest
from .workshop import Workshop, digest

_STAGE = 4
_LOCALISED = 0.2
_EVALUATED = 64


def transformer_config(vae_factor: int) -> dict:
    """FLUX.1-Fill in small: 2 double and 6 single blocks of width 256."""
    return {
        "patch_size": 1,
        "in_channels": 128 + 4 * vae_factor**2,
        "out_channels": 64,
        "num_layers": 2,
        "num_single_layers": 6,
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": [8, 28, 28],
    }


def proxy_condition(features: torch.Tensor, card: DecoderCard, codebook: Codebook, grid: tuple[int, int]) -> Condition:
    """The training condition of features [B, N, D] (Eqs. 9-15): what serving makes of the same proxies."""
    logits = proxy_logits(features, codebook)
    proxies = TokenLogits(logits, logits.argmax(-1), grid, source="proxy", codebook=card.codebook)
    return condition_for(card, proxies, codebook)


def train_pico_decoder(
    shop: Workshop,
    name: str,
    variant: str,
    encodings: Encodings,
    vq: VQTokenizer,
    vae: AutoencoderKL,
    calibration: Calibration | None,
    reader: SceneReader,
) -> DistributionConditionedDecoder:
    """Trains (or restores) the decoder called `name` on the proxy conditions of one variant.

    A fifth of the pictures learn localised decoding: a box is to be painted, the rest is given.
    """
    recipe, device = shop.recipe, shop.device
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    card = DecoderCard(
        base="pico FLUX.1-Fill (trained from nothing, all weights in this file)",
        base_config=transformer_config(factor),
        tokenizer=vq.name,
        codebook=vq.codebook.fingerprint,
        code_dim=vq.codebook.dim,
        width=64,
        variant=variant,
        calibration=calibration if variant == "lcdm+lc" else None,
        resolution=recipe.size,
        pixels_per_token=vq.factor,
        vae_factor=factor,
        vae_shift=vae.config.shift_factor,
        vae_scale=vae.config.scaling_factor,
        steps=20,
        licence="Apache-2.0",
    )
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + _STAGE)
        decoder = DistributionConditionedDecoder(FluxTransformer2DModel(**card.base_config), card)
    _start_as_identity(decoder.transformer)
    for weight_name, weight in decoder.transformer.named_parameters():
        weight.requires_grad_(not of_text_stream(weight_name))
    decoder.to(device)
    grid = vq.grid_of(recipe.size, recipe.size)
    blank = scale_latents(
        vae.encode(torch.zeros(1, 3, recipe.size, recipe.size, device=device)).latent_dist.mean,
        card.vae_shift,
        card.vae_scale,
    )
    everything = torch.ones(1, 1, recipe.size, recipe.size, device=device)

    def examples(i: int, draw: torch.Generator) -> Example:
        index = shop.batch(_STAGE, i, recipe.decoder_batch)
        features, latents = (
            torch.from_numpy(np.array(a[index])).float().to(device) for a in (encodings.features, encodings.latents)
        )
        condition = proxy_condition(features, card, vq.codebook, grid)
        masked, mask = blank.expand_as(latents).clone(), everything.expand(len(index), -1, -1, -1).clone()
        local = (torch.rand(len(index), generator=draw) < _LOCALISED).nonzero().squeeze(1)
        if len(local):
            mask[local] = _boxes(len(local), recipe.size, draw).to(device)
            pixels = to_pixels(shop.train_images[index[local.numpy()]], device) * (1 - mask[local])
            with torch.no_grad():
                masked[local] = scale_latents(
                    vae.encode(pixels).latent_dist.mean.float(), card.vae_shift, card.vae_scale
                )
        return Example(latents=latents, condition=condition, masked_latents=masked, mask=mask)

    held_out = to_pixels(shop.held_out_images[:_EVALUATED], device)
    held_out_condition = proxy_condition(vq.features(held_out), card, vq.codebook, grid)

    def evaluate(current: DistributionConditionedDecoder) -> dict[str, float]:
        with shop.autocast():
            painted = decode(
                current, KLAutoencoder(vae), held_out_condition, seeds=range(len(held_out)), steps=10
            ).pixels
        return {
            "psnr": float(psnr(held_out, painted).mean()),
            "ssim": float(ssim(held_out, painted).mean()),
            "perceptual": float(reader.perceptual_distance(held_out, painted).mean()),
        }

    return train_decoder(
        shop.folder / name,
        decoder,
        examples,
        DecoderTraining(
            steps=recipe.decoder_steps,
            learning_rate=2e-3,
            optimizer="muon",
            seed=recipe.seed,
            compiled=recipe.compiled,
        ),
        settings=shop.settings("decoder_batch", tokenizer=tokens_digest(vq.model), autoencoder=digest(vae)),
        autocast=shop.autocast,
        evaluate=evaluate,
        evaluate_every=1000,
    )


def _start_as_identity(transformer: FluxTransformer2DModel) -> None:
    """Zero modulations and output (Peebles & Xie 2023, adaLN-Zero): every block starts as the identity."""
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    layers = [getattr(block, norm).linear for block in blocks for norm in ("norm", "norm1") if hasattr(block, norm)]
    for layer in (*layers, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


def _boxes(count: int, size: int, draw: torch.Generator) -> torch.Tensor:
    """Masks [count, 1, size, size] of boxes with sides of a quarter to three quarters of the picture."""
    sides = (size * (0.25 + 0.5 * torch.rand(count, 2, generator=draw))).long()
    corners = ((size - sides) * torch.rand(count, 2, generator=draw)).long()
    line = torch.arange(size)
    inside = [(line >= corners[:, k, None]) & (line < corners[:, k, None] + sides[:, k, None]) for k in (0, 1)]
    return (inside[0][:, :, None] & inside[1][:, None, :]).float()[:, None]
