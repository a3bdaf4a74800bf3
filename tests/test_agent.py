"""The loop and its command line: verdicts, the second seed, limits, the next proposal, tags, messages."""

import re
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
from conftest import (
    FIRST,
    NIGHT,
    STUB,
    Script,
    better,
    check_agreement,
    fake_measure,
    fake_run,
    open_here,
    rows_of,
    run_here,
)  # fmt: skip
from test_records import METRICS, RUN

import agent
import constants
from constants import CONFIRM_SEED, Problem
from lab.arguments import choose_tag, complete, restore_arguments
from lab.check import rehearse
from lab.measure.files import folder_bytes
from lab.record.journal import FORMAT, has_ended
from lab.records import Stopped, Verdict, sha256

# --- verdicts


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"val_bpb": 0.995}, "keep"),
        ({"val_bpb": 1.0}, "discard"),  # equal is not lower
        ({"val_bpb": None, "crash": "RuntimeError"}, "crash"),
        ({"val_bpb": 0.5, "metrics": METRICS | {"training_seconds": 304.0}}, "invalid"),
        ({"val_bpb": 1.5, "distrust": "looks ahead"}, "invalid"),
        ({"val_bpb": 0.97, "test_bpb": 0.9801}, "invalid"),  # gained 0.03 on val, 0.0199 on test
        ({"val_bpb": 0.97, "test_bpb": 0.9799}, "keep"),
    ],
)
def test_the_verdict_is_a_pure_function_of_the_numbers(changes, word):
    assert agent.judge(replace(RUN, **changes), RUN, RUN, 300.0).word == word
    assert agent.judge(RUN, None, None, 300.0) == Verdict("keep", "baseline")


@pytest.mark.parametrize(
    ("challenger", "incumbent", "word", "said"),
    [
        ({"val_bpb": 0.99}, {}, "keep", "lower on the second seed 0.990000 against 1.000000 too"),
        ({"val_bpb": 1.0}, {}, "discard", "not confirmed: on the second seed 1.000000 against 1.000000"),
        ({"distrust": "keeps state", "val_bpb": 0.5}, {}, "discard", "not confirmed: on the second seed keeps state"),
        ({"val_bpb": 1.5}, {"crash": "KeyError", "val_bpb": None}, "keep", "the incumbent has no number on the second seed"),
    ],
)  # fmt: skip
def test_a_win_has_to_be_lower_on_the_second_seed_too(challenger, incumbent, word, said):
    """Not on the mean of both: the first comparison is the one that the selection flattered."""
    trouble = lambda run: run.crash or run.distrust  # noqa: E731
    verdict = agent.second_look(replace(RUN, **challenger), replace(RUN, **incumbent), trouble)
    assert verdict.word == word and said in verdict.reason


# --- the second seed, in whole nights


def test_luck_and_a_cheat_that_behaves_on_the_first_seed_only_are_not_confirmed(checkout):
    lucky, cheat = (FIRST, f"{FIRST}\n        luck=0.01,"), better(0.3, distrust="looks ahead", distrust_seed=2)
    night = open_here(checkout)
    night.confirm = True
    run_here(night, proposer=Script(lucky, cheat, better(0.395)))
    assert [result.verdict.word for result in night.results] == ["keep", "discard", "discard", "keep"]
    assert "not confirmed: on the second seed" in night.results[1].verdict.reason
    assert night.results[2].verdict.reason == "not confirmed: on the second seed looks ahead"
    own, incumbent = night.results[3].second
    assert own.val_bpb < incumbent.val_bpb
    check_agreement(checkout)


@pytest.mark.parametrize(("profile", "fresh"), [("cpu", True), ("gpu", False)])
def test_on_a_cpu_the_second_look_is_a_fresh_pair(checkout, profile, fresh):
    """Challenger and incumbent one after the other; on a card a stored run of the incumbent serves."""
    night = open_here(checkout, profile=replace(agent.constants.PROFILES[profile]))
    night.confirm, order = True, []
    measure = fake_measure(night, lambda source, seed: order.append((sha256(source)[:6], seed)))
    changes = better(0.39), (better(0.39)[1], better(0.38)[1])
    run_here(night, proposer=Script(*changes), measure=measure, second_seed=True)
    base, one, two = (result.run.source[:6] for result in night.results)
    expected = [(base, 1), (base, 2), (one, 1), (one, 2), (base, 2), (two, 1), (two, 2), (one, 2)]
    stored = [(base, 1), (base, 2), (one, 1), (one, 2), (two, 1), (two, 2)]
    assert order == (expected if fresh else stored)


def test_the_baseline_is_measured_on_both_seeds(checkout):
    """Not in the demo, nor in a try that confirms nothing; history and summary say how far apart they are."""
    night = open_here(checkout)
    lines = []
    night.say = lines.append
    run_here(night, 1, second_seed=True)
    assert night.baseline_second is not None
    assert [row["seed"] for row in night.journal.of("run")].count(CONFIRM_SEED) == 1
    assert lines == [night.noise_text]  # as soon as it is known
    assert f"{night.baseline_second:.6f}" in night.noise_text
    run_here(open_here(checkout), 2, second_seed=True)
    assert len(rows_of(checkout, "run")) == 4  # three experiments and that one: it is not repeated
    night = open_here(checkout, "other")
    run_here(night, 1)
    assert len(rows_of(checkout, "run", "other")) == 2 and night.noise_text == ""


def test_a_baseline_that_a_busy_machine_slowed_on_the_second_seed_is_measured_there_again(checkout):
    night, lines, tokens = open_here(checkout), [], iter((5.0, 9.9))
    night.say = lines.append

    def make_run(source, seed, title):
        run = fake_run(night)(source, seed, title)
        if seed != CONFIRM_SEED:
            return run
        read = next(tokens)
        return replace(run, val_bpb=run.val_bpb + (10.0 - read) / 100, metrics=run.metrics | {"total_tokens_M": read})

    run_here(night, 1, second_seed=True, measure=partial(agent.measure, night, make_run))
    slow, even = (row for row in night.journal.of("run") if row["seed"] == CONFIRM_SEED)
    assert (
        "read 10.00 and 5.00 million tokens" in lines[0] and night.baseline_second == even["val_bpb"] < slow["val_bpb"]
    )


def test_second_runs_by_the_program(checkout):
    """A confirming run is scored without test, is tried once more if it crashed, and each phase has its line."""
    checkout.edit("train.py", "lr=0.4", "lr=0.39, stumbles=True")
    output = checkout.agent("--tag", "t", "--profile", "cpu", "--try", "stumbles", "--confirm")
    assert check_agreement(checkout)[1]["verdict"] == "keep"
    runs = [row for row in rows_of(checkout, "run") if row["seed"] == CONFIRM_SEED]
    assert len(runs) == 3 and all(row["test_bpb"] is None for row in runs)
    assert "so it is run once more" in output and "is lower than" in output
    # It stumbled in scoring: its weights are scored again, not trained anew.
    assert len(re.findall(r"starting .*so on the second seed: stumbles\n", output)) == 1
    assert "starting: baseline" in output and re.search(r"starting \(about \d+ s\): stumbles\n", output)
    assert "training (about 300 s)\n" in output and re.search(r"scoring \(about \d+ s\)\n", output)
    assert not (checkout.folder / "runs" / "t" / "second").exists()


# --- limits


def test_a_night_ends_at_its_limits(checkout):
    night = open_here(checkout)
    assert run_here(night, 2) == "2 experiments done"
    assert run_here(night, 2) == "2 experiments done" and len(night.results) == 3
    assert run_here(night, None, hours=1e-9) == "1e-09 hours are used up"
    assert run_here(open_here(checkout, "one"), 1) == "1 experiment done"
    assert run_here(open_here(checkout, "script"), None, Script(better(0.3))) == "the script is complete"


def test_a_night_ends_in_order_also_if_python_drops_the_interrupt(checkout):
    """As it does if the signal comes within a finalizer: the handler has set `stop` before."""
    night = open_here(checkout)
    with pytest.raises(Stopped):
        run_here(night, 3, measure=fake_measure(night, lambda source, seed: night.stop.set()))
    assert len(check_agreement(checkout)) == 1


def test_twenty_crashes_in_a_row_stop_the_night(checkout):
    night = open_here(checkout)
    crashes = Script(*[("beta=0.8", f"beta={i} // 0") for i in range(22)])
    with pytest.raises(Problem, match="20 experiments crashed in a row"):
        run_here(night, 30, crashes)
    assert [result.verdict.word for result in night.results[1:]] == ["crash"] * 20


def test_a_baseline_that_crashes_ends_the_night_with_its_log(checkout, monkeypatch):
    checkout.edit("train.py", "    steps = 0\n", "    raise RuntimeError('at once')\n")
    output = checkout.agent(*NIGHT, expect=1)
    assert "the baseline failed" in output and "RuntimeError: at once" in output and "--tag NEW" in output
    runs = checkout.folder / "runs"
    assert choose_tag(arguments(monkeypatch), runs) != "t"  # without a tag it is not taken up again
    with pytest.raises(Problem, match="no baseline with a number"):
        choose_tag(arguments(monkeypatch, "--check", "t"), runs)


# --- the next proposal


class Slow(Script):
    """A proposer that is asked in the background."""

    def between_runs(self, number):
        return False


def test_the_next_proposal_is_prepared_while_one_trains(checkout):
    """Of two that take as long as a run does, the second costs no time: it is thought of meanwhile."""
    night, script = open_here(checkout), Slow(*[("beta=0.8", f"beta=0.{i}") for i in range(1, 4)])
    run_here(night, 3, script, measure=fake_measure(night, lambda source, seed: time.sleep(0.2)))
    running = [(history.number, *(run.description for run in history.running)) for history, _ in script.asked]
    assert running == [(1, "baseline"), (2, "change 1"), (3, "change 2")]  # and none after the last


def test_a_proposal_made_for_the_old_incumbent_is_merged_into_the_new_one(checkout):
    night = open_here(checkout)
    changes = [better(0.2), ("        width=64,", "        width=32,")]
    run_here(night, 2, Slow(*changes), measure=fake_measure(night, lambda source, seed: time.sleep(0.1)))
    assert [(result.verdict.word, result.parent) for result in night.results[1:]] == [("keep", 0), ("keep", 1)]
    source = night.source(2)
    assert "lr=0.2," in source and "width=32," in source
    rows = [row for row in rows_of(checkout, "proposal") if row["id"] == night.results[2].proposal]
    assert rows[-1]["source"] == source and rows[-1]["parent"] == 1  # the journal has what ran


def test_a_proposal_that_does_not_merge_goes_back_with_the_reason(checkout):
    night, script = open_here(checkout), Slow(better(0.2), better(0.1), (better(0.2)[1], better(0.1)[1]))
    run_here(night, 2, script, measure=fake_measure(night, lambda source, seed: time.sleep(0.1)))
    (row,) = rows_of(checkout, "reject")
    assert "the incumbent has changed since, in the same lines" in row["reason"] and "proposal" in row
    assert script.asked[2][1] == [f"change 2: {row['reason']}"] and night.results[2].verdict.word == "keep"


def test_a_proposal_that_is_made_while_one_looks_for_it_does_not_end_the_night(checkout, monkeypatch):
    """The thread was alive at the first look, and is done at the second."""
    night = open_here(checkout)
    look = night.unused_proposal

    def late(*args):
        time.sleep(0.1)
        return look(*args)

    monkeypatch.setattr(night, "unused_proposal", late)
    script = Slow(*[("beta=0.8", f"beta=0.{i}") for i in range(1, 5)])
    assert run_here(night, None, script) == "the script is complete" and len(night.results) == 5


def test_a_proposer_that_never_gets_past_the_screen_stops_the_night(checkout):
    night = open_here(checkout)
    with pytest.raises(Problem, match=r"20 proposals in a row were refused, the last with: .*`os` is refused"):
        run_here(night, 5, Slow(*[lambda source: source + "import os\n"] * 50))
    assert len(rows_of(checkout, "reject")) == 20


# --- the command


def arguments(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["agent.py", *words])
    return agent.parse_arguments("")


def test_what_a_start_takes_over_from_the_last(monkeypatch):
    """What only goes with Claude is forgotten with another proposer, what a model may cost is not; a --try and a --check are no such starts."""
    claude = {"proposer": "claude", "max_usd": 9.0, "model": "m", "hours": 3.0}
    tune = {"proposer": "tune", "workers": 2}
    for starts, flags, key, expected in (
        ([claude], "--proposer tune", False, {"proposer": "tune", "max_usd": None, "model": None, "hours": 3.0}),
        ([claude], "", True, {"proposer": "claude", "max_usd": 9.0, "hours": 3.0}),
        ([claude, {"attempt": "x"}, {"check": "t"}], "", True, {"proposer": "claude", "attempt": None}),
        ([claude, tune], "--proposer claude", True, {"max_usd": 9.0, "model": "m", "workers": 2}),
        ([claude, tune], "--check t", False, {"workers": None}),
        ([tune | {"no_sandbox": True}], "", False, {"workers": 2, "no_sandbox": None}),  # to be said each time
    ):
        args = arguments(monkeypatch, *flags.split())
        restore_arguments(args, [{"event": "night", "arguments": start} for start in starts], key)
        assert {name: getattr(args, name) for name in expected} == expected


def test_try_runs_the_checkout_against_the_committed_baseline(checkout):
    flags = ("--tag", "t", "--profile", "cpu", "--no-confirm", "--try")
    assert "edit it" in checkout.agent(*flags, "nothing", expect=1)
    checkout.edit("train.py", "lr=0.4", "lr=0.2")
    checkout.edit("train.py", "    steps = 0\n", "    steps = 0\n    print('counted 7')\n")
    output = checkout.agent(*flags, "halve the  rate", "--because", "it overshoots")
    assert "Its run beside the incumbent's: tokens +0 %; loss after 25% of the time" in output
    assert output.count("it printed: ") == 1 and "it printed: counted 7\n" in output
    results = check_agreement(checkout)
    assert results[1]["hypothesis"] == "it overshoots"
    assert "it overshoots" in checkout.git("log", "-1", "--format=%B", results[1]["commit"])
    assert [(row["verdict"], row["description"]) for row in results[1:]] == [("keep", "halve the rate")]
    assert "lr=0.4" in checkout.git("show", f"{results[0]['commit']}:train.py")
    assert "git diff autoresearch/t -- train.py" in output
    checkout.edit("train.py", "lr=0.2", "lr=0.8")
    output = checkout.agent(*flags, "still \x1b[31mtoo\nhigh")
    table = [line for line in output.splitlines() if line[:4].strip().isdigit()]
    assert [line.split()[0] for line in table] == ["1", "2"]  # the incumbent and its own, not the whole night
    assert "put back   git checkout autoresearch/t -- train.py" in output
    assert checkout.git("log", "-1", "--format=%B", "refs/autoresearch/t/0002").startswith("still too high (discard, ")


def test_a_rehearsal_says_in_seconds_whether_it_would_run_and_records_nothing(checkout):
    checkout.edit("train.py", "lr=0.4", "lr=0.2")
    flags = ("--profile", "cpu", "--try", "x", "--dry")
    assert "passes the screen, builds and takes three steps" in checkout.agent(*flags)
    checkout.edit("train.py", "import prepare\n", "import os, prepare\n")
    assert "`os` is refused" in checkout.agent(*flags, expect=1)
    assert not list(checkout.folder.glob("runs/*")) and not checkout.git("for-each-ref", "refs/autoresearch")
    night = open_here(checkout)
    for old, new, trouble in (
        ("    steps = 0", "    steps = missing", ""),  # after the clock: not rehearsed
        ("    model = build_model(None)", "    model = 1 // 0", "ZeroDivisionError"),
        ("    clock = run.start_clock(model)", "    raise SystemExit()\n    clock = run.start_clock(1)", "before its clock"),
    ):  # fmt: skip
        assert trouble in (said := rehearse(night, STUB.replace(old, new))) and bool(said) == bool(trouble)


def test_tries_and_replays_are_nights_of_their_own(checkout, monkeypatch):
    run_here(open_here(checkout), 1)  # not ended: one that names no tag would take it up
    checkout.edit("train.py", "lr=0.4", "lr=0.35")
    output = checkout.agent("--profile", "cpu", "--budget", "30", "--no-confirm", "--try", "lower rate")
    assert "git diff autoresearch/try -- train.py" in output and len(check_agreement(checkout, "try")) == 2
    checkout.edit("train.py", "lr=0.35", "lr=0.4")
    replayed = checkout.agent("--replay", "try", "--no-confirm", "--profile", "cpu")
    assert "30 s a run" in replayed  # as in the night that it repeats
    assert "night try cannot replay itself" in checkout.agent("--replay", "try", "--tag", "try", expect=1)
    assert [row["description"] for row in check_agreement(checkout, "replay")] == ["baseline", "lower rate"]
    assert len(check_agreement(checkout)) == 2
    assert choose_tag(arguments(monkeypatch), checkout.folder / "runs") == "t"  # the night that has not ended


def test_a_try_that_breaks_the_rules_is_refused_before_its_baseline_is_trained(checkout):
    checkout.edit("train.py", "lr=0.4", "lr=(0.4")
    output = checkout.agent("--profile", "cpu", "--try", "x", expect=1)
    assert output.splitlines()[-1].startswith("error: train.py does not compile: ") and "starting" not in output
    assert not (checkout.folder / "runs" / "try").exists()


def test_a_demo_is_deleted_only_if_the_next_one_can_run(checkout):
    """An interrupted one goes on; with another budget, or after its end, it begins anew; nobody's running demo is touched."""
    checkout.agent("--demo", "--experiments", "1", "--budget", "3")
    journal = (checkout.folder / "runs" / "demo" / "journal.jsonl").read_bytes()
    for place in (checkout.folder / "runs" / "demo" / "lock", checkout.cache / "device-cpu.lock"):
        with constants.lock(place, "somebody"):
            assert "in use by" in checkout.agent("--demo", expect=1)
        assert (checkout.folder / "runs" / "demo" / "journal.jsonl").read_bytes() == journal
    # Also one of an earlier version.
    text = (checkout.folder / "runs" / "demo" / "journal.jsonl").read_text()
    (checkout.folder / "runs" / "demo" / "journal.jsonl").write_text(text.replace(f'"format": {FORMAT}', '"format": 1'))
    assert "the earlier demo is deleted" in checkout.agent("--demo", "--experiments", "1")
    check_agreement(checkout, "demo")


def test_a_night_of_the_program_says_what_it_runs_on_and_ends(checkout, monkeypatch):
    """It grows by little, keeps the weights of its best alone, and no command without a tag takes it up."""
    trouble = {"STUB_SIZES": "cpu", "STUB_COMPILER_TROUBLE": "torch.compile needs g++"}
    output = checkout.agent(*NIGHT, "--experiments", "6", "--budget", "60", **trouble)
    lines, folder = output.splitlines(), checkout.folder / "runs" / "t"
    (at,) = (i for i, line in enumerate(lines) if "baseline" in line and "keep" in line)
    assert lines[at + 1].strip() == "stub (sizes cpu, a test), attention sdpa, 500,000 tokens a second"
    assert "warning: runs are not compiled, so they train on fewer tokens: torch.compile needs g++" in output
    assert "go on      python agent.py --tag t  (with a larger --experiments or --hours)\n" in output
    assert rows_of(checkout, "end")[0]["reason"] == "6 experiments done"
    assert choose_tag(arguments(monkeypatch), folder.parent) != "t"
    assert has_ended([*rows_of(checkout), {"event": "night", "arguments": {"check": "t"}}])
    assert "MB in runs/t" in output and folder_bytes(folder) < 7 * 100_000
    assert len(list(folder.glob("*/out/model.pt"))) == 1


def test_replays_of_two_nights_do_not_mix(checkout, monkeypatch):
    runs = checkout.folder / "runs"
    night = open_here(checkout, "replay")
    night.journal.append("night", format=FORMAT, arguments={"replay": "a"})
    assert choose_tag(arguments(monkeypatch, "--replay", "a"), runs) == "replay"
    assert choose_tag(arguments(monkeypatch, "--replay", "b"), runs) == "replay-2"


def test_what_a_newcomer_gets_wrong_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "program.md").write_text("# no journal\n")
    monkeypatch.chdir(tmp_path)
    for flags, *said in (
        ("", "ANTHROPIC_API_KEY", "--demo", "--command", "--proposer tune", "--try", "program.md"),
        ("--replay nowhere.jsonl", "nowhere.jsonl is no night; --replay takes"),
        ("--replay program.md", "program.md line 1 is damaged"),
        ("--replay empty.jsonl", "has no experiments"),
        ("--proposer claude", "needs ANTHROPIC_API_KEY"),
        ("--proposer tune --max-usd 3", "not with --proposer tune"),
        ("--check none", "there is no night none"),
    ):
        with pytest.raises(Problem) as problem:
            complete(arguments(monkeypatch, *flags.split()), tmp_path / "runs", key=False)
        assert all(part in str(problem.value) for part in said)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--experiments", "0"), "whole number over 0"), (("--seeds", "five"), "whole number over 0"), (("--check", "t", "--seeds", "1"), "2 and more"),
        (("--tag", "a/b"), "a tag has letters"), (("--check", "by-hand"), "a tag has letters"), (("--try", " "), "a few words"),
        (("--demo", "--proposer", "tune"), "not allowed with"), (("--demo", "--tag", "x"), "has its own tag"), (("--kept",), "goes with --replay"),
        (("--seeds", "3"), "goes with --check"), (("--dry",), "goes with --try"), (("--check", "t", "--ablate", "t"), "not allowed with"),
        (("--check", "t", "--tag", "x"), "leave out --tag"),
        (("--command", " "), "takes a program"), (("--help",), "--ablate"),
    ],
)  # fmt: skip
def test_usage_errors_exit_2(args, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["agent.py", *args])
    with pytest.raises(SystemExit) as stop:
        agent.parse_arguments("")
    assert stop.value.code == (0 if args == ("--help",) else 2) and message in "".join(capsys.readouterr())


def test_no_lock_is_held_after_the_last_line(checkout):
    process = checkout.start(*NIGHT, "--experiments", "1")
    for line in process.stdout:
        if line.startswith("history"):
            break
    for place in (checkout.folder / "runs" / "t" / "lock", checkout.cache / "device-cpu.lock"):
        with constants.lock(place, "a test"):
            pass
    assert process.wait(timeout=10) == 0


# --- the terminal


def test_what_read_the_output_ends_and_so_does_the_night_with_one_line(checkout):
    """As with `| head`. rich would end it without a word."""
    checkout.slow(0.05)
    process = subprocess.Popen(
        [sys.executable, "agent.py", *NIGHT, "--experiments", "30"], cwd=checkout.folder, env=checkout.environment | {"PYTHONSAFEPATH": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read()
    assert process.wait(60) == 1 and said.startswith("error: what read this output has ended") and said.count("\n") == 1
    assert "1 experiment:" in checkout.agent("--tag", "t", "--proposer", "tune", "--experiments", "1")


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(checkout):
    command = f"{sys.executable} agent.py --tag t --profile cpu --proposer tune --experiments 1 --no-confirm"
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"], cwd=checkout.folder, env=checkout.environment | {"TERM": "dumb"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "starting: baseline" in done.stdout and "scoring" in done.stdout and "\x1b[" not in done.stdout


def test_a_user_without_a_folder_is_told_how(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("AUTORESEARCH_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    with pytest.raises(Problem, match=r"HOME is not set.*export HOME"):
        constants.cache_dir()
