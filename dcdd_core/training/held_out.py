"""The held-out images of a run: how they are chosen, the loss on them, and the training source without them.

Shapes: B batch, C latent channels, h' w' latent grid.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from ..method.flow import sample_times
from ..method.sampling import keyed_generator
from ..models.decoder import DistributionConditionedDecoder
from ..pipelines.progress import ProgressBar
from .batches import DataShard, Entry, Mark, ReadCounter, Source, Wrapped, load_in_order, stream_files_of
from .cache import EncodingCache
from .config import OptimizationConfig
from .encoded_batch import VLM_TENSORS, EncodedBatch
from .examples import Example, ExampleMaker
from .loss import velocity_losses

#: The most images that are held out, and the fewest that a source must have to be split.
MOST, FEWEST_SPLIT = 512, 20
_DRAWS = 64  # a loss is the mean over at least this many pairs of a time and a noise [choice]
_KEY = 53  # keeps these draws apart from others with the same seed


@dataclass(frozen=True)
class Split:
    """A source split in two.

    Attributes:
        training: the source without the held-out images.
        held_out: only these, in the order of their hashes.
        fingerprint: a hash of the held-out images' names.
    """

    training: Source
    held_out: Listed
    fingerprint: str


def split(source: Source, fraction: float, *, shown: bool = True) -> Split | None:
    """Holds out a fraction of the images, at least 1 and at most `MOST`; None for fewer than `FEWEST_SPLIT` images.

    The images whose names have the smallest hashes are held out, whatever the order, the seed and the number of
    processes. A stream, which has no list of its images, is read from its beginning, but only until `MOST` of the
    hashes lie below the fraction.

    Args:
        shown: whether to show a progress bar while a stream is read; False for all processes but the first.
    """
    seen, below, enough = 0, 0, False
    name_of, stream = namer(source), stream_files_of(source) > 0

    def hashed() -> Iterator[tuple[int, str, Entry]]:
        nonlocal seen, below, enough
        entries = source.entries(DataShard(seed=None), 0)
        with ProgressBar(entries, label="choosing held-out images", unit="image", shown=shown and stream) as bar:
            for entry in bar:
                name = name_of(entry)
                value = int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()[:8], "big")
                seen, below = seen + 1, below + (value < fraction * 2**64)
                yield value, name, entry
                if enough := stream and below == MOST:
                    return

    smallest = heapq.nsmallest(MOST, hashed(), key=lambda found: found[:2])
    count = MOST if enough else min(MOST, max(1, round(fraction * seen)))
    if seen < FEWEST_SPLIT:
        return None
    names = [name for _, name, _ in smallest[:count]]
    digest = hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()[:16]
    held_out = Listed(source, [entry for _, _, entry in smallest[:count]])
    return Split(training=Without(source, frozenset(names)), held_out=held_out, fingerprint=digest)


def namer(source: Source) -> Callable[[Entry], str]:
    """A function that names an entry's image; in a cache, by the name that it had when it was encoded."""
    return (lambda entry: source.keys[entry.data]) if isinstance(source, EncodingCache) else (lambda entry: entry.key)


class Listed(Wrapped):
    """A `Source` of given entries of another one, with random access."""

    stream_files = 0

    def __init__(self, source: Source, listed: Sequence[Entry]):
        super().__init__(source)
        self.listed = listed

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        return (replace(self.listed[i], mark=None) for i in shard.indices(len(self.listed), epoch, start))


class Without(Wrapped):
    """A `Source` without the images of these names. Its marks are the source's, each followed by the position here."""

    def __init__(self, source: Source, names: frozenset[str]):
        super().__init__(source)
        self.names = names
        self._name_of = namer(source)

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`. Without a mark, everything before `start` is listed again."""
        inner, position = (mark[:-1], mark[-1]) if mark else (None, 0)
        found = self.source.entries(shard, epoch, inner[0] if inner else 0, inner)
        last, here = None, None
        for entry in found:
            if entry.mark is not None and entry.mark != last:
                last, here = entry.mark, [*entry.mark, position]
            if self._name_of(entry) not in self.names:
                position += 1
                if position > start:
                    yield replace(entry, mark=here)

    def __getstate__(self) -> dict[str, Any]:
        # Workers only load, and a lambda cannot be sent to them.
        return {name: value for name, value in self.__dict__.items() if name != "_name_of"}


#: (decoder, example, noises [B, C, h', w']) -> errors [B].
Errors = Callable[[DistributionConditionedDecoder, Example, torch.Tensor], torch.Tensor]


class HeldOutLoss:
    """The loss (Eq. 26) on held-out images, which are painted whole and always with the same times and noises.

    Each process encodes its share once, and keeps the encodings in RAM.

    Args:
        held_out: the images.
        encode: encodes a batch of them.
        make: makes examples, without localised decoding.
        vlm_share: the training's; 0 if it uses proxies only.
        errors: replace those of Eq. 26, for a training with another loss.
        batch: images at a time.
        rank, world: this process's rank and the world size.
        total: a vector of this process -> the sum over all processes.

    Attributes:
        counter: counts the images that this process read.

    Raises:
        ValueError: in all processes, if no image can be read.
    """

    def __init__(
        self,
        held_out: Listed,
        encode: Callable[[Any], EncodedBatch],
        make: ExampleMaker,
        config: OptimizationConfig,
        *,
        batch: int,
        rank: int,
        world: int,
        total: Callable[[torch.Tensor], torch.Tensor],
        vlm_share: float = 0.0,
        errors: Errors | None = None,
    ):
        self.make, self.config, self.total, self.vlm_share = make, config, total, vlm_share
        self.errors = errors
        count = len(held_out.listed)
        draws = math.ceil(_DRAWS / count)
        # With sharded weights, all processes must make the same number of forward passes, so all have the same number
        # of items, some with weight zero. A process without a readable image of its own takes one of another's.
        self.counter = ReadCounter()
        others = (number for number in range(count) if number % world != rank)
        readable = list(read_listed(held_out, range(rank, count, world), self.counter))
        readable = readable or list(islice(read_listed(held_out, others, self.counter), 1))
        if not readable:
            raise ValueError(f"no held-out image of {held_out.name} can be read: check the disk and the files")
        items = [(number, item, float(number % world == rank)) for number, item in readable]
        items += [(*items[0][:2], 0.0)] * (math.ceil(count / world) - len(items))
        encoded = [
            encode(held_out.collate([item for _, item, _ in items[start : start + batch]]))
            for start in range(0, len(items), batch)
        ]
        names = ("features", "latents", *(VLM_TENSORS if vlm_share else ()))
        self.tensors = {name: torch.cat([getattr(part, name).cpu() for part in encoded]) for name in names}
        self.weights = torch.tensor([weight for _, _, weight in items])
        # (item, its image's number, draw): with several draws each, even a few images fill the batches.
        self.pairs = [(i, number, draw) for i, (number, *_) in enumerate(items) for draw in range(draws)]
        self.batch = batch

    def __call__(self, decoder: DistributionConditionedDecoder, *, dropped: bool = False) -> float:
        """The mean loss over all held-out images of all processes, on proxies.

        Args:
            dropped: replaces every condition by the decoder's null condition.
        """
        loss, weight = self._sums(decoder, self.make, self.weights[:, None], dropped=dropped)[0]
        return loss / weight

    def numbers(self, decoder: DistributionConditionedDecoder) -> dict[str, float]:
        """The "loss"; in a training with a VLM's conditions also "loss_proxies" and "loss_vlm".

        These two are on proxies alone, and on the VLM's conditions alone, of the images that have them. "loss" is then
        what is trained: both kinds of condition, weighted by their share.
        """
        proxies = self(decoder)
        if not self.vlm_share:
            return {"loss": proxies}
        weights = torch.stack([self.weights, self.weights * self.tensors["vlm_known"]], dim=1)
        every, own = self._sums(decoder, self.make.with_share(1.0), weights)
        found = {"loss": (1 - self.vlm_share) * proxies + self.vlm_share * every[0] / every[1], "loss_proxies": proxies}
        return found | ({"loss_vlm": own[0] / own[1]} if own[1] else {})

    def _sums(
        self,
        decoder: DistributionConditionedDecoder,
        make: ExampleMaker,
        weights: torch.Tensor,
        *,
        dropped: bool = False,
    ) -> list[list[float]]:
        """For each column of weights [items, columns]: the weighted sum of all losses, and the sum of the weights.

        Both are over all processes.
        """
        found = torch.zeros(weights.shape[1], 2)
        for start in range(0, len(self.pairs), self.batch):
            pairs = self.pairs[start : start + self.batch]
            index = [i for i, *_ in pairs]
            batch = EncodedBatch(**{name: values[index] for name, values in self.tensors.items()})
            t, noise = self._drawn(pairs)
            example = make(batch, keyed_generator(0))
            which = torch.ones(len(t), dtype=torch.bool) if dropped else None
            if self.errors is None:
                losses = velocity_losses(decoder, example, t, noise, self.config.weighting, which)
            else:
                losses = self.errors(decoder, example, noise)
            losses = losses.float().cpu()
            found += torch.stack([losses @ weights[index], weights[index].sum(0)], dim=1)
        return self.total(found.flatten()).reshape(-1, 2).tolist()

    def _drawn(self, pairs: Sequence[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Times [B] and noises [B, C, h', w'], each determined by the seed, the image's number and the draw's."""
        times, noises = [], []
        for _, number, draw in pairs:
            generator = keyed_generator(self.config.seed, _KEY, number, draw)
            times.append(sample_times(1, generator=generator, density=self.config.density, shift=self.config.shift))
            noises.append(torch.randn(1, *self.tensors["latents"].shape[1:], generator=generator))
        return torch.cat(times), torch.cat(noises)


def read_listed(held_out: Listed, numbers: Iterable[int], counter: ReadCounter) -> Iterator[tuple[int, Any]]:
    """(number, item) of each usable held-out image among these numbers; all of them are counted.

    They are read in this process: each tensor of another one would keep a file open for as long as the item is kept.
    """
    for number, item in load_in_order(held_out, ((i, held_out.listed[i]) for i in numbers)):
        if counter.admit(item, f"the held-out images of {held_out.name}"):
            yield number, item


def count_images(source: Source) -> int | None:
    """The number of images that a source lists; None for a stream, which would have to be read."""
    return None if stream_files_of(source) else sum(1 for _ in source.entries(DataShard(seed=None), 0))
