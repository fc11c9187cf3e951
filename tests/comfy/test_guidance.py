"""Distribution Guidance on ComfyUI's own models and samplers: random weights shaped as FLUX.1, SDXL and SD 1.5."""

from __future__ import annotations

import numpy as np
import pytest

from tests.comfy.graphs import Graph, Link, output

pytestmark = pytest.mark.comfy

KINDS = {"SD15": (4, "dpmpp_2m", "karras"), "SDXL": (4, "euler_ancestral", "normal"), "Flux": (16, "euler", "simple")}
STEPS = 3


class Artist:
    """A graph from a prompt to a sampler with and without guidance."""

    def __init__(self, info: dict, kind: str):
        self.graph = Graph(info)
        self.channels, self.sampler, self.scheduler = KINDS[kind]
        self.janus = self.graph.add("janus", "DCDD_LoadJanus")
        self.vq = output(self.janus, 1)
        self.tokens = self.graph.add("tokens", "DCDD_JanusLogitSampler", janus=self.janus, seed=2, batch_size=2)
        self.model = self.graph.add("model", "TEST_RandomModel", kind=kind)
        self.vae = self.graph.add("vae", "TEST_RandomVAE", channels=self.channels, factor=8, spread=1.0)
        shared = {"token_logits": self.tokens, "vq_vae": self.vq, "vae": self.vae}
        self.latent = self.graph.add("latent", "DCDD_TokenGuideLatent", width=128, height=128, **shared)
        self.shared = shared

    def guided(self, name: str, model: Link | None = None, **values) -> Link:
        return self.graph.add(name, "DCDD_DistributionGuidance", model=model or self.model, **self.shared, **values)

    def sampled(self, name: str, model: Link, **values) -> None:
        text = output(self.model, 1)
        values = {"cfg": 1.0 if self.channels == 16 else 4.0, **values}
        latent = self.graph.add(
            name,
            "KSampler",
            model=model,
            seed=5,
            steps=STEPS,
            sampler_name=self.sampler,
            scheduler=self.scheduler,
            positive=text,
            negative=text,
            latent_image=self.latent,
            denoise=output(self.latent, 1),
            **values,
        )
        self.graph.keep(latent, f"{name} kept")


def run(server, artist: Artist, *names: str) -> list[np.ndarray]:
    done = server.run(artist.graph.prompt)
    assert done.status == "success", f"node {done.node}: {done.error}"
    return [server.saved(f"{name} kept")["samples"] for name in names]


@pytest.mark.parametrize("kind", KINDS)
def test_guidance_moves_what_a_core_sampler_paints(kind, server, info):
    artist = Artist(info, kind)
    artist.sampled("plain", artist.model)
    artist.sampled("guided", artist.guided("guidance"))
    artist.sampled("off", artist.guided("none", strength=0.0, pull=0.0))
    artist.sampled("early", artist.guided("first steps", end_percent=0.5))
    plain, guided, off, early = run(server, artist, "plain", "guided", "off", "early")
    assert guided.shape == (2, artist.channels, 16, 16) and np.isfinite(guided).all()
    np.testing.assert_array_equal(off, plain)
    assert np.abs(guided - plain).mean() > 0.01 * np.abs(plain).mean()
    assert not np.array_equal(early, guided)


def test_the_hook_of_another_node_is_still_called(server, info):
    """And guiding one clone of a MODEL leaves the other as it was."""
    artist = Artist(info, "SD15")
    rescaled = artist.graph.add("rescaled", "RescaleCFG", model=artist.model, multiplier=0.7)
    artist.sampled("plain", rescaled)
    artist.sampled("guided", artist.guided("guidance", rescaled))
    artist.sampled("again", rescaled)
    plain, guided, again = run(server, artist, "plain", "guided", "again")
    np.testing.assert_array_equal(again, plain)
    assert not np.array_equal(guided, plain)


def test_guidance_in_a_custom_sampler(server, info):
    """SamplerCustomAdvanced with a BasicGuider, as FLUX's own workflows have it."""
    artist = Artist(info, "Flux")
    graph, latents = artist.graph, []
    for name, model in (("plain", artist.model), ("guided", artist.guided("guidance"))):
        guider = graph.add(f"{name} guider", "BasicGuider", model=model, conditioning=output(artist.model, 1))
        sigmas = graph.add(f"{name} sigmas", "BasicScheduler", model=model, scheduler="beta", steps=STEPS, denoise=0.6)
        chosen = graph.add(f"{name} sampler", "KSamplerSelect", sampler_name="heun")
        noise = graph.add(f"{name} noise", "RandomNoise", noise_seed=3)
        latents.append(
            graph.add(
                name,
                "SamplerCustomAdvanced",
                noise=noise,
                guider=guider,
                sampler=chosen,
                sigmas=sigmas,
                latent_image=artist.latent,
            )
        )
        graph.keep(latents[-1], f"{name} kept")
    plain, guided = run(server, artist, "plain", "guided")
    assert np.isfinite(guided).all() and np.abs(guided - plain).mean() > 0.01 * np.abs(plain).mean()


def test_weights_moved_in_inference_mode_can_be_guided_again(server, info):
    """A second run after everything was pushed out of memory: the copies come back as inference tensors."""
    artist = Artist(info, "SD15")
    artist.sampled("guided", artist.guided("guidance"))
    (first,) = run(server, artist, "guided")
    server.free()
    artist.graph.prompt["guided"]["inputs"]["seed"] = 6
    (second,) = run(server, artist, "guided")
    assert np.isfinite(second).all() and not np.array_equal(first, second)


def test_guided_sampling_stops_when_asked(server, info):
    artist = Artist(info, "SD15")
    artist.sampled("guided", artist.guided("guidance"))
    artist.graph.prompt["guided"]["inputs"]["steps"] = 50
    armed = artist.graph.add("arm", "TEST_Interrupt", value=artist.latent, node="guided", report=2)
    artist.graph.prompt["guided"]["inputs"]["latent_image"] = list(armed)
    done = server.run(artist.graph.prompt)
    assert done.status == "interrupted" and done.node == "guided", (done.status, done.error)
    assert done.progress["guided"][-1][0] <= 4
