"""Several processes of one run end with a line where one of them fails or somebody stops them."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from llava.eval.answering import launch


def ends_with(monkeypatch, error):
    """The exit code, or what is said, when accelerate's launcher raises `error`."""

    def launcher():
        raise error

    monkeypatch.setattr(launch, "launch", launcher)
    with pytest.raises(SystemExit) as end:
        launch.main()
    return end.value.code


def test_a_process_that_failed_is_named_without_a_traceback(monkeypatch):
    failure = ProcessFailure(local_rank=1, pid=7, exitcode=3, error_file="")
    said = ends_with(monkeypatch, ChildFailedError("program", {1: failure}))
    assert said.startswith("error: process 1 of the run ended with exit code 3, ")


def test_a_run_that_is_stopped_says_so_and_has_the_exit_code_of_shells(monkeypatch, capsys):
    assert ends_with(monkeypatch, SignalException("got it", signal.SIGINT)) == 130
    assert capsys.readouterr().err == "stopped (SIGINT): the same command goes on\n"
