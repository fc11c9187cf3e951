"""Which family reads given files: the one place where a new family is listed.

A family is one module or folder below `models` with an object of its protocol. It is imported when it is first asked
for, so that listing a family costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

from .files import in_file, read_json, reading
from .protocols import Backbone, BackboneFamily, CodecFamily, LatentCodec, SamplerFamily
from .settings import shown

#: Module below this package, and the family's name in it.
_SAMPLERS: tuple[tuple[str, str], ...] = (
    (".models.janus", "FAMILY"),
    (".models.llamagen", "FAMILY"),
    (".models.masked", "FAMILY"),
    (".models.masked.bigfix", "FAMILY"),
    (".models.masked.amused", "FAMILY"),
)
_CODECS: tuple[tuple[str, str], ...] = ((".models.vae", "FAMILY"),)
_BACKBONES: tuple[tuple[str, str], ...] = ((".models.backbones.flux_fill", "FAMILY"),)

_ADDED: ContextVar[tuple[Any, ...]] = ContextVar("families from outside this package", default=())


@contextmanager
def added(*families: SamplerFamily | CodecFamily | BackboneFamily) -> Iterator[None]:
    """Makes further families known while the context lasts, and asks them first: for families outside this package."""
    token = _ADDED.set((*families, *_ADDED.get()))
    try:
        yield
    finally:
        _ADDED.reset(token)


def samplers() -> list[SamplerFamily]:
    """The known VLM families."""
    return _all(SamplerFamily, _SAMPLERS)


def codecs() -> list[CodecFamily]:
    """The known kinds of latent codec."""
    return _all(CodecFamily, _CODECS)


def backbones() -> list[BackboneFamily]:
    """The known kinds of diffusion transformer."""
    return _all(BackboneFamily, _BACKBONES)


def sampler_family(path: str | Path) -> SamplerFamily:
    """The family that reads a VLM's files.

    Raises:
        ValueError: if nothing is there, or nothing that a family reads.
    """
    return _reader(path, samplers(), "a VLM")


def codec_family(path: str | Path) -> CodecFamily:
    """The family that reads an autoencoder's files.

    Raises:
        ValueError: if nothing is there, or nothing that a family reads.
    """
    return _reader(path, codecs(), "an autoencoder")


def load_codec(path: str | Path, **options: Any) -> LatentCodec:
    """Loads the autoencoder in these files; `options` as for `CodecFamily.load`.

    Raises:
        ValueError: as `codec_family` and the family's loader.
    """
    return codec_family(path).load(str(path), **options)


def backbone_family(config: dict[str, Any]) -> BackboneFamily:
    """The family of a network's configuration, by its "_class_name"; without one, the first family, which wrote none.

    Raises:
        ValueError: for a class that no family builds.
    """
    known = backbones()
    wanted = config.get("_class_name")
    if wanted is None:
        return _listed(_BACKBONES)[0]
    for family in known:
        if family.class_name == wanted:
            return family
    names = ", ".join(family.class_name for family in known)
    raise ValueError(f"the decoder's network is a {shown(wanted)}; known are {names}: update ComfyUI-DCDD")


def codec_of(config: dict[str, Any]) -> CodecFamily:
    """The family of the latents that a network of this configuration paints.

    Raises:
        ValueError: for a codec that is not known.
    """
    backbone, known = backbone_family(config), {family.name: family for family in codecs()}
    if backbone.codec not in known:
        raise ValueError(
            f"the backbone {backbone.name!r} paints latents of the codec {backbone.codec!r}; known are "
            f"{', '.join(map(repr, known))}: register that codec too"
        )
    return known[backbone.codec]


def base_family(path: str | Path) -> BackboneFamily:
    """The family of a base model's files.

    A folder's config.json determines it; a single file is the first family's, whose loader checks what is in it.

    Raises:
        ValueError: if nothing is there, and for a class that no family builds.
    """
    folder = Path(path)
    if not folder.exists():
        raise ValueError(f"{path} does not exist: give the folder or file of the decoder's base model")
    folder = folder / "transformer" if (folder / "transformer").is_dir() else folder
    config = _config(folder)
    with in_file(folder / "config.json"):
        return backbone_family(config if "_class_name" in config else {})


def build_backbone(config: dict[str, Any], *, guidance: float = 1.0) -> Backbone:
    """A network of this configuration with random weights, on torch's current device."""
    return backbone_family(config).build(config, guidance=guidance)


def _all(protocol: type, listed: tuple[tuple[str, str], ...]) -> list[Any]:
    return [*(family for family in _ADDED.get() if isinstance(family, protocol)), *_listed(listed)]


def _listed(listed: tuple[tuple[str, str], ...]) -> list[Any]:
    return [getattr(import_module(module, __package__), name) for module, name in listed]


def _reader(path: str | Path, families: list[Any], what: str) -> Any:
    for family in families:
        if family.reads(str(path)):
            return family
    raise ValueError(f"{path} {_found(Path(path))}; expected {what}: {'; or '.join(f.expected for f in families)}")


def _found(path: Path) -> str:
    """Describes what is at a path."""
    if not path.exists():
        return "does not exist"
    if path.is_file():
        with reading(path, "a model"), path.open("rb") as file:
            return "is a GGUF file" if file.read(4) == b"GGUF" else "is a file"
    if not path.is_dir():
        return "is a device, pipe or socket"
    for name in ("config.json", "model_index.json"):
        config = _config(path, name)
        if kind := config.get("model_type") or config.get("_class_name"):
            return f"holds a {shown(kind)}"
    held = sorted(child.name for child in path.iterdir())
    if "config.json" in held or "model_index.json" in held:
        return "holds no known model"
    return f"has no config.json (it holds {', '.join(held[:8]) or 'nothing'})"


def _config(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """A folder's configuration of this name; empty if there is none. A diffusers pipeline has a model_index.json."""
    path = folder / name
    return read_json(path, "a model's configuration") if path.exists() else {}
