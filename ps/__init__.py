"""Server and coordinator: the processes that hold what matters."""
