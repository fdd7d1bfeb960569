"""Stands for launch.py where a test is about starting and watching: processes that need no torch and do as they are told.

`stub_program.py local RUN_DIR` is a launcher whose children are stubs too. STUB_<NAME> says what the child NAME does once it
runs: pause, as all do by default; finish; await FILE: finish once that is there; seed: finish if the run's seed is 0, else exit
with it; exit N; fail TEXT; stubborn: ignore signals, having started two others that ignore them too, one of them in a session of
its own. STUB_READY names a FIFO that each writes a line to by then; STUB_RESTARTS says how often one is started again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from roundtable.cluster.process.parent_death import PARENT_VARIABLE, die_with_parent

DEAF = "import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; print(flush=True); signal.pause()"


def main() -> int:
    if sys.argv[1] == "local":
        return launcher(Path(sys.argv[2]))
    die_with_parent(int(os.environ.pop(PARENT_VARIABLE)))
    return child(sys.argv[1])


def launcher(folder: Path) -> int:
    import click
    from rich.console import Console

    from roundtable.cluster.launch.local import LaunchSpec, run_local
    from roundtable.cluster.process.restart_policy import RestartPolicy
    from roundtable.cluster.run.console import Screen
    from roundtable.cluster.run.exit_codes import run_command
    from roundtable.common.config.settings import Settings

    @click.command()
    def local() -> None:
        restart_policy = RestartPolicy(int(os.environ.get("STUB_RESTARTS", 0)), 0.05)
        order = LaunchSpec(Settings(workers=2, servers=1), folder, restart_policy=restart_policy, modules=("json",))
        run_local(order, [sys.executable, __file__], os.environ, Screen(Console(), folder / "events.sqlite"))

    return run_command(local, [], "stub")


def child(role: str) -> int:
    name = role if role == "coordinator" else f"{role}-{argument('--index') if '--index' in sys.argv else 'any'}"
    action, _, rest = os.environ.get(f"STUB_{name.upper().replace('-', '_')}", "pause").partition(" ")
    if action == "stubborn":
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        for own_session in (False, True):
            deaf = subprocess.Popen([sys.executable, "-c", DEAF], stdout=subprocess.PIPE, start_new_session=own_session)
            assert deaf.stdout is not None
            deaf.stdout.readline()
    if role == "coordinator":
        folder = Path(argument("--run-dir"))
        if action == "seed":
            seed = tomllib.loads(Path(argument("--config")).read_text())["seed"]
            action, rest = ("exit", str(seed)) if seed else ("finish", "")
        (folder / "events.sqlite").touch()
        if action in ("finish", "await"):
            (folder / "summary.json").write_text(json.dumps({"rounds": 3, "samples": 30, "seconds": 1.0}))
        (folder / "address.tmp").write_text("tcp://127.0.0.1:1\n")
        (folder / "address.tmp").rename(folder / "address")
    if "STUB_READY" in os.environ:
        with Path(os.environ["STUB_READY"]).open("w") as ready:
            ready.write(f"{name} {os.getpid()}\n")
    while action == "await" and not Path(rest).exists():
        time.sleep(0.02)
    if action in ("pause", "stubborn"):
        while True:
            signal.pause()
    if action == "fail":
        print(f"error: {rest}")
    return {"finish": 0, "await": 0, "fail": 1}.get(action, int(rest or 0) if action == "exit" else 1)


def argument(flag: str) -> str:
    return sys.argv[sys.argv.index(flag) + 1]


if __name__ == "__main__":
    sys.exit(main())
