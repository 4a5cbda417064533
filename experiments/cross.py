"""What the hyperbolic cross is made of: how much of unseen gradients other choices of k entries hold.

    python -m experiments.cross FILE    its tables; measures first, for a quarter of an hour, if there is no FILE

MiniLM on Rotten Tomatoes with a fresh and with a trained head (300 steps alone), 32 sentences a step, and the Q4_1
SmolLM2-135M on its own chats, 2 a step, every sixth block. Only the linears of one target train, at 5e-5. Bases and
supports come from the first gradients, 30 where nothing else is said. Each holds 1 % of a linear's entries; that the
attention's have 2 % makes as many. Two shares of the squared norm, means over the layers: of each of the next 12
gradients ("step"), and of the mean of these ("mean"), in which noise has less part.
"""

import json
import pathlib
import random
import statistics
import sys

import torch
import transformers

import finetune
import llama_run
import sparsegrad
from experiments.claim import grid

K, STEPS, UNSEEN, HEAD_STEPS = 0.01, 120, 12, 300


def spectra(grams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, n) -> eigenvectors (n, n), their shares of the energy (n,), by falling share."""
    values, vectors = torch.linalg.eigh(grams.double() / grams.trace())
    return vectors.flip(1).float(), values.flip(0).clamp(min=0).float()


class Bases:
    """Of gradients (n, out, in): V (out, out) with `rows` (out,), U (in, in) with `columns` (in,)."""

    def __init__(self, grads: torch.Tensor):
        self.V, self.rows = spectra(torch.einsum("toi,tpi->op", grads, grads))
        self.U, self.columns = spectra(torch.einsum("toi,toj->ij", grads, grads))

    def rotate(self, grads: torch.Tensor) -> torch.Tensor:
        return self.V.T @ grads @ self.U  # (out, out) @ (n, out, in) @ (in, in)


def largest(expected: torch.Tensor, k: int) -> torch.Tensor:
    """The mask (out, in) of the k entries that are largest."""
    return torch.zeros(expected.numel()).index_fill_(0, expected.flatten().topk(k).indices, 1).view_as(expected).bool()


def corner(shape: tuple[int, int], r: int, c: int) -> torch.Tensor:
    """The mask (out, in) of the leading r rows and c columns."""
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:r, :c] = True
    return mask


def best_sides(rows: torch.Tensor, columns: torch.Tensor, k: int) -> tuple[int, int]:
    """Of the corners with k entries, or a few less, the one that should hold most: a rank for each side."""
    sides = [(r, min(k // r, len(columns))) for r in range(1, min(k, len(rows)) + 1)]
    return max(sides, key=lambda side: rows[: side[0]].sum() * columns[: side[1]].sum())


def outer(rows: torch.Tensor, columns: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    """λ_i μ_j (out, in); nothing beyond `rank`."""
    expected = torch.outer(rows, columns)
    if rank:
        expected[rank:], expected[:, rank:] = 0, 0
    return expected


def held(cores: torch.Tensor, mask: torch.Tensor) -> list[float]:
    """[share of a step, share of the mean] of cores (n, out, in) that a mask (out, in) holds."""
    of_step = (cores[:, mask].square().sum(1) / cores.square().sum((1, 2))).mean()
    mean = cores.mean(0)
    return [of_step.item(), (mean[mask].square().sum() / mean.square().sum()).item()]


def best(cores: torch.Tensor, k: int) -> list[float]:
    """The same of the k largest entries of each step, and of the mean's own."""
    of_step = statistics.mean(sparsegrad.topk_energy(core, k) for core in cores)
    return [of_step, sparsegrad.topk_energy(cores.mean(0), k)]


def choices(seen: torch.Tensor, unseen: torch.Tensor, k: int, shared: Bases) -> dict[str, list[float]]:
    """Choice -> shares, of one layer's gradients (n, out, in)."""
    own, mean = Bases(seen[:30]), Bases(seen[:30].mean(0, keepdim=True))
    cores, by_index = own.rotate(unseen), [1 / torch.arange(1, n + 1) for n in seen.shape[1:]]
    found = {
        "best k of each step, complete": best(cores, k),
        "best k of each step, rank 256": best(cores[:, :256, :256], k),
        "best k of each step, no basis": best(unseen, k),
        "cross": held(cores, largest(outer(own.rows, own.columns), k)),
        "cross, rank 256": held(cores, largest(outer(own.rows, own.columns, 256), k)),
        "cross, rank 128": held(cores, largest(outer(own.rows, own.columns, 128), k)),
        "cross, λ and μ^½": held(cores, largest(outer(own.rows, own.columns.sqrt()), k)),
        "cross, λ^½ and μ": held(cores, largest(outer(own.rows.sqrt(), own.columns), k)),
        "cross of 1 / ij": held(cores, largest(outer(*by_index), k)),
        "corner, a rank for each side": held(cores, corner(cores.shape[1:], *best_sides(own.rows, own.columns, k))),
        "corner, square": held(cores, corner(cores.shape[1:], int(k**0.5), int(k**0.5))),
        "largest measured energy": held(cores, largest(own.rotate(seen[:30]).square().sum(0), k)),
        "largest in the mean gradient": held(cores, largest(own.rotate(seen[:30].mean(0)).abs(), k)),
        "largest measured energy, no basis": held(unseen, largest(seen[:30].square().sum(0), k)),
        "cross of the mean gradient's spectra": held(mean.rotate(unseen), largest(outer(mean.rows, mean.columns), k)),
        "cross, shared": held(shared.rotate(unseen), largest(outer(shared.rows, shared.columns), k)),
    }
    for steps in (5, STEPS):
        bases = Bases(seen[:steps])
        found[f"cross, {steps} steps"] = held(bases.rotate(unseen), largest(outer(bases.rows, bases.columns), k))
    return found


def pooled(seen: list[torch.Tensor], unseen: list[torch.Tensor], k: int) -> list[float]:
    """What the layers of a role, k entries each, hold of all their energy together, then what as many entries hold that
    are shared out where λ_i μ_j times the layer's energy is largest."""
    bases = [Bases(grads[:30]) for grads in seen]
    cores = [of.rotate(grads).square().mean(0) for of, grads in zip(bases, unseen)]  # (out, in) each
    expected = torch.cat([outer(of.rows, of.columns) * grads[:30].square().sum() for of, grads in zip(bases, seen)])  # (L out, in)
    equal = sum(core[largest(outer(of.rows, of.columns), k)].sum() for of, core in zip(bases, cores))
    shared_out = torch.cat(cores)[largest(expected, k * len(seen))].sum()
    return [(part / sum(core.sum() for core in cores)).item() for part in (equal, shared_out)]


def role(name: str) -> str:
    return ".".join(part for part in name.split(".") if not part.isdecimal())


def of_model(model, batches: list[dict], target: str) -> dict:
    """{"choices": choice -> [step, mean], "pooled": [equal, shared out]}, means over layers and over roles."""
    names = list(finetune.target_linears(model, target))
    names = [name for name in names if not name.startswith("model.layers") or int(name.split(".")[2]) % 6 == 0]
    stacks = sparsegrad.collect_gradients(model, batches, names, n_steps=STEPS + UNSEEN)
    found, together, roles = [], [], {}
    for name in names:
        roles.setdefault(role(name), []).append(name)
    for layers in roles.values():
        seen, unseen = ([stacks[name][part] for name in layers] for part in (slice(STEPS), slice(STEPS, None)))
        k = round(K * (2 if target == "attention" else 1) * seen[0][0].numel())
        shared = Bases(torch.cat([grads[:30] for grads in seen]))
        found += [choices(a, b, k, shared) for a, b in zip(seen, unseen)]
        together.append(pooled(seen, unseen, k))
    mean = {name: [statistics.mean(of[name][i] for of in found) for i in (0, 1)] for name in found[0]}
    return {"choices": mean, "pooled": [statistics.mean(of) for of in zip(*together)]}


def models():
    """Column -> (model, batches, target)."""
    from tutorials.common import batches, minilm, rotten_tomatoes  # it sets torch and matplotlib to its taste

    model, tokenizer = minilm()
    data = batches(tokenizer, rotten_tomatoes()["train"], 32)
    yield "MiniLM", model, data, "mlp"
    yield "MiniLM, attention", model, data, "attention"
    optimizer = torch.optim.AdamW(finetune.head_parameters(model).values(), 1e-2)
    for batch in random.Random(1).choices(data, k=HEAD_STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        model.zero_grad()
    yield "MiniLM, trained head", model, data, "mlp"
    sys.argv = ["llama_run.py", "--max-length", "256"]
    llama_run.CHITCHAT = 2 * (STEPS + UNSEEN) * 5 // 4  # a fifth of them is to validate
    args = llama_run.parse()
    args.hub = False
    model, tokenizer = llama_run.load_model(args), llama_run.load_tokenizer(args)
    rows = llama_run.prepare(llama_run.load_trees(args)[0], tokenizer, args, "train", None)
    data = torch.utils.data.DataLoader(rows, 2, collate_fn=transformers.DataCollatorForSeq2Seq(tokenizer))
    yield "SmolLM2", model, data, "mlp"
    yield "SmolLM2, attention", model, data, "attention"


def tables(measured: dict) -> str:
    heads = ["", *(f"{column}, {part}" for column in measured for part in ("step", "mean"))]
    names = next(iter(measured.values()))["choices"]
    rows = [[name, *(f"{share:.2f}" for of in measured.values() for share in of["choices"][name])] for name in names]
    pools = [[column, *(f"{share:.3f}" for share in of["pooled"])] for column, of in measured.items()]
    return grid(heads, rows) + "\n\n" + grid(["", "k each", "k shared out"], pools)


def main() -> None:
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=pathlib.Path, help="such as experiments/results/cross.json")
    path = parser.parse_args().file
    if not path.exists():
        measured = {}
        for column, *of in models():
            measured[column] = of_model(*of)
            print(tables({column: measured[column]}), flush=True)
        finetune.write_json(path, {"shares": measured, **finetune.provenance()})
    print(tables(json.loads(path.read_text(encoding="utf-8"))["shares"]))


if __name__ == "__main__":
    finetune.run_script(main)
