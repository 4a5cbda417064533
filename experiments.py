"""The claim, measured: SparseGrad beside full fine-tuning, LoRA and MeProp, by one protocol.

    python experiments.py run --glue DIR --tasks sst2                                      every run that results/claim has not yet
    python experiments.py run --glue DIR --oasst FILE --tasks mrpc stsb oasst chat --bf16  the same in mixed precision
    python experiments.py table                                                            the tables, from what it has
    python experiments.py figure FILE                                                      the README's figure, likewise

A cell is a task, a setting (all but the MLP linears trains densely, as in the paper, or only
the method and the head: `freeze`) and a method. In each cell the learning rate with the lowest
loss on a held-out part of the training set is found on seed 0, in steps of about three from 1e-5
to 1e-1; the grid grows until the best is not at its edge, or at one of those. Then SEEDS train at that
rate and are measured on the dev set. Every run is `glue_run.py` or `llama_run.py`, without a hub,
so on MiniLM and SmolLM2, or, for other models, a script of results/other-models; its results.json is kept.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import statistics
import string
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import finetune

HERE = pathlib.Path(__file__).parent
FOLDER = HERE / "results" / "claim"


class Task(NamedTuple):
    options: str  # script and options; {glue} stands for what --glue gives
    held_out: int  # training rows, trees or people to choose the learning rate on
    metric: str
    narrow_rank: int  # at which a core on the narrow side has 1 % of a linear's entries
    settings: tuple[str, ...] = ("freeze",)

    @property
    def paths(self) -> list[str]:
        return [field for _, field, _, _ in string.Formatter().parse(self.options) if field]

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "eval_loss"


TASKS = {
    "sst2": Task("glue_run.py --task sst2 --data {glue} --max-train-samples 8000 --epochs 1 --schedule linear",
                 1000, "eval_accuracy", 4, ("paper", "freeze")),
    "mrpc": Task("glue_run.py --task mrpc --data {glue} --epochs 3 --schedule linear",
                 400, "eval_f1", 4, ("paper", "freeze")),
    "stsb": Task("glue_run.py --task stsb --data {glue} --epochs 3 --schedule linear",
                 600, "eval_pearson", 4, ("paper", "freeze")),
    "oasst": Task("llama_run.py --data {oasst} --top-ranked", 30, "eval_loss", 6),
    "chat": Task("llama_run.py --max-length 256", 30, "eval_loss", 6),
    "t5": Task("glue_run.py --task sst2 --model {t5} --data {glue} --max-train-samples 4000 --epochs 1 --schedule linear",
               1000, "eval_accuracy", 5),
    "vit": Task("results/other-models/vit.py --model {vit} --data {images}", 800, "eval_accuracy", 4),
    "gpt2": Task("results/other-models/gpt2.py --model {gpt2} --data {counts}", 20, "eval_loss", 3),
}  # fmt: skip
OTHER_MODELS = ("t5", "vit", "gpt2")  # beyond the paper's
COLUMNS = [(task, setting) for task in TASKS for setting in TASKS[task].settings]
METHODS = {  # options; all at 1 % of a linear, or LoRA's rank nearest to it
    "ft": "--method ft",
    "lora": "--method lora --k 0.01",
    "meprop": "--method meprop --k 0.01",
    "sparsegrad": "--method sparsegrad --k 0.01",
    "own": "--method sparsegrad --k 0.01 --share layer",
    "own, rank 128": "--method sparsegrad --k 0.01 --share layer --rank 128",
    "narrow, all entries": "--method sparsegrad --k 1.0 --sides narrow --rank {}",
}
OWN = METHODS["own, rank 128"]
ABLATIONS = {  # of one of ABLATED, a thing or two changed in each
    "own, rank 128, random": f"{OWN} @random",
    "own, rank 128, mixed": f"{OWN} @mixed",
    "own, random": f"{METHODS['own']} @random",
    "own, rank 128, refreshed": f"{OWN} @refreshed",
    "own, one moment": f"{METHODS['own']} --adaptivity 0",
    "own, rank 128, one moment": f"{OWN} --adaptivity 0",
    "own, rank 128, half moment": f"{OWN} --adaptivity 0.5",
    "own, rank 128, core rate 0.3": f"{OWN} @core-rate=0.3",
    "own, rank 128, core rate 3": f"{OWN} @core-rate=3",
    "own, rank 128, 5 steps": f"{OWN} --basis-steps 5",
    "own, rank 128, one pass": f"{OWN} --basis-steps 120",
    "own, rank 128, k 0.1 %": "--method sparsegrad --k 0.001 --share layer --rank 128",
    "own, rank 77, all entries": "--method sparsegrad --k 1.0 --share layer --rank 77",
    "own, narrow": f"{METHODS['own']} --sides narrow",
    "shared, transposed": f"{METHODS['sparsegrad']} @transposed",
    "shared, k 0.1 %": "--method sparsegrad --k 0.001",
    "shared, k 10 %": "--method sparsegrad --k 0.1",
    "shared, k 100 %": "--method sparsegrad --k 1.0",
}
ABLATED = ("sparsegrad", "own", "own, rank 128")  # what they are beside
OPTIONS = METHODS | ABLATIONS
PATHS = {
    "glue": "GLUE's folder, with SST-2, MRPC and STS-B",
    "oasst": "OpenAssistant's messages, a jsonl file",
    "t5": "a T5 with its tokenizer, a folder (results/other-models)",
    "vit": "a ViT or DINOv2, a folder (results/other-models)",
    "images": "grey images, comma-separated, the class last in a row",
    "gpt2": "a GPT-2 with its genera, a folder (results/other-models)",
    "counts": "counts of genera in samples, comma-separated",
}
PEERS = ("ft", "lora", "meprop")
IN_SHORT = ("sparsegrad", "own, rank 128")  # the kinds of SparseGrad in the README's table of leads
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FROM = {"paper": 3e-5, "freeze": 3e-4}  # four rates from here on, at first
SEEDS = (3, 4, 5)  # SST-2's 0 to 2 were seen before


def options_of(method: str) -> tuple[str, str]:
    """(its options, "" or what results/claim/variants.py changes)."""
    options, _, change = OPTIONS[method].partition(" @")
    return options, change


class Run(NamedTuple):
    task: str
    setting: str
    method: str
    lr: float
    seed: int
    held_out: bool

    @property
    def path(self) -> pathlib.Path:
        method = self.method.replace(", ", "-").replace(" ", "").replace("%", "")
        name = f"{method}-lr{self.lr:.0e}-seed{self.seed}{'-held-out' * self.held_out}"
        return FOLDER / f"{self.task}-{self.setting}" / f"{name}.json"

    def command(self, paths: dict[str, str], output: str, bf16: bool = False) -> list[str]:
        task = TASKS[self.task]
        script, *options = (word.format(**paths) for word in task.options.split())
        of_method, change = options_of(self.method)
        words = [str(HERE / "results/claim/variants.py"), change, script] if change else [str(HERE / script)]
        words = [sys.executable, *words, *options, *of_method.format(task.narrow_rank).split()]
        words += ["--lr", f"{self.lr:g}", "--seed", str(self.seed), "--output-dir", output]
        if self.setting == "freeze" and script == "glue_run.py":  # the others do no else
            words.append("--freeze")
        if bf16:
            words += ["--dtype", "bfloat16"] if script == "llama_run.py" else ["--bf16"]
        return words + ["--held-out", str(task.held_out)] * self.held_out

    def result(self) -> dict | None:
        """What was measured, or that it diverged; None if it was not run."""
        return read(self.path) if self.path.exists() else None


def read(path: str | pathlib.Path) -> dict:
    return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))


Cell = tuple[str, str, str]  # task, setting, method


def rate(cell: Cell) -> tuple[float | None, list[Run]]:
    """(the chosen learning rate, []), or (None, the runs that are missing to choose it)."""
    low, high = RATES.index(FROM[cell[1]]), RATES.index(FROM[cell[1]]) + 4
    while True:
        runs = [Run(*cell, lr, 0, True) for lr in RATES[low:high]]
        results = [run.result() for run in runs]
        if None in results:
            return None, [run for run, result in zip(runs, results) if result is None]
        losses = [result.get("metrics", {}).get("eval_loss", math.inf) for result in results]
        best = losses.index(min(losses))
        if best == 0 and low > 0:
            low -= 1
        elif best == len(runs) - 1 and high < len(RATES):
            high += 1
        else:
            return runs[best].lr, []


def missing(cell: Cell) -> list[Run]:
    lr, to_choose = rate(cell)
    return to_choose or [run for seed in SEEDS if (run := Run(*cell, lr, seed, False)).result() is None]


def make(run: Run, paths: dict[str, str], threads: int, bf16: bool = False) -> None:
    """Run it, and store what came out; UserError if it failed otherwise than by diverging."""
    with tempfile.TemporaryDirectory() as folder:
        output = os.path.join(folder, "run")
        done = subprocess.run(
            run.command(paths, output, bf16),
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode == 0:
            results = read(os.path.join(output, "results.json"))
        elif done.returncode == finetune.Diverged.code:
            arguments = read(os.path.join(output, "arguments.json"))
            results = {"arguments": arguments, "diverged": done.stderr.strip().splitlines()[-1]}
        else:
            raise finetune.UserError(f"{run.path.relative_to(FOLDER)} failed: {done.stderr.strip()[-500:]}")
    arguments = results["arguments"]
    arguments["output_dir"] = None  # it was a temporary one
    for told in (arguments, results.get("used", {})):
        for key in ("model", "data"):  # no paths of this machine
            if os.path.isabs(path := told.get(key) or ""):
                told[key] = os.path.basename(path)
    if change := options_of(run.method)[1]:
        arguments["change"] = change  # the script does not know
    finetune.write_json(run.path, results)


def check_precision(cells: list[Cell], bf16: bool) -> None:
    """UserError if runs of a column are there already in the other precision: its methods would not compare."""
    for task, setting in dict.fromkeys(cell[:2] for cell in cells):
        for path in (FOLDER / f"{task}-{setting}").glob("*.json"):
            stored = read(path)["arguments"]["bf16"]
            if stored != bf16:
                what = "in mixed precision: pass --bf16" if stored else "in fp32: leave --bf16 out"
                raise finetune.UserError(f"the runs of {task}, {setting} that are there are {what}, or move them away")


def run_all(cells: list[Cell], paths: dict[str, str], lanes: int, bf16: bool = False) -> None:
    """Every missing run of `cells`, `lanes` at a time."""
    threads = max(1, (os.cpu_count() or 1) // lanes)
    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        busy: dict[concurrent.futures.Future, Run] = {}
        while True:
            waiting = [run for cell in cells for run in missing(cell) if run not in busy.values()]
            for run in waiting[: lanes - len(busy)]:
                print(f"{time.strftime('%H:%M')} {run.path.relative_to(FOLDER)}", flush=True)
                busy[pool.submit(make, run, paths, threads, bf16)] = run
            if not busy:
                return
            for future in concurrent.futures.wait(busy, return_when=concurrent.futures.FIRST_COMPLETED).done:
                del busy[future]
                future.result()


Values = tuple[float | None, list[float]]  # the chosen learning rate, what each of SEEDS came to


def values(cell: Cell) -> Values:
    """(None, []) unless all runs of the cell are there."""
    lr, to_choose = rate(cell)
    results = [Run(*cell, lr, seed, False).result() for seed in SEEDS] if not to_choose else [None]
    if None in results:
        return None, []
    return lr, [result.get("metrics", {}).get(TASKS[cell[0]].metric, math.nan) for result in results]


Column = tuple[str, str]  # task, setting


def head(column: Column) -> str:
    task, setting = column
    metric = TASKS[task].metric.removeprefix("eval_")
    return f"{task}, {setting} ({metric}{', lower is better' * TASKS[task].lower_is_better})"


def grid(corner: list[str], columns: list[str], rows: dict[tuple[str, ...], list[str]]) -> str:
    """A Markdown table of the rows that hold something."""
    lines = ["| " + " | ".join([*corner, *columns]) + " |", "|---" * (len(corner) + len(columns)) + "|"]
    return "\n".join(lines + ["| " + " | ".join([*name, *cells]) + " |" for name, cells in rows.items() if any(cells)])


def tables() -> dict[str, str]:
    """Title -> Markdown table, of those with a row: mean ± standard deviation over seeds (learning rate); SparseGrad's
    lead, seed by seed, and in short."""
    found = {(column, method): values((*column, method)) for column in COLUMNS for method in OPTIONS}

    def columns_with(methods, of=lambda task: True) -> list[Column]:
        return [column for column in COLUMNS if of(column[0]) and any(found[column, method][1] for method in methods)]

    def rows(methods, columns) -> dict[tuple[str, ...], list[str]]:
        return {(method,): [cell_text(*found[column, method]) for column in columns] for method in methods}

    claim = columns_with(METHODS, lambda task: task not in OTHER_MODELS)
    others = columns_with(METHODS, lambda task: task in OTHER_MODELS)
    ablated = columns_with(ABLATIONS)
    used = [method for method in METHODS if any(found[column, method][1] for column in others)]
    leads = {
        (ours, peer): [lead(column[0], found[column, ours][1], found[column, peer][1]) for column in claim + others]
        for ours in METHODS if ours not in PEERS
        for peer in PEERS
    }  # fmt: skip
    pairs = [(ours, peer) for ours in IN_SHORT for peer in PEERS]
    in_short = {
        (head(column),): [verdict(column[0], found[column, ours][1], found[column, peer][1]) for ours, peer in pairs]
        for column in claim + others
    }
    all_tables = {
        "The claim": grid([""], [head(column) for column in claim], rows(METHODS, claim)),
        "In short": grid([""], [f"{ours}, beside {peer}" for ours, peer in pairs], in_short),
        "Leads": grid(["lead of", "over"], [head(column) for column in claim + others], leads),
        "Ablations": grid([""], [head(column) for column in ablated], rows([*ABLATED, *ABLATIONS], ablated)),
        "Other models": grid([""], used, {(head(c),): [cell_text(*found[c, method]) for method in used] for c in others}),
    }
    return {title: table for title, table in all_tables.items() if table.count("\n") > 1}


def cell_text(lr: float | None, of: list[float]) -> str:
    return f"{spread(of)} ({lr:g})" if of else ""


def leads_of(task: str, ours: list[float], theirs: list[float]) -> list[float]:
    """Seed by seed, positive where ours is better; empty unless both are there."""
    sign = -1 if TASKS[task].lower_is_better else 1
    return [sign * (a - b) for a, b in zip(ours, theirs)]


def lead(task: str, ours: list[float], theirs: list[float]) -> str:
    return spread(leads_of(task, ours, theirs), "+")


def verdict(task: str, ours: list[float], theirs: list[float]) -> str:
    """`ahead` or `behind` by a lead larger than its spread, else `equal`; `undefined` if a value is, as when a run diverged
    or gave all pairs one score, which has no correlation; "" unless both are there."""
    of = leads_of(task, ours, theirs)
    if not of or any(map(math.isnan, of)):
        return spread(of)
    if abs(statistics.mean(of)) <= statistics.stdev(of) + 1e-9:  # ties are common with accuracies of three seeds
        return "equal"
    return f"ahead, {spread(of)}" if statistics.mean(of) > 0 else f"behind, {spread([-x for x in of])}"


def spread(of: list[float], sign: str = "") -> str:
    if any(map(math.isnan, of)):
        return "undefined"
    return f"{statistics.mean(of):{sign}.4f} ± {statistics.stdev(of):.4f}" if of else ""


def figure(path: pathlib.Path) -> None:
    """A panel a column: every seed a dot, their mean a bar, a row a method; right is better. What is undefined has neither."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = {}
    for column in COLUMNS:
        found = {method: of for method in METHODS if (of := values((*column, method))[1])}
        if len(found) > 1:
            columns[column] = found
    if not columns:
        raise finetune.UserError(f"{FOLDER} has no task yet in which two methods are through")
    wide = min(len(columns), 4)
    high = math.ceil(len(columns) / wide)
    drawn, axes = plt.subplots(high, wide, figsize=(1.2 + 2.4 * wide, 2.4 * high), layout="constrained", sharey=True, squeeze=False)
    for ax in axes.flat[len(columns) :]:
        ax.remove()
    names = [method for method in METHODS if any(method in found for found in columns.values())]
    for ax, (column, found) in zip(axes.flat, columns.items()):
        for method, of in found.items():
            at, color = names.index(method), "#000000" if method in PEERS else "#d95f02"
            ax.plot(of, [at] * len(of), "o", color=color, alpha=0.5, markersize=5)
            ax.plot([statistics.mean(of)] * 2, [at - 0.3, at + 0.3], color=color, linewidth=2)
        ax.set_title(head(column), fontsize="small")
        ax.locator_params(axis="x", nbins=4)
        if TASKS[column[0]].lower_is_better:
            ax.invert_xaxis()
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


def main() -> None:
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    parsers = parser.add_subparsers(dest="do", required=True)
    run = parsers.add_parser("run", help="make the runs that are missing")
    for path, what in PATHS.items():
        run.add_argument(f"--{path}", help=what)
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    run.add_argument("--settings", nargs="+", choices=("paper", "freeze"), default=["paper", "freeze"])
    run.add_argument("--methods", nargs="+", choices=OPTIONS, default=list(METHODS))
    run.add_argument("--lanes", type=finetune.number(int, 1), default=2, help="so many at a time, which share the cores")
    run.add_argument(
        "--bf16", action="store_true", help="mixed precision: half the time on a CPU with bf16 instructions, far more on others"
    )
    parsers.add_parser("table", help="print the tables of those there are")
    drawn = parsers.add_parser("figure", help="draw them")
    drawn.add_argument("file", type=pathlib.Path, help="a .png")
    args = parser.parse_args()
    if args.do == "table":
        print("\n\n".join(f"{title}\n\n{table}" for title, table in tables().items()))
        return
    if args.do == "figure":
        if args.file.suffix != ".png":
            parser.error(f"{args.file} should be a .png")
        finetune.check_writable("file", args.file.parent)
        figure(args.file)
        return
    for task in args.tasks:
        for path in TASKS[task].paths:
            if getattr(args, path) is None:
                parser.error(f"task {task} needs --{path}: {PATHS[path]}")
        if not set(args.settings) & set(TASKS[task].settings):
            parser.error(f"task {task} has no setting {', '.join(args.settings)}, only {', '.join(TASKS[task].settings)}")
    cells = [(t, s, m) for t in args.tasks for s in TASKS[t].settings if s in args.settings for m in args.methods]
    check_precision(cells, args.bf16)
    run_all(cells, {path: getattr(args, path) for path in PATHS}, args.lanes, args.bf16)


if __name__ == "__main__":
    finetune.run(main)
