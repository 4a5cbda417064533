"""What vit.py and gpt2.py share: their options, and a fifth of the rows as the dev set."""

import argparse
import pathlib

import datasets

import finetune

K = 0.01


def make_parser(doc: str, data: str, **defaults) -> finetune.Parser:
    """The parser of a script that says `doc`, whose `--data` is a file, `data`; `defaults` of its options."""
    parser = finetune.Parser(description=doc.split("\n\n")[0])
    parser.add_argument("--model", type=pathlib.Path, help="a folder")
    parser.add_argument("--data", type=pathlib.Path, help=data)
    parser.add_argument("--bf16", action="store_true", help="mixed precision")
    finetune.add_options(parser, K)
    parser.set_defaults(freeze=True, hub=False, **defaults)
    return parser


def parse(parser: finetune.Parser) -> argparse.Namespace:
    args = parser.parse_args()
    finetune.check_options(parser, args, K)
    missing = [name for name in ("model", "data", "lr") if getattr(args, name) is None]
    if missing and args.resume is None:
        parser.error(f"--{missing[0]} is missing")
    args = finetune.resumed(args)
    args.model = pathlib.Path(args.model)
    return args


def split(rows: datasets.Dataset) -> dict[str, datasets.Dataset]:
    """Splits "dev", a fifth of the rows, the same for every seed, and "train"."""
    rows, dev = rows.shuffle(seed=0), len(rows) // 5
    return {"dev": rows.select(range(dev)), "train": rows.select(range(dev, len(rows)))}
