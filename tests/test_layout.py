"""The shape of the project: imports one way, nothing happens at import, agent and lab without torch, sizes that a person reads."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

ORDER = [  # each module may import what stands before it, and the folders stand in this order too
    "constants", "lab.records", "lab.machine", "prepare", "train", "lab.measure.score",
    "lab.measure.files", "lab.measure.child", "lab.measure.place", "lab.measure.trial", "lab.measure.sandbox",
    "lab.measure.run",
    "lab.record.git", "lab.record.journal", "lab.record.night", "lab.record.start",
    "lab.propose.screen", "lab.propose.ahead", "lab.propose.replay", "lab.propose.tune", "lab.propose.prompt",
    "lab.propose.model", "lab.propose.claude", "lab.propose.command",
    "lab.fleet", "lab.check", "lab.arguments", "lab.progress", "lab.view", "agent",
]  # fmt: skip


def path_of(name: str):
    return ROOT / f"{name.replace('.', '/')}.py"


def imported(name: str, at_once: bool = False) -> set[str]:
    """The modules that a file imports, wherever in it; `at_once` those that it imports when it is imported."""
    names, tree = set(), ast.parse(path_of(name).read_text())
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & set(ORDER) if name != "constants" else {part.split(".")[0] for part in names}


def test_every_module_has_its_place_and_hides_none_of_the_standard_library():
    """The scorer's children run as scripts, with its folder as the first place that is searched."""
    found = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in (ROOT / "lab").rglob("*.py")}
    assert found - {"lab.__init__"} == {name for name in ORDER if name.startswith("lab.")}
    assert not {name.rpartition(".")[2] for name in found} & sys.stdlib_module_names
    assert imported("constants") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", ORDER[1:])
def test_imports_run_one_way(name):
    own = ORDER.index(name)
    assert all(ORDER.index(other) < own for other in imported(name))
    if name == "lab.measure.trial":  # runs in the sandbox, beside the frozen rules, and imports them there
        assert imported(name) == {"prepare"} and not imported(name, at_once=True)
    elif name in ("prepare", "train", "lab.measure.score"):  # frozen with a night: nothing of lab is beside them there
        assert not any(other.startswith("lab.") for other in imported(name, at_once=True))
        assert {other for other in imported(name) if other.startswith("lab.")} <= {"lab.machine"}  # by hand
    else:
        assert not imported(name) & {"prepare", "train", "lab.measure.score"}


@pytest.mark.parametrize(
    ("names", "absent"),  # which import all others
    [("lab.measure.trial, lab.fleet, agent", "torch numpy anthropic rich"), ("prepare, lab.measure.score, train", "anthropic rich")],
)  # fmt: skip
def test_importing_does_nothing(names, absent, tmp_path):
    """No file is written, no thread started, nothing printed; neither torch nor the API's package is loaded but by those that need it."""
    code = (
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r}); import builtins; real = open\n"
        "def no_writing(file, mode='r', *args, **kwargs):\n"
        "    assert not set(mode) & set('wax+'), file\n"
        "    return real(file, mode, *args, **kwargs)\n"
        f"builtins.open = no_writing; import {names}; assert threading.active_count() == 1\n"
        f"assert not set({absent.split()!r}) & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_top_level_holds_only_what_the_layout_names():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    allowed = "prepare.py train.py constants.py agent.py lab tests program.md analysis.ipynb README.md progress.png"
    allowed += " pyproject.toml LICENSE .ci .gitignore .python-version"
    assert {name.split("/")[0] for name in names if name} <= set(allowed.split())
