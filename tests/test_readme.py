"""README.md against the code: names, commands, the worked example."""
import importlib
import re
import shlex
import subprocess

import pytest
import torch

from conftest import ROOT, SMALL
import evaluate
import sod_mini as sod
import tools

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_read_in_one_sitting():
    assert len(README.splitlines()) < 350


def test_every_function_it_links_to_stands_in_that_file():
    links = re.findall(r"\[`(\w+)`\]\((\w+)\.py\)", README)
    assert len(links) >= 7
    for name, module in links:
        assert hasattr(importlib.import_module(module), name), f"{module}.py has no {name}"


def test_every_name_in_the_guided_reading_exists():
    reading = README[README.index("## A guided reading"):README.index("## The methods of the")]
    for name in re.findall(r"`([A-Za-z_]{4,})`", reading):
        assert any(hasattr(module, name) for module in (sod, tools, evaluate)), name


@pytest.mark.parametrize("script, parse, least", [
    ("sod_mini", sod.parse_config, 4), ("evaluate", evaluate.parse, 5)])
def test_commands_use_options_that_exist(monkeypatch, script, parse, least):
    monkeypatch.setattr(sod, "resumed_config", lambda given: sod.Config())  # runs/NAME is not here
    mine = README[README.index("## Make it yours"):README.index("## Qwen3 on one GPU")]
    commands = re.findall(rf"python {script}\.py(?: (--[^\n`#]+))?", README.replace(mine, ""))
    assert len(commands) >= least
    for command in commands:
        parse(shlex.split(command, comments=True))


@pytest.mark.slow
def test_the_pipeline_runs_in_its_order_and_each_part_ends_with_a_verdict(tmp_path, capsys):
    part = README[README.index("The paper's pipeline"):README.index("## Make it yours")]
    commands = re.findall(r"python sod_mini\.py (--.+ --name (\w+))", part)
    assert [name for _, name in commands] == ["cold_teacher", "teacher", "student"]
    small = {name: value for name, value in SMALL.items() if name not in ("student", "teacher")}
    few = [str(word) for name, value in {**small, "preset": "world", "sft_epochs": 2}.items()
           for word in (f"--{name}", value)]
    for words, name in commands:
        words = shlex.split(words.replace("runs/", f"{tmp_path}/"), comments=True)
        assert sod.main([*words, *few, "--out", str(tmp_path)]) is None
        table = capsys.readouterr().out
        assert "| student after |" in table and "student after minus before: " in table, name
        assert (tmp_path / name / "checkpoint" / "model.safetensors").exists()


def test_tables_name_every_method_and_weight_scheme():
    """Those of the repository: README need not name what a reader adds."""
    methods = ["vanilla", "sft", "grpo", "opd", "opd_only", "opsd_gt", "opsd_hint", "sod",
               "sod_only"]
    schemes = ["uniform", "decay", "mask_after_error", "unclipped", "floor"]
    assert sod.METHODS.keys() >= {*methods} and sod.WEIGHTS.keys() >= {"sod", *schemes}, MINE
    for name in [*methods, *schemes, *evaluate.BENCHMARKS]:
        assert f"`{name}`" in README or re.search(rf"weights [\w| ]*\b{name}\b", README), name


def test_the_worked_example_is_true():
    assert "`d = .3 .6 .2` gives `w = 1 .5 1.2`" in README
    w = sod.step_weights(torch.tensor([[0.3, 0.6, 0.2]]))[0].tolist()
    assert w == pytest.approx([1, 0.5, 1.2], abs=1e-5)


def test_only_the_files_of_the_design_card_stand_at_the_top():
    allowed = {"README.md", "LICENSE", "requirements.txt", "sod_mini.py", "tools.py", "evaluate.py",
               "data", "tests"}
    # Of the files that are committed: data, logs and notes of a reader's own may lie beside them.
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this copy is no clone, so nobody knows which files are its own")
    there = {name.partition("/")[0] for name in listed.stdout.split("\0") if name[:1] != "."}
    assert there - {""} <= allowed, MINE


MINE = ("this holds for the repository; in a copy of your own with further methods or files of "
        "yours it says nothing about them")


def test_requirements_are_the_six_packages_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(line.partition("==")[0] for line in lines) == [
        "numpy", "pytest", "tokenizers", "torch", "tqdm", "transformers"]
    assert all(re.search(r"==\d", line) for line in lines)


def test_every_picture_and_file_named_is_there():
    for path in re.findall(r"\]\((?!http)([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
