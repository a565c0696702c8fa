"""What the Trainers of both stages log."""

from types import SimpleNamespace

import torch

from llava.train.twig_plus.trainers import LoggedParts


class Written:
    """In place of a Trainer, in one of several processes."""

    def __init__(self, others=0.0):
        self.lines, self.asked = [], []

        def reduce(value, how):
            self.asked.append(value.clone())
            return value + others

        self.accelerator = SimpleNamespace(reduce=reduce)

    def log(self, logs):
        self.lines.append(logs)


class Logged(LoggedParts, Written):
    parts = ("policy", "kept")


def test_the_log_shows_means_over_steps():
    trainer = Logged()
    for policy, kept in ((1.0, 10.0), (2.0, 30.0)):
        trainer.note(
            {"loss": torch.tensor(9.0), "policy": torch.tensor(policy), "kept": torch.tensor(kept)}
        )
    trainer.log({"loss": 9.0})
    trainer.log({"train_loss": 9.0})
    assert trainer.lines == [{"loss": 9.0, "policy": 1.5, "kept": 20.0}, {"train_loss": 9.0}]


def test_a_process_whose_samples_gave_a_loss_alone_sums_up_with_the_others():
    """The others wait for it: one that asked for less would hold them up for ever."""
    others = torch.tensor([[4.0, 2.0], [0.0, 0.0]])
    trainer = Logged(others)
    trainer.note({"loss": torch.tensor(0.0)})
    trainer.log({"loss": 0.0})
    assert [own.shape for own in trainer.asked] == [(2, 2)]
    assert trainer.lines == [{"loss": 0.0, "policy": 2.0}]  # of "kept" nobody had any
