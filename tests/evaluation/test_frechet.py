"""Frechet distances against reference values, and statistics that are merged, stored and refused."""

import numpy as np
import pytest
import scipy.linalg
import torch
from safetensors import safe_open
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from dcdd_core.evaluation.frechet import (
    FeatureSet,
    FrechetStatistics,
    _roots,
    features_of,
    frechet_distance,
    load_statistics,
    save_statistics,
    smallest_set,
)
from dcdd_core.files import write_record


def gaussian(mean, std, seed, count=4000, features=4):
    draw = torch.Generator().manual_seed(seed)
    return mean + std * torch.randn(count, features, generator=draw, dtype=torch.float64)


def distance(real, made):
    return frechet_distance(FrechetStatistics.of(real), FrechetStatistics.of(made))


def test_of_gaussians_it_is_the_closed_form():
    found = distance([gaussian(0.0, 1.0, 0)], [gaussian(0.5, 2.0, 1)])
    assert found == pytest.approx(4 * 0.5**2 + 4 * (2 - 1) ** 2, rel=0.05)


def test_of_two_points_each_it_is_the_number_by_hand():
    real = torch.tensor([[0.0, 1.0], [2.0, 1.0]])  # mean (1, 1), covariance diag(2, 0)
    made = torch.tensor([[3.0, 0.0], [3.0, 4.0]])  # mean (3, 2), covariance diag(0, 8)
    assert distance([real], [made]) == pytest.approx(4 + 1 + 2 + 8)
    made = torch.tensor([[0.0, 1.0], [4.0, 1.0]])  # mean (2, 1), covariance diag(8, 0), whose root with 2 is 4
    assert distance([real], [made]) == pytest.approx(1 + 2 + 8 - 2 * 4)


@pytest.mark.parametrize("count", [12, 200])  # fewer images than features, and more
def test_it_is_the_formula_with_scipy_s_square_root(count):
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    a, b = gaussian(0.0, 1.0, 0, count, 24) @ mixing, gaussian(0.3, 1.5, 1, 2 * count, 24)
    (ma, sa), (mb, sb) = ((x.mean(0).numpy(), np.cov(x.numpy(), rowvar=False)) for x in (a, b))
    # of a symmetric matrix, since scipy's root of a singular product is inaccurate
    values, vectors = scipy.linalg.eigh(sa)
    root = vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T
    shared = scipy.linalg.sqrtm(root @ sb @ root + 1e-13 * np.eye(24)).real.trace()
    expected = ((ma - mb) ** 2).sum() + sa.trace() + sb.trace() - 2 * shared
    assert distance([a], [b]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_it_scales_with_the_square_of_the_features_even_if_they_lie_on_a_line(scale):
    """All but one of the eigenvalues are rounding errors, at any scale."""
    direction = gaussian(0.0, 1.0, 5, 1, 24)
    a, b = (gaussian(0.0, 1.0, k, 12, 1) @ direction for k in (0, 1))
    spread = float((a.std(0) - b.std(0)).square().sum())
    expected = float((a.mean(0) - b.mean(0)).square().sum()) + spread
    assert distance([scale * a], [scale * b]) == pytest.approx(scale**2 * expected, rel=1e-9)


@pytest.mark.parametrize("scale", [2.0**-20, 1.0, 2.0**20])
def test_eigenvalues_within_the_rounding_error_of_the_largest_have_no_root(scale):
    eps = 2.0**-52
    values = scale * torch.tensor([-3 * eps, 3 * eps, 5 * eps, 1.0], dtype=torch.float64)  # the error is 4 eps
    expected = scale**0.5 * torch.tensor([0.0, 0.0, (5 * eps) ** 0.5, 1.0], dtype=torch.float64)
    torch.testing.assert_close(_roots(values), expected, rtol=1e-14, atol=0)


class AsGiven(nn.Module):
    num_features = 24

    def forward(self, features):
        return features


@pytest.mark.parametrize("count", [12, 200])  # fewer images than features, and more
def test_it_is_the_number_of_torchmetrics(count):
    mixing = torch.randn(24, 24, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    a, b = gaussian(0.0, 1.0, 0, count, 24) @ mixing, gaussian(0.3, 1.5, 1, count + 5, 24)
    metric = FrechetInceptionDistance(feature=AsGiven(), normalize=True).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert distance([a], [b]) == pytest.approx(float(metric.compute()), rel=1e-6)


def test_it_does_not_depend_on_the_batches():
    a, b = gaussian(0.0, 1.0, 0), gaussian(0.5, 2.0, 1)
    assert distance(a.split(7), b.split(1000)) == pytest.approx(distance([a], [b]), rel=1e-9)
    assert abs(distance([a], [a])) < 1e-9


def test_float32_features_far_from_zero_lose_nothing_in_the_sums():
    a = (1000 + gaussian(0.0, 0.1, 0)).float()
    assert distance([a], [a + 1]) == pytest.approx(float(4 * 1.0**2), rel=1e-6)


def test_three_parts_added_are_the_whole():
    features, made = gaussian(0.0, 1.0, 0), FrechetStatistics.of([gaussian(0.5, 2.0, 1)])
    first, second, third = (FrechetStatistics.of([features[k::3]]) for k in range(3))
    whole, added = FrechetStatistics.of([features]), first + second + third
    assert added.count == whole.count == 4000
    assert torch.allclose(added.mean, features.mean(0), rtol=1e-12, atol=1e-14)
    assert torch.allclose(added.covariance, features.T.cov(), rtol=1e-12, atol=1e-14)
    assert frechet_distance(added, made) == pytest.approx(frechet_distance(whole, made), rel=1e-12)


@pytest.mark.parametrize(
    ("real", "made", "words"),
    [
        ([gaussian(0, 1, 0)], [gaussian(0, 1, 0)[:1]], "at least two"),
        ([gaussian(0, 1, 0)[:1]], [gaussian(0, 1, 0)], "at least two"),
        ([], [], "at least two"),
        ([gaussian(0, 1, 0)], [gaussian(0, 1, 0)[:, :3]], "the same network"),
        ([gaussian(0, 1, 0), gaussian(0, 1, 0)[:, :3]], [gaussian(0, 1, 0)], r"\[B, 4\]"),
    ],
)
def test_what_cannot_be_compared_is_refused(real, made, words):
    with pytest.raises(ValueError, match=words):
        distance(real, made)


def test_statistics_of_another_network_neither_add_nor_compare():
    one, other = (FrechetStatistics.of([gaussian(0, 1, 0)], network=name) for name in ("a", "b"))
    for combine in (frechet_distance, FrechetStatistics.__add__):
        with pytest.raises(ValueError, match=r"network a .* by b"):
            combine(one, other)


def test_a_file_gives_back_every_bit_and_keeps_to_its_network_and_size(tmp_path):
    sets = {name: FrechetStatistics.of([gaussian(0, 1, i)], network="a") for i, name in enumerate(("art", "food"))}
    path = tmp_path / "new" / "s.safetensors"
    save_statistics(path, sets, size=96)
    found = load_statistics(path, network="a", size=96)
    assert list(found) == ["art", "food"] and found["art"].count == 4000
    assert all(torch.equal(found[k].products, sets[k].products) for k in sets)
    assert frechet_distance(found["art"], found["food"]) == frechet_distance(sets["art"], sets["food"])
    for network, size in (("b", 96), ("a", 384)):
        with pytest.raises(ValueError, match="another --statistics"):
            load_statistics(path, network=network, size=size)
    with pytest.raises(ValueError, match="does not exist"):
        load_statistics(tmp_path / "none", network="a", size=96)


@pytest.mark.parametrize(
    ("total", "products", "words"),
    [
        (torch.zeros(1, 2), torch.zeros(2, 2), r"expected a sum \[F\]"),
        (torch.zeros(2), torch.zeros(2, 3), r"expected a sum \[F\]"),
        (torch.zeros(2).double(), torch.zeros(2, 2), "float64"),
        (torch.zeros(2), torch.zeros(2, 2).double(), "float64"),
    ],
)
def test_sums_of_another_shape_or_type_are_refused(total, products, words):
    with pytest.raises(ValueError, match=words):
        FrechetStatistics(count=2, total=total, products=products)


def test_statistics_keep_their_network_when_added_and_read(tmp_path):
    one = FrechetStatistics.of([gaussian(0, 1, 0)], network="a")
    assert (one + one).network == "a"
    save_statistics(tmp_path / "s.safetensors", {"": one}, size=96)
    assert load_statistics(tmp_path / "s.safetensors", network="a", size=96)[""].network == "a"


def test_a_set_of_few_images_is_kept_as_features_and_one_of_many_as_sums():
    """Whichever takes less memory: 4 M F bytes of features, or 8 F (F + 1) of sums."""
    draw = torch.Generator().manual_seed(0)
    for count, kind in ((9, FeatureSet), (10, FrechetStatistics), (2000, FrechetStatistics)):
        features = torch.randn(count, 4, generator=draw)
        found, expected = smallest_set(features, network="n"), FrechetStatistics.of(features.split(1024), network="n")
        assert type(found) is kind and found.count == expected.count == count and found.network == "n"
        held = found.statistics()
        assert held.network == "n" and all(
            map(torch.equal, (held.total, held.products), (expected.total, expected.products))
        )
    assert type(smallest_set(torch.randn(4, 4, dtype=torch.float64))) is FeatureSet
    assert type(smallest_set(torch.randn(5, 4, dtype=torch.float64))) is FrechetStatistics


def test_features_far_from_zero_are_summed_1024_at_a_time():
    features = 1000 + torch.rand(3000, 40, generator=torch.Generator().manual_seed(0))
    own = FeatureSet(features=features).statistics()
    expected = FrechetStatistics.of([features[:1024], features[1024:2048], features[2048:]])
    assert torch.equal(own.products, expected.products) and torch.equal(own.total, expected.total)


@pytest.mark.parametrize("kinds", ["fss", "sfs", "fff", "sfsf", "ss"])
def test_a_file_gives_back_sums_and_features_in_their_order(tmp_path, kinds):
    sets, path = {}, tmp_path / "s.safetensors"
    for number, kind in enumerate(kinds):
        features = gaussian(number, 1, number, count=20 if kind == "s" else 3 + number).float()
        sets[f"c{9 - number}"] = smallest_set(features, network="a")
    assert "".join("f" if isinstance(part, FeatureSet) else "s" for part in sets.values()) == kinds
    save_statistics(path, sets, size=96)
    found = load_statistics(path, network="a", size=96)
    assert list(found) == list(sets) and [type(part) for part in found.values()] == [type(x) for x in sets.values()]
    for name, part in sets.items():
        own, other = part.statistics(), found[name].statistics()
        assert (own.count, found[name].count, other.network) == (other.count, own.count, "a")
        assert torch.equal(own.total, other.total) and torch.equal(own.products, other.products)
    with safe_open(path, "pt") as file:
        assert (set(file.keys()) == {"total", "products"}) == ("f" not in kinds), "as older versions write and read it"


def test_features_are_computed_without_gradients_64_at_a_time():
    weight, sizes = torch.ones(3, requires_grad=True), []
    images = torch.arange(129.0).reshape(129, 1, 1, 1).expand(129, 3, 2, 2)

    def network(part):
        sizes.append(len(part))
        return part.mean((2, 3)) * weight

    found = features_of(images, network)
    assert sizes == [64, 64, 1] and not found.requires_grad and torch.equal(found[:, 0], torch.arange(129.0))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"categories": {}}, "categories must be a list of 1"),
        ({"counts": ["3"]}, "counts must be a list of 1"),
        ({"counts": [0]}, "expected categories with images"),
        ({"total": torch.full((1, 2), torch.nan, dtype=torch.float64)}, "NaN or infinity"),
        ({"total": torch.zeros(2, 2, dtype=torch.float64)}, "must be a list of 2"),
        ({"products": torch.zeros(2, 2, 2, dtype=torch.float64)}, r"the same sets, got \[1, 2\] and \[2, 2, 2\]"),
        ({"products": torch.zeros((), dtype=torch.float64)}, r"the same sets, got \[1, 2\] and \[\]"),
        ({"whole": "b"}, "whole must be a list of categories, got 'b'"),
        (
            {"whole": ["b"], "categories": ["", "a"], "counts": [3, 3]},
            r"whole must be some of its categories, got \['b'",
        ),
        ({"whole": ["b", "b"], "categories": ["", "b", "a"], "counts": [3, 3, 3]}, "whole must be some of its categor"),
        ({"whole": ["b"], "categories": ["", "b"], "counts": [3, 3]}, r"features must be \[3, F\], got \[2, 2\]"),
        ({"features": torch.zeros(3)}, r"features must be \[0, F\], got \[3\]"),
    ],
)
def test_damaged_statistics_are_named(tmp_path, changes, words):
    held = {"total": torch.zeros(1, 2, dtype=torch.float64), "products": torch.zeros(1, 2, 2, dtype=torch.float64)}
    if "whole" in changes or "features" in changes:
        held["features"] = torch.zeros(2, 2)
    meta = {"categories": [""], "counts": [3], "network": "n", "size": 96}
    meta |= {"whole": []} if "whole" in changes else {}
    tensors = {name: changes.get(name, value) for name, value in held.items()}
    write_record(
        tmp_path / "s.safetensors", "Frechet statistics", tensors, meta | {k: changes[k] for k in changes if k in meta}
    )
    with pytest.raises(ValueError, match=f"s.safetensors: .*{words}"):
        load_statistics(tmp_path / "s.safetensors", network="n", size=96)
