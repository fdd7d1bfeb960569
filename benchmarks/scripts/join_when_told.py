"""A worker of the built-in example that has imported all that it needs, and joins once a file says so: `FOLDER NUMBER` are its
arguments, FOLDER/ready-NUMBER is made when it could, and FOLDER/go-NUMBER awaited."""

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
