"""Joining a run: what `roundtable.join()` and `roundtable.embedding()` do."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from roundtable.common.config.launching import as_module, name_of, other_launcher, rank_variables, words_of
from roundtable.common.network.addresses import whole
from roundtable.common.runtime.errors import UsageError
from roundtable.worker.session.participation import Participation, is_interactive

if TYPE_CHECKING:
    from torch import nn

    from roundtable.cluster.launch.standalone import Companions
    from roundtable.worker.run import Run
    from roundtable.worker.session.session import Session

#: A launcher of workers sets these: the coordinator's address, and the number of this worker.
ADDRESS_VARIABLE = "ROUNDTABLE_COORDINATOR"
INDEX_VARIABLE = "ROUNDTABLE_WORKER_INDEX"

#: Lets a script that another launcher has started several times train a model in each process.
ALONE_VARIABLE = "ROUNDTABLE_ALONE"

#: Seconds that the coordinator has to answer, if not the default.
START_VARIABLE = "ROUNDTABLE_START_TIMEOUT"

#: The former names of these variables, which still work for one more release.
OLD_VARIABLES = {ADDRESS_VARIABLE: "PS_COORDINATOR", INDEX_VARIABLE: "PS_WORKER_INDEX", START_VARIABLE: "PS_START_TIMEOUT"}

#: Stands for a script in the run directory of a notebook. Jupyter gives the notebook's name in a variable.
_NOTEBOOK = "a notebook"
_NOTEBOOK_VARIABLE = "JPY_SESSION_NAME"

#: The part of this process in a run, if it has one.
_participations: list[Participation] = []


def join() -> Run:
    """Join the cluster that the environment names. Without one, start a cluster for this process alone.

    Seed torch, numpy and Python by the run's seed, so that every worker builds the same model afterwards. Set torch's number of
    threads, because the bits of the result depend on it. When the script ends, the worker leaves the run by itself. In a notebook
    `run.finish()` does so, or the next `join()`, which begins another run.

    Raise UsageError if the coordinator refuses this worker, or while a run of this process is under way. Raise ClusterError if
    the coordinator cannot be reached. Exit with code 2 if torchrun, srun or mpirun has started this script several times without
    a coordinator.
    """
    address = _from_launcher(ADDRESS_VARIABLE)
    while _participations:
        if address is not None and not is_interactive():
            raise UsageError("this script has joined a run already: it can call run.batches() again, to train further.")
        _participations[0].make_way()
        _participations.pop()
    companions = None
    if address is None:
        _refuse_other_launchers()
        companions = _start_companions()
        address = companions.address
    try:
        session = _join(whole(address))
    except BaseException:
        if companions is not None:
            companions.stop()
        raise
    from roundtable.worker.run import Run  # loaded late, as torch takes long: companions start meanwhile

    _participations.append(Participation(session, companions))
    run = Run(session)
    if companions is None:
        os.environ |= rank_variables(os.environ, run.index, run.workers, run.device.index or 0)
    return run


def _join(address: str) -> Session:
    """Join the run of the coordinator at `address`."""
    import torch

    from roundtable.common.config.settings import START_S
    from roundtable.common.network.addresses import await_route
    from roundtable.common.network.host_identity import here
    from roundtable.common.protocol.messages.session import Hello
    from roundtable.worker.client.io_thread import IoThread
    from roundtable.worker.session.session import Session

    arithmetic = {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }
    index = _from_launcher(INDEX_VARIABLE)
    hello = Hello("worker", int(index) if index else None, "", platform.node(), os.getpid(), arithmetic, here())
    start_s = float(_from_launcher(START_VARIABLE) or START_S)
    await_route(address, start_s)
    io = IoThread(address, hello, start_s)
    try:
        return Session(io)
    except BaseException:
        io.close()
        raise


def _start_companions() -> Companions:
    """Start a coordinator and a server for this process alone."""
    from roundtable.cluster.launch.standalone import Companions

    if is_interactive():
        return Companions(_NOTEBOOK, Path(os.environ.get(_NOTEBOOK_VARIABLE, "notebook")).stem, [])
    script = _this_script()
    return Companions(script, name_of(script), sys.argv[1:])


def _this_script() -> str:
    """Return what names this script on a command line: its file, or the module that `python -m` runs."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.origin != sys.argv[0]:
        return sys.argv[0]
    return as_module(spec.name.removesuffix(".__main__"))


def _refuse_other_launchers() -> None:
    """End the script if another launcher has started it several times: each process would train a model of its own.

    A notebook is one process, whatever the allocation that it runs in has room for.
    """
    found = other_launcher(os.environ)
    if found is None or os.environ.get(ALONE_VARIABLE) or is_interactive():
        return
    launcher, count = found
    command = shlex.join(["roundtable", "local", "--workers", str(count), *words_of(_this_script()), *sys.argv[1:]])
    text = (
        f"{launcher} has started this script {count} times without a coordinator, and each would train a model of its own: on "
        f"one host run `{command}` instead, on several start a coordinator and servers and set {ADDRESS_VARIABLE}=HOST:PORT for "
        f"all; {ALONE_VARIABLE}=1 trains {count} models."
    )
    print(f"error: {text}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _from_launcher(variable: str) -> str | None:
    """Return what the environment has for `variable`, or for its old name."""
    return os.environ.get(variable, os.environ.get(OLD_VARIABLES[variable]))


def embedding(rows: int, dim: int, std: float = 1.0) -> nn.Embedding:
    """Return an `nn.Embedding(rows, dim, sparse=True)` that takes up no memory here. Servers draw its rows from N(0, std^2).

    The values are a function of the run's seed, the table's name and the row. The layer can be used once its model is replicated
    and has an optimizer.
    """
    from roundtable.worker.layers.sparse_embedding import make_embedding

    return make_embedding(rows, dim, std)
