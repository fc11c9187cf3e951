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
        ({"learning_rate": 0.0}, "learning_rate must be a finite number above 0 and of at most 10.0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number above 0 .*, got nan"),
        ({"learning_rate": 10.1}, "learning_rate must be a finite number above 0 and of at most 10.0, got 10.1"),
        ({"weight_decay": 10.1}, "weight_decay must be a finite number in 0..10.0, got 10.1"),
        ({"clip": 0.0}, "clip, the largest gradient norm, must be above 0, got 0.0"),
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


@pytest.mark.parametrize("name", ["sample_every", "save_every", "log_every", "keep"])
def test_numbers_beyond_any_run_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at most 99,999,999, got 100,000,000"):
        RunConfig(**{name: 100_000_000})


def test_the_ends_of_the_ranges_are_allowed():
    OptimizationConfig(steps=1, warmup=0, ema_decay=0.0, weight_decay=0.0, clip=float("inf"))
    OptimizationConfig(steps=99_999_999, learning_rate=10.0, weight_decay=10.0)
    RunConfig(sample_every=99_999_999, save_every=99_999_999, log_every=99_999_999, keep=99_999_999)
    DataConfig(images="a", min_side=11_585)
    for localised in (0, 1):
        DataConfig(images="a", batch=1, window=1, localised=localised)
    RunConfig(samples=0, sample_every=0, save_every=1, log_every=1)
    DataConfig(cache="c", verify=True)
