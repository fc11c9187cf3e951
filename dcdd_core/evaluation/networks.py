"""Metric networks: torchmetrics' Inception and LPIPS, from weight files.

Nothing is downloaded, and no code in a weight file is run: tensors are read by name (safetensors, or torch.save's
format with `weights_only`) and loaded strictly. torchmetrics takes Inception's layers from torch-fidelity and LPIPS'
backbone from torchvision; neither package is among our requirements.

Shapes: B batch, F features, H W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..files import utf8_path
from ..models.checkpoints import fingerprint_of, load_strictly, read_tensors

_INCEPTION = (
    "Inception-v3 in the FID variant, weights-inception-2015-12-05-6726825d.pth from the release v0.2.0 of "
    "github.com/toshas/torch-fidelity"
)
_LPIPS = (
    "torchvision's AlexNet or VGG-16, the file that its AlexNet_Weights or VGG16_Weights names "
    "(alexnet-owt-7be5be79.pth, vgg16-397923af.pth)"
)


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network that computes features for Frechet distances.

    Attributes:
        measure: name of the distance in tables.
        name: full name, for reports.
        fingerprint: of architecture and weights; distances of different fingerprints cannot be compared.
        features: pixels [B, 3, H, W] in -1..1, quantised to 8 bits -> [B, F].
    """

    measure: str
    name: str
    fingerprint: str
    features: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PerceptualNetwork:
    """A network that computes perceptual distances.

    Attributes:
        measure, name, fingerprint: see `FeatureNetwork`.
        distance: two batches of pixels [B, 3, H, W] in -1..1 -> [B], 0 for equal images.
    """

    measure: str
    name: str
    fingerprint: str
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def feature_network(path: Path | None, *, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Inception with weights from a file.

    Raises:
        ValueError: without a file, if its weights do not fit, and if torch-fidelity is missing.
    """
    if path is None:
        raise ValueError(f"--inception FILE is needed for a Frechet distance: {_INCEPTION}")
    return _inception(path, device)


def perceptual_network(path: Path | None, *, device: torch.device | str = "cpu") -> PerceptualNetwork:
    """LPIPS with backbone weights from a file.

    Raises:
        ValueError: without a file, if its weights do not fit, and if torchvision is missing.
    """
    if path is None:
        raise ValueError(f"--lpips FILE is needed for LPIPS: {_LPIPS}")
    return _lpips(path, device)


def _inception(path: Path, device: torch.device | str) -> FeatureNetwork:
    """torchmetrics' network up to its 2048 features, with TensorFlow 1's resizing as in the original FID."""
    tensors = _read_weights(path, _INCEPTION)
    with _torchmetrics():
        from torchmetrics.image.fid import FrechetInceptionDistance

    # torch-fidelity unpickles the file it is given, so it gets a file of plain tensors that we have just written.
    with tempfile.TemporaryDirectory() as folder:
        checked = Path(folder) / "inception.pth"
        torch.save(tensors, checked)
        try:
            network = FrechetInceptionDistance(
                feature=2048, feature_extractor_weights_path=str(checked), antialias=False
            ).inception
        except ModuleNotFoundError as error:
            raise ValueError(
                "torchmetrics takes its Inception's layers from torch-fidelity, which is not installed: "
                "pip install torch-fidelity (it needs torchvision, in the build that fits your torch)"
            ) from error
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"{path} does not fit ({reason}); expected {_INCEPTION}") from error
    network = network.eval().requires_grad_(False).to(device)
    return FeatureNetwork(
        measure="FID",
        name="Inception-v3 (torchmetrics, 2048 features, TensorFlow 1's bilinear resizing)",
        fingerprint=f"inception-v3-{fingerprint_of(network.state_dict())}",
        features=torch.no_grad()(lambda pixels: network(((pixels + 1) * 127.5).round().byte())),
    )


def _lpips(path: Path, device: torch.device | str) -> PerceptualNetwork:
    """torchmetrics' LPIPS, with the linear layers that it ships and a backbone from a file."""
    tensors = _read_weights(path, _LPIPS)
    # torchmetrics' public class always downloads the backbone, so the private one is used.
    with _torchmetrics():
        from torchmetrics.functional.image.lpips import _NoTrainLpips

    kind = "vgg" if "features.28.weight" in tensors else "alex"
    try:
        network = _NoTrainLpips(net=kind, pnet_rand=True)
    except ModuleNotFoundError as error:
        raise ValueError(
            "torchmetrics takes LPIPS' backbone from torchvision, which is not installed: "
            "pip install torchvision, in the build that fits your torch"
        ) from error
    held = {name.removeprefix("features."): tensor for name, tensor in tensors.items() if name.startswith("features.")}
    wanted = {name: name.split(".", 1)[1] for name in network.net.state_dict()}  # slice2.3.weight: features.3.weight
    chosen = {name: held[source] for name, source in wanted.items() if source in held}
    load_strictly(network.net, chosen, f"{path} (expected {_LPIPS})")
    network = network.eval().requires_grad_(False).to(device)
    return PerceptualNetwork(
        measure="LPIPS",
        name=f"LPIPS on {'VGG-16' if kind == 'vgg' else 'AlexNet'} (torchmetrics)",
        fingerprint=f"lpips-{kind}-{fingerprint_of(network.state_dict())}",
        distance=torch.no_grad()(lambda first, second: network(first, second).flatten()),
    )


@contextmanager
def _torchmetrics() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"the published metrics need torchmetrics ({error}): pip install torchmetrics") from error


def _read_weights(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """Tensors by name from a safetensors or torch.save file; nothing in the file is run.

    Files from before torch 1.6 are read too, which `models.checkpoints` cannot do since it maps files.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected {expected}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        with utf8_path(path) as readable:
            held = torch.load(readable, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not chained, since torch's message explains how to run the code in the file.
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as plain tensors ({reason}); expected {expected}") from None
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise ValueError(
            f"{path} holds something other than tensors by name (TorchScript archives contain code and are not "
            f"loaded); expected {expected}"
        )
    return dict(held)
