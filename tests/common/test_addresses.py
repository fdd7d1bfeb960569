"""The address that a process tells others, and waiting for names."""

from __future__ import annotations

import logging
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from roundtable.common.network import addresses
from roundtable.common.network.addresses import (
    advertised,
    await_route,
    is_loopback,
    join,
    needs_ipv6,
    outward,
    split,
    to_advertise,
)
from roundtable.common.runtime.errors import ClusterError, UsageError

ROOT = Path(__file__).parents[2]
BOUND = "tcp://[::]:4242"


@pytest.mark.parametrize(("host", "port"), [("10.0.0.1", 5), ("fd77::2", 65535), ("some_host", 1)])
def test_an_address_is_taken_apart_as_it_was_put_together(host: str, port: int) -> None:
    assert split(join(host, port)) == (host, port)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("a_host", "tcp://a_host:4242"),
        ("10.0.0.1:7", "tcp://10.0.0.1:7"),
        ("tcp://h:65535", "tcp://h:65535"),
        ("fd77::2", "tcp://[fd77::2]:4242"),
        ("[fd77::2]:7", "tcp://[fd77::2]:7"),
    ],
)
def test_what_is_advertised_has_the_port_of_the_listener_if_it_names_none(text: str, address: str) -> None:
    assert to_advertise(text, BOUND) == address


@pytest.mark.parametrize("text", ["", "*", "0.0.0.0", "tcp://[::]:5", "a:0", "a:65536", "a b", "http://x:1", "a:b", "a:1:2"])
def test_what_nobody_can_connect_to_is_not_advertised(text: str) -> None:
    with pytest.raises(UsageError, match=r"is no address that others could reach"):
        to_advertise(text, BOUND)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("tcp://127.3.2.1:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True),
        ("tcp://10.0.0.1:1", False),
        ("tcp://h:1", False),
    ],
)
def test_loopback_addresses_are_known(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def test_a_loopback_address_is_told_to_nobody_by_a_listener_on_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_by_default_route", lambda: iter(["127.0.0.1"]))
    monkeypatch.setattr(addresses, "_of_interfaces", lambda: iter(["127.0.0.1", "10.9.8.7"]))
    for coordinator in ("tcp://127.0.0.1:5555", "tcp://[::1]:5555", "tcp://localhost:5555"):
        assert advertised(BOUND, coordinator) == "tcp://10.9.8.7:4242"
    assert advertised("tcp://127.0.0.1:7", "tcp://10.0.0.1:1") == "tcp://127.0.0.1:7"  # as it was told to listen
    monkeypatch.setattr(addresses, "_of_interfaces", lambda: iter(["127.0.0.1"]))
    assert advertised(BOUND, "tcp://127.0.0.1:5555") == "tcp://127.0.0.1:4242"  # there is no other


def test_an_interface_without_a_default_route_is_found() -> None:
    script = (
        "ip link set lo up && ip link add v0 type veth peer name v1 && ip addr add 10.97.0.1/24 dev v0 && ip link set v0 up && "
        f"ip link set v1 up && {sys.executable} -c 'from roundtable.common.network.addresses import outward; print(outward())'"
    )
    done = subprocess.run(["unshare", "--net", "sh", "-c", script], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no network can be made here: {done.stderr.strip()}")
    assert done.stdout.split() == ["10.97.0.1"]
    alone = "ip link set lo up && " + script.rpartition(" && ")[2]
    assert subprocess.run(["unshare", "--net", "sh", "-c", alone], cwd=ROOT, capture_output=True, text=True).stdout == "None\n"


def test_who_has_an_ipv4_address_is_connected_to_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"both": [socket.AF_INET6, socket.AF_INET], "six": [socket.AF_INET6], "none": []}
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda host, *_, **__: [(family,) for family in found[host]])
    assert [needs_ipv6(f"tcp://{name}:1") for name in found] == [False, True, False]
    assert needs_ipv6("tcp://[fd77::2]:1") and not needs_ipv6("tcp://10.0.0.1:1")


def test_a_name_that_does_not_resolve_yet_is_waited_for_and_told_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, answers = [0.0], ["not known"] * 25
    monkeypatch.setattr(addresses.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(addresses, "_problem", lambda address: answers.pop() if answers else "")
    with caplog.at_level(logging.WARNING):
        await_route("tcp://later:5555", 60.0, lambda s: clock.__setitem__(0, clock[0] + s))
    assert clock[0] == 25.0 and len(caplog.records) == 2


def test_a_name_that_never_resolves_is_given_up_with_its_name_and_host() -> None:
    with pytest.raises(ClusterError) as caught:
        await_route("tcp://no_such_host.invalid:5555", 0.0)
    start = f"the coordinator's address tcp://no_such_host.invalid:5555 cannot be resolved on {socket.gethostname()}: "
    assert str(caught.value).startswith(start) and "--start-timeout" in str(caught.value)


def test_this_host_has_an_address_that_is_no_loopback_one_or_none() -> None:
    found = outward()
    assert found is None or not is_loopback(join(found, 1))
