"""Unconditional priors: low-rank differences that turn a decoder into one without its condition.

Shapes: R rank, M token width.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..files import read_record, write_record
from ..int8_rows import rounded
from .adapter import NullCondition
from .bundle import DecoderOptions, load_decoder
from .decoder import DistributionConditionedDecoder

#: Mu of the prior's time shift; 0 makes the schedule uniform.
SHIFT = 0.0
_KIND = "low-rank difference to an unconditional prior"
_PARTS = (".attn.", ".ff.", ".proj_mlp.", ".proj_out.")


class LowRank(nn.Module):
    """W -> W + up down, with down [R, in] and up [out, R]."""

    def __init__(self, outputs: int, inputs: int, rank: int):
        super().__init__()
        self.down = nn.Parameter(torch.zeros(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """The changed weight [out, in], of the shape and dtype of `weight`."""
        return weight + (self.up @ self.down).to(weight)


class PriorDifference(nn.Module):
    """The differences of the layers that change, and one learned token in place of the condition's tokens.

    Attributes:
        layers: a `LowRank` for each layer, by the layer's name with "/" for ".".
        token: [M], added to every latent token.
    """

    def __init__(self, decoder: DistributionConditionedDecoder, rank: int):
        super().__init__()
        self.layers = nn.ModuleDict(
            {name.replace(".", "/"): LowRank(*layer.weight.shape, rank) for name, layer in _changed(decoder).items()}
        )
        self.token = nn.Parameter(torch.zeros(decoder.backbone.token_width))

    def start(self, seed: int) -> None:
        """Starts at a difference of zero that can be trained: random `down`, and `up` zero."""
        generator = torch.Generator().manual_seed(seed)
        for layer in self.layers.values():
            bound = 1 / math.sqrt(layer.down.shape[1])
            nn.init.uniform_(layer.down, -bound, bound, generator=generator)

    def attach(self, decoder: DistributionConditionedDecoder, *, merge: bool) -> None:
        """Turns the decoder into the prior: changes its transformer's weights and replaces its adapter by the token.

        Args:
            merge: add the differences to the weights permanently; False keeps them separate, to be trained.
        """
        for name, layer in _changed(decoder).items():
            difference = self.layers[name.replace(".", "/")]
            if merge:
                with torch.no_grad():
                    layer.weight = nn.Parameter(difference(layer.weight), requires_grad=False)
            else:
                parametrize.register_parametrization(layer, "weight", difference)
        decoder.adapter = NullCondition(self.token, decoder.backbone.patch)

    def save(self, path: Path) -> None:
        """Writes the difference in 8 bits.

        Raises:
            OSError: as `write_record`.
        """
        held = self.state_dict()
        write_record(path, _KIND, rounded(held, [name for name, value in held.items() if value.ndim == 2]), {})

    @classmethod
    def load(cls, path: Path, decoder: DistributionConditionedDecoder) -> PriorDifference:
        """Loads the difference in a file, for this decoder.

        Raises:
            ValueError: if the file is missing, damaged or made for other layers.
        """
        names = cls(decoder, 1).state_dict()
        tensors, _ = read_record(path, _KIND, names, (), int8_rows=True)
        made = cls(decoder, len(next(value for name, value in tensors.items() if name.endswith(".down"))))
        made.load_state_dict({name: value.float() for name, value in tensors.items()})
        return made.requires_grad_(False)


def load_prior(bundle: Path, difference: Path, *, options: DecoderOptions) -> DistributionConditionedDecoder:
    """Loads a decoder without its condition: it paints arbitrary images of the kind that it was trained on.

    Args:
        bundle: the decoder's bundle.
        difference: the file that `PriorDifference.save` wrote.

    Raises:
        ValueError: as `load_decoder`, and for a difference that is missing, damaged or made for other layers.
    """
    decoder = load_decoder(bundle, options=options)
    own = PriorDifference.load(difference, decoder).to(options.device)
    own.attach(decoder, merge=True)
    decoder.adapter.to(options.dtype)
    # It has no condition that could be dropped.
    decoder.card = replace(decoder.card, shift=SHIFT, condition_dropout=0.0, condition_guidance=1.0)
    return decoder.eval().requires_grad_(False)


def _changed(decoder: DistributionConditionedDecoder) -> dict[str, nn.Linear]:
    """The linear layers of attention and feed-forward, by name."""
    return {
        name: module
        for name, module in decoder.transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name != "proj_out"
        and any(part in f".{name}." for part in _PARTS)
        and not decoder.backbone.unused(f"{name}.weight")
    }
