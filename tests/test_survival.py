"""Steps that survive: faults are injected at every stage, and what comes out is held to account."""
import dataclasses
import json
import math
import os
import signal
import sys
import threading
import time
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
             demonstrations="shown.jsonl", train_data="few.jsonl", prompts_per_step=2,
             group_size=3, steps=2, max_response=150, sft_epochs=1, sft_batch=6, lr=1e-3)
GPU_SAYS = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    for name, source in (("few", "train"), ("shown", "demonstrations")):
        few = (WORLD / f"{source}.jsonl").read_text().splitlines()[:12]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(few))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**changes):
    return sod.Config(**{**SMALL, **changes})


def trained(c, agent=None):
    """(rows, agent, its weights in one vector) of a run."""
    agent = agent or sod.load_agent(c)
    rows = list(sod.train(c, agent))
    return rows, agent, weights(agent)


def weights(agent):
    return torch.cat([p.detach().flatten().clone() for p in agent.student.parameters()])


def command(**options):
    options = {**SMALL, "preset": "world", "show_every": 0, "page": "false", **options}
    return sod.main([str(word) for name, value in options.items()
                     for word in (f"--{name}", value)])


# --- Out of memory ------------------------------------------------------------------------------


def fails_when(monkeypatch, seam, too_much, error=GPU_SAYS):
    """Let sod.`seam` fail whenever too_much(its arguments); the list of times it did."""
    real, failures = getattr(sod, seam), []

    def short_of_memory(*arguments, **options):
        if too_much(*arguments):
            failures.append(1)
            raise error
        return real(*arguments, **options)
    monkeypatch.setattr(sod, seam, short_of_memory)
    return failures


STAGES = {  # seam, when it is too much, option that is lowered
    "slots": ("Slots", lambda model, size: size > 2, "rollout_batch"),
    "rollout": ("sample_turns", lambda model, tok, rollouts, *rest: len(rollouts) > 2,
                "rollout_batch"),
    "scoring": ("hidden_states", lambda model, ids: not model.training and ids.numel() > 500
                and not torch.is_grad_enabled(), "micro_batch_tokens"),
    "update": ("hidden_states", lambda model, ids: torch.is_grad_enabled() and ids.numel() > 300,
               "micro_batch_tokens"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_halves_the_batch_and_does_the_same_step_again(monkeypatch, stage):
    c = config(rollout_engine="slots" if stage == "slots" else "generate")
    plain, _, w = trained(c)
    seam, too_much, option = STAGES[stage]
    failures = fails_when(monkeypatch, seam, too_much)
    rows, agent, mine = trained(c)
    assert failures and list(agent.smaller) == [option]
    assert agent.smaller[option] < getattr(c, option) and agent.shortages == len(failures)
    for key in ("reward", "tokens", "outcomes"):
        assert [r[key] for r in rows] == [r[key] for r in plain]
    for row, other in zip(rows, plain):
        assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    torch.testing.assert_close(mine, w, atol=2e-5, rtol=1e-3)
    line = sod.progress_line(rows[0], c)
    assert f"{len(failures)} times out of memory: {option} {agent.smaller[option]}" in line


def test_the_new_size_is_remembered_so_that_the_next_step_does_not_fail_first(monkeypatch):
    seam, too_much, option = STAGES["update"]
    failures = fails_when(monkeypatch, seam, too_much)
    c = config(steps=1)
    agent = sod.load_agent(c)
    list(sod.train(c, agent))
    before = len(failures)
    assert before
    list(sod.train(dataclasses.replace(c, steps=2), agent))
    assert agent.step == 2 and len(failures) <= before + 1  # responses may have grown


def test_out_of_memory_within_backward_leaves_no_gradient_behind(monkeypatch):
    c = config(steps=1)
    agent = sod.load_agent(c)
    problems = tools.load_problems(c.train_data)[:2]
    prompts = [p for p in sod.fitting_prompts(agent, problems)[0] for _ in range(3)]
    rollouts = sod.sample_rollouts(agent.student, agent.tokenizer, prompts, agent.tool, c,
                                   sod.random_numbers(0, "rollouts", 1))
    scored = sod.score_batch(agent, rollouts, c)
    agent.optimizer = sod.new_optimizer(agent, c)
    norms, rows = [], list(range(6))
    monkeypatch.setattr(agent.optimizer, "step",
                        lambda scale: norms.append(float(torch.stack(
                            [g.norm() for g in agent.optimizer.grads]).norm())) or 1.0)
    sod.update(agent, scored, rows, c)
    agent.optimizer.clear()
    real, calls = agent.optimizer._collect, iter(range(10**6))

    def short_of_memory(i, p):  # in the middle of the second micro-batch
        if next(calls) == 45:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: "
                               "can't allocate memory: you tried to allocate 9 bytes.")
        real(i, p)
    for i, p in enumerate(agent.optimizer.weights):
        p._post_accumulate_grad_hooks.clear()
        p.register_post_accumulate_grad_hook(lambda p, i=i: short_of_memory(i, p))
    tokens = max(len(r.ids) for r in rollouts) * 2
    sod.update(agent, scored, rows, dataclasses.replace(c, micro_batch_tokens=tokens))
    assert agent.shortages == 1 and norms[1] == pytest.approx(norms[0], rel=1e-4)


def test_a_second_update_that_runs_out_of_memory_does_not_repeat_the_first(monkeypatch):
    c = config(steps=1)
    _, plain, w = trained(c)
    real, seen = sod.gradient, []

    def second_is_short(agent, scored, rows, *rest):
        seen.append(rows)
        if len(seen) == 2:
            raise GPU_SAYS
        return real(agent, scored, rows, *rest)
    monkeypatch.setattr(sod, "gradient", second_is_short)
    _, agent, mine = trained(c)
    assert seen == [[0, 1, 2], [3, 4, 5], [3, 4, 5]] and agent.optimizer.taken == 2
    torch.testing.assert_close(mine, w, atol=2e-5, rtol=1e-3)


def test_what_a_failed_attempt_held_is_let_go_before_the_next():
    agent, held = sod.load_agent(config(method="grpo")), []

    def work(c):
        big = torch.zeros(10)
        held.append(weakref.ref(big))
        assert all(attempt() is None for attempt in held[:-1])
        if len(held) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return c.rollout_batch
    assert sod.surviving(agent, config(), "rollout_batch", [1] * 100, work) == 25


def test_with_one_rollout_at_a_time_it_stops_and_says_what_to_turn_down(monkeypatch, capsys):
    fails_when(monkeypatch, "hidden_states", lambda model, ids: torch.is_grad_enabled())
    assert command(name="a") == 1
    said = capsys.readouterr().err
    assert "error: out of memory with one rollout at a time; lower --max_response" in said


def test_real_errors_of_memory_are_known_and_others_are_not_taken_for_one():
    with pytest.raises(RuntimeError) as stop:
        torch.empty(1 << 60)
    assert sod.out_of_memory(stop.value) and sod.out_of_memory(MemoryError())
    assert not sod.out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_other_errors_are_not_tried_again(monkeypatch):
    failures = fails_when(monkeypatch, "hidden_states", lambda *_: True, RuntimeError("other"))
    with pytest.raises(RuntimeError, match="other"):
        trained(config())
    assert len(failures) == 1


def test_imitation_survives_too(monkeypatch):
    c = config(method="sft")
    _, _, w = trained(c)
    failures = fails_when(monkeypatch, "hidden_states", lambda model, ids: ids.numel() > 1000)
    rows, agent, mine = trained(c)
    assert failures and rows[0]["out_of_memory"] >= 1
    torch.testing.assert_close(mine, w, atol=2e-5, rtol=1e-3)


# --- Numbers that are not finite ----------------------------------------------------------------


def spoil(monkeypatch, who, value, steps=(1,)):
    """Let the scores of student or teacher hold `value` in the given steps."""
    real, step = sod.score_batch, iter(range(1, 100))

    def spoilt(agent, rollouts, c):
        scored = real(agent, rollouts, c)
        if next(step) in steps:
            first = (scored.step_id[4] >= 0).nonzero()[3]
            getattr(scored, who)[4, first] = value
            sod.weigh(scored, slice(None), c)
        return scored
    monkeypatch.setattr(sod, "score_batch", spoilt)


@pytest.mark.parametrize("who, value", [("logp_t", math.nan), ("logp_t", -math.inf),
                                        ("logp_s", math.nan)])
def test_scores_that_are_not_finite_move_no_weight_and_are_written_aside(folder, monkeypatch,
                                                                         capsys, who, value):
    spoil(monkeypatch, who, value, steps=(2,))
    assert command(name="a", steps=3) == 0
    rows = [json.loads(line) for line in (folder / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert [row["not_taken"] for row in rows] == [0, 2, 0] and rows[1]["loss"] is None
    assert "| 2 not taken" in capsys.readouterr().out
    (aside,) = (folder / "runs/a/refused").iterdir()
    batch = torch.load(aside, weights_only=True)
    name = {"logp_s": "student", "logp_t": "teacher"}[who]
    assert aside.name == "step-2.pt" and len(batch["ids"]) == 6
    assert f"the {name}'s log-probability of token" in batch["fault"]
    assert f"of rollout 4 (its turn 1) is {value}" in batch["fault"]
    assert not batch[who][4].isfinite().all() and batch[who][:4].isfinite().all()
    for line in (folder / "runs/a/rollouts.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_step_not_taken_leaves_the_weights_and_the_next_one_as_they_were(monkeypatch):
    spoil(monkeypatch, "logp_t", -math.inf)
    c = config(steps=1)
    agent = sod.load_agent(c)
    before = weights(agent)
    list(sod.train(c, agent))
    assert torch.equal(weights(agent), before) and agent.optimizer.taken == 0
    assert agent.refused == 1
    list(sod.train(dataclasses.replace(c, steps=2), agent))
    assert not torch.equal(weights(agent), before) and agent.refused == 0


@pytest.mark.parametrize("seam, name", [("loss", "loss"), ("gradient", "norm of the gradient")])
def test_a_loss_or_gradient_that_is_not_finite_is_not_taken(monkeypatch, seam, name):
    real = sod.batch_loss

    def spoilt(*arguments):
        loss, clipped = real(*arguments)
        if seam == "loss":
            return loss + math.inf, clipped  # the gradient of a constant is 0: only the loss is bad
        loss.register_hook(lambda grad: grad * math.nan)
        return loss, clipped
    monkeypatch.setattr(sod, "batch_loss", spoilt)
    c = config(steps=1)
    agent = sod.load_agent(c)
    before = weights(agent)
    (row,) = sod.train(c, agent)
    assert torch.equal(weights(agent), before) and row["not_taken"] == 2
    assert f"the {name} is" in agent.aside["fault"]


def test_after_a_few_in_a_row_the_run_stops_with_a_diagnosis(folder, monkeypatch, capsys):
    spoil(monkeypatch, "logp_t", math.nan, steps=(1, 3, 4, 5))
    assert command(name="a", steps=9, max_refused=3) == 1
    said = capsys.readouterr().err
    assert "error: 3 steps in a row could not be taken; in the last one the teacher's" in said
    assert len((folder / "runs/a/metrics.jsonl").read_text().splitlines()) == 5
    assert len(list((folder / "runs/a/refused").iterdir())) == 4


def test_imitation_refuses_and_stops_too(folder, monkeypatch, capsys):
    monkeypatch.setattr(sod, "imitation_gradient", lambda *_: math.nan)
    assert command(name="a", method="sft", max_refused=2) == 1
    assert "2 steps in a row could not be taken; in the last one the loss is nan" in (
        capsys.readouterr().err)
    batch = torch.load(folder / "runs/a/refused/step-1.pt", weights_only=True)
    assert len(batch["ids"]) == len(batch["step_id"]) == 6


# --- The machine's faults -----------------------------------------------------------------------


def test_a_rollout_that_the_machine_failed_is_not_in_its_group():
    rewards = torch.tensor([1.0, -1.0, 5.0, -1.0, 1.0, 9.0, -7.0, 3.0, 2.0, 2.0, 2.0, 9.0])
    valid = torch.tensor([1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0]).bool()
    A = sod.group_advantages(rewards, 4, valid)
    # First group: 1, -1, -1 have mean -1/3 and std sqrt(4/3); 5 is not in it.
    std = math.sqrt(4 / 3)
    assert A[:4].tolist() == pytest.approx([4 / 3 / std, -2 / 3 / std, 0, -2 / 3 / std], rel=1e-5)
    assert A[4:8].tolist() == [0, 0, 0, 0]   # one valid rollout has no one to compare with
    assert A[8:].tolist() == [0, 0, 0, 0]    # the valid ones agree
    assert sod.group_advantages(rewards, 4, torch.zeros(12, dtype=bool)).eq(0).all()
    everyone = sod.group_advantages(rewards, 4, torch.ones(12, dtype=bool))
    assert torch.equal(everyone, sod.group_advantages(rewards, 4))


class Broken:
    """The real tool, but the machine fails the programs of some calls."""

    def __init__(self, tool, fails):
        self.tool, self.fails, self.calls = tool, fails, 0

    def run(self, codes, stdins=None, raw=False):
        seen = self.tool.run(codes, stdins, raw)
        for i in range(len(seen)):
            self.calls += 1
            if self.fails(self.calls):
                seen[i] = tools.Observation("[the sandbox failed]", "sandbox_error", 0.0)
        return seen


@pytest.mark.parametrize("engine", ["generate", "slots"])
@pytest.mark.parametrize("kl", ["sampled", "full"])
def test_nothing_is_learnt_from_a_rollout_that_the_machine_failed(engine, kl):
    c = config(steps=1, rollout_engine=engine, silent_rate=0.0, kl=kl, updates_per_step=1)
    agent = sod.load_agent(c)
    agent.tool = Broken(agent.tool, lambda n: n == 2)
    (row,) = sod.train(c, agent)
    scored = agent.scored
    lost = [i for i, r in enumerate(scored.rollouts) if r.finish == "infrastructure"]
    assert lost and row["infrastructure"] == len(lost) and not (
        sod.valid_rows(scored.rollouts)[lost].any())
    assert scored.A[lost].eq(0).all() and scored.advantages[lost].eq(0).all()
    assert "sandbox_error" not in row["outcomes"]
    assert "lost to infrastructure" in sod.progress_line(row, c)
    kept = [r for r in scored.rollouts if r.finish != "infrastructure"]
    assert row["reward"] == pytest.approx(sum(r.reward for r in kept) / len(kept))
    assert row["tokens"] == sum(k >= 0 for r in kept for k in r.step_id)
    # The gradient is that of the batch without it.
    assert gradient_of(agent, c, range(6)) == pytest.approx(
        gradient_of(agent, c, [i for i in range(6) if i not in lost]), rel=1e-4)


def gradient_of(agent, c, rows):
    agent.optimizer.clear()
    rows = list(rows)
    tokens = int((agent.scored.step_id[rows] >= 0).sum())
    sod.gradient(agent, agent.scored, rows, [len(agent.scored.rollouts[i].ids) for i in rows],
                 tokens, dataclasses.replace(c, micro_batch_tokens=1))  # one rollout at a time
    return float(torch.stack([g.norm() for g in agent.optimizer.grads]).norm())


def test_where_the_machine_fails_every_rollout_the_run_stops_and_can_go_on(folder, monkeypatch,
                                                                           capsys):
    with monkeypatch.context() as patch:
        real = tools.PythonTool.run
        patch.setattr(tools.PythonTool, "run", lambda tool, codes, *rest: [
            tools.Observation("", "sandbox_error", 0.0) for _ in codes]
            if codes not in (["1"], ["print(1 + 1)"]) else real(tool, codes))  # those of preflight
        assert command(name="a", silent_rate=0, method="opd", steps=1) == 1
    assert "the sandbox failed a program of every rollout" in capsys.readouterr().err
    assert sod.main(["--resume", "a"]) == 0


def test_a_program_that_could_not_be_judged_is_the_machines_fault():
    problem = tools.Problem("q", "", kind="program",
                            tests=[{"input": "", "output": "3", "type": "stdin"}])
    with tools.PythonTool(workers=1, modules=()) as real:
        for broken, finish, reason in ((True, "infrastructure", "failed tests: sandbox_error"),
                                       (False, "answer", "right")):
            r = sod.Rollout(problem, [1, 2], [-1, 0], 1, turns=["```python\nprint(3)\n```"],
                            outcomes=[""], finish="answer")
            sod.grade_rollouts([r], Broken(real, lambda n: broken), sod.Config())
            assert (r.finish, r.reason) == (finish, reason)


def test_a_tool_that_dies_in_the_middle_of_a_batch_costs_nothing():
    """Zygote and workers are killed while programs run: these run again, and all is as before."""
    c = config(steps=1, silent_rate=0.0)
    (plain,), _, w = trained(c)
    agent = sod.load_agent(c)
    real, begun = agent.tool._ask, threading.Event()

    def ask(request):
        if not begun.is_set():
            begun.set()
            os.kill(agent.tool._zygote.process.pid, signal.SIGKILL)  # its workers die with it
            time.sleep(0.2)
        return real(request)
    agent.tool._ask = ask
    (row,), _, mine = trained(c, agent)
    assert row["tool_retries"] >= 1 and row["infrastructure"] == 0
    assert row["outcomes"] == plain["outcomes"] and torch.equal(mine, w)


def test_a_call_that_the_machine_failed_is_tried_four_times_with_pauses(monkeypatch):
    pauses, calls = [], []
    with tools.PythonTool(workers=1, modules=()) as tool:
        tool.run(["1"])

        def ask(request):
            calls.append(1)
            raise ConnectionResetError
        with monkeypatch.context() as patch:
            patch.setattr(tools.time, "sleep", pauses.append)
            patch.setattr(tool, "_ask", ask)
            assert tool.run(["1"])[0].outcome == "sandbox_error"
    assert len(calls) == 4 and pauses == [0, 1, 4] and tool.retried == 3
