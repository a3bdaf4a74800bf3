"""The numbers at the top of train.py: which there are, another value in the place of one, what a night has tried of them."""

import ast
import math
import re
from dataclasses import dataclass
from functools import lru_cache

from lab.propose.screen import fingerprint
from lab.record.night import Night
from lab.records import Result

FIXED = re.compile(r"#\s*fixed\b", re.IGNORECASE)  # such a comment on its line takes a number out of the search


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
    old: int | float
    new: int | float
    alone: bool  # nothing else was changed


@lru_cache(4096)
def numbers_of(source: str, sizes: str) -> dict[str, Number]:
    """The numbers that serve CONFIGS[sizes], by name: plain NAME = number, tuples of them, the keywords of that entry, and the
    defaults of class Config for those that it leaves out. A zero switches something off and is none, nor is one with a comment
    `# fixed`.
    """
    plain, defaults, own = {}, {}, None
    for node in ast.parse(source).body:
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


def moves_of(results: list[Result], sources: dict[int, str], sizes: str) -> dict[str, list[Move]]:
    """By name: the experiments that changed a number against their incumbent, whatever else they changed."""
    moves = {}
    for result in results:
        if result.parent is not None:
            before, after = (numbers_of(sources[number], sizes) for number in (result.parent, result.number))
            changed = [name for name in after if name in before and after[name].value != before[name].value]
            same = skeleton(sources[result.parent], sizes) == skeleton(sources[result.number], sizes)
            for name in changed:
                move = Move(result, before[name].value, after[name].value, same and len(changed) == 1)
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
