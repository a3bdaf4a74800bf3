"""Run a night of experiments: an LLM edits train.py, each edit trains for five minutes, improvements are kept.

    python agent.py                        Claude does the research; needs ANTHROPIC_API_KEY
    python agent.py --demo                 four short experiments on the CPU, no key needed: shows the loop
    python agent.py --command 'claude -p'  any program does: the prompt on its stdin, the reply on its stdout
    python agent.py --proposer tune        a numeric search over the numbers of train.py, without a model
    python agent.py --try "wider MLP"      your own train.py as one experiment
    python agent.py --check nov23          what that night gained, on fresh seeds, with an interval
    python agent.py --ablate nov23         which of its kept changes carry weight

runs/TAG/ has the record, the branch autoresearch/TAG the winner. Your checkout never changes. Ctrl-C stops; the same command goes
on where it stopped. ANTHROPIC_BASE_URL names another server that speaks Anthropic's Messages API, AUTORESEARCH_CACHE the folder of
the data. program.md holds the instructions that Claude gets.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also where PYTHONSAFEPATH is set

import constants
from constants import CONFIRM_SEED, SEED, Problem, locked
from lab.arguments import choose_tag, parse_arguments, restore_arguments, restore_fixed, restore_setting
from lab.check import CHECK_SEEDS, ablate, check, rehearsal
from lab.measure import cache
from lab.measure.child import end_processes, guard_this_process, interrupts
from lab.measure.files import remove
from lab.measure.sandbox import choose_sandbox, inherited_names
from lab.measure.text import rows_of_the_night
from lab.propose.ahead import Proposals, Try
from lab.propose.claude import MODEL, Claude, credentials_of, take_secrets
from lab.propose.command import Command
from lab.propose.hyperparameters import numbers_alone
from lab.propose.model import Researcher
from lab.propose.replay import Replay, proposals_to_replay, rows_to_replay
from lab.propose.screen import fingerprint, screen
from lab.record.git import Repository
from lab.record.journal import night_runs, read_journal, seconds_of, seconds_of_earlier_starts
from lab.record.night import CRASHING_AFTER, Night, measure, only_crashes, read_checkout
from lab.record.start import journal_start, open_night, renew_demo
from lab.records import RUN_AGAIN, OutOfTime, Proposal, Rejected, Result, Run, Verdict, clean, log_tail, trouble
from lab.view import View, print_summary

HERE = Path(__file__).resolve().parent
RUNS = Path(os.path.realpath(HERE / "runs"))
TEST_ALARM = 0.01  # bpb, or x incumbent if more: a gain on val that exceeds the gain on test by this is not believed
UNEVEN = 0.1  # share of tokens by which two runs of the baseline may differ; more, and it is measured again
MAX_CRASHES = 2 * CRASHING_AFTER  # crashes in a row before the night stops


# ---------------------------------------------------------------------------
# Judge


def judge(run: Run, incumbent: Run | None, baseline: Run | None, budget_s: float) -> Verdict:
    """Keep what lowers val_bpb, unless the number cannot be trusted. Pure. The baseline has no incumbent."""
    if run.crash or run.val_bpb is None:
        return Verdict("crash", run.crash or "no number")
    if reason := trouble(run, baseline, budget_s):
        return Verdict("invalid", reason)
    if incumbent is None:
        return Verdict("keep", "baseline")
    gain = incumbent.val_bpb - run.val_bpb
    if not gain > 0:
        return Verdict("discard")
    if run.test_bpb is not None and incumbent.test_bpb is not None:
        on_test = incumbent.test_bpb - run.test_bpb
        if gain - on_test > TEST_ALARM * max(1.0, incumbent.val_bpb):
            return Verdict("invalid", f"gained {gain:.4f} on val and {on_test:.4f} on test")
    return Verdict("keep")


def second_look(challenger: Run, incumbent: Run, why_not) -> Verdict:
    """A win has to be lower on the second seed too: no selection has flattered that comparison. Pure.

    why_not(run): why its number does not count; empty if it does.
    """
    if why := why_not(challenger):
        return Verdict("discard", f"not confirmed: on the second seed {why}")
    if why_not(incumbent):
        return Verdict("keep", "the incumbent has no number on the second seed: the first comparison decides")
    pair = f"on the second seed {challenger.val_bpb:.6f} against {incumbent.val_bpb:.6f}"
    if challenger.val_bpb < incumbent.val_bpb:
        return Verdict("keep", f"lower {pair} too")
    return Verdict("discard", f"not confirmed: {pair}")


# ---------------------------------------------------------------------------
# One experiment


def experiment(night: Night, proposal: Proposal):
    """Train, score and judge one proposal: yields what to measure (source, seed, title, fresh), gets the Run; returns the Result.

    The incumbent is that of the moment in which a run arrives: with several workers another may have won meanwhile.
    """
    source, program = proposal.source, fingerprint(proposal.source)
    night.tried.setdefault(program, f"an experiment that runs now: {proposal.description}")
    run = yield source, SEED, proposal.description, False
    while True:
        best, second = night.incumbent, None
        verdict = judge(run, best and best.run, night.baseline_run, night.settings.budget_s)
        if verdict.word != "keep" or not best or not night.confirm:
            break
        fresh = night.settings.profile.name == "cpu"  # whose pace drifts: a stored run may be of a faster hour
        why = f"{run.number} is lower than {best.run.number}, so"
        challenger = yield source, CONFIRM_SEED, f"{why} on the second seed: {proposal.description}", fresh
        incumbent = yield night.source(best), CONFIRM_SEED, f"{why} the incumbent on the second seed", fresh
        verdict = second_look(challenger, incumbent, night.trouble)
        second = (challenger.val_bpb, incumbent.val_bpb)
        if verdict.word != "keep" or night.incumbent is best:
            break
    return Result(
        len(night.results), proposal.parent if best else None, best.number if best else None, proposal.id, proposal.description,
        proposal.hypothesis, proposal.operator, proposal.mends, verdict, run, second, commit="", fingerprint=program,
    )  # fmt: skip


def noise(night: Night):
    """The baseline on the second seed, as experiment(): a scale for what comes; returns None."""
    second = yield night.baseline.source, CONFIRM_SEED, "the baseline on the second seed, to know the noise", False
    first = night.results[0].run if night.results else None
    tokens = [run.metrics.get("total_tokens_M") for run in (first, second) if run]
    if len(tokens) == 2 and all(tokens) and abs(tokens[1] / tokens[0] - 1) > UNEVEN:
        night.say(
            f"the baseline's two runs read {tokens[0]:.2f} and {tokens[1]:.2f} million tokens: was the machine busy? It is run once more"
        )
        yield night.baseline.source, CONFIRM_SEED, "the baseline on the second seed, once more", True


class Alone:
    """The crew of one: this process measures. lab/fleet.py has another."""

    def __init__(self, measure):
        self.measure, self.work = measure, []

    @property
    def free(self) -> int:
        """How many experiments may begin at once."""
        return 1 - len(self.work)

    @property
    def running(self) -> list[Proposal]:
        return [proposal for proposal, _ in self.work if proposal]

    def start(self, proposal: Proposal | None, steps) -> None:
        self.work.append((proposal, steps))

    def wait(self):
        """Yields (proposal, what its generator returns) of each that has ended."""
        run = None
        while self.work:
            proposal, steps = self.work[0]
            try:
                run = self.measure(*steps.send(run))
            except StopIteration as end:
                self.work.clear()
                yield proposal, end.value


# ---------------------------------------------------------------------------
# The night


@dataclass
class Limits:
    """When a night ends of itself."""

    experiments: int | None  # after so many, the baseline not counted
    hours: float | None  # of all its starts
    began: float  # this start, by perf_counter, less what earlier ones took
    workers: int = 1

    def mean_s(self, night: Night) -> float:
        """Seconds of an experiment, with its second seed."""
        if not night.results:
            return night.settings.budget_s
        return seconds_of(night_runs(list(night.journal.rows))) / len(night.results)

    def left_s(self) -> float:
        return math.inf if self.hours is None else 3600 * self.hours - (time.perf_counter() - self.began)

    def out_of_time(self, night: Night) -> bool:
        return self.left_s() < self.mean_s(night)

    def reached(self, night: Night, running: int = 0) -> str:
        """Why no other experiment may start; empty if one may. running: how many are under way."""
        done = len(night.results) + running - 1
        if self.experiments is not None and done >= self.experiments:
            return (
                f"all {self.experiments} experiments are done" if self.experiments > 1 else "the one experiment is done"
            )
        return f"{self.hours:g} hours are used up" if done >= 0 and self.out_of_time(night) else ""

    def larger(self, night: Night) -> str | None:
        """The flag that has the night go on, if it ended by one of these limits; else None."""
        if self.experiments is not None and len(night.results) > self.experiments:
            return f"--experiments {2 * self.experiments}"
        return f"--hours {2 * self.hours:g}" if self.out_of_time(night) else None

    def about_left(self, night: Night) -> int | None:
        """How many experiments may still begin, about; None without a limit."""
        done = len(night.results)
        left = [] if self.experiments is None else [self.experiments + 1 - done]
        left += [] if self.hours is None else [self.workers * int(self.left_s() / self.mean_s(night))]
        return min(left, default=None)

    def room_for_another(self, night: Night, running: int) -> bool:
        """Whether one more experiment may follow those that run."""
        enough = self.experiments is not None and len(night.results) + running > self.experiments
        return not enough and self.left_s() > 2 * self.mean_s(night)


def run_night(night: Night, proposer, limits: Limits, crew, view, second_seed: bool = True) -> str:
    """Run experiments until a limit is reached; returns the reason. Raises Problem if the night cannot go on.

    second_seed: whether the baseline is measured on it as well, so that a reader knows how large the noise is. Workers without
    other work do so beside the baseline, which otherwise would have the machine to itself, unlike all that it is compared with.
    """
    proposals, night.out_of_time = Proposals(night, proposer), lambda: limits.out_of_time(night)
    night.left_s, night.about_left = limits.left_s, lambda: limits.about_left(night)
    noise_known = bool(night.noise_text)
    refuse_failed_baseline(night)
    try:
        while True:
            reason = limits.reached(night, len(crew.running))
            if second_seed and crew.free and not reason and (night.results or crew.running):
                second_seed, at_once = False, 1 if night.results else crew.free
                for _ in range(at_once if night.baseline_second is None else 0):
                    crew.start(None, noise(night))
            proposal = proposals.take(crew.running) if crew.free and not reason else None
            if proposal:
                crew.start(proposal, experiment(night, proposal))
                if limits.room_for_another(night, len(crew.running)):
                    proposals.ahead(crew.running)
            elif not crew.work:
                if reason or proposals.exhausted:
                    return reason or proposer.exhausted
                proposals.pause(night.out_of_time)
            for proposal, result in crew.wait():
                if proposal:
                    view.finished(night.record(result, proposal.source))
                if not noise_known and night.noise_text:
                    noise_known = True
                    view.say(f"{'':6}{night.noise_text}")
                refuse_failed_baseline(night)
                refuse_crashes_in_a_row(night)
                if proposer.name == "try" and proposal and result.number:
                    return proposer.exhausted
    except OutOfTime as wait:
        return f"{limits.hours:g} hours are used up, the last of them {wait}"


def refuse_failed_baseline(night: Night) -> None:
    """Raises Problem, and ends the night, if its baseline has no number that counts."""
    if not night.results or night.results[0].verdict.word == "keep":
        return
    reason = f"the baseline failed: {night.results[0].verdict.reason}"
    night.journal.append("end", reason=reason)
    log = "\n".join(log_tail(night.run_folder(0) / "run.log")[-15:])
    raise Problem(f"{reason}\n{log}\nmend train.py, then run the same command with --tag NEW")


def refuse_crashes_in_a_row(night: Night) -> None:
    """Raises Problem if nothing but crashes came of late."""
    if only_crashes(night.results, MAX_CRASHES):
        raise Problem(
            f"{MAX_CRASHES} experiments crashed in a row; read {night.folder}/results.tsv and the last run.log"
        )


# ---------------------------------------------------------------------------
# The command


def make_proposer(night: Night, args, secrets: dict, replayed):
    """Who proposes. Raises Problem if that cannot work, for Claude by asking the API."""
    if args.describe:
        return Try(args.describe, args.because or "", read_checkout(HERE, "train.py"))
    if replayed:
        return Replay(night, replayed)
    if args.command:
        return Command(night, HERE, args.command, secrets)
    if args.proposer == "claude":
        return Claude(night, HERE, credentials_of(secrets), args.model or MODEL, args.max_usd, args.price)
    from lab.propose.tune import Tune  # brings numpy, which no other start needs

    return Tune(night.tag, night.settings.profile.sizes)


def at_work(night: Night, args, proposer, fleet) -> tuple[str, str | None]:
    """What the command asks for, with the device locked; returns why it ended, and the flag with which a night goes on."""
    shown = night.keeps[-1:] if args.describe else night.results if proposer else []
    with View(night, proposer, shown, args.workers if fleet else 0) as view:
        night.say = view.say
        measured = partial(measure, night, view.lanes[0])
        if args.check or args.ablate:
            why = (
                check(night, args.seeds or CHECK_SEEDS, measured, view.say)
                if args.check
                else ablate(night, measured, view.say)
            )
            cache.clear(night.folder)
            return why, None
        earlier_s = seconds_of_earlier_starts(night.journal.rows)
        experiments, hours = (None, None) if args.describe else (args.experiments, args.hours)
        limits = Limits(experiments, hours, time.perf_counter() - earlier_s, args.workers if fleet else 1)
        second_seed = not args.demo and (not args.describe or bool(args.confirm))
        crew = fleet.shown_by(view) if fleet else Alone(measured)
        return run_night(night, proposer, limits, crew, view, second_seed), limits.larger(night)


def start_fleet(args, folder: Path, locks: contextlib.ExitStack):
    """The workers that --workers asks for, which end with the locks; None if this process measures."""
    if not args.workers or args.workers == 1:
        return None
    from lab.fleet import Fleet

    rules = folder / "harness" / "night.json"
    stored = constants.Settings.of(rules.read_text()) if rules.is_file() else None
    fleet = Fleet(args.workers, args.profile, folder.name, stored)
    locks.callback(fleet.close)
    return fleet


def take_device(night: Night, args, locks: contextlib.ExitStack) -> None:
    """The device's lock, the training rows and the sandbox of a night that this process measures."""
    device = f"the device {night.settings.device_name}"
    locks.enter_context(locked(constants.device_lock(night.device_id), device, f"agent.py, tag {night.tag}"))
    locks.enter_context(rows_of_the_night(night))
    night.sandbox = choose_sandbox(night, *sandbox_of(night, args))


def sandbox_of(night: Night, args) -> tuple:
    """The arguments of choose_sandbox(): what it hides, and who goes without."""
    return HERE, RUNS, night.repository.common_dir, args.no_sandbox, numbers_alone(night, args)


def start_and_work(args, secrets: dict) -> None:
    """Open the night that the arguments mean, under its locks; do what they ask for; print the summary. Raises Problem."""
    repository, tag = Repository(HERE), choose_tag(args, RUNS)
    folder, new = RUNS / tag, not (RUNS / tag).exists()
    if not args.demo:
        rows = read_journal(folder / "journal.jsonl")[0]
        restore_arguments(args, rows, bool(credentials_of(secrets)))
        restore_fixed(args, folder / "harness" / "night.json")  # also before the baseline has its result
    replayed = []
    if args.replay:
        rows = rows_to_replay(RUNS, args.replay)
        replayed = proposals_to_replay(rows, bool(args.kept))
        if new:
            restore_setting(args, rows, ("profile", "dataset", "budget"))
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked(folder / "lock", f"night {tag}", f"agent.py, tag {tag}"))
        if args.demo:
            renew_demo(HERE, folder, args, repository)
        try:
            if pids := end_processes(str(folder)):
                print(f"ended what an earlier start had left running: pid {', '.join(map(str, pids))}")
            fleet = start_fleet(args, folder, locks)
            check_new = partial(screen, tried={})
            night = open_night(HERE, folder, args, repository, fleet and fleet.ask, check_new)
            if fleet:
                fleet.open(night, *sandbox_of(night, args))
            else:
                take_device(night, args, locks)
            proposer = None if args.check or args.ablate else make_proposer(night, args, secrets, replayed)
            journal_start(night, args, inherited_names())
        except BaseException:
            if new:  # no later command is to take up a night that never began
                remove(folder)
            raise
        try:
            why, more = at_work(night, args, proposer, fleet)
            if proposer and not args.describe:
                night.journal.append("end", reason=why)
        except KeyboardInterrupt:
            why, more = "interrupted; the same command goes on", ""
        finally:
            if isinstance(proposer, Researcher):
                proposer.stopped = True
            if fleet:
                fleet.close()
            end_processes(str(folder))  # a researcher that is still thinking
    if proposer:
        print_summary(night, why, proposer, None if args.demo or args.describe else more)
    else:
        print(f"\n{why}.")


def main() -> None:
    args = parse_arguments(__doc__)
    guard_this_process()
    sys.stdout.reconfigure(errors="replace")  # the name of a file may be no UTF-8
    secrets = take_secrets()
    os.environ.pop("PYTHONSAFEPATH", None)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi and torch number the cards alike
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupts)
    try:
        if args.dry:
            rows = read_journal(RUNS / (args.tag or "try") / "journal.jsonl")[0]
            restore_setting(args, rows, ("profile", "dataset", "no_sandbox"))
            rehearsal(HERE, RUNS, args)
        else:
            start_and_work(args, secrets)
    except (Problem, Rejected) as problem:
        sys.exit(f"error: {problem}")
    except OSError as error:
        sys.exit(f"error: {constants.file_trouble(error, f'free space, {RUN_AGAIN}')}")
    except subprocess.CalledProcessError as error:
        message = clean(error.stderr or b"").strip().replace("\n", "; ")
        sys.exit(f"error: {' '.join(map(str, error.cmd))} failed: {message}; mend that, {RUN_AGAIN}")
    except KeyboardInterrupt:
        print("interrupted")


if __name__ == "__main__":
    main()
