"""Trains the VQ-VAE: pico's tokenizer, whose decoder is the baseline of the diffusion decoder.

It has two stages, so that the models that use the tokens can be trained before the second has finished:
1. `train_tokenizer` trains encoder, codebook and decoder. For the first fifth of the steps, unquantised unit-length
   features are decoded, with a uniformity loss. Then k-means initialises the codebook, which is updated by EMA, and
   dead codes are restarted at current features (without all this most of the codebook stays dead).
2. `train_vq_decoder` fine-tunes the decoder with a GAN loss; encoder and codebook are frozen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.ema import EMA
from dcdd_core.training.schedules import set_learning_rate, warmup_cosine
from dcdd_core.training.trainable import trained_weights

from .build_context import BuildContext, digest
from .gan_finetune import finetune_with_gan
from .image_losses import fidelity, reconstruction_loss
from .reader import SceneReader
from .scenes import scene_pixels
from .training_loop import train

_STAGE, _DECODER_STAGE = 1, 6
_DECAY = 0.98
_CODES = 1024


class CodeUse(nn.Module):
    """EMA statistics of the codebook: how often each code is used, and the sum of the features assigned to it."""

    def __init__(self, codes: int, dim: int):
        super().__init__()
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", torch.zeros(codes, dim))

    @torch.no_grad()
    def restart(self, vectors: torch.Tensor) -> None:
        self.counts.fill_(1.0)
        self.sums.copy_(vectors)

    @torch.no_grad()
    def update(self, features: torch.Tensor, tokens: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
        """Unit-length features [M, D] and their tokens [M] -> new codebook [K, D]; dead codes restart at features."""
        codes = self.counts.shape[0]
        counts = torch.bincount(tokens, minlength=codes).to(features.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, tokens, features)
        self.counts.mul_(_DECAY).add_(counts, alpha=1 - _DECAY)
        self.sums.mul_(_DECAY).add_(sums, alpha=1 - _DECAY)
        share = features.shape[0] / codes
        dead = (self.counts < 0.03 * share).nonzero().squeeze(1)
        if len(dead):
            chosen = torch.randint(len(features), (len(dead),), generator=draw).to(features.device)
            self.sums[dead] = features[chosen] * 0.3 * share
            self.counts[dead] = 0.3 * share
        return F.normalize(self.sums, dim=1)


def tokenizer_config(grid: int = 12, codes: int = _CODES) -> JanusVQVAEConfig:
    """The configuration of pico's tokenizer: f = 8, `codes` codes of 8 dimensions; 96 pixels -> 12 x 12 tokens.

    The width is at least 64, since the class normalises in 32 groups: groups of a single channel would remove an
    image's colours at every layer. There are no residual blocks before the middle, because a linear patch encoder is
    cheap and learns fast.
    """
    return JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=codes,
        latent_channels=64,
        base_channels=64,
        channel_multiplier=[1, 1, 1, 2],
        num_res_blocks=0,
        num_patches=grid,
    )


def train_tokenizer(context: BuildContext, loss_reader: SceneReader) -> JanusVQVAE:
    """Trains (or restores) the tokenizer and returns it in evaluation mode; its code vectors have unit length."""
    recipe, device = context.recipe, context.device
    steps, batch = recipe.tokenizer_steps, recipe.tokenizer_batch
    quantise_from = int(0.2 * steps)
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed + _STAGE)
        vq = JanusVQVAE(tokenizer_config()).train().to(device)
    codebook = vq.quantize.embedding.weight.requires_grad_(False)
    use = CodeUse(*codebook.shape).to(device)
    optimizer = torch.optim.AdamW(
        [p for p in vq.parameters() if p.requires_grad], lr=0.0, betas=(0.9, 0.98), weight_decay=1e-4
    )
    decoding = nn.ModuleList([vq.post_quant_conv, vq.decoder])
    ema = EMA(trained_weights(decoding), 0.998)

    def step(i: int) -> dict[str, torch.Tensor]:
        draw = keyed_generator(recipe.seed, _STAGE, i)
        set_learning_rate(optimizer, warmup_cosine(i, steps, peak=8e-4, warmup=200))
        pixels = scene_pixels(context.train_images[context.batch(_STAGE, i, batch)], device)
        features = _encode(vq, pixels, context)
        flat = rearrange(features, "b d h w -> (b h w) d")
        logs: dict[str, torch.Tensor] = {}
        if i == quantise_from:
            vectors = _kmeans(context, vq)
            codebook.copy_(vectors)
            use.restart(vectors)
        some = flat[torch.randperm(len(flat), generator=draw)[:512].to(device)]
        extra = 0.02 * uniformity_loss(some)
        vectors = features
        if i >= quantise_from:
            tokens, chosen = _quantise(features, codebook)
            commitment = (features - chosen).square().sum(1).mean()
            extra = extra + 0.25 * commitment
            vectors = features + (chosen - features).detach()
            codebook.copy_(use.update(flat.detach(), tokens, draw))
            logs["commitment"] = commitment.detach()
        with context.autocast():
            decoded = vq.decoder(vq.post_quant_conv(vectors)).float()
        loss, parts = reconstruction_loss(pixels, decoded, loss_reader, context.autocast)
        optimizer.zero_grad(set_to_none=True)
        (loss + extra).backward()
        nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        ema.update()
        return logs | parts

    def evaluate(i: int) -> dict[str, float]:
        with ema.swapped_in():
            return _evaluate(context, vq, loss_reader, quantised=i > quantise_from)

    train(
        context.folder / "tokenizer",
        settings=context.settings(
            "tokenizer_batch",
            architecture=_architecture(vq),
            loss_reader=digest(loss_reader),
            quantise_from=quantise_from,
        ),
        steps=steps,
        step=step,
        state={"model": vq, "use": use, "ema": ema, "optimizer": optimizer},
        evaluate=evaluate,
        evaluate_every=500,
        save_every=250,
    )
    ema.apply()
    return vq.eval().requires_grad_(False)


def uniformity_loss(features: torch.Tensor) -> torch.Tensor:
    """Uniformity of unit vectors [M, D] on the sphere (Wang & Isola 2020): log mean exp(-2 |f_i - f_j|^2), including
    pairs i = j; lower is more uniform."""
    return (4.0 * (features @ features.T - 1.0)).exp().mean().log()


def train_vq_decoder(context: BuildContext, vq: JanusVQVAE, loss_reader: SceneReader) -> JanusVQVAE:
    """Fine-tunes (or restores) the decoder of `vq` with a GAN loss, encoder and codebook frozen; returns `vq`."""
    decoder = nn.ModuleList([vq.post_quant_conv, vq.decoder])
    finetune_with_gan(
        context,
        "vq-decoder",
        _DECODER_STAGE,
        decoder,
        last=vq.decoder.conv_out.weight,
        encode=lambda pixels, _: _quantise(_encode(vq, pixels, context), vq.quantize.embedding.weight)[1],
        decode=lambda parts, vectors: parts[1](parts[0](vectors)),
        steps=context.recipe.vq_decoder_steps,
        batch=context.recipe.tokenizer_batch,
        settings=context.settings("tokenizer_batch", tokenizer=digest(vq), loss_reader=digest(loss_reader)),
        loss_reader=loss_reader,
        evaluate=lambda _: _evaluate(context, vq, loss_reader, quantised=True),
    )
    return vq.eval().requires_grad_(False)


def tokens_digest(vq: JanusVQVAE) -> str:
    """Hash of what a tokenizer's tokens depend on: encoder and codebook, without the decoder."""
    return digest(nn.ModuleList([vq.encoder, vq.quant_conv, vq.quantize]))


def _architecture(vq: JanusVQVAE) -> list:
    config = vq.config
    return [config.num_embeddings, config.base_channels, *config.channel_multiplier, config.num_res_blocks]


def _encode(vq: JanusVQVAE, pixels: torch.Tensor, context: BuildContext) -> torch.Tensor:
    """Unit-length features [B, D, h, w]."""
    with context.autocast():
        features = vq.quant_conv(vq.encoder(pixels))
    return F.normalize(features.float(), dim=1)


def _quantise(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit-length features [B, D, h, w] -> nearest tokens [B h w] and their code vectors [B, D, h, w]."""
    tokens = (rearrange(features.detach(), "b d h w -> (b h w) d") @ codebook.T).argmax(1)
    return tokens, rearrange(codebook[tokens], "(b h w) d -> b d h w", b=len(features), h=features.shape[2])


@torch.no_grad()
def _evaluate(context: BuildContext, vq: JanusVQVAE, loss_reader: SceneReader, *, quantised: bool) -> dict[str, float]:
    pixels = scene_pixels(context.held_out_images, context.device)
    features = torch.cat([_encode(vq, part, context) for part in pixels.split(32)])
    tokens, chosen = _quantise(features, vq.quantize.embedding.weight)
    decoded = []
    for part in (chosen if quantised else features).split(32):
        with context.autocast():
            decoded.append(vq.decoder(vq.post_quant_conv(part)).float().clamp(-1, 1))
    used = float(len(tokens.unique()) / _CODES)
    return fidelity(pixels, torch.cat(decoded), loss_reader) | {"codes_used": used}


@torch.no_grad()
def _kmeans(context: BuildContext, vq: JanusVQVAE, *, scenes: int = 256, rounds: int = 20) -> torch.Tensor:
    """Spherical k-means over the features of training scenes -> code vectors [K, D]."""
    pixels = scene_pixels(context.train_images[:scenes], context.device)
    flat = rearrange(torch.cat([_encode(vq, part, context) for part in pixels.split(32)]), "b d h w -> (b h w) d")
    order = torch.randperm(len(flat), generator=keyed_generator(context.recipe.seed, _STAGE, 1 << 40))
    vectors = flat[order[:_CODES].to(flat.device)]
    for _ in range(rounds):
        tokens = (flat @ vectors.T).argmax(1)
        sums = torch.zeros_like(vectors).index_add_(0, tokens, flat)
        empty = torch.bincount(tokens, minlength=_CODES) == 0
        if bool(empty.any()):
            sums[empty] = flat[order[-int(empty.sum()) :].to(flat.device)]
        vectors = F.normalize(sums, dim=1)
    return vectors
