"""What a decoder's training takes of each GPU, bytes and operations, from the networks' shapes alone.

Counted: every weight of the real networks, and what one step of the real training and the encoding of its pictures
make (`replay`). Taken from documents: what the GPUs share, and what communication holds (`SHARDINGS`,
`_communication`). Left out: the GPU's context and libraries with the workspaces of convolutions, fragmentation, the
sample sheets, and the operations of the encoders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn
from transformers import JanusVQVAEConfig
from transformers.models.janus.modeling_janus import JanusVQVAE

from ..models.backbones.flux_fill.files import fill_config
from ..models.backbones.flux_fill.inference import drop_text
from ..models.card import DecoderCard
from ..models.decoder import DistributionConditionedDecoder
from ..models.vae import FLUX_VAE_CONFIG
from .dry_run import Meter, Replayed, replay, replay_peak
from .encoded_batch import scaled_latents
from .examples import Example
from .optimizers import OPTIMIZERS, muon
from .recipe import DecoderTraining, decoder_loss, muon_matrices
from .settings import require_at_least
from .trainable import TRAINED, choose_trained, trained_weights

#: What the GPUs share among them instead of each holding all of it: (weights, gradients, optimiser's states).
#: DDP: Li et al. 2020, arXiv 2006.15704. ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054, section 5. FSDP (full shard):
#: Zhao et al. 2023, arXiv 2304.11277.
SHARDINGS = {
    "ddp": (False, False, False),
    "zero1": (False, False, True),
    "zero2": (False, True, True),
    "fsdp": (True, True, True),
}
_BUCKET = int(5e8)
"""Numbers in DeepSpeed's reduction buckets: the default of its documentation (deepspeed.ai/docs/config-json:
reduce_bucket_size)."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, how, and on how many GPUs; named as `train.py` names it.

    Attributes:
        config: of the transformer.
        width: of the adapter.
        train, rank: see `trainable.choose_trained`.
        precision: "bf16", mixed: frozen weights in bfloat16, trained ones in float32 (with DeepSpeed in bfloat16, and
            copies in float32), computed in bfloat16; or "no", all in float32.
        checkpointing: blocks keep nothing but their input.
        batch, accumulate: pictures of a GPU at a time, and batches of an update.
        resolution, grid: sides of the pictures in pixels, and of their grids in tokens.
        average: a moving average of the trained weights, in float32.
        localised: share of the pictures with only a box to paint, whose rest is encoded at every step.
        cached: the pictures come encoded, from a cache.
        sharding: one of `SHARDINGS`.

    Raises:
        ValueError: for choices that are unknown or do not go together, and sizes below 1 or that do not divide.
    """

    config: Mapping[str, Any] = field(default_factory=fill_config)
    width: int = 128
    train: str = "attention"
    rank: int = 16
    precision: str = "bf16"
    checkpointing: bool = False
    batch: int = 4
    accumulate: int = 1
    resolution: int = 384
    grid: int = 24
    optimizer: str = "adamw"
    average: bool = True
    localised: float = 0.2
    cached: bool = False
    sharding: str = "ddp"
    gpus: int = 1

    def __post_init__(self):
        known = {"train": TRAINED, "precision": ("bf16", "no"), "optimizer": OPTIMIZERS, "sharding": tuple(SHARDINGS)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        counts = ("width", "rank", "batch", "accumulate", "resolution", "grid", "gpus")
        require_at_least(1, **{name: getattr(self, name) for name in counts})
        if not 0 <= self.localised <= 1:
            raise ValueError(f"localised must be a share, in 0..1, got {self.localised}")
        if self.resolution % 16:
            raise ValueError(
                f"a resolution of {self.resolution} does not fit: it must be a multiple of 16 pixels, one packed latent"
            )
        if self.optimizer == "muon" and self.sharding != "ddp":
            raise ValueError(f"muon works on whole matrices, and {self.sharding} cuts them: take ddp, or adamw")

    @property
    def deepspeed(self) -> bool:
        """Whether its engine trains, in place of accelerate's own ways."""
        return self.sharding.startswith("zero")


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What a training takes.

    Attributes:
        weights: how many there are: "all" that are held, and "trained" ones.
        memory: bytes of each GPU: what lies there all the time by name.
        encoding, step, optimizer_step: bytes on top, of one after the other: encoding a batch, its forward and backward
            pass, the optimiser's step; each with the gradients that are there then.
        kept, gradients: of the step's bytes, the activations that wait for the backward pass, and what remains at its
            end.
        forward_operations, operations: of one GPU, for a forward pass of one batch and for a whole update.
    """

    weights: dict[str, int]
    memory: dict[str, int]
    encoding: int
    step: int
    optimizer_step: int
    kept: int
    gradients: int
    forward_operations: int
    operations: int

    @property
    def peak(self) -> int:
        """Bytes of each GPU at the worst moment."""
        return sum(self.memory.values()) + max(self.encoding, self.step, self.optimizer_step)


def cost_of(setup: Setup) -> Cost:
    """Builds the networks on the meta device, replays a step there and adds up what the GPUs hold.

    Raises:
        ValueError: for "lora" without peft.
    """
    decoder = shaped(setup)
    trained = trained_weights(decoder)
    made = replayed(decoder, setup)
    count = sum(weight.numel() for weight in trained.values())
    everything = sum(weight.numel() for weight in decoder.parameters())

    shares = dict(
        zip(("weights", "gradients", "states"), (setup.gpus if cut else 1 for cut in SHARDINGS[setup.sharding]))
    )
    half = setup.precision == "bf16"
    copies = half and setup.deepspeed
    states, beside, optimizer_operations = optimizer_cost(trained, setup.optimizer)
    gradients = count * (2 if copies else 4)
    vq, vae = encoders()
    memory = {
        "frozen weights": _ceil(everything - count, 2 if half else 4, shares["weights"]),
        "trained weights": _ceil(count, 2 if copies else 4, shares["weights"]),
        "float32 copies of them": _ceil(count, 4, shares["states"]) if copies else 0,
        "optimiser's states": _ceil(states, 1, shares["states"]),
        "moving average": _ceil(count, 4, shares["weights"]) if setup.average else 0,
        "communication": _communication(setup, decoder, gradients),
        "tokenizer, in float32": sum(weight.nbytes for weight in vq.parameters()),
        "autoencoder, in float32": sum(weight.nbytes for weight in vae.parameters()),
    }
    whole, own = shares["gradients"] == 1, math.ceil(gradients / shares["gradients"])
    if whole and setup.accumulate == 1:
        step = made.peak
    else:
        # From the second batch on all gradients are there from the start; those that are shared never are, as a whole.
        step = made.peak_beside_gradients + own
    return Cost(
        weights={"all": everything, "trained": count},
        memory=memory,
        encoding=encoding_peak(setup, vq, vae) + (own if setup.accumulate > 1 else 0),
        step=step,
        optimizer_step=own + beside,
        kept=made.saved,
        gradients=own,
        forward_operations=made.forward_operations,
        operations=made.operations * setup.accumulate + optimizer_operations,
    )


def shaped(setup: Setup) -> DistributionConditionedDecoder:
    """The decoder on the meta device, without the text stream, its weights in the types that one GPU computes with."""
    card = DecoderCard(
        base="",
        base_config=dict(setup.config),
        tokenizer="",
        codebook="",
        code_dim=8,
        width=setup.width,
    )
    with torch.device("meta"):
        decoder = DistributionConditionedDecoder.build(card)
        drop_text(decoder.transformer)
        decoder.to(torch.bfloat16 if setup.precision == "bf16" else torch.float32)
        choose_trained(decoder, setup.train, rank=setup.rank)
    # Where weights are gathered, or DeepSpeed holds the copies in float32, those at work are in the lower type.
    if setup.precision == "bf16" and setup.sharding != "ddp":
        decoder.to(torch.bfloat16)
    return decoder


def replayed(decoder: DistributionConditionedDecoder, setup: Setup, *, on_gpu: bool = True) -> Replayed:
    """One batch through `decoder_loss` and back, on shapes."""
    batch, side, tokens = setup.batch, setup.resolution // decoder.card.vae_factor, setup.grid**2

    def shape(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, device="meta")

    # Not a Condition, which looks at its numbers.
    condition = SimpleNamespace(
        code_vectors=shape(batch, tokens, decoder.card.code_dim),
        uncertainty=shape(batch, tokens, 4),
        grid=(setup.grid, setup.grid),
    )
    channels = decoder.transformer.config.out_channels // 4
    example = Example(
        latents=shape(batch, channels, side, side),
        condition=condition,
        masked_latents=shape(1, channels, side, side),
        mask=shape(1, 1, setup.resolution, setup.resolution),
    )
    return replay(
        lambda: decoder_loss(decoder, example, torch.Generator(), DecoderTraining(steps=1)),
        trained_weights(decoder).values(),
        checkpointed=decoder.backbone.blocks if setup.checkpointing else (),
        autocast=torch.bfloat16 if setup.precision == "bf16" else None,
        on_gpu=on_gpu,
    )


@cache
def encoders() -> tuple[JanusVQVAE, AutoencoderKL]:
    """The two networks that every training holds: Janus-Pro's tokenizer and FLUX's autoencoder, on the meta device."""
    with torch.device("meta"):
        # transformers' own numbers are Janus-Pro's.
        return JanusVQVAE(JanusVQVAEConfig()).eval(), AutoencoderKL.from_config(dict(FLUX_VAE_CONFIG)).eval()


def encoding_peak(setup: Setup, vq: JanusVQVAE, vae: AutoencoderKL) -> int:
    """Bytes that making a batch's example takes, before its forward pass: what `ExampleMaker` asks of the encoders.

    Which pictures have a box is drawn anew for every batch; now and then it is all of them.
    """
    batch, side = setup.batch, setup.resolution
    token_side = setup.grid * 2 ** (len(vq.config.channel_multiplier) - 1)
    latent_side = side // 2 ** (len(vae.config.block_out_channels) - 1)

    def shape(*sizes: int) -> torch.Tensor:
        return torch.empty(batch, *sizes, device="meta")

    def work() -> None:
        pixels = shape(3, side, side)
        if not setup.cached:
            vq.quant_conv(vq.encoder(shape(3, token_side, token_side)))
            scaled_latents(vae, pixels)
        if setup.localised:
            latents, mask = shape(vae.config.latent_channels, latent_side, latent_side), shape(1, side, side)
            masked_latents = torch.empty_like(latents)
            masked_latents.copy_(scaled_latents(vae, pixels.clone(), mask.clone()))

    return replay_peak(work) if setup.localised or not setup.cached else 0


def optimizer_cost(trained: Mapping[str, nn.Parameter], optimizer: str) -> tuple[int, int, int]:
    """Bytes of an optimiser's states for weights in float32, bytes and operations of its step.

    AdamW's step (fused) needs nothing beside its two moments, and its operations do not count. With 8 bits a moment
    takes a byte a weight and a float32 for each block of 256, tensors below 4096 numbers excepted (Dettmers et al.
    2021, arXiv 2110.02861; bitsandbytes' `Optimizer2State`). Muon's step is replayed with PyTorch's own.
    """
    if optimizer == "adamw8bit":
        sizes = [weight.numel() for weight in trained.values()]
        return sum(2 * (n + 4 * math.ceil(n / 256) if n >= 4096 else 4 * n) for n in sizes), 0, 0
    matrices = [trained[name] for name in muon_matrices(trained)] if optimizer == "muon" else []
    states = 8 * (sum(w.numel() for w in trained.values()) - sum(w.numel() for w in matrices))
    if not matrices:
        return states, 0, 0
    works = [nn.Parameter(torch.empty_like(w, dtype=torch.float32, device="meta")) for w in matrices]
    for work in works:
        work.grad = torch.empty_like(work)
    stepped = muon(works, weight_decay=DecoderTraining.weight_decay)
    with Meter() as meter:
        stepped.step()
    momenta = sum(t.nbytes for state in stepped.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return states + momenta, meter.peak - momenta, meter.operations


def _communication(setup: Setup, decoder: DistributionConditionedDecoder, gradients: int) -> int:
    """Bytes that exchanging needs: DDP's buckets hold each gradient once more (`gradient_as_bucket_view=False`, the
    default); FSDP gathers the block at work and the next one, and has the gradients of one block whole; DeepSpeed fills
    a bucket of gradients."""
    if setup.gpus == 1:
        return 0
    size = 2 if setup.precision == "bf16" else 4
    if setup.sharding == "ddp":
        return gradients
    blocks = [list(block.parameters()) for block in decoder.backbone.blocks]
    if setup.sharding == "fsdp":
        gathered = 2 * size * max(sum(w.numel() for w in block) for block in blocks)
        return gathered + 4 * max(sum(w.numel() for w in block if w.requires_grad) for block in blocks)
    return size * min(_BUCKET, gradients // size)


def _ceil(count: int, size: int, parts: int) -> int:
    return math.ceil(count * size / parts)
