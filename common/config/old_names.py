"""Names that settings had in the release before. Flags and files understand them for one more release."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from roundtable.common.runtime.errors import UsageError

#: The name of today by the name of before.
OLD_NAMES: Mapping[str, str] = {
    "lane": "transport",
    "push_codec": "compress_gradients",
    "weight_codec": "compress_weights",
    "codec_ratio": "topk_ratio",
    "snapshot_every": "checkpoint_every",
    "snapshots_kept": "keep_checkpoints",
    "staleness": "max_staleness",
    "backup": "backup_micro_batches",
    "merge": "average_weights_by",
    "watchdog": "stack_dump_after",
    "silence": "heartbeat_timeout",
    "timeout": "progress_timeout",
    "away": "coordinator_timeout",
    "loader_workers": "num_data_workers",
    "devices": "column_devices",
    "respawn": "max_restarts",
    "respawn_backoff": "restart_delay",
    "accept_versions": "allow_version_mismatch",
    "bind": "listen",
}
#: Settings that are gone, and the values by which runs of the release before went without them: their files still open.
_REMOVED: Mapping[str, Any] = {"codec_momentum": 0.0}
_OLD_VALUES: Mapping[tuple[str, str], str] = {("lane", "socket"): "tcp"}


def new_value(old_name: str, value: Any) -> Any:
    """Return the value of today for a value that was given by an old name."""
    if isinstance(value, list):
        return [new_value(old_name, one) for one in value]
    return _OLD_VALUES.get((old_name, value), value) if isinstance(value, str) else value


def with_new_names(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return `values` by the names of today, with underscores. Raises UsageError if a setting is there by two names."""
    found: dict[str, tuple[str, Any]] = {}
    for given, value in values.items():
        old = given.replace("-", "_")
        if old in _REMOVED and value == _REMOVED[old]:
            continue
        name = OLD_NAMES.get(old, old)
        if name in found:
            raise UsageError(f"{where}: {found[name][0]} and {given} are one setting; give it once, as {name}.")
        found[name] = given, new_value(old, value)
    return {name: value for name, (_, value) in found.items()}
