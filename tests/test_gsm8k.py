"""GSM8K's annotations as conversations with the tool: what a real model's cold start imitates."""
import doctest
import json
import random
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
import gsm8k_demonstrations as gsm8k
import tools

ROWS = [
    {"question": "Two sons?", "answer": "Tony got 2*$1750 = $<<2*1750=3500>>3500.\n"
     "Both got $1750+$3500=$<<1750+3500=5250>>5250.\n#### 5,250"},
    {"question": "Wrong?", "answer": "It is 2+2=<<2+2=5>>5.\n#### 5"},
    {"question": "A share?", "answer": "It is 5%=<<5%*100=5>>5.\n#### 5"},
    {"question": "No calculation?", "answer": "None.\n#### 5"},
    {"question": "A third?", "answer": "It is 1/3=<<1/3=.33>>.33 of it.\n#### 0.33"}]


@pytest.fixture
def written(tmp_path):
    """Options -> the conversations that the script writes of ROWS."""
    source, target = tmp_path / "train.jsonl", tmp_path / "shown.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(*options):
        assert gsm8k.main([str(source), str(target), *options]) == 0
        return tools.load_demonstrations(target)
    return run


def test_each_calculation_is_a_call_that_the_real_tool_answers(written, capsys):
    (problem, turns), (_, third) = written("--slips", "0")
    assert problem.question == "Two sons?"
    calls = [tools.parse_tool_call(turn["content"]) for turn in turns[::2]]
    assert [call and call.code for call in calls] == ["print(2*1750)", "print(1750+3500)", None]
    assert [turn["content"] for turn in turns[1::2]] == ["3500", "5250"]
    assert "5250" not in turns[2]["content"]
    assert turns[-1]["content"] == "The answer is \\boxed{5250}."
    assert third[0]["content"].startswith("It is 1/3 of it.\n<tool_call>")
    assert "2 conversations" in capsys.readouterr().out  # the other three are left out


def test_the_parquet_of_the_hub_gives_the_same_conversations(written, tmp_path, parquet):
    plain = written()
    assert gsm8k.main([str(parquet(*ROWS)), str(tmp_path / "other.jsonl")]) == 0
    assert tools.load_demonstrations(tmp_path / "other.jsonl") == plain


def test_a_slipped_call_fails_in_the_real_tool_and_is_repaired(written):
    (_, turns), _ = written("--slips", "1")
    failed = [n for n, turn in enumerate(turns) if "Error" in turn["content"]]
    assert len(failed) == 1 and turns[failed[0] + 1]["content"].startswith("The call failed.")
    assert tools.parse_tool_call(turns[failed[0] + 1]["content"]).code.count("(") == 1
    kinds = {gsm8k.slip("print(2*1750)", random.Random(n)) for n in range(9)}
    assert kinds == {"print(2*1750", "print(total*1750)"}


def test_a_file_that_is_not_gsm8k_ends_with_a_sentence(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"question": "q", "answer": 5}\n')
    assert gsm8k.main([str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 1
    assert "is not GSM8K: needed a question and an answer" in capsys.readouterr().err
    assert not (tmp_path / "b.jsonl").exists()
    assert doctest.testmod(gsm8k) == doctest.TestResults(failed=0, attempted=1)
