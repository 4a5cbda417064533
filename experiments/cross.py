"""What the hyperbolic cross is made of: how much of unseen gradients other choices of k entries hold.

    python -m experiments.cross FILE    its tables; measures first, for a quarter of an hour, if there is no FILE

MiniLM on Rotten Tomatoes with a fresh and with a trained head (300 steps alone), 32 sentences a step, and the Q4_1
SmolLM2-135M on its own chats, 2 a step, every sixth block. Only the linears of one target train, at 5e-5. Bases and
supports come from the first gradients, 30 where nothing else is said. Each holds 1 % of a linear's entries. The
attention has half as many weights as the MLP, so 2 % of it, or ⅔ % of both kinds, is as many. The share of the squared
norm that each holds, the mean over the layers: of the next 12 gradients after those it is made of, of the mean of
these 12, in which noise has less part, and of the 12 gradients after 120 steps ("later").
"""

import json
import pathlib
import random
import statistics
import sys
from collections.abc import Iterable

import torch
import transformers

import finetune
import llama_run
import sparsegrad
from experiments import energy
from experiments.claim import grid

K, STEPS, UNSEEN, HEAD_STEPS = 0.01, 120, 12, 300


class Bases:
    """Of gradients (n, out, in): V (out, out) with the spectrum `rows` (out,), U (in, in) with `columns` (in,)."""

    def __init__(self, grads: torch.Tensor):
        grams = torch.einsum("toi,tpi->op", grads, grads), torch.einsum("toi,toj->ij", grads, grads)
        (self.rows, self.V), (self.columns, self.U) = (torch.linalg.eigh(gram / gram.trace()) for gram in grams)
        self.rows, self.columns = (values.flip(0).clamp(min=0) for values in (self.rows, self.columns))
        self.V, self.U = self.V.flip(1), self.U.flip(1)

    def rotate(self, grads: torch.Tensor) -> torch.Tensor:
        return self.V.T @ grads @ self.U  # (out, out) @ (n, out, in) @ (in, in)

    def cross(self, k: int, power: tuple[float, float] = (1, 1), rank: int | None = None) -> torch.Tensor:
        """The mask (out, in) of the k entries with the largest λ_i^a μ_j^b, none beyond `rank`."""
        expected = torch.outer(self.rows ** power[0], self.columns ** power[1])
        if rank:
            expected[rank:], expected[:, rank:] = 0, 0
        return largest(expected, k)


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


def held(cores: torch.Tensor, mask: torch.Tensor) -> float:
    """The share of the squared norm of cores (n, out, in) that a mask (out, in) holds, the mean over them."""
    return (cores[:, mask].square().sum(1) / cores.square().sum((1, 2))).mean().item()


def best(cores: torch.Tensor, k: int, rank: int | None = None) -> float:
    """The same of the k largest entries of each, none beyond `rank`."""
    return statistics.mean(energy.best(core[:rank, :rank], k, core) for core in cores)


def choices(grads: torch.Tensor, k: int, own: Bases, shared: Bases) -> dict[str, list[float]]:
    """Choice -> what it holds of the next gradients, of their mean, and of later ones, of one layer's (n, out, in). `own`
    are the bases of its first 30, `shared` those of all layers of its role."""
    found, seen, shape = {}, grads[:30], grads.shape[1:]
    ranks = torch.outer(*(torch.arange(1, n + 1) for n in shape))

    def parts(bases: Bases | None, steps: int) -> list[torch.Tensor]:
        """The gradients after those steps, their mean, and the last ones, between bases."""
        after, last = (of if bases is None else bases.rotate(of) for of in (grads[steps : steps + UNSEEN], grads[-UNSEEN:]))
        return [after, after.mean(0, keepdim=True), last]

    def add(parts: list[torch.Tensor], masks: dict[str, torch.Tensor]) -> None:
        found.update({name: [held(cores, mask) for cores in parts] for name, mask in masks.items()})

    rotated, plain = parts(own, 30), parts(None, 30)
    found["best k of each step"] = [best(cores, k) for cores in rotated]
    found["best k of each step, rank 256"] = [best(cores, k, 256) for cores in rotated]
    found["best k of each step, no basis"] = [best(cores, k) for cores in plain]
    add(rotated, {
        "cross": own.cross(k),
        "cross, rank 256": own.cross(k, rank=256),
        "cross, rank 128": own.cross(k, rank=128),
        "cross, λ and μ^½": own.cross(k, (1, 0.5)),
        "cross, λ^½ and μ": own.cross(k, (0.5, 1)),
        "cross of 1 / ij": largest(1 / ranks, k),
        "corner, a rank for each side": corner(shape, *best_sides(own.rows, own.columns, k)),
        "corner, square": corner(shape, int(k**0.5), int(k**0.5)),
        "largest measured energy": largest(own.rotate(seen).square().sum(0), k),
        "largest in the mean gradient": largest(own.rotate(seen.mean(0)).abs(), k),
    })  # fmt: skip
    add(plain, {"largest measured energy, no basis": largest(seen.square().sum(0), k)})
    mean, of_5, of_all = Bases(seen.mean(0, keepdim=True)), Bases(grads[:5]), Bases(grads[:STEPS])
    add(parts(mean, 30), {"cross of the mean gradient's spectra": mean.cross(k)})
    add(parts(shared, 30), {"cross, shared": shared.cross(k)})
    add(parts(of_5, 5), {"cross, 5 steps": of_5.cross(k)})
    add(parts(of_all, STEPS), {"cross, 120 steps": of_all.cross(k)})
    return found


def pooled(layers: list[torch.Tensor], bases: list[Bases], k: int) -> list[float]:
    """What the layers of a role, gradients (n, out, in) each, hold of their next gradients' energy together by a cross of
    k entries each, then by as many that are shared out: where λ_i μ_j times the layer's energy is largest."""
    expected = [torch.outer(own.rows, own.columns) for own in bases]
    energies = [own.rotate(grads[30 : 30 + UNSEEN]).square().sum(0) for own, grads in zip(bases, layers)]
    weighted = torch.cat([of * grads[:30].square().sum() for of, grads in zip(expected, layers)])  # (L out, in)
    equal = sum(of[largest(guess, k)].sum() for guess, of in zip(expected, energies))
    shared_out = torch.cat(energies)[largest(weighted, k * len(layers))].sum()
    return [(part / torch.cat(energies).sum()).item() for part in (equal, shared_out)]


def of_model(model, batches: Iterable[dict], names: Iterable[str], share: float) -> dict:
    """{"choices": choice -> [next, their mean, later], "pooled": [k each, k shared out]}, means over layers and over roles.
    k is a share of a linear."""
    stacks = sparsegrad.collect_gradients(model, batches, list(names), n_steps=STEPS + UNSEEN)
    found, together, roles = [], [], {}
    for name, grads in stacks.items():
        roles.setdefault(sparsegrad._role(name), []).append(grads)
    for layers in roles.values():
        k, bases = round(share * layers[0][0].numel()), [Bases(grads[:30]) for grads in layers]
        shared = Bases(torch.cat([grads[:30] for grads in layers]))
        found += [choices(grads, k, own, shared) for grads, own in zip(layers, bases)]
        together.append(pooled(layers, bases, k))
    mean = {name: [statistics.mean(of[name][i] for of in found) for i in range(3)] for name in found[0]}
    return {"choices": mean, "pooled": [statistics.mean(of) for of in zip(*together)]}


def models():
    """Column, and what `of_model` takes."""
    from tutorials.common import batches, minilm, rotten_tomatoes  # it sets torch and matplotlib to its taste

    model, tokenizer = minilm()
    data = batches(tokenizer, rotten_tomatoes()["train"], 32)
    mlp, attention, both = (finetune.target_linears(model, target) for target in ("mlp", "attention", "all"))
    yield "MiniLM", model, data, mlp, K
    yield "MiniLM, attention", model, data, attention, 2 * K
    yield "MiniLM, both", model, data, both, 2 / 3 * K
    optimizer = torch.optim.AdamW(finetune.head_parameters(model).values(), finetune.HEAD_RATE)
    for batch in random.Random(1).choices(data, k=HEAD_STEPS):
        model(**batch).loss.backward()
        optimizer.step()
        model.zero_grad()
    yield "MiniLM, trained head", model, data, mlp, K
    sys.argv = ["llama_run.py", "--max-length", "256"]
    llama_run.CHITCHAT = 2 * (STEPS + UNSEEN) * 5 // 4  # a fifth of them is to validate
    args = llama_run.parse()
    args.hub = False
    model, tokenizer = llama_run.load_model(args), llama_run.load_tokenizer(args)
    rows = llama_run.prepare(llama_run.load_trees(args)[0], tokenizer, args, "train")
    data = torch.utils.data.DataLoader(rows, 2, collate_fn=transformers.DataCollatorForSeq2Seq(tokenizer))
    yield "SmolLM2", model, data, llama_run.every_nth(model, 6), K
    yield "SmolLM2, attention", model, data, llama_run.every_nth(model, 6, "attention"), 2 * K
    yield "SmolLM2, both", model, data, llama_run.every_nth(model, 6, "all"), 2 / 3 * K


def tables(measured: dict) -> str:
    """What each choice holds of the next gradients, and of later ones; then whether k is better shared out."""
    names = next(iter(measured.values()))["choices"]
    rows = [[name, *("{0:.2f}, {2:.2f}".format(*of["choices"][name]) for of in measured.values())] for name in names]
    pools = [[told, *(f"{of['pooled'][i]:.2f}" for of in measured.values())] for i, told in enumerate(("k each", "k shared out"))]
    return grid(["", *measured], rows) + "\n\n" + grid(["", *measured], pools)


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
