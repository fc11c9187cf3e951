"""LlamaGen in the nodes: what is held, counted and sampled with by default."""

from __future__ import annotations

from importlib import import_module

import pytest

from dcdd_core.models.llamagen.sampler import LlamaGenSampler
from tests.comfy.graphs import Graph, output
from tests.fake_comfy.double import Double
from tests.tiny_bigfix import tiny_text_encoder
from tests.tiny_llamagen import save_llamagen, tiny_weights

NAME, PROMPT = "tiny_llamagen", "a red circle on the left"


@pytest.fixture
def told(double: Double, monkeypatch) -> list[tuple]:
    """What ComfyUI's memory manager brings, for how many bytes, and the options of every token loop, in order."""
    found: list[tuple] = []
    host, loop = (
        import_module(f"{double.pack.__name__}.{name}")
        for name in ("nodes.host", "dcdd_core.models.autoregressive.token_loop")
    )
    bring, start = host.bring, loop.TokenLoop.start

    def brought(*models, memory=0):
        held = {type(model.network).__name__: sum(w.nbytes for w in model.network.parameters()) for model in models}
        if "LlamaGenTransformer" in held:
            found.append((held["LlamaGenTransformer"], memory))
        return bring(*models, memory=memory)

    def started(self, *args, **given):
        found.append((self.options.guidance, self.options.top_k))
        return start(self, *args, **given)

    monkeypatch.setattr(host, "bring", brought)
    monkeypatch.setattr(loop.TokenLoop, "start", started)
    return found


def test_its_text_encoder_is_not_held_beside_it_and_it_samples_as_its_authors_do(double, told):
    folder = double.base / "models" / "janus" / NAME
    save_llamagen(folder)
    graph = Graph(double.get("/object_info"))
    janus = graph.add("janus", "DCDD_LoadJanus", model=NAME)
    sampled = graph.add("sample", "DCDD_JanusLogitSampler", janus=janus, prompt=PROMPT)
    graph.keep(graph.add("decode", "DCDD_VQVAEDecode", token_logits=sampled, vq_vae=output(janus, 1)), NAME)
    run = double.run(graph.prompt)
    assert run.status == "success", (run.node, run.error)
    network = 4 * sum(weight.numel() for weight in tiny_weights().values())
    text = sum(weight.nbytes for weight in tiny_text_encoder().parameters())
    logits = LlamaGenSampler.load(folder).working_memory([PROMPT])
    (held, for_text), (still_held, for_logits), options, *_ = told
    assert held == still_held == network and options == (7.5, 1000)
    assert for_text - for_logits == text - logits  # both with what previews take
