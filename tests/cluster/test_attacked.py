"""A small cluster that strangers attack over real sockets while it trains."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import zmq

from common.runlog import Event, RunLogReader
from common.wire import PROTOCOL

ROOT = Path(__file__).parents[2]
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + b"\x00" + bytes(31)
READY = b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER"


def train(folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "launch.py"), "local", "--workers", "2", "--servers", "2", "--rounds", "100", "--lane",
               "socket", "--run-dir", str(folder), "--overwrite", *more]  # fmt: skip
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def summary(process: subprocess.Popen[str], folder: Path) -> dict[str, object]:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    found: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return found


def addresses(folder: Path) -> list[tuple[str, int]]:
    """Where the coordinator and the servers listen."""
    until, found = time.monotonic() + 60, []
    while time.monotonic() < until:
        logs = [folder / "logs" / f"{name}.log" for name in ("coordinator", "server-0", "server-1")]
        texts = [log.read_text() if log.exists() else "" for log in logs]
        found = [int(m[1]) for text in texts if (m := re.search(r"listening at tcp://[^\s]*:(\d+)", text))]
        if len(found) == 3 and "this is server-0" in texts[1] and "this is server-1" in texts[2]:
            return [("127.0.0.1", port) for port in found]
        time.sleep(0.05)
    raise AssertionError(f"only {found} listen")


def memory(pattern: str) -> int:
    """The largest resident size, in MiB, of processes with `pattern` in their command line."""
    sizes = [0]
    for status in Path("/proc").glob("[0-9]*/status"):
        with contextlib.suppress(OSError):
            if pattern in (status.parent / "cmdline").read_text().replace("\0", " "):
                found = re.search(r"VmRSS:\s+(\d+)", status.read_text())
                sizes.append(int(found[1]) >> 10 if found else 0)
    return max(sizes)


class Attack:
    def __init__(self, targets: list[tuple[str, int]]) -> None:
        self._targets = targets
        self._over = threading.Event()
        kinds = (self._storm, self._slow, self._endless, self._headers, self._web)
        self._threads = [threading.Thread(target=self._repeat, args=(kind,), daemon=True) for kind in kinds]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=10.0)

    def _repeat(self, kind: object) -> None:
        while not self._over.wait(0.02):
            for target in self._targets:
                with contextlib.suppress(OSError):
                    kind(target)  # type: ignore[operator]

    def _storm(self, target: tuple[str, int]) -> None:
        socks = [socket.create_connection(target, timeout=2.0) for _ in range(70)]
        for sock in socks:
            sock.close()
        time.sleep(0.3)

    def _slow(self, target: tuple[str, int]) -> None:
        with socket.create_connection(target, timeout=2.0) as sock:
            for byte in GREETING[:3]:
                sock.send(bytes([byte]))
                time.sleep(0.1)

    def _web(self, target: tuple[str, int]) -> None:
        with socket.create_connection(target, timeout=2.0) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + bytes(random.randrange(256) for _ in range(500)))
            time.sleep(0.1)

    def _endless(self, target: tuple[str, int]) -> None:
        """Frames that always say there is more."""
        frame = b"\x03" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)
        with socket.create_connection(target, timeout=2.0) as sock:
            sock.sendall(GREETING + READY)
            for _ in range(200):
                sock.sendall(frame)

    def _headers(self, target: tuple[str, int]) -> None:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        sock = context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(f"tcp://{target[0]}:{target[1]}")
        push = {"type": "Push", "round": 1, "lo": 0, "hi": 1, "samples": 16, "micro_batches": 1, "chunks": [0], "present": [1]}
        bodies = [
            {"type": "Goodbye", "reason": "x"},
            {"type": "Close", "round": 1, "ks": [0]},
            {"type": "Pull", "clock": 1},
            push,
        ]
        for body in bodies:
            for sender in ("worker-0", "coordinator", "server-0"):
                sock.send(msgspec.msgpack.encode([PROTOCOL, "", sender, 7, 0, body]))
        sock.send(b"\x91" * 100_000)
        sock.send_multipart([b"x"] * 5000)
        time.sleep(0.2)
        context.destroy(linger=0)


def test_an_attacked_run_gives_the_bits_of_an_undisturbed_one(tmp_path: Path) -> None:
    quiet = summary(train(tmp_path / "quiet"), tmp_path / "quiet")
    process = train(tmp_path / "loud")
    attack = Attack(addresses(tmp_path / "loud"))
    try:
        largest = 0
        while process.poll() is None:
            largest = max(largest, memory(str(tmp_path / "loud")), memory("launch.py server"))
            time.sleep(0.2)
    finally:
        attack.stop()
        if process.poll() is None:
            process.kill()
    loud = summary(process, tmp_path / "loud")
    assert loud["weights_sha256"] == quiet["weights_sha256"]
    assert (loud["samples"], loud["dropped"]) == (quiet["samples"], quiet["dropped"])
    refused = loud["refused"]
    assert isinstance(refused, dict)
    assert refused.keys() >= {"malformed", "oversized", "run", "flood"}
    assert largest < 1500  # MiB


def say_hello(address: tuple[str, int], incarnations: range) -> None:
    """As many processes that never say anything else."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    sock = context.socket(zmq.DEALER)
    sock.connect(f"tcp://{address[0]}:{address[1]}")
    for incarnation in incarnations:
        hello = {"type": "Hello", "role": "worker", "host": f"forged-{incarnation}", "pid": incarnation}
        sock.send(msgspec.msgpack.encode([PROTOCOL, "", "", incarnation, 0, hello]))
    context.destroy(linger=5000)


def test_two_thousand_who_only_say_hello_are_no_members_and_a_worker_joins_all_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train(folder, "--rounds", "1000000", "--silence", "4")
    worker = None
    try:
        coordinator, *_ = addresses(folder)

        def events(kind: str) -> list[Event]:
            with contextlib.closing(RunLogReader(folder / "events.sqlite")) as log:
                return [event for _, _, event in log.events() if event.kind == kind]

        def until(ready: Callable[[], object], what: str) -> None:
            deadline = time.monotonic() + 60
            while not ready():
                assert process.poll() is None and time.monotonic() < deadline, what
                time.sleep(0.1)

        until(lambda: events("plan"), "training")
        before = memory(f"coordinator --prepared --config {folder}")
        for batch in range(3):
            say_hello(coordinator, range(1000 + 700 * batch, 1000 + 700 * (batch + 1)))
            until(lambda batch=batch: len(events("joined")) >= 4 + 64 * (batch + 1), "strangers")  # type: ignore[misc]
            if batch < 2:
                until(lambda batch=batch: len(events("forgotten")) >= 64 * (batch + 1), "end of them")  # type: ignore[misc]
        command = [sys.executable, str(ROOT / "launch.py"), "worker", "--coordinator", "tcp://{}:{}".format(*coordinator)]
        worker = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        until(lambda: any(event.data["pid"] == worker.pid for event in events("joined")), "worker")  # type: ignore[union-attr]
        (name,) = {event.process for event in events("joined") if event.data["pid"] == worker.pid}

        def shares() -> bool:
            with contextlib.closing(RunLogReader(folder / "events.sqlite")) as log:
                return any(row.worker == name for row in log.contributions())

        until(shares, "contributions")
        assert len(events("joined")) == 5 + 3 * 64 and not events("lost")
        assert memory(f"coordinator --prepared --config {folder}") < before + 50  # MiB
    finally:
        for one in filter(None, (process, worker)):
            one.terminate()
            one.communicate(timeout=20)
