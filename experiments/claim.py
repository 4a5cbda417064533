"""The claim, measured: SparseGrad beside full fine-tuning, LoRA and MeProp, by one protocol.

    python -m experiments.claim run --glue DIR --tasks sst2                      the claim's runs that are not stored yet
    python -m experiments.claim run --glue DIR --oasst FILE --tasks mrpc --bf16  the same in mixed precision
    python -m experiments.claim table                                            the tables, from the stored runs
    python -m experiments.claim figure FILE                                      the figure, from the stored runs
    python -m experiments.claim costs --glue DIR --oasst FILE                    speed and memory; on an idle machine

A cell is a task, a setting and a method. In the setting `paper` all but the MLP linears trains
densely; in `freeze` only the method and the head train. With `, head` the head trains alone for
HEAD_STEPS before that, by every method. Each cell first looks for its learning
rate: the one with the lowest loss on a held-out part of the training set, seed 0. The rates go
from 1e-5 to 1e-1 in steps of about three. The search begins with four of them, and tries more
until the best has a neighbour on both sides or is the first or last of all. Then SEEDS train at
that rate, and are measured on the dev set.

A run is `glue_run.py` or `llama_run.py` without a hub, so with MiniLM or SmolLM2, or `vit.py` or
`gpt2.py`. Its results are a line of results/claim.jsonl.
"""

import concurrent.futures
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import threading
from typing import NamedTuple

import finetune
from experiments.variants import OF_PEFT  # peers that the paper leaves out

FILE = pathlib.Path(__file__).parent / "results" / "claim.jsonl"
DIVERGED = 3  # the exit code of such a run
SETTINGS = ("paper", "freeze", "paper, head", "freeze, head")
HEAD_STEPS = 100


class Task(NamedTuple):
    command: str  # what python is given; {glue} stands for what --glue gives
    held_out: int  # training rows, trees or people to choose the learning rate on
    metric: str
    narrow_rank: int  # at which a core on the narrow side has 1 % of a linear's entries
    settings: tuple[str, ...] = ("freeze", "freeze, head")

    @property
    def lower_is_better(self) -> bool:
        return self.metric == "eval_loss"


TASKS = {
    "sst2": Task("glue_run.py --task sst2 --data {glue} --max-train-samples 8000 --epochs 1 --schedule linear",
                 1000, "eval_accuracy", 4, SETTINGS),
    "mrpc": Task("glue_run.py --task mrpc --data {glue} --epochs 3 --schedule linear",
                 400, "eval_f1", 4, SETTINGS),
    "oasst": Task("llama_run.py --data {oasst} --top-ranked", 30, "eval_loss", 6, ("freeze",)),
    "chat": Task("llama_run.py --max-length 256", 30, "eval_loss", 6, ("freeze",)),
    "t5": Task("glue_run.py --task sst2 --model {t5} --data {glue} --max-train-samples 4000 --epochs 1 --schedule linear",
               1000, "eval_accuracy", 5),
    "vit": Task("-m experiments.vit --model {vit} --data {images}", 800, "eval_accuracy", 4),
    "gpt2": Task("-m experiments.gpt2 --model {gpt2} --data {counts}", 20, "eval_loss", 3, ("freeze",)),
}  # fmt: skip
OTHER_MODELS = ("t5", "vit", "gpt2")  # beyond the paper's
COLUMNS = [(task, setting) for task in TASKS for setting in TASKS[task].settings]
FRESH = [column for column in COLUMNS if not column[1].endswith(", head")]
COMPARED = {  # options; all at 1 % of a linear, or LoRA's rank nearest to it
    "ft": "--method ft",
    "lora": "--method lora --k 0.01",
    "meprop": "--method meprop --k 0.01",
    "sparsegrad": "--method sparsegrad --k 0.01",
    "own": "--method sparsegrad --k 0.01 --share layer",
    "own, rank 128": "--method sparsegrad --k 0.01 --share layer --rank 128",
    "cross": "--method sparsegrad --k 0.01 --share layer --rank 256 --support fixed",
    "cross, complete": "--method sparsegrad --k 0.01 --share layer --support fixed",
    "narrow, all entries": "--method sparsegrad --k 1.0 --sides narrow --rank {}",
    **{method: f"--method lora --k 0.01 @{method}" for method in OF_PEFT},  # what follows an @ is a change of variants.py
}
PEERS = tuple(method for method in finetune.METHODS if method != "sparsegrad")
OWN, CROSS = COMPARED["own, rank 128"], COMPARED["cross"]
ABLATIONS = {  # of one of ABLATED, a thing or two changed in each
    "own, rank 128, random": f"{OWN} @random",
    "own, rank 128, mixed": f"{OWN} @mixed",
    "own, random": f"{COMPARED['own']} @random",
    "own, rank 128, refreshed": f"{OWN} @refreshed",
    "own, one moment": f"{COMPARED['own']} --adaptivity 0",
    "own, rank 128, one moment": f"{OWN} --adaptivity 0",
    "own, rank 128, half moment": f"{OWN} --adaptivity 0.5",
    "own, rank 128, core rate 0.3": f"{OWN} @core-rate=0.3",
    "own, rank 128, core rate 3": f"{OWN} @core-rate=3",
    "own, rank 128, 5 steps": f"{OWN} --basis-steps 5",
    "own, rank 128, one pass": f"{OWN} --basis-steps 120",
    "own, rank 77, all entries": "--method sparsegrad --k 1.0 --share layer --rank 77",
    "own, narrow": f"{COMPARED['own']} --sides narrow",
    "cross, one moment": f"{CROSS} --adaptivity 0",
    "cross, half moment": f"{CROSS} --adaptivity 0.5",
    "cross, 5 steps": f"{CROSS} --basis-steps 5",
    "cross, one pass": f"{CROSS} --basis-steps 120",
    "cross, k shared out": f"{CROSS} @k-shared-out",
    "cross, root rows": f"{CROSS} @root-rows",
    "cross, corner": f"{CROSS} @corner",
    "cross, mean gradient": f"{CROSS} @mean-gradient",
    "cross, shared": "--method sparsegrad --k 0.01 --rank 256 --support fixed",
    "shared, transposed": f"{COMPARED['sparsegrad']} @transposed",
    "shared, k 10 %": "--method sparsegrad --k 0.1",
    "shared, k 100 %": "--method sparsegrad --k 1.0",
}
AMONG = {  # whose leads are told beside the ablations' results, and over what
    "own, rank 128, random": ("own, rank 128",),
    "own, random": ("own",),
    "own, rank 128, mixed": ("own, rank 128",),
    "own, rank 128, one moment": ("own, rank 128",),
    "own, rank 128, half moment": ("own, rank 128", *PEERS),
    "own, one moment": ("own",),
    "own": ("sparsegrad",),
    "own, rank 128": ("sparsegrad",),
    "cross": ("sparsegrad", "own, rank 128"),
    **dict.fromkeys(("cross, complete", *(change for change in ABLATIONS if change.startswith("cross, "))), ("cross",)),
    **dict.fromkeys(("cross, one moment", "cross, half moment"), ("cross", *PEERS)),
}
SMALL = {  # at 0.1 %, where LoRA's least rank is more than twice as many numbers
    "lora, rank 1": "--method lora --rank 1",
    "meprop, k 0.1 %": "--method meprop --k 0.001",
    "shared, k 0.1 %": "--method sparsegrad --k 0.001",
    "own, rank 128, k 0.1 %": "--method sparsegrad --k 0.001 --share layer --rank 128",
    "cross, k 0.1 %": "--method sparsegrad --k 0.001 --share layer --rank 256 --support fixed",
}
TARGETED = ("lora", "meprop", "cross")
TARGETS = {  # as many entries as 1 % of the MLP's linears: MiniLM and SmolLM2 have half as many weights in the attention
    f"{method}, {target}": COMPARED[method].replace("0.01", f"{k} --target {target}")
    for target, k in (("attention", 0.02), ("all", 0.02 / 3))
    for method in TARGETED
}
HEADED, PROBED = ("ft", "lora", "meprop", "cross"), (30, 300)  # beside HEAD_STEPS, to choose it by
HEADS = {f"{m}, {steps} head steps": f"{COMPARED[m]} --head-steps {steps}" for m in HEADED for steps in PROBED}
HEADS["ft, head alone"] = f"--method ft --head-steps {HEAD_STEPS} --max-steps 1"  # at a rate of 0
WATCHED = {"cross, watched": f"{CROSS} @watched"}  # what its entries hold of gradients as training goes on
STUDIED = COMPARED | ABLATIONS | SMALL | TARGETS | HEADS | WATCHED
ABLATED = ("sparsegrad", "own", "own, rank 128", "cross")
IN_SHORT = ("sparsegrad", "own, rank 128", "cross")  # the kinds of SparseGrad whose leads are told in short
PATHS = {
    "glue": "GLUE's folder, with SST-2 and MRPC",
    "oasst": "OpenAssistant's messages, a jsonl file",
    "t5": "a T5 with its tokenizer, a folder that rebuild.py makes",
    "vit": "a ViT or DINOv2, a folder that rebuild.py makes",
    "images": "grey images, comma-separated, the class last in a row",
    "gpt2": "a GPT-2 with its genera, a folder that rebuild.py makes",
    "counts": "counts of genera in samples, comma-separated",
}
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FROM = {"paper": 3e-5, "freeze": 3e-4}  # four rates from here on, at first
SEEDS = (3, 4, 5)  # SST-2's 0 to 2 were seen before

Cell = tuple[str, str, str]  # task, setting, method
Column = tuple[str, str]  # task, setting

# ---------------------------------------------------------------------------------- runs


class Run(NamedTuple):
    task: str
    setting: str
    method: str
    lr: float
    seed: int
    held_out: bool

    def command(self, paths: dict[str, str], output: str, bf16: bool = False) -> list[str]:
        task, (options, _, change) = TASKS[self.task], STUDIED[self.method].partition(" @")
        script, *words = (word.format(**paths) for word in task.command.split())
        changed = ["-m", "experiments.variants", change] if change else []
        words = [sys.executable, *changed, script, *words, *options.format(task.narrow_rank).split()]
        words += ["--lr", f"{self.lr:g}", "--seed", str(self.seed), "--output-dir", output]
        words += ["--freeze"] * (self.setting.startswith("freeze") and script == "glue_run.py")  # the others do nothing else
        words += ["--head-steps", str(HEAD_STEPS)] * self.setting.endswith("head")
        words += (["--dtype", "bfloat16"] if script == "llama_run.py" else ["--bf16"]) * bf16
        return words + ["--held-out", str(task.held_out)] * self.held_out


class Study(dict):
    """Run -> its results, or its arguments and how it "diverged": the lines of a file."""

    def __init__(self, path: pathlib.Path = FILE):
        self.path, self.lock = path, threading.Lock()
        if path.exists():
            with open(path, encoding="utf-8") as file:
                self.update((Run(*(record[field] for field in Run._fields)), record) for record in map(json.loads, file))

    def add(self, run: Run, results: dict) -> None:
        """Keep what a run came to and append its line; several lanes may do so at once."""
        record = run._asdict() | results
        with self.lock:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            self[run] = record

    def rate(self, cell: Cell) -> tuple[float | None, list[Run]]:
        """(the chosen learning rate, []), or (None, the runs that are missing to choose it)."""
        low = RATES.index(FROM[cell[1].partition(",")[0]])
        high = low + 4
        while True:
            runs = [Run(*cell, lr, 0, True) for lr in RATES[low:high]]
            if to_choose := [run for run in runs if run not in self]:
                return None, to_choose
            losses = [self[run].get("metrics", {}).get("eval_loss", math.inf) for run in runs]
            best = losses.index(min(losses))
            if best == 0 and low > 0:
                low -= 1
            elif best == len(runs) - 1 and high < len(RATES):
                high += 1
            else:
                return runs[best].lr, []

    def missing(self, cell: Cell) -> list[Run]:
        lr, to_choose = self.rate(cell)
        return to_choose or [run for seed in SEEDS if (run := Run(*cell, lr, seed, False)) not in self]

    def outcome(self, cell: Cell) -> list[float]:
        """What each of SEEDS came to, NaN if it diverged; [] unless all runs of the cell are there."""
        if self.missing(cell):
            return []
        results = [self[Run(*cell, self.rate(cell)[0], seed, False)] for seed in SEEDS]
        return [result.get("metrics", {}).get(TASKS[cell[0]].metric, math.nan) for result in results]


def make(run: Run, paths: dict[str, str], threads: int, bf16: bool = False, options: tuple[str, ...] = ()) -> dict:
    """Run it, with further `options`; its results, or its arguments and how it "diverged". UserError if it failed otherwise."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [*run.command(paths, f"{folder}/run", bf16), *options], env=environment, capture_output=True, text=True
        )
        if done.returncode not in (0, DIVERGED):
            raise finetune.UserError(f"{run} failed: {done.stderr.strip()[-500:]}")
        if done.returncode == 0:
            results = json.loads(pathlib.Path(folder, "run", "results.json").read_text(encoding="utf-8"))
        else:
            arguments = json.loads(pathlib.Path(folder, "run", "arguments.json").read_text(encoding="utf-8"))
            results = {"arguments": arguments, "diverged": done.stderr.strip().splitlines()[-1]}
    for told in (results["arguments"], results.get("used", {})):  # no paths of this machine
        told |= {key: os.path.basename(text) for key, text in told.items() if isinstance(text, str) and os.path.isabs(text)}
    results["arguments"]["output_dir"] = None  # it was a temporary one
    if change := STUDIED[run.method].partition(" @")[2]:
        results["arguments"]["change"] = change  # the script does not know
    return results


def check_precision(study: Study, cells: list[Cell], bf16: bool) -> None:
    """UserError if a column of `cells` has runs in the other precision already: its methods would not compare."""
    for run, results in study.items():
        stored = results["arguments"]["bf16"]
        if stored != bf16 and run[:2] in {cell[:2] for cell in cells}:
            what = "in mixed precision: pass --bf16" if stored else "in fp32: leave --bf16 out"
            raise finetune.UserError(f"the runs of {run.task}, {run.setting} that are stored are {what}, or move them away")


def run_all(study: Study, cells: list[Cell], paths: dict[str, str], lanes: int, bf16: bool = False) -> None:
    """Every missing run of `cells`, `lanes` cells at a time."""

    def fill(cell: Cell) -> None:
        while missing := study.missing(cell):
            print(missing[0], flush=True)
            study.add(missing[0], make(missing[0], paths, max(1, (os.cpu_count() or 1) // lanes), bf16))

    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        for _ in pool.map(fill, cells):  # raises what a lane raised
            pass


COSTLY = ("ft", "lora", "meprop", "sparsegrad", "own, rank 128", "cross")
COSTS, ROUNDS, SHORT = FILE.with_name("costs.jsonl"), 3, ("--max-steps", "20", "--held-out", "8")


def cost_runs(task: str, method: str) -> list[Run]:
    return [Run(task, "freeze", method, 1e-4, seed, True) for seed in range(ROUNDS)]


def measure_costs(costs: Study, paths: dict[str, str]) -> None:
    """Short runs, each method in turn, several times."""
    for task in ("sst2", "oasst"):
        for run in (run for runs in zip(*(cost_runs(task, method) for method in COSTLY)) for run in runs):
            if run not in costs:
                print(run, flush=True)
                costs.add(run, make(run, paths, os.cpu_count() or 1, task != "sst2", SHORT))


# -------------------------------------------------------------------------------- tables


def grid(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" if row else "|" + "---|" * len(heads) for row in [heads, [], *rows])


def tables(study: Study) -> dict[str, str]:
    """Title -> Markdown table, of those with a row. "Leads" are SparseGrad's, seed by seed, and "In short" their verdicts;
    the others hold mean ± standard deviation over the seeds (learning rate)."""
    found = {(column, method): study.outcome((*column, method)) for column in COLUMNS for method in STUDIED}

    def columns_of(methods, wanted=COLUMNS) -> list[Column]:
        return [column for column in wanted if any(found[column, method] for method in methods)]

    def cell(column: Column, method: str) -> str:
        of = found[column, method]
        return f"{spread(of)} ({study.rate((*column, method))[0]:g})" if of else ""

    def leads(column: Column, ours: str, peer: str, there: Column | None = None) -> list[float]:
        """Seed by seed, positive where ours is better, over a peer in the same column or `there`; empty unless both are there."""
        sign = -1 if TASKS[column[0]].lower_is_better else 1
        return [sign * (a - b) for a, b in zip(found[column, ours], found[there or column, peer])]

    def values(columns: list[Column], methods) -> tuple:
        """Heads, and a row a method."""
        return ["", *map(head, columns)], {(m,): [cell(c, m) for c in columns] for m in methods}

    def told(pairs, columns: list[Column]) -> tuple:
        return ["lead of", "over", *map(head, columns)], {p: [spread(leads(c, *p), "+") for c in columns] for p in pairs}

    def probes(task: str, method: str) -> list[str]:
        """Held-out losses at the method's rate, without a trained head, and with one."""
        at = {0: ("freeze", method), HEAD_STEPS: ("freeze, head", method)}
        at |= {steps: ("freeze", f"{method}, {steps} head steps") for steps in PROBED}
        runs = [Run(task, *at[steps], study.rate((task, "freeze", method))[0], 0, True) for steps in sorted(at)]
        losses = [study.get(run, {}).get("metrics", {}).get("eval_loss") for run in runs]
        return [f"{loss:.3f}" if loss else "" for loss in losses] if any(losses[1:]) else []

    every, ablated = columns_of(COMPARED, FRESH), columns_of(ABLATIONS)
    trained = {to: (to[0], to[1].removesuffix(", head")) for to in columns_of(COMPARED) if to not in FRESH}
    claim, others = ([c for c in every if (c[0] in OTHER_MODELS) == beyond] for beyond in (False, True))
    used = [method for method in COMPARED if any(found[column, method] for column in others)]
    pairs = [(ours, peer) for ours in COMPARED if ours not in (*PEERS, *OF_PEFT) for peer in PEERS]
    short = [(ours, peer) for ours, peer in pairs if ours in IN_SHORT]
    made = {
        "The claim": values(claim, COMPARED),
        "In short": (["", *(f"{ours}, beside {peer}" for ours, peer in short)],
                     {(head(c),): [verdict(leads(c, *pair)) for pair in short] for c in every}),
        "Leads": told((*pairs, *(("cross", peer) for peer in OF_PEFT)), every),
        "Ablations": values(ablated, (*ABLATED, *ABLATIONS)),
        "Among them": told(((ours, over) for ours in AMONG for over in AMONG[ours]), ablated),
        "While training": (["", "beginning", "middle", "end"],
                           {(f"{task}, {setting}",): [f"{of['fixed']:.2f}, {of['best']:.2f}" for of in results["held"]]
                            for (task, setting, *_), results in study.items() if "held" in results}),
        "Head steps": (["", "", *map(str, sorted((0, HEAD_STEPS, *PROBED)))],
                       {(task, m): probes(task, m) for task in ("sst2", "mrpc", "vit") for m in HEADED}),
        "A trained head": (["", *(part for to in trained for part in (head(trained[to]), head(to), "gain"))],
                           {(m,): [part for to in trained
                                   for part in (cell(trained[to], m), cell(to, m), spread(leads(to, m, m, trained[to]), "+"))]
                            for m in HEADED}),
        "Which linears": values(columns_of(TARGETS), (*TARGETED, *TARGETS)),
        "At 0.1 %": values(columns_of(SMALL), SMALL),
        "Other models": (["", *used], {(head(c),): [cell(c, m) for m in used] for c in others}),
    }  # fmt: skip
    full = {title: [[*name, *cells] for name, cells in rows.items() if any(cells)] for title, (_, rows) in made.items()}
    return {title: grid(made[title][0], full[title]) for title in made if full[title]}


def cost_table(costs: Study) -> str:
    """What each method takes; ratios are the median over rounds, and their range."""
    heads = ["", "", "trained numbers", "optimizer, MB", "file, MB", "steps a second, LoRA = 1", "peak, LoRA = 1", "search, s"]
    rows = []
    for task, method in ((task, method) for task in dict.fromkeys(run.task for run in costs) for method in COSTLY):
        mine, loras = ([costs[run] for run in cost_runs(task, of)] for of in (method, "lora"))
        speed, peak = ([a[key] / b[key] for a, b in zip(mine, loras)] for key in ("steps_per_second", "peak_memory_mib"))
        sizes = (f"{mine[0][key] / 1e6:.1f}" if mine[0][key] else "" for key in ("optimizer_bytes", "file_bytes"))
        ratios = (f"{statistics.median(of):.2f} ({min(of):.2f} to {max(of):.2f})" for of in (speed, peak))
        search = statistics.median(results["basis_seconds"] for results in mine)
        rows.append([task, method, f"{mine[0]['trainable_parameters']:,}", *sizes, *ratios, f"{search:.0f}" if search else ""])
    return grid(heads, rows)


def head(column: Column) -> str:
    task, setting = column
    metric = TASKS[task].metric.removeprefix("eval_")
    return f"{task}, {setting} ({metric}{', lower is better' * TASKS[task].lower_is_better})"


def spread(of: list[float], sign: str = "") -> str:
    """Mean ± standard deviation. `undefined` if a value is: a run diverged."""
    if any(map(math.isnan, of)):
        return "undefined"
    return f"{statistics.mean(of):{sign}.4f} ± {statistics.stdev(of):.4f}" if of else ""


def verdict(leads: list[float]) -> str:
    """`ahead` or `behind` if the mean lead is larger than its standard deviation, else `equal`."""
    if not leads or any(map(math.isnan, leads)):
        return spread(leads)
    if abs(statistics.mean(leads)) <= statistics.stdev(leads) + 1e-9:  # ties are common with accuracies of three seeds
        return "equal"
    return f"ahead, {spread(leads)}" if statistics.mean(leads) > 0 else f"behind, {spread([-lead for lead in leads])}"


def figure(study: Study, path: pathlib.Path) -> None:
    """A panel a column: every seed a dot, their mean a bar, a row a method; right is better. What is undefined has neither.
    OF_PEFT would be too far away to see the others apart."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [method for method in COMPARED if method not in OF_PEFT]
    panels = {column: {m: of for m in shown if (of := study.outcome((*column, m)))} for column in FRESH}
    panels = {column: found for column, found in panels.items() if len(found) > 1}
    names = [method for method in shown if any(method in found for found in panels.values())]
    wide = min(len(panels), 4)
    high = math.ceil(len(panels) / wide)
    drawn, axes = plt.subplots(high, wide, figsize=(1.2 + 2.4 * wide, 2.4 * high), layout="constrained", sharey=True, squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, (column, found) in zip(axes.flat, panels.items()):
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
    drawn.savefig(path, dpi=110)


def main() -> None:
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    parsers = parser.add_subparsers(dest="do", required=True)
    run = parsers.add_parser("run", help="make the runs that are missing")
    for name, what in PATHS.items():
        run.add_argument(f"--{name}", help=what)
    run.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    run.add_argument("--settings", nargs="+", choices=SETTINGS, default=["paper", "freeze"])
    run.add_argument("--methods", nargs="+", choices=STUDIED, default=[m for m in COMPARED if m not in OF_PEFT])
    run.add_argument("--lanes", type=int, default=2, help="cells at a time, which share the cores")
    half = "mixed precision: half the time on a CPU with bf16 instructions, far more on others"
    run.add_argument("--bf16", action="store_true", help=half)
    parsers.add_parser("table", help="print the tables of the stored runs")
    parsers.add_parser("figure", help="draw them").add_argument("file", type=pathlib.Path, help="a picture, such as claim.png")
    costs = parsers.add_parser("costs", help="measure what each method takes, and print it")
    for name in ("glue", "oasst"):
        costs.add_argument(f"--{name}", help=PATHS[name])
    args, study = parser.parse_args(), Study()
    if args.do == "table":
        print("\n\n".join(f"{title}\n\n{table}" for title, table in tables(study).items()))
    elif args.do == "figure":
        figure(study, args.file)
    elif args.do == "costs":
        measure_costs(Study(COSTS), vars(args))
        print(cost_table(Study(COSTS)))
    else:
        paths = {name: path for name in PATHS if (path := getattr(args, name)) is not None}
        for task in args.tasks:
            try:
                TASKS[task].command.format(**paths)
            except KeyError as error:
                parser.error(f"task {task} needs --{error.args[0]}: {PATHS[error.args[0]]}")
        cells = [(t, s, m) for t in args.tasks for s in TASKS[t].settings if s in args.settings for m in args.methods]
        check_precision(study, cells, args.bf16)
        run_all(study, cells, paths, args.lanes, args.bf16)


if __name__ == "__main__":
    finetune.run_script(main)
