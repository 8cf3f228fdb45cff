"""``python -m spfde`` is the ``spfde`` command."""

from spfde.app import terminating


def main() -> None:
    """Entry point of both: a SIGTERM is answered before the command line itself is imported."""
    terminating.from_the_start()
    from spfde.app.cli import main as command

    command()


if __name__ == "__main__":
    main()
