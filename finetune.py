"""What glue_run.py and llama_run.py share: options, the paper's methods, training, results.

The training loop is the Hugging Face Trainer and LoRA is PEFT's; this file only puts a
method on a model, measures time and memory, and writes what came out.
"""

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Iterable

import datasets
import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_pt_utils import get_length_grouped_indices

import sparsegrad

METHODS = ("ft", "lora", "meprop", "sparsegrad")
SPARSE = ("meprop", "sparsegrad")
ADAPTER = "sparsegrad.safetensors"  # in the run's folder: bases and what training changed
TRAINED = "trained.safetensors"  # in a checkpoint: the parameters that train, as they are
PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "scipy", "scikit-learn", "bitsandbytes", "gguf")
FIRST_STEPS = 5  # left out of the steps per second: allocations and caches


class UserError(ValueError):
    """Something the caller can mend: told in one line, exit code 2."""

    code = 2


class Diverged(UserError):
    """A loss that is not finite: exit code 3, so that a search for a learning rate can tell."""

    code = 3


# ------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def share_or_count(text: str) -> float | int:
    """`0.01` or `1e-2` is a share, `28000` a count."""
    try:
        k = int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"k is {text!r}: give a share such as 0.01 or a count such as 28000") from None
    if not (k >= 1 if isinstance(k, int) else 0 < k <= 1):
        raise argparse.ArgumentTypeError(f"k is {text}: a share lies above 0 and up to 1.0, a count is 1 or more")
    return k


def number(kind: type, least: float, most: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite `kind` (int or float) from `least` to `most`."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf:
            limit = "or more" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(f"{text} is not {'a whole' if kind is int else 'a'} number of {least} {limit}")
        return value

    return parse


def add_options(parser: argparse.ArgumentParser, k: float | int) -> None:
    """The options of both scripts; `k` is the default of `--k`. None stands for "not given"."""
    add = parser.add_argument
    add("--method", choices=METHODS, default="sparsegrad")
    entries = "entries a step updates of each layer: a share (0.01) or a count (28000)"
    add("--k", type=share_or_count, help=f"{entries}; default {k}")
    add(
        "--rank",
        type=number(int, 1),
        help="sparsegrad: columns kept of each basis (default all); lora: its rank (default: nearest to k)",
    )
    add(
        "--support",
        choices=("topk", "fixed"),
        default="topk",
        help="the k entries with the largest gradients of each step, or k fixed ones",
    )
    add("--share", choices=("role", "layer"), default="role", help="one basis for all blocks' layers of a role, or one a layer")
    add("--sides", choices=("both", "narrow"), default="both", help="rotate both sides of a gradient, or the shorter alone")
    add(
        "--basis-steps", type=number(int, 1), default=30, help="steps of back-propagation the bases are made from, one pass at most"
    )
    rate = "their learning rate, default 5e-5; 0: at the pretrained weights, less memory"
    add("--basis-lr", type=number(float, 0.0), default=5e-5, help=rate)
    add("--lr", type=number(float, 0.0), help="learning rate; default by method and model")
    add("--adaptivity", type=number(float, 0.0, 1.0), default=1.0, help="SparseGradAdamW's, for the cores; 1: Adam")
    add("--batch-size", type=number(int, 1), help="rows a step")
    add("--epochs", type=number(float, 0.001), help="passes over the training rows")
    add("--max-steps", type=number(int, 1), help="stop after so many steps, whatever --epochs says")
    add("--max-train-samples", type=number(int, 1), help="train on so many rows, drawn by the seed")
    add("--held-out", type=number(int, 1), metavar="N", help="evaluate on N rows (trees) of the training data, not on the dev set")
    add("--seed", type=number(int, 0, 2**32 - 3), default=0, help="of everything that is drawn")
    add("--merge", type=pathlib.Path, metavar="DIR", help="also write the tuned model, plain, for from_pretrained")
    add("--output-dir", type=pathlib.Path, help="default: a new folder below runs/")
    add("--resume", type=pathlib.Path, metavar="DIR", help="go on with the interrupted run in DIR, with its own options")
    parser.set_defaults(hub=None)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, k: float | int) -> None:
    """No option is ignored: one that the method has no use for is an error. Then fills in
    the defaults of those not given, `k` for `--k`."""
    uses = {"k": ("lora", *SPARSE), "rank": ("lora", "sparsegrad"), "adaptivity": SPARSE} | dict.fromkeys(
        ("support", "share", "sides", "basis_steps", "basis_lr"), ("sparsegrad",)
    )
    if args.merge is not None and args.merge.exists() and (not args.merge.is_dir() or any(args.merge.iterdir())):
        parser.error(f"--merge {args.merge} is there already: pass a new or empty folder")
    for name, methods in uses.items():
        if args.method not in methods and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is of no use to --method {args.method}, only to {', '.join(methods)}")
    if args.method == "lora" and args.rank is not None and args.k is not None:
        parser.error("--rank sets LoRA's size and --k asks for the rank nearest to it: pass one of the two")
    args.k = k if args.k is None else args.k


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; errors of the caller's end in one line and their exit code."""
    try:
        main()
    except ValueError as error:
        if not isinstance(error, UserError) and not _ours(error):
            raise
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(getattr(error, "code", UserError.code))
    except KeyboardInterrupt:
        print("\ninterrupted; --resume DIR goes on from the last checkpoint of the run's folder, if it has one", file=sys.stderr)
        sys.exit(130)


def _ours(error: BaseException) -> bool:
    """Whether sparsegrad.py raised it: its messages say what is wrong and what would be right."""
    tb = error.__traceback__
    while tb.tb_next:
        tb = tb.tb_next
    return pathlib.Path(tb.tb_frame.f_code.co_filename).name == "sparsegrad.py"


# --------------------------------------------------------------------------------- models


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers within `seconds`, name lookup included."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    answered = threading.Event()

    def ask():
        try:
            request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (403, 407):  # a proxy's no is none of the hub's
                answered.set()
        except (OSError, ValueError):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def from_pretrained(auto_class, name: str, hub: bool, dtype: torch.dtype | None = None, **options):
    """`auto_class.from_pretrained`, from a folder, the hub, or what the hub left in the cache;
    a model's weights come in `dtype`, whatever they are stored in."""
    if dtype is not None:
        old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56)
        options["torch_dtype" if old else "dtype"] = dtype
    try:
        return auto_class.from_pretrained(name, local_files_only=not hub and not os.path.isdir(name), **options)
    except (OSError, ValueError, RuntimeError, ImportError, IndexError, KeyError, struct.error, SafetensorError) as error:
        if "gguf_file" in options:
            raise UserError(f"--model {options['gguf_file']} cannot be loaded ({error}); is it a whole GGUF file?") from None
        reason = str(error).splitlines()[0] if hub or os.path.isdir(name) else "no such folder, not in the cache, no hub"
        right = "a hub name or a folder with config.json" if hub else "a folder with config.json, or leave it out for the stand-in"
        raise UserError(f"--model {name} cannot be loaded ({reason}); pass {right}") from None


def package_file(package: str, path: str, install: str = "pip install -r requirements.txt") -> pathlib.Path:
    """The file at `path` in an installed `package`; `install` is the command that brings it."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        raise UserError(f"no hub, and the package {package.replace('_', '-')} is not installed: {install}")
    return pathlib.Path(spec.origin).parent / path


# -------------------------------------------------------------------------------- methods


def lora_rank(linears: Iterable[nn.Module], entries: int) -> int:
    """The LoRA rank whose parameter count is nearest to `entries` over all `linears`."""
    per_rank = sum(sum(sparsegrad.weight_shape(linear)) for linear in linears)
    return max(1, round(entries / per_rank))


def check_held_out(args: argparse.Namespace, count: int, what: str) -> None:
    """UserError if `--held-out` leaves none of `count` training rows, or `what` they are, to train on."""
    if args.held_out >= count:
        raise UserError(f"--held-out {args.held_out}: there are {count} training {what}, and some must be left to train on")


def draw_rows(args: argparse.Namespace, splits: dict, what: str) -> dict:
    """Data sets "train" and others, as they are to be used: with `--held-out`, rows of "train" take the place of all
    others; with `--max-train-samples`, "train" has no more. Both are drawn by the seed."""
    if args.held_out:
        train = splits["train"].shuffle(seed=args.seed)
        check_held_out(args, len(train), what)
        splits = dict.fromkeys(splits, train.select(range(args.held_out)))
        splits["train"] = train.select(range(args.held_out, len(train)))
    if args.max_train_samples:
        train = splits["train"].shuffle(seed=args.seed)
        splits["train"] = train.select(range(min(args.max_train_samples, len(train))))
    return splits


def check_sizes(linears: dict[str, nn.Module], args: argparse.Namespace) -> int:
    """Raise UserError if `--k` or `--rank` is beyond a linear; returns the entries that k asks for in all."""
    rank = args.rank if args.method == "sparsegrad" else None  # of the core
    uses_k = args.method in SPARSE or (args.method == "lora" and not args.rank)
    shapes = {name: sparsegrad.weight_shape(linear) for name, linear in linears.items()}
    budget = sum(round(args.k * math.prod(s)) if isinstance(args.k, float) else args.k for s in shapes.values())
    for name, (out, in_) in shapes.items():
        if args.rank and args.rank > min(out, in_):
            raise UserError(f"--rank {args.rank} is beyond {name}, which is {out} x {in_}: there is room for 1 to {min(out, in_)}")
        rows = rank if rank and (args.sides == "both" or out < in_) else out
        columns = rank if rank and (args.sides == "both" or in_ <= out) else in_
        if uses_k and isinstance(args.k, int) and args.k > rows * columns:
            raise UserError(f"--k {args.k} is beyond {name}, which has {rows} x {columns} = {rows * columns} entries to train")
    return budget


def apply_method(model: nn.Module, linears: dict[str, nn.Module], args: argparse.Namespace, batches: Collection) -> dict:
    """Put `args.method` on `linears` of `model`, in place; returns what to report.

    Trains, beside the method's own parameters, everything but the MLP weights (as the
    paper does for GLUE), or with `args.freeze` only what lies outside the pretrained trunk
    (a classifier's head; a language model's counts as trunk). What trains is kept in fp32.
    """
    weights = {f"{name}.weight" for name in linears}
    language_head = model.get_output_embeddings()
    for name, p in model.named_parameters():
        head = not name.startswith(f"{model.base_model_prefix}.") and language_head is None
        if p.is_floating_point():
            p.requires_grad_(head if args.freeze else name not in weights)
    info = {"linears": len(linears), "basis_seconds": 0.0}
    if args.method == "ft":
        for linear in linears.values():
            linear.weight.requires_grad_(True)
    elif args.method == "lora":
        info["lora_rank"] = args.rank or lora_rank(linears.values(), check_sizes(linears, args))
        import peft

        add_peft(model, peft.LoraConfig(r=info["lora_rank"], lora_alpha=info["lora_rank"]), list(linears))
    else:
        bases = None
        if args.method == "sparsegrad":
            start = time.perf_counter()
            info["basis_steps"] = min(args.basis_steps, len(batches))
            one_pass = f" (one pass; --basis-steps {args.basis_steps})" if info["basis_steps"] < args.basis_steps else ""
            print(f"bases: {info['basis_steps']} steps of back-propagation{one_pass}, then HOSVD ...", flush=True)
            bases = sparsegrad.find_bases(
                model, batches, list(linears), share=args.share, sides=args.sides, rank=args.rank,
                n_steps=info["basis_steps"], lr=args.basis_lr,
            )  # fmt: skip
            info["basis_seconds"] = round(time.perf_counter() - start, 2)
        names = None if bases else list(linears)
        options = dict(support=args.support, cut="step")  # dense gradients, as the Trainer wants
        print(sparsegrad.patch_model(model, bases, args.k, names, **options))
    for p in model.parameters():
        if p.requires_grad:  # tiny steps vanish in half precision
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    return info


def add_peft(model: nn.Module, config, names: list[str]) -> None:
    """The layers of a PEFT `config` inside the plain model, so that checkpoints hold all that trains."""
    import peft

    config.target_modules = set(names)
    parameters = list(model.named_parameters())
    flags = {name: p.requires_grad for name, p in parameters}
    old = {id(p) for _, p in parameters}
    peft.inject_adapter_in_model(config, model)
    for name, p in model.named_parameters():
        if id(p) in old:
            p.requires_grad_(flags[name.replace(".base_layer.", ".")])


def save_adapter(model: nn.Module, folder: pathlib.Path) -> None:
    """What training changed, where it is less than the model: `sparsegrad.safetensors`, or
    PEFT's two files if LoRA alone trains (`PeftModel.from_pretrained` reads them)."""
    if sparsegrad.sparsegrad_layers(model):
        _save_whole(sparsegrad.sparsegrad_state_dict(model), folder / ADAPTER)
    elif all("lora_" in name for name, p in model.named_parameters() if p.requires_grad):
        import peft

        config = model.peft_config["default"]
        config.base_model_name_or_path, config.inference_mode = model.config._name_or_path, True
        config.task_type = "CAUSAL_LM"  # a classifier's head would train too
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        config.save_pretrained(folder)
        _save_whole({f"base_model.model.{name}": t.contiguous() for name, t in state.items()}, folder / "adapter_model.safetensors")


def _save_whole(tensors: dict[str, torch.Tensor], path: pathlib.Path) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"format": "pt"})
    part.replace(path)


def merge(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The plain model with what was learned, in `dtype`: no adapter, no core, nothing quantised."""
    if sparsegrad.sparsegrad_layers(model):
        sparsegrad.unpatch_model(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            plain = module.get_base_layer()
            if plain.weight.is_floating_point():
                module.merge()
            else:  # PEFT would quantise the sum, and lose most of what was learned
                layer = sparsegrad.SparseGradLinear.from_linear(plain, sparsegrad.Basis(), None)
                plain = layer.to_linear()  # in fp32
                plain.weight.data += module.get_delta_weight("default")
            model.set_submodule(name, plain)
    if not all(p.is_floating_point() for p in model.parameters()):
        model = model.dequantize()
    return model.to(dtype)


def save_merged(model: nn.Module, tokenizer, folder: pathlib.Path) -> None:
    """A merged `model` and its tokenizer, if it has one, in `folder`, whole or not at all."""
    for attribute in ("peft_config", "_hf_peft_config_loaded", "hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)
    vars(model.config).pop("quantization_config", None)  # a GGUF's, which was dequantised when it was loaded
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as part:
            for what in (model,) if tokenizer is None else (model, tokenizer):
                what.save_pretrained(os.path.join(part, "model"))
            if folder.is_dir():
                folder.rmdir()  # an empty one, see check_options
            os.rename(os.path.join(part, "model"), folder)
    except OSError as error:
        raise UserError(f"--merge {folder}: {error.strerror or error}; once that is mended, --resume writes it") from None


def count_parameters(model: nn.Module) -> dict:
    """Trainable parameters, and how many of them one step updates."""
    summary = sparsegrad.summary(model)
    total = summary.core + summary.dense
    return {"trainable_parameters": total, "touched_entries": summary.touched + summary.dense, "core_entries": summary.touched}


# ------------------------------------------------------------------------------- training


class LengthGroupedSampler(torch.utils.data.Sampler):
    """Shuffles so that batches hold sentences of like length, hence less padding. Unlike the
    Trainer's own it depends on seed and epoch alone, so a resumed run sees the same batches."""

    def __init__(self, lengths: list[int], batch_size: int, seed: int, state: transformers.TrainerState):
        self.lengths, self.batch_size, self.seed, self.state = lengths, batch_size, seed, state

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        order = torch.Generator().manual_seed(self.seed * 1000 + int(self.state.epoch or 0))
        return iter(get_length_grouped_indices(self.lengths, self.batch_size, generator=order))


class SparseGradTrainer(transformers.Trainer):
    """The Trainer, with batches by length where a datasets.Dataset has `input_ids`. Its
    checkpoints hold the parameters that train, not the frozen ones."""

    def _get_train_sampler(self, *args):
        rows = self.train_dataset
        if not isinstance(rows, datasets.Dataset) or "input_ids" not in rows.column_names:
            return super()._get_train_sampler(*args)
        lengths = [len(ids) for ids in rows["input_ids"]]
        return LengthGroupedSampler(lengths, self.args.train_batch_size, self.args.seed, self.state)

    def _save(self, output_dir=None, state_dict=None):
        folder = pathlib.Path(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        trained = {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / TRAINED)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in load_file(pathlib.Path(resume_from_checkpoint) / TRAINED).items():
                parameters[name].copy_(value)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)


class Measure(transformers.TrainerCallback):
    """Steps per second, a stop at the first loss that is not finite, and Ctrl-C: finish the
    step, write a checkpoint, stop."""

    def __init__(self):
        self.seconds, self.steps, self.interrupted = 0.0, 0, False

    def _now(self) -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.started = state.global_step
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = self._now()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step > self.started + FIRST_STEPS:
            self.seconds += self._now() - self.begin
            self.steps += 1
        if self.interrupted:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.interrupted:  # the Trainer takes the stop for the epoch's end: the checkpoint is written already
            control.should_save = control.should_evaluate = False

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in (key for key in logs if key.endswith("loss")):
            if not math.isfinite(logs[key]):
                raise Diverged(f"{key} is {logs[key]} at step {state.global_step}: lower --lr (it is {args.learning_rate:g})")

    def on_interrupt(self, signum, frame):
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True
        print("\nstopping after this step (Ctrl-C again: at once) ...", file=sys.stderr, flush=True)

    def result(self) -> dict:
        rate = round(self.steps / self.seconds, 3) if self.steps else None
        if torch.cuda.is_available():
            return {
                "steps_per_second": rate,
                "peak_memory_mib": torch.cuda.max_memory_allocated() >> 20,
                "memory_is": "CUDA allocator",
            }
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
        return {"steps_per_second": rate, "peak_memory_mib": peak, "memory_is": "resident set"}


def train_and_report(
    *,
    args: argparse.Namespace,
    folder: pathlib.Path,
    make_model: Callable[[], nn.Module],
    tokenizer,
    trainer_options: dict,
    training_options: dict,
    used: dict,
    linears: Callable[[nn.Module], dict[str, nn.Module]] = sparsegrad.mlp_linears,
    trainer_class: type[SparseGradTrainer] = SparseGradTrainer,
    evaluate_first: bool = False,
    beforehand: Callable[[nn.Module], None] = lambda model: None,
    afterwards: Callable[[nn.Module], dict] = lambda model: {},
) -> dict:
    """One run of one seed in `folder`: method, training, `results.json`; returns the results.

    A `folder` with a checkpoint is gone on with, one with results is only read. `beforehand`
    is given the pretrained model, `afterwards` the tuned one; what that returns joins the results.
    """
    if (folder / "results.json").exists():
        print(f"{folder} is finished already; its results:")
        return json.loads((folder / "results.json").read_text(encoding="utf-8"))
    transformers.set_seed(args.seed)
    model = make_model().to("cuda" if torch.cuda.is_available() else "cpu")
    dtype, chosen = model.dtype, linears(model)
    check_sizes(chosen, args)
    if (
        args.bf16 and model.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    ):  # AVX-512 can at worst emulate it
        print("note:  this CPU has no bf16 instructions: mixed precision is many times slower here than fp32")
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        beforehand(model)
    checkpoint = transformers.trainer_utils.get_last_checkpoint(folder) if folder.is_dir() else None
    if checkpoint and args.method in SPARSE:  # no bases to find again
        sparsegrad.load_sparsegrad_state_dict(model, load_file(folder / ADAPTER))
    else:
        info = apply_method(model, chosen, args, _basis_batches(args, **trainer_options))
        info["trained"] = [name for name, p in model.named_parameters() if p.requires_grad]
    if checkpoint:
        info = json.loads((folder / "method.json").read_text(encoding="utf-8"))
        for name, p in model.named_parameters():
            p.requires_grad_(name in info["trained"])
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # the Trainer trains no quantised model without an adapter; it has one

    measure = Measure()
    training = transformers.TrainingArguments(**{**dict(
        output_dir=str(folder), learning_rate=args.lr, per_device_train_batch_size=args.batch_size,
        num_train_epochs=args.epochs, max_steps=args.max_steps or -1, max_grad_norm=0.0, weight_decay=0.0, seed=args.seed,
        bf16=args.bf16, report_to=[], logging_nan_inf_filter=False, dataloader_pin_memory=torch.cuda.is_available(),
        use_cpu=not torch.cuda.is_available(),
    ), **training_options})  # fmt: skip
    optimizer = _sparse_optimizer(model, args) if args.method in SPARSE else None
    callbacks = [measure, *trainer_options.pop("callbacks", [])]
    trainer = trainer_class(model, training, optimizers=(optimizer, None), callbacks=callbacks, **trainer_options)
    if not checkpoint:
        if evaluate_first:
            info["metrics_before"] = trainer.evaluate()
        folder.mkdir(parents=True, exist_ok=True)
        if args.method in SPARSE:
            save_adapter(model, folder)  # its bases, for --resume
        write_json(folder / "method.json", info)
        if not (args.output_dir / "arguments.json").exists():  # only now: a start that failed blocks no folder
            write_json(args.output_dir / "arguments.json", _plain(args))
    print(f"{'resuming from ' + os.path.basename(checkpoint) if checkpoint else 'training'} ...", flush=True)
    before = signal.signal(signal.SIGINT, measure.on_interrupt)
    try:
        at = transformers.TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json")) if checkpoint else None
        if at and at.global_step >= at.max_steps:  # the Trainer would take one step more
            trainer.state = at
            trainer._load_from_checkpoint(at.best_model_checkpoint if training.load_best_model_at_end else checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        signal.signal(signal.SIGINT, before)
    if measure.interrupted:
        where = args.resume or args.output_dir
        print(
            f"interrupted at step {trainer.state.global_step}; go on with: python {sys.argv[0]} --resume {where}", file=sys.stderr
        )
        sys.exit(130)

    measured = {**measure.result(), "basis_seconds": info["basis_seconds"]}
    evaluations = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    final = {}  # the last evaluation, of every dev set; anew if the best checkpoint came back after it
    for entry in evaluations if not training.load_best_model_at_end else ():
        final |= entry if entry["step"] == trainer.state.global_step else {}
    final = final or trainer.evaluate()
    save_adapter(model, folder)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        extra = afterwards(model)
    if args.method == "sparsegrad":
        extra["orthogonality_error"] = orthogonality_error(model)
    counts = count_parameters(model)
    if args.merge:
        save_merged(merge(model, dtype), tokenizer, args.merge)
    results = {
        "arguments": _plain(args),
        "seed": args.seed,
        "used": used,
        "metrics": final,
        "evaluations": evaluations,
        "steps": trainer.state.global_step,
        **counts,
        **{key: value for key, value in info.items() if key not in ("trained", "basis_seconds")},
        **extra,
        **measured,
        **provenance(),
    }
    write_json(folder / "results.json", results)
    return results


def _basis_batches(args: argparse.Namespace, *, train_dataset, data_collator, **others) -> torch.utils.data.DataLoader:
    order = torch.Generator().manual_seed(args.seed)
    return torch.utils.data.DataLoader(train_dataset, args.batch_size, shuffle=True, collate_fn=data_collator, generator=order)


def _sparse_optimizer(model: nn.Module, args: argparse.Namespace) -> sparsegrad.SparseGradAdamW:
    """A group of the cores, then one of all else that trains, which may be nothing."""
    cores = dict.fromkeys(layer.core for layer in sparsegrad.sparsegrad_layers(model).values())
    others = [p for p in model.parameters() if p.requires_grad and p not in cores]
    groups = [{"params": [*cores], "adaptivity": args.adaptivity}, {"params": others}]
    return sparsegrad.SparseGradAdamW(groups, lr=args.lr, weight_decay=0.0)


def orthogonality_error(model: nn.Module) -> float:
    """The largest entry of |UᵀU − I| and |VᵀV − I| over all bases, in float64."""
    layers = sparsegrad.sparsegrad_layers(model).values()
    vectors = {b for layer in layers for b in layer.basis.parameters()}  # each (n, r)
    grams = [b.T.double() @ b.double() for b in vectors]
    return max((gram - torch.eye(len(gram)).to(gram)).abs().max().item() for gram in grams)


def _plain(args: argparse.Namespace) -> dict:
    return {key: str(value) if isinstance(value, pathlib.Path) else value for key, value in vars(args).items()}


def write_json(path: pathlib.Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def provenance() -> dict:
    """With which versions, from which commit and on what a result was measured."""
    return {"versions": _versions(), "git_commit": _git_commit(), "machine": _machine()}


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_commit() -> str | None:
    here = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=12"], capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None


def _machine() -> dict:
    cpu = platform.processor() or platform.machine()
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, "system": platform.system()}


# ---------------------------------------------------------------------------- run folders


def resumed(args: argparse.Namespace) -> argparse.Namespace:
    """`args`, or with `--resume` the options of the run that is gone on with."""
    if args.resume is None:
        return args
    given = [word.split("=")[0] for word in sys.argv[1:] if word.startswith("--")]
    others = [option for option in given if not "--resume".startswith(option)]
    if others:
        raise UserError(f"--resume goes on with the run's own options: leave out {', '.join(others)}")
    try:
        saved = json.loads((args.resume / "arguments.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"--resume {args.resume}: no arguments.json there that can be read, so no run to go on with") from None
    missing = sorted(vars(args).keys() - saved.keys())
    if missing:
        raise UserError(f"--resume {args.resume}: not a run of this script today (it has no --{missing[0].replace('_', '-')})")
    paths = {key: pathlib.Path(saved[key]) for key in ("data", "output_dir", "merge", "mt_bench") if saved.get(key)}
    return argparse.Namespace(**{**saved, **paths, "resume": args.resume, "output_dir": args.resume})


def open_folder(args: argparse.Namespace, name: str) -> pathlib.Path:
    """The run's folder, not made yet: a new one, or the one resumed."""
    if args.resume is not None:
        return args.resume
    if args.output_dir is None:
        candidates = (pathlib.Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10**6))
        args.output_dir = next(path for path in candidates if not path.exists())
    elif (args.output_dir / "arguments.json").exists():
        raise UserError(f"{args.output_dir} holds a run already; pass --resume {args.output_dir}, or another --output-dir")
    check_writable("--output-dir", args.output_dir)
    if args.merge is not None:
        check_writable("--merge", args.merge)
        if args.merge.absolute() in (args.output_dir.absolute(), *args.output_dir.absolute().parents):
            raise UserError(f"--merge {args.merge} would hold the run's own folder {args.output_dir}: pass another folder")
    return args.output_dir


def check_writable(option: str, path: pathlib.Path) -> None:
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{option} {path}: {there} is not a folder that can be written to")


def cost_rows(run: dict, folder: pathlib.Path) -> dict[str, object]:
    """What a run cost, for `print_table`."""
    return {
        "steps": run["steps"],
        "trainable parameters": f"{run['trainable_parameters']:,}",
        "entries a step updates": f"{run['touched_entries']:,}",
        "seconds for the bases": run["basis_seconds"],
        "steps per second": run["steps_per_second"] or f"not measured: {FIRST_STEPS} steps or fewer",
        "peak memory": f"{run['peak_memory_mib']:,} MiB ({run['memory_is']})",
        "written": f"{folder}/results.json",
    }


def print_table(rows: dict[str, object]) -> None:
    width = max(map(len, rows))
    print()
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
