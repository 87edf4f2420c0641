"""Runs that are killed, interrupted, starved of disk: what is saved, and that they go on exactly.

A run that was interrupted at any moment must end with the same weights and the same logs, byte for
byte, as one that was left alone. Real processes are killed; they are forked from one that has
imported everything, since importing torch takes longer than a whole run of this size.
"""
import hashlib
import json
import multiprocessing
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

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import sod_mini as sod
import tools

WORLD = ROOT / "data" / "world"
PLACES = dict(student=WORLD / "student", teacher=WORLD / "teacher",
              train_data="few.jsonl", eval_data="", preset="world")
SOD = dict(PLACES, name="sod", steps=5, prompts_per_step=2, group_size=2, max_response=120,
           lr=1e-3, save_every=1, show_every=0, page="false")
SFT = dict(PLACES, name="sft", method="sft", demonstrations="shown.jsonl", sft_epochs=2,
           sft_batch=4, save_every=1, page="false")
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["sod_mini"])


def words(options):
    return [str(word) for name, value in options.items() for word in (f"--{name}", value)]


def act(folder, arguments, largest_file):
    """What a real process does: the command, in `folder`, with its screen in a file."""
    os.chdir(folder)
    screen = os.open("screen", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(screen, 1), os.dup2(screen, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    status = sod.main(arguments)
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(status)


def begin(folder, options, *more, largest_file=0):
    process = PROCESSES.Process(target=act, args=(folder, [*more, *words(options)], largest_file))
    process.start()
    return process


def end_of(process, folder):
    """(exit status, what was on the screen)."""
    process.join(300)
    return process.exitcode, (folder / "screen").read_text()


def write_data(folder):
    for name, source in (("few", "train"), ("shown", "demonstrations")):
        few = (WORLD / f"{source}.jsonl").read_text().splitlines()[:12]
        (folder / f"{name}.jsonl").write_text("\n".join(few))


def result(run):
    """Everything that a finished run leaves, but for what the clock said."""
    assert (run / "checkpoint").exists() and not (run / "saves").exists()
    files = [*(run / "checkpoint").iterdir(), run / "metrics.jsonl", run / "rollouts.jsonl"]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def lines(path):
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """{name: what the run leaves if nobody disturbs it}."""
    folder, results = tmp_path_factory.mktemp("undisturbed"), {}
    write_data(folder)
    for options in (SOD, SFT):
        status, said = end_of(begin(folder, options), folder)
        assert status == 0, said
        results[options["name"]] = result(folder / "runs" / options["name"])
    return results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_data(tmp_path)
    return tmp_path


# --- Kills ------------------------------------------------------------------------------------


def strike(process, run, moments):
    """SIGKILL at a random moment: of the process, after a new line of the log, within a save."""
    kind, before = moments.choice(["any", "step", "save"]), lines(run / "metrics.jsonl")
    deadline = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < deadline:
        if (kind == "any" or kind == "step" and lines(run / "metrics.jsonl") > before
                or kind == "save" and list((run / "saves").glob("*.tmp"))):
            break
        time.sleep(0.001)
    time.sleep(moments.random() * {"any": 4, "step": 0.5, "save": 0.03}[kind])
    process.kill()
    process.join()


def kill_and_resume(folder, options, seed, kills):
    """Kill a run again and again, then let it end."""
    run, moments = folder / "runs" / options["name"], random.Random(seed)
    for attempt in range(kills + 1):
        began = (run / "config.json").exists()
        if not began:  # killed before its settings were on the disk: its folder holds nothing
            shutil.rmtree(run, ignore_errors=True)
        process = begin(folder, options, *(["--resume", options["name"]] if began else []))
        if attempt < kills:
            strike(process, run, moments)
    status, said = end_of(process, folder)
    assert status == 0 or "is finished" in said, said
    return result(run)


@pytest.mark.parametrize("options, seed", [
    (SOD, 0), pytest.param(SOD, 1, marks=pytest.mark.slow), (SFT, 2)])
def test_a_run_killed_at_random_moments_ends_as_if_left_alone(undisturbed, folder, options, seed):
    assert kill_and_resume(folder, options, seed, kills=4) == undisturbed[options["name"]]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 23))
def test_many_more_kills(undisturbed, folder, seed):
    options = [SOD, SFT][seed % 2]
    assert kill_and_resume(folder, options, seed, kills=6) == undisturbed[options["name"]]


@pytest.mark.parametrize("number, options", [(signal.SIGINT, SOD), (signal.SIGTERM, SFT)])
def test_a_request_to_stop_saves_first_and_says_how_to_go_on(undisturbed, folder, number, options):
    run = folder / "runs" / options["name"]
    process = begin(folder, {**options, "save_every": 0})
    while lines(run / "metrics.jsonl") < 2 and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, number)
    status, said = end_of(process, folder)
    assert status == 128 + number and f"python sod_mini.py --resume runs/{options['name']}" in said
    (save,) = (run / "saves").iterdir()
    assert int(save.name[5:]) == lines(run / "metrics.jsonl") >= 2 and f"{save.name}\n" in said
    assert sod.main(["--resume", f"runs/{options['name']}"]) == 0
    assert result(run) == undisturbed[options["name"]]


# --- Errors, damage, a full disk ----------------------------------------------------------------


def interrupted_at(step, options, monkeypatch, seam="score_batch"):
    """Run the command in this process until an error in the given step; exit status."""
    real, calls = getattr(sod, seam), iter(range(1, 100))

    def fails(*arguments):
        if next(calls) == step:
            raise ValueError("injected")
        return real(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(sod, seam, fails)
        return sod.main(words(options))


def test_an_error_saves_what_was_learnt_before_it(undisturbed, folder, monkeypatch, capsys):
    assert interrupted_at(4, {**SOD, "save_every": 0}, monkeypatch) == 1
    said = capsys.readouterr().err
    assert "saved runs/sod/saves/step-3" in said and said.endswith("error: injected\n")
    save = folder / "runs/sod/saves/step-3"
    saved, start = (AutoModelForCausalLM.from_pretrained(path).state_dict()
                    for path in (save, WORLD / "student"))
    assert any(not torch.equal(saved[k], start[k]) for k in start)
    assert AutoTokenizer.from_pretrained(save).chat_template
    assert sod.main(["--resume", "runs/sod"]) == 0
    assert result(folder / "runs/sod") == undisturbed["sod"]


def test_an_error_while_weights_move_goes_back_to_the_last_save(undisturbed, folder, monkeypatch):
    # The 8th update is the second half of step 4.
    assert interrupted_at(8, {**SOD, "save_every": 2}, monkeypatch, "update") == 1
    assert [p.name for p in (folder / "runs/sod/saves").iterdir()] == ["step-2"]
    assert sod.main(["--resume", "runs/sod"]) == 0
    assert result(folder / "runs/sod") == undisturbed["sod"]


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_save_is_recognised_and_the_one_before_used(undisturbed, folder, monkeypatch,
                                                              capsys):
    interrupted_at(5, SOD, monkeypatch)
    saves = folder / "runs/sod/saves"
    assert sorted(p.name for p in saves.iterdir()) == ["step-3", "step-4"]  # the newest two
    flip(saves / "step-4/model.safetensors")
    assert sod.main(["--resume", "runs/sod"]) == 0
    said = capsys.readouterr().out
    assert "runs/sod/saves/step-4 is damaged (model.safetensors is not what was written)" in said
    assert "resumed runs/sod/saves/step-3" in said
    assert result(folder / "runs/sod") == undisturbed["sod"]


def test_without_a_whole_save_nothing_is_begun_anew_in_silence(folder, monkeypatch, capsys):
    interrupted_at(3, SOD, monkeypatch)
    for save in (folder / "runs/sod/saves").iterdir():
        flip(save / "state.pt")
    before = (folder / "runs/sod/metrics.jsonl").read_text()
    assert sod.main(["--resume", "runs/sod"]) == 1
    assert "error: no whole save is left in runs/sod/saves" in capsys.readouterr().err
    assert (folder / "runs/sod/metrics.jsonl").read_text() == before


def test_a_full_disk_loses_nothing_that_was_saved(undisturbed, folder):
    room = (WORLD / "student/model.safetensors").stat().st_size + 100_000
    status, said = end_of(begin(folder, {**SOD, "save_every": 3}, largest_file=room), folder)
    assert status == 1 and "Traceback" not in said
    assert "cannot write to runs/sod" in said and "File too large" in said
    assert not list((folder / "runs/sod/saves").iterdir())  # nothing half-written
    interrupted = lines(folder / "runs/sod/metrics.jsonl")
    assert interrupted == 3 and end_of(begin(folder, {}, "--resume", "sod"), folder)[0] == 0
    assert result(folder / "runs/sod") == undisturbed["sod"]


def test_logs_that_no_longer_fit_on_the_disk_are_cut_back(undisturbed, folder):
    status, said = end_of(begin(folder, {**SOD, "save_every": 0}, largest_file=1500), folder)
    assert status == 1 and "cannot write to runs/sod" in said and "Traceback" not in said
    assert end_of(begin(folder, {}, "--resume", "sod"), folder)[0] == 0
    assert result(folder / "runs/sod") == undisturbed["sod"]


# --- What a resumed run may differ in -----------------------------------------------------------


def test_changed_options_are_listed_and_refused_unless_wanted(folder, monkeypatch, capsys):
    interrupted_at(3, SOD, monkeypatch)
    changed = ["--resume", "runs/sod", "--lr", "0.01", "--group_size", "2", "--steps", "3"]
    with pytest.raises(SystemExit) as stop:
        sod.main(changed)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "lr 0.01 (was 0.001), steps 3 (was 5);" in said
    assert "group_size" not in said.split("ran with")[1] and "--change true" in said
    assert sod.main([*changed, "--change", "true"]) == 0
    assert lines(folder / "runs/sod/metrics.jsonl") == 3
    assert json.loads((folder / "runs/sod/config.json").read_text())["lr"] == 0.01


def test_the_same_command_with_resume_goes_on(undisturbed, folder, monkeypatch):
    interrupted_at(3, SOD, monkeypatch)
    assert sod.main([*words(SOD), "--resume", "sod"]) == 0
    assert result(folder / "runs/sod") == undisturbed["sod"]


def test_other_training_data_are_refused(folder, monkeypatch, capsys):
    interrupted_at(3, {**SFT}, monkeypatch, "imitation_step")
    shown = (folder / "shown.jsonl").read_text()
    (folder / "shown.jsonl").write_text(shown.replace("Start with 1", "Start with 2"))
    assert sod.main(["--resume", "runs/sft"]) == 1
    assert "training data are not those that this run began with" in capsys.readouterr().err


def test_a_student_of_another_shape_is_refused(folder, monkeypatch, capsys):
    interrupted_at(3, SOD, monkeypatch)
    status = sod.main(["--resume", "runs/sod", "--change", "true",
                       "--student", str(WORLD / "teacher")])
    assert status == 1 and "do not fit the student" in capsys.readouterr().err


def test_a_finished_run_and_one_that_never_was_are_told(folder, capsys):
    assert sod.main(words({**SOD, "steps": 1})) == 0
    assert sod.main(["--resume", "sod"]) == 1
    assert "runs/sod is finished" in capsys.readouterr().err
    for name, content in (("gone", None), ("torn", "{")):
        if content:
            (folder / "runs" / name).mkdir()
            (folder / "runs" / name / "config.json").write_text(content)
        with pytest.raises(SystemExit) as stop:
            sod.main(["--resume", name])
        assert stop.value.code == 2 and f"{name} holds no run to resume" in capsys.readouterr().err


def test_one_process_at_a_time_writes_a_run(folder, monkeypatch, capsys):
    interrupted_at(2, SOD, monkeypatch)
    with tools.locked(folder / "runs/sod"):
        assert sod.main(["--resume", "sod"]) == 1
    assert "runs/sod is in use by another process" in capsys.readouterr().err


def test_logs_that_have_lost_lines_are_not_filled_with_zeros(folder, monkeypatch, capsys):
    interrupted_at(3, SOD, monkeypatch)
    (folder / "runs/sod/metrics.jsonl").write_text("")
    assert sod.main(["--resume", "sod"]) == 1
    assert "metrics.jsonl has 0 bytes and had" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [
    dict(dtype="bfloat16", warmup=8), dict(method="opsd_gt", init="random"),
    dict(student="dropout", rollout_engine="generate", updates_per_step=1),
])
def test_every_kind_of_state_is_taken_over(folder, monkeypatch, changes):
    shutil.copytree(WORLD / "student", folder / "dropout")
    shape = json.loads((folder / "dropout/config.json").read_text())
    (folder / "dropout/config.json").write_text(json.dumps({**shape, "attention_dropout": 0.2}))
    options = {**SOD, **changes, "steps": 3}
    assert sod.main(words({**options, "name": "whole"})) == 0
    interrupted_at(3, options, monkeypatch)
    assert sod.main(["--resume", "sod"]) == 0
    whole, parts = result(folder / "runs/whole"), result(folder / "runs/sod")
    assert {k for k in whole if whole[k] != parts[k]} == {"README.md"}  # its title is the name


def test_results_measured_before_an_interruption_are_not_measured_again(folder, monkeypatch):
    options = {**SOD, "eval_data": WORLD / "heldout.jsonl", "eval_problems": 2, "eval_samples": 1}
    interrupted_at(2, options, monkeypatch)
    assert list(json.loads((folder / "runs/sod/results.json").read_text())) == ["student before"]
    measured, real = [], sod.evaluate
    monkeypatch.setattr(sod, "evaluate", lambda model, *rest: measured.append(model) or real(
        model, *rest))
    assert sod.main(["--resume", "sod"]) == 0 and len(measured) == 2  # student after, teacher
    card = (folder / "runs/sod/checkpoint/README.md").read_text()
    assert "| student before |" in card and "| teacher |" in card


# --- Files, without models ----------------------------------------------------------------------


def sealed(place):
    with tools.whole_folder(place) as filled:
        (filled / "state.pt").write_bytes(bytes(range(200)) * 50)
        tools.seal(filled)
    return place


DAMAGE = {
    "nothing": (lambda place: None, ""),
    "truncated": (lambda place: os.truncate(place / "state.pt", 99), "state.pt has 99 bytes and"),
    "one bit": (lambda place: flip(place / "state.pt"), "state.pt is not what was written"),
    "missing": (lambda place: (place / "state.pt").unlink(), "state.pt: No such file"),
    "no list": (lambda place: (place / tools.MANIFEST).unlink(), "manifest.json: No such file"),
    "torn list": (lambda place: os.truncate(place / tools.MANIFEST, 40), "manifest.json is not"),
    "other list": (lambda place: (place / tools.MANIFEST).write_text("[3]"), "manifest.json is no"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_every_damage_of_a_sealed_folder_is_named(tmp_path, kind):
    harm, sentence = DAMAGE[kind]
    place = sealed(tmp_path / "step-1")
    harm(place)
    found = tools.damage(place)
    assert found.startswith(sentence) and bool(found) == bool(sentence)


def test_a_folder_that_fails_while_it_is_filled_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), tools.whole_folder(tmp_path / "a") as place:
        (place / "x").write_text("1")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_killed_while_it_is_filled_does_not_get_its_name(tmp_path):
    if not os.fork():
        with tools.whole_folder(tmp_path / "a") as place:
            (place / "x").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)
    os.wait()
    assert [p.name for p in tmp_path.iterdir()] == ["a.tmp"]
    with tools.whole_folder(tmp_path / "a") as place:
        assert not list(place.iterdir())  # what the killed one left is gone
        (place / "y").write_text("2")
        tools.seal(place)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a"] and not tools.damage(tmp_path / "a")


def test_the_newest_whole_folder_is_found_by_number_not_by_letter(tmp_path):
    for n in (9, 10, 11):
        sealed(tmp_path / f"step-{n}")
    (tmp_path / "step-12.tmp").mkdir()
    assert tools.newest_whole(tmp_path) == (tmp_path / "step-11", {})
    flip(tmp_path / "step-11/state.pt")
    place, faults = tools.newest_whole(tmp_path)
    assert place == tmp_path / "step-10" and list(faults) == [tmp_path / "step-11"]
    assert faults[tmp_path / "step-11"] == "state.pt is not what was written"
