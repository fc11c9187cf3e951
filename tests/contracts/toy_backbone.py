"""A diffusion backbone in one file: one token a latent, no mask channels of its own, a layer that nothing reaches."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from einops import rearrange
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from dcdd_core.models.checkpoints import find_tensors

CONFIG = {"_class_name": "ToyTransformer", "channels": 16, "width": 24, "layers": 2}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.mix, self.out = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden, time):
        normed = self.norm(hidden) + time
        return hidden + self.out(torch.nn.functional.silu(self.mix(normed)) + normed.mean(1, keepdim=True))


class ToyTransformer(nn.Module):
    def __init__(self, channels, width, layers):
        super().__init__()
        self.embed, self.see = nn.Linear(channels, width), nn.Linear(channels + 1, width)
        self.time, self.text = nn.Linear(1, width), nn.Linear(4, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, channels)


class ToyBackbone:
    """See `protocols.Backbone`."""

    patch, block_names, folded = 1, ("layers",), False

    def __init__(self, model):
        self.model = model
        self.token_width, self.latent_channels = model.embed.out_features, model.embed.in_features

    @property
    def blocks(self):
        return tuple(self.model.layers)

    def pack(self, latents):
        return rearrange(latents, "b c h w -> b (h w) c")

    def unpack(self, packed, latent_size):
        return rearrange(packed, "b (h w) c -> b c h w", h=latent_size[0])

    def context(self, masked_latents, mask, factor):
        area = torch.nn.functional.avg_pool2d(mask.float(), factor).to(masked_latents)
        batch = max(len(masked_latents), len(area))
        parts = (part.expand(batch, -1, -1, -1) for part in (masked_latents, area))
        return self.pack(torch.cat([*parts], dim=1))

    def velocity(self, packed, context, condition, t, latent_size):
        model = self.model
        hidden = model.embed(packed) + model.see(context.to(packed)) + condition
        time = model.time(t.to(packed)[:, None, None])
        for block in model.layers:
            hidden = block(hidden, time)
        return model.head(hidden)

    def prepare(self, times, like, on_layer=None):
        pass

    def default_shift(self, tokens, steps):
        return 0.5

    def unused(self, name):
        return name.startswith("text.")

    def drop_unused(self):
        self.model.text = nn.Identity()

    def trained_names(self, mode):
        parts = {"attention": ".mix.", "all": ""}
        if mode not in parts:
            raise ValueError(f"a backbone is trained by {' or '.join(parts)}, got {mode!r}")
        return {name for name, _ in self.model.named_parameters() if parts[mode] in name and not self.unused(name)}

    def lora_layers(self):
        return [name for name, part in self.model.named_modules() if name.endswith(".mix")]

    def fold(self, weights):
        pass

    def stream(self, device):
        raise ValueError("a toy backbone is not streamed: load it without --stream")

    def compile(self):
        raise ValueError("a toy backbone is not compiled: load it without --compile")

    def working_memory(self, batch, latent_size):
        return 16 * batch * latent_size[0] * latent_size[1] * self.token_width


class ToyBackboneFamily:
    """See `protocols.BackboneFamily`."""

    name, class_name, published_name, licence, codec = (
        "toy backbone",
        "ToyTransformer",
        "toy/backbone",
        "Apache-2.0",
        "kl",
    )
    expected = "the folder of a toy backbone"

    def config_of(self, path):
        return dict(CONFIG) if path is None else json.loads((Path(path) / "config.json").read_text())

    def build(self, config, *, guidance=1.0):
        return ToyBackbone(ToyTransformer(**{name: config[name] for name in ("channels", "width", "layers")}))

    def find(self, path, backbone, *, needs, without=()):
        file = Path(path) / "model.safetensors"
        if not file.is_file():
            raise ValueError(f"{path} has no model.safetensors: give the folder of {needs}")
        expected = {name: value.shape for name, value in backbone.model.state_dict().items()}
        with safe_open(file, "pt") as opened:
            absent = sorted(set(expected) - set(without) - set(opened.keys()))
        if absent:
            raise ValueError(f"{path} does not fit {needs}; missing: {', '.join(absent)}: fetch it again")
        return find_tensors(file, expected, needs)


def save(folder: Path) -> Path:
    """A toy backbone's files, with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = ToyTransformer(**{name: CONFIG[name] for name in ("channels", "width", "layers")})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
