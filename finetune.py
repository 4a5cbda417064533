"""What glue_run.py and llama_run.py share: options, the paper's methods, training, results.

The training loop is the Hugging Face Trainer and LoRA is PEFT's. This file puts a method on
a model, measures time and memory, goes on with an interrupted run, and writes what came out.
"""

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import platform
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Collection, Iterable
from typing import NoReturn

import accelerate
import datasets
import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import fully_shard

import sparsegrad

METHODS = ("ft", "lora", "meprop", "sparsegrad")
ADAPTER = "sparsegrad.safetensors"  # in the run's folder: bases and what training changed
TRAINED = "trained.safetensors"  # in a checkpoint: the parameters that train, as they are
CHECKPOINT = (TRAINED, "optimizer.pt", "scheduler.pt", "trainer_state.json")
PACKAGES = ("torch", "transformers", "peft", "datasets", "accelerate", "numpy", "scipy", "scikit-learn", "bitsandbytes", "gguf")
# The attention's linears of BERT, DeBERTa, DistilBERT, ViT, LLaMA, Phi, BART, T5, MPNet and GPT-2
ATTENTION = (
    r"(.*\.)?(attention\.((self|attention)\.)?(query|key|value)(_proj)?|attention\.output\.dense|attention\.(q|k|v|out)_lin"
    r"|(self_attn|encoder_attn|attention)\.([qkvo]|qkv|out)_proj|(Self|EncDec)Attention\.[qkvo]|attn\.([qkvo]|c_attn|c_proj))"
)
HEAD_RATE = 1e-2  # of a classifier that trains alone
FIRST_STEPS = 5  # left out of the steps per second: allocations and caches
FIRST = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun started: it writes, and it prints


class UserError(ValueError):
    """Something the caller can mend."""


class Diverged(UserError):
    """A loss that is not finite."""


def run_script(main: Callable[[], None]) -> None:
    """Run a script's `main`, together with the other processes if torchrun or accelerate started some. An error ends in
    one line and exit code 2; a loss that diverged in 3, so that a search for a learning rate can tell; Ctrl-C in 130."""
    processes = accelerate.PartialState(cpu=not torch.cuda.is_available())  # it joins them
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with contextlib.nullcontext() if FIRST else contextlib.redirect_stdout(open(os.devnull, "w")):
            main()
        processes.destroy_process_group()
    except (ValueError, OSError) as error:  # those of sparsegrad.py and of the libraries say what is wrong, too
        fail(" ".join(str(error).split()), 3 if isinstance(error, Diverged) else 2)
    except RuntimeError as error:
        if "closed by peer" not in str(error):
            raise
        os._exit(2)  # another process has failed, and says why
    except KeyboardInterrupt:
        if FIRST:
            print("\ninterrupted; --resume DIR goes on from the last checkpoint in the run's folder, if any", file=sys.stderr)
        sys.exit(130)


def fail(message: str, code: int = 2) -> NoReturn:
    """End in one line. What all processes find is said by the first, and the launcher ends the others as they wait."""
    if not FIRST:
        time.sleep(3)
    print(f"error: {message}", file=sys.stderr, flush=True)
    if "RANK" in os.environ:  # at once
        os._exit(code)
    sys.exit(code)


def in_any_process(flag: bool) -> bool:
    processes = accelerate.PartialState()
    return bool(accelerate.utils.reduce(torch.tensor(float(flag), device=processes.device)))


# ------------------------------------------------------------------------------- options


class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (--help lists the options)")


def share_or_count(text: str) -> float | int:
    """`0.01` or `1e-2` is a share, `28000` a count."""
    try:
        k = int(text) if text.isdecimal() else float(text)
    except ValueError:
        k = 0
    if not (k >= 1 if isinstance(k, int) else 0 < k <= 1):
        raise argparse.ArgumentTypeError(f"k is {text!r}: give a share above 0 and up to 1.0, or a count such as 28000")
    return k


def add_options(parser: argparse.ArgumentParser, k: float | int) -> None:
    """The options of both scripts; `k` is the default of `--k`. None stands for "not given"."""
    parser.epilog = (
        f"On several devices: torchrun --nproc-per-node N {sys.argv[0]} ... does what one process does but for dropout, and for a "
        "last batch of fewer rows than processes. --resume may go on with another N. The processes share out a step's rows, the "
        "bases and the evaluation. The first writes. After Ctrl-C torchrun leaves them 30 seconds to end their step."
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="sparsegrad", help="for accuracy alone lora or meprop are as good")
    add("--target", choices=("mlp", "attention", "all"), default="mlp", help="linears that the method trains; the paper: mlp")
    add("--k", type=share_or_count, help=f"entries of each layer that a step updates: a share or a count; default {k}")
    add("--rank", type=int, help="sparsegrad: columns kept of each basis (default all); lora: its rank (default nearest to k)")
    support = "the k largest of each gradient, or k fixed: less memory, with --share layer --rank 256 --k 0.01"
    add("--support", choices=("topk", "fixed"), default="topk", help=support)
    add("--share", choices=("role", "layer"), default="role", help="one basis for all blocks' layers of a role, or one a layer")
    add("--sides", choices=("both", "narrow"), default="both", help="rotate both sides of a gradient, or the shorter alone")
    add("--basis-steps", type=int, default=30, help="steps of back-propagation for the bases, one pass at most; default 30")
    add("--basis-lr", type=float, default=5e-5, help="their learning rate, default 5e-5; 0: the pretrained weights', less memory")
    add("--lr", type=float, help="learning rate; default by method and model")
    add("--adaptivity", type=float, default=1.0, help="SparseGradAdamW's, for the cores; 1: Adam; 0.5: better on conversations")
    add("--batch-size", type=int, help="rows a step, of all processes together")
    add("--epochs", type=float, help="passes over the training rows")
    add("--max-steps", type=int, help="stop after so many steps, whatever --epochs says")
    add("--max-train-samples", type=int, help="train on so many rows, drawn by the seed")
    add("--held-out", type=int, metavar="N", help="evaluate on N rows (trees) of the training data, not on the dev set")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--merge", type=pathlib.Path, metavar="DIR", help="also write the tuned model, plain, for from_pretrained")
    add("--output-dir", type=pathlib.Path, help="default: a new folder below runs/")
    add("--resume", type=pathlib.Path, metavar="DIR", help="go on with the interrupted run in DIR, with its own options")
    parser.set_defaults(hub=None)


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace, k: float | int) -> None:
    """No option is ignored: one that the method has no use for is an error, and so is a number that makes no sense.
    Then fills in `k` if `--k` is not given."""
    for name, value in vars(args).items():
        least = 0 if name in ("lr", "basis_lr", "adaptivity", "seed", "head_steps") else 1e-9
        most = 1 if name in ("adaptivity", "validation_share") else math.inf
        if type(value) in (int, float) and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} is {value}: that is out of its range")
    uses = {"k": ("lora", "meprop", "sparsegrad"), "rank": ("lora", "sparsegrad"), "adaptivity": ("meprop", "sparsegrad")}
    uses |= dict.fromkeys(("support", "share", "sides", "basis_steps", "basis_lr"), ("sparsegrad",))
    for name, methods in uses.items():
        if args.method not in methods and getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} is of no use to --method {args.method}, only to {', '.join(methods)}")
    if args.method == "lora" and args.rank is not None and args.k is not None:
        parser.error("--rank sets LoRA's size and --k asks for the rank nearest to it: pass one of the two")
    if args.merge is not None and args.merge.exists() and (not args.merge.is_dir() or any(args.merge.iterdir())):
        parser.error(f"--merge {args.merge} is there already: pass a new or empty folder")
    args.k = k if args.k is None else args.k


# ---------------------------------------------------------------------------- run folders


def read(path: pathlib.Path, right: str = "begin a new run") -> dict | None:
    """What a .json or .safetensors file of a run holds; of a zip file of torch's, None. UserError if it is not there or
    not whole, with what would be `right`."""
    try:
        if path.suffix == ".json":
            return json.loads(path.read_text(encoding="utf-8"))
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum does not match")
    except Exception as error:  # as many kinds as there are formats
        raise UserError(f"{path} is missing or damaged ({error}): {right}") from None


def write_json(path: pathlib.Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, default=str) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Whole or not at all, by the first process."""
    if FIRST:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def resumed(args: argparse.Namespace) -> argparse.Namespace:
    """`args`, or with `--resume` the options that the run was begun with."""
    if args.resume is None:
        return args
    if others := [word for word in sys.argv[1:] if word.startswith("--") and not word.startswith("--resume")]:
        raise UserError(f"--resume goes on with the run's own options: leave out {', '.join(others)}")
    saved = read(args.resume / "arguments.json")
    if vars(args).keys() - saved.keys():
        raise UserError(f"{args.resume} holds no run of {sys.argv[0]} as it is today")
    paths = {key: pathlib.Path(saved[key]) for key in ("data", "merge", "mt_bench") if saved.get(key)}
    return argparse.Namespace(**{**saved, **paths, "resume": args.resume, "output_dir": args.resume})


def open_folder(args: argparse.Namespace, name: str) -> pathlib.Path:
    """The run's folder: a new one, below runs/ if not told otherwise, or the one resumed."""
    processes = accelerate.PartialState()
    if args.batch_size % processes.num_processes:
        raise UserError(f"--batch-size {args.batch_size} is shared by {processes.num_processes} processes: pass a multiple of that")
    if args.resume is None and args.output_dir is None:
        candidates = (pathlib.Path("runs") / (name if i == 1 else f"{name}-{i}") for i in range(1, 10**6))
        args.output_dir = next(path for path in candidates if not (path / "arguments.json").exists())
    elif args.resume is None and (args.output_dir / "arguments.json").exists():
        raise UserError(f"{args.output_dir} holds a run already; pass --resume {args.output_dir}, or another --output-dir")
    for path in filter(None, (args.output_dir, args.merge)):
        path.mkdir(parents=True, exist_ok=True)
    processes.wait_for_everyone()  # before one of them writes there
    return args.output_dir


def finished(folder: pathlib.Path) -> dict | None:
    """The results of a run that is through."""
    if not (folder / "results.json").exists():
        return None
    print(f"{folder} is finished already; its results:")
    return read(folder / "results.json")


# -------------------------------------------------------------------------- models, data


def hub_reachable(seconds: float = 3.0) -> bool:
    """Whether the Hugging Face hub answers within `seconds`."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    with contextlib.suppress(OSError, ValueError):
        request = urllib.request.Request(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), method="HEAD")
        urllib.request.urlopen(request, timeout=seconds).close()
        return True
    return False


def stand_in(args: argparse.Namespace, of: str) -> str:
    """What to tell if something else must stand in for the model or the data `of` the paper; "" if nothing must. Sets
    `args.hub`, whether the hub is to be asked."""
    if args.hub is None:  # else a resumed run, what it was begun with
        local = args.data is not None and args.model is not None and os.path.exists(args.model)
        args.hub = not local and in_any_process(hub_reachable())
    missing = " and ".join(what for what in ("model", "data") if getattr(args, what) is None and not args.hub)
    return missing and f"stand-in {missing}, for want of a hub: these are not the numbers of {of}"


def from_pretrained(auto_class, name: str, hub: bool, dtype: torch.dtype | None = None, **options):
    """`auto_class.from_pretrained`, from a folder, the hub, or what the hub left in the cache; a
    model comes on the device, its weights in `dtype`, whatever they are stored in."""
    if dtype is not None:
        old = tuple(map(int, transformers.__version__.split(".")[:2])) < (4, 56)
        options["torch_dtype" if old else "dtype"] = dtype
    try:
        loaded = auto_class.from_pretrained(name, local_files_only=not hub and not os.path.isdir(name), **options)
        return loaded if dtype is None else loaded.to("cuda" if torch.cuda.is_available() else "cpu")
    except Exception as error:  # a damaged file raises as many kinds as there are formats
        where = options.get("gguf_file", name)
        right = "a folder with config.json, a whole .gguf file" + (", or a hub's name" if hub else ", or leave it out")
        raise UserError(f"--model {where} cannot be loaded ({type(error).__name__}: {error}); pass {right}") from None


def package_file(package: str, path: str, install: str = "pip install -r requirements.txt") -> pathlib.Path:
    """The file at `path` in an installed `package`; `install` is the command that brings it."""
    if not (spec := importlib.util.find_spec(package)):
        raise UserError(f"no hub, and the package {package.replace('_', '-')} is not installed: {install}")
    return pathlib.Path(spec.origin).parent / path


def draw_rows(args: argparse.Namespace, splits: dict) -> dict:
    """Data sets "train" and others, as they are to be used: with `--held-out`, rows of "train" take the place of all
    others; with `--max-train-samples`, "train" has no more. Both are drawn by the seed."""
    if args.held_out:
        if args.held_out >= (there := len(splits["train"])):
            raise UserError(f"--held-out {args.held_out}: there are {there} training rows, and some must be left")
        parts = splits["train"].train_test_split(args.held_out, seed=args.seed)
        splits = dict.fromkeys(splits, parts["test"]) | {"train": parts["train"]}
    if args.max_train_samples:
        train = splits["train"].shuffle(seed=args.seed)
        splits = splits | {"train": train.select(range(min(args.max_train_samples, len(train))))}
    return splits


# -------------------------------------------------------------------------------- methods


def apply_method(
    model: nn.Module, linears: dict[str, nn.Module], args: argparse.Namespace, folder: pathlib.Path, rows: Collection, collate
) -> dict:
    """Put `args.method` on `linears` of `model`, in place; returns what to report. Trains, beside the method's own
    parameters, all but the weights of `linears` (as the paper does for GLUE), or with `args.freeze` only the
    `head_parameters`. What trains is kept in fp32. `rows`, collated by `collate`, are what bases are found on. In `folder`
    it leaves what `--resume` needs, and takes the bases from there if a run is gone on with."""
    weights, head = {f"{name}.weight" for name in linears}, head_parameters(model)
    for name, p in model.named_parameters():
        if p.is_floating_point():
            p.requires_grad_(args.method == "ft" if name in weights else name in head or not args.freeze)
    folder.mkdir(parents=True, exist_ok=True)
    info, begun = {"linears": len(linears), "basis_seconds": 0.0}, transformers.trainer_utils.get_last_checkpoint(folder)
    if args.method == "lora":
        shares = isinstance(args.k, float)
        entries = sum(round(args.k * math.prod(sparsegrad.weight_shape(m))) if shares else args.k for m in linears.values())
        info["lora_rank"] = args.rank or lora_rank(linears.values(), entries)
        if info["lora_rank"] > (most := min(min(sparsegrad.weight_shape(m)) for m in linears.values())):
            raise UserError(f"LoRA's rank is {info['lora_rank']}, but the smallest linear has room for 1 to {most}")
        config = dict(r=info["lora_rank"], lora_alpha=info["lora_rank"], base_model_name_or_path=model.config._name_or_path)
        add_peft(model, peft.LoraConfig(**config, task_type="CAUSAL_LM"), list(linears))  # save_adapter writes no classifier's
    elif begun and args.method != "ft":
        sparsegrad.load_sparsegrad_state_dict(model, read(folder / ADAPTER))
    elif args.method != "ft":
        bases = None
        if args.method == "sparsegrad":
            start, order = time.perf_counter(), torch.Generator().manual_seed(args.seed)
            batches = torch.utils.data.DataLoader(
                rows, args.batch_size, shuffle=True, generator=order, collate_fn=lambda batch: collate(own_rows(batch))
            )
            info["basis_steps"] = min(args.basis_steps, len(rows) // args.batch_size or 1)  # one pass at most
            print(f"bases: {info['basis_steps']} steps of back-propagation, then HOSVD ...", flush=True)
            bases = sparsegrad.find_bases(
                model, batches, list(linears), share=args.share, sides=args.sides, rank=args.rank,
                n_steps=info["basis_steps"], lr=args.basis_lr, loss_fn=loss_of_part,
            )  # fmt: skip
            info["basis_seconds"] = round(time.perf_counter() - start, 2)
        names = None if bases else list(linears)  # dense gradients, as the Trainer wants:
        print(sparsegrad.patch_model(model, bases, args.k, names, support=args.support, cut="step"))
        save_adapter(model, folder)
    for p in model.parameters():
        if p.requires_grad:  # tiny steps vanish in half precision
            p.data = p.data.to(torch.promote_types(p.dtype, torch.float32))
    if begun:
        return read(folder / "method.json")
    write_json(folder / "method.json", info)
    return info


def target_linears(model: nn.Module, target: str) -> dict[str, nn.Module]:
    """Name -> linear, of those that `--target` names."""
    found = {} if target == "attention" else sparsegrad.mlp_linears(model)
    return found if target == "mlp" else found | sparsegrad.mlp_linears(model, ATTENTION)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What lies outside the pretrained trunk: a classifier's head. A language model's counts as trunk."""
    outside = {name: p for name, p in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")}
    return outside if model.get_output_embeddings() is None else {}


def train_head(model: nn.Module, args: argparse.Namespace, folder: pathlib.Path, rows: Collection, collate, **training) -> None:
    """Linear probing: the head alone trains for `args.head_steps`, before bases are found and the method begins. A run
    that is gone on with has it in its checkpoint. `training`: TrainingArguments. Raises UserError if there is no head."""
    folder.mkdir(parents=True, exist_ok=True)
    if not args.head_steps or transformers.trainer_utils.get_last_checkpoint(folder):
        return
    if not (head := head_parameters(model)):
        raise UserError("--head-steps is of no use: this model has no head beside its trunk")
    for name, p in model.named_parameters():
        p.requires_grad_(name in head)
    probing = argparse.Namespace(**vars(args) | {"lr": HEAD_RATE, "max_steps": args.head_steps})
    training |= dict(eval_strategy="no", save_strategy="no", lr_scheduler_type="linear")
    shell = copy.copy(model)  # of the same modules and parameters: it takes the marks and mixed precision of this Trainer
    make_trainer(shell, probing, folder, {"train": rows}, collate, training=training).train()


def own_rows(batch: list) -> list:
    """The rows of a batch that are this process's: one of some other's, if there are too few."""
    processes = accelerate.PartialState()
    return batch[processes.process_index :: processes.num_processes] or batch[:1]


def weight(labels: torch.Tensor) -> torch.Tensor:
    """Of the loss of this process's part of a batch, so that the mean over processes is the loss of the batch."""
    labels = labels[:, 1:] if labels.dim() == 2 else labels  # a language model does not predict the first
    count = (labels != -100).sum()
    return count / accelerate.utils.reduce(count.float(), "mean")


def loss_of_part(model: nn.Module, batch: dict) -> torch.Tensor:
    batch = {key: value.to(model.device) for key, value in batch.items()}
    return model(**batch).loss * weight(batch["labels"])


def lora_rank(linears: Iterable[nn.Module], entries: int) -> int:
    """The LoRA rank whose parameter count is nearest to `entries` over all `linears`."""
    per_rank = sum(sum(sparsegrad.weight_shape(linear)) for linear in linears)
    return max(1, round(entries / per_rank))


def add_peft(model: nn.Module, config, names: list[str]) -> None:
    """The layers of a PEFT `config` inside the plain model, so that checkpoints hold all that trains."""
    config.target_modules = set(names)
    flags = {p: p.requires_grad for p in model.parameters()}
    peft.inject_adapter_in_model(config, model)
    for p, flag in flags.items():  # PEFT freezes all but its own
        p.requires_grad_(flag)


def make_optimizer(model: nn.Module, args: argparse.Namespace) -> torch.optim.AdamW:
    """SparseGradAdamW, a group of the cores, then one of all else that trains, if any. AdamW for a method without."""
    cores = dict.fromkeys(layer.core for layer in sparsegrad.sparsegrad_layers(model).values())
    others = [p for p in model.parameters() if p.requires_grad and p not in cores]
    if not cores:
        return torch.optim.AdamW(others, lr=args.lr, weight_decay=0.0, fused=True)
    groups = [{"params": [*cores], "adaptivity": args.adaptivity}, {"params": others}]
    return sparsegrad.SparseGradAdamW([group for group in groups if group["params"]], lr=args.lr, weight_decay=0.0)


# ----------------------------------------------------------------------- adapters, merging


def save_tensors(tensors: dict[str, torch.Tensor], path: pathlib.Path) -> None:
    """Whole or not at all, by the first process."""
    if FIRST:
        part = path.with_suffix(".part")
        save_file(tensors, part, metadata={"format": "pt"})
        part.replace(path)


def save_adapter(model: nn.Module, folder: pathlib.Path) -> None:
    """What training changed, where it is less than the model: `sparsegrad.safetensors`, or
    PEFT's two files if LoRA alone trains (`PeftModel.from_pretrained` reads them)."""
    if sparsegrad.sparsegrad_layers(model):
        save_tensors(sparsegrad.sparsegrad_state_dict(model), folder / ADAPTER)
    elif all("lora_" in name for name, p in model.named_parameters() if p.requires_grad):
        state = sharded.get_model_state_dict(model, options=WHOLE)
        state = peft.get_peft_model_state_dict(model, state, save_embedding_layers=False)
        state = {f"base_model.model.{name}": t.contiguous() for name, t in state.items()}
        save_tensors(state, folder / "adapter_model.safetensors")
        if FIRST:
            model.peft_config["default"].save_pretrained(folder)


def merge(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The plain model with what was learned, in `dtype`: no adapter, no core, nothing quantised."""
    if sparsegrad.sparsegrad_layers(model):
        sparsegrad.unpatch_model(model)
    if not all(p.is_floating_point() for p in model.parameters()):
        model = model.dequantize()  # before LoRA is added: PEFT would quantise the sum, and lose most of what was learned
    for name, module in list(model.named_modules()):
        if hasattr(module, "lora_A"):
            plain = module.get_base_layer()
            plain.weight.data += module.get_delta_weight("default").to(plain.weight)
            model.set_submodule(name, plain)
    for attribute in ("peft_config", "_hf_peft_config_loaded", "hf_quantizer", "is_quantized", "quantization_method"):
        vars(model).pop(attribute, None)
    vars(model.config).pop("quantization_config", None)  # a GGUF's, which was dequantised when it was loaded
    return model.to(dtype)


# ------------------------------------------------------------------------------- training


class LengthGroupedSampler(transformers.trainer_pt_utils.LengthGroupedSampler):
    """That of transformers, which saves padding, but drawn by seed and epoch alone, so that a resumed run sees the same
    batches. `trainer` is set by the Trainer that it belongs to, whose state is made anew as training begins."""

    def __iter__(self):
        self.generator = torch.Generator().manual_seed(self.trainer.args.seed * 1000 + int(self.trainer.state.epoch or 0))
        return super().__iter__()


WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


class SparseGradTrainer(transformers.Trainer):
    """The Trainer, with batches by length where a datasets.Dataset has `input_ids`. Its
    checkpoints hold the parameters that train, not the frozen ones, whole also where FSDP2 has sharded them."""

    def _get_train_sampler(self, *args):
        rows = self.train_dataset
        if not isinstance(rows, datasets.Dataset) or "input_ids" not in rows.column_names:
            return super()._get_train_sampler(*args)
        size, lengths = self.args.train_batch_size * self.args.world_size, [len(ids) for ids in rows["input_ids"]]
        sampler = LengthGroupedSampler(size, lengths=lengths)
        sampler.trainer = self
        return sampler

    def get_train_dataloader(self):
        """Accelerate's own would fill up the last batch of an epoch, where the rows are too few for all processes."""
        if self.args.world_size == 1:
            return super().get_train_dataloader()
        rows, size = self.train_dataset, self.args.train_batch_size * self.args.world_size
        sampler, collate = self._get_train_sampler(), self.data_collator
        return torch.utils.data.DataLoader(rows, size, sampler=sampler, collate_fn=lambda batch: collate(own_rows(batch)))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        counted = self.args.average_tokens_across_devices  # then the Trainer weights by tokens
        return loss if return_outputs or counted else loss * weight(inputs["labels"])

    def save_model(self, output_dir=None, _internal_call=False):
        os.makedirs(output_dir, exist_ok=True)
        trains = {name for name, p in self.model.named_parameters() if p.requires_grad}
        state = sharded.get_model_state_dict(self.model, options=WHOLE)
        save_tensors({name: tensor for name, tensor in state.items() if name in trains}, pathlib.Path(output_dir, TRAINED))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        state = read(pathlib.Path(resume_from_checkpoint) / TRAINED)
        sharded.set_model_state_dict(self.model, state, options=WHOLE)

    def _load_best_model(self):
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir):
        state = sharded.get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=WHOLE)
        if FIRST:
            torch.save(state, os.path.join(output_dir, "optimizer.pt"))
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, "scheduler.pt"))

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            state = torch.load(os.path.join(checkpoint, "optimizer.pt"), map_location="cpu", weights_only=True)
            sharded.set_optimizer_state_dict(self.model, self.optimizer.optimizer, state, options=WHOLE)
            self.lr_scheduler.load_state_dict(torch.load(os.path.join(checkpoint, "scheduler.pt"), weights_only=True))


class Measure(transformers.TrainerCallback):
    """Steps per second and memory; stops at a loss that is not finite; at Ctrl-C has the step finished, and the epoch's
    evaluation if it ends there, a checkpoint written, and exits."""

    def __init__(self, folder: pathlib.Path | None = None):
        self.folder = folder  # of the run, for --resume
        self.seconds, self.steps, self.pressed, self.interrupted = 0.0, 0, False, False

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
        if in_any_process(self.pressed):  # at an epoch's end its evaluation comes first
            self.interrupted, control.should_save = True, control.should_save or state.epoch % 1 > 0

    def on_save(self, args, state, control, **kwargs):
        if self.interrupted:
            accelerate.PartialState().wait_for_everyone()  # all have written
            if FIRST:
                on = f"go on with: python {sys.argv[0]} --resume {self.folder}"
                print(f"\ninterrupted at step {state.global_step}; {on}", file=sys.stderr)
            sys.exit(130)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for key in (key for key in logs if key.endswith("loss")):
            if not math.isfinite(logs[key]):
                raise Diverged(f"{key} is {logs[key]} at step {state.global_step}: lower --lr (it is {args.learning_rate:g})")

    def on_interrupt(self, signum, frame):
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        if FIRST:
            print("\nstopping after this step (Ctrl-C again: at once) ...", file=sys.stderr, flush=True)

    def result(self) -> dict:
        rate = {"steps_per_second": round(self.steps / self.seconds, 3) if self.steps else None}
        if torch.cuda.is_available():
            return rate | {"peak_memory_mib": torch.cuda.max_memory_allocated() >> 20, "memory_is": "CUDA allocator"}
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> (20 if sys.platform == "darwin" else 10)
        return rate | {"peak_memory_mib": peak, "memory_is": "resident set"}


def make_trainer(
    model: nn.Module, args: argparse.Namespace, folder: pathlib.Path, data: dict[str, Collection], collate, *,
    callbacks: Iterable = (), training: dict | None = None, shard: bool = False, **options,
) -> SparseGradTrainer:  # fmt: skip
    """A Trainer of `data["train"]` that evaluates on `data["dev"]`, or on all others by name. `training` are
    TrainingArguments beyond those that `args` sets, `options` the Trainer's. `shard`: FSDP2 over the processes, block by
    block; what trains stays in fp32, the frozen rest in its own dtype."""
    size = args.batch_size // accelerate.PartialState().num_processes
    dev, measure = {split: rows for split, rows in data.items() if split != "train"}, Measure(args.output_dir)
    arguments = dict(
        output_dir=str(folder), seed=args.seed, learning_rate=args.lr, num_train_epochs=args.epochs, max_steps=args.max_steps or -1,
        per_device_train_batch_size=size, per_device_eval_batch_size=size, max_grad_norm=0.0, bf16=args.bf16, report_to=[],
        average_tokens_across_devices=model.get_output_embeddings() is not None, ddp_broadcast_buffers=False,
        logging_nan_inf_filter=False, dataloader_pin_memory=torch.cuda.is_available(), use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    if getattr(model, "is_quantized", False):
        model._hf_peft_config_loaded = True  # the Trainer trains no quantised model without an adapter; it has one
    if shard := shard and accelerate.PartialState().num_processes > 1:
        for module in [*(m for m in model.modules() if type(m).__name__ in model._no_split_modules), model]:
            fully_shard(module)
    trainer = SparseGradTrainer(
        model, transformers.TrainingArguments(**arguments | (training or {})), data_collator=collate,
        train_dataset=data["train"], eval_dataset=dev["dev"] if list(dev) == ["dev"] else dev,
        optimizers=(make_optimizer(model, args), None), callbacks=[measure, *callbacks], **options,
    )  # fmt: skip
    if shard:
        prepare = trainer.accelerator.prepare_model  # autocast alone: else it would wrap the shards in DDP
        trainer.accelerator.prepare_model = functools.partial(prepare, evaluation_mode=True, device_placement=False)
    trainer.measure = measure
    return trainer


def train(trainer: SparseGradTrainer, args: argparse.Namespace) -> None:
    """Train, from the folder's last checkpoint if it has one, and write the adapter. Raises UserError, before
    anything is changed, if the checkpoint lacks a file or a file is damaged. Ctrl-C exits, and says how to go on."""
    folder, over = pathlib.Path(trainer.args.output_dir), False
    if checkpoint := transformers.trainer_utils.get_last_checkpoint(folder):
        check_checkpoint(pathlib.Path(checkpoint))
        state = transformers.TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
        over = state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]
        if state.best_model_checkpoint:
            read(pathlib.Path(state.best_model_checkpoint) / TRAINED)
    elif not (args.output_dir / "arguments.json").exists():  # of the first seed; a start that failed before blocks no folder
        write_json(args.output_dir / "arguments.json", vars(args))
    print(f"{'resuming from ' + os.path.basename(checkpoint) if checkpoint else 'training'} ...", flush=True)
    before = signal.signal(signal.SIGINT, trainer.measure.on_interrupt)
    try:
        if over:  # the Trainer would take one step more
            trainer.state = state
            trainer._load_from_checkpoint(state.best_model_checkpoint or checkpoint)
        else:
            trainer.train(resume_from_checkpoint=checkpoint)
    finally:
        signal.signal(signal.SIGINT, before)
    save_adapter(trainer.model, folder)


def check_checkpoint(folder: pathlib.Path) -> None:
    """UserError if a file is not there or not whole: the Trainer goes on without some of them."""
    processes = len(list(folder.glob("rng_state_*.pth")))  # 0: one alone
    random = [f"rng_state_{i}.pth" for i in range(processes)] or ["rng_state.pth"]
    if max(processes, 1) != accelerate.PartialState().num_processes:
        print("note:  another number of processes than before: dropout is drawn anew")
        if transformers.__version__ < "5":  # it would take each process's rows from the checkpoint
            raise UserError(f"transformers 4 resumes by the same number of processes only, {max(processes, 1)}")
    for path in map(folder.joinpath, (*CHECKPOINT, *random)):
        read(path, f"remove {folder.name} to go on from the checkpoint before it, or begin a new run")


# -------------------------------------------------------------------------------- results


def finish(trainer: SparseGradTrainer, args: argparse.Namespace, info: dict, used: dict, tokenizer=None, **extra) -> dict:
    """Evaluate the trained model, merge it if `--merge` asks for it, and write and return results.json: metrics, sizes,
    time and memory, `info` of `apply_method`, what model and data were `used`, and `extra`."""
    model, measured = trainer.model, trainer.measure.result()
    evaluations = [entry for entry in trainer.state.log_history if any(key.startswith("eval_") for key in entry)]
    final = {}  # the last evaluation, of every dev set; anew if the best checkpoint came back after it
    for entry in evaluations if not trainer.args.load_best_model_at_end else ():
        final |= entry if entry["step"] == trainer.state.global_step else {}
    summary = sparsegrad.summary(model)
    results = {
        "arguments": vars(args).copy(), "seed": args.seed, "used": used,
        "metrics": final or trainer.evaluate(), "evaluations": evaluations, "steps": trainer.state.global_step,
        "trainable_parameters": summary.core + summary.dense, "touched_entries": summary.touched + summary.dense,
        "core_entries": summary.touched, **info, **extra, **measured,
        "optimizer_bytes": sum(t.nbytes for of in trainer.optimizer.state.values() for t in of.values() if torch.is_tensor(t)),
        "file_bytes": sum(path.stat().st_size for path in pathlib.Path(trainer.args.output_dir).glob("*.safetensors")),
    }  # fmt: skip
    if args.merge and FIRST:
        for part in (merge(model, model.dtype), tokenizer):
            if part is not None:
                part.save_pretrained(args.merge)
    results |= provenance()
    write_json(pathlib.Path(trainer.args.output_dir) / "results.json", results)
    return results


def provenance() -> dict:
    """With which versions, from which commit and on what a result was measured."""
    there = {(d.metadata["Name"] or "").lower() for d in importlib.metadata.distributions()}
    versions = {package: importlib.metadata.version(package) for package in PACKAGES if package in there}
    command, commit = ["git", "-C", pathlib.Path(__file__).parent, "describe", "--always", "--dirty", "--abbrev=12"], None
    with contextlib.suppress(OSError):
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    cpu, cpuinfo = platform.processor() or platform.machine(), pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    processes = accelerate.PartialState().num_processes
    machine = {"cpu": cpu, "threads": torch.get_num_threads(), "processes": processes, "gpu": gpu, "system": platform.system()}
    return {"versions": {"python": platform.python_version(), **versions}, "git_commit": commit, "machine": machine}


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
