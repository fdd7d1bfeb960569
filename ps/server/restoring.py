"""Makes a server's state machine without a process, and checks that shards can be restored from a checkpoint."""

from __future__ import annotations

from roundtable.common.config.settings import Settings, make_settings
from roundtable.common.policies import load
from roundtable.common.protocol.messages.session import Refused
from roundtable.common.storage.checkpoint import Checkpoint
from roundtable.ps.server.shard_host import ShardHost
from roundtable.ps.shard.checkpoint_writer import Source, open_source
from roundtable.ps.shard.context import ShardContext


def make_host(index: int, settings: Settings, source: Source | None = None, returns: bool = False) -> ShardHost:
    """Return the state machine of server `index`. The arguments are those of `ShardHost`."""
    return ShardHost(ShardContext(index, settings, load(settings)), source, returns)


def hindrance(checkpoint: Checkpoint) -> str:
    """Try to restore each server's shard as servers do. Return a sentence that says what fails, or '' if nothing does."""
    manifest, run_dir = checkpoint.manifest, checkpoint.folder.parent.parent
    try:
        settings = make_settings({**manifest.settings, "transport": "tcp"}, str(checkpoint.folder))
        for index in range(manifest.servers):
            host = make_host(index, settings, open_source(run_dir, manifest.round))
            for answer in host.handle("worker-0", manifest.setup, (), 0.0):
                if isinstance(answer.body, Refused):
                    return f"{checkpoint.folder} does not restore server-{index}: {answer.body.reason}"
    except Exception as error:  # any error of reading the files, or of torch
        return f"{checkpoint.folder} cannot be restored: {' '.join(str(error).split()).rstrip('.')}."
    return ""
