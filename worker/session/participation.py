"""The part of a process in a run besides its script: it hears signals, notes failures, and leaves at the end."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING, Any

from roundtable.common.runtime.errors import ClusterError, NoAnswer, PsError, Stopped, UsageError
from roundtable.common.runtime.restart import LEAVE_SIGNAL

if TYPE_CHECKING:
    from roundtable.cluster.launch.standalone import Companions
    from roundtable.worker.session.session import Session

#: Signals that tell a worker to leave, and their handlers in scripts that set none.
_USUAL: tuple[tuple[signal.Signals, Any], ...] = (
    (signal.SIGTERM, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
)


def ipython() -> Any:
    """Return the shell of the notebook or of the IPython console that this process runs; None if it runs none."""
    module = sys.modules.get("IPython")
    return module.get_ipython() if module is not None else None


def is_interactive() -> bool:
    """Return whether a person enters the script piece by piece, as in a notebook, so that it has no end of its own."""
    return hasattr(sys, "ps1") or ipython() is not None


class Participation:
    """The part of this process in one run, from its joining to its end.

    In a script, the end of the script is the end of the run. At a prompt or in a notebook it is `run.finish()`, the next
    `join()`, an error in a loop over batches, or the end of the process, whichever comes first.
    """

    def __init__(self, session: Session, companions: Companions | None) -> None:
        """Begin. `companions` are the coordinator and the server of a process that is alone."""
        self._session, self._companions = session, companions
        self._is_interactive = is_interactive()
        self._hook_before = sys.excepthook
        #: The error that a person was shown last, when this began.
        self._error_before = getattr(sys, "last_value", None)
        self._is_over = False
        session.after_end = self._end_companions
        sys.excepthook = self._on_exception
        atexit.register(self._at_exit)
        if not self._is_interactive:
            self._hear_signals()
        elif (shell := ipython()) is not None:
            shell.events.register("post_run_cell", self._on_cell)

    def _hear_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(LEAVE_SIGNAL, lambda number, frame: self._session.leave())
        for number, usual in _USUAL:
            if signal.getsignal(number) == usual:  # otherwise the script has a handler of its own
                signal.signal(number, self._session.on_stop_signal)

    # ---- failures

    def _on_exception(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not self._is_interactive:
            self._note(error)
            self._hook_before(kind, error, trace)
            return
        self._hook_before(kind, error, trace)
        self._give_up_after(error)

    def _on_cell(self, result: Any) -> None:
        """Called by IPython when a cell has ended."""
        error = result.error_before_exec or result.error_in_exec
        if error is not None:
            self._give_up_after(error)

    def _note(self, error: BaseException) -> None:
        session = self._session
        if isinstance(error, KeyboardInterrupt):
            session.interrupted = True
        elif not (isinstance(error, SystemExit) and session.left_early):
            session.failure, session.cut_off = describe_failure(error, sys.argv[0]), isinstance(error, NoAnswer)

    def _give_up_after(self, error: BaseException) -> None:
        """End a run whose loop over batches was left by an error: no other loop could go on with it."""
        if not self._is_over and self._session.is_under_way:
            self._note(error)
            self._give_up()

    def _give_up(self) -> None:
        done = self._session.round
        self._withdraw()
        with contextlib.suppress(PsError):
            self._session.leave_cluster()
        if self._companions is not None:
            self._companions.stop()
            if done:
                where = f" in {self._companions.folder}"
                print(f"the run{where} is given up after round {done}; roundtable.join() begins another.", file=sys.stderr)

    # ---- the end

    def make_way(self) -> None:
        """End this part, so that this process can join another run. Raise UsageError if a loop over batches is under way."""
        if self._is_over:
            return
        if self._session.is_under_way:
            error = getattr(sys, "last_value", None)
            if not self._is_interactive or error is None or error is self._error_before:
                raise UsageError(
                    f"this process takes part in a run already, which is in round {self._session.round}: let its loop over "
                    "batches() end, or call run.finish(), before it joins another."
                )
            self._note(error)
            self._give_up()
        elif not self._session.has_trained:
            self._session.interrupted = True
            self._give_up()
        else:
            self._session.finish()

    def _end_companions(self) -> None:
        """Called when the worker has left the run."""
        if self._is_over:
            return
        self._withdraw()
        if self._companions is not None and (why := self._companions.end(self._session.stop_signal)):
            raise ClusterError(f"the run is not finished: {why}")

    def _withdraw(self) -> None:
        """Have this process as it was before it joined."""
        self._is_over = True
        atexit.unregister(self._at_exit)
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._hook_before
        if self._is_interactive and (shell := ipython()) is not None:
            with contextlib.suppress(ValueError):
                shell.events.unregister("post_run_cell", self._on_cell)
        for number, usual in _USUAL:
            if signal.getsignal(number) == self._session.on_stop_signal:
                signal.signal(number, usual)

    def _at_exit(self) -> None:
        """Leave the run when the script has ended. If the run has failed elsewhere, `launch.py` finds that in sys.last_value."""
        session = self._session
        try:
            session.leave_cluster()
        except Stopped:
            pass
        except PsError as error:
            if not session.failure:
                print(f"error: {error}", file=sys.stderr, flush=True)
                sys.last_value = error if session.failed_elsewhere else None
        try:
            self._end_companions()
        except ClusterError as error:
            print(f"error: {error}", file=sys.stderr)
            if isinstance(getattr(sys, "last_value", None), PsError | None):  # the script itself ended as if all were well
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(1)


def describe_failure(error: BaseException, script: str) -> str:
    """One sentence on an exception that ended a script: its type, text, and the script's own line."""
    line = ""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == script:
            line = f" ({script.rpartition('/')[2]} line {traceback.tb_lineno})"
        traceback = traceback.tb_next
    text = str(error).strip().splitlines()
    if isinstance(error, PsError) and text:  # a sentence already
        return text[0]
    return f"{type(error).__name__}{': ' + text[0] if text else ''}{line}"
