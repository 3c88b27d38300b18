"""``python -m app.local.unprivileged PARENT PROGRAM ARGUMENT…`` becomes PROGRAM, as somebody who is not root.

Postgres refuses to run as root. A user namespace in which root is called 65534 satisfies it and can still read a
directory below root's home; where the kernel grants no namespace, it becomes ``nobody``, and the data directory is handed
over. The process ends with PARENT, whatever that dies of.
"""

import ctypes
import os
import signal
import sys

CLONE_NEWUSER = 0x10000000  # linux/sched.h
PR_SET_PDEATHSIG = 1  # linux/prctl.h
NOBODY = 65534


def main() -> None:
    parent, program, arguments = int(sys.argv[1]), sys.argv[2], sys.argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0 and not _rename_root(libc):
        _become_nobody(arguments)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the process that wanted this is gone")
    os.execv(program, arguments)


def _rename_root(libc: ctypes.CDLL) -> bool:
    if libc.unshare(CLONE_NEWUSER) != 0:
        return False
    for name, content in (("setgroups", "deny"), ("uid_map", f"{NOBODY} 0 1"), ("gid_map", f"{NOBODY} 0 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)
    return True


def _become_nobody(arguments: list[str]) -> None:
    data = os.path.dirname(arguments[arguments.index("-D") + 1])
    for folder, _, files in os.walk(data):
        for path in (folder, *(os.path.join(folder, f) for f in files)):
            os.chown(path, NOBODY, NOBODY)
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)


if __name__ == "__main__":
    main()
