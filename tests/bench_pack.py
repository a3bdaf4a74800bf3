"""How fast prepare.py tokenises and packs, against tiktoken alone on one core: `python tests/bench_pack.py [MEGABYTES]`.

The aim is 80 % of cores x tiktoken. Both are measured in turn, three times, on the same text; the best of each counts.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pyarrow
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import constants
import prepare


def main() -> None:
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    cores, profile = os.cpu_count() or 1, constants.PROFILES["cpu"]
    documents = prepare.sotu_documents("train")
    documents *= max(1, round(megabytes * 1e6 / sum(len(text.encode()) for text in documents)))
    total = sum(len(text.encode()) for text in documents)
    with (
        tempfile.TemporaryDirectory() as name,
        ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool,
    ):
        folder = Path(name)
        (folder / "tokenizer.txt").write_text(
            prepare.train_tokenizer(prepare.sotu_documents("train"), profile.vocab_size)
        )
        encoding = prepare.load_tokenizer(folder / "tokenizer.txt")
        shards = 2 * cores
        for i in range(shards):
            table = pyarrow.table({"text": documents[i::shards]})
            pyarrow.parquet.write_table(table, folder / f"{i}.parquet", row_group_size=2_000)
        parts = [("shard", folder / f"{i}.parquet") for i in range(shards)]
        common = (folder / "tokenizer.txt", profile.max_seq_len + 1, None)
        list(pool.map(time.sleep, [0.2] * cores))  # the workers are up
        alone, packed = [], []
        for _ in range(3):
            start = time.perf_counter()
            for text in documents[: len(documents) // 4]:
                encoding.encode_ordinary(text)
            alone.append(total / 4 / (time.perf_counter() - start))
            start = time.perf_counter()
            list(pool.map(prepare.pack, parts, *([item] * shards for item in common)))
            packed.append(total / (time.perf_counter() - start))
            print(
                f"tiktoken on one core {alone[-1] / 1e6:5.1f} MB/s   tokenise and pack on {cores} {packed[-1] / 1e6:5.1f} MB/s"
            )
    print(f"best: {max(packed) / (cores * max(alone)):.0%} of {cores} x tiktoken alone")


if __name__ == "__main__":
    main()
