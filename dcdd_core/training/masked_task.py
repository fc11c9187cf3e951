"""The training of a masked sampler as the task of a `Trainer`: captions and tokens in, losses out.

Shapes: B batch, N tokens, D code dim.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..method.masked_modelling import CORRUPTIONS, HIDDEN_SHARES
from ..method.sampling import keyed_generator
from ..models.masked.network import MaskedTransformer
from ..models.masked.sampler import MaskedSampler
from ..models.masked.words import Words
from ..pipelines.images import to_pixels
from ..protocols import ImageTokenizer
from ..settings import require_number
from ..types import DCDDWarning
from .batches import Batches, DataShard, ReadCounter, Source, load_in_order
from .config import OptimizationConfig
from .encoded_batch import EncodedBatch
from .held_out import Listed, read_listed
from .image_batch import ImageBatch
from .masked_loss import (
    Corruption,
    MaskedExample,
    drop_captions,
    in_one_mean,
    make_example,
    masked_losses,
    tokens_and_errors,
)
from .trainable import optimizers_of, trained_weights
from .trainer import Averaged, sample_sheet

_MEASURED = 256  # images on which the scale of quantisation errors is measured, at most [choice]
_DRAWS = 64  # a held-out loss is the mean over at least this many examples [choice]
_KEY = 67  # keeps these draws apart from others with the same seed
MOST_WORDS = 4096
"""Of the longest caption, in tokens; a limit against slips."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which tokens are hidden, which are made wrong, and how captions are read.

    Attributes:
        corruptions: where wrong tokens come from, some of `CORRUPTIONS`; with none, revision is not trained.
        schedule: of the share of hidden positions, one of `HIDDEN_SHARES`.
        dropped: share of the captions that are replaced by the row without a prompt, to train guidance.
        words: tokens of the longest prompt, including the template; longer captions are cut.

    Raises:
        ValueError: for unknown choices and numbers out of range.
    """

    corruptions: tuple[str, ...] = CORRUPTIONS
    schedule: str = "arccos"
    dropped: float = 0.1
    words: int = 128

    def __post_init__(self):
        if unknown := sorted(set(self.corruptions) - set(CORRUPTIONS)):
            raise ValueError(f"unknown corruptions {unknown}: expected some of {', '.join(CORRUPTIONS)}")
        if len(set(self.corruptions)) < len(self.corruptions):
            raise ValueError(f"corruptions {', '.join(self.corruptions)}: name each once")
        if self.schedule not in HIDDEN_SHARES:
            raise ValueError(f"the mask schedule must be one of {', '.join(HIDDEN_SHARES)}, got {self.schedule!r}")
        require_number("drop-captions", self.dropped, least=0, most=1, remedy="0.1 is usual, 0 trains no guidance")
        require_number("caption-tokens", self.words, whole=True, least=8, most=MOST_WORDS)


@dataclass(frozen=True, kw_only=True, eq=False)
class CaptionedTokens:
    """Images as tokens, on the CPU.

    Attributes:
        tokens: [B, N] int64.
        errors: log quantisation errors [B, N] float32.
        captions: [B].
    """

    tokens: torch.Tensor
    errors: torch.Tensor
    captions: tuple[str, ...]


class TokenEncoder:
    """Turns batches of a `Source` into tokens: batches of images, or of the features that a cache holds."""

    def __init__(self, tokenizer: ImageTokenizer):
        self.tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, batch: ImageBatch | EncodedBatch) -> CaptionedTokens:
        """The tokens of a batch."""
        device = self.tokenizer.device
        if isinstance(batch, EncodedBatch):
            features = batch.features.to(device)
        else:
            features = self.tokenizer.features(to_pixels(batch.token_pixels, device))
        tokens, errors = tokens_and_errors(self.tokenizer, features)
        return CaptionedTokens(tokens=tokens, errors=errors, captions=batch.captions)


class CaptionReader:
    """Turns captions into the ids that the network reads, at most `most` of them.

    Raises:
        ValueError: if the template alone is longer.
    """

    def __init__(self, words: Words, most: int):
        self.words, self.most = words, most
        around = len(words.ids("a"))
        if around > most:
            raise ValueError(f"the template alone takes {around} tokens, more than --caption-tokens {most}: raise it")
        self._warned = False

    def ids(self, caption: str) -> list[int]:
        """The ids of a caption in its template."""
        return self.words.ids(self.cut(caption))

    def cut(self, caption: str) -> str:
        """The caption, with its end cut off if it has too many tokens.

        Raises:
            ValueError: if nothing of it would be left.
        """
        ids = self.words.ids(caption)
        if len(ids) <= self.most:
            return caption
        self._warn(caption, len(ids))
        spans = self.words.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        kept, text = len(spans), caption
        while len(ids) > self.most:
            kept -= len(ids) - self.most
            text = caption[: spans[kept - 1][1]] if kept > 0 else ""
            if not text.strip():
                raise ValueError(
                    f"the caption {caption[:40]!r} cannot be cut to {self.most} tokens: raise --caption-tokens"
                )
            ids = self.words.ids(text)
        return text

    def _warn(self, caption: str, count: int) -> None:
        if not self._warned:
            self._warned = True
            said = f"captions of more than {self.most} tokens are cut, such as {caption[:60]!r}... with {count}"
            warnings.warn(f"{said}; see --caption-tokens", DCDDWarning, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class ErrorScale:
    """Mean and standard deviation of the images' log quantisation errors; the network predicts standardised errors."""

    mean: float
    deviation: float

    @classmethod
    def of(cls, source: Source, encode: TokenEncoder, *, batch: int) -> ErrorScale:
        """Measured on the first images of a source, and rounded so that another device finds the same.

        Raises:
            ValueError: if no image can be used.
        """
        counter, found = ReadCounter(), []
        entries = ((None, entry) for entry in source.entries(DataShard(seed=None), 0))
        items = (item for _, item in load_in_order(source, entries) if counter.admit(item, source.name))
        items = islice(items, _MEASURED)
        while part := list(islice(items, batch)):
            found.append(encode(source.collate(part)).errors)
        if not found:
            counter.check(source)
            raise ValueError(f"{source.name} has no images")
        errors = torch.cat(found).double()
        return cls(mean=round(float(errors.mean()), 3), deviation=max(1e-3, round(float(errors.std(correction=0)), 3)))

    def standardised(self, errors: torch.Tensor) -> torch.Tensor:
        """(errors - mean) / deviation."""
        return (errors - self.mean) / self.deviation


class MaskedTask:
    """See `trainer.Task`.

    Args:
        sampler: its network is trained, on the device where it is.
    """

    remedy = (
        "make a sampler of it (`train.py progressive --sampler-now`, with the options of this run), and start another "
        "run from that folder (--start-from) with a lower learning rate"
    )

    def __init__(self, sampler: MaskedSampler, encode: TokenEncoder, scale: ErrorScale, masking: MaskingConfig):
        self.network: MaskedTransformer = sampler.model
        self.encode, self.scale, self.masking = encode, scale, masking
        self.reader = CaptionReader(sampler.words, masking.words)
        self.codebook = sampler.codebook
        self.blocks: Sequence[nn.Module] = self.network.layers
        self.settings: Mapping[str, Any] = {
            "network": asdict(self.network.config),
            "masking": asdict(masking),
            "error_scale": asdict(scale),
        }
        self._corruption = Corruption(masking.corruptions, self.codebook, lambda work: work(self.network))

    def optimizers(self, config: OptimizationConfig, *, sharded: bool) -> list[torch.optim.Optimizer]:
        """The optimisers of the weights; Muon, if it is chosen, updates the matrices of the blocks.

        Raises:
            ValueError: for sharded weights.
        """
        if sharded:
            raise ValueError(
                "a masked sampler is trained with DDP: its own draws are among what it learns from, and FSDP would "
                "gather the weights for them in some processes alone; choose configs/accelerate/ddp.yaml"
            )
        weights = trained_weights(self.network)
        return optimizers_of(weights, config, matrices=muon_matrices(weights), betas=(0.9, 0.95))

    def example(self, batch: Any, generator: torch.Generator, averaged: Averaged) -> MaskedExample:
        """See `trainer.Task`; wrong tokens of the kind "samples" are drawn with the averaged weights."""
        corruption = self._corruption.drawing(averaged)
        return self.masked(self.encode(batch), generator, corruption)

    def masked(
        self, batch: CaptionedTokens, generator: torch.Generator, corruption: Corruption | None = None
    ) -> MaskedExample:
        """The example of encoded images.

        Args:
            corruption: None for one that draws with the current weights.
        """
        ids = [self.reader.ids(caption) for caption in batch.captions]
        return make_example(
            drop_captions(ids, self.masking.dropped, self.reader.words.unconditional, generator),
            batch.tokens,
            self.scale.standardised(batch.errors),
            corruption or self._corruption,
            generator,
            codes=self.codebook.size,
            schedule=self.masking.schedule,
        )

    def update(
        self, examples: Iterable[MaskedExample], total: Callable[[torch.Tensor], torch.Tensor], *, parts: int
    ) -> Iterable[MaskedExample]:
        """See `trainer.Task`; all examples are made first, since each has another number of hidden positions."""
        return in_one_mean(list(examples), total, parts=parts)

    def losses(
        self, network: MaskedTransformer, example: MaskedExample, generator: torch.Generator, config: OptimizationConfig
    ) -> dict[str, torch.Tensor]:
        """See `masked_loss.masked_losses`."""
        return masked_losses(network, example)


def muon_matrices(weights: Mapping[str, nn.Parameter]) -> list[str]:
    """The names of a masked transformer's weights that Muon updates: the matrices inside the blocks."""
    return [name for name, weight in weights.items() if name.startswith("layers.") and weight.ndim == 2]


class MaskedHeldOut:
    """The losses on held-out images, always hidden and corrupted in the same places; few images are used several times.

    They are means over the positions of all images, as in training. Each process holds and evaluates a share of the
    images; their division into batches, and so the draws, depend on the number of processes.

    Args:
        batch: images at a time.
        total: numbers of this process -> their sums over all processes.

    Attributes:
        counter: counts the images that this process read.

    Raises:
        ValueError: if no image of any process can be read.
    """

    def __init__(
        self,
        held_out: Listed,
        task: MaskedTask,
        *,
        seed: int,
        batch: int,
        rank: int,
        world: int,
        total: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.task, self.seed, self.total = task, seed, total
        self.counter = ReadCounter()
        count = len(held_out.listed)
        items = list(read_listed(held_out, range(rank, count, world), self.counter))
        if not float(total(torch.tensor([float(len(items))]))[0]):
            raise ValueError(
                f"none of the {count} held-out images of {held_out.name} can be used: add captions to them, or repair "
                "them, or hold out others with another --held-out"
            )
        encoded = [
            task.encode(held_out.collate([item for _, item in items[start : start + batch]]))
            for start in range(0, len(items), batch)
        ]
        numbers = [number for number, _ in items]
        pairs = [(i, draw) for draw in range(math.ceil(_DRAWS / count)) for i in range(len(items))]
        self._parts: list[tuple[tuple[int, int], CaptionedTokens]] = []
        if not items:
            return
        tokens, errors = (torch.cat([getattr(part, name) for part in encoded]) for name in ("tokens", "errors"))
        captions = [caption for part in encoded for caption in part.captions]
        for start in range(0, len(pairs), batch):
            part = pairs[start : start + batch]
            index = [i for i, _ in part]
            held = CaptionedTokens(
                tokens=tokens[index], errors=errors[index], captions=tuple(captions[i] for i in index)
            )
            self._parts.append(((numbers[index[0]], part[0][1]), held))

    def __call__(self, network: MaskedTransformer) -> dict[str, float]:
        """The mean of each loss over all held-out images of all processes."""
        examples = [self.task.masked(part, keyed_generator(self.seed, _KEY, *key)) for key, part in self._parts]
        sums: dict[str, float] = dict.fromkeys(("loss", "hidden", "wrong", "error", "importance"), 0.0)
        for example in in_one_mean(examples, self.total):
            for name, value in masked_losses(network, example).items():
                sums[name] += float(value)
        return dict(zip(sums, self.total(torch.tensor([*sums.values()])).tolist()))


class MaskedSampleSheet:
    """Samples for the captions of a source's first images; on the left the image itself, as its tokens decode it."""

    def __init__(self, source: Source, sampler: MaskedSampler, encode: TokenEncoder, reader: CaptionReader, count: int):
        first = encode(next(iter(Batches(source, size=count, shard=DataShard(seed=None)))))
        self.captions = [reader.cut(caption) for caption in first.captions]
        self.sampler, self.tokenizer = sampler, encode.tokenizer
        self.reference = self._decoded(first.tokens)

    def __call__(self, network: MaskedTransformer) -> Image.Image:
        """The sheet of a network."""
        own = self.sampler
        sampler = MaskedSampler(network, own.words, own.codebook, name=own.name, sampling=own.sampling)
        sampled = sampler.sample(self.captions, seeds=range(len(self.captions)), options=own.sampling)
        return sample_sheet([self.reference, self._decoded(sampled.tokens)])

    def _decoded(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.decode_tokens(tokens.to(self.tokenizer.device), self.sampler.grid)
