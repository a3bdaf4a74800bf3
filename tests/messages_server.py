"""A local server that speaks the streaming Messages API, with scripted replies: what the proposer is tested against."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ODD = {  # how other servers stream: the kind of event that each leaves out
    "no event lines": None, "no usage": None, "zeros": None, "no stop_reason": None, "more": None, "empty": None,
    "no message_start": "message_start", "no block_start": "content_block_start", "no block_stop": "content_block_stop",
    "no message_delta": "message_delta", "no message_stop": "message_stop",
}  # fmt: skip


class LocalServer:
    """A server on a free local port, while its `with` lasts."""

    def __init__(self, handler):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *args: None  # a connection that the test itself cut
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()


class MessagesServer(LocalServer):
    """`script` holds one reply for each call: text, or (kind, argument); the last one is repeated for ever.

    Kinds: "status" (code, headers, message or JSON body), "refusal", "max_tokens", "cut", "error event" (message, or (type, message)),
    another stop reason, "html", "json" (a text as a whole message, or the object itself) and, as other servers stream, (kind of ODD, text).
    A function is called with the request and returns one of these. `requests` are the bodies; `usage` adds up what was reported.
    get: the (code, body) of all that is asked by GET; listed: the names that GET /v1/models has.
    """

    def __init__(self, script, think_s: float = 0.0, models=("claude-opus-5-5",), get=None, listed=()):
        self.script, self.think_s, self.models = list(script), think_s, models
        self.requests, self.usage = [], dict.fromkeys(("input", "cache_write", "cache_read", "output"), 0)
        self.lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                name = self.path.split("?")[0].rsplit("/", 1)[1]
                if get:
                    self.answer(*get)
                elif self.wrong_key():
                    self.answer(401, {"error": {"type": "authentication_error", "message": "invalid x-api-key"}})
                elif name == "models" and listed:
                    self.answer(200, {"data": [{"type": "model", "id": name} for name in listed], "has_more": False})
                elif name not in owner.models:
                    self.answer(404, {"error": {"type": "not_found_error", "message": f"model: {name}"}})
                else:
                    times = {"created_at": "2026-01-01T00:00:00Z"}
                    self.answer(200, {"type": "model", "id": name, "display_name": name} | times)

            def wrong_key(self):
                return "wrong" in f"{self.headers.get('x-api-key')} {self.headers.get('authorization')}"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with owner.lock:
                    owner.requests.append(body)
                    reply = owner.script.pop(0) if len(owner.script) > 1 else owner.script[0]
                reply = reply(body) if callable(reply) else reply
                time.sleep(owner.think_s)
                kind, argument = reply if isinstance(reply, tuple) else ("text", reply)
                if self.wrong_key():
                    self.answer(401, {"error": {"type": "authentication_error", "message": "invalid x-api-key"}})
                elif kind == "status":
                    code, headers, message = argument
                    body = {"type": "error", "error": {"type": "api_error", "message": message}}
                    self.answer(code, message if isinstance(message, dict) else body, headers)
                elif kind == "html":
                    self.answer(200, argument, kind="text/html")
                elif kind == "json":
                    whole = {"type": "message", "role": "assistant", "content": [{"type": "text", "text": argument}]}
                    whole |= {"stop_reason": "end_turn", "usage": {"input_tokens": 9, "output_tokens": 9}}
                    self.answer(200, argument if isinstance(argument, dict) else whole)
                else:
                    self.stream(kind, argument)

            def answer(self, code, facts, headers=(), kind="application/json"):
                raw = json.dumps(facts).encode()
                self.send_response(code)
                for name, value in [("content-type", kind), ("content-length", str(len(raw))), *headers]:
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(raw)

            def stream(self, kind, text):
                self.odd, kind = (kind, "text") if kind in ODD else ("", kind)
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("connection", "close")
                self.end_headers()
                usage = {"input_tokens": 100, "cache_creation_input_tokens": 30, "cache_read_input_tokens": 5000}
                owner.count(input=100, cache_write=30, cache_read=5000)
                message = {"id": "m", "type": "message", "role": "assistant", "content": [], "model": "claude-opus-5-5",
                           "stop_reason": None, "stop_sequence": None, "usage": usage | {"output_tokens": 1}}  # fmt: skip
                self.event("message_start", message=message)
                if kind == "error event":
                    owner.count(output=1)
                    type_, words = text if isinstance(text, tuple) else ("api_error", text or "Overloaded")
                    self.event("error", error={"type": type_, "message": words})
                    return
                half = text if kind != "cut" else text[: len(text) // 2]
                if kind != "refusal":
                    self.event("content_block_start", index=0, content_block={"type": "text", "text": ""})
                    for begin in range(0, len(half), 50):
                        delta = {"type": "text_delta", "text": half[begin : begin + 50]}
                        self.event("content_block_delta", index=0, delta=delta)
                if kind == "cut":
                    owner.count(output=1)
                    return
                if kind != "refusal":
                    self.event("content_block_stop", index=0)
                delta = {"stop_reason": "end_turn" if kind == "text" else kind, "stop_sequence": None}
                tokens = 7 + len(half) // 4
                owner.count(output=tokens)
                self.event("message_delta", delta=delta, usage={"output_tokens": tokens})
                self.event("message_stop")

            def event(self, kind, **facts):
                named = "" if self.odd == "no event lines" else f"event: {kind}\n"
                event = {"type": kind, **facts}
                if self.odd == "no usage":
                    event.pop("usage", None)
                    event.get("message", {}).pop("usage", None)
                elif self.odd == "zeros" and (usage := event.get("usage") or event.get("message", {}).get("usage")):
                    usage.update(dict.fromkeys(usage, 0))
                elif self.odd in ("no stop_reason", "empty") and kind == "message_delta":
                    event["delta"] = {"stop_reason": None}
                if kind != ODD.get(self.odd) and not (self.odd == "empty" and kind.startswith("content")):
                    more = 'event: ping\ndata: {}\n\nevent: new\ndata: {"type": "new", "x": [1]}\n\n'
                    extra = more if self.odd == "more" else ""
                    self.wfile.write(f"{extra}{named}data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()

        super().__init__(Handler)

    def count(self, **tokens):
        with self.lock:
            for name, number in tokens.items():
                self.usage[name] += number
