"""The scorer: measures the weights that a run saved. Frozen with the night, beside prepare.py and constants.py.

    python -m lab.measure.score FOLDER      measures the model of a run folder again (runs/by-hand, runs/nov23/0042), and prints some text
                                    that it writes; for a night's folder run the night's own: python runs/nov23/harness/score.py FOLDER

No line of train.py runs in the scorer's own process. A first child loads the weights, sees val in chunks of a new order and states how
many nats each token costs. A number under --below is a win: the first child states test too, and a second child, which has neither val
nor test within reach, answers a probe: it gets rows up to a cut with random tokens after it, computes all logits, and learns only then
which are wanted. Its predictions before the cut have to agree with what the first child stated. Half of the cuts lie where the run
claims to have improved most on the incumbent. The children share nothing: each has a pipe of its own for what it prints, and
score.json is written by this process when both have ended. What a child says that has seen text reaches no log, which another
run or a prompt might see: why a model fails is heard from one that has not. tests/bench_probe.py measures what the probe finds.
"""

import argparse
import json
import math
import os
import signal
import sys
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np

import constants
from constants import Problem, Settings, write_atomically
from prepare import (
    NOT_FINITE,
    SPECIAL_TOKENS,
    answered,
    bits_per_byte,
    evaluate_nats,
    hold_device,
    keep_freed_memory,
    load_tokenizer,
    perf_counter,
    scored_rows,
    settings_by_hand,
    settings_of_night,
    token_byte_lengths,
)  # fmt: skip

PROBE_ROWS = 1_024  # rows of val and test that the second child gets, each up to a random position
CHUNK_BATCHES = 2  # evaluation batches in one question
PROBE_TAIL = 64  # positions before it whose predictions are compared
PROBE_MEAN_NATS = 1e-4  # by which they may differ on average from what was stated
PROBE_NATS = {"float32": 1e-3, "bfloat16": 0.05}  # and a single one, by dtype of the activations
PROBE_LAST_NATS = {"float32": 1e-4, "bfloat16": 2e-3}  # and the mean of those whose target was out of sight
ERROR_CHARS = 1_000  # of an exception that serve() passes on


def score(
    settings: Settings, below: float, test: bool, launch, incumbent: np.ndarray | None = None
) -> tuple[dict, np.ndarray]:
    """Measure the weights that a run saved; returns what score.json holds, and the (N, T) nats of val and, if measured, of test.

    `launch(kind)` is a context manager that yields the connection to a process that runs train.py, see serve(): "evaluate" has the rows and
    states how well the model predicts each token, "answer" has none and is only asked. A val_bpb under `below` is probed, and with
    `test` measured on test too. incumbent: the same nats of the incumbent's run. "invalid" says why the number cannot be trusted; "seconds" are
    those of each part, of which "load" and "load_again" end with a child's first answer. Raises Problem, ValueError.
    """
    profile, random, seconds, clock = settings.profile, np.random.default_rng(), {}, [perf_counter()]

    def ended(part: str) -> None:
        now = perf_counter()
        seconds[part], clock[0] = seconds.get(part, 0.0) + now - clock[0], now

    token_bytes = token_byte_lengths(load_tokenizer(Path(settings.data, "tokenizer.txt")))
    first = random.integers(0, len(token_bytes), (1, profile.max_seq_len))
    scores = {"val_bpb": None, "test_bpb": None, "invalid": "", "seconds": seconds}
    scored, stated = [], []  # rows of val and test, and the nats that the first process states for them

    def warm_up(connection) -> None:
        """One row: what an honest model takes for it is little beside the load, whatever its size."""
        ask_logits(connection, first, np.zeros(1, np.int64), len(token_bytes))

    try:
        with launch("evaluate") as connection:
            warm_up(connection)
            ended("load")
            for split in ("val", "test") if test else ("val",):
                rows = scored_rows(split, settings)
                nats = ask_nats(connection, split, rows.shape, profile.eval_batch_rows, random)
                if not (np.isfinite(nats).all() and nats.min() > -1e-6):
                    raise ValueError("the process that evaluates states losses that no model has")
                nats = np.where(token_bytes[rows[:, 1:]] > 0, nats, 0)
                scores[f"{split}_bpb"] = bits_per_byte(nats, rows, token_bytes)
                scored, stated = [*scored, rows], [*stated, nats]
                ended(split)
                if not scores["val_bpb"] < below:
                    break
    except (Problem, ValueError):
        with launch("answer") as connection:  # which is heard
            warm_up(connection)
        raise
    rows, nats = np.concatenate(scored), np.concatenate(stated)
    if scores["val_bpb"] < below:
        with launch("answer") as connection:
            warm_up(connection)
            connection.heard = False
            ended("load_again")
            chosen, cuts = draw_probe(nats, incumbent, random)
            ask = partial(ask_logits, connection)
            scores["probe"] = compare(ask, rows, nats, token_bytes, profile.eval_batch_rows, chosen, cuts, random)
        ended("probe")
        scores["invalid"] = found_out(scores["probe"], profile.dtype)
    return scores, nats


def found_out(probe: dict, dtype: str) -> str:
    """Why compare()'s differences mean that a score cannot be trusted; empty if they do not."""
    mean, last, largest = probe["mean_nats"], probe["last_mean_nats"], probe["largest_nats"]
    if abs(mean) < PROBE_MEAN_NATS and abs(last) < PROBE_LAST_NATS[dtype] and largest < PROBE_NATS[dtype]:
        return ""
    return (
        "its predictions change when the target tokens are hidden: it looks ahead, keeps "
        f"state or forges its score ({mean:+.5f} nats a token on average, {last:+.5f} at the edge, {largest:.4f} at most)"
    )


def draw_probe(nats: np.ndarray, incumbent: np.ndarray | None, random) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, cuts in 1..T) of a probe of (N, T) nats; cuts of 1, 2 and T always.

    Half of the edges are drawn in proportion to the square of what a token costs less than with the incumbent's nats: a peek at a few
    tokens pays only where they cost much. The rest, or all without an incumbent: half the rows those with the least nats, half any.
    """
    N, T = nats.shape
    count, order = min(PROBE_ROWS, N), np.argsort(nats.sum(1))
    gained = np.zeros((1, T)) if incumbent is None else np.maximum(0.0, incumbent[:N] - nats[: len(incumbent)])
    weights = np.cumsum(gained.astype(np.float64) ** 2)
    aimed = count // 2 if weights[-1] > 0 else 0
    edges = np.searchsorted(weights, random.random(aimed) * weights[-1], side="right")
    best = (count - aimed) // 2
    others = random.permutation(order[best:])[: count - aimed - best]
    chosen = np.concatenate([order[:best], others])
    cuts = random.integers(1, T + 1, len(chosen))
    cuts[:3] = (1, 2, T)[: len(cuts)]
    drawn = random.permutation(count)
    return np.concatenate([chosen, edges // T])[drawn], np.concatenate([cuts, edges % T + 1])[drawn]


def compare(ask, rows, nats, token_bytes, batch_rows: int, chosen, cuts, random) -> dict:
    """How far the nats of a fresh process that knows only what comes before are from the (N, T) stated for (N, T+1) rows.

    Each of the `chosen` rows is sent with random tokens from its cut on, and the logits of up to PROBE_TAIL positions before the
    cut come back, (B, PROBE_TAIL, vocab) float32 by `ask(tokens, starts, vocab)`.
    """
    tail, T, moved, last = min(PROBE_TAIL, nats.shape[1]), nats.shape[1], [], []
    for begin in range(0, len(chosen), batch_rows):
        batch, cut = chosen[begin : begin + batch_rows], cuts[begin : begin + batch_rows, None]
        noise = random.integers(0, len(token_bytes), (len(batch), T))
        tokens = np.where(np.arange(T) < cut, rows[batch, :-1], noise)
        at = np.maximum(0, cut - tail) + np.arange(tail)  # position t predicts token t + 1
        logits = ask(tokens, at[:, 0], len(token_bytes))
        if not np.isfinite(logits).all():
            raise ValueError(NOT_FINITE)
        targets = np.take_along_axis(rows[batch], at + 1, 1).astype(np.int64)
        logits -= logits.max(-1, keepdims=True)
        of_targets = np.take_along_axis(logits, targets[..., None], 2)[..., 0]
        again = np.log(np.exp(logits, out=logits).sum(-1)) - of_targets
        again[token_bytes[targets] == 0] = 0
        change = again - np.take_along_axis(nats[batch], at, 1)
        moved.append(change[at < cut])
        last.append(change[at == cut - 1])  # its target is the first token out of sight
    moved, last = np.concatenate(moved), np.concatenate(last)
    return {
        "rows": len(chosen),
        "tokens": moved.size,
        "mean_nats": float(moved.mean(dtype=np.float64)),
        "last_mean_nats": float(last.mean(dtype=np.float64)),
        "last_abs_nats": float(np.abs(last).mean(dtype=np.float64)),
        "largest_nats": float(np.abs(moved).max()),
    }


def ask_nats(connection, split: str, shape: tuple[int, int], batch_rows: int, random) -> np.ndarray:
    """The (N, T) nats of a split of (N, T+1) rows, asked in chunks of whole batches.

    In an order drawn anew: what a model learns between two chunks is not what it learns when it is asked again.
    """
    nats, size = np.empty((shape[0], shape[1] - 1), np.float32), CHUNK_BATCHES * batch_rows
    for begin in size * random.permutation(-(-shape[0] // size)):
        part = nats[begin : begin + size]
        part[...] = ask(connection, part.shape, "evaluate", split, int(begin), int(begin) + len(part))
    return nats


def ask_logits(connection, tokens: np.ndarray, starts: np.ndarray, vocab: int) -> np.ndarray:
    """(B, PROBE_TAIL, vocab) logits for (B, T) tokens from each of the (B,) starts on, which are sent when all logits are there."""
    ask(connection, (), "answer", tokens)
    return ask(connection, (len(tokens), min(PROBE_TAIL, tokens.shape[1]), vocab), starts)


def ask(connection, shape: tuple[int, ...], *request) -> np.ndarray:
    """The float32 array that serve() replies. Raises Problem if it sends nothing, ValueError if it sends an exception.

    Its words are told if it is heard: one that has seen text could say some.
    """
    try:
        connection.send(request)
        reply = connection.recv_bytes(max(4 * math.prod(shape), 4 * ERROR_CHARS))
    except (EOFError, OSError):
        raise Problem(
            "the process that runs the model ended, or sent what nobody asked for, before it answered"
        ) from None
    if len(reply) != 4 * math.prod(shape):
        words = reply[: 4 * ERROR_CHARS].decode(errors="replace")
        name, _, reason = words.partition(": ")
        words = reason if name in ("Problem", "ValueError") else words
        if not connection.heard and words != NOT_FINITE:
            words = "the model answers random tokens, but fails on text"
        raise ValueError(words)
    return np.frombuffer(reply, np.float32).reshape(shape).copy()


def serve(connection) -> None:
    """Answers what score() asks about a model over the connection, until it is closed. Runs that model's train.py.

    Requests are pickled (score() is believed), replies are bytes (this process is not): of ("evaluate", split, begin, end) the (N, T)
    float32 nats of these rows; of ("answer", (B, T) tokens) a 0.0 when their logits are computed, and then, of ((B,) starts,), the
    (B, PROBE_TAIL, vocab) float32 logits from each start on; of ("text",) some text that the model writes; of an exception its words.
    """
    import traceback

    import torch

    settings, folder = connection.recv()
    try:
        encoding = load_tokenizer(Path(settings.data, "tokenizer.txt"))
        token_bytes = torch.from_numpy(token_byte_lengths(encoding)).to(settings.device)
        model = load_model(settings, folder).eval()
        while True:
            what, *arguments = connection.recv()
            if what == "evaluate":
                split, begin, end = arguments
                rows = scored_rows(split, settings)[begin:end]
                reply = evaluate_nats(model, rows, token_bytes, settings.profile.eval_batch_rows).tobytes()
            elif what == "answer":
                with torch.no_grad():
                    logits = answered(model, torch.from_numpy(arguments[0]).to(settings.device), len(token_bytes))
                float(logits[-1, -1, -1])  # waits for the device
                connection.send_bytes(np.zeros(1, np.float32).tobytes())
                (starts,) = connection.recv()
                at = starts[:, None] + np.arange(min(PROBE_TAIL, logits.size(1)))
                reply = logits[np.arange(len(at))[:, None], at].float().cpu().numpy().tobytes()
            else:
                reply = f"it writes:\n{sample_text(model, encoding, min(120, settings.profile.max_seq_len))}".encode()
            connection.send_bytes(reply)
    except EOFError:
        pass  # no more questions
    except Exception as error:
        traceback.print_exc()
        connection.send_bytes(f"{type(error).__name__}: {error}"[:ERROR_CHARS].encode())


def load_model(settings: Settings, folder: Path):
    """The model of a run folder with its saved weights. Runs its train.py. Raises Problem."""
    import importlib.util

    import torch

    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    source, saved = folder / "train.py", folder / "out" / "model.pt"
    opened = os.open(saved, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # no pipe: nobody writes
    with open(opened, "rb") as file:
        refuse_unpacking(file, saved)
        weights = torch.load(file, map_location=settings.device, weights_only=True)
    spec = importlib.util.spec_from_file_location("train", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.device(settings.device):
        model = module.build_model(settings.profile)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reasons = str(error).split("\n")
        reason = " ".join(
            " ".join(line.split())[:300] for line in reasons[1:] or reasons
        )  # which are missing, which are too many
        raise Problem(f"{reason[:700]} (the saved weights do not fit the model that build_model returns)") from None
    return model


def refuse_unpacking(file, saved: Path) -> None:
    """Raises Problem unless the file is a zip as torch.save writes it, whose entries take no more memory than room in it."""
    import zipfile

    if file.read(4) != b"PK\3\4" or not zipfile.is_zipfile(file):  # torch looks at the first bytes, zipfile at the last
        raise Problem(f"{saved} is not what torch.save writes")
    entries = zipfile.ZipFile(file).infolist()
    if sum(max(entry.file_size, entry.compress_size) for entry in entries) > os.fstat(file.fileno()).st_size:
        raise Problem(f"{saved} is compressed, or its entries share their bytes; weights are saved by run.finish")
    file.seek(0)


def end_descendants() -> None:
    """Ends all that a child has left running: nothing of what it saw may reach the next one. Raises Problem if one survives."""
    import psutil

    for _ in range(100):
        left = psutil.Process().children(recursive=True)
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(left, timeout=0.2)
    raise Problem("what the model's process left running does not end; the machine may need a reboot")


@contextmanager
def serving(commands: dict[str, list[str]], settings: Settings, folder: Path, kind: str):
    """The connection to a process of its own that serves the model of a run, by the command of its kind.

    As long as it is heard (an attribute of the connection; only "answer" is, which has not seen text), what it prints goes through a
    pipe into our output: no child holds the log.
    """
    import socket
    import subprocess
    import threading
    from multiprocessing.connection import Connection

    ours, theirs = socket.socketpair()
    with Connection(ours.detach()) as connection, theirs:
        connection.heard = kind == "answer"
        process = subprocess.Popen(commands[kind], stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        theirs.close()
        printing = threading.Thread(target=pass_on, args=(process.stdout, connection), daemon=True)
        printing.start()
        try:
            with suppress(OSError):  # it ended at once: the first question finds that out
                connection.send((settings, folder))
            yield connection
        finally:
            process.kill()
            process.wait()
            end_descendants()
            printing.join()


def pass_on(pipe, connection) -> None:
    """Writes to our output what comes through a child's pipe, as long as it is heard."""
    with pipe:
        while block := os.read(pipe.fileno(), 1 << 16):
            if connection.heard:
                os.write(1, block)


def sample_text(model, encoding, max_tokens: int) -> str:
    """What the model writes from the start of a document, drawn at temperature 0.8."""
    import torch

    bos_id = encoding.encode_single_token(SPECIAL_TOKENS[0])
    device, tokens = next(model.parameters()).device, [bos_id]
    with torch.no_grad():
        while len(tokens) < max_tokens:
            logits = model(torch.tensor([tokens], device=device))[0, -1].float()
            token = int(torch.multinomial(torch.softmax(logits / 0.8, dim=-1), 1))
            if token == bos_id:
                break
            tokens.append(token)
    return encoding.decode(tokens[1:])


# ---------------------------------------------------------------------------
# The command


def settings_of_folder(folder: Path) -> Settings:
    """The settings of the run whose weights a folder holds: its night's, else those of a run by hand. Raises Problem."""
    for needed in (folder / "train.py", folder / "out" / "model.pt"):
        if not needed.exists():
            where = "runs/by-hand after python train.py, or that of a night's winner, such as runs/nov23/0042"
            raise Problem(
                f"{needed} does not exist; the scorer takes the folder of a run that has its weights: {where}"
            )
    night = folder.parent / "harness" / "night.json"
    return settings_of_night(night, folder)[0] if night.exists() else settings_by_hand()


def score_by_hand(settings: Settings, folder: Path, below: float, test: bool) -> None:
    """Prints what score() finds and some text that the model writes. Raises Problem if the number cannot be trusted."""
    print(f"warning: this runs {folder / 'train.py'} as you, with your files and your network", flush=True)

    os.environ["PYTHONPATH"] = str(Path(constants.__file__).parent)  # for the children
    commands = {kind: [sys.executable, __file__, "--serve"] for kind in ("evaluate", "answer")}
    launch = partial(serving, commands, settings, folder)
    scores, _ = score(settings, below, test, launch)
    for name in ("val_bpb", "test_bpb"):
        print(f"{name + ':':18}{'not measured' if scores[name] is None else f'{scores[name]:.6f}'}")
    if probe := scores.get("probe"):
        print(
            f"probe:            {probe['tokens']:,} tokens of {probe['rows']:,} rows, {probe['mean_nats']:+.1e} nats on average, "
            f"{probe['last_mean_nats']:+.1e} at the edge, {probe['largest_nats']:.1e} at most"
        )
    print("seconds:          " + ", ".join(f"{name} {value:.1f}" for name, value in scores["seconds"].items()))
    if scores["invalid"]:
        raise Problem(f"this number cannot be trusted: {scores['invalid']}")
    with launch("answer") as connection:
        connection.send(("text",))
        print("\n" + connection.recv_bytes().decode(errors="replace"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder", type=Path, nargs="?", metavar="FOLDER", help="of a run: its train.py and out/model.pt"
    )
    parser.add_argument(
        "--below", type=float, default=math.inf, metavar="BPB", help="probe and test only a val_bpb under it"
    )
    parser.add_argument("--no-test", action="store_true", help="leave test out")
    # The agent gives the commands of both children, which it runs with --serve.
    parser.add_argument("--children", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        if args.serve:
            from multiprocessing.connection import Connection

            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who asks, and who then ends us
            connection = Connection(os.dup(0))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            serve(connection)
            return
        if args.folder is None:
            parser.error("it takes the folder of a run")
        folder = args.folder.resolve()
        settings = settings_of_folder(folder)
        constants.guard_this_process()
        if args.children:
            launch = partial(serving, json.loads(args.children), settings, folder)
            best = folder.parent / "nats.npy"  # of the incumbent, once there is one
            incumbent = np.load(best) if best.exists() else None
            scores, nats = score(settings, args.below, not args.no_test, launch, incumbent)
            np.save(folder / "nats.npy", np.minimum(nats, 1_000.0).astype(np.float16))  # whose largest is 65,504
            write_atomically(folder / "score.json", json.dumps(scores))  # both children have ended
        else:
            with hold_device(settings.device, "python -m lab.measure.score"):  # beside a night it would slow its runs
                score_by_hand(settings, folder, args.below, not args.no_test)
    except (Problem, ValueError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the run's folder is as before")


if __name__ == "__main__":
    main()
