"""Traces of real (tiny) models against plain, unbatched, float64 passes over the same text."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from deferral_train.collecting import CollectConfig, collect
from deferral_train.collecting.prefixes import draft_positions
from deferral_train.pairs.encode import encode_prompts
from deferral_train.pairs.load import ModelPair
from deferral_train.rules.base import PositionRule, TokenRule
from deferral_train.rules.registry import make_rule
from deferral_train.rules.summary import FIELDS, Summary, summarize
from deferral_train.rules.verify import Origin
from deferral_train.traces import Traces, open_traces, read_candidates

from .conftest import make_prompts, tiny_pair

COUNT = 11
# float32 models of a few layers against float64 ones: logits of size 10 agree to about 1e-5.
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}


def collected(pair: ModelPair, out: Path, **settings: object) -> Traces:
    given = {"log_top_k": 6, "chunk_prompts": 4, "batch_tokens": 70, "hidden": "both", **settings}
    collect(CollectConfig(**given), out, progress=False, models=pair, prompts=make_prompts(COUNT))  # type: ignore[arg-type]
    return open_traces(out, verify=True)


def full_logits(model: object, prompt: list[int], tokens: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and last hidden states [T, ..] that predict `tokens`, one sequence alone, in float64."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:  # type: ignore[attr-defined]
            inputs = {
                "input_ids": torch.tensor([prompt]),
                "decoder_input_ids": torch.tensor([[0, *tokens[:-1]]]),
            }
            output = model(**inputs, output_hidden_states=True)  # type: ignore[operator]
            return output.logits[0], output.decoder_hidden_states[-1][0]
        output = model(input_ids=torch.tensor([[*prompt, *tokens[:-1]]]), output_hidden_states=True)  # type: ignore[operator]
        start = len(prompt) - 1
        return output.logits[0, start:], output.hidden_states[-1][0, start:]


def in_double(pair: ModelPair) -> ModelPair:
    return dataclasses.replace(
        pair, drafter=copy.deepcopy(pair.drafter).double(), verifier=copy.deepcopy(pair.verifier).double()
    )


def distributions_of(pair: ModelPair, traces: Traces, with_hidden: bool = False) -> list[torch.Tensor]:
    """Full float64 logits (and hidden states) of both models at every row of the traces, sequence by sequence."""
    pair = in_double(pair)
    prompts = {p.id: p for p in make_prompts(COUNT)}
    parts: list[list[torch.Tensor]] = [[], [], [], []]
    rows, tokens = traces.prompt_of_row, traces.column("token")
    for number in dict.fromkeys(rows.tolist()):
        prompt = prompts[traces.manifest.prompt_ids[number]]
        ids = encode_prompts(pair.tokenizer, [prompt], is_encoder_decoder=pair.is_encoder_decoder).kept[0]
        for place, model in enumerate((pair.drafter, pair.verifier)):
            logits, hidden = full_logits(model, ids.input_ids, tokens[rows == number].tolist())
            parts[place].append(logits[:, : pair.vocab_size])
            parts[place + 2].append(hidden)
    return [torch.cat(part) for part in parts[: 4 if with_hidden else 2]]


@pytest.mark.parametrize("kind", ["t5", "llama", "gemma2", "qwen3", "gpt2"])
def test_every_row_equals_an_unbatched_float64_pass(kind: str, tmp_path: Path) -> None:
    """Batches, padding, sliding windows and padded vocabularies leave no trace in the values."""
    pair = tiny_pair(kind, padded=3)
    traces = collected(pair, tmp_path, temperature=0.7)
    assert len(traces.manifest.chunks) == 3
    assert max(len(chunk.batches) for chunk in traces.manifest.chunks) > 1
    assert traces.prompt_ids == tuple(p.id for p in make_prompts(COUNT))
    assert np.array_equal(traces.column("gold"), traces.column("token"))
    q, p, drafter_hidden, verifier_hidden = distributions_of(pair, traces, with_hidden=True)
    token = torch.from_numpy(traces.column("token")).long()
    reference = summarize(q, p, token=token, temperature=0.7)
    summary = traces.summary()
    for name in reference:
        if FIELDS[name].dtype == "float":
            torch.testing.assert_close(summary[name].double(), reference[name], **TOLERANCE, msg=name)
        else:
            assert torch.equal(summary[name], reference[name]), name
    for role, expected in (("drafter", drafter_hidden), ("verifier", verifier_hidden)):
        stored = traces.summary([f"{role}_hidden"])[f"{role}_hidden"].double()
        torch.testing.assert_close(stored, expected, atol=2e-3, rtol=2e-3)  # 16 bit


def test_rows_are_the_references_tokens_with_their_end(t5: ModelPair, tmp_path: Path) -> None:
    traces = collected(t5, tmp_path)
    encoded = encode_prompts(t5.tokenizer, make_prompts(COUNT), is_encoder_decoder=True).kept
    expected = [token for prompt in encoded for token in prompt.reference_ids]
    assert traces.column("gold").tolist() == expected
    assert traces.column("position").tolist() == [
        n for prompt in encoded for n in range(len(prompt.reference_ids))
    ]
    ends = np.flatnonzero(np.diff(traces.prompt_of_row)).tolist()
    assert all(expected[row] == t5.tokenizer.eos_token_id for row in ends)


def test_batches_and_chunks_move_values_by_rounding_alone(
    t5: ModelPair, llama: ModelPair, tmp_path: Path
) -> None:
    for name, pair in (("t5", t5), ("llama", llama)):
        alone = collected(pair, tmp_path / f"{name}1", batch_tokens=1, chunk_prompts=1)
        together = collected(pair, tmp_path / f"{name}2", batch_tokens=10_000, chunk_prompts=100)
        first, second = alone.summary(), together.summary()
        for field in first:
            # A margin is a difference of logits and carries their rounding, that of values several times as large.
            atol = 4e-5 if field.endswith("_margin") else 1e-5
            torch.testing.assert_close(first[field], second[field], atol=atol, rtol=1e-5, msg=field)


POSITION_RULES = (
    "chow:0.3",
    "chow_log:1.0",
    "diff:0.1",
    "diff_log:0.1",
    "opt:0.3",
    "opt_log:0.2",
    "opt_verifier:0.2",
)


def test_position_rules_from_traces_equal_rules_on_full_distributions(t5: ModelPair, tmp_path: Path) -> None:
    traces = collected(t5, tmp_path)
    q, p = distributions_of(t5, traces)
    full = summarize(q, p, token=torch.from_numpy(traces.column("token")).long())
    decided = 0
    for spec in POSITION_RULES:
        name, alpha = spec.split(":")
        rule = make_rule(name, alpha=float(alpha))
        assert isinstance(rule, PositionRule)
        from_traces, from_distributions = rule.defer(traces.summary()), rule.defer(full)
        assert torch.equal(from_traces, from_distributions), spec
        decided += int(0 < from_distributions.float().mean() < 1)
    assert decided >= 5  # most of the rules both defer and keep here, so that equality says something


@pytest.mark.parametrize("name", ["token_v1", "token_v2", "token_v3"])
@pytest.mark.parametrize("k", [4, 40])
def test_token_rules_from_candidates_are_within_the_stored_bound(
    t5: ModelPair, tmp_path: Path, name: str, k: int
) -> None:
    """eta = sum of q over the tokens not kept: from candidates it is short by at most what they leave out."""
    traces = collected(t5, tmp_path, log_top_k=k)
    q, p = (distribution.log_softmax(-1) for distribution in distributions_of(t5, traces))
    rule = make_rule(name, alpha=0.2)
    assert isinstance(rule, TokenRule)
    full = summarize(q, p)
    kept_mass = (q.exp() * rule.keep(q, p, full)).sum(1)
    candidates = read_candidates(traces)
    distributions = candidates.drafter_logprobs, candidates.verifier_logprobs
    keep = rule.keep(*distributions, traces.summary()) & candidates.valid
    seen = (distributions[0].exp() * keep).sum(1)
    bound = candidates.drafter_rest + candidates.rounding + 1e-4
    # A candidate within float16's rounding of the threshold may fall on either side; none does here.
    assert bool(((kept_mass - seen).abs() <= bound).all())
    assert float(candidates.drafter_rest.max()) < (0.8 if k == 4 else 1e-3)


@pytest.mark.parametrize("prefixes", ["drafter", "verifier", "cascade"])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_on_policy_prefixes_say_which_and_are_scored_as_any_text(
    kind: str, prefixes: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    pair = request.getfixturevalue(kind)
    rule = "opt:alpha=0.3" if prefixes == "cascade" else None
    settings = {"prefixes": prefixes, "rule": rule, "max_new_tokens": 9, "hidden": "none", "log_top_k": 0}
    traces = collected(pair, tmp_path / "a", **settings)
    assert traces.manifest.prefixes == ("cascade:opt:alpha=0.3" if rule else prefixes)
    assert set(traces.column("gold").tolist()) == {-1}
    q, p = distributions_of(pair, traces)
    reference = summarize(q, p, token=torch.from_numpy(traces.column("token")).long())
    summary = traces.summary([name for name in reference if FIELDS[name].dtype == "float"])
    for name in summary:
        torch.testing.assert_close(summary[name].double(), reference[name], **TOLERANCE, msg=name)
    again = collected(pair, tmp_path / "b", **settings)
    for name in traces.columns:
        assert np.array_equal(traces.column(name), again.column(name)), name
    other = collected(pair, tmp_path / "c", **settings, seed=1)
    assert not np.array_equal(traces.column("token")[:20], other.column("token")[:20])


def test_greedy_prefixes_are_the_models_own_argmaxes(llama: ModelPair, tmp_path: Path) -> None:
    settings = {"max_new_tokens": 9, "temperature": 0.0, "hidden": "none"}
    for prefixes in ("drafter", "verifier"):
        traces = collected(llama, tmp_path / prefixes, prefixes=prefixes, **settings)
        assert np.array_equal(traces.column("token"), traces.column(f"{prefixes}_argmax"))
    lossless = collected(llama, tmp_path / "cascade", prefixes="cascade", rule="lossless", **settings)
    assert np.array_equal(lossless.column("token"), traces.column("token"))


def test_a_checkpoints_own_generation_settings_do_not_bend_the_prefixes(
    llama: ModelPair, tmp_path: Path
) -> None:
    settings = {"prefixes": "verifier", "max_new_tokens": 9, "hidden": "none"}
    plain = collected(llama, tmp_path / "a", **settings)
    bent = copy.deepcopy(llama.verifier)
    bent.generation_config.update(top_k=1, repetition_penalty=5.0, min_new_tokens=9, do_sample=False)
    same = collected(dataclasses.replace(llama, verifier=bent), tmp_path / "b", **settings)
    assert np.array_equal(plain.column("token"), same.column("token"))
    assert bent.generation_config.top_k == 1


def test_cascade_rows_say_how_each_token_came_about(llama: ModelPair, tmp_path: Path) -> None:
    traces = collected(
        llama, tmp_path, prefixes="cascade", rule="opt:alpha=0.1", max_new_tokens=20, num_draft_tokens=3
    )
    origin, place = traces.column("origin"), traces.column("draft_position")
    assert set(origin.tolist()) <= {Origin.KEPT, Origin.ACCEPTED, Origin.RESAMPLED, Origin.BONUS}
    assert len(set(origin.tolist())) >= 3
    assert place.max() == 3
    assert set(origin[place == 3].tolist()) == {Origin.BONUS}
    assert traces.summary(["draft_position"]).draft_position.shape == (len(traces),)


def test_draft_positions_start_anew_after_the_verifiers_own_token() -> None:
    kept, accepted, resampled, bonus = Origin.KEPT, Origin.ACCEPTED, Origin.RESAMPLED, Origin.BONUS
    assert draft_positions([kept, resampled, resampled, accepted, kept, bonus, kept]) == [0, 1, 0, 0, 1, 2, 0]


def test_a_teachers_distribution_fills_the_truth_group(tmp_path: Path) -> None:
    from deferral_train.traces.truth import gap

    from .conftest import tiny

    folders = tiny.save_tiny_pair("t5", tmp_path / "pair")
    teacher, _ = tiny.save_tiny_pair("t5", tmp_path / "teacher", seed=5)
    config = CollectConfig(
        drafter=str(folders[0]), verifier=str(folders[1]), teacher=str(teacher), log_top_k=0, device="cpu"
    )
    collect(config, tmp_path / "traces", progress=False, prompts=make_prompts(COUNT))
    traces = open_traces(tmp_path / "traces")
    assert traces.manifest.truth == "teacher"
    from deferral_train.pairs.load import load_models
    from deferral_train.rules.risks import gap_from_truth

    pair = load_models(folders[0], folders[1], "cpu")
    truth = load_models(folders[0], teacher, "cpu")
    q, p = (distribution.softmax(-1) for distribution in distributions_of(pair, traces))
    third = distributions_of(truth, traces)[1].softmax(-1)
    for loss in ("zero_one", "log", "prob"):
        expected = gap_from_truth(q, p, third, loss).float()
        torch.testing.assert_close(gap(traces, "teacher", loss), expected, **TOLERANCE)


def test_summary_of_traces_is_what_a_rule_reads(t5: ModelPair, tmp_path: Path) -> None:
    summary = collected(t5, tmp_path).summary()
    assert isinstance(summary, Summary)
    assert make_rule("opt", alpha=0.2).needs <= set(summary.names)
