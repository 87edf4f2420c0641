"""Iterations that survive: faults are injected at every stage, and the outcome is looked at."""
import json
import math
import sys
import threading
import weakref
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sod_mini as sod
import tools

WORLD = ROOT / "data" / "world"
SMALL = dict(student=str(WORLD / "student"), teacher=str(WORLD / "teacher"), eval_data="",
             demonstrations="shown.jsonl", train_data="few.jsonl", prompts=2, group_size=3,
             iterations=2, max_response=100, sft_epochs=1, sft_batch=6, lr=1e-3)
GPU_SAYS = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    for name, source in (("few", "train"), ("shown", "demonstrations")):
        few = (WORLD / f"{source}.jsonl").read_text().splitlines()[:12]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(few))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sod, "page_of", lambda run: "not wanted")
    return tmp_path


def agent_of(**changes):
    return sod.load_agent(sod.Config(**{**SMALL, **changes}))


def trained(agent):
    """(rows, weights in one vector) of a run."""
    return [m for m, _ in sod.train(agent)], weights(agent)


def weights(agent):
    return torch.cat([p.detach().flatten().clone() for p in agent.student.parameters()])


def command(**options):
    options = {**SMALL, "preset": "world", "show_every": 0, "name": "a", **options}
    return sod.main([str(word) for k, v in options.items() for word in (f"--{k}", v)])


# --- Out of memory ------------------------------------------------------------------------------


def fails_when(patch, seam, too_much, error=GPU_SAYS):
    """Let sod.`seam` fail whenever too_much(its arguments); the list of times it did."""
    real, failures = getattr(sod, seam), []

    def short_of_memory(*arguments):
        if too_much(*arguments):
            failures.append(1)
            raise error
        return real(*arguments)
    patch.setattr(sod, seam, short_of_memory)
    return failures


WANT = {  # seam, when it is too much, option that is halved
    "sampling": ("end_turn", lambda agent, *_: agent.config.rollout_batch > 2, "rollout_batch"),
    "scoring": ("hidden_states", lambda model, ids: not torch.is_grad_enabled()
                and ids.numel() > 500, "micro_batch_tokens"),
    "update": ("hidden_states", lambda model, ids: torch.is_grad_enabled() and ids.numel() > 300,
               "micro_batch_tokens"),
}


@pytest.mark.parametrize("engine, want", [("generate", want) for want in WANT] +
                         [(engine, "sampling") for engine in sod.ENGINES if engine != "generate"])
def test_out_of_memory_halves_the_batch_and_does_the_same_work_again(monkeypatch, engine, want):
    plain, w = trained(agent_of(rollout_engine=engine))
    seam, too_much, option = WANT[want]
    failures = fails_when(monkeypatch, seam, too_much)
    agent = agent_of(rollout_engine=engine)
    asked = getattr(agent.config, option)
    rows, mine = trained(agent)
    assert failures and agent.halvings == len(failures) and getattr(agent.config, option) < asked
    for row, other in zip(rows, plain, strict=True):
        assert all(row[k] == other[k] for k in ("reward", "tokens", "outcomes"))
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    torch.testing.assert_close(mine, w, atol=2e-5, rtol=1e-3)
    assert f"times out of memory so far: rollout_batch {agent.config.rollout_batch}" in (
        sod.progress_line(rows[-1], agent.config))




def gradient_norm(agent):
    """Of the gradient that waits in the optimiser, which then forgets it."""
    grads = [p.grad for p in agent.optimizer.masters if p.grad is not None]
    norm = float(torch.stack([g.norm() for g in grads]).norm())
    agent.optimizer.adamw.zero_grad()
    return norm


def test_a_second_update_that_runs_out_of_memory_does_not_repeat_the_first(monkeypatch):
    _, w = trained(agent_of(iterations=1))
    calls = iter(range(1, 100))
    failures = fails_when(monkeypatch, "micro_batches", lambda *_: torch.is_grad_enabled()
                          and next(calls) == 2)
    agent = agent_of(iterations=1)
    _, mine = trained(agent)
    assert len(failures) == 1 and agent.optimizer.updates == 2
    torch.testing.assert_close(mine, w, atol=2e-5, rtol=1e-3)


def test_what_a_failed_attempt_held_is_let_go_before_the_next():
    agent, held = agent_of(method="grpo", rollout_batch=256), []

    @sod.phase("rollout_batch", lambda: (1, 100))
    def work(agent):
        big = torch.zeros(10)
        held.append(weakref.ref(big))
        assert all(attempt() is None for attempt in held[:-1])
        if len(held) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return agent.config.rollout_batch
    assert work(agent) == 25 and agent.seconds["work"] > 0






# --- Numbers that are not finite ----------------------------------------------------------------


def spoil(patch, who, value, iterations=(1,)):
    """Let a score by student or teacher hold `value` in rollout 4, in the given iterations."""
    real, calls = sod.score, {"student": 0, "teacher": 0}

    def spoilt(agent, model, batch):
        logp, entropy = real(agent, model, batch)
        side = "student" if model is agent.student else "teacher"
        calls[side] += 1
        if side == who and calls[side] in iterations:
            logp[4, (batch.step_id[4] >= 0).nonzero()[3]] = value
        return logp, entropy
    patch.setattr(sod, "score", spoilt)


@pytest.mark.parametrize("who, value", [("teacher", math.nan), ("teacher", -math.inf),
                                        ("student", math.nan)])
def test_scores_that_are_not_finite_move_no_weight(folder, monkeypatch, capsys, who, value):
    spoil(monkeypatch, who, value, iterations=(2,))
    assert command(iterations=3, updates=1) == 0
    rows, rollouts = ([json.loads(line, parse_constant=lambda word: pytest.fail(f"{word}, no JSON"))
                       for line in (folder / f"runs/a/{name}.jsonl").read_text().splitlines()]
                      for name in ("metrics", "rollouts"))
    assert [row["not_taken"] for row in rows] == [0, 1, 0] and rows[1]["loss"] is None
    assert "| 1 updates not taken" in capsys.readouterr().out and len(rollouts) == 18


def test_an_update_not_taken_leaves_weights_and_moments_and_the_others_go_on(monkeypatch):
    spoil(monkeypatch, "teacher", -math.inf, iterations=(1, 2))
    agent = agent_of(updates=1, iterations=3)
    before, iterations = weights(agent), sod.train(agent)
    next(iterations), next(iterations)
    assert torch.equal(weights(agent), before) and agent.optimizer.updates == 0
    assert not agent.optimizer.adamw.state
    next(iterations)
    assert not torch.equal(weights(agent), before) and agent.optimizer.updates == 1
    agent = agent_of(updates=2, iterations=1)  # rollout 4 is in the second update
    spoil(monkeypatch, "teacher", math.nan)
    (row, _), = sod.train(agent)
    assert row["not_taken"] == 1 and agent.optimizer.updates == 1



def test_after_three_in_a_row_the_run_stops_with_a_diagnosis(folder, monkeypatch, capsys):
    spoil(monkeypatch, "teacher", math.nan, iterations=(1, 3, 4, 5))
    assert command(iterations=9) == 1
    assert "error: 3 iterations in a row had updates that could not be taken" in (
        capsys.readouterr().err)
    assert len((folder / "runs/a/metrics.jsonl").read_text().splitlines()) == 5


def test_imitation_stops_too(monkeypatch, capsys):
    monkeypatch.setattr(sod, "backpropagate", lambda *_: (math.nan, 0.0))
    assert command(method="sft", sft_epochs=3) == 1
    assert "3 iterations in a row had updates that could" in capsys.readouterr().err


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
        seen = self.tool.run(codes, stdins, raw)
        return [FAILED if self.fails_now() else one for one in seen]


@pytest.mark.parametrize("engine", sod.ENGINES)
@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_nothing_is_learnt_from_a_rollout_that_the_machine_failed(engine, kl):
    agent = agent_of(iterations=1, rollout_engine=engine, silent_rate=0.0, kl=kl, updates=1)
    agent.tool = Broken(agent.tool, lambda n: n == 2)
    (row, batch), = sod.train(agent)
    lost = [i for i, r in enumerate(batch.rollouts) if r.finish == "infrastructure"]
    kept = [i for i in range(6) if i not in lost]
    assert lost and row["infrastructure"] == len(lost) and batch.reward[lost].isnan().all()
    assert batch.A[lost].eq(0).all() and batch.advantages[lost].eq(0).all()
    assert f"{len(lost)} rollouts lost to the machine" in sod.progress_line(row, agent.config)
    assert "sandbox_error" not in row["outcomes"]
    rollouts = [batch.rollouts[i] for i in kept]
    assert row["reward"] == pytest.approx(sum(r.reward for r in rollouts) / len(rollouts))
    assert row["tokens"] == sum(k >= 0 for r in rollouts for k in r.step_id)
    # The gradient is that of the batch without it.
    agent.config.micro_batch_tokens = 1  # one rollout at a time
    norms = []
    for rows in (range(6), kept):
        sod.backpropagate(agent, batch.rows(list(rows)))
        norms.append(gradient_norm(agent))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4) and norms[0] > 0


def test_where_the_machine_fails_every_rollout_the_run_stops_and_can_go_on(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(tools.PythonTool, "submit", lambda *_: tools.finished(FAILED))
        patch.setattr(sod, "end_turn", lambda agent, r, ends: tools.ToolCall("1"))
        assert command(silent_rate=0, method="opd", iterations=1) == 1
    said = capsys.readouterr().err
    assert "error: the sandbox failed a program of every rollout" in said
    assert sod.main(["--resume", "a"]) == 0


def test_a_program_that_could_not_be_judged_is_the_machines_fault():
    problem = tools.Problem("q", "", kind="program",
                            tests=[{"input": "", "output": "3", "type": "stdin"}])
    with tools.PythonTool(workers=1, modules=()) as real:
        for broken, finish, reason in ((True, "infrastructure", "failed tests: sandbox_error"),
                                       (False, "answer", "right")):
            r = sod.Rollout(problem, [1, 2], [sod.Turn([0], "```python\nprint(3)\n```")],
                            finish="answer")
            sod.grade_rollout(r, Broken(real, lambda n: broken), sod.Config(**SMALL))
            assert (r.finish, r.reason) == (finish, reason)


def test_a_tool_that_dies_in_the_middle_of_a_batch_costs_nothing(monkeypatch):
    """Workers are killed while programs run: these run again, and all is as before."""
    (plain,), w = trained(agent_of(iterations=1, silent_rate=0.0))
    agent = agent_of(iterations=1, silent_rate=0.0)
    real, begun = tools.Worker.ask, threading.Event()

    def ask(worker, request):
        if not begun.is_set():
            begun.set()
            for one in list(agent.tool._workers):
                one.process.kill()
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
