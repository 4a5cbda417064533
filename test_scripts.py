"""Runs the scripts as a user does, on a tiny random model, and once on the stand-in's real one."""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import finetune
import glue_run
import sparsegrad

HERE = pathlib.Path(__file__).parent
GLUE = HERE.parent / "shared" / "data" / "glue"
GOOD = ["a fine film .", "truly great fun", "a warm , witty story", "great acting and a great story"]
BAD = ["a dull film .", "truly bad", "a cold , bland story", "bad acting and a dull story"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    words = sorted(set(" ".join(GOOD + BAD).split()))
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=5 + len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def rows_of(task):
    """Header and rows in the layout of GLUE's own files, columns we do not use included."""
    good, bad = GOOD * 3, BAD * 3
    if task == "cola":
        return None, [["gj04", "1", "", s] for s in good] + [["gj04", "0", "*", s] for s in bad]
    if task == "sst2":
        return ["sentence", "label"], [[s, "1"] for s in good] + [[s, "0"] for s in bad]
    if task == "mrpc":
        header = ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"]
        return header, [["1", "1", "2", s, s] for s in good] + [["0", "1", "2", s, g] for s, g in zip(bad, good)]
    if task == "qqp":
        header = ["id", "qid1", "qid2", "question1", "question2", "is_duplicate"]
        return header, [["0", "1", "2", s, s, "1"] for s in good] + [["0", "1", "2", s, g, "0"] for s, g in zip(bad, good)]
    if task == "stsb":
        header = ["index", "genre", "sentence1", "sentence2", "score"]
        return header, [["0", "x", s, s, "4.8"] for s in good] + [["0", "x", s, g, "1.2"] for s, g in zip(bad, good)]
    if task == "mnli":
        header = ["index", "sentence1", "sentence2", "label1", "gold_label"]
        labels = ["entailment", "neutral", "contradiction"] * 8
        return header, [["0", s, g, "x", label] for s, g, label in zip(good + bad, bad + good, labels)]
    labels = {"wnli": ("1", "0")}.get(task, ("entailment", "not_entailment"))
    first, second = {"qnli": ("question", "sentence")}.get(task, ("sentence1", "sentence2"))
    return ["index", first, second, "label"], [["0", s, s, labels[0]] for s in good] + [
        ["0", b, g, labels[1]] for b, g in zip(bad, good)
    ]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glue")
    for task, entry in glue_run.TASKS.items():
        header, rows = rows_of(task)
        text = "\n".join("\t".join(row) for row in ([header] if header else []) + rows) + "\n"
        (folder / entry["folder"]).mkdir()
        for split in ("train", *(["dev_matched", "dev_mismatched"] if task == "mnli" else ["dev"])):
            (folder / entry["folder"] / f"{split}.tsv").write_text("\ufeff" * (task == "mrpc") + text, encoding="utf-8")
    return folder


@pytest.fixture
def glue(model_folder, data_folder, tmp_path, monkeypatch, capsys):
    """glue(...) runs the script in a new folder; returns (results or exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*options, model=True, data=True):
        given = [*(["--model", str(model_folder)] if model else []), *(["--data", str(data_folder)] if data else [])]
        if "--resume" in options:
            given = []
        monkeypatch.setattr(sys, "argv", ["glue_run.py", *given, *map(str, options)])
        capsys.readouterr()
        code = 0
        try:
            finetune.run(glue_run.main)
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


SHORT = ("--epochs", "1", "--batch-size", "8", "--basis-steps", "3", "--k", "0.05")


def short(method):
    """SHORT, less what the method has no use for."""
    used = {"ft": SHORT[:4], "sparsegrad": SHORT}.get(method, (*SHORT[:4], *SHORT[6:]))
    return ("--method", method, *used)


def results(folder):
    return json.loads((pathlib.Path(folder) / "results.json").read_text())


# ------------------------------------------------------------------------ tasks and methods


@pytest.mark.parametrize("task", sorted(glue_run.TASKS))
def test_every_task_in_glues_own_layout(glue, task):
    code, out, _ = glue("--task", task, *SHORT, "--output-dir", "out")
    assert code == 0
    sides = ["matched_", "mismatched_"] if task == "mnli" else [""]
    found = results("out")
    for name in glue_run.TASKS[task]["metrics"]:
        for side in sides:
            assert f"{side}{name}" in out and f"eval_{side}{name}" in found["metrics"]
    assert found["steps"] == 3 and len(found["evaluations"]) == len(sides)


def test_results_hold_what_a_reader_needs(glue):
    code, out, _ = glue("--task", "sst2", *SHORT, "--epochs", "3")
    assert code == 0
    assert out.startswith("model: ") and "\ndata:  sst2 in glue" in out and "stand-in" not in out
    found = results("runs/sst2-sparsegrad-seed0")
    assert found["arguments"]["k"] == 0.05 and found["seed"] == 0
    assert set(found["versions"]) >= {"torch", "transformers", "peft", "datasets", "numpy", "python"}
    assert found["machine"]["threads"] >= 1 and "git_commit" in found
    assert found["used"]["train_rows"] == 24 and not found["used"]["stand_in"]
    assert found["core_entries"] == 4 * 102 and found["touched_entries"] < found["trainable_parameters"]
    assert found["basis_seconds"] > 0 and found["steps_per_second"] > 0 and found["peak_memory_mib"] > 100
    assert [e["step"] for e in found["evaluations"]] == [3, 6, 9]
    assert all("eval_accuracy" in e for e in found["evaluations"])
    for word in ("accuracy", "trainable parameters", "entries a step updates", "steps per second", "peak memory"):
        assert word in out
    adapter = load_file("runs/sst2-sparsegrad-seed0/sparsegrad.safetensors")
    assert any(name.endswith("core.values") for name in adapter)
    glue("--task", "sst2", *SHORT)  # without --output-dir nothing is written over
    assert pathlib.Path("runs/sst2-sparsegrad-seed0-2/results.json").exists()


@pytest.mark.parametrize("freeze", [False, True])
def test_every_method_trains_what_it_should(glue, freeze):
    found = {}
    for method in finetune.METHODS:
        code, _, err = glue("--task", "sst2", *short(method), "--output-dir", method, *["--freeze"] * freeze)
        assert code == 0, err
        found[method] = results(method)
    mlp, head = 4 * 32 * 64, 32 * 2 + 2
    trunk = sum(p.numel() for p in transformers.BertModel(transformers.BertConfig.from_pretrained(
        found["ft"]["arguments"]["model"])).parameters())  # fmt: skip
    rest = head if freeze else head + trunk - mlp
    assert found["lora"]["lora_rank"] == 1  # 0.05 * 2048 = 102 entries, and 96 a rank
    expected = {"ft": rest + mlp, "lora": rest + 4 * 96, "meprop": rest + mlp, "sparsegrad": rest + mlp}
    assert {m: r["trainable_parameters"] for m, r in found.items()} == expected
    touched = {"ft": rest + mlp, "lora": rest + 4 * 96, "meprop": rest + 4 * 102, "sparsegrad": rest + 4 * 102}
    assert {m: r["touched_entries"] for m, r in found.items()} == touched
    if freeze:
        names = set(load_file("sparsegrad/sparsegrad.safetensors"))
        assert {n for n in names if "core" not in n and "basis" not in n} == {"classifier.weight", "classifier.bias"}


def test_training_learns(glue):
    code, _, _ = glue("--task", "sst2", *SHORT, "--epochs", "15", "--lr", "3e-3", "--output-dir", "out")
    assert code == 0 and results("out")["metrics"]["eval_accuracy"] > 0.9


def test_options_reach_the_method(glue):
    glue("--task", "sst2", *SHORT, "--share", "layer", "--sides", "narrow", "--rank", "6", "--output-dir", "out")
    adapter = load_file("out/sparsegrad.safetensors")
    bases = {n: t for n, t in adapter.items() if "basis" in n}
    assert len(bases) == 4 and all(t.shape == (32, 6) for t in bases.values())
    glue("--task", "sst2", *short("lora"), "--rank", "5", "--max-train-samples", "16", "--output-dir", "lora")
    assert results("lora")["lora_rank"] == 5 and results("lora")["used"]["train_rows"] == 16
    glue("--task", "sst2", *SHORT, "--max-steps", "2", "--bf16", "--output-dir", "bf16")
    assert results("bf16")["steps"] == 2


def test_the_papers_rates_are_used_for_its_models(glue, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "bert-base-uncased")
    for method, rate in (("sparsegrad", 6.81e-5), ("lora", 1e-4)):
        glue("--task", "rte", "--method", method, "--model", "bert-base-uncased", "--max-steps", "1", "--output-dir", method)
        arguments = results(method)["arguments"]
        assert (arguments["lr"], arguments["batch_size"], arguments["epochs"]) == (rate, 16, 3)


def test_metrics_are_glues():
    two = argparse.Namespace(predictions=np.array([[0, 1], [0, 1], [1, 0], [1, 0]]), label_ids=np.array([1, 0, 1, 0]))
    found = glue_run.glue_metrics(["accuracy", "f1", "matthews"], two)
    assert found == {"accuracy": 0.5, "f1": 0.5, "matthews": 0.0}
    two.label_ids = np.array([1, 1, 1, 0])
    assert glue_run.glue_metrics(["f1"], two)["f1"] == pytest.approx(0.8)
    score = argparse.Namespace(predictions=np.array([[1.0], [2.0], [9.0]]), label_ids=np.array([1.0, 2.0, 3.0]))
    found = glue_run.glue_metrics(["pearson", "spearman"], score)
    assert found["spearman"] == pytest.approx(1.0) and found["pearson"] == pytest.approx(0.9177, abs=1e-4)


def test_batches_are_shuffled_by_seed_and_epoch_and_alike_in_length():
    lengths = [1 + i % 40 for i in range(1000)]

    def order(seed, epoch):
        return list(finetune.LengthGroupedSampler(lengths, 8, seed, argparse.Namespace(epoch=epoch)))

    assert order(0, 0) == order(0, 0.7) != order(0, 1.0) and order(0, 0) != order(1, 0)
    assert sorted(order(0, 0)) == list(range(1000))
    batches = [[lengths[i] for i in order(0, 0)[j : j + 8]] for j in range(0, 1000, 8)]
    assert sum(max(b) for b in batches) < 0.7 * 40 * len(batches)


def test_the_first_steps_are_not_timed(monkeypatch):
    clock = iter([0.0, 10.0, 11.0, 12.0, 15.0])
    watch = finetune.Measure()
    monkeypatch.setattr(watch, "_now", lambda: next(clock))
    watch.started = 0
    for step in (finetune.FIRST_STEPS, finetune.FIRST_STEPS + 1, finetune.FIRST_STEPS + 2):
        watch.on_step_begin(None, None, None)
        watch.on_step_end(None, argparse.Namespace(global_step=step), None)
    assert (watch.steps, watch.seconds) == (2, 4.0)


def test_the_same_seed_gives_the_same_metric(glue):
    runs = []
    for folder, seed in (("a", 3), ("b", 3), ("c", 4)):
        glue("--task", "stsb", *SHORT, "--seed", seed, "--output-dir", folder)
        runs.append(results(folder)["metrics"]["eval_loss"])
    assert runs[0] == runs[1] != runs[2]


def test_paper_adds_early_stopping_and_three_seeds(glue):
    code, out, _ = glue("--task", "rte", *SHORT[2:], "--paper", "--lr", "3e-3", "--output-dir", "out")
    assert code == 0 and "over 3 seeds" in out and " ± " in out
    found = results("out")
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert found["summary"]["accuracy"]["mean"] == pytest.approx(sum(r["metrics"]["eval_accuracy"] for r in found["runs"]) / 3)
    for run in found["runs"]:
        assert run["arguments"]["epochs"] == 20 and 10 <= run["steps"] <= 60
        assert run["metrics"]["eval_accuracy"] == max(e["eval_accuracy"] for e in run["evaluations"])  # the best came back


def test_hyperparameters_of_the_paper():
    def of(model, task, method="sparsegrad", freeze=False):
        args = argparse.Namespace(task=task, method=method, freeze=freeze)
        return glue_run.paper_hyperparameters(model, args)

    assert of("bert-base-uncased", "sst2") == (1.47e-5, 32)
    assert of("google-bert/bert-base-uncased", "stsb", "meprop") == (1.24e-4, 32)
    assert of("FacebookAI/roberta-base", "mrpc") == (4.63e-5, 32)
    assert of("roberta-large", "qqp") == (2.89e-6, 32)
    assert of("bert-base-uncased", "rte", "lora") == (None, 16)  # the rates are SparseGrad's
    assert of("bert-base-uncased", "rte", freeze=True) == (None, 16)
    assert of("bert-base-uncased", "wnli") == of("minilm", "sst2") == (None, None)


# -------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("method, extra", [("sparsegrad", ()), ("sparsegrad", ("--freeze",)), ("lora", ("--freeze",))])
def test_ctrl_c_and_resume_come_to_the_same_as_no_interruption(glue, method, extra, monkeypatch):
    options = ("--task", "sst2", *extra, *short(method), "--epochs", "3")
    glue(*options, "--output-dir", "straight")

    step_begin = finetune.Measure.on_step_begin

    def pressed(self, args, state, control, **kwargs):
        step_begin(self, args, state, control, **kwargs)
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(finetune.Measure, "on_step_begin", pressed)
    code, _, err = glue(*options, "--output-dir", "broken")
    assert code == 130 and "--resume broken" in err and not pathlib.Path("broken/results.json").exists()
    assert pathlib.Path("broken/checkpoint-5").is_dir()
    monkeypatch.setattr(finetune.Measure, "on_step_begin", step_begin)
    monkeypatch.setattr(sparsegrad, "find_bases", None)  # must not be needed again

    code, out, err = glue("--resume", "broken")
    assert code == 0, err
    assert "resuming from checkpoint-5" in out
    a, b = results("straight"), results("broken")
    assert a["metrics"]["eval_loss"] == b["metrics"]["eval_loss"] and a["steps"] == b["steps"] == 9
    for key in ("trainable_parameters", "touched_entries"):
        assert a[key] == b[key]
    if method == "sparsegrad":
        a, b = (load_file(f"{folder}/sparsegrad.safetensors") for folder in ("straight", "broken"))
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        (["--task", "sst3"], "invalid choice: 'sst3'"),
        ([], "--task is missing"),
        (["--task", "sst2", "--k", "0"], "k is 0"),
        (["--task", "sst2", "--k", "1.5"], "k is 1.5"),
        (["--task", "sst2", "--k", "many"], "0.01 or a count"),
        (["--task", "sst2", "--k", "2049"], "beyond bert.encoder.layer.0.intermediate.dense|beyond encoder"),
        (["--task", "sst2", "--rank", "33"], "room for 1 to 32"),
        (["--task", "sst2", "--lr", "nan"], "nan is not a number"),
        (["--task", "sst2", "--lr", "-1"], "-1"),
        (["--task", "sst2", "--batch-size", "0"], "0 is not a whole number"),
        (["--task", "sst2", "--model", "no/such"], "--model no/such cannot be loaded"),
        (["--task", "sst2", "--seed", "-1"], "-1 is not a whole number of 0 to"),
        (["--task", "sst2", "--method", "ft", "--k", "5"], "--k is of no use to --method ft"),
        (["--task", "sst2", "--method", "meprop", "--rank", "5"], "--rank is of no use to --method meprop"),
        (["--task", "sst2", "--method", "lora", "--basis-steps", "5"], "--basis-steps is of no use"),
        (["--task", "sst2", "--output-dir", "/dev/null/x"], "/dev/null is not a folder"),
        (["--resume", "nowhere"], "no arguments.json"),
    ],
)
def test_bad_options_end_in_one_line(glue, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, _, err = glue(*options)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert any(part in err for part in message.split("|")), err
    assert not list(pathlib.Path().rglob("results.json"))


def write(folder, name, text):
    (folder / "SST-2").mkdir(exist_ok=True)
    (folder / "SST-2" / name).write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize(
    "train, message",
    [
        (None, "train.tsv is missing"),
        ("", "has no column sentence, label; its header is: (empty file)"),
        ("sentence\tlabel\n", "has no rows with 2 columns"),
        ("text\tlabel\nfine\t1\n", "has no column sentence; its header is: text, label"),
        ("sentence\tlabel\nfine\t1\nodd\tmaybe\n", "line 3: the label is 'maybe', where it should be one of 0, 1"),
        ("sentence\tlabel\nfine\n", "has no rows with 2 columns"),
        ("sentence\tlabel\n" + 200_000 * "x" + "\t1\n", "is not tab-separated UTF-8 text"),
        (b"sentence\tlabel\n\xff\t1\n", "is not tab-separated UTF-8 text"),
    ],
)
def test_bad_files_are_named_before_training(glue, tmp_path, train, message):
    write(tmp_path, "dev.tsv", "sentence\tlabel\nfine\t1\n")
    if train is not None:
        write(tmp_path, "train.tsv", train)
    code, _, err = glue("--task", "sst2", "--data", str(tmp_path))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not pathlib.Path("runs").exists()


def test_rows_that_lack_columns_are_counted_and_left_out(tmp_path, capsys):
    (tmp_path / "train.tsv").write_text("sentence\tlabel\nfine\t1\nbroken\nbad\t0\n")
    rows = glue_run.read_tsv(tmp_path / "train.tsv", glue_run.TASKS["sst2"])
    assert rows["text"] == ["fine", "bad"] and rows["label"] == [1, 0]
    assert "1 rows lack columns" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run(glue):
    code, _, err = glue("--task", "sst2", *SHORT, "--epochs", "5", "--lr", "1e30", "--output-dir", "out")
    assert code == 2 and "loss is nan at step" in err and "lower --lr" in err
    assert not pathlib.Path("out/results.json").exists()


def test_mnli_losses_are_watched_too():
    logs = {"eval_matched_loss": float("nan")}
    with pytest.raises(finetune.UserError, match="eval_matched_loss is nan at step 7"):
        finetune.Measure().on_log(argparse.Namespace(learning_rate=1.0), argparse.Namespace(global_step=7), None, logs=logs)


def test_a_start_that_failed_blocks_no_folder(glue):
    assert glue("--task", "sst2", *SHORT, "--rank", "99", "--output-dir", "out")[0] == 2
    assert glue("--task", "sst2", *SHORT, "--rank", "9", "--output-dir", "out")[0] == 0


def test_a_broken_model_file_is_one_line(glue, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "broken")
    (tmp_path / "broken/model.safetensors").write_bytes(b"short")
    code, _, err = glue("--task", "sst2", "--model", str(tmp_path / "broken"), *SHORT)
    assert code == 2 and "broken cannot be loaded" in err and len(err.strip().splitlines()) == 1


def test_a_folder_with_a_run_is_not_written_over(glue):
    glue("--task", "sst2", *SHORT, "--output-dir", "out")
    before = pathlib.Path("out/results.json").read_bytes()
    code, _, err = glue("--task", "sst2", *SHORT, "--output-dir", "out")
    assert code == 2 and "holds a run already" in err and pathlib.Path("out/results.json").read_bytes() == before


# -------------------------------------------------------------------------------- the data


def test_data_saved_by_datasets(glue, tmp_path):
    part = datasets.Dataset.from_dict({"sentence": GOOD + BAD, "label": [1] * 4 + [0] * 4, "idx": list(range(8))})
    datasets.DatasetDict({"train": part, "validation": part}).save_to_disk(tmp_path / "saved" / "sst2")
    for folder in ("saved", "saved/sst2"):
        code, _, err = glue("--task", "sst2", "--data", str(tmp_path / folder), *SHORT)
        assert code == 0, err
    datasets.DatasetDict({"train": part.remove_columns("label"), "validation": part}).save_to_disk(tmp_path / "bad")
    code, _, err = glue("--task", "sst2", "--data", str(tmp_path / "bad"), *SHORT)
    assert code == 2 and "split train, has no column label; it has sentence, idx" in err


FIRST_ROWS = {  # of GLUE's own layout and of the hub's: texts, label
    "cola": (["a fine film ."], 1),
    "mnli": (["a fine film .", "a dull film ."], 0),
    "mrpc": (["a fine film .", "a fine film ."], 1),
    "qnli": (["a fine film .", "a fine film ."], 0),
    "qqp": (["a fine film .", "a fine film ."], 1),
    "rte": (["a fine film .", "a fine film ."], 0),
    "sst2": (["a fine film ."], 1),
    "stsb": (["a fine film .", "a fine film ."], 4.8),
    "wnli": (["a fine film .", "a fine film ."], 1),
}


@pytest.mark.parametrize("task", sorted(FIRST_ROWS))
def test_texts_and_labels_of_each_layout(task, data_folder):
    texts, label = FIRST_ROWS[task]
    expected = dict(zip(("text", "text2"), texts)) | {"label": label}
    train = glue_run.load_folder(data_folder, task)["train"]
    assert train[0] == expected and len(train) == 24

    names = {"mnli": ["premise", "hypothesis"], "qnli": ["question", "sentence"], "qqp": ["question1", "question2"]}
    names = names.get(task, ["sentence1", "sentence2"] if len(texts) == 2 else ["sentence"])
    part = datasets.Dataset.from_list([dict(zip(names, texts)) | {"label": label, "idx": 0}])
    splits = ["train", "validation_matched", "validation_mismatched"] if task == "mnli" else ["train", "validation"]
    assert glue_run.from_hub_layout(dict.fromkeys(splits, part), task, "here")["train"][0] == expected
    wrong = part.remove_columns("label").add_column("label", ["maybe"])
    with pytest.raises(finetune.UserError, match="a label is 'maybe'"):
        glue_run.from_hub_layout(dict.fromkeys(splits, wrong), task, "here")


@pytest.mark.parametrize("task, rows", [("sst2", (67349, 872)), ("mrpc", (3668, 408)), ("stsb", (5749, 1500))])
@pytest.mark.skipif(not GLUE.is_dir(), reason="GLUE's real files stand beside the development checkout only")
def test_the_real_files_are_read_whole(task, rows):
    splits = glue_run.load_folder(GLUE, task)
    assert (len(splits["train"]), len(splits["dev"])) == rows
    assert all(split["text"][0] for split in splits.values())


def test_the_stand_in_says_so_and_other_tasks_say_what_to_pass(glue, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ("--max-steps", "2", "--max-train-samples", "64", "--basis-steps", "1", "--output-dir", "out")
    code, out, err = glue("--task", "sst2", *options, model=False, data=False)
    assert code == 0, err
    assert out.splitlines()[0].startswith("model: sentence-transformers/all-MiniLM-L6-v2 (package")
    assert "Rotten Tomatoes" in out.splitlines()[1] and "not GLUE's numbers" in out.splitlines()[2]
    assert results("out")["used"]["stand_in"] is True
    assert "stand-in" in out.split("task, method")[1].splitlines()[0]
    code, out, _ = glue("--task", "sst2", *options[:-1], "mixed", model=False)
    assert code == 0 and "note:  stand-in model, for want of a hub: these are not BERT's numbers" in out
    code, _, err = glue("--task", "rte", model=False, data=False)
    assert code == 2 and "pass --data DIR" in err and "RTE/train.tsv" in err


def test_the_stand_ins_split_is_the_same_for_all_and_leaks_nothing():
    first, again = glue_run.rotten_tomatoes(), glue_run.rotten_tomatoes()
    assert len(first["train"]) == 7530 and len(first["dev"]) == 1000
    assert first["dev"]["text"] == again["dev"]["text"]
    assert 0.4 < sum(first["dev"]["label"]) / 1000 < 0.6
    assert len(set(first["train"]["text"]) & set(first["dev"]["text"])) < 5


def test_a_hub_that_does_not_answer_is_noticed_within_seconds(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, says nothing
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        assert not finetune.hub_reachable(seconds=1.0)
        assert time.monotonic() - start < 3


def test_lora_rank_is_the_nearest_to_the_budget():
    linears = [torch.nn.Linear(768, 3072), torch.nn.Linear(3072, 768)]
    assert finetune.lora_rank(linears, 2 * 28_000) == 7  # the paper's
    assert finetune.lora_rank(linears, 1) == 1


def test_the_script_runs_from_a_shell():
    done = subprocess.run([sys.executable, HERE / "glue_run.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--task" in done.stdout
    done = subprocess.run([sys.executable, HERE / "glue_run.py", "--task", "sst2", "--k", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
