"""Prints the part of requirements.lock that some packages need, hashes and all: `locked.py NAME...`; without names, what
the service needs, which is pyproject's dependencies and, of its extras, those that are given as `[EXTRA]`.

The lock's own `# via` comments say who wants whom. So there is one lock, an image gets exactly its versions and hashes,
and nothing is resolved again. A package that is wanted only through an extra of another is taken too, as `via` does not
tell: rather one too many than one too few.
"""

import re
import sys
import tomllib
from pathlib import Path

LOCK, PROJECT = Path("requirements.lock"), Path("pyproject.toml")
_ENTRY = re.compile(r"^(?P<name>[a-z0-9-]+)==.*\n(?:[ ]+--hash=.*\n)+[ ]+# via (?P<via>.*)\n", re.MULTILINE)


def main() -> None:
    text = LOCK.read_text()
    entries = list(_ENTRY.finditer(text))  # a name may have several, for different platforms
    if "".join(entry[0] for entry in entries) != text:
        sys.exit(f"{LOCK} is not as `make lock` writes it: each package with its hashes and a `# via` comment.")
    wanted = {_name(requirement) for requirement in _requirements(sys.argv[1:])}
    if unknown := wanted - {entry["name"] for entry in entries}:
        sys.exit(f"{LOCK} has no {', '.join(sorted(unknown))}: run `make lock`.")
    while more := {entry["name"] for entry in entries if wanted.intersection(entry["via"].split(", "))} - wanted:
        wanted |= more
    print("".join(entry[0] for entry in entries if entry["name"] in wanted), end="")


def _requirements(given: list[str]) -> list[str]:
    extras = [name.strip("[]") for name in given if name.startswith("[")]
    if given and not extras:
        return given
    project = tomllib.loads(PROJECT.read_text())["project"]
    return [*project["dependencies"], *(r for extra in extras for r in project["optional-dependencies"][extra])]


def _name(requirement: str) -> str:
    """As the lock spells it: without extras and versions."""
    return re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", requirement.strip(), maxsplit=1)[0]).lower()


if __name__ == "__main__":
    main()
