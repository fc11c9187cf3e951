"""The Distribution-Conditioned Diffusion Decoder: a FLUX.1-Fill transformer without text, conditioned on the tokens.

Shapes: B batch, N packed latent tokens (row-major h'/2 x w'/2), h' w' latent grid, M inner width, F input channels a
token (64 noisy latent, 64 masked image, 4 f^2 mask; f is the VAE's factor: 384 in all for FLUX.1-Fill's f = 8).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FluxTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from ..files import write_tensors
from ..method.latents import position_ids
from ..types import Calibration, Condition
from .adapter import ConditionEncoder
from .backbones.flux_fill.files import find_transformer
from .backbones.flux_fill.inference import (
    ModulationTable,
    OnLayer,
    drop_text,
    embed_time,
    fold_modulations,
    of_text_stream,
)
from .checkpoints import StoredTensors, find_tensors, load_strictly, misfits
from .int8 import store_in_int8

_FORMAT = "dcdd decoder 1"
#: What a decoder can be conditioned on: the paper's Table 4.
VARIANTS = ("discrete", "lcdm", "lcdm+lc")
#: The first diffusers that streams torchao's tensors.
_STREAMS_TORCHAO = (0, 38)


@dataclass(frozen=True, kw_only=True)
class DecoderCard:
    """What a decoder bundle says of itself; stored as JSON in the header of its safetensors file.

    Attributes:
        base: the transformer that the trained weights go into, such as "black-forest-labs/FLUX.1-Fill-dev".
        base_config: its configuration, so that nothing is fetched to build it.
        tokenizer, codebook: name and fingerprint of the tokenizer whose code vectors it reads.
        code_dim, width: of the adapter.
        variant: what it was trained on, one of `VARIANTS`.
        calibration: applied to logits before mapping; None for none.
        reads: what of a VLM's output the decoder is served by default: its "logits" (the paper), these "anchored"
            to the sampled tokens, or the sampled "tokens" alone.
        resolution: side in pixels of the pictures it was trained on.
        pixels_per_token: side of the square of pixels that one token is painted as; no whole number where Janus's 24 x
            24 tokens are painted as 512 x 512 pixels.
        vae_factor, vae_shift, vae_scale: of the autoencoder whose latents it paints.
        steps: default number of Euler steps.
        shift: default mu of the time shift (`method.flow.shift_time`); None for FLUX's, by resolution.
        guidance: value of the distilled guidance embedding, where the base has one; served as trained.
        licence: of the weights.

    Raises:
        ValueError: for an unknown variant or reading, and for numbers out of range.
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
    pixels_per_token: float = 16
    vae_factor: int = 8
    vae_shift: float = 0.1159
    vae_scale: float = 0.3611
    steps: int = 30
    shift: float | None = None
    guidance: float = 1.0
    licence: str = ""

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {self.variant!r}")
        if self.reads not in ("logits", "anchored", "tokens"):
            raise ValueError(f"reads must be 'logits', 'anchored' or 'tokens', got {self.reads!r}")
        if self.shift is not None and not math.isfinite(self.shift):
            raise ValueError(f"shift must be a finite number, or None for FLUX's, got {self.shift!r}")
        if self.steps < 1 or not self.pixels_per_token > 0 or self.vae_factor < 1:
            raise ValueError(
                f"a decoder needs at least 1 step, and pixels for a token and a latent, got steps={self.steps}, "
                f"pixels_per_token={self.pixels_per_token}, vae_factor={self.vae_factor}"
            )

    def painted_size(self, grid: tuple[int, int]) -> tuple[int, int]:
        """(H, W) in pixels of the picture that an (h, w) grid of tokens is painted as.

        `resolution` for the grid of the training; for others the nearest size that is made of whole packed latents.
        """
        unit = 2 * self.vae_factor
        height, width = (max(1, round(n * self.pixels_per_token / unit)) * unit for n in grid)
        return height, width


class DistributionConditionedDecoder(nn.Module):
    """Transformer + adapter: predicts the velocity of packed latents (Eqs. 23-25).

    The text stream gets a sequence of length zero and a pooled vector of zeros: it then cannot reach the output, and
    the condition is the only guide. Before training the adapter adds nothing, so this is exactly the base model.

    Args:
        transformer: with or without its text stream (`flux_inference.drop_text`).
        table: where the modulations come from if the transformer's own layers for them were taken out
            (`flux_inference.fold_modulations`); such a decoder paints, and cannot be trained.
    """

    def __init__(self, transformer: FluxTransformer2DModel, card: DecoderCard, *, table: ModulationTable | None = None):
        super().__init__()
        self.transformer = transformer
        self.adapter = ConditionEncoder(card.code_dim, card.width, transformer.inner_dim)
        self.card = card
        self.table = table
        self._rotary: tuple[tuple, tuple[torch.Tensor, torch.Tensor]] | None = None

    # The adapter's: the transformer's layers may wait elsewhere for their turn, or be stored in 8 bits.
    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.adapter.norm.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.adapter.norm.weight.dtype

    def prepare(self, times: Sequence[float], *, on_layer: OnLayer | None = None) -> None:
        """Call before steps at these times (0..1): what is computed once for all of them is computed now, if at all.

        Args:
            on_layer: see `ModulationTable.prepare`.
        """
        if self.table is not None:
            self.table.prepare(times, guidance=self._guidance, like=self.adapter.norm.weight, on_layer=on_layer)

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
            t: [B] in 0..1, 1 is pure noise; on the CPU, nothing waits for the device.
            latent_size: (h', w').

        Returns:
            [B, N, 64].
        """
        model = self.transformer
        hidden = model.x_embedder(packed) + condition  # Eq. 23
        blocks = blocks_of(model)
        *modulations, last = self._modulations(t, hidden, len(blocks) + 1)
        rotary = self._rotary_at(latent_size, hidden.device)
        text = hidden.new_zeros(len(hidden), 0, hidden.shape[2])
        for block, modulation in zip(blocks, modulations, strict=True):
            # The text that comes back has other strides, for which a compiled block would be compiled again.
            _, hidden = block(hidden, text, modulation, rotary)
        return model.proj_out(model.norm_out(hidden, last))

    def _rotary_at(self, latent_size: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary embedding of a size's positions, the same at every step: that of the last size is kept."""
        key = (tuple(latent_size), device)
        if self._rotary is None or self._rotary[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # A training may come after a host's inference.
                self._rotary = key, self.transformer.pos_embed(position_ids(*latent_size).to(device))
        return self._rotary[1]

    @property
    def _guidance(self) -> float | None:
        return self.card.guidance if self.transformer.config.guidance_embeds else None

    def _modulations(self, t: torch.Tensor, hidden: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        """What each modulated norm takes: its own modulation from the table, or the embedding to compute it from."""
        if self.table is not None:
            return self.table.at(t, guidance=self._guidance, like=hidden)
        model = self.transformer
        pooled = hidden.new_zeros(len(hidden), model.config.pooled_projection_dim)
        t = t.to(hidden.device)
        return [embed_time(model.time_text_embed, t, guidance=self._guidance, pooled=pooled)] * count


def blocks_of(transformer: FluxTransformer2DModel) -> tuple[nn.Module, ...]:
    """The joint and the single blocks, in the order of use."""
    return (*transformer.transformer_blocks, *transformer.single_transformer_blocks)


def save_bundle(
    path: str | Path,
    decoder: DistributionConditionedDecoder,
    *,
    trained: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a decoder bundle: one safetensors file with the adapter, the trained weights and the card.

    Without the text stream: it cannot reach the output, so a bundle paints, and can be trained further, without it.

    Args:
        trained: says of a transformer parameter's name whether it differs from the base; the others stay out.
        dtype: storage type.

    Raises:
        ValueError: for a decoder whose modulations are a table.
        OSError: if it cannot be written, such as on a full disk; what was there stays.
    """
    if decoder.table is not None:
        raise ValueError(
            "this decoder was loaded for painting and does not hold all its weights: load it with fold=False"
        )
    tensors = {f"adapter.{k}": v for k, v in decoder.adapter.state_dict().items()}
    of_transformer = decoder.transformer.state_dict()
    tensors |= {f"transformer.{k}": v for k, v in of_transformer.items() if trained(k) and not of_text_stream(k)}
    tensors = {k: v.to("cpu", dtype) for k, v in tensors.items()}
    write_tensors(path, tensors, {"format": _FORMAT, "card": json.dumps(asdict(decoder.card))})


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
    try:
        values = json.loads(header["card"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is damaged: its card is no JSON ({error}); download it again") from error
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
    fold: bool = True,
    eight_bit: bool = False,
    streamed: bool = False,
    compiled: bool = False,
) -> DistributionConditionedDecoder:
    """Loads a bundle over its base model, without the text stream.

    Of FLUX.1-Fill's 11.90 billion parameters, 6.46 are held for painting and 8.66 for training. What is dropped is not
    read; what the modulations are computed from is read when a schedule is new (`flux_inference.ModulationTable`), so
    the files must stay where they are.

    Args:
        base: the base in a layout that `flux_files.find_transformer` reads: a diffusers folder, or a single file such
            as `flux1-fill-dev.safetensors`. Of it only what the bundle lacks is read; None if that is nothing.
        device: where it computes.
        dtype: that it computes in; None takes the stored types.
        fold: False keeps the layers that compute the modulations: for training, and for `save_bundle`.
        eight_bit: the blocks' linear weights are stored as int8, which halves what bfloat16 takes, at a small loss
            (`int8.store_in_int8`; `python -m benchmarks int8` has it beside diffusers' layerwise casting). Compiled
            besides, it is slower than alone on a CPU.
        streamed: the blocks wait in RAM, and each is on `device` for its turn alone, none fetched ahead: slow, but
            FLUX.1-Fill then takes the room of one block (diffusers' group offloading, whose fetching ahead hangs on a
            forward pass that is not ours).
        compiled: the blocks run compiled, one compilation for all of a kind: the first picture of a size and batch
            waits for it, others of the same compile nothing. After eight sizes and batches, which is torch's limit
            (`torch._dynamo.config.recompile_limit`), new ones run as they are.

    Raises:
        ValueError: naming the base that is needed, or the tensors that are missing, unexpected or of a wrong shape; for
            ways of holding the weights that exclude each other; for `eight_bit` without torchao.
    """
    card = read_card(path)
    with torch.device("meta"):
        decoder = DistributionConditionedDecoder(FluxTransformer2DModel(**card.base_config), card)
    return fill_decoder(
        decoder,
        _find(path, base, decoder),
        what=f"{path}" + (f" over {base}" if base else ""),
        device=device,
        dtype=dtype,
        fold=fold,
        eight_bit=eight_bit,
        streamed=streamed,
        compiled=compiled,
    )


def fill_decoder(
    decoder: DistributionConditionedDecoder,
    stored: StoredTensors,
    *,
    what: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    fold: bool = True,
    eight_bit: bool = False,
    streamed: bool = False,
    compiled: bool = False,
) -> DistributionConditionedDecoder:
    """A decoder on "meta", whole, gets its weights, and is held as `load_decoder` says.

    Args:
        stored: of all that can reach the output; only what is held is read.
        what: names them in errors.

    Raises:
        ValueError: as `load_decoder`.
    """
    if (eight_bit and not fold) or (streamed and (compiled or not fold)):
        raise ValueError(
            "weights in 8 bits cannot be trained, and weights that change place between the steps neither compiled nor "
            f"trained: got eight_bit={eight_bit}, streamed={streamed}, compiled={compiled}, fold={fold}"
        )
    if eight_bit and streamed and tuple(map(int, diffusers.__version__.split(".")[:2])) < _STREAMS_TORCHAO:
        raise ValueError(
            f"weights in 8 bits are streamed by diffusers 0.38 or newer, this is {diffusers.__version__}: upgrade it, "
            "or load with one of eight_bit and streamed"
        )
    transformer = decoder.transformer
    drop_text(transformer)
    if fold:
        decoder.table = fold_modulations(transformer, stored.within("transformer."))
    tensors: dict[str, torch.Tensor] = {}
    blocks = {name: part for name, part in decoder.named_modules() if name.rpartition(".")[0].endswith("_blocks")}
    # Each at once in the type and the place that it stays in: in others, all of them need not fit.
    place = "cpu" if streamed else device
    for name, block in blocks.items():
        load_strictly(block, stored.within(f"{name}.").read(block.state_dict(), dtype=dtype, device=place), what)
        if eight_bit:
            store_in_int8(block, place)
        tensors |= {f"{name}.{of}": tensor for of, tensor in block.state_dict().items()}
    rest = [name for name in decoder.state_dict() if name not in tensors]
    load_strictly(decoder, tensors | stored.read(rest, dtype=dtype, device=device), what)
    decoder.eval().requires_grad_(False)
    if streamed:
        transformer.enable_group_offload(torch.device(device), offload_type="block_level", num_blocks_per_group=1)
        # diffusers would fetch the ends for its own forward pass, which is not ours.
        for end in (transformer.x_embedder, transformer.proj_out):
            end.to(device)
    if compiled:
        transformer.compile_repeated_blocks(dynamic=False)
    return decoder


def _find(path: str | Path, base: str | Path | None, decoder: DistributionConditionedDecoder) -> StoredTensors:
    """All tensors of a whole decoder but the text stream's: those of the bundle, and the base's for the others."""
    expected = {name: value.shape for name, value in decoder.state_dict().items()}
    of_bundle = find_tensors(path, expected, type(decoder).__name__)
    without = {name for name in expected if name in of_bundle or of_text_stream(name)}
    of_transformer = {name for name in expected if name.startswith("transformer.")}
    if missing := sorted(expected.keys() - of_transformer - without):
        raise ValueError(f"{path} does not fit {type(decoder).__name__}; {misfits(missing=missing)}")
    absent = of_transformer - without
    if not absent:
        return of_bundle
    if base is None:
        raise ValueError(
            f"{path} holds only what training changed; it needs its base model {decoder.card.base} as well "
            f"({len(absent)} tensors): give the folder or file that holds it"
        )
    own = {name.removeprefix("transformer.") for name in of_transformer & without}
    found = find_transformer(base, decoder.transformer, needs=decoder.card.base, without=own)
    return found.below("transformer.") | of_bundle
