"""What a decoder is made from: the VLM's tokenizer, the autoencoder, the base transformer, the calibration."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import safe_open

from .. import registry
from ..models.bundle import DecoderOptions, load_decoder, save_bundle
from ..models.card import DecoderCard
from ..models.checkpoints import load_strictly
from ..models.decoder import DistributionConditionedDecoder
from ..models.janus.tokenizer import load_tokenizer
from ..models.vae import load_vae
from ..models.vq import VQTokenizer
from ..types import Calibration, DCDDWarning, same_codebook
from .encoded_batch import geometry_for
from .image_batch import Geometry
from .settings import require_at_least
from .trainable import changed_by_training, choose_trained, merge_lora


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The two frozen networks that pictures go through, and the sizes at which they do."""

    vq: VQTokenizer
    vae: AutoencoderKL
    geometry: Geometry


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a decoder is made from.

    Attributes:
        vlm: a folder that `VQTokenizer.load` reads.
        vae: what `load_vae` reads.
        base: what `flux_files.find_transformer` reads: FLUX.1-Fill. None where `bundle` holds a whole transformer.
        bundle: a decoder to go on from; None for a new adapter on the base.
        calibration: a file of `Calibration.save`, for the variant "lcdm+lc"; None takes that of `bundle`.
        variant: the conditions to learn from, of the paper's Table 4 (`DecoderCard.variant`).
        resolution: R; None for the size of the VLM's own pictures.
        width: of a new adapter [choice].
        trained, rank: see `choose_trained`.
        seed: of what starts at random: a new adapter and low-rank changes.
        licence: of the result; None for that of what it starts from.

    Raises:
        ValueError: for a resolution, a width or a rank below 1.
    """

    vlm: Path
    vae: Path
    base: Path | None = None
    bundle: Path | None = None
    calibration: Path | None = None
    variant: str = "lcdm+lc"
    resolution: int | None = None
    width: int = 128
    trained: str = "attention"
    rank: int = 16
    seed: int = 0
    licence: str | None = None

    def __post_init__(self):
        sizes = {} if self.resolution is None else {"resolution": self.resolution}
        require_at_least(1, **sizes, width=self.width, rank=self.rank)

    def encoders(self, device: torch.device | str) -> Encoders:
        """The encoders in float32, and the sizes.

        Raises:
            ValueError: for files of another kind, and a resolution that does not fit the VLM's grid.
        """
        vq = load_tokenizer(self.vlm, device=device, dtype=torch.float32)
        vae = load_vae(self.vae, device=device, dtype=torch.float32)
        own = vq.model.config.num_patches * vq.factor
        geometry = geometry_for(vq, vae, resolution=self.resolution or own, token_resolution=own)
        return Encoders(vq=vq, vae=vae, geometry=geometry)

    def decoder(self, encoders: Encoders, *, dtype: torch.dtype = torch.float32) -> DistributionConditionedDecoder:
        """The decoder to train, on the CPU without its text stream; what is trained requires a gradient, in float32.

        Args:
            dtype: of what is frozen.

        Raises:
            ValueError: for files of another kind, a calibration or a bundle of another tokenizer, and without any base.
        """
        if self.base is None and self.bundle is None:
            raise ValueError(
                "there is nothing to train: give the base (FLUX.1-Fill), or a decoder bundle to start from"
            )
        decoder = self._new(encoders, dtype) if self.bundle is None else self._started(encoders, dtype)
        choose_trained(decoder, self.trained, rank=self.rank, seed=self.seed)
        return decoder

    def save(self, path: Path, decoder: DistributionConditionedDecoder, average: dict[str, torch.Tensor]) -> None:
        """Writes the bundle of what training made of a decoder: the weights that it changed, and the card.

        Args:
            decoder: of `decoder`, as it is before training; it receives the average.
            average: the trained weights by name (`checkpoint.load_average`).
        """
        changed = changed_by_training(decoder) | (set() if self.bundle is None else _transformer_names(self.bundle))
        load_strictly(decoder, {**decoder.state_dict(), **average}, "the training's average")
        merge_lora(decoder)
        save_bundle(path, decoder, trained=lambda name: name in changed)

    def _new(self, encoders: Encoders, dtype: torch.dtype) -> DistributionConditionedDecoder:
        family = registry.base_family(self.base)
        config, published = family.config_of(str(self.base)), family.config_of(None)
        name, licence = (family.published_name, family.licence) if config == published else (self.base.name, "")
        about = {"licence": licence} | self._card_of(encoders, None)
        card = DecoderCard(base=name, base_config=config, width=self.width, **about)
        with torch.device("meta"):
            backbone = family.build(config, guidance=card.guidance)
        unused = {name for name in backbone.model.state_dict() if backbone.unused(name)}
        stored = family.find(str(self.base), backbone, needs=name, without=unused)
        backbone.drop_unused()
        load_strictly(backbone.model, stored.read(dtype=dtype), str(self.base))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return DistributionConditionedDecoder(backbone, card)

    def _started(self, encoders: Encoders, dtype: torch.dtype) -> DistributionConditionedDecoder:
        decoder = load_decoder(self.bundle, self.base, DecoderOptions(dtype=dtype, fold=False))
        if decoder.card.code_dim != encoders.vq.codebook.dim or decoder.card.vae_factor != encoders.geometry.vae_factor:
            raise ValueError(
                f"{self.bundle} reads {decoder.card.code_dim}-dimensional code vectors and paints latents of "
                f"{decoder.card.vae_factor} pixels, the tokenizer and the autoencoder have {encoders.vq.codebook.dim} "
                f"and {encoders.geometry.vae_factor}: start from a bundle made with networks like them"
            )
        decoder.card = replace(decoder.card, **self._card_of(encoders, decoder.card.calibration))
        return decoder

    def _card_of(self, encoders: Encoders, calibration: Calibration | None) -> dict:
        """What the card says of the encoders and the conditions."""
        vq, vae = encoders.vq, encoders.vae
        if self.calibration is not None and self.variant != "lcdm+lc":
            raise ValueError(f"the variant {self.variant!r} takes no calibration: leave it out, or take 'lcdm+lc'")
        if self.calibration is not None:
            calibration = Calibration.load(self.calibration)
        if self.variant != "lcdm+lc":
            calibration = None
        elif calibration is None:
            raise ValueError("the variant 'lcdm+lc' needs a calibration: make one for this VLM with `dcdd calibrate`")
        elif not same_codebook(calibration.codebook, vq.codebook.fingerprint):
            raise ValueError(
                f"the calibration is of another tokenizer ({calibration.codebook}, expected "
                f"{vq.codebook.fingerprint}): make one for this VLM with `dcdd calibrate`"
            )
        if calibration is not None and not calibration.converged:
            warnings.warn(
                f"the calibration of {self.calibration or self.bundle} did not converge: a decoder trained on it reads "
                "distributions that the VLM never gives. Make another with `dcdd calibrate`, which says what to do",
                DCDDWarning,
                stacklevel=2,
            )
        return {
            "tokenizer": vq.name,
            "codebook": vq.codebook.fingerprint,
            "code_dim": vq.codebook.dim,
            "variant": self.variant,
            "calibration": calibration,
            "resolution": encoders.geometry.resolution,
            "pixels_per_token": encoders.geometry.pixels_per_token,
            "vae_factor": encoders.geometry.vae_factor,
            "vae_shift": vae.config.shift_factor,
            "vae_scale": vae.config.scaling_factor,
            **({} if self.licence is None else {"licence": self.licence}),
        }


def _transformer_names(bundle: Path) -> set[str]:
    with safe_open(bundle, framework="pt") as file:
        return {name.removeprefix("transformer.") for name in file.keys() if name.startswith("transformer.")}
