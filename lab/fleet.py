"""Several cards: the runs of one night on Ray's workers, each with a device, a sandbox and rows of its own.

Journal, git and all decisions stay with the agent. Fleet.measure hands a source and a seed to an idle worker, in a process of Ray's on its
node, and returns the Run.
"""

import contextlib
import io
import itertools
import os
import queue
import secrets
import shutil
import signal
import socket
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import constants
from constants import DATASETS, SEED, Problem, Settings, cache_dir, counted, device_lock, lock, locked
from lab.machine import cores
from lab.measure.child import end_processes
from lab.measure.files import names_within, packed, remove, unpack
from lab.measure.place import HARNESS, Place
from lab.measure.run import (
    RESULT_BYTES,
    cache_aside,
    clear_caches,
    measure_at,
    rows_of_the_night,
    set_cache_aside,
)
from lab.measure.sandbox import Sandbox, choose_sandbox
from lab.record.night import Night
from lab.record.start import difference, survey
from lab.records import OutOfTime, References, Run, Stopped, one_line, sha256

HERE = Path(__file__).resolve().parent.parent  # on a worker Ray's copy of the checkout
READY_LIMIT_S = 120.0  # of a worker, its like of an earlier start ended
START_LIMIT_S = 3_600.0  # its node's data prepared
STATE_LIMIT_S = 2.0  # how long a worker may take to say what it does
IDLE_LIMIT_S = 20.0  # and to take a run
CLOSE_LIMIT_S = 20.0  # of a worker, to end what it runs
# of a run's folder: what comes back of every run on the night's seed
RETURNED = "train.py run.json run.log score.log score.json nats.npy out/result.json".split()


# ---------------------------------------------------------------------------
# In the agent


class Fleet:
    """The workers of a night, started here or in the cluster of RAY_ADDRESS. Raises Problem."""

    def __init__(self, count: int, profile: str | None, tag: str, stored: Settings | None):
        """stored: of a night that goes on."""
        # No reports to Ray; workers at our priority; one is not killed because a run fills the memory.
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", "RAY_memory_monitor_refresh_ms": "0"}
        os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"  # else it makes an environment anew for each worker
        os.environ["AUTORESEARCH_CACHE"] = str(cache_dir())  # of its workers, which start elsewhere
        address, ours = os.environ.get("RAY_ADDRESS"), signal.getsignal(signal.SIGTERM)
        if not address:  # it listens on all networks: only those who have our token may ask it to run something
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        try:
            import ray
        except ImportError:
            raise Problem('--workers needs Ray; run: pip install -e ".[ray]"') from None
        here = {} if address else {"num_cpus": len(cores()), "include_dashboard": False}
        with tempfile.TemporaryDirectory() as code:  # what workers get of the checkout, in which a key may lie
            shutil.copytree(HERE / "lab", f"{code}/lab", ignore=shutil.ignore_patterns("__pycache__"))
            for name in ("constants.py", "prepare.py"):
                shutil.copy(HERE / name, code)
            try:
                started = dict(log_to_driver=False, logging_level="ERROR", runtime_env={"working_dir": code})
                ray.init(address or "local", **started, **here)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise Problem(f"Ray does not start: {error}") from None
        signal.signal(signal.SIGTERM, ours)  # which Ray has replaced
        self.ray, self.stored, self.night, self.packed = ray, stored, None, (None, None)
        has = ray.cluster_resources()
        usual = os.environ.get("AUTORESEARCH_PROFILE") or ("gpu" if has.get("GPU") else "cpu")
        self.profile = profile or (stored.profile.name if stored else usual)
        what, noun = ("GPU", "GPU") if self.profile == "gpu" else ("CPU", "core")
        if has.get(what, 0) < count:
            ray.shutdown()
            found = counted(int(has.get(what, 0)), noun)
            raise Problem(f"--workers {count} needs {counted(count, noun)} and finds {found}; take fewer workers")
        where = f"in the cluster {address}" if address else "here"
        print(f"starting {count} workers {where}; each prepares data that its machine lacks")
        share = 0 if self.profile == "gpu" else int(has["CPU"] // count)
        options = {"num_gpus": 1, "num_cpus": 0} if self.profile == "gpu" else {"num_cpus": share}
        kind = ray.remote(Worker).options(max_concurrency=2, **options)
        self.held = None
        if self.profile == "cpu" and not address:
            self.held = locked(device_lock("cpu"), "the CPU", f"agent.py, tag {tag}")
        self.workers = {i: kind.remote(i, tag, share, bool(self.held)) for i in range(1, count + 1)}
        self.of_all("phase", limit_s=READY_LIMIT_S)

    def of_all(self, method: str, *args, limit_s: float = START_LIMIT_S) -> dict[int, object]:
        """What each worker answers; one that cannot go on is left out, with a line. Raises Problem if none is left."""
        answers = {number: getattr(worker, method).remote(*args) for number, worker in self.workers.items()}
        ends = time.monotonic() + limit_s
        for number, answer in list(answers.items()):
            try:
                answers[number] = self.ray.get(answer, timeout=max(0.1, ends - time.monotonic()))
            except self.ray.exceptions.RayError as error:
                del answers[number]
                if isinstance(error, self.ray.exceptions.GetTimeoutError):
                    error = Problem(f"no answer within {limit_s:.0f} s: no room for it, or its node hangs")
                self.leave_out(number, error)
        return answers

    def leave_out(self, number: int, error: Exception) -> None:
        reason, worker = str(getattr(error, "cause", None) or error).strip(), self.workers.pop(number)
        lines = reason.splitlines()
        short = one_line(lines[-1] if "creation task" in lines[0] else lines[0])
        with contextlib.suppress(self.ray.exceptions.RayError):  # it ends what it runs and tidies up, if it still can
            self.ray.get(worker.close.remote(), timeout=STATE_LIMIT_S)
        self.ray.kill(worker)
        say = self.night.say if self.night else print
        say(f"worker {number} is left out, {len(self.workers)} remain: {short}")
        if not self.workers:
            raise Problem(f"no worker is left; the last one: {reason}")

    def ask(self, here: Path, *flags: str) -> dict:
        """What the night's machine is: that of a worker like those of its earlier starts, else of the commonest kind."""
        flags = [*flags, *(() if "--profile" in flags else ("--profile", self.profile))]
        dataset = os.environ.get("AUTORESEARCH_DATASET")
        if dataset and "--dataset" not in flags:
            flags += ["--dataset", dataset if dataset in DATASETS else str(Path(dataset).expanduser().resolve())]
        hosts = self.of_all("survey", *flags)
        alike = [number for number, host in hosts.items() if self.stored and not difference(host, self.stored)]
        kinds = {number: (hosts[number]["device_name"], hosts[number]["sizes"]) for number in alike or hosts}
        return hosts[max(kinds, key=lambda number: list(kinds.values()).count(kinds[number]))]

    def open(self, night: Night, *sandbox) -> None:
        """Gives the night to all workers. Its sandbox is the weakest of theirs."""
        harness = packed(night.folder / "harness", HARNESS)
        answers = self.of_all("open", night.settings, harness, *sandbox).values()
        for note in dict.fromkeys(note for _, notes in answers for note in notes.splitlines()):
            print(note)
        night.sandbox = min(
            (box for box, _ in answers), key=lambda box: (box is not None, box and not box.shared_processes)
        )
        self.night, self.idle = night, queue.Queue()
        for number in self.workers:
            self.idle.put(number)

    # --- measuring

    @property
    def room(self) -> int:
        """How many runs may be made at once."""
        return len(self.workers)

    def make_run(self, lanes, source: str, seed: int, title: str) -> Run:
        """Has an idle worker make a run; if that one is lost, another, once. Blocks; many threads may be here. Raises OutOfTime, Stopped."""
        for _ in range(2):
            number = self.idle_worker()
            lane = lanes[number - 1]
            with self.night.deciding:  # nobody is kept meanwhile
                references, incumbent = self.night.references, self.files_of_incumbent()
            left_s = self.night.until - time.perf_counter()
            answer = self.workers[number].measure.remote(source, seed, title, references, left_s, incumbent)
            lane.begin(title, None)
            try:
                run, files = self.answer(number, answer, lane)
            except OutOfTime:
                self.idle.put(number)
                raise
            except self.ray.exceptions.RayError as error:
                self.leave_out(number, error)
                continue
            finally:
                lane.end()
            self.idle.put(number)
            if files:
                place = self.night.arrived(run.source)
                unpack(files, place)
                set_cache_aside(self.night.folder, run.source, place / "cache")  # only a win brings one
            return run
        if not self.night.incumbent:
            raise Problem("two workers were lost with the baseline; run the same command again")
        return Run(sha256(source), seed, crash="its worker was lost, and so was a second one")

    def idle_worker(self) -> int:
        """One that answers; those that do not are left out, so that no run is lost with them."""
        while True:
            if self.night.stop.is_set():
                raise Stopped
            with contextlib.suppress(queue.Empty):
                number = self.idle.get(timeout=0.05)
                try:
                    self.ray.get(self.workers[number].phase.remote(), timeout=IDLE_LIMIT_S)
                    return number
                except self.ray.exceptions.RayError as error:
                    self.leave_out(number, error)

    def answer(self, number: int, answer, lane) -> tuple[Run, dict]:
        """What a worker returns; its phase is shown meanwhile."""
        while not self.ray.wait([answer], timeout=0.5)[0]:
            if self.night.stop.is_set():
                raise Stopped
            with contextlib.suppress(self.ray.exceptions.RayError):
                phase = self.ray.get(self.workers[number].phase.remote(), timeout=STATE_LIMIT_S)
                if phase and phase != lane.phase:
                    lane.enter(phase)
        return self.ray.get(answer)

    def files_of_incumbent(self):
        """Ray's reference to the night's compile cache and the incumbent's nats, which travel once to each node; None before the baseline."""
        folder, best = self.night.folder, self.night.incumbent
        if best and self.packed[0] != best.number:
            names = ["nats.npy", *(f"cache/{name}" for name in names_within(folder / "cache"))]
            self.packed = best.number, self.ray.put(packed(folder, names))
        return self.packed[1]

    def close(self) -> None:
        """Ends the workers and what they run."""
        if not self.ray.is_initialized():
            return
        for ending in [worker.close.remote() for worker in self.workers.values()]:
            with contextlib.suppress(self.ray.exceptions.RayError):
                self.ray.get(ending, timeout=CLOSE_LIMIT_S)
        self.ray.shutdown()
        if self.held:
            self.held.close()


# ---------------------------------------------------------------------------
# On a node


class Worker:
    """One device of a fleet, in a process of Ray's on its node; what a run tells its phases. Raises Problem."""

    def __init__(self, number: int, tag: str, share: int, alone: bool):
        """share: how many cores are its own; 0: it has a card. alone: no worker of another night or cluster is on this machine."""
        constants.guard_this_process()
        os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        self.number, self.share, self.alone, self.cores = number, share, alone, None
        self.folder = cache_dir() / "fleet" / f"{tag}-{number}"
        self.held, self.closed, self.doing, self.incumbent = contextlib.ExitStack(), False, "", None
        # Its like of an earlier start may still be about to end.
        self.held.enter_context(lock(self.folder.with_suffix(".lock"), f"worker {number}", wait=True))
        end_processes(str(self.folder))

    def phase(self) -> str:
        """What its run does; empty if there is none."""
        return self.doing

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
            device = f"the device {self.host['device_name']}"
            self.held.enter_context(locked(device_lock(self.host["device_id"]), device, f"worker {self.number}"))
        return self.host

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

    def measure(
        self, source: str, seed: int, title: str, references: References, left_s: float, files
    ) -> tuple[Run, dict]:
        """The Run, and of one on the night's seed the files; those of a win include its weights and what it compiled.

        files: the night's compile cache and the incumbent's nats.
        """
        self.take_cores()
        if references.incumbent and self.incumbent != references.incumbent.source:
            self.incumbent = references.incumbent.source
            unpack(files, self.folder / "incumbent")
            for name in ("cache", "nats.npy"):
                if (brought := self.folder / "incumbent" / name).exists():
                    remove(self.folder / name)
                    os.replace(brought, self.folder / name)
        self.place.until = time.perf_counter() + left_s
        if seed == SEED:
            clear_caches(self.folder)
        folder = self.folder / ("run" if seed == SEED else "second")
        run = measure_at(self.place, self, folder, source, seed, title, references)
        if seed != SEED:
            return replace(run, worker=self.number), {}
        files = packed(folder, RETURNED)
        if len(files.get("out/result.json", b"")) > RESULT_BYTES:
            del files["out/result.json"]
        if run.val_bpb is not None and (not references.incumbent or run.val_bpb < references.incumbent.val_bpb):
            made = cache_aside(self.folder, run.source)
            files |= packed(folder, ["out/model.pt"])
            files |= {f"cache/{name}": raw for name, raw in packed(made, names_within(made)).items()}
        return replace(run, worker=self.number), files

    def begin(self, title: str, folder: Path) -> None:
        if self.closed:
            raise Problem("the night has ended")
        self.doing = "starting"

    def enter(self, phase: str) -> None:
        self.doing = phase

    def end(self) -> None:
        self.doing = ""

    def close(self) -> None:
        self.closed = True
        end_processes(str(self.folder))
        self.held.close()
        remove(self.folder)
