"""Metric networks: loaded safely from files, with clear errors if something is missing.

torchmetrics builds its networks from layers of torch-fidelity and torchvision, which are not among our requirements.
Fakes replace them here: torchvision's two backbones in full, and torch-fidelity's Inception with its layer names only.
Weight files have the published layout and random weights.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dcdd_core.evaluation.networks import feature_network, perceptual_network
from dcdd_core.models.checkpoints import fingerprint_of
from dcdd_pico import embedded
from dcdd_pico import models as pico_models
from dcdd_pico.reader import SceneReader
from tests.tiny import fill


def random_images(seed=0, size=96):
    return (torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255).round() / 127.5 - 1


def test_pico_measures_with_its_scene_reader(monkeypatch):
    reader = fill(SceneReader())
    monkeypatch.setattr(pico_models, "load_reader", lambda *, device: reader)
    frechet, perceptual = pico_models.feature_network(), pico_models.perceptual_network()
    assert torch.equal(frechet.features(random_images()), reader.frechet_features(random_images()))
    assert not frechet.features(random_images()).requires_grad
    assert torch.equal(perceptual.distance(random_images(), random_images()), torch.zeros(2))
    assert frechet.fingerprint == perceptual.fingerprint == f"scene-reader-{fingerprint_of(reader.state_dict())}"


def test_without_pico_s_weights_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(embedded, "WEIGHTS", tmp_path / "none")
    with pytest.raises(ValueError, match="none"):
        pico_models.feature_network()


def test_other_models_need_files_and_are_told_which():
    with pytest.raises(ValueError, match=r"--inception FILE .* weights-inception-2015-12-05-6726825d.pth .*fidelity"):
        feature_network(None)
    with pytest.raises(ValueError, match=r"--lpips FILE .*alexnet-owt-7be5be79.pth"):
        perceptual_network(None)


class Code:
    def __reduce__(self):
        return print, ("run!",)


@pytest.mark.parametrize("make", [feature_network, perceptual_network])
@pytest.mark.parametrize(
    ("held", "words"),
    [
        (Code(), "plain tensors"),
        ([torch.zeros(1)], "something other"),
        ({"a": 1}, "something other"),
        (b"", "plain tensors"),
    ],
)
def test_code_and_other_files_are_not_loaded(tmp_path, capsys, make, held, words):
    path = tmp_path / "x.pth"
    path.write_bytes(b"") if held == b"" else torch.save(held, path)
    with pytest.raises(ValueError, match=words) as refused:
        make(path)
    assert "run!" not in capsys.readouterr().out and "weights_only" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_not_run(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"x.pt cannot be read as plain tensors|TorchScript"):
        feature_network(tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"none.pth does not exist; expected Inception"):
        feature_network(tmp_path / "none.pth")


INCEPTION = (
    "Conv2d_1a_3x3",
    "Conv2d_2a_3x3",
    "Conv2d_2b_3x3",
    "MaxPool_1",
    "Conv2d_3b_1x1",
    "Conv2d_4a_3x3",
    "MaxPool_2",
)
INCEPTION += tuple(f"Mixed_{name}" for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"))


class Extractor(nn.Module):
    """A fake of torch-fidelity's class: its layer names, each layer with three channels; loads a file strictly."""

    INPUT_IMAGE_SIZE = 299

    def __init__(self, name="", features_list=(), feature_extractor_weights_path=None):
        super().__init__()
        self.features_list = list(features_list)
        for layer in INCEPTION:
            self.add_module(layer, nn.MaxPool2d(3, 2) if "Pool" in layer else nn.Conv2d(3, 3, 1))
        self.AvgPool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 2)
        if feature_extractor_weights_path is not None:
            self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))


def resized(images, size, align_corners):
    return F.interpolate(images, size, mode="bilinear", align_corners=align_corners)


@pytest.fixture
def torch_fidelity(monkeypatch):
    """Replaces what torchmetrics imports from torch-fidelity, and makes torchmetrics import it again."""
    fid = import_module("torchmetrics.image.fid")
    parts = {
        "feature_extractor_inceptionv3": {"FeatureExtractorInceptionV3": Extractor},
        "helpers": {"vassert": lambda truth, words: None if truth else pytest.fail(words)},
        "interpolate_compat_tensorflow": {"interpolate_bilinear_2d_like_tensorflow1x": resized},
    }
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    for name, held in parts.items():
        monkeypatch.setitem(sys.modules, f"torch_fidelity.{name}", SimpleNamespace(**held))
    monkeypatch.setattr("torchmetrics.utilities.imports._TORCH_FIDELITY_AVAILABLE", True)
    monkeypatch.setattr(sys.modules["torchmetrics.image"], "fid", fid)  # undone after the test
    monkeypatch.delitem(sys.modules, "torchmetrics.image.fid")


@pytest.mark.parametrize("legacy", [False, True])  # torch-fidelity's file is older than torch 1.6's format
def test_inception_gets_the_file_s_tensors_and_the_images_bytes(tmp_path, torch_fidelity, legacy):
    original = fill(Extractor())
    weights, path, images = original.state_dict(), tmp_path / "w.pth", random_images(0, 384)
    torch.save(dict(weights), path, _use_new_zipfile_serialization=not legacy)
    network = feature_network(path)
    expected = (resized((images + 1) * 127.5, (299, 299), False) - 128) / 128  # shrunk without a filter
    for layer in INCEPTION:
        expected = getattr(original, layer)(expected)
    found = network.features(images)
    torch.testing.assert_close(found, expected.mean((2, 3)), atol=1e-4, rtol=1e-4)
    assert not found.requires_grad
    assert network.measure == "FID" and network.fingerprint == f"inception-v3-{fingerprint_of(weights)}"
    torch.save(weights | {"more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"w.pth does not fit .*more.* expected Inception-v3"):
        feature_network(path)


def test_a_file_needs_no_name_in_utf8(tmp_path, torch_fidelity):
    path = tmp_path / "\udcff.pth"
    try:
        path.touch()
    except (OSError, UnicodeError):
        pytest.skip("this system has only names that are UTF-8")
    with path.open("wb") as file:
        torch.save(fill(Extractor()).state_dict(), file)
    assert feature_network(path).measure == "FID"


def test_another_torchmetrics_is_no_bad_file(tmp_path, monkeypatch):
    def older(self, feature, feature_extractor_weights_path):
        pytest.fail("called without antialias")

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance.__init__", older)
    with pytest.raises(TypeError, match="antialias"):
        feature_network(state(tmp_path / "w.pth", a=torch.zeros(1)))


def alexnet():
    """The layers that torchvision calls `features`."""
    pool = nn.MaxPool2d(3, 2)
    first = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), pool, nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), pool]
    sizes = ((192, 384), (384, 256), (256, 256))
    last = [layer for i, o in sizes for layer in (nn.Conv2d(i, o, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*first, *last, pool)


def vgg16():
    """The layers that torchvision calls `features`."""
    layers, channels = [], 3
    for width, count in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


BACKBONES = {"alex": alexnet, "vgg": vgg16}
TAPS = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}  # Zhang et al. 2018, arXiv 1801.03924: after each stage


@pytest.fixture
def torchvision(monkeypatch):
    """Replaces torchvision by its two backbones."""
    made = {name: lambda weights, make=make: SimpleNamespace(features=make()) for name, make in BACKBONES.items()}
    models = SimpleNamespace(alexnet=made["alex"], vgg16=made["vgg"])
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", True)


def lpips(backbone, kind, *images):
    """LPIPS by hand, with the linear layers that torchmetrics ships."""
    shift, scale = (torch.tensor(v)[None, :, None, None] for v in ((-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)))
    stages = []
    for image in images:
        stages.append([])
        image = (image - shift) / scale
        for i, layer in enumerate(backbone):
            image = layer(image)
            if i in TAPS[kind]:
                stages[-1].append(image / (image.square().sum(1, keepdim=True) + 1e-8).sqrt())
    carried = (
        Path(import_module("torchmetrics.functional.image.lpips").__file__).parent / "lpips_models" / f"{kind}.pth"
    )
    linear = torch.load(carried, map_location="cpu", weights_only=True)
    parts = [linear[f"lin{k}.model.1.weight"] * (a - b).square() for k, (a, b) in enumerate(zip(*stages))]
    return sum(part.sum(1).mean((1, 2)) for part in parts)


@pytest.mark.parametrize("kind", BACKBONES)
def test_lpips_takes_torchvision_s_file_and_no_other(tmp_path, torchvision, kind):
    backbone = fill(BACKBONES[kind]())
    weights = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    path, images = tmp_path / "w.pth", (random_images(0, 64), random_images(1, 64))
    torch.save(weights | {"classifier.1.weight": torch.zeros(1)}, path)
    network = perceptual_network(path)
    found = network.distance(*images)
    assert found.shape == (2,) and not found.requires_grad
    with torch.no_grad():
        torch.testing.assert_close(found, lpips(backbone, kind, *images), atol=1e-5, rtol=1e-4)
    assert network.measure == "LPIPS" and f"lpips-{kind}-" in network.fingerprint
    assert torch.equal(network.distance(images[0], images[0]), torch.zeros(2))
    torch.save({name: value for name, value in weights.items() if name != "features.3.bias" and "3" in name}, path)
    with pytest.raises(ValueError, match="missing: slice"):
        perceptual_network(path)


def state(path, **tensors):
    torch.save({name.replace("__", "."): value for name, value in tensors.items()}, path)
    return path


def test_missing_torch_fidelity_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("torchmetrics.image.fid._TORCH_FIDELITY_AVAILABLE", False)
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        feature_network(state(tmp_path / "w.pth", a=torch.zeros(1)))


def test_missing_torchvision_is_explained(tmp_path, monkeypatch):
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", False)
    with pytest.raises(ValueError, match="pip install torchvision"):
        perceptual_network(state(tmp_path / "w.pth", a=torch.zeros(1)))


def test_inception_is_torch_fidelity_s(tmp_path):
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        original = fill(module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]))
    for part in original.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_var.fill_(4.0)
    path = tmp_path / "w.pth"
    torch.save(original.state_dict(), path)
    network = feature_network(path)
    images = ((random_images(0, 384) + 1) * 127.5).round().byte()
    assert torch.equal(network.features(random_images(0, 384)), original(images)[0])
