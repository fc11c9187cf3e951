"""Trains the VQ-VAE: the tokenizer that everything speaks through, and the opponent that the decoder is held against.

Two stages, so that what learns the tokens' language need not wait for the decoder's last polish:
1. `train_tokenizer`: encoder, codebook and decoder. At first unquantised: they learn with the unit-length features
   themselves, spread by a uniformity loss; then k-means gives the codebook its first entries, moving averages move
   them, and entries that nobody uses are moved onto features that need one (a plain start leaves most of the codebook
   dead).
2. `train_vq_decoder`: encoder and codebook frozen, the decoder trained on with an adversarial loss.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.simple_loop import moving_average, set_learning_rate, train, warmup_cosine

from .build_context import Workshop, digest
from .gan_finetune import polish
from .image_losses import fidelity, reconstruction_loss
from .reader import SceneReader
from .scenes import scene_pixels

_STAGE, _DECODER_STAGE = 1, 6
_DECAY = 0.98
_CODES = 1024


class CodeUse(nn.Module):
    """Moving averages of how often each code is used and of the features assigned to it."""

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
        """features [M, D] unit length, tokens [M] -> the new codebook [K, D]; rarely used codes move onto features."""
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
    """The pico tokenizer: f = 8, `codes` 8-dimensional codes; 96 pixels -> 12 x 12 tokens.

    Width 64 everywhere: the class normalises in 32 groups, and groups of a single channel would wipe out a picture's
    colours at every layer. No residual blocks before the middle: a linear patch encoder costs little and learns fast.
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


def train_tokenizer(shop: Workshop, loss_reader: SceneReader) -> JanusVQVAE:
    """Trains (or restores) the tokenizer and returns it in evaluation mode, its codebook of unit length."""
    recipe, device = shop.recipe, shop.device
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
    average = moving_average(decoding, 0.998)

    def step(i: int) -> dict[str, torch.Tensor]:
        draw = keyed_generator(recipe.seed, _STAGE, i)
        set_learning_rate(optimizer, warmup_cosine(i, steps, peak=8e-4, warmup=200))
        pixels = scene_pixels(shop.train_images[shop.batch(_STAGE, i, batch)], device)
        features = _encode(vq, pixels, shop)
        flat = rearrange(features, "b d h w -> (b h w) d")
        logs: dict[str, torch.Tensor] = {}
        if i == quantise_from:
            vectors = _kmeans(shop, vq)
            codebook.copy_(vectors)
            use.restart(vectors)
        some = flat[torch.randperm(len(flat), generator=draw)[:512].to(device)]
        extra = 0.02 * (4.0 * (some @ some.T - 1.0)).exp().mean().log()
        vectors = features
        if i >= quantise_from:
            tokens, chosen = _quantise(features, codebook)
            commitment = (features - chosen).square().sum(1).mean()
            extra = extra + 0.25 * commitment
            vectors = features + (chosen - features).detach()
            codebook.copy_(use.update(flat.detach(), tokens, draw))
            logs["commitment"] = commitment.detach()
        with shop.autocast():
            decoded = vq.decoder(vq.post_quant_conv(vectors)).float()
        loss, parts = reconstruction_loss(pixels, decoded, loss_reader, shop.autocast)
        optimizer.zero_grad(set_to_none=True)
        (loss + extra).backward()
        nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(decoding)
        return logs | parts

    train(
        shop.folder / "tokenizer",
        settings=shop.settings(
            "tokenizer_batch",
            architecture=_architecture(vq),
            loss_reader=digest(loss_reader),
            quantise_from=quantise_from,
        ),
        steps=steps,
        step=step,
        state={"model": vq, "use": use, "average": average, "optimizer": optimizer},
        evaluate=lambda i: _evaluate(shop, vq, average.module, loss_reader, quantised=i > quantise_from),
        evaluate_every=500,
        save_every=250,
    )
    return _settle(vq, average.module)


def train_vq_decoder(shop: Workshop, vq: JanusVQVAE, loss_reader: SceneReader) -> JanusVQVAE:
    """Trains the decoder on, encoder and codebook frozen, with an adversarial loss; returns the tokenizer."""
    decoder = nn.ModuleList([vq.post_quant_conv, vq.decoder])
    averaged = polish(
        shop,
        "vq-decoder",
        _DECODER_STAGE,
        decoder,
        last=vq.decoder.conv_out.weight,
        encode=lambda pixels, _: _quantise(_encode(vq, pixels, shop), vq.quantize.embedding.weight)[1],
        decode=lambda parts, vectors: parts[1](parts[0](vectors)),
        steps=shop.recipe.vq_decoder_steps,
        batch=shop.recipe.tokenizer_batch,
        settings=shop.settings("tokenizer_batch", tokenizer=digest(vq), loss_reader=digest(loss_reader)),
        loss_reader=loss_reader,
        evaluate=lambda parts: _evaluate(shop, vq, parts, loss_reader, quantised=True),
    )
    return _settle(vq, averaged)


def tokens_digest(vq: JanusVQVAE) -> str:
    """Names the language that a tokenizer speaks: encoder and codebook, without the decoder."""
    return digest(nn.ModuleList([vq.encoder, vq.quant_conv, vq.quantize]))


def _architecture(vq: JanusVQVAE) -> list:
    config = vq.config
    return [config.num_embeddings, config.base_channels, *config.channel_multiplier, config.num_res_blocks]


def _settle(vq: JanusVQVAE, averaged: nn.ModuleList) -> JanusVQVAE:
    """Puts the averaged decoder in place and freezes everything."""
    vq.post_quant_conv.load_state_dict(averaged[0].state_dict())
    vq.decoder.load_state_dict(averaged[1].state_dict())
    return vq.eval().requires_grad_(False)


def _encode(vq: JanusVQVAE, pixels: torch.Tensor, shop: Workshop) -> torch.Tensor:
    """Unit-length features [B, D, h, w]."""
    with shop.autocast():
        features = vq.quant_conv(vq.encoder(pixels))
    return F.normalize(features.float(), dim=1)


def _quantise(features: torch.Tensor, codebook: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit features [B, D, h, w] -> nearest tokens [B h w] and their code vectors [B, D, h, w]."""
    tokens = (rearrange(features.detach(), "b d h w -> (b h w) d") @ codebook.T).argmax(1)
    return tokens, rearrange(codebook[tokens], "(b h w) d -> b d h w", b=len(features), h=features.shape[2])


@torch.no_grad()
def _evaluate(
    shop: Workshop, vq: JanusVQVAE, decoding: nn.ModuleList, loss_reader: SceneReader, *, quantised: bool
) -> dict[str, float]:
    pixels = scene_pixels(shop.held_out_images, shop.device)
    features = torch.cat([_encode(vq, part, shop) for part in pixels.split(32)])
    tokens, chosen = _quantise(features, vq.quantize.embedding.weight)
    post_quant_conv, decoder = decoding
    decoded = []
    for part in (chosen if quantised else features).split(32):
        with shop.autocast():
            decoded.append(decoder(post_quant_conv(part)).float().clamp(-1, 1))
    used = float(len(tokens.unique()) / _CODES)
    return fidelity(pixels, torch.cat(decoded), loss_reader) | {"codes_used": used}


@torch.no_grad()
def _kmeans(shop: Workshop, vq: JanusVQVAE, *, scenes: int = 256, rounds: int = 20) -> torch.Tensor:
    """Spherical k-means over the features of a few hundred scenes -> [K, D]."""
    pixels = scene_pixels(shop.train_images[:scenes], shop.device)
    flat = rearrange(torch.cat([_encode(vq, part, shop) for part in pixels.split(32)]), "b d h w -> (b h w) d")
    order = torch.randperm(len(flat), generator=keyed_generator(shop.recipe.seed, _STAGE, 1 << 40))
    vectors = flat[order[:_CODES].to(flat.device)]
    for _ in range(rounds):
        tokens = (flat @ vectors.T).argmax(1)
        sums = torch.zeros_like(vectors).index_add_(0, tokens, flat)
        empty = torch.bincount(tokens, minlength=_CODES) == 0
        if bool(empty.any()):
            sums[empty] = flat[order[-int(empty.sum()) :].to(flat.device)]
        vectors = F.normalize(sums, dim=1)
    return vectors
