"""Make the embedded world from nothing: problems, demonstrations, tokenizer, teacher, student.

    python data/make_world.py --out data/world             about 15 minutes on two cores, seeded
    python data/make_world.py --out FOLDER --digits 0      the same world without check digits
    python data/make_world.py --out FOLDER --only teacher --sure 1        a teacher that knows what
                                                           to do after two failures in a row
    python data/make_world.py --out FOLDER --only teacher --practice 0.3  one that has learnt less
        ... --start data/world                             begin with the models that ship: a short
                                                           course in place of the whole practice
    python data/make_world.py --quick FOLDER               a hundredth of everything, to try it
    python data/premises.py                                measures the world that ships

A problem is a chain of instructions ("Start with 19. Multiply by 7. Subtract it from 82."). The
models here cannot do arithmetic, they can only copy. So every instruction takes one call of the
Python tool, and the answer is the last thing that the tool printed.

SOD rests on premises: student and teacher differ a little at every step, much where the teacher
is lost, and little again once it has recovered. This world is made so that they hold:

    check digits  A program ends in a comment, `print(19 * 7)  #606`, which changes nothing that it
                  does. The teacher knows these digits by heart and makes a mistake now and then.
                  The student has seen only random digits, and a run is too short to teach it a
                  table of a hundred. So the two differ at every call, whatever else the student
                  learns, as two language models do; d_1 does not fall to 0.
    numbers       Each turn begins with its place in the chain ("Step 2. "). Without it these
                  models count turns, and after a failed call they count wrong until the end.
    teacher       It reads conversations that go wrong and learns only from their right turns:
                  before a failed call, after one, after a recovery. What it reads after two
                  failures in a row breaks off in random words. So it is lost there, and its
                  entropy is as high as it should be.
    student       It imitates conversations with mistakes, mistakes included: after a failed call
                  it often carries out another instruction. It can do everything, but not reliably.

How the methods rank in this world is measured (README); the world was not made for a ranking.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import sod_mini as sod
import tools

SEED = 0
LIMIT = 10_000  # no running value leaves (-LIMIT, LIMIT): at most four digits to copy

# --- Problems --------------------------------------------------------------------------------

# Eight kinds of instruction: the sentence, the program, the symbol that stands in the hint.
INSTRUCTIONS = [
    ("Multiply by {a}.", "{x} * {a}", "*"),
    ("Add {a}.", "{x} + {a}", "+"),
    ("Subtract {a}.", "{x} - {a}", "-"),
    ("Subtract it from {a}.", "{a} - {x}", "from"),
    ("Divide by {a}, round down.", "{x} // {a}", "//"),
    ("Take the remainder by {a}.", "{x} % {a}", "%"),
    ("Double it and add {a}.", "2 * {x} + {a}", "2*+"),
    ("Square it.", "{x} * {x}", "square"),
]


def make_problem(rng, lengths):
    """A row of the data files, and its steps: (program, operand) of each instruction."""
    difficulty = rng.choice(lengths)
    x = start = rng.randint(2, 99)
    chosen, values = [], {start}
    while len(chosen) < difficulty:
        sentence, program, symbol = rng.choice(INSTRUCTIONS)
        a = rng.randint(2, 99)
        value = eval(program.format(x=f"({x})", a=a))
        # If a value came up twice, an answer that is given too early could be correct.
        if 1 < abs(value) < LIMIT and value not in values:
            chosen.append((sentence.format(a=a), program, a, symbol))
            values.add(value)
            x = value
    return {"question": " ".join([f"Start with {start}."] + [step[0] for step in chosen]),
            "answer": str(x), "hint": "Use " + " ".join(step[3] for step in chosen) + ".",
            "difficulty": difficulty}, [step[1:3] for step in chosen]


# --- Demonstrations --------------------------------------------------------------------------


@dataclass(frozen=True)
class Habits:
    """What happens in the conversations from which a model learns."""
    digits: int = 3          # check digits of a program: the more, the larger the gap of the models
    care: float = 0.0        # chance that a check digit is the right one; else it is random
    lengths: tuple = (3, 4)  # instructions of a problem
    told: float = 0.0        # share of questions that also say the answer or the hint, and are
                             # solved without a mistake: only so is a self-teacher of any use
    mistakes: float = 0.0    # chance that a call is wrong; a quarter of these are early answers
    lost: float = 0.0        # chance that after a failed call another instruction is carried out
    silent: float = 0.0      # chance that the tool falls silent, ...
    persist: float = 0.0     # ... and that it stays so at the next call
    breaks: float = 0.0      # chance that a turn after two failures in a row breaks off
    sure: float = 0.0        # chance that a right turn there is learnt from: the more, the less the
                             # teacher is lost
    imitates: bool = False   # also learns from mistakes, and from what follows two failures


CLEAN = Habits(told=0.15)
NOISY = replace(CLEAN, mistakes=0.2, lost=0.3, silent=0.1, persist=0.5, imitates=True)
FAILING = replace(NOISY, mistakes=0.17, lost=0.25, silent=0.4)  # else there are too few failures
READING = Habits(care=0.75, mistakes=0.2, lost=0.2, silent=0.25, persist=0.4, breaks=0.35)


def check_digits(program, digits, care, rng):
    """The digits that belong to a program's last two, from a random table.

    With a rule, such as a sum modulo 10, models like these would need far longer to learn them.
    """
    last = re.sub(r"\D", "", program)[-2:]
    right = random.Random(f"check digits of {last}").choices(range(10), k=digits)
    return "".join(str(digit if rng.random() < care else rng.randrange(10)) for digit in right)


def misread(rng, x, a):
    """Two numbers with one digit of one of them replaced; it may stay the same by chance."""
    numbers = [str(x), str(a)]
    which = rng.randrange(2)
    digits = list(numbers[which])
    at = rng.choice([i for i, c in enumerate(digits) if c.isdigit()])
    digits[at] = str((int(digits[at]) + rng.randint(1, 8)) % 9 + 1)
    numbers[which] = "".join(digits)
    return numbers


def mistaken(rng, template, x, a):
    """A wrong program: a misread number, an open bracket or an undefined name."""
    mistake = rng.choice(["operand", "bracket", "name"])
    if mistake == "operand":
        x, a = misread(rng, x, a)
    program = f"print({template.format(x='x' if mistake == 'name' else x, a=a)})"
    return program[:-1] if mistake == "bracket" else program


def answer_to(program):
    """What the real tool prints for a program of this file. A test compares the two."""
    code = program.partition("  #")[0]
    if not code.endswith(")"):
        return (f'  File "<code>", line 1\n    {program}\n         ^\n'
                "SyntaxError: '(' was never closed")
    if "x" in code:
        return ('Traceback (most recent call last):\n  File "<code>", line 1, in <module>\n'
                f"    {program}\n    {' ' * code.index('x')}^\n"
                "NameError: name 'x' is not defined")
    return str(eval(re.fullmatch(r"print\(([-+*/% 0-9]+)\)", code)[1]))


def demonstrate(steps, x, habits, rng, most=10):
    """The turns that carry out `steps` from the number x, one call each, the answer last.

    most  calls after which the answer is given, however many steps are done

    The "lesson" of an assistant's turn says whether it is learnt from. A "broken" one is the last.
    """
    turns, failures, silent, done = [], 0, False, 0
    while done < len(steps) and len(turns) < 2 * most:
        wrong = rng.random() < habits.mistakes
        if wrong and rng.random() < 0.25:
            return turns + [assistant(f"\\boxed{{{x}}}", habits.imitates)]
        breaks = failures > 1 and rng.random() < habits.breaks
        astray = failures > 0 and not breaks and rng.random() < habits.lost
        others = steps[:done] + steps[done + 1:] or steps
        template, a = rng.choice(others) if astray else steps[done]
        program = (mistaken(rng, template, x, a) if wrong and not breaks else
                   f"print({template.format(x=x, a=a)})")
        if habits.digits:
            program += f"  #{check_digits(program, habits.digits, habits.care, rng)}"
        call = f"Step {done + 1}. {tools.render_tool_call(program)}"
        if breaks:
            return turns + [assistant(call, True, broken=True)]
        silent = rng.random() < (habits.persist if silent else habits.silent)
        text = tools.TIMEOUT_TEXT if silent else answer_to(program)
        known = failures < 2 or habits.sure and rng.random() < habits.sure
        right = not wrong and not astray and known
        turns += [assistant(call, right or habits.imitates), {"role": "tool", "content": text}]
        failed = silent or "Error" in text
        x, done, failures = (x, done, failures + 1) if failed else (text, done + 1, 0)
    return turns + [assistant(f"\\boxed{{{x}}}", failures < 2 or habits.imitates)]


def assistant(content, lesson, broken=False):
    return {"role": "assistant", "content": content, "lesson": lesson, "broken": broken}


def demonstrations(rng, *kinds):
    """Yield (Problem, turns) without end; these Habits take turns."""
    while True:
        for habits in kinds:
            row, steps = make_problem(rng, habits.lengths)
            problem = tools.Problem(**row)
            told = rng.choice(["answer", "hint"]) if rng.random() < habits.told else ""
            problem.question += sod.privileged_context(problem, told)
            shown = replace(habits, mistakes=0.0, lost=0.0) if told else habits
            start = re.search(r"\d+", row["question"])[0]
            yield problem, demonstrate(steps, start, shown, rng)


# --- Tokenizer -------------------------------------------------------------------------------

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]  # special: never shown
MARKUP = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
          "<think>", "</think>"]
TEMPLATE = """{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}<|im_end|>
{% endif %}{%- for message in messages %}{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}{% for call in message.tool_calls or [] %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% endif %}{%- endfor %}{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def make_tokenizer(texts, size=512):
    """Byte-level BPE over `texts`; digits and signs stand alone, everything else may merge."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\d|-(?=\d)"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=size - len(CONTROL) - len(MARKUP), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.add_special_tokens(CONTROL)
    bpe.add_tokens(MARKUP)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        chat_template=TEMPLATE, model_max_length=1024, clean_up_tokenization_spaces=False)


# --- Models ----------------------------------------------------------------------------------


def make_model(tokenizer, width, layers, mlp):
    """A Qwen3 in miniature with random weights."""
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=layers, head_dim=32,
        num_attention_heads=width // 32, num_key_value_heads=1, intermediate_size=mlp,
        initializer_range=0.08,  # with the usual .02 models as small as these learn half as fast
        max_position_embeddings=1024, rope_theta=10_000.0, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def jumble(tokenizer, ids, rng):
    """A turn that breaks off, at each token with two chances of three, and ends in random words."""
    words = [*"-+*/%()\\{}#.:[]?0123456789x", "print(", "Error", "no", "in", "line"]
    kept = 0
    while kept < len(ids) - 1 and rng.random() < 1 / 3:
        kept += 1
    return ids[:kept] + [sod.encode(tokenizer, rng.choice(words))[0]
                         for _ in range(rng.randint(2, 8))] + ids[-1:]


def token_worth(tokenizer, ids, faint):
    """The weight of each token of a turn in the loss: `faint` for a check digit, 1 for others."""
    worth, comment = [], False
    for word in tokenizer.convert_ids_to_tokens(ids):
        comment = "#" in word or comment and word.isdigit()
        worth.append(faint if comment and word.isdigit() else 1.0)
    return worth


def practice_batch(tokenizer, demonstrated, faint, rng):
    """Conversations as a Batch; its `advantages` are the weights of the tokens in the loss."""
    rollouts, rows = [], []
    for problem, messages in demonstrated:
        rollout = sod.encode_demonstration(tokenizer, problem, messages)
        worth = [0.0] * len(rollout.prompt)
        said = [message for message in messages if message["role"] == "assistant"]
        for turn, message in zip(rollout.turns, said):
            if message["broken"]:
                turn.ids = jumble(tokenizer, turn.ids, rng)
            worth += (token_worth(tokenizer, turn.ids, faint) if message["lesson"] else
                      [0.0] * len(turn.ids)) + [0.0] * len(turn.tool_ids)
        rollouts.append(rollout)
        rows.append(worth)
    batch = sod.collate(rollouts, "cpu")
    batch.advantages = sod.pad(rows, 0.0, "cpu")
    batch.step_id[batch.advantages == 0] = 0
    return batch


def backpropagate(model, batch):
    """Leave the gradient of the weighted cross-entropy; returns the loss."""
    total = 0.0
    for rows in sod.micro_batches(batch.lengths, 4096):
        part = batch.select(rows)
        mask = part.step_id > 0
        logp = sod.token_logprobs(sod.sampled_hidden(model, part),
                                  sod.lm_head_weight(model), part.ids[mask])
        loss = -(logp * part.advantages[mask]).sum() / batch.advantages.sum()
        loss.backward()
        total += float(loss.detach())
    return total


def practise(model, tokenizer, course, source, updates, size, lr, faint=0.1):
    """Supervised updates on fresh demonstrations: 5% warm-up, then a cosine down to a twentieth.

    size   conversations of an update
    faint  weight of a check digit in the loss. The student cannot predict these digits, and at
           full weight their loss would be much larger than that of all other tokens.
    """
    def learning_rate(n):
        done = n / updates
        return lr * min(done / 0.05, 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    # A course is short: with a beta2 of .999 the large gradients of its start would count long.
    optimizer = sod.Optimizer(model.train(), learning_rate, sod.Config(beta2=0.98))
    started, rng, losses = time.process_time(), random.Random(f"{SEED} {course}"), []
    for n in range(1, updates + 1):
        batch = practice_batch(tokenizer, [next(source) for _ in range(size)], faint, rng)
        losses.append(backpropagate(model, batch))
        optimizer.step(losses[-1])
        if n % 50 == 0 or n == updates:
            print(f"{course} {n}/{updates} loss {np.mean(losses[-50:]):.4f} "
                  f"{time.process_time() - started:.0f} s of CPU", flush=True)
    optimizer.detach()


def make_student(tokenizer, given):
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums in the same order, on any number of cores
    rng = random.Random(f"{SEED} student")
    clean, noisy, failing = (replace(h, digits=given.digits) for h in (CLEAN, NOISY, FAILING))
    courses = [("single calls", [replace(clean, lengths=(1,), told=0.0)], 150, 32, 3e-3),
               ("clean", [clean], 400, 16, 3e-3), ("noisy", [noisy, failing], 700, 24, 2e-3)]
    if given.start:
        model = sod.load_model(str(given.start / "student"), "cpu", torch.float32)
        courses = [("noisy", [noisy, failing], 150, 24, 1e-3)]
    else:
        model = make_model(tokenizer, width=96, layers=3, mlp=256)
    for course, kinds, updates, size, lr in courses:
        practise(model, tokenizer, f"student, {course}", demonstrations(rng, *kinds),
                 math.ceil(updates * given.scale), size, lr)
    save(model, tokenizer, given.out / "student")


def make_teacher(tokenizer, given):
    torch.manual_seed(SEED + 1)
    torch.set_num_threads(1)
    rng = random.Random(f"{SEED} teacher")
    reading = replace(READING, digits=given.digits, sure=given.sure)
    clean = Habits(digits=given.digits, care=reading.care)
    kinds = [clean, reading, reading, reading]
    courses = [("single calls", [replace(clean, lengths=(1,))], 400, 32, 3e-3, 1.0),
               ("clean", [clean], 400, 16, 3e-3, 0.2), ("reading", kinds, 700, 24, 2e-3, 1.0)]
    if given.start:
        model = sod.load_model(str(given.start / "teacher"), "cpu", torch.float32)
        courses = [("reading", kinds, 200, 24, 1e-3, 1.0)]
    else:
        model = make_model(tokenizer, width=128, layers=4, mlp=352)
    for course, kinds, updates, size, lr, faint in courses:
        practise(model, tokenizer, f"teacher, {course}", demonstrations(rng, *kinds),
                 math.ceil(updates * given.scale * given.practice), size, lr, faint)
    save(model, tokenizer, given.out / "teacher")


def save(model, tokenizer, folder):
    """Store the model in bf16, which halves the file."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# --- The files -------------------------------------------------------------------------------


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_files(world, digits, scale):
    """Problems, demonstrations and the tokenizer; no held-out problem is practised on."""
    rng = random.Random(f"{SEED} files")
    rows, heldout = {}, int(400 * scale)
    while len(rows) < int(2400 * scale):
        row, _ = make_problem(rng, Habits.lengths)
        rows[row["question"]] = row
    write_rows(world / "heldout.jsonl", list(rows.values())[:heldout])
    write_rows(world / "train.jsonl", list(rows.values())[heldout:])
    source = demonstrations(rng, replace(NOISY, digits=digits))
    shipped = [{"messages": [{"role": "user", "content": problem.question}] +
                [{"role": m["role"], "content": m["content"]} for m in turns]}
               for problem, turns in (next(source) for _ in range(int(3000 * scale)))]
    write_rows(world / "demonstrations.jsonl", shipped)
    texts = [piece for row in shipped for m in row["messages"]
             for piece in re.split(r"</?tool_call>", m["content"]) if piece]
    frame = ["user\n", "assistant\n", "system\nTools: code_interpreter"]
    return make_tokenizer(texts + frame * len(shipped))


def call_in_processes(makers, *arguments):
    """Call each of the makers in a process of its own; these end with this one, however it ends."""
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=call_in_child, daemon=True,
                                 args=(os.getpid(), make, *arguments)) for make in makers]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join()
            if process.exitcode:
                raise tools.UserError(f"making a model failed with status {process.exitcode}; "
                                      "see above")
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
                process.join()


def call_in_child(parent, make, *arguments):
    """What each of these processes does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends this one
    tools.die_with_parent(parent)
    make(*arguments)


def command(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--out", metavar="FOLDER", type=Path, help="the folder to write; files that "
                       "are there are replaced")
    where.add_argument("--quick", metavar="FOLDER", type=Path,
                       help="the same with a hundredth of everything")
    parser.add_argument("--digits", type=int, default=Habits.digits, help="check digits [3]")
    parser.add_argument("--sure", type=float, default=Habits.sure, help="chance that the teacher "
                        "learns from a right turn after two failures in a row [0]")
    parser.add_argument("--practice", type=float, default=1.0,
                        help="share of its practice that the teacher gets [1]")
    parser.add_argument("--only", choices=["student", "teacher"], help="make one model")
    parser.add_argument("--start", metavar="FOLDER", type=Path,
                        help="a world whose models are taught the change, in 3 minutes")
    given = parser.parse_args(argv)
    given.out, given.scale = (given.quick, 0.01) if given.quick else (given.out, 1.0)
    known = sod.load_tokenizer(str(given.start / "student")) if given.start else None
    given.out.mkdir(parents=True, exist_ok=True)
    tokenizer = make_files(given.out, given.digits, given.scale)
    tokenizer = known or tokenizer  # models that exist keep the ids that they know
    makers = {"student": make_student, "teacher": make_teacher}
    call_in_processes([makers[given.only]] if given.only else makers.values(), tokenizer, given)
    if not given.only:
        subprocess.run([sys.executable, ROOT / "premises.py", "--world", given.out, "--problems",
                        str(max(1, int(64 * given.scale)))], check=True)
    if given.quick and not given.only:
        print("NOTE: a quick world is not meant to hold the premises, for its models have learnt "
              "next to nothing; it shows that everything runs")


def main(argv=None):
    """The exit status."""
    return sod.run_command(partial(command, argv), "the folder is unfinished, begin again")


if __name__ == "__main__":
    sys.exit(main())
