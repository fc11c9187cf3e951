"""The data passed between the stages: Codebook, TokenLogits, Calibration, Condition.

All four are frozen and validate themselves. Each has `to` for another device, `part` for some images of a batch,
`joined` to join parts, and `save` and `load` for one safetensors file, with everything but the tensors as JSON in its
header. Codebook and Calibration belong to a whole batch, so each is its own part. No tensor passed in is modified.

Shapes: B batch, N tokens (a row-major h x w grid), K codes, D code dimension.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .files import in_file, read_record, write_record
from .settings import require_number, require_text, shown

Source = Literal["vlm", "proxy"]
#: Remedies in messages about invalid calibrations and token logits.
_CALIBRATED = "give one that is, or calibrate again"
_SAMPLED = "sample or encode again"
#: Largest scale, bias, anchor or anchor temperature. Fits stay below 20,000; logits stay far from float32's limit.
_LARGEST = 1e6
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_MAPPED = "`method.lcdm.map_logits` makes both"
_GRID_FIELDS = ("grid", "source", "guidance", "temperature", "model", "codebook", "calibrated")


class DCDDWarning(UserWarning):
    """Something a user should know although nothing failed; hosts show it to the user."""


@dataclass(frozen=True, eq=False)
class Codebook:
    """The tokenizer's codebook E, with rows of unit length.

    Attributes:
        vectors: [K, D] float32, K >= 2; real numbers of any scale and dtype are accepted, and rows are normalised.

    Raises:
        ValueError: for a wrong shape, numbers that are complex or not finite, or a row of zeros.
    """

    vectors: torch.Tensor

    def __post_init__(self):
        v = self.vectors
        if not isinstance(v, torch.Tensor) or v.ndim != 2 or v.shape[0] < 2 or v.shape[1] < 1:
            raise ValueError(f"a codebook is a tensor [K >= 2, D >= 1], got {_describe(v)}")
        if v.is_complex():
            raise ValueError(f"a codebook holds real numbers, got {_describe(v)}")
        v = v.detach().float()
        if not bool(torch.isfinite(v).all()):
            raise ValueError("the codebook holds NaN or infinity: its file is damaged or was cast to too small a dtype")
        # Divide by the largest number first: squares of very small or large ones leave float32's range.
        largest = v.abs().amax(dim=1, keepdim=True)
        if bool((largest == 0).any()):
            raise ValueError(
                f"{int((largest == 0).sum())} rows of the codebook are zero and cannot be normalised: "
                "take the codebook of a trained tokenizer"
            )
        # Rows that already have unit length keep their bits, so that saving and loading is exact.
        unit = bool((v.norm(dim=1) - 1).abs().max() < 1e-6)
        object.__setattr__(self, "vectors", v.clone() if unit else F.normalize(v / largest, dim=1))

    @property
    def size(self) -> int:
        """K."""
        return self.vectors.shape[0]

    @property
    def dim(self) -> int:
        """D."""
        return self.vectors.shape[1]

    def of(self, tokens: torch.Tensor) -> torch.Tensor:
        """Code vectors [..., D] of tokens [...] on any device, on the codebook's."""
        return self.vectors[tokens.to(self.vectors.device)]

    @cached_property
    def fingerprint(self) -> str:
        """Size and eight projections, such as "16384x8:+0.021,...": survives a cast to bfloat16, not a permutation."""
        k = torch.arange(self.size, dtype=torch.float64)[:, None]
        d = torch.arange(self.dim, dtype=torch.float64)[None, :]
        v = self.vectors.cpu().double()
        scale = math.sqrt(2 / v.numel())
        sums = [float((v * torch.cos((j + 1.0) * k + 0.7 * j * d + j)).sum()) * scale for j in range(8)]
        return f"{self.size}x{self.dim}:" + ",".join(f"{s:+.3f}" for s in sums)

    def to(self, device: torch.device | str) -> Codebook:
        """The same on another device."""
        return Codebook(self.vectors.to(device))

    def part(self, first: int, last: int) -> Codebook:
        """Itself: a codebook belongs to a whole batch."""
        return self

    @classmethod
    def joined(cls, parts: Sequence[Codebook]) -> Codebook:
        """The codebook that all parts share.

        Raises:
            ValueError: if their codebooks differ.
        """
        if any(part.fingerprint != parts[0].fingerprint for part in parts):
            raise ValueError(f"parts of different codebooks cannot be joined: {[part.fingerprint for part in parts]}")
        return parts[0]

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        write_record(path, "codebook", {"vectors": self.vectors}, {})

    @classmethod
    def load(cls, path: str | Path) -> Codebook:
        """What `save` wrote, on the CPU.

        Raises:
            ValueError: if the file is absent, damaged or of another kind; the message names it.
        """
        tensors, _ = read_record(path, "codebook", ("vectors",), ())
        with in_file(path):
            return cls(tensors["vectors"])


def same_codebook(first: str | None, second: str | None) -> bool:
    """Whether two fingerprints can belong to one codebook; an unknown one (None) fits any."""
    if first is None or second is None or first == second:
        return True
    if ":" not in first or ":" not in second:  # not made by Codebook.fingerprint
        return False
    (size_a, sums_a), (size_b, sums_b) = first.split(":", 1), second.split(":", 1)
    try:
        pairs = [(float(a), float(b)) for a, b in zip(sums_a.split(","), sums_b.split(","))]
    except ValueError:
        return False
    return size_a == size_b and all(abs(a - b) < 0.015 for a, b in pairs)


@dataclass(frozen=True, eq=False)
class TokenLogits:
    """A grid of image-token distributions, and the tokens picked from them.

    Attributes:
        logits: [B, N, K] floating point, unnormalised; -inf bars a code, NaN and +inf are refused.
        tokens: [B, N] int64 in 0..K-1.
        grid: (h, w), h * w = N.
        source: "vlm" for a language model's logits (after guidance and temperature, before any filter), "proxy" for
            cosine similarities of a VQ encoder's features (Eqs. 10, 13).
        guidance, temperature: how the tokens were sampled; None for proxy logits.
        model: name of the model that made the logits.
        codebook: fingerprint of the codebook that the K columns refer to; None if unknown.
        calibrated: whether a calibration has been applied (`method.calibration.apply_calibration`).
        calibrated_at: bool [B, N], the positions where one has been applied if that is only some of them: an edit keeps
            an image's calibrated proxies beside a VLM's logits. None for nowhere, and for `calibrated` logits.

    Raises:
        ValueError: if any of this does not hold.
    """

    logits: torch.Tensor
    tokens: torch.Tensor
    grid: tuple[int, int]
    _: KW_ONLY
    source: Source = "vlm"
    guidance: float | None = None
    temperature: float | None = None
    model: str = ""
    codebook: str | None = None
    calibrated: bool = False
    calibrated_at: torch.Tensor | None = None

    def __post_init__(self):
        logits, tokens = self.logits, self.tokens
        if not isinstance(logits, torch.Tensor) or logits.ndim != 3 or logits.dtype not in _FLOATS:
            raise ValueError(f"logits must be a floating-point tensor [B, N, K], got {_describe(logits)}")
        object.__setattr__(self, "grid", _check_grid(self.grid, logits.shape[1]))
        if logits.shape[0] < 1 or logits.shape[2] < 2:
            raise ValueError(f"logits need a batch of at least 1 and 2 codes, got {_describe(logits)}")
        if not isinstance(tokens, torch.Tensor) or tokens.shape != logits.shape[:2] or tokens.dtype != torch.int64:
            raise ValueError(f"tokens must be int64 {list(logits.shape[:2])} like the logits, got {_describe(tokens)}")
        if int(tokens.min()) < 0 or int(tokens.max()) >= logits.shape[2]:
            raise ValueError(
                f"tokens must lie in 0..{logits.shape[2] - 1}, got {int(tokens.min())}..{int(tokens.max())}"
            )
        top = logits.detach().amax(dim=2)
        if not bool(torch.isfinite(top).all()):
            raise ValueError(
                "logits hold NaN, +inf, or a position where every code is barred (-inf): "
                "sample again, with float32 logits if they came from half precision"
            )
        if self.source not in ("vlm", "proxy"):
            raise ValueError(f"source must be 'vlm' or 'proxy', got {shown(self.source)}: {_SAMPLED}")
        require_number("guidance", self.guidance, optional=True, remedy=_SAMPLED)
        require_number("temperature", self.temperature, least=0, optional=True, remedy=_SAMPLED)
        require_text("model", self.model, remedy=_SAMPLED)
        require_text("codebook", self.codebook, optional=True, remedy=_SAMPLED)
        if not isinstance(self.calibrated, bool):
            raise ValueError(f"calibrated must be true or false, got {shown(self.calibrated)}: {_SAMPLED}")
        self._check_calibrated_at()

    def _check_calibrated_at(self) -> None:
        at = self.calibrated_at
        if at is None:
            return
        if not isinstance(at, torch.Tensor) or at.dtype != torch.bool or at.shape != self.tokens.shape:
            raise ValueError(
                f"calibrated_at must be bool {list(self.tokens.shape)} like the tokens, got {_describe(at)}: {_SAMPLED}"
            )
        if self.calibrated:
            raise ValueError(f"logits that are calibrated everywhere take no calibrated_at: {_SAMPLED}")
        if not bool(at.any()):
            object.__setattr__(self, "calibrated_at", None)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> TokenLogits:
        """The same on another device, with the logits in another dtype if one is given."""
        dtypes = {"logits": dtype}
        return replace(self, **{name: value.to(device, dtypes.get(name)) for name, value in self._tensors.items()})

    def part(self, first: int, last: int) -> TokenLogits:
        """The images first..last - 1 of the batch."""
        return replace(self, **{name: value[first:last] for name, value in self._tensors.items()})

    @property
    def is_calibrated(self) -> torch.Tensor:
        """Whether a calibration has been applied at each position: bool [B, N]."""
        if self.calibrated_at is not None:
            return self.calibrated_at
        return torch.full_like(self.tokens, self.calibrated, dtype=torch.bool)

    @property
    def _tensors(self) -> dict[str, torch.Tensor]:
        at = {} if self.calibrated_at is None else {"calibrated_at": self.calibrated_at}
        return {"logits": self.logits, "tokens": self.tokens} | at

    @property
    def record(self) -> dict[str, Any]:
        """All but the tensors, by name."""
        return {name: getattr(self, name) for name in _GRID_FIELDS}

    @classmethod
    def joined(cls, parts: Sequence[TokenLogits]) -> TokenLogits:
        """Joins parts that were made the same way into one batch; a single part is returned as it is.

        Raises:
            ValueError: for parts that differ in anything but their tensors.
        """
        if len(parts) == 1 or all(part.calibrated_at is None for part in parts):
            return _joined(parts, ("logits", "tokens"), _GRID_FIELDS)
        joined = cls.joined([replace(part, calibrated_at=None) for part in parts])
        return replace(joined, calibrated_at=torch.cat([part.is_calibrated for part in parts]))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        write_record(path, "token logits", self._tensors, self.record)

    @classmethod
    def load(cls, path: str | Path) -> TokenLogits:
        """What `save` wrote, on the CPU.

        Raises:
            ValueError: if the file is absent, damaged or of another kind; the message names it.
        """
        names = ("logits", "tokens", "calibrated_at")
        tensors, meta = read_record(path, "token logits", names, _GRID_FIELDS, later=("calibrated_at",))
        with in_file(path):
            return cls(**tensors, **meta)


@dataclass(frozen=True, eq=False)
class Condition:
    """What the decoder is conditioned on (Eqs. 6-8).

    Attributes:
        code_vectors: [B, N, D], distribution-weighted code vectors; their lengths are 0..1 (not checked).
        uncertainty: [B, N, 4], each 0..1 (not checked): confidence p(1), margin p(1) - p(2), top-k mass, tail entropy.
        grid: (h, w), h * w = N.
        codebook: fingerprint of the codebook; None if unknown.

    Raises:
        ValueError: if any of this does not hold.
    """

    code_vectors: torch.Tensor
    uncertainty: torch.Tensor
    grid: tuple[int, int]
    _: KW_ONLY
    codebook: str | None = None

    def __post_init__(self):
        c, u = self.code_vectors, self.uncertainty
        if not isinstance(c, torch.Tensor) or c.ndim != 3 or c.dtype not in _FLOATS:
            raise ValueError(f"code vectors must be a floating-point tensor [B, N, D], got {_describe(c)}: {_MAPPED}")
        if not isinstance(u, torch.Tensor) or u.shape != (*c.shape[:2], 4) or u.dtype not in _FLOATS:
            raise ValueError(f"uncertainty must be floating point {[*c.shape[:2], 4]}, got {_describe(u)}: {_MAPPED}")
        object.__setattr__(self, "grid", _check_grid(self.grid, c.shape[1]))
        if c.shape[0] < 1:
            raise ValueError(f"a condition needs a batch of at least 1, got {_describe(c)}: {_MAPPED}")
        if not bool(torch.isfinite(c).all()) or not bool(torch.isfinite(u).all()):
            raise ValueError("the condition holds NaN or infinity: map its logits again")
        require_text("codebook", self.codebook, optional=True, remedy="map its logits again")

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """The same on another device, in another dtype if one is given."""
        return replace(
            self, code_vectors=self.code_vectors.to(device, dtype), uncertainty=self.uncertainty.to(device, dtype)
        )

    def part(self, first: int, last: int) -> Condition:
        """The images first..last - 1 of the batch."""
        return replace(self, code_vectors=self.code_vectors[first:last], uncertainty=self.uncertainty[first:last])

    @classmethod
    def joined(cls, parts: Sequence[Condition]) -> Condition:
        """Joins parts that were made the same way into one batch; a single part is returned as it is.

        Raises:
            ValueError: for parts that differ in anything but their tensors.
        """
        return _joined(parts, ("code_vectors", "uncertainty"), ("grid", "codebook"))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        tensors = {"code_vectors": self.code_vectors, "uncertainty": self.uncertainty}
        write_record(path, "condition", tensors, {"grid": self.grid, "codebook": self.codebook})

    @classmethod
    def load(cls, path: str | Path) -> Condition:
        """What `save` wrote, on the CPU.

        Raises:
            ValueError: if the file is absent, damaged or of another kind; the message names it.
        """
        tensors, meta = read_record(path, "condition", ("code_vectors", "uncertainty"), ("grid", "codebook"))
        with in_file(path):
            return cls(**tensors, **meta)


@dataclass(frozen=True, kw_only=True)
class CalibrationStatistics:
    """The four numbers that calibration matches (Eq. 12), over all tokens; each in 0..1.

    Attributes:
        mean_entropy, entropy_95: mean and 95th percentile of the normalised entropy.
        mean_confidence, confidence_95: mean and 95th percentile of the top-1 probability.

    Raises:
        ValueError: for a number outside 0..1 (by more than 1e-6).
    """

    mean_entropy: float
    entropy_95: float
    mean_confidence: float
    confidence_95: float

    def __post_init__(self):
        for name, value in asdict(self).items():
            # The mean of numbers that are all 1 may round to more than 1.
            require_number(name, value, least=-1e-6, most=1 + 1e-6, remedy="measure it again")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How proxy logits are made to match one VLM's (Eqs. 14-15), and how the VLM's own logits are softened.

    q = softmax(s (a cos + b)), p = (1 - eps) q + eps / K. The bias b cancels in the softmax, and s and a act as one
    number: all four names are kept to match the paper, but only s a and eps are free. For a VLM's logits only eps, the
    anchor and its temperature act (`method.calibration.to_probabilities`).

    Attributes:
        scale, affine_scale, affine_bias, smoothing: s > 0, a > 0, b, and eps in 0..1 (excluding 1).
        anchor: beta >= 0, the pull of VLM distributions towards the sampled token; 0 in the paper.
        anchor_temperature: tau > 0, by which a VLM's logits are divided before anchoring; 1 leaves them unchanged.
        target, achieved: statistics of the VLM's logits, and of the calibrated proxy logits.
        converged: whether |mean entropy - target| <= 0.02.
        vlm, guidance, temperature, codebook: what it was measured on; None, or "" for the VLM, if unknown.

    Raises:
        ValueError: for parameters out of range.
    """

    scale: float
    affine_scale: float = 1.0
    affine_bias: float = 0.0
    smoothing: float = 0.0
    anchor: float = 0.0
    anchor_temperature: float = 1.0
    target: CalibrationStatistics | None = None
    achieved: CalibrationStatistics | None = None
    converged: bool = False
    vlm: str = ""
    guidance: float | None = None
    temperature: float | None = None
    codebook: str | None = None

    def __post_init__(self):
        for name in ("scale", "affine_scale"):
            require_number(f"calibration {name}", getattr(self, name), above=0, most=_LARGEST, remedy=_CALIBRATED)
        limits = {
            "affine_bias": {"least": -_LARGEST, "most": _LARGEST},
            "smoothing": {"least": 0, "below": 1},
            "anchor": {"least": 0, "most": _LARGEST},
            "anchor_temperature": {"above": 0, "most": _LARGEST},
            "guidance": {"optional": True},
            "temperature": {"least": 0, "optional": True},
        }
        for name, limit in limits.items():
            require_number(f"calibration {name}", getattr(self, name), **limit, remedy=_CALIBRATED)
        for name in ("target", "achieved"):
            if not isinstance(getattr(self, name), (CalibrationStatistics, type(None))):
                raise ValueError(
                    f"calibration {name} must be statistics or None, got {shown(getattr(self, name))}: {_CALIBRATED}"
                )
        if not isinstance(self.converged, bool):
            raise ValueError(f"calibration converged must be true or false, got {shown(self.converged)}: {_CALIBRATED}")
        require_text("calibration vlm", self.vlm, remedy=_CALIBRATED)
        require_text("calibration codebook", self.codebook, optional=True, remedy=_CALIBRATED)

    @property
    def sharpness(self) -> float:
        """s a, the factor on the cosines (Eq. 14)."""
        return self.scale * self.affine_scale

    @property
    def unanchored(self) -> Calibration:
        """The same without anchor and anchor temperature (beta = 0, tau = 1), as in the paper."""
        return replace(self, anchor=0.0, anchor_temperature=1.0)

    def to(self, device: torch.device | str) -> Calibration:
        """Itself: it holds no tensors."""
        return self

    def part(self, first: int, last: int) -> Calibration:
        """Itself: a calibration belongs to a whole batch."""
        return self

    @classmethod
    def joined(cls, parts: Sequence[Calibration]) -> Calibration:
        """The calibration that all parts share.

        Raises:
            ValueError: if their calibrations differ.
        """
        if any(part != parts[0] for part in parts):
            raise ValueError("parts with different calibrations cannot be joined: calibrate them with one")
        return parts[0]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values for `from_dict`; omits an anchor temperature of 1, as files older than that field do."""
        return {name: value for name, value in asdict(self).items() if name != "anchor_temperature" or value != 1}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Calibration:
        """The calibration of `to_dict`'s values; a ValueError for unknown or missing names, or invalid values."""
        if not isinstance(values, dict):
            raise ValueError(f"a calibration must be an object, got {shown(values)}: {_CALIBRATED}")
        values = dict(values)
        known = set(cls.__dataclass_fields__)
        if "scale" not in values or not set(values) <= known:
            raise ValueError(
                f"a calibration must hold scale, and others of {sorted(known)}, got {shown(sorted(values))}: "
                f"{_CALIBRATED}"
            )
        for name in ("target", "achieved"):
            if values.get(name) is not None:
                expected = set(CalibrationStatistics.__dataclass_fields__)
                if not isinstance(values[name], dict) or set(values[name]) != expected:
                    raise ValueError(
                        f"calibration {name} must hold {sorted(expected)}, got {shown(values[name])}: calibrate again"
                    )
                values[name] = CalibrationStatistics(**values[name])
        return cls(**values)

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        write_record(path, "calibration", {}, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """What `save` wrote, on the CPU.

        Raises:
            ValueError: if the file is absent, damaged or of another kind; the message names it.
        """
        _, values = read_record(path, "calibration", (), tuple(cls.__dataclass_fields__), later=("anchor_temperature",))
        with in_file(path):
            return cls.from_dict(values)


def _joined(parts: Sequence[Any], tensors: Sequence[str], fields: Sequence[str]) -> Any:
    if len(parts) == 1:
        return parts[0]
    for name in fields:
        values = [getattr(part, name) for part in parts]
        if any(value != values[0] for value in values):
            raise ValueError(f"parts with different {name} cannot be joined into one batch: {values}")
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in tensors})


def _check_grid(grid: Any, tokens: int) -> tuple[int, int]:
    try:
        h, w = (operator.index(side) for side in grid)
        if any(isinstance(side, bool) for side in grid):
            raise TypeError
    except (TypeError, ValueError):
        raise ValueError(
            f"grid must be two whole numbers (h, w), got {shown(grid)}: give the (h, w) they were sampled on"
        ) from None
    if h < 1 or w < 1 or h * w != tokens:
        raise ValueError(
            f"a grid of {shown(h)} x {shown(w)} does not hold {tokens} tokens: give the (h, w) they were sampled on"
        )
    return h, w


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
