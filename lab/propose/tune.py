"""The numbers at the top of train.py, and the numeric search: one to five of them at once, by a model of the night's own results.

A Bayesian quadratic, diagonal, in doublings of each number, with Thompson sampling. tests/bench_search.py measures it against
Optuna's samplers and says why it is not one of them.
"""

import ast
import math
import re
from dataclasses import dataclass
from functools import lru_cache

from constants import Problem
from lab.propose.ahead import History, Proposer
from lab.record.night import Night
from lab.records import Proposal, Result, change_of, fingerprint, parsed

FIXED = re.compile(r"#\s*fixed\b", re.IGNORECASE)  # such a comment on its line takes a number out of the search
MAX_MOVED = 5  # numbers of one proposal
MAX_STEP = 0.5  # doublings by which one moves
FARTHEST = 3.0  # doublings that count of a value far from the present one
TRIALS = 300  # of the night, the last ones: a fit takes milliseconds
SCALES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # of a curvature, in bpb a squared doubling
SLOPE = 0.5  # x that: of a slope, so that the best value is expected within half a doubling
NOISES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # of one difference, in bpb
FAR = 0.01  # bpb, or x the baseline: what is worse by more counts for little more


# ---------------------------------------------------------------------------
# The numbers: which there are, another value in the place of one, what a night has tried of them


@dataclass(frozen=True)
class Number:
    """A numeric hyperparameter as it stands in a source."""

    value: int | float
    text: str
    line: int  # from 0
    begin: int  # columns
    end: int


@dataclass(frozen=True)
class Move:
    """One number that an experiment set to another value."""

    result: Result
    new: int | float
    alone: bool  # nothing else was changed


@lru_cache(4096)
def numbers_of(source: str, sizes: str) -> dict[str, Number]:
    """The numbers that serve CONFIGS[sizes], by name: plain NAME = number, tuples of them, the keywords of that entry, and the
    defaults of class Config for those that it leaves out. A zero switches something off and is none, nor is one with a comment
    `# fixed`.
    """
    plain, defaults, own = {}, {}, None
    for node in parsed(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            fields = [field for field in node.body if isinstance(field, ast.AnnAssign)]
            named = [field for field in fields if isinstance(field.target, ast.Name) and field.value is not None]
            defaults = {field.target.id: field.value for field in named}
        elif isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            for name, value in assigned(node.targets[0] if isinstance(node, ast.Assign) else node.target, node.value):
                if name == "CONFIGS" and isinstance(value, ast.Dict):
                    entries = zip(value.keys, value.values, strict=True)
                    entry = next((entry for key, entry in entries if getattr(key, "value", None) == sizes), None)
                    own = {word.arg: word.value for word in entry.keywords} if isinstance(entry, ast.Call) else None
                elif name.isupper():
                    plain[name] = value
    lines, numbers = source.split("\n"), {}
    serving = {} if own is None else defaults | own  # without an entry nobody knows which defaults count
    for name, node in (plain | serving).items():
        value = value_of(node)
        if value and node.lineno == node.end_lineno and not FIXED.search(lines[node.lineno - 1]):
            line = lines[node.lineno - 1].encode()  # columns count bytes
            begin, end = (len(line[:column].decode()) for column in (node.col_offset, node.end_col_offset))
            text = lines[node.lineno - 1][begin:end]
            numbers[name] = Number(value, text, node.lineno - 1, begin, end)
    return numbers


def assigned(target: ast.expr, value: ast.expr) -> list[tuple[str, ast.expr]]:
    """(name, value) of an assignment, also of `A, B = (1, 2), 3`, which is A[0], A[1] and B."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
        return [pair for t, v in zip(target.elts, value.elts, strict=True) for pair in assigned(t, v)]
    if not isinstance(target, ast.Name):
        return []
    if isinstance(value, ast.Tuple):
        return [(f"{target.id}[{i}]", element) for i, element in enumerate(value.elts)]
    return [(target.id, value)]


def value_of(node: ast.expr) -> int | float | None:
    """The value of a number, or of a power such as 2**16; None for all else."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float) and abs(node.value) < 1e15:
        return node.value
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        base, exponent = value_of(node.left), value_of(node.right)
        if base and exponent and abs(base) < 1_000 and abs(exponent) < 64:
            return base**exponent
    return None


def with_values(source: str, sizes: str, values: dict[str, str]) -> str:
    """The source with numbers replaced by other text."""
    lines, numbers = source.split("\n"), numbers_of(source, sizes)
    for name in sorted(values, key=lambda name: -numbers[name].begin):  # from right to left
        number = numbers[name]
        lines[number.line] = lines[number.line][: number.begin] + values[name] + lines[number.line][number.end :]
    return "\n".join(lines)


@lru_cache(4096)
def skeleton(source: str, sizes: str) -> str:
    """What two programs share that differ in nothing but these numbers."""
    return fingerprint(with_values(source, sizes, dict.fromkeys(numbers_of(source, sizes), "1")))


def moves_of(history: History) -> dict[str, list[Move]]:
    """By name: the experiments that changed a number against their incumbent, whatever else they changed."""
    sizes, moves = history.night.settings.profile.sizes, {}
    for result in history.results:
        if result.parent is not None:
            old, new = history.night.source(result.parent), history.night.source(result.number)
            before, after = numbers_of(old, sizes), numbers_of(new, sizes)
            changed = [name for name in after if name in before and after[name].value != before[name].value]
            same = skeleton(old, sizes) == skeleton(new, sizes)
            for name in changed:
                move = Move(result, after[name].value, same and len(changed) == 1)
                moves.setdefault(name, []).append(move)
    return moves


# ---------------------------------------------------------------------------
# A number as a coordinate


def coordinate(value: float, like: float) -> float:
    """Where a value lies, in doublings: of itself, or of its odds if `like`, the present value, is a fraction."""
    if isinstance(like, float) and 0 < like < 1:
        share = min(max(value, 1e-300), 1 - 1e-6)
        return math.log2(share / (1 - share))
    return math.log2(max(value, 1e-300))


def text_at(place: float, like: Number) -> str:
    """A number near a coordinate, as source text of the same kind: powers of two stay such, fractions stay fractions.

    Integers from 16 on keep the power of two that divides them, round ones from 10,000 on have two digits. Where the next whole
    number or power of two is further away, a quarter of a doubling is enough to reach it. The present value's own text if it is
    the nearest.
    """
    value = like.value
    if abs(place - coordinate(value, value)) < 1e-9:
        return like.text
    if isinstance(value, float):
        share = 0 < value < 1
        new = 1 / (1 + 2**-place) if share else 2**place
        text = repr(round(1 - float(f"{1 - new:.2g}"), 12)) if share and new > 0.5 else repr(float(f"{new:.2g}"))
        return like.text if float(text) == value else text
    move, grain = place - math.log2(value), value & -value
    step = 0 if abs(move) <= 0.25 else 1 if move > 0 else -1  # if the move itself would reach nothing
    if value >= 16 and grain == value:
        power = max(0, grain.bit_length() - 1 + (round(move) or step))
        new, text = 2**power, f"2**{power}" if "**" in like.text else str(2**power)
    else:
        if value < 16:
            grain = 1
        elif value >= 10_000 and value % 1_000 == 0:
            grain = 10 ** max(0, int(place * math.log10(2)) - 1)
        new = max(grain, grain * round(2**place / grain))
        new = max(grain, value + step * grain) if new == value else new
        text = str(new)
    return like.text if new == value else text


def numbers_alone(night: Night, args) -> bool:
    """Whether nothing but numbers of train.py was and will be changed in this night."""
    sizes = night.settings.profile.sizes
    programs = {skeleton(row["source"], sizes) for row in night.journal.of("proposal")}
    return len(programs) <= 1 and bool(args.proposer == "tune" or args.check or args.ablate)


# ---------------------------------------------------------------------------
# The search


class Tune(Proposer):
    """Proposes without a model of language. Draws depend on the tag, the experiment's number, its rejects and the history alone."""

    name = "tune"

    def propose(self, source: str, history: History, feedback: list[str]) -> Proposal | None:
        """Raises Problem if train.py has no numbers."""
        import numpy as np

        night, sizes = history.night, history.night.settings.profile.sizes
        numbers = numbers_of(source, sizes)
        if not numbers:
            raise Problem("train.py has no numbers at its top that `tune` could move; use another proposer")
        places, changes = trials(history, numbers)
        random = np.random.default_rng([*f"{night.tag}/{history.number}/{history.rejects}".encode()])
        at = np.array([coordinate(number.value, number.value) for number in numbers.values()])
        values, names = {}, list(numbers)
        moved = random.integers(1, MAX_MOVED + 1)
        for i, move in best_moves(np.clip(places - at, -FARTHEST, FARTHEST), changes, random):
            text = text_at(at[i] + move, numbers[names[i]])
            if text != numbers[names[i]].text and len(values) < moved:
                values[names[i]] = text
        if not values:  # integers that no small step reaches
            name = names[random.integers(len(names))]
            values[name] = text_at(at[names.index(name)] + random.choice((-1.0, 1.0)), numbers[name])
        description = ", ".join(f"{name} {numbers[name].text} -> {text}" for name, text in values.items())
        why = f"numeric search over {len(changes)} results of this night"
        return Proposal(description, why, with_values(source, sizes, values), "tune")


def trials(history: History, numbers: dict[str, Number]) -> tuple:
    """(coordinates (n, numbers), changes of val_bpb (n,)) of the baseline and of all that differs from its incumbent in numbers alone.

    A change is counted from the baseline, over the keeps that led to the incumbent of its time; what others than numbers have
    gained is left out, so that results before and after it can be compared. What has no number counts as the worst.
    """
    import numpy as np

    results, sizes = history.results, history.night.settings.profile.sizes
    levels, places, changes = {}, [], []
    skeletons = [skeleton(history.night.source(result.number), sizes) for result in results]
    for result in results:
        before = 0.0 if result.parent is None else levels[result.parent]
        alike = result.parent is None or skeletons[result.parent] == skeletons[result.number]
        change = change_of(results, result) if alike else None
        levels[result.number] = before + (change or 0.0)
        if alike:
            there = numbers_of(history.night.source(result.number), sizes)
            places.append([coordinate(there.get(name, own).value, own.value) for name, own in numbers.items()])
            changes.append(before if result.parent is None else np.nan if change is None else before + change)
    places, changes = np.array(places).reshape(-1, len(numbers))[-TRIALS:], np.array(changes)[-TRIALS:]
    if np.isfinite(changes).any():
        changes = np.where(np.isfinite(changes), changes, np.nanmax(changes))
    far = FAR * max(1.0, results[0].run.val_bpb if results else 1.0)
    return places, far * np.arcsinh(changes / far)


def best_moves(moves, changes, random) -> list[tuple[int, float]]:
    """(index, move) of each number, the one that promises most first, by one draw from the posterior of the model.

    moves (n, d): what was tried, as distances from the present values; changes (n,) of val_bpb. Noise and the scale of the
    coefficients are those of the highest marginal likelihood.
    """
    import numpy as np

    n, d = moves.shape
    features = np.hstack([np.ones((n, 1)), moves, 0.5 * moves**2])
    best = (-np.inf,)
    for scale in SCALES:
        mean = np.r_[0.0, np.zeros(d), np.full(d, scale)]
        variance = np.r_[1.0, np.full(d, SLOPE * scale), np.full(d, scale)] ** 2
        for noise in NOISES:
            covariance = (features * variance) @ features.T + noise**2 * np.eye(n)
            lower = np.linalg.cholesky(covariance)
            error = changes - features @ mean
            likelihood = -0.5 * np.square(np.linalg.solve(lower, error)).sum() - np.log(np.diag(lower)).sum()
            if likelihood > best[0]:
                best = (likelihood, mean, variance, covariance, error)
    _, mean, variance, covariance, error = best
    gain = np.linalg.solve(covariance, features * variance).T
    posterior = np.diag(variance) - gain @ (features * variance)
    draw = random.multivariate_normal(mean + gain @ error, posterior, method="eigh")
    slope, curvature = draw[1 : d + 1], np.maximum(draw[d + 1 :], 1e-9)
    step = np.clip(-slope / curvature, -MAX_STEP, MAX_STEP)
    value = slope * step + 0.5 * curvature * step**2
    return [(int(i), float(step[i])) for i in np.argsort(value)]
