"""Distribution guidance at work: predicted clean latents, pulled towards what a condition says of each position.

Shapes: B batch, N tokens (row-major h x w grid), D code dim, H W pixels of the painted image, h' w' latent grid,
C latent channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..files import is_finite
from ..method.guidance import WEIGHTS, guide_clean, position_weights, pull_to, token_loss
from ..protocols import ImageTokenizer, LatentCodec
from ..settings import require_number
from ..types import Condition, same_codebook

#: The strongest guidance: ten times the spread of the latents in one step.
MOST_STRENGTH = 10.0
#: Normalised latents [B, C, h', w'] -> pixels [B, 3, H, W] in -1..1, differentiable.
Decode = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """How strongly, when and by what predicted images are pulled.

    Attributes:
        strength: eta, the root mean square of a step on latents of unit variance at t = 1; 0 is off.
        pull: 0..1, how close early steps stay to the soft VQ decode.
        first, last: steps at times last <= t <= first are guided; 1 is pure noise.
        every: only each of so many steps of the schedule, from its first on.
        gradients: steps of the gradient at each of them.
        weight: what a position counts: "confidence" max p, or "uniform".

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
        """Whether it changes nothing."""
        return self.strength == 0 and self.pull == 0


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenGuide:
    """Pulls predicted clean latents towards a condition, through a latent decoder and the VLM's VQ encoder.

    Attributes:
        tokenizer: its encoder reads the images, shrunk or enlarged to the token grid's own size.
        decode: how it sees latents: the codec, or a cheap stand-in for it.
        condition: of B images; its code vectors and confidence count.
        scale: s of the calibration (Eq. 14).
        soft: [B, C, h', w'] normalised latents of the VQ decode of the code vectors, which `pull` draws to.
        free: bool [B or 1, N], positions that nothing pulls; None for none.

    Raises:
        ValueError: for another tokenizer's condition.
    """

    tokenizer: ImageTokenizer
    decode: Decode
    condition: Condition
    scale: float
    soft: torch.Tensor
    options: GuidanceOptions = GuidanceOptions()
    free: torch.Tensor | None = None

    def __post_init__(self):
        if not same_codebook(self.condition.codebook, self.tokenizer.codebook.fingerprint):
            raise ValueError(
                f"this condition is of codebook {self.condition.codebook}, but {self.tokenizer.name} has "
                f"{self.tokenizer.codebook.fingerprint}: guide with the tokenizer of the VLM that sampled it"
            )

    def part(self, first: int, last: int) -> TokenGuide:
        """That of the images first..last - 1."""
        free = self.free if self.free is None or len(self.free) == 1 else self.free[first:last]
        return replace(self, condition=self.condition.part(first, last), soft=self.soft[first:last], free=free)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the VQ encoder reads in images of any size: [B, 3, H, W] in -1..1 -> [B, N, D], differentiable."""
        h, w = self.condition.grid
        size = (h * self.tokenizer.factor, w * self.tokenizer.factor)
        if tuple(pixels.shape[2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", antialias=True)
        return self.tokenizer.features(pixels)

    def loss(self, clean: torch.Tensor) -> torch.Tensor:
        """L [B] of normalised latents [B, C, h', w'] (`method.guidance.token_loss`); differentiable."""
        # Only the latents and the image are kept for the way back.
        pixels = checkpoint(self.decode, clean, use_reentrant=False)
        features = checkpoint(self.features, pixels, use_reentrant=False)
        weights = position_weights(self.condition.uncertainty[..., 0], self.options.weight, self.free)
        return token_loss(features, self.condition.code_vectors, weights, self.tokenizer.codebook, scale=self.scale)

    def gradient(self, clean: torch.Tensor) -> torch.Tensor:
        """dL/dx0 [B, C, h', w'], also where gradients are switched off.

        Raises:
            ValueError: if it is not finite.
        """
        with torch.inference_mode(False), torch.enable_grad():
            x = clean.detach().clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss(x).sum(), x)
        if not is_finite(gradient):
            raise ValueError(
                "the gradient of distribution guidance holds NaN or infinity: load the autoencoder in float32"
            )
        return gradient

    def guided(self, time: float, step: int = 0) -> bool:
        """Whether the step at this time is guided; `step` counts from the first."""
        options = self.options
        return not options.off and options.last <= time <= options.first and step % options.every == 0

    @torch.no_grad()
    def correct(self, clean: torch.Tensor, time: float) -> torch.Tensor:
        """x0 after the gradient's step and the pull: [B, C, h', w'].

        Raises:
            ValueError: as `gradient`.
        """
        if self.options.strength:
            for _ in range(self.options.gradients):
                clean = guide_clean(clean, self.gradient(clean), time, self.options.strength)
        return pull_to(clean, self.soft, time, self.options.pull)

    @torch.no_grad()
    def agreement(self, pixels: torch.Tensor) -> torch.Tensor:
        """Share of positions at which the encoder reads the condition's nearest code, [B]: a check on the result.

        Guidance that has fooled the encoder rather than painted what the condition says loses it under a little noise.
        """
        tokens = self.tokenizer.tokens(self.features(pixels))
        wanted = self.tokenizer.tokens(self.condition.code_vectors)
        return (tokens == wanted.to(tokens.device)).float().mean(-1)


def token_guide(
    tokenizer: ImageTokenizer,
    codec: LatentCodec,
    condition: Condition,
    *,
    scale: float,
    options: GuidanceOptions | None = None,
    size: tuple[int, int] | None = None,
    free: torch.Tensor | None = None,
) -> TokenGuide:
    """A guide for the latents of a codec.

    Args:
        scale: s of the VLM's calibration.
        size: (H, W) of the painted image; the token grid's own by default.

    Raises:
        ValueError: for another tokenizer's condition.
    """
    return TokenGuide(
        tokenizer=tokenizer,
        decode=lambda clean: codec.decode(codec.denormalize(clean)),
        condition=condition,
        scale=scale,
        soft=soft_latents(tokenizer, codec, condition, size),
        options=options or GuidanceOptions(),
        free=free,
    )


@torch.no_grad()
def soft_latents(
    tokenizer: ImageTokenizer, codec: LatentCodec, condition: Condition, size: tuple[int, int] | None = None
) -> torch.Tensor:
    """z_soft: normalised latents [B, C, h', w'] of the VQ decode of a condition's code vectors, at (H, W) = `size`."""
    made = []
    for k in range(len(condition.code_vectors)):
        pixels = tokenizer.decode_vectors(condition.part(k, k + 1).code_vectors, condition.grid)
        if size is not None and tuple(pixels.shape[2:]) != tuple(size):
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(-1, 1)
        made.append(codec.normalize(codec.encode(pixels)))
    return torch.cat(made)


def sharpen(
    guide: TokenGuide,
    clean: torch.Tensor,
    *,
    steps: int = 8,
    on_step: Callable[[int, int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The loss alone, without a diffusion model: normalised gradient steps on latents, each shorter than the last.

    Args:
        clean: normalised latents [B, C, h', w'] to start from, such as `guide.soft`.
        steps: at least 1; step k has the root mean square eta (1 - k / steps), eta = `guide.options.strength`.
        on_step: called with (steps done, steps, latents); may raise to stop.

    Raises:
        ValueError: as `TokenGuide.gradient`, and for steps < 1.
    """
    require_number("steps", steps, whole=True, least=1)
    for k in range(steps):
        clean = guide_clean(clean, guide.gradient(clean), 1.0, guide.options.strength * (1 - k / steps))
        if on_step is not None:
            on_step(k + 1, steps, clean)
    return clean
