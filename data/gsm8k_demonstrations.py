"""Conversations with the Python tool from GSM8K's own annotations: a cold start for real models.

    python data/gsm8k_demonstrations.py train.jsonl demonstrations.jsonl
    python data/gsm8k_demonstrations.py train.jsonl demonstrations.jsonl --rows 400 --slips 0.2

The first file is GSM8K's training half: train.jsonl of github.com/openai/grade-school-math, in
grade_school_math/data, or the same rows as parquet (which needs pyarrow), from the Hub:

    hf download openai/gsm8k main/train-00000-of-00001.parquet --repo-type dataset --local-dir gsm8k

GSM8K's solutions mark each calculation: "Natalia sold 48/2 = <<48/2=24>>24 clips in May." Each line
like this becomes a turn: its words without the result, a call that prints the result, and what the
real tool answers. The last turn is the answer in \\boxed{}. In a share of the conversations a call
with a slip comes first; it fails, and the next turn repeats it without the slip. Rows whose results
Python does not confirm are left out.
"""
import argparse
import json
import random
import re
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

import sod_mini as sod
import tools

MARK = r"\s*=?\s*\$?<<([^<>=]+)=([^<>]+)>>[\d,]*(?:\.\d+)?"


def calculations(solution):
    """[(words without the results, program, result)] of each line of a solution that calculates;
    None where a calculation is not plain arithmetic.

    >>> calculations("He sold 48/2 = <<48/2=24>>24 clips.\\nThat is all.\\n#### 24")
    [('He sold 48/2 clips.', 'print(48/2)', '24')]
    """
    found = []
    for line in solution.partition("####")[0].splitlines():
        if marks := re.findall(MARK, line):
            if any(re.search(r"[^-+*/(). 0-9]", expression) for expression, _ in marks):
                return None
            words = re.sub(MARK, "", line).strip()
            found.append((words, f"print({', '.join(e for e, _ in marks)})",
                          " ".join(result for _, result in marks)))
    return found


def slip(program, rng):
    """A program with a slip: a bracket stays open, or a name is not defined."""
    return program[:-1] if rng.random() < 0.5 else re.sub(r"\d+(\.\d+)?", "total", program, count=1)


def same_numbers(text, result):
    """Does the tool's answer hold the numbers of the annotations, but for their rounding?"""
    printed, marked = text.split(), result.split()
    try:
        return len(printed) == len(marked) and all(
            abs(float(a) - float(b)) <= 0.01 * max(1, abs(float(b)))
            for a, b in zip(printed, marked))
    except ValueError:
        return False


def conversation(row, tool, slips, most, rng, render=tools.render_tool_call):
    """The messages of one row of GSM8K, or None where it cannot be written as calls."""
    steps = calculations(row["answer"])
    if not steps or len(steps) > most:
        return None
    answer = row["answer"].rpartition("####")[2].strip().replace(",", "")
    wrong = rng.randrange(len(steps)) if rng.random() < slips else -1
    calls = []  # (words, program)
    for k, (words, program, _) in enumerate(steps):
        if k == wrong:
            calls.append((words, slip(program, rng)))
            words = "The call failed. Once more."
        calls.append((words, program))
    answers = [answer.text for answer in tool.run([program for _, program in calls])]
    confirmed = [text for n, text in enumerate(answers) if n != wrong]
    if not all(same_numbers(text, step[2]) for text, step in zip(confirmed, steps)):
        return None
    messages = [{"role": "user", "content": row["question"]}]
    for (words, program), text in zip(calls, answers):
        messages += [{"role": "assistant", "content": f"{words}\n{render(program)}"},
                     {"role": "tool", "content": text}]
    return messages + [{"role": "assistant", "content": f"The answer is \\boxed{{{answer}}}."}]


def command(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("source", type=Path, help="GSM8K's train.jsonl or its parquet")
    parser.add_argument("target", type=Path, help="the file to write")
    parser.add_argument("--rows", type=int, default=400, help="conversations to write [400]")
    parser.add_argument("--slips", type=float, default=0.2, help="share with a failed call [0.2]")
    parser.add_argument("--most", type=int, default=4, help="most calculations of a row [4]")
    parser.add_argument("--calls", choices=tools.CALLS, default="hermes",
                        help="form of the calls, as in sod_mini.py [hermes]")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    given.target.parent.mkdir(parents=True, exist_ok=True)
    rng, written, left_out = random.Random(given.seed), [], 0
    render = tools.CALLS[given.calls]().render
    rows = [row for _, row in tools.read_rows(given.source)]
    if not all(isinstance(row.get("answer"), str) and "question" in row for row in rows):
        raise sod.UserError(f"{given.source} is not GSM8K: needed a question and an answer in each "
                            "row")
    with tools.PythonTool() as tool:
        for row in rows:
            if len(written) == given.rows:
                break
            if messages := conversation(row, tool, given.slips, given.most, rng, render):
                written.append(json.dumps({"messages": messages}) + "\n")
            else:
                left_out += 1
    tools.write_whole(given.target, "".join(written))
    print(f"{len(written)} conversations in {given.target}; {left_out} rows were left out: more "
          f"than {given.most} calculations, none, or results that Python does not confirm")


def main(argv=None):
    """The exit status."""
    return sod.run_command(partial(command, argv), "begin again")


if __name__ == "__main__":
    sys.exit(main())
