"""Decoder bundles: one safetensors file with the adapter, the trained weights, and a card in its header."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from .. import registry
from ..files import (
    is_finite,
    json_object,
    open_tensors,
    reading,
    require_checksums,
    stored_checksums,
    write_tensors,
)
from ..settings import shown
from ..types import DCDDWarning
from .card import LATER, DecoderCard
from .checkpoints import StoredTensors, find_tensors, load_strictly, misfits
from .decoder import DistributionConditionedDecoder
from .int8 import linear_weights, store_in_int8

_FORMAT = "dcdd decoder 1"
_BUNDLE = "a DCDD decoder bundle (.safetensors)"
#: The first diffusers release that streams torchao's tensors.
_STREAMS_TORCHAO = (0, 38)


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """How a decoder's weights are held.

    Attributes:
        device: device it computes on.
        dtype: compute dtype; None keeps the stored dtypes.
        linear_dtype: dtype to hold the blocks' linear weights in, for a host whose layers compute in the dtype of their
            input whatever they are stored in; None for `dtype`.
        fold: False keeps the layers that `Backbone.fold` would instead read from disk once per schedule: for training,
            and for `save_bundle`.
        eight_bit: store the blocks' linear weights as int8, which takes half the memory of bfloat16, at a small loss
            (`python -m benchmarks int8` measures it). On a CPU it is slower, even when compiled.
        streamed: keep the blocks in RAM and move each to `device` only for its turn: slow, but FLUX.1-Fill then takes
            only the memory of one block there.
        compiled: compile the blocks: the first image of each size and batch waits for the compiler. After eight sizes
            and batches, torch's limit (`torch._dynamo.config.recompile_limit`), new ones run uncompiled.

    Raises:
        ValueError: for choices that exclude each other, and for streamed 8-bit weights with an old diffusers.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None
    linear_dtype: torch.dtype | None = None
    fold: bool = True
    eight_bit: bool = False
    streamed: bool = False
    compiled: bool = False

    def __post_init__(self):
        if (self.eight_bit and not self.fold) or (self.streamed and (self.compiled or not self.fold)):
            raise ValueError(
                "weights in 8 bits cannot be trained, and streamed weights can be neither compiled nor trained: got "
                f"eight_bit={self.eight_bit}, streamed={self.streamed}, compiled={self.compiled}, fold={self.fold}"
            )
        if self.eight_bit and self.linear_dtype is not None:
            raise ValueError(
                f"eight_bit holds linear weights as int8, got linear_dtype={self.linear_dtype}: leave out one of them"
            )
        if self.eight_bit and self.streamed:
            import diffusers  # takes seconds, which the help texts of commands should not

            version = tuple(map(int, diffusers.__version__.split(".")[:2]))
            if version < _STREAMS_TORCHAO:
                raise ValueError(
                    f"8-bit weights are streamed by diffusers 0.38 or newer, this is {diffusers.__version__}: upgrade "
                    "it, or hold the weights either in 8 bits or streamed"
                )


def save_bundle(
    path: str | Path,
    decoder: DistributionConditionedDecoder,
    *,
    trained: Callable[[str], bool] = lambda name: True,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a decoder bundle: one safetensors file with the adapter, the trained weights and the card.

    Weights that the backbone calls unused are left out: a bundle paints, and can be trained further, without them.

    Args:
        trained: tells from a transformer parameter's name whether it differs from the base; the others are left out.
        dtype: storage dtype.

    Raises:
        ValueError: for a decoder that was folded for painting, and for weights that are NaN or infinite in `dtype`.
        OSError: if it cannot be written, for example to a full disk; an existing file is then kept.
    """
    if decoder.backbone.folded:
        raise ValueError(
            "this decoder was loaded for painting and does not hold all its weights: load it with fold=False"
        )
    tensors = {f"adapter.{k}": v for k, v in decoder.adapter.state_dict().items()}
    of_transformer = decoder.transformer.state_dict()
    kept = {k: v for k, v in of_transformer.items() if trained(k) and not decoder.backbone.unused(k)}
    tensors |= {f"transformer.{k}": v for k, v in kept.items()}
    tensors = {k: v.to("cpu", dtype) for k, v in tensors.items()}
    if broken := [name for name, tensor in tensors.items() if not is_finite(tensor)]:
        raise ValueError(
            f"{path} was not written: {shown(broken)} hold NaN or infinity in {str(dtype).removeprefix('torch.')}: the "
            "training diverged, resume it from an earlier checkpoint at a lower learning rate"
        )
    write_tensors(path, tensors, {"format": _FORMAT, "card": json.dumps(decoder.card.to_dict())}, checksums=True)


def read_card(path: str | Path) -> DecoderCard:
    """Reads the card of a bundle, without its weights.

    Raises:
        ValueError: if the file is missing, damaged, not a bundle, or written by another version.
    """
    with open_tensors(path, _BUNDLE) as file, reading(path, _BUNDLE):
        header = file.metadata() or {}
    if header.get("format") != _FORMAT:
        raise ValueError(
            f"{path} is no DCDD decoder bundle (its header has no {_FORMAT!r}); a bundle is made by training"
        )
    values = json_object(header.get("card", ""), path, "a decoder's card")
    known = {field.name for field in fields(DecoderCard)}
    if not set(values) & known:
        raise ValueError(f"{path} has a card without any of its fields: it is damaged, copy or download it again")
    more, less = sorted(set(values) - known), sorted(known - set(values) - LATER)
    if more or less:
        raise ValueError(
            f"{path} was written by another version: its card has {shown(more)} more and {less} less than this one "
            "reads; update ComfyUI-DCDD, or train it again"
        )
    with _of_card(path):
        return DecoderCard.from_dict(values)


@contextmanager
def _of_card(path: str | Path) -> Iterator[None]:
    """Wraps code that checks a card: its ValueErrors then name the file and what to do."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"the card of {path} cannot be used: {error}; download the bundle again") from error


def load_decoder(
    path: str | Path, base: str | Path | None = None, options: DecoderOptions | None = None
) -> DistributionConditionedDecoder:
    """Loads a bundle over its base model, without the weights that cannot reach the output.

    Of FLUX.1-Fill's 11.90 billion parameters, 6.46 billion are held for painting and 8.66 billion for training. Dropped
    weights are not read, except that the whole bundle is read once for its checksums. Weights that `Backbone.fold`
    takes out are read again for every new schedule, so the files must stay where they are.

    Args:
        base: the base model, in a layout that its `BackboneFamily` reads. Only weights that the bundle lacks are read
            from it; None if it lacks none, and unused, with a warning, in that case.

    Raises:
        ValueError: as `read_card`; naming the base that is needed, or tensors that are missing, unexpected, of a wrong
            shape, not finite or not what was written; for `eight_bit` without torchao.
    """
    card = read_card(path)
    with _of_card(path), torch.device("meta"):
        decoder = DistributionConditionedDecoder.build(card)
    what = f"{path}" + (f" over {base}" if base else "")
    stored = _find(path, base, decoder)
    _require_sound(path, decoder)
    return fill_decoder(decoder, stored, options or DecoderOptions(), what=what)


def _require_sound(path: str | Path, decoder: DistributionConditionedDecoder) -> None:
    """Reads a bundle once, a tensor at a time, and refuses tensors that are not finite or differ from what was written.

    Unused tensors are skipped. Older bundles have no checksums to compare with.
    """
    with open_tensors(path, _BUNDLE) as file:
        with reading(path, _BUNDLE):
            metadata, names = file.metadata() or {}, list(file.keys())
        checksums = stored_checksums(path, metadata)
        if absent := sorted(set(checksums) - set(names)):
            raise ValueError(f"{path} is damaged: it lacks {shown(absent)}: take another copy of the file")
        for name in names:
            if decoder.backbone.unused(name.removeprefix("transformer.")):
                continue
            with reading(path, _BUNDLE):
                tensor = file.get_tensor(name)
            if not tensor.is_floating_point():
                raise ValueError(
                    f"{path} holds {name} in {str(tensor.dtype).removeprefix('torch.')}, expected floating-point "
                    "weights; quantised bundles are not read: take the original, which can be held in 8 bits"
                )
            require_checksums(path, {name: tensor}, checksums)
            if not is_finite(tensor):
                raise ValueError(
                    f"{path} holds NaN or infinity in {name}: its training diverged or the file is damaged, take "
                    "another bundle"
                )


def fill_decoder(
    decoder: DistributionConditionedDecoder, stored: StoredTensors, options: DecoderOptions, *, what: str
) -> DistributionConditionedDecoder:
    """Loads the weights of a whole decoder that is on "meta".

    Args:
        stored: all weights that can reach the output; only those that are held are read.
        what: names the files in errors.

    Raises:
        ValueError: as `load_decoder`.
    """
    backbone, dtype = decoder.backbone, options.dtype
    backbone.drop_unused()
    if options.fold:
        backbone.fold(stored.within("transformer."))
    tensors: dict[str, torch.Tensor] = {}
    parents = {f"transformer.{name}" for name in backbone.block_names}
    blocks = {name: part for name, part in decoder.named_modules() if name.rpartition(".")[0] in parents}
    # Each block goes straight to its final dtype and device, so that not all of them need to fit anywhere else.
    place = "cpu" if options.streamed else options.device
    for name, block in blocks.items():
        own = stored.within(f"{name}.")
        read = own.read(linear_weights(block), dtype=options.linear_dtype or dtype, device=place)
        others = [each for each in block.state_dict() if each not in read]
        load_strictly(block, read | own.read(others, dtype=dtype, device=place), what)
        if options.eight_bit:
            store_in_int8(block, place)
        tensors |= {f"{name}.{of}": tensor for of, tensor in block.state_dict().items()}
    rest = [name for name in decoder.state_dict() if name not in tensors]
    load_strictly(decoder, tensors | stored.read(rest, dtype=dtype, device=options.device), what)
    decoder.eval().requires_grad_(False)
    if options.streamed:
        backbone.stream(torch.device(options.device))
    if options.compiled:
        backbone.compile()
    return decoder


def _find(path: str | Path, base: str | Path | None, decoder: DistributionConditionedDecoder) -> StoredTensors:
    """All tensors of a whole decoder that can reach its output: the bundle's, and the base's for the rest."""
    expected = {name: value.shape for name, value in decoder.state_dict().items()}
    of_bundle = find_tensors(path, expected, type(decoder).__name__)
    of_transformer = {name for name in expected if name.startswith("transformer.")}
    unused = {name for name in of_transformer if decoder.backbone.unused(name.removeprefix("transformer."))}
    without = unused | {name for name in expected if name in of_bundle}
    if missing := sorted(expected.keys() - of_transformer - without):
        raise ValueError(f"{path} does not fit {type(decoder).__name__}; {misfits(missing=missing)}")
    absent = of_transformer - without
    if not absent:
        if base is not None:
            warnings.warn(f"{path} holds all weights: {base} is not used", DCDDWarning, stacklevel=3)
        return of_bundle
    if base is None:
        raise ValueError(
            f"{path} holds only what training changed; it needs its base model {decoder.card.base} as well "
            f"({len(absent)} tensors): give the folder or file that holds it"
        )
    own = {name.removeprefix("transformer.") for name in of_transformer & without}
    family = registry.backbone_family(decoder.card.base_config)
    found = family.find(str(base), decoder.backbone, needs=decoder.card.base, without=own)
    return found.below("transformer.") | of_bundle
