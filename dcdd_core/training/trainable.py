"""Which of a decoder's weights are trained, by which optimiser, and how low-rank updates are merged into them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set

import torch
from torch import nn

from ..models.decoder import DistributionConditionedDecoder
from .config import OptimizationConfig
from .optimizers import adamw_8bit, adamw_with_muon

TRAINED = ("attention", "adapter", "lora", "all")
_NO_MATRICES = (
    "the optimizer muon would update nothing: it takes the matrices inside the transformer's blocks, and none of them "
    "is trained; take adamw, or train attention, lora or all instead of the adapter alone (--train)"
)


def check_optimizer(optimizer: str, trained: str) -> None:
    """Checks, before weights are read, that an optimiser has something to update.

    Args:
        trained: mode of `choose_trained`.

    Raises:
        ValueError: for Muon if the adapter alone is trained.
    """
    if optimizer == "muon" and trained == "adapter":
        raise ValueError(_NO_MATRICES)


def choose_trained(decoder: DistributionConditionedDecoder, mode: str, *, rank: int = 16, seed: int = 0) -> None:
    """Freezes the weights that are not trained, and converts those that are to float32.

    Args:
        mode: "attention": the adapter and the backbone's attention, as in the paper; "adapter" alone; "lora": the
            adapter and low-rank updates (peft) of the backbone's `lora_layers`; "all".
        rank, seed: for the low-rank updates, which start at zero.

    Raises:
        ValueError: for another mode, or "lora" without peft.
    """
    if mode not in TRAINED:
        raise ValueError(f"what is trained must be one of {', '.join(TRAINED)}, got {mode!r}")
    decoder.requires_grad_(False)
    decoder.adapter.requires_grad_(True)
    if mode == "lora":
        _add_lora(decoder, rank, seed)
    elif mode != "adapter":
        trained = set(decoder.backbone.trained_names(mode))
        for name, weight in decoder.transformer.named_parameters():
            weight.requires_grad_(name in trained)
    for weight in decoder.parameters():
        if weight.requires_grad:
            # A copy: the weight may be a memory map of the file that it was read from.
            weight.data = weight.data.to(torch.float32, copy=True)


def trained_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights by name."""
    return {name: weight for name, weight in module.named_parameters() if weight.requires_grad}


def frozen_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The frozen weights by name."""
    return {name: weight for name, weight in module.named_parameters() if not weight.requires_grad}


def decoder_optimizers(
    decoder: DistributionConditionedDecoder, config: OptimizationConfig, *, sharded: bool = False
) -> list[torch.optim.Optimizer]:
    """The optimisers of a decoder's trained weights; see `optimizers_of`."""
    weights, matrices = trained_weights(decoder), muon_matrices(decoder)
    return optimizers_of(weights, config, matrices=matrices, betas=(0.9, 0.99), sharded=sharded)


def optimizers_of(
    weights: Mapping[str, nn.Parameter],
    config: OptimizationConfig,
    *,
    matrices: Collection[str],
    betas: tuple[float, float],
    sharded: bool = False,
) -> list[torch.optim.Optimizer]:
    """The optimisers of trained weights, each weight in exactly one.

    Args:
        matrices: the names of the weights that Muon updates, if it is chosen.
        betas: of AdamW.
        sharded: as for `adamw_8bit`.

    Raises:
        ValueError: for Muon without matrices, and as `adamw_8bit` and `muon`.
    """
    if config.optimizer == "muon" and not matrices:
        raise ValueError(_NO_MATRICES)
    options = {"betas": betas, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw8bit":
        return [adamw_8bit(weights.values(), **options, sharded=sharded)]
    return list(adamw_with_muon(weights, matrices if config.optimizer == "muon" else (), **options).values())


def muon_matrices(decoder: DistributionConditionedDecoder) -> Sequence[str]:
    """The names of the trained weights that Muon updates: the matrices inside the backbone's blocks.

    Those of norms (AdaLN's modulations) are not among them: their only input is the time, and they start at zero.
    """
    blocks = tuple(f"transformer.{name}." for name in decoder.backbone.block_names)
    weights = trained_weights(decoder).items()
    return [name for name, weight in weights if name.startswith(blocks) and weight.ndim == 2 and ".norm" not in name]


def changed_by_training(decoder: DistributionConditionedDecoder) -> Set[str]:
    """The names of the backbone's weights that training changes, as they are called after `merge_lora`."""
    names = trained_weights(decoder.transformer)
    return {f"{name.split('.lora_')[0]}.weight" if ".lora_" in name else name for name in names}


def merge_lora(decoder: DistributionConditionedDecoder) -> None:
    """Adds low-rank updates, if there are any, to the weights they belong to; plain layers remain."""
    if getattr(decoder.transformer, "peft_config", None):
        decoder.transformer.fuse_lora()
        decoder.transformer.unload_lora()


def _add_lora(decoder: DistributionConditionedDecoder, rank: int, seed: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("LoRA training needs peft: install the 'train' extra, or train 'attention'") from error
    layers = list(decoder.backbone.lora_layers())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
