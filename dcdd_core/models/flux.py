"""The Distribution-Conditioned Diffusion Decoder: a FLUX.1-Fill transformer without text, conditioned on the tokens.

Shapes: B batch, N packed latent tokens (row-major h'/2 x w'/2), h' w' latent grid, M inner width, F input channels a
token (64 noisy latent, 64 masked image, 4 f^2 mask; f is the VAE's factor: 384 in all for FLUX.1-Fill's f = 8).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..method.latents import position_ids
from ..types import Calibration, Condition
from .checkpoints import load_strictly, read_tensors
from .condition_encoder import ConditionEncoder
from .flux_files import read_transformer

_FORMAT = "dcdd decoder 1"


@dataclass(frozen=True, kw_only=True)
class DecoderCard:
    """What a decoder bundle says of itself; stored as JSON in the header of its safetensors file.

    Attributes:
        base: the transformer that the trained weights go into, such as "black-forest-labs/FLUX.1-Fill-dev".
        base_config: its configuration, so that nothing is fetched to build it.
        tokenizer, codebook: name and fingerprint of the tokenizer whose code vectors it reads.
        code_dim, width: of the adapter.
        variant: what it was trained on: "discrete", "lcdm" or "lcdm+lc" (the paper's Table 4).
        calibration: applied to logits before mapping; None for none.
        reads: what of a VLM's output the decoder is served by default: its "logits" (the paper), these "anchored"
            to the sampled tokens, or the sampled "tokens" alone.
        resolution: side in pixels of the pictures it was trained on.
        pixels_per_token: side of the square of pixels that one token is painted as.
        vae_factor, vae_shift, vae_scale: of the autoencoder whose latents it paints.
        steps: default number of Euler steps.
        guidance: value of the distilled guidance embedding, where the base has one; served as trained.
        licence: of the weights.
    """

    base: str
    base_config: dict[str, Any]
    tokenizer: str
    codebook: str
    code_dim: int
    width: int
    variant: str = "lcdm+lc"
    calibration: Calibration | None = None
    reads: str = "logits"
    resolution: int = 384
    pixels_per_token: int = 16
    vae_factor: int = 8
    vae_shift: float = 0.1159
    vae_scale: float = 0.3611
    steps: int = 30
    guidance: float = 1.0
    licence: str = ""

    def __post_init__(self):
        if self.variant not in ("discrete", "lcdm", "lcdm+lc"):
            raise ValueError(f"variant must be 'discrete', 'lcdm' or 'lcdm+lc', got {self.variant!r}")
        if self.reads not in ("logits", "anchored", "tokens"):
            raise ValueError(f"reads must be 'logits', 'anchored' or 'tokens', got {self.reads!r}")
        if self.steps < 1 or self.pixels_per_token % self.vae_factor or self.pixels_per_token < self.vae_factor:
            raise ValueError(
                f"a decoder needs at least 1 step and whole latents a token, got steps={self.steps}, "
                f"pixels_per_token={self.pixels_per_token}, vae_factor={self.vae_factor}"
            )


class DistributionConditionedDecoder(nn.Module):
    """Transformer + adapter: predicts the velocity of packed latents (Eqs. 23-25).

    The text stream gets a sequence of length zero and a pooled vector of zeros: it then cannot reach the output, and
    the condition is the only guide. Before training the adapter adds nothing, so this is exactly the base model.
    """

    def __init__(self, transformer: FluxTransformer2DModel, card: DecoderCard):
        super().__init__()
        self.transformer = transformer
        self.adapter = ConditionEncoder(card.code_dim, card.width, transformer.inner_dim)
        self.card = card

    def condition_tokens(self, condition: Condition, latent_size: tuple[int, int]) -> torch.Tensor:
        """The condition's share of the fused tokens, [B, N, M]; the same at every step, so computed once (Eq. 22)."""
        return self.adapter(condition, latent_size)

    def forward(
        self, packed: torch.Tensor, condition: torch.Tensor, t: torch.Tensor, latent_size: tuple[int, int]
    ) -> torch.Tensor:
        """Velocity n - z0 at time t.

        Args:
            packed: [B, N, F] noisy latent, masked image and mask (`method.latents.fill_input`).
            condition: [B, N, M] from `condition_tokens`.
            t: [B] in 0..1, 1 is pure noise.
            latent_size: (h', w').

        Returns:
            [B, N, 64].
        """
        model = self.transformer
        hidden = model.x_embedder(packed) + condition  # Eq. 23
        pooled = hidden.new_zeros(len(hidden), model.config.pooled_projection_dim)
        # In float32 whatever the model's type: bfloat16 would round 1000 t to multiples of 4.
        times = (t.float() * 1000,)
        if model.config.guidance_embeds:
            times += (torch.full_like(times[0], self.card.guidance * 1000),)
        temb = model.time_text_embed(*times, pooled)
        rotary = model.pos_embed(position_ids(*latent_size).to(hidden.device))
        text = hidden.new_zeros(len(hidden), 0, hidden.shape[2])
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            text, hidden = block(hidden, text, temb, rotary)
        return model.proj_out(model.norm_out(hidden, temb))


def of_text_stream(name: str) -> bool:
    """Whether a transformer parameter of this name is of the text stream: with no text, it cannot reach the output."""
    return any(part in name for part in ("context", ".add_", "_add_", "norm_added"))


def save_bundle(
    path: str | Path,
    decoder: DistributionConditionedDecoder,
    *,
    trained: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a decoder bundle: one safetensors file with the adapter, the trained weights and the card.

    Args:
        trained: says of a transformer parameter's name whether it differs from the base; the others stay out.
        dtype: storage type.
    """
    tensors = {f"adapter.{k}": v for k, v in decoder.adapter.state_dict().items()}
    tensors |= {f"transformer.{k}": v for k, v in decoder.transformer.state_dict().items() if trained(k)}
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in tensors.items()}
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    save_file(tensors, temporary, metadata={"format": _FORMAT, "card": json.dumps(asdict(decoder.card))})
    os.replace(temporary, path)


def read_card(path: str | Path) -> DecoderCard:
    """The card of a bundle, without its weights.

    Raises:
        ValueError: if the file is missing, damaged, or no bundle.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected a DCDD decoder bundle (.safetensors)")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}): download it again") from error
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is no DCDD decoder bundle (its header has no {_FORMAT!r}); a bundle is made by training"
        )
    values = json.loads(header["card"])
    known = {field.name for field in fields(DecoderCard)}
    if set(values) != known:
        raise ValueError(
            f"{path} was written by another version: its card has {sorted(set(values) - known)} more and "
            f"{sorted(known - set(values))} less than this one reads; update ComfyUI-DCDD, or train it again"
        )
    if values["calibration"] is not None:
        values["calibration"] = Calibration.from_dict(values["calibration"])
    return DecoderCard(**values)


def load_decoder(
    path: str | Path,
    base: str | Path | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> DistributionConditionedDecoder:
    """Loads a bundle over its base model.

    Args:
        base: the base in a layout that `flux_files.read_transformer` reads: a diffusers folder, or a single file such
            as `flux1-fill-dev.safetensors`. Of it only what the bundle lacks is read; None if that is nothing.

    Raises:
        ValueError: naming the base that is needed, or the tensors that are missing, unexpected or of a wrong shape.
    """
    card = read_card(path)
    tensors = read_tensors(path, dtype=dtype, device=device)
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(**card.base_config)
        decoder = DistributionConditionedDecoder(transformer, card)
    own = {name.removeprefix("transformer.") for name in tensors if name.startswith("transformer.")}
    absent = set(transformer.state_dict()) - own
    if absent:
        if base is None:
            raise ValueError(
                f"{path} holds only what training changed; it needs its base model {card.base} as well "
                f"({len(absent)} tensors): give the folder or file that holds it"
            )
        of_base = read_transformer(base, transformer, needs=card.base, without=own, dtype=dtype, device=device)
        tensors |= {f"transformer.{name}": tensor for name, tensor in of_base.items()}
    load_strictly(decoder, tensors, f"{path}" + (f" over {base}" if base else ""))
    return decoder.eval().requires_grad_(False)
