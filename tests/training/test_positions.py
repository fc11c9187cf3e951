"""Resuming the data on another number of processes: no image twice in an epoch, none left out."""

import json
import random
from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest

from dcdd_core.training.batches import Batches, DataShard, Unreadable
from dcdd_core.training.held_out import Without, split
from dcdd_core.training.positions import Redistributed, restore_position, saved_position
from tests.training import test_data
from tests.training.test_data import KINDS, paths, source  # noqa: F401  a fixture


def shard(rank, world):
    return DataShard(seed=3, rank=rank, world=world, window=5)


@dataclass
class World:
    """Processes that read a source, and what they saw by epoch."""

    batches: list
    seen: dict

    @classmethod
    def of(cls, images, world, size, seen, positions=None):
        made = [Batches(images(), size=size, shard=shard(rank, world)) for rank in range(world)]
        if positions is not None:
            for one in made:
                restore_position(one, positions)
        return cls(made, seen)

    def read(self, updates):
        for one in self.batches:
            collate = one.source.collate
            one.source.collate = lambda items: items
            for _, found in zip(range(updates), watched(one, self.seen), strict=False):
                assert len(found) == one.size
            one.source.collate = collate
        return json.loads(json.dumps([saved_position(one) for one in self.batches]))


def watched(batches, seen):
    """Its batches; the images of each are noted under the epoch that they belong to."""
    order = []
    entries = batches._entries

    def noted():
        for at, entry in entries():
            order.append((at[0], entry.key))
            yield at, entry

    batches._entries = noted
    handed = 0
    for items in iter(batches):
        for epoch, key in order[handed : handed + len(items)]:
            seen[epoch][key] += 1
        handed += len(items)
        yield items
    batches._entries = entries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("worlds", [(2, 1), (1, 3), (3, 2, 4, 2)])
@pytest.mark.parametrize("part", [False, True])
def test_every_image_comes_once_an_epoch_whatever_the_number_of_processes(paths, kind, worlds, part):  # noqa: F811
    def images():
        found = source(paths, kind)
        return split(found, 0.1).training if part else found

    names = {entry.key for entry in images().entries(DataShard(seed=None), 0)}
    assert len(names) == test_data.COUNT - 2 * part
    draw, seen, positions = random.Random(str((kind, worlds))), defaultdict(Counter), None
    for world in worlds:
        for _ in range(2):  # and resumed on the same number
            running = World.of(images, world, 2, seen, positions)
            positions = running.read(draw.randrange(1, 6))
    World.of(images, worlds[-1], 1, seen, positions).read(4 * test_data.COUNT // worlds[-1])
    whole = [epoch for epoch in seen if epoch < max(seen) - 1]
    assert len(whole) >= 2
    for epoch in whole:
        assert seen[epoch] == dict.fromkeys(names, 1), epoch


def test_an_epoch_that_was_just_finished_leaves_nothing(paths):  # noqa: F811
    seen = defaultdict(Counter)
    images = lambda: source(paths, "folder")  # noqa: E731
    positions = World.of(images, 1, test_data.COUNT, seen).read(1)
    World.of(images, 2, 1, seen, positions).read(test_data.COUNT)
    assert seen[0] == seen[1] == dict.fromkeys(seen[0], 1) and len(seen[0]) == test_data.COUNT


def test_another_source_is_still_refused(paths):  # noqa: F811
    position = saved_position(Batches(source(paths, "folder"), size=2, shard=shard(0, 1)))
    with pytest.raises(ValueError, match="saved from other data"):
        restore_position(Batches(source(paths, "saved"), size=2, shard=shard(1, 2)), [position])


def test_names_of_what_was_left_out_are_kept_by_the_next_processes(paths):  # noqa: F811
    batches = [Batches(source(paths, "folder"), size=2, shard=shard(rank, 2)) for rank in (0, 1)]
    for number, own in enumerate(batches):
        own.counter.admit(Unreadable(f"{number}.png", "half a file"), "somewhere")
        own.counter.admit(Unreadable("small.png", "9 x 9", small=True), "somewhere")
        own.counter.admit(Unreadable(f"bare{number}.png", "it has no caption", uncaptioned=True), "somewhere")
    positions = json.loads(json.dumps([saved_position(own) for own in batches]))
    del positions[1]["left_out"]["unreadable"]["1.png"]
    positions[1]["left_out"]["unreadable"]["2.png"] = "no image"
    for world in (1, 3):
        later = Batches(source(paths, "folder"), size=2, shard=shard(0, world))
        restore_position(later, positions)
        assert later.counter.reasons == {"0.png": "half a file", "2.png": "no image"}
        assert list(later.counter.too_small) == ["small.png"]
        assert list(later.counter.uncaptioned) == ["bare0.png", "bare1.png"]
    for position in positions:  # an earlier version's
        del position["left_out"]
    restore_position(Batches(source(paths, "folder"), size=2, shard=shard(0, 2)), positions)
    restore_position(Batches(source(paths, "folder"), size=2, shard=shard(0, 1)), positions)


@pytest.mark.parametrize("kind", ["parquet", "webdataset"])
def test_a_stream_without_its_held_out_images_continues_with_and_without_its_mark(paths, kind):  # noqa: F811
    images = Without(source(paths, kind), frozenset(split(source(paths, kind), 0.3).training.names))
    entries = list(images.entries(shard(0, 2), 1))
    for start in range(len(entries)):
        rest = [entry.key for entry in entries[start:]]
        assert [entry.key for entry in images.entries(shard(0, 2), 1, start)] == rest
        for mark in (entries[start].mark, entries[max(0, start - 1)].mark):
            assert [entry.key for entry in images.entries(shard(0, 2), 1, start, mark)] == rest


def test_epochs_that_leave_too_little_for_many_processes_are_gone_over(paths):  # noqa: F811
    """Of 12 and 11 images, two processes are an epoch apart after 140: the later one leaves some of 23 without any."""
    seen = defaultdict(Counter)
    images = lambda: source(paths, "folder")  # noqa: E731
    positions = World.of(images, 2, 1, seen).read(140)
    epochs = [position["epoch"] for position in positions]
    assert max(epochs) == min(epochs) + 1
    World.of(images, test_data.COUNT, 1, seen, positions).read(4)
    for epoch in range(max(epochs) + 2):
        assert len(seen[epoch]) == test_data.COUNT and set(seen[epoch].values()) == {1}, epoch


def test_an_epoch_that_was_begun_two_changes_ago_is_not_begun_again(paths):  # noqa: F811
    """Two processes were an epoch apart, three stopped before they came to the later one, four go on."""
    at = lambda epoch, consumed: {"epoch": epoch, "consumed": consumed, "mark": None}  # noqa: E731
    images = source(paths, "folder")
    begun = [entry.key for entry in images.entries(shard(1, 2), 1)][:3]
    moved = Redistributed(images, [[at(0, 10), at(1, 3)], [at(0, 2), at(0, 2), at(0, 1)]])
    found = [entry.key for rank in range(4) for entry in moved.entries(shard(rank, 4), 1)]
    assert len(begun) == 3 and len(found) == len(set(found)) == test_data.COUNT - 3 and not set(found) & set(begun)
    assert moved.last_unfinished == 1
