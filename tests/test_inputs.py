"""Inputs from hell: each stops with one sentence and its exit status, and leaves no file."""
import errno
import functools
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import sod_mini as sod
from conftest import ROOT, WORLD

BASE = ("--preset world --iterations 1 --eval_data '' --prompts 2 --group_size 2 --show_every 0 "
        "--max_response 100 --overlong_buffer 0")
REAL_LOAD_TOOL = sod.load_tool
ROW = {"question": "Start with 5. Add 3.", "answer": "8"}
LINE = json.dumps(ROW).encode() + b"\n"


@pytest.fixture(autouse=True)
def few_problems(dozen, monkeypatch):
    """Each test runs in the repository, with a file of a dozen problems, and one tool for all."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sod, "load_tool", lambda config: load_tool_once(
        config.tool_modules, config.silent_rate))


@functools.lru_cache
def load_tool_once(modules, silent_rate):
    return REAL_LOAD_TOOL(sod.Config(tool_modules=modules, silent_rate=silent_rate))


def command(tmp_path, arguments="", module="sod_mini"):
    """The exit status of a command line, in which HERE is the test's folder."""
    base = f"{BASE} --train_data HERE/few.jsonl" if module == "sod_mini" else ""
    place = "" if re.search("--rescore|--compare|--version", arguments) else "--out HERE/out"
    words = shlex.split(f"{base} {place} {arguments}".replace("HERE", str(tmp_path)))
    try:
        main = functools.partial(importlib.import_module(module).main, words)
        return sod.run_command(main) if module == "sod_mini" else main()
    except SystemExit as stop:
        return stop.code


def stops(capsys, tmp_path, arguments, status, sentence, module="sod_mini"):
    """The command ends with `status` and a last line that matches; `out` holds no file."""
    got, said = command(tmp_path, arguments, module), capsys.readouterr().err.strip().splitlines()
    assert got == status and re.search(sentence, said[-1]), (got, said[-1:])
    assert "Traceback" not in "\n".join(said) and re.match(r"(error|[-\w.]+: error): ", said[-1])
    assert not [*(tmp_path / "out").rglob("*")]


# --- Options ------------------------------------------------------------------------------------

OPTIONS = [
    ("--lr", 2, r"argument --lr: expected one argument"),
    ("--iterations 1.5", 2, r"argument --iterations: invalid int value: '1.5'"),
    ("--learning_rate 1", 2, r"arguments: --learning_rate 1; did you mean --lr\?$"),
    ("--iter 3", 2, r"unrecognized arguments: --iter 3; did you mean --iterations\?$"),
    ("--tool-timeout=3 --gruop_size 4", 2, r"4; did you mean --tool_timeout and --group_size\?$"),
    ("--fp16 x", 2, r"unrecognized arguments: --fp16 x$"),
    ("--preset big", 2, r"argument --preset: invalid choice: 'big'"),
    ("--offload teacher --kl full", 2, r"kl full needs the teacher .* use --offload none"),
    ("--method grpo --kl full", 2, r"grpo has no teacher .*use --kl sampled"),
    ("--method grpo --weights uniform", 2, r"method grpo fixes its own weights"),
    ("--method grpo --group_size 1", 2, r"group_size is 1, and grpo compares .*: use 2 or more"),
    ("--num_minibatches 5", 2, r"prompts 2 does not divide into 5"),
    ("--overlong_buffer 101", 2, r"overlong_buffer 101 is more than max_response 100: lower it"),
    ("--train_data ''", 2, r"needs problems to learn from: use --train_data FILE"),
    ("--method sft --demonstrations ' '", 2, r"none are named: use --demonstrations FILE"),
    ("--name a/../../b", 2, r"name is 'a/../../b'; needed the name of one folder"),
    ("--name 'a\0b'", 2, r"name is 'a\\x00b'; needed the name of one folder"),
    ("--resume HERE", 2, r"holds no run that can be resumed .*name its folder"),
    ("--device cuda", 1, r"device 'cuda' cannot be used .*; use --device cpu"),
    ("--device tpu", 1, r"device 'tpu' cannot be used .*; use --device cpu"),
    ("--name " + "n" * 300, 1, r"File name too long.; name another place with --out"),
    ("--tool_modules no_such_module", 1, r"tool_modules .*no_such_module.* not installed; "),
    ("--max_response 5000", 1, r"reads 1024 tokens; max_prompt 128 and max_response 5000"),
    ("--max_prompt 3", 1, r"all 12 rows are longer than 3 tokens .*; raise --max_prompt"),
    ("--method vanilla", 2, r"method vanilla only measures: name problems with --eval_data"),
    ("--student HERE/gone", 1, r"there is no folder .*name a folder"),
    ("--teacher nobody/nothing", 1, r"cannot load nobody/nothing: .*Hub"),
    ("--student data/world/train.jsonl", 1, r"there is no folder .*name a folder"),
    ("--teacher ''", 1, r"there is no folder"),
]
BEYOND = ("lr -1, lr nan, lr inf, iterations 0, temperature 0, eval_top_p 1.5, dual_clip .5, "
          "beta1 1, silent_rate 1, epsilon 0, tool_chars 3, seed -1, seed 4294967296, "
          "threads 10000, micro_batch_tokens -1, decode_chunk 0, floor -1")
UNKNOWN = ("method SOD, weights none, kl exact, dtype float16, rollout_engine vllm, offload disk, "
           "init zeros")
OPTIONS += [(f"--{case}", 2, rf"{case.split()[0]} is .*; it must be at least")
            for case in BEYOND.split(", ")]
OPTIONS += [(f"--{case}", 2, "{} is '{}'; choose from ".format(*case.split()))
            for case in UNKNOWN.split(", ")]
OPTIONS += [(f"--{name} word", 2, f"--{name}: .*'word'") for name in ("lr", "seed", "preflight")]


def ascii_name(value):
    return re.sub(r"[^ -~]", "?", str(value))[:40] if isinstance(value, str) else ""


@pytest.mark.parametrize("arguments, status, sentence", OPTIONS, ids=ascii_name)
def test_wrong_options_end_with_a_sentence(capsys, tmp_path, arguments, status, sentence):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    stops(capsys, tmp_path, arguments, status, sentence)


@pytest.mark.parametrize("arguments, sentence", [
    ("--tool-timeout 3", r"arguments: --tool-timeout 3; did you mean --tool_timeout\?$"),
    ("--learning_rate 1", r"unrecognized arguments: --learning_rate 1$"),
    ("--modle x", r"did you mean --model\?$")])
def test_evaluate_py_says_which_option_was_meant_as_well(capsys, tmp_path, arguments, sentence):
    stops(capsys, tmp_path, arguments, 2, sentence, "evaluate")


@pytest.mark.parametrize("arguments, said", [
    ("--method grpo --teacher x --lr 1e-5", "method grpo learns nothing from --teacher"),
    ("--method sod --floor 0.1 --delta 0.3",
     "method sod with --weights sod learns nothing from --floor"),
    ("--weights unclipped --delta 0.3", "--weights unclipped learns nothing from --delta"),
    ("--method opd --demonstrations '' --sft_lr 1",
     "method opd learns nothing from --demonstrations, --sft_lr"),
    ("--method sft --lr 1e-5", "method sft learns nothing from --lr"),
    ("--method opsd_gt --opd_coef 2 --teacher_system x", ""), ("--weights floor --floor 1", ""),
    ("--weights mine --floor 1 --delta 1", "")])
def test_given_options_that_a_run_does_not_use_are_noted_once(capsys, monkeypatch, arguments, said):
    monkeypatch.setitem(sod.WEIGHTS, "mine", sod.WEIGHTS["floor"])
    sod.parse_config(shlex.split(f"--preset world {arguments}"))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == bool(said) and all(
        line.startswith("NOTE: ") and line.endswith(said) for line in lines)


def test_a_folder_that_is_there_already_stays_as_it_is(capsys, tmp_path):
    mine = tmp_path / "out" / "mine"
    mine.mkdir(parents=True)
    (mine / "notes").write_text("")
    assert command(tmp_path, "--name mine") == 1
    assert f"already; give this run another --name, or go on with that one: --resume {mine}" in (
        capsys.readouterr().err)
    assert [p.name for p in mine.rglob("*")] == ["notes"]


# --- Data files ---------------------------------------------------------------------------------

DATA = {
    "broken": (LINE + b'{"question": "1+1", "answer"\n', r"line 2: found broken JSON .*mend"),
    "keys": (b'{"q": "1+1", "a": "2"}\n', r"line 1: found no question \(columns: q, a\); needed"),
    "long": (json.dumps({**ROW, "question": "Add 1. " * 140_000}).encode(),
             r"all 1 rows are longer than 128 tokens .* raise --max_prompt"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 9\n",
                r"pointer.jsonl is a Git LFS pointer.*git lfs pull"),
    "latin1": ('{"question": "caf\xe9", "answer": "1"}'.encode("latin-1"), r"no UTF-8 text"),
    "dict_question": (b'{"question": {"a": 1}, "answer": "2"}\n', r"line 1: found no question"),
    "kind": (b'{"question": "1+1", "answer": "2", "kind": "essay"}\n',
             r"line 1: found the kind 'essay'; needed math, choice or program"),
    "program": (b'{"question": "1+1", "answer": "2", "kind": "program"}\n',
                r"found the kind 'program' without tests; needed"),
    "half_pair": (b'{"messages": [{"role": "user", "content": "\\udc00"}], "answer": "2"}\n',
                  r"line 1: found half a surrogate pair"),
    "digits": (b'{"question": "1+1", "answer": ' + b"9" * 5000 + b"}\n", r"found broken JSON"),
}
SPECIAL = {  # what makes the thing at this path
    "loop": (lambda path: path.symlink_to(path), r"does not exist; needed"),
    "pipe": (os.mkfifo, r"is no plain file; needed"),
    "device": (lambda path: path.symlink_to("/dev/zero"), r"is no plain file; needed"),
}
Q = {"role": "user", "content": "q"}
TURNS = {  # demonstrations: what follows the question
    "alone": ([], r"line 1: found no conversation"),
    "roles": ([{"role": "bot", "content": "a"}], r"the turn .*needed the role system, user, "),
    "text": ([{"role": "assistant", "content": 7}], r"found the turn .*as its content one text"),
    "calls": ([{"role": "assistant", "content": "", "tool_calls": 5}],
              r"found the turn .*calls are markup"),
    "half": ([{"role": "assistant", "content": "\ud800"}], r"half a surrogate pair"),
}
FILES = [(f"--train_data HERE/{name}.jsonl", data, sentence)
         for name, (data, sentence) in {**DATA, **SPECIAL}.items()]
FILES += [(f"--method sft --demonstrations HERE/{name}.jsonl",
           json.dumps({"messages": [Q, *turns]}).encode(), sentence)
          for name, (turns, sentence) in TURNS.items()]
FILES += [
    ("--method opsd_hint --train_data HERE/plain.jsonl", LINE, r"has problems without hint"),
    ("--method sft --demonstrations HERE/problem.jsonl", LINE, r"found no conversation; needed"),
    ("--method sft --demonstrations HERE/dict.jsonl", b'{"messages": {"role": "user"}}',
     r"line 1: found no conversation; needed .*a list"),
    ("--train_data HERE/rows.csv", b"question,answer\n1+1\n", r"line 2: found broken CSV .*cells"),
    ("--train_data HERE/rows.xlsx", b"PK", r"a .xlsx file; needed .jsonl or .json or .csv or .par"),
]
EVALUATED = [  # and what tests of evaluate.py do not ask
    ("--data HERE/rows.parquet", b"PAR1 nonsense", r"rows.parquet(: found |.*[Pp]arquet)"),
    ("--data HERE/rows.xlsx", b"PK", r"a .xlsx file; needed .jsonl or .json or .csv or .parquet"),
    ("--data HERE/half.jsonl", b'{"question": "\\ud800", "answer": "2"}', r"half a surrogate pair"),
    ("--data gsm8k --benchmarks HERE/nowhere", LINE, r"found no file .*put it there, or fetch"),
    ("--compare data/world/student HERE/file.jsonl", LINE, r"no file of samples|no folder"),
    ("--compare nowhere.jsonl HERE/file.jsonl", LINE, r"nowhere.jsonl does not exist; name a file"),
    ("--data HERE/lfs.parquet", DATA["pointer"][0], r"lfs.parquet is a Git LFS pointer"),
    ("--limit 1 --out HERE/lfs.jsonl", LINE, r"cannot write .*lfs.jsonl .*; name another place"),
]


@pytest.mark.parametrize("arguments, make, sentence, module",
                         [(*case, "sod_mini") for case in FILES] +
                         [(*case, "evaluate") for case in EVALUATED], ids=ascii_name)
def test_files_from_hell(capsys, tmp_path, arguments, make, sentence, module):
    path = tmp_path / arguments.rpartition("/")[2]
    path.write_bytes(make) if isinstance(make, bytes) else make(path)
    stops(capsys, tmp_path, arguments, 1, sentence, module)


def test_a_file_without_permission_is_one_sentence(tmp_path):
    """As nobody, where the tests run as root: root may read everything."""
    path = tmp_path / "secret.jsonl"
    path.write_bytes(LINE)
    path.chmod(0)
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import tools\n"
            "if os.geteuid() == 0: os.seteuid(65534)\n"
            "try: tools.load_problems(sys.argv[2])\nexcept ValueError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)], capture_output=True,
                          text=True)
    assert "Permission denied" in done.stdout and "needed a text file that can" in done.stdout, done


@pytest.mark.parametrize("number, sentence", [
    (errno.EACCES, "name another place with --out"), (errno.EROFS, "name another place"),
    (errno.ENOSPC, "make room there, or name another place")])
def test_a_place_that_takes_no_file_is_one_sentence_in_every_command(capsys, number, sentence):
    def work():
        raise OSError(number, os.strerror(number), "/there/file")
    assert sod.run_command(work) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: cannot write /there/file (") and sentence in said
    with pytest.raises(FileNotFoundError):  # a bug, which keeps its traceback
        sod.run_command(lambda: open("/no/such/file"))


# --- Models and tokenizers ----------------------------------------------------------------------


def settings(name, **changes):
    """A change of a JSON file of a model folder; None removes a key."""
    def change(path):
        data = {**json.loads((path / name).read_text()), **changes}
        (path / name).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))
    return change


def weights(name, change):
    def apply(path):
        tensors = load_file(path / "model.safetensors")
        change(tensors[name])
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return apply


def write(name, text):
    return lambda path: (path / name).write_text(text)


def remove(*patterns):
    return lambda path: [file.unlink() for pattern in patterns for file in path.glob(pattern)]


def cut(name, size):
    return lambda path: os.truncate(path / name, size)


def layers(n):
    return settings("config.json", num_hidden_layers=n, layer_types=["full_attention"] * n)


def swap(path):
    data = json.loads((path / "tokenizer.json").read_text())
    vocab = data["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
    (path / "tokenizer.json").write_text(json.dumps(data))


def reworded(old, new):
    def change(path):
        text = (path / TEMPLATE).read_text()
        assert old in text
        (path / TEMPLATE).write_text(text.replace(old, new))
    return change


TEMPLATE = "chat_template.jinja"
MODELS = {
    "no_config": (remove("config.json"), r"cannot load .*Unrecognized model.*; a folder must hold"),
    "no_weights": (remove("model.safetensors"), r"cannot load .*safetensors"),
    "no_tokenizer": (remove("tokenizer*", TEMPLATE), r"no chat template .*use a chat"),
    "no_tokens": (remove("tokenizer.json"), r"cannot load .* tokenizer"),
    "half_weights": (cut("model.safetensors", 300_000), r"cannot load "),
    "half_tokenizer": (cut("tokenizer.json", 9000), r"cannot load "),
    "half_config": (cut("config.json", 100), r"cannot load .*JSON"),
    "wrong_shape": (settings("config.json", intermediate_size=300), r"differ in 12 tensors"),
    "many_rows": (settings("config.json", vocab_size=600), r"differ in 1 tensors, such as .*embed"),
    "few_rows": (settings("config.json", vocab_size=506),
                 r"writes ids up to \d+ and .* has 506 vocabulary rows; use the tokenizer"),
    "more_layers": (layers(9), r"weights and config of .* differ in \d+ tensors"),
    "other_layers": (settings("config.json", num_hidden_layers=2),
                     r"layers. \(2\) must be .* \(4\)"),
    "pointer": (write("model.safetensors", DATA["pointer"][0].decode()),
                r"model.safetensors is a Git LFS pointer.*git lfs pull"),
    "adapter": (lambda path: [change(path) for change in (
        remove("model.safetensors"), write("adapter_config.json", '{"peft_type": "LORA"}'))],
                r"holds an adapter .*; merge it into its base model"),
    "fewer_layers": (layers(2), r"weights and config of .* differ in \d+ tensors"),
    "unknown_kind": (settings("config.json", model_type="novel"), r"cannot load "),
    "no_decoder": (write("config.json", '{"model_type": "t5"}'), r"cannot load "),
    "nan": (weights("model.norm.weight", lambda t: t.fill_(float("nan"))),
            r"plain tool call .* nan nats .* random, damaged or for another tokenizer"),
    "random": (weights("model.embed_tokens.weight", lambda t: t.normal_()),
              r"plain tool call .* chance is -6.24: its weights are random"),
    "other_ids": (swap, r"give different ids for .*use two models of one family"),
    "no_answers": (reworded("{{ message.content }}\n</tool_response>", "</tool_response>"),
                   r"does not show a tool or its answers.* use a model whose template knows tools"),
    "no_tools": (reworded("{{ tool.function.name }}", ""), r"does not show a tool or its answers"),
    "other_end": (settings("tokenizer_config.json", eos_token="<|endoftext|>"),
                  r"ends a turn with '<\|im_end\|>.* tokenizer with '<\|endoftext\|>'.*set eos"),
    "syntax": (write(TEMPLATE, "{% for m in messages %}"), r"does not show .*gave .an error"),
    "no_end": (settings("tokenizer_config.json", eos_token=None), r"no end-of-turn token; use a"),
}


def model(tmp_path, name, change):
    shutil.copytree(WORLD / "teacher", tmp_path / name)
    change(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", MODELS)
def test_models_from_hell(capsys, tmp_path, name):
    change, sentence = MODELS[name]
    stops(capsys, tmp_path, f"--teacher {model(tmp_path, name, change)}", 1, sentence)


AUTO = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
CODE = {
    "novel": (settings("config.json", model_type="novel", auto_map=AUTO), True),
    "known": (settings("config.json", auto_map=AUTO), False),  # transformers' own code serves
    "tokenizer": (settings("tokenizer_config.json", tokenizer_class="Own",
                           auto_map={"AutoTokenizer": ["own.Own", "own.Own"]}), False),
}


@pytest.mark.parametrize("name", CODE)
def test_code_in_a_model_folder_is_never_run_or_asked_about(capsys, tmp_path, monkeypatch, name):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    change, refused = CODE[name]
    path = model(tmp_path, name, change)
    write("own.py", f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")(path)
    for more in ("--teacher", "--method grpo --init random --student"):
        if refused:
            stops(capsys, tmp_path, f"{more} {path}", 1, "custom code .* no code of its own")
        else:
            assert command(tmp_path, f"{more} {path}") == 0
    assert not (tmp_path / "ran").exists()


# --- What is accepted, but not in silence -------------------------------------------------------


def test_problems_both_learnt_from_and_measured_on_are_noted_once(capsys, tmp_path):
    with open(tmp_path / "few.jsonl", "ab") as few:
        few.write(b"\n" + LINE)
    for line, notes in ((LINE, 1), (LINE.replace(b"5. Add", b"6. Add"), 0)):
        (tmp_path / "held_out.jsonl").write_bytes(line)
        assert command(tmp_path, "--eval_data HERE/held_out.jsonl --eval_samples 1 --name "
                       f"n{notes}") == 0
        said = capsys.readouterr().out
        assert said.count("NOTE: 1 of the 1 problems to measure on are also among") == notes


# --- Real processes and their screens -----------------------------------------------------------


def real(tmp_path, redirection, *arguments, **environment):
    """(exit status, standard error) of the command in a shell, followed by `redirection`."""
    words = shlex.split(BASE.replace("--iterations 1", "--iterations 2"))
    line = shlex.join([sys.executable, "-c", "import sys, sod_mini as sod; sod.write_page = str; "
                       "sys.exit(sod.run_command(sod.main))", *words,
                       "--train_data", f"{tmp_path}/few.jsonl",
                       "--out", f"{tmp_path}/out", "--name", "a", *arguments])
    done = subprocess.run(["bash", "-o", "pipefail", "-c", f"{line} {redirection}"], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, **environment})
    return done.returncode, done.stderr


@pytest.mark.parametrize("redirection, status", [(">&-", 0), ("| head -1", 1),
                                                 ("2>&1 | head -1", 1)])
def test_a_closed_screen_is_no_traceback_and_loses_nothing(tmp_path, redirection, status):
    got, said = real(tmp_path, redirection)
    assert got == status and "Traceback" not in said and "Exception" not in said
    if status == 0:
        assert (tmp_path / "out/a/checkpoint").exists()
    elif "2>&1" not in redirection:
        assert said.endswith("the reader of this output has gone, so the command stopped\n")


def test_a_terminal_that_knows_only_ascii_shows_every_character_of_the_data(tmp_path):
    text = "Start with 5.\u2028 Add \U0001f642 3."
    row = json.dumps({**ROW, "question": text}, ensure_ascii=False)
    (tmp_path / "few.jsonl").write_text(row, encoding="utf-8")
    screen = tmp_path / "screen"
    got, said = real(tmp_path, f"> {screen}", "--show_every", "1", PYTHONIOENCODING="ascii")
    assert got == 0, said
    assert r"Start with 5.\u2028 Add \U0001f642 3." in screen.read_text("ascii")
    rows = (tmp_path / "out/a/rollouts.jsonl").read_text().splitlines()
    assert json.loads(rows[0])["question"] == text


def test_ctrl_c_while_a_command_starts_is_one_line_and_no_traceback():
    code = ("import tools, os, signal, time; tools.end_quietly_at_ctrl_c(); "
            "os.kill(os.getpid(), signal.SIGINT); time.sleep(60)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")
    for script in ("sod_mini.py", "evaluate.py"):  # before what takes seconds
        text = (ROOT / script).read_text()
        assert text.index("tools.end_quietly_at_ctrl_c()") < text.index("\nimport numpy")
