"""The screen: what is refused at once, and what an honest edit may write."""

import pytest
from conftest import ROOT, STUB

from lab.propose.screen import screen
from lab.records import Rejected, fingerprint

REAL = (ROOT / "train.py").read_text()


def test_the_real_train_py_passes_the_screen():
    screen(REAL, {})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import os", "import of os|`os`"),
        ("import torch.utils.cpp_extension", "cpp_extension"),
        ("from torch import hub", "hub"),
        ("torch.os.environ['X'] = '1'", "environ|`os`"),
        ("x = open('f')", "`open`"),
        ("torch.manual_seed(3)", "seed belongs"),
        ("x = eval('1')", "`eval`"),
        ("x = ().__class__.__dict__", "__dict__"),
        ("object.__setattr__(torch, 'x', 1)", "__setattr__"),
        ("def f(clock): clock.start += 9", "assignment to `start` is refused"),
        ("def f(clock): type(clock).expired = False", "assignment to `expired` is refused"),
        ("def f(run): run.seed = 7", "assignment to `seed`"),
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
        ("import numpy as np; x = np.fromfile('f')", "fromfile"),
        (f"x = '{'a' * 1001}'", "literal"),
        (f"x = {10**1001}", "literal"),
        ("x = (", "does not compile"),
        ("object.__getattribute__(torch, 'o' + 's')", "__getattribute__"),
        ("import operator; operator.attrgetter('os')", "import of operator|attrgetter"),
        ("import numpy; numpy.testing.rundocs", "testing"),
        ("import torch.utils.collect_env", "collect_env"),
        ("torch.utils.benchmark.Timer", "benchmark"),
        ("import typing; typing.get_type_hints(GPT)", "get_type_hints"),
        ("import typing; typing.ForwardRef('1')", "ForwardRef"),
        ("torch.importlib.machinery.SourceFileLoader('q', 'x')", "importlib|machinery"),
        ("torch.fx.graph_module._exec_with_source('import os', {})", "_exec_with_source"),
        ("torch.ops.load_library('x')", "load_library"),
        ("setattr(torch, 'x', None)", "`setattr`"),
        ("x = torch._getframe(1)", "_getframe"),
        ("def f(error): return error.__traceback__.tb_frame.f_back", "tb_frame|f_back"),
        ("import gc; gc.get_objects()", "get_objects"),
        ("import numpy; numpy.memmap('val.bin')", "memmap"),
        ("torch.from_file('val.bin')", "from_file"),
        ("def f(clock): clock.budget_s = 900", "budget_s"),
        ("x = __import__('constants')", "__import__"),
        ("def f(run): run.settings", "`settings`"),
        ("import numpy; numpy.save('rows', 0)", "`save`"),
        ("prepare.perf_counter = lambda: 0.0", "assignment to `prepare.perf_counter`"),
        ("prepare.np.load = None", "`load`|assignment"),
        ("import constants\ndel constants.SEED", "assignment to `constants.SEED`"),
        ("import prepare as p; p.evaluate_nats = 1", "assignment to `p.evaluate_nats`"),
        ("from prepare import Training as T; T.y = 1", "assignment to `T.y`"),
        ("prepare.TABLE[0] = 1", "assignment to"),
        ("def f(run): run.__class__.x = f", "__class__"),
        ("def f(run): type(run).finish = f", "assignment to `finish`"),
        ("from torch import *", "hides which name is meant"),
        ("from torch import load", "`load`"),
        ("x = '\ud800'", "does not compile"),
        (
            "def f(x):\n    if x == 0: pass\n" + "".join(f"    elif x == {i}: pass\n" for i in range(1, 1_000)),
            "does not compile",
        ),
        ("from .prepare import x", "import of prepare is refused|relative"),
        ("#" * 64_000, "bytes"),
    ],
)
def test_the_screen_refuses(line, message):
    with pytest.raises(Rejected, match=message):
        screen(f"{REAL}{line}\n", {})


@pytest.mark.parametrize("cookie", ["raw_unicode_escape", "utf-7", "latin-1", "no-such-coding"])
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
        "torch._inductor.config.coordinate_descent_tuning = True",
        "def f(run): return torch.randperm(run.seed)",
        "class A:\n    def f(self): self.start = 1",
        "import triton\n@triton.jit\ndef kernel(x): triton.language.store(x, triton.language.load(x))",
        "def f(x, y): x[0], y.grad = 1, None",
        "def f(load, save):\n    package = load + save\n    return package.mean()",
        "import triton\nimport triton.language as tl\n@triton.jit\ndef kernel(x): tl.store(x, tl.load(x) + 1)",
    ],
)
def test_what_an_honest_edit_writes_passes_the_screen(line):
    screen(f"{REAL}{line}\n", {})


def test_a_program_that_differs_in_comments_only_is_no_new_idea():
    tried = {fingerprint(STUB): "experiment 3, discard"}
    with pytest.raises(Rejected, match="experiment 3, discard"):
        screen(STUB.replace("# best at 0.1", "# hm"), tried)
