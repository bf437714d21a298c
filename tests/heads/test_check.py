import pytest
import torch
from heads.distributions import FEATURES, every_head

from deferral_train.errors import InputError
from deferral_train.heads import GapHead
from deferral_train.testing import check_head


@pytest.mark.parametrize("name", list(every_head()))
def test_every_head_passes(name):
    check_head(every_head()[name])


class Mixing(GapHead):
    head_type = "mixing"

    def forward(self, x):
        out = super().forward(x)
        return {"gap": out["gap"] + x.cumsum(0)[:, 0]}


class Noisy(GapHead):
    head_type = "noisy"

    def forward(self, x):
        return {"gap": torch.rand(len(x))}


class Claiming(GapHead):
    head_type = "claiming"

    @property
    def features(self):
        return (*super().features, "js")


@pytest.mark.parametrize(("kind", "said"), [(Mixing, "influence"), (Noisy, "two calls"), (Claiming, "js")])
def test_broken_heads_are_told_why(kind, said):
    with pytest.raises(InputError, match=said):
        check_head(kind(FEATURES, hidden=(4,)))
