"""The researcher over the Anthropic Messages API: replies, cost, outages. Not covered: tools, images, batches.

Other servers speak the protocol in their own ways, so the stream is read here, not by the SDK, and every answer is judged by what it
says, whatever its status.
"""

import itertools
import json
import os
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

from constants import Problem
from lab.propose.model import LostIdea, Researcher
from lab.record.journal import spent_usd
from lab.record.night import Night
from lab.records import RUN_AGAIN, one_line

MODEL = "claude-opus-5-5"
# Dollars a million tokens on 2026-11-23: input, output, input read from the cache. Writing the one-hour cache costs
# twice the input.
PRICES = {
    "claude-opus-5-5": (4.0, 20.0, 0.20),
    "claude-sonnet-5-5": (2.0, 10.0, 0.10),
    "claude-haiku-5-5": (0.10, 0.50, 0.01),
}
LONG_PROMPTS = {"claude-haiku-5-5": (100_000, 5.0)}  # from so many tokens on, everything costs so many times as much
REPLY_TOKENS, LEAST_REPLY_TOKENS = 32_000, 8_000  # of one reply, thinking included; where the context is small
TIMEOUT_S = 600.0  # without a byte from the server
MAX_LOST = 3  # ideas that a server refuses before the night ends, if it never replied
# Stop reasons of what is no whole reply.
BROKEN_OFF = frozenset("refusal tool_use max_tokens length pause_turn model_context_window_exceeded".split())
GATEWAYS = (408, 502, 504, 524)  # statuses of a server in between: the one behind it may have begun
MAX_BROKEN = 10  # answers that are no whole reply before the night ends, if there never was one
NO_MONEY = re.compile(
    r"(?<!thinking )(?<!retry )(?<!token )(?<!error )\b(budget|quota|credits?|insufficient_quota)\b", re.IGNORECASE
)
PASSES = re.compile(  # by waiting
    r"per (second|minute|hour)|rate limit|retry|try(ing)? again|resource has been exhausted", re.IGNORECASE
)
TOO_LONG = re.compile(
    r"max_tokens\b.*\b(too large|too high|exceed\w*|greater|larger|maximum|at most|must be)|(exceed\w*|maximum|too large)\b.*max_tokens|"
    r"context (size|length|window)|maximum context|(prompt|input) is too long",
    re.IGNORECASE,
)
DROPPABLE = {  # what another server may not take of a request: the words by which it says so
    "output_config": r"output_config|effort", "cache_control": r"cache_control", "a system prompt in blocks": r"system\b.*\b(string|str)\b",
}  # fmt: skip
STATUS_OF = {  # of the errors that come within a stream
    "invalid_request_error": 400, "authentication_error": 401, "billing_error": 402, "permission_error": 403, "not_found_error": 404,
    "request_too_large": 413, "rate_limit_error": 429, "api_error": 500, "overloaded_error": 529,
}  # fmt: skip
COUNTS = {  # of `usage`
    "input": "input_tokens", "cache_write": "cache_creation_input_tokens", "cache_read": "cache_read_input_tokens", "output": "output_tokens",
}  # fmt: skip
SECRETS = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN")


def take_secrets() -> dict[str, str]:
    """The keys, taken out of the environment: whoever asks a model gets them, and nothing else that we start."""
    return {name: os.environ.pop(name) for name in SECRETS if os.environ.get(name)}


def credentials_of(secrets: dict[str, str]) -> dict[str, str]:
    """What the API's client is made with: the key, else the token, else nothing, which other servers may accept. Empty: nobody to ask."""
    if secrets:
        name = next(name for name in SECRETS if name in secrets)
        return {"api_key" if name == SECRETS[0] else "auth_token": secrets[name]}
    return {"api_key": "none"} if os.environ.get("ANTHROPIC_BASE_URL") else {}


class Claude(Researcher):
    """Asks one model. Raises Problem."""

    name = "claude"

    def __init__(self, night: Night, here: Path, credentials: dict, model: str, max_usd: float | None):
        self.model, self.max_usd = model, max_usd
        if max_usd is not None and model not in PRICES:
            raise Problem(
                f"--max-usd needs the price of {model}; add it to PRICES, at the top of lab/propose/claude.py"
            )
        from anthropic import Anthropic, DefaultHttpxClient

        try:
            transport = DefaultHttpxClient()
        # A proxy of a kind that it does not know, such as ALL_PROXY=socks5://.
        except (ImportError, ValueError) as error:
            reason, how = str(error).split(". ")[0], "pip install 'httpx2[socks]'"
            raise Problem(
                f"the proxy that the environment names cannot be used ({reason})\nmend ALL_PROXY or HTTPS_PROXY; for SOCKS run: {how}"
            ) from None
        self.client = Anthropic(**credentials, max_retries=0, timeout=TIMEOUT_S, http_client=transport)
        self.dropped, self.reply_tokens = set(), REPLY_TOKENS  # what of DROPPABLE this server does not take
        calls = night.journal.of("call")
        self.replied, self.refused, self.broken = any(row.get("stop") for row in calls), 0, 0
        super().__init__(night, here)
        self.preflight()

    @property
    def spent_usd(self) -> float:
        return spent_usd(self.night.journal.rows)

    @property
    def bill(self) -> str:
        """What the API has cost, in dollars or, where it has no price that we know, in tokens."""
        if self.model in PRICES:
            return f"the API has cost ${self.spent_usd:.2f}; tokens and prices stand in the journal"
        last = {row["id"]: row["tokens"] for row in self.night.journal.of("call")}.values()
        written = sum(tokens.get("output", 0) for tokens in last)
        read = sum(sum(tokens.values()) for tokens in last) - written
        return f"the price of {self.model} is unknown: {read:,} tokens were read and {written:,} written"

    @property
    def exhausted(self) -> str:
        return f"the next call might exceed --max-usd {self.max_usd:g}; ${self.spent_usd:.2f} are spent"

    def preflight(self) -> None:
        """Finds a wrong key, an unknown model or a server that is not there, before anything is trained. Raises Problem.

        Another server's refusal is no verdict but on a name that its list lacks: a key may be good for messages alone.
        """
        from anthropic import APIConnectionError, APIError, APIStatusError

        other, model = bool(os.environ.get("ANTHROPIC_BASE_URL")), self.model
        try:
            self.client.models.retrieve(model)
        except APIStatusError as error:
            message = error_text(error)
            if error.status_code == 404:
                names = self.names_of_models()
                if names and model not in names:
                    known = ", ".join(names[:20])
                    raise Problem(
                        f"the server does not know the model {model}; choose with --model one that it has: {known}"
                    ) from None
            if error.status_code in (401, 403) and not other:
                raise Problem(f"the API refuses the key ({message}); check {' or '.join(SECRETS)}") from None
            if error.status_code == 404 and not other:
                raise Problem(f"the API does not know the model {model} ({message}); choose one with --model") from None
        except APIConnectionError as error:
            reason, url = one_line(str(error.__cause__ or error))[:200], self.client.base_url
            how = "check ANTHROPIC_BASE_URL and the proxy, then run the same command"
            raise Problem(f"{url} cannot be reached ({reason}); {how}") from None
        except (APIError, ValueError):
            pass  # an answer of another kind: the first message decides

    def names_of_models(self) -> list[str]:
        """The models that the server lists; none if it does not."""
        from anthropic import APIError

        try:
            first = self.client.models.list(limit=1000).data or []  # some servers repeat it for ever
            return [model.id for model in first if isinstance(model.id, str)]
        except (APIError, ValueError, TypeError, AttributeError):
            return []

    def ask(self, system: list[str], number: int) -> str | None:
        """The reply, through outages, however long; None if the next attempt might cost too much.

        Each attempt has two `call` rows: before it at its worst case, after it with what it cost. Raises LostIdea, Problem.
        """
        failures, effort = 0, "high"
        while True:
            size = sum(len(part.encode()) for part in (*system, *(turn["content"] for turn in self.turns)))
            worst = usd_of(self.model, {"cache_write": size // 2, "output": self.reply_tokens})
            if self.max_usd is not None and spent_usd(self.night.journal.rows, bound=True) + worst > self.max_usd:
                return None
            call, start, message = self.open_call(number, self.model, worst), time.perf_counter(), Message()
            failed = self.read(message, system, effort)
            exact = not failed.begun if failed else message.counted  # else it may have cost its worst case
            bound = {} if exact else {"bound_usd": worst}
            said = {"error": failed.message} if failed else {"stop": message.stop, "reply": message.text}
            seconds = time.perf_counter() - start
            self.night.journal.append(
                "call", **call, tokens=message.usage, usd=usd_of(self.model, message.usage), seconds=seconds, at_least=not exact, **said, **bound
            )  # fmt: skip
            if failed:
                if self.adapt(failed):
                    continue
                self.give_up(failed)
                failures += 1
                self.wait_out(failures, f"{failed.status or ''} {failed.message}".strip(), failed.delay_s)
                continue
            self.status = ""
            if message.stop in ("end_turn", "stop_sequence") or (message.text and message.stop not in BROKEN_OFF):
                self.replied = True
                return message.text
            thoughtful = effort == "high" and "output_config" not in self.dropped
            if message.stop in ("max_tokens", "length") and thoughtful:  # it thought for too long
                effort = "medium"
            elif not (message.stop == "model_context_window_exceeded" and self.shorten()):
                raise LostIdea(f"no whole reply: {message.stop}")

    def read(self, message: "Message", system: list[str], effort: str) -> "Failed | None":
        """Fills the message from one request; why that failed, else None."""
        from anthropic import APIError
        from httpx2 import HTTPError

        asked = {"system": "\n\n".join(system)}
        if "a system prompt in blocks" not in self.dropped:
            cached = {} if "cache_control" in self.dropped else {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
            asked = {"system": [{"type": "text", "text": text, **cached} for text in system]}
        if "output_config" not in self.dropped:
            asked["output_config"] = {"effort": effort}
        try:
            with self.client.messages.with_streaming_response.create(
                model=self.model, max_tokens=self.reply_tokens, messages=self.turns, stream=True, **asked
            ) as response:
                for event in events_of(response):
                    message.take(event)
        except Failed as failed:  # an error within the stream
            return failed
        except Exception as error:  # also what a stream of another shape does to our reading
            status = getattr(error, "status_code", None)
            begun = status is None or status < 400 or status in GATEWAYS  # what broke off may have cost all
            broken = not isinstance(error, (APIError, HTTPError))
            return Failed(status, error_text(error), retry_after(error), begun, broken)
        if message.stop is None:
            return Failed(None, "its answer has no text" if message.ended else "its reply broke off", broken=True)
        return None

    def adapt(self, failed: "Failed") -> bool:
        """Does without what another server of the same protocol does not take, aloud; True if that is worth another try."""
        message = failed.message
        if failed.status in (None, 401, 402, 429) or failed.no_money or PASSES.search(message):
            return False
        if TOO_LONG.search(message):
            return self.shorten(message)
        for name, words in DROPPABLE.items():
            if failed.status < 500 and name not in self.dropped and re.search(words, message):
                self.dropped.add(name)
                self.night.say(f"the server does not take {name}; going on without it")
                return True
        return False

    def shorten(self, reason: str = "the context is too small") -> bool:
        """Asks for a shorter reply, then with a shorter history, from now on; False if both are as short as they may be."""
        if self.reply_tokens == REPLY_TOKENS:
            self.night.say(f"the model's context is small ({reason[:200]}): replies and history are made shorter")
        if self.reply_tokens > LEAST_REPLY_TOKENS:
            self.reply_tokens //= 2
            return True
        return self.shorten_history()

    def give_up(self, failed: "Failed") -> None:
        """Raises Problem for what no waiting mends: key, money, model. Raises LostIdea for a request that the server does not take.

        A content filter is one such: it meets ordinary code now and then. Else nothing: an outage.
        """
        status, message = failed.status, failed.message
        if status == 401:
            raise Problem(f"the API refuses the key ({message}); check {' or '.join(SECRETS)}, {RUN_AGAIN}")
        if status == 402 or failed.no_money:
            raise Problem(f"the API account has no credit or budget left ({message}); add some, {RUN_AGAIN}")
        if status == 404:
            raise Problem(
                f"the API does not know the model {self.model} or the path ({message}); choose one with --model, {RUN_AGAIN}"
            )
        refused = status and 400 <= status < 500 and status not in (408, 409, 425, 429)
        if "content filter" in message or refused or status == 501:
            self.refused, reason = self.refused + 1, f"the server does not take the request: {message}"
            if self.refused >= MAX_LOST and not self.replied:
                how = f"check the key, --model and ANTHROPIC_BASE_URL, {RUN_AGAIN}"
                raise Problem(f"the server refused {self.refused} ideas and never replied ({reason}); {how}")
            raise LostIdea(reason)
        self.broken += failed.broken
        if self.broken >= MAX_BROKEN and not self.replied:
            raise Problem(
                f"the server answered {self.broken} times and never with a whole reply ({message}); check ANTHROPIC_BASE_URL, {RUN_AGAIN}"
            )


# ---------------------------------------------------------------------------
# What a server answers


@dataclass
class Failed(Exception):
    """Why a request has no reply."""

    status: int | None  # also of an error within a stream, by its type; None if nothing was said
    message: str
    delay_s: float | None = None  # that the server asks to wait
    begun: bool = True  # whether it may have cost something
    broken: bool = False  # whether there was an answer, which is no whole reply

    @property
    def no_money(self) -> bool:
        """Whether there is none left, which no waiting mends; a limit by the minute is none such."""
        return bool(
            self.status and self.delay_s is None and NO_MONEY.search(self.message) and not PASSES.search(self.message)
        )


@dataclass
class Message:
    """A reply as far as it has come. The SDK's own accumulator takes no stream that lacks an event or a count."""

    text: str = ""
    stop: str | None = None  # why it ended; None for what is not whole
    usage: dict[str, int] = field(default_factory=dict)  # what was reported last, by the names of COUNTS
    final: int = 0  # tokens of the reply as reported after it
    ended: bool = False  # in order

    @property
    def counted(self) -> bool:
        """Whether its tokens were reported, at the end: no text comes from nothing."""
        return self.final > 0 and any(self.usage.get(name) for name in COUNTS if name != "output")

    def take(self, event: dict) -> None:
        """Takes one event, or a whole message. Raises Failed for an error; what it does not know is no matter."""
        kind = event.get("type")
        if kind == "error" or (kind is None and "error" in event):
            error = inner(event, "error")
            raise Failed(STATUS_OF.get(error.get("type"), 500), words_in(event) or str(error.get("type") or "an error"))
        if kind == "message_start":
            self.count(inner(inner(event, "message"), "usage"))
        elif kind == "message":
            for block in event.get("content") or ():
                self.add(block)
            self.final = self.count(inner(event, "usage"))
            self.end(event.get("stop_reason"))
        elif kind == "content_block_start":
            self.add(inner(event, "content_block"))
        elif kind == "content_block_delta":
            self.add(inner(event, "delta"))
        elif kind == "message_delta":
            self.stop = inner(event, "delta").get("stop_reason") or self.stop
            self.final = self.count(inner(event, "usage"))
        elif kind == "message_stop":
            self.end(self.stop)

    def add(self, part: dict) -> None:
        """Adds the words of a text block, or of a delta of one; thoughts are left out."""
        if part.get("type") in ("text", "text_delta"):
            self.text += str(part.get("text") or "")

    def end(self, stop: str | None) -> None:
        """It ended in order, whether or not it says why."""
        self.stop, self.ended = stop or ("end_turn" if self.text else None), True

    def count(self, usage: dict) -> int:
        """Takes what is reported; the tokens of the reply in it."""
        counts = {name: usage.get(key) for name, key in COUNTS.items()}
        self.usage |= {name: n for name, n in counts.items() if type(n) is int and 0 <= n < 10**9}
        return self.usage.get("output", 0) if COUNTS["output"] in usage else 0


def inner(outer: dict, name: str) -> dict:
    """The object of this name; empty if there is none."""
    value = outer.get(name)
    return value if isinstance(value, dict) else {}


def events_of(response):
    """The JSON objects of a stream of server-sent events, or the one of a plain answer. Raises ValueError for another kind.

    Each says its own type: no `event:` line is needed.
    """
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        texts = [b"".join(response.iter_bytes())]
    elif kind == "text/event-stream":
        texts = data_of(response.iter_bytes())
    else:
        raise ValueError(f"the server answers with {kind or 'something'}, not with a reply of the Messages API")
    for text in texts:
        if not text.strip():
            continue
        event = {"type": "message_stop"} if text == b"[DONE]" else json.loads(text)
        if isinstance(event, dict):
            yield event


def data_of(chunks):
    """The data of each server-sent event, whose lines end in \\n or \\r\\n."""
    rest, data = b"", []
    for chunk in itertools.chain(chunks, [b"\n\n"]):  # the last event may lack its end
        rest += chunk
        *lines, rest = rest.split(b"\n")
        for line in map(bytes.strip, lines):
            if line.startswith(b"data:"):
                data.append(line[5:].strip())
            elif not line and data:
                yield b"\n".join(data)
                data = []


def words_in(body) -> str:
    """What a server's answer says in words, in one line; servers put it in several places. Empty if it says nothing."""
    if not isinstance(body, dict):
        return one_line(str(body or ""))[:300]
    places = (inner(body, "error").get("message"), body.get("message"), body.get("detail"), body.get("error"))
    return next((one_line(str(words))[:300] for words in places if words and not isinstance(words, dict)), "")


def error_text(error: Exception) -> str:
    return words_in(getattr(error, "body", None)) or words_in(str(error)) or type(error).__name__


def retry_after(error) -> float | None:
    """Seconds that the server asks to wait, at most an hour; None if it does not say."""
    try:
        return min(3600.0, max(0.0, float(error.response.headers["retry-after"])))
    except (AttributeError, KeyError, ValueError, TypeError):
        return None


def usd_of(model: str, tokens: dict) -> float | None:
    """Dollars of {input, cache_write, cache_read, output} tokens of a model; None if PRICES lacks it."""
    if not (price := PRICES.get(model)):
        return None
    rates = {"input": price[0], "cache_write": 2 * price[0], "cache_read": price[2], "output": price[1]}
    long_tokens, factor = LONG_PROMPTS.get(model, (0, 1.0))
    read = sum(count for name, count in tokens.items() if name != "output")
    return (factor if read > long_tokens else 1.0) * sum(count * rates[name] for name, count in tokens.items()) / 1e6
