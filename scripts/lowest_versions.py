"""Print the lowest versions that pyproject.toml allows, one ``name==version`` a line, as constraints for pip.

Usage: python scripts/lowest_versions.py [PYPROJECT]    (by default the one of the repository that holds this script)

Extras count as well. Exits 1 and names the requirement when one has no ``>=``: nobody knows then what is the lowest.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*(?:>=\s*(?P<version>[0-9][0-9A-Za-z.]*))?")


def lowest(project: dict[str, Any]) -> list[str]:
    """Pins of what the table ``[project]`` of a pyproject.toml requires, sorted.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    groups = [project.get("dependencies", []), *project.get("optional-dependencies", {}).values()]
    pins = set()
    for requirement in (requirement for group in groups for requirement in group):
        found = _REQUIREMENT.match(requirement)
        if found is None or (found["version"] is None and found["name"] != project["name"]):
            raise ValueError(f"{requirement!r} has no lower bound: write name>=version")
        if found["name"] != project["name"]:
            pins.add(f"{found['name']}=={found['version']}")
    return sorted(pins)


def main(arguments: list[str]) -> int:
    path = Path(arguments[0]) if arguments else Path(__file__).parents[1] / "pyproject.toml"
    try:
        print("\n".join(lowest(tomllib.loads(path.read_text())["project"])))
    except ValueError as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
