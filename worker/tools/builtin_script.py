"""The built-in training script: a network of `roundtable.worker.models.builtin` on images of `roundtable.worker.data`, chosen by
the run's settings.

It is a user's script like any other, and an example of one. It uses nothing that other scripts cannot use.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sized
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, Subset

import roundtable
from roundtable.common.config.example_settings import ExampleSettings
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.model_file import read_weights
from roundtable.worker import data
from roundtable.worker.models import builtin, cnn_blocks
from roundtable.worker.models.alexnet_two_columns import whole_state
from roundtable.worker.models.hybrid import shard_fully_connected
from roundtable.worker.run import Run

Schedule = Callable[[torch.optim.Optimizer], lr_scheduler.LRScheduler]


def main() -> None:
    """Train until the settings' epochs or rounds are over. Measure on the held-out images once an epoch and at the end."""
    run = roundtable.join()
    settings, example = run.settings, run.settings.example
    images = data.chosen(settings)
    rounds = settings.epochs * math.ceil(len(images.train) / settings.global_batch)

    model = builtin.build(example.model, images.shape, images.classes, example.column_devices)
    if example.init is not None:
        load_weights(model, Path(example.init))
    head = shard_fully_connected(model, images.classes) if example.parallel == "hybrid" else None
    run.replicate(model)
    optimizer = optimizer_class(example.optimizer)
    opt = run.optimizer(
        optimizer,
        **optimizer_arguments(optimizer, example),
        clip_norm=example.clip_norm,
        schedule=schedule(example, rounds),
        schedule_per="round",
    )
    held_out: Dataset[data.Sample] = images.test
    if settings.policy == "average":
        if settings.average_weights_by == "greedy":  # images that choose a model must not measure it
            choosing, held_out = halves(images.test)
            run.merge_by(lambda model: score(run, model, images.train, choosing))
        run.before_merge(lambda: run.log(part_accuracy=accuracy(model, held_out)))

    def log_accuracy() -> None:
        with run.masters():  # measure the weights of the model's file
            run.log(accuracy=accuracy(model, held_out, head), held_out=size)

    measured, size = run.epoch, len(cast(Sized, held_out))
    for x, y in run.batches(images.train, num_workers=example.num_data_workers):
        out = model(x)
        y = y.to(out.device, non_blocking=True)
        loss = cnn_blocks.LOSSES[example.loss](out, y) if head is None else roundtable.sharded_cross_entropy(out, y)
        loss.backward()
        run.log(loss=loss)
        if head is None:  # with a head, this would be another question to the servers
            run.log(train_accuracy=(out.argmax(1) == y).float().mean())
        opt.step()
        if run.is_chief and run.epoch != measured:
            measured = run.epoch
            log_accuracy()
    if settings.policy in ("local", "average"):
        run.recompute_batchnorm(images.train)
    if run.is_chief:
        log_accuracy()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights in a file into `model`. Raises UsageError with the first tensor that does not fit."""
    found, wanted = whole_state(read_weights(path)), model.state_dict()
    for name, tensor in wanted.items():
        if name not in found:
            raise UsageError(f"{path} has no '{name}', which the model has: give the weights of the same model.")
        if found[name].shape != tensor.shape:
            shapes = f"{list(found[name].shape)}, but the model needs {list(tensor.shape)}"
            raise UsageError(f"{path} has '{name}' of shape {shapes}: give the weights of the same model.")
    strange = sorted(found.keys() - wanted.keys())
    if strange:
        raise UsageError(f"{path} has '{strange[0]}', but the model does not: give the weights of the same model.")
    model.load_state_dict(found)


def accuracy(model: nn.Module, samples: Dataset[data.Sample], head: roundtable.ShardedLinear | None = None) -> float:
    """Return the share of `samples`, 0 to 1, whose label has the largest logit. A sharded `head` computes the logits.

    The model's mode and torch's generator stay as they were.
    """
    training = model.training
    model.eval()
    loader = DataLoader(samples, batch_size=250, generator=torch.Generator())
    with torch.no_grad():
        right = 0
        for x, y in loader:
            out = model(x)
            best = out.argmax(1) if head is None else head.topk(out, 1)[1][:, 0]
            right += int((best.cpu() == y).sum())
    model.train(training)
    return right / len(cast(Sized, samples))


def score(run: Run, model: nn.Module, train: data.Samples, held_out: Dataset[data.Sample]) -> float:
    """Return a score of a mean of models: its accuracy, after its batch normalisation got statistics of its own."""
    run.recompute_batchnorm(train)
    return accuracy(model, held_out)


def halves(samples: data.Samples) -> tuple[Dataset[data.Sample], Dataset[data.Sample]]:
    """Return half of the samples to choose a model by, and the other half to measure it by. They are always the same."""
    order = torch.randperm(len(samples), generator=torch.Generator().manual_seed(0)).tolist()
    return Subset(samples, order[::2]), Subset(samples, order[1::2])


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """Return the class of torch.optim with that name. Raises UsageError if there is none."""
    found = getattr(torch.optim, name, None)
    if not inspect.isclass(found) or not issubclass(found, torch.optim.Optimizer) or found is torch.optim.Optimizer:
        raise UsageError(f"torch.optim has no optimizer '{name}'; --optimizer takes a class of it, such as SGD or AdamW.")
    return found


def optimizer_arguments(optimizer: type[torch.optim.Optimizer], example: ExampleSettings) -> dict[str, Any]:
    """Return those of lr, momentum and weight_decay that the class takes."""
    takes = inspect.signature(optimizer).parameters
    asked = {"lr": example.lr, "momentum": example.momentum, "weight_decay": example.weight_decay}
    return {key: value for key, value in asked.items() if key in takes}


def schedule(example: ExampleSettings, rounds: int) -> Schedule | None:
    """Return the schedule of the learning rate over `rounds`, or None if it is constant.

    Raises UsageError for an unknown name.
    """
    courses: dict[str, Schedule] = {
        "CosineAnnealingLR": partial(lr_scheduler.CosineAnnealingLR, T_max=rounds),
        "LinearLR": partial(lr_scheduler.LinearLR, start_factor=1.0, end_factor=0.0, total_iters=rounds),
        "OneCycleLR": partial(lr_scheduler.OneCycleLR, max_lr=example.lr, total_steps=rounds, cycle_momentum=False),
    }
    if example.schedule == "none":
        return None
    if example.schedule not in courses:
        raise UsageError(f"there is no schedule '{example.schedule}' here; --schedule takes {', '.join(courses)} or none.")
    return courses[example.schedule]


if __name__ == "__main__":
    main()
