"""The training text appears when the clock starts; and a kill at any instant of the hand-over leaves the next start right and warm."""

import os
import shutil
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import NIGHT, STUB, check_agreement, make_checkout, open_here, rows_of, story

from constants import Problem, sha256_of
from lab.measure import place, run
from lab.measure.run import hand_over_text, rows_of_the_night


@pytest.fixture
def night(checkout):
    """A night of this process whose data are 1,000 rows."""
    data = checkout.cache / "cpu-sotu"
    data.mkdir(parents=True)
    (data / "train.bin").write_bytes(os.urandom(2 * 257 * 1_000))
    return open_here(checkout, data_sha256={"train.bin": sha256_of(data / "train.bin")})


def run_folder(night, number: int) -> Path:
    folder = night.run_folder(number)
    (folder / "text").mkdir(parents=True)
    return folder


def test_the_rows_are_linked_into_a_runs_folder_and_read_in_full_once(night, monkeypatch):
    read, data = Mock(side_effect=sha256_of), Path(night.settings.data) / "train.bin"
    monkeypatch.setattr(place, "sha256_of", read)
    with rows_of_the_night(night):
        assert night.rows.samefile(data)
        folder = run_folder(night, 0)
        hand_over_text(night, folder)
        assert (folder / "text" / "train.bin").samefile(data)
    names = [call.args[0].name for call in read.call_args_list]
    assert names.count("train.bin") == 1 and not night.rows.parent.exists()


def test_rows_that_a_run_changed_without_a_sandbox_are_found_out_at_the_next_start(night):
    """There a link is the file itself."""
    with rows_of_the_night(night):
        folder = run_folder(night, 0)
        hand_over_text(night, folder)
        with open(folder / "text" / "train.bin", "r+b") as file:
            file.write(b"other")
    with pytest.raises(Problem, match=r"train\.bin changed since the night began"):
        rows_of_the_night(night).__enter__()


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="this machine has no second file system to write to")
def test_rows_on_another_file_system_are_copied_once(checkout, monkeypatch):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        data = Path(place) / "train.bin"
        data.write_bytes(os.urandom(2 * 257 * 1_000))
        night = open_here(checkout, data=place, data_sha256={"train.bin": sha256_of(data)})
        with rows_of_the_night(night):
            assert not night.rows.samefile(data) and night.rows.read_bytes() == data.read_bytes()
            folder = run_folder(night, 0)
            hand_over_text(night, folder)
            assert (folder / "text" / "train.bin").samefile(night.rows)
        monkeypatch.setattr(run.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
        with pytest.raises(Problem, match=r"cannot be linked to .*free space there, or set AUTORESEARCH_CACHE"):
            rows_of_the_night(night).__enter__()
        assert not night.rows.parent.exists()


def test_what_a_killed_agent_left_is_gone_at_the_next_start_and_nothing_that_a_link_leads_to(night, tmp_path):
    """Without a sandbox a run may have put a link in the place of its folder."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter").write_text("dear")
    run_folder(night, 3)
    night.rows.parent.mkdir()
    (night.rows.parent / "old").touch()
    night.run_folder(4).mkdir()
    (night.run_folder(4) / "text").symlink_to(mine)
    with rows_of_the_night(night):
        assert [path.name for path in night.rows.parent.iterdir()] == ["train.bin"]
        assert not any(night.folder.glob("0*/text"))
    assert (mine / "letter").read_text() == "dear"


# --- kill -9 of the agent, at each instant of a run

KERNEL = """    import os
    made = os.environ["TORCHINDUCTOR_CACHE_DIR"] + "/kernel-" + str(sorted(CONFIGS["cpu"].items())).replace("/", "")
    print("began with", sorted(name for name in os.listdir(os.path.dirname(made)) if "kernel" in name))
    open(made, "w").close()
"""
COMPILING = STUB.replace("    return dict(", f"{KERNEL}    return dict(")
KILL = """


def kill_once():
    from pathlib import Path

    passed = Path("passed")
    count = len(passed.read_text()) + 1 if passed.exists() else 1
    passed.write_text("x" * count)
    if count == 2:  # in the first experiment after the baseline
        import os

        os.kill(os.getpid(), 9)
"""
INSTANTS = {  # file, the line before which the agent is killed
    "before the mark": ("lab/measure/child.py", "            while not why:"),
    "while the cache is set aside": ("lab/measure/run.py", "    remove(place)\n    os.replace(fresh, place)"),
    "linked, the line not written": ("lab/measure/child.py", "                        began.append(time."),
    "training": ("lab/measure/run.py", '        view.enter("training")'),
    "scoring": ("lab/measure/run.py", '    if crash:\n        return replace(run, crash=f"scoring'),
    "the run written": ("agent.py", "        verdict = judge(run"),
    "the cache promoted, no result": ("lab/record/night.py", '        self.journal.append("result"'),
    "the result written, no refs": ("lab/record/night.py", "        if kept:\n"),
}
TWO = (*NIGHT, "--experiments", "2", "--budget", "60")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    checkout = make_checkout(folder / "checkout", folder / "cache", stub=True)
    checkout.drop_screen()
    (checkout.folder / "train.py").write_text(COMPILING)
    checkout.agent(*TWO, STUB_COMPILER="1")
    return [row[:-1] for row in story(checkout)]


@pytest.mark.parametrize("instant", INSTANTS)
def test_killed_at_each_instant_the_next_start_is_right_and_warm(checkout, undisturbed, instant):
    """It ends as an undisturbed night does; what was compiled for the baseline is there; no text, no cache is left over."""
    place, line = INSTANTS[instant]
    checkout.drop_screen()
    (checkout.folder / "train.py").write_text(COMPILING)
    indent = line[: len(line) - len(line.lstrip())]
    child = "if on_clock: " if instant == "before the mark" else ""  # of the children, the one that trains
    checkout.edit(place, line, f"{indent}{child}kill_once()\n{line}")
    before, main, after = (checkout.folder / place).read_text().partition('\n\nif __name__ == "__main__":')
    (checkout.folder / place).write_text(before + KILL + main + after)
    checkout.agent(*TWO, expect=-9, STUB_COMPILER="1")
    acknowledged = rows_of(checkout, "result")
    assert len(acknowledged) == (2 if "no refs" in instant else 1)
    checkout.agent(*TWO, STUB_COMPILER="1")
    check_agreement(checkout)
    assert [row[:-1] for row in story(checkout)] == undisturbed  # the trees differ: `place` does
    assert rows_of(checkout, "result")[: len(acknowledged)] == acknowledged
    runs = checkout.folder / "runs" / "t"
    assert not list(runs.glob("**/text")) and not list(runs.glob("cache-*"))
    first = "kernel-" + str(sorted(dict(lr=0.4, width=64, decay=0.1, warmdown=0.6, momentum=0.95, beta=0.8).items()))
    assert first in (runs / "0002" / "run.log").read_text() and (runs / "cache" / first).exists()
