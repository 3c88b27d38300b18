"""Stands for Cloud Run's `sandbox` program, with the command line that is documented of it and nothing else.

`sandbox do [--write] [--allow-egress] [--env K=V]… [--mount type=bind,source=…,destination=…[,readonly]]… -- COMMAND`,
carried out by bubblewrap: no environment, no network, the machine's file system read-only. It ends with 0 if the command
did, and with 1 whatever else happened. It is not the parent of what it starts, which is out of sight and outlives it, as
people say of the real one. What that does beyond is not known here. A file `leaks` beside the installed program makes it let
something through, a word a line: `environment`, `network`, `mounts`.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from app.runner.bubblewrap import binary

PROGRAM = "sandbox"
LEAKS = "leaks"


def install(folder: Path, *leaks: str) -> Path:
    """Puts the program into a folder for PATH."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / PROGRAM
    root = Path(__file__).parents[2]
    path, python = shlex.quote(str(root)), shlex.quote(sys.executable)
    program.write_text(f'#!/bin/sh\nPYTHONPATH={path} exec {python} -m {__name__} "$0" "$@"\n')
    program.chmod(0o755)
    (folder / LEAKS).write_text("\n".join(leaks))
    return program


def bubblewrap(arguments: list[str], leaks: list[str]) -> list[str]:
    """Raises ValueError for what is not documented."""
    if arguments[:1] != ["do"] or "--" not in arguments:
        raise ValueError("usage: sandbox do [OPTIONS] -- COMMAND")
    split = arguments.index("--")
    options, command = arguments[1:split], arguments[split + 1 :]
    given = [
        binary(),
        "--unshare-user",
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--new-session",
    ]
    given += ["--tmpfs", "/"]
    for entry in (*sorted(Path("/").iterdir()), *sorted(Path("/opt").iterdir())):
        if entry.name in ("proc", "dev", "opt"):
            continue  # /opt as in the image, with an empty /opt/pytest to mount at
        how = ["--symlink", str(entry.readlink())] if entry.is_symlink() else ["--ro-bind", str(entry)]
        given += [*how, str(entry)]
    given += ["--proc", "/proc", "--dev", "/dev"]
    given += [] if "environment" in leaks else ["--clearenv"]
    shared = "network" in leaks
    while options:
        match options:
            case ["--write", *options]:
                raise ValueError("--write is not stood for here")
            case ["--allow-egress", *options]:
                shared = True
            case ["--env" | "-e", pair, *options] if "=" in pair:
                given += ["--setenv", *pair.split("=", 1)]
            case ["--mount", mount, *options]:
                given += [] if "mounts" in leaks and mount.endswith("readonly") else bind(mount)
            case _:
                raise ValueError(f"unknown option {options[0]!r}")
    return [*given, *([] if shared else ["--unshare-net"]), "--", *command]


def bind(mount: str) -> list[str]:
    kind, source, destination, *how = mount.split(",")
    if kind != "type=bind" or how not in ([], ["readonly"]):
        raise ValueError(f"wrong mount {mount!r}")
    paths = [source.removeprefix("source="), destination.removeprefix("destination=")]
    return ["--ro-bind" if how else "--bind", *paths]


def main() -> None:
    program, arguments = Path(sys.argv[1]), sys.argv[2:]
    leaks = (program.parent / LEAKS).read_text().split()
    try:
        command = bubblewrap(arguments, leaks)
    except ValueError as error:
        sys.exit(f"sandbox: {error}")
    ended, tell = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            # its own environment could be read as /proc/1/environ
            ran = subprocess.run(command, env=os.environ if "environment" in leaks else {}, check=False)
            os.write(tell, bytes([ran.returncode != 0]))
        os._exit(0)
    os.close(tell)
    sys.exit(os.read(ended, 1) != b"\0")


if __name__ == "__main__":
    main()
