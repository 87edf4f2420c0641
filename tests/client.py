"""Compare a checkpoint that a server runs with the rollouts that this project samples from it.

    pip install accelerate fastapi openai uvicorn
    transformers serve MODEL --port 8000 --device cpu --dtype float32
    python tests/client.py MODEL PROBLEMS --system "..."

Each problem is solved twice, greedily: by a client that sends the tool's schema, runs the calls
that the server parses and sends the tool's answers back; and by `sample_rollouts`.
`transformers serve` drops the words before a call from the history it is sent, so later turns
differ. With --as_text the client sends such a turn back as text, and whole conversations agree.
"""
import argparse
import json
import sys
import urllib.request
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import sod_mini as sod
import tools


def ask(url, model, messages, most):
    """The server's next message, {"role", "content", perhaps "tool_calls"}."""
    body = {"model": model, "messages": messages, "tools": [tools.TOOL_SCHEMA], "temperature": 0,
            "max_tokens": most}
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)["choices"][0]["message"]


def converse(ask, tool, messages, max_turns, as_text):
    """[(words, program or None) of each turn]: what a client sees of one conversation."""
    turns = []
    while len(turns) < max_turns:
        message = ask(messages)
        words = (message.get("content") or "").strip()
        if not (calls := message.get("tool_calls")):
            return turns + [(words, None)]
        program = json.loads(calls[0]["function"]["arguments"])["code"]
        turns.append((words, program))
        if as_text:
            message = {"role": "assistant",
                       "content": f"{words}\n{tools.render_tool_call(program)}".strip()}
        answer = tool.submit(tools.ToolCall(program)).result()
        messages = [*messages, message,
                    {"role": "tool", "tool_call_id": calls[0]["id"], "content": answer.text}]
    return turns


def turns_of(rollout):
    """The turns of a rollout in the form that `converse` returns."""
    return [(turn.text.partition("<tool_call>")[0].strip(), call and call.code)
            for turn in rollout.turns for call in [tools.parse_tool_call(turn.text)]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", help="the folder that the server was started with")
    parser.add_argument("problems", help="a file of problems")
    parser.add_argument("--url", default="http://localhost:8000/v1")
    parser.add_argument("--limit", type=int, default=12, help="problems to solve [12]")
    parser.add_argument("--system", default=sod.SYSTEM, help="system text")
    parser.add_argument("--max_response", type=int, default=400,
                        help="tokens of a rollout; for the server, of a turn [400]")
    parser.add_argument("--as_text", action="store_true", help="send calls back as text")
    given = parser.parse_args()
    config = sod.Config(**sod.PRESETS["gpu"] | dict(
        student=given.model, teacher="", train_data=given.problems, method="grpo",
        system=given.system, max_response=given.max_response, overlong_buffer=0))
    problems = tools.load_problems(given.problems)[:given.limit]
    tokenizer = sod.load_tokenizer(given.model)
    model = sod.load_model(given.model, torch.device("cpu"), torch.float32)
    with sod.load_tool(config)[0] as tool:
        agent = sod.Agent(config, model, None, tokenizer, tool)
        prompts = [(p, sod.encode_prompt(tokenizer, p, sod.Context(system=given.system))) for p in problems]
        # So small a top-p leaves only the likeliest token, which is greedy sampling.
        rollouts = sod.sample_rollouts(agent, model, prompts, (0, "client", 0), top_p=1e-6)
        server = partial(ask, given.url, given.model, most=given.max_response)
        first = whole = calls = 0
        for rollout in rollouts:
            start = [{"role": "system", "content": given.system},
                     {"role": "user", "content": rollout.problem.question}]
            served = converse(server, tool, start, config.max_turns, given.as_text)
            ours, finish_reason = turns_of(rollout), rollout.finish_reason
            if finish_reason == "length":  # its last turn is cut where the server's is not
                ours, served = ours[:-1], served[:len(ours) - 1]
            first += served[:1] == ours[:1]
            whole += served == ours
            calls += sum(program is not None for _, program in served)
            line = dict(served=served, ours=ours, finish_reason=finish_reason)
            print(json.dumps(line), flush=True)
    print(f"{len(rollouts)} problems: first turn the same in {first}, whole conversation in "
          f"{whole}; {calls} calls parsed by the server")


if __name__ == "__main__":
    main()
