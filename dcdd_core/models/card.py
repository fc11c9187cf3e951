"""The card of a decoder bundle: how it describes itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..method.distillation import OBJECTIVES
from ..settings import require_number, require_text, shown
from ..types import Calibration

#: What a decoder can be conditioned on (the paper's Table 4).
VARIANTS = ("discrete", "lcdm", "lcdm+lc")
#: The parts of a VLM's output that a decoder can read.
READINGS = ("logits", "anchored", "tokens")
#: The most Euler steps; more make no visible difference.
MOST_STEPS = 1000
#: The strongest distribution guidance: ten times the spread of the latents in one step.
MOST_STRENGTH = 10.0
#: The strongest guidance on the condition; images fall apart long before it [choice].
MOST_CONDITION_GUIDANCE = 20.0
_GUIDANCE, _DISTILLED = "distribution_guidance", "distilled"
_OFF = {_GUIDANCE: None, "condition_dropout": 0.0, "condition_guidance": 1.0, _DISTILLED: None}
#: Fields that the first cards did not have; they are not written when they have their default.
LATER = frozenset(_OFF)
#: The upper limit of a card's sizes: far beyond any network's, and small enough to multiply safely.
_LARGEST = 2**16


def why_not_read(reads: str | None, *, variant: str, calibrated: bool) -> str:
    """Why a decoder's images would not change with one of `READINGS`, to follow "this decoder"; "" if they can.

    Args:
        reads: None for the decoder's own.
        variant: one of `VARIANTS`.
        calibrated: whether the decoder has a calibration, to which the anchor belongs.
    """
    if variant == "discrete" and reads not in (None, "tokens"):
        return "was trained on tokens alone"
    return "has no calibration to anchor with" if reads == "anchored" and not calibrated else ""


@dataclass(frozen=True, kw_only=True)
class ServedGuidance:
    """The distribution guidance that a decoder paints best with.

    Attributes:
        strength: eta (`method.guidance.guide_clean`), 0..`MOST_STRENGTH`; 0 is off.
        shift: mu of the time shift to use with it, -100..100; None for the card's own.

    Raises:
        ValueError: for numbers out of range.
    """

    strength: float
    shift: float | None = None

    def __post_init__(self):
        require_number(f"{_GUIDANCE} strength", self.strength, least=0, most=MOST_STRENGTH)
        require_number(f"{_GUIDANCE} shift", self.shift, least=-100, most=100, optional=True)

    @classmethod
    def from_dict(cls, values: Any) -> ServedGuidance:
        """The inverse of `asdict`.

        Raises:
            ValueError: for anything else.
        """
        if not isinstance(values, dict) or set(values) != {"strength", "shift"}:
            raise ValueError(f"{_GUIDANCE} must be an object of strength and shift, got {shown(values)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """How a few-step student was distilled.

    Attributes:
        objective: one of `method.distillation.OBJECTIVES`.
        teacher_steps: number of Euler steps of its teacher, 2..`MOST_STEPS`.

    Raises:
        ValueError: for another objective, and numbers out of range.
    """

    objective: str
    teacher_steps: int

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {shown(self.objective)}")
        require_number("teacher_steps", self.teacher_steps, whole=True, least=2, most=MOST_STEPS)

    @classmethod
    def from_dict(cls, values: Any) -> Distilled:
        """The inverse of `asdict`.

        Raises:
            ValueError: for anything else.
        """
        if not isinstance(values, dict) or set(values) != {"objective", "teacher_steps"}:
            raise ValueError(f"{_DISTILLED} must be an object of objective and teacher_steps, got {shown(values)}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class DecoderCard:
    """The description in a bundle's header, stored as JSON.

    Attributes:
        base: the transformer that the trained weights go into, such as "black-forest-labs/FLUX.1-Fill-dev".
        base_config: its configuration, so that nothing is downloaded to build it. Its "_class_name" says which backbone
            it is (`registry.backbone_family`); FLUX.1-Fill's has none.
        tokenizer, codebook: name and fingerprint of the tokenizer whose code vectors it reads.
        code_dim, width: sizes of the adapter.
        variant: what it was trained on, one of `VARIANTS`.
        calibration: applied to logits before mapping; None for none.
        reads: what the decoder reads of a VLM's output by default: its "logits" (the paper), the logits "anchored" to
            the sampled tokens, or the sampled "tokens" alone.
        resolution: side in pixels of the images that it was trained on.
        pixels_per_token: side in pixels of the square that one token covers; not a whole number if Janus' 24 x 24
            tokens become 512 x 512 pixels.
        vae_factor, vae_shift, vae_scale: of the autoencoder whose latents it paints; shift and scale are None if it
            normalises them in another way.
        steps: default number of Euler steps, 1..`MOST_STEPS`; for a student, the number it was distilled for.
        shift: default mu of the time shift (`method.flow.shift_time`); None for the backbone's own, by resolution.
        guidance: value of the distilled guidance embedding, if the base has one; the same as in training.
        licence: licence of the weights.
        distribution_guidance: the distribution guidance to use by default; None for none, as in the paper.
        condition_dropout: share of the training examples whose condition was dropped; 0, as in the paper, for none.
            Above 0 the decoder has a null condition (`adapter.NullCondition`) and can be guided on the condition.
        condition_guidance: w, the default scale of the guidance on the condition; 1 is off.
        distilled: how a student was distilled; None for a decoder that can take any number of steps.

    Raises:
        ValueError: for an unknown variant or reading, values of wrong types, and numbers out of range.
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
    vae_shift: float | None = 0.1159
    vae_scale: float | None = 0.3611
    steps: int = 30
    shift: float | None = None
    guidance: float = 1.0
    licence: str = ""
    distribution_guidance: ServedGuidance | None = None
    condition_dropout: float = 0.0
    condition_guidance: float = 1.0
    distilled: Distilled | None = None

    def __post_init__(self):
        for name in ("base", "tokenizer", "codebook", "licence"):
            require_text(name, getattr(self, name))
        if not isinstance(self.base_config, dict):
            raise ValueError(f"base_config must be an object, got {shown(self.base_config)}")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {shown(self.variant)}")
        if self.reads not in READINGS:
            raise ValueError(f"reads must be one of {', '.join(READINGS)}, got {shown(self.reads)}")
        if not isinstance(self.calibration, (Calibration, type(None))):
            raise ValueError(f"calibration must be a calibration or None, got {shown(self.calibration)}")
        if not isinstance(self.distribution_guidance, (ServedGuidance, type(None))):
            raise ValueError(
                f"{_GUIDANCE} must be a strength and a shift or None, got {shown(self.distribution_guidance)}"
            )
        for name in ("code_dim", "width", "resolution", "vae_factor"):
            require_number(name, getattr(self, name), whole=True, least=1, most=_LARGEST)
        if self.width % 8:
            raise ValueError(f"width must be a multiple of 8, got {self.width}")
        require_number("pixels_per_token", self.pixels_per_token, above=0, most=_LARGEST)
        require_number("steps", self.steps, whole=True, least=1, most=MOST_STEPS)
        require_number("vae_shift", self.vae_shift, optional=True)
        require_number("vae_scale", self.vae_scale, above=0, optional=True)
        if (self.vae_shift is None) != (self.vae_scale is None):
            raise ValueError(
                f"vae_shift and vae_scale must be two numbers or both None, got {self.vae_shift} and {self.vae_scale}"
            )
        # The range that `method.flow.timesteps` takes.
        require_number("shift", self.shift, least=-100, most=100, optional=True)
        require_number("guidance", self.guidance, least=0, most=_LARGEST)
        require_number("condition_dropout", self.condition_dropout, least=0, below=1)
        self.condition_guidance_of(self.condition_guidance)
        self._check_student()

    def _check_student(self) -> None:
        if not isinstance(self.distilled, (Distilled, type(None))):
            raise ValueError(
                f"{_DISTILLED} must be an objective and a number of steps or None, got {shown(self.distilled)}"
            )
        if self.distilled is None:
            return
        if self.steps >= self.distilled.teacher_steps:
            raise ValueError(
                f"a student takes fewer steps than its teacher, got {self.steps} and {self.distilled.teacher_steps}"
            )
        if self.condition_dropout:
            raise ValueError(f"a student has no null condition, got condition_dropout {self.condition_dropout:g}")

    def condition_guidance_of(self, asked: float | None) -> float:
        """The guidance scale w: what was asked for, or by default the card's own.

        Raises:
            ValueError: for a w outside 0..`MOST_CONDITION_GUIDANCE`, and for one other than 1 for a student or a
                decoder that was trained without dropped conditions.
        """
        w = self.condition_guidance if asked is None else asked
        require_number("condition_guidance", w, least=0, most=MOST_CONDITION_GUIDANCE, remedy="1 is off")
        if w != 1 and self.distilled is not None:
            raise ValueError(
                f"condition_guidance must be 1, which is off, got {w:g}: this decoder is a student, which paints with "
                "the guidance that its teacher had; leave it out, or distil a teacher whose card says this guidance"
            )
        if w != 1 and self.condition_dropout == 0:
            raise ValueError(
                f"condition_guidance must be 1, which is off, got {w:g}: this decoder never saw an image without its "
                "condition; train one that did, `train.py --drop-condition 0.1`, from this one if you like (--bundle)"
            )
        return w

    def to_dict(self) -> dict[str, Any]:
        """The card as a dict for JSON; later fields with their default are left out, as in older cards."""
        values = {name: value for name, value in asdict(self).items() if name not in _OFF or value != _OFF[name]}
        return values | {"calibration": self.calibration and self.calibration.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderCard:
        """The inverse of `to_dict`.

        Raises:
            ValueError: for values that are not a card's.
        """
        values = dict(values)
        if values["calibration"] is not None:
            values["calibration"] = Calibration.from_dict(values["calibration"])
        if values.get(_GUIDANCE) is not None:
            values[_GUIDANCE] = ServedGuidance.from_dict(values[_GUIDANCE])
        if values.get(_DISTILLED) is not None:
            values[_DISTILLED] = Distilled.from_dict(values[_DISTILLED])
        return cls(**values)

    def painted_size(self, grid: tuple[int, int], *, patch: int = 2) -> tuple[int, int]:
        """(H, W) in pixels of the image that an (h, w) grid of tokens becomes.

        This is `resolution` for the grid of the training, and for others the nearest size made of whole packed latents.

        Args:
            patch: latents per side of one of the backbone's tokens.
        """
        unit = patch * self.vae_factor
        height, width = (max(1, round(n * self.pixels_per_token / unit)) * unit for n in grid)
        return height, width
