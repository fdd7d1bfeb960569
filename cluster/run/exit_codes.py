"""The one place where a command ends: its last line, and its exit code. docs/fault-tolerance.md lists the exit codes."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import signal
import sys
import sysconfig
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import click

from roundtable.cluster.process.output import check_names, silence
from roundtable.common.runtime.errors import PsError, RunStopped, Stopped, UsageError, printable

#: The exit code after a mistake in the command.
USAGE = 2
#: The exit code of a server or worker whose run was told to stop and can be resumed. Started again, it joins the resumed run.
STOPPED = 75

_ROOT = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_ROOT / name) for name in ("launch.py", "cli.py", "roundtable", "common", "ps", "worker", "cluster", "explore"))
_LIBRARIES = tuple(
    dict.fromkeys(str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
)
_LONGEST = 400


def run_command(cli: click.Command, argv: Sequence[str], prog: str, obj: object = None) -> int:
    """Run `cli` and return the exit code. If it fails, the last line on stderr is `error: <sentence>`.

    Failures go through sys.excepthook, so that a worker's own hook, which tells the coordinator, is called too.
    """
    before, sys.excepthook = sys.excepthook, report
    try:
        check_names(argv)
        with cli.make_context(prog, list(argv), obj=obj) as ctx:
            cli.invoke(ctx)
            sys.stdout.flush()
        return 0
    except click.exceptions.Exit as end:
        return end.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return error.exit_code
    except click.ClickException as error:
        print(f"error: {' '.join(error.format_message().split())}", file=sys.stderr)
        return error.exit_code
    except BaseException as error:
        code = exit_code(error)
        if code:
            sys.excepthook(type(error), error, error.__traceback__)
        return code
    finally:
        sys.excepthook = before


def leave(code: int) -> NoReturn:
    """End this process as `sys.exit` does: wait for threads, call the functions of atexit, and flush open files.

    If such a function has put a PsError into sys.last_value, the process fails.

    Python's own teardown is skipped. With torch it takes 0.2 s. It also touches, and so copies, all memory that forked processes
    share.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for thing in gc.get_objects():
        if issubclass(type(thing), io.IOBase):
            with contextlib.suppress(OSError, ValueError):
                thing.flush()
    ctypes.CDLL(None).fflush(None)
    told = getattr(sys, "last_value", None)
    os._exit(code or (exit_code(told) if isinstance(told, PsError) else 0))


def exit_code(error: BaseException) -> int:
    """Return the exit code of a process that `error` ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    if isinstance(error, KeyboardInterrupt):
        return 128 + (error.number if isinstance(error, Stopped) else signal.SIGINT)
    if isinstance(error, RunStopped):
        return STOPPED
    return USAGE if isinstance(error, UsageError) else 1


def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Say on stderr why a command ends: in a sentence, after a traceback if the error was not expected."""
    if isinstance(error, KeyboardInterrupt):
        with contextlib.suppress(OSError):
            if str(error):
                print(error, file=sys.stderr, flush=True)
        return
    if isinstance(error, BrokenPipeError) and _output_is_broken():
        return
    with contextlib.suppress(OSError):
        if isinstance(error, SystemExit):
            if isinstance(error.code, str):
                print(f"error: {error.code.removeprefix('error: ')}", file=sys.stderr)
            return
        if not isinstance(error, PsError):
            traceback.print_exception(kind, error, trace)
        print(f"error: {printable(describe(error))}", file=sys.stderr, flush=True)


def _output_is_broken() -> bool:
    """Return whether nothing reads the output any more, as after `| head`. If so, silence it: no later flush may fail."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout.fileno())
        return True
    return False


def describe(error: BaseException) -> str:
    """Return an exception as one line: a PsError's sentence, else its type, text and place in the user's own code."""
    if isinstance(error, PsError):
        return " ".join(str(error).split())
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename).name} line {error.lineno})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any("Traceback" in line for line in lines):  # another process's error, passed on as text
        lines = [lines[0], lines[-1]]
    text = " ".join(lines)
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    frame = _place(error.__traceback__)
    where = f" ({Path(frame.filename).name} line {frame.lineno})" if frame else ""
    return type(error).__name__ + (f": {text}" if text else "") + where


def _place(trace: TracebackType | None) -> traceback.FrameSummary | None:
    """Return the innermost frame of the user's code. If there is none, return ours, or else any."""
    frames = traceback.extract_tb(trace)[::-1]
    user = [f for f in frames if not f.filename.startswith("<") and not _in(f.filename, (*_OURS, *_LIBRARIES))]
    ours = [f for f in frames if _in(f.filename, _OURS)]
    return next(iter([*user, *ours, *frames]), None)


def _in(filename: str, places: Sequence[str]) -> bool:
    path = str(Path(filename).resolve())
    return any(path == place or path.startswith(place + os.sep) for place in places)
