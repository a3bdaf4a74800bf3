"""The loop: edits, screen, proposers, verdicts, journal, git, resume. Training is the stub of stub_prepare.py."""

import json
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from conftest import NIGHT, ROOT, STUB, check_agreement, make_checkout, rows_of, story
from hypothesis import given
from hypothesis import strategies as st

import agent
from agent import Edit

REAL = (ROOT / "train.py").read_text()


# --- edits


LINES = st.lists(st.sampled_from(["a = 1", "b = 2", "c = 3", "", "    d"]), max_size=14).map(
    lambda lines: "\n".join(lines) + "\n"
)


@given(LINES, LINES)
def test_edits_between_two_sources_lead_from_one_to_the_other(old, new):
    if old.strip() and old != new:
        assert agent.apply_edits(old, agent.edits_between(old, new)) == new


def test_edits_between_are_small():
    new = STUB.replace("width=64", "width=128")
    assert agent.edits_between(STUB, new) == (Edit("        width=64,", "        width=128,"),)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("no such line", "x"), "matches 0 times"),
        (Edit("", "x"), "is empty"),
        (Edit("}", "x"), None),
        (Edit("    steps", "x"), "matches 0 times"),  # part of a line is not a line
    ],
)
def test_an_edit_must_match_whole_lines_exactly_once(edit, message):
    if message is None:
        assert "\nx\n" in agent.apply_edits(STUB, (edit,))
    else:
        with pytest.raises(agent.ScreenError, match=message):
            agent.apply_edits(STUB, (edit,))


def test_an_edit_that_matches_twice_is_refused():
    with pytest.raises(agent.ScreenError, match="matches 2 times"):
        agent.apply_edits("a\nb\na\n", (Edit("a", "c"),))


# --- screen


def test_the_real_train_py_passes_the_screen():
    agent.screen(REAL, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import os", "import of os"),
        ("import torch.utils.cpp_extension", "cpp_extension"),
        ("from torch import hub", "hub"),
        ("torch.os.environ['X'] = '1'", "environ|`os`"),
        ("x = open('f')", "`open`"),
        ("torch.manual_seed(3)", "seed belongs"),
        ("prepare.evaluate_bpb = None", "assignment to an attribute of the imported prepare"),
        ("torch.nn.functional.cross_entropy = None", "assignment to an attribute of the imported torch"),
        ("F.softmax = None", "assignment to an attribute of the imported F"),
        ("x = eval('1')", "`eval`"),
        ("x = ().__class__.__dict__", "__dict__"),
        ("object.__setattr__(torch, 'x', 1)", "__setattr__"),
        ("def f(clock): clock.start += 9", "assignment to `start` is refused"),
        ("def f(clock): type(clock).expired = False", "assignment to `expired` is refused"),
        ("def f(run): run.seed = 7", "`seed` is refused|assignment to `seed`"),
        ("torch.random.seed()", "`seed` is refused: the seed belongs"),
        ("import numpy as np; x = np.random.default_rng(3)", "seed belongs"),
        ("import numpy as np; x = np.lib.format.open_memmap('w.npy')", "open_memmap"),
        ("def f(x): x.dump('w')", "`dump`"),
        ("prepare.Path('w').write_text('')", "`Path`|`write_text`"),
        ("import collections; collections._sys", "_sys"),
        ("match prepare:\n    case object(os=z): pass", "`os`"),
        ("def f(run): return run._rows", "_rows"),
        ("prepare.open_rows", "open_rows"),
        ("from torch.random import seed", "`seed` is refused"),
        ("torch.cuda.manual_seed_all(7)", "manual_seed_all"),
        ("torch.backends.cuda.torch.log_softmax = None", "assignment to an attribute of the imported torch"),
        ("import numpy as np; x = np.fromfile('f')", "fromfile"),
        (f"x = '{'a' * 1001}'", "literal"),
        (f"x = {10**1001}", "literal"),
        ("x = (", "does not compile"),
        ("from .prepare import x", "import of prepare is refused|relative"),
        ("#" * 64_000, "bytes"),
    ],
)
def test_the_screen_refuses(line, message):
    with pytest.raises(agent.ScreenError, match=message):
        agent.screen(f"{REAL}{line}\n", {})


@pytest.mark.parametrize(
    "part", ["def build_model(profile)", '__name__ == "__main__"', ".start_clock(", ".finish(", "prepare.start("]
)
def test_the_screen_asks_for_the_contract(part):
    assert part in REAL
    with pytest.raises(agent.ScreenError, match="contract"):
        agent.screen(
            REAL.replace(
                part,
                part.replace("build_model", "make")
                .replace("main", "xx")
                .replace("start", "go")
                .replace("finish", "end"),
            ),
            {},
        )


@pytest.mark.parametrize(
    "line",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "torch._inductor.config.coordinate_descent_tuning = True",
        "def f(run): return torch.randperm(run.seed)",
        "class A:\n    def f(self): self.start = 1",
    ],
)
def test_what_an_honest_edit_writes_passes_the_screen(line):
    agent.screen(f"{REAL}{line}\n", {})


def test_a_program_that_differs_in_comments_only_is_no_new_idea():
    tried = {agent.fingerprint(STUB): "experiment 3, discard"}
    with pytest.raises(agent.ScreenError, match="experiment 3, discard"):
        agent.screen(STUB.replace("# best at 0.1", "# hm"), tried)


# --- verdicts


def experiment(**changes):
    metrics = {"training_seconds": 300.0, "num_steps": 1000}
    base = agent.Experiment(
        number=1, parent=0, description="x", hypothesis="", edits=(), operator="", repairs=None, missed=False, source="", val_bpb=1.0,
        test_bpb=1.0, confirm_bpb=None, crash="", distrust="", rerun_seconds=0.0, cold_seconds=None, metrics=metrics, run_seconds=320.0, clock_seconds=301.0, scoring_seconds=20.0, idle_seconds=0.1,
    )  # fmt: skip
    return replace(base, **changes)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"val_bpb": 0.995}, "keep"),
        ({"val_bpb": 1.0}, "discard"),  # equal is not lower
        ({"val_bpb": 1.01}, "discard"),
        ({"val_bpb": None, "crash": "RuntimeError"}, "crash"),
        ({"val_bpb": 0.5, "metrics": {"training_seconds": 304.0, "num_steps": 1000}}, "invalid"),
        ({"val_bpb": 0.5, "run_seconds": 320.0 + 61}, "invalid"),  # longer before its clock started
        ({"val_bpb": 0.5, "run_seconds": 320.0 + 7, "clock_seconds": 301.0 + 7}, "invalid"),  # and after
        ({"val_bpb": 0.9, "test_bpb": 0.9, "run_seconds": 320.0 + 5, "clock_seconds": 301.0 + 5}, "keep"),
        ({"val_bpb": 0.5, "clock_seconds": None}, "invalid"),
        ({"val_bpb": 0.5, "scoring_seconds": 51.0}, "invalid"),
        ({"val_bpb": 1.5, "distrust": "looks ahead"}, "invalid"),
        ({"val_bpb": 0.97, "test_bpb": 0.9801}, "invalid"),  # gained 0.03 on val, 0.0199 on test
        ({"val_bpb": 0.97, "test_bpb": 0.9799}, "keep"),
        ({"val_bpb": 0.99, "test_bpb": 0.99, "confirm_bpb": 1.005}, "keep"),  # means 0.9975 and 0.9985
        ({"val_bpb": 0.99, "test_bpb": 0.99, "confirm_bpb": 1.007}, "discard"),
    ],
)
def test_the_verdict_is_a_pure_function_of_the_numbers(changes, word):
    assert agent.judge(experiment(**changes), experiment(confirm_bpb=0.997), experiment(number=0), 300.0).word == word


def test_a_run_may_take_the_time_to_compile_a_new_model():
    late = experiment(val_bpb=0.99, test_bpb=0.99, run_seconds=320.0 + 150)
    assert agent.judge(late, experiment(), experiment(cold_seconds=70.0), 300.0).word == "keep"  # 60 and 105 s
    assert agent.judge(late, experiment(), experiment(cold_seconds=50.0), 300.0).word == "invalid"
    on_card = experiment(cold_seconds=50.0)  # its micro-batch may be halved twice, and compiled each time: 60 and 225 s
    on_card.metrics["peak_vram_mb"] = 40_000.0
    assert agent.judge(late, experiment(), on_card, 300.0).word == "keep"
    later = replace(late, run_seconds=late.run_seconds + 130)
    assert agent.judge(later, experiment(), on_card, 300.0).word == "invalid"


def test_the_baseline_is_kept():
    assert agent.judge(experiment(number=0, parent=None), None, None, 300.0) == agent.Verdict("keep", "baseline")


# --- what a child leaves behind


RESULT = {
    "training_seconds": 1.0, "total_seconds": 2.0, "peak_vram_mb": None, "mfu_percent": None, "total_tokens_M": 1, "num_steps": 5,
    "num_params_M": 1.0, "startup_seconds": 1.0, "epoch": 0.1, "seed": 1, "device": "cpu", "backend": "sdpa",
    "loader_wait_seconds": 0.0, "micro_rows": 16, "losses": [[0.1, 2.0]],
}  # fmt: skip


def test_an_honest_result_is_read(tmp_path):
    (tmp_path / "result.json").write_text(json.dumps(RESULT))
    assert agent.read_result(tmp_path / "result.json") == RESULT


@pytest.mark.parametrize(
    "text",
    [
        "", "null", "[]", "{}", "[" * 100_000, "x" * 70_000,
        json.dumps({**RESULT, "val_bpb": 0.1}),
        json.dumps({**RESULT, "training_seconds": "300"}),
        json.dumps({**RESULT, "training_seconds": None}),
        json.dumps({**RESULT, "num_steps": -1}),
        json.dumps({**RESULT, "num_steps": True}),
        json.dumps({**RESULT, "epoch": float("nan")}),
        json.dumps({**RESULT, "total_seconds": float("inf")}),
        json.dumps({**RESULT, "device": "a\x1b[31mb"}),
        json.dumps({**RESULT, "backend": "b" * 100}),
        json.dumps({**RESULT, "losses": [[1.0, float("nan")]]}),
        json.dumps({**RESULT, "losses": [[1.0]]}),
    ],
)  # fmt: skip
def test_a_hostile_result_is_refused(tmp_path, text):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(ValueError):
        agent.read_result(tmp_path / "result.json")


def test_a_result_that_is_a_link_or_a_pipe_is_refused(tmp_path):
    (tmp_path / "real").write_text(json.dumps(RESULT))
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises((OSError, ValueError)):
            agent.read_result(tmp_path / name)


def test_text_of_a_child_is_made_harmless():
    raw = b"\x1b[31mred\x1b[0m\x1b]0;title\x07 a\rb\x00c\xff\nlast\r\n"
    assert agent.sanitise(raw) == "bc\ufffd\nlast\n"


# --- the random proposer


def test_random_moves_one_number_of_the_profile():
    proposer = agent.RandomProposer("t", "cpu")
    names = {name for name, _ in agent.numeric_hyperparameters(REAL, "cpu")}
    assert {"n_layer", "MATRIX_LR", "step_tokens", "ROPE_BASE"} <= names and not {"softcap", "short_window"} & names
    for number in range(1, 30):
        proposal = proposer.propose(REAL, agent.Ledger(number, 0, [], []), [])
        new = agent.apply_edits(REAL, proposal.edits)
        changed = [pair for pair in zip(REAL.split("\n"), new.split("\n"), strict=True) if pair[0] != pair[1]]
        assert len(changed) == 1 and proposal.description.split(" ")[0] in changed[0][0]
        assert proposal == proposer.propose(REAL, agent.Ledger(number, 0, [], []), [])


def test_random_moves_the_sizes_of_the_card_that_is_there():
    """Its own numbers, and the defaults for those that it leaves out; moving one of these moves the program."""
    for sizes, layers, tokens in (("H100", 9, 2**18), ("RTX 4090", 5, 2**16), ("small", 4, 2**15)):
        found = {name: node.value for name, node in agent.numeric_hyperparameters(REAL, sizes)}
        assert (found["n_layer"], found["step_tokens"]) == (layers, tokens)
        assert found["softcap"] == 15.0 and "momentum_steps" in found and "conv_taps" not in found


@given(st.one_of(st.integers(1, 10**6), st.floats(1e-6, 1e3)), st.integers())
def test_a_neighbour_is_another_number_of_the_same_kind(value, seed):
    text = agent.neighbour(value, random.Random(seed))
    assert (
        type(eval(text)) is type(value)
        and eval(text) > 0
        and (eval(text) < 1 or not 0.5 < value < 0.999)
        and (eval(text) != value or value < 1e-5 or isinstance(value, float))
    )


# --- a whole night


def test_a_night_agrees_with_itself_and_leaves_the_checkout_alone(checkout):
    (checkout.folder / "train.py").write_text(STUB.replace("width=64", "width=100"))  # dirty
    (checkout.folder / "staged.txt").write_text("staged")
    checkout.git("add", "staged.txt")
    (checkout.folder / "untracked.txt").write_text("untracked")
    (checkout.folder / ".git" / "index.lock").write_text("")  # left over by something that was killed
    index = (checkout.folder / ".git" / "index").read_bytes()
    output = checkout.agent(*NIGHT, "--experiments", "8")
    assert (checkout.folder / ".git" / "index").read_bytes() == index
    (checkout.folder / ".git" / "index.lock").unlink()
    status = checkout.git("status", "--short").split("\n")
    assert status == ["A  staged.txt", " M train.py", "?? untracked.txt"]
    results = check_agreement(checkout)
    assert len(results) == 9 and "width=100" in checkout.git("show", f"{results[0]['commit']}:train.py")
    assert "all 8 experiments are done" in output and "git checkout autoresearch/t -- train.py" in output
    assert {row["verdict"] for row in results} >= {"keep", "discard"}
    checkout.git("checkout", "autoresearch/t", "--", "train.py")  # the command that the summary prints


def test_a_night_in_two_sittings_repeats_one_in_a_single(checkout, undisturbed):
    checkout.agent(*NIGHT, "--experiments", "3")
    checkout.agent("--tag", "t", "--experiments", "6")
    assert story(checkout) == undisturbed


def test_a_complete_night_prints_its_summary_and_runs_nothing(checkout):
    checkout.agent(*NIGHT, "--experiments", "2")
    assert "all 2 experiments are done" in checkout.agent("--tag", "t")
    assert len(check_agreement(checkout)) == 3


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """What an undisturbed night of six experiments comes to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    checkout = make_checkout(folder / "checkout", folder / "cache", stub=True)
    checkout.agent(*NIGHT, "--experiments", "6")
    return story(checkout)


@pytest.mark.parametrize("moment", ["baseline", "proposal", "start", "run", "result"])
def test_killed_at_any_moment_the_night_goes_on(checkout, moment, undisturbed):
    """kill -9 when the journal or the run folder shows the moment; the next start ends as an undisturbed night does."""
    journal = checkout.folder / "runs" / "t" / "journal.jsonl"
    wanted = {
        "baseline": lambda text: '"event": "start"' in text,
        "proposal": lambda text: text.count('"event": "proposal"') == 2,
        "start": lambda text: text.count('"event": "start"') == 3,
        "run": lambda text: (checkout.folder / "runs" / "t" / "0003" / "run.log").exists(),
        "result": lambda text: text.count('"event": "result"') == 4,
    }[moment]
    checkout.slow(0.01)
    process = checkout.start(*NIGHT, "--experiments", "6")
    deadline = time.monotonic() + 60
    while not (journal.exists() and wanted(journal.read_text())):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.001)
    process.kill()
    process.wait()
    acknowledged = [json.loads(line) for line in journal.read_text().splitlines()[:-1]]
    checkout.agent("--tag", "t", *(NIGHT[2:] if moment == "baseline" else ()), "--experiments", "6")
    assert story(checkout) == undisturbed
    kept = [row for row in acknowledged if row["event"] == "result"]
    assert rows_of(checkout, "result")[: len(kept)] == kept


def test_a_torn_last_line_is_dropped_and_said(checkout):
    checkout.agent(*NIGHT, "--experiments", "2")
    journal = checkout.folder / "runs" / "t" / "journal.jsonl"
    with open(journal, "a") as file:
        file.write('{"event": "result", "numb')
    output = checkout.agent("--tag", "t", "--experiments", "3")
    assert "torn last line" in output and len(check_agreement(checkout)) == 4


@pytest.mark.parametrize("refs", ["none moved", "branch moved only"])
def test_killed_between_result_and_refs_the_moves_are_made_on_resume(checkout, refs):
    checkout.agent(*NIGHT, "--experiments", "6")
    results = rows_of(checkout, "result")
    keeps = [row for row in results if row["verdict"] == "keep"]
    last = keeps[-1]
    journal = checkout.folder / "runs" / "t" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    cut = next(i for i, line in enumerate(lines) if json.loads(line).get("commit") == last["commit"])
    journal.write_text("".join(lines[: cut + 1]))
    for row in results[last["number"] :]:
        checkout.git("update-ref", "-d", f"refs/autoresearch/t/{row['number']:04d}")
    if refs == "none moved":
        checkout.git("update-ref", "refs/heads/autoresearch/t", keeps[-2]["commit"])
    checkout.agent("--tag", "t", "--experiments", str(last["number"]))
    assert check_agreement(checkout)[-1]["commit"] == last["commit"]


def test_a_branch_that_was_moved_stops_the_night(checkout):
    checkout.agent(*NIGHT, "--experiments", "2")
    checkout.git("update-ref", "refs/heads/autoresearch/t", "main")
    output = checkout.agent("--tag", "t", "--experiments", "3", expect=1)
    assert "not at the last keep" in output and "Traceback" not in output


def test_refs_without_a_journal_stop_the_night_with_the_command_that_deletes_them(checkout):
    checkout.agent(*NIGHT, "--experiments", "1")
    (checkout.folder / "runs" / "t").rename(checkout.folder / "gone")
    output = checkout.agent(*NIGHT, expect=1)
    command = re.search(r"(git for-each-ref --format=.*--stdin)", output)[1]
    subprocess.run(command, shell=True, cwd=checkout.folder, check=True)
    assert "autoresearch" not in checkout.git("for-each-ref")


def test_a_night_whose_branch_is_checked_out_is_refused(checkout):
    checkout.agent(*NIGHT, "--experiments", "1")
    checkout.git("switch", "-q", "autoresearch/t")
    assert "is checked out" in checkout.agent("--tag", "t", "--experiments", "2", expect=1)


def test_a_baseline_that_crashes_ends_the_night_with_its_log(checkout):
    source = STUB.replace("    steps = 0\n", "    steps = 0\n    raise RuntimeError('at once')\n")
    (checkout.folder / "train.py").write_text(source)
    output = checkout.agent(*NIGHT, expect=1)
    assert "the baseline failed" in output and "RuntimeError: at once" in output


# --- try, replay, tags


def test_try_runs_the_checkout_against_the_committed_baseline(checkout):
    assert "edit it" in checkout.agent("--tag", "t", "--profile", "cpu", "--try", "nothing", expect=1)
    (checkout.folder / "train.py").write_text(STUB.replace("lr=0.4", "lr=0.2"))
    output = checkout.agent("--tag", "t", "--profile", "cpu", "--try", "halve the  rate")
    results = check_agreement(checkout)
    assert [(row["verdict"], row["description"]) for row in results] == [
        ("keep", "baseline"),
        ("keep", "halve the rate"),
    ]
    assert "lr=0.4" in checkout.git("show", f"{results[0]['commit']}:train.py")
    assert "git diff autoresearch/t -- train.py" in output
    again = checkout.agent("--tag", "t", "--try", "the same", expect=1)
    assert "the night's incumbent, unchanged; edit it" in again
    (checkout.folder / "train.py").write_text(STUB)
    again = checkout.agent("--tag", "t", "--try", "back", expect=1)
    assert "tried already: experiment 0, keep" in again and len(check_agreement(checkout)) == 2


def test_try_needs_no_proposer_and_a_bad_edit_is_one_clear_line(checkout):
    (checkout.folder / "train.py").write_text(STUB + "import os\n")
    output = checkout.agent("--tag", "t", "--profile", "cpu", "--try", "imports os", expect=1)
    assert "import of os" in output and "Traceback" not in output


def test_replay_repeats_the_keeps_of_another_night(checkout):
    checkout.agent(*NIGHT, "--experiments", "8")
    journal = str(checkout.folder / "runs" / "t" / "journal.jsonl")
    checkout.agent("--tag", "again", "--profile", "cpu", "--replay", journal, "--kept")
    first = [row for row in check_agreement(checkout) if row["verdict"] == "keep"]
    second = check_agreement(checkout, "again")
    assert [row["description"] for row in second] == [row["description"] for row in first]
    assert second[-1]["val_bpb"] == first[-1]["val_bpb"]


def test_the_newest_unfinished_night_is_taken_up(checkout):
    checkout.agent(*NIGHT, "--hours", "0.000001")  # the baseline, then nothing more fits
    checkout.agent("--tag", "full", *NIGHT[2:], "--experiments", "1")
    checkout.agent("--experiments", "1", "--hours", "1")
    assert len(check_agreement(checkout)) == 2


def test_the_same_command_on_the_second_evening_starts_another_night(checkout):
    evening = ("--proposer", "random", "--profile", "cpu", "--hours", "0.000001")
    checkout.agent("--tag", "first", *evening)
    checkout.agent(*evening)
    assert len(list(checkout.folder.glob("runs/*/journal.jsonl"))) == 2


def test_tries_and_replays_are_nights_of_their_own(checkout):
    checkout.agent(*NIGHT, "--hours", "0.000001")  # unfinished: one that names no tag would take it up
    (checkout.folder / "train.py").write_text(STUB.replace("lr=0.4", "lr=0.35"))
    output = checkout.agent("--profile", "cpu", "--try", "lower rate")
    (tag,) = (path.parent.name for path in checkout.folder.glob("runs/*-try/journal.jsonl"))
    assert f"git diff autoresearch/{tag} -- train.py" in output and "git checkout" not in output
    (checkout.folder / "train.py").write_text(STUB.replace("lr=0.4", "lr=0.8"))
    output = checkout.agent("--profile", "cpu", "--try", "too high")
    assert f"put back   git checkout autoresearch/{tag} -- train.py" in output
    assert len(check_agreement(checkout, tag)) == 3 and len(check_agreement(checkout)) == 1
    checkout.agent("--replay", f"runs/{tag}")  # a night's folder does too
    assert len(list(checkout.folder.glob("runs/*-replay/journal.jsonl"))) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--demo"),
        (("--proposer", "replay"), "needs --replay"),
        (("--replay", "nowhere.jsonl"), "does not exist"),
        (("--replay", "tests"), "tests/journal.jsonl does not exist"),
        (("--replay", "program.md"), "program.md is not a night's journal"),
        (("--replay", "empty.jsonl"), "has no experiments"),
        (("--replay", "barren.jsonl", "--kept"), "kept nothing but its baseline"),
        (("--proposer", "claude"), "needs ANTHROPIC_API_KEY"),
        (("--proposer", "claude", "--max-usd", "1", "--model", "unheard-of"), "ANTHROPIC_API_KEY"),
    ],
)
def test_what_a_newcomer_gets_wrong_is_one_clear_line_and_begins_no_night(checkout, args, message):
    (checkout.folder / "tests").mkdir()
    (checkout.folder / "empty.jsonl").touch()
    row = {"event": "result", "number": 1, "verdict": "discard"}
    (checkout.folder / "barren.jsonl").write_text(json.dumps(row) + "\n")
    output = checkout.agent(*args, expect=1)
    assert message in output and "Traceback" not in output
    assert not list(checkout.folder.glob("runs/*"))


def test_usage_errors_exit_2(checkout):
    assert "whole number over 0" in checkout.agent("--experiments", "0", expect=2)
    assert "whole number over 0" in checkout.agent("--seeds", "five", expect=2)
    assert "--kept goes with --replay" in checkout.agent("--kept", expect=2)
    for tag in ("a/b", "", "by-hand"):
        for flag in ("--tag", "--check", "--ablate"):
            assert "a tag has letters" in checkout.agent(flag, tag, expect=2)
    assert "a few words" in checkout.agent("--try", " ", expect=2)
    assert "--demo does not go with --proposer" in checkout.agent("--demo", "--proposer", "random", expect=2)
    assert "--replay does not go with" in checkout.agent("--proposer", "random", "--replay", "x", expect=2)
    assert "not with random" in checkout.agent("--proposer", "random", "--max-usd", "3", expect=2)
    assert "--check does not go with --max-usd" in checkout.agent("--check", "t", "--max-usd", "3", expect=2)
    assert not (checkout.folder / "runs").exists()  # nothing began


def test_a_conflicting_flag_is_refused_and_names_the_way_on(checkout):
    checkout.agent(*NIGHT, "--experiments", "1")
    output = checkout.agent("--tag", "t", "--budget", "20", expect=1)
    assert "budget" in output and "--tag NEW" in output


@pytest.mark.parametrize("name", ["constants.py", "prepare.py"])
def test_rules_that_changed_refuse_to_resume(checkout, name):
    checkout.agent(*NIGHT, "--experiments", "1")
    with open(checkout.folder / name, "a") as file:
        file.write("\n# changed\n")
    output = checkout.agent("--tag", "t", "--experiments", "2", expect=1)
    assert f"git checkout autoresearch/t -- {name}" in output and "--tag NEW" in output
    checkout.git("checkout", "autoresearch/t", "--", name)
    checkout.agent("--tag", "t", "--experiments", "2")


def test_outside_a_repository_the_next_command_is_named(checkout):
    subprocess.run(["rm", "-rf", str(checkout.folder / ".git")], check=True)
    assert "git init" in checkout.agent(*NIGHT, expect=1)
    checkout.git("init", "-q")
    assert "no commit yet" in checkout.agent(*NIGHT, expect=1)


def test_help_reads_like_documentation():
    done = subprocess.run([sys.executable, "agent.py", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0
    for flag in (
        "--demo",
        "--tag",
        "--proposer",
        "--replay",
        "--try",
        "--experiments",
        "--hours",
        "--budget",
        "--profile",
    ):
        assert flag in done.stdout
