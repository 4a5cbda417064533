"""What bases keep of gradients they have not seen: `python energy.py energy.json` prints the
tables of the README beside it, and measures first if the file is not there (some minutes).

MiniLM, 42 steps of 32 Rotten Tomatoes sentences, nothing but the MLP linears trains: bases from the
first 30 gradients of a layer, the share of the squared norm kept, mean over the other 12.
"""

import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repository

import torch

import finetune
import sparsegrad
from benchmark import Method
from experiments import grid

STEPS, UNSEEN, ROWS = 30, 12, 32
WAYS = {  # as `benchmark.py` names them, at 1 % of a linear where no k stands
    "complete": Method("sparsegrad"),
    "narrow side": Method("sparsegrad:narrow"),
    "narrow side, rank 32": Method("sparsegrad:narrow:rank=32"),
    "narrow side, rank 8, all entries": Method("sparsegrad:narrow:rank=8:k=all"),
    "both sides, rank 128": Method("sparsegrad:rank=128"),
    "both sides, rank 77, all entries": Method("sparsegrad:rank=77:k=all"),
}
# The stored file has these from sketches of the gradients too, an option that find_bases had once.
SKETCHED = ("complete", "narrow side, rank 8, all entries", "both sides, rank 128")
SHARES = {"role": "shared", "layer": "own"}
ROLES = ("up", "down")


def kept(grad: torch.Tensor, complete: sparsegrad.Basis, way: Method) -> float:
    """Share of the squared norm of `grad` (out, in) that a step keeps."""
    basis = way.basis(complete)
    core = grad if basis.V is None else basis.V.T @ grad  # (r, out) @ (out, in)
    core = core if basis.U is None else core @ basis.U  # (r, in) @ (in, r)
    k = core.numel() if way.k else round(0.01 * grad.numel())
    return sparsegrad.topk_energy(core, k) * (core.norm() / grad.norm()).item() ** 2


def measure() -> dict:
    """Sketch, of which there is None alone now -> share -> way -> [up, down]."""
    sys.path.insert(0, str(pathlib.Path(finetune.__file__).parent / "tutorials"))
    from common import batches, minilm, rotten_tomatoes

    model, tokenizer = minilm()
    data = batches(tokenizer, rotten_tomatoes()["train"].select(range(ROWS * (STEPS + UNSEEN))), ROWS)
    unseen = {name: grads[STEPS:] for name, grads in sparsegrad.collect_gradients(model, data, n_steps=STEPS + UNSEEN).items()}
    energies = {share: {} for share in SHARES}
    for share in SHARES:
        print(share, flush=True)
        bases = sparsegrad.find_bases(model, data, share=share, n_steps=STEPS)
        for way in WAYS:
            of = {role: [] for role in ROLES}
            for name, grads in unseen.items():
                role = "up" if grads.shape[1] > grads.shape[2] else "down"
                of[role] += [kept(grad, bases[name], WAYS[way]) for grad in grads]
            energies[share][way] = [statistics.mean(of[role]) for role in ROLES]
    return {"None": energies}


def tables(energies: dict) -> str:
    heads = [f"{share}, {role}" for share in SHARES.values() for role in ROLES]
    exact = energies["None"]
    every_way = {(way,): [f"{energy:.2f}" for share in SHARES for energy in exact[share][way]] for way in WAYS}
    sketched_heads = [f"{way}, {share}" for way in SKETCHED for share in SHARES.values()]
    by_sketch = {
        ("exact" if sketch == "None" else f"{sketch} columns",): [
            "{:.3f}, {:.3f}".format(*of[share][way]) for way in SKETCHED for share in SHARES
        ]
        for sketch, of in energies.items()
    }
    table, of_sketches = grid([""], heads, every_way), grid(["up, down"], sketched_heads, by_sketch)
    return table if len(energies) == 1 else f"{table}\n\n{of_sketches}"


def main() -> None:
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("file", type=pathlib.Path, help="a .json")
    path = parser.parse_args().file
    if not path.exists():
        finetune.check_writable("file", path.parent)
        finetune.write_json(path, {"energies": measure(), **finetune.provenance()})
    print(tables(json.loads(path.read_text(encoding="utf-8"))["energies"]))


if __name__ == "__main__":
    finetune.run(main)
