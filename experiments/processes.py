"""What several processes send and hold, and what the search for the bases gains by them.

    torchrun --nproc-per-node 2 -m experiments.processes    measure, on CPUs; writes results/processes.json
    python -m experiments.processes                         print the tables of that file

Bytes are counted where DistributedDataParallel hands its buckets to the network, and where `find_bases` sums. They do
not depend on the weights, so those are random, and so are the bases. What a LLaMA-2 70B holds is computed: a model on
the meta device is patched, and the sizes of its tensors are added up.
"""

import statistics
import time

import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import finetune
import llama_run
import sparsegrad
from experiments import benchmark
from experiments.claim import grid

FILE = benchmark.RESULTS / "processes.json"
METHODS = ["ft", "lora", "meprop", "sparsegrad", "sparsegrad:rank=128", "sparsegrad:rank=256:fixed"]
METHODS += ["sparsegrad:narrow:rank=8:k=all"]
LLAMA_70B = dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
DEVICES = (1, 4, 8)
ROUNDS = 3
SEARCHES = {"shared, complete": {}, "each layer's own, rank 128": {"share": "layer", "rank": 128}}


# -------------------------------------------------------------------------------- measured


def counted(sent: list[int], tensor: torch.Tensor) -> torch.Tensor:
    sent.append(tensor.numel() * tensor.element_size())
    return tensor


def count_and_reduce(sent: list[int], bucket: dist.GradBucket):
    counted(sent, bucket.buffer())
    return allreduce_hook(None, bucket)


def random_bases(model: nn.Module) -> dict[str, sparsegrad.Basis]:
    """Complete ones, of two shapes."""
    shapes = {name: sparsegrad.weight_shape(m) for name, m in sparsegrad.mlp_linears(model).items()}
    made = {
        (out, in_): sparsegrad.Basis(torch.randn(in_, in_), torch.randn(out, out), torch.rand(in_), torch.rand(out))
        for out, in_ in {*shapes.values()}
    }
    return {name: made[shape] for name, shape in shapes.items()}


def wire() -> dict[str, int]:
    """Method -> bytes of gradients that a process hands over in a step. BERT-base, its MLP linears and the classifier."""
    args = benchmark.parse(["--arch", "bert-base", "--batch", "2", "--seq", "8"])
    config, found = benchmark.make_config(args.arch, args.layers), {}
    base, batch = benchmark.make_model(config, args), next(benchmark.make_batches(config, args))
    bases = random_bases(base)
    for name in METHODS:
        model, _ = benchmark.build(base, list(bases), benchmark.Method(name), bases, args)
        together, sent = nn.parallel.DistributedDataParallel(model, broadcast_buffers=False), []
        together.register_comm_hook(sent, count_and_reduce)
        together(**batch).loss.backward()
        found[name] = sum(sent)
    return found


def search() -> dict[str, dict]:
    """Kind of bases -> seconds of searches of 12 steps of 32 sentences, MiniLM, by one process and by all, each with one
    thread, in turn, and the bytes that each process of the last hands over."""
    from tutorials.common import batches, minilm, rotten_tomatoes  # it sets torch and matplotlib to its taste

    model, tokenizer = minilm()
    whole = batches(tokenizer, rotten_tomatoes()["train"].select(range(12 * 32)), 32)
    here, world = dist.get_rank(), dist.get_world_size()
    parts = [{key: value[here::world] for key, value in batch.items()} for batch in whole]
    joined, all_reduce, sent, found = sparsegrad._joined, dist.all_reduce, [], {}

    def seconds(data, options) -> float:
        start = time.perf_counter()
        sparsegrad.find_bases(model, data, n_steps=12, **options)
        return time.perf_counter() - start

    for name, options in SEARCHES.items():
        found[name] = {"alone": [], "together": []}
        for _ in range(ROUNDS):
            sparsegrad._joined = lambda: False
            if here == 0:
                found[name]["alone"].append(seconds(whole, options))
            sparsegrad._joined = joined
            dist.barrier()
            sent.clear()
            dist.all_reduce = lambda tensor: all_reduce(counted(sent, tensor))
            found[name]["together"].append(seconds(parts, options))
            dist.all_reduce = all_reduce
        found[name]["bytes"] = sum(sent)
    return found


# -------------------------------------------------------------------------------- computed


def sizes(model: nn.Module) -> tuple[int, int, int]:
    """Bytes of what FSDP2 shards (parameters, gradients and two moments of what trains), of what it does not (buffers),
    and of the largest block."""

    def size(tensors) -> int:
        return sum(t.numel() * t.element_size() for t in tensors)

    trained = size(p for p in model.parameters() if p.requires_grad)
    blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    return size(model.parameters()) + 3 * trained, size(model.buffers()), max(size(m.parameters()) for m in blocks)


def llama_70b() -> list[list[str]]:
    """Rows: method, what trains, GB a device of 1, 4 and 8, without activations: the share of what is sharded, and two
    whole blocks, the one at work and the next."""
    rows = []
    for name in ("ft", "lora:rank=32", "sparsegrad:rank=512:k=100000:fixed", "sparsegrad:rank=128:k=all"):
        method = benchmark.Method(name)
        with torch.device("meta"):
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_70B)).to(torch.bfloat16)
            linears = llama_run.every_nth(model, 3)
            bases = {}
            for layer, linear in linears.items():
                out, in_ = sparsegrad.weight_shape(linear)
                spectra = (torch.empty(method.rank), torch.empty(method.rank)) if method.rank else ()
                bases[layer] = sparsegrad.Basis(torch.empty(in_, method.rank or 1), torch.empty(out, method.rank or 1), *spectra)
        model.requires_grad_(False)
        if method.name == "sparsegrad":
            sparsegrad.patch_model(model, bases, None if method.k == 1.0 else method.k, **method.ways)
        elif method.name == "lora":
            import peft

            finetune.add_peft(model, peft.LoraConfig(r=method.rank), list(linears))
        else:
            for linear in linears.values():
                linear.weight.requires_grad_(True)
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
        sharded, whole, block = sizes(model)
        trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
        each = [(sharded / n + whole + (2 * block if n > 1 else 0)) / 1e9 for n in DEVICES]
        rows.append([f"`{name}`", f"{trains:,}", *(f"{gigabytes:,.0f}" for gigabytes in each)])
    return rows


def tables(measured: dict) -> dict[str, str]:
    full, found = measured["wire"]["ft"], []
    wired = [[f"`{name}`", f"{sent / 1e6:,.2f}", f"{sent / full:.4f}"] for name, sent in measured["wire"].items()]
    for name, run in measured["search"].items():
        faster = sorted(a / b for a, b in zip(run["alone"], run["together"]))
        seconds = [f"{statistics.median(run[key]):.1f}" for key in ("alone", "together")]
        ratio = f"{statistics.median(faster):.2f} ({faster[0]:.2f} to {faster[-1]:.2f})"
        found.append([name, *seconds, ratio, f"{run['bytes'] / 1e6:,.0f}"])
    return {
        "wire": grid(["method", "MB a step", "full = 1"], wired),
        "search": grid(["bases", "one process, s", "two, s", "times as fast", "MB sent by each"], found),
        "llama-2-70b": grid(["method", "trained numbers", *(f"{n} device{'s' * (n > 1)}, GB" for n in DEVICES)], llama_70b()),
    }


def main() -> None:
    if dist.is_initialized():
        torch.set_num_threads(1)
        measured = {"wire": wire(), "search": search(), **finetune.provenance()}
        finetune.write_json(FILE, measured)
    for name, table in tables(finetune.read(FILE)).items():
        print(f"<!-- processes: {name} -->\n{table}\n")


if __name__ == "__main__":
    finetune.run_script(main)
