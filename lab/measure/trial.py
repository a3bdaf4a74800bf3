"""The trial child: run inside a new sandbox, it proves that a child works there and reaches nothing forbidden.

It imports nothing of lab, which the sandbox hides. Its last line is the JSON list of what it should not have reached.
"""

import ctypes
import errno
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path


def reached(own: dict) -> list[str]:
    """The forbidden things that this process can read, and the networks that it has."""
    seen = [name for _, name in socket.if_nameindex() if name != "lo"]
    for name in own["forbidden"]:
        with suppress(OSError):
            if os.path.isdir(name):
                seen += [name] if os.listdir(name) else []
            else:
                with open(name, "rb") as file:
                    seen += [name] if file.read(1) else []
    with suppress(OSError):
        if own["canary"].encode() in Path(f"/proc/{own['stranger']}/environ").read_bytes():
            seen.append("the environment of other processes")
    return seen


def shared(own: dict) -> list[str]:
    """What this child shares with the next one: open files, namespaces, folders that both may write to, calls that leave traces."""
    found = [f"file descriptor {name}" for name in os.listdir("/proc/self/fd") if int(name) > 2 and is_open(int(name))]
    found += [
        f"the {name} namespace"
        for name, outside in own["namespaces"].items()
        if os.readlink(f"/proc/self/ns/{name}") == outside
    ]
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        place, options, kind = before.split()[4], before.split()[5].split(","), after.split()[0]
        private = kind in ("tmpfs", "devpts", "proc") or place in own["writable"] or place.startswith("/dev/")
        found += [f"{place}, to which it may write"] if "rw" in options and not private else []
    call = ctypes.CDLL(None, use_errno=True).syscall
    for name, number in own["calls"].items():  # with arguments that no call takes
        ctypes.set_errno(0)
        call(number, *[ctypes.c_long(-1)] * 6)
        found += [f"the call {name}"] if ctypes.get_errno() not in (errno.EPERM, errno.ENOSYS) else []
    return found


def is_open(descriptor: int) -> bool:
    with suppress(OSError):
        os.fstat(descriptor)
        return True
    return False


def name_a_thread() -> None:
    """As drivers do. Raises OSError if that is not possible here."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        if os.path.isdir("/proc/self/task"):
            Path(f"/proc/self/task/{thread.native_id}/comm").write_text("named")
    finally:
        done.set()


if __name__ == "__main__":
    own = json.loads(Path(sys.argv[1]).read_text())
    left = shared(own) if os.path.isdir("/proc/self/fd") else []
    import prepare

    prepare.try_device(own["device"])
    name_a_thread()
    open(own["tokenizer"]).close()
    if own["compiler"]:
        compiler, header = own["compiler"]
        subprocess.run([*compiler, "--version"], check=True, stdout=subprocess.DEVNULL)
        open(header).close()
    print(json.dumps([*reached(own), *left]))
