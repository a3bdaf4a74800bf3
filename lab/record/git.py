"""Git by plumbing: commits, refs and merges. The user's checkout, index, hooks and stash are never touched."""

import os
import re
import subprocess
import tempfile
from pathlib import Path

from constants import Problem
from lab.measure.child import running, spawning
from lab.records import Rejected

OURS = {f"GIT_{who}_{what}": value for who in ("AUTHOR", "COMMITTER")
        for what, value in (("NAME", "autoresearch"), ("EMAIL", "autoresearch@localhost"))}  # fmt: skip


class Repository:
    """The repository of the checkout in `folder`. Raises Problem if git cannot use it."""

    def __init__(self, folder: Path):
        self.folder, self.sources, self.inherited = folder, {}, []
        try:
            # A hook or an IDE may have named another repository in them.
            self.inherited = self.git("rev-parse", "--local-env-vars").split()
            self.prefix = self.git("rev-parse", "--show-prefix")
            self.common_dir = folder / self.git("rev-parse", "--git-common-dir")
        except FileNotFoundError:
            raise Problem("git is not installed; run: apt-get install git") from None
        except subprocess.CalledProcessError as error:
            if b"dubious ownership" in error.stderr:
                how = f"git config --global --add safe.directory {folder}"
                raise Problem(f"{folder} belongs to another user, so git does not use it; run: {how}") from None
            if b"not a git repository" in error.stderr:
                how = "git init && git add -A && git commit -m start"
                raise Problem(f"{folder} is not a git repository; run: {how}") from None
            raise
        if self.resolve("HEAD") is None:
            raise Problem("the repository has no commit yet; run: git add -A && git commit -m start")

    def git(self, *args: str, data: bytes | None = None, whole: bool = False, **environment: str) -> str:
        """What git prints, less the last newline unless `whole`. In a session of its own: Ctrl-C on the terminal is not for it."""
        command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", *args]
        own = {name: value for name, value in os.environ.items() if name not in self.inherited}
        with spawning:
            process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                env={**own, "GIT_OPTIONAL_LOCKS": "0", **environment}, start_new_session=True,
            )  # fmt: skip
            running.add(process.pid)
        try:
            output, errors = process.communicate(data or b"")
        finally:
            running.discard(process.pid)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, output, errors)
        return output.decode() if whole else output.decode().removesuffix("\n")

    def resolve(self, name: str) -> str | None:
        """The commit of a ref or revision; None if there is none."""
        try:
            return self.git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}")
        except subprocess.CalledProcessError:
            return None

    def source(self, commit: str) -> str:
        """train.py of a commit, to the last byte. Read once: commits do not change."""
        if commit not in self.sources:
            self.sources[commit] = self.git("cat-file", "blob", f"{commit}:{self.prefix}train.py", whole=True)
        return self.sources[commit]

    def commit(self, parent: str, files: dict[str, str], message: str) -> str:
        """A commit on `parent` with these files replaced. It is an object only: no ref moves."""
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": str(Path(folder) / "index")}
            self.git("read-tree", parent, **index)
            for name, text in files.items():
                blob = self.git("hash-object", "-w", "--no-filters", "--stdin", data=text.encode())
                self.git("update-index", "--add", "--cacheinfo", f"100644,{blob},{self.prefix}{name}", **index)
            tree = self.git("write-tree", **index)
        return self.git("commit-tree", tree, "-p", parent, "-F", "-", data=message.encode(errors="replace"), **OURS)

    def move(self, ref: str, new: str, old: str | None) -> None:
        """Moves a ref by compare-and-swap; old None means that it must not exist yet. Raises Problem."""
        try:
            self.git("update-ref", ref, new, old or "0" * len(new))
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip()
            how = f"run: git update-ref {ref} {new}, or start another night with --tag NEW"
            raise Problem(f"{ref} is not where this night left it ({reason}); {how}") from None

    def refs(self, tag: str) -> dict[str, str]:
        """The commits of a night's branch and experiments, by the refs' full names."""
        branch = f"refs/heads/autoresearch/{tag}"
        lines = self.git("for-each-ref", "--format=%(refname) %(objectname)", branch, f"refs/autoresearch/{tag}/")
        refs = dict(line.split() for line in lines.splitlines())
        return {name: commit for name, commit in refs.items() if not name.startswith(f"{branch}/")}

    def refuse_blocked(self, *refs: str) -> None:
        """Raises Problem if one of the refs could not be created: autoresearch/TAG cannot stand beside a branch `autoresearch`."""
        lines = ["start", *(f"create {ref} {self.resolve('HEAD')}" for ref in refs), "prepare", "abort", ""]
        try:
            self.git("update-ref", "--stdin", data="\n".join(lines).encode())
        except subprocess.CalledProcessError as error:
            reason = error.stderr.decode(errors="replace").strip().removeprefix("fatal: prepare: ")
            blocked = re.search("Read-only|Permission denied|No space", reason)
            how = (
                f"see that you may write to {self.common_dir}"
                if blocked
                else "rename what is in the way: git branch -m OLD NEW"
            )
            raise Problem(f"git cannot make this night's refs ({reason}); {how}") from None

    def refuse_checked_out(self, branch: str) -> None:
        """Raises Problem if a checkout is on the night's branch: moving it would dirty that checkout."""
        if f"branch {branch}\n" in self.git("worktree", "list", "--porcelain") + "\n":
            raise Problem(f"{branch.removeprefix('refs/heads/')} is checked out somewhere; run there: git switch -")

    def merge(self, base: str, ours: str, theirs: str) -> str:
        """`ours` with the change that leads from `base` to `theirs`. Raises Rejected if both changed the same line.

        A separator line stands between all lines while git merges, so that changes of neighbouring lines do not conflict.
        """
        with tempfile.TemporaryDirectory() as folder:
            names = [str(Path(folder) / name) for name in ("ours", "base", "theirs")]
            for name, text in zip(names, (ours, base, theirs), strict=True):
                Path(name).write_text("".join(f"{line}\n\x1f\n" for line in text.split("\n")))
            try:
                merged = self.git("merge-file", "-p", "-q", *names) + "\n"
            except subprocess.CalledProcessError:
                raise Rejected("the incumbent has changed since, in the same lines of train.py") from None
        return "\n".join(line for line in merged.split("\n")[:-1] if line != "\x1f")
