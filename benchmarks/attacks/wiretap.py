"""Changes at the sockets of a run's processes: messages are recorded for a replay, or are sent twice and out of order.

Each is done by a module in a folder of PYTHONPATH. It wraps the method that sends messages, and is active while a certain file is
in that folder.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec

from benchmarks.attacks.target import Target, say

_FLAG = "now"
#: The file that exists once a message has gone twice or late.
_DID = "did"
#: The most messages that each process records.
_MOST = 200
_LENGTH = struct.Struct(">Q")
_BEGIN = """import os, random, struct
import msgspec, zmq
send, folder, flag = zmq.Socket.send_multipart, {folder!r}, {flag!r}
"""
#: Makes each process record its messages and their addresses, in a file of its own.
_TAP = """written = {{}}
def tapped(self, parts, *args, **more):
    number = written.get(os.getpid(), 0)
    if self.type == zmq.DEALER and number < {most} and os.path.exists(flag):
        written[os.getpid()] = number + 1
        data = msgspec.msgpack.encode([self.last_endpoint.decode().rstrip("\\0"), [bytes(part) for part in parts]])
        with open(os.path.join(folder, str(os.getpid()) + ".sent"), "ab") as file:
            file.write(struct.pack(">Q", len(data)) + data)
    return send(self, parts, *args, **more)
zmq.Socket.send_multipart = tapped
"""
#: Makes a fifth of all messages go after later ones, and another fifth twice.
_UNRULY = """held = {{}}
def unruly(self, parts, *args, **more):
    late, chance = held.setdefault((os.getpid(), id(self)), []), random.random()
    is_on = self.type in (zmq.DEALER, zmq.ROUTER) and os.path.exists(flag)
    if is_on and chance < 0.2:
        late.append([bytes(part) for part in parts])
        return None
    after = [[bytes(part) for part in parts]] if is_on and chance < 0.4 else []
    sent = send(self, parts, *args, **more)
    if late and (not is_on or random.random() < 0.5):
        after, late[:] = after + late, []
    for message in after:
        open(os.path.join(folder, {did!r}), "ab").close()
        try:
            send(self, message, zmq.NOBLOCK)
        except zmq.ZMQError:
            pass  # the recipient is gone
    return sent
zmq.Socket.send_multipart = unruly
"""


class Wire:
    """The sockets of processes that are started with `env`."""

    def __init__(self, folder: Path, is_unruly: bool = False) -> None:
        """Make `folder`, which has the module. While it is `on`, messages are recorded, or if `is_unruly`, disordered."""
        folder.mkdir(parents=True)
        self._folder = folder
        self._flag = folder / _FLAG
        text = (_BEGIN + (_UNRULY if is_unruly else _TAP)).format(folder=str(folder), flag=str(self._flag), most=_MOST, did=_DID)
        (folder / "sitecustomize.py").write_text(text, encoding="utf-8")
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        self.env = {"PYTHONPATH": path}

    def on(self) -> None:
        self._flag.touch()

    def off(self) -> None:
        self._flag.unlink()

    @property
    def was_unruly(self) -> bool:
        """Return whether a message has gone twice or late."""
        return (self._folder / _DID).exists()

    def heard(self) -> list[tuple[str, list[bytes]]]:
        """Return the recorded messages, by process and in order: the address, and header and frames."""
        return [message for file in sorted(self._folder.glob("*.sent")) for message in _read(file)]


def replay(messages: Sequence[tuple[str, list[bytes]]], where: Sequence[Target] = ()) -> None:
    """Send messages once more: to the targets `where`, or if there are none, to the addresses that they went to."""
    addresses = [target.address for target in where] or sorted({address for address, _ in messages})
    for address in addresses:
        say(address, [parts for to, parts in messages if where or to == address])


def _read(file: Path) -> list[tuple[str, list[bytes]]]:
    found, data, at = [], file.read_bytes(), 0
    while at + _LENGTH.size <= len(data):
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size + length
        if at <= len(data):  # else the process was killed in the middle of a record
            found.append(msgspec.msgpack.decode(data[at - length : at], type=tuple[str, list[bytes]]))
    return found
