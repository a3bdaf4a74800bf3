"""The shape of the project: flat, imports one way, nothing happens at import."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

OURS = {"constants", "prepare", "train", "agent"}
ALLOWED = {
    "constants": set(),
    "prepare": {"constants"},
    "train": {"prepare", "constants"},
    "agent": {"constants"},
}


def imported(name: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").split(".")[0])
    return names


@pytest.mark.parametrize("name", sorted(OURS))
def test_imports_run_one_way(name):
    assert imported(name) & OURS <= ALLOWED[name]


def test_agent_never_imports_torch():
    assert "torch" not in imported("agent")


def test_constants_uses_the_standard_library_only():
    assert imported("constants") <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("name", sorted(OURS))
def test_importing_does_nothing(name, tmp_path):
    code = (
        f"import sys, threading; sys.path.insert(0, {str(ROOT)!r}); import builtins; real = open\n"
        "def no_writing(file, mode='r', *args, **kwargs):\n"
        "    assert not set(mode) & set('wax+'), file\n"
        "    return real(file, mode, *args, **kwargs)\n"
        f"builtins.open = no_writing; import {name}; assert threading.active_count() == 1"
    )
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_top_level_holds_only_what_the_layout_names():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    allowed = (
        "prepare.py train.py constants.py agent.py program.md analysis.ipynb pyproject.toml tests README.md LICENSE"
    )
    assert {name.split("/")[0] for name in names if name} <= {
        *allowed.split(), ".ci", ".gitignore", ".python-version", "progress.png",
    }  # fmt: skip
