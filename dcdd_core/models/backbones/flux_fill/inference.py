"""Reduces a FLUX transformer to what painting needs: no text stream, and modulations from tables.

Both reductions work on diffusers' own modules, whose forward passes are unchanged: what is removed is replaced by the
identity or by nothing. The names of the remaining weights do not change.

Shapes: B batch, S times of a schedule, M inner width, P width of the pooled text embedding, R values in all modulations
of one time (FLUX.1-Fill: 706,560).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import nn
from torch.func import functional_call

from ...checkpoints import StoredTensors

#: Number of schedules whose tables are kept; one of 30 steps takes 42 MB in bfloat16 for FLUX.1-Fill.
_KEPT = 3
_EMBEDDER = "time_text_embed."
#: Called with (layers done, layers); may raise to stop.
OnLayer = Callable[[int, int], None]


def of_text_stream(name: str) -> bool:
    """Whether a parameter of this name belongs to the text stream, which cannot reach the output without text."""
    return any(part in name for part in ("context", ".add_", "_add_", "norm_added"))


def drop_text(transformer: FluxTransformer2DModel) -> None:
    """Removes everything that `of_text_stream` names: blocks still take a text, but only one of zero tokens."""
    transformer.context_embedder = nn.Identity()
    for block in transformer.transformer_blocks:
        block.norm1_context = _NoText()
        block.ff_context = nn.Identity()
        block.attn.added_kv_proj_dim = None  # From this the attention processor tells whether there is a text.
        for name in ("add_q_proj", "add_k_proj", "add_v_proj", "norm_added_q", "norm_added_k"):
            delattr(block.attn, name)
        block.attn.to_add_out = nn.Identity()


class _NoText(nn.Module):
    """Replaces the text's adaptive norm: returns the empty text [B, 0, M] unchanged, and zero modulations."""

    def forward(self, text: torch.Tensor, emb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return text, *[text.new_zeros(len(text), text.shape[2])] * 4


def embed_time(
    embedder: Callable[..., torch.Tensor],
    t: torch.Tensor,
    *,
    guidance: float | None,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """The embedding [B, M] that every modulation is computed from, by FLUX's `time_text_embed`.

    Args:
        t: [B] in 0..1.
        guidance: value of the distilled guidance; None for a model that has none.
        pooled: [B, P] zeros, the pooled text embedding of no text; sets the dtype.
    """
    # In float32 whatever the model's dtype: bfloat16 would round 1000 t to multiples of 4.
    times = (t.float() * 1000,)
    if guidance is not None:
        times += (torch.full_like(times[0], guidance * 1000),)
    return embedder(*times, pooled)


@dataclass(frozen=True, kw_only=True)
class _Schedule:
    """The modulations [S, R] at the times of one schedule, in RAM."""

    times: tuple[float, ...]
    guidance: float | None
    table: torch.Tensor


class ModulationTable:
    """The AdaLN modulations of whole schedules, in place of the layers that compute them.

    They depend only on time, guidance and a pooled text embedding of zeros. So the embedders and modulation layers
    (FLUX.1-Fill: 2.2 of 11.9 billion parameters) are not held, only the tables of the last three schedules, in RAM: 1.4
    MB per step in bfloat16, of which each step copies its row to the device. For a new schedule these layers are read
    from their files again, one at a time, and released: 4.4 GB in bfloat16 per schedule.

    Args:
        transformer: defines the modulations and how time is embedded; may be on "meta".
        weights: the weights of its embedders and modulation layers.
    """

    def __init__(self, transformer: FluxTransformer2DModel, weights: StoredTensors):
        norms = _modulated_norms(transformer)
        self._layers = tuple(f"{name}.linear" for name in norms)
        self._widths = [norm.linear.out_features for norm in norms.values()]
        self._embedder = transformer.time_text_embed
        self._pooled = transformer.config.pooled_projection_dim
        self._weights = weights
        self._schedules: OrderedDict[tuple, _Schedule] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of the tables in RAM."""
        return sum(schedule.table.nbytes for schedule in self._schedules.values())

    def prepare(
        self,
        times: Sequence[float],
        *,
        guidance: float | None,
        like: torch.Tensor,
        on_layer: OnLayer | None = None,
    ) -> None:
        """Computes the table of a schedule, unless it is kept already.

        Args:
            like: sets the dtype and the device to compute with.
            on_layer: called with (layers done, layers) after each layer is read; may raise to stop.

        Raises:
            ValueError: if the files of the weights were changed or removed.
        """
        self._schedule(tuple(times), guidance, like, on_layer)

    def at(self, t: torch.Tensor, *, guidance: float | None, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The modulations of every modulated norm at the times t [B], in order of use, each [B or 1, 2, 3 or 6 M].

        Times that no table holds cost as much as a new schedule: `prepare` them all at once.
        """
        wanted = t.tolist()
        for schedule in reversed(self._schedules.values()):
            if schedule.guidance == guidance and set(wanted) <= set(schedule.times):
                break
        else:
            schedule = self._schedule(tuple(sorted(set(wanted))), guidance, like)
        places = [schedule.times.index(time) for time in wanted]
        if len(set(places)) == 1:  # One row serves the whole batch.
            rows = schedule.table[places[0] : places[0] + 1]
        else:
            rows = schedule.table[places]
        # With pinned memory the host does not wait for the copy.
        rows = rows.to(like.device, like.dtype, non_blocking=rows.is_pinned())
        return rows.split(self._widths, dim=1)

    def _schedule(
        self, times: tuple[float, ...], guidance: float | None, like: torch.Tensor, on_layer: OnLayer | None = None
    ) -> _Schedule:
        key = (times, guidance, like.dtype)
        if key not in self._schedules:
            table = self._compute(times, guidance, like, on_layer)
            self._schedules[key] = _Schedule(times=times, guidance=guidance, table=table)
            if len(self._schedules) > _KEPT:
                self._schedules.popitem(last=False)
        self._schedules.move_to_end(key)
        return self._schedules[key]

    @torch.no_grad()
    def _compute(
        self, times: tuple[float, ...], guidance: float | None, like: torch.Tensor, on_layer: OnLayer | None
    ) -> torch.Tensor:
        kind = {"dtype": like.dtype, "device": like.device}

        def embedder(*inputs: torch.Tensor) -> torch.Tensor:
            read = self._weights.read([_EMBEDDER + name for name in self._embedder.state_dict()], **kind)
            weights = {name.removeprefix(_EMBEDDER): weight for name, weight in read.items()}
            return functional_call(self._embedder, weights, inputs)

        def modulation(k: int, layer: str) -> torch.Tensor:
            weight, bias = self._weights.read((f"{layer}.weight", f"{layer}.bias"), **kind).values()
            row = F.linear(activated, weight, bias).cpu()
            if on_layer is not None:
                on_layer(k + 1, len(self._layers))
            return row

        with torch.autocast(like.device.type, enabled=False):
            pooled = torch.zeros(len(times), self._pooled, **kind)
            t = torch.tensor(times, device=like.device)
            activated = F.silu(embed_time(embedder, t, guidance=guidance, pooled=pooled))
            table = torch.cat([modulation(k, layer) for k, layer in enumerate(self._layers)], dim=1)
        return table.pin_memory() if like.is_cuda else table


def fold_modulations(transformer: FluxTransformer2DModel, weights: StoredTensors) -> ModulationTable:
    """Removes the layers that depend only on the time; the norms then get their modulations from the returned table.

    Args:
        weights: the weights of the removed layers.
    """
    table = ModulationTable(transformer, weights)
    for norm in _modulated_norms(transformer).values():
        norm.silu = norm.linear = nn.Identity()
    transformer.time_text_embed = nn.Identity()
    return table


def _modulated_norms(transformer: FluxTransformer2DModel) -> dict[str, nn.Module]:
    """The modulated norms by name, in order of use, without those of the text stream."""
    blocks = {f"transformer_blocks.{i}.norm1": block.norm1 for i, block in enumerate(transformer.transformer_blocks)}
    singles = transformer.single_transformer_blocks
    blocks |= {f"single_transformer_blocks.{i}.norm": block.norm for i, block in enumerate(singles)}
    return blocks | {"norm_out": transformer.norm_out}
