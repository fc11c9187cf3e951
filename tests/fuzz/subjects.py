"""The public loaders, each with a sound file or folder to damage, and a digest of what it makes of one."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from dcdd_core import registry
from dcdd_core.evaluation.image_folder import list_images, read_readable
from dcdd_core.evaluation.prompts import read_geneval, read_prompts
from dcdd_core.models.bundle import load_decoder, save_bundle
from dcdd_core.models.janus import deepseek
from dcdd_core.models.janus.files import save_int8
from dcdd_core.models.janus.sampler import JanusSampler
from dcdd_core.models.janus.tokenizer import load_tokenizer
from dcdd_core.models.vae import load_vae
from dcdd_core.pipelines.image_files import ReadPolicy
from dcdd_core.protocols import SamplingOptions
from dcdd_core.training.batches import Batches, DataShard
from dcdd_core.training.cache import EncodingCache
from dcdd_core.training.cache_writer import write_cache
from dcdd_core.training.sources import open_images
from dcdd_core.types import Calibration, Codebook, Condition, TokenLogits
from tests import tiny
from tests.models.janus import deepseek_layout
from tests.training import runs


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loader.

    Attributes:
        owner: its module, for the list of failures.
        build: writes something sound into an empty folder.
        load: reads it; the digest is of all that a user of it would see.
        sealed: checksums guard every value, so that none may change unnoticed.
        free: contents that a reader cannot judge, such as prompts and pixels: other values are other data.
    """

    name: str
    owner: str
    build: Callable[[Path], Any]
    load: Callable[[Path], str]
    sealed: bool = False
    free: bool = False


def digest(*values: Any) -> str:
    """Of tensors and plain values."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            found.update(f"{value.dtype} {tuple(value.shape)}".encode())
            value = value.detach().contiguous().view(torch.uint8).numpy().tobytes()
        found.update(value if isinstance(value, bytes) else repr(value).encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def _janus(folder: Path) -> str:
    sampler = JanusSampler.load(folder)
    drawn = sampler.sample(["red star"], seeds=[1], options=SamplingOptions(guidance=2.0))
    words = sorted(sampler.tokenizer.get_vocab().items())
    return digest(sampler.fingerprint, sampler.codebook.fingerprint, words, drawn.logits, drawn.tokens)


def _build_deepseek(folder: Path, kind: str, shards: int) -> None:
    deepseek_layout.write_all_but_weights(folder)
    deepseek_layout.write_weights(folder, deepseek_layout.tiny_weights(), kind, shards)


def _deepseek(folder: Path) -> str:
    with mock.patch.object(deepseek, "_VQ_16", {**deepseek._VQ_16, **deepseek_layout.TINY_VQ}):
        return _janus(folder)


def _tokenizer(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    proxies = tokenizer.encode(pixels)
    return digest(proxies.logits, proxies.tokens, tokenizer.decode_tokens(proxies.tokens, proxies.grid))


def _codec(folder: Path) -> str:
    codec = registry.load_codec(folder)
    pixels = torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16)
    latents = codec.encode(pixels)
    return digest(latents, codec.decode(latents), codec.shift, codec.scale, codec.factor)


def _vae_file(folder: Path) -> str:
    vae = load_vae(folder / "ae.safetensors", config=dict(tiny.tiny_vae().config))
    return digest(*vae.state_dict().values())


def _build_vae_file(folder: Path) -> None:
    save_file({name: value.clone() for name, value in tiny.tiny_vae().state_dict().items()}, folder / "ae.safetensors")


def _is_trained(name: str) -> bool:
    return ".attn." in name


def _build_with_base(folder: Path, *, file: bool = False) -> None:
    decoder = tiny.tiny_decoder()
    save_bundle(folder / "bundle.safetensors", decoder, trained=_is_trained, dtype=torch.float32)
    if file:
        values = {name: value.clone() for name, value in decoder.transformer.state_dict().items()}
        save_file(values, folder / "base.safetensors")
    else:
        decoder.transformer.save_pretrained(folder / "base", max_shard_size="40KB")


def _decoder(folder: Path, base: str | None = None) -> str:
    decoder = load_decoder(folder / "bundle.safetensors", None if base is None else folder / base)
    card = asdict(decoder.card)
    free = ("base", "tokenizer", "licence")
    return digest(*decoder.state_dict().values(), sorted((k, v) for k, v in card.items() if k not in free))


def _logits() -> TokenLogits:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 16, 64, generator=draw)
    return TokenLogits(logits, logits.argmax(-1), (4, 4), guidance=2.0, codebook=_codebook().fingerprint)


def _codebook() -> Codebook:
    return Codebook(tiny.tiny_vq().quantize.embedding.weight)


def _of_logits(folder: Path) -> str:
    found = TokenLogits.load(folder / "file.safetensors")
    return digest(found.logits, found.tokens, found.grid, found.source, found.guidance, found.temperature)


def _of_condition(folder: Path) -> str:
    found = Condition.load(folder / "file.safetensors")
    return digest(*(value for value in vars(found).values() if isinstance(value, torch.Tensor)), found.grid)


def _of_calibration(folder: Path) -> str:
    found = asdict(Calibration.load(folder / "file.safetensors"))
    return digest(sorted((name, value) for name, value in found.items() if name not in ("vlm",)))


def _png(number: int, side: int = 20) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)
    out = io.BytesIO()
    PIL.Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def _build_images(folder: Path, count: int = 4) -> None:
    for i in range(count):
        (folder / f"{i}.png").write_bytes(_png(i))


def _build_tar(folder: Path) -> None:
    for part in range(2):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            for i in range(3):
                info, content = tarfile.TarInfo(f"{part}{i}.png"), _png(10 * part + i)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def _build_parquet(folder: Path) -> None:
    for part in range(2):
        rows = {"image": [{"bytes": _png(10 * part + i), "path": f"{i}.png"} for i in range(3)]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(str(folder / f"{part}.parquet"))


def _build_saved(folder: Path) -> None:
    rows = {"image": [{"bytes": _png(i), "path": None} for i in range(4)]}
    features = datasets.Features({"image": datasets.Image()})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder / "set"))


def _source(folder: Path) -> str:
    """One epoch in batches, as a training reads it, with all that may be left out left out."""
    geometry = runs.encoders()[2]
    path = folder / "set" if (folder / "set").exists() else folder
    source = open_images(path, geometry, policy=ReadPolicy(skip_unreadable=1.0))
    stream = iter(Batches(source, size=2, shard=DataShard(seed=None)))
    return digest(*(next(stream).pixels for _ in range(2)))


def _evaluated(folder: Path) -> str:
    images, (pixels,) = read_readable(list_images(folder), 16)
    return digest([image.name for image in images], pixels)


def _build_cache(folder: Path) -> None:
    tokenizer, codec, geometry = runs.encoders()
    (folder / "images").mkdir()
    _build_images(folder / "images")
    source = open_images(folder / "images", geometry)
    write_cache(folder / "cache", source, tokenizer, codec, shard_size=2, batch_size=2, report=lambda _: None)


def _cache(folder: Path) -> str:
    cache = EncodingCache(folder / "cache")
    cache.verify()
    batch = cache.batch(range(len(cache)))
    return digest(cache.keys, batch.features, batch.latents, asdict(cache.card.geometry))


def _build_run(folder: Path) -> None:
    (folder / "images").mkdir()
    _build_images(folder / "images", 6)
    runs.run(folder / "run", folder / "images", steps=3, what="adapter")


def _resumed(folder: Path) -> str:
    AcceleratorState._reset_state(reset_partial_state=True)
    decoder = runs.run(folder / "run", folder / "images", steps=3, what="adapter")
    return digest(*decoder.adapter.state_dict().values())


_PROMPTS = ["a red star", "a blue circle on sand", "zwei Häuser"]


def _build_prompts(folder: Path) -> None:
    (folder / "prompts.txt").write_text("\n".join(_PROMPTS), "utf-8")
    rows = [{"prompt": text, "id": f"p{i}", "category": "all"} for i, text in enumerate(_PROMPTS)]
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    (folder / "prompts.json").write_text(json.dumps({row["id"]: row for row in rows}), "utf-8")
    rows = [{"prompt": text, "tag": "colors", "include": []} for text in _PROMPTS]
    (folder / "geneval.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")


def _prompts(folder: Path) -> str:
    files = [folder / f"prompts.{suffix}" for suffix in ("txt", "jsonl", "json")]
    return digest(*(read_prompts(path) for path in files), read_geneval(folder / "geneval.jsonl"))


def _saved(value: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda folder: value().save(folder / "file.safetensors")


def _calibration() -> Calibration:
    return Calibration(scale=25.0, smoothing=0.01, anchor=2.0, guidance=3.0, codebook=_codebook().fingerprint)


def _build_int8(folder: Path) -> None:
    model, tokenizer = tiny.tiny_janus()
    save_int8(folder, model)
    tokenizer.save_pretrained(folder)


SUBJECTS = {
    subject.name: subject
    for subject in (
        Subject(name="Janus folder", owner="models/janus", build=tiny.save_janus, load=_janus),
        Subject(name="Janus folder in 8 bits", owner="models/janus", build=_build_int8, load=_janus),
        Subject(
            name="DeepSeek folder",
            owner="models/janus/deepseek.py",
            build=lambda folder: _build_deepseek(folder, ".safetensors", 2),
            load=_deepseek,
        ),
        Subject(
            name="DeepSeek pickles",
            owner="models/janus/deepseek.py",
            build=lambda folder: _build_deepseek(folder, ".bin", 1),
            load=_deepseek,
        ),
        Subject(name="image tokenizer", owner="models/janus", build=tiny.save_janus, load=_tokenizer),
        Subject(
            name="VAE folder", owner="models/vae.py", build=lambda f: tiny.tiny_vae().save_pretrained(f), load=_codec
        ),
        Subject(name="VAE file", owner="models/vae.py", build=_build_vae_file, load=_vae_file),
        Subject(
            name="FLUX folder",
            owner="models/backbones",
            build=_build_with_base,
            load=lambda folder: _decoder(folder, "base"),
        ),
        Subject(
            name="FLUX file",
            owner="models/backbones",
            build=lambda folder: _build_with_base(folder, file=True),
            load=lambda folder: _decoder(folder, "base.safetensors"),
        ),
        Subject(
            name="decoder bundle",
            owner="models/bundle.py",
            build=lambda folder: save_bundle(folder / "bundle.safetensors", tiny.tiny_decoder()),
            load=_decoder,
            sealed=True,
        ),
        Subject(name="calibration", owner="types.py", build=_saved(_calibration), load=_of_calibration),
        Subject(name="TokenLogits", owner="types.py", build=_saved(_logits), load=_of_logits),
        Subject(name="Condition", owner="types.py", build=_saved(lambda: tiny.tiny_condition(1)), load=_of_condition),
        Subject(
            name="Codebook",
            owner="types.py",
            build=_saved(_codebook),
            load=lambda folder: digest(Codebook.load(folder / "file.safetensors").vectors),
        ),
        Subject(name="encoding cache", owner="training/cache.py", build=_build_cache, load=_cache, sealed=True),
        Subject(
            name="training checkpoint", owner="training/checkpoints.py", build=_build_run, load=_resumed, sealed=True
        ),
        Subject(name="prompts", owner="evaluation/prompts.py", build=_build_prompts, load=_prompts, free=True),
        Subject(
            name="evaluated images", owner="evaluation/image_folder.py", build=_build_images, load=_evaluated, free=True
        ),
        Subject(name="training images", owner="training/folders.py", build=_build_images, load=_source, free=True),
        Subject(name="webdataset shards", owner="training/shards.py", build=_build_tar, load=_source, free=True),
        Subject(name="parquet files", owner="training/shards.py", build=_build_parquet, load=_source, free=True),
        Subject(name="saved dataset", owner="training/tabular.py", build=_build_saved, load=_source, free=True),
    )
}

warnings.filterwarnings("ignore")
