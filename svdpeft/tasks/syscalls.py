"""The filter of system calls behind which ``sandbox`` runs a program.

Refused are the calls that start processes or namespaces, reach the network or other processes, or hold memory that
RLIMIT_AS does not count.
"""

from __future__ import annotations

import errno
import struct

MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_*
REFUSED = {  # by their numbers on each machine; None: it has no such call
    "fork": (57, None),
    "vfork": (58, None),
    "unshare": (272, 97),
    "setns": (308, 268),
    "socket": (41, 198),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "io_uring_setup": (425, 425),
}
CLONE, CLONE3 = (56, 220), 435
CLONE_THREAD = 0x10000
X32 = 0x40000000  # on x86_64, calls from this number on are those of another interface, under other numbers


def filter_for(machine: str) -> bytes:
    """The filter, a classic BPF program: 8 bytes an instruction (code, jump if, jump if not, value)."""
    load, equal, at_least, any_bit, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill = 0x7FFF0000, 0x80000000
    refuse = 0x00050000  # + the error that the caller sees
    column = list(MACHINES).index(machine)
    lines = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine]), (leave, 0, 0, kill)]  # the interface's name
    lines += [(load, 0, 0, 0), (at_least, 0, 1, X32), (leave, 0, 0, kill)]  # the call's number
    for numbers in REFUSED.values():
        if numbers[column] is not None:
            lines += [(equal, 0, 1, numbers[column]), (leave, 0, 0, refuse + errno.EPERM)]
    # clone3 hides its flags behind a pointer: as on old kernels there is none, and the C library falls back to clone
    lines += [(equal, 0, 1, CLONE3), (leave, 0, 0, refuse + errno.ENOSYS)]
    lines += [(equal, 0, 3, CLONE[column]), (load, 0, 0, 16), (any_bit, 1, 0, CLONE_THREAD)]
    lines += [(leave, 0, 0, refuse + errno.EPERM), (leave, 0, 0, allow)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
