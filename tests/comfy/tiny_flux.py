"""The files that workflows 8 and 9 ask for, as small as ComfyUI's own loaders let them be, with random weights.

ComfyUI tells an architecture from the names and shapes in its file. FLUX.1-dev's width, its text's widths (in 0.3.64)
and its autoencoder's are fixed there, its depth is not: so the transformer has one double and one single block, the
autoencoder is a whole one, and the text encoders are as shallow, and inside as narrow, as `TEXT_ENCODERS` says, which
ComfyUI has to be told (see /test/text_encoders in tools_pack.py).
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]

#: Channels of the transformer, of each of its heads, of what CLIP-L and T5 give it, and inside of their layers.
WIDTH, HEAD, CLIP_WIDTH, T5_WIDTH, INNER = 3072, 128, 768, 4096, 32
LAYERS, HEADS = 2, 2

#: What ComfyUI's configurations of the two are overridden with; "model_config" is that of CLIP-L.
TEXT_ENCODERS = {
    "model_config": {"intermediate_size": INNER, "num_attention_heads": HEADS, "num_hidden_layers": LAYERS},
    "t5xxl_model_config": {"d_ff": INNER, "d_kv": INNER // HEADS, "num_heads": HEADS, "num_layers": LAYERS},
}


def write_flux(models: Path) -> list[Path]:
    """The four files under the names that the workflows have for them, 0.9 GB in all, in ComfyUI's models folder."""
    files = {
        models / "diffusion_models" / "flux1-dev.safetensors": (transformer(), torch.float8_e4m3fn),
        models / "vae" / "ae.safetensors": (autoencoder(), torch.bfloat16),
        models / "text_encoders" / "clip_l.safetensors": (clip_l(), torch.bfloat16),
        models / "text_encoders" / "t5xxl_fp8_e4m3fn.safetensors": (t5(), torch.float8_e4m3fn),
    }
    for path, (shapes, dtype) in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: _weights(name, shape, dtype) for name, shape in shapes.items()}, path)
    return list(files)


def transformer() -> Shapes:
    """FLUX.1-dev in BFL's layout: 64 channels of packed latents, guidance, one block of each kind."""
    shapes = _linear("img_in", 64, WIDTH) | _linear("txt_in", T5_WIDTH, WIDTH)
    for name, entering in {"time_in": 256, "guidance_in": 256, "vector_in": CLIP_WIDTH}.items():
        shapes |= _linear(f"{name}.in_layer", entering, WIDTH) | _linear(f"{name}.out_layer", WIDTH, WIDTH)
    for stream in ("double_blocks.0.img", "double_blocks.0.txt"):
        shapes |= _linear(f"{stream}_mod.lin", WIDTH, 6 * WIDTH) | _linear(f"{stream}_attn.qkv", WIDTH, 3 * WIDTH)
        shapes |= _linear(f"{stream}_attn.proj", WIDTH, WIDTH) | _query_and_key(f"{stream}_attn.norm")
        shapes |= _linear(f"{stream}_mlp.0", WIDTH, 4 * WIDTH) | _linear(f"{stream}_mlp.2", 4 * WIDTH, WIDTH)
    shapes |= _linear("single_blocks.0.linear1", WIDTH, 7 * WIDTH) | _linear(
        "single_blocks.0.linear2", 5 * WIDTH, WIDTH
    )
    shapes |= _linear("single_blocks.0.modulation.lin", WIDTH, 3 * WIDTH) | _query_and_key("single_blocks.0.norm")
    return (
        shapes | _linear("final_layer.linear", WIDTH, 64) | _linear("final_layer.adaLN_modulation.1", WIDTH, 2 * WIDTH)
    )


def autoencoder() -> Shapes:
    """FLUX's ae.safetensors: 8 pixels a latent, 16 channels."""
    widths, channels = (128, 256, 512, 512), 16
    shapes = _conv("encoder.conv_in", 3, widths[0]) | _conv("decoder.conv_in", channels, widths[-1])
    entering = widths[0]
    for level, width in enumerate(widths):
        for block in range(2):
            shapes |= _residual(f"encoder.down.{level}.block.{block}", entering, width)
            entering = width
        if level < 3:
            shapes |= _conv(f"encoder.down.{level}.downsample.conv", width, width)
    for level, width in reversed([*enumerate(widths)]):
        for block in range(3):
            shapes |= _residual(f"decoder.up.{level}.block.{block}", entering, width)
            entering = width
        if level > 0:
            shapes |= _conv(f"decoder.up.{level}.upsample.conv", width, width)
    for part, last, leaving in (("encoder", widths[-1], 2 * channels), ("decoder", widths[0], 3)):
        shapes |= _residual(f"{part}.mid.block_1", widths[-1], widths[-1])
        shapes |= _norm(f"{part}.mid.attn_1.norm", widths[-1])
        for name in ("q", "k", "v", "proj_out"):
            shapes |= _conv(f"{part}.mid.attn_1.{name}", widths[-1], widths[-1], side=1)
        shapes |= _residual(f"{part}.mid.block_2", widths[-1], widths[-1])
        shapes |= _norm(f"{part}.norm_out", last) | _conv(f"{part}.conv_out", last, leaving)
    return shapes


def clip_l() -> Shapes:
    """CLIP-L's text model in the transformers layout."""
    top = "text_model"
    shapes = {
        f"{top}.embeddings.token_embedding.weight": (49408, CLIP_WIDTH),
        f"{top}.embeddings.position_embedding.weight": (77, CLIP_WIDTH),
        "text_projection.weight": (CLIP_WIDTH, CLIP_WIDTH),
    }
    for layer in (f"{top}.encoder.layers.{k}" for k in range(LAYERS)):
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= _linear(f"{layer}.self_attn.{name}", CLIP_WIDTH, CLIP_WIDTH)
        shapes |= _norm(f"{layer}.layer_norm1", CLIP_WIDTH) | _norm(f"{layer}.layer_norm2", CLIP_WIDTH)
        shapes |= _linear(f"{layer}.mlp.fc1", CLIP_WIDTH, INNER)
        shapes |= _linear(f"{layer}.mlp.fc2", INNER, CLIP_WIDTH)
    return shapes | _norm(f"{top}.final_layer_norm", CLIP_WIDTH)


def t5() -> Shapes:
    """T5's encoder in the transformers layout."""
    buckets = 32
    shapes: Shapes = {
        "shared.weight": (32128, T5_WIDTH),
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight": (buckets, HEADS),
        "encoder.final_layer_norm.weight": (T5_WIDTH,),
    }
    for block in (f"encoder.block.{k}.layer" for k in range(LAYERS)):
        shapes |= {f"{block}.0.SelfAttention.{name}.weight": (INNER, T5_WIDTH) for name in "qkv"}
        shapes |= {f"{block}.0.SelfAttention.o.weight": (T5_WIDTH, INNER)}
        shapes |= {f"{block}.{k}.layer_norm.weight": (T5_WIDTH,) for k in (0, 1)}
        shapes |= {f"{block}.1.DenseReluDense.{name}.weight": (INNER, T5_WIDTH) for name in ("wi_0", "wi_1")}
        shapes |= {f"{block}.1.DenseReluDense.wo.weight": (T5_WIDTH, INNER)}
    return shapes


def _linear(name: str, entering: int, leaving: int) -> Shapes:
    return {f"{name}.weight": (leaving, entering), f"{name}.bias": (leaving,)}


def _conv(name: str, entering: int, leaving: int, side: int = 3) -> Shapes:
    return {f"{name}.weight": (leaving, entering, side, side), f"{name}.bias": (leaving,)}


def _norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _query_and_key(name: str) -> Shapes:
    return {f"{name}.{kind}_norm.scale": (HEAD,) for kind in ("query", "key")}


def _residual(name: str, entering: int, leaving: int) -> Shapes:
    shapes = _norm(f"{name}.norm1", entering) | _conv(f"{name}.conv1", entering, leaving)
    shapes |= _norm(f"{name}.norm2", leaving) | _conv(f"{name}.conv2", leaving, leaving)
    return shapes if entering == leaving else shapes | _conv(f"{name}.nin_shortcut", entering, leaving, side=1)


#: A prime, so that the rows of no matrix repeat.
_NOISE = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))


def _weights(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Norms at 1, biases at 0, all else normal at 1/sqrt(fan-in): the same noise again and again, which is quick."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0).to(dtype)
    noise = (_NOISE / prod(shape[1:]) ** 0.5).to(dtype)
    values = torch.empty(prod(shape), dtype=dtype)
    for part in values.split(len(noise)):
        part.copy_(noise[: len(part)])
    return values.view(shape)
