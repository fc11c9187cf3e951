"""A FLUX.1-Fill transformer without text as a `Backbone`.

The text stream gets a sequence of length zero and a pooled vector of zeros: it then cannot reach the output.

Shapes: B batch, L packed latent tokens (row-major h'/2 x w'/2), h' w' latent grid, M inner width, F = 4 C channels of a
packed latent (64), G of the context (64 of the masked image and 4 f^2 of the mask; f is the codec's factor).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from ....method import latents as flux_latents
from ....method.flow import resolution_shift
from ....protocols import OnLayer, StoredWeights
from . import files
from .inference import ModulationTable, drop_text, embed_time, fold_modulations, of_text_stream


class FluxFill:
    """See `protocols.Backbone`.

    Args:
        model: with or without its text stream.
        guidance: value of the distilled guidance embedding, for a network that has one.
    """

    patch = 2
    block_names = ("transformer_blocks", "single_transformer_blocks")

    def __init__(self, model: FluxTransformer2DModel, *, guidance: float = 1.0):
        self.model = model
        self.token_width = model.inner_dim
        self.latent_channels = model.out_channels // self.patch**2
        self.guidance = guidance if model.config.guidance_embeds else None
        self.table: ModulationTable | None = None
        self._rotary: tuple[tuple, tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """The joint and the single blocks, in order of use."""
        return tuple(block for name in self.block_names for block in getattr(self.model, name))

    @property
    def folded(self) -> bool:
        """Whether `fold` was called."""
        return self.table is not None

    def pack(self, latents: torch.Tensor) -> torch.Tensor:
        """See `method.latents.pack`."""
        return flux_latents.pack(latents)

    def unpack(self, packed: torch.Tensor, latent_size: tuple[int, int]) -> torch.Tensor:
        """See `method.latents.unpack`."""
        return flux_latents.unpack(packed, *latent_size)

    def context(self, masked_latents: torch.Tensor, mask: torch.Tensor, factor: int) -> torch.Tensor:
        """FLUX.1-Fill's additional input channels: the packed latents of the masked image, and the packed mask."""
        needed, latents = self.model.config.in_channels, 2 * self.patch**2 * self.latent_channels
        if needed != latents + (self.patch * factor) ** 2:
            raise ValueError(
                f"this network has {needed} input channels, expected {latents} of latents and "
                f"{(self.patch * factor) ** 2} of a mask at {factor} pixels a latent: the decoder's base_config and "
                "vae_factor do not belong together, download the bundle again"
            )
        return flux_latents.fill_context(flux_latents.pack(masked_latents), flux_latents.pack_mask(mask, factor))

    def velocity(
        self,
        packed: torch.Tensor,
        context: torch.Tensor,
        condition: torch.Tensor,
        t: torch.Tensor,
        latent_size: tuple[int, int],
    ) -> torch.Tensor:
        """See `Backbone.velocity`."""
        model, blocks = self.model, self.blocks
        hidden = model.x_embedder(flux_latents.fill_input(packed, context)) + condition  # Eq. 23
        *modulations, last = self._modulations(t, hidden, len(blocks) + 1)
        rotary = self._rotary_at(latent_size, hidden.device)
        text = hidden.new_zeros(len(hidden), 0, hidden.shape[2])
        for block, modulation in zip(blocks, modulations, strict=True):
            # The returned text is not passed on: its strides differ, and a compiled block would be compiled again.
            _, hidden = block(hidden, text, modulation, rotary)
        return model.proj_out(model.norm_out(hidden, last))

    def prepare(self, times: Sequence[float], like: torch.Tensor, on_layer: OnLayer | None = None) -> None:
        """Computes the modulations of a new schedule, if modulations come from a table."""
        if self.table is not None:
            self.table.prepare(times, guidance=self.guidance, like=like, on_layer=on_layer)

    def default_shift(self, tokens: int, steps: int) -> float:
        """FLUX.1's shift, which depends only on the number of tokens."""
        return resolution_shift(tokens)

    def unused(self, name: str) -> bool:
        """Whether the parameter belongs to the text stream, which never gets any text."""
        return of_text_stream(name)

    def drop_unused(self) -> None:
        """Removes the text stream."""
        drop_text(self.model)

    def trained_names(self, mode: str) -> Collection[str]:
        """The names of the parameters that a training mode trains: "attention" or "all".

        "attention" means the attention projections and norms of every block (the paper). The output projection that a
        single block shares between attention and MLP counts as MLP [choice].
        """
        parts = {"attention": ".attn.", "all": ""}
        if mode not in parts:
            raise ValueError(f"a backbone is trained by {' or '.join(parts)}, got {mode!r}")
        names = (name for name, _ in self.model.named_parameters())
        return {name for name in names if parts[mode] in name and not of_text_stream(name)}

    def lora_layers(self) -> Collection[str]:
        """The linear layers of every block's attention."""
        return [
            name
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and ".attn." in name and not of_text_stream(name)
        ]

    def fold(self, weights: StoredWeights) -> None:
        """Replaces the modulation layers (2.2 of 11.9 billion parameters) by tables, computed from the files for every
        new schedule: they depend only on the time."""
        self.table = fold_modulations(self.model, weights)

    def stream(self, device: torch.device) -> None:
        """Uses diffusers' group offloading, one block at a time, without prefetching, which hangs on a forward pass
        that is not the model's own."""
        self.model.enable_group_offload(device, offload_type="block_level", num_blocks_per_group=1)
        # diffusers would fetch the first and last layer in its own forward pass, which is not used here.
        for end in (self.model.x_embedder, self.model.proj_out):
            end.to(device)

    def compile(self) -> None:
        """Compiles all blocks of a kind once for each size and batch, up to torch's limit."""
        self.model.compile_repeated_blocks(dynamic=False)

    def working_memory(self, batch: int, latent_size: tuple[int, int]) -> int:
        """Estimated bytes: 64 float32 arrays of all tokens."""
        return 64 * 4 * batch * (math.prod(latent_size) // self.patch**2) * self.token_width

    def _rotary_at(self, latent_size: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """The rotary embedding of a latent size's positions, the same at every step; the last size's is cached."""
        key = (tuple(latent_size), device)
        if self._rotary is None or self._rotary[0] != key:
            with torch.inference_mode(False), torch.no_grad():  # Training may follow a host's inference.
                ids = flux_latents.position_ids(*latent_size).to(device)
                self._rotary = key, self.model.pos_embed(ids)
        return self._rotary[1]

    def _modulations(self, t: torch.Tensor, hidden: torch.Tensor, count: int) -> Sequence[torch.Tensor]:
        """The input of each modulated norm: its modulation from the table, or the embedding to compute it from."""
        if self.table is not None:
            return self.table.at(t, guidance=self.guidance, like=hidden)
        pooled = hidden.new_zeros(len(hidden), self.model.config.pooled_projection_dim)
        t = t.to(hidden.device)
        return [embed_time(self.model.time_text_embed, t, guidance=self.guidance, pooled=pooled)] * count


class FluxFillFamily:
    """See `protocols.BackboneFamily`."""

    name = "flux-fill"
    class_name = "FluxTransformer2DModel"
    expected = "a FLUX.1-Fill transformer: a diffusers folder, or a single file such as flux1-fill-dev.safetensors"
    published_name = "black-forest-labs/FLUX.1-Fill-dev"
    licence = "FLUX.1 [dev] Non-Commercial License"
    codec = "kl"

    def config_of(self, path: str | None) -> dict[str, Any]:
        """See `files.fill_config`."""
        return files.fill_config(path)

    def build(self, config: Mapping[str, Any], *, guidance: float = 1.0) -> FluxFill:
        """See `BackboneFamily.build`; raises ValueError for a configuration that is not FLUX's."""
        files.require_config(config, "base_config")
        values = {name: value for name, value in config.items() if not name.startswith("_")}
        return FluxFill(FluxTransformer2DModel(**values), guidance=guidance)

    def find(self, path: str, backbone: FluxFill, *, needs: str, without: Collection[str] = ()) -> StoredWeights:
        """See `files.find_transformer`."""
        return files.find_transformer(path, backbone.model, needs=needs, without=without)
