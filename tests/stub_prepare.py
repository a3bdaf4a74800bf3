"""Stands in for prepare.py in tests of the agent: the same commands and contract, no torch, runs of milliseconds.

The "model" is the dict that build_model returns; its val_bpb is a closed form of it, so that every verdict can be derived
by hand: 1 + (ln(lr / 0.1))^2 + width / 10000. A model may have `luck` on the night's seed, twice its reverse on others, `overfit` val, be caught
by the scorer for `distrust` (on every seed, or on the one that `distrust_seed` names), be `slow`, crash once where it `stumbles` (in the first
scoring on the second seed), its numbers may carry `noise` by seed, and it may have used `peak_mb` of a card.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import constants


class Clock:
    def __init__(self):
        night = json.loads(Path(__file__).with_name("night.json").read_text())
        said = (Path(night["data"]) / "train.bin").read_text()  # Checkout.slow: a child's environment is an allow-list
        self.calls, self.step_s = 0, float(said.removeprefix("stub"))

    @property
    def expired(self):
        self.calls += 1
        time.sleep(self.step_s)
        return self.calls > 5


class Run:
    def start_clock(self, model):
        if json.loads(Path("../run.json").read_text())["until_clock"]:
            sys.exit(0)
        print(f"{constants.CLOCK_MARK} after 0.1 s", flush=True)
        return Clock()

    def finish(self, model, *, steps, tokens):
        Path("model.pt").write_text(json.dumps(model))
        result = dict.fromkeys(("peak_vram_mb", "mfu_percent"))
        result["peak_vram_mb"] = model.get("peak_mb")
        result |= {
            "training_seconds": 0.01 * model.get("slow", 1),
            "total_seconds": 0.1,
            "total_tokens_M": tokens / 1e6,
            "num_steps": steps,
        }
        result |= {"num_params_M": 0.1, "startup_seconds": 0.05, "epoch": 0.1, "loader_wait_seconds": 0.0}
        result["micro_rows"] = None
        result |= {"seed": json.loads(Path("../run.json").read_text())["seed"], "device": "cpu", "backend": "stub"}
        result["losses"] = [[0.0, 2.0], [0.01, 1.5]]
        Path("result.json").write_text(json.dumps(result))


def start():
    print("step     3   50.0%  loss 1.7500      1,234 tok/s", flush=True)
    return Run()


def main():
    if "--machine" in sys.argv:
        facts = {
            "profile": "cpu",
            "dataset": "sotu",
            "torch": os.environ.get("STUB_TORCH", "stub"),
            "threads": 1,
            "memory_gb": None,
            "peak_tflops": None,
            "flash_attention": {},
            "capability": None,
            "sizes": os.environ.get("STUB_SIZES", "cpu"),
            "sizes_reason": "a test" if "STUB_SIZES" in os.environ else "",
            "compiler_trouble": os.environ.get("STUB_COMPILER_TROUBLE", ""),
            "device": "cpu",
            "device_id": os.environ.get("STUB_DEVICE_ID", "cpu"),
            "device_name": os.environ.get("STUB_DEVICE_NAME", "stub"),
            "dtype": "float32",
        }
        print(json.dumps(facts | {"compiler": "STUB_COMPILER" in os.environ, "train_file": "train.bin"}))
    elif "--probe" in sys.argv:
        forbidden = json.loads((Path(sys.argv[-1]) / "run.json").read_text())["forbidden"]
        print(json.dumps({"reachable": [path for path in forbidden if os.path.isfile(path)], "network": []}))
    elif "--score" in sys.argv:
        folder, below = Path(sys.argv[sys.argv.index("--score") + 1]), float(sys.argv[sys.argv.index("--below") + 1])
        model, seed = (json.loads((folder / name).read_text()) for name in ("out/model.pt", "run.json"))
        stumbled = folder.parent / "stumbled"
        if model.get("stumbles") and seed["seed"] == 2 and not stumbled.exists():
            stumbled.touch()
            sys.exit("stumbled")
        true_bpb = model.get("noise", 0.0) * math.sin(7 * seed["seed"] + 10 * model["lr"])
        true_bpb += model.get("luck", 0.0) * (-1 if seed["seed"] == 1 else 2)
        true_bpb += 1 + math.log(model["lr"] / 0.1) ** 2 + model["width"] / 10_000
        val_bpb = true_bpb - model.get("overfit", 0.0)
        test_bpb = true_bpb if val_bpb < below else None
        distrust = model.get("distrust", "") if model.get("distrust_seed") in (None, seed["seed"]) else ""
        print(json.dumps({"val_bpb": val_bpb, "test_bpb": test_bpb, "invalid": distrust}))
    else:  # prepare: the files whose presence the agent checks
        data = Path(os.environ["AUTORESEARCH_CACHE"]) / "cpu-sotu"
        data.mkdir(parents=True, exist_ok=True)
        for name in ("train.bin", "val.bin", "test.bin", "tokenizer.txt"):
            (data / name).write_text("stub0.002")


if __name__ == "__main__":
    main()
