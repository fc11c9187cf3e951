"""The fixed networks that measure: torchmetrics' Inception and LPIPS, from weight files.

Nothing is downloaded, and no code in a weight file is run: it is read as tensors by name (safetensors, or torch.save's
format under `weights_only`), which the network must take strictly. torchmetrics builds its two networks out of other
packages' layers, Inception out of torch-fidelity's and LPIPS out of torchvision's; neither is among our requirements.

Shapes: B batch, F features, H W pixels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..models.checkpoints import fingerprint_of, load_strictly, read_tensors

_INCEPTION = (
    "Inception-v3 in the FID variant, weights-inception-2015-12-05-6726825d.pth from the release v0.2.0 of "
    "github.com/toshas/torch-fidelity"
)
_LPIPS = (
    "AlexNet or VGG-16 as torchvision trained them, the file that its AlexNet_Weights or VGG16_Weights names "
    "(alexnet-owt-7be5be79.pth, vgg16-397923af.pth)"
)


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """Features for Frechet distances.

    Attributes:
        measure: what its distance is called in tables.
        name: in words.
        fingerprint: of network and weights; what another one measured cannot be compared.
        features: pixels [B, 3, H, W] in -1..1, in steps of 8 bits -> [B, F].
    """

    measure: str
    name: str
    fingerprint: str
    features: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class PerceptualNetwork:
    """A perceptual distance.

    Attributes:
        measure, name, fingerprint: see `FeatureNetwork`.
        distance: two times pixels [B, 3, H, W] in -1..1 -> [B], 0 for equal pictures.
    """

    measure: str
    name: str
    fingerprint: str
    distance: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def feature_network(path: Path | None, *, device: torch.device | str = "cpu") -> FeatureNetwork:
    """Inception from a file.

    Raises:
        ValueError: without a file, for a file of other weights, and if torch-fidelity is missing.
    """
    if path is None:
        raise ValueError(f"--inception FILE is needed for a Frechet distance: {_INCEPTION}")
    return _inception(path, device)


def perceptual_network(path: Path | None, *, device: torch.device | str = "cpu") -> PerceptualNetwork:
    """LPIPS with its backbone from a file.

    Raises:
        ValueError: without a file, for a file of other weights, and if torchvision is missing.
    """
    if path is None:
        raise ValueError(f"--lpips FILE is needed for LPIPS: {_LPIPS}")
    return _lpips(path, device)


def _inception(path: Path, device: torch.device | str) -> FeatureNetwork:
    """torchmetrics' network at its 2048 features, resizing as TensorFlow 1 did for the first FIDs."""
    tensors = _read_weights(path, _INCEPTION)
    from torchmetrics.image.fid import FrechetInceptionDistance

    # torch-fidelity unpickles the file that it is given: it gets one of plain tensors that we have just written.
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
    """torchmetrics' LPIPS, with the linear layers that come with it and a backbone from a file."""
    tensors = _read_weights(path, _LPIPS)
    # Not torchmetrics' public class, which cannot be kept from downloading the backbone.
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


def _read_weights(path: Path, expected: str) -> dict[str, torch.Tensor]:
    """Tensors by name from safetensors or from what torch.save wrote, also before torch 1.6 (`models.checkpoints` maps
    files and cannot); nothing in the file is run."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist; expected {expected}")
    if path.suffix == ".safetensors":
        return read_tensors(path)
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # Not chained: torch's message goes on to say how to run the code in the file.
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} cannot be read as tensors alone ({reason}); expected {expected}") from None
    if not isinstance(held, dict) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise ValueError(
            f"{path} holds other things than tensors by name (a TorchScript archive is code, and is not run); "
            f"expected {expected}"
        )
    return dict(held)
