"""The pretend accelerator refuses what a GPU refuses, computes what the CPU computes, and leaves the CPU alone."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable

import pytest
import torch
from device import pretend_device

pretend_device.install()

HOST = torch.arange(12.0).reshape(3, 4)


def here() -> torch.Tensor:
    return HOST.to("sim")


REFUSED: dict[str, Callable[[], object]] = {
    "elementwise": lambda: here() + HOST,
    "two devices of one kind": lambda: here() + HOST.to("sim:1"),
    "matrix product": lambda: torch.nn.functional.linear(here(), HOST),
    "lists": lambda: torch.cat([HOST, here()]),
    "a mask of the host": lambda: torch.where(HOST > 0, here(), here()),
    "gather": lambda: here().gather(0, torch.zeros(1, 4, dtype=torch.long)),
    "index_select": lambda: here().index_select(0, torch.tensor([0])),
    "embedding": lambda: torch.nn.functional.embedding(torch.tensor([0]), here()),
    "a device index of a host tensor": lambda: HOST[torch.tensor([0], device="sim")],
    "a CPU generator": lambda: torch.rand(3, device="sim", generator=torch.Generator()),
    "a CPU generator in multinomial": lambda: here().softmax(-1).multinomial(1, generator=torch.Generator()),
    "a device generator for the host": lambda: torch.rand(3, generator=torch.Generator("sim")),
    "numpy": lambda: here().numpy(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_gpu_refuses_is_refused(case: str) -> None:
    with pytest.raises((RuntimeError, TypeError)):
        REFUSED[case]()


def test_what_a_gpu_takes_from_the_host_is_taken() -> None:
    assert torch.equal((here() * torch.tensor(2.0)).cpu(), HOST * 2)  # a scalar
    assert torch.equal(here()[torch.tensor([2, 0])].cpu(), HOST[[2, 0]])  # an index
    assert torch.equal(torch.where(here() > 3, here(), 0.0).cpu(), torch.where(HOST > 3, HOST, 0.0))


def test_values_are_those_of_the_cpu_and_stay_on_their_device() -> None:
    for index in range(pretend_device.DEVICES):
        place = torch.device("sim", index)
        x = HOST.to(place)
        found = [
            x @ x.T,
            x.sort(descending=True).indices,
            x.nonzero(),
            x.T.contiguous(),
            copy.deepcopy(x),
            x.half(),
        ]
        wanted = [
            HOST @ HOST.T,
            HOST.sort(descending=True).indices,
            HOST.nonzero(),
            HOST.T,
            HOST,
            HOST.half(),
        ]
        for ours, theirs in zip(found, wanted):
            assert ours.device == place
            assert torch.equal(ours.cpu(), theirs)


def test_operators_in_place_write_through_views() -> None:
    found = []
    for place in ("cpu", "sim"):
        x = HOST.clone().to(place)
        x[:, 1:3].index_put_((torch.tensor([0, 2], device=place),), torch.full((), -1.0, device=place))
        x[torch.tensor([1], device=place), 1:] = x[torch.tensor([2], device=place), :3]
        x.T[3].add_(5)
        found.append(x.cpu())
    assert torch.equal(*found)


def test_gradients_flow() -> None:
    grads = []
    for place in ("cpu", "sim"):
        w = (HOST / 10).to(place).requires_grad_()
        (w @ w.T).tanh().sum().backward()
        grads.append(w.grad.cpu())
    torch.testing.assert_close(grads[1], grads[0])


def test_seeds_give_the_numbers_of_the_cpu() -> None:
    drawn = [
        torch.rand(2, 4, device=d, generator=torch.Generator(d).manual_seed(3)).cpu() for d in ("cpu", "sim")
    ]
    assert torch.equal(*drawn)
    generator = torch.Generator("sim").manual_seed(3)
    rows = torch.stack([torch.rand(4, device="sim", generator=generator) for _ in range(2)])
    assert torch.equal(rows.cpu(), drawn[0])  # the state moves on


def test_a_device_draw_leaves_the_generator_of_the_cpu_alone() -> None:
    torch.manual_seed(1)
    first = torch.rand(4)
    torch.manual_seed(1)
    on_device = torch.rand(4, device="sim")
    assert torch.equal(on_device.cpu(), first)
    assert torch.equal(torch.rand(4), first)


def test_storages_are_saved_and_loaded() -> None:
    file = io.BytesIO()
    torch.save(here(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True).cpu(), HOST)
