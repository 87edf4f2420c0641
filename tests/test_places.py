"""What an option names is found from everywhere: the clone's files, a run, the model of a run."""
import json
import os
import shutil
from pathlib import Path

import pytest

import evaluate
import sod_mini as sod
import tools
from conftest import WORLD, command
from test_resume import RUN, SFT, act_at, folder, resume  # noqa: F401, a fixture

SHORT = dict(SFT, student="data/world/student", teacher="data/world/teacher", sft_epochs=1)


@pytest.fixture
def elsewhere(folder, monkeypatch):  # noqa: F811
    """A working directory that is neither the run's nor the clone's."""
    place = folder / "elsewhere"
    place.mkdir()
    return lambda: monkeypatch.chdir(place)


def test_the_world_is_found_from_any_directory_and_stored_without_one(elsewhere):
    elsewhere()
    config, preset = sod.parse_config([])
    assert preset == "world"
    for name in ("student", "teacher", "train_data", "eval_data", "demonstrations"):
        assert getattr(config, name).startswith("data/world/")
    assert len(tools.load_problems(config.eval_data)) and sod.skeleton(config.student)
    assert evaluate.find_file("data/world/train.jsonl", "") == WORLD / "train.jsonl"
    assert evaluate.benchmark_config("data/world/train.jsonl", {}).k == sod.Config.eval_samples
    assert "data/world/train.jsonl" in sod.file_digests(config)


def test_what_is_there_as_given_comes_first(folder):  # noqa: F811
    (folder / "data/world").mkdir(parents=True)
    assert tools.locate("data/world") == Path("data/world")
    assert tools.locate("no/such") == Path("no/such") and tools.locate("") == Path("")


def test_a_run_goes_on_from_another_directory(folder, elsewhere, monkeypatch):  # noqa: F811
    act_at(2, {**SHORT, "demonstrations": folder / "shown.jsonl"}, monkeypatch)
    elsewhere()
    assert command({}, "--resume", str(folder / RUN)) == 0
    stored = json.loads((folder / RUN / "config.json").read_text())
    assert stored["student"] == "data/world/student"


def test_a_run_stands_for_its_checkpoint_or_its_newest_save(monkeypatch, capsys):
    act_at(3, SHORT, monkeypatch)
    assert sod.model_folder("runs/run") == f"{RUN}/saves/iteration-2"
    assert evaluate.sod.skeleton("runs/run").config.model_type == "qwen3"
    assert resume() == 0 and sod.model_folder("runs/run") == f"{RUN}/checkpoint"
    for option in ("student", "teacher"):
        assert command({**SHORT, "method": "opd", "train_data": "few.jsonl", "iterations": 1,
                        "prompts": 2, "group_size": 2, option: RUN, "name": option}) == 0
        assert f"{option} {RUN}/checkpoint, " in capsys.readouterr().out
    (RUN / "checkpoint").rename("model")
    shutil.rmtree(RUN / "saves", ignore_errors=True)
    assert command({**SHORT, "student": RUN, "name": "none"}) == 1
    assert f"{RUN} is a run without a checkpoint or a save" in capsys.readouterr().err
    assert sod.model_folder("model") == "model"


@pytest.mark.parametrize("out", [[], ["--out", "others"]])
def test_the_page_of_a_run_is_written_by_its_name(out, capsys):
    place = Path(out[-1] if out else "runs", "mine")
    place.mkdir(parents=True)
    (place / "config.json").write_text(json.dumps(vars(sod.Config())))
    assert evaluate.main(["--page", "mine", *out]) == 0 and (place / "rollouts.html").exists()
    assert evaluate.main(["--page", "others_too", *out]) == 1
    assert "error: others_too/config.json does not exist" in capsys.readouterr().err
