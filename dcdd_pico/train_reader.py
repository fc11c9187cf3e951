"""Trains the two scene readers (`reader.py`)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from dcdd_core.training.schedules import set_learning_rate, warmup_cosine

from .build_context import BuildContext
from .reader import SceneReader, fact_labels
from .scenes import scene_pixels
from .training_loop import train

_BATCH = 128


def train_reader(context: BuildContext, name: str, seed: int) -> SceneReader:
    """Trains (or restores) the reader called `name` and returns it in evaluation mode.

    Its log holds the accuracy for each fact on held-out scenes.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reader = SceneReader()
    reader = reader.to(context.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=0.0, weight_decay=0.02)
    labels = {fact: label.to(context.device) for fact, label in fact_labels(context.train_facts).items()}
    held_out = scene_pixels(context.held_out_images, context.device)
    held_out_labels = {fact: label.to(context.device) for fact, label in fact_labels(context.held_out_facts).items()}

    def step(i: int) -> dict[str, torch.Tensor]:
        reader.train()
        set_learning_rate(optimizer, warmup_cosine(i, context.recipe.reader_steps, peak=2e-3, warmup=50))
        index = context.batch(seed, i, _BATCH)
        pixels = scene_pixels(context.train_images[index], context.device)
        with torch.random.fork_rng(), context.autocast():
            torch.manual_seed(seed * 1_000_003 + i)  # for the dropout
            answers = reader(pixels)
        loss = sum(F.cross_entropy(answers[fact].float(), labels[fact][index]) for fact in answers)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        return {"loss": loss.detach()}

    @torch.no_grad()
    def evaluate(_: int) -> dict[str, float]:
        reader.eval()
        answers = reader(held_out)
        return {
            fact: float((logits.argmax(1) == held_out_labels[fact]).float().mean()) for fact, logits in answers.items()
        }

    train(
        context.folder / name,
        settings=context.settings(seed=seed, batch=_BATCH),
        steps=context.recipe.reader_steps,
        step=step,
        state={"model": reader, "optimizer": optimizer},
        evaluate=evaluate,
        evaluate_every=350,
        save_every=350,
    )
    return reader.eval().requires_grad_(False)


def train_loss_reader(context: BuildContext) -> SceneReader:
    """Trains (or restores) the reader whose perceptual distance is used as a loss, and which measures no table."""
    return train_reader(context, "loss-reader", context.recipe.seed + 102)
