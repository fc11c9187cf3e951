"""In which order training sees its examples: shares of processes, endless batches, exact resume.

A source tells the order of an epoch without decoding anything; loading a picture is a function of its entry alone. So
the order does not depend on the number of workers, and a position is resumed without decoding what went before it.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..method.sampling import keyed_generator
from ..pipelines.images import UnreadableImage
from ..types import DCDDWarning
from .settings import require_at_least

UNREADABLE_SHARE, UNREADABLE_FROM = 0.01, 100

_ORDER = 41  # sets the draws of an order apart from others with the same seed
_CHUNK = 8  # entries that a worker is given at a time

# Where a stream can be entered: [position in the epoch, number of the file in the epoch's order, row in the file].
Mark = Sequence[int]
Item = TypeVar("Item")
Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class Share:
    """Which pictures a process gets, and in which order.

    Attributes:
        seed: of the order, new in every epoch; None for the order in which the pictures are stored.
        rank, world: this is process `rank` of `world`; no picture goes to two of them, and none is left out.
        window: of streams, which cannot be read anywhere: so many pictures at a time are read, undecoded, and shuffled.
    """

    seed: int | None = 0
    rank: int = 0
    world: int = 1
    window: int = 1000

    def __post_init__(self):
        require_at_least(1, window=self.window)
        if self.world < 1 or not 0 <= self.rank < self.world:
            raise ValueError(f"rank must lie in 0..{self.world - 1} of {self.world} processes, got {self.rank}")

    def permutation(self, count: int, *key: int) -> list[int]:
        """A permutation of range(count), the same in all processes, a function of the seed and the key."""
        if self.seed is None:
            return list(range(count))
        return torch.randperm(count, generator=keyed_generator(self.seed, _ORDER, *key)).tolist()

    def indices(self, count: int, epoch: int, start: int) -> list[int]:
        """This process's of range(count) in an epoch, from position `start` on: of a source that is read anywhere."""
        return self.permutation(count, epoch)[self.rank :: self.world][start:]


@dataclass(frozen=True)
class Entry:
    """A picture that was not read yet: its name, what its source needs to load it, and where to enter a stream."""

    key: str
    data: Any
    mark: Mark | None = None


class Source(Protocol[Item, Batch]):
    """Where training examples come from: pictures, or a cache of their encodings."""

    name: str
    fingerprint: str  # changes when entries are added, taken away or renamed

    def entries(self, share: Share, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """The share's entries of an epoch from position `start` on; `mark`, of an entry near there, saves reading."""

    def load(self, entry: Entry) -> Item:
        """Raises UnreadableImage."""

    def collate(self, items: Sequence[Item]) -> Batch: ...


class Tally:
    """Counts what was read; warns of each unreadable picture, and stops when they are too many.

    Attributes:
        read, unreadable: so far; the second is part of the first.
    """

    def __init__(self, read: int = 0, unreadable: int = 0):
        self.read = read
        self.unreadable = unreadable

    def admit(self, item: Any, source: str) -> bool:
        """Whether the item was read.

        Raises:
            ValueError: at an unreadable item, if more than 1 % of at least 100 were unreadable.
        """
        self.read += 1
        if not isinstance(item, Unreadable):
            return True
        self.unreadable += 1
        warnings.warn(f"{item.key} of {source} is skipped: {item.reason}", DCDDWarning, stacklevel=2)
        if self.read >= UNREADABLE_FROM and self.unreadable > UNREADABLE_SHARE * self.read:
            raise ValueError(
                f"{self.unreadable} of {self.read} pictures of {source} could not be read, the last one {item.key} "
                f"({item.reason}); more than {UNREADABLE_SHARE:.0%} is more than chance: check the disk and the files, "
                "or take the bad ones out"
            )
        return False


@dataclass(frozen=True)
class Unreadable:
    """Stands for an item that could not be loaded."""

    key: str
    reason: str


def load_in_order(
    source: Source[Item, Any], entries: Iterable[tuple[Any, Entry]], *, workers: int = 0
) -> Iterator[tuple[Any, Item | Unreadable]]:
    """(tag, item) for each (tag, entry), in their order whatever the number of worker processes."""
    tags: deque[Any] = deque()

    def chunks() -> Iterator[list[Entry]]:
        # Runs in this process: a stream is read once, and its bytes are sent to the workers, which decode them.
        remaining = iter(entries)
        while chunk := list(islice(remaining, _CHUNK)):
            tags.extend(tag for tag, _ in chunk)
            yield [entry for _, entry in chunk]

    loader = DataLoader(
        _Loading(source),
        batch_sampler=chunks(),
        collate_fn=_as_they_are,
        num_workers=workers,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    for items in loader:
        for item in items:
            yield tags.popleft(), item


class Batches(Generic[Batch]):
    """Endless batches of one process's share, epoch after epoch, from a position that can be saved and resumed.

    Every batch is full: an unreadable picture's place is taken by the one after it, and a batch may span two epochs.
    What comes does not depend on `workers`.

    The state says how far the batches that were handed out reach, not what was read ahead. It is JSON and belongs to
    one process: with several, each needs its own back (accelerate's `register_for_checkpointing` keeps only that of
    the main process).

    Args:
        source: see `Source`.
        size: B.
        share: seed, and the process's place among the others.
        workers: processes that decode; 0 for this one.

    Raises:
        ValueError: while iterating, if the share is empty or too much is unreadable.
    """

    def __init__(self, source: Source[Any, Batch], *, size: int, share: Share | None = None, workers: int = 0):
        if size < 1:
            raise ValueError(f"a batch needs a size of at least 1, got {size}")
        self.source = source
        self.size = size
        self.share = share or Share()
        self.workers = workers
        self.tally = Tally()
        self._at: tuple[int, int, Mark | None] = (0, 0, None)

    @property
    def epoch(self) -> int:
        """Of the last picture that was handed out."""
        return self._at[0]

    def __iter__(self) -> Iterator[Batch]:
        items = []
        for at, item in load_in_order(self.source, self._entries(), workers=self.workers):
            if self.tally.admit(item, self.source.name):
                items.append(item)
            if len(items) == self.size:
                self._at = at
                yield self.source.collate(items)
                items = []

    def _entries(self) -> Iterator[tuple[tuple[int, int, Mark | None], Entry]]:
        epoch, start, mark = self._at
        while True:
            end = start
            for end, entry in enumerate(self.source.entries(self.share, epoch, start, mark), start + 1):
                yield (epoch, end, entry.mark), entry
            if end == 0:
                raise ValueError(
                    f"{self.source.name} has no picture for process {self.share.rank} of {self.share.world}: use fewer "
                    "processes, or more pictures"
                )
            epoch, start, mark = epoch + 1, 0, None

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, as JSON."""
        epoch, consumed, mark = self._at
        return {
            "source": self.source.fingerprint,
            **asdict(self.share),
            "epoch": epoch,
            "consumed": consumed,
            "mark": None if mark is None else list(mark),
            "read": self.tally.read,
            "unreadable": self.tally.unreadable,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a position; an iterator that runs already does not notice.

        Raises:
            ValueError: if it is of another source, seed, or number of processes.
        """
        own = {"source": self.source.fingerprint, **asdict(self.share)}
        differ = [f"{name} {state.get(name)!r} -> {value!r}" for name, value in own.items() if state.get(name) != value]
        if differ:
            raise ValueError(
                f"this position was saved from other data ({', '.join(differ)}): resume with the same pictures, seed "
                "and number of processes, or start afresh"
            )
        mark = state["mark"]
        self._at = (state["epoch"], state["consumed"], mark if mark is None else tuple(mark))
        self.tally = Tally(state["read"], state["unreadable"])


class _Loading(Dataset):
    """What a worker does with an entry."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, entry: Entry) -> Any:
        try:
            return self.source.load(entry)
        except UnreadableImage as error:
            return Unreadable(entry.key, str(error))


def _as_they_are(items: list[Any]) -> list[Any]:
    return items
