"""Make the embedded world from nothing: problems, demonstrations, tokenizer, teacher, student.

    python data/make_world.py                 about 13 minutes on two busy cores, seeded
    python data/make_world.py --quick FOLDER  the same script with little of everything, to try it

A problem is a chain of instructions ("Start with 19. Multiply by 7. Subtract it from 82."). The
models here cannot do arithmetic, they can only copy: so every instruction takes one call of the
Python tool, and the answer is the last thing the tool printed.

    teacher   practised on clean demonstrations, then on tools that fail once and answer when asked
              again. It has never seen two failures in a row.
    student   practised on clean demonstrations, then on noisy ones, whose tool may stay silent for
              several calls. It can do everything and is reliable at nothing.
"""
import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT.parent))

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import sod_mini as sod
import tools

SEED = 0
NOISE = 0.35  # chance that a step of the student's demonstrations goes wrong
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


def make_problem(rng):
    """A row of the data files, with its steps (sentence, program, operand, symbol)."""
    difficulty = rng.randint(2, 4)
    x = start = rng.randint(2, 99)
    steps, seen = [], {start}
    while len(steps) < difficulty:
        sentence, program, symbol = rng.choice(INSTRUCTIONS)
        a = rng.randint(2, 99)
        value = eval(program.format(x=f"({x})", a=a))
        # A value that came up before would let an early answer pass for a right one.
        if 1 < abs(value) < LIMIT and value not in seen:
            steps.append((sentence.format(a=a), program, a, symbol))
            seen.add(value)
            x = value
    return {"question": " ".join([f"Start with {start}."] + [step[0] for step in steps]),
            "answer": str(x), "hint": "Use " + " ".join(step[3] for step in steps) + ".",
            "difficulty": difficulty, "start": start, "steps": steps}


# --- Demonstrations --------------------------------------------------------------------------


class Bench:
    """Programs in, tool answers out; arithmetic without a fault is worked out here, a real tool
    gets the rest. A test compares the two."""

    def __init__(self, tool):
        self.tool = tool

    def __call__(self, program):
        match = re.fullmatch(r"print\(([-+*/% 0-9]+)\)", program)
        return str(eval(match[1])) if match else self.tool.run([program])[0].text


class Outages:
    """A tool that falls silent with probability `rate` a call, and stays so with `persist`."""

    def __init__(self, rng, rate, persist):
        self.rng, self.rate, self.persist, self.down = rng, rate, persist, False

    def silent(self):
        self.down = self.rng.random() < (self.persist if self.down else self.rate)
        return self.down


def misread(rng, x, a):
    """Two numbers with one digit of one of them replaced, in one case of eight by itself."""
    numbers = [str(x), str(a)]
    which = rng.randrange(2)
    digits = list(numbers[which])
    at = rng.choice([i for i, c in enumerate(digits) if c.isdigit()])
    digits[at] = str((int(digits[at]) + rng.randint(1, 8)) % 9 + 1)
    numbers[which] = "".join(digits)
    return numbers


def mistaken(rng, template, x, a):
    """The program of a step gone wrong: a misread number, an open bracket, an undefined name."""
    mistake = rng.choice(["operand", "bracket", "name"])
    if mistake == "operand":
        x, a = misread(rng, x, a)
    program = f"print({template.format(x='x' if mistake == 'name' else x, a=a)})"
    return program[:-1] if mistake == "bracket" else program


def demonstrate(problem, rng, bench, noise=0.0, outages=None):
    """The turns that solve `problem`, one tool call an instruction, the answer last.

    noise    chance that a step goes wrong: one in four of those is an answer too early; half of
             the calls that fail are written again, the other half passed over
    outages  when the tool is silent; the call is then repeated as it was
    """
    turns = []

    def call(program):
        text = tools.TIMEOUT_TEXT
        while text == tools.TIMEOUT_TEXT:
            text = tools.TIMEOUT_TEXT if outages and outages.silent() else bench(program)
            turns.append({"role": "assistant", "content": tools.render_tool_call(program)})
            turns.append({"role": "tool", "content": text})
        return text

    x = str(problem["start"])
    for _, template, a, _ in problem["steps"]:
        right = f"print({template.format(x=x, a=a)})"
        wrong = rng.random() < noise
        if wrong and rng.random() < 0.25:
            break
        text = call(mistaken(rng, template, x, a) if wrong else right)
        if "Error" in text and rng.random() < 0.5:
            text = call(right)
        x = text if "Error" not in text else x
    turns.append({"role": "assistant", "content": f"\\boxed{{{x}}}"})
    return turns


def demonstrations(rng, bench, noise=0.0, rate=0.0, persist=0.0, told=0.15):
    """Yield (Problem, turns) without end. A share `told` of the questions says the answer or the
    hint besides: those are solved without a mistake, so that a self-teacher is worth asking."""
    while True:
        problem = make_problem(rng)
        row = to_problem(problem)
        view = rng.choice(["answer", "hint"]) if rng.random() < told else ""
        row.question += sod.told_besides(row, view)
        yield row, demonstrate(problem, rng, bench, 0.0 if view else noise,
                               Outages(rng, rate, persist))


def to_problem(problem):
    return tools.Problem(question=problem["question"], answer=problem["answer"],
                         hint=problem["hint"], difficulty=problem["difficulty"])


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
        max_position_embeddings=1024, rope_theta=10_000.0, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id))


def practise(model, tokenizer, source, updates, batch, lr, label):
    """Supervised updates on fresh demonstrations: 5% warm-up, then a cosine down to a twentieth."""
    config = sod.Config(beta2=0.98)  # a short run: .999 would remember the first, wild updates
    agent, start = sod.Agent(config, model.train(), None, tokenizer, None), time.time()

    def learning_rate(n):
        done = n / updates
        return lr * min(done / 0.05, 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)

    agent.optimizer = sod.Optimizer(model, learning_rate, config)
    for n in range(1, updates + 1):
        rows = [sod.encode_demonstration(tokenizer, *next(source)) for _ in range(batch)]
        loss, _ = sod.backpropagate(agent, sod.collate(rows, model.device))
        agent.optimizer.step(loss)
        if n % 100 == 0 or n == updates:
            print(f"{label} {n}/{updates} loss {loss:.4f} {time.time() - start:.0f} s", flush=True)
    agent.optimizer.detach()


def save(model, tokenizer, folder):
    """bf16 halves the file; the weights that ship are the rounded ones."""
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_files(world, scale):
    """Problems, demonstrations and the tokenizer; no held-out problem is practised on."""
    rng = random.Random(f"{SEED} files")
    rows, heldout = {}, int(400 * scale)
    while len(rows) < int(2400 * scale):
        problem = make_problem(rng)
        rows[problem["question"]] = {k: problem[k] for k in
                                     ("question", "answer", "hint", "difficulty")}
    write_rows(world / "heldout.jsonl", list(rows.values())[:heldout])
    write_rows(world / "train.jsonl", list(rows.values())[heldout:])
    with tools.PythonTool() as tool:
        source = noisy(rng, tool)
        shipped = [{"messages": [{"role": "user", "content": p.question}, *turns]}
                   for p, turns in (next(source) for _ in range(int(3000 * scale)))]
    write_rows(world / "demonstrations.jsonl", shipped)
    texts = [piece for row in shipped for m in row["messages"]
             for piece in re.split(r"</?tool_call>", m["content"]) if piece]
    frame = ["user\n", "assistant\n", "system\nTools: code_interpreter"]
    return make_tokenizer(texts + frame * len(shipped))


def noisy(rng, tool):
    """What the student saw last: the tool of the world, and mistakes."""
    return demonstrations(rng, Bench(tool), noise=NOISE, rate=0.1, persist=0.5)


def make_student(tokenizer, world, scale):
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the same sums in the same order, on any number of cores
    model = make_model(tokenizer, width=96, layers=3, mlp=256)
    rng = random.Random(f"{SEED} student")
    with tools.PythonTool() as tool:
        clean = demonstrations(rng, Bench(tool))
        practise(model, tokenizer, clean, int(1800 * scale), 24, 3e-3, "student, clean")
        practise(model, tokenizer, noisy(rng, tool), int(150 * scale), 24, 1e-3, "student, noisy")
    save(model, tokenizer, world / "student")


def make_teacher(tokenizer, world, scale):
    torch.manual_seed(SEED + 1)
    torch.set_num_threads(1)
    model = make_model(tokenizer, width=128, layers=4, mlp=352)
    rng = random.Random(f"{SEED} teacher")
    with tools.PythonTool() as tool:
        clean, once = demonstrations(rng, Bench(tool)), demonstrations(rng, Bench(tool), rate=0.2)
        practise(model, tokenizer, clean, int(700 * scale), 32, 3e-3, "teacher, clean")
        practise(model, tokenizer, once, int(500 * scale), 32, 2e-3, "teacher, single time-outs")
    save(model, tokenizer, world / "teacher")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--quick", metavar="FOLDER", type=Path,
                        help="a fiftieth of everything, into a folder of its own")
    quick = parser.parse_args().quick
    world, scale = (quick, 0.02) if quick else (ROOT / "world", 1.0)
    world.mkdir(parents=True, exist_ok=True)
    tokenizer = make_files(world, scale)
    makers = [torch.multiprocessing.get_context("spawn").Process(target=make,
                                                                 args=(tokenizer, world, scale))
              for make in (make_student, make_teacher)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join()
        if maker.exitcode:
            sys.exit(f"making a model failed with status {maker.exitcode}; see above")


if __name__ == "__main__":
    main()
