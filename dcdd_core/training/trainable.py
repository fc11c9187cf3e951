"""Which of a decoder's weights are trained, and how they come back into plain ones."""

from __future__ import annotations

from collections.abc import Set

import torch
from torch import nn

from ..models.backbones.flux_fill.inference import of_text_stream
from ..models.decoder import DistributionConditionedDecoder

TRAINED = ("attention", "adapter", "lora", "all")


def choose_trained(decoder: DistributionConditionedDecoder, what: str, *, rank: int = 16, seed: int = 0) -> None:
    """Freezes all that is not trained, and holds what is in float32.

    The text stream is always frozen: it cannot reach the output.

    Args:
        what: "attention": the transformer's attention (its projections and norms) and the adapter, as in the paper;
            "adapter" alone; "lora": low-rank changes of the attention's projections (peft), and the adapter; "all".
            A single block's projection out of attention and MLP together counts as its MLP's [choice].
        rank, seed: of the low-rank changes, which start as none.

    Raises:
        ValueError: for another `what`, or "lora" without peft.
    """
    if what not in TRAINED:
        raise ValueError(f"what is trained must be one of {', '.join(TRAINED)}, got {what!r}")
    transformer = decoder.transformer
    decoder.requires_grad_(False)
    decoder.adapter.requires_grad_(True)
    if what == "lora":
        _add_lora(decoder, rank, seed)
    else:
        for name, weight in transformer.named_parameters():
            wanted = {"attention": ".attn." in name, "adapter": False, "all": True}[what]
            weight.requires_grad_(wanted and not of_text_stream(name))
    for weight in decoder.parameters():
        if weight.requires_grad:
            # A copy: what was read may still be the file itself, mapped.
            weight.data = weight.data.to(torch.float32, copy=True)


def trained_weights(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: weight for name, weight in decoder.named_parameters() if weight.requires_grad}


def frozen_weights(decoder: nn.Module) -> dict[str, nn.Parameter]:
    """What is not trained, by name."""
    return {name: weight for name, weight in decoder.named_parameters() if not weight.requires_grad}


def changed_by_training(decoder: DistributionConditionedDecoder) -> Set[str]:
    """The names of the transformer's weights that training changes, as they are after `merge_lora`."""
    names = trained_weights(decoder.transformer)
    return {f"{name.split('.lora_')[0]}.weight" if ".lora_" in name else name for name in names}


def merge_lora(decoder: DistributionConditionedDecoder) -> None:
    """Adds low-rank changes, if there are any, to the weights that they change; plain layers remain."""
    if getattr(decoder.transformer, "peft_config", None):
        decoder.transformer.fuse_lora()
        decoder.transformer.unload_lora()


def _add_lora(decoder: DistributionConditionedDecoder, rank: int, seed: int) -> None:
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("training by LoRA needs peft: install the 'train' extra, or train 'attention'") from error
    layers = [
        name
        for name, module in decoder.transformer.named_modules()
        if isinstance(module, nn.Linear) and ".attn." in name and not of_text_stream(name)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder.transformer.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
