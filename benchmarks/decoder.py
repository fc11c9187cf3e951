"""Decoding: a picture of 576 image tokens, against diffusers' FluxFillPipeline with 512 text tokens

`python benchmarks/decoder.py` takes options of the shape and the device.

The weights are random and the same for both. On a CPU the shape is FLUX.1-Fill's in small: one joint block to two
single ones, heads of 128 channels; in small attention is a larger part of the arithmetic, which favours the shorter
sequence. On a GPU it is the published one. Theirs is the pipeline's own call, from embeddings of the text to latents:
its text encoders do not run, and in the place of its autoencoder, which has a grey picture to encode, there is one of
four channels. Ours is `pipelines.decode`, without an autoencoder; the schedule's table is there from the first,
uncounted picture. Both take turns in one run. Peak memory is that of the weights, the table's too, and the most that a
picture takes besides.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxTransformer2DModel
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.flux import GRID, IMAGE, SIZE, TEXT, card_of, published_steps, random_decoder, random_transformer
from benchmarks.memory import flux_sizes
from benchmarks.peak import peak
from benchmarks.targets import Target
from benchmarks.timing import NOT_MEASURED, compared, is_h100
from dcdd_core.evaluation.tables import markdown_table
from dcdd_core.models.backbones.flux_fill.files import FLUX_FILL_CONFIG
from dcdd_core.models.decoder import DistributionConditionedDecoder
from dcdd_core.pipelines.decode import decode
from dcdd_core.types import Condition

HEAD = ("what", "who", "seconds", "times ours", "peak memory, GB", "times ours")
#: Operations a second in bfloat16 that an H100 (SXM) gives dense matrices.
H100_OPERATIONS = 989e12
_STEPS = 30
_LIMIT = (f"{_STEPS} steps of FLUX.1-Fill's shape", "an H100's arithmetic alone")
_COUNTED = "a step of FLUX.1-Fill's shape, counted"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A FLUX.1-Fill with this many heads and joint blocks, and twice as many single ones, and how it is run."""

    heads: int = 8
    joint: int = 1
    steps: int = 2
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    def __str__(self) -> str:
        blocks = f"{self.joint} + {2 * self.joint} blocks of width {128 * self.heads}"
        how = f"{self.steps} steps of {blocks}, {self.dtype} on {self.device}"
        return how + (", compiled" if self.compiled else "")


_REAL = [
    Shape(heads=24, joint=19, steps=_STEPS, device="cuda", dtype=torch.bfloat16, compiled=compiled)
    for compiled in (False, True)
]

TARGETS = (
    Target(
        row=(str(Shape()), "diffusers"),
        column="times ours",
        relation="at least",
        bound=1.8,
        source="about the ratio of operations at the published shape, counted above",
    ),
    *(
        Target(
            row=(str(real), "ours"),
            column="seconds",
            rival=_LIMIT,
            relation="at most",
            bound=2.0,
            source="chosen: the limit is the operations at the GPU's peak",
        )
        for real in _REAL
    ),
    *(
        Target(
            row=(what, "ours"),
            column="peak memory, GB",
            rival=(what, "diffusers"),
            relation="at most",
            bound=0.56,
            source="6.46 of 11.90 G weights remain, and activations",
        )
        for what in (str(Shape()), str(_REAL[0]), _COUNTED)
    ),
)


class NoAutoencoder:
    """Latents of zeros, and latents for pixels: what is timed is the transformer."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.new_zeros(len(pixels), 16, *SIZE)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        return z


def pipeline_of(transformer: FluxTransformer2DModel) -> FluxFillPipeline:
    """diffusers' pipeline with FLUX.1-Fill's scheduler, without text encoders, and with next to no autoencoder."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[4] * 4,
        latent_channels=16,
        norm_num_groups=4,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )
    # The published scheduler_config.json.
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, max_image_seq_len=4096
    )
    pipeline = FluxFillPipeline(
        scheduler=scheduler,
        vae=nn.Module.to(vae, transformer.device, transformer.dtype),  # ModelMixin's own warns whatever the type.
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_diffusers(transformer: FluxTransformer2DModel, steps: int) -> Callable[[], torch.Tensor]:
    pipeline, config = pipeline_of(transformer), transformer.config
    like = {"device": transformer.device, "dtype": transformer.dtype}
    side = 8 * SIZE[0]
    image, mask = torch.zeros(1, 3, side, side), torch.ones(1, 1, side, side)
    text = torch.zeros(1, TEXT, config.joint_attention_dim, **like)
    pooled = torch.zeros(1, config.pooled_projection_dim, **like)

    def run() -> torch.Tensor:
        return pipeline(
            image=image,
            mask_image=mask,
            height=side,
            width=side,
            num_inference_steps=steps,
            latents=torch.randn(1, IMAGE, 64).to(**like),
            prompt_embeds=text,
            pooled_prompt_embeds=pooled,
            output_type="latent",
        ).images

    return run


def held(model: nn.Module) -> int:
    """Bytes of its weights, and of a decoder's tables."""
    table = model.backbone.table if isinstance(model, DistributionConditionedDecoder) else None
    tables = 0 if table is None else table.nbytes
    return tables + sum(weight.nbytes for weight in model.state_dict().values())


def contest(shape: Shape, *, rounds: int = 5) -> list[tuple[str, ...]]:
    """Rows of a shape, with random weights."""
    joint, heads = shape.joint, shape.heads
    config = {**FLUX_FILL_CONFIG, "num_layers": joint, "num_single_layers": 2 * joint, "num_attention_heads": heads}
    kind = {"device": shape.device, "dtype": shape.dtype}
    decoder = random_decoder(card_of(config), compiled=shape.compiled, **kind)
    transformer = random_transformer(config, **kind)
    if shape.compiled:
        transformer.compile_repeated_blocks(dynamic=False)
    condition = Condition(torch.randn(1, IMAGE, 8), torch.rand(1, IMAGE, 4), GRID)
    functions = {
        "ours": lambda: decode(decoder, NoAutoencoder(), condition, seeds=[0], steps=shape.steps),
        "diffusers": by_diffusers(transformer, shape.steps),
    }
    found = compared(str(shape), functions, rounds)
    models = {"ours": decoder, "diffusers": transformer}
    most = {who: held(models[who]) + peak(run, shape.device == "cuda") for who, run in functions.items()}
    return [(*row, f"{most[row[1]] / 1e9:.3g}", f"{most[row[1]] / most['ours']:.2f}") for row in found]


def counted() -> list[tuple[str, ...]]:
    """Rows of the published shape, counted and not run."""
    sizes, found = flux_sizes(), published_steps()
    most = {
        "ours": sizes["to paint, bfloat16"] + found["ours"].activations,
        "diffusers": sizes["as published"] + found["diffusers"].activations,
    }
    return [
        (
            _COUNTED,
            who,
            f"{found[who].tera:.2f} TFLOP",
            f"{found[who].tera / found['ours'].tera:.2f}",
            f"{most[who] / 1e9:.3g}",
            f"{most[who] / most['ours']:.2f}",
        )
        for who in ("ours", "diffusers")
    ]


def on_gpu() -> list[tuple[str, ...]]:
    """Rows of the published shape on a GPU, with an H100's limit."""
    limit = _STEPS * published_steps()["ours"].tera * 1e12 / H100_OPERATIONS
    limits = [(*_LIMIT, f"{limit:.3g}", "-", "-", "-")]
    if not torch.cuda.is_available():
        return [(f"{_LIMIT[0]} (GPU, bfloat16)", "both", NOT_MEASURED, "-", "-", "-"), *limits]
    found = [row for real in _REAL for row in contest(real, rounds=3)]
    return [*found, *(limits if is_h100() else [])]


def rows() -> list[tuple[str, ...]]:
    return [*contest(Shape()), *on_gpu(), *counted()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=8, help="of 128 channels (default: 8; FLUX.1: 24)")
    parser.add_argument("--joint", type=int, default=1, help="joint blocks, and half the single ones (default: 1)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="both run their blocks compiled")
    chosen = parser.parse_args()
    options = vars(chosen) | {"dtype": getattr(torch, chosen.dtype)}
    found = contest(rounds=options.pop("rounds"), shape=Shape(**options))
    print(markdown_table([HEAD, *found, *counted()]))


if __name__ == "__main__":
    main()
