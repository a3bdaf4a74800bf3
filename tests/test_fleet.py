"""Several workers: the rules of a night in which experiments overlap, a worker that is lost, and a real night on Ray."""

import os
import queue
import re
import signal
import sys
import threading
import time
from functools import partial
from importlib.util import find_spec
from types import SimpleNamespace

import psutil
import pytest
from conftest import (
    NIGHT,
    Checkout,
    Quiet,
    Script,
    better,
    check_agreement,
    fake_measure,
    fake_run,
    open_here,
    rows_of,
    run_here,
    settings_for,
    wait_for,
)

from agent import Limits, experiment, run_night
from constants import SEED, Problem
from lab.fleet import Fleet
from lab.measure.files import packed, unpack
from lab.record.night import measure
from lab.record.start import difference
from lab.records import Proposal, Run, Stopped, sha256
from lab.view import View

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason='Ray is not installed: pip install -e ".[ray]"')
NARROWER = ("        width=64,", "        width=32,")


class Turns:
    """A measure for several threads: all experiments of `order` begin, then they end in this order."""

    def __init__(self, night, order: list[int], before=lambda source, seed: None):
        self.night, self.order, self.begun = night, [f"change {number}" for number in order], set()
        self.measure = fake_measure(night, before)

    def __call__(self, source: str, seed: int, title: str, fresh: bool = False):
        self.begun.add(title)
        if title in self.order:
            earlier = set(self.order[: self.order.index(title)])
            wait_for(lambda: self.begun >= set(self.order) and earlier <= {r.description for r in self.night.results})
        return self.measure(source, seed, title, fresh)


def outcomes(night) -> list[tuple]:
    return [(result.description, result.verdict.word, result.parent) for result in night.results[1:]]


@pytest.mark.parametrize(
    ("change", "outcome", "runs", "said"),
    [
        (NARROWER, ("keep", 1), 4, ""),  # measured again on top of the present incumbent
        (better(0.3), ("discard", 0), 3, "lower than experiment 0, on which it was made, but 1 was kept meanwhile: "),
        (("width=64,", "width=99,"), ("discard", 0), 3, ""),  # not lower than its parent: not measured again
    ],
)
def test_what_was_made_on_an_earlier_incumbent(checkout, change, outcome, runs, said):
    """Both begin on the baseline; change 2 is kept first. Every keep is its parent plus one change."""
    night = open_here(checkout)
    run_here(night, None, Script(change, better(0.2)), measure=Turns(night, [2, 1]), workers=2)
    assert outcomes(night) == [("change 2", "keep", 0), ("change 1", *outcome)]
    late, source = night.results[2], night.source(2)
    assert ("lr=0.2," in source) == (outcome[0] == "keep") and ("same lines" in late.verdict.reason) == bool(said)
    assert late.verdict.reason.startswith(said) and late.run.id == runs - 1 and len(rows_of(checkout, "run")) == runs
    assert len(re.findall(r"(?m)^[-+] ", checkout.git("show", "--format=", late.commit, "--", "train.py"))) == 2
    check_agreement(checkout)


def test_a_win_that_was_cut_off_before_its_second_run_goes_on_after_a_kill(checkout):
    """It was put on top of the incumbent and not yet measured there: its row says so."""
    night = open_here(checkout)
    run_here(night, 0)
    proposals = [Proposal("narrower", "", night.baseline.source.replace(*NARROWER), proposer="script", parent=0)]
    proposals += [Proposal("faster", "", night.baseline.source.replace(*better(0.2)), proposer="script", parent=0)]
    narrower, faster = (night.add_proposal(proposal, 1) for proposal in proposals)
    experiment(night, faster, fake_measure(night))

    class Killed(Exception):
        pass

    def measure(source, seed, title, fresh=False):
        if "lr=0.2" in source:
            raise Killed
        return fake_measure(night)(source, seed, title, fresh)

    with pytest.raises(Killed):
        experiment(night, narrower, measure)
    again = open_here(checkout)
    run_here(again, 2, Script(), workers=2)
    assert outcomes(again) == [("faster", "keep", 0), ("narrower", "keep", 1)]
    check_agreement(checkout)


def test_the_files_of_a_run_that_is_made_anew_on_another_incumbent_do_not_stay(checkout):
    """A worker brought them, another experiment was kept, the agent was killed before the verdict."""
    night = open_here(checkout)
    run_here(night, 1, Script(better(0.2)))
    source = night.baseline.source.replace(*NARROWER)
    night.add_proposal(Proposal("narrower", "", source, proposer="script", parent=0), 2)
    night.add_run(fake_run(night)(source, SEED, ""))
    night.arrived(sha256(source)).mkdir()
    again = open_here(checkout)
    assert night.arrived(sha256(source)).exists()  # it may be needed
    run_here(again, 2, Script())
    assert outcomes(again) == [("change 1", "keep", 0), ("narrower", "keep", 1)]
    check_agreement(checkout)


def test_the_next_is_proposed_knowing_what_runs_and_the_limit_counts_it(checkout):
    night, script = open_here(checkout), Script(*[("beta=0.8", f"beta=0.{i}") for i in range(1, 9)])
    run_here(night, 5, script, measure=Turns(night, [3, 2, 1]), workers=3)
    assert len(night.results) == 6 and len(rows_of(checkout, "proposal")) == 6
    asked = [(history.number, sorted(run.description for run in history.running)) for history, _ in script.asked]
    assert asked[:4] == [(1, []), (2, ["change 1"]), (3, ["change 1", "change 2"]), (4, ["change 1", "change 2"])]


def test_the_baseline_is_measured_with_all_workers_at_work(checkout):
    """As all that it is compared with: alone it would have memory and bandwidth to itself."""
    night, together = open_here(checkout), threading.Barrier(3, timeout=30)
    seeds, lines, run = [], [], fake_measure(night)
    night.say = lines.append

    def measure(source, seed, title, fresh=False):
        seeds.append(seed)
        if len(seeds) <= 3:
            together.wait()
        return run(source, seed, title, fresh)

    run_here(night, None, Script(better(0.2)), second_seed=True, measure=measure, workers=3)
    assert sorted(seeds[:3]) == [1, 2, 2] and night.noise is not None
    assert [line for line in lines if "two seeds" in line] == [night.noise_text]


def test_the_hours_count_what_an_experiment_takes_not_the_runs_beside_the_baseline(checkout):
    night = open_here(checkout)
    changes = [("beta=0.8", f"beta=0.{i}") for i in range(1, 5)]
    reason = run_here(night, None, Script(*changes), hours=0.7, second_seed=True, workers=8)
    assert reason == "the script is complete" and len(night.results) == 5  # runs of 340 s, as the fake says


def test_a_baseline_that_fails_beside_a_run_on_the_second_seed_that_works_ends_the_night(checkout):
    night = open_here(checkout)

    def measure(source, seed, title, fresh=False):
        failed = Run(sha256(source), seed, crash="its worker was lost")
        return night.add_run(failed) if seed == SEED else fake_measure(night)(source, seed, title, fresh)

    for _ in range(2):  # also at the next start
        with pytest.raises(Problem, match="the baseline failed: its worker was lost"):
            run_here(night, None, Script(), second_seed=True, measure=measure, workers=3)


def test_an_experiment_that_was_just_recorded_is_not_counted_as_running_too(checkout):
    night, script = open_here(checkout), Script(better(0.3), ("beta=0.8", "beta=0.7"))
    record = night.record

    def slow_record(*args):
        result = record(*args)
        time.sleep(0.2)  # meanwhile the thread of the experiment has not ended
        return result

    night.record = slow_record
    assert run_here(night, 2, script, workers=2) == "2 experiments done"
    assert [(history.number, history.more) for history, _ in script.asked] == [(1, 1), (2, 0)]


def test_what_a_thread_raises_ends_the_night_and_what_the_others_run(checkout):
    night = open_here(checkout)

    def measure(source, seed, title, fresh=False):
        if title == "change 1":
            raise Problem("the disk is full")
        if title == "change 2":
            assert night.stop.wait(30)
            raise Stopped
        return fake_measure(night)(source, seed, title, fresh)

    with pytest.raises(Problem, match="the disk is full"):
        run_here(night, None, Script(better(0.3), better(0.2)), measure=measure, workers=2)
    assert len(night.results) == 1


# --- a fleet without Ray


class Lost(Exception):
    pass


FAKE_RAY = SimpleNamespace(  # its few calls: an answer is a function, called when it is got
    exceptions=SimpleNamespace(RayError=Lost, GetTimeoutError=TimeoutError),
    wait=lambda answers, timeout: (answers, []),
    get=lambda answer, timeout=None: answer(),
    put=lambda value: value,
    kill=lambda worker: None,
)


def fake_fleet(night, behaviours):
    """behaviours: of each worker, what its runs do: "works", or "dies" at its first one."""
    fleet = object.__new__(Fleet)
    fleet.ray, fleet.night, fleet.packed, fleet.idle = FAKE_RAY, night, (None, None), queue.Queue()
    local, ran = fake_run(night), []

    def run(number, behaviour, source, seed, title, *others):
        if behaviour == "dies":
            raise Lost("the node is gone\nand more")
        ran.append((number, sha256(source), seed))
        files = {"train.py": source.encode(), "run.log": b"log", "out/result.json": b"{}"}
        return local(source, seed, title), files if seed == 1 else {}

    def worker(number, behaviour):
        make_run = SimpleNamespace(remote=lambda *args: partial(run, number, behaviour, *args))
        phase, close = (SimpleNamespace(remote=lambda: lambda: "training") for _ in range(2))
        return SimpleNamespace(measure=make_run, phase=phase, close=close)

    fleet.workers = {i: worker(i, behaviour) for i, behaviour in enumerate(behaviours, 1)}
    for number in fleet.workers:
        fleet.idle.put(number)
    return fleet, ran


def run_fleet(night, behaviours, changes, second_seed=True):
    (fleet, ran), view = fake_fleet(night, behaviours), Quiet()
    lanes = View(night, None, [], len(behaviours)).lanes
    night.say, limits = view.say, Limits(None, None, workers=len(behaviours))
    measured = partial(measure, night, partial(fleet.make_run, lanes))
    return run_night(night, Script(*changes), limits, measured, lambda: fleet.room, view, second_seed), view.lines, ran


def test_an_experiment_whose_worker_dies_is_run_elsewhere(checkout):
    night = open_here(checkout)
    _, lines, ran = run_fleet(night, ["works", "dies", "works"], [better(0.2), NARROWER, ("beta=0.8", "beta=0.7")])
    assert "worker 2 is left out, 2 remain: the node is gone" in lines
    assert {"change 1", "change 2", "change 3"} < {result.description for result in night.results}
    check_agreement(checkout)
    assert all((night.run_folder(result.number) / "run.log").read_text() == "log" for result in night.results)
    own = [run for run in ran if run[2] == SEED]
    assert len(own) == len(set(own)) and not list(night.folder.glob("arrived-*"))
    assert len(rows_of(checkout, "run")) == len(ran)


def test_what_loses_two_workers_is_a_crash_and_without_workers_the_night_stops(checkout):
    night = open_here(checkout)
    run_here(night, 0)
    _, lines, _ = run_fleet(night, ["dies", "dies", "works"], [better(0.2)], second_seed=False)
    assert len([line for line in lines if "is left out" in line]) == 2
    assert night.results[1].verdict.reason == "its worker was lost, and so was a second one"
    with pytest.raises(Problem, match="no worker is left; the last one: the node is gone"):
        run_fleet(night, ["dies"], [better(0.1)], second_seed=False)
    check_agreement(checkout)


def test_a_machine_of_another_kind_or_with_fewer_threads_is_told_apart(checkout):
    settings, host = settings_for(checkout, threads=2), vars(settings_for(checkout)) | {"sizes": "cpu", "threads": 4}
    assert difference(host, settings) == ""
    assert difference(host | {"threads": 1}, settings) == "threads 2, here it is 1"
    assert difference(host | {"sizes": "small"}, settings) == "sizes cpu, here it is small"


def test_the_live_view_has_a_line_for_each_worker_at_work(checkout):
    view = View(open_here(checkout), None, [], workers=3)
    for lane in view.lanes[1:]:
        lane.begin("wider", None)
        lane.enter("training")
    view.lanes[1].lines = lambda: ["step     3   50.0%  loss 1.7500      1,234 tok/s"]
    first, second = view.render().plain.split("\n")
    assert first.startswith("  w2  ━━━━━━━━━━──────────  50%  loss 1.7500  1,234 tok/s  0 s  wider")
    assert second.startswith("  w3  training  0 s  wider")
    view.lanes[2].end()
    assert "\n" not in view.render().plain


def test_an_ended_run_is_not_drawn_again(checkout, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with View(open_here(checkout), None, []) as view:
        view.lanes[0].begin("wider", None)
        view.live.refresh()
        view.lanes[0].end()
        view.say("done")
    before, after = capsys.readouterr().out.split("done")
    assert "wider" in before and "wider" not in after


def test_files_of_a_run_travel_and_links_do_not(tmp_path):
    (tmp_path / "run" / "out").mkdir(parents=True)
    (tmp_path / "run" / "out" / "model.pt").write_bytes(b"weights")
    (tmp_path / "run" / "link").symlink_to("/etc/passwd")
    os.mkfifo(tmp_path / "run" / "pipe")
    files = packed(tmp_path / "run", ["out/model.pt", "link", "pipe", "missing"])
    assert files == {"out/model.pt": b"weights"}
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "old").touch()
    unpack(files, tmp_path / "there")
    assert [path.name for path in tmp_path.joinpath("there").rglob("*")] == ["out", "model.pt"]


def test_without_ray_one_line_says_what_to_install(checkout, tmp_path):
    (tmp_path / "none" / "ray").mkdir(parents=True)
    (tmp_path / "none" / "ray" / "__init__.py").write_text("raise ImportError('not here')")
    output = checkout.agent(*NIGHT, "--workers", "2", expect=1, PYTHONPATH=str(tmp_path / "none"))
    assert output == 'error: --workers needs Ray; run: pip install -e ".[ray]"\n'
    assert not (checkout.folder / "runs" / "t").exists()


# --- on Ray


def of_ray(checkout: Checkout) -> list[str]:
    """Ray's processes of this checkout but its monitors, which take a minute to notice that a killed agent is gone."""
    processes = [process.info for process in psutil.process_iter(["name", "environ"])]
    own = [of for of in processes if (of["environ"] or {}).get("AUTORESEARCH_CACHE") == str(checkout.cache)]
    kinds = ("ray::Worker", "ray::IDLE", "raylet", "gcs_server")
    return [of["name"] for of in own if of["name"].startswith(kinds)]


@needs_ray
def test_a_night_of_two_workers_on_ray(checkout: Checkout):
    """Records agree, both workers ran, a stop and a kill lose nothing, and nothing of it is left."""
    checkout.within = ["taskset", "-c", "0,1"]  # these tests run on one core
    flags = (*NIGHT, "--workers", "2", "--budget", "1")
    process = checkout.start(*flags, "--experiments", "6")
    while len(rows_of(checkout, "result")) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    assert of_ray(checkout)
    process.send_signal(signal.SIGKILL if sys.platform == "linux" else signal.SIGINT)
    process.communicate()
    before = rows_of(checkout, "result")
    output = checkout.agent("--tag", "t", "--experiments", "6")
    results = check_agreement(checkout)
    assert len(results) == 7 and results[: len(before)] == before
    assert {row["worker"] for row in results} == {1, 2} and "worker 2: " in output
    assert not list((checkout.cache / "fleet").glob("t-*[0-9]")) and of_ray(checkout) == []
