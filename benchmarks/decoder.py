"""Decoding: one image of 576 image tokens, against diffusers' FluxFillPipeline with 512 text tokens

`python benchmarks/decoder.py` has options for shape and device.

Both use the same random weights. On a CPU the shape is a small FLUX.1-Fill: one joint block to two single blocks, heads
of 128 channels. At that size attention is a larger part of the FLOPs, which favours our shorter sequence. On a GPU the
shape is the published one. The baseline is the pipeline's own call from text embeddings to latents: text encoders do
not run, and its autoencoder, which encodes the blank image, is replaced by one of four channels. Ours is
`pipelines.decode` without an autoencoder; its table of modulations is computed in the warm-up round. Both alternate in
one run. Peak memory is that of the weights (and of the table) plus the peak of decoding one image.
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
#: FLOP/s of an H100 (SXM) in bfloat16 for dense matrices.
H100_FLOPS = 989e12
_STEPS = 30
_LIMIT = (f"{_STEPS} steps of FLUX.1-Fill's shape", "limit by an H100's FLOP/s")
_COUNTED = "one step at FLUX.1-Fill's shape, counted"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The shape of a FLUX.1-Fill, which has twice as many single blocks as joint ones, and how it is run."""

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
        source="about the ratio of FLOPs at the published shape, counted above",
    ),
    *(
        Target(
            row=(str(real), "ours"),
            column="seconds",
            baseline=_LIMIT,
            relation="at most",
            bound=2.0,
            source="chosen: the limit is all FLOPs at the GPU's peak rate",
        )
        for real in _REAL
    ),
    *(
        Target(
            row=(what, "ours"),
            column="peak memory, GB",
            baseline=(what, "diffusers"),
            relation="at most",
            bound=0.56,
            source="6.46 of 11.90 B parameters remain, plus activations",
        )
        for what in (str(Shape()), str(_REAL[0]), _COUNTED)
    ),
)


class NoAutoencoder:
    """A codec that encodes to zeros and decodes to the latents themselves, since only the transformer is timed."""

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.new_zeros(len(pixels), 16, *SIZE)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        return latents

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        return z


def pipeline_of(transformer: FluxTransformer2DModel) -> FluxFillPipeline:
    """diffusers' pipeline with FLUX.1-Fill's scheduler, without text encoders, and with a minimal autoencoder."""
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
        vae=nn.Module.to(vae, transformer.device, transformer.dtype),  # ModelMixin.to warns about every dtype.
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
    """Bytes of a model's weights, and of a decoder's table of modulations."""
    table = model.backbone.table if isinstance(model, DistributionConditionedDecoder) else None
    tables = 0 if table is None else table.nbytes
    return tables + sum(weight.nbytes for weight in model.state_dict().values())


def contest(shape: Shape, *, rounds: int = 5) -> list[tuple[str, ...]]:
    """Rows for a shape, measured with random weights."""
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
    """Rows for the published shape, counted without running it."""
    sizes, found = flux_sizes(), published_steps()
    most = {
        "ours": sizes["for inference, bfloat16"] + found["ours"].activations,
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
    """Rows for the published shape on a GPU, and the limit of an H100."""
    limit = _STEPS * published_steps()["ours"].tera * 1e12 / H100_FLOPS
    limits = [(*_LIMIT, f"{limit:.3g}", "-", "-", "-")]
    if not torch.cuda.is_available():
        return [(f"{_LIMIT[0]} (GPU, bfloat16)", "both", NOT_MEASURED, "-", "-", "-"), *limits]
    found = [row for real in _REAL for row in contest(real, rounds=3)]
    return [*found, *(limits if is_h100() else [])]


def rows() -> list[tuple[str, ...]]:
    return [*contest(Shape()), *on_gpu(), *counted()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--heads", type=int, default=8, help="number of heads of 128 channels (default: 8; FLUX.1: 24)")
    parser.add_argument(
        "--joint", type=int, default=1, help="joint blocks; there are twice as many single blocks (default: 1)"
    )
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="compile the blocks of both")
    chosen = parser.parse_args()
    options = vars(chosen) | {"dtype": getattr(torch, chosen.dtype)}
    found = contest(rounds=options.pop("rounds"), shape=Shape(**options))
    print(markdown_table([HEAD, *found, *counted()]))


if __name__ == "__main__":
    main()
