"""The loop that trainings on scene tokens share: clipped gradients, averaged weights, learning rates, closed scenes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dcdd_pico import token_training
from dcdd_pico.build_context import BuildContext, Recipe


def test_gradients_are_clipped_rates_follow_the_schedule_and_the_scenes_are_closed(tmp_path, monkeypatch):
    closed, rates, evaluated = [], [], []
    scenes = SimpleNamespace(batch=lambda step, size: (step, size), close=lambda: closed.append(True))
    monkeypatch.setattr(token_training, "SceneTokens", lambda *_, **__: scenes)
    monkeypatch.setattr(token_training, "tokens_digest", lambda model: "x")
    network = nn.Linear(3, 3)
    context = BuildContext(folder=tmp_path, device=torch.device("cpu"), recipe=Recipe(train_scenes=5))
    training = token_training.TokenTraining(
        context,
        tmp_path,
        SimpleNamespace(model=None),
        network,
        trained=dict(network.named_parameters()),
        matrices=["weight"],
        uses=1,
        ahead=False,
    )
    assert training.block == token_training.block_of(5) == 5 and token_training.block_of(10**6) == 2048

    def losses(i, found):
        assert found == (i, 7)
        rates.append({name: one.param_groups[0]["lr"] for name, one in training.optimizers.items()})
        return {"loss": 1e6 * network(torch.ones(3)).square().sum(), "other": torch.ones(())}

    told = {"steps": 40, "batch": 7, "peak": 0.01, "settings": {}, "save_every": 40}

    def evaluate(done):
        evaluated.append(done)
        return {"seen": 1.0}

    training.run("a", losses, evaluate, warmup=150, **told)
    assert evaluated == [10, 20, 30, 40], "a short training has a curve too"
    norm = torch.cat([weight.grad.flatten() for weight in network.parameters()]).norm()
    assert norm == pytest.approx(1, abs=1e-4), "clipped"
    by_name = [[one[name] for one in rates[1:]] for name in ("optimizer", "muon")]
    assert by_name[0] == by_name[1], "one schedule for both"
    assert by_name[0].index(max(by_name[0])) <= 2 and by_name[0][-1] < 1e-3, "a twentieth of the updates to warm up"
    assert closed == [True] and not network.training and not network.weight.requires_grad
