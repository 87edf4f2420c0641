"""Iterations that survive: faults are injected at every stage, and the outcome is looked at."""
import math
import threading
import weakref

import pytest
import torch

import sod_mini as sod
import tools
from conftest import SMALL, command, gradient, json_lines

FEW = dict(SMALL, eval_data="", demonstrations="shown.jsonl", train_data="few.jsonl", prompts=2,
           max_response=100, sft_epochs=1, sft_batch=6)
RUN = dict(FEW, preset="world", show_every=0, name="a")


@pytest.fixture(autouse=True)
def folder(dozen, monkeypatch):
    monkeypatch.chdir(dozen)
    return dozen


def agent_of(**changes):
    return sod.load_agent(sod.Config(**{**FEW, **changes}))


def trained(agent):
    """(rows, weights in one vector) of a run."""
    return [m for m, _ in sod.train(agent)], weights(agent)


def weights(agent):
    return torch.cat([p.detach().flatten().clone() for p in agent.student.parameters()])


# --- Out of memory ------------------------------------------------------------------------------


def test_a_second_update_that_runs_out_of_memory_does_not_repeat_the_first(monkeypatch):
    _, plain = trained(agent_of(iterations=1))
    real, calls = sod.micro_batches, []

    def fails_once(*arguments):
        calls.extend([1] * torch.is_grad_enabled())
        if torch.is_grad_enabled() and len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real(*arguments)
    monkeypatch.setattr(sod, "micro_batches", fails_once)
    agent = agent_of(iterations=1)
    (row,), mine = trained(agent)
    assert agent.optimizer.updates == 2 and agent.halvings == 1
    torch.testing.assert_close(mine, plain, atol=2e-5, rtol=1e-3)
    assert "1 times out of memory so far: rollout_batch " in sod.progress_line(row, agent.config)


def test_what_a_failed_attempt_held_is_let_go_before_the_next():
    agent, held = agent_of(method="grpo", rollout_batch=256), []

    def work(size):
        big = torch.zeros(10)
        held.append(weakref.ref(big))
        assert all(attempt() is None for attempt in held[:-1])
        if len(held) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return size
    assert sod.retry_on_oom(agent, "rollout_batch", work, least=1, most=100) == 25
    assert agent.sizes == {"rollout_batch": 25} and agent.config.rollout_batch == 256
    assert any(seconds > 0 for seconds in agent.seconds.values())


# --- Numbers that are not finite ----------------------------------------------------------------


def spoil(patch, who, value, iterations=(1,)):
    """Let a score by student or teacher hold `value` in rollout 4, in the given iterations."""
    real, calls = sod.score, {"student": 0, "teacher": 0}

    def spoilt(agent, model, batch):
        logp, entropy = real(agent, model, batch)
        side = "student" if model is agent.student else "teacher"
        calls[side] += 1
        if side == who and calls[side] in iterations:
            logp[4, (batch.step_id[4] > 0).nonzero()[3]] = value
        return logp, entropy
    patch.setattr(sod, "score", spoilt)


@pytest.mark.parametrize("who, value", [("teacher", math.nan), ("teacher", -math.inf),
                                        ("student", math.nan)])
def test_scores_that_are_not_finite_move_no_weight(folder, monkeypatch, capsys, who, value):
    spoil(monkeypatch, who, value, iterations=(2,))
    assert command({**RUN, "iterations": 3, "num_minibatches": 1}) == 0
    rows, rollouts = (json_lines(folder / f"runs/a/{name}.jsonl")
                      for name in ("metrics", "rollouts"))
    assert [row["skipped_updates"] for row in rows] == [0, 1, 0] and rows[1]["loss"] is None
    assert "health: 1 updates were not taken" in capsys.readouterr().out and len(rollouts) == 18


@pytest.mark.parametrize("method, iterations", [("sod", 5), ("sft", 3)])
def test_after_three_in_a_row_the_run_stops_with_a_diagnosis(folder, monkeypatch, capsys, method,
                                                             iterations):
    spoil(monkeypatch, "teacher", math.nan, iterations=(1, 3, 4, 5))
    if method == "sft":
        monkeypatch.setattr(sod, "backpropagate", lambda *_: (math.nan, 0.0))
    assert command({**RUN, "method": method, "iterations": 9, "sft_epochs": 3}) == 1
    assert "error: 3 iterations in a row had updates that could not be" in capsys.readouterr().err
    assert len(json_lines(folder / "runs/a/metrics.jsonl")) == iterations


# --- The machine's faults -----------------------------------------------------------------------

FAILED = tools.Observation("[the sandbox failed]", "sandbox_error", 0.0)


class Broken:
    """The real tool, but the machine fails the n-th program where fails(n)."""

    def __init__(self, tool, fails):
        self.tool, self.fails, self.calls = tool, fails, 0

    def fails_now(self):
        self.calls += 1
        return self.fails(self.calls)

    def submit(self, call, place=()):
        return tools.finished(FAILED) if self.fails_now() else self.tool.submit(call, place)

    def run(self, codes, stdins=None, raw=False):
        return [FAILED if self.fails_now() else answer
                for answer in self.tool.run(codes, stdins, raw)]


@pytest.mark.parametrize("engine", sod.ENGINES)
@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_nothing_is_learnt_from_a_rollout_that_the_machine_failed(engine, kl):
    agent = agent_of(iterations=1, rollout_engine=engine, silent_rate=0.0, kl=kl, num_minibatches=1)
    agent.tool = Broken(agent.tool, lambda n: n == 2)
    (row, batch), = sod.train(agent)
    lost = [i for i, r in enumerate(batch.rollouts) if r.finish_reason == "infrastructure"]
    kept = [i for i in range(6) if i not in lost]
    assert lost and row["infrastructure"] == len(lost) and batch.reward[lost].isnan().all()
    assert batch.A[lost].eq(0).all() and batch.advantages[lost].eq(0).all()
    assert f"failed in {len(lost)} rollouts" in sod.health([row])["infrastructure"]
    assert "sandbox_error" not in row["outcomes"]
    rollouts = [batch.rollouts[i] for i in kept]
    assert row["reward"] == pytest.approx(sum(r.reward for r in rollouts) / len(rollouts))
    assert row["tokens"] == sum(k > 0 for r in rollouts for k in r.step_id)
    # The gradient is that of the batch without it.
    whole, without = (gradient(agent, batch.select(list(rows)), 1) for rows in (range(6), kept))
    assert whole.norm() > 0 and (whole - without).norm() < 1e-4 * whole.norm()


def test_where_the_machine_fails_every_rollout_the_run_stops_and_can_go_on(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(tools.PythonTool, "submit", lambda *_: tools.finished(FAILED))
        patch.setattr(sod, "end_turn", lambda agent, r, ends: tools.ToolCall("1"))
        assert command({**RUN, "silent_rate": 0, "method": "opd", "iterations": 1}) == 1
    said = capsys.readouterr().err
    assert "error: the sandbox failed a program of every rollout" in said
    assert command({"resume": "a"}) == 0


def test_a_program_that_could_not_be_judged_is_the_machines_fault():
    problem = tools.Problem("q", "", kind="program",
                            tests=[{"input": "", "output": "3", "type": "stdin"}])
    with tools.PythonTool(workers=1, modules=()) as real:
        for broken, finish, reason in ((True, "infrastructure", "failed tests: sandbox_error"),
                                       (False, "answer", "correct")):
            r = sod.Rollout(problem, [1, 2], [sod.Turn([0], "```python\nprint(3)\n```")],
                            finish_reason="answer")
            sod.grade_rollout(r, Broken(real, lambda n: broken), r.turns[-1].text)
            assert (r.finish_reason, r.reason) == (finish, reason)


def test_a_tool_that_dies_in_the_middle_of_a_batch_costs_nothing(monkeypatch):
    """Workers are killed while programs run: these run again, and all is as before."""
    (plain,), w = trained(agent_of(iterations=1, silent_rate=0.0))
    agent = agent_of(iterations=1, silent_rate=0.0)
    real, begun = tools.Worker.ask, threading.Event()

    def ask(worker, request):
        if not begun.is_set():
            begun.set()
            for other in list(agent.tool._workers):
                other.process.kill()
        return real(worker, request)
    monkeypatch.setattr(tools.Worker, "ask", ask)
    (row,), mine = trained(agent)
    assert row["tool_retries"] >= 1 and row["infrastructure"] == 0
    assert row["outcomes"] == plain["outcomes"] and torch.equal(mine, w)
    assert "tool calls tried again so far" in sod.progress_line(row, agent.config)


def test_a_call_that_the_machine_failed_is_tried_four_times_with_pauses(monkeypatch):
    pauses, calls = [], []

    def ask(request):
        calls.append(1)
        raise ConnectionResetError
    with tools.PythonTool(workers=1, modules=()) as tool:
        tool.run(["1"])
        with monkeypatch.context() as patch:
            patch.setattr(tools.time, "sleep", pauses.append)
            patch.setattr(tool, "_ask", ask)
            assert tool.run(["1"])[0].outcome == "sandbox_error"
    assert len(calls) == 4 and pauses == [0, 1, 4] and tool.retried == 3
