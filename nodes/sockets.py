"""The socket types, and the values of those that carry models.

TOKEN_LOGITS and CALIBRATION carry dcdd_core's TokenLogits and Calibration themselves, on ComfyUI's intermediate device.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from comfy_api.latest import io

from ..dcdd_core.models.card import DecoderCard
from ..dcdd_core.models.decoder import DistributionConditionedDecoder
from ..dcdd_core.protocols import ImageTokenizer, TokenSampler
from ..dcdd_core.types import Condition, Source
from .host import Managed, ManagedCodec

CATEGORY = "DCDD"
CONNECT_LOGITS = "connect the token_logits of a Janus Logit Sampler, Progressive Token Sampler or VQ-VAE Encode"
CONNECT_VQ = "connect the vq_vae of a Load Janus or Load VQ-VAE"

JanusModelSocket = io.Custom("JANUS_MODEL")
VQVAESocket = io.Custom("VQ_VAE")
DecoderSocket = io.Custom("DCDD_DECODER")
TokenLogitsSocket = io.Custom("TOKEN_LOGITS")
ConditionSocket = io.Custom("DCDD_CONDITION")
CalibrationSocket = io.Custom("CALIBRATION")


@dataclass(frozen=True, kw_only=True)
class JanusModel:
    """What JANUS_MODEL carries: the sampler, and the tokenizer that decodes its previews."""

    sampler: Managed[TokenSampler]
    vq: Managed[ImageTokenizer]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """What DCDD_DECODER carries: the decoder, and its own codec, or None if a VAE has to be connected."""

    decoder: Managed[DistributionConditionedDecoder]
    codec: ManagedCodec | None


@dataclass(frozen=True, kw_only=True, eq=False)
class MappedCondition(Condition):
    """What DCDD_CONDITION carries: a condition that knows how it was made.

    Attributes:
        token_size: pixels per token, along each side.
        model, source, calibrated: those of the token logits.
        card: that of the decoder for which the LCDM Encoder calibrated; None if no decoder was connected.
        sharpness: s of the card's calibration, or of an embedded VLM's own; None without one.
    """

    token_size: int
    model: str
    source: Source
    calibrated: bool
    card: DecoderCard | None
    sharpness: float | None


def schema(name: str, display_name: str, *, category: str, search_aliases: list[str], **values: Any) -> io.Schema:
    """A node's schema; search aliases are left out where ComfyUI does not support them."""
    known = {field.name for field in fields(io.Schema)}
    if "search_aliases" in known:
        values["search_aliases"] = search_aliases
    return io.Schema(node_id=f"DCDD_{name}", display_name=display_name, category=f"{CATEGORY}/{category}", **values)


def expect(value: Any, kind: type, socket: str, remedy: str) -> None:
    """Refuses a value that is not a `kind`: ComfyUI lets literals and other packs' values into custom sockets.

    Raises:
        ValueError: naming what came, and `remedy`.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{socket} got {type(value).__name__} {str(value)[:60]!r}: {remedy}")
