"""System calls that agents' code does without: a filter for seccomp(2), in the kernel's classic BPF.

Each of them uses up what is counted for a user of the machine and not for a sample (keys), takes memory that no process maps
and nobody counts (memfd, where there is no control group; System V's objects, where they cannot be bounded), or opens much of
the kernel to code that needs none of it. They answer as if the kernel did not have them: ENOSYS.
"""

import errno
import os
import struct
from collections.abc import Iterable

ALWAYS = ("add_key", "request_key", "keyctl", "io_uring_setup", "bpf", "perf_event_open", "userfaultfd", "memfd_secret")
UNMAPPED_MEMORY = ("memfd_create",)
SYSTEM_V = ("shmget", "msgget", "semget")

MACHINES: dict[str, tuple[int, dict[str, int]]] = {
    "x86_64": (
        0xC000003E,
        {
            "add_key": 248,
            "request_key": 249,
            "keyctl": 250,
            "io_uring_setup": 425,
            "bpf": 321,
            "perf_event_open": 298,
            "userfaultfd": 323,
            "memfd_secret": 447,
            "memfd_create": 319,
            "shmget": 29,
            "msgget": 68,
            "semget": 64,
        },
    ),
    "aarch64": (
        0xC00000B7,
        {
            "add_key": 217,
            "request_key": 218,
            "keyctl": 219,
            "io_uring_setup": 425,
            "bpf": 280,
            "perf_event_open": 241,
            "userfaultfd": 282,
            "memfd_secret": 447,
            "memfd_create": 279,
            "shmget": 194,
            "msgget": 186,
            "semget": 190,
        },
    ),
}
_X32 = 0x40000000  # x86_64's second table of system calls
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06  # linux/bpf_common.h
_NUMBER, _MACHINE = 0, 4  # offsets in struct seccomp_data
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def without(names: Iterable[str], machine: str = os.uname().machine) -> bytes:
    """The filter, as `bwrap --seccomp` reads it; nothing for a machine whose numbers are not known here.

    Another machine's calls (32-bit programs) would come by other numbers: they get the same answer, all of them.
    """
    if machine not in MACHINES:
        return b""
    audit, numbers = MACHINES[machine]
    refused = sorted(numbers[name] for name in names)
    no = len(refused) + 1  # instructions from the first comparison to the refusal
    program = [
        (_LOAD, 0, 0, _MACHINE),
        (_IF_EQUAL, 0, no + 2, audit),
        (_LOAD, 0, 0, _NUMBER),
        (_IF_AT_LEAST, no, 0, _X32),
        *((_IF_EQUAL, no - 1 - at, 0, number) for at, number in enumerate(refused)),
        (_RETURN, 0, 0, _ALLOW),
        (_RETURN, 0, 0, _ERRNO | errno.ENOSYS),
    ]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in program)
