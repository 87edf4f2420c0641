"""Graders: pairs of answer and truth with the right verdict, hostile input, real references."""

import doctest
import json
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import tools
from tools import grade_choice, grade_math, grade_program, last_boxed, last_program, same_output

SHARED = Path(__file__).parents[2] / "shared"

EQUAL = [  # (answer, truth)
    ("42", "42"), (" 42 ", "42"), ("42.", "42"), ("42.000", "42"), ("+42", "42"), ("-0", "0"),
    ("1000.0", "1,000"), (r"1{,}000", "1000"), (r"1,\!000", "1000"), (r"1\,000", "1000"),
    ("1\u202f000", "1000"), ("1,234,567.50", "1234567.5"), ("25", "025"), ("000", "0"),
    (".5", "0.5"), ("1/2", "0.5"), (r"\frac12", "0.5"), (r"\dfrac{1}{2}", "2/4"),
    (r"\tfrac{1}{2}", r"\frac1{2}"), (r"\frac{ 1 }{ 2 }", ".5"), (r"\frac{-3}{4}", "-0.75"),
    (r"\frac{3}{-4}", "-3/4"), (r"3\frac{1}{2}", "3.5"), ("3 1/2", "7/2"), (r"-3\frac12", "-3.5"),
    (r"\frac{1,000}{3}", "1000/3"), ("⁄".join("12"), "1/2"), ("−5", "-5"), ("- 5", "-5"),
    (r"-\frac{-1}{2}", "1/2"), ("-(-5)", "5"),
    (r"\frac{\frac12}{3}", r"\frac{1/2}{3}"),
    # Units, money, per cent
    ("$-5$", "-5"), (r"5\%", "5"), ("50", r"50\%"), ("50 percent", "50%"),
    ("25%", "0.25"), (r"25\%", r"\frac{1}{4}"), ("12.5 percent", "1/8"), (r"150\%", "1.5"),
    (r"90^{\circ}", "90"), ("90°", "90 degrees"), (r"\$1,800.00", "1800"), ("€20", "20"),
    ("$18", "18 dollars"), (r"\$5/\text{hour}", "5"), (r"1\frac{1}{2}\text{ cups}", "1.5"),
    ("3 bolts of fabric", "3"), ("5cm", "5"), (r"5\text{ cm}", "5"), (r"5\,\text{cm}^2", "5"),
    (r"5~\mathrm{km/h}", "5"), ("5 m", "5"), ("2 hours", "2 hour"), ("1 point", "1"),
    ("3 half-gallon jugs", "3"), ("5 dollars per dozen", "5"), ("3 dozen", "3  dozen"),
    (r"3 \times 10^6", "3000000"), (r"1.5 \cdot 10^{-3}", "0.0015"), ("2E2", "200"),
    # Lists, sets, tuples, intervals
    ("1,2", r"\{1,2\}"), (r"\left\{1,2\right\}", "2,1"), (r"\left(1,2\right)", "(1, 2)"),
    (r"(\frac12, 3)", "(0.5, 3)"), ("(5)", "5"), ("100,200", "100, 200"),
    ("1 or 2", "2, 1"), (r"1\text{ and }2", "1,2"),
    ("[0,1)", r"\left[0,1\right)"), ("(−∞, 5]", r"(-\infty,5]"), ("{1,2}", r"\{1,2\}"),
    ("[0,1] ∪ [2,3]", r"[0, 1]\cup[2, 3]"), ("(1,2), (3,4)", "(3,4),(1,2)"),
    # Named values, words, symbols
    ("x = 5", "5"), ("5", "n=5"), ("m+n = 113", "113"), (r"\theta = 30^\circ", "30"),
    ("x = 1 or x = 2", "1, 2"), (r"x \in [0,1]", "[0,1]"), ("f(x)=5", "5"),
    ("evelyn", r"\text{Evelyn}"), (r"\textbf{even}", "even"), ("Yes.", "yes"),
    (r"\sqrt 2", r"\sqrt{2}"), (r"2*\sqrt3", r"2\sqrt{3}"), (r"\dfrac{\sqrt 3}{2}", r"\sqrt3/2"),
    (r"\frac{x}{2}", "x/2"), ("2π", r"2 \pi"), ("x ≤ 5", r"x\le 5"), (r"x \leq 5", r"x \le 5"),
    ("y = 2x + 3", "y=2x+3"), ("x^{2}", "x^2"), (r"1010_{2}", "1010_2"), (r"\mathbf{42}", "42"),
    (r"\displaystyle\frac12", "1/2"), (r"\(42\)", "42"), ("42", r"\boxed{42}"),
    (r"\frac{x+1}{2}", "(x+1)/2"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    ("9" * 599, "9" * 599), ("7" * 5000, "7" * 5000),
    # Powers
    ("10^3", "1000"), ("10^{-2}", ".01"), ("10^{-3}", ".001"), ("2^{-1}", "1/2"),
    ("2^{10}", "1024"), ("10^{+2}", "100"), ("(-2)^{3}", "-8"), ("-2^2", "-4"),
    ("(-1)^{2023}", "-1"), ("2^0", "1"),
    (r"\left(\frac{1}{2}\right)^{3}", "1/8"), (r"2^3 \cdot 5^2", "200"), ("1e-05", "10^{-5}"),
    (r"-\frac{1}{2^{2}}", "-0.25"), (r"\frac{2^5}{3}", "32/3"), ("2^3/4", "2"), ("1.5^2", "2.25"),
    ("3 x 10^2", "300"), ("10^6 dollars", "1000000"), ("10^{3} cm", "1000 cm"), ("5²", "25"),
    ("2^{100}", "1267650600228229401496703205376"), ("9^{600}", "9^{600}"), ("x^{2}y", "x^2 y"),
    # Products: one number, and its symbols in any order
    (r"\frac12\pi", r"\frac{\pi}{2}"), (r"\frac{2 \pi}{3}", r"\frac{2}{3}\pi"), ("2*3", "6"),
    (r"0.5\pi", r"\frac{\pi}{2}"), (r"\frac12 x", "x/2"), (r"-\frac{-\pi}{2}", r"\frac{\pi}{2}"),
    (r"\frac{3\sqrt{2}}{4}", r"\frac34\sqrt2"), (r"\frac{\pi}{-2}", r"-\frac12\pi"),
    (r"\frac{1}{2}(x+1)", r"\frac{x+1}{2}"), (r"\frac{1}{2}e^{-x}", r"\frac{e^{-x}}{2}"),
    (r"\frac{xz}{y}", r"\frac{x}{y}z"), (r"\frac{1}{x^2}", "1/x^2"), ("(x-1)*(x+1)", "(x+1)(x-1)"),
    (r"\frac{\frac{4}{9}}{2}", "2/9"), ("4/9/2", "2/9"), ("√13", r"\sqrt{13}"),
    (r"\frac{1}{2\pi}", r"\frac{1}{2}/\pi"), (r"\sqrt{3}\pi", r"\pi\sqrt3"), ("(x+1)", "x+1"),
    (r"\left(\frac{\pi}{2}\right)", "pi/2"), ("3, (x+1)", "x+1, 3"), ("(even)", "even"),
    ("((1,2))", "(1,2)"),
    # What Python prints
    ("2*sqrt(2)", r"2\sqrt{2}"), ("pi/2", r"\frac{\pi}{2}"), ("x**2 + 1", "x^2+1"),
    ("-pi", r"-\pi"), ("sqrt(3)*pi/6", r"\frac{\pi\sqrt{3}}{6}"),
    ("(1 + sqrt(5))/2", r"\frac{1+\sqrt{5}}{2}"),
    ("10**(-2)", "0.01"), ("2*x*y", "2xy"), ("1/(2*pi)", r"\frac{1}{2\pi}"), ("2**10", "1024"),
    ("2/sqrt(3)", r"\frac{2}{\sqrt{3}}"), ("(2*sqrt(2), pi/2)", r"(2\sqrt{2}, \frac{\pi}{2})"),
    # Units: whole ones, and only where both sides have one
    ("16 cm^2", "16"), ("16 cm²", r"16\,\mathrm{cm}^{2}"), ("60 km/h", "60 km per h"),
    (r"2\pi\text{ cm}", r"2\pi"), (r"5\sqrt{2} \text{ inches}", r"5\sqrt2"), ("50 percent", "50"),
    ("5 dollars/hour", "5 dollars per hour"), ("9.8 m/s^2", "9.8"), ("5 per dozen", "5"),
    ("(5 cm, 6 cm)", "(5, 6)"),
    # Tuples, lists, both signs
    ("(1,234)", "(1, 234)"), ("(1,234, 5)", "(1234, 5)"), ("1,000, 2,000", "1000, 2000"),
    ("(10^2, 1)", "(100,1)"), (r"(2^{-1}, \infty)", r"(0.5, \infty)"), ("2,2,3", "3, 2, 2"),
    (r"\{\frac12\pi, 1\}", r"1, \frac{\pi}{2}"), (r"\pm 2", "-2, 2"), ("±3", r"\{3, -3\}"),
    (r"x = \pm\frac12", "-1/2, 1/2"), (r"1 \pm \sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
]
DIFFERENT = [
    ("42", "43"), ("42", "-42"), ("42", "4.2"), ("4 2", "42"), ("1,000", "1"), ("1.000", "1000"),
    ("1{,}5", "15"), ("1/2", "2"), (r"\frac12", "12"), (r"\frac12", "2/1"), ("--5", "5"),
    (r"\frac{1}{23}", r"\frac123"), ("31/2", "3 1/2"), (r"3\frac{1}{2}", "1.5"), ("0.333", "1/3"),
    ("3.14", r"\pi"), ("50%", "5"), ("50", "0.5"), ("25%", "2.5"), ("25%", "0.0025"),
    ("0.25%", "25%"), ("25 cm", "0.25"), ("(25%, 1)", "(2.5, 1)"), ("%", "0.01"),
    ("0.5%", "50%"), ("1/0", "0"),
    ("5-", "5"), ("1 2", "12"), ("5.0.0", "5"), ("4/9/2", "8/9"), ("1/2/3", "1/2"), ("5/(2)", "5"),
    ("0x10", "16"), ("1_000", "1000"), ("9" * 599, "9" * 598 + "8"), ("-(5)", "5"), ("12:30", "12"),
    # Text after a number that is no unit, units that differ, words that change the number
    ("5x", "5"), ("5 xy", "5"), ("5m", "5"), (r"5\pi", "5"), ("5 pi", "5"), (r"2\sqrt{3}", "2"),
    ("5!", "5"), ("5i", "5"), ("5/x", "5"), ("5/abc", "5"), ("5 of 6", "5/6"), ("5 or 6", "5"),
    ("5 cm", "5 m"), ("30 minutes", "30 hours"), ("1 radian", "1 degree"), ("5 squared", "5"),
    ("5 mod 7", "5"), ("5 sin x", "5"), ("5 infinity", "5"), (r"5\infty", "5"), ("5 half", "5"),
    ("3 dozen", "3"), ("2 thirds", "2"), ("5 halves", "5"), ("7 tenths", "7"), ("3 quarters", "3"),
    ("5 hundred", "5"), ("5 millions", "5"), ("5 degrees below zero", "5"), ("5/dozen", "60"),
    # Powers
    ("5^2", "5"), ("10^6", "10"), ("10^2", "102"), ("2^{-1}", "2"), ("3 10^2", "3100"),
    ("1e400", "1e401"), ("1e999999999", "1"), ("inf", "1e999"), ("nan", "0"),
    # Lists, sets, tuples, intervals
    ("5, 6", "5"), ("(1,2)", "(2,1)"), ("[0,1]", "(0,1)"), ("(0,1]", "[0,1)"), ("(1,2)", "12"),
    ("(1,2,3)", "(1,2)"), (r"\{1,2\}", "(1,2)"), (r"\{1,2\}", r"\{1,3\}"), ("1,2", "12"),
    ("1,2", "1.2"), (r"[0,1]\cup[2,3]", "[0,3]"), (r"(-\infty,5]", r"(-\infty,5)"),
    (r"\{\}", "0"), ("(1+2)(3)", "1+2"),
    # Names and symbols
    ("x=5", "y=5"), ("x^2=5", "5"), ("x-1=5", "5"), ("2x=5", "5"), ("x<5", "5"), ("x", "X"),
    ("even", "odd"), (r"\text{none}", "0"), ("True", "1"), ("", "0"), ("$ $", r"\left"),
    (r"\sqrt{2}3", r"\sqrt{23}"), ("2*3", "23"), ("1010_2", "1010"), ("x^{10}", "x^{1}0+"),
    (r"\frac{1}{2x}", r"\frac{1}{2}x"), (r"\frac{x+1}{2}", "x+1/2"), ("2x", "3x"), ("x/0", "x"),
    ("-x", "x"), ("--x", "x"), ("1a", "a"), ("x^{1/2}", "x/2"), ("(-x)^2", "-x^2"),
    # Powers that are others, are not defined, or have too many digits
    ("10^3", "103"), ("10^{-3}", "-1000"), ("(-2)^2", "-2^2"), ("2^x", "x^2"), ("x^2", "2x"),
    ("0^{-1}", "0"), ("2^3^2", "512"), ("9^9^9", "1"), ("9^{9^9}", "9^9"), ("(9^600)^600", "9"),
    ("2^{9999}", "2^{9998}"), ("2^{999999999}", "2"), ("2^{1/2}", "1"), ("10^{2.5}", "100.5"),
    ("2^{2}3", "2^{23}"), (r"5^\frac12", "2.5"), ("x^\\frac{1}{2}", "x/2"), ("x^{2y}", "x^2y"),
    (r"9^{600}\cdot 9^{600}", "9"),
    # Products
    (r"\frac{x}{yz}", r"\frac{x}{y}z"), (r"\frac{1}{2\pi}", r"\frac{\pi}{2}"), ("2*-3", "2-3"),
    (r"\frac{\sin x}{2}", r"\sin\frac{x}{2}"), (r"\sin 2\pi", r"2\sin\pi"), ("f(2)", "2f"),
    ("3x+2", "2+3x"), ("2(x+1)", "2x+1"), ("x**2", "x*2"), ("even", "neve"), ("AB", "BA"),
    ("(even)", "neve"), ("*9", "9"), ("/5", ".2"), (r"\frac12\frac12", "0.4"),
    ("red blue", "blue red"), ("1/0", "2/0"), ("x/2", "x/3"), ("sqrt(2)", "1.4142"), ("2()", "2"),
    # Units
    ("16 cm", "16 cm^2"), ("16 cm^2", "16 cm^3"), ("16 cm", "16 square cm"), ("60 km/h", "60 km"),
    ("5 m/s", "5 m/s^2"), ("5/hour", "5 hours"), ("5 per hour", "5 per day"),
    ("(5 cm, 1)", "(5 m, 1)"), ("5 cm, 6", "5 m, 6"),
    (r"2\pi\text{ cm}", r"2\pi\text{ m}"), (r"2\pi\text{ cm}", "2"), (r"\pi r^2 h", r"\pi r^2"),
    # Tuples, lists, both signs
    ("(1,234)", "1234"), ("(1,234)", "1,234"), ("[1,234]", "1234"), ("-(1,234)", "-1234"),
    ("(1,234)/2", "617"), ("1,000, 2", "1, 0, 2"), ("1,2,2", "1,2"), ("()", "1"), ("12,34", "1234"),
    (r"\pm 2", "2"), (r"\pm 2", "-2"), (r"\pm 2", "(2,-2)"), (r"(\pm 2)", "(2,-2)"),
    (r"3 \pmod 5", "3"),
]


@pytest.mark.parametrize("answer, truth", EQUAL)
def test_two_spellings_of_one_answer_are_equal(answer, truth):
    for first, second in ((answer, truth), (truth, answer)):
        verdict = grade_math(f"So the answer is \\boxed{{{first}}}.", second)
        assert verdict == tools.Verdict(True, "correct", 1.0)


@pytest.mark.parametrize("answer, truth", DIFFERENT)
def test_two_answers_that_look_alike_are_not_equal(answer, truth):
    for first, second in ((answer, truth), (truth, answer)):
        verdict = grade_math(f"\\boxed{{{first}}}", second)
        assert not verdict.correct and verdict.score == 0.0
        assert verdict.reason in ("wrong", "no boxed answer")


@pytest.mark.parametrize("text, content", [
    (r"\boxed{1} then \boxed{2}", "2"), (r"\boxed{1} cut \boxed{2", "1"), (r"\boxed {7}", "7"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\{1,2\}}", r"\{1,2\}"),
    ("no box, 42", None), (r"put it in \boxed{}", None), (r"\boxed{3}, not \boxed{ }", "3"),
    (r"\boxed{a\}}", r"a\}"), ("", None), (r"\boxed{\boxed{5}}", "5"), (r"\boxed", None),
    (r"\boxed{\\}", r"\\"), ("\\boxed{\\", None),
    (r"<think>\boxed{9}</think> so \boxed{8}", "8"), (r"\boxed{1} " + r"\boxed 2 " * 900, "1"),
    (r"\boxed{1} \boxed\{2\}", "1"), (r"\boxed{1}" + " " * 19_000 + r"\boxed{2", "1"),
])
def test_last_balanced_box_is_found(text, content):
    assert last_boxed(text) == content


def test_an_answer_without_a_box_is_wrong_and_says_so():
    assert grade_math("The answer is 42.", "42") == tools.Verdict(False, "no boxed answer", 0.0)
    assert grade_math(r"\boxed{" + "1" * 5000 + "}", "1" * 4999).reason == "answer too long"


@pytest.mark.parametrize("answers, groups", [
    (["5 cm", "5", "x = 5", "5 dollars", "5"], ["5"] * 5),
    (["50%", "50", "50"], ["50"] * 3), (["y = x^2", "x^2"], ["x^2"] * 2),
    (["5 cm", "5 m", "5", "5 cm"], ["5 cm", "5 m", "5 cm", "5 cm"]),  # 5 goes with the commonest
    ([None, "(1,2)", "(2,1)", None], [None, "(1,2)", "(2,1)", None]),
    ([r"\{1,2\}", "2, 1", "[0,1)"], ["2, 1", "2, 1", "[0,1)"]),
    (["7" * 700, "7" * 700, "("], ["7" * 700] * 2 + ["("]),
])
def test_votes_are_grouped_by_the_equality_of_the_grader(answers, groups):
    assert tools.group_answers(answers) == groups
    backwards = tools.group_answers(answers[::-1])[::-1]
    assert [groups.count(one) for one in groups] == [backwards.count(one) for one in backwards]


def test_programs_and_turns_without_an_answer_have_no_vote():
    for kind, turn in (("math", "5"), ("choice", r"\boxed{5}"), ("program", r"\boxed{5}")):
        assert tools.voted_answer(tools.Problem("?", kind=kind), turn) is None


MEGA = 1_000_000
MEGABYTES = ["{", "}", "\\boxed{", "\\boxed", "\\", " ", "\n"]
HOSTILE = [
    *(piece * (MEGA // len(piece)) for piece in MEGABYTES), "\\boxed{" + "{}" * (MEGA // 2),
    "\\boxed{1" + "}" * MEGA, "\\boxed{" + "9" * 19_000 + "}", " " * MEGA + r"\boxed{1}",
    *(f"\\boxed{{{inner}}}" for inner in [
        "9" * 599, "1e" + "9" * 500, "9" * 300 + "^{" + "9" * 200 + "}", "2^{999}", "2^-999",
        "(" * 299 + ")" * 299, "[" * 200 + "," * 200 + "]" * 200, "1," * 299, "1, " * 199,
        "1,000" * 100, " " * 598 + "x", "1" + " " * 598, "1 000" * 100,
        r"\frac{" * 80 + "1" + "}" * 80, r"\frac11" * 80, r"\text{" * 80 + "}" * 80, "a " * 299,
        "5 " + "ab " * 190, "5 " + "a.-*" * 140, "-" * 599, "x=" * 299, "x(" * 299, "x_" * 299,
        r"1\cup" * 110, r"\{1\}," * 80, "1^" * 299, "1.1" * 199, "1/" * 299, "or " * 199,
        "5" + " million" * 74, "{ a " * 149, "\x00" * 599, "\ud800", "٣", "½",
        "a" * 20 + " " * 500 + "=", "(" + "1/" * 290 + "2)", "(-1)" * 149, "x^-" * 199,
        "9^600*" * 99, "9^-600/" * 85, "(9^600)^600", "±1,000°" * 85, r"\pi°" * 149,
        "sqrt°a" * 99, "5" + "a/" * 299, "5 " + "per " * 149, r"\frac{{1}}" * 66, r"\pm" * 199,
        "1**" * 199,
    ]),
]


@pytest.mark.parametrize("turn", HOSTILE, ids=range(len(HOSTILE)))
def test_no_input_makes_grading_slow_or_raise(turn):
    near = turn[7:-1][:599] + "1"
    for grade, truth in ((grade_math, "1"), (grade_choice, "A"), (grade_math, near)):
        seconds = min(timed(grade, turn, truth) for _ in range(3))
        assert seconds < 0.03, "a few milliseconds, with room for a busy machine"


def timed(grade, turn, truth):
    start = time.process_time()
    verdict = grade(turn, truth)
    assert not verdict.reason.startswith("grader error"), verdict
    return time.process_time() - start


def test_grading_holds_under_the_smallest_limit_on_integer_strings():
    before = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(640)
    try:
        assert grade_math("\\boxed{+" + "9" * 599 + "}", "9" * 599).correct
    finally:
        sys.set_int_max_str_digits(before)


@pytest.mark.parametrize("turn", [None, 42, b"\\boxed{1}", [], "\ud800 \\boxed{\ud800}"])
@pytest.mark.parametrize("kind", ["math", "choice", "program"])
def test_a_grader_never_raises_but_names_its_fault(turn, kind):
    assert not tools.grade(tools.Problem("?", "3", kind), turn, tool=None).correct
    lost = Scripted(("3", "ok"))  # one observation for two tests
    for tests, tool, fault in (([{}], None, "KeyError"), (SUM, lost, "ValueError")):
        problem = tools.Problem("?", kind="program", tests=tests)
        assert tools.grade(problem, fenced("1"), tool).reason == f"grader error: {fault}"


# --- Real references --------------------------------------------------------------------------

def test_gsm8k_references_are_right_for_their_own_answer_and_wrong_for_the_next():
    path = SHARED / "gsm8k" / "test.jsonl"
    if not path.exists():
        pytest.skip("shared/gsm8k is not here")
    rows = [json.loads(line)["answer"].rpartition("####") for line in path.read_text().splitlines()]
    answers = [answer.strip() for _, _, answer in rows]
    assert len(answers) == 1319
    for (solution, _, answer), neighbour in zip(rows, answers[1:] + answers[:1]):
        turn = f"{solution}\nThe answer is \\boxed{{{answer.strip()}}}."
        assert grade_math(turn, answer).correct
        same = Fraction(answer.strip().replace(",", "")) == Fraction(neighbour.replace(",", ""))
        assert grade_math(turn, neighbour).correct == same


# --- Multiple choice --------------------------------------------------------------------------

@pytest.mark.parametrize("turn, letter, right", [
    (r"\boxed{C}", "C", True), (r"\boxed{(C)}", "C", True), (r"\boxed{\text{C}}", "C", True),
    (r"\boxed{c}", "C", True), (r"\boxed{\textbf{(C)}}", "C", True), (r"\boxed{C.}", "C", True),
    (r"\boxed{C) 5 cm}", "C", True), (r"\boxed{\text{(C) } 5}", "C", True),
    (r"\boxed{Option C}", "(C)", True),
    (r"\boxed{C}", "B", False), (r"\boxed{A, C}", "A", False), (r"\boxed{A and C}", "A", False),
    ("(C)", "C", False), (r"\boxed{Carbon}", "C", False), (r"\boxed{(A), (C)}", "A", False),
    (r"\boxed{}", "C", False), ("", "C", False), (r"\boxed{5}", "C", False),
])
def test_letters(turn, letter, right):
    verdict = grade_choice(turn, letter)
    assert verdict.correct == right and verdict.score == float(right)
    assert not verdict.reason.startswith("grader error")


# --- Programs ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def tool():
    with tools.PythonTool(modules=()) as tool:
        yield tool


class Scripted:
    """A tool that says what it is told to."""

    def __init__(self, *observations):
        self.observations = [SimpleNamespace(text=text, outcome=outcome, seconds=0.0)
                             for text, outcome in observations]

    def run(self, codes, stdins=None, raw=False):
        self.codes, self.stdins = codes, stdins
        return self.observations


def fenced(program, label="python"):
    return f"Here it is:\n```{label}\n{program}\n```\nDone."


SUM = [{"input": "1 2\n", "output": "3\n", "type": "stdin"},
       {"input": "5 -5\n", "output": "0", "type": "stdin"}]
FIRST = [{"input": "[1, 2]\n3", "output": "[1, 3]", "type": "functional", "fn_name": "first"}]


@pytest.mark.parametrize("program, tests, reason, score", [
    ("a, b = map(int, input().split())\nprint(a + b)", SUM, "correct", 1.0),
    ("print(3)", SUM, "failed tests: wrong answer", 0.5),
    ("print(3)\nx", SUM, "failed tests: error", 0.0),
    ("class Solution:\n    def first(self, xs: List[int], y):\n"
     "        print('log')\n        return (xs[0], y)", FIRST, "correct", 1.0),
    ("def first(xs, y):\n    return [xs[0], y]", FIRST, "correct", 1.0),
    ("def first(xs, y):\n    return [y]", FIRST, "failed tests: wrong answer", 0.0),
    ("def other(xs, y):\n    return [y]", FIRST, "failed tests: error", 0.0),
    ("def first(xs, y):\n    return {xs[0]}", FIRST, "failed tests: error", 0.0),
    ("raise SystemExit(0)", FIRST, "failed tests: no value", 0.0),
    ("from __future__ import annotations\ndef first(xs: List[int], y):\n"
     "    return [xs[0], gcd(y, 6)]", FIRST, "correct", 1.0),
    ("s = 'from __future__'\nprint(comb(3, 1))", [{"input": "", "output": "3"}], "correct", 1.0),
    ("from __future__ import annotations\nif __name__ == '__main__':\n"
     "    print(sum(map(int, input().split())))", SUM, "correct", 1.0),
    ("def f():\n    return 7\nf()", [{"input": "", "output": "", "type": "stdin"}], "correct", 1.0),
    ("print(pow(2, 5, 7), gcd(4, 6), deque([1])[0])", [{"input": "", "output": "4 2 1"}], "correct",
     1.0),
])
def test_programs_run_against_every_test(tool, program, tests, reason, score):
    verdict = grade_program(fenced(program), tests, tool)
    assert (verdict.reason, verdict.score, verdict.correct) == (reason, score, score == 1.0)


def test_a_turn_without_a_program_scores_minus_one():
    for turn in ("no program", "```python\nprint(1)", "```text\noutput\n```", ""):
        assert grade_program(turn, SUM, Scripted()) == tools.Verdict(False, "no program", -1.0)
    assert grade_program(fenced("1"), [], Scripted()) == tools.Verdict(False, "no tests", 0.0)


def test_a_fault_of_the_sandbox_is_told_apart_from_a_wrong_program():
    tool = Scripted(("3", "ok"), ("could not start", "sandbox_error"))
    verdict = grade_program(fenced("1"), SUM, tool)
    assert verdict == tools.Verdict(False, "failed tests: sandbox_error", 0.5)
    for outcome in ("timeout", "memory", "crashed", "output_truncated"):
        verdict = grade_program(fenced("1"), SUM, Scripted(("3", outcome), ("0", "ok")))
        assert (verdict.reason, verdict.score) == (f"failed tests: {outcome}", 0.5)
    assert tool.stdins == ["1 2\n", "5 -5\n"]


@pytest.mark.parametrize("text, program", [
    (fenced("a") + "\n" + fenced("b"), "b\n"), (fenced("a") + "\nIt prints\n```\n7\n```", "a\n"),
    (fenced("a", ""), "a\n"), (fenced("a", "Python3"), "a\n"),
    (fenced("a") + "\n```python\ncut", "a\n"), ("```\nleft open\n```python\nb\n```", "b\n"),
    ("```python\n    s = '\\n'\n\n```", "    s = '\\n'\n\n"), (fenced("a", "cpp"), None),
    ("  ```py\nx\n  ```", "x\n"), ("- So:\n  ```py\n  if 1:\n    x\n  ```", "if 1:\n  x\n"), (
        "\t```py\n\tx\ny\n\t```", "\tx\ny\n"), ("<think>\n```python\na\n```\n</think>", "a\n"),
])
def test_the_last_fenced_program_is_found_unchanged(text, program):
    assert last_program(text) == program


@pytest.mark.parametrize("printed, expected, equal", [
    ("1\n2\n", "1\n2", True), (" 1 \n2", "1\n2", True), ("1.0 2", "1 2.00", True),
    ("1  2", "1 2", True), ("1e3", "1000", True), ("1\n\n2", "1\n2", False), ("1 2", "12", False),
    ("1", "1\n2", False), ("yes", "YES", False), ("a  b", "a b", False), ("nan", "inf", False),
    ("1e999999999", "1e999999998", False), ("", "", True), ("sNaN", "1", False), ("", "0", False),
])
def test_output_is_compared_by_line(printed, expected, equal):
    assert same_output(printed, expected) == equal


def test_a_megabyte_of_output_is_compared_in_time():
    for text in ("9" * MEGA, "1 " * (MEGA // 2), "\n" * MEGA, "```\n" * (MEGA // 4)):
        start = time.process_time()
        same_output(text, text + "1")
        last_program(text)
        assert time.process_time() - start < 1.5


def test_examples_in_the_docstrings():
    assert doctest.testmod(tools) == doctest.TestResults(failed=0, attempted=8)
