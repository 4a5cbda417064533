"""SparseGrad on a GPT-2, for `experiments.py`: `python gpt2.py --model FOLDER --data FILE`.

The GPT-2 is one that has read samples of microbes (`rebuild.py gpt2` makes its FOLDER, genera.csv in it), FILE how
often each genus was counted in samples of people's guts: comma-separated, a row a genus, a column a sample, PERSON
or PERSON.VISIT above it. A sample is a sentence: its genera, by how many standard deviations each one's share (of
the genera that are known) lies above its mean in what the GPT-2 was pretrained on, the largest first. A fifth of the
people, the same for every seed, are the dev set. Of the model only its MLP linears train, by the method, at a
learning rate that falls to zero.
"""

import collections
import csv
import pathlib
import shutil
import sys
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repository

import datasets
import numpy as np
import script
import torch
import transformers

import finetune
import llama_run
from finetune import UserError

PAD, BOS, EOS, SPECIAL = 0, 2, 3, 4  # tokens; the genera follow, in the order of genera.csv


def parse():
    return script.parse(script.make_parser(__doc__, "counts, comma-separated", batch_size=8, epochs=5.0))


def main() -> None:
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    splits = load_sentences(args)

    def make_model():
        return finetune.from_pretrained(transformers.AutoModelForCausalLM, str(args.model), False, torch.float32)

    def collate(rows):
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.tensor([row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in rows])  # (B, T)
        return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.masked_fill(ids == PAD, -100)}

    folder = finetune.open_folder(args, f"gpt2-{args.method}-seed{args.seed}")
    used = {"model": args.model.name, "data": args.data.name} | {f"{split}_rows": len(splits[split]) for split in splits}
    run = finetune.train_and_report(
        args=args, folder=folder, make_model=make_model, tokenizer=Genera(args.model), used=used,
        trainer_class=llama_run.LanguageTrainer, evaluate_first=True,
        training_options=dict(eval_strategy="epoch", save_strategy="no", lr_scheduler_type="linear",
                              per_device_eval_batch_size=args.batch_size),
        trainer_options=dict(train_dataset=splits["train"], eval_dataset=splits["dev"], data_collator=collate,
                             compute_metrics=llama_run.language_metrics, preprocess_logits_for_metrics=llama_run.token_losses),
    )  # fmt: skip
    losses = " before, ".join(f"{run[when]['eval_loss']:.4f}" for when in ("metrics_before", "metrics"))
    finetune.print_table({"loss": f"{losses} after"} | finetune.cost_rows(run, folder))


class Genera(NamedTuple):
    """What a GPT-2 of genera has for a tokenizer, for `--merge`: the table in its folder."""

    folder: pathlib.Path

    def save_pretrained(self, folder: str) -> None:
        shutil.copy(self.folder / "genera.csv", folder)


def load_sentences(args) -> dict[str, datasets.Dataset]:
    """Splits "train" and "dev" with the column input_ids, a row a sample; people are in one of them."""
    _, usual = read_table(args.model / "genera.csv", "`rebuild.py gpt2` writes it")
    if not all(len(numbers) == 2 and numbers[1] > 0 for numbers in usual.values()):
        raise UserError(
            f"{args.model}/genera.csv: a genus has a mean and a standard deviation above 0; `rebuild.py gpt2` writes it"
        )
    usual = {genus.removeprefix("g__"): numbers for genus, numbers in usual.items()}
    tokens = {genus: SPECIAL + i for i, genus in enumerate(usual)}
    samples, counts = read_table(args.data, "it should hold a genus a row, a sample a column, comma-separated")
    known = [genus for genus in counts if genus in tokens]
    if not known:
        raise UserError(f"{args.data}: the model knows none of its genera; it knows such as {', '.join(list(tokens)[:3])}")
    table = np.array([counts[genus] for genus in known])  # (genera, samples)
    for sample, there in zip(samples, table.any(axis=0)):
        if not there:
            raise UserError(f"{args.data}: sample {sample} has no genus that the model knows, such as {known[0]}: leave it out")
    ids = np.array([tokens[genus] for genus in known])  # (genera,)
    mean, std = np.array([usual[genus] for genus in known]).T
    visits: dict[str, list[list[int]]] = {}
    for sample, count in zip(samples, table.T):
        there = np.flatnonzero(count)
        above = (count[there] / count.sum() - mean[there]) / std[there]
        sentence = [BOS, *ids[there[np.argsort(-above, kind="stable")]].tolist(), EOS]
        visits.setdefault(sample.partition(".")[0], []).append(sentence)
    if len(visits) < 5:
        raise UserError(f"{args.data}: samples of {len(visits)} people, and it takes five or more: a fifth are the dev set")
    people = datasets.Dataset.from_dict({"visits": list(visits.values())})
    splits = finetune.draw_rows(args, script.split(people), "people")
    return {
        split: datasets.Dataset.from_dict({"input_ids": [sentence for person in of["visits"] for sentence in person]})
        for split, of in splits.items()
    }


def read_table(path: pathlib.Path, right: str) -> tuple[list[str], dict[str, list[float]]]:
    """(names of the columns after the first, first cell of a row -> its numbers). UserError, which ends with what
    would be `right`, unless rows have names of their own and as many numbers of 0 or more as there are columns."""

    def refuse(wrong) -> UserError:
        return UserError(f"{path}: {wrong}; {right}")

    try:
        rows = [row for row in csv.reader(path.read_text(encoding="utf-8-sig").splitlines()) if row]
        table = [(name, [float(cell) for cell in cells]) for name, *cells in rows[1:]]
    except (OSError, ValueError, csv.Error) as error:
        raise refuse(getattr(error, "strerror", None) or error) from None
    if not table:
        raise refuse("it is empty")
    if twice := [name for name, times in collections.Counter(name for name, _ in table).items() if times > 1]:
        raise refuse(f"two rows are called {twice[0]}")
    for name, numbers in table:
        if len(numbers) != len(rows[0]) - 1:
            raise refuse(f"row {name} has {len(numbers)} numbers, where the first row has {len(rows[0]) - 1} names")
        if odd := [number for number in numbers if not 0 <= number < np.inf]:
            raise refuse(f"row {name} holds {odd[0]}, where a number of 0 or more should stand")
    return rows[0][1:], dict(table)


if __name__ == "__main__":
    finetune.run(main)
