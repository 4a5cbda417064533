"""What the notebooks share: a real model, real sentences, the look of the pictures."""

import logging
import os
import random
import warnings
from collections.abc import Iterable

for name in ("bitsandbytes", "matplotlib.font_manager"):  # neither an absent GPU library nor a font cache is news
    logging.getLogger(name).setLevel(logging.ERROR)
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # else a warning once a data loader forks

import datasets
import matplotlib.pyplot as plt
import torch
import transformers

from glue_run import find_model, rotten_tomatoes

__all__ = ["batches", "minilm", "rotten_tomatoes", "same"]

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
datasets.disable_progress_bars()
warnings.filterwarnings("ignore", category=FutureWarning)  # between PEFT and transformers
torch.use_deterministic_algorithms(True)
torch.utils.deterministic.fill_uninitialized_memory = False  # with NaN: an eighth of the time

# Line styles and markers differ, so that nothing hangs on the colours.
plt.rcParams.update({
    "axes.grid": True, "axes.spines.right": False, "axes.spines.top": False, "axes.titlesize": "medium",
    "figure.constrained_layout.use": True, "figure.dpi": 80, "grid.alpha": 0.3, "image.cmap": "gray_r",
    "axes.prop_cycle": plt.cycler(color=["#000000", "#1f77b4", "#d95f02", "#999999"])
    + plt.cycler(linestyle=["-", "--", "-.", ":"]) + plt.cycler(marker=["o", "s", "^", "x"]),
})  # fmt: skip


def minilm(seed: int = 0):
    """all-MiniLM-L6-v2, a BERT of 6 blocks (384 -> 1536 -> 384), with a new two-way classifier on top, and
    its tokenizer. Dropout is off: its random numbers differ from machine to machine."""
    folder, _ = find_model(None, hub=False)
    torch.manual_seed(seed)  # draws the classifier
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2, **no_dropout)
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def batches(tokenizer, rows: Iterable[dict], size: int = 16) -> list[dict[str, torch.Tensor]]:
    """Rows of text and label as what `model(**batch)` takes. Sentences of like length share a batch, which
    saves padding; the order of the batches is drawn, the same each time."""
    rows = sorted(rows, key=lambda row: len(row["text"]))
    parts = [rows[start : start + size] for start in range(0, len(rows), size)]
    random.Random(0).shuffle(parts)
    made = []
    for part in parts:
        texts, labels = [row["text"] for row in part], [row["label"] for row in part]
        made.append({**tokenizer(texts, padding=True, return_tensors="pt"), "labels": torch.tensor(labels)})
    return made


def same(ours: torch.Tensor, reference: torch.Tensor) -> bool:
    """Equal up to rounding: the difference has less than a ten-thousandth of the reference's norm."""
    return bool((ours - reference).norm() < 1e-4 * reference.norm())
