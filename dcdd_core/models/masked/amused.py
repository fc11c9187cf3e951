"""The aMUSEd family: which folders belong to it, and how they are loaded.

aMUSEd is an open reproduction of MUSE (Patil et al. 2024, arXiv 2401.01808), published as amused/amused-256 and
amused/amused-512: 8,192 codes, 16 x 16 and 32 x 32 tokens of 16 pixels per side.
"""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import VQModel

from ..checkpoints import read_config
from .amused_files import NETWORK, PIPELINES, AmusedFolder
from .amused_tokenizer import AmusedTokenizer
from .family import LoadsMasked
from .sampler import MaskedSampler


class AmusedFamily(LoadsMasked):
    """See `protocols.SamplerFamily`."""

    name = "amused"
    expected = "the folder of an aMUSEd model (amused-256 or amused-512), as diffusers writes it"

    def reads(self, path: str) -> bool:
        """True for a folder whose model_index.json, or if it has none, whose transformer's config.json is aMUSEd's."""
        folder = Path(path)
        if (folder / "model_index.json").exists():
            return read_config(folder, "model_index.json").get("_class_name") in PIPELINES
        transformer = folder / "transformer"
        return (transformer / "config.json").exists() and read_config(transformer).get("_class_name") == NETWORK

    def read_sampler(self, path: str, *, device: torch.device | str, dtype: torch.dtype) -> MaskedSampler:
        """See `AmusedFolder.sampler`."""
        return AmusedFolder(path).sampler(device=device, dtype=dtype)

    def load_tokenizer(
        self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> AmusedTokenizer:
        """See `AmusedFolder.tokenizer`."""
        return AmusedFolder(path).tokenizer(dtype=dtype, device=device)

    def published_tokenizer(self) -> AmusedTokenizer:
        """The tokenizer of both published models, on the larger one's 32 x 32 grid."""
        with torch.device("meta"):
            model = VQModel(
                block_out_channels=(128, 256, 256, 512, 768),
                down_block_types=("DownEncoderBlock2D",) * 5,
                up_block_types=("UpDecoderBlock2D",) * 5,
                layers_per_block=2,
                latent_channels=64,
                num_vq_embeddings=8192,
                mid_block_add_attention=False,
                lookup_from_codebook=True,
                force_upcast=True,
            )
        # The codebook's values are checked, so it needs some: these are random.
        shape = model.quantize.embedding.weight.shape
        return AmusedTokenizer(model, torch.randn(shape, generator=torch.Generator().manual_seed(0)), grid=(32, 32))


FAMILY = AmusedFamily()
