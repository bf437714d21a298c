"""Judge labels of a batch: which tokens of the verifier's text may be the drafter's, as trace columns.

N scored positions, in the order of the texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deferral_train.collecting.prefixes import Continuations
from deferral_train.collecting.scoring import ModelOutputs
from deferral_train.collecting.substitute import Substitution, rescore
from deferral_train.rules.distributions import gather_token, lowest_argmax
from deferral_train.traces.schema import JUDGED_COLUMN, JUDGED_HIDDEN


def judge_columns(
    model: Any,
    drafter: Tensor,
    verifier: Tensor,
    scores: ModelOutputs,
    continuations: Continuations,
    prompts: Sequence[Sequence[int]],
    window: int,
    batch_tokens: int,
) -> dict[str, Tensor]:
    """``judge_score`` [N] and ``verifier_hidden_at_token`` [N, D] of the drafter's argmax at every position.

    Args:
        model: the verifier.
        drafter: logits [N, V] over the tokens that both know.
        verifier: the same of the verifier.
        scores: of the verifier's pass, with hidden states and past.
        continuations: texts that follow the prompts; where they bring labels, AutoJudge's (+1, -1, 0), these are the
            scores, else SelfJudge's are computed.
        prompts: token ids of each.
        window: tokens after the argmax that SelfJudge rescores.
        batch_tokens: most padded tokens per pass.

    Returns:
        Where the argmax is the text's own token the score is 0, and the state that of the next position (zeros at
        the last, which is never read).
    """
    assert scores.past is not None
    assert scores.hidden is not None
    texts, labels = continuations.tokens, continuations.labels
    token = torch.tensor([one for text in texts for one in text], device=verifier.device)
    argmax = lowest_argmax(drafter)
    normaliser = verifier.float().logsumexp(-1)
    own = gather_token(verifier, token).float() - normaliser
    theirs = gather_token(verifier, argmax).float() - normaliser
    judged = argmax != token if labels is None else argmax != lowest_argmax(verifier)
    score = torch.zeros_like(own, dtype=torch.float64)
    hidden = _next_states(scores.hidden, [len(text) for text in texts])
    places = [(row, place) for row, text in enumerate(texts) for place in range(len(text))]
    chosen = judged.nonzero()[:, 0].tolist()
    if chosen:
        encoder_decoder = model.config.is_encoder_decoder
        substitutions = [
            Substitution(
                row, place, (1 if encoder_decoder else len(prompts[row])) + place, int(argmax[number])
            )
            for number in chosen
            for row, place in (places[number],)
        ]
        of_text = list(own.split([len(text) for text in texts]))
        used = window if labels is None else 0
        suffix, states = rescore(
            model, scores.past, texts, of_text, substitutions, used, verifier.shape[-1], batch_tokens
        )
        hidden[judged] = states
        if labels is None:
            score[judged] = (theirs - own)[judged].double() + suffix
    if labels is not None:
        score = torch.tensor([one for row in labels for one in row], device=own.device)
    return {JUDGED_COLUMN: score.float(), JUDGED_HIDDEN: hidden}


def _next_states(states: Tensor, lengths: Sequence[int]) -> Tensor:
    """Each position's successor's state [N, D]; zeros at the end of a text."""
    shifted = torch.zeros_like(states)
    shifted[:-1] = states[1:]
    shifted[torch.tensor(lengths, device=states.device).cumsum(0) - 1] = 0
    return shifted
