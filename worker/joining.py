"""Joining a run: what `roundtable.join()` and `roundtable.embedding()` do."""

from __future__ import annotations

import atexit
import os
import platform
import signal
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from roundtable.worker.run import Run

#: A launcher of workers sets these: the coordinator's address, and the number of this worker.
ADDRESS_VARIABLE = "ROUNDTABLE_COORDINATOR"
INDEX_VARIABLE = "ROUNDTABLE_WORKER_INDEX"

#: Signals that tell a worker to leave, and their handlers in scripts that set none.
_USUAL: tuple[tuple[signal.Signals, Any], ...] = (
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
)

#: Seconds that the coordinator has to answer, if not the default.
START_VARIABLE = "ROUNDTABLE_START_TIMEOUT"

#: The former names of these variables, which still work for one more release.
OLD_VARIABLES = {ADDRESS_VARIABLE: "PS_COORDINATOR", INDEX_VARIABLE: "PS_WORKER_INDEX", START_VARIABLE: "PS_START_TIMEOUT"}


def join() -> Run:
    """Join the cluster that the environment names. Without one, start a cluster for this process alone.

    Seed torch, numpy and Python by the run's seed, so that every worker builds the same model afterwards. Set torch's number of
    threads, because the bits of the result depend on it. When the script ends, the worker leaves the run by itself.

    Raise UsageError if the coordinator refuses this worker, and ClusterError if it cannot be reached.
    """
    import torch

    from roundtable.common.config.settings import START_S
    from roundtable.common.network.addresses import await_route
    from roundtable.common.network.host_identity import here
    from roundtable.common.protocol.messages.session import Hello
    from roundtable.common.runtime.errors import NoAnswer
    from roundtable.common.runtime.restart import LEAVE_SIGNAL
    from roundtable.worker.client.io_thread import IoThread
    from roundtable.worker.run import Run

    runs: list[Run] = []
    address = _from_launcher(ADDRESS_VARIABLE)
    if address is None:
        from roundtable.cluster.launch.standalone import start_companions

        address = start_companions(sys.argv[0], lambda: runs[0].stop_signal if runs else 0)
    arithmetic = {
        "torch": str(torch.__version__),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }
    index = _from_launcher(INDEX_VARIABLE)
    hello = Hello("worker", int(index) if index else None, "", platform.node(), os.getpid(), arithmetic, here())
    start_s = float(_from_launcher(START_VARIABLE) or START_S)
    await_route(address, start_s)
    run = Run(IoThread(address, hello, start_s))
    runs.append(run)
    if threading.current_thread() is threading.main_thread():
        signal.signal(LEAVE_SIGNAL, lambda number, frame: run.leave())
        for number, usual in _USUAL:
            if signal.getsignal(number) == usual:  # otherwise the script has a handler of its own
                signal.signal(number, run.on_stop_signal)
    before = sys.excepthook

    def failed(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, KeyboardInterrupt):
            run.interrupted = True
        elif not (isinstance(error, SystemExit) and run.left_early):
            run.failure, run.cut_off = describe_failure(error, sys.argv[0]), isinstance(error, NoAnswer)
        before(kind, error, traceback)

    sys.excepthook = failed
    atexit.register(_finish, run)
    return run


def _from_launcher(variable: str) -> str | None:
    """Return what the environment has for `variable`, or for its old name."""
    return os.environ.get(variable, os.environ.get(OLD_VARIABLES[variable]))


def _finish(run: Run) -> None:
    """Leave the run when the script has ended. If the run has failed elsewhere, `launch.py` finds that in sys.last_value."""
    from roundtable.common.runtime.errors import PsError, Stopped

    try:
        run.finish()
    except Stopped:
        pass
    except PsError as error:
        if not run.failure:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.last_value = error if run.failed_elsewhere else None
    for number, usual in _USUAL:
        if signal.getsignal(number) == run.on_stop_signal:
            signal.signal(number, usual)


def describe_failure(error: BaseException, script: str) -> str:
    """Return one sentence on an exception that ended a script: its type, its text, and the script's own line."""
    line = ""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == script:
            line = f" ({script.rpartition('/')[2]} line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    from roundtable.common.runtime.errors import PsError

    text = str(error).strip().splitlines()
    if isinstance(error, PsError) and text:  # the text is a sentence already
        return text[0]
    return f"{type(error).__name__}{': ' + text[0] if text else ''}{line}"


def embedding(rows: int, dim: int, std: float = 1.0) -> nn.Embedding:
    """Return an `nn.Embedding(rows, dim, sparse=True)` that takes up no memory here. Servers draw its rows from N(0, std^2).

    The values are a function of the run's seed, the table's name and the row. The layer can be used once its model is replicated
    and has an optimizer.
    """
    from roundtable.worker.layers.sparse_embedding import make_embedding

    return make_embedding(rows, dim, std)
