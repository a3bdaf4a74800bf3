"""The researcher over the Anthropic Messages API: replies, cost, outages. Not covered: tools, images, batches."""

import math
import os
import random
import re
import time
from pathlib import Path

from constants import Problem, write_atomically
from lab.journal import spent_usd
from lab.night import History, Night, read_checkout
from lab.prompt import DIVIDER, HISTORY_LINES, REPLACE, REPLY_FORM, SEARCH, request_text, schedule_of, system_text
from lab.records import RUN_AGAIN, Proposal, Rejected, clean

MODEL = "claude-opus-5-5"
# Dollars a million tokens on 2026-11-23: input, output, input read from the cache. Writing the one-hour cache costs
# twice the input.
PRICES = {
    "claude-opus-5-5": (4.0, 20.0, 0.20),
    "claude-sonnet-5-5": (2.0, 10.0, 0.10),
    "claude-haiku-5-5": (0.10, 0.50, 0.01),
}
LONG_PROMPTS = {"claude-haiku-5-5": (100_000, 5.0)}  # from so many tokens on, everything costs so many times as much
REPLY_TOKENS = 32_000  # of one reply, thinking included
TIMEOUT_S = 600.0  # without a byte from the server
PATIENCE_S = 60.0  # longest pause between two attempts if the server names none
OUTAGE_REMINDER_S = 3_600.0  # between two lines about an outage, the first at its third failure
MAX_REFUSALS = 3  # refusals in a row before the night stops
BLOCK = re.compile(rf"^{SEARCH}[ \t]*\n(.*?)^{DIVIDER}[ \t]*\n(.*?)^{REPLACE}[ \t]*$", re.MULTILINE | re.DOTALL)
MARK = re.compile(rf"^({SEARCH}|{REPLACE})[ \t]*$", re.MULTILINE)


# ---------------------------------------------------------------------------
# A reply


def parse_reply(text: str, source: str) -> tuple[Proposal, str | None]:
    """(proposal against `source`, new notes or None) of a reply in REPLY_FORM. Raises Rejected, saying what is wrong with it."""
    blocks = list(BLOCK.finditer(text))
    rest = BLOCK.sub("", text).partition("\nNOTES:")[0]
    if MARK.search(rest) or any(MARK.search(block[1] + block[2]) for block in blocks):
        raise Rejected(f"a SEARCH/REPLACE block has no `{DIVIDER}` or no end.\n{REPLY_FORM}")
    if not blocks:
        raise Rejected(f"the reply has no SEARCH/REPLACE block.\n{REPLY_FORM}")
    head, tail = text[: blocks[0].start()], text[blocks[-1].end() :]
    title = re.search(r"^DESCRIPTION:[ \t]*(\S.*)$", head, re.MULTILINE)
    if not title:
        raise Rejected(f"the reply has no DESCRIPTION line before its first block.\n{REPLY_FORM}")
    why = re.search(r"^HYPOTHESIS:\s*(.*)", head, re.MULTILINE | re.DOTALL)
    why = clean(why[1].replace("```", "").strip())[:2000] if why else ""
    notes = re.search(r"^NOTES:(.*)", tail, re.MULTILINE | re.DOTALL)
    notes = "".join(re.findall(r"\S+\s*", notes[1])[:400]).strip() if notes else None
    for number, block in enumerate(blocks, 1):
        source = replaced(source, block[1], block[2], number)
    return Proposal(clean(title[1].strip())[:200], why, source), notes


def replaced(source: str, search: str, replacement: str, number: int) -> str:
    """The source with the lines `search` replaced. Raises Rejected unless they occur exactly once, as whole lines."""
    if not search.strip():
        raise Rejected(f"block {number}: its SEARCH part is empty")
    text = f"\n{source}"
    count = len(re.findall(f"(?=\n{re.escape(search)})", text))
    if count != 1:
        raise Rejected(
            f"block {number}: its SEARCH lines match {count} times, not once; copy whole lines exactly:\n{search}"
        )
    return text.replace(f"\n{search}", f"\n{replacement}", 1)[1:]


# ---------------------------------------------------------------------------
# The API


def take_credentials() -> dict:
    """What the client is made with, taken out of the environment: a key, else a token, else nothing, which other servers may accept."""
    key, token = (os.environ.pop(name, "") for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN"))
    if key or token:
        return {"api_key": key} if key else {"auth_token": token}
    return {"api_key": "none"} if os.environ.get("ANTHROPIC_BASE_URL") else {}


class Claude:
    """Asks a model for one proposal at a time. Called from the background thread; `status` is what the live view shows of it."""

    name, inline = "claude", False

    def __init__(self, night: Night, here: Path, credentials: dict, model: str, max_usd: float | None):
        if max_usd is not None and model not in PRICES:
            raise Problem(
                f"--max-usd needs the price of {model}, which PRICES in lab/claude.py lacks; add it, or leave --max-usd out"
            )
        from anthropic import Anthropic, DefaultHttpxClient

        try:
            transport = DefaultHttpxClient()
        except (
            ImportError,
            ValueError,
        ) as error:  # a proxy of a kind that it does not know, such as ALL_PROXY=socks5://
            reason, how = str(error).split(". ")[0], "pip install 'httpx2[socks]'"
            raise Problem(
                f"the proxy that the environment names cannot be used ({reason})\nmend ALL_PROXY or HTTPS_PROXY; for SOCKS run: {how}"
            ) from None
        self.client = Anthropic(**credentials, max_retries=0, timeout=TIMEOUT_S, http_client=transport)
        self.night, self.here, self.model, self.max_usd = night, here, model, max_usd
        self.options, self.cached = {"output_config": {"effort": "high"}}, True  # what the server takes
        self.lines = HISTORY_LINES
        self.turns: list[dict] = []  # of the idea in hand: request, reply, objection, reply ...
        self.refusals, self.status = 0, ""
        schedule_of(read_checkout(here, "program.md"))
        self.preflight()

    @property
    def spent_usd(self) -> float:
        return spent_usd(list(self.night.journal.rows))

    @property
    def exhausted(self) -> str:
        return f"the next call might exceed --max-usd {self.max_usd:g}; ${self.spent_usd:.2f} are spent"

    def preflight(self) -> None:
        """Finds a wrong key or an unknown model in a second, before anything is trained. Raises Problem."""
        from anthropic import (
            APIConnectionError,
            APIStatusError,
            AuthenticationError,
            NotFoundError,
            PermissionDeniedError,
        )

        try:
            self.client.models.retrieve(self.model)
        except (AuthenticationError, PermissionDeniedError) as error:
            raise Problem(
                f"the API refuses the key ({error_text(error)}); check ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN"
            ) from None
        except NotFoundError as error:
            reason = error_text(error)
            if "model" in reason:  # another server may not know the path at all
                raise Problem(
                    f"the API does not know the model {self.model} ({reason}); choose one with --model"
                ) from None
        except APIConnectionError as error:
            reason, url = clean(str(error.__cause__ or error))[:200], self.client.base_url
            raise Problem(
                f"{url} cannot be reached ({reason}); check ANTHROPIC_BASE_URL and the proxy, then run the same command"
            ) from None
        except APIStatusError:
            pass  # an outage is waited out later; other servers may lack this path

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        """None if the next call might cost too much. Raises Rejected for a reply that is no proposal, Problem if going on is of no use."""
        schedule = schedule_of(read_checkout(self.here, "program.md"))
        operator = schedule[(history.number - 1) % len(schedule)]
        if self.refusals >= MAX_REFUSALS:
            raise Problem(
                f"{self.refusals} replies were refusals; change program.md or choose another --model, {RUN_AGAIN}"
            )
        if feedback and self.turns:
            objection = f"That cannot be run: {feedback[-1]}\n\nThe whole reply again, mended."
            self.turns.append({"role": "user", "content": objection})
        else:
            missed = f"Your last proposal was not run: {feedback[-1]}" if feedback else ""
            self.turns = [{"role": "user", "content": request_text(source, history, operator, missed, self.lines)}]
        profile = self.night.settings.profile.name
        reply = self.ask(system_text(self.here, self.night.folder / "harness", profile, source), history.number)
        if reply is None:
            return None
        text, stop = reply
        if stop not in ("end_turn", "stop_sequence"):
            self.turns = []
            self.refusals += stop == "refusal"
            raise Rejected(f"no whole reply: {stop or 'the stream was cut'}")
        self.turns.append({"role": "assistant", "content": text or "(empty)"})
        self.refusals = 0
        proposal, notes = parse_reply(text, source)
        if notes is not None:
            write_atomically(self.night.folder / "notes.md", notes + "\n")
        repairs = history.repair.number if history.repair else None
        return Proposal(proposal.description, proposal.hypothesis, proposal.source, operator, repairs)

    def ask(self, system: list[str], number: int) -> tuple[str, str | None] | None:
        """(text, stop reason) of one reply, through outages, however long; None if the next attempt might cost too much.

        Each attempt has two `call` rows: before it at its worst case, after it with what it cost. Raises Problem.
        """
        from anthropic import APIError, APIStatusError
        from httpx2 import HTTPError

        failures, said_at, text, turns = 0, -math.inf, "", list(self.turns)
        while True:
            size = sum(map(len, system)) + sum(len(str(turn["content"])) for turn in turns)
            worst = usd_of(self.model, {"cache_write": size // 2, "output": REPLY_TOKENS})
            if self.max_usd is not None and spent_usd(list(self.night.journal.rows), bound=True) + worst > self.max_usd:
                return None
            call = {"id": len(self.night.journal.of("call")), "number": number, "model": self.model}
            self.night.journal.append("call", **call, tokens={}, usd=worst, at_least=True)
            usage, start, self.status = {}, time.perf_counter(), "thinking"
            try:
                message = self.stream(system, turns, usage)
                reply = "".join(block.text for block in message.content if block.type == "text")
                cut = message.stop_reason is None
                bound = {"bound_usd": worst} if cut else {}
                self.close_call(call, usage, start, at_least=cut, stop=message.stop_reason, reply=reply, **bound)
            except (APIError, HTTPError) as error:
                status = error.status_code if isinstance(error, APIStatusError) else None
                answered = status is not None and status >= 400  # and so not begun; what broke off may have cost all
                bound = {} if answered else {"bound_usd": worst}
                self.close_call(call, usage, start, at_least=not answered, error=error_text(error), **bound)
                if status in (400, 413) and self.adapt(error_text(error)):
                    continue
                self.refuse_to_go_on(status, error)
                failures += 1
                delay = retry_after(error) or min(PATIENCE_S, 2.0**failures) * random.uniform(0.5, 1.0)
                self.status = f"API {status or type(error).__name__}, again in {delay:.0f} s"
                if failures >= 3 and time.perf_counter() - said_at > OUTAGE_REMINDER_S:
                    said_at = time.perf_counter()
                    self.night.say(f"waiting for the API: {error_text(error)}")
                time.sleep(delay)
                continue
            text, self.status = text + reply, ""
            if message.stop_reason == "pause_turn":
                turns.append({"role": "assistant", "content": message.content})
                continue
            if message.stop_reason == "model_context_window_exceeded" and self.lines > 10:
                self.lines //= 2
            return text, message.stop_reason

    def close_call(self, call: dict, usage: dict, start: float, **more) -> None:
        seconds, usd = time.perf_counter() - start, usd_of(self.model, usage)
        self.night.journal.append("call", **call, tokens=usage, usd=usd, seconds=seconds, **more)

    def stream(self, system: list[str], turns: list[dict], usage: dict):
        """One streamed reply. `usage` holds what was reported last, also when the stream breaks."""
        blocks = [{"type": "text", "text": text} for text in system]
        for block in blocks if self.cached else ():
            block["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
        names = {
            "input": "input_tokens",
            "cache_write": "cache_creation_input_tokens",
            "cache_read": "cache_read_input_tokens",
        }
        with self.client.messages.stream(
            model=self.model, max_tokens=REPLY_TOKENS, system=blocks, messages=turns, **self.options
        ) as events:
            for event in events:
                if event.type in ("message_start", "message_delta"):
                    counts = event.message.usage if event.type == "message_start" else event.usage
                    for name, attribute in (names | {"output": "output_tokens"}).items():
                        if getattr(counts, attribute, None) is not None:
                            usage[name] = getattr(counts, attribute)
            return events.get_final_message()

    def adapt(self, message: str) -> bool:
        """Drops what another server of the same protocol does not know, once each; True if it is worth another try."""
        if "output_config" in message and self.options:
            self.options, dropped = {}, "output_config"
        elif "cache_control" in message and self.cached:
            self.cached, dropped = False, "cache_control"
        else:
            return False
        self.night.say(f"the server does not take {dropped}; going on without it")
        return True

    def refuse_to_go_on(self, status: int | None, error) -> None:
        """Raises Problem for what no waiting mends: key, credit, model, a request that the server does not take.

        Raises Rejected for a reply that a content filter blocked: it meets ordinary code now and then, and costs one idea.
        """
        message = error_text(error)
        if "content filter" in message:
            self.turns, self.refusals = [], self.refusals + 1
            raise Rejected(f"no whole reply: {message}")
        if status in (401, 403):
            raise Problem(
                f"the API refuses the key ({message}); check ANTHROPIC_API_KEY or ANTHROPIC_AUTH_TOKEN, {RUN_AGAIN}"
            )
        if status == 402 or "credit balance" in message:
            raise Problem(f"the API account has no credit ({message}); add some, {RUN_AGAIN}")
        if status == 404:
            raise Problem(
                f"the API does not know the model {self.model} or the path ({message}); choose one with --model, {RUN_AGAIN}"
            )
        if status in (400, 413, 422):
            raise Problem(f"the API does not take the request ({message}); {RUN_AGAIN.removeprefix('then ')}")


def error_text(error) -> str:
    body = getattr(error, "body", None)
    inner = body.get("error") if isinstance(body, dict) else None
    return clean(str(inner.get("message") if isinstance(inner, dict) else error))[:300]


def retry_after(error) -> float | None:
    """Seconds that the server asks to wait, at most an hour; None if it does not say."""
    try:
        return min(3600.0, max(0.0, float(error.response.headers["retry-after"])))
    except (AttributeError, KeyError, ValueError, TypeError):
        return None


def usd_of(model: str, tokens: dict) -> float | None:
    """Dollars of {input, cache_write, cache_read, output} tokens; None for a model without a known price."""
    if model not in PRICES:
        return None
    price_in, price_out, price_read = PRICES[model]
    rates = {"input": price_in, "cache_write": 2 * price_in, "cache_read": price_read, "output": price_out}
    long_tokens, factor = LONG_PROMPTS.get(model, (0, 1.0))
    read = sum(count for name, count in tokens.items() if name != "output")
    return (factor if read > long_tokens else 1.0) * sum(count * rates[name] for name, count in tokens.items()) / 1e6
