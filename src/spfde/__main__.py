"""``python -m spfde`` is the ``spfde`` command."""

import os

from spfde.app import terminating

SPINS = "1000"
"""How often a thread that waits for others looks before it sleeps: some 20 microseconds, where OpenMP takes 3 ms."""


def main() -> None:
    """Entry point of both: a SIGTERM is answered before the command line itself is imported."""
    terminating.from_the_start()
    if "OMP_WAIT_POLICY" not in os.environ:
        # PyTorch's OpenMP reads it when it is loaded. Who spins holds a core that others stand in a queue for.
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from spfde.app.cli import main as command

    command()


if __name__ == "__main__":
    main()
