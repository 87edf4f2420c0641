"""What is known before the weights are read, and what is done about it."""
import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import sod_mini as sod
from conftest import WORLD, small

STUDENT, TEACHER = 344_928, 771_456  # parameters


@pytest.fixture
def world():
    return small(demonstrations="", train_data=str(WORLD / "train.jsonl"))


def test_a_sound_world_passes_before_its_weights_and_says_what_was_found(world, monkeypatch,
                                                                         capsys):
    monkeypatch.setattr(sod, "load_model", None)  # no weights are read
    agent = sod.preflight(world)
    said = capsys.readouterr().out
    assert "same ids on 7 probes, same template, 2,000 rows to learn from, tool answers" in said
    assert "seed 0" in said and "0.008 GiB on cpu for weights, AdamW and gradient" in said
    assert "NOTE" not in said and len(agent.train_set) == 2000 and len(agent.eval_set) == 4


@pytest.mark.parametrize("options, dtype, need", [
    # Bytes a weight: 4 or 2 to compute with; 8 for the moments, 4 for the gradient, 4 for a master
    # where it is another tensor.
    (dict(), torch.float32, 16 * STUDENT + 4 * TEACHER),
    (dict(method="grpo"), torch.float32, 16 * STUDENT),
    (dict(method="vanilla"), torch.float32, 4 * STUDENT),
    (dict(method="opsd_gt"), torch.float32, 20 * STUDENT),
    (dict(), torch.bfloat16, 18 * STUDENT + 2 * TEACHER),
    (dict(offload="all"), torch.bfloat16, 2 * STUDENT + 2 * TEACHER),
])
def test_the_memory_that_a_run_holds_for_certain_by_hand(world, monkeypatch, options, dtype, need):
    config = replace(world, **options)
    teacher = {"teacher": world.teacher, "answer": world.student}.get(
        sod.METHODS[config.method].scorer)
    arguments = (config, sod.skeleton(world.student), teacher and sod.skeleton(teacher),
                 torch.device("cuda"), dtype)
    monkeypatch.setattr(sod, "GIB", 1)
    monkeypatch.setattr(sod, "free_memory", lambda device: need)
    assert sod.check_memory(*arguments).startswith(f"{need}.000 GiB on cuda for weights")
    monkeypatch.setattr(sod, "free_memory", lambda device: need - 1)
    with pytest.raises(ValueError, match=f"take {need}.*{need - 1}.* free on cuda; choose smaller"):
        sod.check_memory(*arguments)
    assert sod.check_memory(replace(config, preflight=False), *arguments[1:])


@pytest.mark.parametrize("text, outcome", [("", "timeout"), ("3", "ok"), ("[failed]", "error")])
def test_a_tool_that_cannot_add_is_refused(world, monkeypatch, text, outcome):
    """And nobody is advised to drop the sandbox for it."""
    answer = sod.tools.Observation(text, outcome, 0.1)
    monkeypatch.setattr(sod.tools.PythonTool, "run", lambda self, codes: [answer] * len(codes))
    with pytest.raises(ValueError, match=f"answers '.*' .{outcome}. to .*, not 2") as stop:
        sod.load_tool(world)
    assert "unsafe" not in str(stop.value)


def test_a_model_no_better_than_chance_is_refused_unless_it_is_to_start_from_nothing(
        world, tmp_path, capsys):
    sod.load_tokenizer(world.student).save_pretrained(tmp_path)
    fresh = sod.load_model(world.student, "cpu", torch.float32, "random")
    fresh.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="chance is -6.24: its weights are random, damaged or"):
        sod.load_agent(replace(world, student=str(tmp_path)))
    sod.load_agent(replace(world, student=str(tmp_path), preflight=False))
    capsys.readouterr()
    sod.load_agent(replace(world, init="random"))
    assert (f"teacher {world.teacher}, 771,456 parameters; a token of a plain tool call is 4.7 "
            "times as likely to it as by chance (-4.69 nats, chance -6.24)\n") in capsys.readouterr().out


def test_another_template_of_the_teacher_is_a_note(world, tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(world.teacher).save_pretrained(tmp_path)
    tokenizer = sod.load_tokenizer(world.teacher)
    tokenizer.chat_template = tokenizer.chat_template.replace("Tools:", "Start with:")
    tokenizer.save_pretrained(tmp_path)
    sod.preflight(replace(world, teacher=str(tmp_path)))
    assert "NOTE: the teacher has another template" in capsys.readouterr().out


# --- Thinking mode ------------------------------------------------------------------------------

QWENS = ("{% if enable_thinking is defined and enable_thinking is false %}"
         "{{ '<think>\n\n</think>\n\n' }}{% endif %}")  # the end of Qwen3's template


@pytest.fixture
def thinker(world, tmp_path):
    """A tokenizer's folder whose template thinks unless it is told not to, as Qwen3's does."""
    tokenizer = sod.load_tokenizer(world.student)
    tokenizer.chat_template = tokenizer.chat_template.removesuffix("{% endif %}") + QWENS + (
        "{% endif %}")
    tokenizer.save_pretrained(tmp_path / "thinker")
    return tmp_path / "thinker"


def test_models_think_only_where_they_are_asked_to_and_before_every_turn(thinker):
    for thinking in (False, True):
        tokenizer = sod.load_tokenizer(thinker, thinking)
        opened = [tokenizer.decode(sod.encode_prompt(tokenizer, sod.example()[0])),
                  sod.render_tool_turn(tokenizer, "42")]
        assert [text.endswith("assistant\n" + "<think>\n\n</think>\n\n" * (not thinking))
                for text in opened] == [True, True]


def test_a_checkpoint_keeps_its_mode_as_a_default_and_another_one_can_be_asked_for(
        thinker, tmp_path):
    sod.load_tokenizer(thinker, False).save_pretrained(tmp_path)
    plain = sod.AutoTokenizer.from_pretrained(tmp_path)
    render = lambda tokenizer, **mode: tokenizer.apply_chat_template(
        [{"role": "user", "content": "q"}], add_generation_prompt=True, tokenize=False, **mode)
    assert "<think>" in render(plain) and "<think>" not in render(plain, enable_thinking=True)
    again = sod.load_tokenizer(tmp_path, True)
    assert "<think>" not in render(again)
    assert again.chat_template == sod.load_tokenizer(thinker, True).chat_template


def test_a_template_without_a_thinking_mode_is_left_alone_and_cannot_think(world, tmp_path):
    with pytest.raises(ValueError, match="has no thinking mode; use --thinking false"):
        sod.preflight(replace(world, thinking=True))
    stored = sod.AutoTokenizer.from_pretrained(world.student).chat_template
    assert sod.load_tokenizer(world.student).chat_template == stored


@pytest.mark.parametrize("closed, mean, words", [
    (-0.1, -2.0, []), (-20.0, -2.0, ["'</tool_call>', which closes a call, is out of its reach"]),
    (-20.0, -9.0, ["NOTE: worse than chance", "out of its reach"])])
def test_a_loaded_model_is_told_in_words_and_only_a_poor_one_with_a_note(
        world, monkeypatch, capsys, closed, mean, words):
    agent = sod.Agent(replace(world, preflight=False), None, None,
                      sod.load_tokenizer(world.student), None)
    model = sod.skeleton(world.student)
    text = sod.example()[1][0]["content"] + agent.tokenizer.eos_token
    ids = torch.tensor(sod.encode(agent.tokenizer, text))
    logp = torch.full(ids.shape, mean)
    logp[-2] = closed
    monkeypatch.setattr(sod, "check_plain_head", lambda *_: (ids, logp))
    sod.print_model("student", "it", model, True, agent)
    said = capsys.readouterr().out
    times = math.exp(float(logp.mean()) + math.log(len(sod.lm_head_weight(model))))
    assert f"plain tool call is {times:,.1f} times as likely to it as by chance" in said
    assert said.count("NOTE") == len(words) and all(part in said for part in words)


def test_what_success_depends_on_besides_the_model_is_said_before_a_run(world, capsys):
    sod.preflight(replace(world, system="Be user friendly.", eval_top_p=0.6))
    said = capsys.readouterr().out
    assert ("rollouts  temperature 1.0, top-p 1.0, no top-k; at most 12 turns and 200 tokens; "
            "thinking off; system text 'Be user friendly.'; tool schema in the system turn\n"
            ) in said
    assert "evaluation  temperature 1.0, top-p 0.6, no top-k" in said


@pytest.mark.parametrize("flags, note", [
    ("fpu avx512f avx512_bf16 wbnoinvd", "; this CPU has instructions for bfloat16"),
    ("fpu amx_bf16 avx512_fp16", "; this CPU has instructions for bfloat16"),
    ("fpu avx2 avx512f", "; this CPU has no instructions for bfloat16: --dtype float32 is faster")])
def test_the_start_says_whether_this_cpu_computes_in_bf16(tmp_path, flags, note):
    (tmp_path / "cpuinfo").write_text(f"model name : x\nflags : {flags}\n")
    asked = lambda device, dtype: sod.note_on_bf16(torch.device(device), dtype,
                                                   tmp_path / "cpuinfo")
    assert asked("cpu", torch.bfloat16).startswith(note)
    assert asked("cpu", torch.float32) == asked("meta", torch.bfloat16) == ""


def test_the_settings_for_a_small_real_pair_are_a_preset_that_works(world, tmp_path):
    """Python blocks, short rollouts, bf16; data and models are named by whoever starts it."""
    given = ["--preset", "cpu", "--train_data", world.train_data, "--eval_data", world.eval_data]
    config, preset = sod.parse_config(given)
    assert preset == "cpu" and config.calls == "python" and config.dtype == "bfloat16"
    with pytest.raises(SystemExit):
        sod.parse_config(given[:2])  # names no problems
    agent = sod.preflight(config)
    assert len(agent.train_set) == 2000 and len(agent.eval_set) == 100
