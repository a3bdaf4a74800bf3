"""Stands in for lab/measure/score.py: val_bpb is a closed form of the model, so that every verdict can be derived by hand.

1 + (ln(lr / 0.1))^2 + width / 10000. A model may have `luck` on the night's seed, twice its reverse on others, crash once if it `stumbles`
(in the first scoring on the second seed), and its numbers may carry `noise` by seed.
"""

import json
import math
import sys
from pathlib import Path


def truth(model: dict, seed: int) -> float:
    bpb = 1 + math.log(model["lr"] / 0.1) ** 2 + model["width"] / 10_000
    bpb += model.get("luck", 0.0) * (-1 if seed == 1 else 2)
    return bpb + model.get("noise", 0.0) * math.sin(7 * seed + 10 * model["lr"])


def main():
    folder, below = Path(sys.argv[1]), float(sys.argv[sys.argv.index("--below") + 1])
    model = json.loads((folder / "out" / "model.pt").read_text())
    seed = json.loads((folder / "run.json").read_text())["seed"]
    stumbled = folder.parent / "stumbled"
    if model.get("stumbles") and seed == 2 and not stumbled.exists():
        stumbled.touch()
        sys.exit("stumbled")
    true_bpb = truth(model, seed)
    test_bpb = true_bpb if true_bpb < below and "--no-test" not in sys.argv else None
    scores = {"val_bpb": true_bpb, "test_bpb": test_bpb, "invalid": "", "seconds": {}, "probe": {}}
    (folder / "score.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main()
