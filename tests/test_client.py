"""client.py, which compares a served checkpoint with our rollouts, with a scripted server."""
import json

import pytest

import client
from conftest import Echo, play, sod, tools

WORDS, PROGRAM = "First the product.", "print(6 * 7)"


def conversation(as_text):
    """(turns, messages of the last request) of a client whose server calls once, then answers."""
    call = {"id": "a1", "type": "function", "function": {
        "name": tools.TOOL_NAME, "arguments": json.dumps({"code": PROGRAM})}}
    said = [{"role": "assistant", "content": WORDS, "tool_calls": [call]},
            {"role": "assistant", "content": "\\boxed{42}"}]
    asked = []

    def ask(messages):
        asked.append(messages)
        return said.pop(0)

    start = [{"role": "user", "content": "Question 0: what is 6 * 7?"}]
    return client.converse(ask, Echo(), start, 8, as_text), asked[-1]


@pytest.mark.parametrize("as_text", [False, True])
def test_client_runs_the_parsed_call_and_sends_its_answer_back(as_text):
    turns, messages = conversation(as_text)
    assert turns == [(WORDS, PROGRAM), ("\\boxed{42}", None)]
    assert messages[-1] == {"role": "tool", "tool_call_id": "a1", "content": PROGRAM}
    assert ("tool_calls" in messages[-2]) is not as_text


def test_what_the_client_sends_is_what_a_rollout_shows_its_model(tokenizer):
    said = [f"{WORDS}\n{tools.render_tool_call(PROGRAM)}", "\\boxed{42}"]
    model, (rollout,) = play(tokenizer, said)
    turns, messages = conversation(as_text=True)
    sent = tokenizer.apply_chat_template(messages, tools=[tools.TOOL_SCHEMA], tokenize=False,
                                         add_generation_prompt=True)
    assert sod.encode(tokenizer, sent) == model.shown[0][1]
    assert client.turns_of(rollout) == turns
