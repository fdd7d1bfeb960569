"""A user's script that evaluates with all workers after each epoch and stops early. It writes all that it got to NAME.json."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

GLOBAL_BATCH, MICRO_BATCH, EPOCHS, PATIENCE, EVALUATED = 16, 4, 12, 2, 5
OPTIMIZER: dict[str, Any] = {"lr": 0.4, "momentum": 0.9}


def dataset(seed: int, samples: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 8, generator=generator)
    noise = torch.randn(samples, generator=generator)
    return TensorDataset(inputs, (inputs[:, 0] + 0.8 * noise > 0).long())


def classifier() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))


def measured(model: nn.Module) -> Callable[[Any], dict[str, Any]]:
    def measure(batch: Any) -> dict[str, Any]:
        x, y = batch
        logits = model(x)
        return {"held_out_loss": nn.functional.cross_entropy(logits, y), "accuracy": (logits.argmax(1) == y).float().mean()}

    return measure


def main(folder: str) -> None:
    import roundtable

    run = roundtable.join()
    model = run.replicate(classifier())
    opt = run.optimizer(torch.optim.SGD, **OPTIMIZER)
    held_out, got, best, bad = dataset(2, 43), [], float("inf"), 0
    for _ in range(EPOCHS):
        for x, y in run.batches(dataset(1, 64), micro_batch=MICRO_BATCH, global_batch=GLOBAL_BATCH, epochs=1, shuffle=False):
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
            run.log(loss=loss)
            opt.step()
        if run.stopped:
            break
        assert model.training
        means = run.evaluate(measured(model), held_out, micro_batch=EVALUATED)
        got.append({**means, "loss": run.metrics["loss"], "chief": run.agree(run.index), "round": run.round})
        best, bad = (means["held_out_loss"], 0) if means["held_out_loss"] < best else (best, bad + 1)
        if not bad:
            run.save("best")
        if bad == PATIENCE:
            run.stop(f"no better than {best:.4f} for {PATIENCE} epochs")
    Path(folder, f"{run.name}.json").write_text(json.dumps(got))


if __name__ == "__main__":
    main(sys.argv[1])
