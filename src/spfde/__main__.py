"""``python -m spfde`` is the ``spfde`` command."""

from spfde.app.cli import main

main()
