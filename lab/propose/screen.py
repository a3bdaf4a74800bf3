"""The screen: what is refused before any training time is spent. An alarm for lazy cases; the wall is the sandbox and the scorer."""

import ast
import builtins
import io
import re
import tokenize

from lab.records import Rejected, fingerprint, parsed

SOURCE_BYTES = 64_000  # train.py stays under this
LITERAL_CHARS = 1_000  # no literal is longer: weights and answers do not hide in the source
IMPORTS = frozenset(
    "__future__ torch numpy triton math time gc functools itertools dataclasses contextlib typing collections copy prepare constants".split()
)
REFUSED = {  # name or attribute: why
    name: reason
    for reason, names in {
        "reaches outside the experiment": "os sys _os _sys subprocess socket ctypes ctypeslib cpp_extension pathlib Path shutil multiprocessing "
        "inspect testing _testing collect_env f2py distutils bottleneck _pytesttester hipify benchmark tensorboard viz importlib machinery "
        "find_spec module_from_spec exec_module load_library",
        "the environment decides nothing here; `run` has what a run may know": "environ getenv putenv",
        "reaches into the harness": "builtins __builtins__ __dict__ __globals__ __closure__ __code__ __subclasses__ __bases__ __base__ __class__ __mro__ mro "
        "__self__ __func__ __loader__ __spec__ _C _rows open_rows settings_by_hand",
        "walks the frames of its caller": "_getframe f_back f_locals f_globals tb_frame gi_frame cr_frame",
        "finds objects of the harness": "get_objects get_referrers get_referents",
        "hides what runs; for evaluation mode use module.train(False)": "eval exec compile_command __import__ import_module "
        "_exec_with_source get_type_hints ForwardRef evaluate_forward_ref get_annotations",
        "hides which name is meant; write it out": "* getattr setattr delattr __getattribute__ __getattr__ __setattr__ "
        "__delattr__ getattr_static attrgetter methodcaller globals locals vars",
        "reads files; run.train_rows has the data": "open memmap open_memmap fromfile from_file loadtxt genfromtxt DataSource load hub package "
        "PyTorchFileReader",
        "writes files; run.finish saves the weights": "save savez savez_compressed savetxt tofile dump write_text write_bytes write_atomically "
        "PyTorchFileWriter",
        "the seed belongs to the harness, and its generators have it": "manual_seed manual_seed_all set_rng_state_all seed_all default_generator "
        "default_rng RandomState SeedSequence PCG64 PCG64DXSM MT19937 Philox SFC64 seed",
        "belongs to the harness; clock.progress and clock.seconds tell the time": "settings budget_s",
    }.items()
    for name in names.split()
}
HELD = frozenset(
    "start last recent events stopped_s expired progress seconds seed clock finish report batches start_clock".split()
)  # no edit assigns them


def screen(source: str, tried: dict[str, str]) -> None:
    """Raises Rejected unless the source compiles, keeps rules and contract, and is new.

    tried maps the fingerprint of each program of the night to what became of it.
    """
    try:
        raw = source.encode()
        if len(raw) > SOURCE_BYTES:
            raise Rejected(f"train.py has {len(raw):,} bytes; {SOURCE_BYTES:,} are allowed")
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)  # as the interpreter reads the file
        if not encoding.startswith("utf-8"):
            raise Rejected(
                f"train.py declares the coding {encoding}, which can hide code in a comment; only UTF-8 is allowed"
            )
        tree = parsed(source)
        compile(source, "train.py", "exec")
        check_rules(tree)
        check_contract(tree)
        outcome = tried.get(fingerprint(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last three also from deep nesting
        raise Rejected(f"train.py does not compile: {error}") from None
    if outcome:
        raise Rejected(f"the same program was tried already: {outcome}")


def check_rules(tree: ast.Module) -> None:
    """Raises Rejected for imports, names, literals and assignments that the rules refuse."""
    kernels, harness = names_from(tree, "triton"), names_from(tree, "prepare") | names_from(tree, "constants")
    for node in ast.walk(tree):
        at = f"line {getattr(node, 'lineno', '?')}"
        for name in names_of(node, kernels):
            if name in REFUSED:
                raise Rejected(f"{at}: `{name}` is refused: {REFUSED[name]}")
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            for name in modules:
                if name.split(".")[0] not in IMPORTS or getattr(node, "level", 0):
                    allowed = ", ".join(sorted(IMPORTS))
                    raise Rejected(f"{at}: import of {name or 'a relative module'} is refused; allowed: {allowed}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, (str, bytes, int)):
            size = node.value.bit_length() / 3.3 if isinstance(node.value, int) else len(node.value)
            if size > LITERAL_CHARS:
                raise Rejected(f"{at}: a literal of over {LITERAL_CHARS:,} characters is refused")
        elif isinstance(node, (ast.Attribute, ast.Subscript)) and not isinstance(node.ctx, ast.Load):
            owner, name = ast.unparse(node.value), getattr(node, "attr", "")
            if name in HELD and owner != "self":
                raise Rejected(f"{at}: assignment to `{name}` is refused: clock, time and seed belong to the harness")
            if re.split(r"\W", owner, maxsplit=1)[0] in harness:
                raise Rejected(f"{at}: assignment to `{ast.unparse(node)}` is refused: the harness is not edited")


def names_of(node: ast.AST, kernels: set[str]) -> list[str]:
    """The names in a node that the rules look at.

    `load` of triton reads memory of the card. A variable `load` or `seed` is nobody's: what is imported is looked at where it is.
    """
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [part for alias in node.names for part in alias.name.split(".")] + (
            getattr(node, "module", None) or ""
        ).split(".")
    if isinstance(node, ast.Name):
        return [node.id] if hasattr(builtins, node.id) or node.id.startswith("__") else []
    if isinstance(node, ast.Attribute):
        owner = ast.unparse(node.value).split(".")[0] if isinstance(node.value, (ast.Name, ast.Attribute)) else ""
        allowed = (node.attr == "load" and owner in kernels) or (node.attr == "seed" and owner == "run")
        return [] if allowed else [node.attr]
    return node.kwd_attrs if isinstance(node, ast.MatchClass) else []


def names_from(tree: ast.Module, package: str) -> set[str]:
    """What a package, its modules and what they hold are called here."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found = [alias for alias in node.names if alias.name.split(".")[0] == package]
            names |= {alias.asname or package for alias in found}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == package:
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def check_contract(tree: ast.Module) -> None:
    """Raises Rejected if build_model, start, start_clock or finish is missing."""
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "build_model" not in functions or len(functions["build_model"].args.args) != 1:
        raise Rejected("the contract asks for `def build_model(profile)` at the top level of train.py")
    if not any(isinstance(node, ast.If) and "__main__" in ast.dump(node.test) for node in tree.body):
        raise Rejected('the contract asks for `if __name__ == "__main__":` around the run')
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    missing = {"start", "start_clock", "finish"} - {call.attr for call in calls if isinstance(call, ast.Attribute)}
    for name in sorted(missing):
        raise Rejected(f"the contract asks for a call of `{name}`; program.md shows the shape")
