"""The page of a run: what it may do, what it shows, and where its numbers come from."""
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
import torch
from conftest import SMALL, WORLD, command, json_lines

import evaluate
import sod_mini as sod
import tools

TEMPLATE = evaluate.TEMPLATE.read_text(encoding="utf-8")
HOSTILE = ("</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>&amp;@NAME@"
           "\u2028\u2029\ud800")


# --- Rows: what a run stores --------------------------------------------------------------------


def scored_batch(tokenizer, method="sod"):
    """Two rollouts of two steps and of one, with numbers to follow by hand."""
    first, second = (sod.encode(tokenizer, text + "<|im_end|>") for text in ("1", "2"))
    rollouts = [
        sod.Rollout(tools.Problem("q", "2"), [0], [sod.Turn(first, "1", "error", "no", [0]),
                                                   sod.Turn(second, "2")]),
        sod.Rollout(tools.Problem("q", "3"), [0], [sod.Turn(second, "2")])]
    batch = sod.collate(rollouts, "cpu")
    batch.logp_s = torch.full(batch.ids.shape, -0.25)
    batch.A = torch.tensor([0.70711, -0.70711])
    if method == "sod":
        batch.logp_t = batch.logp_s - torch.where(batch.step_id == 2, 1.0, 0.5)
        batch.d = sod.step_divergence(batch.logp_s, batch.logp_t, batch.step_id)
        batch.w = sod.step_weights(batch.d)
    batch.advantages = sod.token_advantages(method, batch.A, batch.logp_s, batch.logp_t,
                                            batch.step_id, batch.w)
    return batch, len(first)


def rows_of(batch, tokenizer, with_tokens=2):
    return json.loads(json.dumps(list(sod.rollout_rows(batch, 7, tokenizer, with_tokens))))


def test_rows_hold_the_scores_of_each_token_of_each_step(tokenizer):
    batch, n = scored_batch(tokenizer)
    row, other = rows_of(batch, tokenizer)
    one, two = row["turns"]
    assert row["iteration"] == 7
    assert row["advantage"] == 0.7071 and other["advantage"] == -0.7071
    assert (one["d"], one["w"], two["d"], two["w"]) == (0.5, 1.0, 1.0, 0.5)
    assert one["logp_s"] == [-0.25] * n and one["logp_t"] == [-0.75] * n
    assert two["logp_t"] == [-1.25] * n
    assert one["token_advantages"] == [0.207] * n  # .70711 + 1 * (-.5), three decimals
    assert two["token_advantages"] == [0.207] * n  # .70711 + .5 * (-1)
    assert (one["tool"], two["tool"], one["outcome"]) == ("no", None, "error")
    for turn in (*row["turns"], *other["turns"]):
        assert "".join(turn["tokens"]) == turn["text"] + "<|im_end|>"


def test_without_a_teacher_none_is_stored_and_only_so_many_rollouts_keep_their_tokens(tokenizer):
    row, other = rows_of(scored_batch(tokenizer, "grpo")[0], tokenizer, with_tokens=1)
    assert other["turns"][0].keys() == {"text", "outcome", "d", "w", "entropy_t", "tool"}
    turn = row["turns"][0]
    assert "logp_t" not in turn and turn["d"] is None and turn["w"] is None
    assert set(turn["token_advantages"]) == {0.707}


def test_what_json_does_not_know_is_stored_as_null(tokenizer):
    batch, n = scored_batch(tokenizer)
    batch.logp_t[:] = -torch.inf
    row, _ = rows_of(batch, tokenizer)
    assert row["turns"][0]["logp_t"] == [None] * n
    assert sod.plain([1.5, float("nan"), [float("inf"), 2]]) == [1.5, None, [None, 2]]


# --- The page -----------------------------------------------------------------------------------


def a_turn(text="1 ", outcome="ok", tool="2", **changes):
    return {"text": text, "outcome": outcome, "d": 0.31, "w": 1.0, "tool": tool,
            "tokens": [text, "<|im_end|>"], "logp_s": [-0.1, -0.2], "logp_t": [-1.3, -0.25],
            "token_advantages": [-0.493, 0.657]} | changes


def a_row(iteration, turns=(), **changes):
    return {"iteration": iteration, "question": "1 + 1", "answer": "2", "correct": True,
            "reason": "correct", "reward": 1.0, "advantage": 0.707, "finish_reason": "answer",
            "turns": list(turns) or [a_turn(), a_turn("2", "", None)]} | changes


def a_run(folder, rows, curves=(), **changes):
    """The files of a run, as sod_mini.py writes them."""
    folder.mkdir(exist_ok=True)
    config = vars(sod.Config()) | {"name": folder.name, **changes}
    (folder / "config.json").write_text(json.dumps(config))
    for name, lines in (("rollouts.jsonl", rows), ("metrics.jsonl", curves)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


class Reader(HTMLParser):
    """What a browser finds: elements with their attributes, and the text of each."""

    def __init__(self, html):
        super().__init__(convert_charrefs=False)
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        self.found.append(["/" + tag, {}, ""])

    def handle_data(self, text):
        if self.found:
            self.found[-1][2] += text

    def all(self, tag):
        return [entry for entry in self.found if entry[0] == tag]


def page_of(folder, *iterations):
    evaluate.write_page(folder, *iterations)
    reader = Reader((folder / "rollouts.html").read_text(encoding="utf-8"))
    data, code = (entry for entry in reader.all("script"))
    assert data[1] == {"type": "application/json", "id": "data"}
    assert not set("<>&") & set(data[2])  # nothing in it can end the element, or be an entity
    return reader, json.loads(data[2]), code[2]


def test_no_request_can_leave_the_page_and_its_policy_lets_it_fetch_nothing(tmp_path):
    reader, _, code = page_of(a_run(tmp_path / "r", [a_row(1)]))
    assert {tag for tag, _, _ in reader.found}.isdisjoint(
        {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"})
    assert not any({"src", "href", "style"} & attributes.keys()
                   or any(name.startswith("on") for name in attributes)
                   for _, attributes, _ in reader.found)
    (style,) = reader.all("style")
    assert "url(" not in style[2] and "@import" not in style[2]
    for word in ("fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "import ", "import("):
        assert word not in code
    policy = next(a["content"] for _, a, _ in reader.all("meta")
                  if a.get("http-equiv") == "Content-Security-Policy")
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'",
                     "script-src": "'unsafe-inline'", "style-src": "'unsafe-inline'"}


def test_markup_in_model_text_and_in_names_is_inert(tmp_path):
    turn = a_turn(HOSTILE, HOSTILE, HOSTILE)
    plain, _, _ = page_of(a_run(tmp_path / "r", [a_row(1)]))
    row = a_row(1, [turn], question=HOSTILE, truth="@DATA@", finish_reason=HOSTILE)
    folder = tmp_path / "<img src=x onerror=alert(1)>&amp;@DATA@\udcff"
    reader, data, _ = page_of(a_run(folder, [row], name=""))
    assert [tag for tag, _, _ in reader.found] == [tag for tag, _, _ in plain.found]
    (shown,) = data["iterations"]["1"]
    assert shown == row | {"patterns": ["erroneous"]} and data["name"] == f"Run {folder.name}"
    raw = (folder / "rollouts.html").read_text(encoding="utf-8")
    assert "<img" not in raw and not set("\u2028\u2029") & set(raw)
    assert "<title>Run &lt;img src=x onerror=alert(1)&gt;&amp;amp;@DATA@" in raw


def test_the_script_makes_text_nodes_only_and_finds_every_element_it_names():
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                 "Function(", "setTimeout", "srcdoc", "DOMParser", "createContextualFragment"):
        assert word not in TEMPLATE
    named = set(re.findall(r'\$\("(\w+)"\)', TEMPLATE))
    assert len(named) > 8 and all(f'id="{name}"' in TEMPLATE for name in named)


def test_every_number_on_the_page_stands_in_the_files_of_the_run(tmp_path):
    rows = [a_row(n, reward=reward) for n in (1, 2) for reward in (1.0, -0.9)]
    curves = [{"iteration": n, "reward": 0.05, "d_by_step": [0.31, None]} for n in (1, 2)]
    _, data, code = page_of(a_run(tmp_path / "r", rows, curves))
    assert data["iterations"] == {
        str(n): [row | {"patterns": ["stable", "stable"]} for row in rows if row["iteration"] == n]
        for n in (1, 2)}
    assert data["curves"] == curves
    for name in set(re.findall(r"\bdata\.(\w+)", code)):
        assert name in data


def test_patterns_come_from_what_became_of_the_calls_alone():
    for outcomes, found in [
            (["ok", "ok", ""], "stable stable stable"),
            (["timeout"], "erroneous"),
            (["ok", "error", "malformed", "not_run"], "stable erroneous erroneous erroneous"),
            (["error", "output_truncated", "", "error"], "erroneous recovery recovery erroneous")]:
        assert evaluate.patterns(outcomes) == found.split()


def test_without_a_choice_the_page_holds_the_first_the_middle_and_the_last_iteration(tmp_path):
    folder = a_run(tmp_path / "r", [a_row(n) for n in range(1, 10)])
    assert list(page_of(folder)[1]["iterations"]) == ["1", "5", "9"]
    assert list(page_of(folder, "7", "2")[1]["iterations"]) == ["2", "7"]
    assert list(page_of(a_run(tmp_path / "s", [a_row(4)]))[1]["iterations"]) == ["4"]
    assert page_of(folder)[1]["about"].endswith("shown: 3 of 9 iterations.")


def test_the_page_tells_what_the_method_of_the_run_does(tmp_path):
    def told(**changes):
        _, data, _ = page_of(a_run(tmp_path / "r", [a_row(1)], **changes))
        return data["about"].split(". ")[0], data["worth"]
    about, worth = told(teacher="T", opd_coef=0.5, weights="decay")
    assert about.startswith("Method sod with the weights decay, ") and about.endswith("by T")
    assert worth == "advantage + 0.5 · w · (log p teacher − log p student)"
    assert told(method="opd_only")[1].startswith("1.0 · w ·")
    assert told(method="sod_only", kl="full")[1].startswith("0, for the exact")
    assert told(method="opsd_gt")[0].endswith("by its own frozen start")
    assert told(method="grpo") == (f"Method grpo, student {sod.Config.student}, scored by nobody",
                                   "advantage")


def test_a_run_of_sft_says_that_it_has_curves_and_no_rollouts_or_teacher(tmp_path):
    curves = [{"iteration": 1, "iterations": 30, "loss": 2.5}]
    _, data, code = page_of(a_run(tmp_path / "s", [], curves, method="sft"))
    assert data["about"].endswith("Iteration 1 of 30; reload the page for later ones. It imitates "
                                  "demonstrations, so there are curves and no rollouts.")
    assert not data["iterations"]
    assert data["curves"] == curves and not data["scored"]
    assert '$("trust").hidden = $("ledger").hidden = !data.scored' in code


def test_rollouts_without_tokens_are_shown_all_the_same_and_nan_is_null(tmp_path):
    bare = {name: a_turn()[name] for name in ("text", "outcome", "d", "w", "tool")}
    _, data, _ = page_of(a_run(tmp_path / "r", [a_row(1, [bare, bare | {"d": math.nan}])]))
    assert data["iterations"]["1"][0]["turns"] == [bare, bare | {"d": None}]


def test_a_rollout_that_the_machine_failed_has_no_numbers_and_is_in_no_count(tmp_path):
    stored = a_turn(outcome="sandbox_error", d=0.0, w=1.0, tokens=[])  # as older versions wrote it
    lost = [a_row(1, [turn], finish_reason="infrastructure", correct=False)
            for turn in (stored, stored | {"d": None, "w": None})]
    _, data, code = page_of(a_run(tmp_path / "r", [a_row(1), *lost]))
    kept, *failed = data["iterations"]["1"]
    assert kept["turns"][0]["d"] == 0.31 and failed[0] == failed[1]
    assert failed[0]["turns"] == [{"text": "1 ", "outcome": "sandbox_error", "tool": "2"}]
    kinds = code[code.index("const kinds"):code.index("let rows")].split("\n")
    assert 'const failed = rollout => rollout.finish_reason === "infrastructure"' in code
    assert sum("counted(rows" in line for line in kinds) == 4  # all but the two that show it


@pytest.mark.parametrize("line, sentence", [
    ("{broken", "line 2: found broken JSON"), ("[1]", "line 2: found a list"),
    ('{"step": 1, "question": "q", "turns": []}', "line 2: found no rollout with iteration"),
    ('{"iteration": 1, "question": "q"}', "line 2: found no rollout with iteration, turns"),
    (json.dumps(a_row(1, ["text"])), "line 2: found no rollout"),
    (json.dumps(a_row(1, [{"text": "t"}])), "line 2: found no rollout")])
def test_a_broken_row_is_one_sentence_and_the_older_page_stays(tmp_path, capsys, line, sentence):
    folder = a_run(tmp_path / "r", [a_row(1)])
    (folder / "rollouts.html").write_text("older")
    with open(folder / "rollouts.jsonl", "a") as file:
        file.write(line + "\n" + '{"still being writ')
    assert evaluate.main(["--page", str(folder)]) == 1
    (said,) = capsys.readouterr().err.splitlines()
    assert sentence in said and (folder / "rollouts.html").read_text() == "older"


def test_bad_usage_is_one_sentence(tmp_path, capsys):
    def said(*arguments):
        assert evaluate.main([str(a) for a in arguments]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line
    assert "gone/config.json does not exist" in said("--page", tmp_path / "gone")
    folder = a_run(tmp_path / "r", [a_row(1), a_row(3)])
    assert "iteration 2 is not in" in said("--page", folder, 2)
    (folder / "config.json").write_text("[1]")
    assert "config.json: found a list" in said("--page", folder)


@pytest.mark.parametrize("stored", [dict(method="ppo"), dict(weights="sqrt"), dict(gone=True)])
def test_a_run_of_a_method_or_scheme_that_is_gone_can_still_be_looked_at(tmp_path, stored):
    folder = a_run(tmp_path / "r", [a_row(1)], **stored)
    _, data, _ = page_of(folder)
    assert str([*stored.values()][0]) in data["about"] or "gone" in stored


def test_a_model_has_no_page(tmp_path, capsys):
    shutil.copytree(WORLD / "student", tmp_path / "model")
    assert evaluate.main(["--page", str(tmp_path / "model")]) == 1
    assert "is a model, not a run" in capsys.readouterr().err
    assert not (tmp_path / "model" / "rollouts.html").exists()


def test_a_page_that_cannot_be_written_is_told_and_does_no_harm(tmp_path, capfd):
    sod.write_page(tmp_path / "gone")
    assert "does not exist" in capfd.readouterr().err


def stand_in(monkeypatch, tmp_path, body):
    """Have a short program stand in for evaluate.py: write_page looks for it beside sod_mini.py."""
    (tmp_path / "evaluate.py").write_text("import pathlib, sys, time\n" + body)
    monkeypatch.setattr(sod, "__file__", str(tmp_path / "sod_mini.py"))
    monkeypatch.setattr(sod, "PAGES", [])


def test_a_page_of_a_run_that_goes_on_is_not_waited_for_and_the_last_one_is(tmp_path, monkeypatch):
    log, go = tmp_path / "log", tmp_path / "go"
    stand_in(monkeypatch, tmp_path, f"""
while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.01)
open({str(log)!r}, "a").write(sys.argv[2] + "\\n")""")
    sod.write_page("first", wait=False)
    sod.write_page("left out, for the first is still busy", wait=False)
    assert not log.exists()
    assert os.getpriority(os.PRIO_PROCESS, sod.PAGES[0].pid) == 19
    go.touch()
    sod.write_page("last")
    assert log.read_text().split("\n") == ["first", "last", ""] and not sod.PAGES


def test_a_page_that_failed_beside_the_run_is_told_at_the_next_save(tmp_path, monkeypatch, capfd):
    stand_in(monkeypatch, tmp_path, "sys.exit(3)")
    sod.write_page("r", wait=False)
    sod.PAGES[0].wait()
    sod.write_page("r", wait=False)
    assert "the page of r was not written (3)" in capfd.readouterr().err
    monkeypatch.setattr(sod.sys, "executable", str(tmp_path / "gone"))
    sod.write_page("r")
    assert "not written ([Errno 2]" in capfd.readouterr().err


def test_a_page_is_written_at_every_save(dozen, monkeypatch):
    asked = []
    monkeypatch.chdir(dozen)
    monkeypatch.setattr(sod, "write_page", lambda folder, wait=True: asked.append(
        (len(json_lines(folder / "metrics.jsonl")), wait)))
    assert command({**SMALL, "method": "sft", "eval_data": "", "sft_batch": 4, "sft_epochs": 1,
                    "demonstrations": "shown.jsonl", "save_every": 1, "out": "runs"}) == 0
    assert asked == [(1, False), (2, False), (3, False), (3, True)]


# --- What came of the run -----------------------------------------------------------------------


def test_the_page_begins_with_what_was_measured_and_when_health_was_spoken_of(tmp_path):
    curves = [{"iteration": n, "cut_length": cut, "entropy": None, "tokens": 60,
               "infrastructure": 1} for n, cut in enumerate([0.1, 0.5, 0.5, 0.2], start=1)]
    folder = a_run(tmp_path / "r", [a_row(1)], curves, prompts=2, group_size=2)
    assert page_of(folder)[1]["results"] == []
    (folder / "results.json").write_text(json.dumps(
        {"student before": {"correct": [[0, 1], [1, 1]]}, "teacher": {"correct": [[1, 1]]}}))
    data = page_of(folder)[1]
    assert [(name, mean) for name, mean, _, _ in data["results"]] == [("student before", 75),
                                                                      ("teacher", 100)]
    assert list(data["news"]) == ["1", "2"]  # and not again at 3
    assert data["news"]["1"][0].startswith("the sandbox failed in 1 rollouts")
    assert data["news"]["2"][0].startswith("50% of rollouts were cut at the token budget")
    assert data["rollouts"] == 4  # 60 tokens of 3 rollouts: the machine failed one


# --- What a model wrote in an evaluation --------------------------------------------------------


def test_an_evaluation_stores_what_was_written_and_its_page_shows_it(tmp_path, capsys):
    turns = [sod.Turn([1, 2], "print(2)", "ok", "2", [3], "code_interpreter"),
             sod.Turn([4], "\\boxed{2}")]
    r = sod.Rollout(tools.Problem("1 + 1", "2", id="p"), [0], turns, finish_reason="answer",
                    correct=True, reason="correct")
    rows = json.loads(json.dumps([evaluate.sample_row(r, 0, n) for n in range(2)]))
    assert rows[0]["turns"] == [{"text": "print(2)", "outcome": "ok", "tool": "2"},
                                {"text": None, "outcome": "", "tool": None}]  # it is "final"
    assert rows[0]["question"] == "1 + 1" and "question" not in rows[1]

    def shown(rows):
        file = tmp_path / "m.jsonl"
        evaluate.write_samples(file, evaluate.Evaluation("m", "world", 1, 0, 0, ["d"],
                                                         {"k": 2, "runs": 1}, rows))
        assert evaluate.main(["--page", str(file)]) == 0, capsys.readouterr().err
        page = Reader((tmp_path / "m.html").read_text(encoding="utf-8"))
        return json.loads(page.all("script")[0][2])
    data = shown(rows)
    assert data["name"] == "m on world" and list(data["iterations"]) == ["1", "2"]
    for (row,) in data["iterations"].values():
        assert [turn["text"] for turn in row["turns"]] == ["print(2)", "\\boxed{2}"]
        assert row["patterns"] == ["stable", "stable"] and row["question"] == "1 + 1"
    assert data["results"][0][:2] == ["m", 100] and not shown(rows[:1])["results"]
    old = [{name: row[name] for name in evaluate.COLUMNS} for row in rows]
    assert list(shown([old[0], rows[1]])["iterations"]) == ["2"]  # the rest of an older file
    with pytest.raises(AssertionError, match="m.jsonl holds no transcripts"):
        shown(old)


# --- The page's own arithmetic and its behaviour under a hand -----------------------------------

NODE = shutil.which("node")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))),
               None)
BY_HAND = dict(d_1=0.3, d_k=0.6, epsilon=0, delta=0.2, logp_s=-1, logp_t=-3, A=0.5, opd_coef=1,
               ratio=5, clip_low=0.2, clip_high=0.28, dual_clip=3)


def test_the_ledger_of_a_token_by_hand():
    assert evaluate.ledger(BY_HAND) == pytest.approx(
        dict(quotient=0.5, w_k=0.5, distillation=-1, A_it=-0.5, loss=1.5))  # not .5 * 5
    other = evaluate.ledger(BY_HAND | dict(d_k=0.1, logp_t=0, opd_coef=2))
    assert other == pytest.approx(
        dict(quotient=3, w_k=1.2, distillation=1.2, A_it=2.9, loss=-2.9 * 1.28))


def test_the_examples_of_the_page_meet_every_branch():
    examples = evaluate.checks()
    assert len(examples) == 12
    for x, y in examples:
        assert x.keys() == evaluate.KNOBS.keys() and all(map(math.isfinite, y.values()))
    for told in (lambda x, y: y["w_k"] < y["quotient"], lambda x, y: y["A_it"] < 0,
                 lambda x, y: y["loss"] == pytest.approx(-y["A_it"] * x["dual_clip"]),
                 lambda x, y: y["loss"] == pytest.approx(-y["A_it"] * (1 + x["clip_high"])),
                 lambda x, y: y["loss"] == pytest.approx(-y["A_it"] * (1 - x["clip_low"])),
                 lambda x, y: y["loss"] == pytest.approx(-y["A_it"] * x["ratio"])):
        assert {bool(told(*example)) for example in examples} == {True, False}


@pytest.mark.skipif(not NODE, reason="node is not here")
def test_the_pages_arithmetic_gives_the_numbers_of_sod_mini():
    start, end = TEMPLATE.index("// --- The ledger"), TEMPLATE.index("// --- Its sliders")
    examples = evaluate.checks(200)
    code = (f"const examples = {json.dumps(examples)}\n{TEMPLATE[start:end]}\nconsole.log("
            "JSON.stringify([examples.map(e => worth(e[0])), examples.every(agrees)]))")
    done = subprocess.run([NODE, "-"], input=code, capture_output=True, text=True, check=True)
    values, agreed = json.loads(done.stdout)
    for (_, theirs), ours in zip(examples, values, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-9)
    assert agreed


def in_browser(page, tmp_path, code=""):
    """What headless Chromium makes of a page after a script: the document, as text."""
    (tmp_path / "shown.html").write_text(page.replace(
        "</html>", f'<script type="module">{code}</script></html>'))
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/b",
         "--dump-dom", str(tmp_path / "shown.html")], capture_output=True, text=True, timeout=100)
    return Reader(done.stdout)


def text_of(reader, name):
    """The text within the element with this id, up to its own end."""
    start = next(i for i, (_, a, _) in enumerate(reader.found) if a.get("id") == name)
    end = next(i for i, (tag, _, _) in enumerate(reader.found[start:], start)
               if tag == "/" + reader.found[start][0])
    return "".join(text for _, _, text in reader.found[start:end])


@pytest.mark.skipif(not BROWSER, reason="Chromium is not here")
def test_a_browser_checks_the_ledger_and_a_click_or_enter_fills_it_in(tmp_path):
    failed = [a_turn(outcome="error", d=0.4), a_turn("2", "ok", d=0.8, w=0.5)]
    rows = [a_row(1), a_row(2, failed), a_row(2, failed, correct=False)]
    folder = a_run(tmp_path / "r", rows, [{"iteration": 1, "d": 0.3, "reward": 0.1},
                                          {"iteration": 2, "d": 0.3, "reward": 0.2}])
    page_of(folder)
    page = (folder / "rollouts.html").read_text(encoding="utf-8")
    seen = in_browser(page, tmp_path)
    assert "same numbers as sod_mini.py on 12 examples" in text_of(seen, "checked")
    assert "1 of 2" in text_of(seen, "count")
    assert "✓ correct, recovery" in text_of(seen, "rollout")  # of iteration 2
    second = 'document.querySelectorAll("#rollout [tabindex]")[2]'  # "2" of step 2
    for act in ("click()", 'dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", '
                           "bubbles: true}))"):
        seen = in_browser(page, tmp_path, f"{second}.{act}")
        assert text_of(seen, "sum_w_k") == "0.500" and text_of(seen, "run_w_k") == "0.500"
        assert text_of(seen, "sum_A_it") == "0.107"  # .707 + .5 * (-1.3 + .1)
        assert text_of(seen, "run_A_it") == "−0.493"  # as the row has it
    wrong = re.sub(r'"quotient": [\d.]+', '"quotient": 7', page, count=1)
    assert "WRONG on 1 of 12 examples" in text_of(in_browser(wrong, tmp_path), "checked")


@pytest.mark.skipif(not BROWSER, reason="Chromium is not here")
def test_a_browser_shows_an_sft_run_and_an_evaluation_without_what_they_lack(tmp_path):
    def seen(path):
        reader = in_browser(path.read_text(encoding="utf-8"), tmp_path)
        hidden = {a["id"] for _, a, _ in reader.found if "hidden" in a}
        return reader, hidden
    folder = a_run(tmp_path / "s", [], [{"iteration": n, "loss": 2.5 / n} for n in (1, 2)],
                   method="sft")
    page_of(folder)
    reader, hidden = seen(folder / "rollouts.html")
    assert hidden >= {"choice", "bench", "glossary", "readout"}
    assert "loss" in text_of(reader, "outcome")
    turn = {"text": "print(2)", "outcome": "ok", "tool": "2"}
    row = dict.fromkeys(evaluate.COLUMNS, 0) | {"correct": True, "turns": [turn], "answer": "2",
                                                "finish_reason": "length", "question": "1 + 1"}
    evaluate.write_samples(tmp_path / "m.jsonl", evaluate.Evaluation(
        "m", "world", 1, 0, 0, ["d"], {"k": 1, "runs": 1}, [row]))
    evaluate.write_page(tmp_path / "m.jsonl")
    reader, hidden = seen(tmp_path / "m.html")
    assert hidden >= {"ledger", "run", "training", "readout"} and "bench" not in hidden
    shown = text_of(reader, "rollout")
    assert "✓ correct, stable, cut off: token budget" in shown and "1 + 1" in shown
    assert "trained" not in shown and "reward" not in shown and "100.0%" in text_of(
        reader, "outcome")


@pytest.mark.skipif(not BROWSER, reason="Chromium is not here")
@pytest.mark.parametrize("width", [320, 1280])
def test_no_page_is_wider_than_its_screen(tmp_path, width):
    folder = a_run(tmp_path / "r", [a_row(1, [a_turn("x" * 300), a_turn()])],
                   [{"iteration": 1, "d": 0.3, "reward": 0.1}])
    (folder / "results.json").write_text('{"student before": {"correct": [[1]]}}')
    page_of(folder)
    frame = (f"const frame = document.createElement('iframe'); frame.width = {width}; "
             "frame.srcdoc = PAGE; document.body.append(frame); "
             "frame.onload = () => document.title = 'wide ' + "
             "frame.contentDocument.documentElement.scrollWidth")
    page = json.dumps((folder / "rollouts.html").read_text(encoding="utf-8"))
    seen = in_browser("<!doctype html><title></title><body></html>", tmp_path,
                      frame.replace("PAGE", page.replace("</", "<\\/")))
    assert int(seen.all("title")[0][2].split()[1]) <= width
