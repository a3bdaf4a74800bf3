"""Several workers: the rules of a night in which experiments overlap, a worker that is lost, and a real night on Ray."""

import os
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
    open_here,
    rows_of,
    run_here,
    settings_for,
)

from agent import Alone, Limits, experiment, run_night
from constants import SEED, Problem
from lab.fleet import Fleet
from lab.measure.files import packed, unpack
from lab.record.start import difference
from lab.records import Proposal, sha256
from lab.view import View

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason='Ray is not installed: pip install -e ".[ray]"')
NARROWER = ("        width=64,", "        width=32,")


class Several(Alone):
    """A crew of several in this process: all begin, then that one ends whose change comes first in `order`."""

    def __init__(self, measure, count: int, order: list[int]):
        super().__init__(measure)
        self.count, self.order, self.calls = count, [f"change {number}" for number in order], 0
        self.others = set(threading.enumerate())  # of nights of other tests, which may wait for ever

    @property
    def free(self):
        return self.count - len(self.work)

    def wait(self):
        self.calls += 1
        being_made = any(
            "(body)" in thread.name for thread in set(threading.enumerate()) - self.others
        )  # of Proposals.begin()
        if self.free and (being_made or self.calls < 20):  # another may still begin
            time.sleep(0.005)
            return
        self.calls = 0
        names = [proposal.description if proposal else "" for proposal, _ in self.work]
        first = min(range(len(names)), key=lambda i: self.order.index(names[i]) if names[i] in self.order else 99)
        (proposal, steps), run = self.work.pop(first), None
        try:
            while True:
                run = self.measure(*steps.send(run))
        except StopIteration as end:
            yield proposal, end.value


def run_several(night, changes, order, count=2, proposer=None, experiments=None):
    proposer = proposer or Script(*changes)
    crew = Several(fake_measure(night), count, order)
    return run_night(night, proposer, Limits(experiments, None, time.perf_counter()), crew, Quiet(), False)


def test_what_overtook_is_the_one_to_beat(checkout):
    """Both begin on the baseline; the larger gain ends first, so the smaller one, lower than its parent, is a discard."""
    night = open_here(checkout)
    run_several(night, [NARROWER, better(0.2)], order=[2, 1])
    words = [(result.verdict.word, result.parent, result.rival) for result in night.results]
    assert words == [("keep", None, None), ("keep", 0, 0), ("discard", 0, 1)] and night.lacking() is None
    check_agreement(checkout)


def test_a_keep_that_the_winner_lacks_is_the_next_experiment(checkout):
    night = open_here(checkout)
    run_several(night, [NARROWER, better(0.2)], order=[1, 2])
    words = [(result.verdict.word, result.parent, result.rival) for result in night.results]
    assert words == [("keep", None, None), ("keep", 0, 0), ("keep", 0, 1), ("keep", 2, 2)]
    merged = night.results[3]
    assert (merged.description, merged.operator, merged.mends) == ("experiment 1 on top of 2: change 1", "merge", 1)
    assert "lr=0.2," in (source := night.source(merged)) and "width=32," in source and night.lacking() is None
    check_agreement(checkout)


def test_a_merge_comes_before_what_waits(checkout):
    night = open_here(checkout)

    class Ahead(Script):
        def between_runs(self, number):
            return False

    decays = [("        decay=0.1,", f"        decay={decay},") for decay in (0.2, 0.3)]
    run_several(night, [], order=[1, 2, 3], proposer=Ahead(NARROWER, better(0.2), *decays))
    assert [result.description for result in night.results[1:4]] == ["change 1", "change 2", "change 3"]
    assert night.results[4].operator == "merge" and night.results[5].description == "change 4"


def test_the_commit_of_what_was_overtaken_shows_its_own_change(checkout):
    night = open_here(checkout)
    run_several(night, [NARROWER, better(0.2)], order=[2, 1])
    overtaken = night.results[2]
    assert checkout.git("rev-parse", f"{overtaken.commit}^") == night.results[0].commit
    assert "made on experiment 0, before 1 was kept" in checkout.git("log", "-1", "--format=%B", overtaken.commit)
    change = checkout.git("show", "--format=", overtaken.commit, "--", "train.py")
    assert "+        width=32," in change and "lr=" not in change.replace(" lr=0.4", "")


def test_what_was_trained_before_a_kill_is_judged_and_not_trained_anew(checkout):
    """It was made on the baseline, its run is journalled, then another was kept: it is not rebased, so that its run still counts."""
    night = open_here(checkout)
    run_here(night, 0)
    proposals = [Proposal("narrower", "", night.baseline.source.replace(*NARROWER), proposer="script", parent=0)]
    proposals += [Proposal("faster", "", night.baseline.source.replace(*better(0.2)), proposer="script", parent=0)]
    narrower, faster = (night.add_proposal(proposal, 1) for proposal in proposals)
    measure = fake_measure(night)
    measure(narrower.source, SEED)
    crew = Several(measure, 1, [])
    crew.start(faster, experiment(night, faster))
    for proposal, result in crew.wait():
        night.record(result, proposal.source)
    trained = len(rows_of(checkout, "run"))
    again = open_here(checkout)
    run_several(again, [], order=[], experiments=2)
    assert again.results[2].description == "narrower" and again.results[2].parent == 0 and again.results[2].rival == 1
    assert len(rows_of(checkout, "run")) == trained


def test_a_keep_that_conflicts_goes_back_to_the_proposer(checkout):
    night, told = open_here(checkout), []

    class Told(Script):
        def propose(self, source, history, feedback):
            told.append(feedback)
            return super().propose(source, history, feedback)

    last = ("        decay=0.1,", "        decay=0.2,")
    run_several(night, [], order=[1, 2, 3], proposer=Told(better(0.3), better(0.2), last))
    (row,) = rows_of(checkout, "reject")
    assert row["description"] == "experiment 1 on top of 2: change 1" and "in the same lines" in row["reason"]
    assert [f"{row['description']}: {row['reason']}"] in told
    assert [result.verdict.word for result in night.results[:3]] == 3 * ["keep"]


def test_the_next_is_proposed_knowing_what_runs_and_the_limit_counts_it(checkout):
    night, asked = open_here(checkout), []

    class Asked(Script):
        def propose(self, source, history, feedback):
            asked.append((history.number, sorted(proposal.description for proposal in history.running)))
            return super().propose(source, history, feedback)

    lines = [("beta=0.8", f"beta=0.{i}") for i in range(1, 9)]
    run_several(night, [], order=[3, 2, 1], count=3, proposer=Asked(*lines), experiments=5)
    assert len(night.results) == 6 and len(rows_of(checkout, "proposal")) == 6
    assert asked[:4] == [(1, []), (2, ["change 1"]), (3, ["change 1", "change 2"]), (4, ["change 1", "change 2"])]


def test_the_baseline_is_measured_with_all_workers_at_work(checkout):
    """As all that it is compared with: alone it would have memory and bandwidth to itself."""
    night, at_once = open_here(checkout), []
    crew = Several(fake_measure(night, lambda source, seed: at_once.append((seed, len(crew.work)))), 3, [])
    view = Quiet()
    run_night(night, Script(better(0.2)), Limits(None, None, time.perf_counter()), crew, view, True)
    assert at_once[:2] == [(1, 2), (2, 2)] and night.noise is not None
    assert [line for line in view.lines if "two seeds" in line] == [f"      {night.noise_text}"]


def test_a_night_of_one_worker_lacks_nothing(checkout):
    night = open_here(checkout)
    run_here(night, 6, Script(better(0.2), NARROWER, better(0.4), better(0.1), better(0.3)))
    assert night.lacking() is None and all(result.parent == result.rival for result in night.results)


def test_a_merge_that_was_cut_off_is_run_after_a_kill(checkout):
    """The keep is recorded, the merge not yet proposed: the next start knows that it is missing."""
    night = open_here(checkout)
    run_several(night, [NARROWER, better(0.2)], order=[1, 2], experiments=2)
    again = open_here(checkout)
    assert again.lacking().number == 1
    run_several(again, [], order=[])
    assert again.results[3].operator == "merge" and again.results[3].verdict.word == "keep"


# --- a fleet without Ray


class Lost(Exception):
    pass


class FakeRay:
    """Ray's few calls: an answer is a function, called when it is got."""

    exceptions, calls = SimpleNamespace(RayError=Lost, GetTimeoutError=TimeoutError), 0

    def wait(self, answers, timeout):
        self.calls += 1
        return (answers, []) if timeout > 0.1 or self.calls % 20 == 0 else ([], time.sleep(0.005) or answers)

    def get(self, answer, timeout=None):
        return answer()

    def put(self, value):
        return value

    def kill(self, worker):
        pass


def fake_fleet(night, behaviours):
    """behaviours: of each worker, what its runs do: "works", or "dies" at its first one."""
    fleet = object.__new__(Fleet)
    fleet.ray, fleet.night, fleet.work, fleet.compiled, fleet.looked = FakeRay(), night, [], (None, None), 0.0
    fleet.view = View(night, None, [], len(behaviours))
    local, ran = fake_measure(night, journal=False), []

    def run(number, behaviour, source, seed, title, *others):
        if behaviour == "dies":
            raise Lost("the node is gone\nand more")
        ran.append((number, sha256(source), seed))
        run = local(source, seed, title, fresh=True)
        files = {"train.py": source.encode(), "run.log": b"log", "out/result.json": b"{}"}
        return run, files if seed == 1 else {}

    def worker(number, behaviour):
        measure = SimpleNamespace(remote=lambda *args: partial(run, number, behaviour, *args))
        nothing = SimpleNamespace(remote=lambda: lambda: None)
        state = SimpleNamespace(remote=lambda: lambda: ("training", ["line"]))
        return SimpleNamespace(measure=measure, state=state, ready=nothing, close=nothing)

    fleet.workers = {i: worker(i, behaviour) for i, behaviour in enumerate(behaviours, 1)}
    fleet.sent = dict.fromkeys(fleet.workers)
    return fleet, ran


def run_fleet(night, behaviours, changes, second_seed=True):
    (fleet, ran), view = fake_fleet(night, behaviours), Quiet()
    night.say = view.say
    limits = Limits(None, None, time.perf_counter(), len(behaviours))
    return run_night(night, Script(*changes), limits, fleet, view, second_seed), view.lines, ran


def test_an_experiment_whose_worker_dies_is_run_elsewhere(checkout):
    night = open_here(checkout)
    _, lines, ran = run_fleet(night, ["works", "dies", "works"], [better(0.2), NARROWER, ("beta=0.8", "beta=0.7")])
    assert "worker 2 is left out, 2 remain: the node is gone" in lines
    assert {"change 1", "change 2", "change 3"} < {result.description for result in night.results}
    check_agreement(checkout)
    assert all((night.run_folder(result.number) / "run.log").read_text() == "log" for result in night.results)
    assert len(ran) == len(set(ran)) and not list(night.folder.glob("arrived-*"))
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


def of_ray() -> list[str]:
    """Ray's processes but its monitors, which take a minute to notice that a killed agent is gone."""
    names = (process.info["name"] or "" for process in psutil.process_iter(["name"]))
    return [name for name in names if name.startswith(("ray::Worker", "ray::IDLE", "raylet", "gcs_server"))]


@needs_ray
def test_a_night_of_two_workers_on_ray(checkout: Checkout):
    """Records agree, both workers ran, a stop and a kill lose nothing, and nothing of it is left."""
    checkout.within = ["taskset", "-c", "0,1"]  # these tests run on one core
    flags = (*NIGHT, "--workers", "2", "--budget", "1")
    process = checkout.start(*flags, "--experiments", "9")
    while len(rows_of(checkout, "result") if (checkout.folder / "runs/t/journal.jsonl").exists() else []) < 4:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL if sys.platform == "linux" else signal.SIGINT)
    process.communicate()
    before = rows_of(checkout, "result")
    output = checkout.agent("--tag", "t", "--experiments", "9")
    results = check_agreement(checkout)
    assert len(results) == 10 and results[: len(before)] == before
    assert (
        {row["worker"] for row in results} == {1, 2}
        and "worker 2: " in output
        and "% " not in output.split("worker 2: ")[0][:0]
    )
    assert not list((checkout.cache / "fleet").glob("t-*[0-9]")) and of_ray() == []
