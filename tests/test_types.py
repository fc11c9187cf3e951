"""What flows between the stages: it validates itself, round-trips through a file, and is never changed by us."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dcdd_core.types import (
    Calibration,
    CalibrationStatistics,
    Codebook,
    Condition,
    TokenLogits,
    same_codebook,
)

STATISTICS = CalibrationStatistics(mean_entropy=0.4, entropy_95=0.7, mean_confidence=0.2, confidence_95=0.6)


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def logits(**changes) -> TokenLogits:
    fields = {"logits": rand(2, 6, 5), "tokens": torch.arange(12).reshape(2, 6) % 5, "grid": (2, 3), **changes}
    return TokenLogits(**fields)


def condition(**changes) -> Condition:
    return Condition(**{"code_vectors": rand(2, 6, 3), "uncertainty": rand(2, 6, 4), "grid": (2, 3), **changes})


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_codebook_rows_become_unit_vectors_of_the_same_direction(scale, dtype):
    raw = (rand(7, 4) * scale).to(dtype)
    kept = raw.clone()
    vectors = Codebook(raw).vectors
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(7))
    expected = kept.double() / kept.double().norm(dim=1, keepdim=True)
    torch.testing.assert_close(vectors, expected.float())
    assert torch.equal(raw, kept)


def test_code_vectors_of_tokens_of_any_shape():
    codebook = Codebook(torch.eye(4)[:, [1, 0, 2, 3]])
    found = codebook.of(torch.tensor([[3, 0], [1, 1]]))
    assert found.shape == (2, 2, 4) and found.argmax(-1).tolist() == [[3, 1], [0, 0]]


def test_codebook_of_unit_rows_is_taken_as_it_is():
    first = Codebook(rand(9, 8))
    assert torch.equal(Codebook(first.vectors).vectors, first.vectors)


@pytest.mark.parametrize(
    ("vectors", "says"),
    [
        (torch.ones(1, 4), "K >= 2"),
        (torch.ones(4), "K >= 2"),
        ([[1.0]], "list"),
        (torch.tensor([[1.0, 0], [0, 0]]), "zero"),
        (torch.tensor([[1.0, 0], [torch.nan, 0]]), "NaN"),
        (torch.tensor([[1.0, 0], [torch.inf, 0]]), "NaN or inf"),
    ],
)
def test_codebook_refuses(vectors, says):
    with pytest.raises(ValueError, match=says):
        Codebook(vectors)


def test_fingerprint_survives_half_precision_but_no_other_codebook():
    vectors = rand(512, 8)
    own = Codebook(vectors).fingerprint
    assert same_codebook(own, Codebook(vectors.bfloat16()).fingerprint)
    assert not same_codebook(own, Codebook(vectors[torch.arange(511, -1, -1)]).fingerprint)
    assert not same_codebook(own, Codebook(rand(512, 8, seed=1)).fingerprint)
    assert not same_codebook(own, Codebook(vectors[:511]).fingerprint)
    assert not same_codebook("5x3:+0.1,+0.2", "6x3:+0.1,+0.2")
    assert same_codebook(own, None) and same_codebook(None, own)
    assert same_codebook("another name", "another name") and not same_codebook("another name", own)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"logits": rand(6, 5)}, r"\[B, N, K\]"),
        ({"logits": torch.ones(2, 6, 5, dtype=torch.int64)}, "floating-point"),
        ({"logits": torch.full((2, 6, 5), torch.nan)}, "NaN"),
        ({"logits": torch.full((2, 6, 5), torch.inf)}, r"\+inf"),
        ({"logits": torch.full((2, 6, 5), -torch.inf)}, "barred"),
        ({"logits": rand(2, 6, 1), "tokens": torch.zeros(2, 6, dtype=torch.int64)}, "2 codes"),
        ({"tokens": torch.zeros(2, 6, dtype=torch.int32)}, "int64"),
        ({"tokens": torch.zeros(2, 5, dtype=torch.int64)}, "like the logits"),
        ({"tokens": torch.full((2, 6), 5)}, "0..4"),
        ({"tokens": torch.full((2, 6), -1)}, "0..4"),
        ({"grid": (3, 3)}, "does not hold 6"),
        ({"grid": (-2, -3)}, "does not hold 6"),
        ({"grid": 6}, "two whole numbers"),
        ({"source": "encoder"}, "'vlm' or 'proxy'"),
        ({"calibrated_at": torch.ones(6, dtype=torch.bool)}, r"calibrated_at must be bool \[2, 6\].*got bool \[6\]"),
        ({"calibrated_at": torch.ones(2, 6)}, r"got float32 \[2, 6\]: sample or encode again"),
        ({"calibrated": True, "calibrated_at": torch.ones(2, 6, dtype=torch.bool)}, "calibrated everywhere take no"),
        ({"logits": rand(2, 0, 5), "tokens": torch.zeros(2, 0, dtype=torch.int64), "grid": (0, 0)}, "0 tokens"),
    ],
)
def test_token_logits_refuse(changes, says):
    with pytest.raises(ValueError, match=says):
        logits(**changes)


def test_positions_that_are_calibrated_follow_their_images(tmp_path):
    """Into parts, into a file, and beside images that have none."""
    at = torch.zeros(2, 6, dtype=torch.bool)
    at[1, 2] = True
    some, none, every = logits(calibrated_at=at), logits(), logits(calibrated=True)
    assert torch.equal(some.is_calibrated, at) and not none.is_calibrated.any() and every.is_calibrated.all()
    assert some.part(0, 1).calibrated_at is None and torch.equal(some.part(1, 2).calibrated_at, at[1:])
    whole = TokenLogits.joined([none, some, some.part(1, 2)])
    assert torch.equal(whole.calibrated_at, torch.cat([torch.zeros_like(at), at, at[1:]])) and len(whole.tokens) == 5
    assert TokenLogits.joined([none, none]).calibrated_at is None
    for one in (some, none):
        one.save(tmp_path / "logits.safetensors")
        found = TokenLogits.load(tmp_path / "logits.safetensors")
        assert torch.equal(found.is_calibrated, one.is_calibrated)
        assert (found.calibrated_at is None) == (one.calibrated_at is None)
    assert torch.equal(some.to("cpu", torch.float64).calibrated_at, at)


def test_logits_are_moved_once(monkeypatch):
    held, moved, to = logits(), [], torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *to_what: moved.append(self.ndim) or to(self, *to_what))
    assert held.to("cpu", torch.float64).logits.dtype == torch.float64 and moved.count(3) == 1


def test_token_logits_allow_barred_codes():
    values = rand(2, 6, 5)
    values[..., 3] = -torch.inf
    assert logits(logits=values).grid == (2, 3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"code_vectors": rand(6, 3)}, r"\[B, N, D\].*map_logits"),
        ({"uncertainty": rand(2, 6, 3)}, r"\[2, 6, 4\].*map_logits"),
        ({"uncertainty": torch.full((2, 6, 4), torch.nan)}, "NaN"),
        ({"code_vectors": torch.full((2, 6, 3), -torch.inf)}, "infinity"),
        ({"grid": (2, 2)}, "does not hold 6"),
    ],
)
def test_condition_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        condition(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"affine_scale": -1.0}, "affine_scale"),
        ({"affine_bias": float("nan")}, "affine_bias"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"anchor": -1.0}, "anchor.*calibrate again"),
    ],
)
def test_calibration_refuses(changes, says):
    with pytest.raises(ValueError, match=says):
        Calibration(**{"scale": 25.0, **changes})


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5"])
def test_statistics_lie_between_0_and_1(value):
    with pytest.raises(ValueError, match="entropy_95"):
        dataclasses.replace(STATISTICS, entropy_95=value)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"scale": 1.0, "bias": 0.0},
        {"scale": 1.0, "target": {"mean_entropy": 0.5}},
        {"scale": 1.0, "target": {"x": 1}},
        {"scale": 1.0, "target": 5},
    ],
)
def test_calibration_from_a_dict_of_other_names(values):
    with pytest.raises(ValueError, match="expected|must hold"):
        Calibration.from_dict(values)


CALIBRATION = Calibration(
    scale=23.5,
    affine_scale=1.02,
    smoothing=0.01,
    anchor=1.5,
    target=STATISTICS,
    achieved=dataclasses.replace(STATISTICS, entropy_95=0.69),
    converged=True,
    vlm="janus",
    guidance=5.0,
    temperature=1.0,
    codebook=Codebook(rand(9, 8)).fingerprint,
)


@pytest.mark.parametrize(
    "thing",
    [
        Codebook(rand(9, 8)),
        logits(source="vlm", guidance=5.0, temperature=0.9, model="janus", codebook="5x3:+0.1"),
        logits(logits=rand(2, 6, 5).half(), source="proxy"),
        condition(codebook="5x3:+0.1"),
        condition(code_vectors=rand(6, 2, 3).transpose(0, 1)),
        # Both parts of one token lie next to each other in one storage.
        condition(code_vectors=rand(1, 1, 7)[..., :3], uncertainty=rand(1, 1, 7)[..., 3:], grid=(1, 1)),
        CALIBRATION,
        Calibration(scale=1.0),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_saved_is_loaded(thing, tmp_path):
    thing.save(tmp_path / "it.safetensors")
    back = type(thing).load(tmp_path / "it.safetensors")
    for field in dataclasses.fields(thing):
        before, after = getattr(thing, field.name), getattr(back, field.name)
        assert before.dtype == after.dtype if isinstance(before, torch.Tensor) else before == after
        assert not isinstance(before, torch.Tensor) or torch.equal(before, after)
    assert [path.name for path in tmp_path.iterdir()] == ["it.safetensors"]


def test_one_token_condition_cut_from_one_tensor_is_saved(tmp_path):
    whole = rand(1, 1, 7)
    condition(code_vectors=whole[..., :3], uncertainty=whole[..., 3:], grid=(1, 1)).save(tmp_path / "c.safetensors")
    assert torch.equal(Condition.load(tmp_path / "c.safetensors").uncertainty, whole[..., 3:])


def test_loading_says_what_it_found(tmp_path):
    path = tmp_path / "it.safetensors"
    with pytest.raises(ValueError, match="does not exist"):
        Codebook.load(path)
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="cannot be read as a file with a codebook.*make it again"):
        Codebook.load(path)
    save_file({"vectors": rand(3, 2)}, path)
    with pytest.raises(ValueError, match="no known kind.*expected a codebook"):
        Codebook.load(path)
    save_file({"vectors": rand(3, 2)}, path, metadata={"format": "dcdd", "kind": "codebook", "dcdd": "{"})
    with pytest.raises(ValueError, match="cannot be read as a description of a codebook.*damaged.*make it again"):
        Codebook.load(path)
    for description in ("5", "null", "[]", '"vectors"'):
        save_file({"vectors": rand(3, 2)}, path, metadata={"format": "dcdd", "kind": "codebook", "dcdd": description})
        with pytest.raises(ValueError, match="a JSON object: it is damaged or something else; make it again"):
            Codebook.load(path)
    CALIBRATION.save(path)
    with pytest.raises(ValueError, match="holds calibration.*expected a codebook"):
        Codebook.load(path)


#: Values of wrong types, by a name; a field's own kind of value is left out of its list below.
WRONG = {
    "list": [],
    "object": {},
    "text": "5",
    "true": True,
    "number": 5,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "negative": -1,
    "long number": 10**400,
    "nested": [[[[]]]],
}
FILES = {
    "token logits": logits(guidance=5.0, temperature=0.9, model="janus", codebook="5x3:+0.1"),
    "condition": condition(codebook="5x3:+0.1"),
    "calibration": CALIBRATION,
}
#: Which of them a field may have: else a line names the file and the field.
FINE = {
    "guidance": {"number", "negative"},
    "temperature": {"number"},
    "model": {"text"},
    "codebook": {"text"},
    "calibrated": {"true"},
    "scale": {"number"},
    "affine_scale": {"number"},
    "affine_bias": {"number", "negative"},
    "anchor": {"number"},
    "anchor_temperature": {"number"},
    "converged": {"true"},
    "vlm": {"text"},
}


def with_header(path, kind, **changes):
    """The file of `FILES[kind]` with other values in its header; paths of names are joined with a dot."""
    FILES[kind].save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    fields = json.loads(metadata["dcdd"])
    for name, value in changes.items():
        *parents, last = name.split(".")
        owner = fields
        for parent in parents:
            owner = owner[parent]
        owner[last] = value
    save_file(tensors, path, metadata=metadata | {"dcdd": json.dumps(fields)})
    return path


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    ("kind", "field"),
    [
        *(("token logits", field) for field in ("grid", "source", "guidance", "temperature", "model", "codebook")),
        ("token logits", "calibrated"),
        *(("condition", field) for field in ("grid", "codebook")),
        *(("calibration", field.name) for field in dataclasses.fields(Calibration)),
        *(("calibration", f"target.{field.name}") for field in dataclasses.fields(CalibrationStatistics)),
    ],
)
def test_a_wrong_value_in_a_file_is_named(tmp_path, kind, field, wrong):
    path = with_header(tmp_path / "it.safetensors", kind, **{field: WRONG[wrong]})
    name = field.rpartition(".")[2]
    if wrong in FINE.get(name, ()):
        assert getattr(type(FILES[kind]).load(path), name) == WRONG[wrong]
        return
    with pytest.raises(ValueError, match=f"^{path}: .*{name} must .*, got ") as caught:
        type(FILES[kind]).load(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("grid", [[2, 3, 1], [2.0, 3.0], ["2", "3"], [True, 6], [2, None], 10**400, [10**400, 3]])
def test_a_grid_of_other_values_is_refused(tmp_path, grid):
    for kind in ("token logits", "condition"):
        path = with_header(tmp_path / "it.safetensors", kind, grid=grid)
        with pytest.raises(ValueError, match=f"^{path}: .*grid"):
            type(FILES[kind]).load(path)


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int32, torch.bool, torch.complex64])
def test_tensors_of_other_types_are_refused(tmp_path, kind, dtype):
    path = tmp_path / "it.safetensors"
    FILES[kind].save(path)
    with safe_open(path, framework="pt") as file:
        metadata, names = file.metadata(), list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    for name in names:
        save_file({**tensors, name: tensors[name].to(dtype)}, path, metadata=metadata)
        with pytest.raises(ValueError, match=f"^{path}: {name.replace('_', ' ')} must be"):
            type(FILES[kind]).load(path)


@pytest.mark.parametrize("kind", [Codebook, TokenLogits, Condition, Calibration])
def test_what_is_no_file_is_refused(tmp_path, kind):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder", "nothing"):
        with pytest.raises(ValueError, match=f"{name} (is a|does not exist).*; expected a file with a"):
            kind.load(tmp_path / name)


def test_a_grid_in_a_file_is_checked(tmp_path):
    thing = condition()
    thing.save(tmp_path / "it.safetensors")
    assert Condition.load(tmp_path / "it.safetensors").grid == (2, 3)
    tensors = {"code_vectors": thing.code_vectors, "uncertainty": thing.uncertainty}
    header = {"format": "dcdd", "kind": "condition", "dcdd": '{"grid": 5, "codebook": null}'}
    save_file(tensors, tmp_path / "it.safetensors", metadata=header)
    with pytest.raises(ValueError, match="two whole numbers"):
        Condition.load(tmp_path / "it.safetensors")


def test_a_condition_moves_as_a_whole():
    moved = condition(codebook="5x3:+0.1").to("cpu", torch.float16)
    assert moved.code_vectors.dtype == moved.uncertainty.dtype == torch.float16
    assert moved.grid == (2, 3) and moved.codebook == "5x3:+0.1"


# --- what all four types have -----------------------------------------------------------------------------------------


def of_each_type():
    codebook = Codebook(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    logits = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1))
    grid = TokenLogits(logits, logits.argmax(-1), (2, 2), guidance=2.0, codebook=codebook.fingerprint)
    condition = Condition(torch.rand(3, 4, 3), torch.rand(3, 4, 4), (2, 2), codebook=codebook.fingerprint)
    return codebook, grid, condition, Calibration(scale=20.0, smoothing=0.1)


def tensors(value):
    return {name: found for name, found in vars(value).items() if isinstance(found, torch.Tensor)}


@pytest.mark.parametrize("value", of_each_type(), ids=lambda value: type(value).__name__)
def test_parts_join_to_the_whole_and_survive_moves_and_files(value, tmp_path):
    kind = type(value)
    value.save(tmp_path / "value.safetensors")
    parts = [value.part(0, 1), value.part(1, 3)]
    for again in (kind.joined(parts), kind.joined([value]), value.to("cpu"), kind.load(tmp_path / "value.safetensors")):
        assert type(again) is kind and tensors(again).keys() == tensors(value).keys()
        for name, found in tensors(value).items():
            assert torch.equal(getattr(again, name), found)


def test_a_part_is_the_images_that_were_asked_for():
    _, grid, condition, _ = of_each_type()
    assert torch.equal(grid.part(1, 3).logits, grid.logits[1:]) and torch.equal(grid.part(1, 3).tokens, grid.tokens[1:])
    assert torch.equal(condition.part(0, 1).uncertainty, condition.uncertainty[:1])
    assert grid.part(1, 2).guidance == 2.0 and condition.part(1, 2).codebook == condition.codebook


def test_moving_to_another_dtype_leaves_whole_numbers_alone():
    _, grid, condition, _ = of_each_type()
    assert grid.to("cpu", torch.bfloat16).logits.dtype == torch.bfloat16
    assert grid.to("cpu", torch.bfloat16).tokens.dtype == torch.int64
    assert condition.to("cpu", torch.bfloat16).uncertainty.dtype == torch.bfloat16


def test_what_does_not_belong_together_is_not_joined():
    codebook, grid, condition, calibration = of_each_type()
    other = Codebook(torch.randn(6, 3, generator=torch.Generator().manual_seed(9)))
    for kind, parts, words in (
        (TokenLogits, [grid, replace(grid, guidance=3.0)], "different guidance cannot be joined"),
        (TokenLogits, [grid, replace(grid, codebook=other.fingerprint)], "different codebook cannot be joined"),
        (Condition, [condition, replace(condition, grid=(1, 4))], "different grid cannot be joined"),
        (Codebook, [codebook, other], "different codebooks cannot be joined"),
        (Calibration, [calibration, replace(calibration, scale=9.0)], "different calibrations cannot be joined"),
    ):
        with pytest.raises(ValueError, match=words):
            kind.joined(parts)
