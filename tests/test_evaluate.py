"""Benchmark files, files of samples, interruption, rescoring, reports and the command line."""
import base64
import contextlib
import csv
import json
import pickle
import re
import shutil
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import sod_mini as sod
import tools
from conftest import PROCESSES, WORLD
from evaluate import BENCHMARKS, PAPER, EvalConfig, Evaluation, load_benchmark
from tools import UserError

STUDENT = str(WORLD / "student")


def write(folder, *rows, name="set.jsonl"):
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n"
                            for row in rows))
    return path


def load(path, **options):
    return load_benchmark(str(path), EvalConfig(**options))


def said(capsys, *argv, status=1):
    """What a command says that ends with this status: one line where it is an error."""
    assert evaluate.main([str(word) for word in argv]) == status
    out, error = capsys.readouterr()
    assert not status or error.startswith("error: ") and error.count("\n") == 1
    return error if status else out


# --- GPQA -------------------------------------------------------------------------------------

def gpqa(path, count, **changed):
    names = ["Record ID", "Question", "Correct Answer",
             *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        for n in range(count):
            cells = [f"rec{n}", f"Which,\nof {n}?", f"right {n}", "x", "y", "z"]
            table.writerow(dict(zip(names, cells), **changed))
    return path


def test_gpqa_options_stand_in_a_fixed_order_that_differs_between_questions(tmp_path):
    loaded = load(gpqa(tmp_path / "a.csv", 200))
    assert [problem.question for problem in loaded] == [
        problem.question for problem in load(gpqa(tmp_path / "b.csv", 200))]
    for n, problem in enumerate(loaded):
        assert f"\n{problem.answer}) right {n}\n" in problem.question
        assert (problem.kind, problem.id) == ("choice", f"rec{n}")
    letters = [problem.answer for problem in loaded]
    assert min(letters.count(letter) for letter in "ABCD") > 30  # 50 expected, sd 6


def test_broken_csv_and_an_id_that_stands_twice_are_named(tmp_path):
    with pytest.raises(ValueError, match="the id a stands in several rows; .* make them unique"):
        load(write(tmp_path, *[{"question": "q", "answer": "1", "id": "a"}] * 2))
    with pytest.raises(ValueError, match="line 3: found an empty cell"):
        load(gpqa(tmp_path / "a.csv", 1, **{"Incorrect Answer 2": ""}))
    with pytest.raises(ValueError, match="line 3: found broken CSV .*2 cells"):
        load(write(tmp_path, "question,answer\na,1\nb", name="cells.csv"))


# --- LiveCodeBench ----------------------------------------------------------------------------

def squeezed(data):
    return base64.b64encode(zlib.compress(data)).decode()


def packed(content):
    return squeezed(pickle.dumps(content))


CASES = [{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}]
MORE = [{"input": "5 6\n", "output": "11\n", "testtype": "stdin"}]
CALLS = [{"input": "[1]\n2", "output": "[1, 2]", "testtype": "functional"}]
OTHER = [{"input": "[5]\n6", "output": "[5, 6]", "testtype": "functional"}]


def contest(public=CASES, private="[]", name="", **changed):
    return {"question_title": "T", "question_content": "Add.", "question_id": "abc_1",
            "contest_date": "2025-03-01T00:00:00", "starter_code": "", "difficulty": "medium",
            "public_test_cases": json.dumps(public), "private_test_cases": private,
            "metadata": json.dumps({"func_name": name} if name else {}), **changed}


def test_livecodebench_asks_for_a_program_or_for_a_function_with_its_name(tmp_path):
    row = contest(CALLS, name="pair", starter_code="class Solution:\n    def pair(self, xs, y):\n")
    program, function = load(write(tmp_path, contest(), row | {"question_id": "abc_2"}))
    assert (program.kind, program.id) == ("program", "abc_1")
    assert "standard input" in program.question
    assert "def pair(self, xs, y):\n```" in function.question
    with pytest.raises(ValueError, match="line 1: .*func_name"):
        load(write(tmp_path, contest(CALLS)))


def test_a_hostile_pickle_runs_nothing(tmp_path):
    evil = f"cposix\nmkdir\n(V{tmp_path}/owned\ntR.".encode()
    with pytest.raises(ValueError, match="line 1: found test cases.*asks for posix.mkdir"):
        load(write(tmp_path, contest(private=squeezed(evil))))
    assert not (tmp_path / "owned").exists()
    pickle.loads(evil)  # an ordinary unpickler is owned by it
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("private", [
    packed({1, 2}), packed(7), packed(CASES), "7", packed("7"), "[" * 100_000, packed("no json"),
    "AAAA", "%%%", packed(json.dumps(CASES))[:-8], packed([1]), "[", packed(b"bytes"),
    squeezed(b"\x80\x04garbage"), packed(json.dumps([{"a": 1}]))])
def test_broken_test_cases_are_one_sentence(tmp_path, private):
    with pytest.raises(ValueError, match="set.jsonl, line 1: ") as caught:
        load(write(tmp_path, contest(private=private)))
    assert "\n" not in str(caught.value)


# --- Named benchmarks ---------------------------------------------------------------------------

def test_a_benchmark_is_found_by_name_and_its_count_checked(tmp_path):
    named = lambda name="gpqa_diamond": load_benchmark(name, EvalConfig(benchmarks=str(tmp_path)))
    with pytest.raises(ValueError, match="hf download Idavidrein/gpqa gpqa_diamond.csv --repo-type "
                       f"dataset --local-dir {tmp_path}/gpqa_diamond"):
        named()
    with pytest.raises(ValueError, match="neither a file nor a benchmark; .*aime2024"):
        named("aime")
    (tmp_path / "gpqa_diamond").mkdir()
    gpqa(tmp_path / "gpqa_diamond" / "gpqa_diamond.csv", 197)  # where hf puts it
    with pytest.raises(ValueError, match="gpqa_diamond.csv: found 197 of 198 problems"):
        named()
    gpqa(tmp_path / "gpqa_diamond.csv", 198)  # put there by hand, it comes first
    assert len(named()) == 198


def test_livecodebench_v6_has_its_months_and_says_how_many_are_in_them(tmp_path, capsys):
    months = ["2025-01-31", "2025-02-01", "2025-05-31T00:00:00", "2025-06-01", None]
    rows = [contest(question_id=f"q{n}", contest_date=months[n % 5]) for n in range(175)]
    write(tmp_path, *rows, name="livecodebench_v6.jsonl")
    assert len(load_benchmark("livecodebench_v6", EvalConfig(benchmarks=str(tmp_path)))) == 70
    assert capsys.readouterr().err == (
        "70 of 175 problems of livecodebench_v6 are dated 2025-02 to 2025-05\n")


def test_parquet_is_read_or_the_way_to_convert_it_is_told(tmp_path, monkeypatch):
    (tmp_path / "set.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as where it is not installed
    with pytest.raises(ValueError, match="pip install pyarrow.*convert"):
        load(tmp_path / "set.parquet")
    table = SimpleNamespace(to_pylist=lambda: [{"question": "Q", "answer": "7"}])
    pyarrow = SimpleNamespace(parquet=SimpleNamespace(read_table=lambda path: table))
    monkeypatch.setitem(sys.modules, "pyarrow", pyarrow)
    assert load(tmp_path / "set.parquet")[0].answer == "7"


# --- Every form of answer -----------------------------------------------------------------------

ANSWERS = [
    "5", "-3.50", r"\frac{1}{2}", "1/2", "1,000", "50%", r"50\%", "5 cm", "x = 5", "(1, 2)",
    r"\left(\tfrac12, -1\right)", "1, 2, 3", "red, green", r"\{1, 2\}", r"\emptyset", "[0, 1)",
    r"(-\infty, 2]", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\text{yes}", "x^2 + 1",
    r"2\sqrt{3}", "NaN", "nan", "inf", "null", "None", "true", '"', "\u2028", "\ud800", "naïve",
    "B", r"\pi", "1e400", "{}", "10^{-2}", "((1, 2), (3, 4))", "[[1, 2], [3]]", r"\frac{1}{0}"]
HEAVY = ["\\boxed{" * 150_000, "\\boxed{" + "9" * 10**6 + "}", "\\boxed{10^{999999}}",
         "\\boxed{" + "{" * 500 + "}" * 500 + "}", "A" * 10**6, "\\boxed{1e999999999}",
         "\\boxed{1/0}", "\\boxed{" + "1," * 290 + "}"]


def scripted(finals, problem):
    """In place of sample_rollouts: rollouts of one turn each, graded as usual."""
    def sample(agent, model, prompts, key, numbers, temperature, top_p):
        rollouts = [sod.Rollout(problem, ids, [sod.Turn([1], finals[n])], (*key, n),
                                finish_reason="answer") for n, (_, ids) in zip(numbers, prompts)]
        for r in rollouts:
            sod.grade_rollout(r, agent.tool, sod.final_text(r, "hermes"))
        return rollouts
    return sample


@pytest.mark.parametrize("kind", ["math", "choice"])
def test_every_form_of_answer_goes_through_write_read_report_and_rescoring(
        kind, tmp_path, monkeypatch, capsys):
    finals = [*(f"\\boxed{{{answer}}}" for answer in ANSWERS), *HEAVY, "", "no", "\\boxed{", "B"]
    row = {"question": "q", "answer": "5"} if kind == "math" else {
        "question": "q\nA) 1\nB) 2", "answer": "B", "kind": "choice"}
    (problem,) = loaded = load(data := write(tmp_path, row))
    monkeypatch.setattr(sod, "sample_rollouts", scripted(finals, problem))
    config = EvalConfig(k=len(finals), rollout_batch=7, out=str(tmp_path), tool_unsafe=True)
    model = sod.load_model(STUDENT, "cpu", sod.torch.float32)
    one, path = evaluate.sample_benchmark("m", str(data), loaded, model,
                                          sod.load_tokenizer(STUDENT), config)
    assert evaluate.read_samples(path) == one and len(one.rows) == len(finals)
    votes = [row["vote"] for row in one.rows if row["vote"] is not None]
    assert len(votes) >= (len(ANSWERS) if kind == "math" else 1)
    started = time.process_time()
    assert f"| maj@{len(finals)} |" in evaluate.markdown([one])
    assert time.process_time() - started < 5  # no vote is slow
    said(capsys, "--rescore", path, status=0)
    assert evaluate.read_samples(path.with_suffix(".rescored.jsonl")).rows == one.rows


# --- Interruption -------------------------------------------------------------------------------

TINY = ["--model", STUDENT, "--limit", "12", "--k", "2", "--runs", "2", "--rollout_batch", "4"]


def evaluate_tiny(folder):
    """(file of samples, what was printed but for paths) of an evaluation."""
    with open(folder / "screen", "w") as screen, contextlib.redirect_stdout(screen):
        assert evaluate.main([*TINY, "--out", str(folder)]) == 0
    (path,) = folder.glob("*.jsonl")
    return path, re.sub(r"samples  .*\n", "", (folder / "screen").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What an evaluation leaves that nothing interrupted."""
    return evaluate_tiny(tmp_path_factory.mktemp("whole"))


def test_a_killed_evaluation_continues_and_ends_with_the_same_table(whole, tmp_path, capsys):
    path = tmp_path / whole[0].name
    process = PROCESSES.Process(target=evaluate_tiny, args=[tmp_path])
    process.start()
    while process.is_alive() and (not path.exists() or path.read_bytes().count(b"\n") < 9):
        time.sleep(0.001)
    process.kill()
    process.join()
    killed = path.read_text()
    assert 9 <= killed.count("\n") < 49  # a header, 2 runs of 12 problems, 2 samples each
    path.write_text(killed + '{"run": 0, "problem": "hel')  # killed while it wrote a line
    assert "of 48 samples: the evaluation was interrupted" in said(capsys, "--rescore", path)
    path, table = evaluate_tiny(tmp_path)
    assert table == whole[1] and path.read_text() == whole[0].read_text()


def test_an_evaluation_killed_in_its_first_line_or_amid_a_batch_continues(whole, tmp_path):
    lines, path = whole[0].read_text().splitlines(keepends=True), tmp_path / "a.jsonl"
    cases = (("", 1), (lines[0][:40], 1), (lines[0], 1), ("".join(lines[:4]), 1),
             ("".join(lines[:5]), 5), ("".join(lines[:44]) + '{"run', 41), ("".join(lines), 49))
    for kept, left in cases:  # batches of four samples
        path.write_text(kept)
        one = evaluate.read_samples(whole[0])
        one.rows = []
        evaluate.resume(path, one)
        assert path.read_text() == "".join(lines[:left])
        assert len(one.rows) == left - 1


def test_two_evaluations_cannot_write_to_one_file(whole, tmp_path):
    path, one = tmp_path / "a.jsonl", evaluate.read_samples(whole[0])
    path.write_text(before := whole[0].read_text())
    with tools.locked(path), pytest.raises(UserError, match="is in use by another process"):
        evaluate.resume(path, one)
    assert path.read_text() == before


def test_a_file_that_is_being_sampled_is_locked_until_it_is_finished(tmp_path, monkeypatch):
    def sample(*_):
        with pytest.raises(UserError, match="is in use"), tools.locked(next(tmp_path.glob("*.j*"))):
            pass
        yield []
    monkeypatch.setattr(evaluate, "sample_the_rest", sample)
    path = evaluate.sample_benchmark(
        "m", "d", [tools.Problem("q", "5")], sod.load_model(STUDENT, "cpu", torch.float32),
        sod.load_tokenizer(STUDENT), EvalConfig(out=str(tmp_path)))[1]
    with tools.locked(path):
        pass


def test_each_benchmark_is_sampled_with_the_threads_that_its_table_tells(tmp_path, monkeypatch):
    """The world takes one thread, other data as many as there are."""
    data, used = write(tmp_path, {"question": "q", "answer": "1"}), []
    loaded, sampled = [], []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 5)
    monkeypatch.setattr(torch, "set_num_threads", used.append)
    monkeypatch.setattr(sod, "load_model", lambda *_: loaded.append(used[:]))
    monkeypatch.setattr(evaluate, "sample_benchmark", lambda name, data, *_: sampled.append(
        used[-1]) or (None, "path"))
    monkeypatch.setattr(evaluate, "markdown", lambda evaluations: "")
    evaluate.evaluate_all([STUDENT], ["world", str(data)], {"max_response": 9, "max_prompt": 99})
    assert sampled == [1, 5] and loaded == [[5]]  # set before a model is loaded


def test_every_sample_has_random_numbers_of_its_own_whatever_came_before(monkeypatch):
    drawn = []

    def sample(agent, model, prompts, key, numbers, *sampling):
        assert sampling == (0.7, 0.6)
        drawn.extend(sod.random_numbers(*key, n).random() for n in numbers)
        return [sod.Rollout(problem, [], [sod.Turn()]) for problem, _ in prompts]
    monkeypatch.setattr(sod, "sample_rollouts", sample)
    prompts = [(tools.Problem("q", "1", id=name), []) for name in "ab"]

    def samples(seed, done, batch):
        config = EvalConfig(k=3, runs=2, seed=seed, temperature=0.7, top_p=0.6, rollout_batch=batch)
        one = Evaluation("m", "d", 2, 0, 1, 1, vars(config), [{}] * done)
        drawn.clear()
        rows = [row for rows in evaluate.sample_the_rest(sod.Agent(config, *[None] * 4), one,
                                                         prompts) for row in rows]
        places = [(row["run"], row["problem"], row["sample"]) for row in rows]
        assert places == [(r, p, s) for r in (0, 1) for p in "ab" for s in range(3)][done:]
        return list(drawn)
    whole = samples(0, 0, 12)
    assert len({*whole, *samples(1, 0, 12)}) == 24
    assert samples(0, 0, 5) == whole and samples(0, 5, 5) == whole[5:]


@pytest.mark.parametrize("finish, outcome, final", [
    ("answer", "", "\\boxed{4}"), ("length", "", ""), ("turns", "not_run", ""),
    ("infrastructure", "", "\\boxed{4}"), ("infrastructure", "sandbox_error", "")])
def test_only_a_final_turn_is_graded_and_only_sampled_tokens_count(finish, outcome, final):
    turns = [sod.Turn([1, 2], "call", "ok", "5", [3]), sod.Turn([4, 5], "\\boxed{4}", outcome)]
    r = sod.Rollout(tools.Problem("q", "4", id="p"), [1] * 6, turns, finish_reason=finish)
    row = evaluate.sample_row(r, 0, 3)
    assert row["final"] == final and row["vote"] == ("4" if final else None)
    assert (row["tokens"], row["sample"]) == (4, 3)
    assert row["calls"] == ["ok"] + [outcome] * (outcome != "")


def test_other_settings_problems_or_weights_start_another_file():
    base = dict(model="m", data="d", problems=2, skipped=0, weights=1, questions=["1"], settings={})
    changes = [{}, {"settings": {"seed": 1}}, {"weights": 2}, {"questions": ["2"]}, {"model": "n"},
               {"read": "1"}]
    assert len({evaluate.file_of(Evaluation(**base | change), "x") for change in changes}) == 6


def test_examples_functions_or_a_template_with_other_contents_start_another_file(
        tmp_path, monkeypatch):
    """Under the same names, and so with the same settings."""
    monkeypatch.setattr(evaluate, "sample_the_rest", lambda *_: [])
    model, asked = sod.load_model(STUDENT, "cpu", sod.torch.float32), [tools.Problem("q", "5")]
    examples, functions = tmp_path / "examples.jsonl", tmp_path / "functions.py"
    config = EvalConfig(out=str(tmp_path), examples=str(examples), silent_rate=0.0,
                        tools=f"{tools.TOOL_NAME},{functions}")

    def file(shown="2 + 2", does="a", template=lambda text: text):
        for cache in (sod.worked_examples, sod.call_form):
            cache.cache_clear()
        write(tmp_path, {"messages": [{"role": "user", "content": shown},
                                      {"role": "assistant", "content": "4"}]}, name=examples.name)
        functions.write_text('def f(a: int):\n    """Double.\n\n    Args:\n        a: A number.\n'
                             f'    """\n    return {does}\n')
        tokenizer = sod.load_tokenizer(STUDENT)
        tokenizer.chat_template = template(tokenizer.chat_template)
        return evaluate.sample_benchmark("m", "d", asked, model, tokenizer, config)[1]
    files = [file(), file("3 + 3"), file(does="2 * a"),
             file(template=lambda text: text.replace("Tools:", "Here:"))]
    assert len({*files}) == 4 and file() == files[0]
    problems = [tools.Problem("q", "1"), tools.Problem("q", "2"), tools.Problem("r", "1"),
                tools.Problem("q", "1", tests=[{"input": ""}])]
    assert len({*evaluate.digests_of(problems), *evaluate.digests_of(problems[:1] * 2)}) == 5
    model = sod.torch.nn.Linear(3, 2, dtype=sod.torch.bfloat16)
    before = sod.weights_crc(model)
    assert before == sod.weights_crc(model)
    with sod.torch.no_grad():
        model.bias[0] += 1
    assert before != sod.weights_crc(model)


# --- Reports of files of samples, without a model -----------------------------------------------

def row(problem, right, run=0, sample=0, **changed):
    return {"run": run, "problem": problem, "sample": sample, "correct": right,
            "reason": "correct" if right else "wrong", "vote": "1" if right else "2",
            "final": f"\\boxed{{{1 if right else 2}}}", "finish_reason": "answer", "calls": ["ok"],
            "tokens": 10, **changed}


def stored(path, rows, model="m", data="d", **changed):
    """A file of samples as evaluate.py writes it."""
    settings = evaluate.stored_settings(EvalConfig(**changed)) | {"device": "cpu"}
    asked = list(dict.fromkeys(row["problem"] for row in rows))
    evaluate.write_samples(path, Evaluation(model, str(data), len(asked), 0, 1, asked, settings,
                                            rows))
    return path


def four_by_two(path, runs=1, **changed):
    """Two problems, four samples: one right, and three right, in every run."""
    rows = [row(f"p{p}", s <= 2 * p, run, s) for run in range(runs) for p in (0, 1)
            for s in range(4)]
    return stored(path, rows, k=4, runs=runs, **changed)


def test_the_numbers_of_a_report_by_hand(tmp_path):
    one = evaluate.read_samples(four_by_two(tmp_path / "a.jsonl", runs=2))
    assert one.correct().tolist() == [[1, 0, 0, 0] * 2, [1, 1, 1, 0] * 2]
    assert one.scores() == {"p0": 0.25, "p1": 0.75}
    detail = evaluate.details(one)
    assert detail["mean ± std over runs"] == "50.00 ± 0.00"
    # p0 has 2 of 8 right: 1 - C(6,2)/C(8,2) = 13/28; p1 has 6: 1 - 1/28; their mean is 71.4%
    assert detail["pass@k, k = 1, 2, 4, 8"] == "50.0, 71.4, 89.3, 100.0"
    assert detail["maj@4"] == "50.0"
    assert detail["not correct, because"] == "50.0% (wrong 50.0%)"


UNJUDGED = "samples the sandbox failed, counted as not correct"


def test_calls_cuts_and_failures_are_counted_and_the_sandbox_apart(tmp_path):
    rows = [row("p", True, sample=0, calls=["ok", "timeout", "error", "timeout"]),
            row("p", False, sample=1, calls=["sandbox_error"], finish_reason="infrastructure"),
            row("p", False, sample=2, calls=[], finish_reason="length", reason="no boxed answer"),
            row("p", False, sample=3, calls=["not_run"], finish_reason="turns",
                reason="no boxed answer")]
    detail = evaluate.details(evaluate.read_samples(stored(tmp_path / "a.jsonl", rows, k=4)))
    assert detail["tool calls a trajectory"] == "1.50"
    assert detail["failed calls"] == "50.0% (timeout 33.3%, error 16.7%)"
    assert detail["cut off, by"] == "50.0% (turns 25.0%, length 25.0%)"
    assert detail[UNJUDGED] == "1"
    assert detail["not correct, because"] == "75.0% (no boxed answer 50.0%, wrong 25.0%)"
    assert detail["sampled tokens a trajectory"] == "10"


def test_a_benchmark_of_the_paper_has_the_papers_result_beside_it(tmp_path):
    def table(data):
        path = four_by_two(tmp_path / f"{data}.jsonl", data=data)
        return evaluate.markdown([evaluate.read_samples(path)])
    assert "SOD 0.6B, SOD 1.7B, their 4B teacher: 26.13, 41.72, 60.42\n" in table("aime2025")
    assert "the paper" not in table("gsm8k")
    # the means of the paper's tables: SOD 24.22 and 42.98, the teacher 61.59
    figures = [list(map(float, b.paper.split(", "))) for b in BENCHMARKS.values() if b.paper]
    assert np.mean(figures, axis=0) == pytest.approx([24.22, 42.98, 61.59], abs=0.0101)


def test_a_report_has_a_table_and_a_verdict_where_the_problems_are_the_same(tmp_path):
    a = evaluate.read_samples(four_by_two(tmp_path / "a.jsonl"))
    b = evaluate.read_samples(four_by_two(tmp_path / "b.jsonl", model="n"))
    assert evaluate.markdown([a, b]).endswith("both score the same on every problem")
    b.questions = ["p0", "p2"]
    text = evaluate.markdown([a, b])
    assert "| n | 50.0% |" in text and "no verdict: m has 1 problems that n lacks" in text
    assert sod.results_table({"m": a.correct(), "n": b.correct()}) in text  # as in the model card


# --- Rescoring ----------------------------------------------------------------------------------

ADD = "print(sum(map(int, input().split())))"
PAIR = "class Solution:\n    def pair(self, xs: List[int], y):\n        return xs + [y]"
PROGRAMS = [  # question, program, verdict, reason
    ("stdin", ADD, True, "correct"),
    ("stdin", "a, b = map(int, input().split())\nprint(3 if a == 1 else 0)", False,
     "failed tests: wrong answer"),  # right on the public test only
    ("stdin", "while True: pass", False, "failed tests: timeout"),
    ("stdin", "raise ValueError", False, "failed tests: error"),
    ("call", PAIR, True, "correct"),
    ("call", "class Solution:\n    def pair(self, xs, y):\n        return [1, 2]", False,
     "failed tests: wrong answer"),
    ("call", "exit()", False, "failed tests: no value"),
    ("call", None, False, "no program"),
]


@pytest.fixture(scope="module")
def contest_file(tmp_path_factory):
    rows = (contest(private=packed(json.dumps(MORE)), question_id="stdin"),
            contest(CALLS, json.dumps(OTHER), name="pair", question_id="call"))
    return write(tmp_path_factory.mktemp("lcb"), *rows, name="contest.jsonl")


def test_rescoring_grades_stored_programs_without_a_model(contest_file, tmp_path, capsys):
    rows = [row(question, not right, sample=sample, vote=None,
                final="So:" if program is None else f"So:\n```python\n{program}\n```")
            for sample, (question, program, right, _) in enumerate(PROGRAMS)]
    path = stored(tmp_path / "a.jsonl", rows, data=contest_file, k=4, tool_unsafe=True,
                  tool_timeout=1.0)
    text = said(capsys, "--rescore", path, status=0)
    assert "8 of 8 grades changed" in text and "| maj@4 | none |" in text
    new = evaluate.read_samples(tmp_path / "a.rescored.jsonl")
    assert [(r["correct"], r["reason"]) for r in new.rows] == [p[2:] for p in PROGRAMS]
    assert evaluate.read_samples(path).rows == rows  # the old file is as it was


def test_rescoring_takes_the_answers_of_today_and_files_of_another_version(tmp_path, capsys):
    data = write(tmp_path, *({"question": f"q{p}", "answer": "2", "id": f"p{p}"} for p in (0, 1)))
    path = four_by_two(tmp_path / "a.jsonl", data=data)
    path.write_text(path.read_text().replace('"decode_chunk": ', '"chunk": '))
    rescored = said(capsys, "--rescore", path, "--tool_unsafe", "true", status=0)
    assert "8 of 8 grades changed" in rescored
    new = evaluate.read_samples(tmp_path / "a.rescored.jsonl")
    assert list(new.scores().values()) == [0.75, 0.25] and new.settings["tool_unsafe"]
    write(tmp_path, {"question": "q", "answer": "2", "id": "p0"})
    assert "lacks 1 problems of" in said(capsys, "--rescore", path)


def test_samples_are_not_graded_as_answers_to_another_question(tmp_path, capsys):
    """Rows without an id are counted by line: one more on top moves all the others."""
    asked = [{"question": f"q{p}", "answer": "2"} for p in (0, 1)]
    data = write(tmp_path, *asked)
    rows = [row(p.id, False, sample=0, question=p.question) for p in load(data)]
    path = stored(tmp_path / "a.jsonl", rows, data=data, k=1, tool_unsafe=True)
    assert "2 of 2 grades changed" in said(capsys, "--rescore", path, status=0)
    write(tmp_path, {"question": "q", "answer": "2"}, *asked)
    assert "has another question than in" in said(capsys, "--rescore", path)


class BrokenTool:
    """A sandbox that fails whatever it is asked to run."""
    __enter__ = lambda self: self
    __exit__ = lambda self, *_: None
    run = lambda self, codes, stdins=None, raw=False: [
        tools.Observation("the sandbox failed", "sandbox_error", 0.0) for _ in codes]


def test_what_the_sandbox_failed_to_judge_is_judged_later_or_stays_unjudged(
        contest_file, tmp_path, monkeypatch, capsys):
    (problem, _) = load(contest_file)
    turns = [sod.Turn([1], f"```python\n{program}\n```") for _, program, *_ in PROGRAMS[:3]]
    rollouts = [sod.Rollout(problem, [0], [turn], finish_reason="answer") for turn in turns]
    rollouts.append(sod.Rollout(problem, [0], [sod.Turn([1], "call", "sandbox_error")],
                                finish_reason="infrastructure"))  # its final turn was never sampled
    for r in rollouts:
        sod.grade_rollout(r, BrokenTool(), r.turns[-1].text)
    rows = [evaluate.sample_row(r, 0, n) for n, r in enumerate(rollouts)]
    path = stored(tmp_path / "a.jsonl", rows, data=contest_file, k=4, tool_unsafe=True,
                  tool_timeout=1.0)
    with monkeypatch.context() as patch:  # the sandbox is still broken
        patch.setattr(sod, "load_tool", lambda config: (BrokenTool(), 0.0))
        assert f"| {UNJUDGED} | 4 |" in said(capsys, "--rescore", path, status=0)
    text = said(capsys, "--rescore", tmp_path / "a.rescored.jsonl", status=0)
    assert "1 of 4 grades changed" in text and f"| {UNJUDGED} | 1 |" in text
    new = evaluate.read_samples(tmp_path / "a.rescored.rescored.jsonl")
    assert [r["correct"] for r in new.rows] == [True, False, False, False]
    assert [r["finish_reason"] for r in new.rows] == ["answer"] * 3 + ["infrastructure"]


# --- Comparing ----------------------------------------------------------------------------------

def test_two_files_are_compared_by_problem(tmp_path, capsys):
    a, b = (stored(tmp_path / f"{share}.jsonl", [row(f"p{p}", p % 10 < share) for p in range(100)],
                   k=1) for share in (2, 4))
    assert said(capsys, "--compare", a, b, status=0) == (
        f"{b} is better by 20.0 points, 95% interval 12.0 to 29.1\n")
    other = evaluate.read_samples(b)
    other.questions = 2  # as an older version wrote it
    evaluate.write_samples(b, other)
    assert "use --rescore on their file first" in said(capsys, "--compare", a, b)


def test_a_file_of_problems_is_the_same_under_another_name_and_in_another_order(
        tmp_path, monkeypatch, capsys):
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(9)]
    kept, model = [], sod.load_model(STUDENT, "cpu", sod.torch.float32)
    monkeypatch.setattr(sod, "sample_rollouts", lambda agent, model, prompts, *_: [
        sod.Rollout(problem, ids, [sod.Turn([1])], correct=bool(kept)) for problem, ids in prompts])
    other = rows[1:] + [{"question": "What is 0 plus 1?", "answer": "1"}]
    for name, asked in (("a", rows), ("copy", rows[::-1]), ("other", other)):
        data = write(tmp_path, *asked, name=f"{name}.jsonl")
        config = EvalConfig(k=1, runs=1, out=str(tmp_path / "out"), tool_unsafe=True)
        kept.append(evaluate.sample_benchmark("m", str(data), load(data), model,
                                              sod.load_tokenizer(STUDENT), config)[1])
    assert "is better by 100.0 points" in said(capsys, "--compare", *kept[:2], status=0)
    assert "has 1 problems that" in said(capsys, "--compare", kept[0], kept[2])


@pytest.mark.parametrize("changed, note", [
    ({"max_turns": 3}, "max_turns 12 and 3"), ({"system": "S"}, "system '' and 'S'"),
    ({"dtype": "bfloat16", "seed": 3}, "dtype 'auto' and 'bfloat16', seed 0 and 3"), ({}, None)])
def test_evaluations_with_other_settings_are_compared_with_a_note(changed, note, tmp_path, capsys):
    a, b = four_by_two(tmp_path / "a.jsonl"), four_by_two(tmp_path / "b.jsonl", **changed)
    text = said(capsys, "--compare", a, b, status=0)
    assert f"; NOTE: the settings differ, too: {note}\n" in text if note else "NOTE" not in text


# --- The command line ---------------------------------------------------------------------------

@pytest.mark.parametrize("argv, message", [
    (["--kk", "1"], "unrecognized"), (["--rescore", "x", "--page", "y"], "not allowed with"),
    (["--k", "many"], "invalid int"),
    (["--rescore", "x", "--k", "2", "--data", "d"], "--rescore does not use data, k; leave it out"),
    (["--page", "x", "--temperature", ".5"], "--page does not use temperature"),
    (["--compare", "x", "y", "--seed", "1"], "--compare does not use seed")])
def test_wrong_options_are_a_sentence_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as caught:
        evaluate.main(argv)
    assert caught.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("option, value, message", [
    ("top_p", "1.5", "top_p is 1.5"), ("runs", "0", "runs is 0; it must be at least 1"),
    ("max_turns", "0", "max_turns is 0"), ("temperature", "0", "temperature is 0"),
    ("max_prompt", "4", "longer than 4 tokens")])
def test_impossible_values_are_a_sentence_and_status_1(option, value, message, tmp_path, capsys):
    assert message in said(capsys, "--model", STUDENT, f"--{option}", value, "--out", tmp_path)


@pytest.mark.parametrize("number, old, new, message", [
    (1, ".*", "", "line 1: found broken JSON"), (1, ".*", "{}", "no file of samples"),
    (1, ".*", "[]", "line 1: found a list"), (1, ".*", '{"model": "m"}', "no file of samples"),
    (1, '"k"', '"samples"', "no file of samples"), (4, ".*", "{", "line 4: found broken JSON"),
    (4, '"calls"', '"used"', "line 4: found no sample, for it lacks calls"),
    (1, '"top_p": 1.0', '"top_p": 7', "top_p is 7")])
def test_a_broken_line_or_header_is_named(number, old, new, message, tmp_path, capsys):
    path = four_by_two(tmp_path / "a.jsonl")
    lines = path.read_text().splitlines()
    lines[number - 1] = re.sub(old, new, lines[number - 1], count=1)
    path.write_text("\n".join(lines) + "\n")
    assert message in said(capsys, "--rescore", path)


def test_the_papers_settings_are_those_of_other_data_and_can_be_changed():
    paper = evaluate.benchmark_config("gsm8k", {"k": 8})
    assert (paper.max_turns, paper.temperature, paper.top_p) == (16, 1.0, 0.6)
    assert (paper.max_prompt, paper.max_response, paper.k, paper.runs) == (4096, 20_480, 8, 5)
    assert paper.silent_rate == 0 and paper.system == sod.SYSTEM and PAPER["k"] == 32
    for data in ("world", str(WORLD / "train.jsonl")):
        world = evaluate.benchmark_config(data, {})
        assert (world.k, world.top_p, world.silent_rate) == (4, 1.0, sod.Config.silent_rate)


def test_one_question_is_answered_on_the_screen_and_a_teacher_adds_d_and_w(capsys):
    question = "Start with 19. Multiply by 7. Subtract it from 82."
    assert evaluate.main(["--ask", question, "--teacher", str(WORLD / "teacher")]) == 0
    said = capsys.readouterr().out.splitlines()
    steps = [line for line in said if line.startswith("step ")]
    d, w = ([float(x) for x in line.split()[1:]] for line in said[-2:])
    assert len(steps) == len(d) == len(w) >= 3 and w[0] == 1 and "print(19 * 7)" in steps[0]
    assert said[1] == "    ->  133" and said[-3] == "ended by answer"
    for k in range(1, len(d)):
        assert w[k] == pytest.approx(min(d[0] / max(d[k], 1e-9), 1.2), rel=0.1)
    assert evaluate.main(["--ask", question, "--max_response", "8"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ended by length"


def test_a_model_is_asked_with_the_settings_of_the_run_that_it_comes_from(tmp_path):
    config = sod.Config(system="S", max_response=99, eval_top_p=0.5)
    (tmp_path / "run").mkdir()
    sod.write_config(config, tmp_path / "run")
    for model in ("checkpoint", "saves/iteration-2"):
        (tmp_path / "run" / model).mkdir(parents=True)
        for path in (tmp_path / "run", tmp_path / "run" / model):
            asked = evaluate.asking_config(str(path), {"max_turns": 3})
            assert (asked.system, asked.max_response, asked.max_turns) == ("S", 99, 3)
            assert asked.top_p == 1.0
    assert evaluate.asking_config(STUDENT, {}) == evaluate.benchmark_config("world", {})
    assert evaluate.asking_config("Qwen/Qwen3-0.6B", {}).max_response == PAPER["max_response"]


def test_a_question_for_which_the_window_is_too_small_is_refused(tmp_path, capsys):
    shutil.copytree(STUDENT, tmp_path / "copy")
    assert evaluate.main(["--ask", "q", "--model", str(tmp_path / "copy")]) == 1
    assert "reads 1024 tokens; max_prompt" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ["--teacher", "x"], ["--ask", "q", "--data", "world"], ["--ask", ""], ["--ask", " "],
    ["--ask", "q", "--page", "runs/x"], ["--ask", "q", "--compare", "a", "b"]])
def test_a_teacher_is_for_a_question_and_a_question_needs_no_data(words, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate.main(words)
    assert stop.value.code == 2 and "--ask takes a question" in capsys.readouterr().err
