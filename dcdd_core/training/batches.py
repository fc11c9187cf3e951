"""The order in which training sees its examples: per-process shards, endless batches, exact resume.

A source lists the order of an epoch without decoding anything, and loading an image depends on its entry alone. So the
order does not depend on the number of workers, and a run resumes at a position without decoding what came before it.
"""

from __future__ import annotations

import signal
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from ..method.sampling import keyed_generator
from ..pipelines.image_files import ReadPolicy
from ..pipelines.images import TooSmallImage, UnreadableImage
from ..settings import require_at_least
from ..types import DCDDWarning
from .captions import MissingCaption
from .image_batch import TrainingImage

MIN_READ = 100
"""Images that are read before a share of unreadable ones means anything."""

_ORDER = 41  # keeps the draws of an order apart from others with the same seed
_CHUNK = 8  # entries that a worker is given at a time
MOST_NAMED = 1000
"""Images that are left out and named; of unreadable ones also, how many are looked for."""

# Where to enter a stream: [position in the epoch, number of the file in the epoch's order, row in the file].
Mark = Sequence[int]
Item = TypeVar("Item")
Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class DataShard:
    """Which images a process gets, and in which order.

    Attributes:
        seed: of the order, which is new in every epoch; None for the order in which the images are stored.
        rank, world: this process's rank and the world size; every image goes to exactly one process.
        window: for streams, which have no random access: this many images at a time are read, undecoded, and shuffled.
            Without effect on other sources.

    Raises:
        ValueError: for a rank outside 0..world-1, and a window below 1.
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
        """A permutation of range(count), determined by seed and key and the same in all processes."""
        if self.seed is None:
            return list(range(count))
        return torch.randperm(count, generator=keyed_generator(self.seed, _ORDER, *key)).tolist()

    def indices(self, count: int, epoch: int, start: int) -> list[int]:
        """This process's indices of range(count) in an epoch from position `start` on, for random access."""
        return self.permutation(count, epoch)[self.rank :: self.world][start:]


@dataclass(frozen=True)
class Entry:
    """An image that is not loaded yet: its name, what its source needs to load it, and where to enter a stream."""

    key: str
    data: Any
    mark: Mark | None = None


class Source(Protocol[Item, Batch]):
    """Where training examples come from: images, or a cache of their encodings.

    Attributes:
        name: for messages.
        fingerprint: changes when entries are added, removed or renamed.
        policy: which entries may be left out.

    A stream also has `stream_files`, the number of files that are read one after the other (`stream_files_of`).
    """

    name: str
    fingerprint: str
    policy: ReadPolicy

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """The shard's entries of an epoch from position `start` on; the `mark` of an entry before it saves reading."""

    def load(self, entry: Entry) -> Item:
        """Loads an entry's item; raises UnreadableImage for one to leave out."""

    def collate(self, items: Sequence[Item]) -> Batch: ...


def stream_files_of(source: Source) -> int:
    """The number of files that a stream is read from; 0 for a source with random access."""
    return getattr(source, "stream_files", 0)


class Wrapped:
    """Base class of a `Source` that only changes another one's entries and takes everything else from it."""

    def __init__(self, source: Source):
        self.source = source
        self.name = source.name
        self.fingerprint = source.fingerprint

    @property
    def policy(self) -> ReadPolicy:
        """See `Source`."""
        return self.source.policy

    @property
    def min_side(self) -> int | None:
        """Of the source, if it leaves out images for their size."""
        return getattr(self.source, "min_side", None)

    @property
    def stream_files(self) -> int:
        """Of the source, if it is a stream."""
        return stream_files_of(self.source)

    def load(self, entry: Entry) -> Any:
        """See `Source.load`."""
        return self.source.load(entry)

    def collate(self, items: Sequence[Any]) -> Any:
        """See `Source.collate`."""
        return self.source.collate(items)


class ReadCounter:
    """Counts what was read, and warns about each image that is left out.

    Attributes:
        read, unreadable: images so far; `read` includes the unreadable ones, but not those left out as too small or
            for lack of a caption.
        small: images that are too small.
        bare: images that are left out for lack of a caption.
        reasons: name of an unreadable image -> what is wrong with it, for the first `MOST_NAMED`.
        too_small, uncaptioned: names of the images in `small` and in `bare`, up to as many.
        without_caption: names of images that are used without a caption, up to as many.
    """

    def __init__(self, read: int = 0, unreadable: int = 0, small: int = 0):
        self.read = read
        self.unreadable = unreadable
        self.small = small
        self.bare = 0
        self.reasons: dict[str, str] = {}
        self.too_small: dict[str, None] = {}
        self.uncaptioned: dict[str, None] = {}
        self.without_caption: dict[str, None] = {}

    def admit(self, item: Any, source: str) -> bool:
        """Counts an item; returns whether it can be used."""
        if not isinstance(item, Unreadable):
            self.read += 1
            if isinstance(item, TrainingImage) and item.uncaptioned and len(self.without_caption) < MOST_NAMED:
                self.without_caption[item.key] = None
            return True
        if item.small:
            self.small += 1
            if len(self.too_small) < MOST_NAMED:
                self.too_small[item.key] = None
        elif item.uncaptioned:
            self.bare += 1
            if len(self.uncaptioned) < MOST_NAMED:
                self.uncaptioned[item.key] = None
        else:
            self.read += 1
            self.unreadable += 1
            if len(self.reasons) < MOST_NAMED:
                self.reasons[item.key] = item.reason
        warnings.warn(f"{item.key} of {source} is skipped: {item.reason}", DCDDWarning, stacklevel=2)
        return False

    def check(self, source: Source) -> None:
        """Refuses a source that was read to its end if too many images are unreadable, or none can be used.

        Raises:
            ValueError: naming the unreadable images.
        """
        source.policy.check(self.read, self.unreadable, self.reasons, source.name)
        if self.read == self.unreadable:
            bare = f", and {self.bare} have no caption" if self.bare else ""
            raise ValueError(
                f"none of the {self.read + self.small + self.bare} images of {source.name} can be used: "
                f"{self.unreadable} cannot be read, and {self.small} are too small (see --min-side){bare}"
            )


@dataclass(frozen=True)
class Unreadable:
    """Stands for an item that is left out: as too `small`, as `uncaptioned`, or otherwise as unreadable."""

    key: str
    reason: str
    small: bool = False
    uncaptioned: bool = False


def load_in_order(
    source: Source[Item, Any], entries: Iterable[tuple[Any, Entry]], *, workers: int = 0
) -> Iterator[tuple[Any, Item | Unreadable]]:
    """(tag, item) for each (tag, entry), in their order, whatever the number of worker processes."""
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
        collate_fn=_unchanged,
        num_workers=workers,
        generator=torch.Generator(),  # Without one, the loader draws from the global generator.
        worker_init_fn=_leave_interrupts,
    )
    for items in loader:
        for item in items:
            yield tags.popleft(), item


class Batches(Generic[Batch]):
    """Endless batches of one process's shard, epoch after epoch, from a position that can be saved and resumed.

    Every batch is full: an image that is left out is replaced by the next one, and a batch may span two epochs. The
    batches do not depend on `workers`. If more images are unreadable so far than the source's policy allows, the next
    ones are read too, until few enough are, or to the end of the epoch, so that the error names all of them.

    The state says how far the batches handed out so far reach, not what was read ahead. It consists of JSON values and
    belongs to one process. With several processes, each must get its own back; accelerate's
    `register_for_checkpointing` keeps only the main process's.

    Args:
        source: see `Source`.
        size: B.
        shard: the seed, and the process's rank.
        workers: processes that decode; 0 for this one.

    Raises:
        ValueError: while iterating, if the shard is empty, too many images are unreadable, or none can be used.
    """

    def __init__(self, source: Source[Any, Batch], *, size: int, shard: DataShard | None = None, workers: int = 0):
        if size < 1:
            raise ValueError(f"a batch needs a size of at least 1, got {size}")
        self.source = source
        self.size = size
        self.shard = shard or DataShard()
        self.workers = workers
        self.counter = ReadCounter()
        self._at: tuple[int, int, Mark | None] = (0, 0, None)

    @property
    def epoch(self) -> int:
        """The epoch of the last image that was handed out."""
        return self._at[0]

    def __iter__(self) -> Iterator[Batch]:
        items = []
        epoch, cleared = self._at[0], 0
        # Epochs in a row without an item that could be used; each gives a process another part of the images.
        useless, idle = 0, self._at[1] == 0
        for at, item in load_in_order(self.source, self._entries(), workers=self.workers):
            if at[0] != epoch:
                self.counter.check(self.source)
                useless = useless + 1 if idle else 0
                if useless == self.shard.world:
                    raise ValueError(
                        f"none of the images of {self.source.name} can be used any more: they have become unreadable, "
                        "or --min-side has been raised"
                    )
                epoch, idle = at[0], True
            if self.counter.admit(item, self.source.name):
                items.append(item)
                idle = False
            elif self.counter.read > cleared and self._too_many():
                cleared = self._search(at)
            if len(items) == self.size:
                self._at = at
                yield self.source.collate(items)
                items = []

    @property
    def _min_side(self) -> int | None:
        """The smallest side of images that are used, in pixels; None for a source that leaves out none for its size."""
        return getattr(self.source, "min_side", None)

    def _too_many(self) -> bool:
        counter = self.counter
        return counter.read >= MIN_READ and not self.source.policy.allows(counter.unreadable, counter.read)

    def _search(self, at: tuple[int, int, Mark | None]) -> int:
        """Reads on in an epoch until the share of unreadable images is allowed; at its end, refuses the source.

        Returns:
            The number of images read by then; up to there, nothing needs to be searched again.

        Raises:
            ValueError: naming all unreadable images of the epoch.
        """
        epoch, position, mark = at
        found = ReadCounter(self.counter.read, self.counter.unreadable)
        found.reasons = dict(self.counter.reasons)
        rest = ((None, entry) for entry in self.source.entries(self.shard, epoch, position, mark))
        for _, item in load_in_order(self.source, rest, workers=self.workers):
            found.admit(item, self.source.name)
            if self.source.policy.allows(found.unreadable, found.read) or len(found.reasons) == MOST_NAMED:
                break
        self.source.policy.check(found.read, found.unreadable, found.reasons, self.source.name)
        return found.read

    def _entries(self) -> Iterator[tuple[tuple[int, int, Mark | None], Entry]]:
        epoch, start, mark = self._at
        while True:
            end = start
            for end, entry in enumerate(self.source.entries(self.shard, epoch, start, mark), start + 1):
                yield (epoch, end, entry.mark), entry
            if end == 0 and epoch > getattr(self.source, "last_unfinished", -1):
                raise ValueError(
                    f"{self.source.name} has no image for process {self.shard.rank} of {self.shard.world}: use fewer "
                    "processes, or more images"
                )
            epoch, start, mark = epoch + 1, 0, None

    def _order(self) -> dict[str, Any]:
        """What the order of the images depends on."""
        order = {"source": self.source.fingerprint, **asdict(self.shard)}
        if not stream_files_of(self.source):
            del order["window"]
        return order

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch, as JSON values."""
        epoch, consumed, mark = self._at
        return {
            **self._order(),
            "min_side": self._min_side,
            "epoch": epoch,
            "consumed": consumed,
            "mark": None if mark is None else list(mark),
            "read": self.counter.read,
            "unreadable": self.counter.unreadable,
            "left_out": {
                "unreadable": self.counter.reasons,
                "small": list(self.counter.too_small),
                **({"uncaptioned": list(self.counter.uncaptioned)} if self.counter.uncaptioned else {}),
                **({"without_caption": list(self.counter.without_caption)} if self.counter.without_caption else {}),
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a saved position; existing iterators are not affected.

        Raises:
            ValueError: if it is of another source, smallest side, seed, rank, number of processes, or, of a stream,
                window.
        """
        own = self._order()
        if state.get("min_side") is not None:  # older states do not say it
            own["min_side"] = self._min_side
        differ = [f"{name} {state.get(name)!r} -> {value!r}" for name, value in own.items() if state.get(name) != value]
        if state.get("source") != own["source"]:
            differ[0] = f"{self.source.name} does not hold the same images"
        if differ:
            raise ValueError(
                f"this position was saved from other data ({', '.join(differ)}): resume with the same images, seed, "
                "smallest side, number of processes and, of a stream, window, or start afresh"
            )
        mark = state["mark"]
        self._at = (state["epoch"], state["consumed"], mark if mark is None else tuple(mark))
        self.counter = ReadCounter(state["read"], state["unreadable"])
        named = state.get("left_out", {"unreadable": {}, "small": []})
        self.counter.reasons, self.counter.too_small = dict(named["unreadable"]), dict.fromkeys(named["small"])
        self.counter.uncaptioned = dict.fromkeys(named.get("uncaptioned", ()))
        self.counter.without_caption = dict.fromkeys(named.get("without_caption", ()))


class _Loading(Dataset):
    """A dataset whose indices are entries, so that worker processes load them."""

    def __init__(self, source: Source):
        self.source = source

    def __getitem__(self, entry: Entry) -> Any:
        try:
            return self.source.load(entry)
        except UnreadableImage as error:
            kinds = {"small": isinstance(error, TooSmallImage), "uncaptioned": isinstance(error, MissingCaption)}
            return Unreadable(entry.key, str(error), **kinds)


def _leave_interrupts(_: int) -> None:
    """Ignores Ctrl-C, which in a terminal reaches the workers too: only the main process acts on it, and ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _unchanged(items: list[Any]) -> list[Any]:
    return items
