"""Print what pyproject.toml needs, with the extras named in the first argument: the layer that an image caches."""

import re
import sys
import tomllib
from pathlib import Path


def requirements(text: str, extras: list[str]) -> list[str]:
    """The dependencies of a pyproject.toml and of some of its extras, those that name other extras of it resolved.

    Raises:
        SystemExit: an extra that is not there.
    """
    project = tomllib.loads(text)["project"]
    known = project.get("optional-dependencies", {})
    found, left = list(project["dependencies"]), list(extras)
    while left:
        extra = left.pop(0)
        if extra not in known:
            raise SystemExit(f"there is no extra {extra!r}; there are {', '.join(known)}")
        for line in known[extra]:
            own = re.fullmatch(rf"{project['name']}\[(.*)\]", line)
            if own:
                left += own[1].split(",")
            else:
                found.append(line)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    wanted = [name for name in "".join(sys.argv[1:2]).split(",") if name]
    print("\n".join(requirements(Path("pyproject.toml").read_text(), wanted)))
