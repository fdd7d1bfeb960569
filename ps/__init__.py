"""The server and the coordinator: the processes that keep the state of a run."""
