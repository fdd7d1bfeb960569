"""Starts and watches the processes of a run, and runs experiments. It knows servers and workers by their command lines only."""
