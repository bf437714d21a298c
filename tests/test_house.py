"""The house rules that a reader feels, read off the syntax trees: sizes, names, first words, circles of imports.

``house_known.json`` lists what broke a rule when the check was written, by room; a file is known by its name, whatever
folder it has moved to. The list may only shrink: a new offender fails, and so does an entry that is mended and still
listed. ``python tests/test_house.py`` drops those.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deferral_train"
KNOWN = Path(__file__).with_name("house_known.json")
MOST_PARAMETERS, MOST_LINES = 8, 60
MOST_CALLS, MOST_FILES = 6, 4  # from Pair.generate to the formula of a rule

# A signature that another library or the public surface fixes.
FIXED_SIGNATURES = {
    "decoding/generate.py:cascade_generate": "transformers hands these to a custom_generate callable, by name",
    "rules/verify.py:verify_block": "public, as docs/design.md states it",
    "evaluation/offline.py:score_rules": "public; binds to one ScoreSettings in its first statements",
    "training/module.py:DeferralModule.__init__": "LightningCLI makes the flags --model.* of these parameters",
    "training/datamodule.py:TraceDataModule.__init__": "LightningCLI makes the flags --data.* of these parameters",
}

# Words that gave way to the field's terms, and what to say.
REPLACED_WORDS = {
    "favourite": "argmax",
    "wish": "constraint",
    "operate": "operating_point",
    "closing": "print_summary",
    "paste": "engine_command",
    "imagined": "shadow_outcome",
    "shelf": "ShardWriterThread",
    "law": "distribution",
}
STABLE_NAMES = {"LawRule", "law"}  # public: rules that users have written define the method
# Whole names, where the word alone is fine elsewhere: by file or room.
REPLACED_NAMES = {
    ("decoding", "Cascade"): "DecodingState",
    ("decoding", "Stepper"): "CachedModel",
    ("decoding", "Ledger"): "StatsRecorder",
    ("decoding", "judge"): "verify_block: judge is a rule, a head and a label",
    ("collecting/scoring.py", "Scores"): "ModelOutputs",
    ("rules/scoring.py", "Scores"): "AcceptanceProbs",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef


@cache
def trees() -> dict[str, ast.Module]:
    """Syntax tree of every file of the package, by its path inside it."""
    return {
        path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def definitions(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """Functions and classes below a node, with their dotted names."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield prefix + child.name, child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


def everywhere() -> Iterator[tuple[str, str, Definition]]:
    for file, tree in trees().items():
        for name, node in definitions(tree):
            yield file, name, node


def is_public(name: str) -> bool:
    return not any(part.startswith("_") for part in name.split("."))


def parameters(node: Function) -> list[str]:
    """Names of all parameters, self and cls left out."""
    given = node.args
    every = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [one.arg for one in every if one is not None]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def lines(node: Function) -> int:
    """Lines from ``def`` to the end, the docstring left out."""
    first = node.body[0]
    docstring = 0 if ast.get_docstring(node) is None else first.end_lineno - first.lineno + 1
    return node.end_lineno - node.lineno + 1 - docstring


def many_parameters() -> Iterator[tuple[str, str]]:
    for file, name, node in everywhere():
        fixed = f"{file}:{name}" in FIXED_SIGNATURES
        if isinstance(node, Function) and len(parameters(node)) > MOST_PARAMETERS and not fixed:
            yield file, name


def long_functions() -> Iterator[tuple[str, str]]:
    for file, name, node in everywhere():
        if isinstance(node, Function) and is_public(name) and lines(node) > MOST_LINES:
            yield file, name


def shared_class_names() -> Iterator[tuple[str, str]]:
    places = defaultdict(list)
    for file, name, node in everywhere():
        if isinstance(node, ast.ClassDef) and is_public(name):
            places[node.name].append(file)
    return ((file, name) for name, files in places.items() if len(files) > 1 for file in files)


def riddling_docstrings() -> Iterator[tuple[str, str]]:
    for file, tree in trees().items():
        for name, node in [("", tree), *definitions(tree)]:
            if re.match(r"(What|Whether)\b", ast.get_docstring(node) or ""):
                yield file, name


def replaced_words() -> Iterator[tuple[str, str]]:
    for file in trees():
        stem = file.removesuffix(".py").split("/")[-1]
        if set(REPLACED_WORDS) & set(stem.split("_")):
            yield file, ""
    for file, name, node in everywhere():
        if is_public(name):
            words = {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", node.name)}
            words = {word.removesuffix("s") for word in words} - (
                {"law"} if node.name in STABLE_NAMES else set()
            )
            named = (file, node.name) in REPLACED_NAMES or (file.split("/")[0], node.name) in REPLACED_NAMES
            if named or words & set(REPLACED_WORDS):
                yield file, name


CHECKS = {
    "many_parameters": many_parameters,
    "long_functions": long_functions,
    "shared_class_names": shared_class_names,
    "riddling_docstrings": riddling_docstrings,
    "replaced_words": replaced_words,
}


def found() -> dict[str, dict[str, list[str]]]:
    """Offenders of every check by room (a folder of the package, or a file beside them), known by their file's name."""
    rooms: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for check, offenders in CHECKS.items():
        for file, name in offenders():
            rooms[file.split("/")[0]][check].append(f"{file.rpartition('/')[2]}:{name}")
    return {room: {check: sorted(names) for check, names in by.items()} for room, by in sorted(rooms.items())}


@pytest.mark.parametrize("check", CHECKS)
def test_no_new_offender_and_no_mended_one_still_listed(check):
    known = json.loads(KNOWN.read_text(encoding="utf-8"))
    listed = {name for by in known.values() for name in by.get(check, ())}
    now = {name for by in found().values() for name in by.get(check, ())}
    assert not now - listed, f"{check}: mend these, the list of known ones only shrinks"
    assert not listed - now, f"{check}: mended; run `python tests/test_house.py` to drop them from the list"


PLANTED = """
class Twice: ...

def many(a, b, c, d, e, f, g, *h, i): ...

def law(): ...

def laws_of(): ...

class Shelf:
    def __init__(self, a, b, c, d, e, f, g, h): ...

    def puts(self):
        "Whether it does."

def long():
"""


def test_every_check_finds_what_is_planted(monkeypatch):
    planted = {"a/x.py": PLANTED + "    pass\n" * MOST_LINES, "b/y.py": "class Twice: ..."}
    monkeypatch.setitem(globals(), "trees", lambda: {file: ast.parse(text) for file, text in planted.items()})
    assert found() == {
        "a": {
            "many_parameters": ["x.py:many"],
            "long_functions": ["x.py:long"],
            "shared_class_names": ["x.py:Twice"],
            "riddling_docstrings": ["x.py:Shelf.puts"],
            "replaced_words": ["x.py:Shelf", "x.py:laws_of"],
        },
        "b": {"shared_class_names": ["y.py:Twice"]},
    }


def test_every_fixed_signature_is_one():
    """An exception that no longer needs to be one is taken off the list."""
    sizes = {
        f"{file}:{name}": len(parameters(node))
        for file, name, node in everywhere()
        if isinstance(node, Function)
    }
    assert all(sizes.get(name, 0) > MOST_PARAMETERS for name in FIXED_SIGNATURES)


def test_the_walk_from_generate_to_a_rules_formula_is_short():
    """Every frame of the package on the stack when max q < max p - alpha D_TV is evaluated, both ends counted."""
    from decoding.helpers import pair_of

    from deferral_train.decoding import Pair
    from deferral_train.pairs.load import make_pair
    from deferral_train.rules.position import Opt

    walks = []

    def note(frame, event, _):
        if event != "call" or frame.f_code is not Opt.defer.__code__:
            return
        walk = []
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                walk.append((Path(frame.f_code.co_filename).name, frame.f_code.co_qualname))
            frame = frame.f_back
        walks.append(walk[::-1])

    pair = Pair(make_pair(*pair_of("llama")))
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        pair.generate(["w1 w2 w3", "w4 w5"], rule="opt", max_new_tokens=6)
    finally:
        sys.setprofile(before)
    assert walks
    for walk in walks:
        assert walk[0] == ("pair.py", "Pair.generate")
        assert walk[-1] == ("position.py", "Opt.defer")
        assert len(walk) <= MOST_CALLS, walk
        assert len({file for file, _ in walk}) <= MOST_FILES, walk


def test_files_do_not_import_each_other_in_a_circle():
    """Imports inside functions count; those for the type checker alone do not (`make check` counts these too)."""
    grimp = pytest.importorskip("grimp", reason="comes with import-linter, of the extra dev")
    graph = grimp.build_graph("deferral_train", exclude_type_checking_imports=True, cache_dir=None)
    for importer, imported in known_circles():
        graph.remove_import(importer=importer, imported=imported)
    order = TopologicalSorter({name: graph.find_modules_directly_imported_by(name) for name in graph.modules})
    try:
        order.prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


def known_circles() -> list[tuple[str, ...]]:
    """Imports that the contract in pyproject.toml leaves out until they are mended."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (contract,) = (
        one for one in project["tool"]["importlinter"]["contracts"] if one["type"] == "acyclic_siblings"
    )
    return [tuple(edge.split(" -> ")) for edge in contract.get("ignore_imports", ())]


def shrink() -> None:
    """Drop mended offenders from the list of known ones; adds none."""
    known, kept = json.loads(KNOWN.read_text(encoding="utf-8")), found()
    listed = {(check, name) for by in known.values() for check, names in by.items() for name in names}
    for room, by in kept.items():
        still = {check: [name for name in names if (check, name) in listed] for check, names in by.items()}
        kept[room] = {check: names for check, names in still.items() if names}
    kept = {room: by for room, by in kept.items() if by}
    KNOWN.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(shrink())
