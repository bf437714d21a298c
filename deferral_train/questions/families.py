"""Families of questions: each draws a question in English and the query that answers it.

Phrases hold their variants in brackets, ``[how many|what number of]``; names of the database stand in quotes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from deferral_train.questions.query import Condition, Join, Query

_VARIANTS = re.compile(r"\[([^\[\]]*)\]")
# How each number of a thing is spoken of; the last word of a phrase is the unit.
SPOKEN = {
    "arguments": ("[take|have|accept]", "arguments"),
    "lines": ("[have|span|are]", "lines"),
    "methods": ("[have|define]", "methods"),
    "functions": ("[define|have]", "functions"),
    "classes": ("[define|have]", "classes"),
    "imports": ("[import|have]", "imports"),
}
COMPARISONS = {
    ">": "[more than|over|above]",
    ">=": "[at least|no fewer than]",
    "<": "[fewer than|less than|under]",
    "<=": "[at most|no more than]",
    "=": "[exactly|just]",
}
NUMBERS = {
    "functions": ("arguments", "lines"),
    "classes": ("methods", "lines"),
    "modules": ("lines", "functions", "classes", "imports"),
}
AGGREGATES = {
    "avg": "[average|mean]",
    "max": "[largest|maximum|highest]",
    "min": "[smallest|minimum|lowest]",
    "sum": "[total|summed]",
}
MOST = {
    "lines": "[longest|largest]",
    "arguments": "with the most arguments",
    "methods": "with the most methods",
}
DIGITS = {2: "two", 3: "three", 4: "four", 5: "five"}
Numbers = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Names:
    """The names of the database that one part may ask about, and the numbers that stand beside them.

    Attributes:
        modules, packages, imported: names. functions, classes: (name, module) pairs.
        numbers: table to owner (module or package) to column to the values there.
    """

    modules: Sequence[str]
    packages: Sequence[str]
    imported: Sequence[str]
    functions: Sequence[tuple[str, str]]
    classes: Sequence[tuple[str, str]]
    numbers: Mapping[str, Mapping[str, Numbers]] = field(default_factory=dict)


@dataclass(frozen=True)
class Drawn:
    """A question and its query."""

    question: str
    query: Query


def say(draw: random.Random, phrase: str) -> str:
    """A phrase with every bracket replaced by one of its variants."""
    return " ".join(_VARIANTS.sub(lambda found: draw.choice(found[1].split("|")), phrase).split())


def _conditions(
    draw: random.Random, names: Names, table: str, owner: str, count: int
) -> tuple[str, tuple[Condition, ...]]:
    """So many conditions on different columns, in English behind "that"; empty for none."""
    columns = list(NUMBERS[table]) + ([] if table == "modules" else ["documented"])
    chosen = draw.sample(columns, min(count, len(columns)))
    parts, found = [], []
    for column in chosen:
        if column == "documented":
            value = draw.randrange(2)
            parts.append(
                "[have a docstring|are documented]" if value else "[have no docstring|are undocumented]"
            )
            found.append(Condition(column, "=", value))
        else:
            phrase, condition = _number(draw, column, names.numbers[table][owner][column])
            parts.append(phrase)
            found.append(condition)
    return (" that " + " and ".join(parts) if parts else ""), tuple(found)


def _number(draw: random.Random, column: str, values: Sequence[int]) -> tuple[str, Condition]:
    verb, unit = SPOKEN[column]
    value = draw.choice(values)
    if draw.random() < 0.2:
        upper = value + draw.choice((2, 5, 10, 20))
        return f"{verb} between {value} and {upper} {unit}", Condition(column, "between", value, upper)
    operator = draw.choice(tuple(COMPARISONS))
    return f"{verb} {COMPARISONS[operator]} {value} {unit}", Condition(column, operator, value)


def _things(draw: random.Random, names: Names) -> tuple[str, str, Condition]:
    """Functions or classes of a module: (table, module, the condition that says so)."""
    table = draw.choice(("functions", "classes"))
    module = draw.choice([name for name in names.modules if name in names.numbers[table]])
    return table, module, Condition("module", "=", module)


def count_things(draw: random.Random, names: Names) -> Drawn:
    """Functions or classes of a module, counted, under up to two conditions."""
    table, module, own = _things(draw, names)
    said, more = _conditions(draw, names, table, module, draw.randrange(3))
    how = f"how many {table} [in|of] '{module}' {said.removeprefix(' that ')}"
    phrase = draw.choice(
        (
            how if said else f"how many {table} does '{module}' [have|define]",
            f"[count the|number of|tell me the number of] {table} [in|of] '{module}'{said}",
        )
    )
    return Drawn(say(draw, phrase), Query(("count",), table, (own, *more)))


def list_things(draw: random.Random, names: Names) -> Drawn:
    """Names of functions or classes of a module, under one or two conditions."""
    table, module, own = _things(draw, names)
    said, more = _conditions(draw, names, table, module, draw.choice((1, 2)))
    phrase = f"[which|list the|show the|name the|what are the] {table} [in|of] '{module}'{said}"
    return Drawn(say(draw, phrase), Query(("name",), table, (own, *more)))


def aggregate(draw: random.Random, names: Names) -> Drawn:
    """Mean, extreme or sum of a number over a module's functions or classes, under at most one condition."""
    table, module, own = _things(draw, names)
    column, function = draw.choice(NUMBERS[table]), draw.choice(tuple(AGGREGATES))
    said, more = _conditions(draw, names, table, module, draw.choice((0, 0, 1)))
    phrase = (
        f"[what is the|give the|the|find the] {AGGREGATES[function]} number of {column} [of|over] the {table} "
        f"[in|of] '{module}'{said}"
    )
    return Drawn(say(draw, phrase), Query((f"{function} {column}",), table, (own, *more)))


def top_things(draw: random.Random, names: Names) -> Drawn:
    """The functions or classes of a module with the most of something."""
    return _extreme(draw, names, MOST, True)


def _extreme(draw: random.Random, names: Names, words: Mapping[str, str], falling: bool) -> Drawn:
    table, module, own = _things(draw, names)
    column, limit = draw.choice(NUMBERS[table]), draw.choice((1, 1, 2, 3, 4, 5))
    said, more = _conditions(draw, names, table, module, draw.choice((0, 0, 1)))
    number = "" if limit == 1 else f"[{limit}|{DIGITS[limit]}] "
    things = {"functions": "function", "classes": "class"}[table] if limit == 1 else table
    before, behind = (f"{words[column]} ", "") if column == "lines" else ("", f" {words[column]}")
    be = "is" if limit == 1 else "are"
    phrase = f"[what {be}|which {be}|show|give] the {number}{before}{things}{behind} [in|of] '{module}'"
    if said:
        phrase += f" [among|out of] those{said}"
    query = Query(("name",), table, (own, *more), order=column, falling=falling, limit=limit)
    return Drawn(say(draw, phrase), query)


def module_fact(draw: random.Random, names: Names) -> Drawn:
    """One number of a module."""
    module, column = draw.choice(names.modules), draw.choice(NUMBERS["modules"])
    phrase = draw.choice(
        (
            f"how [long is|many lines has|many lines are in] '{module}'"
            if column == "lines"
            else f"what number of {column} [is recorded|is listed] for '{module}'",
            f"[give|look up|what is] the {column} [entry|figure] of [module|the module] '{module}'",
        )
    )
    return Drawn(say(draw, phrase), Query((column,), "modules", (Condition("name", "=", module),)))


def thing_fact(draw: random.Random, names: Names) -> Drawn:
    """One number of a function or class, by its name and module."""
    table = draw.choice(("functions", "classes"))
    name, module = draw.choice(names.functions if table == "functions" else names.classes)
    column = draw.choice(NUMBERS[table])
    phrase = draw.choice(
        (
            f"how many {column} does '{name}' [in|of|from] '{module}' have",
            f"[what is the number of|number of|give the number of] {column} of '{name}' [in|from] [the module|module] "
            f"'{module}'",
        )
    )
    kind = "function" if table == "functions" else "class"
    where = (Condition("name", "=", name), Condition("module", "=", module))
    said = say(draw, phrase).replace(f"'{name}'", f"[the {kind}|{kind}] '{name}'", 1)
    return Drawn(say(draw, said), Query((column,), table, where))


def modules_of_package(draw: random.Random, names: Names) -> Drawn:
    """Modules of a package, listed or counted, under one or two conditions."""
    package = draw.choice(names.packages)
    said, more = _conditions(draw, names, "modules", package, draw.choice((1, 2)))
    select, phrase = draw.choice(
        (
            ("name", f"[which|list the|show the] modules [of|in] package '{package}'{said}"),
            (
                "count",
                f"[count the|number of|tell me the number of] modules [of|in] package '{package}'{said}",
            ),
        )
    )
    query = Query((select,), "modules", (Condition("package", "=", package), *more))
    return Drawn(say(draw, phrase), query)


def top_modules(draw: random.Random, names: Names) -> Drawn:
    """The modules of a package with the most of something."""
    package, column = draw.choice(names.packages), draw.choice(NUMBERS["modules"])
    limit = draw.choice((1, 2, 3, 4, 5))
    number = "" if limit == 1 else f"[{limit}|{DIGITS[limit]}] "
    things = "module" if limit == 1 else "modules"
    phrase = f"[show|give|find] the {number}{things} of package '{package}' with the most {column}"
    where = (Condition("package", "=", package),)
    return Drawn(say(draw, phrase), Query(("name",), "modules", where, order=column, limit=limit))


def imports_of(draw: random.Random, names: Names) -> Drawn:
    """The imports of a module."""
    module = draw.choice(names.modules)
    phrase = (
        f"[which modules does '{module}' import|list what '{module}' imports|show the imports of '{module}']"
    )
    return Drawn(say(draw, phrase), Query(("name",), "imports", (Condition("module", "=", module),)))


def importers(draw: random.Random, names: Names) -> Drawn:
    """Modules that import another."""
    other = draw.choice(names.imported)
    select, phrase = draw.choice(
        (
            ("module", f"[which modules import|list the modules that import|show who imports] '{other}'"),
            ("count", f"[how many modules import|count the modules that import] '{other}'"),
        )
    )
    return Drawn(say(draw, phrase), Query((select,), "imports", (Condition("name", "=", other),)))


def grouped(draw: random.Random, names: Names) -> Drawn:
    """Functions or classes of a module, counted for every value of a column."""
    table, module, own = _things(draw, names)
    column = draw.choice((NUMBERS[table][0], "documented"))
    by = "docstring or none" if column == "documented" else f"number of {column}"
    said, more = _conditions(draw, names, table, module, draw.choice((0, 0, 1)))
    if any(condition.column == column for condition in more):
        said, more = "", ()
    phrase = f"[count|how many are] the {table} of '{module}'{said} [for each|by|per] {by}"
    return Drawn(say(draw, phrase), Query(("count",), table, (own, *more), group=column))


def joined(draw: random.Random, names: Names) -> Drawn:
    """Functions or classes of all modules of a package, under one or two conditions of their own."""
    table = draw.choice(("functions", "classes"))
    package = draw.choice([name for name in names.packages if name in names.numbers[table]])
    said, more = _conditions(draw, names, table, package, draw.choice((1, 2)))
    select, phrase = draw.choice(
        (
            ("name", f"[which|list the|show the] {table} [in|of] any module of '{package}'{said}"),
            (
                "count",
                f"[count the|number of|tell me the number of] {table} [in|of] any module of '{package}'{said}",
            ),
        )
    )
    where = (Condition("modules.package", "=", package), *more)
    return Drawn(say(draw, phrase), Query((select,), table, where, Join("modules", "module", "name")))


def bottom_things(draw: random.Random, names: Names) -> Drawn:
    """Held out: the functions or classes with the least of something, an order that no other family asks for."""
    least = {
        "lines": "[shortest|smallest]",
        "arguments": "with the fewest arguments",
        "methods": "with the fewest methods",
    }
    return _extreme(draw, names, least, False)


def mean_of_importers(draw: random.Random, names: Names) -> Drawn:
    """Held out: an aggregate over the modules that import another, a join that no other family asks for."""
    other, function = draw.choice(names.imported), draw.choice(tuple(AGGREGATES))
    column = draw.choice(("lines", "functions", "classes"))
    phrase = (
        f"[what is the|give the|find the] {AGGREGATES[function]} number of {column} of the modules that import "
        f"'{other}'"
    )
    where = (Condition("imports.name", "=", other),)
    query = Query((f"{function} {column}",), "modules", where, Join("imports", "name", "module"))
    return Drawn(say(draw, phrase), query)


Family = Callable[[random.Random, Names], Drawn]
SEEN: dict[str, Family] = {
    family.__name__: family
    for family in (
        count_things, list_things, aggregate, top_things, module_fact, thing_fact, modules_of_package,
        top_modules, imports_of, importers, grouped, joined,
    )
}  # fmt: skip
HELD_OUT: dict[str, Family] = {family.__name__: family for family in (bottom_things, mean_of_importers)}
