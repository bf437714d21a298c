"""Features read from tables by token id: embeddings of the two argmaxes, their folded weights, and their cosine.

An embedding is a row of the verifier's output matrix. A linear body makes of it a weighted sum, one number per token of
the vocabulary, so that a fitted linear head is stored with tables of such numbers in place of the matrix
(:func:`fold`). V vocabulary, D width.

=============================  =================================================  =====
feature                        value                                              width
=============================  =================================================  =====
``drafter_argmax_embedding``   the matrix's row of v_q                            D
``verifier_argmax_embedding``  the matrix's row of v_p                            D
``token_embedding``            the matrix's row of the token spoken of            D
``drafter_argmax_worth``       the table's number of v_q, of a folded head        1
``verifier_argmax_worth``      the table's number of v_p, of a folded head        1
``token_worth``                the table's number of the token spoken of          1
``argmax_cosine``              cosine of the rows of v_q and v_p                  1
=============================  =================================================  =====
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from deferral_train.errors import InputError
from deferral_train.rules.summary import Summary

SPOKEN_OF = ("drafter_argmax", "verifier_argmax", "token")
EMBEDDINGS = {f"{name}_embedding": name for name in SPOKEN_OF}
WORTHS = {f"{name}_worth": name for name in SPOKEN_OF}
COSINE = "argmax_cosine"
FIELDS_READ: dict[str, tuple[str, ...]] = {
    **{feature: (name,) for feature, name in {**EMBEDDINGS, **WORTHS}.items()},
    COSINE: ("drafter_argmax", "verifier_argmax"),
}
VOCABULARY = "vocabulary"  # among a head's widths: V
MATRIX = "matrix"  # among a head's widths: D
MOST_ENTRIES = 1 << 22
MOST_NUMBERS = 1 << 30


class Lookups(nn.Module):
    """Matrix and tables behind the features of a head that look tokens up.

    The matrix is kept in 16 bit, for fitting as for serving, so that both read the same numbers.

    Args:
        names: features that look a token up.
        widths: of the head; ``vocabulary`` V, and D under ``matrix`` where a row is read.
    """

    matrix: Tensor

    def __init__(self, names: Sequence[str], widths: Mapping[str, int]) -> None:
        super().__init__()
        self.vocabulary, self.width = widths.get(VOCABULARY, 0), 0
        if not 0 < self.vocabulary <= MOST_ENTRIES:
            raise InputError(
                f"feature {names[0]!r} looks tokens up; give the size of the vocabulary, widths={{'{VOCABULARY}': V}}, "
                f"up to {MOST_ENTRIES}"
            )
        if any(name in EMBEDDINGS or name == COSINE for name in names):
            self.width = widths.get(MATRIX, 0)
            if not 0 < self.width * self.vocabulary <= MOST_NUMBERS:
                raise InputError(
                    f"features that read the verifier's output matrix need its width, widths={{'{MATRIX}': D}}, and at "
                    f"most {MOST_NUMBERS} numbers in it; got {self.vocabulary} rows of {self.width}"
                )
            zeros = torch.zeros(self.vocabulary, self.width, dtype=torch.float16)
            self.register_buffer("matrix", zeros)
        for name in names:
            if name in WORTHS:
                self.register_buffer(name, torch.zeros(self.vocabulary))

    def feature_width(self, name: str) -> int:
        """Columns of a feature."""
        return self.width if name in EMBEDDINGS else 1

    @torch.no_grad()
    def set_matrix(self, matrix: Tensor) -> None:
        """Take the verifier's output matrix [>=V, D]; further rows are padding.

        Raises:
            InputError: another width, or fewer rows.
        """
        if matrix.shape[0] < self.vocabulary or matrix.shape[1] != self.width:
            raise InputError(
                f"the verifier's output matrix is {list(matrix.shape)}, the head looks up {self.vocabulary} rows of "
                f"{self.width}; use the pair of the traces"
            )
        self.matrix.copy_(matrix[: self.vocabulary])

    def columns(self, summary: Summary, name: str) -> Tensor:
        """The feature's columns [.., width], float32."""
        if name == COSINE:
            rows = [self._rows(summary[field]) for field in FIELDS_READ[COSINE]]
            return torch.cosine_similarity(rows[0], rows[1], dim=-1).unsqueeze(-1)
        if name in EMBEDDINGS:
            return self._rows(summary[EMBEDDINGS[name]])
        return self.get_buffer(name)[summary[WORTHS[name]].long()].unsqueeze(-1).float()

    def _rows(self, token: Tensor) -> Tensor:
        return self.matrix[token.long()].float()
