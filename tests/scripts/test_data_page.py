"""The blocks of docs/tutorial/data.md about streams run as they are, one after the other, in a script."""

from __future__ import annotations

import importlib.util
import io
import re
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "tutorial" / "data.md"
BEFORE = """
import itertools, torch, roundtable
from torch.utils.data import DataLoader

run = roundtable.join()
model = run.replicate(torch.nn.Linear(3, 2))
opt = run.optimizer(torch.optim.SGD, lr=0.1)
count = 0

def train(x, y):
    global count
    count += len(x)
    torch.nn.functional.cross_entropy(model(x), y).backward()
    opt.step()
"""
#: Samples that each block trains on.
EXPECTED = [240, 120, 120, 112]


def write_data(folder: Path) -> None:
    for name, samples in (("a", 70), ("b", 50)):
        rows = [(n / samples, 1.0, -n / samples, n % 2) for n in range(samples)]
        (folder / f"{name}.txt").write_text("".join(f"{a} {b} {c} {y}\n" for a, b, c, y in rows))
        (folder / f"{name}.csv").write_text("a,b,c,y\n" + "".join(f"{a},{b},{c},{y}\n" for a, b, c, y in rows))
        with tarfile.open(folder / f"train-{'ab'.index(name):03}.tar", "w") as archive:
            for number, (a, b, c, y) in enumerate(rows):
                for end, data in (("bin", struct.pack("3f", a, b, c)), ("cls", str(y).encode())):
                    info = tarfile.TarInfo(f"{number:05}.{end}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


@pytest.mark.slow
@pytest.mark.long
def test_the_blocks_about_streams_run(tmp_path: Path) -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n## Streams\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"(<!-- needs (\w+) -->\n)?```python\n(.*?)```", section, re.S)
    assert len(blocks) == len(EXPECTED)
    script = BEFORE
    expected = []
    for (_, needs, block), samples in zip(blocks, EXPECTED, strict=True):
        if needs and importlib.util.find_spec(needs) is None:
            continue
        of_batch = "torch.stack([batch[n].float() for n in 'abc'], 1), batch['y'].long()"
        call = f"train({of_batch if needs else 'x, y'})"
        assert block.count("    ...\n") == 1
        script += f"{f'import {needs}' if needs else ''}\n{block.replace('...', call)}\nprint('trained', count)\ncount = 0\n"
        expected.append(f"trained {samples}")
    write_data(tmp_path)
    (tmp_path / "train.py").write_text(script)
    result = subprocess.run([sys.executable, "train.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line for line in result.stdout.splitlines() if line.startswith("trained")] == expected
    assert "WARNING" not in result.stderr
