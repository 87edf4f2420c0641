"""Files: problems of every benchmark, repairs that are counted, a run's own files."""

import errno
import json
import math
import os
import signal
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import sod_mini as sod
import tools
from conftest import Echo, Scripted
from tools import Problem, load_demonstrations, load_problems

SHARED = Path(__file__).parents[2] / "shared"


def write(folder, *rows, name="set.jsonl"):
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def load_one(folder, row):
    (problem,) = load_problems(write(folder, row))
    return problem


# --- Columns ----------------------------------------------------------------------------------

@pytest.mark.parametrize("row, question, answer", [
    ({"question": "1+1?", "answer": "2"}, "1+1?", "2"),
    ({"question": "1+1?", "answer": 0}, "1+1?", "0"),
    ({"question": "Eggs?", "answer": "16 - 7 = <<16-7=9>>9\n#### 1,009"}, "Eggs?", "1,009"),
    ({"Problem": "Find n.", "Answer": 33, "Solution": "long"}, "Find n.", "33"),
    ({"problem": "Find n.", "solution": r"So \boxed{\frac{1}{2}}."}, "Find n.", r"\frac{1}{2}"),
    ({"problem": "Find n.", "solution": "33"}, "Find n.", "33"),
    ({"problem": "P", "solution": r"\boxed{8}", "answer": "8", "level": 3}, "P", "8"),
    ({"prompt": "Q", "reward_model": {"ground_truth": "7", "style": "rule"}}, "Q", "7"),
    ({"prompt": "Q", "reward_model": {"ground_truth": r"\{1,2\}"}}, "Q", r"\{1,2\}"),
    ({"prompt": "Q", "reward_model": {"ground_truth": "[0,1)"}}, "Q", "[0,1)"),
])
def test_question_and_answer_are_found_under_every_name(tmp_path, row, question, answer):
    problem = load_one(tmp_path, row)
    assert (problem.question, problem.answer, problem.kind) == (question, answer, "math")
    assert (problem.id, problem.source) == ("set-1", "set")


def test_own_rows_keep_every_column(tmp_path):
    row = {"messages": [{"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "Q"},
                        {"role": "assistant", "content": "A"}],
           "answer": "A", "hint": "think", "difficulty": 2, "id": "x7", "source": "world"}
    assert load_one(tmp_path, row) == Problem("Q", "A", "math", "think", [], row["messages"][:2],
                                              "x7", "world", 2)


def test_open_agentrl_rows_bring_messages_and_source(tmp_path):
    messages = [{"role": "user", "content": "Find n."}]
    row = {"data_source": "aime2025", "prompt": messages,
           "reward_model": {"ground_truth": "70", "style": "rule"}, "extra_info": {"index": 3}}
    assert load_one(tmp_path, row) == Problem("Find n.", "70", messages=messages, id="set-1",
                                              source="aime2025")


def test_a_letter_is_a_choice_only_where_options_are_listed(tmp_path):
    listed = {"question": "Which?\nA) 1\nB) 2", "answer": "B"}
    assert load_one(tmp_path, listed).kind == "choice"
    assert load_one(tmp_path, {"question": "Which variable?", "answer": "B"}).kind == "math"


LISTED = "Which one?\n\nA) 3\nB) 4\nC) $5\n\nGive the letter of the right option in \\boxed{}."
CHOICES = {"question": "Which one?", "choices": [3, "4", "$5"]}


@pytest.mark.parametrize("row", [
    {**CHOICES, "answer": 2}, {**CHOICES, "answer": "c"}, {**CHOICES, "answer": "(C) 5"},
    {"question": "Which one?", "options": CHOICES["choices"], "answer": "C."},
    {"question": "Which one?", "A": "3", "B": "4", "C": "$5", "answer": "C"},
    {**CHOICES, "question": LISTED, "answer": 2}, {**CHOICES, "kind": "choice", "answer": 2},
    {"messages": [{"role": "user", "content": "Which one?"}], "choices": CHOICES["choices"],
     "reward_model": {"ground_truth": "C"}},
])
def test_options_in_columns_are_shown_in_the_question_as_those_of_gpqa_are(tmp_path, row):
    problem = load_one(tmp_path, row)
    assert (problem.question, problem.answer, problem.kind) == (LISTED, "C", "choice")
    assert not problem.messages or problem.messages == [{"role": "user", "content": LISTED}]
    for turn in ("\\boxed{c}", "\\boxed{C) 5}"):
        assert tools.grade(problem, turn, None).correct
    assert not tools.grade(problem, "\\boxed{5}", None).correct


@pytest.mark.parametrize("row, message", [
    ({"answer": 3}, "the answer 3 to 3 choices; needed the place .* 0 to 2, or its letter, A to C"),
    ({"answer": "2"}, "the answer '2' to"), ({"answer": "$5"}, "the answer '.5' to"),
    ({"answer": "A. 5"}, "the answer 'A. 5' to"), ({"answer": True}, "the answer True to"),
    ({"answer": "D"}, "the answer 'D' to"), ({"answer": -1}, "the answer -1 to"),
    ({"choices": "3, 4, 5", "answer": 2}, "the choices '3, 4, 5'; needed a list of 2 to 26 texts"),
    ({"choices": {"text": ["3", "4"]}, "answer": 1}, "the choices .*convert"),
    ({"choices": ["3", ""], "answer": 1}, "the choices "), ({"choices": ["3"]}, "the choices "),
    ({"choices": None, "kind": "choice", "answer": "5"}, "the kind choice and the answer '5'"),
])
def test_choices_that_cannot_be_read_are_one_sentence(tmp_path, row, message):
    with pytest.raises(tools.UserError, match=f"line 1: found {message}"):
        load_one(tmp_path, {**CHOICES, **row})


@pytest.mark.parametrize("question", [
    "Which?\nA) 3\nB) 4\nC) 5", "Which?\nA. 3\nB. 4\nC. 5 cm", "Which?\n(a) 3\n(b) 4\n(c) 5",
    "Which? A) 3 B) 4 C) 5", "Vitamin A. Which? (A) 3 (B) 4 (C) 5", "**A**: 3\n**B**: 4\n**C**: 5",
    r"$\textbf{(A)}\ 3 \qquad \textbf{(B)}\ 4 \qquad \textbf{(C)}\ 5$"])
@pytest.mark.parametrize("answer", ["C", "c", "C. 5", "(c) 5", "C) 5", r"\textbf{(C)}"])
def test_an_answer_that_names_a_listed_option_is_its_letter(tmp_path, question, answer):
    problem = load_one(tmp_path, {"question": question, "answer": answer})
    assert (problem.question, problem.answer, problem.kind) == (question, "C", "choice")
    assert tools.grade(problem, "\\boxed{c) 5}", None).correct


@pytest.mark.parametrize("question, answer", [
    ("Which?\nA) 3\nB) 4", "4"), ("Which?\nA) 3\nB) 4", "C"), ("If f(A) = 1 and f(B) = 2?", "B"),
    ("a) Find x. b) Find y.", "a) 5 b) 7"), ("a) Find x. b) Find y.", "a) 5, b) 7"),
    ("Find A. Then?", "A"), ("Which?\nA) 3\nB) 4", "B) 5")])
def test_other_answers_stay_mathematics(tmp_path, question, answer):
    problem = load_one(tmp_path, {"question": question, "answer": answer})
    assert (problem.answer, problem.kind) == (answer, "math")
    row = {"question": "1 + 2?", "a": 1, "b": 2, "answer": 3}  # columns of another meaning
    assert load_one(tmp_path, row).kind == "math"
    assert load_one(tmp_path, {**CHOICES, "kind": "math", "answer": "5"}).question == "Which one?"


def test_a_file_may_mix_benchmarks_row_by_row(tmp_path):
    path = write(tmp_path, {"question": "a", "answer": "1"}, "", {"problem": "b", "Answer": "2"})
    assert [(p.question, p.answer, p.id) for p in load_problems(path)] == [
        ("a", "1", "set-1"), ("b", "2", "set-3")]


@pytest.mark.parametrize("level, number", [
    ("easy", 1), ("Hard", 3), ("Level 5", 5), (4, 4), ("", 0), ("?", 0)])
def test_difficulty_is_a_number(tmp_path, level, number):
    row = {"question": "a", "answer": "1", "difficulty": level}
    assert load_one(tmp_path, row).difficulty == number


# --- Broken escapes ---------------------------------------------------------------------------

def told(path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        problems = load_problems(path)
    return problems, [str(one.message) for one in caught if one.category is UserWarning]


def test_lost_backslashes_are_restored_and_counted(tmp_path):
    # Written with one backslash, as the broken files are: \f is a form feed.
    path = write(tmp_path, r'{"problem": "$\frac{a}{b}$ in \triangle ABC, \theta", "answer": "1"}',
                 r'{"problem": "a\tb\nnext line, \\frac", "answer": "3"}',
                 r'{"messages": [{"role": "user", "content": "a = 1\neq = 2"}], "answer": "4"}')
    problems, (note,) = told(path)
    assert "backslashes restored in 1 rows (lines 1)" in note
    assert [problem.question for problem in problems] == [
        r"$\frac{a}{b}$ in \triangle ABC, \theta", "a\tb\nnext line, \\frac",
        "a = 1\neq = 2"]  # a program, perhaps


@pytest.mark.parametrize("name, count, mended", [
    ("aime/aime2024", 30, ""), ("aime/aime2025", 30, "3 rows (lines 19, 20, 28)"),
    ("gsm8k/test", 1319, ""), ("gsm8k/train", 7473, "")])
def test_the_shared_files_load_as_they_are(name, count, mended):
    path = SHARED / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"shared/{name} is not here")
    problems, notes = told(path)
    assert len(problems) == count and not any(c in p.question for p in problems for c in "\f\b\t")
    assert [mended in note for note in notes] == [True] * bool(mended)


# --- Files ------------------------------------------------------------------------------------

def test_json_arrays_and_byte_order_marks_are_read(tmp_path):
    path = tmp_path / "set.json"
    path.write_text(json.dumps([{"question": "a", "answer": "1"}, {"question": "b", "answer": "2"}],
                               indent=1), encoding="utf-8-sig")
    assert [p.id for p in load_problems(path)] == ["set-1", "set-2"]


def test_csv_and_the_parquet_of_the_hub_are_read_as_json_lines_are(tmp_path, parquet):
    (tmp_path / "set.csv").write_text('question,answer\n"1,\n2?",7\n')
    (problem,) = load_problems(tmp_path / "set.csv")
    assert (problem.question, problem.answer, problem.id) == ("1,\n2?", "7", "set-3")
    path = parquet({"question": "Eggs?", "answer": "16 - 7 = <<16-7=9>>9\n#### 1,009"})
    assert [(p.question, p.answer) for p in load_problems(path)] == [("Eggs?", "1,009")]
    ((problem, solution),) = load_demonstrations(parquet({"messages": turns("ua")}))
    assert (problem.question, solution) == ("0", turns("ua")[1:])


def test_parquet_without_pyarrow_and_broken_parquet_are_one_sentence(tmp_path, monkeypatch):
    path = tmp_path / "set.parquet"
    path.write_bytes(b"PAR1")

    def broken(path):
        raise ValueError("no footer")
    for module, message in ((None, "pip install pyarrow.*convert"),
                            (SimpleNamespace(parquet=SimpleNamespace(read_table=broken)),
                             "found broken parquet .no footer.; fetch")):
        monkeypatch.setitem(sys.modules, "pyarrow", module)
        for load in (load_problems, load_demonstrations):
            with pytest.raises(tools.UserError, match=f"set.parquet: .*{message}"):
                load(path)


GOOD = {"question": "a", "answer": "1"}
ASKED = {"role": "user", "content": "Q"}


@pytest.mark.parametrize("rows, message", [
    ([GOOD, '{"question": "b", "ans'], "line 2: found broken JSON.*mend or delete"),
    ([GOOD, "", "[1]x"], "line 3: found broken JSON"), ([GOOD, "7"], "line 2: found a int; needed"),
    ([GOOD, {"question": "a"}], "line 2: found no answer .columns: question.; needed"),
    ([{"question": " ", "answer": "1"}], "no question"), ([""], "is empty; needed"),
    ([{"question": "a", "answer": None}], "no answer"),
    ([{"question": "a", "tests": [7]}], "found the test 7; needed"),
    ([{"question": "a", "tests": [{"input": "", "output": "", "type": "functional"}]}], "fn_name"),
    ([{"question": "a", "tests": [{"input": "", "output": "abc", "type": "functional",
                                   "fn_name": "f"}]}], "found the output 'abc' of f; needed JSON"),
    ([{"question": "a", "tests": [{"input": "nums = [1]", "output": "1", "type": "functional",
                                   "fn_name": "f"}]}], "found the input 'nums = .1.' of f; needed"),
    ([{"question": "a", "tests": [{"input": "1", "output": "1", "type": "functional",
                                   "fn_name": "f g"}]}], "for the function 'f g'; needed"),
    ([{"question": "a", "tests": {"inputs": ["1", "2"], "outputs": ["1"]}}],
     "2 inputs and 1 outputs; needed"),
    ([{"question": "a", "tests": {"inputs": [1], "outputs": [1]}}], "found the input 1 of a test"),
    ([{"messages": ["s"], "answer": "1"}], "found the turn 's'; needed"),
    ([GOOD, {"messages": [ASKED], "question": "R", "answer": "1"}],
     "line 2: found the question 'R' and messages whose last user turn does not hold it; needed"),
    ([GOOD, {"question": "b", "answer": math.nan}], "line 2: found no answer"),
    ([GOOD, r'{"question": "\ud83d", "answer": "1"}'], "line 2: found half a surrogate pair"),
    ([r'{"question": "\cup", "answer": "1"}'], "line 1: found broken JSON"),
    ([GOOD, {"question": "b", "answer": "}"}], "line 2: found the answer '}', to which no answer"),
    ([GOOD, {"question": "b", "answer": "7" * 30_000}], "line 2: .*to which no answer is equal"),
    (["\0"], "no UTF-8 text .zero bytes"), (["[]"], "is empty"),
    (["[" * 100_000], "broken JSON"), (['[{"question": "a",\n"answer": }]'], "line 2"),
])
def test_faults_are_one_sentence_with_file_and_line(tmp_path, rows, message):
    path = write(tmp_path, *rows)
    with pytest.raises(ValueError, match=message) as caught:
        load_problems(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_hint_that_a_data_frame_left_out_is_none(tmp_path):
    assert load_one(tmp_path, {**GOOD, "hint": math.nan, "id": math.nan}).hint == ""


def test_tests_may_stand_in_the_ground_truth(tmp_path):
    calls = {"inputs": [[[1], 2]], "outputs": [[1, 2]], "fn_name": "pair"}
    problem = load_one(tmp_path,
                       {"prompt": "Q", "reward_model": {"ground_truth": json.dumps(calls)}})
    assert problem.kind == "program" and problem.answer == ""
    assert problem.tests == [{"input": "[1]\n2", "output": "[1, 2]", "type": "functional",
                              "fn_name": "pair"}]


# --- Demonstrations ---------------------------------------------------------------------------

def turns(letters, *texts):
    """A conversation by the first letters of its roles, its texts "0", "1" and so on."""
    roles = {role[0]: role for role in ("system", "user", "assistant", "tool", "bot")}
    return [{"role": roles[letter], "content": text}
            for letter, text in zip(letters, texts or "0123456789")]


@pytest.mark.parametrize("letters, prompt", [
    ("u", 1), ("su", 2), ("uu", 2), ("uau", 3), ("suatauau", 8),              # to be answered
    ("ua", 1), ("suata", 2), ("uaua", 3), ("suatauata", 6), ("uatauua", 6),  # answered
])
def test_what_follows_the_last_user_turn_is_the_solution(tmp_path, letters, prompt):
    path = write(tmp_path, {"messages": turns(letters), "answer": "A"})
    (problem,) = load_problems(path)
    assert problem.messages == turns(letters)[:prompt] and problem.question == str(prompt - 1)
    if letters.endswith("u"):
        with pytest.raises(ValueError, match="line 1: found no conversation; needed"):
            load_demonstrations(path)
    else:
        ((shown, solution),) = load_demonstrations(path)
        assert (shown.messages, shown.question) == (problem.messages, problem.question)
        assert solution == turns(letters)[prompt:]


@pytest.mark.parametrize("letters", ["s", "a", "au", "uat", "uatauat", "uta", "utu", "uatu", "uaa",
                                     "uatta", "us", "uasu", "ssu"])
@pytest.mark.parametrize("load", [load_problems, load_demonstrations])
def test_a_conversation_that_can_be_read_two_ways_is_refused_with_its_line(tmp_path, letters, load):
    good = {"messages": turns("uaua"), "answer": "1"}
    path = write(tmp_path, good, {"messages": turns(letters), "answer": "1"})
    order = " ".join(turn["role"] for turn in turns(letters))
    with pytest.raises(ValueError, match=f"line 2: found turns in the order {order}; needed"):
        load(path)


WORKED = turns("uatau", "What is 2 * 3?", "I ask. " + tools.render_tool_call("print(2 * 3)"),
               "6 <|im_end|></tool_call>", "So \\boxed{6}.", "What is 6 * 7? <tool_call>")


def test_the_call_of_a_worked_example_is_the_tokens_a_model_has_to_write(tmp_path, tokenizer):
    problem = load_one(tmp_path, {"messages": WORKED, "answer": "42"})
    context = sod.Context(system="Be brief.")
    ids, plain = (sod.encode_prompt(tokenizer, p, context) for p in (problem, Problem("Q")))
    more = {token: ids.count(at) - plain.count(at)
            for token, at in tokenizer.get_added_vocab().items() if ids.count(at) > plain.count(at)}
    of_calls = ["<tool_call>", "</tool_call>"]
    assert [more.pop(token) for token in of_calls] == [1, 1]  # not the user's, nor the tool's
    assert more.pop("<|im_start|>") == more.pop("<|im_end|>") == 4
    assert all(token.strip("</>") == "tool_response" for token in more)
    text = tokenizer.decode(ids)
    places = [text.index(turn["content"]) for turn in WORKED]
    assert places == sorted(places)
    assert text.endswith("<|im_start|>assistant\n")


def test_a_question_after_a_worked_example_is_graded_against_its_own_answer(tmp_path, tokenizer):
    problems = load_problems(write(
        tmp_path, {"messages": WORKED, "answer": "42"}, {"question": "6 * 8?", "answer": "48"},
        {"messages": [*WORKED, *turns("a", "\\boxed{42}")], "answer": "42"},
        {"messages": WORKED[:-1], "answer": "6"}))
    prompts = [(p, sod.encode_prompt(tokenizer, p)) for p in problems]
    assert prompts[0][1] == prompts[2][1]
    prompts.pop(2)
    model = Scripted(tokenizer, prompts, [["\\boxed{42}"], ["\\boxed{42}"], ["\\boxed{6}"]],
                     tokenizer.eos_token)
    config = sod.Config(rollout_engine="generate", eval_samples=1, max_prompt=3000)
    agent = sod.Agent(config, model, None, tokenizer, Echo(), eval_set=[p for p, _ in prompts])
    assert sod.measure(agent, model).tolist() == [[1], [0], [1]]


@pytest.mark.parametrize("row, message", [
    ({"text": "Q"}, "found no conversation"), ({"messages": "Q"}, "found no conv"),
    ("", "is empty"), ("{", "line 1: found broken JSON"),
    *(({"messages": [ASKED, turn]}, "found the turn .*calls are markup") for turn in (
        {"role": "assistant", "content": "", "tool_calls": 5}, *turns("b"),
        {"role": "assistant", "content": ["part"]})),
])
def test_a_broken_demonstration_is_one_sentence(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        load_demonstrations(write(tmp_path, row))


# --- The files of a run -------------------------------------------------------------------------


def test_a_folder_that_fails_while_it_is_filled_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), tools.whole_folder(tmp_path / "a") as place:
        (place / "x").write_text("1")
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_killed_while_it_is_filled_does_not_get_its_name(tmp_path):
    child = os.fork()
    if not child:
        with tools.whole_folder(tmp_path / "a") as place:
            (place / "x").write_text("1")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tmp"]
    with tools.whole_folder(tmp_path / "a") as place:
        assert not list(place.iterdir())  # what the killed one left is gone
        (place / "y").touch(0o600)  # as some libraries write, for their owner only
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "y"]
    assert (tmp_path / "a/y").stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o666


def test_saves_are_found_by_number_not_by_letter(tmp_path):
    for name in ("iteration-9", "iteration-10", "iteration-11.tmp", "iteration-x", "step-12"):
        (tmp_path / name).mkdir()
    assert [p.name for p in tools.numbered(tmp_path)] == ["iteration-9", "iteration-10"]
    tools.remove(tmp_path / "iteration-9")
    assert [p.name for p in tools.numbered(tmp_path)] == ["iteration-10"]


@pytest.mark.parametrize("held, size, left, note", [
    ("a\nb\nc\n", 4, "a\nb\n", ""), ("a\nb\n", 4, "a\nb\n", ""), (None, 0, "", ""),
    (None, 4, "", "had 4 bytes when its run was saved and 0 are left: earlier lines are missing"),
    ("a\nb", 4, "a\n", "and 2 are left"), ("a\nbcde\n", 4, "a\n", "and 2 are left"),
])
def test_a_log_is_cut_back_or_goes_on_with_a_note(tmp_path, held, size, left, note):
    path = tmp_path / "metrics.jsonl"
    if held is not None:
        path.write_text(held)
    said = tools.cut_back(path, size)
    assert note in said and bool(note) == bool(said)
    assert path.read_text() == left


@pytest.mark.parametrize("error, advice", [
    (OSError(errno.ENOSPC, "No space left on device"), "No space.*make room on the disk and res"),
    (RuntimeError("unexpected pos"), "make room on the disk and resume"),  # torch on a full disk
    (PermissionError(errno.EACCES, "Permission denied"), "Permission denied.*mend that and resume"),
])
def test_what_stops_writing_is_told_with_what_to_do(tmp_path, error, advice):
    with pytest.raises(tools.WriteError, match=advice), tools.writing(tmp_path):
        raise error


@pytest.mark.parametrize("error", [TypeError("Object of type Tensor is not JSON serializable"),
                                   ValueError("max() arg is an empty sequence"), RuntimeError("x")])
def test_a_bug_while_files_are_written_stays_what_it_is(tmp_path, error):
    with pytest.raises(type(error)) as raised, tools.writing(tmp_path):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_run_whose_folder_was_deleted_says_so(tmp_path, when):
    folder = tmp_path / "run"
    if when == "meanwhile":
        folder.mkdir()
    with pytest.raises(tools.WriteError, match="this folder is gone"), tools.writing(folder):
        folder.rmdir()
        tools.append_rows(folder / "metrics.jsonl", [{}])


SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_first_signal_is_a_request_to_stop_and_a_second_one_stops_at_once(number):
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.raises(KeyboardInterrupt) as stop, tools.handled_signals(tools.interrupt):
        signal.raise_signal(number)
    assert stop.value.args == (number,)
    with pytest.raises(KeyboardInterrupt), tools.stop_requests() as requests:
        signal.raise_signal(number)
        assert requests == [number]  # noted; what is being changed goes on
        signal.raise_signal(signal.SIGTERM)
    assert requests == [number]
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_a_run_under_nohup_outlives_its_terminal():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with tools.stop_requests() as requests:
            signal.raise_signal(signal.SIGHUP)
        assert requests == []
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_is_locked_for_one_process(tmp_path):
    with tools.locked(tmp_path):
        with pytest.raises(ValueError, match="in use by another process"), tools.locked(tmp_path):
            pass
    with tools.locked(tmp_path):
        pass
