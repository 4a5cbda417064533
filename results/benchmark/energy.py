"""What bases keep of gradients they have not seen: `python energy.py energy.json` prints the two
tables of the README beside it, and measures first if the file is not there (a quarter of an hour).

MiniLM, 42 steps of 32 Rotten Tomatoes sentences, nothing but the MLP linears trains: bases from the
first 30 gradients of a layer, the share of the squared norm kept, mean over the other 12.
"""

import json
import pathlib
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repository

import finetune
import sparsegrad

STEPS, UNSEEN, ROWS = 30, 12, 32
WAYS = {  # columns of the shorter and of the longer side (0: as it is), share of a linear's entries (None: the whole core)
    "complete": (None, None, 0.01),
    "narrow side": (None, 0, 0.01),
    "narrow side, rank 32": (32, 0, 0.01),
    "narrow side, rank 8, all entries": (8, 0, None),
    "both sides, rank 128": (128, 128, 0.01),
    "both sides, rank 77, all entries": (77, 77, None),
}
SKETCHED = ("complete", "narrow side, rank 8, all entries", "both sides, rank 128")
SKETCHES = (None, 128, 64, 32, 16)
SHARES = {"role": "shared", "layer": "own"}
ROLES = ("up", "down")


def kept(grad, basis: sparsegrad.Basis, way: str) -> float:
    """Share of the squared norm of `grad` (out, in) that a step keeps."""
    narrow, wide, share = WAYS[way]
    columns = (narrow, wide) if grad.shape[1] <= grad.shape[0] else (wide, narrow)  # of U, of V
    core = grad
    core = core if columns[1] == 0 else basis.V[:, : columns[1]].T @ core  # (r, out) @ (out, in)
    core = core if columns[0] == 0 else core @ basis.U[:, : columns[0]]  # (r, in) @ (in, r)
    k = core.numel() if share is None else round(share * grad.numel())
    return sparsegrad.topk_energy(core, k) * (core.norm() / grad.norm()).item() ** 2


def measure() -> dict:
    """Sketch -> share -> way -> [up, down]."""
    sys.path.insert(0, str(pathlib.Path(finetune.__file__).parent / "tutorials"))
    from common import batches, minilm, rotten_tomatoes

    model, tokenizer = minilm()
    model.bert.requires_grad_(False)
    data = batches(tokenizer, rotten_tomatoes()["train"].select(range(ROWS * (STEPS + UNSEEN))), ROWS)
    unseen = {name: grads[STEPS:] for name, grads in sparsegrad.collect_gradients(model, data, n_steps=STEPS + UNSEEN).items()}
    energies = {}
    for sketch in SKETCHES:
        for share in SHARES:
            print(f"sketch {sketch}, {share}", flush=True)
            bases = sparsegrad.find_bases(model, data, share=share, sketch=sketch, n_steps=STEPS)
            for way in WAYS if sketch is None else SKETCHED:
                of = {role: [] for role in ROLES}
                for name, grads in unseen.items():
                    role = "up" if grads.shape[1] > grads.shape[2] else "down"
                    of[role] += [kept(grad, bases[name], way) for grad in grads]
                energies.setdefault(str(sketch), {}).setdefault(share, {})[way] = [statistics.mean(of[role]) for role in ROLES]
    return energies


def tables(energies: dict) -> str:
    heads = [f"{share}, {role}" for share in SHARES.values() for role in ROLES]
    exact = energies["None"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for way in WAYS:
        lines.append(f"| {way} | " + " | ".join(f"{energy:.2f}" for share in SHARES for energy in exact[share][way]) + " |")
    heads = [f"{way}, {share}" for way in SKETCHED for share in SHARES.values()]
    lines += ["", "| up, down | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for sketch, of in energies.items():
        cells = ["{:.3f}, {:.3f}".format(*of[share][way]) for way in SKETCHED for share in SHARES]
        lines.append(f"| {'exact' if sketch == 'None' else f'{sketch} columns'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    path = pathlib.Path(sys.argv[1])
    if not path.exists():
        finetune.write_json(path, {"energies": measure(), **finetune.provenance()})
    print(tables(json.loads(path.read_text(encoding="utf-8"))["energies"]))


if __name__ == "__main__":
    finetune.run(main)
