import pytest
import torch

from deferral_train.errors import InputError
from deferral_train.training.loader import TableLoader


def table(rows=103):
    return {"x": torch.arange(rows * 2.0).view(rows, 2), "z": torch.arange(rows)}


def seen(loader):
    return [batch["z"] for batch in loader]


def test_an_epoch_is_a_permutation_and_columns_stay_together():
    batches = list(TableLoader(table(), 10, seed=3))
    rows = torch.cat([b["z"] for b in batches])
    assert sorted(rows.tolist()) == list(range(103))
    assert rows.tolist() != list(range(103))
    for batch in batches:
        assert torch.equal(batch["x"][:, 0], 2.0 * batch["z"])


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        return torch.cat(seen(TableLoader(table(), 10, seed, epoch=lambda: epoch))).tolist()

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 1)


def test_state_resumes_in_the_middle_of_the_same_epoch_only():
    epoch = 4
    loader = TableLoader(table(), 10, seed=0, epoch=lambda: epoch)
    whole = seen(loader)
    walk = iter(loader)
    for _ in range(3):
        next(walk)
    state = loader.state_dict()
    again = TableLoader(table(), 10, seed=0, epoch=lambda: epoch)
    again.load_state_dict(state)
    rest = seen(again)
    assert len(rest) == len(whole) - 3
    assert all(torch.equal(a, b) for a, b in zip(rest, whole[3:]))
    assert len(seen(again)) == len(whole)
    epoch = 5
    again.load_state_dict(state)
    assert len(seen(again)) == len(whole)


def test_ranks_share_the_rows_without_repeats():
    shuffled = [torch.cat(seen(TableLoader(table(), 10, 0, rank, 3))) for rank in range(3)]
    assert [len(part) for part in shuffled] == [34, 34, 34]
    assert len(set(torch.cat(shuffled).tolist())) == 102
    ordered = [torch.cat(seen(TableLoader(table(), 10, None, rank, 3))) for rank in range(3)]
    assert sorted(torch.cat(ordered).tolist()) == list(range(103))


def test_ordered_batches_are_views_not_copies():
    data = table()
    batch = next(iter(TableLoader(data, 10)))
    assert batch["x"].untyped_storage().data_ptr() == data["x"].untyped_storage().data_ptr()


def test_too_few_rows_or_no_batch():
    with pytest.raises(InputError, match="processes"):
        TableLoader(table(2), 1, seed=0, rank=0, world=3)
    with pytest.raises(InputError, match="batch_size"):
        TableLoader(table(), 0)
