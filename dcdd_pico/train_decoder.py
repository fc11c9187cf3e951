"""Trains pico's diffusion decoder, and the decoders of the ablation."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, FluxTransformer2DModel

from dcdd_core.evaluation.metrics import psnr, ssim
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.models.vae import KLCodec
from dcdd_core.models.vq import VQTokenizer
from dcdd_core.pipelines.decode import decode
from dcdd_core.training.batches import Batches
from dcdd_core.training.config import OptimizationConfig, RunConfig
from dcdd_core.training.decoder_task import DecoderTask
from dcdd_core.training.encoded_batch import geometry_for
from dcdd_core.training.examples import ExampleMaker, proxy_condition
from dcdd_core.training.trainable import choose_trained
from dcdd_core.training.trainer import Evaluation, Trainer
from dcdd_core.types import Calibration

from .build_context import BuildContext, digest
from .reader import SceneReader
from .scene_cache import Encodings, SceneEncodings
from .scenes import scene_pixels
from .train_tokenizer import tokens_digest

_STAGE = 4
_LOCALISED = 0.2
_EVALUATED = 64


def transformer_config(vae_factor: int) -> dict:
    """FLUX.1-Fill's configuration with 2 double and 6 single blocks of width 256."""
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


def train_pico_decoder(
    context: BuildContext,
    name: str,
    variant: str,
    encodings: Encodings,
    vq: VQTokenizer,
    vae: AutoencoderKL,
    calibration: Calibration,
    reader: SceneReader,
) -> DistributionConditionedDecoder:
    """Trains (or restores) the decoder called `name` on conditions of one variant, made from proxies.

    A fifth of the images train localised decoding, in which a box is painted and the rest of the image is given.
    """
    recipe, device = context.recipe, context.device
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
        decoder = DistributionConditionedDecoder.build(card)
    _start_as_identity(decoder.transformer)
    choose_trained(decoder, "all")
    decoder.to(device)
    codec = KLCodec(vae)
    geometry = geometry_for(
        vq, codec, patch=decoder.backbone.patch, resolution=recipe.size, token_resolution=recipe.size
    )
    held_out = scene_pixels(context.held_out_images[:_EVALUATED], device)
    held_out_condition = proxy_condition(vq.features(held_out), card, vq.codebook, geometry.grid)

    def evaluate(current: DistributionConditionedDecoder) -> Evaluation:
        with context.autocast():
            painted = decode(current, codec, held_out_condition, seeds=range(len(held_out)), steps=10).pixels
        return Evaluation(
            numbers={
                "psnr": float(psnr(held_out, painted).mean()),
                "ssim": float(ssim(held_out, painted).mean()),
                "perceptual": float(reader.perceptual_distance(held_out, painted).mean()),
            }
        )

    return Trainer(
        context.folder / name,
        DecoderTask(decoder, ExampleMaker(card, vq, codec, geometry, localised=_LOCALISED)),
        Batches(SceneEncodings(context, encodings, _STAGE, recipe.decoder_batch), size=recipe.decoder_batch),
        OptimizationConfig(
            steps=recipe.decoder_steps,
            learning_rate=recipe.decoder_learning_rate,
            optimizer="muon",
            shift=recipe.decoder_shift,
            seed=recipe.seed,
            compile=recipe.compiled,
        ),
        accelerator=Accelerator(cpu=device.type == "cpu", mixed_precision="no"),
        settings=context.settings(tokenizer=tokens_digest(vq.model), autoencoder=digest(vae)),
        autocast=context.autocast,
        run=RunConfig(sample_every=1000, save_every=250, log_every=50),
        evaluate=evaluate,
    ).train()


def _start_as_identity(transformer: FluxTransformer2DModel) -> None:
    """Zeroes modulations and output, so that every block starts as the identity (adaLN-Zero, Peebles & Xie 2023)."""
    layers = [
        getattr(block, norm).linear
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks)
        for norm in ("norm", "norm1")
        if hasattr(block, norm)
    ]
    for layer in (*layers, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
