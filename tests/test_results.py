"""What was measured, and on what: no number of one test stands for another one."""
import json
import math

import numpy as np
import pytest
import torch

import sod_mini as sod
import tools
from conftest import WORLD, SMALL, command, small
from test_resume import RUN, SFT, act_at, folder, resume  # noqa: F401, a fixture

MEASURED = dict(SFT, eval_data="held.jsonl", eval_problems=2, eval_samples=1, silent_rate=0)


@pytest.fixture(autouse=True)
def held_out(folder):  # noqa: F811
    lines = (WORLD / "heldout.jsonl").read_text().splitlines(keepends=True)
    (folder / "held.jsonl").write_text("".join(lines[:2]))
    (folder / "others.jsonl").write_text("".join(lines[2:4]))


def stored():
    return json.loads((RUN / "results.json").read_text())


@pytest.mark.parametrize("change", [
    "eval_temperature .5", "eval_top_p .9", "seed 1", "max_turns 5", "eval_data others.jsonl",
    "silent_rate .5", "system Think."])
def test_a_result_is_measured_again_where_anything_that_decides_it_has_changed(monkeypatch, change):
    act_at(3, MEASURED, monkeypatch)
    before, (name, value) = stored()["student before"], change.split()
    measured, real = [], sod.measure
    monkeypatch.setattr(sod, "measure", lambda agent, model: measured.append(
        sod.weights_crc(model)) or real(agent, model))
    assert resume(f"--{name}", value) == 0
    start = sod.weights_crc(sod.load_model(str(WORLD / "student"), "cpu", torch.float32))
    assert measured[0] == start and len(measured) == 2  # before, from the start model, and after
    after = stored()
    assert after["student before"]["measured_with"] != before["measured_with"]
    shared = [{k: v for k, v in one["measured_with"].items() if k != "weights"}
              for one in after.values()]
    assert shared[0] == shared[1]  # one table, one test


def test_a_start_that_is_another_model_now_is_left_out_of_table_and_card(monkeypatch, capsys):
    act_at(3, {**MEASURED, "init": "random"}, monkeypatch)
    assert resume("--seed", 1) == 0  # by which another random model would be the start
    assert "NOTE: the run began with another model" in capsys.readouterr().out
    card = (RUN / "checkpoint/README.md").read_text()
    assert "student after" in card and "| student before" not in card
    assert "before training was not measured on this test" in card


def test_a_result_is_measured_again_where_the_worked_examples_have_changed(folder, monkeypatch):
    worked = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]}
    options = {**MEASURED, "examples": "worked.jsonl", "max_prompt": 300}
    for n in (1, 2):
        sod.worked_examples.cache_clear()
        (folder / "worked.jsonl").write_text(json.dumps(worked).replace('"1"', f'"{n}"'))
        act_at(3, options, monkeypatch) if n == 1 else resume()
        if n == 1:
            before = stored()["student before"]
    assert stored()["student before"]["measured_with"] != before["measured_with"]


def test_a_result_depends_on_what_functions_of_the_users_do(folder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(sod, "fitting_prompts", lambda *_: ([], 0))
    functions, model = folder / "functions.py", torch.nn.Linear(2, 2)
    agent = sod.Agent(small(tools=str(functions)), model, None, None, None, eval_set=[])

    def measured(does):
        sod.call_form.cache_clear()
        functions.write_text('def f(a: int):\n    """Double.\n\n    Args:\n        a: A number.\n'
                             f'    """\n    return {does}\n')
        return sod.measured_with(agent, model)
    assert measured("2 * a") == measured("2 * a") != measured("3 * a")


@pytest.mark.parametrize("option, value", [("threads", 2), ("micro_batch_tokens", 999),
                                           ("sft_lr", 0.01)])
def test_what_does_not_decide_it_leaves_it(monkeypatch, option, value):
    act_at(3, MEASURED, monkeypatch)
    before = stored()
    assert resume(f"--{option}", value) == 0
    assert stored()["student before"] == before["student before"]


def test_results_are_0_and_1_before_and_after_a_resume(monkeypatch):
    act_at(3, MEASURED, monkeypatch)
    before = stored()
    assert resume() == 0
    for one in [*before.values(), *stored().values()]:
        assert {type(x) for row in one["correct"] for x in row} == {int}


def test_the_card_says_where_the_start_was_not_measured_on_this_test():
    results = {"student after": np.array([[1, 0]])}
    assert "before training was not measured" in sod.model_card(small(), results)
    assert "not measured" not in sod.model_card(small(), {"student before": results["student after"],
                                                          **results})


def test_the_card_names_a_base_model_only_where_it_is_one_of_the_hub(folder):  # noqa: F811
    (folder / "runs/cold").mkdir(parents=True)  # spelled as a Hub id is
    for student, said in (("data/world/student", "The embedded student of sod-mini, "),
                          (WORLD / "teacher", "The embedded teacher of sod-mini, "),
                          ("runs/cold", "The model of a folder `runs/cold`, "),
                          ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B, trained with sod-mini, ")):
        card = sod.model_card(small(student=str(student)), {})
        on_hub = str(student).startswith("Qwen")
        assert said in card and ("base_model: Qwen/Qwen3-0.6B\n" in card) == on_hub
        assert ("\nbase_model:" in card) == on_hub


@pytest.mark.parametrize("after, changes, said", [
    # -100, 0, 50, 50 points: mean 0, std sqrt(5000), so 0 -+ 3.182 sqrt(5000 / 4)
    ([[0, 0], [1, 1], [1, 0], [1, 0]], {}, "+0.0 points, 95% interval -100.0 to 100.0 over problems"),
    # six times -50 and a -100: mean -57.1, std 18.9, so -57.1 -+ 2.447 * 18.9 / sqrt(7)
    ([[1, 0]] * 6 + [[0, 0]], {}, "-57.1 points, 95% interval -74.6 to -39.7 over "
     "problems, paired; this run made the student worse: try a lower --lr than 0.001"),
    ([[0, 0]] * 6, dict(method="sft"), "worse: try a lower --sft_lr than 0.002"),
    # five of a hundred differ: mean -5, std 21.9, so -5 -+ 1.984 * 21.9 / 10
    ([[0, 0]] * 5 + [[1, 1]] * 95, {}, "-5.0 points, 95% interval -9.3 to -0.7 over problems, "
     "paired; the two differ on 5 problems only, and below 6 chance alone does that too often"),
    ([[1, 1]] * 4, {}, "to 0.0 over problems, paired; the same on every problem"),
    ([[0, 1]], {}, "-50.0 points, 95% interval -100.0 to 100.0 over problems")])
def test_table_and_card_end_with_the_paired_difference(after, changes, said):
    before = [[1, 1]] * len(after)
    if "+0.0" in said:
        before[2:] = [[0, 0], [0, 0]]
    results = {f"student {when}": np.array(x) for when, x in (("before", before), ("after", after))}
    sentence = sod.what_changed(results, small(**changes))
    assert said in sentence and sentence in sod.model_card(small(**changes), results)
    assert ("worse" in said) == ("worse" in sentence)
    assert sod.what_changed({"student after": results["student after"]}, small()) == ""


# --- Rollouts that the machine failed -----------------------------------------------------------


def lost_and_whole():
    """Three rollouts of a group, scored by hand; the machine failed the first."""
    rollouts = [sod.Rollout(tools.Problem("q", "1"), [5], [sod.Turn([6], "t", "error", "no")],
                            finish_reason=f, reward=-1.0)
                for f in ("infrastructure", "answer", "answer")]
    batch = sod.collate(rollouts, "cpu")
    batch.logp_s = torch.where(batch.sampled, -1.0, 0.0)
    batch.logp_t, batch.entropy_t = 2 * batch.logp_s, -batch.logp_s
    batch.entropy_s = batch.entropy_t
    batch.d = sod.step_divergence(batch.logp_s, batch.logp_t, batch.step_id)
    batch.w = sod.step_weights(batch.d)
    batch.A = sod.group_advantages(batch.reward, 3)
    batch.advantages = batch.logp_t - batch.logp_s
    return batch


def test_a_rollout_that_the_machine_failed_has_no_numbers_in_its_row():
    tokenizer = sod.load_tokenizer(SMALL["student"])
    lost, whole, _ = sod.rollout_rows(lost_and_whole(), 1, tokenizer, 3)
    assert lost["advantage"] is None and whole["advantage"] == 0
    for name in ("d", "w", "entropy_t"):
        assert lost["turns"][0][name] is None and whole["turns"][0][name] == 1.0
    assert "tokens" in whole["turns"][0] and "tokens" not in lost["turns"][0]


def test_it_is_not_shown_and_not_counted():
    batch = lost_and_whole()
    batch.rollouts[0].problem = tools.Problem("lost", "1")
    batch.rollouts[0].correct = True
    assert "lost" not in sod.show_rollout(batch)
    m = sod.batch_metrics(sod.Agent(small(), None, None, None, None), 1, batch, [(0.1, 1.0, 0.0)])
    assert m["d"] == 1.0 and m["infrastructure"] == 1 and m["frac_zero_std_groups"] == 1.0


@pytest.mark.parametrize("rewards, share", [
    ([1, 1, 1, -1], 0.5), ([1, math.nan, 1, -1], 0.0), ([math.nan] * 4, 0.0),
    ([1, 1, math.nan, math.nan], 1.0), ([math.nan, math.nan, 1, -1], 0.0)])
def test_groups_of_which_the_machine_left_one_rollout_or_none_are_no_groups_that_agree(rewards,
                                                                                       share):
    assert sod.frac_zero_std_groups(torch.tensor(rewards), 2) == share


# --- The screen ---------------------------------------------------------------------------------

HOSTILE = "\x1b[2J\x1b]0;owned\x07\x9b31m\r\u202e"


def test_control_characters_of_model_tool_and_data_reach_no_terminal():
    batch = lost_and_whole()
    r = batch.rollouts[1]
    r.problem = tools.Problem(f"q{HOSTILE}", f"1{HOSTILE}")
    r.turns[0].text, r.turns[0].tool_text = f"t{HOSTILE}", f"no{HOSTILE}"
    r.correct = True
    shown = sod.show_rollout(batch)
    assert all(c.isprintable() for line in shown.split("\n") for c in line)
    assert r"q\x1b[2J\x1b]0;owned\x07" in shown and r"no\x1b[2J" in shown


def test_they_do_not_in_a_sentence_about_data_either(folder, capsys):  # noqa: F811
    (folder / "bad.jsonl").write_text(json.dumps({"question": "q", "answer": "1",
                                                  "kind": HOSTILE}) + "\n")
    assert command({**SMALL, "train_data": f"bad{HOSTILE}.jsonl"}) == 1
    assert command({**SMALL, "train_data": "bad.jsonl"}) == 1
    said = capsys.readouterr().err
    assert said.count("error: ") == 2 and not set("\x1b\x07\x9b\r\u202e") & set(said)


# --- Preflight ----------------------------------------------------------------------------------


def test_a_tokenizer_that_drops_the_words_of_a_call_is_refused(folder):  # noqa: F811
    """Where <tool_call> is a special token, no call would ever be seen in the decoded text."""
    tokenizer = sod.load_tokenizer(SMALL["student"])
    tokenizer.save_pretrained(folder / "special")
    data = json.loads((folder / "special/tokenizer.json").read_text())
    for token in data["added_tokens"]:
        token["special"] = True
    (folder / "special/tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(tools.UserError, match="in which no call can be found; mark <tool_call>"):
        sod.load_tokenizer(folder / "special")


def test_the_longer_prompt_of_a_self_teacher_is_held_against_the_window(folder, capsys):  # noqa
    rows = [{"question": "Start with 5. Add 3.", "answer": answer} for answer in ("8", "8" * 40)]
    (folder / "two.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = small(method="opsd_gt", train_data="two.jsonl")
    tokenizer = sod.load_tokenizer(SMALL["student"])
    longest = max(len(sod.encode_prompt(tokenizer, p, sod.teacher_context(config)))
                  for p in tools.load_problems("two.jsonl"))
    for window, left in ((longest + config.max_response, 2), (longest + config.max_response - 1, 1)):
        assert len(sod.load_train_set(tokenizer, config, window)) == left
    assert "1 problems or demonstrations are too long and skipped" in capsys.readouterr().out
