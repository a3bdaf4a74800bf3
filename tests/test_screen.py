"""The screen: what is refused at once, and what an honest edit may write."""

import pytest
from conftest import ROOT, STUB

from lab.propose.screen import screen
from lab.records import Rejected, fingerprint

REAL = (ROOT / "train.py").read_text()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import os", "`os`"), ("import torch.utils.cpp_extension", "`cpp_extension`"), ("from torch import hub", "`hub`"),
        ("from torch.random import seed", "`seed`"), ("from torch import *", "hides which name is meant"),
        ("import operator", "import of operator is refused"), ("from .prepare import x", "import of prepare is refused"),
        ("torch.importlib.machinery", "`importlib`|`machinery`"), ("match prepare:\n    case object(os=z): pass", "`os`"),
        ("x = open('f')", "`open`"), ("x = ().__class__", "`__class__`"), ("def f(run): return run._rows", "`_rows`"),
        ("x = eval('1')", "`eval`"), ("setattr(torch, 'x', None)", "`setattr`"), ("object.__setattr__(torch, 'x', 1)", "`__setattr__`"),
        ("x = torch._getframe(1)", "`_getframe`"), ("import gc; gc.get_objects()", "`get_objects`"),
        ("import numpy as np; x = np.load('f')", "`load`"), ("import numpy; numpy.save('rows', 0)", "`save`"), ("def f(run): run.settings", "`settings`"),
        ("torch.manual_seed(3)", "the seed belongs"), ("torch.random.seed()", "`seed` is refused: the seed belongs"),
        ("def f(run): run.seed = 7", "assignment to `seed`"), ("def f(clock): type(clock).expired = False", "assignment to `expired`"),
        ("prepare.perf_counter = lambda: 0.0", "assignment to `prepare.perf_counter`"), ("prepare.TABLE[0] = 1", "assignment to"),
        ("import constants\ndel constants.SEED", "assignment to `constants.SEED`"),
        ("import prepare as p; p.evaluate_nats = 1", "assignment to `p.evaluate_nats`"),
        ("from prepare import Training as T; T.y = 1", "assignment to `T.y`"),
        (f"x = '{'a' * 1001}'", "literal"), (f"x = {10**1001}", "literal"), ("#" * 64_000, "bytes"),
        ("x = (", "does not compile"), ("x = '\ud800'", "does not compile"),
        ("def f(x):\n    if x == 0: pass\n" + "    elif x == 1: pass\n" * 1_000, "does not compile"),
    ],
)  # fmt: skip
def test_the_screen_refuses(line, message):
    with pytest.raises(Rejected, match=message):
        screen(f"{REAL}{line}\n", {})


@pytest.mark.parametrize("cookie", ["raw_unicode_escape", "no-such-coding"])
def test_a_coding_that_hides_code_in_a_comment_is_refused(cookie):
    """The interpreter takes the escaped newline for one; ast.parse of a str does not look at the cookie."""
    for head in (f"# -*- coding: {cookie} -*-\n", f"\n# vim: set fileencoding={cookie} :\n"):
        with pytest.raises(Rejected, match="coding"):
            screen(f"{head}# \\u000aimport os\n{REAL}", {})
    screen(f"# -*- coding: utf-8 -*-\n{REAL}", {})


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("def build_model(profile)", "def make(profile)"), ('__name__ == "__main__"', '__name__ == "x"'), (".start_clock(", ".go("),
        (".finish(", ".end("), ("prepare.start(", "prepare.go("),
    ],
)  # fmt: skip
def test_the_screen_asks_for_the_contract(part, other):
    assert part in REAL
    with pytest.raises(Rejected, match="contract"):
        screen(REAL.replace(part, other), {})


@pytest.mark.parametrize(
    "line",
    [
        "torch.backends.cuda.matmul.allow_tf32 = True",
        "def f(run): return torch.randperm(run.seed)",
        "class A:\n    def f(self): self.start = 1",
        "import triton\n@triton.jit\ndef kernel(x): triton.language.store(x, triton.language.load(x))",
        "import triton.language as tl\ndef kernel(x): tl.store(x, tl.load(x) + 1)",
        "def f(load, save):\n    package = load + save\n    return package.mean()",
    ],
)
def test_what_an_honest_edit_of_the_real_train_py_writes_passes_the_screen(line):
    screen(f"{REAL}{line}\n", {})


def test_a_program_that_differs_in_comments_only_is_no_new_idea():
    tried = {fingerprint(STUB): "experiment 3, discard"}
    with pytest.raises(Rejected, match="experiment 3, discard"):
        screen(STUB.replace("# best at 0.1", "# hm"), tried)
