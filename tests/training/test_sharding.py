"""Weights sharded over processes: accelerate's FSDP2 on a CPU, where accelerate itself refuses it."""

import os
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.fsdp import FSDPModule

from dcdd_core.method.sampling import keyed_generator
from dcdd_core.training.config import OptimizationConfig
from dcdd_core.training.loss import decoder_loss
from dcdd_core.training.trainable import choose_trained, trained_weights
from dcdd_core.training.trainer import Evaluation
from tests.tiny import tiny_decoder
from tests.training import runs
from tests.training.runs import example, forked, kill_at, losses, png_folder, run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes"),
    pytest.mark.filterwarnings("ignore:.*"),
]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return png_folder(tmp_path_factory.mktemp("images") / "folder")


WHOLE = runs.accelerator


def sharded_accelerator(precision="no"):
    """An accelerator that is told, after the fact, that it was launched for FSDP."""
    AcceleratorState._reset_state(reset_partial_state=True)
    found = Accelerator(cpu=True, mixed_precision=precision)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["NoSuchBlock"],  # the backbone says which
        reshard_after_forward=True,
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    if precision != "no":
        plugin.set_mixed_precision(precision)
    found.state.fsdp_plugin = plugin
    found.state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    return found


def train(folder, images, dtype=torch.float32, what="attention", condition_dropout=0.0, **changes):
    decoder = tiny_decoder(condition_dropout=condition_dropout).to(dtype)
    choose_trained(decoder, what)
    data, recipe = example(), OptimizationConfig(steps=1)

    def look(decoder):
        sharded = [isinstance(block, FSDPModule) for block in decoder.backbone.blocks]
        assert all(sharded) or not any(sharded), sharded
        assert any(sharded) == (runs.accelerator is not WHOLE)
        return Evaluation(numbers={"loss": float(decoder_loss(decoder, data, keyed_generator(1), recipe))})

    # No look in a saving step, which puts the weights back in parts too.
    options = {"steps": 5, "save_every": 2, "sample_every": 3, "evaluate": look}
    return run(folder, images, decoder=decoder, **options | changes)


def test_they_are_trained_evaluated_and_saved_as_unsharded_ones_are(tmp_path, images, monkeypatch):
    assert forked(lambda: train(tmp_path / "whole", images), world=2) == [0, 0]
    monkeypatch.setattr(runs, "accelerator", sharded_accelerator)
    assert forked(lambda: train(tmp_path / "parts", images), world=2) == [0, 0]
    # After a look, the next step would take the average for the weights.
    found, expected = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    assert len(found) == 5 and len(found[2]) == 4
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    assert -9 in forked(lambda: train(tmp_path / "cut", images, on_batch=kill_at(3)), world=2)
    assert forked(lambda: train(tmp_path / "cut", images), world=2) == [0, 0]
    assert losses(tmp_path / "cut") == found

    newest = tmp_path / "cut" / "checkpoints" / "step-00000005"
    kept = FileSystemReader(newest / "parts").read_metadata().state_dict_metadata
    decoder = tiny_decoder()
    choose_trained(decoder, "attention")
    names = {name.removeprefix("model.decoder.") for name in kept if name.startswith("model.")}
    assert names == set(trained_weights(decoder)) and len(names) < len(decoder.state_dict())

    for file in (newest / "parts").glob("*.distcp"):
        file.unlink()

    def refused():
        with pytest.raises(ValueError, match="is damaged .*delete it to resume from the one before it"):
            train(tmp_path / "cut", images)

    assert forked(refused, world=2) == [0, 0]


def test_conditions_are_left_out_as_with_unsharded_weights(tmp_path, images, monkeypatch):
    changes = {"what": "adapter", "condition_dropout": 0.5}
    assert forked(lambda: train(tmp_path / "whole", images, **changes), world=2) == [0, 0]
    monkeypatch.setattr(runs, "accelerator", sharded_accelerator)
    assert forked(lambda: train(tmp_path / "parts", images, **changes), world=2) == [0, 0]
    found, expected = losses(tmp_path / "parts"), losses(tmp_path / "whole")
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_full_disk_is_reported(tmp_path, images, monkeypatch):
    resource = pytest.importorskip("resource", reason="limits the size of files")
    monkeypatch.setattr(runs, "accelerator", sharded_accelerator)

    def fill(k):
        if k == 2:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, limits[1]))  # bytes a file; writing more fails

    def full():
        with pytest.raises(OSError, match="step 4 could not be written .*step-00000002, is intact"):
            train(tmp_path, images, on_batch=fill, evaluate=None)

    assert forked(full, world=2) == [0, 0]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_frozen_base_in_half_precision_is_trained_in_mixed(tmp_path, images, monkeypatch):
    monkeypatch.setattr(runs, "accelerator", lambda: sharded_accelerator("bf16"))
    assert forked(lambda: train(tmp_path, images, torch.bfloat16, steps=2), world=2) == [0, 0]
    assert len(losses(tmp_path)) == 2


@pytest.mark.skipif(find_spec("torchao") is None, reason="an optional optimiser")
def test_8_bit_moments_are_saved_too(tmp_path, images, monkeypatch):
    monkeypatch.setattr(runs, "accelerator", sharded_accelerator)
    options = {"steps": 3, "save_every": 1, "evaluate": None, "optimizer": "adamw8bit", "what": "all"}
    with torch.compiler.set_stance("force_eager"):  # torchao would compile its update for each shape, for minutes
        assert forked(lambda: train(tmp_path / "whole", images, **options), world=2) == [0, 0]
        stopped = options | {"on_batch": kill_at(2)}
        assert -9 in forked(lambda: train(tmp_path / "cut", images, **stopped), world=2)
        assert forked(lambda: train(tmp_path / "cut", images, **options), world=2) == [0, 0]
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole") and len(losses(tmp_path / "cut")) == 3
