"""Starting and watching the processes of a run, and experiments over many runs. Knows the others by command line only."""
