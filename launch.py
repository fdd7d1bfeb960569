"""The command `roundtable`, to be called in a checkout: `python launch.py --help`."""

from roundtable.cli import leave, main

if __name__ == "__main__":
    leave(main())
