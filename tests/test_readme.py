"""README.md against the code: links, commands, the worked example."""
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
import sod_mini as sod

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_link_to_a_function_points_at_its_line():
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 7
    for name, file, line in links:
        text = (ROOT / file).read_text(encoding="utf-8").splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", text), f"{name} is not at {file}:{line}"


def test_commands_use_options_that_exist(monkeypatch):
    monkeypatch.setattr(sod, "resumed_config", lambda given: given)  # runs/NAME is not here
    commands = re.findall(r"python sod_mini\.py (--[^\n`]+)", README)
    assert len(commands) >= 4
    for command in commands:
        sod.parse_config(shlex.split(command, comments=True))


def test_tables_name_every_method_scheme_and_metric():
    for name in ["vanilla", "sft", *sod.METHODS]:
        assert f"| `{name}` |" in README
    for name in set(sod.WEIGHTS) - {"sod"}:
        assert name in README


def test_the_worked_example_is_true():
    assert "`d = .3 .6 .2` gives `w = 1 .5 1.2`" in README
    w = sod.step_weights(torch.tensor([[0.3, 0.6, 0.2]]))[0].tolist()
    assert w == pytest.approx([1, 0.5, 1.2], abs=1e-5)


def test_only_the_files_of_the_design_card_stand_at_the_top():
    allowed = {"README.md", "LICENSE", "requirements.txt", "sod_mini.py", "tools.py", "evaluate.py",
               "data", "tests"}
    found = {p.name for p in ROOT.iterdir() if not p.name.startswith(".")}
    assert found - {"runs", "benchmarks", "__pycache__"} <= allowed


def test_requirements_are_the_six_packages_pinned():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert sorted(line.partition("==")[0] for line in lines) == [
        "numpy", "pytest", "tokenizers", "torch", "tqdm", "transformers"]
    assert all(re.search(r"==\d", line) for line in lines)


def test_commands_of_evaluate_use_options_that_exist():
    commands = re.findall(r"python evaluate\.py(?: (--[^\n`#]+))?", README)
    assert len(commands) >= 8
    for command in commands:
        evaluate.parse(shlex.split(command, comments=True))


def test_the_study_tables_are_those_of_the_study():
    stored = (ROOT / "data" / "study" / "study.md").read_text(encoding="utf-8")
    shown = README[README.index("## What holds in the small"):README.index("## The method in")]
    rows = [line for line in stored.splitlines() if line.startswith("| ")]
    assert len(rows) >= 30 and all(line in shown for line in rows)


def test_sizes_of_the_embedded_world_are_as_told():
    world = ROOT / "data" / "world"
    for name, rows in (("train", 2000), ("heldout", 400), ("demonstrations", 3000)):
        assert len((world / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()) == rows
    for name, parameters in (("student", 344_928), ("teacher", 771_456)):
        model = sod.load_model(str(world / name), "cpu", torch.float32)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert f"data/world/{name}, {parameters:,} parameters" in README


def test_every_picture_and_file_named_is_there():
    for path in re.findall(r"\]\((?!http|sod_mini\.py#)([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
