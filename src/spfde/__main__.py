"""``python -m spfde`` is the ``spfde`` command."""

import os

from spfde.app import terminating

SPINS = "1000"
"""How often a thread of OpenMP that waits looks before it sleeps: for some 20 microseconds, not for 3 ms."""


def main() -> None:
    """Entry point of both: a SIGTERM is answered before the command line itself is imported."""
    terminating.from_the_start()
    if "OMP_WAIT_POLICY" not in os.environ:
        # Read when PyTorch is loaded. Who spins holds a core that others stand in a queue for.
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    from spfde.app.cli import main as command

    command()


if __name__ == "__main__":
    main()
