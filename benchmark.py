"""Steps per second, launches and peak memory of every method, side by side in one process.

    python benchmark.py --arch bert-base --batch 32 --seq 128 --json bert-base.json
    python benchmark.py --table bert-base.json ...        the README's tables, from such files
    python benchmark.py --goals bert-base.json ...        its ratios to LoRA, the floor and full fine-tuning
    python benchmark.py --sweep sweep.json                cost against tokens, width, k and rank
    python benchmark.py --figure sweep.json sweep.png     the README's figure, from that file

The architectures are the real ones, from their configs, with random weights and random
tokens: nothing is downloaded. The methods share one set of frozen weights and take their
steps in turn, so that a machine that slows down does so for all of them; times are medians
with their quartiles. Memory is what tensors take, counted, not the process's. Launches are the
operators of a step that would each start a kernel on a GPU: views and the like do not count. On
a CPU, dropout and attention are made of more of them, for every method alike.

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

`meprop` and `sparsegrad` cut gradients in the optimizer's step; with `cut=backward` as the paper
does, in the backward.
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
import sparsegrad
from sparsegrad import Basis

NAMES = ("frozen", "ft", "lora", "shira", "meprop", "sparsegrad", "literal")
FAST, CUT = "sparsegrad:narrow:rank=8:k=all", "sparsegrad:narrow:rank=32"  # about as many trained as LoRA, as many updated a step
METHODS = ["frozen", "ft", "lora", "shira", "meprop", FAST, CUT]
METHODS += ["sparsegrad:rank=128", "sparsegrad:rank=256:fixed"]
METHODS += ["sparsegrad:narrow", "sparsegrad", "literal"]
SEARCHES = {
    "complete, exact": {},
    "narrow, exact": {"sides": "narrow"},
    "each layer's own, rank=128": {"share": "layer", "rank": 128},
}
CONFIGS = {
    "bert-base": transformers.BertConfig,
    "roberta-base": lambda: transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "llama-2-7b": lambda: transformers.LlamaConfig(max_position_embeddings=4096),  # else the 7B model's by default
    "minilm": lambda: transformers.BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=6),
}
SWEEP = {  # one setting varied at a time, from two blocks of MiniLM, 32 x 128 tokens, k = 1 %
    "tokens": ([128, 512, 2048, 8192, 16384], ["frozen", "ft", "lora", "sparsegrad:narrow:rank=32", "sparsegrad"]),
    "width": ([128, 256, 512, 1024], ["frozen", "ft", "lora", "sparsegrad:narrow:rank=32", "sparsegrad"]),
    "k": ([0.0001, 0.001, 0.01, 0.1, 1.0], ["meprop:k={}", "sparsegrad:narrow:rank=32:k={}", "sparsegrad:k={}"]),
    "rank": ([4, 16, 64, 256, 384], ["lora:rank={}", "sparsegrad:narrow:rank={}", "sparsegrad:rank={}"]),
}

# ------------------------------------------------------------------- models and batches


def make_config(arch: str, layers: int | None) -> transformers.PretrainedConfig:
    """The real architecture; `layers` blocks of it, or all."""
    config = CONFIGS[arch]()
    if layers is not None and layers > config.num_hidden_layers:
        raise finetune.UserError(f"--layers {layers}: {arch} has {config.num_hidden_layers} blocks")
    config.num_hidden_layers = layers or config.num_hidden_layers
    config.use_cache = False
    return config


def make_model(config: transformers.PretrainedConfig, args: argparse.Namespace) -> nn.Module:
    """Random weights in `args.dtype`, train mode, nothing trainable."""
    causal = config.model_type == "llama"
    auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
    try:
        torch.set_default_dtype(args.dtype)
        with torch.device(args.device):
            model = auto.from_config(config)
    finally:
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
    names = list(sparsegrad.mlp_linears(model))
    if model.config.model_type == "llama":
        names = [name for name in names if int(name.split(".layers.")[1].split(".")[0]) % 3 == 0]
    return names


def forward(model: nn.Module, batch: dict[str, Tensor], args: argparse.Namespace) -> Tensor:
    with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == torch.bfloat16):
        return model(**batch).loss


# ------------------------------------------------------------------------------- methods


class Method:
    """`sparsegrad:rank=128:k=0.001`, read."""

    def __init__(self, text: str):
        self.text, (self.name, *options) = text, text.split(":")
        self.rank, self.narrow, self.k, self.support, self.cut = None, False, None, "topk", "step"
        if self.name not in NAMES:
            raise argparse.ArgumentTypeError(f"{self.name!r} is none of {', '.join(NAMES)}")
        for option in options:
            key, _, value = option.partition("=")
            if key == "rank" and self.name in ("lora", "sparsegrad"):
                self.rank = finetune.number(int, 1)(value)
            elif key == "k" and self.name in ("meprop", "sparsegrad"):
                self.k = 1.0 if value == "all" else finetune.share_or_count(value)
            elif option in ("cut=step", "cut=backward") and self.name in ("meprop", "sparsegrad"):
                self.cut = value
            elif option == "narrow" and self.name == "sparsegrad":
                self.narrow = True
            elif option == "fixed" and self.name == "sparsegrad":
                self.support = "fixed"
            else:
                raise argparse.ArgumentTypeError(f"{self.name} has no option {option!r}")
        if self.narrow and self.support == "fixed":  # complete bases tell nothing of rows unrotated
            raise argparse.ArgumentTypeError(f"{text}: fixed needs the spectra of both sides")

    def basis(self, complete: Basis) -> Basis:
        """What it uses of complete bases."""
        U, V = complete.U[:, : self.rank], complete.V[:, : self.rank]
        if self.narrow:
            return Basis(U) if len(U) <= len(V) else Basis(V=V)
        energies = complete.column_energy, complete.row_energy
        return Basis(U, V, *(None if e is None else e[: self.rank] for e in energies))

    def core(self, out: int, in_: int) -> int:
        """Entries of the core it puts on a weight (out, in)."""
        if self.name != "sparsegrad" or not self.rank:
            return out * in_
        return self.rank * (max(out, in_) if self.narrow else self.rank)


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
    elif method.name in ("meprop", "sparsegrad"):
        cuts = {id(b): method.basis(b) for b in bases.values()} if method.name == "sparsegrad" else {}
        used = {name: cuts[id(b)] for name, b in bases.items()} if cuts else None
        ways = {"support": method.support, "cut": method.cut}
        sparsegrad.patch_model(model, used, method.k or args.k, None if used else names, **ways)
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


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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


class Run:
    """One method under measurement."""

    def __init__(self, method: Method, base: nn.Module, names: list[str], bases: dict[str, Basis], args: argparse.Namespace):
        self.method, self.args, self.seconds = method, args, []
        self.model, self.optimizer = build(base, names, method, bases, args)

    def step(self, batch) -> None:
        forward(self.model, batch, self.args).backward()
        if self.optimizer:
            self.optimizer.step()
            self.optimizer.zero_grad()

    def time(self, batch) -> None:
        synchronize(self.args.device)
        start = time.perf_counter()
        self.step(batch)
        synchronize(self.args.device)
        self.seconds.append(time.perf_counter() - start)

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
    moments = []

    def moment():
        synchronize(args.device)
        moments.append(time.perf_counter())

    def watched(steps):
        moment()
        yield from steps
        moment()  # when asked for one more: all gradients are collected

    def find(steps, **options):
        moments.clear()
        bases = sparsegrad.find_bases(
            base, watched(steps), names, n_steps=len(steps) + 1, lr=args.basis_lr,
            loss_fn=lambda m, b: forward(m, b, args), **options,
        )  # fmt: skip
        moment()
        return bases

    before, costs, found = sum(held(base).values()), {}, []
    for label, options in SEARCHES.items():
        if options and not args.searches:
            continue
        peak = before + peak_of(lambda options=options: found.append(find(steps[:2], **options)), args.device)
        if len(steps) > 2:  # fewer were timed under the memory profiler
            found[-1] = find(steps, **options)
        del found[1:]  # the first way's are used
        start, collected, end = moments
        seconds = {"collecting": collected - start, "decomposing": end - collected}
        costs[label] = {**seconds, "peak_bytes": peak}
    training = Run(Method("ft"), base, names, found[0], argparse.Namespace(**vars(args) | {"rest": False}))
    for batch in steps[:1] + steps:
        training.time(batch)
    return found[0], {"steps": len(steps), "training": sum(training.seconds[1:]), "ways": costs}


def check_fit(config: transformers.PretrainedConfig, args: argparse.Namespace) -> None:
    """UserError if a method's rank or k is more than there is room for."""
    model = make_model(config, argparse.Namespace(dtype=torch.float32, device="meta"))
    for out, in_ in {sparsegrad.weight_shape(model.get_submodule(name)) for name in adapted(model)}:
        for method in args.methods:
            if method.rank and method.rank > min(out, in_):
                raise finetune.UserError(f"{method.text}: there is room for ranks of 1 to {min(out, in_)}")
            if isinstance(method.k, int) and method.k > method.core(out, in_):
                raise finetune.UserError(f"{method.text}: a core has {method.core(out, in_)} entries")


def measure(config: transformers.PretrainedConfig, args: argparse.Namespace) -> dict:
    """One setting: the search for the bases, and every method."""
    torch.manual_seed(0)
    base = make_model(config, args)
    names = adapted(base)
    batches = make_batches(config, args)
    bases, cost = search(base, names, batches, args)
    runs = [Run(method, base, names, bases, args) for method in args.methods]
    for number in range(args.warmup + args.repeats):
        for run in runs:
            run.time(next(batches)) if number >= args.warmup else run.step(next(batches))
    return {"linears": len(names), "search": cost, "methods": {run.method.text: run.result(next(batches)) for run in runs}}


def sweep(args: argparse.Namespace) -> list[dict]:
    """Cost along each axis of SWEEP, the rest as it stands there."""
    points = []
    for axis, (values, methods) in SWEEP.items():
        for value in values:
            print(f"{axis} {value}", flush=True)
            gc.collect()  # the models before
            config = make_config("minilm", 2)
            here = argparse.Namespace(**vars(args) | dict(batch=32, seq=128, basis_steps=1, searches=False, k=0.01))
            chosen = {text: Method(text.format(value)) for text in methods}
            if axis == "tokens":
                here.batch = value // here.seq
            elif axis == "width":
                config.hidden_size, config.intermediate_size, config.num_attention_heads = value, 4 * value, value // 32
            elif axis == "k":  # no points beyond a core, where k counts for nothing
                out, in_ = config.intermediate_size, config.hidden_size
                chosen = {text: method for text, method in chosen.items() if method.k * out * in_ <= method.core(out, in_)}
            here.methods = list(chosen.values())
            results = measure(config, here)["methods"]
            for text, method in chosen.items():
                points.append({"axis": axis, "value": value, "method": text, **results[method.text]})
    return points


# ------------------------------------------------------------------------------ reporting


def table(run: dict) -> str:
    """A Markdown table of one measured setting."""
    methods, options = run["methods"], run["options"]
    peers = {name.split(":")[0]: name for name in reversed(methods)}
    if options["rest"]:
        peers.pop("frozen", None)  # it has no gradients before the first MLP, and is no floor
    counted = any("launches" in m for m in methods.values())  # files of before have none
    launches = ["launches", "launches, LoRA = 1"] * counted
    heads = ["method", "steps/s (quartiles)", "LoRA = 1", "full = 1", "time, frozen = 1", *launches]
    heads += ["peak MiB", "saved MiB", "optimizer MiB", "trainable", "updated a step"]
    lines = [
        setting(run) + f", {run['machine']['gpu'] or run['machine']['cpu']}, {run['machine']['threads']} threads",
        "",
        f"| {' | '.join(heads)} |",
        "|" + "---|" * len(heads),
    ]
    for name, m in methods.items():
        rate, high, low = (f"{1 / s:.3g}" for s in (m["seconds"], *m["quartiles"]))
        ratios = [ratio(run, peers.get("lora"), name), ratio(run, peers.get("ft"), name), ratio(run, name, peers.get("frozen"))]
        mib = [f"{m[key] / 2**20:,.0f}" for key in ("peak_bytes", "saved_bytes", "optimizer_bytes")]
        if counted:
            ratios += [f"{m['launches']:,}", ratio(run, name, peers.get("lora"), "launches")]
        cells = [f"{rate} ({low} to {high})", *ratios, *mib, f"{m['trainable']:,}", f"{m['touched']:,}"]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    cost = run["search"]
    if cost["steps"] > 2:
        training = cost["training"]
        lines += [
            "",
            f"Bases from {cost['steps']} steps; training the same linears for as many takes {training:.1f} s:",
            "",
            "| bases | collecting, s | decomposing, s | beyond training, s | allowed (10 % and 10 s) | peak MiB |",
            "|---|---|---|---|---|---|",
        ]
        for label, way in cost["ways"].items():
            beyond = f"{way['collecting'] + way['decomposing'] - training:.1f}"
            peak = f"{way['peak_bytes'] / 2**20:,.0f}" if way["peak_bytes"] else ""
            cells = [label, f"{way['collecting']:.1f}", f"{way['decomposing']:.1f}", beyond, f"{0.1 * training + 10:.1f}", peak]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def setting(run: dict) -> str:
    options = run["options"]
    rest = "the rest trains too" if options["rest"] else "the rest frozen"
    if options["return_memory"]:
        rest += ", glibc's allocator as it comes"
    tokens = f"{options['batch']} x {options['seq']} tokens"
    return f"{options['arch']}, {options['layers']} blocks, {tokens}, {options['dtype']}, {rest}"


def goals(runs: list[dict]) -> str:
    """A Markdown table of the ratios that the project set itself goals for, a row a setting."""
    lines = [
        "| | rank 8, all: steps/s, LoRA = 1 | peak, LoRA = 1 | time, frozen = 1 | rank 32, k: steps/s | peak | time, frozen = 1 "
        "| complete: steps/s, full = 1 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for run in runs:
        pairs = [pair for ours in (FAST, CUT) for pair in (("lora", ours), (ours, "lora", "peak_bytes"), (ours, "frozen"))]
        no_floor = run["options"]["rest"]
        cells = ["" if "frozen" in pair and no_floor else ratio(run, *pair) for pair in (*pairs, ("ft", "sparsegrad"))]
        lines.append("| " + " | ".join([setting(run), *cells]) + " |")
    return "\n".join(lines)


def ratio(run: dict, a: str | None, b: str | None, key: str = "seconds") -> str:
    """Of two methods of a run; empty if it has not both."""
    m = run["methods"]
    return f"{m[a][key] / m[b][key]:.2f}" if a in m and b in m else ""


def read(path: pathlib.Path, key: str) -> dict:
    """A file that this script wrote; UserError if it is another."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        if not run[key] or key == "methods" and not run["search"]["ways"]:
            raise ValueError(f"no {key} in it")
    except FileNotFoundError:
        raise finetune.UserError(f"{path} is not there") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        wrote = "--json" if key == "methods" else "--sweep"
        raise finetune.UserError(f"{path} is not what {wrote} writes ({type(error).__name__}: {error})") from None
    return run


def figure(points: list[dict], path: pathlib.Path) -> None:
    """Time and peak memory along each axis, both scales logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    styles = {
        "frozen": ("frozen (the floor)", "#999999", ":", "x"),
        "ft": ("full", "#000000", "-", "o"),
        "lora": ("LoRA", "#d95f02", "--", "s"),
        "meprop": ("MeProp", "#7570b3", "-.", "v"),
        "sparsegrad:narrow": ("SparseGrad, narrow side, rank 32 (or as below)", "#1b9e77", "-", "^"),
        "sparsegrad:rank": ("SparseGrad, both sides, rank as below", "#66a61e", "-.", "D"),
        "sparsegrad": ("SparseGrad, complete bases", "#1f77b4", "-", "P"),
    }
    drawn, axes = plt.subplots(2, len(SWEEP), figsize=(3.2 * len(SWEEP), 5.6), layout="constrained", sharey="row")
    seen = {}
    for column, (axis, (values, methods)) in zip(axes.T, SWEEP.items()):
        for text in methods:
            style = text.replace(":rank={}", "" if ":narrow" in text or "lora" in text else ":rank")
            label, color, line, marker = styles[style.replace(":k={}", "").replace(":rank=32", "")]
            chosen = [p for p in points if p["axis"] == axis and p["method"] == text]
            for ax, key, scale in zip(column, ("seconds", "peak_bytes"), (1000, 2**-20)):
                xs, ys = [p["value"] for p in chosen], [scale * p[key] for p in chosen]
                seen[label] = ax.plot(xs, ys, color=color, linestyle=line, marker=marker, markersize=4)[0]
                ax.set(xscale="log", yscale="log", xlabel=axis)
                ax.set_xticks(values, [f"{v:g}" for v in values], rotation=30)
                ax.set_xticks([], minor=True)
                ax.grid(alpha=0.3)
    axes[0, 0].set_ylabel("ms a step")
    axes[1, 0].set_ylabel("peak MiB")
    drawn.legend(list(seen.values()), list(seen), loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------- main


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = finetune.Parser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--arch", choices=CONFIGS, help="default bert-base")
    add("--layers", type=finetune.number(int, 1), help="blocks, to fit a small machine; default all")
    add("--methods", type=Method, nargs="+", help="see the top of this file")
    add("--batch", type=finetune.number(int, 1), help="rows a step, default 32")
    add("--seq", type=finetune.number(int, 2), help="tokens a row, default 128")
    add("--dtype", choices=("fp32", "bf16"), help="of frozen weights and activations; what trains is in fp32; default fp32")
    add("--k", type=finetune.number(float, 1e-6, 1.0), help="share of each linear that a step updates, default 0.01")
    add("--rest", action="store_true", default=None, help="all but the MLP weights trains too, as in the paper")
    add("--repeats", type=finetune.number(int, 1), help="steps timed of each method, default 7")
    add("--warmup", type=finetune.number(int, 1), help="steps before them, default 3")
    add("--basis-steps", type=finetune.number(int, 1), help="steps that the bases are made from, default 30")
    add("--basis-lr", type=finetune.number(float, 0.0), help="their learning rate, default 5e-5")
    add("--searches", action="store_true", default=None, help="also find bases for one side, and for each layer")
    add(
        "--return-memory",
        action="store_true",
        default=None,
        help="leave the C library's allocator as it is: noisier, and slower for all",
    )
    add = parser.add_mutually_exclusive_group().add_argument
    add("--json", type=pathlib.Path, help="write what was measured")
    add("--table", type=pathlib.Path, nargs="+", metavar="FILE", help="measure nothing, print the tables of such files")
    add("--goals", type=pathlib.Path, nargs="+", metavar="FILE", help="measure nothing, print ratios, a row a file")
    add("--sweep", type=pathlib.Path, metavar="FILE", help="measure cost against tokens, width, k and rank, and write it")
    add("--figure", type=pathlib.Path, nargs=2, metavar=("FILE", "PNG"), help="measure nothing, draw what --sweep wrote")
    args = parser.parse_args(arguments)
    for option, path in (("--json", args.json), ("--sweep", args.sweep), ("--figure", (args.figure or (None, None))[1])):
        if path:
            finetune.check_writable(option, path.parent)
            if path.is_dir():
                raise finetune.UserError(f"{option} {path}: that is a folder, not a file")
    sizes = dict(arch="bert-base", layers=None, batch=32, seq=128, k=0.01, basis_steps=30, searches=False)
    others = dict(dtype="fp32", rest=False, repeats=7, warmup=3, basis_lr=5e-5, return_memory=False)
    alone = next((name for name in ("table", "goals", "figure", "sweep") if getattr(args, name)), None)
    for name, default in {"methods": [Method(text) for text in METHODS], **sizes, **others}.items():
        if getattr(args, name) is None:
            setattr(args, name, default)
        elif alone and not (alone == "sweep" and name in others):
            why = "which varies sizes of its own" if alone == "sweep" else "which measures nothing"
            raise finetune.UserError(f"--{name.replace('_', '-')} is of no use to --{alone}, {why}")
    texts = [method.text for method in args.methods]
    if len(set(texts)) < len(texts):
        raise finetune.UserError(f"--methods {' '.join(texts)}: one is named twice")
    limit = CONFIGS[args.arch]().max_position_embeddings - 2 * (args.arch == "roberta-base")  # it counts from 2
    if args.seq > limit:
        raise finetune.UserError(f"--seq {args.seq}: {args.arch} takes rows of up to {limit} tokens here")
    return args


def main() -> None:
    args = parse()
    if args.table:
        print("\n\n".join(table(read(path, "methods")) for path in args.table))
        return
    if args.goals:
        print(goals([read(path, "methods") for path in args.goals]))
        return
    if args.figure:
        figure(read(args.figure[0], "points")["points"], args.figure[1])
        return
    if not args.return_memory:
        keep_freed_memory()
    config = make_config(args.arch, args.layers)
    chosen = ("arch", "batch", "seq", "dtype", "k", "rest", "repeats", "warmup", "basis_lr", "return_memory")
    options = {name: getattr(args, name) for name in chosen} | {"layers": config.num_hidden_layers}
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if args.sweep:
        used = {name: options[name] for name in ("dtype", "rest", "repeats", "warmup", "return_memory")}
        finetune.write_json(args.sweep, {"options": used, "points": sweep(args), **finetune.provenance()})
        return
    check_fit(config, args)
    run = {"options": options, **measure(config, args), **finetune.provenance()}
    print(table(run))
    if args.json:
        finetune.write_json(args.json, run)


if __name__ == "__main__":
    finetune.run(main)
