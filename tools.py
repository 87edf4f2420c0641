"""The world outside the model: tool calls, graders, files, and a sandbox that runs Python.

    python tools.py          prints what the sandbox guarantees on this machine

    with PythonTool(timeout=5) as tool:
        for observation in tool.run(["6 * 7", "1 / 0"]):
            print(observation.outcome, observation.text)  # ok 42, then: error Traceback ...

Three processes take part in a call to the sandbox, and all of them run this file:

    trainer   PythonTool passes a program to an idle worker, as an open file, and judges its end
    worker    imports numpy and sympy once and gives up every right it can; for each program it
              forks a child, moves its output to a file and stops it in time (run_child)
    child     gives up more rights (restrict_child), runs one program (exec_code) and exits; no
              descriptor but 0, 1 and 2 is open in it

A program may rewrite any Python object that it can reach in its child. So the outcome follows from
what the kernel reports: exit status, CPU time, bytes in a pipe. The worker never reads a program or
its output, so no later program can find them in the memory that it inherits. Landlock limits which
files can be read and seccomp which system calls can be made; the sandbox needs both.

Outcomes
    ok, error          it ended with exit status 0, or with another one
    memory             it ended with a MemoryError that nothing caught
    timeout            it was stopped: its CPU seconds or its seconds on the clock were used up
    crashed            a signal ended it: a fault in C code, an abort, a kill
    output_truncated   it was stopped: it printed more than a million bytes
    sandbox_error      the machine failed, not the program; the call was tried four times

Not covered: bugs of the kernel, side channels, anything but Linux 5.13 or newer on x86_64;
names, sizes and times of files (stat) and facts about the machine (uname, pid, clock); memory that
the kernel holds for a program; equal output where a program reads clocks or os.urandom, or depends
on the order of a set of objects that are hashed by address.
"""
from __future__ import annotations

import ast
import atexit
import base64
import collections
import contextlib
import csv
import ctypes
import errno
import fcntl
import functools
import gc
import importlib.util
import io
import itertools
import json
import linecache
import math
import os
import pickle
import platform
import random
import re
import resource
import select
import shutil
import signal
import site
import socket
import string
import struct
import subprocess
import sys
import sysconfig
import termios
import threading
import time
import traceback
import types
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path


class UserError(ValueError):
    """One sentence about input, settings or the machine: what was found, what was needed, what to
    do. Commands end with that sentence; any other exception keeps its traceback."""


def printable(text):
    """Text of a model or a tool for the screen. Control characters, which could clear the screen
    or forge a line, are shown by name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# --- The protocol: how a turn calls a tool, and how it is answered --------------------------------

TIMEOUT_TEXT = "[no answer in time]"  # a tool that is silent: see Config.silent_rate


@dataclass(frozen=True)
class Tool:
    """What a model may call: the Python interpreter, or a function of the user's own."""
    name: str
    schema: dict      # as chat templates take it
    source: str = ""  # of the function's file; the interpreter has none


TOOL_NAME = "code_interpreter"
TOOL_SCHEMA = {"type": "function", "function": {
    "name": TOOL_NAME,
    "description": "Run a Python program and return what it prints.",
    "parameters": {"type": "object",
                   "properties": {"code": {"type": "string", "description": "The program."}},
                   "required": ["code"]}}}
INTERPRETER = Tool(TOOL_NAME, TOOL_SCHEMA)


@dataclass(frozen=True)
class ToolCall:
    """The first call of a turn, or what is wrong with it."""
    code: str = ""     # the program; empty where there is a fault
    fault: str = ""    # unopened | unclosed | not_json | unknown_tool | bad_arguments
    message: str = ""  # the fault as the model is told it
    ignored: int = 0   # further calls of the same turn, which do not run
    tool: str = TOOL_NAME


def without_thoughts(text, mark):
    """The text after `</think>`; all of it where that word stands in the program of a call, which
    begins with `mark`."""
    thought, ended, rest = text.partition("</think>")
    return rest if ended and ("<think>" in thought or mark not in thought) else text


class HermesCalls:
    """A call is JSON between <tool_call> and </tool_call>, its answer a turn of the role tool."""

    def __init__(self, tools=(INTERPRETER,)):
        self.known = tools
        self.tools = {tool.name: tool for tool in tools}
        self.schemas = [tool.schema for tool in tools]  # for the template, which shows them

    def render(self, code):
        """The text of a turn that calls the interpreter, as a model of this family writes it."""
        return self.render_call(TOOL_NAME, {"code": code})

    def render_call(self, name, arguments):
        """The same for any tool."""
        call = {"name": name, "arguments": arguments}
        return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"

    def answer(self, text):
        """The message that brings the tool's text back to the model."""
        return {"role": "tool", "content": text}

    def parse(self, text):
        """The first tool call in the text of one turn.

        text     what the model wrote, control tokens removed; thoughts do not count
        returns  ToolCall, or None where the turn holds no call and so is an answer

        Never raises; linear in the length of the text. Differs from the authors' code: there a
        malformed call ends the rollout in silence, and further calls of a turn vanish. Here the
        model is told of both.
        """
        text = without_thoughts(text, "<tool_call>")
        start, end = text.find("<tool_call>"), text.find("</tool_call>")
        if start < 0 and end < 0:
            return None
        if start < 0 or 0 <= end < start:
            return self._fault("unopened", "found </tool_call> before any <tool_call>")
        if end < 0:
            return self._fault("unclosed", "found <tool_call> without </tool_call>")
        call = self._parse_json(text[start + len("<tool_call>"):end])
        return replace(call, ignored=text.count("<tool_call>", end))

    def _parse_json(self, body):
        try:
            call = json.loads(body)
        except (ValueError, RecursionError):
            return self._fault("not_json", "the text between the tags is not valid JSON")
        name = call.get("name") if isinstance(call, dict) else None
        if not isinstance(name, str) or name not in self.tools:
            known = ("the only tool is " if len(self.tools) == 1 else "the tools are ")
            return self._fault("unknown_tool", known + ", ".join(self.tools))
        arguments = call.get("arguments")
        if name != TOOL_NAME:
            if not isinstance(arguments, dict):
                return self._fault("bad_arguments", "the arguments must be a JSON object")
            return ToolCall(call_of_function(self.tools[name], arguments), tool=name)
        if not isinstance(arguments, dict) or not isinstance(arguments.get("code"), str):
            return self._fault("bad_arguments", "the argument must be one string called code")
        if len(arguments) > 1:
            return self._fault("bad_arguments", "code is the only argument")
        return ToolCall(code=arguments["code"])

    def _fault(self, kind, found):
        example = self.render("...")
        if TOOL_NAME not in self.tools:
            call = f'{{"name": "{next(iter(self.tools))}", "arguments": {{...}}}}'
            example = f"<tool_call>\n{call}\n</tool_call>"
        return ToolCall(fault=kind, message=f"Tool call not run: {found}. Write it as {example}")


def call_of_function(tool, arguments):
    """A call of a user's function as a program: its file, then what the function returns."""
    return as_module(tool.source) + f"print({tool.name}(**{arguments!r}))\n"


def as_module(source):
    """A file as the beginning of a program. There `if __name__ == "__main__"` is false, and what it
    defines can be found under the name of its module, as pickle asks for."""
    name = "import sys\nsys.modules['tools'], __name__ = sys.modules['__main__'], 'tools'\n"
    return f"{name}{source}\n" if source else ""


class PythonCalls:
    """A call is the first ```python block of a turn (as in ToRA, Qwen2.5-Math, ReTool), its answer
    an ```output block in the next user turn. A template that knows no tools serves as well. The
    functions of a user's tools are at hand in every program."""
    BLOCK = re.compile(r"^([ \t]*)```(?:python3?|py)[ \t]*\n(.*?)(^[ \t]*```[ \t]*$|\Z)",
                       re.M | re.S)
    schemas = None

    def __init__(self, tools=(INTERPRETER,)):
        self.known = tools
        source = as_module("\n".join(dict.fromkeys(tool.source for tool in tools)).strip())
        self.source = source and f"{source}__name__ = '__main__'\n"  # as in a program of its own

    def render(self, code):
        return f"```python\n{code}\n```"

    def render_call(self, name, arguments):
        if name == TOOL_NAME:
            return self.render(arguments["code"])
        named = ", ".join(f"{argument}={value!r}" for argument, value in arguments.items())
        return self.render(f"print({name}({named}))")

    def answer(self, text):
        """The fence is longer than any in the text, so that this cannot end the block."""
        longest = max(map(len, re.findall("`+", text)), default=0)
        fence = "`" * max(3, longest + 1)
        return {"role": "user", "content": f"{fence}output\n{text}\n{fence}"}

    def parse(self, text):
        """As HermesCalls.parse. A block after \\boxed{} is part of the answer and does not run."""
        text = without_thoughts(text, "```py")
        blocks = list(self.BLOCK.finditer(text))
        if not blocks or last_boxed(text[:blocks[0].start()]) is not None:
            return None
        indent, code, closed = blocks[0].groups()
        if not closed:
            return ToolCall(fault="unclosed", message="Program not run: found ```python without a "
                            f"line ``` at its end. Write it as\n{self.render('...')}")
        return ToolCall(code=self.source + moved_left(code, indent), ignored=len(blocks) - 1)


def moved_left(code, indent):
    """A program without the indentation of its fence, as in a list, where all its lines have it.

    >>> moved_left("   if 1:\\n       print(2)\\n", "   ")
    'if 1:\\n    print(2)\\n'
    """
    lines = code.splitlines(keepends=True)
    inside = all(line.startswith(indent) or not line.strip() for line in lines)
    return "".join(line.removeprefix(indent) for line in lines) if inside else code


CALLS = {"hermes": HermesCalls, "python": PythonCalls}
HERMES = HermesCalls()
render_tool_call, parse_tool_call = HERMES.render, HERMES.parse  # with the interpreter alone


# --- Graders: verdicts and votes ----------------------------------------------------------------

@dataclass
class Verdict:
    """What a grader says about one final turn."""
    correct: bool  # the benchmark's yes or no
    reason: str    # why, in words that can be counted
    score: float   # 1 right, 0 wrong; programs: fraction of tests passed, -1 without a program


def grade(problem, final_turn, tool):
    """The verdict on a final turn, by the kind of its problem.

    Where a grader fails, the answer is wrong and the reason names the exception, to be counted.
    """
    try:
        if problem.kind == "program":
            return grade_program(final_turn, problem.tests, tool)
        grader = {"math": grade_math, "choice": grade_choice}[problem.kind]
        return grader(final_turn, problem.answer)
    except Exception as fault:
        return Verdict(False, f"grader error: {type(fault).__name__}", 0.0)


def last_boxed(text):
    """Content of the last balanced, non-blank \\boxed{...} in text, or None.

    A box that never closes (the turn was cut off) is passed over for an earlier one. Only the
    last 20,000 characters are read, which bounds the time on a megabyte of open boxes.

    >>> last_boxed(r"So \\boxed{1}, or rather \\boxed{\\frac{1}{2}}; not \\boxed{3")
    '\\\\frac{1}{2}'
    """
    text, opened, best = text[-20_000:], [], (-1, None)
    # \boxed {5} is legal LaTeX; \{ and \} are printed braces, which do not nest.
    for token in re.finditer(r"\\boxed ?\{|\\.|[{}]", text, re.DOTALL):
        if token[0].endswith("{") and token[0] != r"\{":
            opened.append((token.end(), token[0] != "{"))
        elif token[0] == "}" and opened:
            start, boxed = opened.pop()
            content = text[start:token.start()].strip()
            if boxed and content:
                best = max(best, (start, content))
    return best[1]


def voted_answer(problem, final_turn):
    """The answer of a final turn as a text that can vote; None without one.

    A choice votes for its letter. Programs have no vote, because no two are alike.
    """
    if problem.kind == "choice":
        return chosen_letter(final_turn)
    return last_boxed(final_turn) if problem.kind == "math" else None


def group_answers(answers):
    """For each answer the commonest spelling that the grader calls equal to it; None stays None.

    The grader's equality is no equivalence relation (5 cm = 5 = 5 m). So the most frequent spelling
    comes first, and each next one joins the first group whose first spelling it equals.

    >>> group_answers(["5", "x = 5", None, "7", "5 cm", "5"])
    ['5', '5', None, '7', '5', '5']
    """
    times = collections.Counter(answer for answer in answers if answer is not None)
    leaders, leader_of = [], {None: None}
    for answer in sorted(times, key=lambda answer: (-times[answer], answer)):
        leader_of[answer] = next((one for one in leaders if agree(one, answer)), answer)
        if leader_of[answer] == answer:
            leaders.append(answer)
    return [leader_of[answer] for answer in answers]


def agree(first, second):
    """True if the grader of maths accepts each of two answers where the other is the truth."""
    return all(grade_math(f"\\boxed{{{one}}}", other).correct
               for one, other in ((first, second), (second, first)))


# --- Graders: mathematics -----------------------------------------------------------------------

# A longer answer is right only if it is spelled as the truth is. 600 digits are below 640, the
# smallest limit on int(str) that Python can be set to; patterns read them in microseconds.
MAX_ANSWER = 600
MAX_BITS = 2_000  # the largest number that is computed; 600 digits have 1,994 bits

SYMBOLS = str.maketrans({
    **dict.fromkeys("−–—‐‑‒﹣－", "-"), **dict.fromkeys("⁄∕", "/"), **dict.fromkeys("×·⋅∗", "*"),
    **dict.fromkeys("€£¥", ""), **dict.fromkeys("\u00a0\u2009\u202f\n\t", " "),
    "°": " degrees ", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ",
    "√": "sqrt ", "²": "^2", "³": "^3", "≤": "<=", "≥": ">=",
})

# These bring LaTeX that only sets the layout, and what Python prints, to one spelling. The order
# matters, for a later pattern reads what an earlier one wrote.
REWRITES = [(re.compile(pattern), new) for pattern, new in [
    (r"\\\\", "; "),                                             # rows of a matrix
    (r"\\(?:(?:text|math)(?:bf|it|rm|sf|tt)?|mbox|operatorname) ?\{([^{}]*)\}", r" \1 "),
    (r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle)(?![A-Za-z])", ""),
    (r"\\[dtc]frac", r"\\frac"),
    (r"\{,\}", ","),                                            # 1{,}000
    (r"\\!|\\?\$|\\[()\[\]]", ""),                              # thin space, money, math mode
    (r"\\[,;: ]|\\q?quad(?![A-Za-z])|~", " "),
    (r"\\%|percent(?![A-Za-z])", "%"),
    (r" ?\^ ?(?:\\circ|\{ ?\\circ ?\})|\\degrees?(?![A-Za-z])", " degrees "),
    (r"\\(?:cdot|times)(?![A-Za-z])", "*"),
    (r"\\le(?:q|qslant)?(?![A-Za-z])", "<="),
    (r"\\ge(?:q|qslant)?(?![A-Za-z])", ">="),
    (r"\\\{", "⦃"),                                            # printed braces: a set
    (r"\\\}", "⦄"),
    (r"(?<![\\A-Za-z])sqrt ?([0-9]+)", r"\\sqrt{\1}"),
    (r"\\?(?<![A-Za-z])sqrt ?\(([^()]*)\)", r"\\sqrt{\1}"),     # sqrt(2) = \sqrt{2}
    (r"(?<![\\A-Za-z])(sqrt|pi)(?![A-Za-z])", r"\\\1"),
    (r"(\\[A-Za-z]+) (?=[0-9])", r"\1"),                        # \sqrt 2 = \sqrt2
    (r"\\pm(?![A-Za-z])", "±"),
    (r"\*\*", "^"),
    (r" ?([_^]) ?", r"\1"),
    (r"([_^])[{(] ?\+?(-?[0-9]+|[A-Za-z]) ?[)}](?![0-9])", r"\1\2"),  # x^{10} = x^10
    (r"(?<![_^])\{ ?([A-Za-z0-9]) ?\}", r"\1"),                 # \sqrt{2} = \sqrt2
    (r"(?<=[0-9.])[eE]([+-]?[0-9]{1,3})(?![0-9])", r"*10^\1"),  # 2e5 = 2*10^5
    (r"(?<=[0-9.]) ?x ?(?=10\^)", "*"),                         # 2 x 10^5 = 2*10^5
    (r"\b(?:or|and)\b", ", "),
    (r" +", " "),
]]
HALF = r" ?(?:\{((?:[^{}]|\{[^{}]*\})*)\}|([0-9A-Za-z]))"
FRAC = re.compile(r"(\^?)\\frac" + HALF + HALF)
NAMED = re.compile(r"(^|,) ?\\?[A-Za-z][A-Za-z0-9_+() ]{0,20}(?:=|\\in(?![A-Za-z]))")  # x = 5

INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)"
MIXED = r"(?<![*/])(?<![*/][-+])[0-9]+ [0-9]+/0*[1-9][0-9]*"  # 3 1/2, but not 1/3 1/2
# f(2) is one symbol, for f may be a function; 1a is no product, for it may be hexadecimal.
FACTOR = re.compile(
    r"(^[-+]?|(?!^)[*/][-+]?|(?=[\\A-Za-z(]))"                  # sign or operator; 2x is 2*x
    rf"(?:(?!1[A-Za-z])({MIXED}|{INTEGER}(?:\.[0-9]*)?|\.[0-9]+)"
    r"|(\\pi|\\sqrt(?:[0-9A-Za-z]|\{[^{}]*\})|[A-Za-z](?:\([^()]*\))?)|\(([^(),]*)\))"
    r"(?:\^([-+]?[0-9]{1,4}(?![0-9])|[A-Za-z]|\{[^{}]*\}))?")   # its power
WORD = r"[A-Za-z]++(?:\^-?[1-3])?"
MEASURED = re.compile(  # number, how its unit is joined to it, unit, other words
    rf"((?:[^A-Za-z\\%]|\\pi|\\sqrt)+?)( per | ?/? ?)(%|{WORD}(?:(?: ?/ ?| per ){WORD})*+)"
    rf"((?:[ /.*'-]{{1,3}}{WORD})*+)")

# Units too short to be told from a product of symbols by their length: 5 cm, but not 5 xy.
UNITS = set("mm cm m km in ft yd mi mg g kg lb oz ml l s h hr".split())
# Words that change the number before them: "3 dozen" is not 3. Such an answer is compared as text.
NOT_UNITS = set("dozen hundred thousand million billion trillion half halve third quarter fourth "
                "fifth sixth seventh eighth ninth tenth hundredth thousandth millionth mod sin cos "
                "tan cot log exp squared cubed factorial choose over times plus minus divided "
                "than infinity below".split())


def grade_math(final_turn, truth):
    """Compare the last boxed answer with the true one, numbers as numbers (see `same_answer`).

    Differs from the authors' code: there the two must be equal as strings, and only the last 100
    characters of the turn are searched.
    """
    answer = last_boxed(str(final_turn))
    if answer is None:
        return Verdict(False, "no boxed answer", 0.0)
    truth = last_boxed(str(truth)) or str(truth).strip()
    if answer != truth and max(len(answer), len(truth)) > MAX_ANSWER:
        return Verdict(False, "answer too long", 0.0)
    right = answer == truth or same_answer(answer, truth)
    return Verdict(right, "correct" if right else "wrong", float(right))


def same_answer(answer, truth):
    """True if two short LaTeX strings name the same number, product, set, tuple, interval or text.

    A unit counts only where both sides have one. 50% equals 50, because a question that asks "what
    percent" has 50 as its truth, and 0.5, which it is; but 50 does not equal 0.5. There is no
    algebra: 2+3x and 3x+2 are two texts.

    >>> same_answer(r"\\frac{1}{2}", ".5"), same_answer("2, 1", r"\\{1,2\\}")
    (True, True)
    >>> same_answer("pi/2", r"\\frac12\\pi"), same_answer("16 cm", "16 cm^2")
    (True, False)
    """
    a, t = clean(answer), clean(truth)
    if bool(NAMED.search(a)) != bool(NAMED.search(t)):  # x = 5 equals 5, but not y = 5
        a, t = NAMED.sub(r"\1", a).strip(), NAMED.sub(r"\1", t).strip()
    read = measured if measured(a) and measured(t) else canonical  # is 1,234 a number or a list?
    x, y, bare_x, bare_y = read(a), read(t), read(a, False), read(t, False)
    return bool(a) and (x == y or bare_x == bare_y and (x == bare_x or y == bare_y)
                        or percent_as_number(x) == percent_as_number(y))


def percent_as_number(value):
    """What `measured` returns for 25% as what it returns for 0.25; any other value as it is."""
    if isinstance(value, tuple) and isinstance(value[0], Fraction) and value[3] == "%":
        return value[0] / 100, *value[1:3], ""
    return value


def clean(text):
    """Spell LaTeX, Unicode and plain text one way; `\\frac{a}{b}` becomes `a/b`."""
    text = text.translate(SYMBOLS)
    for pattern, new in REWRITES:
        text = pattern.sub(new, text)
    for _ in range(3):  # fractions in fractions
        text = FRAC.sub(slashed, text)
    return re.sub(r" +", " ", text).strip().rstrip(" .;,")


def slashed(match):
    """One match of FRAC as a/b, with brackets where 1/2x and 1/(2x) would otherwise look alike."""
    top, bottom = (match[2] or match[3] or "").strip(), (match[4] or match[5] or "").strip()
    if re.search(r".[-+ ]|^-.", top):
        top = f"({top})"
    if not re.fullmatch(r"[0-9]+(?:\.[0-9]+)?|[A-Za-z]|\\[a-z]+[0-9]?", bottom):
        bottom = f"({bottom})"
    if match[1]:
        return f"^{{{top}/{bottom}}}"
    return f" {top}/{bottom} "  # spaces: 3\frac12 is 3 1/2


def measured(text, units=True):
    """(number, symbols above the line, symbols below it, unit) of a cleaned product, or None."""
    found = MEASURED.fullmatch(text)
    unit = read_unit(*found.groups()) if found else ""
    head = product(without_blanks(found[1])) if unit else None
    if head:
        return (*head, unit * units)
    text = without_blanks(text)
    whole = product(text)
    if not whole or text[0] == "(" and whole[1] == (text,):  # (x+1) is x+1
        return None
    return *whole, ""


def read_unit(number, joint, unit, words):
    """The unit of a number, without plural endings.

    It is "" where that text is part of the expression, as in 5x, or changes the number, as in
    5 dozen. In "5 per dozen" and "5 half-gallon jugs" no word changes the number.
    """
    whole = re.sub(" ?/ ?| per ", "/", (joint + unit).lower())  # "/dozen", " cm^2"
    said = re.findall("[a-z]+(?![a-z-])", (whole + words.lower()).split("/")[0])
    if any(word.removesuffix("s") in NOT_UNITS for word in said):
        return ""
    # 5cm and 5 m are lengths. 5m may be five times m, and \pi h may be \pi times h.
    first = re.match("[a-z]*", unit.lower())[0]
    short = first in UNITS and (len(first) > 1 or joint and "\\" not in number)
    if unit != "%" and not short and not (" " in joint and len(first) > 2):
        return ""
    return re.sub("(?<=[a-z]{2})[es]+(?![a-z])", "", whole.strip())


@functools.lru_cache(1000)  # a comparison reads each of its texts several times
def product(text):
    """(number, symbols above the line, symbols below it) of a text such as 2\\pi/3, or None."""
    if len(text) > 1 and text.isalpha():
        return None  # a word
    value, above, below, end = Fraction(1), [], [], 0
    while not end or end < len(text):
        found = FACTOR.match(text, end)
        factor = read_factor(*found.groups()[1:]) if found else None
        if not factor or "/" in found[1] and not factor[0]:
            return None
        number, top, bottom = factor
        if "/" in found[1]:
            number, top, bottom = 1 / number, bottom, top
        value *= -number if "-" in found[1] else number
        if bits(value) > MAX_BITS:
            return None
        above += top
        below += bottom
        end = found.end()
    return value, tuple(sorted(above)), tuple(sorted(below))


def read_factor(digits, symbol, inner, power):
    """One factor as a product. A bracket without a product in it, as in (x+1)^2, is a symbol."""
    if digits:
        parts = digits.split() if "/" in digits else [re.sub("[, ]", "", digits)]
        base = sum(map(Fraction, parts)), (), ()  # 3 1/2 is 3 + 1/2
    else:
        base = None if symbol else product(inner)
    if base and not power:
        return base
    if base and base[1:] == ((), ()) and power[-1].isdigit():
        number, power = base[0], int(power)
        defined = (number or power >= 0) and bits(number) * abs(power) <= MAX_BITS
        return (number ** power, (), ()) if defined else None
    return None if digits else (Fraction(1), ((symbol or f"({inner})") + (power or ""),), ())


def bits(number):
    """The logarithm to base 2 of the larger half of a fraction, rounded down."""
    return max(abs(number.numerator), number.denominator).bit_length() - 1


def canonical(text, units=True, depth=0):
    """A cleaned string as a value that can be compared with ==.

    (1,2) and intervals keep order and brackets. A set or a bare list loses its order, and \\pm 2
    is the list 2, -2. A product is what `measured` returns. Everything else is text without blanks.
    """
    text = text.strip()
    whole = measured(text, units)
    if whole and (depth or "," not in text):  # 1,000 is a number within a list, else a list
        return whole
    kind, parts = split_list(text)
    if depth == 5 or not kind and len(parts) < 2:
        return without_blanks(text)
    values = [canonical(part, units, depth + 1) for part in parts]
    if len(values) == 1:
        return values[0]
    return (kind, *values) if kind else frozenset(collections.Counter(values).items())


def split_list(text):
    """The brackets around a whole string, '' for none, and the parts between its commas.

    The brackets of a set are '' as well, because a set and a bare list are the same answer.

    >>> split_list("[0, (1,2))"), split_list("1,000, ±2")
    (('[)', ['0', ' (1,2)']), ('', ['1,000', ' +2', ' -2']))
    """
    # How many brackets are open after each character.
    depth = [*itertools.accumulate((char in "([{⦃") - (char in ")]}⦄") for char in text)]
    kind = ""
    if len(text) > 1 and depth[-1] == 0 and min(depth[:-1]) > 0:
        kind, text, depth = text[0] + text[-1], text[1:-1], [d - 1 for d in depth[1:-1]]
    # Where a comma and a blank separate the parts, 1,000 without a blank is a number.
    comma = re.compile(r",(?![0-9]{3}(?![0-9]))" if ", " in text else ",")
    cuts = [at for at, opened in enumerate(depth) if not opened and comma.match(text, at)]
    parts = [text[a + 1:b] for a, b in itertools.pairwise([-1, *cuts, len(text)])]
    parts = [part for part in parts if part.strip()]
    if kind not in ("", "{}", "⦃⦄"):
        return kind, parts
    return "", [part.replace("±", sign) for part in parts for sign in "+-"[:1 + ("±" in part)]]


def without_blanks(text):
    """Text for comparison; the blank of "1 2" stays (it is not 12) and words lose their case."""
    text = re.sub(r"(?<![0-9]) | (?![0-9.])", "", text)
    text = re.sub(r"(?<=[0-9A-Za-z)}])\*(?=[A-Za-z(\\])", "", text)  # 2*\sqrt3 = 2\sqrt3
    return text.lower() if len(text) > 1 and text.isalpha() else text


# --- Graders: multiple choice -------------------------------------------------------------------

# "C", "(C)", "C) 5 cm", "option C"; not "A, C" and not "(A) (C)".
CHOICE = re.compile(r"(?:(?:option|choice|answer)[ :]*)?\(?([A-Z])"
                    r"(?:[).:](?! ?(?:,|\(|[A-Z][).:]))(.*))?", re.IGNORECASE)
# The letter before an option: "A)", "(A)", "**A.**", "a:"; not "f(A)".
OPTION = re.compile(r"(?:(?<!\w)\(|(?<![\w(]))([A-Z])\W{0,2}?[).:][}*]*", re.IGNORECASE)


def grade_choice(final_turn, letter):
    """Compare the letter in the last box with the right one."""
    chosen = chosen_letter(str(final_turn))
    if chosen is None:
        boxed = last_boxed(str(final_turn)) is not None
        return Verdict(False, "boxed answer is no letter" if boxed else "no boxed answer", 0.0)
    right = chosen == str(letter).strip(" ().").upper()
    return Verdict(right, "correct" if right else "wrong", float(right))


def chosen_letter(turn):
    return read_choice(last_boxed(turn) or "")[0]


def read_choice(text):
    """(letter, text after it) of an answer that names one option, else (None, "").

    >>> read_choice("(c) 5 cm"), read_choice("A and C")
    (('C', ' 5 cm'), (None, ''))
    """
    found = CHOICE.fullmatch(clean(text[:MAX_ANSWER]))
    return (found[1].upper(), found[2] or "") if found else (None, "")


def listed_options(question):
    """{letter: text up to the next letter} of the options that a question lists, each on a line of
    its own or all on one line; {} where there are less than two.

    >>> listed_options("Which one? (A) 1 (B) 2")
    {'A': ' 1 ', 'B': ' 2'}
    """
    marks = []
    for mark in OPTION.finditer(question):
        if len(marks) == 1 and mark[1].upper() == "A":
            marks = []  # "Vitamin A. Which one? A) 1 B) 2"
        if mark[1].upper() == chr(ord("A") + len(marks)):
            marks.append(mark)
    ends = [mark.start() for mark in marks[1:]] + [len(question)]
    return {mark[1].upper(): question[mark.end():end]
            for mark, end in zip(marks, ends) if len(marks) > 1}


def begins(text, start):
    """Does a text begin with another one, whatever their blanks, capitals and LaTeX?"""
    text, start = (without_blanks(clean(one[:MAX_ANSWER])).casefold() for one in (text, start))
    return text.startswith(start)


# --- Graders: programs --------------------------------------------------------------------------

# LiveCodeBench puts these imports before every program, for its starter code says List[int] and
# imports nothing. builtins comes last because math and others hide names such as pow.
PRELUDE = "".join(f"import {name}\nfrom {name} import *\n" for name in (
    "sys string re collections heapq bisect copy math itertools functools typing builtins"
).split()) + "sys.setrecursionlimit(50_000)\n"
MARK = "value of the call: "
CALL = """
import json as _json
_call = Solution().{name} if "Solution" in globals() else {name}
_args = [_json.loads(_line) for _line in {lines!r}]
print("\\n" + {mark!r} + _json.dumps(_call(*_args)), flush=True)
"""


def grade_program(final_turn, tests, tool):
    """Run the last fenced program of the final turn against every test.

    tests    [{"input": str, "output": str, "type": "stdin" | "functional", "fn_name": str}]
             functional: one JSON argument a line in, one JSON value out, as in LiveCodeBench
    tool     tool.run(codes, stdins, raw=True) gives one observation a test: its stdout, uncut
    returns  a Verdict that is right if all tests pass, scored by the fraction that did. The reason
             names every kind of failure once; "sandbox_error" is the machine's, not the model's.
    """
    program = last_program(str(final_turn))
    if program is None:
        return Verdict(False, "no program", -1.0)
    if not tests:
        return Verdict(False, "no tests", 0.0)
    codes = [code_for_test(program, test) for test in tests]
    stdins = ["" if is_functional(test) else test["input"] for test in tests]
    observations = tool.run(codes, stdins, raw=True)
    failures = [failure(test, one) for test, one in zip(tests, observations, strict=True)]
    kinds = sorted({kind for kind in failures if kind})
    reason = "failed tests: " + ", ".join(kinds) if kinds else "correct"
    return Verdict(not kinds, reason, failures.count("") / len(tests))


def last_program(text):
    """The last closed fenced block, unchanged; one labelled Python is preferred to an unlabelled.

    Differs from the authors' code: there the program is what stands between two </think>, and each
    \\n in it becomes a line break, even within a string.
    """
    found, label, lines, indent = {}, None, [], ""
    for line in text.splitlines(keepends=True):
        fence = line.strip()
        if fence.startswith("```") and (len(fence) > 3 or label is None):
            label, lines = fence[3:].strip().lower(), []  # a labelled fence always opens a block
            indent = line[:line.index("`")]
        elif fence == "```":
            name = "python" if label in ("python", "python3", "py") else label
            found[name], label = moved_left("".join(lines), indent), None
        else:
            lines.append(line)
    return found.get("python", found.get(""))


def is_functional(test):
    return test.get("type") == "functional"


def code_for_test(program, test):
    """The program as it is run for one test."""
    if "from __future__" in program:  # must come first in what is compiled, so before PRELUDE
        program = f"exec(compile({program!r}, '<program>', 'exec', dont_inherit=True))\n"
    if not is_functional(test):
        return PRELUDE + program
    lines = [line for line in test["input"].split("\n") if line.strip()]
    return PRELUDE + program + CALL.format(name=test["fn_name"], lines=lines, mark=MARK)


def failure(test, observation):
    """Why a test failed: an outcome of the tool, "wrong answer", "no value"; "" if it passed."""
    if observation.outcome != "ok":
        return observation.outcome
    if not is_functional(test):
        return "" if same_output(observation.text, test["output"]) else "wrong answer"
    _, mark, value = observation.text.rpartition(MARK)
    if not mark:
        return "no value"  # the program ended itself, by exit(), before the call
    return "" if json.loads(value) == json.loads(test["output"]) else "wrong answer"


def same_output(printed, expected):
    """True if all lines are equal without their outer blanks; numbers are compared as numbers."""
    ours, theirs = printed.strip().split("\n"), expected.strip().split("\n")
    return len(ours) == len(theirs) and all(
        a.strip() == b.strip() or same_numbers(a.split(), b.split())
        for a, b in zip(ours, theirs))


def same_numbers(ours, theirs):
    try:
        return [Decimal(word) for word in ours] == [Decimal(word) for word in theirs]
    except InvalidOperation:  # words
        return False


# --- Problem files ------------------------------------------------------------------------------

@dataclass
class Problem:
    """One question and what decides whether an answer to it is right."""
    question: str                               # what the user turn says
    answer: str = ""                            # maths and choice: the truth; programs: ""
    kind: str = "math"                          # math | choice | program: which grader
    hint: str = ""                              # for the teacher of opsd_hint, without the answer
    tests: list = field(default_factory=list)   # programs: see grade_program
    messages: list | None = None                # the row's own prompt, worked examples included
    id: str = ""                                # unique within its file
    source: str = ""                            # the benchmark, by default the file's name
    difficulty: int = 0                         # 1 is easy, 0 is unknown


def load_problems(path, calls=HERMES):
    """Every problem of a .jsonl, .json, .csv or .parquet file, in order.

    The columns of a row say how it is read, so a file may mix benchmarks:

        question or messages, answer, hint, tests, difficulty    this project's own
        question, answer "... #### 42"                           GSM8K
        problem, answer or solution                              AIME, MATH-500
        prompt, reward_model.ground_truth, data_source           Open-AgentRL
        question, correct answer, incorrect answer 1 to 3        GPQA
        question_content, public_test_cases                      LiveCodeBench
        question, choices, answer (place from 0, or letter)      MMLU; also options, or A, B, ...

    Messages are asked up to their last user turn, with the worked examples before it; a solution
    after that turn is left out. Where a call stands beside its turn, in tool_calls, it becomes the
    text that `calls` writes.

    Raises UserError, one sentence with file, line, what was found and what to do. Where JSON took
    backslashes from LaTeX they are put back, and a warning counts the rows.
    """
    path = Path(path)
    return read_problems(path, read_rows(path), calls)


def read_problems(path, rows, calls=HERMES):
    """The Problem of each (line number, row) of a file."""
    problems, mended = [], []
    for line, row in rows:
        restored = restore_latex(row)
        mended += [str(line)] * (restored != row)
        with naming_the_line(path, line):
            row = {str(name).strip().lower(): restored[name] for name in row}
            problem = read_row(row, calls)
            if problem.kind == "math" and not agree(problem.answer, problem.answer):
                raise UserError(f"found the answer {problem.answer!r:.80}, to which no answer is "
                                "equal, not even itself; mend it.")
        problems.append(replace(problem, source=problem.source or path.stem,
                                id=problem.id or f"{path.stem}-{line}"))
    if not problems:
        raise UserError(f"{path} is empty; needed at least one problem.")
    if mended:
        warnings.warn(f"{path}: backslashes restored in {len(mended)} rows "
                      f"(lines {', '.join(mended)})", stacklevel=3)
    return problems


@contextlib.contextmanager
def naming_the_line(path, line):
    """Put the file and the line of a row before the sentence that says what is wrong with it."""
    try:
        yield
    except ValueError as fault:
        raise UserError(f"{path}, line {line}: {fault}") from fault
    except (TypeError, AttributeError, RecursionError) as fault:
        raise UserError(f"{path}, line {line}: found a column that holds another kind of value "
                        f"than its name promises ({fault}); mend it.") from fault


def load_demonstrations(path, calls=HERMES):
    """[(Problem, turns), ...] from rows whose "messages" hold whole conversations.

    The problem keeps what `read_messages` calls the prompt, `turns` are the solution.
    """
    path, pairs = Path(path), []
    for line, row in read_rows(path):
        with naming_the_line(path, line):
            prompt, turns = read_messages(row, calls)
            if not turns:
                raise UserError("found no conversation; needed \"messages\", a list of turns "
                                "with an assistant turn at its end.")
            pairs.append((Problem(prompt[-1]["content"], messages=prompt), turns))
    if not pairs:
        raise UserError(f"{path} is empty; needed at least one demonstration.")
    return pairs


# The first letters of the roles: the system's turn, worked examples, the question, its solution.
CONVERSATION = re.compile("s?(?:u+(?:at)*a)*u+((?:at)*a)?")


def read_messages(row, calls):
    """(prompt, solution): a row's turns up to its last user turn, and those after it.

    The prompt may hold worked examples; the solution is empty where the row ends with its
    question. A row without a conversation gives (None, []).
    """
    messages = row.get("messages") or row.get("prompt")
    if not isinstance(messages, list):
        return None, []
    turns = [read_turn(message, calls) for message in messages]
    roles = [turn["role"] for turn in turns]
    found = CONVERSATION.fullmatch("".join(role[0] for role in roles))
    if not found:
        raise UserError(f"found turns in the order {' '.join(roles)}; needed user and assistant "
                        "in turn, a tool only between two assistant turns, a system turn only "
                        "first, and at the end a user turn (the question) or an assistant turn "
                        "(its solution); complete the conversation or delete its end.")
    end = len(turns) - len(found[1] or "")
    return turns[:end], turns[end:]


def read_turn(message, calls):
    """One turn as text, in which a call stands as the model is to write it."""
    if (isinstance(message, dict) and message.get("role") == "assistant"
            and isinstance(message.get("tool_calls"), list) and message["tool_calls"]):
        message = {**message, "content": with_call(message, calls), "tool_calls": None}
    if (not isinstance(message, dict) or not isinstance(message.get("content"), str)
            or message.get("role") not in ("system", "user", "assistant", "tool")
            or message.get("tool_calls")):
        raise UserError(f"found the turn {message!r:.80}; needed the role system, user, assistant "
                        "or tool, and as its content one text, in which calls are markup, or "
                        "a list tool_calls in an assistant turn.")
    return {"role": message["role"], "content": message["content"]}


def with_call(message, calls):
    """The text of an assistant turn and of the call beside it, which OpenAI's API keeps apart:

    {"content": "I ask." or None,
     "tool_calls": [{"function": {"name": "f", "arguments": an object, or its JSON}}]}
    """
    known = {tool.name: tool.schema["function"]["parameters"]["properties"] for tool in calls.known}
    try:
        (call,) = message["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
        fits = set(arguments) <= set(known[name]) and (
            name != TOOL_NAME or isinstance(arguments["code"], str))
    except (ValueError, TypeError, KeyError):
        fits = False
    if not fits or not isinstance(arguments, dict):
        raise UserError(f"found the calls {message['tool_calls']!r:.160}; needed one call a turn, "
                        f"of {' or '.join(known)}, with the name of a tool and its arguments as "
                        "an object or as JSON; give the tool by --tools, or delete the row.")
    written = calls.render_call(name, arguments)
    text = "\n".join(filter(None, [message.get("content"), written]))
    read = calls.parse(text)
    # The mark of a call, in the words before it or in the program, would be read as its own.
    if (not read or read.fault or read != calls.parse(written)
            or name == TOOL_NAME and arguments["code"] not in read.code):
        raise UserError(f"found a turn that would be read as another call once its call is written "
                        f"as {calls.render('...')!r}; take that mark out of its text or program.")
    return text


SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def read_rows(path):
    """(line number, row) for each row of a file; in parquet the number of the row."""
    if path.suffix == ".parquet" and path.is_file():
        return enumerate(read_parquet(path), start=1)
    text = read_text(path, SUFFIXES)
    return read_csv(path, text) if path.suffix == ".csv" else read_json(path, text)


def read_csv(path, text):
    """Yield (number of the row's last line, row)."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row or None in row.values():
                raise csv.Error(f"the row has not the header's {len(reader.fieldnames)} cells")
            yield reader.line_num, row
    except csv.Error as fault:
        raise UserError(f"{path}, line {reader.line_num}: found broken CSV ({fault}); check the "
                        "quotes, or fetch the file again.") from fault


def read_parquet(path):
    """Rows as plain dicts. This needs pyarrow, which is not among the requirements."""
    refuse_pointers(path)
    try:
        from pyarrow import parquet
    except ImportError as fault:
        raise UserError(f"{path}: found parquet, and pyarrow is not installed; run `pip install "
                        "pyarrow`, or convert the file to .jsonl elsewhere.") from fault
    try:
        return parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as fault:  # pyarrow's own errors are ValueErrors
        raise UserError(f"{path}: found broken parquet ({fault}); fetch the file again.") from fault


def locate(path):
    """The file or folder that an option names: as given, else below the folder of these scripts. So
    data/world/student or runs/NAME, stored as a word, means the same in every working directory."""
    ours = Path(__file__).resolve().parent / path
    elsewhere = path and not os.path.exists(path)  # "" names nothing
    return ours if elsewhere and os.path.exists(ours) else Path(path)


def refuse_pointers(*paths):
    """Refuse what Git leaves in the place of a large file where Git LFS is not installed."""
    for path in filter(Path.is_file, paths):
        with open(path, "rb") as file:
            if file.read(40).startswith(b"version https://git-lfs"):
                raise UserError(f"{path} is a Git LFS pointer, not the file itself; run `git lfs "
                                "pull` where you cloned it, or download the file")


def read_text(path, suffixes=(".jsonl", ".json")):
    """The text of a file with one of these suffixes."""
    path = locate(path)
    try:
        if not path.is_file():  # reading a pipe would wait, reading a device might never end
            found = "is no plain file" if path.exists() else "does not exist"
            raise UserError(f"{path} {found}; needed one that can be read to its end.")
        if path.suffix not in suffixes:
            raise UserError(f"{path}: found a {path.suffix or 'nameless'} file; needed "
                            f"{' or '.join(suffixes)}; rename or convert it.")
        refuse_pointers(path)
        text = path.read_bytes().decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeError("zero bytes")
    except (UnicodeError, OSError) as fault:
        raise UserError(f"{path}: found no UTF-8 text ({fault}); needed a text file that can be "
                        "read; decompress it or save it as UTF-8.") from fault
    return text


def read_json(path, text):
    """Yield (line number, row) of JSON lines, or (position, row) of one JSON array of objects."""
    if text.lstrip().startswith("["):
        rows = enumerate(parse_json(path, 1, text), start=1)
    else:
        rows = ((line, parse_json(path, line, row))
                for line, row in enumerate(text.split("\n"), start=1) if row.strip())
    for line, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {line}: found a {type(row).__name__}; needed a JSON "
                            "object such as {\"question\": ..., \"answer\": ...}.")
        if re.search("[\ud800-\udfff]", json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{path}, line {line}: found half a surrogate pair; needed whole "
                            "characters; mend or delete that line.")
        yield line, row


def parse_json(path, line, text):
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as fault:
        line += getattr(fault, "lineno", 1) - 1
        raise UserError(f"{path}, line {line}: found broken JSON ({fault}); needed one JSON "
                        "object a line; mend or delete that line.") from fault


# JSON reads "\frac" as a form feed and "rac". Nobody means a form feed or a backspace, so all of
# them are put back; tab, return and newline only before the rest of a command, as in "\theta".
LOST_BACKSLASH = re.compile(r"[\f\b]|\t(?=(?:riangle|imes|heta|ext|frac|au|o)\b)"
                            r"|\r(?=(?:ight|angle|ho|m)\b)|\n(?=(?:eq|abla)\b)")


def restore_latex(row):
    """The row with the backslashes that JSON took from its texts put back.

    Messages and tests stay as they are: they hold programs, in which a line may begin with "eq".
    """
    def restore(value):
        return (LOST_BACKSLASH.sub(lambda lost: json.dumps(lost[0])[1:-1], value)
                if isinstance(value, str) else value)
    return {name: restore(value) for name, value in row.items()}


def read_row(row, calls):
    """The Problem of a row. Its columns, in lower case, say which benchmark it is from. Raises
    ValueError where something is missing."""
    if "correct answer" in row:
        return read_gpqa(row)
    return read_livecodebench(row) if "question_content" in row else read_general(row, calls)


def read_gpqa(row):
    """The order of the four options is drawn with the question as the seed, so that it is the same
    in every run and on any machine."""
    names = ["correct answer", *(f"incorrect answer {number}" for number in (1, 2, 3))]
    options = [first_text(row, name).strip() for name in names]
    question = first_text(row, "question").strip()
    if not question or not all(options):
        raise UserError("found an empty cell; needed a question and four options; fetch it again.")
    order = random.Random(question).sample(range(4), 4)
    question = with_options(question, [options[index] for index in order])
    return Problem(question, "ABCD"[order.index(0)], "choice", id=first_text(row, "record id"))


def with_options(question, options):
    listed = "\n".join(f"{letter}) {text}" for letter, text in zip(string.ascii_uppercase, options))
    return f"{question}\n\n{listed}\n\nGive the letter of the right option in \\boxed{{}}."


def read_livecodebench(row):
    """A program to write. It is graded by the public and the private tests; where the row has
    starter code, this is part of the question."""
    function = json.loads(row.get("metadata") or "{}").get("func_name", "")
    tests = [test for name in ("public_test_cases", "private_test_cases")
             for test in read_tests(unpack(row.get(name)), function)]
    if not tests:
        raise UserError("found no test cases; needed public_test_cases or private_test_cases.")
    task = "Write a Python program that reads from standard input and prints the answer."
    if starter := first_text(row, "starter_code"):
        task = f"Complete this code:\n```python\n{starter.rstrip()}\n```"
    task += "\nGive the whole program in one ```python block."
    return Problem(f"{row['question_content']}\n\n{task}", "", "program", tests=tests,
                   id=first_text(row, "question_id"))


def unpack(packed):
    """Test cases from JSON, or from JSON pickled, in zlib, in base64, as in the official files."""
    if not isinstance(packed, str) or not packed.strip():
        return packed
    if packed.lstrip()[0] in "[{":
        return json.loads(packed)
    try:
        data = zlib.decompress(base64.b64decode(packed, validate=True))
        return json.loads(TextOnly(io.BytesIO(data)).load())
    except Exception as fault:  # a hostile pickle can raise any exception
        raise UserError(f"found test cases that cannot be unpacked ({fault}); needed JSON, or a "
                        "pickled JSON string in zlib in base64; fetch the file again.") from fault


class TextOnly(pickle.Unpickler):
    """Unpickles plain data. A pickle that names a class or function, to call it, is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")


def read_general(row, calls):
    """The Problem of a row of GSM8K, AIME, MATH-500, Open-AgentRL or this project."""
    messages, _ = read_messages(row, calls)
    question = first_text(row, "question", "problem", "prompt")
    if messages and question.strip() not in messages[-1]["content"]:
        raise UserError(f"found the question {question!r:.80} and messages whose last user turn "
                        "does not hold it; needed one question; delete one of the two columns.")
    question = messages[-1]["content"] if messages else question
    if not question.strip():
        raise UserError(f"found no question (columns: {', '.join(row)}); needed question, "
                        "problem, prompt or messages; rename the column.")
    reward = row.get("reward_model")
    truth = reward.get("ground_truth") if isinstance(reward, dict) else None
    tests = read_tests(row.get("tests") or hidden_tests(truth))
    answer = "" if tests else read_answer(row, truth)
    kind = row.get("kind") or ("program" if tests else "")
    if options := [] if kind in ("math", "program") else read_options(row, answer):
        answer = right_letter(truth if row.get("answer") is None else row["answer"], options)
        listed = listed_options(question).values()  # the question may show its options already
        if len(listed) != len(options) or not all(map(begins, listed, options)):
            question = with_options(question, options)
            messages = messages and [*messages[:-1], {**messages[-1], "content": question}]
    if not answer and not tests:
        raise UserError(f"found no answer (columns: {', '.join(row)}); needed answer, solution, "
                        "reward_model.ground_truth or tests; without one nothing can be graded.")
    source = first_text(row, "data_source", "source")
    if letter := chosen_option(question, answer, "choice" if options else kind):
        answer, kind = letter, "choice"
    kind = kind or "math"
    if kind not in ("math", "choice", "program") or kind == "program" and not tests:
        raise UserError(f"found the kind {kind!r}{' without tests' * (kind == 'program')}; needed "
                        "math, choice or program, and tests with program.")
    return Problem(question, answer, kind, first_text(row, "hint"), tests, messages,
                   first_text(row, "id", "unique_id", "question_id"), source, read_level(row))


def first_text(row, *names):
    """The first of these columns that holds text or a number, as text; "" if none does.

    A data frame writes nan where it holds nothing; nan is not equal to itself.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, int, float)) and str(value).strip() and value == value:
            return str(value)
    return ""


def read_answer(row, truth):
    """The final answer, cut out of a worked solution where the column holds one."""
    answer = first_text(row, "answer")
    if "####" in answer:
        return answer.rpartition("####")[2].strip()
    if answer or isinstance(truth, (str, int, float)):
        return answer.strip() or str(truth).strip()
    solution = first_text(row, "solution")
    return (last_boxed(solution) or solution.rpartition("####")[2]).strip()


def read_options(row, answer):
    """The options that a row of multiple choice has in a list, or in columns A, B and so on; []
    where it has none. Such columns count only if the answer is a letter."""
    value = next((row[name] for name in ("choices", "options")
                  if row.get(name) and row[name] == row[name]), None)  # nan: see first_text
    if value is None:
        columns = itertools.takewhile(lambda name: first_text(row, name), string.ascii_lowercase)
        options = [first_text(row, name).strip() for name in columns]
        return options if len(options) > 1 and read_choice(answer)[0] else []
    options = [first_text({"": option}, "").strip()
               for option in (value if isinstance(value, list) else [])]
    if not 2 <= len(options) <= 26 or not all(options):
        raise UserError(f"found the choices {value!r:.80}; needed a list of 2 to 26 texts; convert "
                        "them, or delete the column if the question shows them.")
    return options


def right_letter(answer, options):
    """The letter of the right one of these options, of which the answer is the place or letter."""
    letter, text = read_choice(answer) if isinstance(answer, str) else (None, "")
    place = ord(letter) - ord("A") if letter else answer if type(answer) is int else -1
    if not 0 <= place < len(options) or not begins(options[place], text):
        last = len(options) - 1
        raise UserError(f"found the answer {answer!r:.80} to {len(options)} choices; needed the "
                        f"place of the right one, a number from 0 to {last}, or its letter, A to "
                        f"{string.ascii_uppercase[last]}.")
    return string.ascii_uppercase[place]


def chosen_option(question, answer, kind):
    """The letter that an answer such as c, (C) or "C. 5" names among the options of a question;
    "" for another answer. Without options a lone letter is an unknown of algebra."""
    letter, text = read_choice(answer)
    if kind == "choice" and not letter:
        raise UserError(f"found the kind choice and the answer {answer!r:.80}; needed the letter "
                        "of an option.")
    options = listed_options(question) if letter and not kind else {}
    right = kind == "choice" or letter in options and begins(options[letter], text)
    return letter if right else ""


def read_level(row):
    """Easy, medium, hard are 1, 2, 3; "Level 5" is 5; 0 is unknown."""
    level = first_text(row, "difficulty", "level").lower()
    digits = re.search(r"[0-9]+", level)
    return {"easy": 1, "medium": 2, "hard": 3}.get(level, int(digits[0]) if digits else 0)


def hidden_tests(truth):
    """The test cases that some rows hold as JSON in the place of an answer; [] for an answer."""
    if isinstance(truth, str) and truth.lstrip()[:1] in ("[", "{") and '"' in truth:
        try:
            truth = json.loads(truth)
        except ValueError:
            return []  # a set or an interval, which is an answer
    return truth if isinstance(truth, (list, dict)) else []


def read_tests(tests, function=""):
    """Test cases of any benchmark as the dicts that grade_program takes.

    tests     [{"input", "output", "testtype" or "type", "fn_name"}, ...], or
              {"inputs": [...], "outputs": [...], "fn_name"}
    function  the name that functional tests use where they bring none
    """
    if isinstance(tests, dict):
        function = tests.get("fn_name") or function
        inputs, outputs = (tests.get(name, []) for name in ("inputs", "outputs"))
        if len(inputs) != len(outputs):
            raise UserError(f"found tests with {len(inputs)} inputs and {len(outputs)} outputs; "
                            "needed as many of each.")
        tests = [{"input": given, "output": wanted, "type": "functional" if function else "stdin"}
                 for given, wanted in zip(inputs, outputs)]
    return [read_test(test, function) for test in tests or []]


def read_test(test, function):
    if not isinstance(test, dict) or "input" not in test or "output" not in test:
        raise UserError(f"found the test {test!r:.80}; needed "
                        "{\"input\": \"...\", \"output\": \"...\"}.")
    kind = test.get("testtype") or test.get("type") or "stdin"
    name = str(test.get("fn_name") or function)
    if kind not in ("stdin", "functional") or kind == "functional" and not name.isidentifier():
        raise UserError(f"found a {kind} test for the function {name!r}; needed stdin, or "
                        "functional with a function name (fn_name, metadata.func_name).")
    given, wanted = test["input"], test["output"]
    if not isinstance(given, (str, list)):
        raise UserError(f"found the input {given!r:.80} of a test; needed text, or a list of "
                        "arguments.")
    if isinstance(given, list):  # arguments as values: one JSON text a line
        given = "\n".join(json.dumps(argument) for argument in given)
    wanted = wanted if isinstance(wanted, str) else json.dumps(wanted)
    if kind == "functional":
        for what, text in (*(("input", line) for line in given.split("\n") if line.strip()),
                           ("output", wanted)):
            try:
                json.loads(text)
            except ValueError:
                raise UserError(f"found the {what} {text!r:.80} of {name}; needed JSON: an "
                                "argument of the function a line, and what it returns.") from None
    return {"input": given, "output": wanted, "type": kind,
            "fn_name": name if kind == "functional" else ""}


# --- The files of a run: whole, or not there ----------------------------------------------------

def sync(path):
    """Wait until a file, or the names in a folder, are on the disk and survive a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path, text):
    """Replace a file, so that at every moment it holds all of the old text or all of the new."""
    aside = Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    aside.rename(path)
    sync(aside.parent)


@contextlib.contextmanager
def whole_folder(folder):
    """Yield a folder to fill, which takes the name `folder` once all of it is on the disk.

    After an error nothing of it remains. A kill or a power cut may leave a `folder`.tmp, which the
    next call removes; `folder` itself is never half written.
    """
    aside = Path(f"{folder}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            if path.is_file():  # as open as the folder, for some libraries let only the owner read
                path.chmod(aside.stat().st_mode & 0o666)
            sync(path)
        if folder.exists():  # a run that is finished a second time replaces its results
            shutil.rmtree(folder)
        aside.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def remove(folder):
    """Remove a folder, so that at no moment a part of it stands under its name."""
    aside = Path(f"{folder}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside)


def numbered(folder):
    """The folders iteration-N in `folder`, smallest N first."""
    found = [path for path in Path(folder).glob("iteration-*") if path.name[10:].isdecimal()]
    return sorted(found, key=lambda path: int(path.name[10:]))


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
TORCH_ON_A_FULL_DISK = ("unexpected pos", "PytorchStreamWriter failed")


class WriteError(UserError):
    """A file of the run could not be written; the message says why and what to do."""


@contextlib.contextmanager
def writing(folder):
    """Turn what stops a run from writing its files into a sentence.

    Libraries wrap the operating system's error in one of their own, which keeps its text at most.
    """
    try:
        os.stat(folder)
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in FULL or any(
            words in str(error) for words in [*map(os.strerror, FULL), *TORCH_ON_A_FULL_DISK])
        if not full and not isinstance(error, OSError):
            raise  # a bug, which keeps its traceback
        remedy = f"{'make room on the disk' if full else 'mend that'} and resume"
        raise WriteError(
            f"cannot write to {folder} ({error}); what was saved before is whole: {remedy}"
            if Path(folder).is_dir() else
            f"cannot write to {folder}: this folder is gone; begin anew") from error


def append_rows(path, rows):
    """Add dicts to a file, one a line."""
    with open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def cut_back(path, size):
    """Remove what was appended to a log after it had `size` bytes.

    returns  "", or a sentence where earlier lines are missing; the log then continues after its
             last whole line, because a lost log is no reason to lose a run
    """
    path.touch()
    with open(path, "r+b") as file:
        kept = file.read(size)
        kept = kept[:kept.rfind(b"\n") + 1]  # without this, the next row would join half a line
        file.truncate(len(kept))
    if len(kept) == size:
        return ""
    return (f"{path} had {size:,} bytes when its run was saved and {len(kept):,} are left: "
            "earlier lines are missing, and new lines follow what is left.")


@contextlib.contextmanager
def handled_signals(handle):
    """In the body, SIGINT (Ctrl-C), SIGTERM and SIGHUP (a lost connection) call handle(number)."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # nohup: the run outlives its terminal
        numbers.remove(signal.SIGHUP)
    before = {number: signal.signal(number, lambda number, frame: handle(number))
              for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number):
    raise KeyboardInterrupt(number)


def end_quietly_at_ctrl_c():
    """Until a command takes over the signals, as while torch is read, Ctrl-C ends with one line."""
    def end(number, frame):
        print("interrupted", file=sys.stderr, flush=True)
        os._exit(128 + number)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored
        signal.signal(signal.SIGINT, end)


@contextlib.contextmanager
def stop_requests():
    """Yield a list to which the number of a signal is added; the body stops when it is ready to.

    A second signal raises KeyboardInterrupt(number) at once.
    """
    requests = []
    with handled_signals(lambda number: interrupt(number) if requests else
                         requests.append(number)):
        yield requests


@contextlib.contextmanager
def locked(folder):
    """Keep other processes from writing to the same folder or file. The lock ends with this
    process, even if it is killed."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder} is in use by another process; let it end") from None
        yield
    finally:
        os.close(fd)


# --- The sandbox: in the trainer ----------------------------------------------------------------

MEMORY_MB = 512         # address space of a program, beyond what the interpreter itself holds
MAX_OUTPUT = 1_000_000  # bytes; a program that prints more is stopped
THREADS = 64            # threads a program may have; twice as many where C code starts them at once
FILES = 64              # descriptors that a worker, and so a program, may have
READY = b"+"            # a child's first byte: it is restricted, and no line of the program has run
# A child whose program ended with a MemoryError ends by this signal, the last of the real-time
# ones. An exit status would not do, for a program may end with any.
MEMORY_SIGNAL = int(signal.SIGRTMAX)
PAUSES = (0, 1, 4)      # seconds before a call that the sandbox failed is tried again
SELF = os.path.abspath(__file__)
PYTHON = [sys.executable, "-s", "-B", "-X", "utf8", SELF]
ENVIRONMENT = {  # all that a program sees; nothing of it is the trainer's
    "HOME": "/", "LANG": "C.UTF-8", "TZ": "UTC", "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",  # otherwise each thread takes an arena out of the address space
}


@dataclass(frozen=True)
class Limits:
    """What a program may use, and how it is shown. Every field is an option of PythonTool."""
    timeout: float = 5.0     # CPU seconds, because the clock also counts what other processes do
    max_chars: int = 2000    # characters shown to the model; the middle of longer text is cut
    workers: int = 0         # programs at once; 0: one a core (more would only share the cores)
    modules: tuple = ("numpy", "sympy")  # imported in advance, where installed
    unsafe: bool = False     # run programs even where this machine cannot contain them

    @property
    def wall(self):
        """Seconds on the clock, sleeping included."""
        return 3 * self.timeout


@dataclass(frozen=True)
class Observation:
    """What one program did."""
    text: str       # what the model is shown
    outcome: str    # listed at the top of this file, or a ToolCall's fault
    seconds: float  # on the clock, without the wait for a free worker


class PythonTool:
    """Runs programs and keeps nothing: a call is a function from code (and stdin) to text.

    Safe from several threads; starts at the first call.
    """

    def __init__(self, **options):
        self.limits = Limits(**options)
        self.retried = 0  # calls that the sandbox failed and tried again
        self._lock, self._closed = threading.Lock(), False
        self._workers, self._idle = set(), collections.deque()
        workers = self.limits.workers or len(
            getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0))
        self._pool = ThreadPoolExecutor(workers, "python-tool")

    def run(self, codes, stdins=None, raw=False):
        """Run the programs, as many at once as there are workers; observations in order.

        stdins   a text for each program to read, or None: all read the end of file
        raw      for judging a program against tests: text is its stdout alone, uncut, no echo
        """
        self._start()
        stdins = [""] * len(codes) if stdins is None else stdins
        # After Ctrl-C, map drops what has not begun; what runs ends by its own limits.
        return list(self._pool.map(self._call, codes, stdins, [raw] * len(codes)))

    def submit(self, call, place=()):
        """A future of what is observed after a ToolCall.

        place  where in a run the call is made: (seed, purpose, iteration, number of the rollout,
               turn). It makes no difference here; a tool with randomness of its own draws from it.
        """
        if call.fault:
            return finished(noting_ignored(call, Observation(call.message, call.fault, 0.0)))
        self._start()
        return self._pool.submit(
            lambda: noting_ignored(call, self._call(call.code, "", raw=False)))

    def _start(self):
        """Start the first worker, once; refuse where this machine cannot contain a program."""
        with self._lock:
            if self._closed:
                raise RuntimeError("This PythonTool is closed; make a new one.")
            if self._workers:
                return
            missing = missing_locks()
            if missing and not self.limits.unsafe:
                raise RuntimeError(f"This machine cannot contain a model's program (missing: "
                                   f"{missing}): use Linux 5.13 or newer on x86_64, or pass "
                                   "unsafe=True (--tool_unsafe true) to run programs with limits "
                                   "only.")
            # With unsafe=True a machine that can contain programs does so all the same.
            self.limits = replace(self.limits, unsafe=bool(missing))
            try:
                self._idle.append(self._add_worker())
            except OSError as error:
                raise RuntimeError(f"The sandbox does not start: {error}.") from error

    def close(self):
        """End every process of the sandbox; calls still under way come back as sandbox_error."""
        self._closed = True
        for worker in list(self._workers):
            worker.process.kill()
        self._pool.shutdown()
        for worker in self._workers:
            worker.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def _call(self, code, stdin, raw):
        """Run one program; a call that the sandbox fails is repeated after each of PAUSES."""
        started = time.monotonic()
        for pause in (*PAUSES, None):
            try:
                return self._ask((code, stdin, raw))
            except (OSError, ValueError, RecursionError) as fault:  # the last comes from JSON
                if self._closed or pause is None:
                    break
                print(f"sandbox: {fault}; the call is tried again", file=sys.stderr)
            with self._lock:
                self.retried += 1
            time.sleep(pause)
        return Observation("[the sandbox failed; the program is not to blame]", "sandbox_error",
                           time.monotonic() - started)

    def _ask(self, request):
        """What an idle worker, or a new one, observes; a worker that fails is not used again."""
        try:
            worker = self._idle.pop()
            while worker.process.poll() is not None:  # it was killed while it was idle
                worker = self._idle.pop()
        except IndexError:
            worker = self._add_worker()
        try:
            observation = worker.ask(request)
        except BaseException:
            worker.close()  # otherwise a late answer would be taken for that of another call
            self._workers.discard(worker)
            raise
        self._idle.append(worker)
        return observation

    def _add_worker(self):
        worker = Worker(self.limits)
        self._workers.add(worker)
        return worker


class SilentTool(PythonTool):
    """The tool of the embedded world, which is silent at some turns: their calls time out.

    rate     chance that it falls silent: at the first turn, and after a turn at which it was not
    persist  chance that it stays silent at the next turn

    Silence is a function of the place alone, so `submit` needs a place, made of numbers and text.
    """

    def __init__(self, rate, persist, **options):
        super().__init__(**options)
        self.rate, self.persist = rate, persist

    def submit(self, call, place):
        if call.fault or not self.is_silent(place):
            return super().submit(call, place)
        return finished(noting_ignored(call, Observation(TIMEOUT_TEXT, "timeout", 0.0)))

    def is_silent(self, place):
        """Follow the chain of silent and answered turns from turn 0 to the turn of this place."""
        draws, silent = random.Random(f"silence {place[:-1]}"), False
        for _ in range(place[-1] + 1):
            silent = draws.random() < (self.persist if silent else self.rate)
        return silent


def finished(observation):
    """A future that already has its result."""
    future = Future()
    future.set_result(observation)
    return future


def noting_ignored(call, observation):
    """The observation; where a turn made several calls, the model is told that only one ran."""
    note = f"\n(Only the first call of this turn ran; {call.ignored} did not.)"
    return replace(observation, text=observation.text + note) if call.ignored else observation


class Worker:
    """The trainer's handle on a process that runs one program after the other.

    That process ends when the trainer closes the socket between them, or ends itself.
    """

    def __init__(self, limits):
        self.limits, self.asked = limits, 0
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # A session of its own keeps Ctrl-C in the trainer's terminal away from the worker.
            # The socket is descriptor 0 there, which in a child gives way to the program's stdin.
            self.process = subprocess.Popen(
                [*PYTHON, "--worker", json.dumps(asdict(limits))], env=ENVIRONMENT, cwd="/",
                stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True)
        self.socket.settimeout(180)  # its imports may take long on a busy machine
        try:
            receive(self.socket)
        except (OSError, ValueError):
            self.close()
            raise OSError("its process was not ready in time, or ended with status "
                          f"{self.process.returncode} and said why on stderr") from None
        self.socket.settimeout(limits.wall + 20)  # a living worker stops a program well before

    def ask(self, request):
        """The Observation of one program, from (code, stdin, raw)."""
        code, stdin, raw = request
        self.asked += 1
        with (memory_file(code.encode("utf-8", "surrogatepass")) as program,
              memory_file(stdin.encode("utf-8", "replace")) as given):
            send(self.socket, [self.asked, raw], program, given)
        match receive(self.socket):
            case [[self.asked, int(status), "" | "timeout" | "output_truncated" as stopped,
                   float(seconds)], [output]]:
                with output:
                    output.seek(0)
                    return observe(output.read(), status, stopped, seconds, raw, self.limits)
        raise ValueError("an answer is malformed, or belongs to another request")

    def close(self):
        self.socket.close()
        self.process.kill()
        self.process.wait()


def memory_file(content):
    """A file without a name that holds these bytes, to be read from its start."""
    file = os.fdopen(os.memfd_create("sandbox"), "w+b")
    file.write(content)
    file.seek(0)
    return file


def send(sock, value, *files):
    """Send a value as JSON, and open files with it."""
    socket.send_fds(sock, [json.dumps(value).encode()], [file.fileno() for file in files])


def receive(sock):
    """(value, files) of one message."""
    message, descriptors, _, _ = socket.recv_fds(sock, 4096, 2)
    files = [os.fdopen(descriptor, "rb") for descriptor in descriptors]
    if not message:
        raise ConnectionError("a process at the other end of a socket has ended")
    return json.loads(message), files


def observe(output, status, stopped, seconds, raw, limits):
    """The Observation of a child, from its output, exit status and why it was stopped, or ""."""
    if output[:1] != READY:
        why = output.decode("utf-8", "replace") or stopped or f"status {status}"
        raise OSError(f"no program was begun ({why})")
    ended = {0: "ok", -MEMORY_SIGNAL: "memory"}.get(status, "crashed" if status < 0 else "error")
    outcome, output = stopped or ended, output[1:1 + MAX_OUTPUT]
    text = output.decode("utf-8", "replace")
    return Observation(text if raw else shown_text(text, outcome, status, limits), outcome, seconds)


def shown_text(text, outcome, status, limits):
    """What the model is shown: the output, without addresses of this machine, and how it ended.

    Differs from the authors' code: there time-outs and failures read "no stdout here", and count
    as success; and text over 256 characters loses its middle without a word.
    """
    text = re.sub(r"\bat 0x[0-9a-f]{6,}(?=>)", "at 0x0", text.rstrip("\n"))  # <object at 0x7f..>
    half = limits.max_chars // 2
    if len(text) > 2 * half:
        left_out = f"[... {len(text) - 2 * half:,} characters left out ...]"
        text = f"{text[:half]}\n{left_out}\n{text[-half:]}"
    notes = {
        "error": f"[exit status {status}]" if status > 1 or not text else "",
        "timeout": f"[stopped: out of time, {limits.timeout:g} s of computing "
                   f"or {limits.wall:g} s in all]",
        "memory": f"[out of memory, {MEMORY_MB} MB]",
        "crashed": f"[crashed: signal {-status}]",
        "output_truncated": f"[stopped: it printed more than {MAX_OUTPUT:,} bytes]",
    }
    return "\n".join(filter(None, [text, notes.get(outcome)])) or "[no output]"


# --- The sandbox: in the worker -----------------------------------------------------------------

WARM_UP = {  # the first use of a library is slow, so the worker makes it, once for all children
    "numpy": "import numpy as n; n.linalg.solve(n.eye(2), n.ones(2)); n.random.default_rng(0)",
    "sympy": "from sympy import *; x = symbols('x'); solve(x**2 - x - 6); simplify(sin(x)**2);"
             "integrate(x * exp(x), x); factorint(60); print(x)",
}
# These load shared libraries from outside Python's own folders, which no child can read.
FOREIGN = ("sqlite3", "ssl", "hashlib", "bz2", "lzma", "decimal", "ctypes", "uuid", "zoneinfo")


def worker_main(limits):
    """Import libraries and give up rights, once; then run one program after the other."""
    set_limit("NOFILE", FILES, FILES)  # at this moment only 0, 1 and 2 are open
    trainer = socket.socket(fileno=0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory runs out, the kernel kills a program and not the trainer
    import_modules(limits)
    restrict_worker(limits)
    listener = None if limits.unsafe else thread_listener()
    gc.collect()
    gc.freeze()  # children neither see nor touch the objects of these imports
    send(trainer, "ready")
    with contextlib.suppress(ConnectionError):  # the trainer has ended, or has closed the socket
        while True:
            (number, raw), (code, stdin) = receive(trainer)
            with code, stdin, memory_file(b"") as output:
                ended = run_child(trainer, listener, limits, raw, code, stdin, output)
                send(trainer, [number, *ended], output)


def import_modules(limits):
    """Import and warm up libraries; seed random numbers; take the project off the path."""
    sys.path[:] = [entry for entry in sys.path if entry.startswith(python_folders())]
    sys.argv[:] = ["<code>"]
    sys.set_int_max_str_digits(0)
    with warnings.catch_warnings(), contextlib.redirect_stderr(None):  # many deprecations
        for name in limits.modules:
            if importlib.util.find_spec(name):
                importlib.import_module(name)
                exec(WARM_UP.get(name, ""), {})
        for name in FOREIGN:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)
        sys.modules["numpy.random.bit_generator"].randbits = random.Random(0).getrandbits


@functools.cache
def python_folders():
    """The folders a program may read: Python's own and those of the installed packages."""
    paths = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    paths += site.getsitepackages()
    return tuple(sorted({*paths, *map(os.path.realpath, paths)}, key=len, reverse=True))


def run_child(trainer, listener, limits, raw, code, stdin, output):
    """Fork a child for one program, wait until it ends or must be stopped, and reap it.

    returns  exit status (below 0: the signal that ended it), why it was stopped or "", seconds
    """
    started = time.monotonic()
    printed, theirs = os.pipe()
    worker, pid = os.getpid(), os.fork()
    if pid == 0:
        child_main(worker, code, (stdin.fileno(), theirs), raw, limits)
    os.setpgid(pid, pid)  # the kill below then reaches all that the child may have started
    os.close(theirs)
    stopped = poll_child(pid, printed, output, trainer, listener, limits)
    os.killpg(pid, signal.SIGKILL)  # even if it has ended: nobody gets its id before it is reaped
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(printed)
    return status, stopped, time.monotonic() - started


def poll_child(pid, printed, output, trainer, listener, limits):
    """Move what the child prints to a file until it ends. Returns "", or why it must be stopped."""
    poll, size, end = select.poll(), 0, os.pidfd_open(pid)
    for descriptor in filter(None, (printed, end, listener)):
        poll.register(descriptor, select.POLLIN)
    poll.register(trainer, 0)  # reports only a hang-up
    deadline, cpu_clock = time.monotonic() + limits.wall, ~pid << 3 | 2
    with os.fdopen(end):
        while (left := min(deadline - time.monotonic(),
                           limits.timeout - time.clock_gettime(cpu_clock))) > 0:
            ready = dict(poll.poll(max(1, 1000 * left)))
            if trainer.fileno() in ready:
                break  # nobody waits for an answer any more, and sending it will fail
            if listener in ready:
                permit_thread(listener)
            if printed in ready:
                moved = os.splice(printed, output.fileno(), 65536)  # not through our own memory
                size += moved
                if not moved:
                    poll.unregister(printed)  # it closed its output, but may still run
                if size > len(READY) + MAX_OUTPUT:
                    return "output_truncated"
            elif end in ready:
                return ""  # it has ended, and every byte is moved
    return "timeout"


# --- The sandbox: in the child ------------------------------------------------------------------

def child_main(worker, program, descriptors, raw, limits):
    """Restrict this process, then run the program; never returns."""
    # Our own references, because the program may replace os._exit.
    leave, kill, own, status = os._exit, os.kill, os.getpid(), 1
    try:
        code = program.read().decode("utf-8", "surrogatepass")
        stdin, stdout = descriptors
        os.setpgid(0, 0)  # the worker does the same; either may come first
        die_with_parent(worker)
        os.dup2(1 if raw else stdout, 2)  # the worker's 1 is /dev/null
        os.dup2(stdout, 1)
        os.dup2(stdin, 0)
        os.closerange(3, FILES)  # the worker's limit allows no descriptor beyond these
        restrict_child(limits)
        os.write(1, READY)
        status = exec_code(code, raw)
    except BaseException as error:
        os.write(1, f"{type(error).__name__}: {error}".encode("utf-8", "replace"))
    finally:
        if status < 0:
            kill(own, -status)
        leave(status)  # after a signal only where the program ignores it


def exec_code(code, raw):
    """Run a program as Python would run a file, in a fresh __main__; returns the exit status, or
    -MEMORY_SIGNAL after a MemoryError."""
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    sys.stdin = sys.__stdin__ = open(0, errors="surrogateescape", closefd=False)
    sys.stdout = sys.__stdout__ = output_stream(1, "surrogateescape")
    sys.stderr = sys.__stderr__ = output_stream(2, "backslashreplace")
    random.seed(0)  # random takes a new seed after every fork
    run, raised, error = exec, sys.exc_info, None  # our own: the program may take them away
    try:
        for part in compile_code(code, raw):
            run(part, vars(main))
    except:  # noqa: E722, because the program may have given the name BaseException to another
        error = raised()[1]
    del main
    return run_exit_handlers(error)


def output_stream(descriptor, errors):
    """A stream without a buffer, so that what was printed is kept however the program ends."""
    return io.TextIOWrapper(open(descriptor, "wb", 0, closefd=False), "utf-8", errors=errors,
                            write_through=True)


def compile_code(code, raw):
    """The program as code objects: all of it, or its body and a last expression to be echoed.

    Differs from the authors' code: there the last line is rewritten to print(<line>), which breaks
    a program that ends in a loop, an assignment, an import or a comment.
    """
    code = without_fence(code.lstrip("\ufeff"))
    lines = [line + "\n" for line in code.split("\n")]
    linecache.cache["<code>"] = (len(code), None, lines, "<code>")  # tracebacks quote from here
    tree = ast.parse(code, "<code>")
    echo = not raw and tree.body and isinstance(tree.body[-1], ast.Expr)
    last = ast.Interactive([tree.body.pop()] if echo else [])
    # As in a notebook, mode "single" gives the value of an expression to sys.displayhook.
    return [compile(part, "<code>", mode, dont_inherit=True)
            for part, mode in ((tree, "exec"), (last, "single"))]


def without_fence(code):
    """A program without the Markdown that some models write around it."""
    try:
        "```" in code and ast.parse(code)
        return code
    except (SyntaxError, ValueError):
        return last_program(code) or code


def run_exit_handlers(error):
    """What Python does after the last line of a program; returns the exit status."""
    flush_output()
    status = 0 if error is None else exit_status(error)
    sys.modules.pop("__main__", None)
    for task in (threading._shutdown, atexit._run_exitfuncs, functools.partial(gc.collect, 1)):
        with contextlib.suppress(BaseException):
            task()  # gc.collect runs destructors while the program's globals still exist
    flush_output()
    return status


def flush_output():
    for stream in (vars(sys).get("stdout"), vars(sys).get("stderr")):
        with contextlib.suppress(BaseException):
            stream.flush()  # the program may have put any object in its place


def exit_status(error):
    """As Python itself ends on an exception, or takes the argument of sys.exit."""
    if not isinstance(error, SystemExit):
        print_traceback(error)
        return -MEMORY_SIGNAL if isinstance(error, MemoryError) else 1
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    sys.__stderr__.write(f"{error.code}\n")
    return 1


def print_traceback(error):
    """Print the traceback with the lines of the program alone, without libraries and this file."""
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))  # the reserve that restrict_worker left
    whole = traceback.TracebackException.from_exception(error, lookup_lines=False)
    waiting = [whole]
    while waiting:
        part = waiting.pop()
        part.stack[:] = [frame for frame in part.stack if frame.filename.startswith("<")
                         and not frame.filename.startswith("<frozen")]
        part.stack = part.stack or None  # None prints no heading where no frame is left
        nested = [part.__cause__, part.__context__, *(getattr(part, "exceptions", None) or ())]
        waiting += [other for other in nested if other and other.stack]
    text = "".join(whole.format())
    if "cannot open shared object file" in text:  # torch, unless --tool_modules has imported it
        text += "[this library is not available here: it needs files that programs may not read]\n"
    sys.__stderr__.write(text)


# --- The sandbox: Landlock, seccomp and limits --------------------------------------------------

# The system calls of a program, by name and number on x86_64; all others are refused.
ALLOWED = """
open files        read 0  write 1  close 3  fstat 5  lseek 8  pread64 17  pwrite64 18  pipe 22
                  dup 32  dup2 33  fsync 74  dup3 292  pipe2 293
names of files    stat 4  lstat 6  access 21  getcwd 79  readlink 89  getdents64 217
                  newfstatat 262  readlinkat 267  faccessat 269  statx 332
memory            mmap 9  mprotect 10  munmap 11  brk 12  mremap 25  madvise 28
waiting           poll 7  select 23  sched_yield 24  pause 34  nanosleep 35  futex 202
                  clock_nanosleep 230  epoll_wait 232  epoll_ctl 233  pselect6 270  ppoll 271
                  epoll_pwait 281  eventfd2 290  epoll_create1 291
own signals       rt_sigaction 13  rt_sigprocmask 14  rt_sigreturn 15  alarm 37  setitimer 38
                  rt_sigtimedwait 128  sigaltstack 131  restart_syscall 219
threads and ends  exit 60  wait4 61  set_tid_address 218  exit_group 231  set_robust_list 273
                  rseq 334
facts             getpid 39  uname 63  gettimeofday 96  getrlimit 97  getrusage 98  sysinfo 99
                  times 100  getuid 102  getgid 104  geteuid 107  getegid 108  getppid 110
                  getpgrp 111  getgroups 115  getpgid 121  gettid 186  time 201
                  sched_getaffinity 204  clock_gettime 228  clock_getres 229  getrandom 318
a pair of sockets sendto 44  recvfrom 45  shutdown 48  getsockname 51  getpeername 52
                  setsockopt 54  getsockopt 55
"""
# Allowed with some arguments only: see rules_on_arguments.
CONDITIONAL = """
    open 2  ioctl 16  socketpair 53  clone 56  kill 62  fcntl 72  prctl 157  tkill 200  tgkill 234
    openat 257  prlimit64 302
"""
NUMBERS = {name: int(number) for name, number in re.findall(r"(\w+) (\d+)", ALLOWED + CONDITIONAL)}
NEWER = 424  # calls from here on (clone3, openat2, io_uring) seem missing, so libc uses older ones
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
PR_SET_PDEATHSIG, PR_SET_NAME, PR_GET_NAME, PR_SET_NO_NEW_PRIVS = 1, 15, 16, 38
SECCOMP, SET_FILTER, NEW_LISTENER = 317, 1, 8
libc = ctypes.CDLL(None, use_errno=True)


def checked_call(function, *arguments):
    """Call a function of libc with integers as wide as the kernel reads them; a failure raises."""
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in arguments]
    result = function(*wide)
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{os.strerror(ctypes.get_errno())}: {arguments[0]}")
    return result


def die_with_parent(parent):
    """Ask the kernel to kill this process when its parent ends, however that ends."""
    checked_call(libc.prctl, PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)  # the parent ended before the request


def missing_locks():
    """What this machine lacks to contain a program; "" where it has everything."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "Linux on x86_64"
    # With these arguments Landlock returns its version.
    if libc.syscall(LANDLOCK_CREATE, None, ctypes.c_ulong(0), ctypes.c_ulong(1)) < 1:
        return "Landlock"
    # A kernel that knows these flags finds no filter at address 0, which is the error EFAULT.
    libc.syscall(SECCOMP, SET_FILTER, NEW_LISTENER, None)
    return "" if ctypes.get_errno() == errno.EFAULT else "seccomp"


def restrict_worker(limits):
    """Give up what no child needs, once for all of them."""
    with open("/proc/self/statm") as file:
        space = int(file.read().split()[0]) * resource.getpagesize() + (MEMORY_MB << 20)
    set_limit("AS", space, space + (64 << 20))  # the reserve is there to report a MemoryError
    set_limit("STACK", 8 << 20, 8 << 20)
    set_limit("CORE", 0, 0)
    if limits.unsafe:
        return
    checked_call(libc.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    allow_reading_only(python_folders())
    # Without capabilities, root may do no more than the owner of its files. It stays root, because
    # Python may stand in a folder that only this user can read.
    checked_call(libc.capset, struct.pack("Ii", 0x20080522, 0), bytes(24))


def allow_reading_only(folders):
    """Landlock: let this process read these folders and use no other file.

    seccomp cannot do this, because a filter sees the address of a path and not its text.
    """
    every_right = struct.pack("Q", (1 << 13) - 1)
    rules = checked_call(libc.syscall, LANDLOCK_CREATE, every_right, len(every_right), 0)
    for folder in filter(os.path.isdir, folders):
        fd = os.open(folder, os.O_PATH | os.O_CLOEXEC)
        read_file_and_folder = struct.pack("=Qi", 4 | 8, fd)
        checked_call(libc.syscall, LANDLOCK_ADD, rules, 1, read_file_and_folder, 0)
        os.close(fd)
    checked_call(libc.syscall, LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def restrict_child(limits):
    """Give up what only the worker needs: CPU time, writing to files, most system calls."""
    set_limit("CPU", *[2 * math.ceil(limits.timeout) + 1] * 2)  # in case the worker stops it late
    set_limit("FSIZE", 0, 0)
    if not limits.unsafe:
        install_filter(seccomp_filter(os.getpid()))


def set_limit(name, soft, hard):
    """Lower a limit of this process; one that is lower already stays."""
    which = getattr(resource, "RLIMIT_" + name)
    most = resource.getrlimit(which)[1]
    hard = hard if most == resource.RLIM_INFINITY else min(hard, most)
    resource.setrlimit(which, (min(soft, hard), hard))


# A seccomp filter is a small program that the kernel runs before every system call. It has one
# register. A jump says how many instructions to skip if its test is true, and how many if not.
LOAD, EQUAL, AT_LEAST, AND, RETURN = 0x20, 0x15, 0x35, 0x54, 0x06
ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000  # REFUSE + the errno to answer with
NOTIFY = 0x7FC00000  # ask the process that holds the filter's listener
AUDIT_ARCH, ANY_BIT, CLONE_THREAD = 0xC000003E, 0xFFFFFFFF, 0x10000
NOTIF_RECV, NOTIF_SEND = 0xC0502100, 0xC0182101  # ioctl on a listener


def op(code, value, if_true=0, if_false=0):
    """One instruction of a filter."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def only_if(*conditions):
    """Allow a call if for each (index, mask, values): argument[index] & mask is in values."""
    body = op(RETURN, ALLOW) + op(RETURN, REFUSE + errno.EPERM)
    for index, mask, values in reversed(conditions):
        refuse, tests = len(body) // 8 - 1, b""
        for left, value in enumerate(reversed(values)):
            tests = op(EQUAL, value, left, 0 if left else refuse) + tests
        body = op(LOAD, 16 + 8 * index) + op(AND, mask) + tests + body
    return body


def seccomp_filter(own):
    """The filter of the process with the id `own`: one rule for each call, then a refusal."""
    rules = {name: op(RETURN, ALLOW) for name in NUMBERS} | rules_on_arguments(own)
    return (op(LOAD, 4) + op(EQUAL, AUDIT_ARCH, 1) + op(RETURN, KILL) + op(LOAD, 0)
            + b"".join(op(EQUAL, NUMBERS[name], 0, len(body) // 8) + body
                       for name, body in rules.items())
            + op(AT_LEAST, NEWER, 0, 1) + op(RETURN, REFUSE + errno.ENOSYS)
            + op(RETURN, REFUSE + errno.EPERM))


def rules_on_arguments(own):
    """The rules of the calls in CONDITIONAL."""
    write = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    namespaces = 0x7E020080
    pair = ANY_BIT ^ socket.SOCK_CLOEXEC ^ socket.SOCK_NONBLOCK
    itself = only_if((0, ANY_BIT, [own]))  # it may abort, or set an alarm
    return {
        "open": only_if((1, write, [0])), "openat": only_if((2, write, [0])),  # to read
        "kill": itself, "tkill": itself, "tgkill": itself,
        "prlimit64": only_if((0, ANY_BIT, [0, own])),
        "clone": only_if((0, CLONE_THREAD | namespaces, [CLONE_THREAD])),  # threads alone
        "prctl": only_if((0, ANY_BIT, [PR_SET_NAME, PR_GET_NAME])),
        # asyncio wants a pair; datagram pairs could send to any other socket of the machine.
        "socketpair": only_if((0, ANY_BIT, [socket.AF_UNIX]), (1, pair, [socket.SOCK_STREAM])),
        # Not F_SETOWN and F_SETSIG, by which the kernel sends signals for a program; no leases.
        "fcntl": only_if((1, ANY_BIT, [fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD,
                                       fcntl.F_SETFD, fcntl.F_GETFL, fcntl.F_SETFL])),
        "ioctl": only_if((1, ANY_BIT, [termios.TCGETS, termios.TIOCGWINSZ, termios.FIONREAD,
                                       termios.FIONBIO, termios.FIOCLEX, termios.FIONCLEX])),
    }


def install_filter(instructions, flags=0):
    code = ctypes.create_string_buffer(instructions, len(instructions))
    head = struct.pack("HxxxxxxP", len(instructions) // 8, ctypes.addressof(code))
    return checked_call(libc.syscall, SECCOMP, SET_FILTER, flags, head)


def thread_listener():
    """A descriptor on which the kernel asks this worker before a child of it starts a thread.

    RLIMIT_NPROC is of no use: it does not bind root, and for others it counts all their processes.
    """
    return install_filter(op(LOAD, 0) + op(EQUAL, NUMBERS["clone"], 0, 4) + op(LOAD, 16)
                          + op(AND, CLONE_THREAD) + op(EQUAL, CLONE_THREAD, 0, 1)
                          + op(RETURN, NOTIFY) + op(RETURN, ALLOW), NEW_LISTENER)


def permit_thread(listener):
    """Answer one such question: yes, or EAGAIN where the child has THREADS threads already.

    Threads that ask at the same time are not counted yet, so there may be twice THREADS of them.
    """
    request = bytearray(80)
    with contextlib.suppress(FileNotFoundError):  # the child that asked has ended
        fcntl.ioctl(listener, NOTIF_RECV, request)
        number, thread = struct.unpack_from("QI", request)
        few = os.stat(f"/proc/{thread}/task").st_nlink - 2 < THREADS  # . and .. are counted, too
        answer = struct.pack("QqiI", number, 0, 0 if few else -errno.EAGAIN, few)
        fcntl.ioctl(listener, NOTIF_SEND, answer)


# --- The command line ---------------------------------------------------------------------------

GUARANTEES = {  # guarantee: a program that must not succeed
    "reads no file": f"open({SELF!r}).read()",
    "writes no file": "import os; p = '/tmp/python_tool_probe'; open(p, 'w'); os.remove(p)",
    "no network": "import socket; socket.socket()",
    "no new process": "import os; os.fork() or os._exit(0)",
    "no signal to others": "import os; os.kill(os.getppid(), 0)",
    "bounded memory": f"bytearray({2 * MEMORY_MB} << 20)",
    f"at most {2 * THREADS} threads": "import threading; threading.stack_size(1 << 18); "
        "wait = threading.Event().wait; "
        f"[threading.Thread(target=wait, daemon=True).start() for _ in range({THREADS})]",
}
PROBE = f"""
for name, forbidden in {GUARANTEES}.items():
    try:
        exec(forbidden)
    except Exception as error:
        print(name * isinstance(error, (PermissionError, MemoryError, RuntimeError)))
"""


def guarantees():
    """{guarantee: whether it holds on this machine}; a program tries to break each of them."""
    with PythonTool(unsafe=True, modules=()) as tool:
        observation = tool.run([PROBE], raw=True)[0]
    return {name: name in observation.text.splitlines() for name in GUARANTEES}


def main(arguments):
    if arguments[:1] == ["--worker"]:
        worker_main(Limits(**json.loads(arguments[1])))
    elif arguments:
        sys.exit(__doc__)
    else:
        for name, held in guarantees().items():
            print(f"{'holds' if held else 'DOES NOT HOLD':14}{name}")


if __name__ == "__main__":
    main(sys.argv[1:])
