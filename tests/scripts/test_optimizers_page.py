"""The blocks of the tutorial's page on optimizers make scripts that train."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "optimizers.md"
BEFORE = """
import torch
import roundtable
from torch import nn
from torch.utils.data import TensorDataset

class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(8, 4))

rows = torch.Generator().manual_seed(1)
dataset = TensorDataset(torch.randn(192, 8, generator=rows), torch.randint(0, 4, (192,), generator=rows))
held_out_x, held_out_y = dataset.tensors
"""
AFTER_RATES = """
assert run.round == 3 * 3 + 3 * 3 + 3, run.round
assert opt.param_groups[0]["lr"] == 0.1 / 21, opt.param_groups
assert scheduler.last_epoch == batches.rounds == 9, scheduler.last_epoch
"""
BEFORE_CLASSES = """
run = roundtable.join()
model = run.replicate(Net())
"""
AFTER_CLASSES = """
before = model[0].weight.clone()
for x, y in run.batches(dataset, micro_batch=16, global_batch=64, epochs=1):
    nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
assert [group["lr"] for group in opt.param_groups] == [0.02, 3e-4] and not torch.equal(before, model[0].weight)
"""
BEFORE_GAN = """
run = roundtable.join()
generator, critic = nn.Linear(64, 8), nn.Linear(8, 1)
dataset = TensorDataset(dataset.tensors[0])
"""
AFTER_GAN = """
assert run.round == 30 and all(parameter.isfinite().all() for parameter in generator.parameters())
"""


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("used", "before", "after"),
    [
        (slice(0, 3), "", AFTER_RATES),
        pytest.param(slice(3, 4), BEFORE_CLASSES, AFTER_CLASSES, marks=pytest.mark.long),
        pytest.param(slice(4, 5), BEFORE_GAN, AFTER_GAN, marks=pytest.mark.long),
    ],
)
def test_the_blocks_of_the_page_train(used: slice, before: str, after: str, launch, tmp_path: Path) -> None:
    assert len(blocks()) == 5
    script = tmp_path / "blocks.py"
    script.write_text(BEFORE + before + "\n".join(blocks()[used]) + after)
    assert launch("--workers", 2, "--servers", 2, "--threads", 1, script)["rounds"] in (21, 3, 30)
