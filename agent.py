"""Run a night of experiments: an LLM edits train.py, each edit trains for five minutes, improvements are kept.

    python agent.py --demo                   show the loop in under three minutes, on the CPU, without a key
    python agent.py --hours 9 --max-usd 40   a night with Claude; needs ANTHROPIC_API_KEY
    python agent.py --command 'claude -p'    a night with any program that reads a prompt and prints a reply
    python agent.py --proposer tune          a night without a model: a search over the numbers of train.py
    python agent.py --workers 8              eight experiments at once, on eight cards, with Ray
    python agent.py --tag nov23              go on with an earlier night
    python agent.py --replay nov23 --kept    run the kept changes of an earlier night again
    python agent.py --try "wider MLP"        run train.py as you edited it, as one experiment
    python agent.py --check nov23            measure what a night gained, on fresh seeds
    python agent.py --ablate nov23           find out which of its kept changes matter

The record of a night is in runs/TAG/, its winner is the branch autoresearch/TAG; your checkout does not change. Ctrl-C stops a night,
the same command goes on. program.md holds the instructions that a model gets. README.md lists the environment variables.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # also where PYTHONSAFEPATH is set

import constants
from constants import CONFIRM_SEED, SEED, Problem, counted, locked
from lab.arguments import complete, parse_arguments, restore
from lab.check import CHECK_SEEDS, ablate, check, rehearsal
from lab.measure.child import end_processes
from lab.measure.files import remove
from lab.measure.run import clear_caches, rows_of_the_night
from lab.measure.sandbox import choose_sandbox, inherited_names
from lab.propose.ahead import Proposals, Try, rebased
from lab.propose.claude import MODEL, Claude, credentials_of, take_secrets
from lab.propose.command import Command
from lab.propose.replay import Replay
from lab.propose.screen import screen
from lab.propose.tune import Tune, numbers_alone
from lab.record.git import Repository
from lab.record.journal import seconds_of_earlier_starts
from lab.record.night import Night, make_run_here, measure, read_checkout
from lab.record.start import journal_start, open_night, renew_demo, stored_settings
from lab.records import (
    RUN_AGAIN,
    OutOfTime,
    Proposal,
    Rejected,
    Result,
    Run,
    Stopped,
    Verdict,
    clean,
    run_trouble,
    uneven,
)
from lab.view import View, print_summary

HERE = Path(__file__).resolve().parent
RUNS = Path(os.path.realpath(HERE / "runs"))
TEST_ALARM = 0.01  # bpb, or x incumbent if more: a gain on val that exceeds the gain on test by this is not believed
MAX_CRASHES = 20  # crashes in a row before the night stops


# ---------------------------------------------------------------------------
# Ctrl-C, SIGTERM and a closed terminal end a night in order

ended = threading.Event()  # the night's `stop`: what runs is ended, and threads raise Stopped


def interrupt(number, frame) -> None:
    """The handler of these signals. An exception alone would not do: Python drops one that is raised in a finalizer."""
    if not ended.is_set():
        ended.set()
        raise KeyboardInterrupt


# ---------------------------------------------------------------------------
# Judge


def judge(run: Run, incumbent: Run | None, baseline: Run | None, budget_s: float) -> Verdict:
    """Keep what lowers val_bpb, unless the number cannot be trusted. Pure. The baseline has no incumbent."""
    if run.crash or run.val_bpb is None:
        return Verdict("crash", run.crash or "no number")
    if reason := run_trouble(run, baseline, budget_s):
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


def experiment(night: Night, proposal: Proposal, measure) -> Result:
    """Measure one proposal, judge it, record it. Runs in a thread; measure(source, seed, title, fresh=False) -> Run blocks.

    What the journal has a run of is not measured again, unless `fresh`. With several workers another experiment may be kept
    meanwhile: then this one is put on top of it, and measured once more.
    """
    while True:
        parent = night.parent_of(proposal)  # what it was made on; None for the baseline
        run, second = measure(proposal.source, SEED, proposal.description), None
        verdict = judge(run, parent and parent.run, night.baseline_run, night.settings.budget_s)
        # A win over what is no longer the incumbent is measured again below: it needs no second look yet.
        if verdict.word == "keep" and parent and parent is night.incumbent and night.confirm:
            fresh = night.settings.profile.name == "cpu"  # a CPU's pace drifts: a stored run may be of a faster hour
            why = f"{run.number} is lower than {parent.run.number}, so"
            second = (
                measure(proposal.source, CONFIRM_SEED, f"{why} on the second seed: {proposal.description}", fresh),
                measure(night.source(parent.number), CONFIRM_SEED, f"{why} the incumbent on the second seed", fresh),
            )
            verdict = second_look(*second, night.run_trouble)
        with night.deciding:  # one verdict after the other
            if verdict.word != "keep" or night.incumbent is parent:
                return night.record(proposal, run, verdict, second)
            try:  # another experiment was kept meanwhile: this change on top of it, round again
                proposal = rebased(night, proposal, len(night.results))
            except Rejected as refused:
                late = f"lower than experiment {parent.number}, on which it was made, but {night.incumbent.number} was kept meanwhile: {refused}"
                return night.record(proposal, run, Verdict("discard", late), second)


def begin_noise(pool, night: Night, measure, count: int) -> list:
    """Futures of the baseline on the second seed, `count` times; the first of them says how large the noise is.

    Beside the baseline every worker runs it: a baseline that has the machine to itself is faster than what it is compared with.
    """
    again = partial(measure, night.baseline.source, CONFIRM_SEED, "the baseline on the second seed")
    return [pool.submit(measure_noise, night, measure), *(pool.submit(again) for _ in range(count - 1))]


def measure_noise(night: Night, measure) -> None:
    """The baseline on the second seed, compared with its own run as soon as that is there: a scale for what comes."""
    second = measure(night.baseline.source, CONFIRM_SEED, "the baseline on the second seed, to know the noise")
    while not night.results:
        if night.stop.wait(0.1):
            raise Stopped
    if uneven(second, night.results[0].run):
        tokens = [run.metrics["total_tokens_M"] for run in (night.results[0].run, second)]
        pair = f"{tokens[0]:.2f} and {tokens[1]:.2f} million tokens"
        night.say(f"the baseline's two runs read {pair}: was the machine busy? It is run once more")
        measure(night.baseline.source, CONFIRM_SEED, "the baseline on the second seed, once more", True)
    if night.noise_text:
        night.say(night.noise_text)


# ---------------------------------------------------------------------------
# The night


@dataclass
class Limits:
    """When a night ends of itself."""

    experiments: int | None  # after so many, the baseline not counted
    hours: float | None  # of all its starts
    end: float = math.inf  # by perf_counter: when they are used up
    workers: int = 1
    reason: str = ""  # why no other experiment may begin

    def left(self, night: Night, running: list[Proposal]) -> int | None:
        """How many more experiments may begin, about, while these run: 0 for none, None without a limit. Sets `reason`, night.until."""
        begun, count = night.begun(running), len(night.results)
        runs = [run for result in night.results for run in (result.run, *(result.second or ()))]
        mean_s = sum(run.seconds for run in runs) / count if count else night.settings.budget_s  # of an experiment
        night.until = self.end - mean_s
        by_number = by_time = math.inf
        if self.experiments is not None:
            by_number = self.experiments + 1 - begun
        if self.hours is not None:
            by_time = self.workers * int((self.end - time.perf_counter()) / mean_s) - len(running)
        if by_number <= 0:
            self.reason = f"{counted(self.experiments, 'experiment')} done"
        elif by_time <= 0:
            self.reason = f"{self.hours:g} hours are used up"
        least = max(min(by_number, by_time), 0 if begun else 1)  # the baseline is always run
        return None if least == math.inf else least


@contextlib.contextmanager
def threads(night: Night, count: int):
    """Threads that measure. What raises in the block, Ctrl-C too, ends what they run; they are waited for."""
    with ThreadPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            night.stop.set()
            raise


def wait_for_one(futures, patient: bool) -> None:
    """Waits until one is done, or a moment. In slices: a signal that the system hands to another thread does not wake this one."""
    while not wait(futures, timeout=0.2, return_when=FIRST_COMPLETED).done and patient:
        pass


def run_night(night: Night, proposer, limits: Limits, measure, room, view, second_seed: bool = True) -> str:
    """Run experiments until a limit is reached; returns the reason. Raises Problem if the night cannot go on.

    room(): how many experiments may run at once. second_seed: whether the baseline is measured on it as well, so that a reader knows
    how large the noise is.
    """
    proposals = Proposals(night, proposer, partial(limits.left, night))
    running = {}  # future: its proposal; None for the baseline on the second seed
    refuse_to_go_on(night)
    second_seed = second_seed and night.baseline_second is None
    with threads(night, room()) as pool:
        while not night.stop.is_set():
            for future in [future for future in running if future.done()]:
                proposal = running.pop(future)
                try:
                    result = future.result()
                except OutOfTime as spent:
                    night.say(f"--hours ended while {spent}")
                    continue
                if proposal:
                    view.finished(result)
                refuse_to_go_on(night)
            under_way = [proposal for proposal in running.values() if proposal]
            more, free = limits.left(night, under_way) != 0, room() - len(running)
            proposal = None
            if more and free > 0:
                if second_seed and (night.results or under_way):
                    second_seed = False
                    running |= dict.fromkeys(begin_noise(pool, night, measure, 1 if night.results else free))
                    continue
                proposal = proposals.take(under_way)
            if proposal:
                running[pool.submit(experiment, night, proposal, measure)] = proposal
                proposals.ahead([*under_way, proposal])
            elif running:  # to its end if nothing can begin before, else a moment: a proposal is being made
                wait_for_one(running, patient=not more or free <= 0)
            elif not more or proposals.exhausted:
                return proposer.exhausted if more else limits.reason
            else:
                proposals.pause()  # nothing runs, and the next one is still being made
    raise Stopped


def refuse_to_go_on(night: Night) -> None:
    """Ends the night and raises Problem if the baseline has no number that counts, or the last experiments all crashed."""
    words = [result.verdict.word for result in night.results]
    if words and words[0] != "keep":
        failed, how = night.results[0], "mend train.py, then run the same command"
        reason = f"the baseline failed: {failed.verdict.reason}"
    elif words[-MAX_CRASHES:] == ["crash"] * MAX_CRASHES:
        failed, how = night.results[-1], f"read {night.folder}/results.tsv, then go on"
        reason = f"{MAX_CRASHES} experiments crashed in a row"
    else:
        return
    night.journal.append("end", reason=reason)
    raise Problem(f"{reason}\n{night.log_of(failed)}\n{how} with --tag NEW")


# ---------------------------------------------------------------------------
# The command


def make_proposer(night: Night, args, secrets: dict, replayed):
    """Who proposes. Raises Problem if that cannot work, for Claude by asking the API; Rejected for a train.py that breaks the rules."""
    if args.attempt:
        source = read_checkout(HERE, "train.py")
        screen(source, {})  # before the baseline is trained
        return Try(args.attempt, args.because or "", source)
    if replayed:
        return Replay(night, replayed)
    if args.command:
        return Command(night, HERE, args.command, secrets)
    if args.proposer == "claude":
        return Claude(night, HERE, credentials_of(secrets), args.model or MODEL, args.max_usd)
    assert args.proposer == "tune"
    return Tune()


def at_work(night: Night, args, proposer, fleet) -> str:
    """What the command asks for, with the device locked; returns why it ended."""
    # Of earlier starts: for --try the incumbent alone, for --check and --ablate nothing.
    shown = night.keeps[-1:] if args.attempt else night.results if proposer else []
    with View(night, proposer, shown, args.workers if fleet else 0) as view:
        night.say = view.note
        make_run = partial(fleet.make_run, view.lanes) if fleet else partial(make_run_here, night, view.lanes[0])
        measured = partial(measure, night, make_run)
        if args.check or args.ablate:
            with threads(night, 1) as pool:
                task = partial(check, night, args.seeds or CHECK_SEEDS) if args.check else partial(ablate, night)
                future = pool.submit(task, measured, view.say)
                wait_for_one([future], patient=True)
            clear_caches(night.folder)
            return future.result()
        left_s = math.inf if args.hours is None else 3600 * args.hours - seconds_of_earlier_starts(night.journal.rows)
        end = time.perf_counter() + left_s
        own = Limits(args.experiments, args.hours, end, args.workers or 1)
        limits = Limits(None, None) if args.attempt else own  # --try proposes once
        second_seed = not args.demo and (not args.attempt or bool(args.confirm))
        return run_night(night, proposer, limits, measured, lambda: fleet.room if fleet else 1, view, second_seed)


def start_fleet(args, folder: Path, locks: contextlib.ExitStack):
    """The workers that --workers asks for, which end with the locks; None if this process measures."""
    if not args.workers or args.workers == 1:
        return None
    from lab.fleet import Fleet

    fleet = Fleet(args.workers, args.profile, folder.name, stored_settings(folder))
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
    repository = Repository(HERE)
    tag, replayed = complete(args, RUNS, key=bool(credentials_of(secrets)))
    folder, new = RUNS / tag, not (RUNS / tag).exists()
    with contextlib.ExitStack() as locks:
        locks.enter_context(locked(folder / "lock", f"night {tag}", f"agent.py, tag {tag}"))
        if args.demo:
            renew_demo(HERE, folder, args, repository)
        try:
            if pids := end_processes(str(folder)):
                print(f"ended what an earlier start had left running: pid {', '.join(map(str, pids))}")
            locks.callback(end_processes, str(folder))  # a researcher that is still thinking
            fleet = start_fleet(args, folder, locks)
            check_baseline = partial(screen, tried={})
            night = open_night(HERE, folder, args, repository, fleet and fleet.ask, check_baseline)
            night.stop = ended
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
            why = at_work(night, args, proposer, fleet)
            if proposer and not args.attempt:
                night.journal.append("end", reason=why)
        except (KeyboardInterrupt, Stopped):
            why = "interrupted; the same command goes on"
        finally:
            night.stop.set()  # a model that is still thinking is not asked again
    if proposer:
        print_summary(night, why, proposer, goes_on=not (args.demo or args.attempt))
    else:
        print(f"\n{why}.")


def main() -> None:
    args = parse_arguments(__doc__)
    constants.guard_this_process()
    sys.stdout.reconfigure(errors="replace")  # the name of a file may be no UTF-8
    secrets = take_secrets()
    os.environ.pop("PYTHONSAFEPATH", None)
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # nvidia-smi and torch number the cards alike
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as nohup asks
            signal.signal(number, interrupt)
    try:
        if args.dry:
            stored = stored_settings(RUNS / (args.tag or "try"))
            restore(args, stored.flags if stored else {})
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
