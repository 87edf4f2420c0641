"""The problems of reasoning-gym, with a stand-in for that package: what the three files hold."""
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import reasoning
import sod_mini as sod
import tools


def create_dataset(task, size, seed):
    """As in the real package, item n of seed s is item n - 1 of seed s + 1. A tenth of the problems
    to measure on are also among those to learn from, as happens where a task has few problems."""
    numbers = [seed + n if n % 10 else n for n in range(size)]
    return [{"question": f" {task} of {number}? ", "answer": number} for number in numbers]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder in which the script has written its files."""
    gym = SimpleNamespace(create_dataset=create_dataset)
    monkeypatch.setitem(sys.modules, "reasoning_gym", gym)
    reasoning.main([str(tmp_path / "made")])
    return tmp_path / "made"


def test_no_problem_to_learn_from_is_measured_on(folder):
    train, test = (tools.load_problems(folder / f"{name}.jsonl") for name in ("train", "test"))
    assert len(train) == len(reasoning.TASKS) * reasoning.TRAIN_SIZE
    assert len(test) == len(reasoning.TASKS) * reasoning.TEST_SIZE * 9 // 10
    assert not {p.question for p in train} & {p.question for p in test}
    for problem in train + test:
        assert f"of {problem.answer}?" in problem.question and problem.kind == "math"
    assert [p.question for p in train] != sorted(p.question for p in train)  # the tasks are mixed


def test_the_worked_example_runs_and_prints_what_it_shows(folder):
    calls = sod.call_form("python", tools.TOOL_NAME)
    question, call, answer, last = sod.worked_examples(str(folder / "worked.jsonl"), calls)
    with tools.PythonTool(workers=1, modules=()) as tool:
        seen = tool.submit(calls.parse(call["content"])).result()
    assert (seen.outcome, seen.text) == ("ok", answer["content"])
    assert tools.grade_math(last["content"], answer["content"]).correct
    assert question["role"] == "user" and calls.parse(last["content"]) is None


def test_the_same_files_come_out_twice(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    reasoning.main([str(folder)])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before and len(before) == 3


def test_without_the_package_one_sentence_names_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    assert sod.run_command(partial(reasoning.main, [str(tmp_path / "made")])) == 1
    said = capsys.readouterr()
    assert "pip install reasoning-gym" in said.err and said.err.count("\n") == 1
    assert not (tmp_path / "made").exists()
