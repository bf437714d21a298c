"""A query as a value, and the many ways of writing it that mean the same."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

# Share of the queries whose conditions stand as in the question; in the others their order is drawn.
AS_ASKED = 0.9


@dataclass(frozen=True)
class Condition:
    """``column operator value``, or with ``upper`` a range that includes both ends.

    Attributes:
        column: of the queried table, or ``table.column`` of the joined one.
        operator: ``=``, ``>``, ``>=``, ``<`` or ``<=``; ``between`` with ``upper``.
        value: number or text.
    """

    column: str
    operator: str
    value: int | str
    upper: int | None = None


@dataclass(frozen=True)
class Join:
    """A second table whose ``column`` equals ``own`` of the queried one."""

    table: str
    own: str
    column: str


@dataclass(frozen=True)
class Query:
    """The meaning of a query, whatever the way of writing.

    Attributes:
        select: columns, ``count``, or an aggregate as ``avg lines``.
        table: what it is asked of.
        where: conditions that all hold.
        join: a second table for conditions on it.
        group: column of a group; it is also selected.
        order, falling: column of the order and its direction. limit: rows that are kept.
    """

    select: tuple[str, ...]
    table: str
    where: tuple[Condition, ...] = ()
    join: Join | None = None
    group: str | None = None
    order: str | None = None
    falling: bool = True
    limit: int | None = None


@dataclass(frozen=True)
class Style:
    """One way of writing.

    Attributes:
        upper: keywords in capitals. shout: functions in capitals.
        alias: 0 none, 1 a letter after the table, 2 a letter after ``AS``; a join always has one.
        initial: that letter is the table's first one, else ``t``, and ``u`` for the joined table.
        count: what is counted: ``*`` or ``1``.
        equal: ``=``, ``==`` or ``is``.
        between: a range as ``BETWEEN``, else as two comparisons.
        comma: a join as two tables and a condition, else with ``JOIN``.
        labelled: computed columns get a name.
        lines: every clause on a line of its own.
        closed: a semicolon at the end.
        as_asked: conditions in the order of the question, else in one that is drawn.
    """

    upper: bool = True
    shout: bool = True
    alias: int = 0
    initial: bool = True
    count: str = "*"
    equal: str = "="
    between: bool = True
    comma: bool = False
    labelled: bool = False
    lines: bool = False
    closed: bool = False
    as_asked: bool = True

    @classmethod
    def drawn(cls, draw: random.Random) -> Style:
        """Every habit drawn by itself, all its forms alike but the order of conditions (:data:`AS_ASKED`)."""
        return cls(
            upper=draw.random() < 0.5,
            shout=draw.random() < 0.5,
            alias=draw.randrange(3),
            initial=draw.random() < 0.5,
            count=draw.choice("*1"),
            equal=draw.choice(("=", "==", "is")),
            between=draw.random() < 0.5,
            comma=draw.random() < 0.5,
            labelled=draw.random() < 0.5,
            lines=draw.random() < 0.5,
            closed=draw.random() < 0.5,
            as_asked=draw.random() < AS_ASKED,
        )


def write(query: Query, style: Style, draw: random.Random | None = None) -> str:
    """The query in SQL.

    Args:
        draw: shuffles the conditions where the style does not keep their order; without, they stay in it.
    """
    return _Writer(query, style).text(draw)


@dataclass(frozen=True)
class _Writer:
    query: Query
    style: Style

    def text(self, draw: random.Random | None) -> str:
        query, word = self.query, self._word
        clauses = [f"{word('select')} {', '.join(self._selected())}", f"{word('from')} {self._tables()}"]
        both = f" {word('and')} "
        conditions = [both.join(self._condition(condition)) for condition in query.where]
        if query.join is not None and self.style.comma:
            conditions.append(self._joined(query.join))
        if draw is not None and not self.style.as_asked:
            draw.shuffle(conditions)
        if conditions:
            clauses.append(f"{word('where')} {both.join(conditions)}")
        if query.group is not None:
            clauses.append(f"{word('group by')} {self._column(query.group)}")
        if query.order is not None:
            direction = word("desc" if query.falling else "asc")
            clauses.append(f"{word('order by')} {self._column(query.order)} {direction}")
        if query.limit is not None:
            clauses.append(f"{word('limit')} {query.limit}")
        return ("\n" if self.style.lines else " ").join(clauses) + (";" if self.style.closed else "")

    def _word(self, text: str) -> str:
        return text.upper() if self.style.upper else text

    def _function(self, name: str) -> str:
        return name.upper() if self.style.shout else name

    def _equal(self) -> str:
        return self._word(self.style.equal)

    def _selected(self) -> Sequence[str]:
        columns = [] if self.query.group is None else [self._column(self.query.group)]
        for item in self.query.select:
            function, _, column = item.rpartition(" ")
            if item == "count":
                columns.append(f"{self._function('count')}({self.style.count})" + self._label("total"))
            elif function:
                columns.append(f"{self._function(function)}({self._column(column)})" + self._label("result"))
            else:
                columns.append(self._column(item))
        return columns

    def _label(self, name: str) -> str:
        return f" {self._word('as')} {name}" if self.style.labelled else ""

    def _tables(self) -> str:
        join = self.query.join
        first = self._table(self.query.table)
        if join is None:
            return first
        if self.style.comma:
            return f"{first}, {self._table(join.table)}"
        return (
            f"{first} {self._word('join')} {self._table(join.table)} {self._word('on')} {self._joined(join)}"
        )

    def _table(self, table: str) -> str:
        alias = self._alias(table)
        return table + (f" {self._word('as')}" * (self.style.alias == 2) + f" {alias}" if alias else "")

    def _alias(self, table: str) -> str:
        if not self.style.alias and self.query.join is None:
            return ""
        return table[0] if self.style.initial else "t" if table == self.query.table else "u"

    def _joined(self, join: Join) -> str:
        return f"{self._column(join.own)} {self._equal()} {self._column(f'{join.table}.{join.column}')}"

    def _column(self, name: str) -> str:
        table, _, column = name.rpartition(".")
        alias = self._alias(table or self.query.table)
        return f"{alias}.{column}" if alias else column

    def _condition(self, condition: Condition) -> list[str]:
        column, value = self._column(condition.column), _literal(condition.value)
        if condition.upper is not None:
            if self.style.between:
                return [f"{column} {self._word('between')} {value} {self._word('and')} {condition.upper}"]
            return [f"{column} >= {value}", f"{column} <= {condition.upper}"]
        operator = self._equal() if condition.operator == "=" else condition.operator
        return [f"{column} {operator} {value}"]


def _literal(value: int | str) -> str:
    return str(value) if isinstance(value, int) else "'" + value.replace("'", "''") + "'"
