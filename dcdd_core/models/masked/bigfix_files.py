"""A folder with BIGFix as published: the transformer's .pth, LlamaGen's tokenizer and a T5 model.

NAME.pth is what the authors' trainer saves (a dict with "model_state_dict"). Sizes are read off its tensors, except for
the number of heads, which no tensor shows: the released trainer has one for each of its widths. For another width the
folder needs a config.json: {"model_type": "bigfix", "heads": 2}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from ...types import Codebook
from ..checkpoints import load_renamed, only_checkpoint, open_saved, read_config, unwrapped, whole_number
from ..llamagen import tokenizer as llamagen
from ..sizes import square_grid
from ..t5 import T5Words, check_width, load_text
from .bigfix_network import REWARDS, BigFixConfig, BigFixTransformer

MODEL_TYPE = "bigfix"
CHECKPOINT = "BigFix_XLarge_aplha02_res512_MiroFT.pth"
"""The published file, as its authors spell it."""
REPOSITORY = "llvictorll/BigFIX"
TOKENIZER = f"{llamagen.NAME}.pt"
TEXT = "flan-t5-xl"

_AGAIN = f"take {CHECKPOINT} of {REPOSITORY}"
#: Number of heads for each width of the released trainer.
_HEADS: Mapping[int, int] = MappingProxyType({384: 6, 768: 12, 1024: 16, 1152: 16, 1536: 24})

# Modules, by our names and by the authors'.
_MODULES: Mapping[str, str] = MappingProxyType(
    {
        "codes": "tok_emb",
        "positions": "pos_emb",
        "registers": "reg_tokens",
        "text_in": "txt_proj",
        "style_in": "reward_proj.0",
        "style_out": "reward_proj.2",
        "norm": "last_norm",
        "head": "head",
    }
)
_BLOCK: Mapping[str, str] = MappingProxyType(
    {
        "attention_norm": "ln1",
        "q": "attn.wq",
        "k": "attn.wk",
        "v": "attn.wv",
        "out": "attn.wo",
        "text_norm": "ln1_bis",
        "text_q": "cross_attn.wq",
        "text_k": "cross_attn.wk",
        "text_v": "cross_attn.wv",
        "text_out": "cross_attn.wo",
        "mlp_norm": "ln2",
        "gate": "ff.w1",
        "up": "ff.w3",
        "down": "ff.w2",
    }
)


class BigFixFolder:
    """The parts of a folder, which are located but not read.

    Attributes:
        path: the folder.
        checkpoint, tokenizer: the files of its parts.
        name: the model's name: the checkpoint's, without its suffix, since folders may be renamed.

    Raises:
        ValueError: naming the part that is missing, and where to get it; for several checkpoints, and a config.json
            with unknown entries.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        missing = f"no checkpoint of BIGFix: put {CHECKPOINT} of {REPOSITORY} there"
        self.checkpoint = only_checkpoint(self.path, checkpoints(self.path), missing)
        self.tokenizer = self.path / TOKENIZER
        self.name = self.checkpoint.stem
        if not self.tokenizer.exists():
            raise ValueError(f"{self.path} has no {TOKENIZER}, its image tokenizer: put that of {REPOSITORY} there")
        self._config = read_config(self.path) if (self.path / "config.json").exists() else {"model_type": MODEL_TYPE}
        if unknown := sorted(set(self._config) - {"model_type", "heads"}):
            raise ValueError(f"{self.path / 'config.json'} has {unknown}, expected model_type and heads alone")

    @property
    def text(self) -> Path:
        """The folder of the text encoder.

        Raises:
            ValueError: if there is none.
        """
        text = self.path / TEXT
        if not text.is_dir():
            raise ValueError(
                f"{self.path} has no folder {TEXT}, its text encoder: put the files of google/{TEXT} there "
                "(config.json, tokenizer.json, tokenizer_config.json, and the safetensors files with their index)"
            )
        return text

    def config(self) -> BigFixConfig:
        """The transformer's sizes; only names and shapes are read.

        Raises:
            ValueError: as `network_config`, and for a file that is damaged, holds code or is not such a checkpoint.
        """
        return network_config(self._tensors(), self._heads, self.checkpoint)

    def load_network(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> tuple[BigFixTransformer, T5Words]:
        """Loads the transformer with its text encoder, and the text tokenizer.

        Raises:
            ValueError: as `text`, `read_network` and `t5.load_text`, and for a text encoder of another width.
        """
        check_width(self.text, self.config().text_width, self.checkpoint.name, f"take google/{TEXT}")
        network = self.read_network(device=device, dtype=dtype)
        text = load_text(self.text, device=device, dtype=dtype)
        network.text_encoder = text.encoder
        return network.eval().requires_grad_(False), text.words

    def read_network(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> BigFixTransformer:
        """Loads the transformer without a text encoder.

        Raises:
            ValueError: as `config`, and for tensors that are missing, unexpected or of a wrong shape, by their names in
                the file.
        """
        held = self._tensors()
        with torch.device("meta"):
            network = BigFixTransformer(network_config(held, self._heads, self.checkpoint))
        load_renamed(network, held, bigfix_name, self.checkpoint, dtype=dtype, device=device)
        return network

    def codebook(self) -> Codebook:
        """The image tokenizer's codebook.

        Raises:
            ValueError: as `config` and `llamagen.load_codebook`, and for another number of codes than the
                transformer's.
        """
        codebook, codes = llamagen.load_codebook(self.tokenizer), self.config().codes
        return llamagen.require_codes(codebook, self.tokenizer, codes, self.checkpoint.name, REPOSITORY)

    @property
    def _heads(self) -> int | None:
        if "heads" not in self._config:
            return None
        return whole_number(self._config, "heads", str(self.path), remedy="take the number it was trained with")

    def _tensors(self) -> dict[str, Any]:
        held = open_saved(self.checkpoint).get("model_state_dict")
        if not isinstance(held, Mapping):
            raise ValueError(f"{self.checkpoint} has no 'model_state_dict', as BIGFix's trainer saves: {_AGAIN}")
        return unwrapped(held)


def checkpoints(folder: Path) -> list[Path]:
    """The .pth files of a folder."""
    return sorted(file for file in folder.glob("*.pth") if not file.name.startswith("."))


def bigfix_name(name: str) -> str:
    """The released name for a tensor in a `BigFixTransformer`."""
    module, _, kind = name.rpartition(".")
    if module.startswith("layers."):
        _, number, part = module.split(".")
        return f"transformer.layers.{number}.{_BLOCK[part]}.{kind}"
    return f"{_MODULES[module]}.{kind}"


def network_config(held: Mapping[str, Any], heads: int | None, file: Path) -> BigFixConfig:
    """Reads a transformer's sizes off its checkpoint's tensors.

    Args:
        held: tensors by their released names.
        heads: number of heads; None for the released trainer's at this width.

    Raises:
        ValueError: for tensors that are missing or that no such network has, and a width whose number of heads is not
            known.
    """
    (codes, width), (tokens, _), (registers, _) = (
        _shape(held, f"{name}.weight", file) for name in ("tok_emb", "pos_emb", "reg_tokens")
    )
    grid = square_grid(tokens, f"{file} (pos_emb.weight)", _AGAIN)
    if _shape(held, "reward_proj.0.weight", file)[1] != REWARDS:
        raise ValueError(f"{file} was trained with other rewards than {REWARDS} (reward_proj.0.weight): {_AGAIN}")
    if heads is None and width not in _HEADS:
        raise ValueError(
            f"{file} is of width {width}, and no tensor says how many heads that has; known are widths "
            f'{", ".join(map(str, _HEADS))}: put a config.json beside it, such as {{"model_type": "{MODEL_TYPE}", '
            '"heads": 16}'
        )
    layers = {match[1] for name in held if (match := re.match(r"transformer\.layers\.(\d+)\.", name))}
    return BigFixConfig(
        grid=grid,
        codes=codes - 1,
        text_width=_shape(held, "txt_proj.weight", file)[1],
        width=width,
        layers=len(layers),
        heads=heads or _HEADS[width],
        hidden=_shape(held, "transformer.layers.0.ff.w1.weight", file)[0],
        registers=registers,
    )


def _shape(held: Mapping[str, Any], name: str, file: Path) -> tuple[int, int]:
    value = held.get(name)
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{file} has no tensor {name}, as a text-to-image checkpoint of BIGFix has: {_AGAIN}")
    if value.ndim != 2 or not value.numel():
        raise ValueError(f"{file} has {name} as {list(value.shape)}, expected a matrix: {_AGAIN}")
    return tuple(value.shape)
