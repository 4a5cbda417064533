"""What bases keep of gradients they have not seen.

    python -m experiments.energy FILE    its table; measures first, for some minutes, if there is no FILE

MiniLM, 42 steps of 32 Rotten Tomatoes sentences, nothing but the MLP linears trains. Bases come from a layer's first
30 gradients. The table has the share of the squared norm that a step keeps, the mean over the other 12 gradients.
"""

import json
import pathlib
import statistics

import torch

import finetune
import sparsegrad
from experiments.benchmark import Method
from experiments.claim import grid

SEEN, UNSEEN, BATCH = 30, 12, 32
WAYS = {  # as `benchmark.py` names them, at 1 % of a linear where no k stands
    "complete": Method("sparsegrad"),
    "narrow side": Method("sparsegrad:narrow"),
    "narrow side, rank 32": Method("sparsegrad:narrow:rank=32"),
    "narrow side, rank 8, all entries": Method("sparsegrad:narrow:rank=8:k=all"),
    "both sides, rank 128": Method("sparsegrad:rank=128"),
    "both sides, rank 77, all entries": Method("sparsegrad:rank=77:k=all"),
}
SHARES = {"role": "shared", "layer": "own"}
ROLES = ("up", "down")


def best(core: torch.Tensor, k: int, grad: torch.Tensor) -> float:
    """Share of the squared norm of `grad` (out, in) that the k largest entries of its `core`, or of a part of it, hold."""
    return sparsegrad.topk_energy(core, k) * (core.norm() / grad.norm()).item() ** 2


def kept(grad: torch.Tensor, complete: sparsegrad.Basis, way: Method) -> float:
    """Share of the squared norm of `grad` (out, in) that a step keeps."""
    basis = way.basis(complete)
    core = grad if basis.V is None else basis.V.T @ grad  # (r, out) @ (out, in)
    core = core if basis.U is None else core @ basis.U  # (r, in) @ (in, r)
    return best(core, core.numel() if way.k else round(0.01 * grad.numel()), grad)


def measure() -> dict:
    """Share -> way -> [up, down]."""
    from tutorials.common import batches, minilm, rotten_tomatoes  # it sets torch and matplotlib to its taste

    model, tokenizer = minilm()
    data = batches(tokenizer, rotten_tomatoes()["train"].select(range(BATCH * (SEEN + UNSEEN))), BATCH)
    unseen = {name: grads[SEEN:] for name, grads in sparsegrad.collect_gradients(model, data, n_steps=SEEN + UNSEEN).items()}
    energies = {share: {} for share in SHARES}
    for share in SHARES:
        bases = sparsegrad.find_bases(model, data, share=share, n_steps=SEEN)
        for name, way in WAYS.items():
            of = {role: [] for role in ROLES}
            for linear, grads in unseen.items():
                role = "up" if grads.shape[1] > grads.shape[2] else "down"
                of[role] += [kept(grad, bases[linear], way) for grad in grads]
            energies[share][name] = [statistics.mean(of[role]) for role in ROLES]
    return energies


def table(energies: dict) -> str:
    heads = ["", *(f"{share}, {role}" for share in SHARES.values() for role in ROLES)]
    return grid(heads, [[way, *(f"{energy:.2f}" for share in SHARES for energy in energies[share][way])] for way in WAYS])


def main() -> None:
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=pathlib.Path, help="such as experiments/results/energy.json")
    path = parser.parse_args().file
    if not path.exists():
        finetune.write_json(path, {"energies": {"None": measure()}, **finetune.provenance()})
    print(table(json.loads(path.read_text(encoding="utf-8"))["energies"]["None"]))  # of the gradients, not of a sketch of them


if __name__ == "__main__":
    finetune.run_script(main)
