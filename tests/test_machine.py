"""What a run finds out about its machine: the card and its class, what it lacks, and the line that says so."""

import json
import os
import re
import sys
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import SETTINGS, fake_program

import constants
import prepare
from lab import machine
from lab.record.start import START_SHARDS

TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12080). Please update your GPU driver by downloading and "
    "installing a new version from the URL: http://www.nvidia.com/Download/index.aspx"
)
NO_KERNEL = "CUDA error: no kernel image is available for execution on the device\nSearch for it in the manual."
GPU = replace(constants.PROFILES["gpu"], dtype="bfloat16")
H100 = replace(
    SETTINGS, profile=GPU, compile=True, device="cuda", device_name="NVIDIA H100 80GB HBM3", capability=[9, 0], sizes_reason="a known card"
)  # fmt: skip
CARD_TROUBLE = machine.card_trouble
RESULT = {"mfu_percent": 39.84, "total_tokens_M": 330.0, "training_seconds": 300.0, "backend": "FA4"}


@dataclass
class Machine:
    """Stands in for torch on a machine with a card, or without one: what a driver would say is an argument."""

    build: str | None = "13.0"
    hip: str | None = None
    card: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    init: str = ""  # what initialising CUDA raises
    kernel: str = ""  # what the first kernel raises
    bf16: bool = True
    __version__ = "2.13.0+cu130"
    bfloat16, float32 = torch.bfloat16, torch.float32

    @property
    def version(self):
        return SimpleNamespace(cuda=self.build, hip=self.hip)

    @property
    def cuda(self):
        def start():
            if self.init:
                raise RuntimeError(self.init)

        major, minor = self.capability
        card = SimpleNamespace(name=self.card, major=major, minor=minor, total_memory=85e9, uuid="11-22")
        return SimpleNamespace(
            is_available=lambda: bool(self.build or self.hip) and not self.init,
            init=start,
            get_device_properties=lambda index: card,
            is_bf16_supported=lambda including_emulation: self.bf16,
        )

    def ones(self, *shape, device):
        if self.kernel:
            raise RuntimeError(self.kernel)
        return torch.ones(*shape)


@pytest.fixture
def tools(tmp_path, monkeypatch):
    """An empty folder as the whole PATH."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    for name in ("CC", "CXX", "CUDA_VISIBLE_DEVICES", "AUTORESEARCH_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


# --- the card


@pytest.mark.parametrize(
    ("stand_in", "said", "command"),
    [
        (Machine(build=None), "a build for CPUs alone", "pip install --force-reinstall torch==2.13.0"),
        (Machine(init=TOO_OLD), "driver is too old for CUDA 13.0", "torch==2.13.0 --index-url .*/cu126"),
        (Machine(init="Found no NVIDIA driver on your system. Please"), "Found no NVIDIA driver", "nvidia-smi"),
        (Machine(card="Tesla V100-SXM2-16GB", capability=(7, 0), kernel=NO_KERNEL), r"no kernels for .*V100.*\(compute capability 7.0\)", "/cu126"),
        (Machine(build="12.6", card="NVIDIA B200", capability=(10, 0), kernel=NO_KERNEL), "no kernels for NVIDIA B200", "/cu130"),
        (Machine(kernel="CUDA error: uncorrectable ECC error encountered"), "H100 .*does not work: .*ECC", "nvidia-smi"),
    ],
)  # fmt: skip
def test_what_keeps_torch_from_the_card_is_said_with_a_command(stand_in, said, command):
    trouble = machine.card_trouble(stand_in)
    assert "\n" not in trouble
    assert re.search(f"{said}.*{command}", trouble), trouble


def test_a_card_that_works_has_no_trouble():
    assert machine.card_trouble(Machine()) == machine.card_trouble(Machine(build=None, hip="7.2")) == ""


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("GRID A100-10C", None), ("NVIDIA GH200 480GB", None),
    ],
)  # fmt: skip
def test_the_peak_is_that_of_the_very_card(card, peak):
    assert machine.peak_tflops(card) == peak


@pytest.mark.parametrize(
    ("peak", "measured", "sizes"),
    [
        (756.0, 0.0, "H100"), (312.0, 0.0, "A100"), (209.5, 0.0, "RTX 4090"), (71.0, 0.0, "RTX 4090"), (None, 496.0, "H100"), (None, 234.0, "A100"),
        (None, 184.0, "RTX 4090"), (None, 49.0, "RTX 4090"), (None, 24.0, "small"),
    ],
)  # fmt: skip
def test_a_known_card_is_its_class_and_another_goes_by_its_speed(peak, measured, sizes):
    assert machine.card_class(peak, measured) == sizes


def test_an_unknown_card_is_measured_once(tools):
    """A start on a machine that measures 10 % slower today finds the same class, by hand and in a night."""
    rates = iter([455.0, 410.0])
    found = [machine.sizes_of("NVIDIA GH200", None, uuid, lambda: next(rates)) for uuid in ("a", "a", "b")]
    measured = "measured {} TFLOP/s, kept in cards.json"
    assert found == [*2 * [("H100", measured.format(455))], ("A100", measured.format(410))]
    assert machine.sizes_of("NVIDIA A40", 149.7, "c", None) == ("RTX 4090", "a known card")


def test_the_rate_is_that_of_the_fastest_products(monkeypatch):
    """2 x 100^3 operations in 4, 2, 1 ms and so on: a card raises its clock; at last it is held at 1 ms."""
    now, ms = [0.0], iter([4.0] * 8 + [2.0] * 8 + [1.0] * 1000)

    class Matrix:
        def to(self, dtype):
            return self

        def __matmul__(self, other):
            now[0] += next(ms) / 1e3
            return torch.zeros(1, 1)

    monkeypatch.setattr(machine.time, "perf_counter", lambda: now[0])
    card = SimpleNamespace(randn=lambda *shape, device: Matrix())
    assert machine.tflops(card, "cuda", torch.bfloat16, 100, 0.5) == pytest.approx(2e6 / 1e-3 / 1e12)


def test_what_a_night_decides_on_a_card(tools, monkeypatch):
    monkeypatch.setattr(machine, "tflops", lambda *_: 30.0)
    fake_program(tools, "gcc")
    facts = machine.card_facts(Machine())
    wanted = {"sizes": "H100", "peak_tflops": 989.0, "memory_gb": 85.0, "dtype": "bfloat16", "compiler": True}
    assert facts.items() >= (wanted | {"capability": [9, 0]}).items()
    old = machine.card_facts(Machine(card="Tesla T4", capability=(7, 5), bf16=False))
    assert (old["sizes"], old["dtype"]) == ("small", "float32") and "measured 30" in old["sizes_reason"]
    assert machine.card_facts(Machine(build=None, hip="7.2", capability=(9, 4)))["capability"] is None  # no Hopper
    assert machine.card_facts(Machine(capability=(6, 1)))["compiler"] is False
    (tools / "gcc").unlink()
    with pytest.raises(machine.Problem, match=r"needs a C compiler; run: apt-get install g\+\+"):
        machine.card_facts(Machine())


def test_each_card_has_its_own_lock(monkeypatch):
    locks = set()
    for uuid in ("11-22", "33-44"):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index, uuid=uuid: SimpleNamespace(uuid=uuid))
        locks.add(constants.device_lock(prepare.device_id("cuda")))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-1/5/0")
    locks.add(constants.device_lock(prepare.device_id("cuda")))
    assert len(locks) == 3 and prepare.device_id("cpu") == "cpu"


@pytest.mark.parametrize(("given", "order"), [(None, "PCI_BUS_ID"), ("FASTEST_FIRST", "FASTEST_FIRST")])
def test_cards_are_numbered_alike_by_hand_and_in_a_night(monkeypatch, given, order):
    """In the order of nvidia-smi, unless the user says otherwise: before torch looks at the first card."""
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    if given:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", given)
    monkeypatch.setattr(machine, "card_trouble", lambda torch: os.environ["CUDA_DEVICE_ORDER"])
    with pytest.raises(machine.Problem, match=order):
        machine.machine("gpu")


# --- what compiling needs


@pytest.mark.parametrize(
    ("device", "installed", "header", "missing"),
    [
        ("cuda", "gcc", True, ""), ("cuda", "clang", True, ""), ("cuda", "g++", True, "a C compiler"),
        ("cuda", "gcc", False, "Python.h"), ("cuda", "", False, "a C compiler and Python.h"),
        ("cpu", "g++", True, ""), ("cpu", "gcc", True, r"a C\+\+ compiler"), ("cpu", "clang++", False, "Python.h"),
    ],
)  # fmt: skip
def test_what_compiling_lacks_is_named_with_its_packages(tools, monkeypatch, device, installed, header, missing):
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda *_: str(tools.parent))
    if header:
        (tools.parent / "Python.h").touch()
    if installed:
        fake_program(tools, installed)
    pattern = rf"torch.compile needs {missing}; run: apt-get install g\+\+ python3\.\d+-dev" if missing else ""
    assert re.fullmatch(pattern, machine.compiler_trouble(device))


def test_a_compiler_of_the_users_counts_and_one_that_is_not_there_does_not(tools, monkeypatch):
    fake_program(tools, "gcc")
    fake_program(tools, "icx")
    monkeypatch.setenv("CC", "icx -m64")
    assert "compiler" not in machine.compiler_trouble("cuda")
    for wrong in ("/opt/gone/gcc", '"unclosed'):
        monkeypatch.setenv("CC", wrong)
        assert f"CC={wrong} is none; run: unset CC" in machine.compiler_trouble("cuda")


# --- the profile


def choice(monkeypatch, stand_in, nodes) -> str:
    """The profile that nobody named: the real choose(), with this machine for torch's, and these device nodes."""
    monkeypatch.setattr(machine, "gpu_nodes", lambda: nodes)
    monkeypatch.setattr(machine, "card_trouble", lambda torch: CARD_TROUBLE(stand_in))
    return machine.choose(None, None)[0]


def test_the_profile_goes_by_what_torch_can_use(tools, monkeypatch, capsys):
    fake_program(tools, "gcc")
    none = Machine(init="Found no NVIDIA driver on your system.")
    assert choice(monkeypatch, Machine(), ["/dev/nvidia1"]) == "gpu"  # a container with the second card alone
    assert choice(monkeypatch, none, []) == "cpu" and capsys.readouterr().err == ""
    for node in ("/dev/dxg", "/dev/kfd"):  # WSL without CUDA, an AMD chip that ROCm does not know
        assert choice(monkeypatch, none, [node]) == "cpu"
        said = capsys.readouterr().err
        assert "note: profile cpu, since torch sees no GPU" in said and ("rocm7.2" in said) == (node == "/dev/kfd")
    with pytest.raises(machine.Problem, match=r"a build for CPUs alone; .* on the CPU instead, add --profile cpu"):
        choice(monkeypatch, Machine(build=None), ["/dev/nvidia0"])
    (tools / "gcc").unlink()  # nothing is chosen that could not be compiled
    with pytest.raises(machine.Problem, match=r"torch\.compile needs a C compiler"):
        choice(monkeypatch, Machine(), ["/dev/nvidia0"])


def test_device_nodes_are_those_of_cards(tmp_path, monkeypatch):
    for name in ("nvidia1", "nvidiactl", "nvidia-uvm", "kfd", "null"):
        (tmp_path / name).touch()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [os.path.basename(node) for node in machine.gpu_nodes(str(tmp_path))] == ["kfd", "nvidia1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert machine.gpu_nodes(str(tmp_path)) == []


def test_a_named_profile_needs_no_card_to_prepare_its_data(monkeypatch, capsys):
    """And says at once that nothing can be trained here: before it asks the hub for the first byte."""
    monkeypatch.setattr(machine, "card_trouble", lambda torch: "torch sees no GPU")
    monkeypatch.setattr(prepare, "prepare", lambda *_: print("asks the hub", file=sys.stderr))
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--profile", "gpu", "--num-shards", "1"])
    prepare.main()
    assert capsys.readouterr().err == "note: nothing can be trained on this machine: torch sees no GPU\nasks the hub\n"


def test_the_shards_that_a_night_begins_with_are_enough_for_one_run():
    """By the published 38 % of an H100's peak in 300 s, at 342e6 FLOPs a token of 9 x 640; a shard has 42M tokens."""
    assert START_SHARDS * 42e6 > 0.38 * 989e12 * 300 / 342e6


# --- how fast it is, and what would help


def test_a_run_says_what_it_ran_on():
    line = "NVIDIA H100 80GB HBM3 (sizes H100, a known card), attention FA4, 1,100,000 tokens a second, mfu 39.8 %"
    assert machine.speed_text(H100, RESULT) == line
    plain = replace(H100, device_name="cpu", sizes_reason="")
    sdpa = machine.speed_text(plain, RESULT | {"mfu_percent": None, "backend": "sdpa"})
    assert sdpa == "cpu, attention sdpa, 1,100,000 tokens a second"
    assert machine.speed_text(plain, {}) == "cpu, attention unknown"


NO_COMPILER = {"capability": None, "compiler_trouble": "run: apt-get install g++", "compile": False}


@pytest.mark.parametrize(
    ("facts", "backend", "said"),
    [
        ({}, "FA3", ""), ({}, "FA2", "pip install -e '.[hopper]'"), ({"capability": [12, 0]}, "FA2", ""),
        ({"capability": [8, 0]}, "sdpa", "grep attention"), ({"profile": replace(GPU, dtype="float32")}, "sdpa", ""), ({"capability": [7, 5]}, "sdpa", ""),
        (NO_COMPILER, "sdpa", "apt-get install g++"), (NO_COMPILER | {"budget_s": 20.0}, "sdpa", ""), ({"capability": None, "compile": False}, "sdpa", ""),
    ],
)  # fmt: skip
def test_what_would_be_faster_is_named_with_its_command(facts, backend, said):
    advice = machine.speed_advice(replace(H100, **facts), backend)
    assert said in advice and bool(advice) == bool(said) and "\n" not in advice


def test_the_first_line_of_a_run_names_the_sizes_and_why():
    measured = replace(H100, sizes_reason="measured 410 TFLOP/s", profile=replace(GPU, sizes="A100"))
    line = "NVIDIA H100 80GB HBM3 (sizes A100, measured 410 TFLOP/s), bfloat16, compiled, 1 thread, 300 s a run"
    assert line in measured.text and constants.Settings.of(measured.json()) == measured


def test_a_run_of_a_night_takes_what_its_baseline_chose(tmp_path):
    (tmp_path / "night.json").write_text(replace(H100, profile=replace(GPU, sizes="A100")).json())
    chosen = {"attention": "FA2", "micro_rows": 64}
    (tmp_path / "run.json").write_text(json.dumps({"seed": 2, "chosen": chosen}))
    settings, seed = prepare.settings_of_night(tmp_path / "night.json", tmp_path)
    assert seed == 2 and settings.profile == replace(GPU, sizes="A100", **chosen)
