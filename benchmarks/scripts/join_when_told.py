"""A worker of the built-in example that imports its modules, and joins once a file tells it to.

Its arguments are `FOLDER NUMBER`. It makes FOLDER/ready-NUMBER when it could join, and waits for FOLDER/go-NUMBER.
"""

import sys
import time
from pathlib import Path

from roundtable.worker.tools import builtin_script

if __name__ == "__main__":
    folder, number = Path(sys.argv[1]), sys.argv[2]
    (folder / f"ready-{number}").touch()
    while not (folder / f"go-{number}").exists():
        time.sleep(0.005)
    builtin_script.main()
