"""The fork server: a process that has imported torch, and from which the servers and workers of this machine are forked.

An import of torch takes seconds of processor time. A fork takes milliseconds and shares the memory. So a run starts sooner, and
a killed process is back sooner. (The imports touch no device, so a child may use CUDA; untested.)

Run as a script, this file is the fork server. It reads requests, one JSON a line, and forks twice for each. The process between
the two forks ends at once, so the kernel gives the child to the launcher (PR_SET_CHILD_SUBREAPER). From then on the launcher is
its parent, and waits for it as for any child. If the fork server ends, no process is harmed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from roundtable.cluster.process.parent_death import PARENT_VARIABLE, die_with_parent
from roundtable.common.storage import private_files

#: Seconds for a fork server that is ready to make a process.
_FORK_S = 10.0
_PR_SET_CHILD_SUBREAPER = 36
#: Bytes of room for the command lines of children, which are written over the fork server's own.
_COMMAND_BYTES = 1024
_TICK_S = 0.001


class Forked:
    """A process that a fork server has made, with the methods of subprocess.Popen that we use."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return None while the process runs, else its exit code, or minus the signal that killed it."""
        if self._code is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # the launcher was started with SIGCHLD ignored, so the code is unknown
                pid, status = self.pid, 0
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code

    def wait(self, timeout: float) -> int:
        """Wait for the end and return the exit code. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() >= deadline:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_TICK_S)
        return code

    def kill(self) -> None:
        """Send SIGKILL, unless the process is known to have ended."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


class ForkServer:
    """The launcher's side of a fork server. If it has failed, or on other systems than Linux, it is never ready."""

    def __init__(self, modules: Sequence[str], env: Mapping[str, str]) -> None:
        """Start a fork server that imports `modules`, if there are any. `env` is its environment."""
        self._process: subprocess.Popen[bytes] | None = None
        self._ready = False
        if modules and sys.platform.startswith("linux") and ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0:
            self._process = subprocess.Popen(
                [sys.executable, __file__, *modules, " " * _COMMAND_BYTES],
                env=env,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                start_new_session=True,
                umask=private_files.usual_umask,
            )

    @property
    def coming(self) -> bool:
        """Return whether the fork server is starting and not ready yet."""
        if self._process is None or self._ready:
            return False
        if self._answers(0.0):
            self._ready = self._line() == b"ready"
            if not self._ready:
                self.stop()
        return self._process is not None and not self._ready

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> Forked | None:
        """Return a process that runs `argv`, a command line of Python with a script, and appends its output to `log`.

        Return None if the fork server cannot make one.
        """
        if self._process is None or not self._ready or self._process.stdin is None or argv[0] != sys.executable:
            return None
        request = json.dumps({"argv": list(argv), "env": dict(env), "log": str(log.absolute()), "cwd": str(Path.cwd())})
        with contextlib.suppress(OSError):
            self._process.stdin.write(request.encode() + b"\n")
            if self._answers(_FORK_S) and (pid := self._line()):
                return Forked(int(pid))
        self.stop()
        return None

    def stop(self) -> None:
        """End the fork server. The processes that it has made go on."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _answers(self, patience_s: float) -> bool:
        assert self._process is not None and self._process.stdout is not None
        return bool(select.select([self._process.stdout], [], [], patience_s)[0])

    def _line(self) -> bytes:
        """Return the next line, which is short and comes at once. It is empty if the fork server has ended."""
        assert self._process is not None and self._process.stdout is not None
        return self._process.stdout.readline().strip()


def main() -> None:
    """Import the modules, then fork a process for each request. Returns in a forked process when its script has ended."""
    parent = int(os.environ.pop(PARENT_VARIABLE))
    die_with_parent(parent)
    for module in sys.argv[1:-1]:
        with contextlib.suppress(Exception):  # a process that needs the module reports the error
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a garbage collection in a child would copy the shared memory
    os.write(1, b"ready\n")
    with open(0, "rb", closefd=False) as requests:
        while line := requests.readline():
            if os.fork() == 0:
                if os.fork():
                    os._exit(0)
                break
            os.wait()
        else:
            return
    request = json.loads(line)
    _become(request["argv"], request["env"], request["log"], request["cwd"], parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def _become(argv: Sequence[str], env: Mapping[str, str], log: str, cwd: str, parent: int) -> None:
    """Turn this process into one that was started with `argv`. Once it is a child of `parent`, the launcher, tell it so."""
    os.setsid()
    while os.getppid() != parent and Path(f"/proc/{parent}").exists():
        time.sleep(_TICK_S)
    answers = os.dup(1)
    for fd, path, mode in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)):
        opened = os.open(path, mode, 0o644)
        os.dup2(opened, fd)
        os.close(opened)
    os.dup2(1, 2)
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv[:], sys.orig_argv[:] = argv[1:], argv
    sys.path[0] = str(Path(argv[1]).resolve().parent)
    _show(argv)
    if "torch" in sys.modules and env.get("OMP_NUM_THREADS", threads) != threads:
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # Python itself reseeds only its own generator after a fork
    os.write(answers, b"%d\n" % os.getpid())
    os.close(answers)


def _show(argv: Sequence[str]) -> None:
    """Show `argv` in ps, top and pgrep: write it over the command line that this process was started with."""
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[45:47])
    line = b"\0".join(os.fsencode(arg) for arg in argv)[: end - start - 1]
    ctypes.memmove(start, line.ljust(end - start, b"\0"), end - start)


if __name__ == "__main__":
    main()
