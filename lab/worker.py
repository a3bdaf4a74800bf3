"""One worker of a fleet: a device of some node with its own place, sandbox and rows. It runs in a process of Ray's there."""

import contextlib
import io
import itertools
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

from constants import SEED, Problem, Settings, cache_dir, device_lock, lock, locked
from lab.machine import cores
from lab.measure import cache
from lab.measure.child import end_processes, guard_this_process
from lab.measure.files import names_within, packed, remove, unpack
from lab.measure.place import Place
from lab.measure.run import RESULT_BYTES, measure_at
from lab.measure.sandbox import Sandbox, choose_sandbox
from lab.measure.text import rows_of_the_night
from lab.record.start import difference, survey, with_hashes
from lab.records import Rivals, Run, log_tail

HERE = Path(__file__).resolve().parent.parent  # Ray's copy of the checkout
RETURNED = (
    "train.py",
    "run.json",
    "run.log",
    "score.log",
    "score.json",
    "nats.npy",
    "out/result.json",
)  # of a run's folder


class Worker:
    """One device of a fleet: runs in a process of Ray's on its node, and is what a run tells its phases. Raises Problem."""

    def __init__(self, number: int, tag: str, share: int, alone: bool):
        """share: how many cores are its own; 0: it has a card. alone: no worker of another night or cluster is on this machine."""
        guard_this_process()
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        self.number, self.share, self.alone, self.cores = number, share, alone, None
        self.folder = cache_dir() / "fleet" / f"{tag}-{number}"
        self.held, self.closed, self.phase, self.log = contextlib.ExitStack(), False, "", Path()
        # Its like of an earlier start may still be about to end.
        self.held.enter_context(lock(self.folder.with_suffix(".lock"), f"worker {number}", wait=True))
        end_processes(str(self.folder))

    def ready(self) -> None:
        pass

    def take_cores(self) -> None:
        """Binds this thread, and so its children, to cores that no other worker of this machine has."""
        if self.share and not hasattr(os, "sched_setaffinity"):
            raise Problem("on this system cores cannot be shared out: --workers needs cards here")
        if self.share and self.cores is None:
            if not self.alone:
                self.held.enter_context(locked(device_lock("cpu"), "the CPU", f"worker {self.number}", shared=True))
            for slot in itertools.count():
                with contextlib.suppress(BlockingIOError):
                    name = f"cpu-{socket.gethostname()}-{slot}"
                    self.held.enter_context(lock(device_lock(name), f"worker {self.number}"))
                    break
            here = cores()
            self.cores = {here[(slot * self.share + i) % len(here)] for i in range(self.share)}
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    def survey(self, *flags: str) -> dict:
        self.take_cores()
        self.host = survey(HERE, *flags)
        if not self.share:
            name = self.host["device_name"]
            note = f"worker {self.number}"
            self.held.enter_context(locked(device_lock(self.host["device_id"]), f"the device {name}", note))
        return self.host

    def hashed(self) -> dict:
        return with_hashes(self.host)

    def open(self, settings: Settings, harness: dict[str, bytes], *sandbox) -> tuple[Sandbox | None, str]:
        """Its place in this night; the sandbox that its trial child proved, and what there is to say about it."""
        self.take_cores()
        if other := difference(self.host, settings):
            raise Problem(f"the night has {other}")
        remove(self.folder)
        unpack(harness, self.folder / "harness")
        settings = replace(settings, data=self.host["data"])
        (self.folder / "harness" / "night.json").write_text(settings.json())
        self.place = Place(self.folder, settings, self.host["device_id"], say=self.enter)
        with contextlib.redirect_stdout(io.StringIO()) as notes:
            self.held.enter_context(rows_of_the_night(self.place))
            self.place.sandbox = choose_sandbox(self.place, *sandbox)
        return self.place.sandbox, notes.getvalue()

    def measure(self, source: str, seed: int, title: str, rivals: Rivals, left_s: float, compiled) -> tuple[Run, dict]:
        """The Run, and of one on the night's seed the files; those of a win include its weights and what it compiled.

        compiled: the night's cache and the incumbent's nats, if they are others than at the last call.
        """
        self.take_cores()
        if compiled is not None:
            unpack(compiled, self.folder / "incumbent")
            for name in ("cache", "nats.npy"):
                if (brought := self.folder / "incumbent" / name).exists():
                    remove(self.folder / name)
                    os.replace(brought, self.folder / name)
        ends = time.monotonic() + left_s
        self.place.out_of_time = lambda: time.monotonic() > ends
        if seed == SEED:
            cache.clear(self.folder)
        folder = self.folder / ("run" if seed == SEED else "trial")
        run = measure_at(self.place, self, folder, source, seed, title, rivals)
        if seed != SEED:
            return replace(run, worker=self.number), {}
        files = packed(folder, RETURNED)
        if len(files.get("out/result.json", b"")) > RESULT_BYTES:
            del files["out/result.json"]
        if run.val_bpb is not None and (not rivals.incumbent or run.val_bpb < rivals.incumbent.val_bpb):
            made = cache.aside(self.folder, run.source)
            files |= packed(folder, ["out/model.pt"])
            files |= {f"cache/{name}": raw for name, raw in packed(made, names_within(made)).items()}
        return replace(run, worker=self.number), files

    def begin(self, title: str, folder: Path) -> None:
        if self.closed:
            raise Problem("the night has ended")
        self.phase, self.log = "starting", folder / "run.log"

    def enter(self, phase: str) -> None:
        self.phase = phase

    def end(self) -> None:
        self.phase = ""

    def state(self) -> tuple[str, list[str]]:
        """The phase of its run, empty if there is none, and the end of its log."""
        return self.phase, log_tail(self.log) if self.phase else []

    def close(self) -> None:
        self.closed = True
        end_processes(str(self.folder))
        self.held.close()
        remove(self.folder)
