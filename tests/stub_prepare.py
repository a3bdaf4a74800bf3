"""Stands in for prepare.py in tests of the agent: the same commands and contract, no torch, runs of milliseconds.

The "model" is the dict that build_model returns; stub_score.py has the closed form of its val_bpb. It may have used `peak_mb`
of a card.
"""

import json
import os
import sys
import time
from pathlib import Path

import constants


class Clock:
    def __init__(self):
        said = Path("../text/train.bin").read_text()  # Checkout.slow: a child's environment is an allow-list
        self.calls, self.step_s = 0, float(said.removeprefix("stub"))

    @property
    def expired(self):
        self.calls += 1
        time.sleep(self.step_s)
        return self.calls > 5


class Training:
    def start_clock(self, model):
        print(f"{constants.CLOCK_MARK} after 0.1 s", flush=True)
        if sys.stdin.readline() != constants.TEXT_LINE:
            sys.exit("error: the agent is gone")
        return Clock()

    def finish(self, model, *, steps, tokens):
        print(constants.FINISH_MARK, flush=True)
        Path("model.pt").write_text(json.dumps(model))
        result = {
            "training_seconds": 0.01, "total_seconds": 0.1, "total_tokens_M": tokens / 1e6, "num_steps": steps,
            "peak_vram_mb": model.get("peak_mb"), "reserved_vram_mb": model.get("peak_mb"), "mfu_percent": None, "num_params_M": 0.1, "startup_seconds": 0.05, "epoch": 0.1,
            "loader_wait_seconds": 0.0, "micro_rows": None, "seed": 1, "backend": "sdpa", "losses": [[0.0, 0, 2.0], [0.01, 9, 1.5]],
        }  # fmt: skip
        Path("result.json").write_text(json.dumps(result))


def try_device(device):
    pass


def start():
    print("step     3   50.0%  loss 1.7500      1,234 tok/s", flush=True)
    return Training()


def main():
    data = constants.cache_dir() / "cpu-sotu"
    dataset = sys.argv[sys.argv.index("--dataset") + 1] if "--dataset" in sys.argv else "sotu"
    if "--machine" in sys.argv:
        facts = {
            "profile": "cpu", "dataset": dataset, "data": str(data), "train_file": "train.bin" if data.exists() else None,
            "torch": os.environ.get("STUB_TORCH", "stub"), "threads": 1, "memory_gb": float(os.environ.get("STUB_MEMORY_GB", 0)) or None, "peak_tflops": None, "flash_attention": {},
            "capability": None, "sizes": os.environ.get("STUB_SIZES", "cpu"), "sizes_reason": "a test" if "STUB_SIZES" in os.environ else "",
            "compiler": "STUB_COMPILER" in os.environ, "compiler_trouble": os.environ.get("STUB_COMPILER_TROUBLE", ""), "device": "cpu",
            "device_id": os.environ.get("STUB_DEVICE_ID", "cpu"), "device_name": os.environ.get("STUB_DEVICE_NAME", "stub"), "dtype": "float32",
        }  # fmt: skip
        print(json.dumps(facts))
    else:  # prepare: the files whose presence the agent checks
        data.mkdir(parents=True, exist_ok=True)
        for name in ("train.bin", "val.bin", "test.bin", "tokenizer.txt"):
            (data / name).write_text("stub0.002")


if __name__ == "__main__":
    main()
