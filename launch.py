"""The command `roundtable`, to be called in a checkout: `python launch.py --help`."""

from roundtable.cli import main
from roundtable.cluster.run.exit_codes import leave

if __name__ == "__main__":
    leave(main())
