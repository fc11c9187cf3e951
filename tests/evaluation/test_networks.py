"""The networks that measure: from files, safely, and explained where they are missing.

torch-fidelity and torchvision, whose layers torchmetrics uses, are not among our requirements: where they are absent a
stand-in of torchmetrics' class takes their place here, and the tests of the real ones are left out.
"""

import importlib.util

import pytest
import torch
from torch import nn

from dcdd_core.evaluation import networks
from dcdd_core.evaluation.networks import feature_network, perceptual_network
from dcdd_core.models.checkpoints import fingerprint_of
from dcdd_core.pico.reader import SceneReader
from dcdd_core.pipelines import models as pipelines_models
from tests.tiny import fill


def pictures(seed=0, size=96):
    return (torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 255).round() / 127.5 - 1


def test_pico_measures_with_its_scene_reader(monkeypatch):
    reader = fill(SceneReader())
    monkeypatch.setattr(networks, "load_reader", lambda *, device, weights: reader)
    frechet, perceptual = (make(None, embedded=True) for make in (feature_network, perceptual_network))
    assert torch.equal(frechet.features(pictures()), reader.frechet_features(pictures()))
    assert not frechet.features(pictures()).requires_grad
    assert torch.equal(perceptual.distance(pictures(), pictures()), torch.zeros(2))
    assert frechet.fingerprint == perceptual.fingerprint == f"scene-reader-{fingerprint_of(reader.state_dict())}"


def test_without_pico_s_weights_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(pipelines_models, "PICO_WEIGHTS", tmp_path / "none")
    with pytest.raises(ValueError, match="none"):
        feature_network(None, embedded=True)


def test_other_models_need_files_and_are_told_which():
    with pytest.raises(ValueError, match=r"--inception FILE .* weights-inception-2015-12-05-6726825d.pth .*fidelity"):
        feature_network(None, embedded=False)
    with pytest.raises(ValueError, match=r"--lpips FILE .*alexnet-owt-7be5be79.pth"):
        perceptual_network(None, embedded=False)


class Code:
    def __reduce__(self):
        return print, ("run!",)


@pytest.mark.parametrize("make", [feature_network, perceptual_network])
@pytest.mark.parametrize(
    ("held", "words"),
    [(Code(), "tensors alone"), ([torch.zeros(1)], "other things"), ({"a": 1}, "other things"), (b"", "tensors alone")],
)
def test_code_and_other_files_are_not_loaded(tmp_path, capsys, make, held, words):
    path = tmp_path / "x.pth"
    path.write_bytes(b"") if held == b"" else torch.save(held, path)
    with pytest.raises(ValueError, match=words) as refused:
        make(path, embedded=False)
    assert "run!" not in capsys.readouterr().out and "weights_only" not in str(refused.value)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_torchscript_archive_is_not_run(tmp_path):
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match=r"x.pt cannot be read as tensors alone|TorchScript"):
        feature_network(tmp_path / "x.pt", embedded=False)
    with pytest.raises(ValueError, match=r"none.pth does not exist; expected Inception"):
        feature_network(tmp_path / "none.pth", embedded=False)


class StandIn(nn.Module):
    """torchmetrics' Inception as far as it is used: reads a file, strictly, and takes bytes."""

    def __init__(self, path):
        super().__init__()
        self.layer = nn.Linear(3, 5)
        self.load_state_dict(torch.load(path, weights_only=True))

    def forward(self, images):
        assert images.dtype == torch.uint8
        return self.layer(images.float().mean((2, 3)))


@pytest.fixture
def stand_in(monkeypatch):
    class Metric:
        def __init__(self, feature, feature_extractor_weights_path, antialias):
            assert feature == 2048 and not antialias
            self.inception = StandIn(feature_extractor_weights_path)

    monkeypatch.setattr("torchmetrics.image.fid.FrechetInceptionDistance", Metric)


@pytest.mark.parametrize("legacy", [False, True])  # torch-fidelity's file is older than torch 1.6's format
def test_inception_gets_the_file_s_tensors_and_the_pictures_bytes(tmp_path, stand_in, legacy):
    layer = fill(nn.Linear(3, 5))
    weights = {f"layer.{name}": value for name, value in layer.state_dict().items()}
    path = tmp_path / "w.pth"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    network = feature_network(path, embedded=True)
    expected = layer(((pictures() + 1) * 127.5).mean((2, 3)))
    assert torch.allclose(network.features(pictures()), expected, atol=1e-3)
    assert network.measure == "FID" and network.fingerprint == f"inception-v3-{fingerprint_of(weights)}"
    torch.save(weights | {"more": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"w.pth does not fit .*more.* expected Inception-v3"):
        feature_network(path, embedded=True)


def state(path, **tensors):
    torch.save({name.replace("__", "."): value for name, value in tensors.items()}, path)
    return path


@pytest.mark.skipif(importlib.util.find_spec("torch_fidelity") is not None, reason="torch-fidelity is here")
def test_missing_torch_fidelity_is_explained(tmp_path):
    with pytest.raises(ValueError, match="pip install torch-fidelity"):
        feature_network(state(tmp_path / "w.pth", a=torch.zeros(1)), embedded=False)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
def test_missing_torchvision_is_explained(tmp_path):
    with pytest.raises(ValueError, match="pip install torchvision"):
        perceptual_network(state(tmp_path / "w.pth", a=torch.zeros(1)), embedded=False)


@pytest.mark.parametrize("kind", ["alex", "vgg"])
def test_lpips_takes_torchvision_s_file_and_no_other(tmp_path, kind):
    torchvision = pytest.importorskip("torchvision")
    backbone = fill({"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[kind](weights=None).features)
    weights = {f"features.{name}": value for name, value in backbone.state_dict().items()}
    path = tmp_path / "w.pth"
    torch.save(weights | {"classifier.1.weight": torch.zeros(1)}, path)
    network = perceptual_network(path, embedded=False)
    found = network.distance(pictures(0), pictures(1))
    assert found.shape == (2,) and (found > 0).all() and kind in network.fingerprint
    assert torch.equal(network.distance(pictures(), pictures()), torch.zeros(2))
    torch.save({name: value for name, value in weights.items() if name != "features.3.bias" and "3" in name}, path)
    with pytest.raises(ValueError, match="missing: slice"):
        perceptual_network(path, embedded=False)


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
    network = feature_network(path, embedded=False)
    images = ((pictures(0, 384) + 1) * 127.5).round().byte()
    assert torch.equal(network.features(pictures(0, 384)), original(images)[0])
