"""Inputs from hell: each stops with one sentence and its exit status, and leaves nothing behind."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import evaluate
import sod_mini as sod

WORLD = ROOT / "data" / "world"
BASE = ["--preset", "world", "--steps", "1", "--eval_data", "", "--prompts_per_step", "2",
        "--group_size", "2"]
ROW = {"question": "Start with 5. Add 3.", "answer": "8"}


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.set_num_threads(1)


def status_of(main, arguments):
    try:
        return main([str(a) for a in arguments])
    except SystemExit as stop:
        return stop.code


def stops(capsys, tmp_path, arguments, status, sentence, main=sod.main, base=BASE):
    """The command ends with `status` and a last line that matches; `out` holds no file."""
    out = tmp_path / "out"
    place = [] if {"--rescore", "--table", "--download"} & set(arguments) else ["--out", out]
    got = status_of(main, [*base, *place, *arguments])
    said = capsys.readouterr().err.strip().splitlines() or [""]
    assert got == status and re.search(sentence, said[-1]), (got, said[-1])
    assert "Traceback" not in "\n".join(said) and re.match(r"(error|[\w.]+: error): ", said[-1])
    assert not out.is_dir() or not [p for p in out.rglob("*")]


# --- Options ----------------------------------------------------------------------------------

OPTIONS = [
    (["--lr", "fast"], r"argument --lr: invalid float value: 'fast'"),
    (["--lr", "-1"], r"lr is -1.0; it must be at least 1e-12 and below inf"),
    (["--lr", "nan"], r"lr is nan; it must be at least"),
    (["--lr", "inf"], r"lr is inf; it must be .* below inf"),
    (["--lr"], r"argument --lr: expected one argument"),
    (["--steps", "0"], r"steps is 0; it must be at least 1"),
    (["--steps", "1.5"], r"argument --steps: invalid int value: '1.5'"),
    (["--method", "SOD"], r"method is 'SOD'; choose from vanilla, sft, grpo"),
    (["--weights", "none"], r"weights is 'none'; choose from sod, uniform"),
    (["--kl", "exact"], r"kl is 'exact'; choose from sampled, full"),
    (["--dtype", "float16"], r"dtype is 'float16'; choose from auto, float32, bfloat16"),
    (["--rollout_engine", "vllm"], r"rollout_engine is 'vllm'; choose from slots, generate"),
    (["--offload", "disk"], r"offload is 'disk'; choose from none, teacher, all"),
    (["--offload", "teacher", "--kl", "full"], r"kl full needs the teacher .* use --offload none"),
    (["--preset", "big"], r"argument --preset: invalid choice: 'big'"),
    (["--learning_rate", "1"], r"unrecognized arguments: --learning_rate 1"),
    (["--step", "3"], r"unrecognized arguments: --step 3"),
    (["--tool_unsafe", "yes"], r"'yes' is neither true nor false"),
    (["--updates_per_step", "5"], r"prompts_per_step 2 does not divide into 5"),
    (["--method", "grpo", "--weights", "uniform"], r"method grpo fixes its own weights"),
    (["--temperature", "0"], r"temperature is 0.0; it must be at least 1e-12"),
    (["--eval_top_p", "1.5"], r"eval_top_p is 1.5; it must be at least 1e-12 and below 1"),
    (["--clip_dual", "0.5"], r"clip_dual is 0.5; it must be at least 1"),
    (["--beta1", "1"], r"beta1 is 1.0; it must be at least 0 and below 1"),
    (["--silent_rate", "1"], r"silent_rate is 1.0; it must be at least 0 and below 1"),
    (["--epsilon", "0"], r"epsilon is 0.0; it must be at least 1e-12"),
    (["--tool_chars", "3"], r"tool_chars is 3; it must be at least 64"),
    (["--seed", "-1"], r"seed is -1; it must be at least 0"),
    (["--micro_batch_tokens", "-1"], r"micro_batch_tokens is -1; it must be at least 0"),
    (["--name", "a/../../b"], r"name is 'a/../../b'; needed one folder name.*--out says where"),
    (["--name", "a\0b"], r"name is 'a\\x00b'; needed one folder name"),
    (["--system", "caf\udce9"], r"system holds .* no UTF-8 .*; type it again in UTF-8"),
]


@pytest.mark.parametrize("arguments, sentence", OPTIONS, ids=lambda x: " ".join(x)[:40]
                         .replace("\0", "NUL").encode("ascii", "replace").decode())
def test_wrong_options_end_with_status_2(capsys, tmp_path, arguments, sentence):
    stops(capsys, tmp_path, arguments, 2, sentence)


@pytest.mark.parametrize("arguments, sentence", [
    (["--device", "cuda"], r"device cuda was asked for and no CUDA GPU .*; use --device cpu"),
    (["--device", "tpu"], r"device 'tpu' is none that torch knows; use cpu, cuda or cuda:1"),
    (["--device", ""], r"device '' is none that torch knows"),
    (["--teacher_device", "moon"], r"device 'moon' is none that torch knows"),
    (["--name", "n" * 300], r"cannot write to .*: File name too long; choose another"),
    (["--tool_modules", "no_such_module"], r"tool_modules .*no_such_module.* not installed; "),
    (["--max_response", "5000"], r"reads 1024 tokens; max_prompt 128 and max_response 5000"),
    (["--max_prompt", "3"], r"all 2000 prompts are longer than 3 tokens .*; raise --max_prompt"),
])
def test_options_that_this_machine_or_model_cannot_serve(capsys, tmp_path, arguments, sentence):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    stops(capsys, tmp_path, arguments, 1, sentence)


def test_a_folder_that_is_there_already_stays_as_it_is(capsys, tmp_path):
    (tmp_path / "out" / "mine").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "notes").write_text("kept")
    status = status_of(sod.main, [*BASE, "--out", tmp_path / "out", "--name", "mine"])
    assert status == 1 and "or give this run another --name" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["mine", "notes"]


# --- Data files -------------------------------------------------------------------------------

LINE = json.dumps(ROW).encode() + b"\n"
NESTED = b'{"question": ' + b"[" * 100_000
DATA = {
    "empty": (b"", r"empty.jsonl is empty; needed at least one problem"),
    "blank": (b"\n \n\t\n", r"is empty; needed at least one problem"),
    "binary": (bytes(range(256)), r"found bytes that are no UTF-8 text .*decompress it or save it"),
    "gzip": (b"\x1f\x8b\x08\0\0\0\0\0", r"found bytes that are no UTF-8 text"),
    "nul": (LINE + b"\0\n", r"no UTF-8 text \(zero bytes\)"),
    "utf16": (json.dumps(ROW).encode("utf-16"), r"no UTF-8 text"),
    "latin1": ('{"question": "caf\xe9", "answer": "1"}'.encode("latin-1"), r"no UTF-8 text"),
    "broken": (LINE + b'{"question": "1+1", "answer"\n', r"line 2: found broken JSON .*mend"),
    "words": (b"What is 1+1?\n", r"line 1: found broken JSON .*needed one JSON object a line"),
    "list": (b'["question"]\n', r"line 1: found a str; needed a JSON object such as"),
    "number": (LINE + b"17\n", r"line 2: found a int; needed a JSON object"),
    "keys": (b'{"q": "1+1", "a": "2"}\n', r"line 1: found no question \(columns: q, a\); needed"),
    "no_answer": (b'{"question": "1+1"}\n', r"line 1: found no answer .*nothing can be graded"),
    "null_answer": (b'{"question": "1+1", "answer": null}\n', r"line 1: found no answer"),
    "blank_answer": (b'{"question": "1+1", "answer": "  "}\n', r"line 1: found no answer"),
    "list_answer": (b'{"question": "1+1", "answer": ["2"]}\n', r"line 1: found no answer"),
    "empty_question": (b'{"question": " ", "answer": "2"}\n', r"line 1: found no question"),
    "dict_question": (b'{"question": {"a": 1}, "answer": "2"}\n', r"line 1: found no question"),
    "kind": (b'{"question": "1+1", "answer": "2", "kind": "essay"}\n',
             r"line 1: found the kind 'essay'; needed math, choice or program"),
    "kind_list": (b'{"question": "1+1", "answer": "2", "kind": [1]}\n', r"found the kind \[1\]"),
    "program": (b'{"question": "1+1", "answer": "2", "kind": "program"}\n',
                r"found the kind 'program' without tests; needed"),
    "tests": (b'{"question": "1+1", "tests": 5}\n', r"line 1: found a column that holds another"),
    "test_keys": (b'{"question": "1+1", "tests": [{"in": "1"}]}\n', r"found the test .*needed"),
    "messages": (b'{"messages": ["hello"], "answer": "2"}\n', r"found the message 'hello'; needed"),
    "no_user": (b'{"messages": [{"role": "system", "content": "x"}], "answer": "2"}\n',
                r"found messages without a user turn; needed"),
    "surrogate": (b'{"question": "half \\ud83d a pair", "answer": "2"}\n',
                  r"line 1: found half a surrogate pair in question; needed"),
    "half_pair": (b'{"messages": [{"role": "user", "content": "\\udc00"}], "answer": "2"}\n',
                          r"line 1: found half a surrogate pair in messages"),
    "nested": (NESTED, r"line 1: found broken JSON"),
    "digits": (b'{"question": "1+1", "answer": ' + b"9" * 5000 + b"}\n", r"found broken JSON"),
    "long": (json.dumps({**ROW, "question": "Add 1. " * 1_400_000}).encode(),
             r"all 1 prompts are longer than 128 tokens .* raise --max_prompt"),
}


def data_file(tmp_path, name, data):
    path = tmp_path / f"{name}.jsonl"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", DATA)
def test_problem_files_from_hell(capsys, tmp_path, name):
    data, sentence = DATA[name]
    stops(capsys, tmp_path, ["--train_data", data_file(tmp_path, name, data)], 1, sentence)


@pytest.mark.parametrize("name", ["broken", "surrogate", "keys", "kind"])
def test_held_out_files_are_checked_before_the_training(capsys, tmp_path, name):
    data, sentence = DATA[name]
    stops(capsys, tmp_path, ["--eval_data", data_file(tmp_path, name, data)], 1, sentence)


def special_file(tmp_path, kind):
    path = tmp_path / "special.jsonl"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "csv":
        path = tmp_path / "rows.csv"
        path.write_text("question,answer\n1+1,2\n")
    return path


@pytest.mark.parametrize("kind, sentence", [
    ("folder", r"is a directory; give one of the files in it"),
    ("missing", r"does not exist; check the path"), ("dangling", r"does not exist; check the path"),
    ("loop", r"does not exist; check the path"), ("pipe", r"is no plain file; needed"),
    ("device", r"is no plain file; needed"),
    ("csv", r"found a .csv file; needed .jsonl or .json; rename or convert it"),
])
def test_things_that_are_no_data_files(capsys, tmp_path, kind, sentence):
    stops(capsys, tmp_path, ["--train_data", special_file(tmp_path, kind)], 1, sentence)


CONVERSATIONS = {
    "problem": (ROW, r"line 1: found no conversation; needed \"messages\""),
    "alone": ({"messages": [{"role": "user", "content": "q"}]}, r"line 1: found no conversation"),
    "roles": ({"messages": [{"role": "user", "content": "q"}, {"role": "bot", "content": "a"}]},
              r"found the turn .*only assistant and tool turns can follow"),
    "text": ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": 7}]},
             r"found the turn .*needed its content as text"),
    "calls": ({"messages": [{"role": "user", "content": "q"},
                            {"role": "assistant", "content": "", "tool_calls": 5}]},
              r"found the tool_calls 5; needed a list"),
    "arguments": ({"messages": [{"role": "user", "content": "q"}, {
        "role": "assistant", "tool_calls": [{"function": {"name": "x", "arguments": "{"}}]}]},
                  r"found the tool_calls .*; needed a list"),
    "dict": ({"messages": {"role": "user"}}, r"line 1: found messages that are no list"),
    "half": ({"messages": [{"role": "user", "content": "q"},
                           {"role": "assistant", "content": "\ud800"}]},
             r"line 1: found half a surrogate pair in messages"),
    "long": ({"messages": [{"role": "user", "content": "q"},
                           {"role": "assistant", "content": "1 + 1 " * 2000}]},
             r"all 1 demonstrations are longer than 512 tokens; raise --max_response"),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_demonstrations_from_hell(capsys, tmp_path, name):
    row, sentence = CONVERSATIONS[name]
    path = data_file(tmp_path, name, json.dumps(row).encode())
    stops(capsys, tmp_path, ["--method", "sft", "--demonstrations", path], 1, sentence)


# --- Models and tokenizers --------------------------------------------------------------------


def edited(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def weights(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def template(path, text):
    (path / "chat_template.jinja").write_text(text)


def swap(data):
    vocab = data["model"]["vocab"]
    vocab["1"], vocab["2"] = vocab["2"], vocab["1"]


NORM = "model.norm.weight"
MODELS = {
    "no_config": (lambda p: (p / "config.json").unlink(), r"cannot load .*a folder must hold"),
    "no_weights": (lambda p: (p / "model.safetensors").unlink(), r"cannot load .*safetensors"),
    "no_tokenizer": (lambda p: (p / "tokenizer.json").unlink(), r"cannot load .*a tokenizer"),
    "half_weights": (lambda p: os.truncate(p / "model.safetensors", 300_000), r"cannot load "),
    "no_bytes": (lambda p: (p / "model.safetensors").write_bytes(b""), r"cannot load "),
    "half_tokenizer": (lambda p: os.truncate(p / "tokenizer.json", 9000), r"cannot load "),
    "half_config": (lambda p: os.truncate(p / "config.json", 100), r"cannot load .*JSON"),
    "wrong_shape": (lambda p: edited(p / "config.json", lambda c: c.update(intermediate_size=300)),
                    r"cannot load .*(size mismatch|mismatch)"),
    "more_layers": (lambda p: edited(p / "config.json", lambda c: c.update(
        num_hidden_layers=9, layer_types=["full_attention"] * 9)),
                    r"the weights of .* lack \d+ tensors .*config"),
    "fewer_layers": (lambda p: edited(p / "config.json", lambda c: c.update(
        num_hidden_layers=2, layer_types=["full_attention"] * 2)),
                     r"the weights of .* hold \d+ tensors .*config"),
    "unknown_kind": (lambda p: edited(p / "config.json", lambda c: c.update(model_type="novel")),
                     r"cannot load "),
    "no_decoder": (lambda p: (p / "config.json").write_text('{"model_type": "t5"}'),
                   r"cannot load "),
    "other_kind": (lambda p: edited(p / "config.json", lambda c: c.update(model_type="llama")),
                   r"rollout_engine slots knows Qwen3 .*use --rollout_engine generate"),
    "few_rows": (lambda p: edited(p / "config.json", lambda c: c.update(vocab_size=506)),
                 r"writes ids up to \d+ and .* has 506 vocabulary rows; use the tokenizer"),
    "nan": (lambda p: weights(p, lambda t: t[NORM].fill_(float("nan"))),
            r"plain tool call .* nan nats .* random, damaged or for another tokenizer"),
    "noise": (lambda p: weights(p, lambda t: t["model.embed_tokens.weight"].normal_()),
              r"plain tool call .* chance is -6.24: its weights are random"),
    "no_template": (lambda p: (p / "chat_template.jinja").unlink(),
                    r"no chat template .*use a chat"),
    "no_tool_role": (lambda p: template(p, "{% for m in messages %}{% if m.role != 'tool' %}"
                                        "{{ m.content }}<|im_end|>{% endif %}{% endfor %}"),
                     r"does not show tool answers.*role tool"),
    "no_tools": (lambda p: template(p, "{% for m in messages %}{{ m.content }}<|im_end|>"
                                    "{% endfor %}"),
                 r"does not tell the model of its tool.*use a model whose template"),
    "raises": (lambda p: template(p, "{{ raise_exception('no tools here') }}"), r"no tools here"),
    "syntax": (lambda p: template(p, "{% for m in messages %}"), r"template .* does not show"),
    "other_ids": (lambda p: edited(p / "tokenizer.json", swap),
                  r"different ids for the same text .they differ from token .*one family"),
    "no_end": (lambda p: edited(p / "tokenizer_config.json", lambda c: c.pop("eos_token", 0)),
               r"no end-of-turn token; use a chat model"),
}


def model(tmp_path, name, change):
    path = tmp_path / name
    shutil.copytree(WORLD / "teacher", path)
    change(path)
    return path


@pytest.mark.parametrize("name", MODELS)
def test_teachers_from_hell(capsys, tmp_path, name):
    change, sentence = MODELS[name]
    role = "--student" if name == "other_kind" else "--teacher"
    stops(capsys, tmp_path, [role, model(tmp_path, name, change)], 1, sentence)


def test_a_file_and_a_missing_folder_are_no_models(capsys, tmp_path):
    stops(capsys, tmp_path, ["--student", WORLD / "train.jsonl"], 1, "is a file; name the folder")
    stops(capsys, tmp_path, ["--student", tmp_path / "gone"], 1, "there is no folder .*name a")
    stops(capsys, tmp_path, ["--teacher", "nobody/nothing"], 1, "cannot load nobody/nothing: .*Hub")
    stops(capsys, tmp_path, ["--teacher", ""], 1, "there is no folder")


# --- evaluate.py ------------------------------------------------------------------------------

EVALUATE = [
    (["--k", "0"], 2, r"k is 0; it must be at least 1"),
    (["--rollout_batch", "0"], 2, r"rollout_batch is 0; it must be at least 1"),
    (["--dates", "last year"], 2, r"dates is 'last year'; write FIRST:LAST"),
    (["--top_p", "0"], 2, r"top_p is 0.0; it must be at least"),
    (["--compare", "a"], 2, r"argument --compare: expected 2 arguments"),
    (["--model", "a", "--table", "b"], 2, r"not allowed with argument"),
    (["--table", "x.jsonl", "--k", "3"], 2, r"--table makes no use of --k"),
    (["--data", "aime1999"], 1, r"aime1999 is neither a file nor a benchmark; the benchmarks are"),
    (["--data", "gsm8k", "--benchmarks", "nowhere"], 1, r"found no file .*put it there, or fetch"),
    (["--rescore", "nowhere.jsonl"], 1, r"nowhere.jsonl does not exist; check the path"),
    (["--rescore", str(WORLD / "train.jsonl")], 1, r"is no file of samples of evaluate.py"),
    (["--table", str(WORLD / "train.jsonl")], 1, r"is no file of samples of evaluate.py"),
    (["--download", "world"], 1, r"world cannot be downloaded; choose from"),
    (["--model", "nowhere/at/all"], 1, r"there is no folder 'nowhere/at/all'"),
    (["--compare", str(WORLD / "student"), str(WORLD / "train.jsonl")], 1,
     r"train.jsonl is a file; name the folder"),
    (["--max_response", "5000"], 1, r"reads 1024 tokens; max_prompt 128 and max_response 5000"),
]


@pytest.mark.parametrize("arguments, status, sentence", EVALUATE, ids=lambda x: str(x)[:40])
def test_evaluate_says_what_is_wrong(capsys, tmp_path, arguments, status, sentence):
    stops(capsys, tmp_path, arguments, status, sentence, evaluate.main, [])


@pytest.mark.parametrize("name, data, sentence", [
    ("twice.jsonl", b'{"id": "a", "question": "1+1", "answer": "2"}\n' * 2,
     r"the id a stands in several rows; .*make them unique"),
    ("quotes.csv", b'question,answer\n"1+1,2\n', r"line 1: found broken CSV .*check the quotes"),
    ("cells.csv", b"question,answer\n1+1,2,3\n", r"line 2: found broken CSV .*header's 2 cells"),
    ("rows.parquet", b"PAR1 nonsense", r"rows.parquet: found "),
    ("rows.xlsx", b"PK", r"found a .xlsx file; needed .jsonl or .json or .csv or .parquet"),
    ("half.jsonl", b'{"question": "\\ud800", "answer": "2"}', r"found half a surrogate pair"),
])
def test_evaluate_refuses_files_from_hell(capsys, tmp_path, name, data, sentence):
    (tmp_path / name).write_bytes(data)
    stops(capsys, tmp_path, ["--data", tmp_path / name], 1, sentence, evaluate.main, [])


# --- Real processes ---------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/self/status").exists(), reason="no Linux")
def test_a_file_without_permission_is_one_sentence(tmp_path):
    """As nobody, where the tests run as root: root may read everything."""
    path = data_file(tmp_path, "secret", LINE)
    path.chmod(0)
    code = ("import os, sys; sys.path.insert(0, sys.argv[1]); import tools\n"
            "if os.geteuid() == 0: os.seteuid(65534)\n"
            "try: tools.load_problems(sys.argv[2])\nexcept ValueError as error: print(error)")
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)], capture_output=True,
                          text=True)
    assert "secret.jsonl: Permission denied; needed a file that can be read" in done.stdout, done


@pytest.mark.parametrize("arguments, status, sentence", [
    (["--lr", "-1"], 2, "error: lr is -1.0; it must be at least"),
    (["--train_data", "nowhere.jsonl", "--preset", "world"], 1, "error: nowhere.jsonl does not"),
])
def test_the_exit_status_of_a_real_process(tmp_path, arguments, status, sentence):
    done = subprocess.run([sys.executable, str(ROOT / "sod_mini.py"), "--out",
                           str(tmp_path / "out"), *arguments], capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == status and sentence in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not list((tmp_path / "out").glob("*"))


def test_there_are_more_than_a_hundred_of_them():
    assert len(OPTIONS) + len(DATA) + len(CONVERSATIONS) + len(MODELS) + len(EVALUATE) >= 100
