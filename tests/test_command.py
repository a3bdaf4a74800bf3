"""Any program as the researcher: scripted programs of every kind, by the command line and in this process."""

import os
import signal
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
from conftest import PLAIN, check_agreement, fake_program, open_here, rows_of, run_here, wait_for
from test_claude import add, reply

import lab.propose.command
import lab.propose.model
from constants import Problem
from lab.propose.command import Command, words_of
from lab.view import View, print_summary


@pytest.fixture
def program(checkout, tmp_path):
    """A night whose researcher is a Python program: program(code, experiments) -> (reason or Problem, night)."""

    def run(code, experiments=1, secrets=None):
        (checkout.folder / "program.md").write_text("Schedule: improve\n")
        here = open_here(checkout)
        try:
            command = Command(here, checkout.folder, written(tmp_path, code), secrets or {})
            outcome = run_here(here, experiments, command)
        except Problem as problem:
            outcome = problem
        return outcome, here

    return run


def written(folder, code: str) -> str:
    """The command of a program. It counts its calls in a file; `n` is the number of this one, from 0, `prompt` what it read."""
    head = (
        "import os, sys, time, subprocess\n"
        f"with open({str(folder / 'calls')!r}, 'a+') as f:\n    f.seek(0); n = len(f.read()); f.write('.')\n"
        "prompt = sys.stdin.read()\n"
        f"open({str(folder / 'prompt')!r} + str(n), 'w').write(prompt)\n"
    )
    (folder / "program.py").write_text(head + code)
    return f"{sys.executable} {folder / 'program.py'}"


def ended(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_its_reply_is_run_and_it_is_asked_for_the_next_meanwhile(checkout, program, tmp_path):
    """It may chat: in fences, with colours, with line ends of another system, after a first draft; the last reply counts."""
    draft, final = reply("draft", ("        width=64,", "        width=1,")), add("idea", 7)
    text = f"Let me think.\n\x1b[1m{draft}\x1b[0m\nOn reflection:\n```\n{final}\n```\nGood luck!\n"
    lines = text.replace("\n", "\r\n")
    reason, _ = program(f"sys.stdout.write({lines!r}.replace('7', str(n)))", 3)
    assert reason == "3 experiments done"
    assert [row["description"] for row in check_agreement(checkout)][1:] == ["idea 0", "idea 1", "idea 2"]
    prompt = (tmp_path / "prompt2").read_text()
    for part in ("SEARCH", "# train.py of the incumbent", "You propose experiment 3", "beta=0.8", "# Running now"):
        assert part in prompt
    assert {row["model"] for row in rows_of(checkout, "call")} == {"python" + sys.executable.rpartition("python")[2]}


def test_a_reply_that_cannot_be_run_is_sent_back_with_the_objection(checkout, program, tmp_path, capsys):
    good, bad = add("idea", 1), reply("bad", ("nothing like it", "x"))
    _, here = program(f"print({good!r} if n else {bad!r})")
    assert here.results[1].description == "idea 1"
    line = "a reply of command cannot be run, it is asked again: block 1: its SEARCH lines match 0 times"
    assert capsys.readouterr().out.count(line) == 1
    prompt = (tmp_path / "prompt1").read_text()
    assert prompt.index("nothing like it") < prompt.index("That cannot be run: block 1: its SEARCH lines match 0 times")


def test_a_failure_is_waited_out_aloud(checkout, program, monkeypatch, capsys):
    monkeypatch.setattr(lab.propose.model, "PATIENCE_S", 0.05)
    trouble, said = "sys.exit('out of quota')", "exit status 1: out of quota"
    reason, here = program(f"if 0 < n < 4:\n    {trouble}\nprint({add('idea', 7)!r}.replace('7', str(n)))", 2)
    assert reason == "2 experiments done" and here.results[2].description == "idea 4"
    errors = [row["error"] for row in rows_of(checkout, "call") if "error" in row]
    assert errors == [said] * 3 and capsys.readouterr().out.count(f"waiting for command: {said}") == 1


def test_what_keeps_a_program_from_replying_is_named(checkout, tmp_path, monkeypatch):
    """In its own words, without its arguments, which may be secret."""
    night = open_here(checkout)
    node = "x.js:3\nthrow new Error(1)\n  ^\nTypeError: boom\n    at Error (x.js:3)\n\nNode.js v20"
    for code, said in (
        (f"sys.exit({node!r})", "exit status 1: TypeError: boom"),
        ("sys.exit('bad ' + sys.argv[1])", "exit status 1: bad ..."),
        ("", "it printed nothing"),
        ("time.sleep(60)", "no reply within 1 s"),
        ("os.kill(os.getpid(), 9)", "exit status -9"),
    ):
        monkeypatch.setattr(lab.propose.command, "LIMIT_S", 1.0 if "sleep" in code else 10.0)
        reply, trouble = Command(night, checkout.folder, f"{written(tmp_path, code)} canary-token", {}).run("?")
        assert reply == "" and trouble.startswith(said)


def test_one_that_never_replied_is_no_outage_nor_at_the_next_start(checkout, program, monkeypatch, capsys):
    """Nor is it kept quiet until what runs has ended."""
    monkeypatch.setattr(lab.propose.model, "PATIENCE_S", 0.05)
    for start in range(2):
        problem, here = program("sys.exit('no such model')")
        assert isinstance(problem, Problem) and len(here.results) == 1
        assert "failed 3 times and never replied: exit status 1: no such model" in str(problem)
        line = f"nothing more is proposed: {problem}; what runs now is finished first"
        assert start or line in capsys.readouterr().out
    assert len({row["id"] for row in rows_of(checkout, "call")}) == 6


def test_one_that_fails_for_ever_loses_its_turns_to_the_numeric_search(program, monkeypatch, capsys):
    monkeypatch.setattr(lab.propose.model, "PATIENCE_S", 0.01)
    reason, here = program(f"if n:\n    sys.exit(3)\nprint({add('idea', 1)!r})", 2)
    assert reason == "2 experiments done"
    assert [result.operator for result in here.results[1:]] == ["improve", "tune"]
    assert capsys.readouterr().out.count("an idea of command is lost: exit status 3") == 1


def test_output_without_end_is_cut_and_ended(checkout, program, capsys):
    """The numeric search takes the turn of a researcher that has nothing to say, and the terminal says so."""
    start = time.monotonic()
    reason, here = program("while True:\n    print('blah ' * 1000)")
    assert reason == "1 experiment done" and here.results[1].operator == "tune"
    assert time.monotonic() - start < 30 and len(rows_of(checkout, "reject")) == 4
    line = "an idea of command is lost: the reply has no SEARCH/REPLACE block; the numeric search takes this turn"
    assert capsys.readouterr().out.count(line) == 1
    print_summary(here, reason, SimpleNamespace(name="command"), None)
    assert "4 proposals could not be run; the journal says why\n" in capsys.readouterr().out


def test_it_works_in_an_empty_folder_with_the_key_and_what_it_leaves_behind_is_ended(checkout, program, tmp_path):
    code = (
        "p = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"open({str(tmp_path / 'seen')!r}, 'w').write(f\"{{p.pid}} {{os.environ['ANTHROPIC_API_KEY']}} {{os.listdir()}}\")\n"
        f"print({add('idea', 1)!r})"
    )
    program(code, secrets={"ANTHROPIC_API_KEY": "canary-key"})
    pid, *seen = (tmp_path / "seen").read_text().split()
    assert seen == ["canary-key", "[]"] and ended(int(pid))
    assert b"canary-key" not in b"".join(p.read_bytes() for p in checkout.folder.rglob("*") if p.is_file())


def test_a_program_that_is_not_there_is_one_line_before_the_baseline(checkout):
    output = checkout.agent(*PLAIN, "--command", "no-such-program -p", expect=1)
    assert "--command" in output and "Traceback" not in output and not (checkout.folder / "runs" / "t").exists()
    with pytest.raises(Problem, match="--command"):
        words_of("'unclosed")


def test_by_the_command_line_only_its_first_word_is_stored(checkout, tmp_path):
    """And so a night that goes on has to be given it again."""
    command = written(tmp_path, f"print({add('idea', 7)!r}.replace('7', str(n)))") + " --token canary-token"
    output = checkout.agent(*PLAIN, "--command", command, "--experiments", "1", ANTHROPIC_API_KEY="canary-two")
    assert "idea 0" in output and "the API has cost" not in output
    journal = (checkout.folder / "runs" / "t" / "journal.jsonl").read_text()
    assert "canary" not in journal and rows_of(checkout, "night")[0]["arguments"]["command"] == sys.executable
    output = checkout.agent("--tag", "t", "--experiments", "2", expect=1)
    assert "say it again, --command" in output
    output = checkout.agent("--tag", "t", "--command", command, "--experiments", "3")
    assert "go on      the same command  (with a larger --experiments or --hours)\n" in output
    assert len(check_agreement(checkout)) == 4


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_it_ends_with_the_agent(checkout, tmp_path, how):
    command = written(tmp_path, f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)")
    process = checkout.start(*PLAIN, "--command", command)
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), process)
    process.send_signal(how)
    output, _ = process.communicate(timeout=20)
    wait_for(lambda: ended(int((tmp_path / "pid").read_text())))
    assert "Traceback" not in output


def test_the_live_view_says_what_it_does_before_the_description(checkout):
    night = open_here(checkout)
    command = Command(night, checkout.folder, "python3 x", {})
    view = View(night, command, [])
    view.lanes[0].begin("wider", None)
    assert view.render().plain == "   0  starting  0 s  wider"
    command.status = "thinking"
    assert view.render().plain == "   0  starting  0 s  thinking  wider"


def test_a_model_that_takes_the_card_or_the_cores_is_asked_between_runs(checkout, tmp_path, monkeypatch):
    fake_program(tmp_path, "ollama")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (checkout.folder / "program.md").write_text("Schedule: improve tune\n")
    for name, expected in (("python3", [False, True]), ("ollama", [True, True])):
        command = Command(open_here(checkout, tag=name), checkout.folder, f"{name} run x", {})
        assert [command.between_runs(number) for number in (1, 2)] == expected


def test_the_last_good_program_is_used_while_program_md_is_away(checkout, tmp_path, monkeypatch):
    """An editor replaces it, a save leaves bytes that are no text, a line is wrong: each is said once, and the night goes on."""
    place, lines = checkout.folder / "program.md", []
    place.write_text("\ufeffSchedule: improve tune\n", encoding="utf-8")
    night = open_here(checkout)
    monkeypatch.setattr(night, "say", lines.append)
    command = Command(night, checkout.folder, "python3 x", {})
    for damage in (None, b"\xff\xfe\x00", b"Schedule: dance\n"):
        place.write_bytes(damage) if damage else place.unlink()
        assert [command.operator(number) for number in (1, 2, 3)] == ["improve", "tune", "improve"]
    assert len(lines) == 3 and all("its last good text is used" in line for line in lines)
    assert command.instructions.startswith("Schedule: improve tune")
    place.write_text("Schedule: explore\n")
    assert command.operator(1) == "explore" and len(lines) == 3
