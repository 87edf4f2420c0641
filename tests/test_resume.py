"""Runs that are killed, interrupted, starved of disk: what is saved, and that they go on exactly.

A run that was interrupted at any moment must end with the same weights and the same logs, byte for
byte, as one that was left alone. Most of it happens in this process; where a real one is killed,
it is forked from one that has imported everything, since that takes longer than such a run.
"""
import contextlib
import hashlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import sod_mini as sod
import tools
from conftest import PROCESSES, WORLD, a_dozen, command, json_lines

PLACES = dict(student=WORLD / "student", teacher=WORLD / "teacher", eval_data="", preset="world",
              save_every=1, name="run")
SOD = dict(PLACES, train_data="few.jsonl", iterations=5, prompts=2, group_size=2,
           max_response=100, lr=1e-3, show_every=0)
SFT = dict(PLACES, method="sft", demonstrations="shown.jsonl", sft_epochs=2, sft_batch=4)
ALL = {"sod": SOD, "sft": SFT, "bf16": dict(SOD, dtype="bfloat16", warmup=8)}
RUN = Path("runs/run")


@pytest.fixture(autouse=True)
def folder(dozen, monkeypatch):
    monkeypatch.chdir(dozen)
    return dozen


def resume(*more):
    return command({}, "--resume", "run", *map(str, more))


def result(run):
    """Everything that a finished run leaves, but for what the clock said and its settings."""
    assert (run / "checkpoint").exists() and len(os.listdir(run / "saves")) == 1
    files = [*(run / "checkpoint").iterdir(), run / "metrics.jsonl", run / "rollouts.jsonl"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
            if file.name != "README.md"}


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """{kind: what the run leaves if nobody disturbs it}."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("undisturbed"))
        patch.setattr(sod, "write_page", lambda run, wait=True: None)
        a_dozen(Path())
        for kind, options in ALL.items():
            assert command({**options, "name": kind}) == 0
        return {kind: result(Path("runs", kind)) for kind in ALL}


def act_at(call, options, patch, act=None, seam="draw"):
    """The command, where something happens at a call of `seam`: draw begins every iteration."""
    real, calls = getattr(sod, seam), iter(range(1, 100))

    def acts(*arguments):
        if next(calls) == call:
            (act or fail)()
        return real(*arguments)
    with patch.context() as scoped:
        scoped.setattr(sod, seam, acts)
        return command(options)


def fail():
    raise tools.UserError("injected")


# --- Stopped in the middle ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALL)
def test_a_run_that_stopped_after_some_iterations_ends_as_if_left_alone(undisturbed, monkeypatch,
                                                                        kind):
    assert act_at(4, ALL[kind], monkeypatch) == 1
    assert resume() == 0 and result(RUN) == undisturbed[kind]


@pytest.mark.parametrize("changes", [
    dict(method="opsd_gt", init="random"), dict(kl="full", num_minibatches=1),
    dict(method="grpo", offload="all")])
def test_every_kind_of_state_is_taken_over(monkeypatch, changes):
    options = {**SOD, **changes, "iterations": 2}
    assert command({**options, "name": "whole"}) == 0
    act_at(2, options, monkeypatch)
    assert resume() == 0 and result(RUN) == result(Path("runs/whole"))


def test_another_teacher_under_the_same_name_is_told(folder, monkeypatch, capsys):
    shutil.copytree(WORLD / "teacher", folder / "T")
    act_at(2, {**SOD, "teacher": "T"}, monkeypatch)
    shutil.copytree(WORLD / "student", folder / "T", dirs_exist_ok=True)
    capsys.readouterr()
    assert resume() == 0
    assert capsys.readouterr().out.count("NOTE: the teacher has changed since this run was") == 1


def test_health_looks_back_upon_the_iterations_before_a_resume(monkeypatch):
    """A collapse is told where calls have halved within ten iterations."""
    act_at(3, SFT, monkeypatch)
    seen = []
    monkeypatch.setattr(sod, "news", lambda history: seen.append(
        [m["iteration"] for m in history]) or [])
    assert resume() == 0 and seen[0] == [1, 2, 3] and len(seen) > 1
    rows = [json.loads(line) for line in (RUN / "metrics.jsonl").read_text().splitlines()]
    assert sod.stored_metrics(RUN) == rows
    with (RUN / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 99, "loss": null}\n')
    assert sod.stored_metrics(RUN)[-1] == {"iteration": 99}


def test_an_error_saves_what_was_learnt_before_it(monkeypatch, capsys):
    assert act_at(4, {**SFT, "save_every": 0}, monkeypatch) == 1
    assert capsys.readouterr().err.endswith(
        f"saved {RUN}/saves/iteration-3\nto go on: python sod_mini.py --resume {RUN}\n"
        "error: injected\n")
    saved, start = (AutoModelForCausalLM.from_pretrained(path).state_dict()
                    for path in (RUN / "saves/iteration-3", WORLD / "student"))
    assert any(not torch.equal(saved[k], start[k]) for k in start)
    assert AutoTokenizer.from_pretrained(RUN / "saves/iteration-3").chat_template


def test_an_error_while_weights_move_goes_back_to_the_last_save(undisturbed, monkeypatch):
    # The 8th update is the second half of iteration 4.
    assert act_at(8, {**SOD, "save_every": 2}, monkeypatch, seam="backpropagate") == 1
    assert os.listdir(RUN / "saves") == ["iteration-2"]
    assert resume() == 0 and result(RUN) == undisturbed["sod"]


@pytest.mark.parametrize("number, kind, seam, call", [
    (signal.SIGINT, "sft", "draw", 3),
    (signal.SIGTERM, "sft", "update_metrics", 3), (signal.SIGHUP, "sod", "backpropagate", 6),
])
def test_a_request_to_stop_saves_first_and_says_how_to_go_on(undisturbed, monkeypatch, capsys,
                                                             number, kind, seam, call):
    """The iteration under way is finished first."""
    ask = lambda: os.kill(os.getpid(), number)
    assert act_at(call, {**ALL[kind], "save_every": 0}, monkeypatch, ask, seam) == 128 + number
    said = capsys.readouterr().err
    assert f"saved {RUN}/saves/iteration-3\n" in said and f"--resume {RUN}\n" in said
    assert lines(RUN / "metrics.jsonl") == 3
    assert resume() == 0 and result(RUN) == undisturbed[kind]


def test_a_run_under_nohup_outlives_its_terminal(undisturbed, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert act_at(2, SFT, monkeypatch, lambda: os.kill(os.getpid(), signal.SIGHUP)) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert result(RUN) == undisturbed["sft"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_while_loading_ends_with_a_sentence_and_leaves_nothing(
        monkeypatch, capsys, number):
    ask = lambda: os.kill(os.getpid(), number)
    assert act_at(1, SOD, monkeypatch, ask, "skeleton") == 128 + number
    said = capsys.readouterr().err
    assert said.startswith("interrupted") and "to go on" not in said and not RUN.exists()


# --- Kills --------------------------------------------------------------------------------------


def real_process(folder, options, *more):
    """What a real process does: the command, in `folder`, with its screen in a file."""
    os.chdir(folder)
    screen = os.open("screen", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(screen, 1), os.dup2(screen, 2)
    sod.write_page = lambda run, wait=True: None
    status = command(options, *more)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def strike(process, run, moments):
    """SIGKILL at a random moment: of the process, after a new line of the log, within a save."""
    kind, before = moments.choice(["any", "iteration", "save"]), lines(run / "metrics.jsonl")
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if (kind == "any" or kind == "iteration" and lines(run / "metrics.jsonl") > before
                or kind == "save" and list((run / "saves").glob("*.tmp"))):
            break
        time.sleep(0.001)
    time.sleep(moments.random() * {"any": 4, "iteration": 0.5, "save": 0.03}[kind])
    process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_a_run_killed_at_random_moments_ends_as_if_left_alone(undisturbed, folder, seed):
    kind, moments = ["sft", "sod", "bf16"][seed % 3], random.Random(seed)
    run, kills = folder / RUN, 4
    for attempt in range(kills + 1):
        began = (run / "config.json").exists()
        if not began:  # killed before its settings were on the disk: its folder holds nothing
            shutil.rmtree(run, ignore_errors=True)
        process = PROCESSES.Process(target=real_process, args=(
            folder, ALL[kind], *(["--resume", "run"] if began else [])))
        process.start()
        if attempt < kills:
            strike(process, run, moments)
        process.join(300)
    said = (folder / "screen").read_text()
    assert process.exitcode == 0, said
    assert result(run) == undisturbed[kind]


# --- Damage, lost logs, a full disk -------------------------------------------------------------


@pytest.mark.parametrize("file, harm", [
    ("state.pt", lambda path: os.truncate(path, 99)), ("config.json", lambda path: path.unlink()),
    ("model.safetensors", lambda path: os.truncate(path, 300_000)),
])
def test_a_damaged_save_is_named_and_the_one_before_it_serves(undisturbed, monkeypatch, capsys,
                                                              file, harm):
    act_at(5, SFT, monkeypatch)
    assert sorted(os.listdir(RUN / "saves")) == ["iteration-3", "iteration-4"]  # the newest two
    before = (RUN / "metrics.jsonl").read_text()
    harm(RUN / "saves/iteration-4" / file)
    capsys.readouterr()
    assert resume() == 1
    said = capsys.readouterr().err
    assert f"error: {RUN}/saves/iteration-4 cannot be taken over" in said
    assert "to go on:" not in said and "or remove that folder" in said
    assert (RUN / "metrics.jsonl").read_text() == before
    shutil.rmtree(RUN / "saves/iteration-4")
    assert resume() == 0 and f"resumed {RUN} after iteration 3" in capsys.readouterr().out
    assert result(RUN) == undisturbed["sft"]


def test_without_a_save_a_resumed_run_says_that_it_begins_anew(undisturbed, monkeypatch, capsys):
    act_at(3, SFT, monkeypatch)
    shutil.rmtree(RUN / "saves")
    assert resume() == 0
    assert f"resumed {RUN} after iteration 0" in capsys.readouterr().out
    assert result(RUN) == undisturbed["sft"]


@pytest.mark.parametrize("harm, left", [
    (lambda log: log.unlink(), [4, 5, 6]),
    (lambda log: log.write_text(log.read_text()[:-5]), [1, 2, 4, 5, 6]),  # a line is whole or gone
])
def test_a_lost_or_shortened_log_does_not_end_a_run(undisturbed, monkeypatch, capsys, harm, left):
    act_at(4, SFT, monkeypatch)
    harm(RUN / "metrics.jsonl")
    assert resume() == 0
    said, found = capsys.readouterr().out, result(RUN)
    assert f"{RUN}/metrics.jsonl had " in said and "earlier lines are missing" in said
    assert [row["iteration"] for row in json_lines(RUN / "metrics.jsonl")] == left
    assert {k for k in found if found[k] != undisturbed["sft"][k]} == {"metrics.jsonl"}


def test_a_run_whose_folder_was_deleted_is_not_to_be_resumed(monkeypatch, capsys):
    assert act_at(3, SFT, monkeypatch, lambda: shutil.rmtree(RUN)) == 1
    said = capsys.readouterr().err
    assert said == f"error: cannot write to {RUN}: this folder is gone; begin anew\n"


@pytest.mark.parametrize("largest, kind, changes, left", [
    ((WORLD / "student/model.safetensors").stat().st_size, "sft", dict(save_every=3), 3),
    (3200, "sod", dict(save_every=0), 1),  # the logs
])
def test_a_full_disk_loses_nothing_that_was_saved(undisturbed, capsys, largest, kind, changes,
                                                  left):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, before[1]))
    try:
        assert command({**ALL[kind], **changes}) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert f"cannot write to {RUN}" in said and "File too large" in said and "make room" in said
    assert lines(RUN / "metrics.jsonl") == left and not list(RUN.glob("saves/*"))
    assert resume() == 0 and result(RUN) == undisturbed[kind]


# --- What a resumed run may differ in -----------------------------------------------------------


def test_changed_options_are_listed_and_hold(monkeypatch, capsys):
    act_at(3, SFT, monkeypatch)
    assert resume("--sft_lr", "0.01", "--sft_batch", 4, "--sft_epochs", 1) == 0
    said = capsys.readouterr().out
    assert "changed: sft_epochs 1, was 2\nchanged: sft_lr 0.01, was 0.002\n" in said
    assert "changed: sft_batch" not in said and lines(RUN / "metrics.jsonl") == 3
    assert json.loads((RUN / "config.json").read_text())["sft_lr"] == 0.01


def test_a_size_halved_for_lack_of_memory_is_not_stored_as_the_users_setting(monkeypatch):
    def short(lengths, budget, *more):
        if budget > 700:
            raise MemoryError
        return real(lengths, budget, *more)
    real = sod.micro_batches
    with monkeypatch.context() as patch:
        patch.setattr(sod, "micro_batches", short)
        act_at(3, SFT, monkeypatch)
    assert resume() == 0
    small, *sizes = [row["micro_batch_tokens"] for row in json_lines(RUN / "clock.jsonl")]
    assert small <= 700 and sizes == [small] + [sod.Config.micro_batch_tokens] * 4
    stored = json.loads((RUN / "config.json").read_text())
    assert stored["micro_batch_tokens"] == sod.Config.micro_batch_tokens


def test_the_same_command_with_resume_goes_on(undisturbed, monkeypatch):
    act_at(3, SFT, monkeypatch)
    assert command(SFT, "--resume", "run") == 0 and result(RUN) == undisturbed["sft"]


@pytest.mark.parametrize("more", [["--student", WORLD / "teacher"], ["--dtype", "bfloat16"]])
def test_what_cannot_go_on_is_refused_and_left_as_it_was(undisturbed, monkeypatch, capsys, more):
    act_at(5, SFT, monkeypatch)
    capsys.readouterr()
    assert resume(*more) == 1
    said = capsys.readouterr().err
    assert "iteration-4 cannot be taken over" in said and said.count("\n") == 1
    assert "resume with the --student, --dtype and --offload that it began with" in said
    assert resume() == 0 and result(RUN) == undisturbed["sft"]


def test_a_finished_run_goes_on_as_if_more_iterations_had_been_asked_at_once(undisturbed):
    assert command({**SOD, "iterations": 2}) == 0
    assert resume("--iterations", 5) == 0 and result(RUN) == undisturbed["sod"]


def test_a_finished_run_without_its_last_save_is_told(capsys):
    assert command({**SFT, "sft_epochs": 1}) == 0
    shutil.rmtree(RUN / "saves")
    assert resume() == 1
    assert f"{RUN} is finished, and its last save" in capsys.readouterr().err


def test_a_run_killed_after_its_checkpoint_prints_its_table_when_resumed(monkeypatch, capsys):
    options = {**SFT, "eval_data": WORLD / "heldout.jsonl", "eval_problems": 2, "eval_samples": 1}
    with monkeypatch.context() as patch:
        patch.setattr(sod, "write_page", lambda run, wait=True: wait and fail())  # after it
        assert command(options) == 1
    assert (RUN / "checkpoint").exists() and "| student after |" not in capsys.readouterr().out
    before = result(RUN)
    monkeypatch.setattr(sod, "measure", None)  # nothing is measured again
    assert resume() == 0 and "| student after |" in capsys.readouterr().out
    assert result(RUN) == before


def test_two_unnamed_runs_of_one_second_have_a_folder_each(monkeypatch):
    seconds = iter(["1", "1", "2"])
    monkeypatch.setattr(time, "strftime", lambda form: next(seconds))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    config = sod.Config()
    assert [sod.open_run_folder(config).name for _ in range(2)] == ["sod-1", "sod-2"]


CONFIGS = {
    None: "No such file", "{": "Expecting property name", "[]": "no attribute",
    '{"lr": "fast"}': "lr is 'fast'; needed float", '{"prompts": true}': "True; needed int",
    '{"method": [1]}': r"method is [1]; choose from vanilla, sft", '{"page": true}': "'page'",
}


@pytest.mark.parametrize("content", CONFIGS)
def test_a_folder_without_settings_that_can_be_used_is_no_run(capsys, content):
    RUN.mkdir(parents=True)
    if content:
        (RUN / "config.json").write_text(content)
    assert resume() == 2
    said = capsys.readouterr().err.splitlines()[-1]
    fault = "does not fit this" if content and ":" in content else "holds no run that can be"
    assert fault in said and CONFIGS[content] in said


def test_one_process_at_a_time_writes_a_run(monkeypatch, capsys):
    act_at(2, SFT, monkeypatch)
    with tools.locked(RUN):
        assert resume() == 1
    assert f"{RUN} is in use by another process" in capsys.readouterr().err


def test_results_measured_before_an_interruption_are_not_measured_again(monkeypatch):
    options = {**SFT, "eval_data": WORLD / "heldout.jsonl", "eval_problems": 2, "eval_samples": 1}
    act_at(3, options, monkeypatch)
    assert list(json.loads((RUN / "results.json").read_text())) == ["student before"]
    measured, real = [], sod.measure
    monkeypatch.setattr(sod, "measure", lambda *a: measured.append(1) or real(*a))
    assert resume() == 0 and len(measured) == 1  # student after
    card = (RUN / "checkpoint/README.md").read_text()
    assert "| student before |" in card and "| student after |" in card


def test_all_that_is_printed_is_kept_in_the_log_of_the_run(monkeypatch, capsys):
    act_at(3, {**SOD, "iterations": 3, "show_every": 1, "lr": 0.1}, monkeypatch)  # it has health
    assert resume("--seed", 1) == 0
    said, log = capsys.readouterr().out, (RUN / "log.txt").read_text()
    assert log == said and log.count("; started 2") == 2 and log.count("iteration 2/3 | ") == 1
    for words in ("    health: ", "    turn 1  d ", "changed: seed 1, was 0\n", "checkpoint runs"):
        assert words in log


def test_a_screen_that_is_closed_ends_a_run_whose_log_has_the_last_line(monkeypatch, capsys):
    class Closed(io.StringIO):
        def write(self, text):
            if text.startswith("iteration "):
                raise BrokenPipeError
    monkeypatch.setattr(sod, "run_command", lambda work: work())
    with contextlib.redirect_stdout(Closed()), pytest.raises(BrokenPipeError):
        command({**SFT, "sft_epochs": 1})
    assert (RUN / "log.txt").read_text().splitlines()[-1].startswith("iteration 3/3 | loss")


def test_a_run_killed_while_loading_has_left_a_log_alone_and_may_begin_anew(capsys):
    RUN.mkdir(parents=True)
    (RUN / "log.txt").write_text("preset  world\n")
    assert command({**SFT, "sft_epochs": 1}) == 0
    assert (RUN / "log.txt").read_text().startswith("preset  world\npreset  world; sod-mini")


# --- What a run leaves --------------------------------------------------------------------------


def test_what_a_run_leaves_can_be_read_by_others_and_says_how_it_was_made(monkeypatch, capsys):
    act_at(2, {**SFT, "seed": 17}, monkeypatch)
    assert resume() == 0
    assert "seed 17" in capsys.readouterr().out
    for file in [*(RUN / "checkpoint").iterdir(), RUN / "metrics.jsonl"]:
        assert file.stat().st_mode & 0o777 == 0o644, file
    assert json.loads((RUN / "config.json").read_text())["versions"] == sod.VERSIONS
    card = (RUN / "checkpoint/README.md").read_text()
    assert "license:" not in card and "licence is that of the model before training" in card
    assert torch.__version__ in card and '"resume"' not in card and len(card.splitlines()) <= 25


def test_the_command_tells_its_versions(capsys):
    assert command({}, "--version") == 0
    assert f"torch {torch.__version__}" in capsys.readouterr().out
