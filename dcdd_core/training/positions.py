"""Resuming the data with another number of processes: every image still comes once per epoch.

The epochs that were under way are finished first: what their processes had left is redistributed. Later epochs are
divided as usual. A position in a redistributed epoch is found again by listing what came before it, without decoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from .batches import Batches, DataShard, Entry, Mark, Source, Wrapped

_MISSING = object()
_BEFORE, _LEFT_OUT = "before", "left_out"
_IF_ANY = ("uncaptioned", "without_caption")


class Redistributed(Wrapped):
    """A `Source` whose unfinished epochs are finished by another number of processes.

    Args:
        source: the source with its own order.
        before: for each change of that number, oldest first: all processes' positions then (`Batches.state_dict`).
    """

    def __init__(self, source: Source, before: Sequence[Sequence[Mapping[str, Any]]]):
        super().__init__(source)
        self.before = [list(positions) for positions in before]

    @property
    def last_unfinished(self) -> int:
        """The last epoch of which a part had been read: it may leave nothing for some of the processes."""
        return max(position["epoch"] for positions in self.before for position in positions)

    def entries(self, shard: DataShard, epoch: int, start: int = 0, mark: Mark | None = None) -> Iterator[Entry]:
        """See `Source.entries`."""
        return self._entries(len(self.before), shard, epoch, start, mark)

    def _entries(self, changes: int, shard: DataShard, epoch: int, start: int, mark: Mark | None) -> Iterator[Entry]:
        """The entries as they were after this many changes."""
        if not changes:
            yield from self.source.entries(shard, epoch, start, mark)
            return
        positions = self.before[changes - 1]
        if epoch > max(position["epoch"] for position in positions):
            yield from self._entries(changes - 1, shard, epoch, start, mark)  # a part may have been read before those
            return
        left = []
        for rank, position in enumerate(positions):
            if position["epoch"] <= epoch:
                at = (position["consumed"], position["mark"]) if position["epoch"] == epoch else (0, None)
                left.append(self._entries(changes - 1, replace(shard, rank=rank, world=len(positions)), epoch, *at))
        # `restore_position` starts the first of these epochs at 1, not at 0.
        done = start - (epoch == min(position["epoch"] for position in positions))
        for entry in islice(_in_turn(left), shard.rank + max(0, done) * shard.world, None, shard.world):
            yield replace(entry, mark=None)  # Its mark belongs to another process's part.


def saved_position(batches: Batches) -> dict[str, Any]:
    """This process's position, as JSON values, for `restore_position`."""
    before = batches.source.before if isinstance(batches.source, Redistributed) else []
    return batches.state_dict() | ({_BEFORE: before} if before else {})


def restore_position(batches: Batches, positions: Sequence[Mapping[str, Any]]) -> None:
    """Continues this process's batches from the saved positions of all processes, by rank.

    With the same number of processes, it continues exactly. With another number, the batches differ, and each image
    that is left in the epoch comes once.

    Raises:
        ValueError: if they are of another source or seed, or, of a stream, another window.
    """
    shard = batches.shard
    before = positions[0].get(_BEFORE, [])
    if len(positions) == shard.world:
        if before:
            batches.source = Redistributed(batches.source, before)
        batches.load_state_dict(positions[shard.rank])
        return
    batches.source = Redistributed(batches.source, [*before, [_reach(position) for position in positions]])
    batches.load_state_dict(
        {
            **positions[0],
            "rank": shard.rank,
            "world": shard.world,
            "epoch": min(position["epoch"] for position in positions),
            "consumed": 1,  # At 0, an epoch with nothing left would look like a source without images.
            "mark": None,
            # Rounded up: with nothing read at all, the end of an epoch would look like that of unusable images.
            "read": math.ceil(sum(position["read"] for position in positions) / shard.world),
            "unreadable": sum(position["unreadable"] for position in positions) // shard.world,
            _LEFT_OUT: _together([position[_LEFT_OUT] for position in positions if _LEFT_OUT in position]),
        }
    )


def _together(left_out: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several processes left out, combined."""
    unreadable = {name: reason for own in left_out for name, reason in own["unreadable"].items()}
    small, *others = (sorted({name for own in left_out for name in own.get(kind, ())}) for kind in ("small", *_IF_ANY))
    return {"unreadable": unreadable, "small": small} | {kind: names for kind, names in zip(_IF_ANY, others) if names}


def _reach(position: Mapping[str, Any]) -> dict[str, Any]:
    return {name: position[name] for name in ("epoch", "consumed", "mark")}


def _in_turn(streams: Iterable[Iterator[Entry]]) -> Iterator[Entry]:
    """Entries from the streams in turn, until all have ended."""
    remaining = list(streams)
    while remaining:
        heads = [(stream, next(stream, _MISSING)) for stream in remaining]
        yield from (head for _, head in heads if head is not _MISSING)
        remaining = [stream for stream, head in heads if head is not _MISSING]
