"""SparseGrad: fine-tune the MLP layers of a transformer through sparse gradients.

After Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of
MLP Layers", EMNLP 2024, arXiv 2410.07383. One file; it needs torch and nothing else.

    bases = find_bases(model, loader)            # 30 steps of back-propagation, then HOSVD
    print(patch_model(model, bases, k=0.01))     # MLP linears become SparseGradLinear
    optimizer = SparseGradAdamW(model.parameters(), lr=1e-4)
    ...                                          # your training loop, unchanged
    unpatch_model(model)                         # plain linears again, same outputs

In the right basis most of the energy of a weight gradient sits in a few entries. So
rotate the gradient into that basis, keep its k largest entries, train only those.

    T            tokens: all leading dimensions of an input, flattened
    W            (out, in)     pretrained weight, frozen; in code `residual`
    U            (in, r_in)    basis of the input side, orthonormal columns, falling energy
    V            (out, r_out)  basis of the output side, likewise
    C            (r_out, r_in) the trainable `core`, zero at first
    G = dYᵀ X    (out, in)     the gradient an ordinary linear would have

    forward      y = x (W + V C Uᵀ)ᵀ + b
    backward     dL/dC = Vᵀ G U = (dY V)ᵀ (x U), then only its k largest entries
                 dL/dx = dY (W + V C Uᵀ),  dL/db = Σ_tokens dY

The paper (§3.2) trains W̃ = Vᵀ W U itself. With complete bases V C Uᵀ + W = V (C + W̃) Uᵀ:
C is W̃ less its initial value, with the same gradient and the same Adam steps. Starting
at zero makes an untrained layer equal the linear bit for bit, lets the bases be
truncated (r < out, in) or absent, lets C train in fp32 beside a W in bf16, and leaves in
C exactly what training changed in the weight. A basis that is None stands for the
identity; with neither basis this is the paper's MeProp.
"""

import collections
import copy
import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.adamw import adamw

# ------------------------------------------------------------------ unfolding and HOSVD


def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-`mode` unfolding (§3.1): `(d0, ..., dn)` -> `(d_mode, product of the others)`."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)


def hosvd(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Higher-order SVD by unfoldings (§3.1), the textbook form.

    Returns the core tensor and one factor a mode: the left singular vectors of that
    mode's unfolding, `(d_mode, min(d_mode, product of the others))`, columns by falling
    singular value. Multiplying the core by every factor gives `tensor` back.
    """
    factors = [torch.linalg.svd(unfold(tensor, mode), full_matrices=False).U for mode in range(tensor.dim())]
    core = tensor
    for factor in factors:  # contract the leading mode; the new one goes last
        core = torch.tensordot(core, factor, dims=([0], [0]))
    return core, factors


# ------------------------------------------------------------------------ which layers

MLP_LINEARS = (
    r"(.*\.)?("
    r"(?<!attention\.)(intermediate|output)\.dense"  # BERT, RoBERTa, ViT of transformers 4
    r"|ffn\.lin[12]"  # DistilBERT
    r"|mlp\.fc[12]"  # ViT of transformers 5
    r"|mlp\.(up|down)_proj"  # LLaMA, Mistral, Qwen2 (§5.2 leaves gate_proj alone)
    r"|DenseReluDense\.w(i|i_0|i_1|o)"  # T5
    r"|mlp\.c_(fc|proj)"  # GPT-2
    r")"
)


def _is_linear(module: nn.Module) -> bool:
    """nn.Linear, quantised ones included, or the Conv1D of GPT-2 (known by name: transformers is not imported)."""
    return (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and module.weight.dim() == 2


def _is_quantised(linear: nn.Module) -> bool:
    """Whether the weight is stored as integers, in whatever packing, as bitsandbytes does."""
    return not linear.weight.is_floating_point()


def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of an nn.Linear or Conv1D; of a quantised layer the weight's own shape says little."""
    return (linear.out_features, linear.in_features) if isinstance(linear, nn.Linear) else tuple(linear.weight.T.shape)


def _out_in(linear: nn.Module, tensor: Tensor) -> Tensor:
    """`tensor`, shaped as the weight of `linear`, as an `(out, in)` view."""
    return tensor if isinstance(linear, nn.Linear) else tensor.T


@torch.no_grad()
def dense_weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) as floats, in fp32 if it is quantised."""
    if not _is_quantised(linear):
        return _out_in(linear, linear.weight)
    y = linear(torch.eye(linear.in_features, device=linear.weight.device))  # asks nothing of how it is stored
    return (y if linear.bias is None else y - linear.bias).T.float()


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def mlp_linears(model: nn.Module, target_modules: str | Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Name -> linear layer, of the layers that SparseGrad is to train.

    `target_modules` is as in PEFT: a regex that matches whole names, or a list of names
    or name endings. Without it, the MLP linears of BERT, RoBERTa, DistilBERT, ViT, LLaMA,
    Mistral, Qwen2, T5 and GPT-2 are found by name. Raises ValueError, with the linear
    layers there are, if none match.
    """
    linears = {name: m for name, m in model.named_modules() if name and _is_linear(m)}
    if target_modules is None or isinstance(target_modules, str):
        pattern = re.compile(MLP_LINEARS if target_modules is None else target_modules)
        found = {name: m for name, m in linears.items() if pattern.fullmatch(name)}
    else:
        endings = tuple(target_modules)
        found = {name: m for name, m in linears.items() if any(f".{name}".endswith(f".{e}") for e in endings)}
    if any(isinstance(m, SparseGradLinear) for m in model.modules()):
        raise ValueError("the model has SparseGrad layers already; unpatch_model(model) takes them out")
    if not found:
        wanted = "no MLP of a known family" if target_modules is None else f"nothing that matches {target_modules!r}"
        kinds = sorted({_role(name) for name in linears}) or ["none"]
        raise ValueError(f"{wanted} in this model; pass target_modules. Its linear layers: {', '.join(kinds)}")
    return found


def _role(name: str) -> str:
    """The name with block numbers struck out: layers of one role share it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)


# ------------------------------------------------------------- gradients and their bases


class Basis(nn.Module):
    """An orthonormal basis for each side of a weight gradient (§3.1).

    U `(in, r_in)`, V `(out, r_out)`: orthonormal columns by falling energy, or None for
    a side that is not rotated. A module, so that layers can share one and `.to()` moves it.
    In memory each column lies in one piece; `state_dict` holds contiguous copies.
    """

    def __init__(self, U: Tensor | None = None, V: Tensor | None = None):
        super().__init__()
        for side, vectors in (("U", U), ("V", V)):
            if vectors is not None:
                rows = vectors.T.contiguous()  # each vector in one piece: sparse products read whole ones
                vectors = (rows.clone() if rows.untyped_storage().nbytes() > rows.nbytes else rows).T  # and no cut-off columns
            self.register_buffer(side, vectors)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for side in self._buffers:
            if prefix + side in destination:
                destination[prefix + side] = destination[prefix + side].contiguous()  # safetensors takes no other

    def extra_repr(self) -> str:
        return ", ".join(f"{s}={None if b is None else tuple(b.shape)}" for s, b in (("U", self.U), ("V", self.V)))


def _model_loss(model: nn.Module, batch) -> Tensor:
    device = next(model.parameters()).device
    loss = model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}).loss
    if loss is None:
        raise ValueError("the model gave no loss: put labels in the batches, or pass loss_fn(model, batch)")
    return loss


def _back_propagate(
    model: nn.Module,
    linears: Mapping[str, nn.Module],
    batches: Iterable,
    visit: Callable[[str, Tensor], None],
    n_steps: int = 30,
    lr: float = 5e-5,
    loss_fn: Callable[[nn.Module, object], Tensor] = _model_loss,
    callback: Callable[[int, Tensor], None] | None = None,
) -> None:
    """Run `n_steps` of training of `linears` alone, show `visit` each weight gradient
    `(out, in)` in fp32 or better, and leave the model as it was, come what may."""
    weights = {name: linear.weight for name, linear in linears.items() if not _is_quantised(linear)}
    quantised = {name: linear for name, linear in linears.items() if name not in weights}
    if quantised and lr:
        raise ValueError(f"{next(iter(quantised))} is quantised, so it cannot be trained for its bases: pass lr=0")
    seen = set()

    def see(name: str, grad: Tensor) -> None:
        if name in seen:
            raise ValueError(f"{name} is quantised and used twice in a step, so its gradient cannot be watched: leave it out")
        seen.add(name)
        visit(name, grad)

    flags = [(p, p.requires_grad) for p in model.parameters()]
    modes = [(m, m.training) for m in model.modules()]
    kept = [(w, w.data, w.grad) for w in weights.values()]
    buffers = [(m, name, b, b.clone()) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    optimizer, step = None, -1
    hooks = [_watch_gradient(linear, functools.partial(see, name)) for name, linear in quantised.items()]
    try:
        model.train().requires_grad_(False)
        for weight in weights.values():
            weight.grad = None
            weight.requires_grad_(True)
        if lr:  # train copies, in fp32 or better: Adam's epsilon and tiny steps vanish in half precision
            masters = [nn.Parameter(w.detach().to(_at_least_fp32(w.dtype), copy=True)) for w in weights.values()]
            optimizer = torch.optim.AdamW(masters, lr=lr, fused=all(m.is_cpu for m in masters) or None)
            for weight, master in zip(weights.values(), masters):
                weight.data = master.data.to(weight.dtype)  # the master itself where the dtypes agree
        for step, batch in enumerate(itertools.islice(batches, n_steps)):
            with torch.enable_grad():
                loss = loss_fn(model, batch)
                loss.backward()
            for name, weight in weights.items():
                if weight.grad is not None:
                    grad = _out_in(linears[name], weight.grad)
                    see(name, grad.to(_at_least_fp32(grad.dtype)))
            for name in linears:
                if name not in seen:
                    raise ValueError(f"the loss does not depend on {name}: leave it out of target_modules")
            seen.clear()
            if optimizer:
                for weight, master in zip(weights.values(), masters):
                    master.grad = weight.grad.to(master.dtype)
                optimizer.step()
                for weight, master in zip(weights.values(), masters):
                    weight.data.copy_(master.data)
            for weight in weights.values():
                weight.grad = None
            if callback:
                callback(step, loss.detach())
    finally:
        for hook in hooks:
            hook.remove()
        for weight, data, grad in kept:
            weight.data, weight.grad = data, grad
        for m, name, buffer, before in buffers:
            m._buffers[name] = buffer
            with torch.no_grad():
                buffer.copy_(before)
        for p, flag in flags:
            p.requires_grad_(flag)
        for m, mode in modes:
            m.training = mode
    if step < 0:
        raise ValueError("no batches: gradients cannot be collected from an empty iterable")


def _watch_gradient(linear: nn.Module, see: Callable[[Tensor], None]):
    """Show `see` the gradient that a weight which can hold none, a quantised one, would get."""

    def after_forward(module, args, y):
        if not torch.is_grad_enabled():  # the first pass of reentrant checkpointing
            return y
        x = args[0].detach().flatten(0, -2)  # (T, in)

        def when_dy_is_known(dy):
            dy = dy.flatten(0, -2)  # (T, out)
            dtype = _at_least_fp32(dy.dtype)
            see(dy.to(dtype).T @ x.to(dtype))  # (out, T) @ (T, in)

        y = y + y.new_zeros(()).requires_grad_()  # so that it has a gradient, whatever came before
        y.register_hook(when_dy_is_known)
        return y

    return linear.register_forward_hook(after_forward)


def collect_gradients(
    model: nn.Module, batches: Iterable, target_modules: str | Iterable[str] | None = None, **options
) -> dict[str, Tensor]:
    """Name -> weight gradients `(steps, out, in)` of the MLP linears, fp32 or better (§3.1).

    `options` are `n_steps`, `lr`, `loss_fn`, `callback` of `find_bases`, which needs no such
    stack; use this to look at gradients.
    """
    linears = mlp_linears(model, target_modules)
    stack = {name: [] for name in linears}
    _back_propagate(model, linears, batches, lambda name, grad: stack[name].append(grad.clone()), **options)
    return {name: torch.stack(grads) for name, grads in stack.items()}


def find_bases(
    model: nn.Module,
    batches: Iterable,
    target_modules: str | Iterable[str] | None = None,
    *,
    share: str = "role",
    sides: str = "both",
    rank: int | None = None,
    sketch: int | None = None,
    **options,
) -> dict[str, Basis]:
    """Name of layer -> Basis: the HOSVD of §3.1, streamed.

    The left singular vectors of an unfolding are the eigenvectors of its Gram matrix, a
    sum over the gradients: `Σ G Gᵀ` gives V, `Σ Gᵀ G` gives U. Memory is those two
    matrices, `(out, out)` and `(in, in)`, however many steps are taken.

    Trains the MLP linears alone by AdamW, in train mode, on at most `n_steps` of
    `batches`, at learning rate `lr`, then undoes it: weights, buffers, flags, modes and
    gradients are as before, also after an error.

    n_steps, lr: 30 and 5e-5 by default; lr 0 stays in place and needs no optimizer's memory,
        and quantised layers, which cannot train, need it.
    share: "role", one basis for all blocks' layers of a role, as in the paper; "layer", one each.
    sides: "both"; "narrow", only the shorter side of each weight (the input side of a square one).
    rank: columns to keep a side; None, all of them (complete bases, as in the paper).
    sketch: columns of a random projection of each gradient, `Σ (G Ω) (G Ω)ᵀ` for `Σ G Gᵀ`: less work
        for wide layers, but the sums, up to a factor, are right on average only. Seeded. None: exact.
    loss_fn: `loss_fn(model, batch)`; default, `.loss` of `model(**batch)`.
    callback: called as `callback(step, loss)` after each step, for a progress bar or log.

    Raises ValueError for options that do not fit the model, no batches, or gradients
    that are zero or not finite.
    """
    linears = mlp_linears(model, target_modules)
    if share not in ("role", "layer") or sides not in ("both", "narrow"):
        raise ValueError(f"share is 'role' or 'layer' and sides 'both' or 'narrow', not {share!r} and {sides!r}")
    shapes = {name: weight_shape(linear) for name, linear in linears.items()}
    for name, shape in shapes.items():
        if rank is not None and not 1 <= rank <= min(shape):
            raise ValueError(f"rank is {rank}, but {name} {shape} has room for 1 to {min(shape)} columns a side")
    if sketch is not None and not (isinstance(sketch, int) and sketch >= 1):
        raise ValueError(f"sketch is {sketch}: it is a count of columns, an int of 1 or more")
    groups = {name: (_role(name), shapes[name]) if share == "role" else name for name in linears}
    grams: dict[object, list[Tensor | None]] = {}
    generator = torch.Generator().manual_seed(0)

    def visit(name: str, grad: Tensor) -> None:
        out, in_ = grad.shape
        if groups[name] not in grams:
            rotated = (True, True) if sides == "both" else (in_ <= out, out < in_)
            grams[groups[name]] = [grad.new_zeros(d, d) if on else None for d, on in zip((in_, out), rotated)]
        for gram, rows in zip(grams[groups[name]], (grad.T, grad)):
            if gram is not None:
                if sketch is not None and sketch < rows.shape[1]:
                    rows = rows @ torch.randn(rows.shape[1], sketch, generator=generator).to(rows)  # (n, p) @ (p, sketch)
                _add_gram(gram, rows)

    _back_propagate(model, linears, batches, visit, **options)
    bases = {}
    for group, pair in grams.items():
        name = next(n for n, g in groups.items() if g == group)
        U, V = (None if gram is None else _eigenbasis(gram, rank, name) for gram in pair)
        bases[group] = Basis(U, V)
    return {name: bases[groups[name]] for name in linears}


def _add_gram(gram: Tensor, rows: Tensor, block: int = 256) -> None:
    """`gram += rows rowsᵀ` (n, n), in blocks on and below the diagonal: all that `eigh` reads."""
    for start in range(0, len(rows), block):
        end = start + block
        gram[start:end, :end].addmm_(rows[start:end], rows[:end].T)  # (block, p) @ (p, end)


def _eigenbasis(gram: Tensor, rank: int | None, name: str) -> Tensor:
    """Eigenvectors `(n, rank)` of a Gram matrix `(n, n)`, given on and below the diagonal, by falling eigenvalue."""
    energy = gram.trace()
    if not 0 < energy < math.inf:
        raise ValueError(f"the gradients of {name} are {'zero' if energy == 0 else 'not finite'}: no basis in them")
    vectors = torch.linalg.eigh(gram.double(), UPLO="L").eigenvectors  # float64: orthogonal to 1e-7 once rounded
    return vectors.flip(1)[:, :rank].to(gram.dtype)


# ------------------------------------------------------------------------ sparse gradients


def topk_coo(grad: Tensor, k: int) -> Tensor:
    """The `k` entries of `grad` (rows, columns) largest in magnitude, as a coalesced COO
    tensor (§3.3). No device synchronisation. Raises ValueError unless 1 <= k <= numel."""
    flat = grad.flatten()
    if not 1 <= k <= flat.numel():
        raise ValueError(f"k is {k}, but a gradient {tuple(grad.shape)} has 1 to {flat.numel()} entries to keep")
    index = _largest(flat.abs(), k)  # row-major order is coalesced order
    columns = grad.shape[1]
    # Strided so on purpose: autograd hands contiguous indices on without the mark "coalesced".
    indices = torch.stack((index // columns, index % columns), dim=1).T  # (2, k)
    return torch.sparse_coo_tensor(indices, flat[index], grad.shape, is_coalesced=True, check_invariants=False)


def _largest(sizes: Tensor, k: int) -> Tensor:
    """Indices of the `k` largest of `sizes` (n,), ascending. On a CPU, where `topk` is slow on
    millions, it gets those above a bound that a sample puts a little below the k-th largest."""
    if sizes.device.type == "cpu" and len(sizes) >= max(4 * k, SAMPLE**2):
        bound = sizes[::SAMPLE].topk(int(1.1 * k / SAMPLE) + 32, sorted=False).values.min().item()
        likely = (sizes < bound).logical_not_().nonzero().squeeze(1)  # so put, a NaN is among them
        if len(likely) >= k:  # else the sample misled
            return likely[sizes[likely].topk(k, sorted=False).indices].sort().values
    return sizes.topk(k, sorted=False).indices.sort().values


SAMPLE = 61  # one entry in so many; prime, so that it seldom meets the same columns in every row


def topk_energy(grad: Tensor, k: int) -> float:
    """Share, 0 to 1, of the squared norm of `grad` that its `k` largest entries hold."""
    squares = grad.double().square().flatten()
    return (squares.topk(k).values.sum() / squares.sum()).item()


# ------------------------------------------------------------------------------ the layer


class Plan(NamedTuple):
    """How a layer computes: which products are the fewest depends on the sizes."""

    merge: bool  # forward and dL/dx with W + V C Uᵀ written out; else rotate activations (Table 2)
    tokens: bool  # dL/dC as (dY V)ᵀ (x U); else as Vᵀ (dYᵀ x) U


SPARSE = 25  # dense multiply-adds in the time of one with a sparse factor, on two CPU cores (results/benchmark)


def cheapest_plan(tokens: int, out: int, in_: int, r_out: int | None, r_in: int | None, k: int | None = None) -> Plan:
    """The plan of fewest multiply-adds a step; `r_out`, `r_in` None for a side not rotated.

    k: entries of C that change from step to step, if the layer keeps W + V C Uᵀ and need
    only bring it up to date; None: it is written out anew.
    """
    rows, columns = r_out or out, r_in or in_  # of the core
    r_out, r_in = r_out or 0, r_in or 0  # a product by the identity costs nothing
    rotate = tokens * (in_ * r_in + out * r_out)  # x U and dY V
    write = out * in_ + min(rows * r_in * in_ + out * r_out * in_, out * r_out * columns + out * r_in * in_)  # W + V C Uᵀ
    if k is not None:  # as `_add_expanded` does it
        if r_out and r_in:
            by_sparse, by_dense = (out, r_in) if out >= in_ else (in_, r_out)
        else:
            by_sparse, by_dense = out if r_out else in_ if r_in else 1, 0
        write = min(SPARSE * k, rows * columns) * by_sparse + out * in_ * by_dense
    elif not _keep(rows * columns, out * in_):
        write *= 2  # for the backward again
    reduce = min(r_out * out * in_ + rows * in_ * r_in, out * in_ * r_in + r_out * out * columns)  # Vᵀ G U
    costs = {
        Plan(merge=False, tokens=True): 2 * rotate + 3 * tokens * rows * columns,
        Plan(merge=True, tokens=True): write + rotate + tokens * rows * columns,
        Plan(merge=True, tokens=False): write + reduce + tokens * out * in_,
    }
    return min(costs, key=costs.get)


def _keep(core: int, weight: int) -> bool:
    """Whether W + V C Uᵀ, once written out, is kept for the backward and, in training, for the next step. Not
    for a small core: it would be the largest tensor of the layer, and writing it out again is cheap."""
    return 2 * core > weight


def _expand(core: Tensor, U: Tensor | None, V: Tensor | None, onto: Tensor | None = None) -> Tensor:
    """V C Uᵀ `(out, in)`, in the cheaper order; a new tensor with `onto` added, if given."""
    if U is None and V is None:
        return core if onto is None else onto + core
    if U is None:
        left, right = V, core
    elif V is None:
        left, right = core, U.T
    else:
        (rows, columns), out, in_ = core.shape, V.shape[0], U.shape[0]
        v_first = out * columns * (rows + in_) <= rows * in_ * (columns + out)
        left, right = (V @ core, U.T) if v_first else (V, core @ U.T)
    return left @ right if onto is None else torch.addmm(onto, left, right)


def _merge(residual: Tensor, core: Tensor, U: Tensor | None, V: Tensor | None, dtype: torch.dtype) -> Tensor:
    """W + V C Uᵀ `(out, in)` in `dtype`, that of all but W."""
    same = residual.dtype == dtype
    return _expand(core, U, V, residual) if same else (residual + _expand(core, U, V)).to(dtype)


def _add_expanded(weight: Tensor, change: Tensor, U: Tensor | None, V: Tensor | None) -> None:
    """`weight` (out, in) += V ΔC Uᵀ, for a sparse ΔC; the wide side by a sparse product, if there are two."""
    if SPARSE * change._nnz() > change.numel():
        change = change.to_dense()
    if U is None and V is None:
        weight.add_(change)
    elif V is None:
        weight.add_(change @ U.T)  # (out, in) @ (in, in)
    elif U is None:
        weight.add_((change.T @ V.T).T)  # (in, out) @ (out, out)
    elif len(V) >= len(U):
        weight.addmm_((change.T @ V.T).T, U.T)  # (out, r_in) @ (r_in, in)
    else:
        weight.addmm_(V, change @ U.T)  # (out, r_out) @ (r_out, in)


class SparseGradFunction(torch.autograd.Function):
    """`y = x (W + V C Uᵀ)ᵀ + b` with a top-k gradient for C (§3.2, §3.3, Table 2).

    x (T, in), residual W (out, in), core C (r_out, r_in), U, V, bias (out,) or None;
    k, the entries of dL/dC to keep, or None for all of them as a dense tensor. Computes
    in `dtype` and returns (T, out) in it; W gets no gradient. W None, for one that is
    elsewhere: `y = x (V C Uᵀ)ᵀ + b`, by a plan that does not merge. merged: W + V C Uᵀ, if
    the caller has it at hand and the plan merges.
    """

    @staticmethod
    def forward(ctx, x, residual, core, U, V, bias, k, plan, dtype, merged=None):
        bias_dtype = None if bias is None else bias.dtype
        shared = U, V  # by many layers, so these are saved, and cast again in backward
        C, U, V = (None if t is None else t.to(dtype) for t in (core, U, V))
        x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        train_core = ctx.needs_input_grad[2]
        rotated = x
        if U is not None and plan.tokens and (train_core or not plan.merge):
            rotated = x @ U  # (T, in) @ (in, r_in)
        if plan.merge:
            weight = _merge(residual, C, U, V, dtype) if merged is None else merged.to(dtype)
            y = F.linear(x, weight, bias)  # (T, in) @ (in, out)
            if merged is None and _keep(C.numel(), residual.numel()):
                merged = weight
        else:
            left, right = (rotated, C) if V is None else (rotated @ C.T, V)  # (T, r_in) @ (r_in, r_out)
            # then (T, r_out) @ (r_out, out)
            y = F.linear(left, right, bias) if residual is None else F.linear(x, residual.to(dtype), bias).addmm_(left, right.T)
        ctx.save_for_backward(rotated if train_core else None, residual, core, *shared, merged)
        ctx.k, ctx.plan, ctx.dtypes = k, plan, (dtype, bias_dtype)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        rotated, residual, core, U, V, merged = ctx.saved_tensors
        dtype, bias_dtype = ctx.dtypes
        dy, C, U, V = (None if t is None else t.to(dtype) for t in (dy, core, U, V))
        dx = d_core = d_bias = None
        dyv = dy
        if V is not None and ctx.plan.tokens and (ctx.needs_input_grad[2] or not ctx.plan.merge):
            dyv = dy @ V  # (T, out) @ (out, r_out)
        if ctx.needs_input_grad[0]:
            if ctx.plan.merge:
                dx = dy @ (_merge(residual, C, U, V, dtype) if merged is None else merged.to(dtype))  # (T, out) @ (out, in)
            else:
                left, right = (dyv, C) if U is None else (dyv @ C, U.T)  # (T, r_out) @ (r_out, r_in)
                # then (T, r_in) @ (r_in, in)
                dx = left @ right if residual is None else (dy @ residual.to(dtype)).addmm_(left, right)
        if ctx.needs_input_grad[2]:
            d_core = dyv.T @ rotated  # (r_out, T) @ (T, r_in), or G (out, T) @ (T, in)
            if not ctx.plan.tokens:
                d_core = _expand(d_core, None if U is None else U.T, None if V is None else V.T)
            d_core = d_core.to(core.dtype)
            if ctx.k is not None:
                d_core = topk_coo(d_core, ctx.k)
        if ctx.needs_input_grad[5]:
            d_bias = dy.sum(0, dtype=bias_dtype)
        return dx, None, d_core, None, None, d_bias, None, None, None, None


class SparseGradLinear(nn.Module):
    """A linear layer that trains through the k largest entries of its rotated gradient.

    Made by `from_linear`, undone by `to_linear`. `residual` (out, in) is the pretrained
    weight, frozen, in its own dtype; `core` (r_out, r_in) trains, in fp32 or better
    (ValueError in less, where steps of size lr would vanish in rounding);
    `bias` is the linear's own parameter. Input (..., in), output (..., out).

    A quantised linear is kept as it is, as `base`, and `residual` is None: `base` multiplies
    by W, this layer adds what V C Uᵀ gives.

    On a CPU, a layer with a large fp32 core that SparseGradAdamW trains by k of its entries holds one more tensor
    (out, in), W + V C Uᵀ, from step to step; saving, copying or moving the layer drops it.
    """

    _kept: tuple[list | None, Tensor | None] = (None, None)  # what W + V C Uᵀ was made from, and itself

    def __init__(self, linear: nn.Module, basis: Basis, k: int | None):
        super().__init__()
        self.out_features, self.in_features = weight_shape(linear)
        weight, self.bias, self.base = linear.weight, linear.bias, None
        if _is_quantised(linear):
            self.base, linear.bias = linear, None
            self.register_parameter("residual", None)
        else:
            self.residual = nn.Parameter(_out_in(linear, weight).detach().contiguous(), requires_grad=False)
        self.basis = basis
        shape = _core_shape(basis, self.out_features, self.in_features)
        self.core = nn.Parameter(torch.zeros(shape, device=weight.device, dtype=_at_least_fp32(weight.dtype)))
        self.k = k
        self._plain = nn.Linear if self.base is not None else type(linear)

    @classmethod
    def from_linear(cls, linear: nn.Module, basis: Basis, k: float | int | None) -> "SparseGradLinear":
        """Wrap an nn.Linear or GPT-2 Conv1D. The weight is taken over, not copied (but a
        Conv1D's is transposed); `basis` becomes the layer's own, and moves to where and as
        what the core is.

        k: entries a step, as a count (int), or as a share of `out * in` (float, at most
        the whole core); None, or as many as the core has, gives a dense gradient. Raises ValueError if the basis does
        not fit the weight, or k is 0 or more than the core has entries.
        """
        layer = cls(linear, basis, _check_fit("the layer", weight_shape(linear), basis, k))
        layer.basis.to(layer.core)
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A plain layer of the original class with weight `W + V C Uᵀ` and the same bias
        parameter; its weight trains if the core did. A quantised one becomes an nn.Linear in fp32."""
        weight = self.merged_weight()
        with torch.device("meta"):  # no initialisation, no random numbers drawn
            plain = self._plain
            linear = plain(self.in_features, self.out_features) if issubclass(plain, nn.Linear) else plain(*weight.shape)
        linear.weight = nn.Parameter(_out_in(linear, weight).contiguous(), self.core.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def merged_weight(self) -> Tensor:
        """`W + V C Uᵀ` (out, in), in the dtype of W (fp32 if that is quantised): what the layer
        multiplies by."""
        delta = _expand(self.core.detach(), self.basis.U, self.basis.V)
        W = self.residual if self.base is None else dense_weight(self.base)
        return (W + delta).to(W.dtype)

    @property
    def weight(self) -> Tensor:
        """The frozen pretrained weight, for code that asks a linear's dtype or device
        (T5 does). Not what the layer multiplies by: see `merged_weight`."""
        return self.residual if self.base is None else self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        own = x.dtype if self.residual is None else self.residual.dtype
        dtype = torch.get_autocast_dtype(device) if autocast else own
        if x.dtype != dtype and not autocast:
            raise RuntimeError(f"input is {x.dtype} but the layer is {dtype}")
        if torch.is_grad_enabled() and self.core.requires_grad and self.core.dtype in (torch.float16, torch.bfloat16):
            raise ValueError("a core in fp16 or bf16 cannot train: its steps vanish in rounding; keep it in fp32")
        U, V = self.basis.U, self.basis.V
        r_out, r_in = (None if b is None else b.shape[1] for b in (V, U))
        tokens = x.reshape(-1, x.shape[-1])  # (T, in)
        plan, merged = Plan(merge=False, tokens=True), None
        keeps = self._keeps_weight()
        if self.base is None:
            plan = cheapest_plan(tokens.shape[0], self.out_features, self.in_features, r_out, r_in, self.k if keeps else None)
        if keeps and plan.merge:
            with torch.autocast("cpu", enabled=False):  # it is fp32, and there
                merged = self._kept_weight()
        core = self.core if torch.is_grad_enabled() else self.core.detach()
        y = SparseGradFunction.apply(tokens, self.residual, core, U, V, self.bias, self.k, plan, dtype, merged)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.base is None else y + self.base(x).to(y.dtype)

    # A step of SparseGradAdamW moves k entries of C, so W + V C Uᵀ need not be written out anew:
    # the layer keeps it while it trains, and adds what the optimizer says that it did. Any other
    # write to C, W or a basis shows in its address or version, and then all is written anew.
    # (A write through `.data` has neither: write under no_grad.) With another optimizer, which
    # may write so, it is written out anew each time.
    def _keeps_weight(self) -> bool:
        trains = torch.is_grad_enabled() and self.core.requires_grad and self.k is not None
        exact = self.base is None and self.residual.dtype == self.core.dtype  # small changes would vanish in bf16
        # On CUDA the transposed ΔC would be sorted anew, and the host wait for it.
        return trains and exact and self.core.is_cpu and _keep(self.core.numel(), self.residual.numel())

    @torch.no_grad()
    def _kept_weight(self) -> Tensor:
        U, V, core = self.basis.U, self.basis.V, self.core
        stamps = [(t.data_ptr(), t._version) for t in (core, self.residual, U, V) if t is not None]
        before, weight = self._kept
        told = getattr(core, "last_step", None)  # None: of no step of SparseGradAdamW yet; (): the last is in the weight
        if before == stamps and told is not None:
            return weight
        old, new, index, change = told or (None,) * 4
        if before == [(core.data_ptr(), old), *stamps[1:]] and new == core._version:
            change = torch.sparse_coo_tensor(torch.stack(index), change, core.shape, is_coalesced=True, check_invariants=False)
            _add_expanded(weight, change, U, V)
        else:
            weight = _merge(self.residual, core, U, V, core.dtype)
        self._kept = stamps, weight
        core.last_step = told and ()  # also asks the optimizer to tell
        return weight

    def _save_to_state_dict(self, *args):
        self._kept = None, None  # so that a run that goes on from the file rounds as the one that wrote it
        super()._save_to_state_dict(*args)

    def __getstate__(self):
        return {**self.__dict__, "_kept": (None, None)}  # not into copies and files

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, core={tuple(self.core.shape)}, k={self.k}"

    # A state_dict must hold a shared basis once, not once a layer (safetensors, and with it
    # the Trainer, refuses tensors that share memory). So the first layer registers it as a
    # submodule and the others only point to it, and move it along when they are moved.
    def _borrow_basis(self) -> None:
        self.__dict__["basis"] = self._modules.pop("basis")

    def _apply(self, fn, recurse=True):
        self._kept = None, None
        if "basis" not in self._modules:
            self.basis._apply(fn)
        return super()._apply(fn, recurse)


def _core_shape(basis: Basis, out: int, in_: int) -> tuple[int, int]:
    return (out if basis.V is None else basis.V.shape[1]), (in_ if basis.U is None else basis.U.shape[1])


def _check_fit(name: str, shape: tuple[int, int], basis: Basis, k: float | int | None) -> int | None:
    """Entries to keep for a weight of `shape` (out, in), None if that is all; ValueError if basis or k do not fit it."""
    out, in_ = shape
    for side, vectors, size in (("U", basis.U, in_), ("V", basis.V, out)):
        if vectors is not None and (vectors.dim() != 2 or vectors.shape[0] != size or not 1 <= vectors.shape[1] <= size):
            raise ValueError(f"{side} of {name} is {tuple(vectors.shape)}; for a weight ({out}, {in_}) it is ({size}, 1 to {size})")
    rows, columns = _core_shape(basis, out, in_)
    if k is None:
        return None
    if isinstance(k, float):
        if not 0 < k <= 1:
            raise ValueError(f"k is {k}: as a share it lies above 0 and up to 1.0; an int is a count of entries")
        k = max(1, min(round(k * out * in_), rows * columns))
    if not 1 <= k <= rows * columns:
        raise ValueError(f"k is {k}, but the core of {name} ({rows}, {columns}) has 1 to {rows * columns} entries")
    return k if k < rows * columns else None  # with nothing to cut, a dense gradient is the smaller one


# ------------------------------------------------------------------------ patching a model


class Summary(NamedTuple):
    """What a patched model trains; `print` it."""

    layers: int  # SparseGrad layers
    core: int  # entries of their cores
    touched: int  # of these, entries one step updates
    dense: int  # other trainable parameters
    frozen: int  # parameters that do not train, as they are stored (4-bit ones two to a byte)

    def __str__(self) -> str:
        share = 100 * self.touched / max(self.core, 1)
        return (
            f"{self.layers} SparseGrad layers: a step updates {self.touched:,} of {self.core:,} core entries ({share:.3g} %); "
            f"{self.dense:,} other parameters train, {self.frozen:,} are frozen"
        )


def sparsegrad_layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    """Name -> layer, of the SparseGrad layers of `model`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseGradLinear)}


def summary(model: nn.Module) -> Summary:
    """Count what trains in a patched model."""
    layers = sparsegrad_layers(model).values()
    cores = [layer for layer in layers if layer.core.requires_grad]
    core = sum(layer.core.numel() for layer in cores)
    touched = sum(layer.core.numel() if layer.k is None else layer.k for layer in cores)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    return Summary(len(layers), core, touched, trainable - core, total - trainable)


def patch_model(
    model: nn.Module,
    bases: Mapping[str, Basis] | None,
    k: float | int | None = 0.01,
    target_modules: str | Iterable[str] | None = None,
) -> Summary:
    """Replace the named linears by SparseGradLinear, in place; returns the `summary`.

    bases: from `find_bases`, and copied, so that no two models share one. None: no bases,
    the paper's MeProp, on `target_modules` (as in `find_bases`).
    k: as in `SparseGradLinear.from_linear`; the paper keeps 1 % of each layer (§5.1).

    Other parameters stay as trainable as they were. Raises ValueError, the model
    untouched, if it is patched already or a name, a shape or k does not fit.
    """
    if bases is None:
        bases = dict.fromkeys(mlp_linears(model, target_modules), Basis())
    elif target_modules is not None:
        raise ValueError("target_modules goes with bases=None; bases name their layers themselves")
    if not bases:
        raise ValueError("no layers to patch: the bases are empty")
    if sparsegrad_layers(model):
        raise ValueError("the model is patched already; unpatch_model(model) takes its SparseGrad layers out")
    modules = dict(model.named_modules())
    owners = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, basis in bases.items():
        linear = modules.get(name, nn.Module())
        if not name or not _is_linear(linear):
            what = f"a {type(linear).__name__}" if name in modules else "not in the model"
            raise ValueError(f"{name!r} should be a linear layer, but is {what}")
        if owners[id(linear.weight)] > 1:
            raise ValueError(f"the weight of {name} is tied to another of the model; a patched layer would untie it")
        _check_fit(name, weight_shape(linear), basis, k)
    copies: dict[int, Basis] = {}
    for name, basis in bases.items():
        borrowed = id(basis) in copies
        layer = SparseGradLinear.from_linear(modules[name], copies.setdefault(id(basis), copy.deepcopy(basis)), k)
        if borrowed:
            layer._borrow_basis()
        model.set_submodule(name, layer)
    return summary(model)


def unpatch_model(model: nn.Module) -> None:
    """Turn every SparseGradLinear back into the plain layer it was, with what it learned,
    in place: the outputs stay. Raises ValueError if there is none."""
    layers = sparsegrad_layers(model)
    if not layers:
        raise ValueError("the model has no SparseGrad layers")
    for name, layer in layers.items():
        model.set_submodule(name, layer.to_linear())


# -------------------------------------------------------------------------- the optimizer


class SparseGradAdamW(torch.optim.Optimizer):
    """AdamW for dense gradients, lazy Adam for COO gradients (§3.3), in one optimizer.

    The lazy one is that of torch.optim.SparseAdam: only entries present in the gradient
    move, their moments with them; no weight decay; one step count for all entries. Its
    two moments are dense, so its memory is AdamW's. A core with a dense gradient decays
    as any parameter: towards 0, where the layer is the pretrained one.

    k: cut each COO gradient to its k largest entries before the step, a count. Accumulation
    over micro-batches unites their supports; this restores the sparsity. None: no cut.

    adaptivity: how far step sizes adapt to each entry, from 1 (Adam) to 0 (one second moment for a
    whole parameter, so its entries keep their proportions; Adam-mini has one for a block). An entry is
    divided by the root of v^adaptivity · s^(1 − adaptivity), v its own second moment and s the
    parameter's, of the mean square of its gradient's entries. At 0.5 rank 128 did better on language
    models and no better at classifying (README). It holds for dense gradients too, whose step then takes
    two more tensors of their size: give the cores a group of their own where more than they trains.

    Raises ValueError for an option out of range, in a group as well.
    """

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, k: int | None = None, adaptivity: float = 1.0
    ):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, k=k, adaptivity=adaptivity))

    def add_param_group(self, param_group: dict) -> None:
        options = {**self.defaults, **param_group}
        lr, betas, eps, weight_decay = (options[key] for key in ("lr", "betas", "eps", "weight_decay"))
        k, adaptivity = options["k"], options["adaptivity"]
        if not (lr >= 0 and eps >= 0 and weight_decay >= 0 and all(0 <= b < 1 for b in betas)):
            raise ValueError(f"lr {lr}, eps {eps}, weight_decay {weight_decay} must be >= 0 and betas {betas} in [0, 1)")
        if k is not None and not (isinstance(k, int) and k >= 1):
            raise ValueError(f"k is {k}: it is a count of entries, an int of 1 or more")
        if not 0 <= adaptivity <= 1:
            raise ValueError(f"adaptivity is {adaptivity}: it lies from 0 (one second moment for a whole parameter) to 1 (Adam)")
        super().add_param_group(param_group)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("adaptivity", 1.0)  # of a state from before there was one

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group["k"] is not None and any(p.grad.is_sparse and p.grad.dense_dim() for p in params):
                raise ValueError("k cuts entries, but a gradient is sparse by rows (an embedding's): give it a group with k=None")
            for p in params:
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"] = torch.zeros_like(p)
                    state["exp_avg_sq"] = torch.zeros_like(p)
            ours = [p.grad.is_sparse or group["adaptivity"] < 1 for p in params]
            self._adamw_step(group, [p for p, own in zip(params, ours) if not own])
            self._own_step(group, [p for p, own in zip(params, ours) if own])
        return loss

    def _adamw_step(self, group, params) -> None:
        states = [self.state[p] for p in params]
        adamw(
            params,
            # CPU kernels that do all at once do not look at strides.
            [p.grad if p.grad.stride() == p.stride() else torch.empty_like(p).copy_(p.grad) for p in params],
            *([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq")),
            max_exp_avg_sqs=[],
            state_steps=[s["step"] for s in states],
            fused=all(p.is_cpu and p.is_contiguous() for p in params) or None,  # else torch's default, a few kernels for all
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _own_step(self, group, params) -> None:
        if not params:
            return
        (beta1, beta2), adaptivity = group["betas"], group["adaptivity"]
        indices, g, m, v, sizes, eps = [], [], [], [], [], []
        for p in params:
            state = self.state[p]
            if p.grad.is_sparse:
                grad = p.grad.coalesce()
                index, values = grad.indices(), grad.values()
                if group["k"] is not None and len(values) > group["k"]:
                    kept = values.abs().topk(group["k"], sorted=False).indices.sort().values
                    index, values = index[:, kept], values[kept]
            else:
                index, values = (...,), p.grad
                p.mul_(1 - group["lr"] * group["weight_decay"])  # and a new version: a layer that keeps its weight makes it anew
            state["step"] += 1
            step = state["step"].item()
            correction = math.sqrt(1 - beta2**step)
            sizes.append(-group["lr"] * correction / (1 - beta1**step))
            eps.append(group["eps"] * (1.0 if p.grad.is_sparse else correction))  # SparseAdam's place for it, or AdamW's
            indices.append(tuple(index))
            g.append(values)
            m.append(state["exp_avg"][indices[-1]])
            v.append(state["exp_avg_sq"][indices[-1]])
        m = torch._foreach_lerp(m, g, 1 - beta1)  # all cores in one kernel, as torch's optimizers do
        v = torch._foreach_mul(v, beta2)
        torch._foreach_addcmul_(v, g, g, value=1 - beta2)
        for p, index, g_p, m_p, v_p in zip(params, indices, g, m, v):
            state = self.state[p]
            state["exp_avg"][index] = m_p
            state["exp_avg_sq"][index] = v_p
            if adaptivity < 1 and g_p.numel():
                if "mean_square" in state:  # s
                    state["mean_square"].lerp_(g_p.square().mean(), 1 - beta2)
                else:  # at the first step the same, later the best guess
                    state["mean_square"] = v_p.mean()
                v_p.pow_(adaptivity).mul_(state["mean_square"] ** (1 - adaptivity))
        torch._foreach_sqrt_(v)
        torch._foreach_add_(v, eps)
        torch._foreach_div_(m, v)
        torch._foreach_mul_(m, sizes)
        for p, index, change in zip(params, indices, m):
            before = p._version
            p[index] = p[index] + change
            if hasattr(p, "last_step"):  # the layer's `_kept_weight` asks for it
                p.last_step = before, p._version, index, change


@torch.no_grad()
def clip_grad_norm_(params: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale all gradients in place so that their joint 2-norm is at most `max_norm`, COO
    ones counted by their summed entries; returns the norm before. With max_norm inf
    nothing is scaled. torch's own raises on COO gradients up to 2.13."""
    values = []
    for p in [params] if isinstance(params, Tensor) else params:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()  # duplicates must be summed before they are squared
        if p.grad is not None:
            values.append(p.grad._values() if p.grad.is_sparse else p.grad)
    if not values:
        return torch.tensor(0.0)
    device = values[0].device
    norm = torch.stack([v.norm(dtype=_at_least_fp32(v.dtype)).to(device, torch.float32) for v in values]).norm()
    if max_norm == math.inf:
        return norm
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for v in values:
        v.mul_(scale.to(v.device))
    return norm


# --------------------------------------------------------------------------------- saving


def sparsegrad_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What training changed, and the bases: flat, and fit for `safetensors.torch.save_file`.

    `NAME.core.values`, and `.indices` (int32, into the flattened core) of its entries that
    are not zero; `NAME.core.meta` (int64): out, in, r_out, r_in (0: no basis), number of the
    basis, k (0: dense); `sparsegrad.basis.NUMBER.U` and `.V`; all other trainable parameters and the model's
    persistent buffers under their own names. Raises ValueError if nothing is patched.
    """
    layers = sparsegrad_layers(model)
    if not layers:
        raise ValueError("the model has no SparseGrad layers")
    state, numbers = {}, {}
    ours = tuple(f"{name}.{part}" for name in layers for part in ("core", "basis.", "base."))
    persistent = model.state_dict().keys()
    buffers = {name: b for name, b in model.named_buffers() if name in persistent}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in {**trained, **buffers}.items():
        if not name.startswith(ours):
            state[name] = tensor.detach().clone().contiguous()
    for name, layer in layers.items():
        number = numbers.setdefault(id(layer.basis), len(numbers))
        for side, vectors in layer.basis.named_buffers():
            state[f"sparsegrad.basis.{number}.{side}"] = vectors.detach().clone().contiguous()
        flat = layer.core.detach().flatten()
        index = flat.nonzero().squeeze(1)
        state[f"{name}.core.values"] = flat[index]
        state[f"{name}.core.indices"] = index.to(torch.int32)
        ranks = (0 if b is None else b.shape[1] for b in (layer.basis.V, layer.basis.U))
        state[f"{name}.core.meta"] = torch.tensor([layer.out_features, layer.in_features, *ranks, number, layer.k or 0])
    return state


def load_sparsegrad_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Patch a fresh copy of the pretrained `model` and bring it to where `state`, of
    `sparsegrad_state_dict`, was saved: same outputs, ready to train on.

    Raises ValueError naming the first mismatch of name or shape, the model untouched.
    """
    metas = {key.removesuffix(".core.meta"): v.tolist() for key, v in state.items() if key.endswith(".core.meta")}
    if not metas:
        raise ValueError("no SparseGrad layer in this state: it was not made by sparsegrad_state_dict")
    ours = {f"{name}.core.{part}" for name in metas for part in ("values", "indices", "meta")}
    others = {key: v for key, v in state.items() if key not in ours and not key.startswith("sparsegrad.basis.")}
    modules, tensors = dict(model.named_modules()), model.state_dict(keep_vars=True)
    bases = {}
    for name, meta in metas.items():
        module = modules.get(name)
        if isinstance(module, SparseGradLinear):
            raise ValueError(f"{name} is patched already: load into a fresh copy of the pretrained model")
        shape = weight_shape(module) if module is not None and _is_linear(module) else None
        if shape != tuple(meta[:2]):
            raise ValueError(f"{name} is a linear layer {tuple(meta[:2])} in the file, but {shape or 'none'} in the model")
        if len(meta) != 6:
            raise ValueError(f"{name}.core.meta should be six numbers, but is {meta}")
        out, in_, r_out, r_in, number, k = meta
        entries = (r_out or out) * (r_in or in_)
        values, index = (state.get(f"{name}.core.{part}", torch.empty(0, 0)) for part in ("values", "indices"))
        whole = values.dim() == 1 and values.shape == index.shape and 0 <= k <= entries
        if not whole or (len(index) and not 0 <= index.min() <= index.max() < entries):
            raise ValueError(f"{name}.core is damaged: it should be as many values as indices, below {entries}")
        for side, shape in (("U", (in_, r_in)), ("V", (out, r_out))):
            basis = state.get(f"sparsegrad.basis.{number}.{side}", torch.empty(0, 0))
            if shape[1] and tuple(basis.shape) != shape:
                raise ValueError(f"sparsegrad.basis.{number}.{side} should be {shape}, for {name}, but is {tuple(basis.shape)}")
        if number not in bases:
            bases[number] = Basis(*(state.get(f"sparsegrad.basis.{number}.{side}") for side in "UV"))
    for name, value in others.items():
        shape = tuple(tensors[name].shape) if name in tensors else None
        if shape != tuple(value.shape):
            raise ValueError(f"{name} is {tuple(value.shape)} in the file, but {shape or 'missing'} in the model")
    patch_model(model, {name: bases[meta[4]] for name, meta in metas.items()}, None)
    with torch.no_grad():
        for name, layer in sparsegrad_layers(model).items():
            layer.k = _check_fit(name, metas[name][:2], layer.basis, metas[name][5] or None)
            index = state[f"{name}.core.indices"].to(layer.core.device, torch.int64)
            layer.core.view(-1)[index] = state[f"{name}.core.values"].to(layer.core)
        for name, value in others.items():
            tensors[name].copy_(value)
