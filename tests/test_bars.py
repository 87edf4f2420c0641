"""Bars: how far long work has come, where somebody watches; short work and files stay clean."""
import contextlib
import io
import itertools

import pytest
import tqdm

import sod_mini as sod
from conftest import play, small


class Terminal(io.StringIO):
    def isatty(self):
        return True

    def reconfigure(self, **options):
        pass


@pytest.fixture
def seconds(monkeypatch):
    """A function: seconds(s) makes s seconds pass whenever a bar looks at the clock."""
    def pass_by(s):
        clock = itertools.count(0, s)
        monkeypatch.setattr(tqdm.std, "time", lambda: float(next(clock)))
    return pass_by


def shown(work, screen=Terminal):
    """What a bar has written while work() went on."""
    with contextlib.redirect_stderr(screen()) as err:
        work()
    return err.getvalue()


def passes():
    assert list(sod.with_bar(iter([[2], [0, 1]]), [1000, 1000, 3000])) == [[2], [0, 1]]


def test_a_long_pass_shows_tokens_and_time_left_and_then_nothing(seconds):
    seconds(6)
    said = shown(passes)
    assert "gradient:  60%" in said and "3.00k/5.00k [" in said and "token/s]" in said
    assert said.endswith("\r") and not said.rpartition("\r")[0].rpartition("\r")[2].strip()
    with sod.torch.no_grad():
        assert "scores: " in shown(passes)


def test_short_work_and_a_file_see_no_bar(seconds):
    seconds(0.1)
    assert shown(passes) == ""
    seconds(4)
    assert shown(passes, io.StringIO) == ""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_of_several_has_a_bar(seconds, monkeypatch, rank):
    seconds(4)
    monkeypatch.setattr(sod, "RANK", rank)
    assert bool(shown(passes)) == (rank == 0)


def test_sampling_counts_the_rollouts_that_are_finished(tokenizer, seconds):
    seconds(4)
    call = sod.tools.HERMES.render("42")
    said = shown(lambda: play(tokenizer, ["\\boxed{42}"], [call, "\\boxed{42}"]))
    assert "sampling:  50%" in said and "1.00/2.00 [" in said and "sampling: 100%" in said


def test_the_bar_of_a_run_has_its_total(tmp_path, monkeypatch):
    for name in ("train", "save_run"):
        monkeypatch.setattr(sod, name, lambda *arguments: ())
    agent = sod.Agent(small(iterations=6), None, None, None, None)
    assert "0/6 [" in shown(lambda: sod.train_to_files(agent, tmp_path))
