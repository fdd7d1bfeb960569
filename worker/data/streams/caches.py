"""Files that keep what was found out about shards. Several workers may write one at the same time."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

from roundtable.common.runtime.errors import UsageError


def read_cache(path: Path) -> dict[str, Any]:
    """Return what a JSON file has; an empty dict if there is no file. Raises UsageError if it is no JSON object."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"the cache {path} cannot be read ({error}): delete it, and the shards are counted again.") from None
    if not isinstance(found, dict):
        raise UsageError(f"the cache {path} is not one of a stream: pass another path.")
    return found


def write_cache(path: Path, found: dict[str, Any]) -> None:
    """Write a JSON file. A reader sees the old contents or the new ones. Raises UsageError if it cannot be written."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(found), encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"the cache {path} cannot be written ({error}): pass the path of a file that can.") from None
