"""Harms to the disk of a run: it is full, read-only or slow."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.harms.base import Harm
from benchmarks.live import Cluster
from roundtable.common.runtime.errors import UsageError
from roundtable.common.storage.event_log import RunLogReader

_CLONE_NEWNS = 0x00020000
_DISK_BYTES = 48 << 20
#: Once a certain file exists, a wait for the disk takes so much longer.
_SLOW_DISK = """#include <sys/syscall.h>
#include <unistd.h>
static void wait(void) {{ if (access("{flag}", F_OK) == 0) usleep({microseconds}); }}
int fsync(int fd) {{ wait(); return syscall(SYS_fsync, fd); }}
int fdatasync(int fd) {{ wait(); return syscall(SYS_fdatasync, fd); }}
"""


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a small file system in `folder`.

    Only this process and its children see it, so nothing is left of it when they have ended. Raises UsageError if it cannot be
    mounted.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or libc.unshare(_CLONE_NEWNS):
        raise UsageError("mounts a file system, for which it must be run as root")
    folder.mkdir()
    for command in (
        ["mount", "--make-rprivate", "/"],
        ["mount", "-t", "tmpfs", "-o", f"size={_DISK_BYTES}", "tmpfs", str(folder)],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UsageError(f"'{' '.join(command)}' failed: {done.stderr.strip()}")
    try:
        yield folder / "run"
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=False)


def fill(seconds: float) -> Harm:
    """Fill the file system of the run directory's parent for some seconds."""

    def harm(run: Cluster) -> Cluster:
        file = run.folder.parent / "full"
        end = time.monotonic() + seconds
        with file.open("wb", buffering=0) as out:
            while time.monotonic() < end:
                try:
                    out.write(bytes(64 << 10))
                except OSError:
                    time.sleep(0.02)  # then fill the space that was freed meanwhile
        assert "warning: " in (shown := run.shown()), f"nobody who looks on was told of the full disk: {shown}"
        file.unlink()
        return run

    return harm


def read_only(seconds: float) -> Harm:
    """Make the run directory read-only for some seconds. The run must be on `small_disk`.

    Files that are open stay open. No new file can be made.
    """

    def harm(run: Cluster) -> Cluster:
        place, began, rounds, taken = str(run.folder), time.time(), run.rounds(), len(run.events("checkpoint"))
        for command in (["mount", "--bind", place, place], ["mount", "-o", "remount,bind,ro", place]):
            subprocess.run(command, check=True, capture_output=True)
        time.sleep(seconds)
        assert run.rounds() > rounds, "training did not go on while the folder could not be written"
        told = [event for _, at, event in run.read(RunLogReader.events) if event.kind == "warning" and at > began]
        assert any("no checkpoint" in event.data["text"] for event in told), "nobody has told that there is no checkpoint"
        assert "warning: no checkpoint" in run.shown(), "nobody who looks on was told that there is no checkpoint"
        subprocess.run(["umount", "--lazy", place], check=True, capture_output=True)
        run.until(lambda: len(run.events("checkpoint")) > taken + 1, "checkpoints again")
        return run

    return harm


def slow_disk(folder: Path, wait_s: float, seconds: float) -> tuple[Harm, dict[str, str]]:
    """Return a harm that makes the disk slow for some seconds, and the environment that lets it.

    Each wait for the disk takes `wait_s` longer. `folder` gets a library that all processes load.
    """
    folder.mkdir(parents=True)
    flag, library, source = folder / "slow", folder / "slow.so", folder / "slow.c"
    source.write_text(_SLOW_DISK.format(flag=flag, microseconds=round(wait_s * 1e6)), encoding="utf-8")
    if shutil.which("gcc") is not None:
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True, capture_output=True)

    def harm(run: Cluster) -> Cluster:
        assert library.exists(), "there is no gcc to make the disk slow with"
        rounds, taken = run.rounds(), len(run.events("checkpoint"))
        flag.touch()
        time.sleep(seconds)
        assert run.rounds() > rounds, "training did not go on while the disk was slow"
        flag.unlink()
        run.until(lambda: len(run.events("checkpoint")) > taken + 1, "checkpoints again")
        return run

    return harm, {"LD_PRELOAD": str(library)}
