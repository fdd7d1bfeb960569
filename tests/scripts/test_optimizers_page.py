"""The blocks of the tutorial's page on optimizers make a script that trains."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "optimizers.md"
BEFORE = """
import torch
from torch.utils.data import TensorDataset

class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(8, 4))

generator = torch.Generator().manual_seed(1)
dataset = TensorDataset(torch.randn(192, 8, generator=generator), torch.randint(0, 4, (192,), generator=generator))
held_out_x, held_out_y = dataset.tensors
"""
AFTER = """
assert run.round == 3 * 3 + 3 * 3 + 3, run.round
assert opt.param_groups[0]["lr"] == 0.1 / 21, opt.param_groups
assert scheduler.last_epoch == batches.rounds == 9, scheduler.last_epoch
"""


@pytest.mark.slow
def test_the_blocks_of_the_page_train(launch, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    script = tmp_path / "blocks.py"
    script.write_text(BEFORE + "\n".join(blocks) + AFTER)
    assert launch("--workers", 2, "--servers", 2, "--threads", 1, script)["rounds"] == 21
