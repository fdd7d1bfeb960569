"""A notebook: its cells run one after another in a kernel, which is interrupted and restarted as Jupyter does it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

import pytest

jupyter_client = pytest.importorskip("jupyter_client")
pytest.importorskip("ipykernel")

pytestmark = pytest.mark.slow

#: Seconds for a cell, on a machine that others use too.
CELL_S = 120.0

TRAIN = """
import torch, roundtable
data = torch.utils.data.TensorDataset(torch.ones(8, 4), torch.ones(8, 2))
run = roundtable.join()
model = run.replicate(torch.nn.Linear(4, 2))
opt = run.optimizer(torch.optim.SGD, lr=0.1)
for x, y in run.batches(data, micro_batch=2, global_batch=4, epochs=3):
    torch.nn.functional.mse_loss(model(x), y).backward()
    opt.step()
    at_round(run)
print(run.round, float(model.weight.detach().sum()))
"""


class Notebook:
    """A kernel, started in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._manager = jupyter_client.KernelManager(kernel_name="python3")
        self._manager.kernel_spec.argv[0] = sys.executable
        self._manager.start_kernel(cwd=str(folder), env=os.environ | {"JPY_SESSION_NAME": "mine.ipynb"})
        self._connect()

    def _connect(self) -> None:
        self._client = self._manager.client()
        self._client.start_channels()
        self._client.wait_for_ready(timeout=CELL_S)
        self.run("def at_round(run): pass")

    def run(self, cell: str, interrupt_at: str | None = None) -> tuple[str, str]:
        """Run a cell, and interrupt it once it prints a text. Return all it prints, and the name of its error or ''."""
        asked = self._client.execute(cell)
        printed, error, interrupted = "", "", False
        while True:
            try:
                message = self._client.get_iopub_msg(timeout=CELL_S)
            except Empty:
                raise AssertionError(f"nothing came for {CELL_S:.0f} s after {printed!r}") from None
            if message["parent_header"].get("msg_id") != asked:
                continue
            content: dict[str, Any] = message["content"]
            if message["msg_type"] == "stream":
                printed += content["text"]
            elif message["msg_type"] == "error":
                error = f"{content['ename']}: {content['evalue']}"
            elif message["msg_type"] == "status" and content["execution_state"] == "idle":
                return printed, error
            if interrupt_at is not None and not interrupted and interrupt_at in printed:
                interrupted = True
                self._manager.interrupt_kernel()

    def restart(self) -> None:
        self._client.stop_channels()
        self._manager.restart_kernel(now=True)
        self._connect()

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)

    def processes(self) -> set[str]:
        """Return the roles of the processes that the kernel has started for its run."""
        roles = set()
        for path in Path("/proc").iterdir():
            try:
                words = (path / "cmdline").read_bytes().split(b"\0") if path.name.isdigit() else []
                if (path / "cwd").resolve() == self._folder and len(words) > 2 and words[1].endswith(b"cli.py"):
                    roles.add(words[2].decode())
            except OSError:
                continue
        return roles


@pytest.fixture
def notebook(tmp_path: Path) -> Iterator[Notebook]:
    made = Notebook(tmp_path)
    yield made
    made.close()


def test_cells_train_again_after_the_end_an_error_and_an_interrupt(notebook: Notebook) -> None:
    printed, error = notebook.run(TRAIN)
    assert error == "" and printed.startswith("6 "), (printed, error)
    printed, error = notebook.run("run.finish()")
    assert error == "" and "the model is in runs/mine/model.safetensors" in printed and notebook.processes() == set()

    notebook.run("def at_round(run):\n    if run.round == 2: raise ValueError('mine')")
    printed, error = notebook.run(TRAIN)
    assert error == "ValueError: mine" and "the run in runs/mine-2 is given up after round 2" in printed
    assert notebook.processes() == set()

    notebook.run("import time\ndef at_round(run):\n    if run.round == 2: print('waits', flush=True); time.sleep(600)")
    printed, error = notebook.run(TRAIN, interrupt_at="waits")
    assert error.startswith("KeyboardInterrupt") and "is given up after round 2" in printed


@pytest.mark.long
def test_a_cell_is_run_again_before_the_end_and_after_it_and_the_kernel_is_restarted(notebook: Notebook) -> None:
    notebook.run("def at_round(run):\n    if run.round == 2: roundtable.join()")
    printed, error = notebook.run(TRAIN)
    assert error.startswith("UsageError: this process takes part in a run already, which is in round 2: ")

    notebook.run("def at_round(run): pass")
    first, error = notebook.run(TRAIN)
    assert error == "" and first.startswith("6 "), (first, error)
    printed, error = notebook.run("run = roundtable.join()")  # it ends the run before
    assert error == "" and "the model is in runs/mine-2/model.safetensors" in printed
    assert notebook.processes() == {"coordinator", "server"}

    notebook.restart()
    assert notebook.processes() == set()
    printed, error = notebook.run(TRAIN)
    assert (printed.splitlines()[0], error) == (first.splitlines()[0], "")
