"""Many requests at once, each with settings of its own: none is lost, and each says what it says alone.

A request alone is in an engine of the same kind with nobody beside it. Greedy text depends on where blocks begin, which
preemption moves: a request that was put aside is held against that only where its text is the verifier's own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from engines import counts, generate, preemptions, prompts, remembering, save_pair, start, stop, use

pytestmark = pytest.mark.engine
LOSSLESS, FREE, NOTHING = {"deferral_lossless": 1}, {"deferral_dial": 5.0}, {"deferral_max_request_loss": 0.0}
KINDS = [
    None, LOSSLESS, FREE, {"deferral_dial": -0.3}, {**FREE, **NOTHING}, {**FREE, "deferral_max_request_loss": 0.4},
    {"deferral_dial": 0.6, "deferral_max_request_loss": 1.0},
]  # fmt: skip
SAMPLED = 9  # every ninth request samples, with a seed of its own
CROWDS = [
    pytest.param(200, id="V1"),
    pytest.param(40, id="V2", marks=pytest.mark.v2),
    pytest.param(200, id="V2-many", marks=[pytest.mark.v2, pytest.mark.slow]),
]


class Asked(NamedTuple):
    """One request: its prompt, what it asks of the plug-in, and its temperature."""

    prompt: tuple[int, ...]
    kind: int
    temperature: float
    tokens: int


def crowd(count: int, rows: list[list[int]], tokens: int) -> list[Asked]:
    return [
        Asked(tuple(rows[number % len(rows)]), number % len(KINDS), float(number % SAMPLED == 0), tokens)
        for number in range(count)
    ]


def at_once(
    llm: Any, seam: Any, asked: list[Asked], abort: Any
) -> tuple[dict[int, list[int]], set[int], set[int]]:
    """Texts by number, those that were aborted, and those that the engine put aside on the way."""
    from vllm import SamplingParams

    core, found, gone, aside = llm.llm_engine, {}, set(), set()
    schedule = seam.schedule

    def watched(output: Any) -> None:
        aside.update(int(name.split("-")[1]) for name in output.scheduled_cached_reqs.resumed_req_ids)
        aside.update(
            int(new.req_id.split("-")[1]) for new in output.scheduled_new_reqs if new.req_id in seam.requests
        )
        schedule(output)

    seam.schedule = watched
    try:
        for number, one in enumerate(asked):
            params = SamplingParams(
                temperature=one.temperature,
                max_tokens=one.tokens,
                ignore_eos=True,
                extra_args=KINDS[one.kind],
                seed=number,
            )
            core.add_request(f"n-{number}", {"prompt_token_ids": list(one.prompt)}, params)
        steps = 0
        while core.has_unfinished_requests():
            for output in core.step():
                if output.finished:
                    found[int(output.request_id.split("-")[1])] = list(output.outputs[0].token_ids)
            steps += 1
            leaving = {number for number in range(len(asked)) if abort(steps, number)} - set(found)
            core.abort_request([f"n-{number}" for number in leaving])
            gone |= leaving
    finally:
        del seam.schedule
    return {number: text for number, text in found.items() if number not in gone}, gone, aside


@pytest.mark.parametrize("count", CROWDS)
def test_of_many_requests_none_is_lost_or_mixed_up(tmp_path, count):
    pair = save_pair(tmp_path)
    # 20 short requests fit, and of long ones, which grow to three blocks each, about half of those that run.
    room = {"num_gpu_blocks_override": count // 4 + 14, "block_size": 32, "max_num_seqs": min(64, count // 2)}
    llm = start(pair, {"rule": "opt:alpha=0.2", "max_request_loss": 3.0}, enable_prefix_caching=False, **room)
    try:
        few = max(2, count // 16)
        short = crowd(count, prompts(few, seed=31, shortest=3, longest=8), 16)
        long = crowd(count // 2, prompts(few, seed=32, shortest=36, longest=50), 24)
        alone = by_itself(llm, [one for one in dict.fromkeys(short + long) if one.temperature == 0])

        seam, spent = begin(llm)
        found, gone, aside = at_once(
            llm, seam, short, lambda step, number: step in (2, 3) and number % 12 == step
        )
        complete(found, gone, short)
        assert len(gone) > count // 16
        assert not aside
        same = [number for number in found if short[number].temperature == 0]
        assert {number: found[number] for number in same} == {number: alone[short[number]] for number in same}
        assert len({tuple(text) for text in found.values()}) > 2 * few  # they say different things
        accounts(llm, seam, spent, short)

        seam, spent = begin(llm)
        before = preemptions(llm)
        found, gone, aside = at_once(llm, seam, long, lambda step, number: step == 4 and number % 10 == 3)
        complete(found, gone, long)
        assert preemptions(llm) > before
        assert len(aside) > 1
        strict = {
            kind
            for kind, one in enumerate(KINDS)
            if one and (one == LOSSLESS or NOTHING.items() <= one.items())
        }
        held = [
            number
            for number in found
            if long[number].temperature == 0 and (number not in aside or long[number].kind in strict)
        ]
        assert len(held) > count // 8
        assert any(number in aside for number in held)
        assert {number: found[number] for number in held} == {number: alone[long[number]] for number in held}
        accounts(llm, seam, spent, long)
    finally:
        stop(llm)


def begin(llm):
    seam, spent = use(llm, rule="opt:alpha=0.2", max_request_loss=3.0), {}
    seam.requests.forget = remembering(seam.requests, spent)
    return seam, spent


def by_itself(llm, asked):
    use(llm, rule="opt:alpha=0.2", max_request_loss=3.0)
    return {
        one: generate(llm, [list(one.prompt)], KINDS[one.kind], max_tokens=one.tokens)[0] for one in asked
    }


def complete(found, gone, asked):
    assert set(found) | gone == set(range(len(asked)))
    assert all(len(text) == asked[number].tokens for number, text in found.items())


def accounts(llm, seam, spent, asked):
    """Every request within its own limit, and what they spent together is what was counted."""
    total = counts(seam)["estimated_loss"]
    generate(llm, [[5, 6]], LOSSLESS, max_tokens=1)  # the engine tells of an end with the next step
    for name, amount in spent.items():
        kind = KINDS[asked[int(name.split("-")[1])].kind] or {}
        limit = 0.0 if kind == LOSSLESS else kind.get("deferral_max_request_loss", 3.0)
        assert 0 <= amount <= limit
    assert sum(spent.values()) == pytest.approx(total)
    assert total > 0
    assert counts(seam)["refused_fault"] == counts(seam)["refused_drafter_law"] == 0
    assert len(seam.requests) <= 1
