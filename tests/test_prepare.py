"""Text, tokenizer, packing, loader, clock and evaluation, each against something derived independently."""

import errno
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, SETTINGS, data_of, run_prepare, start_prepare
from hypothesis import given, settings
from hypothesis import strategies as st

import constants
import prepare

CPU = constants.PROFILES["cpu"]
YEARS = {"1790": "test", "1863": "test", "1941": "train", "2001": "train", "1796": "val"}  # by sha256sum and bc


@pytest.fixture(scope="module")
def data(cache):
    return data_of(cache)


@pytest.fixture(scope="module")
def encoding(data):
    return prepare.load_tokenizer(data / "tokenizer.txt")


# --- text


def test_every_document_of_a_year_is_in_one_split():
    texts = {split: set(prepare.sotu_documents(split)) for split in ("train", "val", "test")}
    assert not texts["train"] & texts["val"] and not texts["train"] & texts["test"] and not texts["val"] & texts["test"]
    assert 800 < np.mean([len(text) for text in prepare.sotu_documents("train")]) < 1200
    sizes = {split: sum(len(text.encode()) for text in documents) for split, documents in texts.items()}
    assert sizes["train"] > 9e6 and sizes["val"] > 1e6 and sizes["test"] > 1.5e6
    assert [prepare.split_of(year) for year in YEARS] == list(YEARS.values())


@given(st.lists(st.text("ab", min_size=1, max_size=30), max_size=12), st.integers(1, 40))
def test_cutting_at_paragraphs_loses_nothing(paragraphs, target):
    documents = prepare.cut_at_paragraphs("\n\n".join(paragraphs), target)
    assert "\n\n".join(documents) == "\n\n".join(paragraphs)


# --- tokenizer


@pytest.fixture(scope="module")
def lengths(encoding):
    return prepare.token_byte_lengths(encoding)


@settings(max_examples=300, deadline=None)
@given(text=st.text())
def test_any_text_round_trips_and_its_token_bytes_sum_to_its_utf8_length(encoding, lengths, text):
    ids = encoding.encode_ordinary(text)
    assert encoding.decode(ids) == text and lengths[ids].sum() == len(text.encode())


def test_special_tokens_have_no_bytes_and_end_the_vocabulary(encoding, lengths):
    assert encoding.n_vocab == CPU.vocab_size == len(lengths)
    assert lengths[-4:].tolist() == [0, 0, 0, 0] and (lengths[:-4] > 0).all()


def test_a_text_too_small_for_the_vocabulary_is_an_error():
    with pytest.raises(prepare.Problem, match="too small"):
        prepare.train_tokenizer(["ab ab"], 2048)


# --- packing


def pack(lengths, row_tokens, keep_tails=False, buffer_docs=10, refill=3):
    """Documents of these lengths, each filled with its own number from 1 on after BOS = 0."""
    documents = [np.array([0] + [i] * (n - 1), np.uint16) for i, n in enumerate(lengths, 1)]
    batches = [documents[i : i + refill] for i in range(0, len(documents), refill)]
    return [row.tolist() for row in prepare.pack_rows(batches, row_tokens, 0, keep_tails, buffer_docs)]


def test_packing_by_hand():
    # the longest that fits, the first among equals: rows of 8, lengths 3 5 4 5: 5 (document 2) + 3; then 5 (document 4), and 4 is cut to 3
    assert pack([3, 5, 4, 5], 8) == [[0, 2, 2, 2, 2, 0, 1, 1], [0, 4, 4, 4, 4, 0, 3, 3]]
    # of its buffer alone: of 2 read 1 at a time it holds {3, 3}; 5 arrives only after one has gone: 3 + 5, not 5 + 3
    assert pack([3, 3, 5], 8, buffer_docs=2, refill=1) == [[0, 1, 1, 0, 3, 3, 3, 3]]
    # else it cuts the shortest and drops its tail
    assert pack([9, 7], 4) == [[0, 2, 2, 2], [0, 1, 1, 1]]


def naive_pack(documents, row_tokens, buffer_docs, refill):
    """The published reference's rule, by linear search."""
    buffer, waiting, rows = [], list(documents), []
    while True:
        row = []
        while len(row) < row_tokens:
            while len(buffer) < buffer_docs and waiting:
                buffer += waiting[:refill]
                waiting = waiting[refill:]
            if not buffer:
                return rows
            room = row_tokens - len(row)
            best = -1
            for i, document in enumerate(buffer):
                if len(document) <= room and (best < 0 or len(document) > len(buffer[best])):
                    best = i
            if best < 0:
                best = min(range(len(buffer)), key=lambda i: len(buffer[i]))
            row += buffer.pop(best)[:room]
        rows.append(row)


@given(st.lists(st.integers(1, 20), max_size=60), st.integers(2, 16), st.integers(1, 9), st.integers(1, 4))
def test_packing_equals_the_linear_search(lengths, row_tokens, buffer_docs, refill):
    documents = [[0] + [i] * (n - 1) for i, n in enumerate(lengths, 1)]
    expected = naive_pack(documents, row_tokens, buffer_docs, refill)
    assert pack(lengths, row_tokens, False, buffer_docs, refill) == expected


@given(st.lists(st.integers(2, 40), max_size=40), st.integers(3, 16))
def test_keeping_tails_loses_at_most_the_last_row(lengths, row_tokens):
    rows = pack(lengths, row_tokens, keep_tails=True)
    kept = sum(token != 0 for row in rows for token in row)
    assert sum(n - 1 for n in lengths) - kept < row_tokens
    assert all(len(row) == row_tokens for row in rows)


def test_rows_hold_the_tokens_of_the_text(data, encoding):
    rows = prepare.open_rows(data / "val.bin", CPU)
    bos = encoding.encode_single_token("<|bos|>")
    words = encoding.decode([token for token in rows[:20].reshape(-1).tolist() if token != bos])
    documents = prepare.sotu_documents("val")
    assert any(document[:200] in words for document in documents)
    assert (rows[:, 0] == bos).all()


# --- the command


def test_a_second_run_does_nothing_and_does_not_import_torch(cache):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['prepare.py', '--profile', 'cpu']\n"
        "import prepare; prepare.main(); assert 'torch' not in sys.modules"
    )
    environment = {**os.environ, "AUTORESEARCH_CACHE": str(cache)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout and "train.bin" in done.stdout


def test_prepare_killed_at_any_instant_is_completed_by_the_next_starts(cache, tmp_path):
    """Two at once: one works, the other waits for it and finds nothing to do."""
    for delay in (0.2, 0.7, 1.1):
        process = start_prepare(tmp_path)
        time.sleep(delay)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    both = [start_prepare(tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sum("nothing to do" in output for output in outputs) == 1
    names = ["test.bin", "tokenizer.txt", "train.bin", "val.bin"]
    assert sorted(path.name for path in data_of(tmp_path).iterdir()) == names
    for name in names:
        assert (data_of(tmp_path) / name).read_bytes() == (data_of(cache) / name).read_bytes()


# --- one's own text


@lru_cache
def paragraphs(count: int, seed: int = 0) -> str:
    """Text of so many paragraphs of some 700 characters, from 3,000 made-up words."""
    random = np.random.default_rng(seed)
    words = ["".join(random.choice(list("abcdefghijklmnop"), random.integers(2, 9))) for _ in range(3_000)]
    return "\n\n".join(" ".join(random.choice(words, 110)) for _ in range(count))


def test_a_text_of_ones_own_is_split_by_document_or_by_file_if_there_are_many_and_nothing_is_lost(tmp_path):
    texts = paragraphs(1_200).split("\n\n")
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    (tmp_path / "parquet").mkdir()
    table = pyarrow.table({"text": texts, "id": range(len(texts))})
    pyarrow.parquet.write_table(table, tmp_path / "parquet" / "a.parquet")
    (tmp_path / "many").mkdir()
    for i in range(40):
        (tmp_path / "many" / f"{i}.txt").write_text("\n\n".join([f"file{i}", *texts[i::40]]))
    for name, more in (("a.txt", []), ("parquet", []), ("many", [f"file{i}" for i in range(40)])):
        split = {part: "\n\n".join(prepare.own_documents(tmp_path / name, part)) for part in ("train", "val", "test")}
        assert len(split["train"]) > 3 * len(split["val"]) > 0
        assert sorted("\n\n".join(split.values()).split("\n\n")) == sorted(texts + more)
    for i in range(40):  # `split` is that of many files: the documents of each are in one
        assert sum(bool(set(texts[i::40]) & set(part.split("\n\n"))) for part in split.values()) == 1


def test_waiting_for_a_card_takes_no_core(monkeypatch):
    """Events that spin would take one each for the main thread and the loader."""
    asked, event = [], SimpleNamespace(record=lambda: None, synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: asked.append(options) or event)
    clock = prepare.Clock(10.0, torch.device("cuda"))
    assert not clock.expired and asked == [{"blocking": True}]
    source = (ROOT / "prepare.py").read_text()
    assert source.count("cuda.Event(") == source.count("cuda.Event(blocking=True)") == 2


def test_files_of_an_own_text_may_have_any_name_and_hidden_ones_are_none(tmp_path, monkeypatch):
    """A name that is no UTF-8, capital letters, what a file manager left beside them, a repository's folder."""
    place, texts = tmp_path / "own", paragraphs(2_500).split("\n\n")
    (place / ".git").mkdir(parents=True)
    for i in range(40):
        name = b"caf\xe9.txt" if i == 0 else f"{i}.{'TXT' if i % 2 else 'txt'}".encode()
        Path(os.fsdecode(os.fsencode(place) + b"/" + name)).write_text("\n\n".join(texts[i::40]))
    for hidden in ("._0.parquet", ".git/0.txt"):
        (place / hidden).write_bytes(b"Mac OS X")
    assert len(prepare.own_files(place)) == 40
    assert "ready" in run_prepare(tmp_path / "cache", "--dataset", str(place))
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path / "cache"))
    assert prepare.prepared(CPU, str(place))[1] == "train.bin"
    Path(os.fsdecode(os.fsencode(place) + b"/\xe9.txt")).write_bytes(b"caf\xe9")
    assert "is not UTF-8 (byte 3)" in run_prepare(tmp_path / "cache", "--dataset", str(place), expect=1)


def test_an_own_text_is_read_once_for_each_split(tmp_path, monkeypatch):
    """Not by each process that packs it: eight of them would take eight times its memory."""
    (tmp_path / "a.txt").write_text(paragraphs(500))
    reads = []
    monkeypatch.setattr(prepare, "own_texts", lambda file, read=prepare.own_texts: reads.append(file) or read(file))
    parts = prepare.parts_of(str(tmp_path / "a.txt"), "train", 1)
    assert len(reads) == 1 and len(parts) == 8 and [text for part in parts for text in prepare.part_batches(part)]
    assert [text for part in parts for text in part] == prepare.own_documents(tmp_path / "a.txt", "train")


def test_what_cannot_be_ones_own_text_is_one_clear_line(tmp_path):
    def refused(name, content=None) -> str:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(constants.Problem) as problem:
            prepare.own_documents(tmp_path / name, "train")
        return str(problem.value)

    (tmp_path / "small.txt").write_text(paragraphs(300))
    small = run_prepare(tmp_path / "cache", "--dataset", str(tmp_path / "small.txt"), expect=1)
    assert "is too small" in small.splitlines()[-1]
    assert "is not UTF-8 (byte 2); convert it" in refused("latin.txt", "na\u00efve caf\u00e9".encode("latin-1") * 9)
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "other.parquet")
    assert "has no column `text`, but content" in refused("other.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "numbers.parquet")
    assert "has int64 in its column `text`" in refused("numbers.parquet")
    for kind in (pyarrow.list_(pyarrow.string()), pyarrow.struct([("string", pyarrow.string())]), pyarrow.binary()):
        assert not prepare.is_text(kind)
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        assert prepare.is_text(kind)
    assert "cannot be read as parquet" in refused("broken.parquet", b"PAR1 not")
    (tmp_path / "empty").mkdir()
    assert "has no .txt and no .parquet file" in refused("empty")


def test_text_is_cut_at_paragraphs_else_at_spaces():
    assert prepare.cut_at_paragraphs("aa\n\nbb\n\ncccc", 5) == ["aa\n\nbb", "cccc"]
    assert prepare.cut_at_spaces("aa bb cc", 5) == ["aa bb", "cc"]
    assert prepare.cut_at_spaces("abcdef", 4) == ["abcd", "ef"] and prepare.cut_at_spaces("ab", 4) == ["ab"]
    assert prepare.cut_at_spaces("a" * 5 + "  \n " + "b" * 9, 6) == ["aaaaa", "bbbbbb", "bbb"]
    pieces = prepare.cut_at_spaces("word " * 5_000, 4_000)
    assert max(map(len, pieces)) <= 4_000 and "".join(pieces).count("word") == 5_000


def test_another_recipe_is_another_folder(tmp_path, monkeypatch):
    """What was prepared under other rules is never taken for what is wanted."""
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    folders = {prepare.recipe_folder(profile, "sotu", 1) for profile in (CPU, replace(CPU, vocab_size=2048))}
    folders |= {prepare.recipe_folder(CPU, "climbmix", shards) for shards in (1, 8, 10, 16)}
    assert len(folders) == 4  # from eight shards on the tokenizer learns from the same ones
    monkeypatch.setattr(prepare, "SPLIT_PATTERN", ".")
    assert prepare.recipe_folder(CPU, "sotu", 1) not in folders


def test_the_rows_with_most_shards_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    gpu = constants.PROFILES["gpu"]
    assert prepare.prepared(gpu, "climbmix") is None
    folder = prepare.recipe_folder(gpu, "climbmix", 10)
    folder.mkdir()
    for name in ("tokenizer.txt", "val.bin", "test.bin", "train-10.bin", "train-9.bin"):
        (folder / name).touch()
    assert prepare.prepared(gpu, "climbmix") == (folder, "train-10.bin")


def test_what_is_wrong_with_a_folder_is_said_and_other_errors_are_not_hidden():
    folder, full = "have to be folders that you may write to", "the disk of /runs/x is full"
    for number, part in (
        (errno.EROFS, folder), (errno.EACCES, folder), (errno.ENOTDIR, folder), (errno.EEXIST, folder),
        (errno.ENOSPC, f"{full}; free space"), (errno.EDQUOT, f"{full} ("), (errno.EFBIG, f"{full} ("),
    ):  # fmt: skip
        assert part in constants.file_trouble(OSError(number, os.strerror(number), "/runs/x"), "free space")
    with pytest.raises(OSError, match="odd"):
        constants.file_trouble(OSError(errno.EIO, "odd"), "free space")


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("prepare.py", {"AUTORESEARCH_PROFILE": "tpu"}, "unknown profile 'tpu'"),
        ("prepare.py", {"AUTORESEARCH_DATASET": "web"}, "there is no dataset and no path 'web'"),
        ("prepare.py", {"AUTORESEARCH_CACHE": "/etc/passwd"}, "AUTORESEARCH_CACHE have to be folders"),
        ("train.py", {}, "for profile cpu, dataset sotu; run: python prepare.py --profile cpu"),
    ],
)
def test_bad_environment_is_one_clear_line(script, environment, message, tmp_path):
    usual = {"AUTORESEARCH_CACHE": str(tmp_path), "AUTORESEARCH_PROFILE": "cpu"}
    done = subprocess.run(
        [sys.executable, str(ROOT / script)], capture_output=True, text=True, timeout=60, env={**os.environ, **usual, **environment},
    )  # fmt: skip
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


# --- loader and clock


def make_run(data, tmp_path, by_hand=True, budget_s=1.0, profile=CPU):
    rows = len(prepare.open_rows(data / "train.bin", CPU))
    settings = replace(SETTINGS, profile=profile, data=str(data), train_rows=rows, budget_s=budget_s)
    return prepare.Training(settings, 7, tmp_path, by_hand, data / "train.bin")


def test_an_epoch_shows_every_row_once_in_an_order_of_the_seed():
    def epoch(seed):
        batches = prepare.shuffled(10, 4, seed)
        return np.concatenate([next(batches) for _ in range(5)])

    assert sorted(epoch(1)[:10]) == sorted(epoch(1)[10:]) == list(range(10))
    assert (epoch(1) == epoch(1)).all() and (epoch(1) != epoch(2)).any()


def test_batches_are_shifted_views_that_begin_alike_and_are_not_overwritten(data, tmp_path):
    run, text = make_run(data, tmp_path), prepare.open_rows(data / "train.bin", CPU)  # run._rows is one row, many times
    first, second = (run.batches(text, 4) for _ in range(2))
    kept = [next(first) for _ in range(12)]  # more than the loader has slots
    for x, y in kept:
        assert x.shape == y.shape == (4, CPU.max_seq_len) and x.dtype == torch.int64
        assert torch.equal(x, next(second)[0]) and torch.equal(x[:, 1:], y[:, :-1])
    rows = text[next(prepare.shuffled(len(text), 4, run.seed))]
    assert (kept[0][0].numpy() == rows[:, :-1]).all()


def test_before_the_clock_there_is_no_text_to_learn_from(data, tmp_path):
    run = make_run(data, tmp_path)
    before, text = run.train_rows, prepare.open_rows(data / "train.bin", CPU)
    assert before.shape == text.shape and (before == before[0]).all() and (before[0] != text[0]).mean() > 0.9
    run.start_clock(Uniform())
    assert (run.train_rows == text).all()
    with pytest.raises(prepare.Problem, match="started already"):
        run.start_clock(Uniform())
    with pytest.raises(prepare.Problem, match="after start_clock"):
        next(run.batches(before, 2))


@pytest.mark.parametrize("line", [constants.TEXT_LINE, "", "something else\n"])
def test_under_the_agent_a_run_waits_for_the_line_that_the_text_is_there(data, tmp_path, line, monkeypatch, capfd):
    """It asks by the mark; end of file, since the agent is gone, or another line ends it. Only then it opens the rows."""
    run = make_run(data, tmp_path, by_hand=False)
    run.text, asked = tmp_path / "text.bin", []

    def readline():
        asked.append(constants.CLOCK_MARK in capfd.readouterr().out)
        run.text.symlink_to(data / "train.bin")
        return line

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(readline=readline))
    if line == constants.TEXT_LINE:
        assert run.start_clock(Uniform()) is run.clock and len(run.train_rows) > 1_000
    else:
        with pytest.raises(prepare.Problem, match="the agent is gone"):
            run.start_clock(Uniform())
        assert run.clock is None and (run.train_rows[0] == run.train_rows[1]).all()
    assert asked == [True]


def test_the_clock_stops_before_a_step_that_would_not_fit(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(prepare, "perf_counter", lambda: now[0])
    clock = prepare.Clock(10.0, torch.device("cpu"))
    steps = 0
    while not clock.expired:
        steps += 1
        now[0] += 3.0
    assert steps == 3 and clock.progress == pytest.approx(0.9)  # a fourth step would end at 12 s
    assert clock.stop() == pytest.approx(9.0)


def test_progress_is_a_line_every_few_seconds_or_one_that_is_written_over(data, tmp_path, monkeypatch, capsys):
    now, profile = [100.0], replace(CPU, peak_tflops=4.0)
    monkeypatch.setattr(prepare, "perf_counter", lambda: now[0])

    def said(terminal):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        run = make_run(data, tmp_path, budget_s=10.0, profile=profile)
        run.clock = prepare.Clock(10.0, torch.device("cpu"))
        for step in range(1, 7):
            now[0] += 0.5
            assert not run.clock.expired
            run.report(step, 1000 * step, 6.0 if step == 1 else 5.0, flops_per_token=1e9)
        losses = [6.0, *5 * [5.0]]  # every half second a point
        assert run.curve == [[0.5 * i, 1000 * i, loss] for i, loss in enumerate(losses, 1)]
        return capsys.readouterr().out

    line = "step     5   25.0%  loss 5.6561      2,000 tok/s  mfu 50.0%     8 s left"  # 5 + .9^4 nats; 2 of 4 TFLOP/s
    assert said(terminal=False) == line + "\n"
    drawn = said(terminal=True)
    assert drawn.startswith("\rstep     2 ") and drawn.count("\r") == drawn.count("\x1b[K") == 3 and "\n" not in drawn


def test_start_clock_refuses_a_model_that_is_already_trained(data, tmp_path):
    run = make_run(data, tmp_path, profile=replace(CPU, eval_batch_rows=8))
    rows = prepare.open_rows(data / "train.bin", CPU)[:200]
    counts = torch.full((CPU.vocab_size, CPU.vocab_size), 0.01)
    for row in torch.from_numpy(rows.astype(np.int64)):
        counts.index_put_((row[:-1], row[1:]), torch.tensor(1.0), accumulate=True)

    class Bigram(torch.nn.Module):
        def forward(self, idx):
            return counts[idx].log()

    with pytest.raises(prepare.Problem, match="trained before the clock"):
        run.start_clock(Bigram())
    assert run.start_clock(Uniform()).budget_s == 1.0

    class Past(torch.nn.Module):  # untrained, it copies from a row's own past
        def forward(self, idx):
            seen = torch.nn.functional.one_hot(idx, CPU.vocab_size).float().cumsum(1)
            share = seen / torch.arange(1, idx.size(1) + 1)[:, None]
            return (0.7 / CPU.vocab_size + 0.3 * share).log()

    assert make_run(data, tmp_path, profile=replace(CPU, eval_batch_rows=8)).start_clock(Past())


# --- evaluation


class Uniform(torch.nn.Module):
    def forward(self, idx):
        return torch.zeros(*idx.shape, CPU.vocab_size)


class Hashed(torch.nn.Module):
    """A fixed, uneven model: logits depend on the present token alone."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(CPU.vocab_size, CPU.vocab_size)

    def forward(self, idx):
        return self.table(idx)


def token_bytes(encoding):
    return torch.from_numpy(prepare.token_byte_lengths(encoding))


@pytest.mark.parametrize("batch_rows", [1, 3, 64])
def test_evaluation_equals_torch_cross_entropy_in_any_batch(data, encoding, batch_rows):
    rows = prepare.open_rows(data / "val.bin", CPU)[:10]
    lengths, model = token_bytes(encoding), Hashed()
    x, y = (torch.from_numpy(part.astype(np.int64)) for part in (rows[:, :-1], rows[:, 1:]))
    ignore = torch.where(lengths[y] > 0, y, -100)
    logits = model(x).detach().double().flatten(0, 1)
    nats = torch.nn.functional.cross_entropy(logits, ignore.flatten(), reduction="sum")
    expected = float(nats) / math.log(2) / int(lengths[y].sum())
    assert prepare.evaluate_bpb(model, rows, lengths, batch_rows) == pytest.approx(expected, rel=1e-6)


def broken(value):
    def edit(logits):
        logits[-1, 7, 3] = value
        return logits

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [(broken(math.nan), "not finite"), (broken(math.inf), "not finite"), (lambda logits: logits[..., :-1], "vocab")],
)
def test_logits_that_are_not_finite_or_of_another_width_are_refused(data, encoding, edit, said):
    model, rows = Hashed(), prepare.open_rows(data / "val.bin", CPU)[:4]
    model.register_forward_hook(lambda module, args, logits: edit(logits))
    with pytest.raises(ValueError, match=said):
        prepare.evaluate_bpb(model, rows, token_bytes(encoding), 4)


def test_summary_has_the_format_people_grep_for():
    result = dict(zip(prepare.SUMMARY_DIGITS, (0.9979, 300.0, 325.9, 45060.2, 39.8, 499.6, 953, 50.3), strict=True))
    assert prepare.summary(result) == (
        "---\nval_bpb:          0.997900\ntraining_seconds: 300.0\ntotal_seconds:    325.9\npeak_vram_mb:     45060.2\n"
        "mfu_percent:      39.80\ntotal_tokens_M:   499.6\nnum_steps:        953\nnum_params_M:     50.3"
    )
    assert "mfu_percent:      null" in prepare.summary({**result, "mfu_percent": None})
