"""The pages of the reference, from sources read as text: nothing of the package is imported.

Commands: their table, the flags on record and the docstrings of their settings. Python: the public names, their
signatures and docstrings.
"""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

# Heading -> (file below the package, name, methods).
PUBLIC: dict[str, list[tuple[str, str, tuple[str, ...]]]] = {
    "Load and decode": [
        ("decoding/pair.py", "load_pair", ()),
        ("decoding/pair.py", "Pair", ("generate",)),
        ("decoding/generate.py", "cascade_generate", ()),
        (
            "decoding/stats.py",
            "GenerationStats",
            ("emitted", "mean_acceptance_length", "deferral_rate", "rejection_rate", "row"),
        ),
    ],
    "Rules": [
        ("rules/registry.py", "make_rule", ()),
        ("rules/base.py", "Rule", ("target",)),
        ("rules/base.py", "PositionRule", ("defer",)),
        ("rules/base.py", "Dial", ()),
        ("rules/verify.py", "verify_block", ()),
    ],
    "Heads and traces": [
        ("heads/base.py", "DeferralHead", ("from_pretrained", "save_pretrained")),
        ("traces/reader.py", "open_traces", ()),
        ("evaluation/offline.py", "score_rules", ()),
    ],
    "The contract of a new rule or head": [
        ("testing.py", "check_rule", ()),
        ("heads/check.py", "check_head", ()),
    ],
    "Errors": [("errors.py", "InputError", ())],
    "Programs that a model wrote": [
        ("evaluation/code.py", "code_execution", ()),
        ("evaluation/code.py", "judge_code", ()),
    ],
}
SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):$")
Defined = ast.FunctionDef | ast.ClassDef
ENTRY = re.compile(r"^ {4,8}(\w+(?:, \w+)*): (.*(?:\n {12,}.*)*)", re.MULTILINE)


def commands_page(root: Path) -> str:
    """Markdown: for every command its sentence, and its flags with default and meaning."""
    flags = json.loads((root / "tests" / "flags.json").read_text(encoding="utf-8"))
    parts = []
    for command, sentence in _commands(root).items():
        meanings = _meanings(root, command)
        rows = [
            f"| `{flag.replace('_', '-')}` | {_code(default)} | {_cell(meanings.get(flag.lstrip('-'), ''))} |"
            for flag, default in flags[command].items()
            if not flag.endswith(".help")
        ]
        table = "\n".join(["| flag | default | |", "|---|---|---|", *rows])
        parts.append(f"## {command}\n\n{sentence[:1].upper()}{sentence[1:]}.\n\n{table}\n")
    return "\n".join(parts)


def _commands(root: Path) -> dict[str, str]:
    tree = ast.parse((root / "deferral_train" / "cli.py").read_text(encoding="utf-8"))
    found = next(
        node for node in tree.body if isinstance(node, ast.AnnAssign) and _name(node.target) == "COMMANDS"
    )
    assert found.value is not None
    return dict(ast.literal_eval(found.value))


def _meanings(root: Path, command: str) -> dict[str, str]:
    """Flag to meaning: of the command's function, of its settings' class and of the classes nested in that."""
    module = root / "deferral_train" / "commands" / f"{command.replace('-', '_')}.py"
    tree = ast.parse(module.read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "run":
            found |= _entries(ast.get_docstring(node, clean=False) or "")
        if isinstance(node, ast.Assign) and _name(node.targets[0]) == "SETTINGS":
            found |= _of_class(root, _name(node.value), "")
    return found


def _of_class(root: Path, name: str, prefix: str) -> dict[str, str]:
    node = _classes(root).get(name)
    if node is None:
        return {}
    found = {prefix + key: text for key, text in _entries(ast.get_docstring(node, clean=False) or "").items()}
    for field in node.body:
        if isinstance(field, ast.AnnAssign):
            for inner in re.findall(r"[A-Z]\w+", ast.unparse(field.annotation)):
                if inner in _classes(root) and inner != name and prefix.count(".") < 3:
                    found |= _of_class(root, inner, f"{prefix}{_name(field.target)}.")
    return found


_CLASSES: dict[str, ast.ClassDef] = {}


def _classes(root: Path) -> dict[str, ast.ClassDef]:
    for file in () if _CLASSES else sorted((root / "deferral_train").rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                _CLASSES.setdefault(node.name, node)
    return _CLASSES


def _entries(docstring: str) -> dict[str, str]:
    return {name: text for names, text in ENTRY.findall(docstring) for name in names.split(", ")}


def _name(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else ""


def _code(default: str | None) -> str:
    return "" if default is None else f"`{_cell(default)}`"


def _cell(text: str) -> str:
    flat = " ".join(text.split()).replace("|", "\\|").replace("``", "`")
    return re.sub(r":(?:data|func|class|mod):`~?([\w.]+)`", r"`\1`", flat)


def python_page(root: Path) -> str:
    """Markdown: every public name with its signature and docstring.

    Raises:
        LookupError: a name that is not where the table says.
    """
    parts = []
    for heading, names in PUBLIC.items():
        parts.append(f"## {heading}\n")
        for file, name, methods in names:
            node = _defined(root / "deferral_train" / file, name)
            parts.append(_described(node, name, "###"))
            parts += [_described(_inside(node, method), f"{name}.{method}", "####") for method in methods]
    return "\n".join(parts)


def _defined(file: Path, name: str) -> Defined:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, Defined) and node.name == name:
            return node
    raise LookupError(f"{file} defines no {name}; correct PUBLIC in docs/reference_pages.py")


def _inside(node: Defined, method: str) -> Defined:
    for inner in node.body:
        if isinstance(inner, ast.FunctionDef) and inner.name == method:
            return inner
    raise LookupError(f"{node.name} defines no {method}; correct PUBLIC in docs/reference_pages.py")


def _described(node: Defined, title: str, level: str) -> str:
    return (
        f"{level} {title}\n\n```python\n{_signature(node)}\n```\n\n{_prose(ast.get_docstring(node) or '')}\n"
    )


def _signature(node: Defined) -> str:
    if isinstance(node, ast.ClassDef):
        fields = [ast.unparse(one) for one in node.body if isinstance(one, ast.AnnAssign)]
        shown = [field for field in fields if "ClassVar" not in field and not field.startswith("_")]
        bases = f"({', '.join(map(ast.unparse, node.bases))})" if node.bases else ""
        return "\n".join([f"class {node.name}{bases}", *(f"    {field}" for field in shown)])
    head = ast.FunctionDef(node.name, node.args, [ast.Pass()], [], node.returns, lineno=0, col_offset=0)
    line = ast.unparse(head).partition(":\n    pass")[0]
    return line if len(line) <= 72 else _broken(line, node.args)


def _broken(line: str, arguments: ast.arguments) -> str:
    """A signature with an argument a line, each as the line spells it."""
    start, rest = line.partition("(")[::2]
    shown = ast.unparse(arguments)
    inner, depth, parts = shown, 0, [""]
    for character in inner:
        depth += (character in "[({") - (character in "])}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    body = ",\n".join(f"    {part.strip()}" for part in parts)
    return f"{start}(\n{body},\n{rest[len(shown) :]}"


def _prose(docstring: str) -> str:
    """A docstring as Markdown: sections as lists, code as code."""
    lines: list[str] = []
    section = False
    for line in docstring.splitlines():
        heading = SECTION.match(line)
        if heading:
            lines += [f"**{heading[1]}**", ""]
            section = True
        elif section and line.startswith("    ") and not line.startswith("     "):
            name, colon, text = line.strip().partition(": ")
            lines.append(
                f"- `{name}`: {text}" if colon and re.fullmatch(r"[\w, *]+", name) else f"- {line.strip()}"
            )
        elif section and line.startswith("     "):
            lines.append(f"  {line.strip()}")
        else:
            section = section and not line.strip()
            lines.append(line)
    text = re.sub(r":(?:data|func|class|mod|meth):`~?([^`]+)`", r"`\1`", "\n".join(lines))
    return text.replace("``", "`")


PAGES = {"reference/commands": commands_page, "reference/python": python_page}
