"""The tool-call protocol: every fault is named, no model text makes it raise or slow."""
import json
import random
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tools
from tools import parse_tool_call, render_tool_call


@pytest.mark.parametrize("code", ["print(1)", "", "a = '\\n'\n", '"""', "東京 🙂", "\ud800"])
def test_a_rendered_call_parses_to_the_same_code(code):
    assert parse_tool_call("Hm.\n" + render_tool_call(code)) == tools.ToolCall(code=code)


def wrap(body):
    return f"<tool_call>\n{body}\n</tool_call>"


CALL = {"name": "code_interpreter", "arguments": {"code": "1"}}


@pytest.mark.parametrize("text, fault", [
    ("<tool_call>\n" + json.dumps(CALL), "unclosed"),
    ("</tool_call>", "unopened"),
    (json.dumps(CALL) + "\n</tool_call><tool_call>", "unopened"),
    (wrap("print(1)"), "not_json"), (render_tool_call("</tool_call>"), "not_json"),
    (wrap(json.dumps(CALL)[:-1]), "not_json"),
    (wrap("[" * 100_000), "not_json"), (wrap("9" * 100_000), "not_json"),
    (wrap('{"name": "code_interpreter", "arguments": {"code": "a\nb"}}'), "not_json"),
    (wrap("null"), "unknown_tool"),
    (wrap('{"name": "python", "arguments": {"code": "1"}}'), "unknown_tool"),
    (wrap('{"name": "code_interpreter"}'), "bad_arguments"),
    (wrap('{"name": "code_interpreter", "arguments": "1"}'), "bad_arguments"),
    (wrap('{"name": "code_interpreter", "arguments": {"code": 1}}'), "bad_arguments"),
    (wrap('{"name": "code_interpreter", "arguments": {"code": "1", "x": 2}}'), "bad_arguments"),
])
def test_each_fault_is_named_and_the_right_form_is_shown(text, fault):
    call = parse_tool_call(text)
    assert call.fault == fault and call.code == ""
    assert "Tool call not run" in call.message and '"name": "code_interpreter"' in call.message


def test_a_turn_without_a_call_is_an_answer():
    for text in ("", "\\boxed{42}", "I could use a tool call.", "<tool_response>1</tool_response>"):
        assert parse_tool_call(text) is None


def test_thoughts_do_not_call_but_a_program_may_hold_their_tag():
    thought = f"<think>\nPerhaps {wrap(json.dumps(CALL))}?\n</think>\n\n"
    assert parse_tool_call(thought + "\\boxed{42}") is None
    assert parse_tool_call(thought + render_tool_call("2")).code == "2"
    for before in ("", "<think>\nHm.\n</think>\n", "Hm.\n</think>\n"):
        call = parse_tool_call(before + render_tool_call("print('</think>')"))
        assert call.code == "print('</think>')"


def test_further_calls_are_counted():
    one = render_tool_call("1")
    assert [parse_tool_call(one * n).ignored for n in (1, 2, 5)] == [0, 1, 4]
    assert parse_tool_call(one + "<tool_call>").ignored == 1


PIECES = ["<tool_call>", "</tool_call>", "<think>", "</think>", "<tool_response>",
          "{", "}", "[", '"', "\\", "\n", '"name": ', '"code_interpreter"', '"arguments": ',
          '"code": ', "print(1)", "\0", "\ud83d", "é", "<|im_end|>", ":", ",", "1e999", "NaN",
          json.dumps(CALL)]


def test_no_model_text_makes_it_raise():
    rng = random.Random(0)
    seen = set()
    for _ in range(20_000):
        call = parse_tool_call("".join(rng.choices(PIECES, k=rng.randint(0, 25))))
        seen.add(call and call.fault)
        assert call is None or bool(call.fault) == bool(call.message)
    assert {None, "unclosed", "unopened", "not_json", "unknown_tool"} <= seen


@pytest.mark.parametrize("piece", [*PIECES, "<tool_call></tool_call>", "</think><tool_call>"])
def test_time_is_linear_in_the_text(piece):
    def seconds(count):
        text = "<tool_call>" + piece * count + "</tool_call>"
        times = []
        for _ in range(3):
            start = time.process_time()
            parse_tool_call(text)
            times.append(time.process_time() - start)
        return min(times)
    count = 200_000 // len(piece)
    assert seconds(4 * count) < 8 * seconds(count) + 0.02
