"""The researcher over the Anthropic Messages API: replies, cost, outages. Not covered: tools, images, batches."""

import os
import time
from pathlib import Path

from constants import Problem
from lab.journal import spent_usd
from lab.night import Night
from lab.records import RUN_AGAIN, clean
from lab.researcher import LostIdea, Researcher

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
MAX_LOST = 3  # ideas that a model loses in a row before another of --model is asked first
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
    """Asks the models of `models` (IDs with commas between), the first one first."""

    name = "claude"

    def __init__(
        self,
        night: Night,
        here: Path,
        credentials: dict,
        models: str,
        max_usd: float | None,
        price: tuple | None = None,
    ):
        """price: dollars a million tokens of input and output, instead of PRICES. Raises Problem."""
        self.models, self.max_usd = [name.strip() for name in models.split(",")], max_usd
        self.prices = {name: (*price, price[0]) if price else PRICES.get(name) for name in self.models}
        for name, known in self.prices.items():
            if max_usd is not None and not known:
                raise Problem(f"--max-usd needs the price of {name}: add --price IN,OUT, in dollars a million tokens")
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
        self.effort, self.cached = "high", True  # what the server takes; an empty effort is not sent
        self.in_a_row = dict.fromkeys(self.models, 0)  # ideas that each has lost
        super().__init__(night, here)
        self.preflight()

    @property
    def spent_usd(self) -> float:
        return spent_usd(list(self.night.journal.rows))

    @property
    def exhausted(self) -> str:
        return f"the next call might exceed --max-usd {self.max_usd:g}; ${self.spent_usd:.2f} are spent"

    def preflight(self) -> None:
        """Finds a wrong key, an unknown model or a server that is not there, before anything is trained. Raises Problem."""
        from anthropic import (
            APIConnectionError,
            APIStatusError,
            AuthenticationError,
            NotFoundError,
            PermissionDeniedError,
        )

        for model in self.models:
            try:
                self.client.models.retrieve(model)
            except (AuthenticationError, PermissionDeniedError) as error:
                raise Problem(f"the API refuses the key ({error_text(error)}); check {' or '.join(SECRETS)}") from None
            except NotFoundError as error:
                if not os.environ.get("ANTHROPIC_BASE_URL"):  # another server may lack this path
                    raise Problem(
                        f"the API does not know the model {model} ({error_text(error)}); choose one with --model"
                    ) from None
            except APIConnectionError as error:
                reason, url = clean(str(error.__cause__ or error))[:200], self.client.base_url
                raise Problem(
                    f"{url} cannot be reached ({reason}); check ANTHROPIC_BASE_URL and the proxy, then run the same command"
                ) from None
            except APIStatusError:
                pass  # an outage is waited out later

    def ask(self, system: list[str], number: int) -> str | None:
        """The reply of the first model that gives a whole one. Raises LostIdea if none does."""
        reasons = []
        for model in sorted(self.models, key=lambda model: self.in_a_row[model] >= MAX_LOST):
            try:
                reply = self.ask_model(model, system, number)
            except LostIdea as lost:
                self.in_a_row[model] += 1
                reasons.append(f"{model}: {lost}")
                if len(self.models) > 1:
                    self.remind(self.in_a_row[model], f"{self.in_a_row[model]} ideas lost in a row by {reasons[-1]}")
            else:
                self.in_a_row[model] = 0
                return reply
        raise LostIdea("; ".join(reasons))

    def ask_model(self, model: str, system: list[str], number: int) -> str | None:
        """One model's reply, through outages, however long; None if the next attempt might cost too much.

        Each attempt has two `call` rows: before it at its worst case, after it with what it cost. Raises LostIdea, Problem.
        """
        from anthropic import APIError, APIStatusError
        from httpx2 import HTTPError

        failures, text, turns, effort = 0, "", list(self.turns), self.effort
        while True:
            size = sum(len(part.encode()) for part in (*system, *(str(turn["content"]) for turn in turns)))
            worst = usd_of(self.prices[model], {"cache_write": size // 2, "output": REPLY_TOKENS}, model)
            if self.max_usd is not None and spent_usd(list(self.night.journal.rows), bound=True) + worst > self.max_usd:
                return None
            call, usage, start = self.open_call(number, model, worst), {}, time.perf_counter()
            try:
                message = self.stream(model, system, turns, effort, usage)
                reply = "".join(block.text for block in message.content if block.type == "text")
                stop, error = message.stop_reason, ""
                bound = {} if stop and "output" in usage else {"bound_usd": worst}
                self.close_call(call, usage, start, at_least=stop is None, stop=stop, reply=reply, **bound)
            # The last four: a stream that is not one, such as the page of a captive portal.
            except (APIError, HTTPError, AssertionError, ValueError, RuntimeError, TypeError) as failure:
                stop, error = None, failure
                status = error.status_code if isinstance(error, APIStatusError) else None
                answered = status is not None and status >= 400  # and so not begun; what broke off may have cost all
                bound = {} if answered else {"bound_usd": worst}
                self.close_call(call, usage, start, at_least=not answered, error=error_text(error), **bound)
                if status in (400, 413) and self.adapt(error_text(error)):
                    effort = self.effort
                    continue
                refuse_to_go_on(status, error_text(error), model)
            if stop is None:
                failures += 1
                reason = f"{getattr(error, 'status_code', '')} {error_text(error)}" if error else "its reply broke off"
                self.wait_out(failures, reason.strip(), retry_after(error))
                continue
            text, self.status = text + reply, ""
            if stop == "pause_turn":
                turns.append({"role": "assistant", "content": message.content})
            elif stop == "max_tokens" and effort == "high":  # it thought for too long
                effort, text, turns = "medium", "", list(self.turns)
            elif stop in ("end_turn", "stop_sequence"):
                return text
            else:
                if stop == "model_context_window_exceeded" and self.lines > 10:
                    self.lines //= 2
                raise LostIdea(f"no whole reply: {stop}")

    def close_call(self, call: dict, usage: dict, start: float, **more) -> None:
        seconds, usd = time.perf_counter() - start, usd_of(self.prices[call["model"]], usage, call["model"])
        self.night.journal.append("call", **call, tokens=usage, usd=usd, seconds=seconds, **more)

    def stream(self, model: str, system: list[str], turns: list[dict], effort: str, usage: dict):
        """One streamed reply. `usage` holds what was reported last, also when the stream breaks."""
        blocks = [{"type": "text", "text": text} for text in system]
        for block in blocks if self.cached else ():
            block["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
        options = {"output_config": {"effort": effort}} if effort else {}
        names = {
            "input": "input_tokens",
            "cache_write": "cache_creation_input_tokens",
            "cache_read": "cache_read_input_tokens",
        }
        with self.client.messages.stream(
            model=model, max_tokens=REPLY_TOKENS, system=blocks, messages=turns, **options
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
        if "output_config" in message and self.effort:
            self.effort, dropped = "", "output_config"
        elif "cache_control" in message and self.cached:
            self.cached, dropped = False, "cache_control"
        else:
            return False
        self.night.say(f"the server does not take {dropped}; going on without it")
        return True


def refuse_to_go_on(status: int | None, message: str, model: str) -> None:
    """Raises Problem for what no waiting mends: key, credit, model. Raises LostIdea for a request that the server does not take.

    A content filter is one such: it meets ordinary code now and then.
    """
    if status == 401:
        raise Problem(f"the API refuses the key ({message}); check {' or '.join(SECRETS)}, {RUN_AGAIN}")
    if status == 402 or "credit balance" in message:
        raise Problem(f"the API account has no credit ({message}); add some, {RUN_AGAIN}")
    if status == 404:
        raise Problem(
            f"the API does not know the model {model} or the path ({message}); choose one with --model, {RUN_AGAIN}"
        )
    if "content filter" in message or status in (400, 403, 413, 422):
        raise LostIdea(f"the API does not take the request: {message}")


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


def usd_of(price: tuple | None, tokens: dict, model: str = "") -> float | None:
    """Dollars of {input, cache_write, cache_read, output} tokens at a price of PRICES; None if there is none."""
    if not price:
        return None
    rates = {"input": price[0], "cache_write": 2 * price[0], "cache_read": price[2], "output": price[1]}
    long_tokens, factor = LONG_PROMPTS.get(model, (0, 1.0))
    read = sum(count for name, count in tokens.items() if name != "output")
    return (factor if read > long_tokens else 1.0) * sum(count * rates[name] for name, count in tokens.items()) / 1e6
