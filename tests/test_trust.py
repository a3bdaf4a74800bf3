"""The keep rule beyond one number: confirmation, alarms, --check and --ablate; on stub training, whose truth is known."""

import json
import math
import signal
import time

import pytest
from conftest import check_agreement, rows_of
from test_agent import experiment

import agent

FIRST = "        lr=0.4,  # best at 0.1"
FLAGS = ("--tag", "t", "--profile", "cpu")


def better(lr: float, **more) -> tuple[str, str]:
    """An edit to another learning rate, nearer to the best one; `more` are further facts about the model."""
    return FIRST, f"        lr={lr},  # best at 0.1" + "".join(
        f"\n        {name}={value!r}," for name, value in more.items()
    )


@pytest.fixture
def night(checkout):
    """Runs edits as the experiments of a night: night(edits, *flags) -> its result rows."""

    def run(edits, *flags, **environment):
        journal = checkout.folder.parent / "ideas.jsonl"
        rows = [
            {"event": "result", "number": n, "verdict": "keep", "description": f"idea {n}", "hypothesis": "",
             "edits": [{"search": old, "replace": new}]}
            for n, (old, new) in enumerate(edits, 1)
        ]  # fmt: skip
        journal.write_text("".join(json.dumps(row) + "\n" for row in rows))
        checkout.agent(*FLAGS, "--replay", str(journal), *flags, **environment)
        return check_agreement(checkout)

    return run


def test_checking_uses_up_no_hours_of_the_night():
    def start(*words):
        return {"event": "night", "arguments": dict.fromkeys(words, "t"), "uptime": 0.0}

    rows = [start(), {"event": "result", "uptime": 50.0}, start("check"), {"event": "trial", "uptime": 900.0}, start()]
    assert agent.seconds_of_earlier_starts(rows) == 50.0


# --- the keep rule


def test_luck_is_not_confirmed_on_the_second_seed(checkout, night):
    lucky, real = (FIRST, f"{FIRST}\n        luck=0.01,"), better(0.395)
    results = night([lucky, real], "--confirm")
    assert [row["verdict"] for row in results] == ["keep", "discard", "keep"]
    assert "not confirmed: on two seeds" in results[1]["reason"]
    assert (
        results[2]["reason"].startswith("confirmed: on two seeds") and results[2]["confirm_bpb"] < results[0]["val_bpb"]
    )
    assert [(row["name"], row["seed"]) for row in rows_of(checkout, "trial")] == [
        ("incumbent", 2), ("claim", 2), ("claim", 2),  # the incumbent's second run serves twice
    ]  # fmt: skip


def test_nothing_is_confirmed_against_an_incumbent_without_a_second_number(night):
    first, change = better(0.39, distrust="keeps state", distrust_seed=2)
    assert night([(first, change)], "--no-confirm")[1]["verdict"] == "keep"
    claim = night([(first, change), (change, better(0.38)[1])], "--confirm")[2]
    assert (claim["verdict"], claim["reason"]) == (
        "discard",
        "not confirmed: on the second seed the incumbent: keeps state",
    )


def test_a_confirming_run_that_crashed_is_run_once_more(checkout, night):
    assert night([better(0.39, stumbles=True)], "--confirm")[1]["verdict"] == "keep"
    assert [(row["name"], bool(row["crash"])) for row in rows_of(checkout, "trial")] == [
        ("incumbent", False), ("claim", True), ("claim", False),
    ]  # fmt: skip


def test_without_confirmation_luck_is_kept_unless_it_is_large(night):
    small, large = (FIRST, f"{FIRST}\n        luck=0.01,"), (FIRST, f"{FIRST}\n        luck=0.2,")
    assert [row["verdict"] for row in night([large, small], "--no-confirm")] == ["keep", "discard", "keep"]


def test_the_cpu_profile_confirms_unless_told_otherwise(checkout, night):
    night([better(0.395)])
    assert len(rows_of(checkout, "trial")) == 2


def test_what_the_scorer_distrusts_is_invalid(night):
    results = night([better(0.39, distrust="looks ahead"), better(0.39, overfit=0.1)])
    assert [row["verdict"] for row in results] == ["keep", "invalid", "invalid"]
    assert results[1]["reason"] == "looks ahead" and "on test" in results[2]["reason"]


def test_a_run_off_the_pace_of_the_same_model_is_run_again():
    usual = {"num_params_M": 1.5, "total_tokens_M": 6.0, "num_steps": 1500, "training_seconds": 300.0}

    def again(val_bpb=1.001, **changes):
        run = agent.Run({**usual, **changes}, "", 320.0, 301.0)
        return agent.pace_may_decide(agent.Measured(run, {"val_bpb": val_bpb}, ""), experiment(metrics=usual))

    assert not again(total_tokens_M=5.9, num_steps=1475)
    assert again(total_tokens_M=5.6, num_steps=1400) and again(total_tokens_M=6.4, num_steps=1600)
    assert again(0.99, total_tokens_M=6.4, num_steps=1600)
    assert not again(1.02, total_tokens_M=5.6, num_steps=1400)  # 7 % of the pace are worth 0.006
    assert not again(total_tokens_M=5.6, num_steps=1400, num_params_M=1.6)
    assert not again(total_tokens_M=5.6, num_steps=700)  # another batch


def test_what_was_off_the_pace_stands_with_its_second_run(checkout, night):
    results = night(
        [("        beta=0.8,", "        beta=0.8,\n        slow=2,"), ("        beta=0.8,", "        beta=0.7,")]
    )
    assert results[1]["rerun_seconds"] > 0 and results[2]["rerun_seconds"] == 0
    short = checkout.agent(
        "--tag", "short", *FLAGS[2:], "--replay", str(checkout.folder.parent / "ideas.jsonl"), "--budget", "20"
    )
    assert "experiments" in short and rows_of(checkout, "result", "short")[1]["rerun_seconds"] == 0


def test_compiling_a_new_incumbents_model_is_no_idling(checkout, night):
    checkout.drop_screen()
    build = '    return dict(CONFIGS["cpu"])'
    slow = f"    import time\n    time.sleep(1)\n    open('../cache/kernel', 'w').close()\n{build} | dict(lr=0.39)"
    edits = [(build, slow), ("        beta=0.8,", "        beta=0.7,")]
    results = night(edits, "--no-confirm", "--budget", "60", STUB_COMPILER="1")
    assert [row["verdict"] for row in results] == ["keep", "keep", "discard"] and results[2]["idle_seconds"] < 1
    assert [row["seconds"] > 1 for row in rows_of(checkout, "compile")] == [False, True]  # the baseline's, the keep's


# --- statistics


def test_holm_stops_at_the_first_that_is_not_rejected():
    assert agent.holm([0.01, 0.04, 0.03, 0.005]) == [True, False, False, True]  # 0.03 > 0.05 / 2
    assert agent.holm([]) == []


def test_the_interval_is_students_with_the_pooled_noise():
    """By hand: variances 1, 1 and 4 of three values each pool to 2, with 6 degrees of freedom; t = 2.4469."""
    found = agent.difference([2.0, 3.0, 4.0], [0.0, 1.0, 2.0], [[10.0, 12.0, 14.0]])
    half = 2.4469 * math.sqrt(2) * math.sqrt(2 / 3)
    assert found.mean == 2.0 and found.pooled == pytest.approx((2 - half, 2 + half), abs=1e-3)
    assert found.welch[0] < 2 < found.welch[1]


# --- check and ablate


def noisy(checkout, noise: float) -> None:
    """Gives the checkout's baseline this much noise from seed to seed."""
    train = checkout.folder / "train.py"
    train.write_text(train.read_text().replace("        width=64,", f"        width=64,\n        noise={noise},"))


def test_check_tells_a_gain_from_none(checkout, night):
    noisy(checkout, 0.002)
    night([better(0.36)], "--no-confirm")
    output = checkout.agent("--check", "t")
    (found,) = rows_of(checkout, "check")
    truth = math.log(4) ** 2 - math.log(3.6) ** 2
    assert found["pooled"][0] < truth < found["pooled"][1] and found["pooled"][0] > 0
    assert "better than the baseline" in output and "Welch" in output and len(found["baseline"]) == 5
    assert f"baseline on seed 101, run 1 of 10: test_bpb {found['baseline'][0]:.6f}" in output
    trials = [(row["name"], row["seed"]) for row in rows_of(checkout, "trial") if row["seed"] > 100]
    assert trials[:4] == [("baseline", 101), ("incumbent", 101), ("incumbent", 102), ("baseline", 102)]
    before = rows_of(checkout, "trial")
    checkout.agent("--check", "t")
    assert rows_of(checkout, "trial") == before  # none twice


def test_check_says_so_where_there_is_nothing(checkout, night):
    noisy(checkout, 0.05)
    night([better(0.398, luck=0.01)], "--no-confirm")
    assert "not distinguishable from the baseline" in checkout.agent("--check", "t", "--seeds", "3")


def test_check_goes_on_after_a_kill(checkout, night):
    noisy(checkout, 0.002)
    checkout.slow(0.1)
    night([better(0.36)], "--no-confirm")
    process = checkout.start("--check", "t")
    while len(rows_of(checkout, "trial")) < 5:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    checkout.agent("--check", "t")
    pairs = [(row["source"], row["seed"]) for row in rows_of(checkout, "trial")]
    assert len(pairs) == len(set(pairs)) and len(rows_of(checkout, "check")) == 1


def test_ablate_says_which_changes_carry_weight(checkout, night):
    noisy(checkout, 0.0005)
    heavy, light = better(0.36), ("        beta=0.8,", "        beta=0.7,\n        luck=0.00001,")
    assert [row["verdict"] for row in night([heavy, light], "--no-confirm")] == ["keep", "keep", "keep"]
    output = checkout.agent("--ablate", "t")
    (found,) = rows_of(checkout, "ablate")
    assert [row["word"] for row in found["rows"]] == ["carries weight", "cannot tell"], output


def test_where_seeds_make_no_difference_any_change_carries_weight(checkout, night):
    night([better(0.39)], "--no-confirm")
    checkout.agent("--ablate", "t")
    assert [row["word"] for row in rows_of(checkout, "ablate")[0]["rows"]] == ["carries weight"]
    assert "better than the baseline" in checkout.agent("--check", "t")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--check", "none"), "there is no night none"),
        (("--check", "t", "--seeds", "1"), "--seeds goes with --check"),
        (("--check", "t", "--ablate", "t"), "--check does not go with --ablate"),
        (("--ablate", "t", "--try", "x"), "--ablate does not go with --try"),
    ],
)
def test_check_and_ablate_refuse_what_makes_no_sense(checkout, flags, said):
    assert said in checkout.agent(*flags, expect=1 if "none" in flags else 2)


def test_nothing_kept_is_said(checkout, night):
    night([("        beta=0.8,", "        beta=0.7,")])
    for command in ("--check", "--ablate"):
        assert "kept nothing but its baseline" in checkout.agent(command, "t", expect=1)
