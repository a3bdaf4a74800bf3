"""The trial child: run inside a new sandbox, it proves that a child works there and reaches nothing forbidden.

It imports nothing of lab, which the sandbox hides. Its last line is the JSON list of what it should not have reached.
"""

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
    import prepare

    own = json.loads(Path(sys.argv[1]).read_text())
    prepare.try_device(own["device"])
    name_a_thread()
    open(own["tokenizer"]).close()
    if own["compiler"]:
        compiler, header = own["compiler"]
        subprocess.run([*compiler, "--version"], check=True, stdout=subprocess.DEVNULL)
        open(header).close()
    print(json.dumps(reached(own)))
