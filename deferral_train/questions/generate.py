"""Questions about the library's database in parts that share no name of a module, function, class or package.

Every part has the same families of questions but ``test_shapes``, which has two that no other part has. Each name of
the database belongs to one part by the hash of the name. Questions whose answer is empty or not determined (a tie at
the limit of an order) are left out, so that a query scores only by naming the right things.
"""

from __future__ import annotations

import random
import re
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deferral_train.errors import InputError
from deferral_train.pairs.corpora import part_of
from deferral_train.pairs.prompts import Prompt
from deferral_train.questions.families import HELD_OUT, NUMBERS, SEEN, Drawn, Family, Names
from deferral_train.questions.query import Query, Style, write

SHARES = {"pair": 0.44, "fit": 0.14, "validation": 0.08, "calibration": 0.17, "test": 0.17}
SHAPES = "test_shapes"
STYLES = ("drawn", "house")
MOST_ROWS = 60  # longer answers are no answer to a question
TRAINED = "pair"  # the part that a pair learns from
# Share of its questions whose names and numbers are invented: a few hundred names a small model knows by heart,
# and does not learn to take them from the question.
INVENTED = 0.8
# Questions with several conditions, or two names, are the hardest to answer: it learns from so many times more of them.
OFTENER = {
    **{"count_things": 2, "list_things": 3, "aggregate": 2, "top_things": 2},
    **{"thing_fact": 4, "modules_of_package": 4, "joined": 3},
}
HARDER = 0.8  # share of its questions that are the harder of two that were drawn
GLUED = 0.5  # share of the parts of invented names that are no real word
MISSES = 40  # drawn questions of a family in a row that cannot be kept
_PARTS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")  # of names
_WORD = re.compile(r"[a-z]+")
_QUOTED = re.compile(r"'([^']*)'")
_NUMBER = re.compile(r"(?<![\w'.])\d{2,}\b")  # of two digits or more: no limit of an order has so many


@dataclass(frozen=True)
class Questions:
    """Questions by part; ``constant`` is the part to the share of its questions that one constant answer gets right.

    ``left_out`` counts, by reason, the drawn questions that no part took.
    """

    parts: Mapping[str, list[Prompt]]
    constant: Mapping[str, float]
    left_out: Mapping[str, int]


def make_questions(
    database: str | Path, sizes: Mapping[str, int], seed: int = 0, style: str = "drawn"
) -> Questions:
    """Draw so many questions a part; the same database, sizes and seed give the same ones.

    Args:
        sizes: part of :data:`SHARES` or ``test_shapes`` to its number of questions.
        style: "drawn" writes every query in habits of its own, "house" all in one style.

    Raises:
        InputError: an unknown style, or a part whose names do not give so many different questions.
    """
    if style not in STYLES:
        raise InputError(f"style={style!r}: use {' or '.join(STYLES)}")
    connection = sqlite3.connect(f"{Path(database).resolve().as_uri()}?mode=ro", uri=True)
    try:
        return _Maker(connection, seed, style).make(sizes)
    finally:
        connection.close()


def _invented(question: str, text: str, parts: Sequence[str], draw: random.Random) -> tuple[str, str]:
    """Question and query with invented numbers, in the order of the old ones' size, and invented names for all that is
    quoted, put together of ``parts``."""
    old_numbers = sorted({int(number) for number in _NUMBER.findall(question)})
    numbers = sorted(draw.sample(range(10, 10 ** draw.choice((2, 2, 2, 3, 3, 4))), len(old_numbers)))
    new = {str(old): str(number) for old, number in zip(old_numbers, numbers)}
    question, text = (
        _NUMBER.sub(lambda found: new.get(found[0], found[0]), side) for side in (question, text)
    )
    # Few parts for all names of a question: one that comes again is not copied by what stood before it alone.
    own = _WORD.findall(_QUOTED.sub("", question))
    few = [_piece(parts, own, draw) for _ in range(draw.choice((2, 3, 4, 8, 16)))]
    for old in dict.fromkeys(_QUOTED.findall(text)):
        name = ".".join(_word(few, draw) for _ in range(draw.choice((1, 1, 2, 3))))
        question, text = (side.replace(f"'{old}'", f"'{name}'") for side in (question, text))
    return question, text


def _piece(parts: Sequence[str], own: Sequence[str], draw: random.Random) -> str:
    """A part of real names or a word of the question, or the head of one and the tail of another.

    The latter bring every piece that a tokenizer may cut names into, which real words alone leave almost unseen.
    """
    one, other = (draw.choice(draw.choice((parts, parts, parts, own))) for _ in range(2))
    if draw.random() < GLUED:
        return one[: draw.randint(1, len(one))] + other[draw.randint(0, len(other)) :]
    return one


def _cased(part: str, draw: random.Random) -> str:
    return draw.choice((part, part, part, part.lower(), part.capitalize(), part.capitalize(), part.upper()))


def _word(parts: Sequence[str], draw: random.Random) -> str:
    """One to three parts, some in other capitals, now and then with a number, as real names have one."""
    chosen = [_cased(draw.choice(parts), draw) for _ in range(draw.choice((1, 1, 2, 2, 3)))]
    if draw.random() < 0.1:
        chosen.append(str(draw.randrange(1, 65)))
    return draw.choice(("", "", "", "", "_", "__")) + draw.choice(("", "_")).join(chosen)


class _Maker:
    def __init__(self, connection: sqlite3.Connection, seed: int, style: str) -> None:
        self.connection, self.seed, self.style = connection, seed, style
        self.left_out: Counter[str] = Counter()

    def make(self, sizes: Mapping[str, int]) -> Questions:
        parts: dict[str, list[Prompt]] = {}
        constant = {}
        for part, size in sizes.items():
            families, owner = (HELD_OUT, "test") if part == SHAPES else (SEEN, part)
            parts[part], answers = self._part(part, families, self._names(owner), size)
            constant[part] = max(Counter(answers).values(), default=0) / max(1, len(answers))
        return Questions(parts, constant, dict(self.left_out))

    def _part(
        self, part: str, families: Mapping[str, Family], names: Names, size: int
    ) -> tuple[list[Prompt], list[Any]]:
        draw = random.Random(f"{self.seed} {part}")
        found: dict[str, tuple[Prompt, Any]] = {}
        parts = self._parts_of(names)
        times = OFTENER if part == TRAINED else {}
        # They take turns; one that has no more to ask is left out from then on.
        waiting = [name for name in families for _ in range(times.get(name, 1))]
        while waiting and len(found) < size:
            family = waiting.pop(0)
            kept = self._kept(families[family], names, draw, found)
            if kept is not None and part == TRAINED and draw.random() < HARDER:
                kept = self._harder(kept, self._kept(families[family], names, draw, found))
            if kept is not None:
                drawn, answer = kept
                question, text = drawn.question, self._written(drawn, draw)
                if part == TRAINED and draw.random() < INVENTED:
                    question, text = _invented(question, text, parts, draw)
                prompt = Prompt(f"{family}/{part}-{len(found) + 1}", question, text)
                found[drawn.question] = (prompt, answer)
                waiting.append(family)
        if len(found) == size:
            return [prompt for prompt, _ in found.values()], [answer for _, answer in found.values()]
        raise InputError(
            f"questions: part {part} gave {len(found)} different questions of {size}; ask for fewer, or use a Python "
            "with more of its library's sources"
        )

    @staticmethod
    def _harder(one: tuple[Drawn, Any], other: tuple[Drawn, Any] | None) -> tuple[Drawn, Any]:
        """Of two questions the one with more values to take over, a range counting as two; the first if alike."""

        def values(kept: tuple[Drawn, Any]) -> int:
            return sum(1 + (condition.upper is not None) for condition in kept[0].query.where)

        return other if other is not None and values(other) > values(one) else one

    @staticmethod
    def _parts_of(names: Names) -> list[str]:
        """The words that the names are made of, each once: a rare one is copied as a common one is."""
        things = (name for name, _ in (*names.functions, *names.classes))
        known = (*names.modules, *names.packages, *names.imported, *things)
        return sorted({part for name in known for part in _PARTS.findall(name)})

    def _kept(
        self, family: Family, names: Names, draw: random.Random, asked: Container[str]
    ) -> tuple[Drawn, Any] | None:
        """The next question of a family that can be kept, and its answer; None where too many in a row cannot."""
        for _ in range(MISSES):
            drawn = family(draw, names)
            if drawn.question in asked:
                self.left_out["asked before"] += 1
            elif (answer := self._answer(drawn.query)) is not None:
                return drawn, answer
        return None

    def _written(self, drawn: Drawn, draw: random.Random) -> str:
        if self.style == "house":
            return write(drawn.query, Style())
        return write(drawn.query, Style.drawn(draw), draw)

    def _answer(self, query: Query) -> tuple[Any, ...] | None:
        """Rows of the query, in no order where it asks for none; None where it should not be asked."""
        rows = self.connection.execute(write(query, Style())).fetchmany(MOST_ROWS + 1)
        if not any(value not in (None, 0) for row in rows for value in row):
            self.left_out["empty answer"] += 1
            return None
        if len(rows) > MOST_ROWS:
            self.left_out["long answer"] += 1
            return None
        if query.limit is not None and self._tied(query):
            self.left_out["tie at the limit"] += 1
            return None
        return tuple(rows if query.order is not None else sorted(rows, key=repr))

    def _tied(self, query: Query) -> bool:
        """True where the order leaves open which rows are kept, or in what order: two kept values, or the last kept and
        the first left out, are equal."""
        assert query.limit is not None
        assert query.order is not None
        wider = replace(query, select=(query.order,), limit=query.limit + 1)
        values = [row[0] for row in self.connection.execute(write(wider, Style()))]
        return len(values) < query.limit or len(set(values)) < len(values)

    def _names(self, part: str) -> Names:
        def rows(query: str) -> Iterator[Any]:
            return (row for row in self.connection.execute(query))

        def ours(name: str) -> bool:
            return part_of(name, SHARES) == part

        modules = [name for (name,) in rows("SELECT name FROM modules") if ours(name)]
        packages = [
            name
            for (name,) in rows("SELECT DISTINCT package FROM modules WHERE package NOT NULL")
            if ours(name)
        ]
        known = set(modules)
        inside = {
            table: [
                (name, module)
                for name, module in rows(
                    f"SELECT name, module FROM {table} GROUP BY name, module HAVING count(*) = 1"
                )
                if ours(name) and module in known and not name.startswith("_")
            ]
            for table in ("functions", "classes")
        }
        imported = [
            name
            for (name,) in rows("SELECT DISTINCT name FROM imports")
            if ours(name) and not name.startswith("_")
        ]
        return Names(
            modules,
            packages,
            imported,
            inside["functions"],
            inside["classes"],
            self._numbers(modules, packages),
        )

    def _numbers(
        self, modules: Sequence[str], packages: Sequence[str]
    ) -> dict[str, dict[str, dict[str, list[int]]]]:
        """Values by table, owner and column: those that conditions compare with."""
        found: dict[str, dict[str, dict[str, list[int]]]] = {}
        wanted = set(modules) | set(packages)
        for table, columns in NUMBERS.items():
            owners = "package, package" if table == "modules" else "module, package"
            source = "modules" if table == "modules" else f"{table} t JOIN modules ON modules.name = module"
            chosen = (
                ", ".join(columns) if table == "modules" else ", ".join(f"t.{column}" for column in columns)
            )
            values: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
            for *held, own in [
                (r[0], r[1], r[2:])
                for r in self.connection.execute(f"SELECT {owners}, {chosen} FROM {source}")
            ]:
                for owner in dict.fromkeys(held):
                    if owner in wanted:
                        for column, value in zip(columns, own):
                            values[owner][column].append(value)
            found[table] = values
        return found
