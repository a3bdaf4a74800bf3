"""How often the scorer's probe finds a peek at the next token, by the share of positions that peek; and what it costs.

    python tests/bench_probe.py [TRIALS] [FOLDER]

Needs prepared data of the cpu profile. The model is a table of next-token logits; where a hash of the last two tokens
says so, it is shown the next one; or it knows the 200 places of val at which its honest self is worst (a gain of some 0.01 bpb
here), and is shown the next token there alone. With the FOLDER of a run, such as runs/by-hand, its honest model is probed likewise.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import constants
import prepare
from lab.measure import score


class Peeker(torch.nn.Module):
    """Logits of a bigram table, those of the next token higher by `strength` at `permille` of 1,000 positions."""

    def __init__(self, vocab: int, permille: int, salt: int, strength: float = 5.0):
        super().__init__()
        self.table = torch.nn.Embedding(vocab, vocab)
        self.permille, self.salt, self.strength = permille, salt, strength

    def forward(self, idx):
        logits = self.table(idx)
        before = torch.nn.functional.pad(idx, (1, 0))[:, :-1]
        chosen = (idx * 7919 + before * 104729 + self.salt) % 1000 < self.permille
        chosen[:, -1] = False
        rows, columns = chosen.nonzero(as_tuple=True)
        logits[rows, columns, idx[rows, (columns + 1).clamp(max=idx.size(1) - 1)]] += self.strength
        return logits


class WorstPeeker(torch.nn.Module):
    """Logits of a bigram table, that of the next token higher by 12 after the triples of tokens in `known`, a sorted (N,) of triple_ids()."""

    def __init__(self, table, known: torch.Tensor, vocab: int):
        super().__init__()
        self.table, self.known, self.vocab = table, known, vocab

    def forward(self, idx):
        logits = self.table(idx).clone()
        chosen = torch.isin(triple_ids(idx, self.vocab), self.known)
        chosen[:, :2] = chosen[:, -1] = False
        rows, columns = chosen.nonzero(as_tuple=True)
        logits[rows, columns, idx[rows, columns + 1]] += 12.0
        return logits


def triple_ids(idx, vocab: int):
    """(B, T) int64: one number for each token with the two before it."""
    one, two = (torch.nn.functional.pad(idx, (n, 0))[:, : idx.size(1)] for n in (1, 2))
    return (two * vocab + one) * vocab + idx


def worst_peeker(rows, token_bytes, vocab: int, count: int):
    """(model, nats of its honest self) of a bigram table that peeks where it would be worst."""
    table = torch.nn.Embedding(vocab, vocab)
    ids = torch.from_numpy(rows[:, :-1].astype(np.int64))
    honest = prepare.evaluate_nats(table, rows, token_bytes, constants.PROFILES["cpu"].eval_batch_rows)
    worst = np.argsort(honest[:, 2:].ravel())[-count:]
    places = worst // (honest.shape[1] - 2), worst % (honest.shape[1] - 2) + 2
    return WorstPeeker(table, triple_ids(ids, vocab)[places].unique(), vocab), honest


def differences(model, rows, token_bytes, trials: int, random=None, incumbent=None) -> list[dict]:
    """What score.compare finds of a model, each time at other rows and cuts. incumbent: nats of the incumbent."""
    random, batch = random or np.random.default_rng(), constants.PROFILES["cpu"].eval_batch_rows
    nats = prepare.evaluate_nats(model, rows, token_bytes, batch)

    def ask(tokens, starts, vocab):
        with torch.no_grad():
            logits = model(torch.from_numpy(tokens)).float().numpy()
        tail = min(score.PROBE_TAIL, tokens.shape[1])
        return np.take_along_axis(logits, (starts[:, None] + np.arange(tail))[..., None], 1)

    draws = (score.draw_probe(nats, incumbent, random) for _ in range(trials))
    return [score.compare(ask, rows, nats, token_bytes.numpy(), batch, *drawn, random) for drawn in draws]


def probe(model, rows, token_bytes, trials: int, random=None, incumbent=None) -> tuple[int, float]:
    """(times found out, largest difference in nats) of a model."""
    found = differences(model, rows, token_bytes, trials, random, incumbent)
    return sum(score.found_out(facts, "bfloat16") != "" for facts in found), max(f["largest_nats"] for f in found)


def main() -> None:
    trials = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    profile = constants.PROFILES["cpu"]
    data, _ = prepare.prepared(profile, "sotu")
    rows = np.concatenate([prepare.open_rows(data / f"{split}.bin", profile) for split in ("val", "test")])
    lengths = prepare.token_byte_lengths(prepare.load_tokenizer(data / "tokenizer.txt"))
    token_bytes = torch.from_numpy(lengths)
    for dtype in ("float32", "bfloat16") if len(sys.argv) > 2 else ():
        folder = Path(sys.argv[2]).resolve()
        settings = replace(prepare.settings_by_hand("cpu"), profile=replace(profile, dtype=dtype))
        model = score.load_model(settings, folder).eval()
        found, most = probe(model, rows, token_bytes, trials)
        print(f"honest, {dtype}: found out {found} of {trials} times, largest difference {most:.1e} nats", flush=True)
    for permille in (1000, 50, 10, 5, 2, 1):
        found, _ = probe(Peeker(profile.vocab_size, permille, salt=0), rows, token_bytes, trials)
        print(f"peek at {permille / 10:5.1f} % of positions: found {found} of {trials}", flush=True)
    model, honest = worst_peeker(rows, token_bytes, profile.vocab_size, 200)
    peeked = prepare.evaluate_nats(model, rows, token_bytes, profile.eval_batch_rows)
    gain = prepare.bits_per_byte(honest, rows, lengths) - prepare.bits_per_byte(peeked, rows, lengths)
    for incumbent, said in ((None, "not known"), (honest, "known")):
        found, _ = probe(model, rows, token_bytes, trials, incumbent=incumbent)
        print(
            f"peek at the 200 worst tokens ({gain:.4f} bpb), the incumbent's nats {said}: found {found} of {trials}",
            flush=True,
        )


if __name__ == "__main__":
    main()
