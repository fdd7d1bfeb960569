"""A user's script that trains nothing and uses the key-value store. Run by test_kv.py, by three workers."""

from __future__ import annotations

from collections.abc import Callable

import torch

import roundtable
from roundtable.common.runtime.errors import UsageError

BLOCKS = 2_500_000  # of float32: three blocks of a chunk's size
PUSHES = 40
READS = 60


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except UsageError as error:
        return str(error)
    raise AssertionError("nothing was refused")


def meet(kv: roundtable.worker.run.KvClient, place: str, workers: int) -> None:
    """Go on when all workers are here."""
    kv.wait(kv.push(f"barrier {place}", torch.ones(1)))
    here = torch.zeros(1)
    while here.item() < workers:
        kv.wait(kv.pull(f"barrier {place}", here))


def main() -> None:
    run = roundtable.join()
    kv = run.kv()
    assert run.kv() is kv

    # adds of all workers sum up, in one block and in several; timestamps may be waited for in any order
    stamps = []
    for number in range(PUSHES):
        stamps.append(kv.push("small", torch.full((2, 3), float(run.index + 1))))
        stamps.append(kv.push("count", torch.tensor([number, 1])))
    stamps.append(kv.push("large", torch.arange(BLOCKS, dtype=torch.float32) * (run.index + 1)))
    for stamp in reversed(stamps):
        kv.wait(stamp)
    meet(kv, "added", run.workers)
    small, count, large = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), torch.zeros(BLOCKS)
    for stamp in [kv.pull("small", small), kv.pull("count", count), kv.pull("large", large)]:
        kv.wait(stamp)
    assert torch.equal(small, torch.full((2, 3), 6.0 * PUSHES))
    assert count.tolist() == [3 * sum(range(PUSHES)), 3 * PUSHES]
    assert torch.equal(large, torch.arange(BLOCKS, dtype=torch.float32) * 6)
    meet(kv, "read", run.workers)

    # a pull sees each push whole or not at all, while others push
    everywhere = torch.ones(BLOCKS)
    if run.index == 0:
        kv.wait(kv.push("whole", torch.zeros(BLOCKS), op="set"))
    meet(kv, "whole", run.workers)
    for _ in range(READS):
        if run.index < 2:
            kv.wait(kv.push("whole", everywhere))
        else:
            kv.wait(kv.pull("whole", large))
            assert large.min() == large.max(), (large.min(), large.max())
    meet(kv, "read whole", run.workers)

    # a worker's own pushes are applied in order, what is pushed is copied, and `set` may change size and type
    mine = f"mine {run.index}"
    values = torch.zeros(3)
    for number in range(5):
        values.fill_(number)
        kv.push(mine, values, op="set")
    kv.push(mine, torch.ones(3))
    values.fill_(-1)
    stamp = kv.pull(mine, values)
    kv.wait(stamp)
    assert values.tolist() == [5.0] * 3
    kv.wait(kv.push(mine, torch.zeros(0), op="set"))
    kv.wait(kv.pull(mine, torch.zeros(0)))
    half = torch.zeros(4, dtype=torch.bfloat16)
    kv.wait(kv.push(mine, torch.ones(8, dtype=torch.bfloat16)[::2], op="set"))
    kv.wait(kv.pull(mine, half))
    assert half.tolist() == [1.0] * 4

    # what cannot be is refused in a sentence, and goes on
    block = 1 << 20
    said = {
        "waited twice": refusal(lambda: kv.wait(stamp)),
        "never given": refusal(lambda: kv.wait(10**9)),
        "no such key": refusal(lambda: kv.wait(kv.pull("nothing", torch.zeros(1)))),
        "pulled into another type": refusal(lambda: kv.wait(kv.pull("small", torch.zeros(6, dtype=torch.int32)))),
        "added another type": refusal(lambda: kv.wait(kv.push("small", torch.zeros(6, dtype=torch.float64)))),
        "pulled too few": refusal(lambda: kv.wait(kv.pull("small", torch.zeros(5)))),
        "pulled too many": refusal(lambda: kv.wait(kv.pull("small", torch.zeros(2 * block)))),
        "pulled the first block": refusal(lambda: kv.wait(kv.pull("large", torch.zeros(block)))),
        "added the first block": refusal(lambda: kv.wait(kv.push("large", torch.ones(block)))),
        "added too many": refusal(lambda: kv.wait(kv.push("small", torch.ones(2 * block)))),
        "not contiguous": refusal(lambda: kv.pull("small", torch.zeros(3, 2).t())),
    }
    for what, text in said.items():
        print(f"{what}: {text}")
        assert text.endswith(".") and "\n" not in text and ".." not in text, text
    meet(kv, "refused", run.workers)
    kv.wait(kv.pull("small", small))
    kv.wait(kv.pull("large", large))
    assert torch.equal(small, torch.full((2, 3), 6.0 * PUSHES)) and large[-1].item() == (BLOCKS - 1) * 6.0
    run.log(passed=1.0)


if __name__ == "__main__":
    main()
