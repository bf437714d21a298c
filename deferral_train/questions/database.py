"""A database of the standard library's own source files: modules, functions, classes and imports.

Every Python has it, so that questions about it need no download. The same Python gives the same bytes.
"""

from __future__ import annotations

import ast
import os
import sqlite3
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from deferral_train import provenance
from deferral_train.errors import InputError

# Tests, bundled wheels, and tables of characters and help texts that define nothing.
SKIPPED_FOLDERS = frozenset(
    {
        *("site-packages", "dist-packages", "test", "tests", "idle_test", "lib-dynload"),
        *("encodings", "pydoc_data", "__pycache__", "__phello__"),
    }
)
# Gone from Python 3.12 (PEP 632, lib2to3 from 3.13, and others) and 3.13 (PEP 594): without them the database is much
# the same whichever Python makes it.
REMOVED = frozenset(
    {
        *(
            "asynchat",
            "asyncore",
            "distutils",
            "imp",
            "lib2to3",
            "smtpd",
            "aifc",
            "audioop",
            "cgi",
            "cgitb",
            "chunk",
        ),
        *("crypt", "imghdr", "mailcap", "msilib", "nis", "nntplib", "ossaudiodev", "pipes", "sndhdr", "spwd"),
        *("sunau", "telnetlib", "uu", "xdrlib"),
    }
)
FILE = "stdlib.sqlite"
FEWEST_MODULES = 100
SCHEMA = {
    "modules": (
        *("name TEXT", "package TEXT", "lines INTEGER"),
        *("functions INTEGER", "classes INTEGER", "imports INTEGER"),
    ),
    "functions": ("name TEXT", "module TEXT", "arguments INTEGER", "lines INTEGER", "documented INTEGER"),
    "classes": ("name TEXT", "module TEXT", "methods INTEGER", "lines INTEGER", "documented INTEGER"),
    "imports": ("module TEXT", "name TEXT"),
}  # fmt: skip
Row = tuple[str | int | None, ...]


@dataclass
class Library:
    """Rows by table, in the order of :data:`SCHEMA`'s columns.

    Attributes:
        modules: (dotted name, the outermost package that holds it or None, lines, functions, classes, imported
            modules).
        functions: those of a module and the methods of its classes: (name, module, arguments, lines, 1 with a
            docstring).
        classes: those at a module's top level: (name, module, methods, lines, 1 with a docstring).
        imports: (module, a module that it imports anywhere), each pair once.
    """

    modules: list[Row] = field(default_factory=list)
    functions: list[Row] = field(default_factory=list)
    classes: list[Row] = field(default_factory=list)
    imports: list[Row] = field(default_factory=list)


def build_database(path: str | Path, root: str | Path | None = None) -> dict[str, int]:
    """Write the database of a folder of ``.py`` files; returns rows by table.

    Args:
        path: the SQLite file, replaced as a whole.
        root: default the running interpreter's standard library.

    Raises:
        InputError: fewer than ``FEWEST_MODULES`` readable sources, as in a Python shipped as a zip or embedded.
    """
    library = read_library(root)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.unfinished")
    unfinished.unlink(missing_ok=True)
    connection = sqlite3.connect(unfinished)
    try:
        with connection:
            for table, columns in SCHEMA.items():
                connection.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
                marks = ", ".join("?" * len(columns))
                connection.executemany(f"INSERT INTO {table} VALUES ({marks})", getattr(library, table))
            for table in ("functions", "classes", "imports"):
                connection.execute(f"CREATE INDEX {table}_by_module ON {table} (module)")
    finally:
        connection.close()
    os.replace(unfinished, target)
    provenance.sync_folder(target.parent)
    return {table: len(getattr(library, table)) for table in SCHEMA}


def read_library(root: str | Path | None = None) -> Library:
    """Parse the sources below ``root``, in order of path.

    Raises:
        InputError: as :func:`build_database`.
    """
    folder = Path(root) if root is not None else Path(sysconfig.get_paths()["stdlib"])
    library = Library()
    for name, package, text in _sources(folder):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):  # templates and files for another Python
            continue
        library.modules.append((name, package, text.count("\n") + 1, *_add(library, name, tree)))
    if len(library.modules) < FEWEST_MODULES:
        raise InputError(
            f"standard library sources: {folder} has {len(library.modules)} readable modules, needs {FEWEST_MODULES}; "
            "use a Python that ships its sources as .py files, such as the one from python.org or a package manager"
        )
    return library


def _sources(folder: Path) -> Iterator[tuple[str, str | None, str]]:
    """(dotted module name, its outermost package or None, text) of every source that can be read."""
    for path in sorted(folder.rglob("*.py"), key=lambda path: path.relative_to(folder).as_posix()):
        relative = path.relative_to(folder)
        if any(part in SKIPPED_FOLDERS or not part.isidentifier() for part in relative.parts[:-1]):
            continue
        parts = [*relative.parts[:-1], relative.stem]
        # _sysconfigdata differs from machine to machine.
        if (
            parts[0] in REMOVED
            or not relative.stem.isidentifier()
            or relative.name.startswith("_sysconfigdata")
        ):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)
        yield name, parts[0] if len(parts) > 1 else None, text


def _add(library: Library, name: str, tree: ast.Module) -> tuple[int, int, int]:
    """Rows of what a module defines and imports; returns the number of functions, classes and imported modules."""
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    functions = [*_functions(tree), *(method for node in classes for method in _functions(node))]
    imported = sorted(set(_imported(tree)))
    library.functions += [
        (node.name, name, _arguments(node), _lines(node), int(ast.get_docstring(node) is not None))
        for node in functions
    ]
    library.classes += [
        (node.name, name, len(_functions(node)), _lines(node), int(ast.get_docstring(node) is not None))
        for node in classes
    ]
    library.imports += [(name, other) for other in imported]
    return len(functions), len(classes), len(imported)


def _functions(node: ast.Module | ast.ClassDef) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [inner for inner in node.body if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)]


def _imported(tree: ast.Module) -> Iterator[str]:
    """Modules that are imported by their full name, anywhere in the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = node.args
    starred = (given.vararg is not None) + (given.kwarg is not None)
    return len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) + starred


def _lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1
