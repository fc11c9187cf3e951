"""A folder with LlamaGen: the transformer's checkpoint, its image tokenizer, and a T5 model.

The checkpoint is the one its authors publish (t2i_XL_stage2_512.pt and the like, or the same tensors as safetensors),
or a copy in the layout of transformers' Llama with model.safetensors and config.json. Sizes are read off its tensors,
except for two that no tensor shows: the number of heads, which are 64 wide in the published models, and the number of
tokens of an image, which follows from the published file's name. If these differ, the folder needs a config.json:
{"model_type": "llamagen", "num_attention_heads": 20, "block_size": 1024}. It may also give the model's "dcdd_name", a
default "guidance" (the published top-k is then not used), and as "tokenizer" the folder of another model, relative to
this one, whose image tokenizer is used.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import torch
from einops import rearrange

from ... import registry
from ...files import in_file, write_tensors
from ...int8_rows import restored, rounded
from ...protocols import MOST_GUIDANCE, ImageTokenizer
from ...settings import require_number, require_text
from ...types import Codebook
from ..checkpoints import (
    load_renamed,
    model_name,
    only_checkpoint,
    open_saved,
    read_config,
    read_headers,
    read_wanted,
    unwrapped,
    weight_files,
    whole_number,
)
from ..sizes import square_grid
from ..t5 import T5Text, check_width, load_text
from . import tokenizer
from .captions import Captions, load_captions
from .network import LlamaGenConfig, LlamaGenTransformer

MODEL_TYPE = "llamagen"
CHECKPOINTS = ("t2i_XL_stage1_256.pt", "t2i_XL_stage2_512.pt")
"""The published files, for images of 256 and 512 pixels, as their authors spell them."""
REPOSITORY = "peizesun/llamagen_t2i"
TEXT = "flan-t5-xl"
OTHER_TEXT = "text_encoder"
"""The folder of a T5 model other than the published one."""
CAPTIONS = "captions.safetensors"
"""Text features of captions that need no text encoder (`captions.save_captions`)."""

_AGAIN = f"take {' or '.join(CHECKPOINTS)} of {REPOSITORY}"
_PIXELS_A_TOKEN = 16
_HEAD_WIDTH = 64
_ENDINGS = (".pt", ".safetensors")
#: Entries that the configuration of a copy for transformers has in addition to a Llama's own.
_CAPTIONED = ("block_size", "caption_dim", "cls_token_num")
# The side in pixels at the end of a published file's name.
_SIDE = re.compile(r"_(\d+)$")
_QKV = "attention.wqkv.weight"

# Modules, by our names and by the authors'.
_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "caption_in": "cls_embedding.cap_proj.fc1",
        "caption_out": "cls_embedding.cap_proj.fc2",
        "language.embed_tokens": "tok_embeddings",
        "language.norm": "norm",
        "head": "output",
    }
)
_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
)
_NULL = "cls_embedding.uncond_embedding"


class LlamaGenFolder:
    """The parts of a folder, which are located but not read.

    Attributes:
        path: the folder.
        checkpoint: a file, or the folder itself if it is in transformers' layout.
        name: the model's name: "dcdd_name" in config.json, or the checkpoint's name without its suffix, since folders
            may be renamed; for a copy for transformers, the folder's.
        guidance: the default guidance in config.json; None without.

    Raises:
        ValueError: naming the part that is missing, and where to get it; for several checkpoints, and a config.json
            with unknown or invalid entries.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._config = read_config(self.path) if (self.path / "config.json").exists() else {"model_type": MODEL_TYPE}
        if self._config.get("model_type") == MODEL_TYPE:
            known = {"model_type", "num_attention_heads", "block_size", "dcdd_name", "guidance", "tokenizer"}
            if unknown := sorted(set(self._config) - known):
                raise ValueError(
                    f"{self.path / 'config.json'} has {unknown}, expected {', '.join(sorted(known))} alone"
                )
            missing = f"no checkpoint of LlamaGen: {_AGAIN}"
            self.checkpoint = only_checkpoint(self.path, checkpoints(self.path), missing)
            stem = self.checkpoint.stem
            self.name = stem if stem != "model" else model_name(self.path)  # transformers gives every model that name
        else:
            self.checkpoint, self.name = self.path, model_name(self.path)
        with in_file(self.path / "config.json"):
            require_text("dcdd_name", self._config.get("dcdd_name"), optional=True)
            self.guidance: float | None = self._config.get("guidance")
            limits = {"least": -MOST_GUIDANCE, "most": MOST_GUIDANCE}
            require_number("guidance", self.guidance, **limits, optional=True, remedy="leave it out for the published")
        self._published, self.name = self.name, self._config.get("dcdd_name") or self.name

    @property
    def tokenizer(self) -> Path:
        """The file of the image tokenizer, or the folder of another model that has it.

        Raises:
            ValueError: if there is none, and for an entry of config.json that is not a relative path to another,
                existing folder.
        """
        if (said := self._config.get("tokenizer")) is not None:
            if not isinstance(said, str) or not said or PurePosixPath(said).is_absolute() or Path(said).is_absolute():
                raise ValueError(
                    f"{self.path / 'config.json'}: tokenizer must be the folder of a model relative to this one, such "
                    f"as '../janus', got {said!r}"
                )
            if (other := self.path / said).resolve() == self.path.resolve():
                raise ValueError(f"{self.path / 'config.json'}: tokenizer is this very folder: leave it out")
            if not other.exists():
                raise ValueError(
                    f"{self.path / 'config.json'}: tokenizer is {said!r}, which does not exist beside this folder: put "
                    f"that model there, or put {tokenizer.NAME}.pt here and leave the entry out"
                )
            return other
        for ending in _ENDINGS:
            if (file := self.path / f"{tokenizer.NAME}{ending}").exists():
                return file
        raise ValueError(f"{self.path} has no {tokenizer.NAME}.pt, its image tokenizer: put that of {REPOSITORY} there")

    @cached_property
    def config(self) -> LlamaGenConfig:
        """The transformer's sizes; only names and shapes are read, and only once.

        Raises:
            ValueError: as `network_config`, and for a file that is damaged, holds code or is not such a checkpoint.
        """
        if self.checkpoint.suffix == ".pt":
            shapes = {name: tuple(getattr(value, "shape", ())) for name, value in self._saved.items()}
        else:
            headers = read_headers(self.checkpoint)
            shapes = {name: header.shape for name, header in unwrapped(headers).items()}
        return network_config(shapes, heads=self._entry("num_attention_heads"), tokens=self._count(), file=self._source)

    def load_network(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> LlamaGenTransformer:
        """Loads the transformer, without a text encoder.

        Raises:
            ValueError: as `config`, and for tensors that are missing, unexpected or of a wrong shape, by their names in
                the file.
        """
        config = self.config
        if self.checkpoint.suffix == ".pt":
            held = self._saved
        else:
            with in_file(self._source):
                held = unwrapped(restored(read_wanted(self.checkpoint, lambda name: True), remedy=_AGAIN))
        with torch.device("meta"):
            network = LlamaGenTransformer(config)
        rename = transformers_name if _is_transformers(held) else released_name
        load_renamed(network, split_qkv(held), rename, self._source, dtype=dtype, device=device)
        for layer in network.language.layers:
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj):
                part.weight.data = halves_of_pairs(part.weight.data, config.heads)
        return network.eval().requires_grad_(False)

    def load_text(self, *, dtype: torch.dtype = torch.float32) -> T5Text | None:
        """Loads T5's encoder, on the CPU, with its tokenizer; None if the folder has saved text features instead.

        Raises:
            ValueError: as `t5.load_text`; if there is neither, and for a text encoder of another width.
        """
        text = next((self.path / name for name in (TEXT, OTHER_TEXT) if (self.path / name).is_dir()), None)
        if text is None:
            if (self.path / CAPTIONS).exists():
                return None
            raise ValueError(
                f"{self.path} has no folder {TEXT}, its text encoder: put the files of google/{TEXT} there "
                "(config.json, tokenizer.json, tokenizer_config.json, and the safetensors files with their index), or "
                f"the features of your prompts, {CAPTIONS}, which `dcdd captions` makes where {TEXT} is"
            )
        check_width(text, self.config.text_width, self.name, f"take google/{TEXT}")
        return load_text(text, dtype=dtype)

    def load_captions(self) -> Captions | None:
        """Loads saved text features; None if there is no such file.

        Raises:
            ValueError: as `captions.load_captions`, and for features of another width.
        """
        file = self.path / CAPTIONS
        if not file.exists():
            return None
        found, trained = load_captions(file), self.config.text_width
        if found.width != trained:
            raise ValueError(
                f"{file} has features of width {found.width}, and {self.name} was trained with {trained}: make them "
                "again with this model's text encoder (`dcdd captions`)"
            )
        return found

    def codebook(self) -> Codebook:
        """The image tokenizer's codebook.

        Raises:
            ValueError: as `config` and `tokenizer.load_codebook`, and for another number of codes than the
                transformer's.
        """
        where = self.tokenizer
        codebook = self.load_tokenizer().codebook if where.is_dir() else tokenizer.load_codebook(where)
        return tokenizer.require_codes(codebook, where, self.config.codes, self.name, REPOSITORY)

    def load_tokenizer(self, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> ImageTokenizer:
        """Loads the image tokenizer, on the grid of the transformer's images.

        Raises:
            ValueError: as `config` and `tokenizer.load_tokenizer`, or the other model's family.
        """
        where, grid = self.tokenizer, self.config.grid
        if not where.is_dir():
            return tokenizer.load_tokenizer(where, grid=grid, name=self.name, device=device, dtype=dtype)
        found = registry.sampler_family(where).load_tokenizer(str(where), device=device, dtype=dtype)
        found.grid, found.name = grid, self.name
        return found

    @property
    def _source(self) -> Path:
        """The checkpoint's file, for errors."""
        return self.checkpoint if self.checkpoint.is_file() else weight_files(self.checkpoint).files[0]

    @cached_property
    def _saved(self) -> dict[str, Any]:
        """The tensors of a .pt file by name, memory-mapped but not read."""
        saved = open_saved(self.checkpoint)
        held = next((saved[part] for part in ("model", "module", "state_dict") if part in saved), saved)
        if not isinstance(held, Mapping):
            raise ValueError(f"{self.checkpoint} holds a {type(held).__name__}, expected tensors by name: {_AGAIN}")
        return unwrapped(held)

    def _count(self) -> int:
        """The number of tokens of an image."""
        if (count := self._entry("block_size")) is not None:
            return count
        side = _SIDE.search(self._published)
        if side is None or int(side[1]) % _PIXELS_A_TOKEN:
            raise ValueError(
                f"nothing says how many tokens an image of {self._source} has: keep the published name of the file, "
                f"which ends with the side in pixels ({CHECKPOINTS[1]}), or put a config.json beside it, such as "
                f'{{"model_type": "{MODEL_TYPE}", "block_size": 1024}}'
            )
        return (int(side[1]) // _PIXELS_A_TOKEN) ** 2

    def _entry(self, name: str) -> int | None:
        if name not in self._config:
            return None
        return whole_number(self._config, name, str(self.path), remedy="take the number it was trained with")


def reads(path: str | Path) -> bool:
    """Whether a folder is LlamaGen's, by its config.json, or if it has none, by a file named t2i_*."""
    folder = Path(path)
    if (folder / "config.json").exists():
        config = read_config(folder)
        captioned = config.get("model_type") == "llama" and any(name in config for name in _CAPTIONED)
        return captioned or config.get("model_type") == MODEL_TYPE
    return folder.is_dir() and any(file.name.lower().startswith("t2i_") for file in checkpoints(folder))


def checkpoints(folder: Path) -> list[Path]:
    """The files of a folder that may hold the transformer."""
    others = (tokenizer.NAME, Path(CAPTIONS).stem)
    found = (file for ending in _ENDINGS for file in folder.glob(f"*{ending}"))
    return sorted(file for file in found if not file.name.startswith(".") and file.stem not in others)


def released_name(name: str) -> str:
    """The authors' name for a tensor in a `LlamaGenTransformer`; for queries, keys and values see `split_qkv`."""
    if name == "null":
        return _NULL
    module, _, kind = name.rpartition(".")
    if not module.startswith("language.layers."):
        return f"{_MODULES[module]}.{kind}"
    _, _, number, *part = module.split(".")
    part = ".".join(part)
    if part.startswith("self_attn.") and part not in _LAYER:
        return _rows_of(f"layers.{number}.{_QKV}", part[len("self_attn.")])
    return f"layers.{number}.{_LAYER[part]}.{kind}"


def transformers_name(name: str) -> str:
    """The name of a `LlamaGenTransformer`'s tensor in a copy for transformers."""
    if name == "null":
        return f"model.{_NULL}"
    if name.startswith("caption_"):
        return f"model.{released_name(name)}"
    if name.startswith("head."):
        return f"lm_{name}"
    return f"model.{name.removeprefix('language.')}"


def save_network(file: Path, network: LlamaGenTransformer, *, int8: bool = False) -> None:
    """Writes a transformer with its authors' tensor names, without a text encoder that was trained as part of it.

    Args:
        int8: matrices in 8 bits with a float32 scale per row, the rest in float16; otherwise everything unchanged.

    Raises:
        OSError: if the file cannot be written.
    """
    tensors, heads = {}, network.config.heads
    for name, value in network.state_dict().items():
        if not name.startswith("text_encoder."):
            turned = name.endswith(("q_proj.weight", "k_proj.weight"))
            value = pairs_of_halves(value, heads) if turned else value
            tensors[released_name(name)] = value
    for i in range(network.config.layers):
        stacked = f"layers.{i}.{_QKV}"
        tensors[stacked] = torch.cat([tensors.pop(_rows_of(stacked, part)) for part in "qkv"])
    if int8:
        tensors = rounded(tensors, [name for name, value in tensors.items() if value.ndim == 2])
    write_tensors(file, tensors, {"format": "pt"})


def split_qkv(held: Mapping[str, Any]) -> dict[str, Any]:
    """Tensors by name, with stacked queries, keys and values of equal size split apart."""
    apart = {}
    for name, value in held.items():
        stacked = name.endswith(_QKV) and isinstance(value, torch.Tensor) and value.ndim == 2 and len(value) % 3 == 0
        apart |= dict(zip((_rows_of(name, part) for part in "qkv"), value.chunk(3))) if stacked else {name: value}
    return apart


def _rows_of(name: str, part: str) -> str:
    return f"{name} ({part})"


def halves_of_pairs(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders a projection [C, C] from adjacent rotary pairs to a Llama's, which are half a head apart."""
    return rearrange(weight, "(h d pair) c -> (h pair d) c", h=heads, pair=2).contiguous()


def pairs_of_halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `halves_of_pairs`."""
    return rearrange(weight, "(h pair d) c -> (h d pair) c", h=heads, pair=2).contiguous()


def network_config(
    shapes: Mapping[str, tuple[int, ...]], *, heads: int | None, tokens: int, file: Path
) -> LlamaGenConfig:
    """Reads a transformer's sizes off its checkpoint's tensors.

    Args:
        shapes: shapes of its tensors, by the authors' names or by transformers'.
        heads: number of heads; None for heads of width 64.
        tokens: N.

    Raises:
        ValueError: for tensors that are missing or that no such network has, and if N is not a square.
    """
    rename = transformers_name if _is_transformers(shapes) else released_name
    found = {
        name: _matrix(shapes, rename(name), file)
        for name in ("null", "caption_in.weight", "language.embed_tokens.weight")
    }
    inner = _matrix(shapes, rename("language.layers.0.mlp.gate_proj.weight"), file)[0]
    grid = square_grid(tokens, str(file), _AGAIN)
    codes, width = found["language.embed_tokens.weight"]
    slots, text_width = found["null"]
    beginning = re.escape(rename("language.layers.0.input_layernorm.weight")).split("0", 1)[0]
    layers = {match[1] for name in shapes if (match := re.match(rf"{beginning}(\d+)\.", name))}
    return LlamaGenConfig(
        grid=grid,
        codes=codes,
        text_width=text_width,
        text_slots=slots,
        width=width,
        layers=len(layers),
        heads=heads or max(1, width // _HEAD_WIDTH),
        hidden=inner,
    )


def _is_transformers(names: Mapping[str, Any]) -> bool:
    return "model.embed_tokens.weight" in names


def _matrix(shapes: Mapping[str, tuple[int, ...]], name: str, file: Path) -> tuple[int, int]:
    shape = shapes.get(name)
    if shape is None:
        raise ValueError(f"{file} has no tensor {name}, as a text-to-image checkpoint of LlamaGen has: {_AGAIN}")
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"{file} has {name} as {list(shape)}, expected a matrix: {_AGAIN}")
    return shape
