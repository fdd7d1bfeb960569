"""Making a server's shard, and trying whether shards can be made from a snapshot."""

from __future__ import annotations

from roundtable.common.config.settings import Settings, make_settings
from roundtable.common.policies import load
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.storage.checkpoint import Snapshot
from roundtable.ps.server.async_shard import AsyncShard
from roundtable.ps.server.checkpoint_writer import Source, open_source
from roundtable.ps.server.shard import Shard
from roundtable.ps.server.sync_shard import SyncShard


def make_shard(index: int, settings: Settings, source: Source | None = None) -> Shard:
    """Make the shard of server `index`; it goes on from `source` once it is set up."""
    policy = load(settings)
    kind = SyncShard if policy.applies == "round" else AsyncShard
    return kind(index, settings, policy, source)


def hindrance(snapshot: Snapshot) -> str:
    """Restore one server's shard after the other, as servers do. Returns what hinders that, in a sentence; '' if nothing does."""
    manifest, run_dir = snapshot.manifest, snapshot.folder.parent.parent
    try:
        settings = make_settings({**manifest.settings, "transport": "tcp"}, str(snapshot.folder))
        for index in range(manifest.servers):
            shard = make_shard(index, settings, open_source(run_dir, manifest.round))
            for answer in shard.handle("worker-0", manifest.setup, (), 0.0):
                if isinstance(answer.body, Refused):
                    return f"{snapshot.folder} does not restore server-{index}: {answer.body.reason}"
    except Exception as error:  # whatever reading or torch objects to
        return f"{snapshot.folder} cannot be restored: {' '.join(str(error).split()).rstrip('.')}."
    return ""
