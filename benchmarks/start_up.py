"""How fast do the command and the library start?

Fresh processes, interleaved: ``spfde --help`` against ``python -c "import torch"``, and ``import torch`` with and
without ``import spfde``. The package loads its parts when they are first used, so ``spfde.attach`` and ``spfde.Recipe``
are touched as well. Targets: the help at most 0.6x of importing torch; the library adds at most 25 % to it.

    python benchmarks/start_up.py                   # about 3 minutes on two cores
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from _common import Figure, Result, Table, begin, compare, interleave, parser, publish

TORCH = "import torch"
LIBRARY = "import torch, spfde; spfde.attach; spfde.Recipe"


def command() -> list[str]:
    """The installed ``spfde``, the one of this interpreter first."""
    beside = Path(sys.executable).with_name("spfde")
    found = str(beside) if beside.exists() else shutil.which("spfde")
    return [found] if found else [sys.executable, "-m", "spfde"]


def process(*arguments: str) -> Callable[[], object]:
    """A call that runs a command to its end, and fails when it does."""
    return lambda: subprocess.run(arguments, check=True, stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=None, help="rounds of one start of each (25)")
    options = made.parse_args(argv)
    stamped = begin(options)
    rounds = options.rounds or (2 if options.quick else 25)
    python = sys.executable
    timings = interleave(
        {
            "spfde --help": process(*command(), "--help"),
            "import torch": process(python, "-c", TORCH),
            "import torch and spfde": process(python, "-c", LIBRARY),
            "python": process(python, "-c", "pass"),
        },
        rounds,
    )
    base = timings["import torch"]
    publish(
        Result(
            name="start_up",
            title="Start-up",
            question="How long does `spfde --help` take against importing PyTorch, and what does `import spfde` add?",
            command="python benchmarks/start_up.py",
            figures=(
                Figure.of(
                    "`spfde --help` over `import torch`",
                    compare(timings["spfde --help"], base),
                    high=0.6,
                    headline=True,
                ),
                Figure.of(
                    "`import torch` and `spfde` over `import torch`",
                    compare(timings["import torch and spfde"], base),
                    high=1.25,
                    headline=True,
                ),
            ),
            tables=(Table.of_timings("Each process", "process", timings),),
            settings={"rounds": rounds, "library": f"`{LIBRARY}`"},
            stamp=stamped,
        ),
        options,
    )


if __name__ == "__main__":
    main()
