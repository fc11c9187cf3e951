"""The memory and FLOPs of a decoder's training on each GPU, from the networks' shapes alone.

Counted: every weight of the real networks, and a dry run of one training step and of encoding its images (`dry_run`).
Taken from publications: what is sharded, and the communication buffers (`SHARDINGS`, `_communication`). Not counted:
the GPU's context and libraries, including convolution workspaces, fragmentation, the sample sheets, and the encoders'
FLOPs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .. import registry
from ..method.distillation import OBJECTIVES, Schedule
from ..method.flow import timesteps
from ..models.card import MOST_STEPS, DecoderCard
from ..models.checkpoints import StoredTensors
from ..models.decoder import DistributionConditionedDecoder
from ..protocols import ImageTokenizer, LatentCodec
from ..settings import require_at_least, require_at_most, require_number
from .config import OptimizationConfig
from .dry_run import DryRun, Meter, dry_run, dry_run_peak
from .encoded_batch import normalized_latents
from .examples import Example
from .loss import trained_velocity, velocity_losses
from .optimizers import OPTIMIZERS, muon
from .trainable import TRAINED, check_optimizer, choose_trained, muon_matrices, trained_weights
from .vlm_cost import PUBLISHED

#: DDP holds everything on every GPU (Li et al. 2020, arXiv 2006.15704); FSDP shards weights, gradients and the
#: optimiser's states (full shard, Zhao et al. 2023, arXiv 2304.11277).
SHARDINGS = ("ddp", "fsdp")
#: The most for each size and count of a setup: beyond any training, yet small enough for PyTorch to count elements.
_MOST = 2**16


@dataclass(frozen=True, kw_only=True)
class TrainingSetup:
    """What is trained, how, and on how many GPUs; the names are those of `train.py`'s options.

    Attributes:
        config: the diffusion transformer's.
        width: the adapter's.
        train, rank: see `trainable.choose_trained`.
        precision: "bf16" for mixed precision: frozen weights in bfloat16, trained ones in float32,
            computation in bfloat16; or "no", all in float32.
        checkpointing: activation checkpointing of the blocks.
        batch, accumulate: images per GPU and micro-batch, and micro-batches per update.
        resolution, grid: side of the images in pixels, and of their token grids.
        average: whether there is an EMA of the trained weights, in float32.
        localised: fraction of localised images, which are masked and encoded again at every step.
        cached: whether the images come already encoded, from a cache.
        vlm_conditions: share of the examples that get the VLM's own conditions, from the cache if `cached`, otherwise
            made by the VLM at every step.
        vlm_model: that VLM, one of `vlm_cost.PUBLISHED`.
        student_steps: Euler steps of a distilled student; 0 for training on images.
        teacher_steps, objective: of that distillation (`method.distillation`); the teacher is counted without guidance.
        sharding: one of `SHARDINGS`.

    Raises:
        ValueError: for choices that are unknown or exclude each other, and for sizes out of range.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: registry.backbones()[0].config_of(None))
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
    vlm_conditions: float = 0.0
    vlm_model: str = "Janus-Pro-1B"
    student_steps: int = 0
    teacher_steps: int = DecoderCard.steps
    objective: str = "trajectory"
    sharding: str = "ddp"
    gpus: int = 1

    def __post_init__(self):
        known = {"train": TRAINED, "precision": ("bf16", "no"), "optimizer": OPTIMIZERS, "sharding": SHARDINGS}
        known |= {"vlm_model": tuple(PUBLISHED), "objective": tuple(OBJECTIVES)}
        for name, choices in known.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        counts = ("width", "rank", "batch", "accumulate", "resolution", "grid", "gpus")
        require_at_least(1, **{name: getattr(self, name) for name in counts})
        require_at_most(_MOST, **{name: getattr(self, name) for name in counts})
        if not 0 <= self.localised <= 1:
            raise ValueError(f"localised must be a fraction in 0..1, got {self.localised}")
        require_number("vlm-conditions", self.vlm_conditions, least=0, most=1)
        require_number("student-steps", self.student_steps, whole=True, least=0, most=MOST_STEPS)
        require_number("teacher-steps", self.teacher_steps, whole=True, least=1, most=MOST_STEPS)
        if self.student_steps >= self.teacher_steps:
            raise ValueError(
                f"a student takes fewer steps than its teacher, got {self.student_steps} and {self.teacher_steps}"
            )
        if self.optimizer == "muon" and self.sharding != "ddp":
            raise ValueError(f"muon needs whole matrices, but {self.sharding} shards them: take ddp, or adamw")
        check_optimizer(self.optimizer, self.train)

    @property
    def schedule(self) -> Schedule:
        """The times of a student and its teacher, without a shift.

        Their number does not depend on the shift, as long as both have the same.
        """
        return Schedule.of(*(timesteps(steps, shift=0.0) for steps in (self.student_steps, self.teacher_steps)))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of a training.

    Attributes:
        weights: the number of "all" weights held, and of the "trained" ones.
        latent_tokens: of one image.
        memory: bytes that each GPU holds throughout, by name.
        encoding, step, optimizer_step: additional bytes of three consecutive phases: encoding a batch, its forward and
            backward pass, and the optimiser's step; each includes the gradients that exist then.
        activations, gradients: of the step's bytes, those stored for the backward pass, and those that remain.
        forward_flops, flops: of one GPU, for the forward pass of one micro-batch and for a whole update.
    """

    weights: dict[str, int]
    latent_tokens: int
    memory: dict[str, int]
    encoding: int
    step: int
    optimizer_step: int
    activations: int
    gradients: int
    forward_flops: int
    flops: int

    @property
    def peak(self) -> int:
        """The peak bytes of each GPU."""
        return sum(self.memory.values()) + max(self.encoding, self.step, self.optimizer_step)


def cost_of(setup: TrainingSetup) -> Cost:
    """Builds the networks on the meta device, does a dry run of a step there, and adds up what each GPU holds.

    Raises:
        ValueError: for a resolution that does not fit the networks, and "lora" without peft.
    """
    tokenizer, codec = encoders(setup)
    decoder = meta_decoder(setup)
    unit = decoder.backbone.patch * codec.factor
    if setup.resolution % unit:
        raise ValueError(
            f"a resolution of {setup.resolution} does not fit: it must be a multiple of {unit} pixels, the size of "
            "one latent token"
        )
    trained = trained_weights(decoder)
    dry = step_dry_run(decoder, setup)
    count = sum(weight.numel() for weight in trained.values())
    everything = sum(weight.numel() for weight in decoder.parameters())

    shards = setup.gpus if setup.sharding == "fsdp" else 1
    half = setup.precision == "bf16"
    matrices = muon_matrices(decoder) if setup.optimizer == "muon" else ()
    states, temporary, optimizer_flops = optimizer_cost(trained, setup.optimizer, matrices)
    gradients = count * 4
    memory = {
        "frozen weights": _ceil(everything - count, 2 if half else 4, shards),
        "trained weights": _ceil(count, 4, shards),
        "optimiser's states": _ceil(states, 1, shards),
        "EMA": _ceil(count, 4, shards) if setup.average else 0,
        "communication": _communication(setup, decoder, gradients),
        "tokenizer, in float32": sum(weight.nbytes for weight in tokenizer.model.parameters()),
        "autoencoder, in float32": sum(weight.nbytes for weight in codec.model.parameters()),
    }
    taught = 0
    if setup.student_steps:
        # The teacher is not sharded.
        memory["teacher"] = _ceil(_painting_weights(setup), 2 if half else 4, 1)
        one_pass = step_dry_run(meta_decoder(setup), replace(setup, student_steps=0)).forward_flops
        taught = OBJECTIVES[setup.objective].teacher_passes(setup.schedule) * one_pass
    vlm, tokens = PUBLISHED[setup.vlm_model], setup.grid**2
    share = 0.0 if setup.cached else setup.vlm_conditions
    encoding = encoding_peak(setup, tokenizer, codec)
    if share:
        memory["VLM, in bfloat16"] = 2 * vlm.weights
        # All of a batch's examples may be chosen.
        encoding = max(encoding, vlm.working_memory(setup.batch, tokens))
    own = math.ceil(gradients / shards)
    if shards == 1 and setup.accumulate == 1:
        step = dry.peak
    else:
        # From the second micro-batch on, all gradients exist from the start. Sharded ones never exist in full.
        step = dry.peak_without_gradients + own
    return Cost(
        weights={"all": everything, "trained": count},
        latent_tokens=(setup.resolution // unit) ** 2,
        memory=memory,
        encoding=encoding + (own if setup.accumulate > 1 else 0),
        step=step,
        optimizer_step=own + temporary,
        activations=dry.activations,
        gradients=own,
        forward_flops=dry.forward_flops,
        flops=(dry.flops + taught + round(share * setup.batch * vlm.flops(tokens))) * setup.accumulate
        + optimizer_flops,
    )


def _painting_weights(setup: TrainingSetup) -> int:
    """The number of weights in a decoder that is loaded for painting."""
    decoder = meta_decoder(replace(setup, train="adapter", optimizer="adamw"))
    decoder.backbone.fold(StoredTensors({}))
    return sum(weight.numel() for weight in decoder.parameters())


def meta_decoder(setup: TrainingSetup) -> DistributionConditionedDecoder:
    """The decoder on the meta device, without unused weights, in the dtypes that one GPU computes with."""
    tokenizer, codec = encoders(setup)
    card = DecoderCard(
        base="",
        base_config=dict(setup.config),
        tokenizer="",
        codebook="",
        code_dim=tokenizer.codebook.dim,
        width=setup.width,
        vae_factor=codec.factor,
    )
    with torch.device("meta"):
        decoder = DistributionConditionedDecoder.build(card)
        decoder.backbone.drop_unused()
        decoder.to(torch.bfloat16 if setup.precision == "bf16" else torch.float32)
        choose_trained(decoder, setup.train, rank=setup.rank)
    # FSDP gathers weights in the lower precision.
    if setup.precision == "bf16" and setup.sharding == "fsdp":
        decoder.to(torch.bfloat16)
    return decoder


def step_dry_run(decoder: DistributionConditionedDecoder, setup: TrainingSetup, *, on_gpu: bool = True) -> DryRun:
    """A dry run of the loss and its backward pass, for one micro-batch."""
    batch, side, tokens = setup.batch, setup.resolution // decoder.card.vae_factor, setup.grid**2

    def shape(*sizes: int) -> torch.Tensor:
        return torch.empty(sizes, device="meta")

    # Not a Condition, which checks its values.
    condition = SimpleNamespace(
        code_vectors=shape(batch, tokens, decoder.card.code_dim),
        uncertainty=shape(batch, tokens, 4),
        grid=(setup.grid, setup.grid),
    )
    channels = decoder.backbone.latent_channels
    example = Example(
        latents=shape(batch, channels, side, side),
        condition=condition,
        masked_latents=shape(1, channels, side, side),
        mask=shape(1, 1, setup.resolution, setup.resolution),
    )

    def loss() -> torch.Tensor:
        # Not `decoder_loss`, which draws on the CPU: a large noise would really take the memory counted here.
        t, noise = shape(batch), torch.empty_like(example.latents)
        if setup.student_steps:
            return _distillation_loss(decoder, example, setup)
        return velocity_losses(decoder, example, t, noise, OptimizationConfig(steps=1).weighting).mean()

    return dry_run(
        loss,
        trained_weights(decoder).values(),
        checkpointed=decoder.backbone.blocks if setup.checkpointing else (),
        autocast=torch.bfloat16 if setup.precision == "bf16" else None,
        on_gpu=on_gpu,
    )


def _distillation_loss(decoder: DistributionConditionedDecoder, example: Example, setup: TrainingSetup) -> torch.Tensor:
    """The student's part of `DistillationTask`; `cost_of` counts the teacher's passes separately."""
    objective, packed = OBJECTIVES[setup.objective], decoder.backbone.pack(example.latents)
    lesson = objective.lesson(
        lambda x, t: torch.empty_like(x), packed, torch.empty_like(packed), setup.schedule, torch.Generator()
    )
    return objective.losses(trained_velocity(decoder, example), lesson).mean()


def encoders(setup: TrainingSetup) -> tuple[ImageTokenizer, LatentCodec]:
    """The two encoders, on the meta device: the first VLM family's published tokenizer, and the backbone's codec."""
    wanted = registry.backbone_family(dict(setup.config)).codec
    codec = next(family for family in registry.codecs() if family.name == wanted)
    return registry.samplers()[0].published_tokenizer(), codec.published()


def encoding_peak(setup: TrainingSetup, tokenizer: ImageTokenizer, codec: LatentCodec) -> int:
    """The peak bytes of making a batch's example: what `ExampleMaker` does with the encoders.

    Counts every image of the batch as localised: they are chosen at random, and sometimes all of them are.
    """
    batch, side = setup.batch, setup.resolution
    token_side = setup.grid * tokenizer.factor
    latent_side = side // codec.factor

    def shape(*sizes: int) -> torch.Tensor:
        return torch.empty(batch, *sizes, device="meta")

    def work() -> None:
        pixels = shape(3, side, side)
        if not setup.cached:
            tokenizer.features(shape(3, token_side, token_side))
            normalized_latents(codec, pixels)
        if setup.localised:
            latents, mask = shape(codec.channels, latent_side, latent_side), shape(1, side, side)
            masked_latents = torch.empty_like(latents)
            masked_latents.copy_(normalized_latents(codec, pixels.clone(), mask.clone()))

    return dry_run_peak(work) if setup.localised or not setup.cached else 0


def optimizer_cost(
    trained: Mapping[str, nn.Parameter], optimizer: str, matrices: Collection[str] = ()
) -> tuple[int, int, int]:
    """Bytes of an optimiser's states for float32 weights, and peak bytes and FLOPs of its step.

    AdamW's fused step needs nothing besides its two moments, and its FLOPs are not counted. With 8 bits, a moment takes
    a byte per weight and a float32 per block of 256; tensors below 4096 elements stay in float32 (Dettmers et al. 2021,
    arXiv 2110.02861; bitsandbytes' `Optimizer2State`). Muon's step is a dry run of PyTorch's own.

    Args:
        matrices: the names of the weights that Muon updates.
    """
    if optimizer == "adamw8bit":
        sizes = [weight.numel() for weight in trained.values()]
        return sum(2 * (n + 4 * math.ceil(n / 256) if n >= 4096 else 4 * n) for n in sizes), 0, 0
    states = 8 * sum(weight.numel() for name, weight in trained.items() if name not in matrices)
    if not matrices:
        return states, 0, 0
    copies = [nn.Parameter(torch.empty_like(trained[m], dtype=torch.float32, device="meta")) for m in matrices]
    for copy in copies:
        copy.grad = torch.empty_like(copy)
    stepped = muon(copies, weight_decay=OptimizationConfig.weight_decay)
    with Meter() as meter:
        stepped.step()
    momenta = sum(t.nbytes for state in stepped.state.values() for t in state.values() if isinstance(t, torch.Tensor))
    return states + momenta, meter.peak - momenta, meter.flops


def _communication(setup: TrainingSetup, decoder: DistributionConditionedDecoder, gradients: int) -> int:
    """Bytes of communication buffers.

    DDP's buckets hold each gradient a second time (`gradient_as_bucket_view=False`, the default). FSDP gathers the
    current block and prefetches the next one, and holds one block's gradients unsharded.
    """
    if setup.gpus == 1:
        return 0
    size = 2 if setup.precision == "bf16" else 4
    if setup.sharding == "ddp":
        return gradients
    blocks = [list(block.parameters()) for block in decoder.backbone.blocks]
    gathered = 2 * size * max(sum(w.numel() for w in block) for block in blocks)
    return gathered + 4 * max(sum(w.numel() for w in block if w.requires_grad) for block in blocks)


def _ceil(count: int, size: int, parts: int) -> int:
    return math.ceil(count * size / parts)
