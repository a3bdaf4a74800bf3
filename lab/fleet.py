"""Several cards: the experiments of one night on Ray's workers, each with a device, a sandbox and rows of its own.

Journal, git and all decisions stay with the agent; a worker gets a source and a seed and returns the Run with its files.
"""

import contextlib
import os
import secrets
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from constants import DATASETS, Problem, Settings, cache_dir, counted, device_lock, locked
from lab.machine import cores
from lab.measure import cache
from lab.measure.files import names_within, packed, unpack
from lab.measure.place import HARNESS
from lab.record.night import Night
from lab.record.start import difference
from lab.records import OutOfTime, Proposal, Run, one_line, sha256
from lab.worker import HERE, Worker

READY_LIMIT_S = 120.0  # of a worker, its like of an earlier start ended
START_LIMIT_S = 3_600.0  # its node's data prepared
STATE_LIMIT_S = 2.0  # how long a worker may take to say what it does
CLOSE_LIMIT_S = 20.0  # of a worker, to end what it runs


@dataclass
class Work:
    """An experiment under way: the generator of its runs, the one that is wanted now, the worker that makes it."""

    proposal: Proposal | None
    steps: object
    worker: int | None = None
    wanted: tuple | None = None
    answer: object | None = None  # Ray's reference to (Run, files)
    lost: int = 0  # how often a worker died of it, or with it


class Fleet:
    """The workers of a night, as run_night() wants its crew: started here or in the cluster of RAY_ADDRESS. Raises Problem."""

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
        self.ray, self.stored, self.night, self.view, self.work, self.looked = ray, stored, None, None, [], 0.0
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
        self.compiled, self.sent = (None, None), dict.fromkeys(self.workers)
        self.of_all("ready", limit_s=READY_LIMIT_S)

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
        number = max(kinds, key=lambda number: list(kinds.values()).count(kinds[number]))
        try:
            return self.ray.get(self.workers[number].hashed.remote(), timeout=START_LIMIT_S)
        except self.ray.exceptions.RayError as error:
            raise Problem(
                f"worker {number} ended while it read the data: {error}; run the same command again"
            ) from None

    def open(self, night: Night, *sandbox) -> None:
        """Gives the night to all workers. Its sandbox is the weakest of theirs."""
        harness = packed(night.folder / "harness", HARNESS)
        answers = self.of_all("open", night.settings, harness, *sandbox).values()
        for note in dict.fromkeys(note for _, notes in answers for note in notes.splitlines()):
            print(note)
        night.sandbox = min(
            (box for box, _ in answers), key=lambda box: (box is not None, box and not box.shared_processes)
        )
        self.night = night

    # --- as a crew

    def shown_by(self, view) -> "Fleet":
        self.view = view
        return self

    @property
    def running(self) -> list[Proposal]:
        return [work.proposal for work in self.work if work.proposal]

    @property
    def free(self) -> int:
        return max(0, len(self.workers) - len(self.work))

    def start(self, proposal: Proposal | None, steps) -> None:
        self.work.append(Work(proposal, steps))

    def wait(self):
        """Yields (proposal, what its generator returned) of the experiments that end within half a second, each judged in its turn."""
        for work in [work for work in self.work if work.answer is None]:
            yield from self.go_on(work, None)
        answers = [work.answer for work in self.work if work.answer is not None]
        ended, _ = self.ray.wait(answers, timeout=0.05 if self.free else 0.5) if answers else ([], [])
        for work in [work for work in self.work if work.answer in ended]:
            run = self.received(work)
            if work in self.work:
                yield from self.go_on(work, run)
        self.look()

    def go_on(self, work: Work, run: Run | None):
        """Hands out the next run of an experiment, or yields its end. What the journal knows already is not repeated."""
        try:
            if run or not work.wanted:
                work.wanted = work.steps.send(run)
            while run := self.known(*work.wanted):
                work.wanted = work.steps.send(run)
        except StopIteration as end:
            self.work.remove(work)
            yield work.proposal, end.value
            return
        work.worker = work.worker or self.idle_worker()
        if work.worker:
            source, seed, title, _ = work.wanted
            call = self.workers[work.worker].measure.remote
            work.answer = call(source, seed, title, self.night.rivals, self.night.left_s(), self.cache_for(work.worker))
            self.lane(work).begin(title, None)

    def idle_worker(self) -> int | None:
        """One that answers; those that do not are left out, so that no experiment is lost with them."""
        taken = {work.worker for work in self.work}
        for number in [number for number in self.workers if number not in taken]:
            try:
                self.ray.get(self.workers[number].ready.remote(), timeout=STATE_LIMIT_S)
                return number
            except self.ray.exceptions.RayError as error:
                self.leave_out(number, error)
        return None

    def known(self, source: str, seed: int, title: str, fresh: bool) -> Run | None:
        return None if fresh else self.night.known_run(sha256(source), seed)

    def received(self, work: Work) -> Run | None:
        """The run that has ended, journalled, its files kept; None if it has to be made again, on another worker."""
        answer, work.answer = work.answer, None
        self.lane(work).end()
        try:
            run, files = self.ray.get(answer)
        except OutOfTime:
            self.work.remove(work)
            return None
        except self.ray.exceptions.RayError as error:
            self.leave_out(work.worker, error)
            work.worker, work.lost = None, work.lost + 1
            crash = "its worker was lost, and so was a second one"
            lost = Run(sha256(work.wanted[0]), work.wanted[1], None, None, crash, "", {}, 0.0, None, None, None)
            return lost if work.lost > 1 else None
        if files:
            place = self.night.arrived(run.source)
            unpack(files, place)
            if (place / "cache").exists():
                cache.set_aside(self.night.folder, run.source, place / "cache")
        self.night.add_run(run)
        return run

    def cache_for(self, number: int):
        """The night's compile cache and nats of the incumbent, if this worker has not got those of the present one."""
        folder, best = self.night.folder, self.night.incumbent
        if not best or self.sent[number] == best.number:
            return None
        if self.compiled[0] != best.number:
            names = ["nats.npy", *(f"cache/{name}" for name in names_within(folder / "cache"))]
            self.compiled = best.number, self.ray.put(packed(folder, names))
        self.sent[number] = best.number
        return self.compiled[1]

    def lane(self, work: Work):
        return self.view.lanes[work.worker - 1]

    def look(self) -> None:
        """Shows what each worker does, at most twice a second."""
        if time.monotonic() - self.looked < 0.5:
            return
        self.looked = time.monotonic()
        for work in self.work:
            if work.answer is not None:
                with contextlib.suppress(self.ray.exceptions.RayError):
                    state = self.workers[work.worker].state.remote()
                    phase, lines = self.ray.get(state, timeout=STATE_LIMIT_S)
                    lane = self.lane(work)
                    lane.lines = lambda lines=lines: lines
                    if phase and phase != lane.phase:
                        lane.enter(phase)

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
