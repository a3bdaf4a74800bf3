"""How often the scorer's probe finds a peek at the next token, by the share of positions that peek; and what it costs.

    python tests/bench_probe.py [TRIALS]

Needs prepared data of the cpu profile. The model is a table of next-token logits; where a hash of the last two tokens
says so, it is shown the next one.
"""

import sys
import time

import numpy as np
import torch
from conftest import ROOT  # noqa: F401

import constants
import prepare


class Peeker(torch.nn.Module):
    """Logits of a bigram table, and of the next token at `permille` of 1,000 positions."""

    def __init__(self, vocab: int, permille: int, salt: int):
        super().__init__()
        self.table = torch.nn.Embedding(vocab, vocab)
        self.permille, self.salt = permille, salt

    def forward(self, idx):
        logits = self.table(idx)
        before = torch.nn.functional.pad(idx, (1, 0))[:, :-1]
        chosen = (idx * 7919 + before * 104729 + self.salt) % 1000 < self.permille
        chosen[:, -1] = False
        rows, columns = chosen.nonzero(as_tuple=True)
        logits[rows, columns, idx[rows, (columns + 1).clamp(max=idx.size(1) - 1)]] += 5.0
        return logits


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    profile = constants.PROFILES["cpu"]
    data = constants.data_dir("cpu", "sotu")
    rows = prepare.open_rows(data / "val.bin", profile)
    lengths = prepare.token_byte_lengths(prepare.load_tokenizer(data / "tokenizer.txt"))
    token_bytes, random = torch.from_numpy(lengths), np.random.default_rng()
    T, batch = profile.max_seq_len, profile.eval_batch_rows
    for permille in (1000, 50, 10, 5, 2, 1, 0):
        found, seconds = 0, 0.0
        for salt in range(trials):
            torch.manual_seed(salt)
            model = Peeker(profile.vocab_size, permille, salt)
            nats = prepare.evaluate_nats(model, rows, token_bytes, batch)
            start = time.perf_counter()
            chosen, cuts = prepare.draw_probe(len(rows), T, random)
            mean, largest = prepare.altered_change(
                model, nats, rows, token_bytes, batch, chosen, cuts, random, lambda: None
            )
            seconds += time.perf_counter() - start
            found += abs(mean) >= constants.PROBE_MEAN_NATS or largest >= constants.PROBE_NATS["bfloat16"]
        print(
            f"peek at {permille / 10:5.1f} % of positions: found {found} of {trials}, {seconds / trials:.1f} s a probe",
            flush=True,
        )


if __name__ == "__main__":
    main()
