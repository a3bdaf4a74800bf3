"""The start of a night: a new one, whose rules are frozen, or one that goes on where it stopped."""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import constants
from constants import Problem, Settings, locked, sha256_of, write_atomically
from lab.measure.files import remove
from lab.measure.place import HARNESS
from lab.record.git import Repository
from lab.record.journal import FORMAT, Journal, has_ended, read_journal, spent_usd
from lab.record.night import Night, read_checkout
from lab.records import Proposal, of_row

DATA_FILES = ("val.bin", "test.bin", "tokenizer.txt")  # and the training rows
START_SHARDS = 10  # training shards that are enough to begin a night; the rest may follow


def ask_prepare(here: Path, *args: str) -> dict:
    """What the checkout's prepare.py says of machine and data. Raises Problem with its own error line."""
    done = subprocess.run(
        [sys.executable, str(here / "prepare.py"), "--machine", *args], capture_output=True, text=True
    )
    if done.returncode:
        silent = f"prepare.py ended with status {done.returncode}; run: python prepare.py --machine"
        raise Problem((done.stderr.strip() or silent).split("\n")[-1].removeprefix("error: "))
    for line in done.stderr.splitlines():
        if line.startswith("note: "):
            print(line)
    return json.loads(done.stdout)


def survey(here: Path, *flags: str) -> dict:
    """What a new night notes of machine and data, hashes included; the data are prepared if they are missing. Raises Problem."""
    host = ask_prepare(here, *flags)  # first: it says if there is no GPU
    if host["train_file"] is None:
        command = ["prepare.py", "--profile", host["profile"], "--dataset", host["dataset"]]
        if host["dataset"] == "climbmix" and host["profile"] == "gpu":
            command += ["--num-shards", str(START_SHARDS)]
        if subprocess.run([sys.executable, *command], cwd=here).returncode:
            raise Problem(f"the data could not be prepared; run: python {' '.join(command)}")
        host = ask_prepare(here, *flags)
    data, rows = Path(host["data"]), host["train_file"]
    hashes = {name: sha256_of(data / name) for name in (rows, *DATA_FILES)}
    return host | {"data_sha256": hashes, "train_rows": constants.row_count(data / rows, host["profile"])}


def create_night(here: Path, folder: Path, args, repository: Repository, ask=None) -> tuple[Settings, str]:
    """Decides everything once, freezes the harness and writes night.json; returns the settings and the device's id.

    ask: what answers for the machine, hashes included, if another one trains.
    """
    tag = folder.name
    if repository.refs(tag):
        names = f"refs/heads/autoresearch/{tag} refs/autoresearch/{tag}"
        how = f"git for-each-ref --format='delete %(refname)' {names} | git update-ref --stdin"
        raise Problem(
            f"there are refs of a night {tag} but no journal in {folder}; use --tag OTHER, or delete them: {how}"
        )
    repository.refuse_blocked(f"refs/heads/autoresearch/{tag}", f"refs/autoresearch/{tag}/0000")
    flags = [word for name in ("profile", "dataset") if (value := getattr(args, name)) for word in (f"--{name}", value)]
    host = (ask or survey)(here, *flags)
    budget_s, harness = args.budget or constants.TIME_BUDGET_S, folder / "harness"
    remove(harness)  # of a start that ended before its baseline
    harness.mkdir(parents=True)
    for name, place in HARNESS.items():
        shutil.copyfile(here / place, harness / name)
        (harness / name).chmod(0o444)
    device_id, profile = (host.pop(key) for key in ("device_id", "profile"))
    hashes = {name: sha256_of(harness / name) for name in HARNESS}
    head = repository.resolve("HEAD")
    every = 1 if budget_s >= constants.COMPILE_FROM_S else constants.SHORT_SCORING
    settings = Settings.made(host, profile, budget_s, tag=tag, head=head, harness_sha256=hashes, score_every=every)
    write_atomically(harness / "night.json", settings.json())
    (harness / "night.json").chmod(0o444)
    return settings, device_id


def stored_settings(folder: Path) -> Settings | None:
    """Those of a night that was begun; None if there are none that can be read, which resume_night() will say."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Settings.of((folder / "harness" / "night.json").read_text())
    return None


def resume_night(here: Path, folder: Path, args, journal: Journal, ask=None) -> tuple[Settings, str]:
    """The settings of a night that goes on, and the device's id. Raises Problem if anything that it fixed is different now."""
    rules, another = folder / "harness" / "night.json", "start another night with --tag NEW"
    if not rules.is_file():
        raise Problem(f"{rules} is gone; restore it, or {another}")
    if sha256_of(rules) != journal.of("night")[-1]["harness"]["night.json"]:
        raise Problem(f"{rules} changed since the night's last start; undo that, or {another}")
    settings = Settings.of(rules.read_text())
    for flag, value in settings.flags.items():
        given = getattr(args, flag)
        if given not in (None, value):
            shown = [f"{v:g}" if flag == "budget" else v for v in (value, given)]
            raise Problem(f"night {settings.tag} has --{flag} {shown[0]}, not {shown[1]}; {another}")
    for name, place in HARNESS.items():
        if sha256_of(here / place) != settings.harness_sha256[name]:
            how = f"git checkout autoresearch/{settings.tag} -- {place}"
            raise Problem(f"{place} differs from the one night {settings.tag} began with; run: {how}, or {another}")
    host = (ask or ask_prepare)(here, "--profile", settings.profile.name, "--dataset", settings.dataset)
    if other := difference(host, settings):
        raise Problem(f"night {settings.tag} ran with {other}; {another}")
    return settings, host["device_id"]


def difference(host: dict, settings: Settings) -> str:
    """In what a machine is not like the one that began the night; empty if it is."""
    names = ("device_name", "torch", "flash_attention", "capability")
    pairs = [(name, getattr(settings, name), host[name]) for name in names]
    pairs.append(("sizes", settings.profile.sizes, host["sizes"]))
    if settings.device == "cpu":  # more than the night's do no harm
        pairs.append(("threads", settings.threads, min(settings.threads, host["threads"])))
    return next((f"{name} {old}, here it is {new}" for name, old, new in pairs if old != new), "")


def open_night(here: Path, folder: Path, args, repository: Repository, ask=None, check=lambda source: None) -> Night:
    """Creates the night or takes it up again. Raises Problem if it cannot.

    Until the baseline has its result, another train.py, other rules or other flags begin the night anew, unless a model was paid.
    ask: see create_night(). check(source) may refuse a new baseline, before anything is made or given up.
    """
    journal, checkout = Journal(folder / "journal.jsonl"), read_checkout(here, "train.py")
    if journal.of("result"):
        baseline, opened = of_row(Proposal, journal.of("proposal")[0]), resume_night(here, folder, args, journal, ask)
    else:
        source = repository.source(repository.resolve("HEAD")) if args.attempt else checkout
        if args.attempt and source == checkout:
            raise Problem(
                "train.py is as it was committed; edit it, then run the same command: the committed one is the baseline"
            )
        check(source)
        baseline, opened, changed = Proposal("baseline", "", source), None, "train.py has changed"
        if journal.of("proposal") and journal.of("proposal")[0]["source"] == source:
            try:
                opened = resume_night(here, folder, args, journal, ask)
            except Problem as problem:
                changed = str(problem)
        if opened is None and spent_usd(journal.rows, bound=True):
            kept = f"what its model has cost would be forgotten ({changed})"
            raise Problem(
                f"night {folder.name} cannot begin anew: {kept}; undo that, or start another night with --tag NEW"
            )
        if opened is None:
            opened = create_night(here, folder, args, repository, ask)  # first: what it refuses gives up nothing
            journal.path.unlink(missing_ok=True)
            journal = Journal(journal.path)
    settings, device_id = opened
    night = Night(folder, settings, device_id, journal, repository, baseline)
    night.recover()
    night.confirm = args.confirm if args.confirm is not None else settings.profile.name == "cpu"
    return night


def journal_start(night: Night, args, environment: list[str]) -> None:
    """The `night` row of this start, and at the first one the baseline's proposal."""
    rules, arguments = night.folder / "harness" / "night.json", vars(args)
    if args.command:  # its first word alone, since the rest may hold a key
        arguments = arguments | {"command": shlex.split(args.command)[0]}
    night.journal.append(
        "night", format=FORMAT, tag=night.tag, pid=os.getpid(), device=night.settings.device_name, sandbox=night.tier,
        versions={"python": sys.version.split()[0], "torch": night.settings.torch},
        harness=night.settings.harness_sha256 | {"night.json": sha256_of(rules)}, environment=environment,
        arguments={name: value for name, value in arguments.items() if value is not None},
    )  # fmt: skip
    if not night.journal.of("proposal"):
        night.baseline = night.add_proposal(night.baseline, 0)


def renew_demo(here: Path, folder: Path, args, repository: Repository) -> None:
    """Deletes what is left of a demo that ended, or that other rules or another budget began. Its lock is held; raises Problem."""
    places = ((folder / "harness" / name, here / place) for name, place in HARNESS.items())
    stored = stored_settings(folder)
    with contextlib.suppress(OSError, Problem):
        same = stored and all(ours.read_bytes() == theirs.read_bytes() for ours, theirs in places)
        if same and stored.budget_s == args.budget and not has_ended(read_journal(folder / "journal.jsonl")[0]):
            return
    locked(constants.device_lock("cpu"), "the CPU", "agent.py --demo").close()  # a demo that cannot run deletes nothing
    refs, left = repository.refs("demo"), [path for path in folder.iterdir() if path.name != "lock"]
    for ref, commit in refs.items():
        repository.git("update-ref", "-d", ref, commit)
    for path in left:
        remove(path)
    if refs or left:
        print("the earlier demo is deleted: runs/demo and its refs")
