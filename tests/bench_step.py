"""What a step of train.py costs on this machine: `python tests/bench_step.py [STEPS]`, profile cpu.

Tokens a second of the loader alone against the step's need; step time eager and compiled, in turn; the optimizers' share.
"""

import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import prepare
import train


def seconds_of(work, times: int) -> list[float]:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 40
    settings = replace(prepare.settings_by_hand("cpu"), compile=True)
    torch.set_num_threads(settings.threads)
    prepare.keep_freed_memory()
    text, config = Path(settings.data, settings.train_file), train.config_of(settings.profile)
    run = prepare.Training(settings, 1, Path(tempfile.mkdtemp()), True, text)
    text_rows = prepare.open_rows(text, settings.profile)
    T = settings.profile.max_seq_len

    batches = run.batches(text_rows, config.micro_rows)
    next(batches)
    loader = seconds_of(lambda: [next(batches) for _ in range(50)], 20)
    rate = 50 * config.micro_rows * T / min(loader)
    median = 50 * config.micro_rows * T / statistics.median(loader)
    print(f"loader: {rate / 1e6:.1f}M tokens a second, the best of 20; the median {median / 1e6:.1f}M")
    batches.close()

    made = {}
    for name, compiled in (("eager", False), ("compiled", True)):
        torch.manual_seed(0)
        model = train.build_model(settings.profile)
        optimizers = train.build_optimizers(model, config, run.dtype, compiled)
        loss_fn = torch.compile(model.loss, dynamic=False, fullgraph=True) if compiled else model.loss
        start = time.perf_counter()
        rows, _ = train.warm_up(run, model, optimizers, loss_fn, config)
        print(f"{name}: warm-up {time.perf_counter() - start:.1f} s")
        made[name] = (loss_fn, optimizers, run.batches(text_rows, rows), config.step_tokens // T // rows)
    taken = {"eager": [], "compiled": [], "optimizers": []}
    for _ in range(steps):
        for name, (loss_fn, optimizers, batches, accumulate) in made.items():
            taken[name] += seconds_of(lambda: train.train_step(loss_fn, optimizers, batches, accumulate), 1)  # noqa: B023
        x, y = next(batches)
        loss_fn(x, y).backward()
        taken["optimizers"] += seconds_of(lambda: [optimizer.step() for optimizer in optimizers], 1)  # noqa: B023
    for name, seconds in taken.items():
        median, best = 1000 * statistics.median(seconds), 1000 * min(seconds)
        print(f"{name}: median {median:.1f} ms, best {best:.1f} ms of {steps}")
    step = statistics.median(taken["compiled"])
    print(f"compiled against eager: {statistics.median(taken['eager']) / step:.2f} times as fast")
    print(f"optimizers, compiled: {statistics.median(taken['optimizers']) / step:.0%} of a step")
    print(f"the loader is {rate * step / config.step_tokens:.0f} times as fast as a step needs")


if __name__ == "__main__":
    main()
