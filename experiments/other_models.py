"""What vit.py and gpt2.py share: their options, and a fifth of the rows as the dev set."""

import argparse
import pathlib

import datasets

import finetune

K = 0.01


def parse(parser: finetune.Parser, **defaults) -> argparse.Namespace:
    """The options of `parser`, and those that all scripts have. Model, data and learning rate have no `defaults`."""
    parser.add_argument("--model", help="a folder")
    parser.add_argument("--data", type=pathlib.Path, help="a file")
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    finetune.add_options(parser, K)
    parser.set_defaults(freeze=True, hub=False, **defaults)
    args = parser.parse_args()
    finetune.check_options(parser, args, K)
    for name in ("model", "data", "lr"):
        if getattr(args, name) is None and args.resume is None:
            parser.error(f"--{name} is missing")
    return finetune.resumed(args)


def split(rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """Splits "dev", a fifth of the rows, the same for every seed, and "train"."""
    parts = rows.train_test_split(len(rows) // 5, seed=0)
    return {"dev": parts["test"], "train": parts["train"]}
