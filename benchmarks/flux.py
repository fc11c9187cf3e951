"""FLUX.1-Fill's published shape with random weights, and the FLOPs and memory of a step, on the meta device."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.peak import Peak
from dcdd_core.method.latents import position_ids
from dcdd_core.models.backbones.flux_fill.backbone import FluxFill
from dcdd_core.models.backbones.flux_fill.files import FLUX_FILL_CONFIG
from dcdd_core.models.backbones.flux_fill.inference import drop_text
from dcdd_core.models.bundle import DecoderOptions, fill_decoder
from dcdd_core.models.card import DecoderCard
from dcdd_core.models.decoder import DistributionConditionedDecoder

#: Number of text tokens; token grid and latent size of an image of 384 x 384 pixels.
TEXT, GRID, SIZE = 512, (24, 24), (48, 48)
IMAGE = GRID[0] * GRID[1]


class RandomTensors:
    """Stands for a model's files: random weights, drawn in bfloat16 each time they are read.

    Args:
        shapes: name -> shape.
        prefix: prepended to names for the seed, so that a weight's values depend on its full name alone.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], prefix: str = ""):
        self._shapes, self._prefix = dict(shapes), prefix

    def within(self, prefix: str) -> RandomTensors:
        inside = {name.removeprefix(prefix): s for name, s in self._shapes.items() if name.startswith(prefix)}
        return RandomTensors(inside, self._prefix + prefix)

    def read(
        self, names: Iterable[str], *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu"
    ) -> dict[str, torch.Tensor]:
        drawn = {}
        for name in names:
            generator = torch.Generator(device).manual_seed(zlib.crc32((self._prefix + name).encode()))
            weight = torch.empty(self._shapes[name], dtype=torch.bfloat16, device=device)
            drawn[name] = weight.normal_(std=0.02, generator=generator).to(dtype)
        return drawn


def card_of(config: dict) -> DecoderCard:
    return DecoderCard(base="random", base_config=config, tokenizer="", codebook="", code_dim=8, width=128)


def random_decoder(card: DecoderCard, **ways) -> DistributionConditionedDecoder:
    """Our decoder with random weights; `ways` are fields of `DecoderOptions`."""
    with torch.device("meta"):
        decoder = DistributionConditionedDecoder.build(card)
    stored = RandomTensors({name: weight.shape for name, weight in decoder.state_dict().items()})
    return fill_decoder(decoder, stored, DecoderOptions(**ways), what="random weights")


def random_transformer(config: dict, *, device: torch.device | str, dtype: torch.dtype) -> FluxTransformer2DModel:
    """diffusers' full transformer with the same weights as `random_decoder`."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**config)
    shapes = {name: weight.shape for name, weight in transformer.state_dict().items()}
    drawn = RandomTensors(shapes, "transformer.").read(shapes, dtype=dtype, device=device)
    transformer.load_state_dict(drawn, assign=True)
    return transformer.eval().requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Cost of one step for one image: TFLOP, and bytes of activations in bfloat16."""

    tera: float
    activations: int


def published_steps() -> dict[str, Step]:
    """The cost of a step at FLUX.1-Fill's shape: diffusers' with 512 text tokens, and ours. Attention scores count as a
    full matrix."""
    with torch.device("meta"), torch.no_grad():
        transformer = FluxTransformer2DModel(**FLUX_FILL_CONFIG)
        decoder = DistributionConditionedDecoder(FluxFill(transformer), card_of(dict(FLUX_FILL_CONFIG)))
        decoder.to(torch.bfloat16)
        config, like = transformer.config, {"dtype": torch.bfloat16}
        packed, t = torch.zeros(1, IMAGE, config.in_channels, **like), torch.ones(1)
        condition = torch.zeros(1, IMAGE, transformer.inner_dim, **like)
        text = torch.zeros(1, TEXT, config.joint_attention_dim, **like)
        pooled = torch.zeros(1, config.pooled_projection_dim, **like)
        places = position_ids(*SIZE).to("meta")

        def theirs() -> None:
            transformer(packed, text, pooled, t, places, torch.zeros(TEXT, 3), t, return_dict=False)

        def ours() -> None:
            decoder(packed[..., :64], packed[..., 64:], condition, t, SIZE)

        found = {}
        for who, step in (("diffusers", theirs), ("ours", ours)):
            with FlopCounterMode(display=False) as counted, Peak() as held:
                step()
            found[who] = Step(tera=counted.get_total_flops() / 1e12, activations=held.peak)
            if who == "diffusers":
                drop_text(transformer)
    return found
