"""Stored measurements, with which a stopped evaluation is resumed, and the sharing of work between processes."""

import json
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from dcdd_core.evaluation.results_store import Measurements, hold_to
from dcdd_core.pipelines.distributed import Processes, processes


def test_numbers_come_back_in_the_order_that_is_asked_for(tmp_path):
    kept = Measurements(tmp_path / "m", ["x"])
    assert kept.done() == set()
    kept.add(["c", "a"], {"x": torch.tensor([[3.0], [1.0]]), "y": torch.zeros(2)})
    kept.add(["b"], {"x": torch.tensor([[2.0]])})
    assert kept.done() == {"a", "b", "c"}
    assert torch.equal(kept.gather(["a", "b", "c"], "x"), torch.tensor([[1.0], [2.0], [3.0]]))
    assert torch.equal(kept.gather(["c"], "x"), torch.tensor([[3.0]]))
    with pytest.raises(ValueError, match=r"1 of 2 images have no x .* such as d"):
        kept.gather(["d", "a"], "x")


def test_a_image_without_everything_needed_is_not_done(tmp_path):
    Measurements(tmp_path, ["x"]).add(["a"], {"x": torch.zeros(1)})
    kept = Measurements(tmp_path, ["x", "y"])
    assert kept.done() == set()
    kept.add(["a"], {"x": torch.ones(1), "y": torch.ones(1)})
    assert kept.done() == {"a"} and kept.gather(["a"], "x") == 1


def test_a_file_cut_short_counts_as_absent(tmp_path):
    kept = Measurements(tmp_path, ["x"])
    kept.add(["a"], {"x": torch.zeros(100)[None]})
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:50])
    assert kept.done() == set()
    kept.add(["a"], {"x": torch.zeros(100)[None]})
    assert kept.done() == {"a"}


def test_settings_hold(tmp_path):
    settings = {"steps": 3, "anchor": None, "pair": (1, 2)}
    hold_to(settings, tmp_path / "new", write=False)
    assert not (tmp_path / "new").exists()
    hold_to(settings, tmp_path / "new")
    hold_to(settings, tmp_path / "new")
    with pytest.raises(ValueError, match=r"steps 3 -> 4.*another --out"):
        hold_to(settings | {"steps": 4}, tmp_path / "new")
    with pytest.raises(ValueError, match="give another --samples"):
        hold_to(settings | {"steps": 4}, tmp_path / "new", option="--samples")


def batches(done, count=1, batch=2):
    """The batches that each of several processes gets of ten items."""
    barrier = threading.Barrier(count)
    given = [None] * count

    def work(index):
        crew = Processes(index=index, count=count, wait=barrier.wait)
        given[index] = [list(part) for part in crew.batches(range(10), batch, done=done.__contains__, label="")]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return given


def test_batches_are_shared_and_stay_the_same():
    assert batches(set()) == [[[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]]
    assert batches(set(), count=3) == [[[0, 1], [6, 7]], [[2, 3], [8, 9]], [[4, 5]]]
    assert batches({2, 3, 4}) == [[[0, 1], [4, 5], [6, 7], [8, 9]]]  # whole, as in the run that was stopped
    assert batches(set(range(10)), count=2) == [[], []]
    with pytest.raises(ValueError, match="--batch"):
        list(Processes().batches([1], 0, done=lambda _: False, label=""))


def test_one_process_needs_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with processes("cpu") as crew:
        assert crew.first and crew.count == 1 and crew.device == "cpu"
        crew.wait()


def test_several_processes_without_accelerate_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match="accelerate"), processes("cpu"):
        pass


@pytest.mark.parametrize(
    "metadata", [None, {}, {"dcdd": "[]"}, {"dcdd": "{}"}, {"dcdd": '{"keys": [1]}'}, {"dcdd": "[" * 99999}]
)
def test_a_file_with_a_damaged_header_counts_as_missing(tmp_path, metadata):
    kept = Measurements(tmp_path, ["ssim"])
    kept.add(["a"], {"ssim": torch.ones(1)})
    save_file({"ssim": torch.ones(1)}, tmp_path / "other.safetensors", metadata=metadata)
    save_file({"ssim": torch.ones(2)}, tmp_path / "short.safetensors", metadata={"dcdd": '{"keys": ["b"]}'})
    assert kept.done() == {"a"} and kept.gather(["a"], "ssim").tolist() == [1]


@pytest.mark.parametrize("content", ["[]", "{", "[" * 200_000, "version https://git-lfs.github.com/spec/v1"])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"settings.json .*: delete it if you are sure .*, or give another --out"):
        hold_to({"seed": 0}, tmp_path)


def test_what_older_results_do_not_name_is_not_asked(tmp_path):
    hold_to({"seed": 0}, tmp_path)
    now = {"seed": 0, "vlm dtype": "bfloat16", "parallel": 4}
    hold_to(now, tmp_path, write=False)
    assert json.loads((tmp_path / "settings.json").read_text()) == {"seed": 0}
    hold_to(now, tmp_path)
    with pytest.raises(ValueError, match="vlm dtype 'bfloat16' -> 'float32'"):
        hold_to(now | {"vlm dtype": "float32"}, tmp_path)
    hold_to(now, tmp_path / "new")
    with pytest.raises(ValueError, match="vlm dtype 'bfloat16' -> 'float32'"):
        hold_to(now | {"vlm dtype": "float32"}, tmp_path / "new")
