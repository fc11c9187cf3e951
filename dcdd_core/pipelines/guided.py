"""Distribution guidance in use: predicted clean latents are pulled towards what a condition says about each position.

Shapes: B batch, N tokens (row-major h x w grid), D code dim, H W pixels of the painted image, h' w' latent grid,
C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from ..files import is_finite
from ..method.guidance import WEIGHTS, guide_clean, position_weights, pull_to, token_loss
from ..models.card import MOST_STRENGTH
from ..protocols import ImageTokenizer, LatentCodec
from ..settings import require_number
from ..types import Codebook, Condition, same_codebook
from .host import PLAIN, Host
from .images import stretched
from .oom import is_out_of_memory, one_by_one
from .tiles import LEAST_TILE, Decode, decode_in_tiles, gradient_at_once, gradient_in_tiles

#: Tiles that are halved because memory ran out keep at least this side, in latent positions.
LEAST_HALVED = 16
#: Times within this of `first` and `last` count as equal: those of the steps are rounded to float32.
_ROUNDING = 1e-6


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """How strongly and when predicted images are guided, and how positions are weighted.

    Attributes:
        strength: eta, 0..`MOST_STRENGTH`, the root mean square of a gradient step on latents of unit variance at t = 1;
            0 leaves only the pull.
        pull: 0..1, how close early steps stay to the soft VQ decode.
        first, last: steps at times last <= t <= first are guided, both in 0..1; 1 is pure noise.
        every: guide only every n-th step of the schedule, starting with the first.
        gradients: number of gradient steps at each guided step.
        weight: weight of a position: its "confidence" max p, or "uniform".

    Raises:
        ValueError: for values out of range.
    """

    strength: float = 0.4
    pull: float = 1.0
    first: float = 1.0
    last: float = 0.0
    every: int = 1
    gradients: int = 1
    weight: str = "confidence"

    def __post_init__(self):
        require_number("strength", self.strength, least=0, most=MOST_STRENGTH)
        for name in ("pull", "first", "last"):
            require_number(name, getattr(self, name), least=0, most=1)
        for name in ("every", "gradients"):
            require_number(name, getattr(self, name), whole=True, least=1)
        if self.last > self.first:
            raise ValueError(
                f"guidance ends at t = {self.last} and starts at {self.first}, but t falls from 1 to 0: swap them"
            )
        if self.weight not in WEIGHTS:
            raise ValueError(f"weight must be one of {', '.join(WEIGHTS)}, got {self.weight!r}")

    @property
    def off(self) -> bool:
        """Whether this guidance changes nothing."""
        return self.strength == 0 and self.pull == 0

    def guides(self, time: float, step: int = 0) -> bool:
        """Whether the step at this time is guided; `step` counts from 0."""
        within = self.last - _ROUNDING <= time <= self.first + _ROUNDING
        return not self.off and within and step % self.every == 0


@dataclass(kw_only=True, eq=False)
class Fallback:
    """What a guide has given up because memory ran out; shared by all its parts and steps.

    Attributes:
        twice: images are decoded twice, so that the activations of decoder and encoder are not held at the same time.
        tile: side of the tiles it now uses, in latent positions; None for the guide's own.
        forward: the forward decode of the image is tiled as well.
        alternating: only every second gradient is computed.
        pausing: the next gradient is skipped.
    """

    twice: bool = False
    tile: int | None = None
    forward: bool = False
    alternating: bool = False
    pausing: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenGuide:
    """Pulls predicted clean latents towards a condition, through a latent decoder and the VLM's VQ encoder.

    The gradient is computed image by image. If it runs out of memory, the image is decoded twice; then the backward
    pass through the decoder runs in tiles, halved in size down to `LEAST_HALVED`; if that is not enough either, only
    every second gradient is computed.

    Attributes:
        tokenizer: its encoder reads the images, resized to the token grid's own size.
        decode: decodes latents to the pixels that are guided: the codec, or a cheap stand-in for it.
        condition: of B images; only its code vectors and confidence are used.
        scale: s of the calibration (Eq. 14), or one for each image.
        soft: [B, C, h', w'] normalised latents of the VQ decode of the code vectors, the target of `pull`.
        free: bool [B or 1, N], positions without weight in the loss; None for none.
        area: [B or 1, 1, h', w'], 1 where latents are painted, 0 where they are kept and not corrected; None paints
            everything.
        tile: side in latent positions, at least `LEAST_TILE`: images are decoded twice, and the backward pass through
            `decode` runs in tiles of this side; None for neither. The first decode takes the whole image while that
            fits: without gradients it needs no more memory than the final decode, and a network that normalises over
            the image computes something else in tiles.
        host: told when memory runs out.

    Raises:
        ValueError: for another tokenizer's condition, and tiles that are too small.
    """

    tokenizer: ImageTokenizer
    decode: Decode
    condition: Condition
    scale: float | tuple[float, ...]
    soft: torch.Tensor
    options: GuidanceOptions = GuidanceOptions()
    free: torch.Tensor | None = None
    area: torch.Tensor | None = None
    tile: int | None = None
    host: Host = PLAIN
    fallback: Fallback = field(default_factory=Fallback, repr=False)

    def __post_init__(self):
        require_number("tile", self.tile, whole=True, least=LEAST_TILE, optional=True, remedy="None uses no tiles")
        if not same_codebook(self.condition.codebook, self.tokenizer.codebook.fingerprint):
            raise ValueError(
                f"this condition is of codebook {self.condition.codebook}, but {self.tokenizer.name} has "
                f"{self.tokenizer.codebook.fingerprint}: guide with the tokenizer of the VLM that sampled it"
            )

    def part(self, first: int, last: int) -> TokenGuide:
        """The guide of images first..last - 1."""
        free, area = (x if x is None or len(x) == 1 else x[first:last] for x in (self.free, self.area))
        condition, soft = self.condition.part(first, last), self.soft[first:last]
        scale = self.scale[first:last] if isinstance(self.scale, tuple) else self.scale
        return replace(self, condition=condition, scale=scale, soft=soft, free=free, area=area)

    def under(self, mask: torch.Tensor) -> TokenGuide:
        """The guide for images that are painted only in part; the guide itself if all of it is painted.

        A latent is painted if any of its pixels is. A position is free if its painted share is less than half of the
        largest share of any position, so that a thin mask is guided too.

        Args:
            mask: [B or 1, 1, H, W] of any size; 0 is kept, anything above is painted.
        """
        painted = (mask > 0).float()
        if bool(painted.all()):
            return self
        shares = F.adaptive_avg_pool2d(painted, self.condition.grid).flatten(1)
        free = shares < 0.5 * shares.amax(1, keepdim=True)
        free = free | (shares == 0) if self.free is None else free | (shares == 0) | self.free.to(free.device)
        return replace(self, free=free, area=F.adaptive_max_pool2d(painted, tuple(self.soft.shape[2:])))

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """The VQ encoder's features of images of any size: [B, 3, H, W] in -1..1 -> [B, N, D], differentiable."""
        return self.tokenizer.features(at_grid(self.tokenizer, pixels, self.condition.grid))

    def loss(self, clean: torch.Tensor) -> torch.Tensor:
        """L [B] of normalised latents [B, C, h', w'] (`method.guidance.token_loss`); differentiable."""
        return self.pixel_loss(self.decode(clean))

    def pixel_loss(self, pixels: torch.Tensor) -> torch.Tensor:
        """L [B] of images [B, 3, H, W] in -1..1, in float32; differentiable."""
        codebook, condition = self.tokenizer.codebook, self.condition
        if codebook.vectors.is_inference():
            codebook = Codebook(codebook.vectors)
        weights = position_weights(_saveable(condition.uncertainty[..., 0]), self.options.weight, self.free)
        features, code_vectors = self.features(pixels), _saveable(condition.code_vectors)
        if not isinstance(self.scale, tuple):
            return token_loss(features, code_vectors, weights, codebook, scale=self.scale)
        images = zip(features.split(1), code_vectors.split(1), weights.split(1), self.scale, strict=True)
        return torch.cat([token_loss(*own, codebook, scale=scale) for *own, scale in images])

    def gradient(self, clean: torch.Tensor) -> torch.Tensor:
        """dL/dx0 [B, C, h', w'], even where autograd is switched off; 0 where memory ran out (see `Fallback`).

        Raises:
            ValueError: if the gradient is not finite.
            RuntimeError: if not even every second gradient fits into memory.
        """
        fallback = self.fallback
        if fallback.alternating and fallback.pausing:
            fallback.pausing = False
            return torch.zeros_like(clean)
        while True:
            tile = fallback.tile or self.tile
            try:
                gradient = torch.cat([self.part(k, k + 1)._of_one(clean[k : k + 1], tile) for k in range(len(clean))])
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                if fallback.alternating:
                    raise RuntimeError(
                        "out of memory for distribution guidance, even for every second step in tiles of "
                        f"{tile} x {tile} latents: {self.host.remedy}"
                    ) from error
            # Outside the handler, which keeps the tensors of the failed attempt alive.
            if not self._falls_back(max(clean.shape[2:]), tile):
                return torch.zeros_like(clean)
        fallback.pausing = fallback.alternating
        if not is_finite(gradient):
            raise ValueError(
                "the gradient of distribution guidance holds NaN or infinity: load the autoencoder in float32"
            )
        return gradient

    def _of_one(self, clean: torch.Tensor, tile: int | None) -> torch.Tensor:
        """The gradient of one image."""
        with torch.inference_mode(False):
            x = clean.detach().to(torch.promote_types(clean.dtype, torch.float32), copy=True)
            if tile is None and not self.fallback.twice:
                return gradient_at_once(self.decode, x, self._by_pixels)
            return gradient_in_tiles(self.decode, x, self._by_pixels(self._pixels(x, tile)), tile)

    def _by_pixels(self, pixels: torch.Tensor) -> torch.Tensor:
        """dL/dpixels of one image."""
        with torch.enable_grad():
            pixels = pixels.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.pixel_loss(pixels).sum(), pixels)
        return gradient

    def _pixels(self, clean: torch.Tensor, tile: int | None) -> torch.Tensor:
        """Decodes one image's latents without gradients; in tiles if it does not fit as a whole."""
        if not self.fallback.forward:
            try:
                return decode_in_tiles(self.decode, clean, None)
            except (RuntimeError, MemoryError) as error:
                if tile is None or not is_out_of_memory(error):
                    raise
            self.fallback.forward = True
            self.host.on_fallback("distribution guidance looks at images that are decoded in tiles")
        return decode_in_tiles(self.decode, clean, tile)

    def _falls_back(self, side: int, tile: int | None) -> bool:
        """Picks a fallback after memory ran out: True to retry this step with it, False to skip this step.

        Args:
            side: the longer side of the latents.
            tile: the tile side that was tried; None for no tiles.
        """
        fallback = self.fallback
        if tile is None and not fallback.twice:
            fallback.twice = True
            self.host.on_fallback("distribution guidance decodes each image twice")
            return True
        tile = min(tile or side, side)
        if tile > LEAST_HALVED:
            fallback.tile = max(LEAST_HALVED, (tile + 1) // 2)
            self.host.on_fallback(
                f"distribution guidance continues in tiles of {fallback.tile} x {fallback.tile} latents"
            )
            return True
        fallback.alternating = True
        self.host.on_fallback("distribution guidance leaves this step out, and continues with every second one")
        return False

    def begin(self) -> None:
        """To be called before the first step of images: their first gradient is computed, also of every second one."""
        self.fallback.pausing = False

    def guided(self, time: float, step: int = 0) -> bool:
        """Whether the step at this time is guided; `step` counts from 0."""
        return self.options.guides(time, step)

    @torch.no_grad()
    def correct(self, clean: torch.Tensor, time: float) -> torch.Tensor:
        """x0 [B, C, h', w'] after the gradient steps and the pull.

        Raises:
            ValueError, RuntimeError: as `gradient`.
        """
        before = clean
        if self.options.strength:
            for _ in range(self.options.gradients):
                clean = self._step(clean, time)
        clean = pull_to(clean, self.soft, time, self.options.pull)
        return clean if self.area is None else torch.where(self.area.to(clean) > 0, clean, before)

    def _step(self, clean: torch.Tensor, time: float) -> torch.Tensor:
        gradient, strength = self.gradient(clean), self.options.strength
        if self.area is None:
            return guide_clean(clean, gradient, time, strength)
        area = self.area.to(gradient)
        moved = guide_clean(clean, gradient * area, time, strength)
        # eta is the root mean square over the painted area.
        return clean + (moved - clean) * area.mean((1, 2, 3), keepdim=True).sqrt().to(clean)

    @torch.no_grad()
    def agreement(self, pixels: torch.Tensor) -> torch.Tensor:
        """Share of positions [B] at which the encoder reads the condition's nearest code: a check on the result.

        If guidance has fooled the encoder instead of painting what the condition says, a little noise lowers the share.
        """
        tokens = self.tokenizer.tokens(self.features(pixels))
        wanted = self.tokenizer.tokens(self.condition.code_vectors)
        return (tokens == wanted.to(tokens.device)).float().mean(-1)


def at_grid(tokenizer: ImageTokenizer, pixels: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Resizes images [B, 3, H, W] of any size so that their tokens form an (h, w) grid; differentiable."""
    size = (grid[0] * tokenizer.factor, grid[1] * tokenizer.factor)
    if tuple(pixels.shape[2:]) == size:
        return pixels
    return F.interpolate(pixels, size, mode="bilinear", antialias=True)


def token_guide(
    tokenizer: ImageTokenizer,
    codec: LatentCodec,
    condition: Condition,
    *,
    scale: float | tuple[float, ...],
    options: GuidanceOptions | None = None,
    size: tuple[int, int] | None = None,
    decode: Decode | None = None,
    free: torch.Tensor | None = None,
    tile: int | None = None,
    host: Host = PLAIN,
) -> TokenGuide:
    """A guide for the latents of a codec.

    Args:
        scale: s of the VLM's calibration, or one for each image.
        size: (H, W) of the painted image; the token grid's own by default.
        decode: decodes the latents; the codec by default, or a cheap stand-in such as `models.cheap_decoder`.
        free, tile, host: see `TokenGuide`.

    Raises:
        ValueError: for another tokenizer's condition, and tiles that are too small.
        RuntimeError: if the soft VQ decode of a single image does not fit into memory.
    """
    return TokenGuide(
        tokenizer=tokenizer,
        decode=decode or (lambda clean: codec.decode(codec.denormalize(clean))),
        condition=condition,
        scale=scale,
        soft=soft_latents(tokenizer, codec, condition, size, host=host),
        options=options or GuidanceOptions(),
        free=free,
        tile=tile,
        host=host,
    )


@torch.no_grad()
def soft_latents(
    tokenizer: ImageTokenizer,
    codec: LatentCodec,
    condition: Condition,
    size: tuple[int, int] | None = None,
    *,
    host: Host = PLAIN,
) -> torch.Tensor:
    """z_soft: normalised latents [B, C, h', w'] of the VQ decode of a condition's code vectors, at (H, W) = `size`.

    Raises:
        RuntimeError: if a single image does not fit into memory.
    """

    def latents(k: int) -> torch.Tensor:
        pixels = tokenizer.decode_vectors(condition.part(k, k + 1).code_vectors, condition.grid)
        return codec.normalize(codec.encode(pixels if size is None else stretched(pixels, size)))

    return torch.cat(list(one_by_one(latents, len(condition.code_vectors), host)))


def sharpen(
    guide: TokenGuide,
    clean: torch.Tensor,
    *,
    steps: int = 8,
    on_step: Callable[[int, int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Minimises the loss alone, without a diffusion model: normalised gradient steps of decreasing length on latents.

    Args:
        clean: normalised latents [B, C, h', w'] to start from, such as `guide.soft`.
        steps: at least 1; step k has root mean square eta (1 - k / steps) with eta = `guide.options.strength`.
        on_step: called with (steps done, steps, latents); may raise to stop.

    Raises:
        ValueError, RuntimeError: as `TokenGuide.gradient`; ValueError for steps < 1.
    """
    require_number("steps", steps, whole=True, least=1)
    guide.begin()
    for k in range(steps):
        clean = guide_clean(clean, guide.gradient(clean), 1.0, guide.options.strength * (1 - k / steps))
        if on_step is not None:
            on_step(k + 1, steps, clean)
    return clean


def _saveable(values: torch.Tensor) -> torch.Tensor:
    """The same values, which autograd can save for the backward pass even if they were made in inference mode."""
    return values.clone() if values.is_inference() else values
