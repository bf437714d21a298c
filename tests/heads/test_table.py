"""The table of heads that an artifact may name, and what each head states about itself."""

from __future__ import annotations

import pytest
from heads.distributions import every_head

from deferral_train.errors import InputError
from deferral_train.heads import HEADS, DeferralHead, GapHead
from deferral_train.heads.objectives import OBJECTIVES, objective_for


def test_the_packages_heads_enter_the_table_and_others_do_not():
    assert set(HEADS) == {"gap", "cost_sensitive", "truth_mixture", "token", "token_gap", "judge", "plug_in"}

    class Mine(GapHead):
        head_type = "mine"

    assert "mine" not in HEADS
    type("Derived", (Mine,), {"__module__": "deferral_train.heads.derived"})  # states no type of its own
    assert "mine" not in HEADS


def test_a_taken_type_is_refused_and_leaves_the_table_as_it_was():
    with pytest.raises(TypeError, match="'gap' is that of GapHead"):
        type("Other", (DeferralHead,), {"__module__": "deferral_train.heads.other", "head_type": "gap"})
    assert HEADS["gap"] is GapHead


def test_a_folder_of_a_users_class_is_loaded_by_that_class_alone(tmp_path):
    class Mine(GapHead):
        head_type = "mine"

    folder = Mine(["drafter_max"]).save_pretrained(tmp_path / "head")
    with pytest.raises(InputError, match="'mine' is unknown"):
        DeferralHead.from_pretrained(folder)
    with pytest.raises(InputError, match="not a 'gap' one"):
        GapHead.from_pretrained(folder)
    assert type(Mine.from_pretrained(folder)) is Mine


@pytest.mark.parametrize("kind", every_head())
def test_a_head_is_trained_by_the_objectives_that_it_states_and_by_no_other(kind):
    head = every_head()[kind]
    assert objective_for(head) == head.objectives[0]
    for name in OBJECTIVES:
        if name in head.objectives:
            assert objective_for(head, name) == name
        else:
            with pytest.raises(InputError, match="does not fit"):
                objective_for(head, name)
