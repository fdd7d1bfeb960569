"""Attacks of strangers on listening processes, for the fault matrix and tests.

An item is done once to one process, or again and again to all processes of a run while `attacking`. All targets are processes on
this machine that a test has started. Every attack is bounded in count and time. docs/security.md has the table.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.attacks import connections, frames, headers
from benchmarks.attacks.target import AGAIN_S, ENDS_S, Target
from roundtable.common.protocol.transport import allow_files


@dataclass(frozen=True)
class Item:
    """An attack, and the kinds (`common/protocol/rejections.py`) under which refusals must be counted."""

    act: Callable[[Target], None]
    refused: Collection[str] = ()


ITEMS: Mapping[str, Item] = {
    "truncated frames": Item(frames.truncated, ("malformed",)),
    "garbage": Item(frames.garbage, ("malformed",)),
    "oversized frames": Item(frames.oversized, ("oversized",)),
    "endless frames": Item(frames.endless, ("flood",)),
    "gradients of another size or type": Item(frames.misshapen, ("sender",)),
    "unknown senders": Item(headers.unknown_senders, ("sender",)),
    "unknown rounds and chunks": Item(headers.unknown_rounds, ("sender",)),
    "another run's id": Item(headers.another_run, ("run",)),
    "another version of the protocol": Item(headers.another_protocol, ("protocol",)),
    "HTTP requests": Item(connections.web),
    "port scans": Item(connections.scan),
    "slow peers": Item(connections.slow, ("sender",)),
    "handshakes that are never finished": Item(connections.half_open),
    "peers that vanish without a word": Item(connections.vanishing),
    f"a storm of {connections.STORM} connections": Item(connections.storm, ("sender",)),
    "a message of three million frames": Item(frames.empty_frames, ("flood",)),
    "headers that take long to decode": Item(headers.colliding, ("malformed", "oversized", "sender")),
    "names that were made up": Item(headers.made_up_names, ("sender",)),
    "connections with the next one's name": Item(connections.chosen_names),
    f"{2 * connections.STORM} connections that say nothing": Item(connections.idle),
}


@contextlib.contextmanager
def attacking(items: Sequence[Item], where: Sequence[Target]) -> Iterator[None]:
    """Do items again and again, each in a thread of its own for each target."""
    allow_files(4 * connections.STORM * len(where))
    over = threading.Event()

    def repeat(item: Item, target: Target) -> None:
        while not over.wait(AGAIN_S):
            with contextlib.suppress(OSError):  # the target refuses the connection, or has shut it
                item.act(target)

    pairs = [(item, target) for item in items for target in where]
    threads = [threading.Thread(target=repeat, args=pair, daemon=True) for pair in pairs]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(timeout=ENDS_S)
