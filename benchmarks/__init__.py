"""Compare trainers: this project, PyTorch's own ways of training data-parallel, and no communication at all.

`python -m benchmarks --help` says how to run them. Nothing else of the project imports this package.
"""

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("psutil") is None:  # psutil measures the processes
    print("error: the benchmarks need psutil, of the extra 'dev': run pip install -e '.[dev]' in a checkout.", file=sys.stderr)
    raise SystemExit(2)

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch.py"
#: The scripts that workers run.
SCRIPTS = ROOT / "benchmarks" / "scripts"
