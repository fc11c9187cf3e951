"""What a decoder is made from: the VLM's tokenizer, the autoencoder, the base transformer, the calibration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .. import registry
from ..files import in_file, open_tensors
from ..models.bundle import DecoderOptions, load_decoder, read_card, save_bundle
from ..models.card import DecoderCard, Distilled, why_not_read
from ..models.checkpoints import load_strictly
from ..models.decoder import DistributionConditionedDecoder
from ..pipelines.load import check_codec
from ..protocols import ImageTokenizer, LatentCodec
from ..settings import require_at_least, require_number
from ..types import Calibration, DCDDWarning, same_codebook
from .config import DistillationConfig
from .encoded_batch import geometry_for
from .image_batch import Geometry
from .trainable import changed_by_training, choose_trained, merge_lora
from .vlm_conditions import Served, VLMConditions

_NOTHING = "there is nothing to train: give the base (FLUX.1-Fill), or a decoder bundle to start from"
#: The most pixels per side, width of an adapter, and rank: beyond any network.
_MOST = 2**16


@dataclass(frozen=True, kw_only=True)
class Encoders:
    """The frozen networks that encode training images, and these images' sizes; the codec is None for no latents."""

    tokenizer: ImageTokenizer
    codec: LatentCodec | None
    geometry: Geometry


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a decoder is made from.

    Attributes:
        vlm: files of a VLM (`registry.sampler_family`); only its image tokenizer is read, except for `conditions`.
        vae: files of a latent codec (`registry.codec_family`).
        base: files of a diffusion transformer (`registry.base_family`); None if `bundle` holds all of its weights.
        bundle: a decoder to start from; None for a new adapter on the base.
        calibration: a file that `Calibration.save` wrote, for the variant "lcdm+lc"; None for that of `bundle`.
        variant: the kind of condition, as in the paper's Table 4 (`DecoderCard.variant`).
        reads: which part of the VLM's output the decoder is served (`DecoderCard.reads`); None for `bundle`'s, or else
            the paper's.
        resolution: R, pixels per side; None for the VLM's own or, in a distillation, the teacher's.
        width: of a new adapter [choice].
        trained, rank: see `choose_trained`.
        seed: for what starts at random: a new adapter and low-rank updates.
        licence: of the result; None for that of its starting point.
        drop_condition: share of the examples whose condition is left out, in [0, 1); None for `bundle`'s, or else 0.
        distillation: how to distil `bundle`, the teacher, into a student of few steps; None for training on images.

    Raises:
        ValueError: for a resolution, a width, a rank or a share out of range.
    """

    vlm: Path
    vae: Path
    base: Path | None = None
    bundle: Path | None = None
    calibration: Path | None = None
    variant: str = "lcdm+lc"
    reads: str | None = None
    resolution: int | None = None
    width: int = 128
    trained: str = "attention"
    rank: int = 16
    seed: int = 0
    licence: str | None = None
    drop_condition: float | None = None
    distillation: DistillationConfig | None = None

    def __post_init__(self):
        require_number("drop-condition", self.drop_condition, least=0, below=1, optional=True)
        sizes = {} if self.resolution is None else {"resolution": self.resolution}
        require_at_least(1, **sizes, width=self.width, rank=self.rank)
        for name, size in {**sizes, "width": self.width, "rank": self.rank}.items():
            if size > _MOST:
                raise ValueError(f"{name} must be at most {_MOST:,}, got {size:,}")

    def check(self) -> None:
        """Checks what can be known before any weights are read: that the files exist, and the calibration.

        Raises:
            ValueError: for a missing file, nothing to train, an impossible distillation, and a calibration that cannot
                be used.
        """
        for path, expected in (
            (self.vlm, "a VLM"),
            (self.vae, "an autoencoder"),
            (self.base, "a diffusion transformer"),
            (self.bundle, "a decoder bundle"),
        ):
            if path is not None and not Path(path).exists():
                raise ValueError(f"{path} does not exist; expected {expected}")
        if self.base is None and self.bundle is None and self.distillation is None:
            raise ValueError(_NOTHING)
        card = None if self.bundle is None else read_card(self.bundle)
        if card is not None and card.distilled is not None:
            raise ValueError(
                f"{self.bundle} is a student of {card.steps} steps, which is neither trained on nor a teacher: start "
                "from the decoder that it was made of"
            )
        if self.distillation is not None:
            self._check_distillation(card)
        self._calibration(None, None if card is None else card.calibration)

    def encoders(self, device: torch.device | str) -> Encoders:
        """Loads the encoders, in float32.

        Raises:
            ValueError: for files of another kind, a token grid that is not square, and a resolution that does not fit.
        """
        options = {"device": device, "dtype": torch.float32}
        tokenizer = registry.sampler_family(self.vlm).load_tokenizer(str(self.vlm), **options)
        codec = registry.load_codec(self.vae, **options)
        rows, columns = tokenizer.grid
        if rows != columns:
            raise ValueError(f"{self.vlm} paints {rows} x {columns} tokens; training needs a square grid")
        own = rows * tokenizer.factor
        resolution = self.resolution or (own if self.distillation is None else read_card(self.bundle).resolution)
        geometry = geometry_for(tokenizer, codec, patch=self._patch(), resolution=resolution, token_resolution=own)
        return Encoders(tokenizer=tokenizer, codec=codec, geometry=geometry)

    def teacher(
        self, device: torch.device | str, *, dtype: torch.dtype, compiled: bool
    ) -> DistributionConditionedDecoder:
        """Loads the teacher of a distillation for painting.

        Args:
            dtype, compiled: see `DecoderOptions`.

        Raises:
            ValueError: as `load_decoder`.
        """
        return load_decoder(self.bundle, self.base, DecoderOptions(device=device, dtype=dtype, compiled=compiled))

    def condition_card(self, encoders: Encoders) -> DecoderCard:
        """The decoder's card, as far as conditions are concerned; no weights are read.

        Raises:
            ValueError: for a calibration that is missing, or of another tokenizer.
        """
        if self.bundle is None:
            return DecoderCard(base="", base_config={}, width=self.width, **self._card_of(encoders, None))
        card = read_card(self.bundle)
        return replace(card, **self._card_of(encoders, card.calibration), **self._student_of(card))

    def conditions(self, card: DecoderCard, encoders: Encoders) -> VLMConditions:
        """Loads the VLM, in bfloat16 on a GPU and in float32 on a CPU, to make its own conditions.

        Args:
            card: of the decoder, or `condition_card`.

        Raises:
            ValueError: as `VLMConditions`, and for files of another kind.
        """
        Served.of(card)  # Checks the card before the VLM is read.
        device = encoders.tokenizer.device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        sampler = registry.sampler_family(self.vlm).load_sampler(str(self.vlm), device=device, dtype=dtype)
        return VLMConditions(sampler, card, encoders.tokenizer)

    def decoder(self, encoders: Encoders, *, dtype: torch.dtype = torch.float32) -> DistributionConditionedDecoder:
        """Loads the decoder to train, on the CPU, without unused weights; trained weights require a gradient.

        Args:
            dtype: of the frozen weights; the trained ones are float32.

        Raises:
            ValueError: for files of another kind, a calibration or a bundle for another tokenizer, and if there is
                neither a base nor a bundle.
        """
        if self.base is None and self.bundle is None:
            raise ValueError(_NOTHING)
        decoder = self._new(encoders, dtype) if self.bundle is None else self._from_bundle(encoders, dtype)
        choose_trained(decoder, self.trained, rank=self.rank, seed=self.seed)
        return decoder

    def save(self, path: Path, decoder: DistributionConditionedDecoder, trained: Mapping[str, torch.Tensor]) -> None:
        """Writes a bundle: the weights that training changed, and the card.

        Args:
            decoder: as `decoder` returns it; the trained weights are loaded into it.
            trained: the trained weights by name (`checkpoints.load_ema`).
        """
        changed = set(changed_by_training(decoder))
        if self.bundle is not None:
            changed |= _transformer_names(self.bundle)
        load_strictly(decoder, {**decoder.state_dict(), **trained}, "the EMA of the training")
        merge_lora(decoder)
        save_bundle(path, decoder, trained=lambda name: name in changed)

    @property
    def condition_dropout(self) -> float:
        """`drop_condition`, or its default; 0 for a student, which takes over its teacher's guidance."""
        if self.distillation is not None:
            return 0.0
        if self.drop_condition is not None:
            return self.drop_condition
        return 0.0 if self.bundle is None else read_card(self.bundle).condition_dropout

    def _patch(self) -> int:
        """Latents per side of one of the backbone's tokens; without a base or a bundle, the first family's."""
        if self.bundle is not None:
            config = read_card(self.bundle).base_config
            with in_file(self.bundle):
                return _patch_of(config)
        if self.base is not None:
            return _patch_of(registry.base_family(self.base).config_of(str(self.base)))
        return _patch_of(registry.backbones()[0].config_of(None))

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
        load_strictly(backbone.model, stored.read(backbone.model.state_dict(), dtype=dtype), str(self.base))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            decoder = DistributionConditionedDecoder(backbone, card)
        check_codec(encoders.codec, decoder, remedy=f"give the autoencoder whose latents {name} paints")
        return decoder

    def _from_bundle(self, encoders: Encoders, dtype: torch.dtype) -> DistributionConditionedDecoder:
        decoder = load_decoder(self.bundle, self.base, DecoderOptions(dtype=dtype, fold=False))
        if decoder.card.code_dim != encoders.tokenizer.codebook.dim:
            raise ValueError(
                f"{self.bundle} reads code vectors of dimension {decoder.card.code_dim}, but the tokenizer's are of "
                f"{encoders.tokenizer.codebook.dim}: start from a bundle that was made with this tokenizer"
            )
        check_codec(encoders.codec, decoder, remedy=f"give the autoencoder that {self.bundle} was trained with")
        card = decoder.card
        decoder.card = replace(card, **self._card_of(encoders, card.calibration), **self._student_of(card))
        decoder.adapter.keep_null(decoder.card.condition_dropout > 0)
        return decoder

    def _card_of(self, encoders: Encoders, calibration: Calibration | None) -> dict[str, Any]:
        """The card's fields about the encoders and the conditions."""
        tokenizer, codec = encoders.tokenizer, encoders.codec
        calibration = self._calibration(tokenizer, calibration)
        if why_not_read(self.reads, variant=self.variant, calibrated=calibration is not None):
            raise ValueError(f"--reads {self.reads} would do nothing with --variant {self.variant}: leave it out")
        return {
            "tokenizer": tokenizer.name,
            "codebook": tokenizer.codebook.fingerprint,
            "code_dim": tokenizer.codebook.dim,
            "variant": self.variant,
            "calibration": calibration,
            "resolution": encoders.geometry.resolution,
            "pixels_per_token": encoders.geometry.pixels_per_token,
            "vae_factor": codec.factor,
            "vae_shift": codec.shift,
            "vae_scale": codec.scale,
            "condition_dropout": self.condition_dropout,
            **({} if self.condition_dropout else {"condition_guidance": 1.0}),
            **({} if self.licence is None else {"licence": self.licence}),
            **({} if self.reads is None else {"reads": self.reads}),
        }

    def _check_distillation(self, card: DecoderCard | None) -> None:
        """Refuses a distillation that makes no sense.

        Args:
            card: of the teacher; None if there is no bundle.
        """
        if card is None:
            raise ValueError("there is nothing to distil: give a decoder bundle (--bundle), the teacher")
        if self.drop_condition is not None:
            raise ValueError("a student learns its teacher's guidance on the condition: leave drop-condition out")
        told, steps = self.distillation, self.distillation.teacher_steps or card.steps
        if told.steps >= steps:
            raise ValueError(
                f"a student takes fewer steps than its teacher, got {told.steps} and {steps}: give fewer "
                "--student-steps (1, 2 or 4), or more --teacher-steps"
            )
        for name, own, taken in (
            ("kind of condition", card.variant, self.variant),
            ("resolution", card.resolution, self.resolution),
        ):
            if taken not in (None, own):
                raise ValueError(f"a student has its teacher's {name}, {own}, got {taken}: leave it out")

    def _student_of(self, card: DecoderCard) -> dict[str, Any]:
        """The fields in which a student's card differs from its teacher's.

        Distribution guidance is unset, since the teacher's was chosen for another number of steps.
        """
        if (told := self.distillation) is None:
            return {}
        return {
            "steps": told.steps,
            "shift": card.shift if told.shift is None else told.shift,
            "distribution_guidance": None,
            "distilled": Distilled(objective=told.objective, teacher_steps=told.teacher_steps or card.steps),
        }

    def _calibration(self, tokenizer: ImageTokenizer | None, calibration: Calibration | None) -> Calibration | None:
        """The calibration of the conditions: the plan's own, or else the given one, the bundle's.

        Args:
            tokenizer: the one it must fit; None if that is not known yet.
        """
        if self.variant != "lcdm+lc":
            if self.calibration is not None:
                raise ValueError(f"the variant {self.variant!r} takes no calibration: leave it out, or use 'lcdm+lc'")
            return None
        if self.calibration is not None:
            calibration = Calibration.load(self.calibration)
        if calibration is None:
            raise ValueError("the variant 'lcdm+lc' needs a calibration: make one for this VLM with `dcdd calibrate`")
        if tokenizer is None:
            return calibration
        if not same_codebook(calibration.codebook, tokenizer.codebook.fingerprint):
            raise ValueError(
                f"the calibration is for another tokenizer (codebook {calibration.codebook}, expected "
                f"{tokenizer.codebook.fingerprint}): make one for this VLM with `dcdd calibrate`"
            )
        if not calibration.converged:
            warnings.warn(
                f"the calibration of {self.calibration or self.bundle} did not converge: its conditions differ from "
                "those that the VLM gives at inference. Make another one with `dcdd calibrate`, which says what to do",
                DCDDWarning,
                stacklevel=2,
            )
        return calibration


def _patch_of(config: dict[str, Any]) -> int:
    with torch.device("meta"):
        return registry.build_backbone(config).patch


def _transformer_names(bundle: Path) -> set[str]:
    with open_tensors(bundle, "a decoder bundle") as file:
        return {name.removeprefix("transformer.") for name in file.keys() if name.startswith("transformer.")}
