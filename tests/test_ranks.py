"""Several processes under torchrun do what one process does; what ends one of them ends all.

Run as a script, this file is one of these processes: it does an iteration of each of CASES.
"""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import sod_mini as sod
import tools
from conftest import SMALL, WORLD, json_lines, small

CASES = {"sod": {}, "grpo": dict(method="grpo"), "full": dict(kl="full"),
         "sft": dict(method="sft", sft_batch=12), "rank 0 lost": {}}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            "--nproc_per_node"]
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


# --- One of the processes ---------------------------------------------------------------------


def iterate(case):
    """(gradient, texts, results of an evaluation, reward, loss) of an iteration."""
    config = small(prompts=6, group_size=2, num_minibatches=1, micro_batch_tokens=500,
                   max_response=100, eval_problems=3, seed=1, **CASES[case])
    agent, gradients, sample = sod.load_agent(config), [], sod.sample_rollouts
    agent.optimizer = sod.make_optimizer(agent)

    def lose_some(*args):
        """The machine fails every rollout that rank 0 of two samples."""
        rollouts = sample(*args)
        for r in rollouts[::2] if "lost" in case else []:
            r.finish_reason = "infrastructure"
        return rollouts

    def no_step(loss):
        sod.add_up_gradients(agent.optimizer.masters)
        gradients.append(torch.cat([p.grad.flatten() for p in agent.optimizer.masters]))
        return loss
    sod.sample_rollouts, agent.optimizer.step = lose_some, no_step
    m, batch = next(sod.train(agent))
    sod.sample_rollouts = sample
    texts = [[turn.text for turn in r.turns] for r in batch.rollouts] if batch else []
    correct = sod.measure(agent, agent.student).tolist() if case == "sod" else []
    return gradients[0], texts, correct, m.get("reward"), m["loss"]


def main(path):
    with sod.process_group():
        for case in CASES:
            gradient, *rest = iterate(case)  # the gradient is the same on every rank
            assert all(torch.equal(gradient, other) for other in sod.all_gather(gradient)), case
            if sod.RANK == 0:
                torch.save((gradient, *rest), Path(path) / f"{case}.pt")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes have left: a file for each case that they finished."""
    folder = tmp_path_factory.mktemp("ranks")
    return folder, subprocess.run([*TORCHRUN, "2", __file__, folder, json.dumps(SMALL)], env=QUIET,
                                  capture_output=True, text=True)


@pytest.fixture(scope="module")
def done(two_processes):
    """A function of a case to what iterate gave of it in one process, this one, and in two. Where
    the two ended early, only the cases that they did not finish fail."""
    folder, run = two_processes

    @functools.cache
    def of(case):
        assert (folder / f"{case}.pt").exists(), (
            f"two processes ended with status {run.returncode} before this case was done:\n"
            f"{run.stderr[-2000:]}")
        return iterate(case), torch.load(folder / f"{case}.pt")
    return of


# --- Claims -----------------------------------------------------------------------------------


def test_two_processes_end_with_status_0(two_processes):
    assert two_processes[1].returncode == 0, two_processes[1].stderr[-2000:]


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_several_processes_is_that_of_one(done, case):
    (one, _, _, reward, loss), (several, _, _, their_reward, their_loss) = done(case)
    assert float((one - several).norm() / one.norm()) < 1e-6 and float(one.norm()) > 0
    assert (their_reward, their_loss) == (reward, pytest.approx(loss, rel=1e-6))


def test_several_processes_sample_the_same_rollouts_in_training_and_evaluation(done):
    for case in ("sod", "rank 0 lost"):
        one, two = done(case)
        assert two[1:3] == one[1:3]
    assert done("sod")[0][1] and done("sod")[0][2]


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_shares_hold_each_item_once_and_come_back_in_order(monkeypatch, ranks):
    monkeypatch.setattr(sod, "RANKS", ranks)
    shares = []
    for rank in range(ranks):
        monkeypatch.setattr(sod, "RANK", rank)
        shares.append(sod.my_share(list(range(7))))
    monkeypatch.setattr(sod, "all_gather", lambda items: shares)
    assert sod.from_all_ranks(shares[-1]) == list(range(7))


def start(folder, ranks, *options, **streams):
    """A run of several processes, in the background."""
    return subprocess.Popen(
        [*TORCHRUN, str(ranks), ROOT / "sod_mini.py", *options, "--out", folder], cwd=ROOT,
        env=QUIET, text=True, stderr=subprocess.PIPE, **{"stdout": subprocess.DEVNULL, **streams})


def wait_for(path, seconds=120):
    until = time.time() + seconds
    while not path.exists() and time.time() < until:
        time.sleep(0.1)
    assert path.exists()


OPTIONS = ["--prompts", "6", "--num_minibatches", "1", "--group_size", "2", "--eval_data", "",
           "--show_every", "0", "--save_every", "2", "--name", "run"]


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_another_number_of_processes(tmp_path):
    run = start(tmp_path, 2, *OPTIONS, "--iterations", "99")
    wait_for(tmp_path / "run" / "saves" / "iteration-2")
    run.send_signal(signal.SIGINT)
    assert "saved" in run.communicate(timeout=60)[1]
    done = len(json_lines(tmp_path / "run" / "metrics.jsonl"))
    assert (tmp_path / "run" / "saves" / f"iteration-{done}").exists()
    shutil.copytree(tmp_path / "run", tmp_path / "alone")
    more = ["--iterations", str(done + 2), "--resume"]
    run = start(tmp_path, 3, *more, str(tmp_path / "run"))
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 0, said
    subprocess.run([sys.executable, ROOT / "sod_mini.py", *more, tmp_path / "alone"], cwd=ROOT,
                   env=QUIET, check=True, stdout=subprocess.DEVNULL)
    texts, weights = [], []
    for name in ("run", "alone"):
        rows = json_lines(tmp_path / name / "rollouts.jsonl")
        texts.append([[turn["text"] for turn in row["turns"]] for row in rows])
        weights.append(load_file(tmp_path / name / "checkpoint" / "model.safetensors"))
    assert texts[0] == texts[1]
    for name, one in weights[1].items():
        assert float((weights[0][name] - one).norm() / one.norm()) < 1e-4


@pytest.mark.slow
def test_a_killed_process_ends_the_others_within_a_minute_and_the_run_can_go_on(tmp_path):
    run = start(tmp_path, 2, *OPTIONS, "--iterations", "99")
    wait_for(tmp_path / "run" / "saves" / "iteration-2")
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    run.communicate(timeout=60)
    assert run.returncode == 1
    done = tools.numbered(tmp_path / "run" / "saves")[-1].name.rpartition("-")[2]
    subprocess.run([sys.executable, ROOT / "sod_mini.py", "--resume", tmp_path / "run",
                    "--iterations", done], cwd=ROOT, env=QUIET, check=True, capture_output=True)


@pytest.mark.slow
def test_rank_0_whose_reader_goes_away_saves_and_ends_and_so_do_the_others(tmp_path):
    run = start(tmp_path, 2, *OPTIONS, "--iterations", "99", "--save_every", "0",
                stdout=subprocess.PIPE)
    while not run.stdout.readline().startswith("iteration 2/"):
        assert run.poll() is None
    run.stdout.close()
    said = run.stderr.read()
    assert run.wait(timeout=60) == 1 and "the reader of this output has gone" in said
    assert len(list((tmp_path / "run" / "saves").glob("iteration-*"))) == 1


@pytest.mark.slow
def test_twenty_launches_in_a_row_end_with_0_and_a_page(tmp_path):
    for n in range(20):
        run = start(tmp_path, 2, *OPTIONS, "--iterations", "1", "--name", f"n{n}")
        said = run.communicate(timeout=120)[1]
        assert run.returncode == 0, (n, said[-2000:])
        assert (tmp_path / f"n{n}" / "rollouts.html").exists()


@pytest.mark.slow
def test_evaluate_py_writes_the_same_file_with_several_processes(tmp_path):
    written = []
    for ranks in (1, 3):
        begin = [*TORCHRUN, "3"] if ranks > 1 else [sys.executable]
        subprocess.run([*begin, ROOT / "evaluate.py", "--model", WORLD / "student",
                        "--k", "1", "--runs", "1", "--out", tmp_path / str(ranks)], env=QUIET,
                       cwd=ROOT, check=True, capture_output=True)
        file, = (tmp_path / str(ranks)).glob("*.jsonl")
        written.append(file.read_text())
    assert written[0] == written[1]


if __name__ == "__main__":
    SMALL.update(json.loads(sys.argv[2]))
    main(sys.argv[1])
