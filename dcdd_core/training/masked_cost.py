"""The memory and FLOPs of a masked sampler's training on each GPU, from the network's shapes alone.

Like `cost`, for a `MaskedTransformer` under DDP: a dry run of one step, and of making its example.

Shapes: B batch, N tokens, K codes, L prompt length.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch

from ..models.masked.network import MaskedConfig, MaskedTransformer
from ..models.masked.words import padded
from ..protocols import ImageTokenizer
from .cost import Cost, optimizer_cost
from .dry_run import Meter, dry_run, dry_run_peak
from .image_batch import Geometry
from .masked_loss import MaskedExample, masked_losses
from .masked_task import muon_matrices
from .trainable import trained_weights


@dataclass(frozen=True, kw_only=True)
class MaskedSetup:
    """What is trained, how, and on how many GPUs.

    Attributes:
        config: of the network.
        geometry: of the images.
        words: L.
        drawn: share of the images whose wrong tokens the network draws itself.
        cached: whether the images come already encoded, from a cache.
        batch, accumulate, optimizer, precision, checkpointing: as in `cost.TrainingSetup`.
    """

    config: MaskedConfig
    geometry: Geometry
    words: int
    drawn: float
    cached: bool
    batch: int
    accumulate: int
    optimizer: str
    precision: str
    checkpointing: bool
    gpus: int


def masked_cost(setup: MaskedSetup, tokenizer: ImageTokenizer) -> Cost:
    """Adds up what each GPU holds, and the FLOPs of an update.

    Args:
        tokenizer: left unchanged.
    """
    with torch.device("meta"):
        network = MaskedTransformer(setup.config)
    trained = trained_weights(network)
    dry = dry_run(
        lambda: masked_losses(network, _example(setup))["loss"],
        trained.values(),
        checkpointed=network.layers if setup.checkpointing else (),
        autocast=torch.bfloat16 if setup.precision == "bf16" else None,
    )
    count = sum(weight.numel() for weight in trained.values())
    gradients = 4 * count
    matrices = muon_matrices(trained) if setup.optimizer == "muon" else ()
    states, temporary, optimizer_flops = optimizer_cost(trained, setup.optimizer, matrices)
    with Meter() as drawing, torch.no_grad():
        _draw(network, setup)
    memory = {
        "trained weights": 4 * count,
        "optimiser's states": states,
        "EMA": 4 * count,
        "communication": gradients if setup.gpus > 1 else 0,
        "tokenizer, in float32": sum(weight.numel() * 4 for weight in tokenizer.model.parameters()),
    }
    accumulated = gradients if setup.accumulate > 1 else 0
    peaks = [0 if setup.cached else _encoding_peak(setup, tokenizer)]
    peaks.append(dry_run_peak(lambda: _draw(network, setup)) if setup.drawn else 0)
    return Cost(
        weights={"all": count, "trained": count},
        latent_tokens=setup.config.tokens,
        memory=memory,
        encoding=max(peaks) + accumulated,
        step=dry.peak if setup.accumulate == 1 else dry.peak_without_gradients + gradients,
        optimizer_step=gradients + temporary,
        activations=dry.activations,
        gradients=gradients,
        forward_flops=dry.forward_flops,
        flops=setup.accumulate * (dry.flops + round(setup.drawn * drawing.flops)) + optimizer_flops,
    )


def _example(setup: MaskedSetup) -> MaskedExample:
    def shape(dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(setup.batch, setup.config.tokens, dtype=dtype, device="meta")

    return MaskedExample(
        ids=[[0] * setup.words] * setup.batch,
        tokens=shape(torch.int64),
        errors=shape(torch.float32),
        hidden=shape(torch.bool),
        wrong=shape(torch.bool),
        seen=shape(torch.int64),
        probe=shape(torch.bool),
    )


def _draw(network: MaskedTransformer, setup: MaskedSetup) -> torch.Tensor:
    """The probabilities of the network's own draws, for the whole batch and all positions: more than are ever drawn."""
    example = _example(setup)
    prefix = network.prefix(*padded(example.ids, "meta"))
    return network.logits(network(example.seen, prefix)).softmax(-1)


def _encoding_peak(setup: MaskedSetup, tokenizer: ImageTokenizer) -> int:
    """The peak bytes of encoding a batch: the encoder, then each position's similarity to all codes."""
    own = copy.copy(tokenizer)
    own.model = copy.deepcopy(tokenizer.model).to("meta")
    side = setup.geometry.token_resolution

    def work() -> torch.Tensor:
        features = own.features(torch.empty(setup.batch, 3, side, side, device="meta"))
        return features @ torch.empty(tokenizer.codebook.dim, tokenizer.codebook.size, device="meta")

    return dry_run_peak(work)
