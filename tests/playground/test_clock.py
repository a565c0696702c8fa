"""What trainings against the clock share."""

import pytest
import torch
from torch import nn

from playground.clock import descend, resume, save_state


def parts():
    torch.manual_seed(0)
    model, finder = nn.Linear(2, 2), nn.Linear(2, 1)
    groups = [{"params": model.parameters()}, {"params": finder.parameters(), "rate": 3.0}]
    return {"model": model, "finder": finder}, [torch.optim.AdamW(groups)]


def step(modules, optimizers, rate=0.1):
    hidden = modules["model"](torch.ones(1, 2))
    descend(modules["finder"](hidden).square().sum(), modules["model"], optimizers, rate)


def test_a_training_that_goes_on_is_the_one_that_was_never_stopped(tmp_path):
    whole, stopped, again = parts(), parts(), parts()
    for _ in range(4):
        step(*whole)
    for _ in range(2):
        step(*stopped)
    save_state(tmp_path / "state.pt", *stopped, step=2, spent=1.5)
    assert resume(tmp_path / "state.pt", *again) == (2, 1.5)
    for _ in range(2):
        step(*again)
    for name, module in whole[0].items():
        for one, other in zip(module.parameters(), again[0][name].parameters(), strict=True):
            assert torch.equal(one, other)


def test_without_a_state_a_training_begins(tmp_path):
    assert resume(tmp_path / "state.pt", *parts()) == (0, 0.0)


def test_a_state_that_could_not_be_written_leaves_the_earlier_one(tmp_path, monkeypatch):
    file, (modules, optimizers) = tmp_path / "state.pt", parts()
    save_state(file, modules, optimizers, step=1, spent=1.0)

    def full(state, part):
        part.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError):
        save_state(file, modules, optimizers, step=2, spent=2.0)
    assert resume(file, modules, optimizers) == (1, 1.0)


def test_groups_of_parameters_go_at_their_own_rate():
    modules, optimizers = parts()
    step(modules, optimizers, rate=0.01)
    assert [group["lr"] for group in optimizers[0].param_groups] == [0.01, pytest.approx(0.03)]
