"""Configurations: what they refuse, and the names by which checkpoints know them."""

import pytest

from dcdd_core.training.config import DataConfig, OptimizationConfig, RunConfig


def test_a_checkpoint_keeps_the_names_that_it_was_written_with():
    found = OptimizationConfig(steps=7, ema_decay=0.5, compile=True, activation_checkpointing=True).settings()
    assert found == {
        "steps": 7,
        "accumulation": 1,
        "learning_rate": 8e-4,
        "warmup": 200,
        "weight_decay": 0.01,
        "clip": 1.0,
        "average_decay": 0.5,
        "density": "logit_normal",
        "shift": 0.0,
        "weighting": "uniform",
        "seed": 0,
        "optimizer": "adamw",
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"steps": 0}, "steps and accumulation must be at least 1, got 0 and 1"),
        ({"accumulation": 0}, "steps and accumulation must be at least 1, got 1 and 0"),
        (
            {"learning_rate": 0.0},
            "learning rate and the largest gradient norm must be above 0, and the rate finite, got 0.0 and",
        ),
        ({"learning_rate": float("nan")}, "must be above 0, and the rate finite, got nan"),
        ({"clip": 0.0}, "must be above 0, .*, got 0.0008 and 0.0"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"ema_decay": 1.0}, r"decay must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, r"decay must lie in \[0, 1\), got -0.1"),
        ({"shift": float("inf")}, "shift must be a finite number in -16.0..16.0, got inf"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adamw8bit, muon, got 'sgd'"),
        ({"density": "beta"}, "density must be one of logit_normal, mode, uniform, got 'beta'"),
        ({"weighting": "snr"}, "weighting must be one of uniform, sigma_sqrt, cosmap, got 'snr'"),
    ],
)
def test_an_optimisation_that_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        OptimizationConfig(**{"steps": 1} | options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"images": None}, "either images or a cache"),
        ({"cache": "b"}, "either images or a cache"),
        ({"verify": True}, "images have no checksums"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"localised": 1.1}, "must lie in 0..1, got 1.1"),
        ({"localised": -0.1}, "must lie in 0..1, got -0.1"),
    ],
)
def test_data_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DataConfig(**{"images": "a"} | options)


def test_the_ends_of_the_ranges_are_allowed():
    OptimizationConfig(steps=1, warmup=0, ema_decay=0.0)
    for localised in (0, 1):
        DataConfig(images="a", batch=1, window=1, localised=localised)
    RunConfig(samples=0, sample_every=0, save_every=1, log_every=1)
    DataConfig(cache="c", verify=True)
