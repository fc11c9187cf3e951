"""BIGFix (Besnier et al. 2025, arXiv 2510.12231), a published masked sampler of images from text, as a family.

The released sampler's settings translate as follows: guidance_scale w is guidance 1 + w here; a softmax temperature t,
which multiplies the logits there, is temperature 1 / t. The released sampler redraws everything revealed in each pass
except the second, with new noise; here this includes the second, and the noise belongs to the position, so that a
position whose distribution does not change keeps its token. Its Halton order uses base 2 for rows and base 3 for
columns, ours the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...method.progressive import ProgressiveOptions
from ...protocols import ImageTokenizer
from ..checkpoints import read_config
from ..llamagen import tokenizer as llamagen
from ..t5 import T5Words
from .bigfix_files import CHECKPOINT, MODEL_TYPE, TEXT, TOKENIZER, BigFixFolder, checkpoints
from .bigfix_network import BigFixPrefix, BigFixTransformer
from .family import LoadsMasked
from .sampler import MaskedSampler

SAMPLING = ProgressiveOptions(
    guidance=6.0, top_p=0.8, passes=32, revision_passes=0, schedule="arccos", order="halton", revise="all", ramp=False
)
"""The settings of the released configuration: 32 steps, guidance_scale 5 (guidance 6 here), top-p 0.8."""


class BigFixSampler(MaskedSampler):
    """A `BigFixTransformer` as a `TokenSampler`; only reading prompts differs from the masked sampler.

    An unconditional row has zeros for its text and asks for low rewards, a conditional one for high rewards
    (`bigfix_network`): guidance leads away from both the empty text and the low rewards.
    """

    model: BigFixTransformer
    words: T5Words

    def _prefix(self, prompts: Sequence[str], *, guided: bool) -> BigFixPrefix:
        ids, real = self.words.padded([self.words.ids(prompt) for prompt in prompts], self.model.mask.device)
        return self.model.prefix(ids, real, guided=guided)


class BigFixFamily(LoadsMasked):
    """See `protocols.SamplerFamily`."""

    name = "bigfix"
    expected = f"the folder of BIGFix, with {CHECKPOINT}, {TOKENIZER} and the folder {TEXT}"

    def reads(self, path: str) -> bool:
        """True for a folder whose config.json says so, or if it has none, that holds a file BigFix*.pth."""
        folder = Path(path)
        if (folder / "config.json").exists():
            return read_config(folder).get("model_type") == MODEL_TYPE
        return folder.is_dir() and any(file.name.lower().startswith("bigfix") for file in checkpoints(folder))

    def read_sampler(self, path: str, *, device: torch.device | str, dtype: torch.dtype) -> BigFixSampler:
        """Loads the sampler in a folder.

        Raises:
            ValueError: as `BigFixFolder`, its `codebook` and its `load_network`.
        """
        folder = BigFixFolder(path)
        codebook = folder.codebook()
        model, words = folder.load_network(device=device, dtype=dtype)
        return BigFixSampler(model, words, codebook, name=folder.name, sampling=SAMPLING)

    def load_tokenizer(
        self, path: str, *, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> ImageTokenizer:
        """Loads LlamaGen's tokenizer in the folder.

        Raises:
            ValueError: as `BigFixFolder` and `llamagen.load_tokenizer`.
        """
        folder = BigFixFolder(path)
        return llamagen.load_tokenizer(
            folder.tokenizer, grid=folder.config().grid, name=folder.name, device=device, dtype=dtype
        )

    def published_tokenizer(self) -> ImageTokenizer:
        """LlamaGen's tokenizer, of the shapes of Janus' own, on the 32 x 32 grid of 512 x 512 pixels."""
        return llamagen.published_tokenizer((32, 32))


FAMILY = BigFixFamily()
"""The BIGFix family: which folders belong to it, and how they are loaded."""
