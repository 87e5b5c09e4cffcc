"""One run in several processes; see :mod:`agents.parallel.processes`."""
