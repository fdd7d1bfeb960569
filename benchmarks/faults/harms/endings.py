"""Harms by which a run ends: all of it is killed, it is told to stop, or it fails."""

from __future__ import annotations

import os
import re
import signal
import time

from benchmarks.faults.harms.base import Harm
from benchmarks.live import Cluster
from roundtable.common.storage import checkpoint
from roundtable.common.storage.run_files import SETTINGS_FILE


def power_loss(damaged: bool, *flags: object) -> Harm:
    """Kill all processes at once, and resume the run with `flags`.

    If `damaged`, a bit of the newest checkpoint is changed before.
    """

    def harm(run: Cluster) -> Cluster:
        run.until(lambda: len(run.events("checkpoint")) > 1, "second checkpoint")
        run.cut_power()
        if damaged:
            whole = checkpoint.finished(run.folder)
            file = whole[-1] / checkpoint.file_of(0)
            data = bytearray(file.read_bytes())
            data[-1] ^= 1
            file.write_bytes(data)
        return Cluster(run.folder, "--resume", run.folder, *flags)

    return harm


def launcher_killed(run: Cluster) -> Cluster:
    """Kill the launcher alone, and resume the run. All that the launcher has started must end by itself."""
    run.kill_launcher()
    return Cluster(run.folder, "--resume", run.folder)


def tell(*names: str) -> Harm:
    """Send SIGTERM to these processes at once."""

    def harm(run: Cluster) -> Cluster:
        pids = [run.pids()[name] for name in names]
        run.harmed_at = time.time()
        for pid in pids:
            os.kill(pid, signal.SIGTERM)
        return run

    return harm


def told_to_stop(*names: str) -> Harm:
    """Send SIGTERM to these processes, or to the launcher if none is named.

    The run must end with a checkpoint. It goes on by `--resume auto`.
    """

    def harm(run: Cluster) -> Cluster:
        if names:
            tell(*names)(run)
        else:
            run.stop()
        code, out = run.end()
        assert code == 128 + signal.SIGTERM, f"exit code {code}"
        assert "with a checkpoint of round" in out and "; resume the run in" in out, out.strip().splitlines()[-1]
        return Cluster(run.folder, "--resume", "auto", "--config", run.folder / SETTINGS_FILE, "--run-dir", run.folder)

    return harm


def fails(last: str) -> Harm:
    """Wait until the run has failed, with this expression in its last line."""

    def harm(run: Cluster) -> Cluster:
        code, out = run.end()
        found = out.strip().splitlines()[-1:]
        assert code and re.search(last, "".join(found)), f"it ended with exit code {code} and {found}"
        return run

    return harm
