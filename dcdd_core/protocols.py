"""What a model family must offer: a token sampler, an image tokenizer, a latent codec, a diffusion backbone.

Pipelines, nodes, commands and training depend only on these; `registry` finds the family that reads a given file.

Shapes: B batch, N tokens (a row-major h x w grid), K codes, D code dim, H W pixels, h' w' latent grid, C latent
channels, L latent tokens of a backbone, F and G channels of its packed latent and context, M its token width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from .settings import require_number
from .types import Codebook, TokenLogits

MOST_GUIDANCE = 1000.0
"""Limit of the guidance's absolute value; samples drawn with more than 20 are all alike."""
TEMPERATURES = (1e-3, 1000.0)
"""Range of the temperature, besides 0: beyond it, logits leave float32's range, or all codes are equally likely."""


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


#: Fields of `SamplingOptions` in which None stands for the sampler's own setting.
FILTERS = ("top_k", "top_p")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """How image tokens are drawn.

    Attributes:
        guidance: classifier-free guidance scale w, at most `MOST_GUIDANCE` in absolute value; 1 is the prompt alone, 0
            no prompt at all.
        temperature: T, within `TEMPERATURES`, or 0 for the most likely code (greedy).
        top_k, top_p: filters of the draw (`method.sampling`). None uses the settings of the sampler's authors, mostly
            no filter; top_k = 0 and top_p = 1 are off. The logits returned are unfiltered.

    Raises:
        ValueError: for values out of range.
    """

    guidance: float = 5.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        limits = {"least": -MOST_GUIDANCE, "most": MOST_GUIDANCE}
        require_number("guidance", self.guidance, **limits, remedy="1 switches it off")
        if self.temperature != 0:
            least, most = TEMPERATURES
            remedy = "or 0, which is greedy; 1 changes nothing"
            require_number("temperature", self.temperature, least=least, most=most, remedy=remedy)
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 0):
            raise ValueError(f"top_k must be a whole number >= 0, got {self.top_k!r}; 0 switches it off")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p must lie in (0, 1], got {self.top_p!r}; 1 switches it off")


@dataclass(frozen=True, kw_only=True, eq=False)
class Progress:
    """How far a sampler has got, whatever the order of the positions.

    Attributes:
        done, total: units of work, such as positions of a row-by-row sampler or passes of a parallel one.
        tokens: [B, N] int64, a view that must not be written to; meaningless where not yet `known`.
        known: bool [B, N], True where a token is decided.
        passes: network passes so far; 0 if the sampler does not count them.
        first: index of the first of these images among all that are sampled: `pipelines.sample` splits batches.
    """

    done: int
    total: int
    tokens: torch.Tensor
    known: torch.Tensor
    passes: int = 0
    first: int = 0


#: Guidance 5, temperature 1 and only the sampler's own filters: DeepSeek's settings for Janus.
DEFAULT_SAMPLING = SamplingOptions()


OnProgress = Callable[[Progress], None]
"""Called as sampling proceeds; what it raises ends the call."""

OnLayer = Callable[[int, int], None]
"""Called with (layers done, layers); what it raises ends the call."""


@runtime_checkable
class TokenSampler(Protocol):
    """Turns prompts into token logits: one distribution for each position of an image's token grid.

    Attributes:
        name: recorded in what it samples.
        grid: (h, w) of the token grid.
        codebook: the codes that the K columns of its logits refer to.
        model: its network, for hosts that move weights between devices.
        default_guidance: the guidance its authors sample with.
    """

    name: str
    grid: tuple[int, int]
    codebook: Codebook
    model: nn.Module
    default_guidance: float

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the weights, on which samples depend besides the arguments of `sample`."""
        ...

    def unknown_words(self, prompt: str) -> list[str]:
        """Words of the prompt that the sampler does not know, each once."""
        ...

    def known_words(self) -> list[str]:
        """Every word it knows, if it knows a fixed list; empty for a sampler that reads any text."""
        ...

    def working_memory(self, prompts: Sequence[str], *, options: SamplingOptions = DEFAULT_SAMPLING) -> int:
        """Estimated bytes that `sample` takes on the model's device besides the weights.

        Raises:
            ValueError: for prompts or options that `sample` refuses.
        """
        ...

    def sample(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        options: SamplingOptions = DEFAULT_SAMPLING,
        previous: TokenLogits | None = None,
        resample: torch.Tensor | None = None,
        on_progress: OnProgress | None = None,
        parallel: int | None = None,
        weights_resident: bool = False,
    ) -> TokenLogits:
        """Samples the tokens of one image per prompt; returns them with the logits from which they were drawn.

        A sample depends on its own prompt and seed, not on the rest of the batch. The global generator is not touched.

        Args:
            prompts: B texts.
            seeds: one per prompt.
            previous, resample: for an edit; give both or neither. Where `resample` (bool [N] or [B, N]) is False, the
                tokens and logits of `previous` are kept, and the result's `calibrated_at` tells which of these are
                calibrated already (`models.edits.kept_calibrated`).
            parallel: how many positions one pass may draw, for sequential samplers; up to rounding, the sample does not
                depend on it. None leaves it to the sampler; 1 draws one by one.
            weights_resident: the host's promise that its own linear layers compute what torch's do, and that all
                weights stay on the device during the call.

        Returns:
            TokenLogits on the model's device: logits float32 [B, N, K] after guidance and temperature and before any
            filter, source "vlm".

        Raises:
            ValueError: for arguments that do not fit each other or the model, and for logits that are not finite.
        """
        ...


@runtime_checkable
class TeacherForced(Protocol):
    """A `TokenSampler` that draws one token after the other, and so has distributions for an existing image, too."""

    def teacher_forced(
        self, prompts: Sequence[str], tokens: torch.Tensor, *, options: SamplingOptions = DEFAULT_SAMPLING
    ) -> TokenLogits:
        """The distributions from which the sampler would draw each token, given the prompt and the tokens before it.

        Args:
            prompts: B texts.
            tokens: int64 [B, N] of the images, as the sampler's image tokenizer encodes them.
            options: guidance and temperature; filters do not act on the logits returned.

        Returns:
            TokenLogits of these tokens on the model's device, logits float32 [B, N, K] after guidance and temperature,
            source "vlm". Up to rounding, an image's logits do not depend on the rest of the batch.

        Raises:
            ValueError: for prompts and tokens that do not fit each other or the model.
        """
        ...


@runtime_checkable
class ImageTokenizer(Protocol):
    """Images to tokens with proxy logits, and tokens or code vectors to images.

    Attributes:
        name: for messages and records.
        codebook: [K, D], unit rows.
        factor: side of a token in pixels.
        grid: token grid (h, w) of its VLM's images.
        model: its network.
    """

    name: str
    codebook: Codebook
    factor: int
    grid: tuple[int, int]
    model: nn.Module

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The token grid (h, w) of an image; a ValueError if a side is not a multiple of the factor."""
        ...

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Image-token features before quantisation (Eq. 9): pixels [B, 3, H, W] in -1..1 -> [B, N, D] float32.

        Differentiable, with frozen weights.
        """
        ...

    def tokens(self, features: torch.Tensor) -> torch.Tensor:
        """Nearest codes: [B, N, D] -> [B, N] int64."""
        ...

    def quantisation_errors(self, features: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Half the squared distances of features [B, N, D] to the codes of tokens [B, N], relative to a code's length.

        [B, N] float32, at least 0, on the features' device; 0 for a feature that equals its code.
        """
        ...

    def encode(self, pixels: torch.Tensor) -> TokenLogits:
        """Proxy logits (Eqs. 9-10) and tokens of images [B, 3, H, W] in -1..1."""
        ...

    def decode_vectors(self, vectors: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Code vectors or mixtures of them [B, N, D] -> pixels [B, 3, H, W] in -1..1."""
        ...

    def decode_tokens(self, tokens: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens [B, N] -> pixels [B, 3, H, W] in -1..1."""
        ...

    def working_memory(self, grid: tuple[int, int]) -> int:
        """Estimated bytes that encoding or decoding one image of this grid takes besides the weights."""
        ...


@runtime_checkable
class LatentCodec(Protocol):
    """Converts pixels to the latents that a backbone paints, and back.

    Attributes:
        factor: f, side of a latent position in pixels.
        channels: C.
        shift, scale: z0 = (latent - shift) scale; None if `normalize` does something else.
        model: its network; None where a host keeps it.
        comfy_format: name of the class in ComfyUI's `latent_formats` that describes these latents; "" for none.
    """

    factor: int
    channels: int
    shift: float | None
    scale: float | None
    model: nn.Module | None
    comfy_format: str

    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in -1..1 -> raw latents [B, C, h', w'] float32."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents [B, C, h', w'] -> [B, 3, H, W] float32 in -1..1; differentiable, with frozen weights."""
        ...

    def normalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Raw latents to z0, what the backbone diffuses (Eq. 17)."""
        ...

    def denormalize(self, z: torch.Tensor) -> torch.Tensor:
        """The inverse of `normalize`."""
        ...

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        """A cheap preview of raw latents as pixels [B, 3, H, W] in -1..1; None if there is no cheap way."""
        ...

    def working_memory(self, height: int, width: int) -> int:
        """Estimated bytes that encoding or decoding one image of this size takes besides the weights."""
        ...


@runtime_checkable
class StoredWeights(Protocol):
    """Tensors by name that stay on disk until they are read (`models.checkpoints.StoredTensors`)."""

    def __contains__(self, name: str) -> bool: ...

    def within(self, prefix: str) -> StoredWeights:
        """The tensors whose names start with `prefix`, by their names without it."""
        ...

    def read(
        self,
        names: Iterable[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> dict[str, torch.Tensor]:
        """The tensors with these names; all by default."""
        ...


@runtime_checkable
class Backbone(Protocol):
    """A diffusion transformer that paints latents on the rectified-flow path, conditioned on condition tokens alone.

    One instance wraps one network. Everything that differs between networks is here: how a latent and its mask become
    tokens, how velocity is predicted, what is trained, what painting does not need, and how the network is cut,
    streamed and compiled.

    Attributes:
        model: the network; bundles name its parameters as it does, with "transformer." in front.
        token_width: M.
        latent_channels: C.
        patch: side of one token in latent positions.
        blocks: its repeated blocks, in order of use.
        block_names: the names of the lists that hold the blocks.
    """

    model: nn.Module
    token_width: int
    latent_channels: int
    patch: int
    blocks: tuple[nn.Module, ...]
    block_names: tuple[str, ...]

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B, C, h', w'] -> tokens [B, L, F]."""
        ...

    def unpack(self, packed: torch.Tensor, latent_size: tuple[int, int]) -> torch.Tensor:
        """The inverse of `pack`."""
        ...

    def context(self, masked_latents: torch.Tensor, mask: torch.Tensor, factor: int) -> torch.Tensor:
        """What the network sees of an image to keep, [B, L, G].

        Args:
            masked_latents: normalised latents [B, C, h', w'] of the image with the masked part blank.
            mask: [B, 1, H, W], 1: paint.
            factor: the codec's f.
        """
        ...

    def velocity(
        self,
        packed: torch.Tensor,
        context: torch.Tensor,
        condition: torch.Tensor,
        t: torch.Tensor,
        latent_size: tuple[int, int],
    ) -> torch.Tensor:
        """n - z0 at time t (Eqs. 23-25).

        Args:
            packed: [B, L, F] noisy latents.
            context: [B or 1, L, G] from `context`.
            condition: [B, L, M], added to the tokens after their input projection (Eq. 23).
            t: [B] in 0..1, 1 is pure noise; on the CPU.

        Returns:
            [B, L, F].
        """
        ...

    def prepare(self, times: Sequence[float], like: torch.Tensor, on_layer: OnLayer | None = None) -> None:
        """Precomputes what all steps at these times share, in `like`'s dtype and on its device; call before them."""
        ...

    def default_shift(self, tokens: int, steps: int) -> float:
        """Mu of the time shift that its authors use for this many latent tokens and steps."""
        ...

    def unused(self, name: str) -> bool:
        """Whether the weight of this name cannot affect the output as used here; such weights are never read."""
        ...

    def drop_unused(self) -> None:
        """Removes from the network what is `unused`."""
        ...

    def trained_names(self, mode: str) -> Collection[str]:
        """Names of the parameters that training in this mode ("attention" or "all") changes."""
        ...

    def lora_layers(self) -> Collection[str]:
        """Names of the linear layers to which low-rank (LoRA) training adds."""
        ...

    def fold(self, weights: StoredWeights) -> None:
        """Removes what painting can read from disk once per schedule; the network can then not be trained or saved."""
        ...

    @property
    def folded(self) -> bool:
        """Whether `fold` was called."""
        ...

    def stream(self, device: torch.device) -> None:
        """Keeps the blocks in RAM, with each on the device only for its turn."""
        ...

    def compile(self) -> None:
        """Compiles the blocks, with one compilation for all blocks of a kind."""
        ...

    def working_memory(self, batch: int, latent_size: tuple[int, int]) -> int:
        """Estimated bytes that one step takes besides the weights."""
        ...


@runtime_checkable
class SamplerFamily(Protocol):
    """A VLM: how its files are recognised and read. `registry` has one for each.

    Attributes:
        name: such as "janus".
        expected: what it reads, in words for error messages.
    """

    name: str
    expected: str

    def reads(self, path: str) -> bool:
        """Whether these files are this family's; looks at configurations, never at weights."""
        ...

    def load_sampler(
        self,
        path: str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        int8: bool = False,
        computes_on: torch.device | str | None = None,
    ) -> TokenSampler:
        """The sampler; a ValueError for files that are incomplete or do not fit.

        Args:
            int8: keep linear weights in 8 bits.
            computes_on: where it will compute, if a host moves it from `device` later.
        """
        ...

    def load_tokenizer(
        self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> ImageTokenizer:
        """The image tokenizer alone."""
        ...

    def published_tokenizer(self) -> ImageTokenizer:
        """The published tokenizer, shapes only, on the meta device: for cost estimates."""
        ...


@runtime_checkable
class CodecFamily(Protocol):
    """A kind of latent codec; attributes as `SamplerFamily`."""

    name: str
    expected: str

    def reads(self, path: str) -> bool:
        """Whether these files are this family's."""
        ...

    def load(self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> LatentCodec:
        """The codec; a ValueError for files that do not fit."""
        ...

    def published(self) -> LatentCodec:
        """The published codec, shapes only, on the meta device."""
        ...


@runtime_checkable
class BackboneFamily(Protocol):
    """A kind of diffusion transformer.

    Attributes:
        name: such as "flux-fill".
        class_name: of the network, the "_class_name" of a `config.json` and of a decoder card's `base_config`.
        published_name, licence: of the published model.
        codec: name of the `CodecFamily` whose latents it paints.
    """

    name: str
    class_name: str
    published_name: str
    licence: str
    codec: str

    def config_of(self, path: str | None) -> dict[str, Any]:
        """The configuration of a base model's files; the published model's for None and for a single file."""
        ...

    def build(self, config: Mapping[str, Any], *, guidance: float = 1.0) -> Backbone:
        """A network with random weights, on torch's current device."""
        ...

    def find(self, path: str, backbone: Backbone, *, needs: str, without: Collection[str] = ()) -> StoredWeights:
        """The weights of a base model's files by the network's names, checked but not read.

        Args:
            needs: what to call the model in errors.
            without: names of weights that may be missing.
        """
        ...
