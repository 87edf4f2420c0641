"""Forms of calls, tools of a user's own, and what student and teacher read before a question."""
import json
import sys
from dataclasses import replace

import pytest
import torch

import sod_mini as sod
import tools
from conftest import ROOT, SMALL, command, json_lines, play, scored_batch, small
from tools import PythonCalls

sys.path.insert(0, str(ROOT / "data"))
PYTHON = PythonCalls()
BLOCK = PYTHON.render

# --- Python blocks ------------------------------------------------------------------------------


@pytest.mark.parametrize("text, code, ignored", [
    (BLOCK("print(1)"), "print(1)\n", 0),
    ("I compute.\n" + BLOCK("x = 1\nprint(x)") + "\nDone?", "x = 1\nprint(x)\n", 0),
    (f"{BLOCK('1')}\n{BLOCK('2')}\n{BLOCK('3')}", "1\n", 2),
    (BLOCK("print(1)") + "\nSo \\boxed{1}.", "print(1)\n", 0),  # a guess before the tool's answer
    ("```py\n1\n```", "1\n", 0), ("  ```python  \n1\n  ```  ", "1\n", 0),
    (BLOCK('s = """\nnot ``` an end\n"""'), 's = """\nnot ``` an end\n"""\n', 0),
    ("1. So:\n   ```python\n   if 1:\n\n       print(2)\n   ```", "if 1:\n\n    print(2)\n", 0),
    ("```text\nno\n```\n" + BLOCK("1"), "1\n", 0), (BLOCK(""), "\n", 0),
    ("<think>\n" + BLOCK("2") + "\n</think>\n" + BLOCK("1"), "1\n", 0),
    (BLOCK("print('</think>')"), "print('</think>')\n", 0)])
def test_the_first_python_block_of_a_turn_is_its_call(text, code, ignored):
    assert PYTHON.parse(text) == tools.ToolCall(code=code, ignored=ignored)


@pytest.mark.parametrize("text", [
    "", "The answer is \\boxed{1}.", "```\nprint(1)\n```", "```text\n1\n```", "use `python`",
    "So \\boxed{1}, by\n" + BLOCK("print(1)"),  # a block after the answer is a part of the answer
    "<think>\n" + BLOCK("1") + "\n</think>\n\\boxed{1}"])
def test_a_turn_without_one_is_an_answer(text):
    assert PYTHON.parse(text) is None


def test_a_block_without_an_end_is_a_fault_that_is_told():
    for text in ("```python\nprint(1)", "so\n```python\n"):
        call = PYTHON.parse(text)
        assert call.fault == "unclosed" and not call.code and BLOCK("...") in call.message


def test_demonstrations_of_gsm8k_are_written_in_either_form(tmp_path):
    row = {"question": "How many?", "answer": "He has 6*7=<<6*7=42>>42.\n#### 42"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    import gsm8k_demonstrations
    for calls, form in tools.CALLS.items():
        target = tmp_path / f"{calls}.jsonl"
        assert gsm8k_demonstrations.main([str(tmp_path / "rows.jsonl"), str(target), "--calls",
                                          calls, "--slips", "0"]) == 0
        ((_, (turn, answer, last)),) = tools.load_demonstrations(target)
        assert form().parse(turn["content"]).code.strip() == "print(6*7)"
        assert answer["content"] == "42" and form().parse(last["content"]) is None


@pytest.mark.parametrize("text", ["42", "a\n```\n\\boxed{1}", "````\n```output", "", "`" * 9])
def test_the_tools_text_cannot_end_its_block(text):
    message = PYTHON.answer(text)
    first, *inside, last = message["content"].split("\n")
    assert message["role"] == "user" and first == last + "output" and set(last) == {"`"}
    assert last not in "\n".join(inside) and "\n".join(inside) == text


def test_a_conversation_in_python_blocks_is_the_templates_own_and_holds_no_forged_token(tokenizer):
    """What was sampled is kept; only the tool's turn is rendered, as a turn of the user."""
    code = "print('``' + '`')"
    model, (rollout,) = play(tokenizer, [BLOCK(code), "\\boxed{42}"], calls="python")
    assert [turn.outcome for turn in rollout.turns] == ["ok", ""] and rollout.correct
    text = tokenizer.decode(rollout.ids[len(rollout.prompt):])
    assert text == (f"{BLOCK(code)}<|im_end|>\n<|im_start|>user\n```output\n{code}\n\n```<|im_end|>\n"
                    "<|im_start|>assistant\n\\boxed{42}<|im_end|>")
    assert tools.TOOL_NAME not in tokenizer.decode(rollout.prompt)  # no schema
    forged, plain = (sod.encode_tool_turn(tokenizer, text, PYTHON) for text in ("<|im_end|>", "6"))
    control = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert forged.count(control) == plain.count(control) == 1


def test_a_demonstration_in_python_blocks_is_the_rollout_that_would_have_written_it(tokenizer):
    _, (rollout,) = play(tokenizer, [BLOCK("6 * 7"), "\\boxed{42}"], calls="python")
    messages = [{"role": "assistant", "content": rollout.turns[0].text},
                {"role": "tool", "content": rollout.turns[0].tool_text},
                {"role": "assistant", "content": rollout.turns[1].text}]
    context = sod.student_context(small(calls="python"))
    shown = sod.encode_demonstration(tokenizer, rollout.problem, messages, context)
    assert shown.ids == rollout.ids and shown.step_id == rollout.step_id


def test_where_a_program_is_asked_for_the_last_one_that_was_called_is_judged():
    problem = tools.Problem("q", "", "program", tests=[{"input": "", "output": "2"}])
    turns = [sod.Turn(text=BLOCK("print(1)")), sod.Turn(text=BLOCK("print(2)")), sod.Turn(text="Ok.")]
    r = sod.Rollout(problem, [], turns, finish_reason="answer")
    assert tools.last_program(sod.final_text(r, "python")) == "print(2)\n"
    assert sod.final_text(r, "hermes") == "Ok."
    assert sod.final_text(replace(r, problem=tools.Problem("q", "1")), "python") == "Ok."
    assert sod.final_text(replace(r, finish_reason="turns"), "python") == ""


NO_TOOLS = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_a_template_without_tools_serves_for_python_blocks_alone(tmp_path, capsys):
    tokenizer = sod.load_tokenizer(SMALL["student"])
    tokenizer.chat_template = NO_TOOLS
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(tools.UserError, match="does not show a tool .*--calls python"):
        sod.load_tokenizer(tmp_path)
    found = sod.load_tokenizer(tmp_path, False, PYTHON)
    sod.how_sampled(found, small(calls="python"), 1.0, 1.0)
    _, (rollout,) = play(found, [BLOCK("6 * 7"), "\\boxed{42}"], calls="python")
    assert rollout.correct


def test_a_special_tool_call_token_is_no_hindrance_to_python_blocks(tmp_path):
    tokenizer = sod.load_tokenizer(SMALL["student"])
    tokenizer.save_pretrained(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    sod.load_tokenizer(tmp_path, False, PYTHON)


# --- Tools of one's own -------------------------------------------------------------------------

MINE = '''"""Two tools."""
import math


def add(a: int, b: int) -> int:
    """Add two whole numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


def circle(radius: float) -> float:
    """Area of a circle.

    Args:
        radius: in metres
    """
    return math.pi * _square(radius)


def _square(x):
    return x * x


if __name__ == "__main__":
    raise SystemExit("a file of tools is no program")
'''


@pytest.fixture
def mine(tmp_path):
    sod.call_form.cache_clear()
    (tmp_path / "mine.py").write_text(MINE)
    return str(tmp_path / "mine.py")


def called(name, **arguments):
    return f'<tool_call>\n{json.dumps({"name": name, "arguments": arguments})}\n</tool_call>'


@pytest.fixture(scope="module")
def sandbox():
    with tools.PythonTool(workers=1, modules=()) as tool:
        yield tool


@pytest.mark.parametrize("text, outcome, answer", [
    (called("add", a=2, b=3), "ok", "5"), (called("circle", radius=1), "ok", "3.14159"),
    (called("code_interpreter", code="6 * 7"), "ok", "42"),
    (called("add", a=2), "error", "missing 1 required positional argument: 'b'"),
    (called("add", a=2, b="x"), "error", "TypeError"),
    (called("add", a=None, b=True), "error", "NoneType"),
    (called("_square", x=2), "unknown_tool", "the tools are code_interpreter, add, circle"),
    ('<tool_call>{"name": ["add"]}</tool_call>', "unknown_tool", "the tools are code_interpreter"),
    ('<tool_call>{"name": "add", "arguments": [2, 3]}</tool_call>', "bad_arguments", "JSON object"),
])
def test_a_function_of_a_file_is_called_in_the_sandbox_and_faults_are_told(mine, sandbox, text,
                                                                           outcome, answer):
    form = sod.call_form("hermes", f"{tools.TOOL_NAME},{mine}")
    seen = sandbox.submit(form.parse(text)).result()
    assert (seen.outcome, answer in seen.text) == (outcome, True), seen.text


def test_a_fault_without_the_interpreter_shows_a_call_of_a_tool_that_there_is(mine):
    call = sod.call_form("hermes", mine).parse("<tool_call>{</tool_call>")
    assert '{"name": "add", "arguments": {...}}' in call.message
    assert sod.call_form("hermes", mine).parse(called("code_interpreter", code="1")).fault


def test_functions_are_at_hand_in_every_python_block(mine, sandbox):
    form = sod.call_form("python", f"{tools.TOOL_NAME},{mine}")
    assert sandbox.submit(form.parse(BLOCK("add(40, 2)"))).result().text == "42"
    guarded = 'if __name__ == "__main__":\n    print(add(40, 2))'
    assert sandbox.submit(form.parse(BLOCK(guarded))).result().text == "42"


def test_the_prompt_shows_the_schemas_and_a_start_line_names_the_tools(tokenizer, mine):
    config = small(tools=mine)
    shown = tokenizer.decode(sod.encode_prompt(tokenizer, tools.Problem("q", "1"),
                                               sod.student_context(config)))
    assert "add" in shown and "circle" in shown and tools.TOOL_NAME not in shown
    line = sod.how_sampled(tokenizer, config, 1.0, 1.0)
    assert line.endswith("turn: add, circle") and "code_interpreter" not in line


def test_the_readmes_file_of_tools_gives_the_lines_that_it_shows(tmp_path, sandbox):
    readme = (ROOT / "README.md").read_text()
    section = readme[readme.index("## Calls, tools and contexts"):]
    (tmp_path / "mine.py").write_text(section.partition("```python\n")[2].partition("```\n")[0])
    config = small(tools=f"{tools.TOOL_NAME},{tmp_path / 'mine.py'}")
    line = sod.how_sampled(sod.load_tokenizer(SMALL["student"]), config, 1.0, 1.0)
    shown = "tool schema in the system turn: code_interpreter, is_prime, lcm"
    assert line.endswith(shown) and shown in " ".join(section.split())
    calls = sod.student_context(config).calls
    for text, value in ((called("lcm", a=4, b=6), "12"), (called("is_prime", n=97), "True")):
        assert sandbox.submit(calls.parse(text)).result().text == value


@pytest.mark.parametrize("text, sentence", [
    ("def f(x): return x", "the function f gives no schema"),
    ('def f(x: int):\n    """No line for x."""', "the function f gives no schema"),
    ("x = 1", "which holds no function"), (None, "which is no Python file"),
])
def test_files_that_give_no_tool_are_refused_before_a_model_is_loaded(tmp_path, capsys, text,
                                                                      sentence):
    if text:
        (tmp_path / "bad.py").write_text(text)
    options = dict(SMALL, tools=tmp_path / "bad.py", out=tmp_path / "out")
    assert command(options) == 1
    said = capsys.readouterr()
    assert sentence in said.err and "student " not in said.out and not list(tmp_path.glob("out/*"))


def test_a_tool_named_twice_is_refused(mine):
    with pytest.raises(tools.UserError, match="holds add twice; name each tool once"):
        sod.call_form("hermes", f"{mine},{mine}")


def test_a_file_that_the_sandbox_cannot_run_is_refused(tmp_path, mine):
    source = MINE.replace("import math", "import math, os\nos.listdir('/')")
    (tmp_path / "listing.py").write_text(source)
    with pytest.raises(tools.UserError, match="(?s)does not run in the sandbox .error.*Permission"):
        sod.load_tool(small(tools=str(tmp_path / "listing.py"), silent_rate=0.0))


def test_a_student_that_knows_another_tool_meets_a_fault_which_metrics_and_rows_name(tmp_path, mine):
    options = dict(SMALL, tools=mine, iterations=1, eval_data="", out=tmp_path, name="r",
                   silent_rate=0, num_minibatches=1, max_response=100, method="grpo")
    assert command(options) == 0
    (m,) = json_lines(tmp_path / "r/metrics.jsonl")
    assert m["outcomes"].get("unknown_tool", 0) > 2 and m["tool_fail"] > 0.8
    card = (tmp_path / "r/checkpoint/README.md").read_text()
    assert f"with tools: `{mine}`, called in the form `hermes`" in card


def test_a_small_random_model_trains_with_tools_of_ones_own(tmp_path, mine):
    options = dict(SMALL, tools=mine, iterations=1, eval_data="", out=tmp_path, name="r",
                   init="random", num_minibatches=1, max_response=60, overlong_buffer=0,
                   method="grpo")
    assert command(options) == 0
    assert len(json_lines(tmp_path / "r/rollouts.jsonl")) == 12


def test_calls_of_ones_own_tool_are_counted_and_stored_under_its_name(tokenizer, tmp_path):
    mine = str(tmp_path / "mine.py")
    (tmp_path / "mine.py").write_text(MINE.partition("if __name__")[0])
    _, rollouts = play(tokenizer, [called("add", a=1, b=2), "\\boxed{42}"], tools=mine)
    m = sod.call_metrics(rollouts[0].turns, 1)
    assert m["outcomes"] == {"add: ok": 1} and m["tool_calls"] == 1 and m["tool_fail"] == 0
    batch = sod.collate(rollouts, "cpu")
    batch.A = torch.zeros(1)
    (row,) = sod.rollout_rows(batch, 1, tokenizer, 0)
    assert row["turns"][0]["name"] == "add" and "name" not in row["turns"][1]


NO_PROGRAM = {  # what makes a difference between a program and the body of a function
    "bom", "markdown_fence",  # only of the text of a program these are taken away
    "evil_repr_result", "repr_not_a_string", "infinite_repr",  # only a program's last line is shown
    "close_every_fd",  # what the function returns cannot be printed any more
    "multiprocessing_pool", "audit_hook"}  # these ask for the name __main__, or hook its end


@pytest.mark.slow
def test_hostile_programs_end_as_bodies_of_ones_own_tools_as_they_do_alone():
    path = ROOT.parent / "shared" / "hostile_snippets.jsonl"
    if not path.exists():
        pytest.skip("the corpus of hostile programs is not here")
    rows = json_lines(path)
    codes = [tools.call_of_function(tools.Tool("f", {}, (
        f"def f():\n    exec({row['code']!r}, globals())\n    return ''\n")), {}) for row in rows]
    with tools.PythonTool(timeout=1.0) as tool:
        alone, inside = tool.run([row["code"] for row in rows]), tool.run(codes)
    differ = {row["name"] for row, a, b in zip(rows, alone, inside) if a.outcome != b.outcome}
    assert len(rows) > 200 and differ <= NO_PROGRAM
    assert all(seen.outcome != "sandbox_error" for seen in inside)


# --- What is read before the question -----------------------------------------------------------

WORKED = {"messages": [
    {"role": "user", "content": "Start with 1. Add 2."},
    {"role": "assistant", "content": tools.render_tool_call("print(1 + 2)")},
    {"role": "tool", "content": "3"}, {"role": "assistant", "content": "\\boxed{3}"}]}


@pytest.fixture
def worked(tmp_path):
    sod.worked_examples.cache_clear()
    (tmp_path / "worked.jsonl").write_text(json.dumps(WORKED))
    return str(tmp_path / "worked.jsonl")


@pytest.mark.parametrize("calls", tools.CALLS)
def test_worked_examples_are_real_turns_with_calls_and_tool_turns(tokenizer, worked, calls):
    config = small(examples=worked, system="Be brief.", calls=calls)
    problem = tools.Problem("Start with 5. Add 6.", "11")
    ids = sod.encode_prompt(tokenizer, problem, sod.student_context(config))
    shown = tokenizer.decode(ids)
    order = [shown.index(text) for text in ("Be brief.", "Start with 1.", "print(1 + 2)", "\n3\n",
                                            "\\boxed{3}", "Start with 5.")]
    assert order == sorted(order) and shown.endswith("<|im_start|>assistant\n")
    assert ids.count(tokenizer.convert_tokens_to_ids("<tool_call>")) >= 1  # not cut in two
    assert ("```output\n3\n```" in shown) == (calls == "python")


def beside(name, arguments, content=None):
    """An assistant turn whose call stands beside its text, as OpenAI's API has it."""
    function = {"name": name, "arguments": arguments}
    return {"role": "assistant", "content": content,
            "tool_calls": [{"id": "1", "type": "function", "function": function}]}


def asked(turn):
    """A conversation with this turn after its question."""
    return {"messages": [WORKED["messages"][0], turn, *WORKED["messages"][2:]]}


CODE = {"code": "print(1 + 2)"}


@pytest.mark.parametrize("arguments", [CODE, json.dumps(CODE)])
@pytest.mark.parametrize("content", [None, "", "I ask."])
@pytest.mark.parametrize("calls", tools.CALLS)
def test_a_call_beside_its_turn_becomes_the_text_that_a_model_is_to_write(tmp_path, calls, content,
                                                                          arguments):
    path = tmp_path / "shown.jsonl"
    path.write_text(json.dumps(asked(beside(tools.TOOL_NAME, arguments, content))))
    form = sod.call_form(calls, tools.TOOL_NAME)
    text = (f"{content}\n" if content else "") + form.render(CODE["code"])
    turn = {"role": "assistant", "content": text}
    ((_, solution),) = tools.load_demonstrations(path, form)
    assert solution == [turn, *WORKED["messages"][2:]]
    context = sod.student_context(small(calls=calls, examples=str(path)))
    assert context.examples[1] == turn and sod.teacher_context(
        small(calls=calls, teacher_examples=str(path))).examples[1] == turn
    question = {"role": "user", "content": "q"}
    path.write_text(json.dumps({"messages": [*asked(turn)["messages"], question], "answer": 1}))
    (kept,) = sod.load_train_set(sod.load_tokenizer(SMALL["student"]),
                                 small(calls=calls, train_data=str(path), max_prompt=500), 2000)
    assert kept[0].messages[1] == turn


def test_a_call_of_ones_own_function_is_written_in_either_form(tmp_path, mine, sandbox):
    (tmp_path / "shown.jsonl").write_text(json.dumps(asked(beside("add", '{"a": 1, "b": 2}'))))
    written = []
    for calls in tools.CALLS:
        form = sod.call_form(calls, mine)
        ((_, (turn, *_)),) = tools.load_demonstrations(tmp_path / "shown.jsonl", form)
        assert sandbox.submit(form.parse(turn["content"])).result().text == "3"
        written.append(turn["content"])
    assert written == [called("add", a=1, b=2), BLOCK("print(add(a=1, b=2))")]


@pytest.mark.parametrize("calls, turn, message", [
    ("hermes", beside("bash", CODE), "found the calls .*of code_interpreter, with the name"),
    ("hermes", beside(tools.TOOL_NAME, "print(1)"), "found the calls"),
    ("hermes", beside(tools.TOOL_NAME, {"code": 1}), "found the calls"),
    ("hermes", beside(tools.TOOL_NAME, {**CODE, "language": "C"}), "found the calls"),
    ("hermes", {**beside(tools.TOOL_NAME, CODE), "tool_calls": [{}]}, "found the calls"),
    ("hermes", {**beside(tools.TOOL_NAME, CODE), "tool_calls": 2 * [
        {"function": {"name": tools.TOOL_NAME, "arguments": CODE}}]}, "needed one call a turn"),
    ("hermes", beside(tools.TOOL_NAME, {"code": "'</tool_call>'"}), "read as another call once"),
    ("python", beside(tools.TOOL_NAME, {"code": "'\'\'\n```\n\'\''"}), "read as another call"),
    ("python", beside(tools.TOOL_NAME, CODE, "So \\boxed{3}."), "read as another call once"),
    ("hermes", beside(tools.TOOL_NAME, CODE, called("code_interpreter", code="1")), "read as anot"),
    ("hermes", {**beside(tools.TOOL_NAME, CODE), "role": "user"}, "found the turn .*needed the role"),
])
def test_a_call_that_the_form_cannot_write_is_one_sentence_with_its_line(tmp_path, calls, turn,
                                                                         message):
    path = tmp_path / "shown.jsonl"
    path.write_text(json.dumps(WORKED) + "\n" + json.dumps(asked(turn)))
    with pytest.raises(tools.UserError, match=f"shown.jsonl, line 2: .*{message}") as caught:
        tools.load_demonstrations(path, sod.call_form(calls, tools.TOOL_NAME))
    assert "\n" not in str(caught.value)


def test_a_rows_own_examples_come_after_those_of_the_run(tokenizer, worked):
    own = [*WORKED["messages"][:1], {"role": "assistant", "content": "\\boxed{4}"},
           {"role": "user", "content": "q"}]
    problem = tools.Problem("q", "1", messages=[{"role": "system", "content": "Mine."}, *own])
    shown = tokenizer.decode(sod.encode_prompt(
        tokenizer, problem, sod.student_context(small(examples=worked, system="Theirs."))))
    assert "Mine." in shown and "Theirs." not in shown
    assert shown.index("\\boxed{3}") < shown.index("\\boxed{4}")


def test_a_teacher_with_its_own_context_scores_the_students_tokens_after_that_prompt(worked):
    agent, batch = scored_batch(teacher_examples=worked, teacher_system="You are careful.",
                                max_response=120)
    _, plain = scored_batch(max_response=120)
    assert [r.ids for r in batch.rollouts] == [r.ids for r in plain.rollouts]
    assert torch.equal(batch.logp_s, plain.logp_s) and not torch.equal(batch.logp_t, plain.logp_t)
    context = sod.teacher_context(agent.config)
    assert context.system == "You are careful." and len(context.examples) == 4
    for i, r in enumerate(batch.rollouts[:3]):
        prompt = sod.encode_prompt(agent.tokenizer, r.problem, context)
        ids = torch.tensor([prompt + r.ids[len(r.prompt):]])
        with torch.no_grad():
            logp = agent.teacher(ids).logits[0, :-1].log_softmax(-1)
        own = logp.gather(1, ids[0, 1:, None])[len(prompt) - 1:, 0]
        sampled = batch.sampled[i, len(r.prompt):len(r.ids)]
        torch.testing.assert_close(batch.logp_t[i, len(r.prompt):len(r.ids)][sampled],
                                   own[sampled], atol=1e-4, rtol=1e-4)


def test_the_teachers_longer_prompt_is_held_against_its_window(worked, capsys):
    tokenizer, config = sod.load_tokenizer(SMALL["student"]), small(teacher_examples=worked)
    longest = max(len(sod.encode_prompt(tokenizer, p, sod.teacher_context(config)))
                  for p in tools.load_problems(config.train_data))
    kept = sod.load_train_set(tokenizer, config, longest + config.max_response - 1)
    assert 0 < len(kept) < 2000 and "too long and skipped" in capsys.readouterr().out


def test_examples_with_a_system_turn_are_refused(tmp_path, worked):
    rows = {"messages": [{"role": "system", "content": "s"}, *WORKED["messages"]]}
    (tmp_path / "system.jsonl").write_text(json.dumps(rows))
    with pytest.raises(tools.UserError, match="holds a system turn"):
        sod.worked_examples(str(tmp_path / "system.jsonl"))


def test_an_evaluation_stores_the_form_the_tools_and_the_examples(mine, worked):
    import evaluate
    config = evaluate.EvalConfig(calls="python", tools=mine, examples=worked)
    stored = evaluate.stored_settings(config)
    assert (stored["calls"], stored["tools"], stored["examples"]) == ("python", mine, worked)


def test_a_run_in_python_blocks_trains(tmp_path, worked, capsys):
    """The embedded student does not know the form: its JSON calls are answers, and wrong."""
    options = dict(SMALL, calls="python", examples=worked, iterations=2, eval_problems=2,
                   eval_samples=1, max_prompt=400, max_response=100, out=tmp_path, name="r",
                   method="grpo", preflight="false")
    assert command(options) == 0
    assert "calls as python blocks, no tool schema; worked examples of" in capsys.readouterr().out
    assert len(json_lines(tmp_path / "r/metrics.jsonl")) == 2
