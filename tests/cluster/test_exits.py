"""A process that leaves at once leaves nothing undone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import atexit, ctypes, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from roundtable.cluster.run.exit_codes import leave

class Told:
    def __init__(self):
        self.itself, self.file = self, open("cycle", "w")

module = ModuleType("of_the_script")
module.file = open("open", "w")
module.file.write("in a buffer")
sys.modules["of_the_script"] = module
told = Told()
told.file.write("in a cycle")
del told
ctypes.CDLL(None).printf(b"by C\\n")
print("by Python", file=sys.stderr)
atexit.register(Path("atexit").write_text, "called")
threading.Thread(target=lambda: (time.sleep(0.2), Path("thread").write_text("waited for"))).start()
ThreadPoolExecutor().submit(lambda: (time.sleep(0.1), Path("pool").write_text("waited for")))
leave(7)
"""


def test_what_was_begun_is_ended_and_what_was_written_is_in_its_file(tmp_path: Path) -> None:
    env = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (7, "by C\n", "by Python\n")
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files == {
        "open": "in a buffer", "cycle": "in a cycle", "atexit": "called", "thread": "waited for", "pool": "waited for",
    }  # fmt: skip
