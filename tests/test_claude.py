"""Claude as the researcher, against a real local server that speaks the streaming Messages API."""

import os
import re
import signal
import time
from contextlib import ExitStack, nullcontext
from importlib.util import find_spec

import pytest
from conftest import FIRST as LINE
from conftest import PLAIN, ROOT, check_agreement, open_here, rows_of, run_here, wait_for
from messages_server import ODD, MessagesServer

import lab.propose.model
from constants import Problem
from lab.propose.claude import Claude, Message, credentials_of, take_secrets, usd_of
from lab.propose.model import LostIdea, parse_reply
from lab.propose.prompt import DIVIDER, REPLACE, SEARCH
from lab.record.journal import spent_usd
from lab.records import Rejected

MODEL = "claude-opus-5-5"


def reply(description: str, *edits: tuple[str, str], notes: str = "") -> str:
    blocks = "".join(f"{SEARCH}\n{old}\n{DIVIDER}\n{new}\n{REPLACE}\n" for old, new in edits)
    tail = f"NOTES: {notes}" if notes else ""
    return f"DESCRIPTION: {description}\nHYPOTHESIS: because of {description}\n{blocks}{tail}"


def add(name: str, value) -> str:
    """A reply whose edit always applies and changes nothing: a discard."""
    return reply(f"{name} {value}", ("    steps = 0", f"    steps = 0\n    {name} = {value!r}"))


FILTERED = "Output blocked by content filtering policy"


def numbered():
    """Endless different discards."""
    count = iter(range(10**6))
    return lambda body: add("idea", next(count))


# --- the reply


def test_a_reply_is_parsed():
    source = "a\n\nb\nd\ne\n"
    text = reply("wider", ("a\n\nb", "c"), ("d", "dd"), notes="remember this\nand that")
    proposal, notes = parse_reply("Some thoughts first.\n" + text, source)
    assert proposal.description == "wider" and proposal.hypothesis == "because of wider"
    assert proposal.source == "c\ndd\ne\n" and notes == "remember this\nand that"
    empty = f"DESCRIPTION: x\n{SEARCH}\nd\n{DIVIDER}\n{REPLACE}\n"
    assert parse_reply(text.replace("\n", "\r\n"), source)[0].source == proposal.source
    lone = parse_reply(reply("x", ("a", "b\rb2")), "a\nc\n")[0].source
    assert lone == "b\nb2\nc\n"  # which the interpreter takes for a line's end
    assert parse_reply(empty, source)[0].source == "a\n\nb\ne\n" and parse_reply(empty, source)[1] is None
    assert len(parse_reply(reply("x", ("a", "b"), notes="w " * 900), source)[1].split()) == 400
    recap = parse_reply(f"{text}\n\nDESCRIPTION: wider, as I said\n", source)[0]
    assert (recap.description, recap.source) == ("wider", proposal.source)
    assert parse_reply(reply("x", ("e", "f")), source.rstrip("\n"))[0].source == "a\n\nb\nd\nf\n"


HONEST = (
    """x = 1  # 8 layers ... 0.002
# the rest moves nothing: variety for `tune`
# q[..., :half], the rest passes unchanged
# (B, T, ...) -> remaining dims are flattened
# the rest of the model's parameters go to AdamW
# Muon for matrices, AdamW for the rest...
# same code as in the paper, fused
# other layers
#"""
    + 20_000 * "-"
)


@pytest.mark.parametrize(
    "line",
    ["    ...", "    # ...", "# ... existing code ...", "// \u2026 unchanged", "# remaining lines as above", "# rest of the file", "#  [same code]"],
)  # fmt: skip
def test_a_line_that_stands_for_others_is_refused(line):
    """It would cost a run. One that was there before may stay."""
    with pytest.raises(Rejected, match="stands for lines that it leaves out"):
        parse_reply(reply("x", ("a", f"b\n{line}")), "a\nc\n")
    assert parse_reply(reply("x", (f"a\n{line}", f"b\n{line}")), f"a\n{line}\n")[0].source == f"b\n{line}\n"
    assert parse_reply(reply("x", ("a", HONEST)), "a\n")[0].source == HONEST + "\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no SEARCH/REPLACE block.\n"), ("x" * 301, "no SEARCH/REPLACE block.\n"), ("Your limit is hit.\nTry at 5pm", 'it says "Your limit is hit. Try at 5pm".\n'),
        (reply("x", ("a", "b")).replace("DESCRIPTION: x\n", ""), "no DESCRIPTION"), (reply("x", ("a", "b"))[:-12], "has no `=======` or no end"),
        (reply("x", ("a", "b")).replace(DIVIDER + "\n", ""), "has no `=======`"),
        (reply("x", ("a", "b"), ("c", "d")).replace(REPLACE, "", 1), "has no `=======` or no end"),
        (reply("x", ("", "b")), "is empty"), (reply("x", ("c", "b")), "match 2 times"),
        (reply("x", ("a = ", "b")), "match 0 times"),  # part of a line is not a line
    ],
)  # fmt: skip
def test_a_reply_that_is_no_proposal_is_rejected_with_its_reason(text, said):
    with pytest.raises(Rejected, match=re.escape(said)):
        parse_reply(text, "a\nc\nc\na = 1\n")


# --- one request


@pytest.fixture
def asking(checkout, monkeypatch):
    """Claude before a scripted server, without runs: asking(script) -> (ask, claude, server); ask() is the reply, or what it raised."""
    monkeypatch.setattr(lab.propose.model, "PATIENCE_S", 0.02)
    with ExitStack() as stack:

        def begin(script, model=MODEL, max_usd=None):
            server = stack.enter_context(MessagesServer(script))
            monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
            night = open_here(checkout, server.url.rpartition(":")[2])
            claude = Claude(night, checkout.folder, {"api_key": "canary-key"}, model, max_usd)
            claude.turns = [{"role": "user", "content": "?"}]

            def ask():
                try:
                    return claude.ask(["programme", "train.py"], 1)
                except (LostIdea, Problem) as trouble:
                    return trouble

            return ask, claude, server

        yield begin


def test_a_server_that_will_never_reply_is_named_in_its_own_words(asking):
    """At once, after ten answers that are no reply, or after three ideas that it refused."""
    for answer, said in (
        (("empty", add("idea", 1)), "answered 10 times and never with a whole reply (its answer has no text)"),
        (("html", "sign in"), "answers with text/html"), (("status", (401, [], "invalid x-api-key")), "refuses the key"),
        (("status", (404, [], "model: gone")), "does not know the model"),
        (("error event", ("authentication_error", "no such key")), "refuses the key (no such key)"),
        (("status", (400, [], {"error": {"message": "No connected db.", "type": "no_db_connection", "code": "400"}})),
         "refused 3 ideas and never replied (the server does not take the request: No connected db."),
        (("status", (422, [], {"detail": "Unprocessable"})), "never replied (the server does not take the request: Unprocessable"),
        (("status", (422, [], "Budget has been exceeded! Current cost: 5.01")), "no credit or budget left (Budget has been exceeded!"),
        (("status", (429, [], "crossed budget: 0.002 >= 1d\n")), "no credit or budget left"),
        (("status", (429, [], "You exceeded your current quota, insufficient_quota")), "no credit or budget left"),
        (("status", (501, [], "not here")), "refused 3 ideas"),
        (("json", {"type": "message", "content": 5}), "never with a whole reply"),
        (("json", {"type": "error", "error": {"type": [], "message": "x"}}), "never with a whole reply"),
    ):  # fmt: skip
        ask, _, server = asking([answer])
        problem = next(raised for _ in range(3) if isinstance(raised := ask(), Problem))
        assert said in str(problem) and "same command" in str(problem) and len(server.requests) <= 10


def test_what_brings_no_reply_costs_one_idea(asking):
    for answer, calls, said in (
        (("refusal", ""), 1, "no whole reply: refusal"),
        (("pause_turn", "a"), 1, "no whole reply: pause_turn"),  # of a server's own tools, which nobody asks for
        (("max_tokens", "DESCRIPTION: x"), 2, "no whole reply: max_tokens"),  # once more, with less thought
        (("status", (400, [], "tools: bad request")), 1, "does not take the request: tools: bad request"),
        (("status", (403, [], "not from this address")), 1, "does not take the request: not from this address"),
        (("status", (400, [], FILTERED)), 1, FILTERED),
        (("error event", FILTERED), 1, FILTERED),
    ):
        ask, _, server = asking([*[answer] * calls, numbered()])
        lost, whole = ask(), ask()
        assert isinstance(lost, LostIdea) and said in str(lost) and "idea 0" in whole
        efforts = [body["output_config"]["effort"] for body in server.requests]
        assert efforts == ["high", *["medium"] * (calls - 1), "high"]
    ask, _, _ = asking([add("idea", 1), ("status", (400, [], "hm"))])  # one reply shows that key and model are right
    assert "idea 1" in ask() and [type(ask()) for _ in range(5)] == [LostIdea] * 5


def test_an_outage_is_waited_out_with_a_line_at_its_third_failure(asking, capsys):
    """It shortens nothing. Each attempt is journalled and billed; what broke off counts for the cap at its worst case."""
    statuses = (
        (529, "overloaded"), (429, "Quota exceeded for quota metric 'Generate requests per minute'"), (503, "upstream retry budget exceeded"),
        (503, "Too many tokens, please wait before trying again."), (500, "internal error while processing request {max_tokens: 32000}"),
    )  # fmt: skip
    answers = [("status", (status, [], words)) for status, words in statuses]
    for answer in (("cut", add("idea", 1)), ("error event", ""), *answers):
        ask, claude, server = asking([answer] * 5 + [numbered()])
        assert "idea 0" in ask() and capsys.readouterr().out.count("waiting for claude: ") == 1
        rows = claude.night.journal.of("call")
        calls = {row["id"]: row for row in rows}.values()
        assert len(calls) == len(server.requests) == 6 and len(rows) == 12
        assert sum("bound_usd" in row for row in calls) == (0 if answer[0] == "status" else 5)
        assert spent_usd(rows) == pytest.approx(usd_of(MODEL, server.usage))
        assert {body["max_tokens"] for body in server.requests} == {32_000}


def test_a_smaller_context_is_met_by_shorter_replies_then_by_a_shorter_history(asking, capsys):
    """Which is said once, and kept."""
    for status, words in (
        (400, "max_tokens is too large: 32000"), (500, "This model's maximum context length is 16384 tokens"),
        (400, "request exceeds the available context size"), (400, "prompt is too long: 70000 tokens"),
    ):  # fmt: skip
        no = ("status", (status, [], words))
        ask, _, server = asking([lambda body, no=no: no if body["max_tokens"] > 8_000 else add("idea", 1)])
        assert all("idea 1" in ask() for _ in range(2)) and capsys.readouterr().out.count("context is small") == 1
        assert [body["max_tokens"] for body in server.requests] == [32_000, 16_000, 8_000, 8_000]
    ask, claude, server = asking([lambda body: no if int(body["messages"][0]["content"]) > 20 else add("idea", 1)])
    claude.request, claude.turns[0]["content"] = str, "300"
    assert "idea 1" in ask() and claude.lines == 18
    shown = [body["messages"][0]["content"] for body in server.requests]
    assert shown == ["300", "300", "300", "150", "75", "37", "18"]


def test_a_reply_is_taken_however_another_server_sends_it(asking):
    """Without an event, a count or a name that the API always has, with some that it has not, or whole."""
    text = add("idea", 1)
    usage, blocks = {"input_tokens": 9, "output_tokens": 9}, [{"type": "text", "text": text}]
    whole = {"type": "message", "content": blocks, "stop_reason": "stop", "usage": usage}  # another word for its end
    kinds = [*(odd for odd in ODD if odd != "empty"), "json"]
    ask, claude, server = asking([*((kind, text) for kind in kinds), ("json", whole)])
    assert [ask() for _ in range(len(kinds) + 1)] == [text] * len(server.requests)
    calls = dict(zip([*kinds, "whole"], claude.night.journal.of("call")[1::2], strict=True))
    uncounted = {"no usage", "zeros", "no message_start", "no message_delta"}
    assert {kind for kind, call in calls.items() if call["at_least"]} == uncounted
    assert {kind for kind, call in calls.items() if "bound_usd" in call} == uncounted
    for usage in ({"input_tokens": -(10**7), "output_tokens": 9}, {"input_tokens": 10**400, "output_tokens": True}):
        message = Message()
        message.take(whole | {"usage": usage})
        assert not message.counted and all(0 <= count < 10**9 for count in message.usage.values())


def test_a_reply_is_its_text_blocks_without_thoughts():
    message = Message()
    for kind, words in (("thinking", "hm"), ("text", "A"), ("redacted_thinking", "x"), ("text", "")):
        message.take({"type": "content_block_start", "content_block": {"type": kind, kind: words}})
    for kind, words in (("thinking", "hm"), ("text", "b"), ("signature", "S"), ("text", "c")):
        message.take({"type": "content_block_delta", "delta": {"type": f"{kind}_delta", kind: words}})
    assert message.text == "Abc"


def test_what_another_server_does_not_take_is_left_out_aloud(asking, capsys):
    words = ("extra fields: output_config", "cache_control: extra fields not permitted", "'system' must be a string")
    other = [("status", (422, [], text)) for text in words]
    for script in (other, [("status", (400, [], "This model does not support the effort parameter."))]):
        ask, _, server = asking([*script, numbered()])
        assert "idea 0" in ask() and capsys.readouterr().out.count("going on without it") == len(script)
        assert "output_config" not in server.requests[-1]
        assert isinstance(server.requests[-1]["system"], str) == (script is other)


def test_the_cap_holds_before_every_attempt(asking):
    """$0.64 each here at worst, which counts for what broke off or is not reported: text does not come from nothing."""
    for answer, cap, replies, calls in ((("zeros", add("idea", 1)), 1.7, 2, 2), (("error event", ""), 2.5, 0, 3)):
        ask, claude, server = asking([answer], max_usd=cap)
        assert all(ask() for _ in range(replies)) and ask() is None and len(server.requests) == calls
        assert f"might exceed --max-usd {cap}" in claude.exhausted
        assert spent_usd(claude.night.journal.rows) + 0.5 < spent_usd(claude.night.journal.rows, bound=True) <= cap
    with pytest.raises(Problem, match="needs the price of claude-x; add it to PRICES"):
        asking([""], model="claude-x", max_usd=1.0)


def test_what_is_wrong_is_found_before_the_baseline(asking, monkeypatch):
    """Of the API. Another server may lack these routes, or give no key its models: the first message decides, unless its list lacks the name."""
    _, claude, _ = asking([""])
    forbidden = 403, {"error": {"type": "permission_error", "message": "only llm_api_routes"}}
    unknown = "does not know the model claude-9"
    for model, key, odd, said, of_another in (
        (MODEL, "wrong", {}, "refuses the key (invalid x-api-key)", ""),
        (MODEL, "k", {"get": forbidden}, "only llm_api_routes", ""),
        ("claude-9", "k", {"listed": [None]}, unknown, ""),
        ("claude-9", "k", {"listed": ["qwen", "llama"]}, unknown, "that it has: qwen, llama"),
    ):
        with MessagesServer([""], **odd) as server:
            claude.model, claude.client = model, claude.client.copy(base_url=server.url, api_key=key)
            for address, wanted in (("", said), (server.url, of_another)):
                monkeypatch.setenv("ANTHROPIC_BASE_URL", address)
                with pytest.raises(Problem, match=re.escape(wanted)) if wanted else nullcontext():
                    claude.preflight()


def test_a_server_that_does_not_answer_and_a_proxy_of_an_unknown_kind_are_named(checkout, monkeypatch):
    night = open_here(checkout)
    proxy = r"the proxy that the environment names cannot be used [^\0]*pip install 'httpx2\[socks\]'"
    kinds = ("socks4", "foo", *(() if find_spec("socksio") else ("socks5",)))
    for name, value, said in (
        ("ANTHROPIC_BASE_URL", "http://127.0.0.1:9", r"cannot be reached.*ANTHROPIC_BASE_URL"),
        ("ANTHROPIC_BASE_URL", "nonsense", r"cannot be reached.*ANTHROPIC_BASE_URL"),
        *(("ALL_PROXY", f"{kind}://127.0.0.1:9", proxy) for kind in kinds),
    ):
        monkeypatch.setenv(name, value)
        with pytest.raises(Problem, match=said):
            Claude(night, ROOT, {"api_key": "k"}, MODEL, None)


@pytest.mark.parametrize(
    ("model", "tokens", "usd"),
    [
        (MODEL, {"input": 1_000, "cache_write": 30_000, "cache_read": 20_000, "output": 10_000}, 0.004 + 0.24 + 0.004 + 0.2),
        ("claude-haiku-5-5", {"input": 40_000, "cache_read": 60_000, "output": 2_000}, 0.004 + 0.0006 + 0.001),
        ("claude-haiku-5-5", {"input": 40_000, "cache_read": 60_001, "output": 2_000}, 5 * (0.004 + 0.00060001 + 0.001)),
        ("another", {"input": 1}, None),
    ],
)  # fmt: skip
def test_a_call_costs_what_the_table_says(model, tokens, usd):
    assert usd_of(model, tokens) == (usd if usd is None else pytest.approx(usd))


def test_a_token_is_taken_like_a_key_and_neither_stays_in_the_environment(monkeypatch):
    names = ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL")
    for given, wanted in (
        (("key", "token", ""), {"api_key": "key"}), (("", "token", "http://here"), {"auth_token": "token"}),
        (("", "", "http://here"), {"api_key": "none"}), (("", "", ""), {}),
    ):  # fmt: skip
        for name, value in zip(names, given, strict=True):
            monkeypatch.setenv(name, value)
        assert credentials_of(take_secrets()) == wanted and not {"key", "token"} & set(os.environ.values())


# --- nights


@pytest.fixture
def night(checkout, monkeypatch):
    """A night in this process with a scripted server: night(script, experiments) -> (reason or Problem, server, night)."""

    def run(script, experiments=None, hours=None, max_usd=None, schedule="improve"):
        with MessagesServer(script) as server:
            monkeypatch.setenv("ANTHROPIC_BASE_URL", server.url)
            monkeypatch.setattr(lab.propose.model, "PATIENCE_S", 0.02)
            here = open_here(checkout)
            (checkout.folder / "program.md").write_text(f"Schedule: {schedule}\n")
            try:
                claude = Claude(here, checkout.folder, {"api_key": "canary-key"}, MODEL, max_usd)
                outcome = run_here(here, experiments, claude, hours)
            except Problem as problem:
                outcome = problem
        return outcome, server, here

    return run


def test_a_night_with_replies_of_every_kind(checkout, night):
    """Each ends in the journal as what it is, the branch holds the keeps alone, and the bill equals the server's count."""
    decay = "        decay=0.1,  # the rest moves nothing: variety for `tune`"
    script = [
        reply("good", (LINE, "        lr=0.3,"), notes="lr matters"),
        reply("bad", ("nothing like it", "x")), reply("mended", ("        width=64,", "        width=60,")),
        add("idea", 1), reply("crashes", (decay, "        decay=1 // 0,")),
        add("idea", 2), reply("repaired", (decay, "        decay=1,")),  # the one trains while the crash is mended
        reply("repeat", ("    steps = 0", "    steps = 0  # again\n    idea = 1")), add("idea", 3),
        ("refusal", ""), ("cut", add("idea", 4)), *[("max_tokens", add("idea", 5))] * 2,
        ("status", (429, [("retry-after", "0.1")], "slow down")), ("error event", ""), add("after_the_burst", 6), numbered(),
    ]  # fmt: skip
    reason, server, here = night(script, 18)
    assert reason == "18 experiments done"
    results = check_agreement(checkout)
    verdicts = {row["description"]: row["verdict"] for row in results}
    assert verdicts["good"] == verdicts["mended"] == "keep" and verdicts["crashes"] == "crash"
    lost = [row["description"] for row in results if row["operator"] == "tune"]  # a refusal, `max_tokens` twice ...
    assert len(lost) >= 2 and all("->" in text for text in lost)
    repaired = next(row for row in results if row["description"] == "repaired")
    assert repaired["mends"] == next(row["number"] for row in results if row["description"] == "crashes")
    reasons = [row["reason"] for row in rows_of(checkout, "reject")]
    for part in ("match 0 times", "tried already: experiment", "no whole reply: refusal", "no whole reply: max_tokens"):
        assert any(part in reason for reason in reasons), (part, reasons)
    calls = {row["id"]: row for row in rows_of(checkout, "call")}
    assert len(rows_of(checkout, "call")) == 2 * len(calls) == 2 * len(server.requests)
    told = {name: sum(row["tokens"].get(name, 0) for row in calls.values()) for name in server.usage}
    assert told == server.usage and sum(row["at_least"] for row in calls.values()) >= 2
    assert spent_usd(here.journal.rows) == pytest.approx(usd_of(MODEL, server.usage))
    assert "canary-key" not in (here.folder / "journal.jsonl").read_text()
    assert len({body["system"][0]["text"] for body in server.requests}) == 1
    assert all(block["cache_control"]["ttl"] == "1h" for block in server.requests[0]["system"])
    texts = [str(body["messages"]) for body in server.requests]
    assert any("lr matters" in text for text in texts[2:]), "its notes come back to it"
    assert any('crashed: "ZeroDivisionError' in text for text in texts)


def test_a_proposal_that_was_paid_for_is_used_after_a_kill(checkout):
    """On a server of another kind: a model without a price costs tokens, and what it says of an outage takes one line."""
    checkout.slow(0.08)
    (checkout.folder / "program.md").write_text("Schedule: improve\n")
    busy = ("status", (529, [("retry-after", "0.05")], "litellm.RateLimitError: busy\n\nLiteLLM: it failed\n"))
    with MessagesServer([numbered()], models=("qwen",)) as server:
        keys = {"ANTHROPIC_API_KEY": "canary-key", "ANTHROPIC_BASE_URL": server.url}
        process = checkout.start(*PLAIN, "--experiments", "2", "--model", "qwen", **keys)
        wait_for(lambda: len(rows_of(checkout, "proposal")) == 2, process)
        process.kill()
        process.communicate()
        paid = [row["description"] for row in rows_of(checkout, "proposal")]
        calls = len(server.requests)
        server.script[:0] = [busy] * 4
        output = checkout.agent("--tag", "t", "--experiments", "2", **keys)
        assert [row["description"] for row in check_agreement(checkout)][:2] == paid
        assert len(server.requests) - calls <= 6 and "improve: " in output
    assert output.count("waiting for claude: 529 litellm.RateLimitError: busy LiteLLM: it failed\n") == 1
    assert re.search(r"the price of qwen is unknown: [\d,]+ tokens were read and \d+ written", output)
    assert "$" not in output
    assert b"canary-key" not in b"".join(p.read_bytes() for p in checkout.folder.rglob("*") if p.is_file())


def test_what_no_waiting_mends_stops_the_night_and_it_goes_on_later(checkout, night):
    problem, _, here = night([add("idea", 1), ("status", (400, [], "Your credit balance is too low"))], 5)
    assert isinstance(problem, Problem) and "no credit" in str(problem) and "same command" in str(problem)
    done = len(here.results)
    assert done >= 2
    night([numbered()], done)
    assert len(check_agreement(checkout)) == done + 1


def test_a_model_that_refuses_for_ever_does_not_end_a_night(checkout, night, capsys):
    """Each time the numeric search takes the turn, and the next idea is asked for as if nothing had been."""
    reason, server, here = night([("refusal", "")], 6)
    assert reason == "6 experiments done" and len(server.requests) == 6
    assert {result.operator for result in here.results[1:]} == {"tune"}
    assert all(len(body["messages"]) == 1 for body in server.requests)
    lines = [line for line in capsys.readouterr().out.split("\n") if "lost" in line]
    why = "no whole reply: refusal; the numeric search takes this turn"
    assert lines == [f"an idea of claude is lost: {why}"] * 6


def test_the_turns_of_tune_cost_nothing_and_are_seen_by_the_model(checkout, night):
    _, server, here = night([numbered()], 6, schedule="improve tune")
    operators = [result.operator for result in here.results[1:]]
    assert operators == ["improve", "tune"] * 3 and len(server.requests) == 3
    assert {row["proposer"] for row in rows_of(checkout, "proposal")} == {"", "claude"}
    text = server.requests[-1]["messages"][0]["content"]
    assert here.results[2].description in text and "# Numbers tried" in text


def test_a_lost_structure_is_offered_once_more(night):
    """An `explore` that lost by no more than half of the discards did; a second loss is none."""
    near = reply("near", ("        beta=0.8,", "        beta=0.8,\n        overfit=-0.001,"))
    far = reply("far", ("        beta=0.8,", "        beta=0.8,\n        overfit=-0.9,"))
    again = reply("near, mended", ("        beta=0.8,", "        beta=0.8,\n        overfit=-0.0005,"))
    _, server, here = night([near, add("idea", 1), again, far, numbered()], 6, schedule="explore")
    asks = [body["messages"][0]["content"].split("# Now")[1] for body in server.requests]
    assert ["lost narrowly" in ask for ask in asks[:3]] == [False, False, True] and "Experiment 1 (near)" in asks[2]
    assert here.results[3].mends == 1 and not any("(near, mended) lost" in ask or "(far) lost" in ask for ask in asks)


def test_bad_edits_are_bounced_with_their_reasons(checkout, night):
    bad = {
        "match 0 times": reply("nowhere", ("nothing like it", "x")),
        "`open` is refused": reply("forbidden", ("        width=64,", "        width=len(open('x').read()),")),
        "tried already": reply("no-op", ("        width=64,", "        width=64,")),
    }
    _, server, here = night([*bad.values(), add("idea", 1), numbered()], 1)
    dialogue = server.requests[3]["messages"]
    assert [turn["role"] for turn in dialogue] == ["user", "assistant"] * 3 + ["user"]
    for said, row, turn in zip(bad, rows_of(checkout, "reject"), dialogue[2::2], strict=True):
        assert said in row["reason"] and said in turn["content"]
    assert here.results[1].description == "idea 1"


def test_the_money_is_never_exceeded(night):
    """A call starts only if its worst case still fits; an interrupted one counts as its worst case."""
    reason, server, here = night([numbered()], 1000, max_usd=0.70)
    assert "might exceed --max-usd 0.7" in reason and 0 < spent_usd(here.journal.rows) <= 0.70
    assert usd_of(MODEL, server.usage) == pytest.approx(spent_usd(here.journal.rows))


def test_an_outage_is_waited_out_aloud_until_the_hours_are_used_up(night):
    script = [add("idea", 1), ("status", (529, [("retry-after", "0.1")], "overloaded"))]
    start = time.monotonic()
    reason, server, here = night(script, hours=(340 + 342) / 2 / 3600 + 1 / 3600)
    assert reason.endswith("hours are used up") and time.monotonic() - start < 40
    assert len(here.results) == 2 and len(server.requests) > 3


def test_interrupted_while_thinking_the_call_stands_at_its_worst_case(checkout):
    """Exit 0 at once; the call in flight is thrown away."""
    with MessagesServer([numbered()], think_s=20.0) as server:
        process = checkout.start(*PLAIN, "--experiments", "3", ANTHROPIC_API_KEY="k", ANTHROPIC_BASE_URL=server.url)
        wait_for(lambda: server.requests and rows_of(checkout, "result"), process)
        start = time.monotonic()
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and time.monotonic() - start < 5 and "Traceback" not in output
    (row,) = rows_of(checkout, "call")
    assert row["usd"] > 0.5 and row["at_least"] and f"the API has cost ${row['usd']:.2f}" in output
