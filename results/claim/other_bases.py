"""One of the scripts with other bases than those of HOSVD, for the ablations of `experiments.py`.

python other_bases.py random glue_run.py --task sst2 ...        random orthonormal columns, seeded
python other_bases.py transposed glue_run.py --task sst2 ...    complete bases, U transposed, as in the released code
"""

import pathlib
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repository

import torch

import sparsegrad


def instead(kind: str, basis: sparsegrad.Basis, generator: torch.Generator) -> sparsegrad.Basis:
    """A basis of the shapes of `basis`."""
    if kind == "transposed":
        return sparsegrad.Basis(basis.U.T, basis.V)
    random = [None if b is None else torch.linalg.qr(torch.randn(b.shape, generator=generator)).Q for b in (basis.U, basis.V)]
    return sparsegrad.Basis(*random)


def main() -> None:
    kind, script = sys.argv[1:3]
    found = sparsegrad.find_bases

    def find_bases(*args, **options):
        bases, made, generator = found(*args, **options), {}, torch.Generator().manual_seed(0)
        for basis in {id(basis): basis for basis in bases.values()}.values():
            made[id(basis)] = instead(kind, basis, generator)
        return {name: made[id(basis)] for name, basis in bases.items()}

    sparsegrad.find_bases = find_bases
    sys.argv = sys.argv[2:]
    runpy.run_path(str(pathlib.Path(sparsegrad.__file__).parent / script), run_name="__main__")


if __name__ == "__main__":
    main()
