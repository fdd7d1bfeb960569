"""The script of fault matrix rows about the end of a run: digits, with the bits of the built-in example.

The first argument says how scripts end. `leave`: worker 1 breaks out of its loop. `exit`: worker 0 ends early. After the last
round worker 0 may `evaluate` for long, `raise`, or be killed (`kill`). `wait FILE`: no worker goes on before FILE exists, so that
a harm can reach all of them. `late`: worker 0 comes late to its first batch.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from pathlib import Path

import msgspec
import torch

import roundtable
from roundtable.worker import data
from roundtable.worker.models import builtin
from roundtable.worker.tools.builtin_script import optimizer_arguments, optimizer_class, schedule

#: The round from which on a script ends early or waits, and the seconds for which worker 0 evaluates or comes late.
ROUND, SECONDS = 60, 8.0


def main() -> None:
    how = sys.argv[1]
    run = roundtable.join()
    example = msgspec.structs.replace(run.settings.example, data="digits", model="mlp")
    settings = msgspec.structs.replace(run.settings, example=example)
    images = data.chosen(settings)
    model = run.replicate(builtin.build(example.model, images.shape, images.classes, example.column_devices))
    optimizer = optimizer_class(example.optimizer)
    rounds = settings.epochs * math.ceil(len(images.train) / settings.global_batch)
    arguments, course = optimizer_arguments(optimizer, example), schedule(example, rounds)
    opt = run.optimizer(optimizer, **arguments, clip_norm=example.clip_norm, schedule=course)
    if run.index == 0 and how == "late":
        time.sleep(SECONDS)
    for x, y in run.batches(images.train):
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        run.log(loss=loss)
        opt.step()
        while how == "wait" and run.round >= ROUND and not Path(sys.argv[2]).exists():
            time.sleep(0.05)
        if how == "leave" and run.index == 1 and run.round >= ROUND:
            break
        if how == "exit" and run.index == 0 and run.round >= ROUND:
            sys.exit(0)
    if run.index == 0 and how == "evaluate":
        time.sleep(SECONDS)
        run.log(accuracy=0.5)
    elif run.index == 0 and how == "raise":
        raise ValueError("the evaluation failed")
    elif run.index == 0 and how == "kill":
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
