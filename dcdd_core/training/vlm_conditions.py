"""Conditions from what a VLM itself predicts for training images, so that training sees what is served.

The tokens are those that the image tokenizer reads from an image, so that image and distributions belong together. The
VLM's distributions for them are teacher-forced (`protocols.TeacherForced`), guided as the calibration says, and mapped
by the code that serves the decoder (`pipelines.condition`). Training on them is our choice; RobusTok (arXiv 2509.12474)
post-trains decoders on generated tokens.

Shapes: B batch, M images of it, N tokens, D code dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from ..method.sampling import keyed_generator
from ..models.card import DecoderCard
from ..pipelines.condition import condition_for
from ..protocols import ImageTokenizer, SamplingOptions, TeacherForced, TokenSampler
from ..settings import require_number, require_text, shown
from ..types import Condition
from .encoded_batch import EncodedBatch

_CHOICE = 83  # keeps these draws apart from others of the same micro-batch
_WITHOUT = "train without --vlm-conditions"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a VLM's conditions depend on, besides image, caption and image tokenizer.

    Attributes:
        guidance, temperature: of the calibration; temperature 1 if it gives none.
        reads: "logits" or "anchored" (`DecoderCard.reads`).
        smoothing, anchor: eps and beta of the calibration; beta is 0 if the logits are read without anchoring.
        anchor_temperature: tau of the calibration; 1 if the logits are read without anchoring.
        sampler: the VLM's fingerprint (`TokenSampler.fingerprint`); None, if it is not loaded, stands for any VLM.

    Raises:
        ValueError: for values of wrong types or out of range.
    """

    guidance: float
    temperature: float
    reads: str
    smoothing: float
    anchor: float
    sampler: str | None = None
    anchor_temperature: float = 1.0

    def __post_init__(self):
        for name in ("guidance", "temperature", "smoothing", "anchor", "anchor_temperature"):
            require_number(name, getattr(self, name))
        if self.reads not in ("logits", "anchored"):
            raise ValueError(f"reads must be 'logits' or 'anchored', got {shown(self.reads)}")
        require_text("sampler", self.sampler, optional=True)

    @classmethod
    def of(cls, card: DecoderCard) -> Served:
        """The way in which a card's decoder is served.

        Raises:
            ValueError: if the VLM's distributions do not reach it, or its calibration does not state the guidance.
        """
        calibration = card.calibration
        if card.variant != "lcdm+lc" or calibration is None:
            raise ValueError(
                "--vlm-conditions needs a decoder with a calibration, which says how the VLM is guided, but this one's "
                f"conditions are {card.variant!r}: give --calibration and the variant lcdm+lc, or {_WITHOUT}"
            )
        if card.reads == "tokens":
            raise ValueError(
                "this decoder is served the sampled tokens alone (its card reads 'tokens'), which the VLM's "
                f"distributions do not reach: give --reads anchored or --reads logits, or {_WITHOUT}"
            )
        if calibration.guidance is None:
            raise ValueError(
                "the calibration does not say with which guidance the VLM was sampled: make it again with "
                f"`dcdd calibrate`, or {_WITHOUT}"
            )
        served = calibration if card.reads == "anchored" else calibration.unanchored
        return cls(
            guidance=float(calibration.guidance),
            temperature=1.0 if calibration.temperature is None else float(calibration.temperature),
            reads=card.reads,
            smoothing=float(served.smoothing),
            anchor=float(served.anchor),
            anchor_temperature=float(served.anchor_temperature),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; without an anchor temperature of 1, as in older versions, which had none."""
        return {name: value for name, value in asdict(self).items() if name != "anchor_temperature" or value != 1}

    @classmethod
    def from_dict(cls, values: Any) -> Served:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for anything else.
        """
        names = [field.name for field in fields(cls)]
        if not isinstance(values, dict) or {"anchor_temperature", *values} != set(names):
            raise ValueError(f"expected an object with {', '.join(names)}, got {shown(values)}")
        return cls(**values)

    def misfits(self, wanted: Served) -> list[str]:
        """Describes what differs from the wanted conditions; an unknown sampler fits any."""
        own, other = asdict(self), asdict(wanted)
        if None in (self.sampler, wanted.sampler):
            del own["sampler"]
        return [
            f"its VLM's conditions have the {name} {value!r}, expected {other[name]!r}"
            for name, value in own.items()
            if value != other[name]
        ]

    def words(self) -> str:
        """A short description for a run's summary."""
        anchored = f", anchored with beta {self.anchor:g}" if self.reads == "anchored" else ""
        if self.anchor_temperature != 1:
            anchored += f" at temperature {self.anchor_temperature:g}"
        return f"guidance {self.guidance:g}, temperature {self.temperature:g}{anchored}, smoothing {self.smoothing:g}"


class VLMConditions:
    """Makes a VLM's conditions of images and captions, as a decoder's card serves them.

    Args:
        sampler: the VLM.
        card: of the decoder, as far as conditions are concerned.
        tokenizer: the VLM's image tokenizer.

    Attributes:
        served: how they are made.

    Raises:
        ValueError: for a sampler that cannot give distributions for an existing image, and as `Served.of`.
    """

    def __init__(self, sampler: TokenSampler, card: DecoderCard, tokenizer: ImageTokenizer):
        if not isinstance(sampler, TeacherForced):
            raise ValueError(
                f"{sampler.name or 'this VLM'} decides many tokens a pass in an order of its own, so it has no "
                "distributions of an image that is there: --vlm-conditions needs one that draws token by token, such "
                f"as Janus or LlamaGen; or {_WITHOUT}"
            )
        self.sampler, self.card, self.tokenizer = sampler, card, tokenizer
        self.served = replace(Served.of(card), sampler=sampler.fingerprint)
        self.options = SamplingOptions(guidance=self.served.guidance, temperature=self.served.temperature)

    @torch.no_grad()
    def __call__(self, features: torch.Tensor, captions: Sequence[str]) -> Condition:
        """The conditions of M images, on the VLM's device.

        Args:
            features: [M, N, D], of the tokenizer's encoder before quantisation.
            captions: M.

        Raises:
            ValueError: naming a caption that the VLM cannot read.
        """
        tokens = self.tokenizer.tokens(features)
        try:
            logits = self.sampler.teacher_forced(captions, tokens, options=self.options)
        except ValueError as error:
            if len(captions) == 1:
                raise ValueError(
                    f"the VLM's conditions of the image with the caption {captions[0][:60]!r} cannot be made: {error}. "
                    "Change the caption, or remove it: without one the image keeps proxies"
                ) from error
            for row in range(len(captions)):  # to find the caption in question
                self(features[row : row + 1], captions[row : row + 1])
            raise
        return condition_for(self.card, logits, self.tokenizer.codebook)


def with_conditions(
    encoded: EncodedBatch, conditions: VLMConditions, chosen: torch.Tensor | None = None
) -> EncodedBatch:
    """Adds the VLM's conditions to a batch, for the images that have a caption.

    Args:
        chosen: bool [B], the images that need them; None for all.
    """
    features = encoded.features
    known = torch.tensor([caption is not None for caption in encoded.captions])
    known = known if chosen is None else known & chosen
    rows = known.nonzero().squeeze(1).tolist()
    vectors, uncertainty = torch.zeros_like(features), features.new_zeros(*features.shape[:2], 4)
    if rows:
        found = conditions(features[rows], [encoded.captions[row] for row in rows])
        vectors[rows], uncertainty[rows] = found.code_vectors.to(vectors), found.uncertainty.to(uncertainty)
    return replace(encoded, vlm_vectors=vectors, vlm_uncertainty=uncertainty, vlm_known=known.to(features.device))


def choice(share: float, count: int, generator: torch.Generator) -> torch.Tensor:
    """Which of `count` examples take a VLM's conditions, bool [count].

    Determined by the generator's seed, which is the micro-batch's, and the position in the batch. The generator is not
    advanced, so that all other draws are those of a training without the VLM's conditions.
    """
    return torch.rand(count, generator=keyed_generator(generator.initial_seed(), _CHOICE)) < share


def mixed(proxies: Condition, encoded: EncodedBatch, chosen: torch.Tensor) -> Condition:
    """The VLM's conditions of the chosen images [B] where they are known, and proxies elsewhere."""
    taken = (chosen.to(encoded.vlm_known.device) & encoded.vlm_known)[:, None, None]
    return replace(
        proxies,
        code_vectors=torch.where(taken, encoded.vlm_vectors, proxies.code_vectors),
        uncertainty=torch.where(taken, encoded.vlm_uncertainty, proxies.uncertainty),
    )
