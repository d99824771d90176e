"""Print the dependencies in pyproject.toml, with the extras in the first argument, for a cached layer of the image."""

import re
import sys
import tomllib
from pathlib import Path


def requirements(text: str, extras: list[str]) -> list[str]:
    """Return the dependencies of a pyproject.toml and of some of its extras. Extras may name other extras.

    Raises:
        SystemExit: an extra does not exist.
    """
    project = tomllib.loads(text)["project"]
    known = project.get("optional-dependencies", {})
    lines, pending = list(project["dependencies"]), list(extras)
    while pending:
        extra = pending.pop(0)
        if extra not in known:
            raise SystemExit(f"there is no extra {extra!r}; there are {', '.join(known)}")
        for line in known[extra]:
            reference = re.fullmatch(rf"{project['name']}\[(.*)\]", line)
            if reference:
                pending += reference[1].split(",")
            else:
                lines.append(line)
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    extras = [name for name in "".join(sys.argv[1:2]).split(",") if name]
    print("\n".join(requirements(Path("pyproject.toml").read_text(), extras)))
