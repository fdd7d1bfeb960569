"""Going on with a run that was stopped, has crashed or was to end early: what may be given anew, and what must be as it was."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.flags import Choice, choose
from common import snapshots
from common.errors import UsageError
from common.runfiles import SETTINGS_FILE
from common.settings import FIELDS

#: Settings that a run may go on with other values of: none changes what a round computes.
_OF_DATA = frozenset({"workers", "servers", "epochs", "rounds", "lane", "loader_workers"})
_OF_FAULTS = frozenset(
    {
        "replicas",
        "kv_memory",
        "snapshot_every",
        "snapshots_kept",
        "silence",
        "timeout",
        "worker_failures",
        "start_timeout",
        "away",
        "watchdog",
    }
)
_FREE = _OF_DATA | _OF_FAULTS


def resumed(
    folder: Path, flags: Mapping[str, Any], script: str | None, args: tuple[str, ...], accept_versions: bool = False
) -> Choice:
    """The settings of the run in `folder`, with `flags` instead of some.

    Raises UsageError where they would make another run of it, or there is no snapshot to go on from; or where the newest is of
    another version of this program or of torch, unless `accept_versions`.
    """
    config = str(folder / SETTINGS_FILE)
    before = choose({}, config)
    now = choose(flags, config, script, args)
    for key in FIELDS:
        old, new = getattr(before.settings, key), getattr(now.settings, key)
        if old != new and key not in _FREE:
            raise UsageError(
                f"the run in {folder} has {key} = {old} and cannot go on with {new}: leave --{key.replace('_', '-')} out, or "
                "begin a new run."
            )
    if (script is not None or args) and (before.script, before.args) != (now.script, now.args):
        told = " ".join([before.script or "the built-in example", *before.args])
        raise UsageError(f"the run in {folder} is one of {told}: leave the script and its arguments out, or begin a new run.")
    found, problems = snapshots.newest(folder)
    if found is None:
        why = " ".join(problems) or "it ended before its first, or had --snapshot-every 0."
        raise UsageError(f"the run in {folder} has no snapshot to go on from: {why}")
    snapshots.check_versions(found, accept_versions)
    return replace(now, run_dir=folder)
