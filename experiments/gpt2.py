"""SparseGrad on a GPT-2, for `claim.py`: `python -m experiments.gpt2 --model FOLDER --data FILE`.

The GPT-2 is one that has read samples of microbes; `rebuild.py gpt2` makes its FOLDER, genera.csv in it. FILE has how
often each genus was counted in samples of people's guts: comma-separated, a row a genus, a column a sample, PERSON or
PERSON.VISIT above it. A sample is a sentence of its genera. They are sorted by how many standard deviations a genus's
share lies above its mean in what the GPT-2 was pretrained on, the largest first; shares are among the genera it knows.
A fifth of the people, the same for every seed, are the dev set. Of the model only its MLP linears train, by the
method, at a learning rate that falls to zero.
"""

import pathlib

import datasets
import numpy as np
import pandas as pd
import torch
import transformers

import finetune
from experiments import other_models
from llama_run import language_metrics, token_losses

PAD, BOS, EOS, SPECIAL = 0, 2, 3, 4  # token ids; the genera follow, in the order of genera.csv


def parse():
    return other_models.parse(finetune.Parser(description=__doc__.split("\n\n")[0]), batch_size=8, epochs=5.0)


def main() -> None:
    args = parse()
    data = load_sentences(args)
    folder = finetune.open_folder(args, f"gpt2-{args.method}-seed{args.seed}")
    if not (run := finetune.finished(folder)):
        transformers.set_seed(args.seed)
        model = finetune.from_pretrained(transformers.AutoModelForCausalLM, args.model, False, torch.float32)
        info = finetune.apply_method(model, finetune.target_linears(model, args.target), args, folder, data["train"], to_batch)
        training = dict(eval_strategy="epoch", save_strategy="no", lr_scheduler_type="linear",
                        per_device_eval_batch_size=args.batch_size)  # fmt: skip
        trainer = finetune.make_trainer(
            model, args, folder, data, to_batch, training=training,
            compute_metrics=language_metrics, preprocess_logits_for_metrics=token_losses,
        )  # fmt: skip
        before = trainer.evaluate()
        finetune.train(trainer, args)
        used = {"model": pathlib.Path(args.model).name, "data": args.data.name} | {
            f"{split}_rows": len(rows) for split, rows in data.items()
        }
        run = finetune.finish(trainer, args, info, used, metrics_before=before)
    losses = " before, ".join(f"{run[when]['eval_loss']:.4f}" for when in ("metrics_before", "metrics"))
    finetune.print_table({"loss": f"{losses} after"} | finetune.cost_rows(run, folder))


def load_sentences(args) -> dict[str, datasets.Dataset]:
    """Splits "train" and "dev" with the column input_ids, a row a sample; a person is in one of them."""
    usual = pd.read_csv(pathlib.Path(args.model, "genera.csv"), index_col=0)  # mean, std
    usual.index = usual.index.str.removeprefix("g__")
    counts = pd.read_csv(args.data, index_col=0)
    counts = counts[counts.index.isin(usual.index)]  # (genera, samples)
    if not counts.any().all():
        raise finetune.UserError(f"{args.data}: a sample has no genus that the model knows, such as {usual.index[0]}")
    token_ids = SPECIAL + usual.index.get_indexer(counts.index)
    mean, std = usual.loc[counts.index].to_numpy().T
    visits: dict[str, list[list[int]]] = {}
    for sample, count in zip(counts, counts.to_numpy().T):
        there = np.flatnonzero(count)
        above = (count[there] / count.sum() - mean[there]) / std[there]
        sentence = [BOS, *token_ids[there[np.argsort(-above, kind="stable")]].tolist(), EOS]
        visits.setdefault(sample.partition(".")[0], []).append(sentence)
    people = datasets.Dataset.from_dict({"visits": list(visits.values())})
    splits = finetune.draw_rows(args, other_models.split(people))
    return {
        split: datasets.Dataset.from_dict({"input_ids": [sentence for person in of["visits"] for sentence in person]})
        for split, of in splits.items()
    }


def to_batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """B rows -> input_ids, attention_mask and labels (B, T), T of the longest."""
    longest = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": ids.masked_fill(ids == PAD, -100)}


if __name__ == "__main__":
    finetune.run_script(main)
