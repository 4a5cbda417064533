"""Steps per second, launches and peak memory of every method, side by side in one process.

    python -m experiments.benchmark --arch bert-base --save NAME    measure; a line of results/benchmark.jsonl
    python -m experiments.benchmark --table NAME ...                print the tables of stored lines, or of all
    python -m experiments.benchmark --compare NAME ...              print speeds and peaks, LoRA = 1, a row a line
    python -m experiments.benchmark --sweep                         measure cost against tokens, width, k and rank
    python -m experiments.benchmark --figure                        draw what --sweep has stored

Architectures are real, from their configs; weights and tokens are random, so nothing is downloaded.
The methods share one set of frozen weights and take their steps in turn, so that a machine that
slows down does so for all of them. Times are medians with quartiles. Memory is what tensors take,
counted, not the process's. Launches are the operators of a step that would each start a kernel on
a GPU, views and the like left out; a CPU makes dropout and attention of more of them than a GPU.

A method is a name and its options, as in `sparsegrad:narrow:rank=32`:

    frozen      nothing trains: the forward and the gradients of activations, the floor
    ft          the MLP linears train densely
    lora        PEFT's LoRA on the same linears; `rank=R`, else the one whose size is nearest to k
    shira       PEFT's SHiRA: a random set of as many entries, fixed
    meprop      top-k entries of the gradient in the original space
    sparsegrad  complete bases shared by a role, as in the paper; `rank=R`: their leading R columns;
                `narrow`: the shorter side of a weight alone; `k=K`, `k=all`: other than --k;
                `fixed`: the entries to train chosen beforehand, by the spectra of the bases
    literal     the paper's Table 2 as written: all activations rotated, whatever the sizes

`meprop` and `sparsegrad` cut gradients in the optimizer's step; with `cut=backward` as the paper does,
in the backward. The first edition of sparsegrad.py, up to commit 923cb81, cut in the backward only.
"""

import argparse
import copy
import ctypes
import gc
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Iterable, Iterator

import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import finetune
import llama_run
import sparsegrad
from experiments.claim import grid
from sparsegrad import Basis

RESULTS = pathlib.Path(__file__).parent / "results"
OPTIONS = dict(frozen=(), ft=(), lora=("rank",), shira=(), meprop=("k", "cut"), literal=())  # of each method
OPTIONS["sparsegrad"] = ("rank", "k", "narrow", "fixed", "cut")
SIDE_BY_SIDE = ["frozen", "ft", "lora", "shira", "meprop"]
SIDE_BY_SIDE += ["sparsegrad:narrow:rank=8:k=all", "sparsegrad:narrow:rank=32"]  # train, and update, about as much as LoRA
SIDE_BY_SIDE += ["sparsegrad:rank=128", "sparsegrad:rank=256:fixed", "sparsegrad:narrow", "sparsegrad", "literal"]
SEARCHES = {"complete, exact": {}, "narrow, exact": {"sides": "narrow"}}
SEARCHES["each layer's own, rank=128"] = {"share": "layer", "rank": 128}
CONFIGS = {
    "bert-base": transformers.BertConfig,
    "roberta-base": lambda: transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "llama-2-7b": lambda: transformers.LlamaConfig(max_position_embeddings=4096),  # else the 7B model's by default
    "minilm": lambda: transformers.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SWEEP = {  # one setting varied at a time, from two blocks of MiniLM, 32 x 128 tokens, k = 1 %
    "tokens": ([128, 512, 2048, 8192, 16384], ["frozen", "ft", "lora", "sparsegrad:narrow:rank=32", "sparsegrad"]),
    "width": ([128, 256, 512, 1024], ["frozen", "ft", "lora", "sparsegrad:narrow:rank=32", "sparsegrad"]),
    "k": ([0.0001, 0.001, 0.01, 0.1, 1.0], ["meprop:k={}", "sparsegrad:narrow:rank=32:k={}", "sparsegrad:k={}"]),
    "rank": ([4, 16, 64, 256, 384], ["lora:rank={}", "sparsegrad:narrow:rank={}", "sparsegrad:rank={}"]),
}

# ------------------------------------------------------------------- models and batches


def make_config(arch: str, layers: int | None) -> transformers.PretrainedConfig:
    """The real architecture, cut to `layers` blocks if a number is given."""
    config = CONFIGS[arch]()
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.use_cache = False
    return config


def make_model(config: transformers.PretrainedConfig, args: argparse.Namespace) -> nn.Module:
    """Random weights in `args.dtype`, train mode, nothing trainable."""
    causal = config.model_type == "llama"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    torch.set_default_dtype(DTYPES[args.dtype])  # made in it: a model in fp32 might not fit
    with torch.device(args.device):
        model = auto.from_config(config)
    torch.set_default_dtype(torch.float32)
    return model.train().requires_grad_(False)


def make_batches(config: transformers.PretrainedConfig, args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    """Random tokens without padding, for ever."""
    while True:
        ids = torch.randint(3, config.vocab_size, (args.batch, args.seq), device=args.device)
        labels = ids if config.model_type == "llama" else torch.randint(0, 2, (args.batch,), device=args.device)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def adapted(model: nn.Module) -> list[str]:
    """Names of the linears that the paper adapts: all MLP linears of BERT, every third block's of LLaMA."""
    return list(llama_run.every_nth(model, 3) if model.config.model_type == "llama" else sparsegrad.mlp_linears(model))


def forward(model: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace) -> Tensor:
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bf16"):
        return model(**batch).loss


# ------------------------------------------------------------------------------- methods


class Method:
    """`sparsegrad:rank=128:k=0.001`, read. ArgumentTypeError for a name or an option that there is not."""

    def __init__(self, text: str):
        self.text, (self.name, *options) = text, text.split(":")
        given = dict(option.partition("=")[::2] for option in options)
        if self.name not in OPTIONS or not given.keys() <= set(OPTIONS[self.name]):
            known = ", ".join(":".join([name, *options]) for name, options in OPTIONS.items())
            raise argparse.ArgumentTypeError(f"{text!r} is none of {known}")
        self.rank = int(given["rank"]) if "rank" in given else None
        self.k = finetune.share_or_count(given["k"].replace("all", "1.0")) if "k" in given else None
        self.narrow = "narrow" in given
        self.ways = {"support": "fixed" if "fixed" in given else "topk", "cut": given.get("cut", "step")}

    def basis(self, complete: Basis) -> Basis:
        """What it uses of complete bases."""
        U, V = complete.U[:, : self.rank], complete.V[:, : self.rank]
        if self.narrow:
            return Basis(U) if len(U) <= len(V) else Basis(V=V)
        energies = complete.column_energy, complete.row_energy
        return Basis(U, V, *(None if e is None else e[: self.rank] for e in energies))


class LiteralFunction(torch.autograd.Function):
    """The paper's Table 2, product by product; `core` is its W̃ (out, in)."""

    @staticmethod
    def forward(ctx, x, core, U, V, bias, k):
        ctx.save_for_backward(x, core, U, V)
        ctx.k = k
        core, U, V = (t.to(x.dtype) for t in (core, U, V))
        y = x @ U @ core.T @ V.T  # (T, in) @ (in, in) @ (in, out) @ (out, out)
        return y if bias is None else y + bias.to(y.dtype)

    @staticmethod
    def backward(ctx, dy):
        x, *others = ctx.saved_tensors
        core, U, V = (t.to(x.dtype) for t in others)
        dyv = dy @ V  # (T, out) @ (out, out)
        d_core = dyv.T @ (x @ U)  # (out, T) @ (T, in)
        return dyv @ core @ U.T, sparsegrad.topk_coo(d_core.float(), ctx.k), None, None, None, None


class LiteralLinear(nn.Module):
    def __init__(self, linear: nn.Linear, basis: Basis, k: int):
        super().__init__()
        self.basis, self.bias, self.k = basis, linear.bias, k
        self.core = nn.Parameter(basis.V.T @ linear.weight.float() @ basis.U)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x
        y = LiteralFunction.apply(x.flatten(0, -2), self.core, self.basis.U, self.basis.V, self.bias, self.k)
        return y.unflatten(0, x.shape[:-1])


def build(base: nn.Module, names: list[str], method: Method, bases: dict[str, Basis], args: argparse.Namespace):
    """(model, optimizer): `method` on a copy of `base` that shares the weights that do not
    train. What trains is in fp32: the method's own and the classifier, with `args.rest`
    everything but the MLP weights, as in the paper."""
    linears, mlp = set(names), set(sparsegrad.mlp_linears(base))
    own = {}
    for name, p in base.named_parameters():
        weight_of = name.removesuffix(".weight")
        dense = args.rest and weight_of not in mlp or name.startswith("classifier.") or method.name == "ft" and weight_of in linears
        dense = dense and method.name != "frozen"
        own[id(p)] = nn.Parameter(p.detach().float().clone() if dense else p.detach(), requires_grad=dense)
    model = copy.deepcopy(base, own)  # parameters in `own` are not copied but put in place
    modules = {name: model.get_submodule(name) for name in names}
    if method.name == "frozen":  # the graph begins where the methods' does
        modules[names[0]].register_forward_hook(lambda module, x, y: y.requires_grad_())
    elif method.name in ("lora", "shira"):
        import peft

        entries = sum(round(args.k * m.weight.numel()) for m in modules.values())
        rank = method.rank or finetune.lora_rank(modules.values(), entries)
        config = peft.LoraConfig(r=rank, lora_alpha=rank) if method.name == "lora" else peft.ShiraConfig(r=rank)
        finetune.add_peft(model, config, names)
    elif method.name == "literal":
        for name, linear in modules.items():
            model.set_submodule(name, LiteralLinear(linear, bases[name], round(args.k * linear.weight.numel())))
    elif method.name == "meprop":
        sparsegrad.patch_model(model, None, method.k or args.k, names, **method.ways)
    elif method.name == "sparsegrad":
        cuts = {id(basis): method.basis(basis) for basis in bases.values()}
        sparsegrad.patch_model(model, {name: cuts[id(basis)] for name, basis in bases.items()}, method.k or args.k, **method.ways)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data = p.data.float()  # PEFT's come in the dtype of the weight
    if not trained:
        return model, None
    if method.name in ("meprop", "sparsegrad", "literal"):
        return model, sparsegrad.SparseGradAdamW(trained, lr=1e-5)
    return model, torch.optim.AdamW(trained, lr=1e-5, fused=True)


# ------------------------------------------------------------------------------ measuring


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as CUDA's allocator and jemalloc do. By default the kernel
    clears every large tensor anew, and how often it must is most of what is then measured."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 2**28)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
            libc.mallopt(option, value)
    except OSError:
        print("no glibc: how the allocator behaves is left to the system")


def clock(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of the distinct storages under `tensors`."""
    parts = itertools.chain.from_iterable((t._indices(), t._values()) if t.is_sparse else (t,) for t in tensors)
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in parts}


def held(model: nn.Module, optimizer=None) -> dict[int, int]:
    """Storages of what is there between two steps."""
    states = optimizer.state.values() if optimizer else ()
    state = [t for s in states for t in s.values() if isinstance(t, Tensor)]
    return storages([*model.parameters(), *model.buffers(), *state])


def peak_of(call: Callable[[], None], device: str) -> int:
    """Bytes of tensors, at most, beyond those that were there before `call`."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())), default=0)


class Launches(TorchDispatchMode):
    """Counts the operators called under it that launch a kernel where tensors are on a GPU. Not
    those that return views or no tensors, nor those that allocate or wrap."""

    QUIET = ("_unsafe_view", "set_", "resize_", "_sparse_coo_tensor_with_dims_and_tensors")
    QUIET += ("_record_function_exit",)
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, returns = func.overloadpacket.__name__, func._schema.returns
        new = [r for r in returns if "Tensor" in str(r.type)]
        new = [r for r in new if r.alias_info is None or r.alias_info.is_write]
        quiet = "empty" in name or name in self.QUIET or (returns and not new)
        self.count += not quiet
        return func(*args, **(kwargs or {}))


class Measured:
    """One method under measurement."""

    def __init__(self, method: Method, base: nn.Module, names: list[str], bases: dict[str, Basis], args: argparse.Namespace):
        self.args, self.seconds = args, []
        self.model, self.optimizer = build(base, names, method, bases, args)

    def step(self, batch) -> None:
        forward(self.model, batch, self.args).backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def timed_step(self, batch) -> None:
        start = clock(self.args.device)
        self.step(batch)
        self.seconds.append(clock(self.args.device) - start)

    def saved_bytes(self, batch) -> int:
        """What autograd keeps from forward to backward that was not there before."""
        saved = []

        def pack(t: Tensor) -> Tensor:
            saved.append(t.detach())  # t itself would hold the node that holds it, for ever
            return saved[-1]

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = forward(self.model, batch, self.args)
        known = held(self.model)
        size = sum(size for address, size in storages(saved).items() if address not in known)
        del loss
        return size

    def result(self, batch) -> dict:
        summary = sparsegrad.summary(self.model)
        uncounted = sum(m.core.numel() - m.k for m in self.model.modules() if isinstance(m, LiteralLinear))
        quartiles = statistics.quantiles(self.seconds, n=4, method="inclusive") if len(self.seconds) > 1 else self.seconds * 3
        before = sum(held(self.model, self.optimizer).values())
        with Launches() as launches:
            self.step(batch)
        return {
            "seconds": quartiles[1],
            "quartiles": quartiles[::2],
            "steps": len(self.seconds),
            "launches": launches.count,
            "trainable": summary.core + summary.dense,
            "touched": summary.touched + summary.dense - uncounted,
            "peak_bytes": before + peak_of(lambda: self.step(batch), self.args.device),
            "optimizer_bytes": before - sum(held(self.model).values()),
            "saved_bytes": self.saved_bytes(batch),
        }


def search(base: nn.Module, names: list[str], batches: Iterator, args: argparse.Namespace) -> tuple[dict[str, Basis], dict]:
    """Complete bases, shared by a role, and what finding them (with `--searches`: by each of SEARCHES) costs
    beside training the same linears as long. Peaks are of two steps."""
    steps = list(itertools.islice(batches, args.basis_steps))

    def find(steps: list, options: dict) -> tuple[dict[str, Basis], float, float]:
        """Bases, and the seconds to collect gradients and to decompose."""
        moments = []

        def watched():
            moments.append(clock(args.device))
            yield from steps
            moments.append(clock(args.device))  # asked for one more: all gradients are collected

        bases = sparsegrad.find_bases(
            base, watched(), names, n_steps=len(steps) + 1, lr=args.basis_lr,
            loss_fn=lambda model, batch: forward(model, batch, args), **options,
        )  # fmt: skip
        start, collected = moments
        return bases, collected - start, clock(args.device) - collected

    before, ways, first = sum(held(base).values()), {}, None
    for label, options in SEARCHES.items():
        if options and not args.searches:
            continue
        peak = before + peak_of(lambda options=options: find(steps[:2], options), args.device)
        bases, collecting, decomposing = find(steps, options)
        first = first or bases
        ways[label] = {"collecting": collecting, "decomposing": decomposing, "peak_bytes": peak}
    training = Measured(Method("ft"), base, names, first, argparse.Namespace(**vars(args) | {"rest": False}))
    for batch in steps[:1] + steps:
        training.timed_step(batch)
    return first, {"steps": len(steps), "training": sum(training.seconds[1:]), "ways": ways}


def measure(config: transformers.PretrainedConfig, args: argparse.Namespace) -> dict:
    """One setting: the search for the bases, and every method."""
    torch.manual_seed(0)
    base = make_model(config, args)
    names = adapted(base)
    batches = make_batches(config, args)
    bases, cost = search(base, names, batches, args)
    methods = {method.text: Measured(method, base, names, bases, args) for method in args.methods}
    for number in range(args.warmup + args.repeats):
        for method in methods.values():
            method.timed_step(next(batches)) if number >= args.warmup else method.step(next(batches))
    results = {text: method.result(next(batches)) for text, method in methods.items()}
    return {"linears": len(names), "search": cost, "methods": results}


def sweep(args: argparse.Namespace) -> list[dict]:
    """Cost along each axis of SWEEP, the rest as it stands there."""
    points = []
    for axis, (values, texts) in SWEEP.items():
        for value in values:
            print(f"{axis} {value}", flush=True)
            gc.collect()  # the models before
            config = make_config("minilm", 2)
            chosen = {text: Method(text.format(value)) for text in texts}
            sizes = dict(batch=32, seq=128, basis_steps=1, searches=False, k=0.01, methods=list(chosen.values()))
            if axis == "tokens":
                sizes["batch"] = value // sizes["seq"]
            elif axis == "width":
                config.hidden_size, config.intermediate_size, config.num_attention_heads = value, 4 * value, value // 32
            results = measure(config, argparse.Namespace(**vars(args) | sizes))["methods"]
            points += [{"axis": axis, "value": value, "method": text, **results[chosen[text].text]} for text in texts]
    return points


# ------------------------------------------------------------------------------ reporting


def stored() -> dict[str, dict]:
    """Name -> line of results/benchmark.jsonl, each a measured setting."""
    path = RESULTS / "benchmark.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {line["name"]: line for line in map(json.loads, lines)}


def save(name: str, line: dict) -> None:
    """Store `line` under `name`, in the place of one of that name."""
    lines = stored() | {name: {"name": name, **line}}
    finetune.write_text(RESULTS / "benchmark.jsonl", "".join(json.dumps(line) + "\n" for line in lines.values()))


def setting(line: dict) -> str:
    options = line["options"]
    rest = "the rest trains too" if options["rest"] else "the rest frozen"
    if options.get("return_memory"):  # lines measured before keep_freed_memory became the rule
        rest += ", glibc's allocator as it comes"
    tokens = f"{options['batch']} x {options['seq']} tokens"
    return f"{options['arch']}, {options['layers']} blocks, {tokens}, {options['dtype']}, {rest}"


def ratio(line: dict, a: str | None, b: str | None, key: str = "seconds") -> str:
    """Of two methods of a line; empty if it has not both."""
    m = line["methods"]
    return f"{m[a][key] / m[b][key]:.2f}" if key in m.get(a, ()) and key in m.get(b, ()) else ""


def table(line: dict) -> str:
    """Markdown tables of one measured setting: its methods, and the searches if there were any."""
    methods, machine = line["methods"], line["machine"]
    peers = {name.split(":")[0]: name for name in reversed(methods)}
    if line["options"]["rest"]:
        peers.pop("frozen", None)  # it has no gradients before the first MLP, and is no floor
    lora, full, floor = map(peers.get, ("lora", "ft", "frozen"))
    rows = []
    for name, m in methods.items():
        cells = {"method": f"`{name}`"}
        if "seconds" in m:
            rate, high, low = (f"{1 / s:.3g}" for s in (m["seconds"], *m["quartiles"]))
            cells |= {"steps/s (quartiles)": f"{rate} ({low} to {high})", "LoRA = 1": ratio(line, lora, name)}
            cells |= {"full = 1": ratio(line, full, name), "time, frozen = 1": ratio(line, name, floor)}
        if "launches" in m:  # the first edition's have none
            cells |= {"launches": f"{m['launches']:,}", "launches, LoRA = 1": ratio(line, name, lora, "launches")}
        cells |= {
            f"{key} MiB": f"{m[f'{key}_bytes'] / 2**20:,.0f}" for key in ("peak", "saved", "optimizer") if f"{key}_bytes" in m
        }
        cells |= {head: f"{m[key]:,}" for head, key in (("trainable", "trainable"), ("updated a step", "touched")) if key in m}
        rows.append(cells)
    told = f"{setting(line)}, {machine['gpu'] or machine['cpu']}, {machine['threads']} threads"
    parts = [told, grid(list(rows[0]), [list(cells.values()) for cells in rows])]
    cost = line.get("search", {"steps": 0})
    if cost["steps"] > 2:
        training, rows = cost["training"], []
        parts.append(f"Bases from {cost['steps']} steps; training the same linears for as many takes {training:.1f} s:")
        for label, way in cost["ways"].items():
            beyond = way["collecting"] + way["decomposing"] - training
            seconds = [f"{s:.1f}" for s in (way["collecting"], way["decomposing"], beyond)]
            rows.append([label, *seconds, f"{way['peak_bytes'] / 2**20:,.0f}"])
        heads = ["bases", "collecting, s", "decomposing, s", "beyond training, s", "peak MiB"]
        parts.append(grid(heads, rows))
    return "\n\n".join(parts)


def compare(lines: list[dict]) -> str:
    """A Markdown table, a row a line: each method's steps a second / peak memory, both LoRA = 1."""
    texts = [text for text in dict.fromkeys(text for line in lines for text in line["methods"]) if text != "lora"]
    rows = []
    for line in lines:
        pairs = [(ratio(line, "lora", text), ratio(line, text, "lora", "peak_bytes")) for text in texts]
        rows.append([line["name"], setting(line), *(" / ".join(filter(None, pair)) for pair in pairs)])
    return grid(["stored as", "setting", *(f"`{text}`" for text in texts)], rows)


def figure(points: list[dict], path: pathlib.Path) -> None:
    """Time and peak memory along each axis, both scales logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    drawn, axes = plt.subplots(2, len(SWEEP), figsize=(3.2 * len(SWEEP), 5.6), layout="constrained", sharey="row")
    curves = {}
    for column, (axis, (values, texts)) in zip(axes.T, SWEEP.items()):
        for text in texts:
            label = text.replace(":k={}", "").replace("={}", " as below")
            look = curves[label][0] if label in curves else dict(color=f"C{len(curves)}", marker="xosPD^v*<>"[len(curves)])
            chosen = [p for p in points if p["axis"] == axis and p["method"] == text]
            for ax, key, scale in zip(column, ("seconds", "peak_bytes"), (1000, 2**-20)):
                curves[label] = look, *ax.plot([p["value"] for p in chosen], [scale * p[key] for p in chosen], **look)
        for ax, unit in zip(column, ("ms a step", "peak MiB")):
            ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit if axis == "tokens" else "")
            ax.set_xticks(values, [f"{v:g}" for v in values], rotation=30)
            ax.set_xticks([], minor=True)
            ax.grid(alpha=0.3)
    drawn.legend([line for _, line in curves.values()], list(curves), loc="outside lower center", ncols=5, frameon=False)
    drawn.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------- main


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = finetune.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", choices=CONFIGS, default="bert-base")
    add("--layers", type=int, help="blocks, to fit a small machine; default all")
    add("--methods", type=Method, nargs="+", default=[Method(text) for text in SIDE_BY_SIDE], help="see the top of this file")
    add("--batch", type=int, default=32, help="rows a step, default 32")
    add("--seq", type=int, default=128, help="tokens a row, default 128")
    add("--dtype", choices=DTYPES, default="fp32", help="of frozen weights and activations; what trains is in fp32")
    add("--k", type=float, default=0.01, help="share of each linear that a step updates, default 0.01")
    add("--rest", action="store_true", help="all but the MLP weights trains too, as in the paper")
    add("--repeats", type=int, default=7, help="steps timed of each method, default 7")
    add("--warmup", type=int, default=3, help="steps before them, default 3")
    add("--basis-steps", type=int, default=30, help="steps that the bases are made from, default 30")
    add("--basis-lr", type=float, default=5e-5, help="their learning rate, default 5e-5")
    add("--searches", action="store_true", help="also find bases for one side, and for each layer")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--save", metavar="NAME", help="store what was measured under this name")
    add("--table", nargs="*", choices=stored(), metavar="NAME", help="measure nothing, print the tables of stored lines, or of all")
    add("--compare", nargs="*", choices=stored(), metavar="NAME", help="measure nothing, print speeds and peaks, LoRA = 1")
    add("--sweep", action="store_true", help="measure cost against tokens, width, k and rank; sizes are the sweep's own")
    add("--figure", action="store_true", help="measure nothing, draw what --sweep has stored")
    args = parser.parse_args(arguments)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main() -> None:
    args, lines = parse(), stored()
    if args.table is not None:
        print("\n\n".join(table(lines[name]) for name in args.table or lines))
    elif args.compare is not None:
        print(compare([lines[name] for name in args.compare or lines]))
    elif args.figure:
        figure(json.loads((RESULTS / "sweep.json").read_text(encoding="utf-8"))["points"], RESULTS / "scaling.png")
    elif args.sweep:
        keep_freed_memory()
        used = {name: getattr(args, name) for name in ("dtype", "rest", "repeats", "warmup")}
        finetune.write_json(RESULTS / "sweep.json", {"options": used, "points": sweep(args), **finetune.provenance()})
    else:
        keep_freed_memory()
        config = make_config(args.arch, args.layers)
        chosen = ("arch", "batch", "seq", "dtype", "k", "rest", "repeats", "warmup", "basis_lr")
        options = {name: getattr(args, name) for name in chosen} | {"layers": config.num_hidden_layers}
        line = {"options": options, **measure(config, args), **finetune.provenance()}
        print(table(line))
        if args.save:
            save(args.save, line)


if __name__ == "__main__":
    finetune.run_script(main)
