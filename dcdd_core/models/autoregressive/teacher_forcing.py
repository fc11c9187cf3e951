"""The logits that the decode loop would compute for the tokens of a given image, at all positions in one pass.

Shapes: B batch, N tokens, K codes, R rows of the language model ([conditional ; unconditional], 2 B, or B without
guidance), L slots of a prompt, C hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...method import sampling
from ...protocols import SamplingOptions
from .token_loop import LlamaReader, Prompts, TokenNetwork


def check_tokens(prompts: Sequence[str], tokens: torch.Tensor, *, count: int, codes: int) -> None:
    """Checks that there are prompts, and the tokens of one image for each.

    Args:
        count, codes: N and K.

    Raises:
        ValueError: saying what was given and what is expected.
    """
    if isinstance(prompts, str):
        raise ValueError("prompts is one text, expected a list of them: write [prompt]")
    if len(prompts) == 0:
        raise ValueError("prompts is empty: give at least one")
    expected = f"int64 [{len(prompts)}, {count}], the tokens of one image for each prompt"
    if not isinstance(tokens, torch.Tensor) or tokens.dtype != torch.int64:
        found = str(tokens.dtype).removeprefix("torch.") if isinstance(tokens, torch.Tensor) else type(tokens).__name__
        raise ValueError(f"tokens must be {expected}, got {found}: encode the images with this model's tokenizer")
    if tokens.shape != (len(prompts), count):
        raise ValueError(
            f"tokens must be {expected}, got {list(tokens.shape)}: encode images of the size that this model paints"
        )
    if int(tokens.min()) < 0 or int(tokens.max()) >= codes:
        raise ValueError(
            f"tokens must lie in 0..{codes - 1}, got {int(tokens.min())}..{int(tokens.max())}: encode the images with "
            "this model's tokenizer"
        )


def teacher_forced_logits(
    network: TokenNetwork, prompts: Prompts, tokens: torch.Tensor, options: SamplingOptions
) -> torch.Tensor:
    """Guided, tempered and unfiltered logits [B, N, K] float32, as `TokenLoop` keeps them, on the tokens' device.

    Each distinct prompt is read once, then all tokens but the last, if there are others, in one pass over all rows. The
    head and the guidance run in float32, one image at a time.

    Args:
        prompts: the rows [conditional ; unconditional], or only the conditional ones without guidance.
        tokens: [B, N] int64.
        options: only guidance and temperature are used; temperature 0 leaves logits undivided.

    Raises:
        ValueError: for logits that are not finite.
    """
    device, length, batch = tokens.device, prompts.embeddings.shape[1], len(tokens)
    padding, rows = prompts.padding.to(device), prompts.rows.to(device)
    origin = None if network.counts_prompt else torch.full_like(padding, length)
    reader = LlamaReader(network.language, padding, length, origin=origin)
    hidden = reader.read(prompts.embeddings.to(device), reader.slots, length)[rows, None]
    given = tokens[:, :-1].repeat(len(rows) // batch, 1)
    if given.shape[1]:
        total = length + given.shape[1]
        reader = reader.spread(rows, length, total)
        rest = reader.read(network.embed(given), reader.slots[length:], total, whole=True)
        hidden = torch.cat([hidden, rest], dim=1)
    logits = []
    for image in range(batch):
        step = network.head(hidden[image::batch].float())
        if options.guidance != 1:
            step = sampling.guide(*step.chunk(2), options.guidance)
        logits.append(sampling.temper(step, options.temperature or 1.0))
    found = torch.cat(logits)
    broken = ~torch.isfinite(found.amax(dim=(0, 2)))
    if bool(broken.any()):
        raise ValueError(
            f"position {int(broken.nonzero()[0]) + 1} of {tokens.shape[1]} failed in {reader.cache.dtype}: "
            f"{sampling.NOT_FINITE}; load the model in float32 (bfloat16 often does too where float16 overflows), or "
            "check its weights"
        )
    return found
