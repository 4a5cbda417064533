"""SparseGrad: fine-tune the MLP layers of a transformer through sparse gradients.

After Chekalina et al., "SparseGrad: A Selective Method for Efficient Fine-tuning of MLP
Layers", EMNLP 2024, arXiv 2410.07383. It needs torch and nothing else: copy this file.

    bases = find_bases(model, loader)            # 30 steps of back-propagation, then HOSVD
    print(patch_model(model, bases, k=0.01))     # MLP linears become SparseGradLinear
    optimizer = SparseGradAdamW(model.parameters(), lr=1e-4)  # your training loop, unchanged
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

The paper (§3.2) trains W̃ = Vᵀ W U itself. With complete bases V C Uᵀ + W = V (C + W̃) Uᵀ:
C is W̃ less its initial value, with the same gradient and the same Adam steps. It makes an
untrained layer equal the linear bit for bit, and lets the bases be truncated or absent. A
basis that is None stands for the identity; with neither this is the paper's MeProp.
"""

import collections
import copy
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

_joined = getattr(dist, "is_initialized", bool)  # bool() is False: torch built without it
Targets = str | Iterable[str] | None  # see mlp_linears
# ------------------------------------------------------------------ unfolding and HOSVD
def unfold(tensor: Tensor, mode: int) -> Tensor:
    """Mode-`mode` unfolding (§3.1): `(d0, ..., dn)` -> `(d_mode, product of the others)`."""
    return tensor.movedim(mode, 0).reshape(tensor.shape[mode], -1)

def hosvd(tensor: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Higher-order SVD by unfoldings (§3.1), the textbook form: the core tensor, and a factor a
    mode, `(d_mode, min(d_mode, product of the others))`, the left singular vectors of its
    unfolding by falling singular value. The core times every factor gives `tensor` back."""
    core, factors = tensor, []
    for mode in range(tensor.dim()):  # contract the leading mode; the new one goes last
        factors.append(torch.linalg.svd(unfold(tensor, mode), full_matrices=False).U)
        core = torch.tensordot(core, factors[-1], dims=([0], [0]))
    return core, factors

# ------------------------------------------------------------------------ which layers
MLP_LINEARS = (
    r"(.*\.)?("
    r"(?<!attention\.)(intermediate|output)\.dense"  # BERT, RoBERTa, ViT of transformers 4
    r"|ffn\.lin[12]|mlp\.fc[12]"  # DistilBERT, ViT of transformers 5
    r"|mlp\.(up|down)_proj"  # LLaMA, Mistral, Qwen2 (§5.2 leaves gate_proj alone)
    r"|DenseReluDense\.w(i|i_0|i_1|o)|mlp\.c_(fc|proj))"  # T5, GPT-2
)

def _is_linear(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's

def weight_shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of an nn.Linear, quantised ones included, or a Conv1D."""
    if isinstance(linear, nn.Linear):
        return linear.out_features, linear.in_features
    return tuple(linear.weight.T.shape)

def _role(name: str) -> str:
    """The name with block numbers struck out: layers of one role share it."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.|$)", "*", name)

def _unwrap(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DDP and torch.compile."""
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model._orig_mod if hasattr(model, "_orig_mod") else model.module
    return model

def mlp_linears(model: nn.Module, target_modules: Targets = None) -> dict[str, nn.Module]:
    """Name -> linear layer, of the layers that SparseGrad is to train. `target_modules` as in PEFT:
    a regex for whole names, or a list of names or their endings; None for the MLP linears of the
    families above. ValueError, with the linears there are, if none match, or but a part of MLPs."""
    model = _unwrap(model)
    if sparsegrad_layers(model):
        raise ValueError("the model is patched already; unpatch_model takes its layers out")
    linears = {name: m for name, m in model.named_modules() if name and _is_linear(m)}
    pattern = MLP_LINEARS if target_modules is None else target_modules
    if not isinstance(pattern, str):
        pattern = "|".join(rf"(.*\.)?{re.escape(ending)}" for ending in pattern)
    found = {name: m for name, m in linears.items() if re.fullmatch(pattern, name)}
    block = {name: re.match(r"((.*?\.)?\d+(?=\.))?", name)[0] for name in linears}  # "layers.0"
    shapes = {(block[name], *weight_shape(m)) for name, m in found.items()}
    stacks = {_role(block[name]) for name in found}
    blocks = {b for b in block.values() if _role(b) in stacks}  # of a whole MLP each: out, and back
    half = blocks - {b for b, *_ in shapes} or any((b, n, m) not in shapes for b, m, n in shapes)
    if not found or (target_modules is None and half):
        some, there = (", ".join(sorted(set(map(_role, names)))) for names in (found, linears))
        what = f"{target_modules or 'a known MLP'}: found {some and f'only {some}' or 'nothing'}"
        raise ValueError(f"{what}; pass target_modules. Linears (*: a number): {there or 'none'}")
    return found

# ------------------------------------------------------------- gradients and their bases
class Basis(nn.Module):
    """An orthonormal basis for each side of a weight gradient (§3.1): U `(in, r_in)`, V `(out,
    r_out)`, columns by falling energy, frozen, or None for a side that is not rotated. Spectra
    for `support="fixed"`: `column_energy` (r_in,), `row_energy` (r_out,), the share of the
    gradients' squared norm in each column and row of the core, or None."""
    def __init__(self, U=None, V=None, column_energy=None, row_energy=None):
        super().__init__()
        for side, b in (("U", U), ("V", V)):  # contiguous: without a hold on columns cut off
            b = b if b is None else nn.Parameter(b.detach().contiguous(), requires_grad=False)
            self.register_parameter(side, b)
        self.column_energy, self.row_energy = column_energy, row_energy

    def core_shape(self, out: int, in_: int) -> tuple[int, int]:
        """(r_out, r_in): the shape of a core between these bases, for a weight (out, in)."""
        return tuple(d if b is None else b.shape[1] for b, d in ((self.V, out), (self.U, in_)))

def _model_loss(model: nn.Module, batch) -> Tensor:
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch is a {type(batch).__name__}, not a dict: pass loss_fn")
    device = next(model.parameters()).device
    output = model(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
    if getattr(output, "loss", None) is None:
        raise ValueError("the model gave no .loss: put labels in the batches, or pass loss_fn")
    return output.loss

def _gradients(model: nn.Module, batches: Iterable, names: list[str], n_steps: int = 30,
               lr: float = 5e-5, loss_fn: Callable[[nn.Module, object], Tensor] = _model_loss):
    """Train the linears `names` alone, and yield each step's gradients, {name: (out, in)}: a twin
    that shares all parameters does, by SparseGrad layers with no bases or cut, whose dL/dC is G."""
    model, reached, steps = _unwrap(model), set(), 0
    shared = {id(p): nn.Parameter(p.detach(), False) if p.is_floating_point() else p
              for p in model.parameters()}  # with flags of its own
    twin = copy.deepcopy(model, shared).train()
    patch_model(twin, dict.fromkeys(names, Basis()), k=None)
    for module in twin.modules():
        if module._parameters and not module._modules:
            module.register_forward_hook(_with_gradient)
    cores = {name: twin.get_submodule(name).core for name in names}
    optimizer = SparseGradAdamW(cores.values(), lr, weight_decay=0.0)
    for _, batch in zip(range(n_steps), batches):
        with torch.enable_grad():
            loss = loss_fn(twin, batch)
            if loss.requires_grad:
                loss.backward()
        for core in cores.values() if _joined() else ():  # of a part of the batch
            core.grad = torch.zeros_like(core) if core.grad is None else core.grad
            _sum(core.grad.div_(dist.get_world_size()))
        gradients = {name: core.grad for name, core in cores.items() if core.grad is not None}
        yield gradients
        reached, steps = reached | gradients.keys(), steps + 1
        if lr:
            optimizer.step()
        twin.zero_grad()
    if missed := ", ".join(name for name in names if name not in reached):
        raise ValueError(f"{steps} batches, but no gradient reached {missed} in loss_fn's model")

def _sum(*tensors: Tensor | None) -> None:
    """Sum each that is not None over the processes of torch.distributed, if begun, in place."""
    for tensor in filter(torch.is_tensor, tensors if _joined() else ()):
        dist.all_reduce(tensor)

def _with_gradient(module: nn.Module, args: tuple, y):  # as re-entrant checkpoints need inputs
    if isinstance(y, Tensor) and y.is_floating_point() and torch.is_grad_enabled():
        return y if y.requires_grad else y.detach().requires_grad_().clone()

def collect_gradients(model: nn.Module, batches: Iterable, target_modules: Targets = None,
                      **options) -> dict[str, Tensor]:
    """Name -> weight gradients `(steps, out, in)` of the MLP linears, fp32 or better (§3.1), to
    look at. Takes `n_steps`, `lr`, `loss_fn` of `find_bases`, which needs no such stack."""
    names = list(mlp_linears(model, target_modules))
    steps = list(_gradients(model, batches, names, **options))
    return {name: torch.stack([G[name] for G in steps if name in G]) for name in names}

def find_bases(model: nn.Module, batches: Iterable, target_modules: Targets = None, *,
               share: str = "role", sides: str = "both", rank: int | None = None,
               **options) -> dict[str, Basis]:
    """Name of layer -> Basis: the HOSVD of §3.1, streamed.
    The left singular vectors of an unfolding are the eigenvectors of its Gram matrix, a sum
    over the gradients: `Σ G Gᵀ` (out, out) gives V, `Σ Gᵀ G` (in, in) gives U. A twin of the
    model trains its MLP linears alone by AdamW, in train mode; the model is not touched.
    n_steps, lr: 30, or all batches, and 5e-5 by default; lr 0 stays at the pretrained weights.
    share: "role", one basis for all blocks' layers of a role, as in the paper; "layer", one each.
    sides: "both"; "narrow", only the shorter side of each weight (input, of a square one).
    rank: columns to keep, all of a shorter side; None: all (complete bases, as in the paper).
    loss_fn: `loss_fn(model, batch)`; default, `.loss` of `model(**batch)`.
    All processes of torch.distributed must call it, each with its part of every batch.
    Raises ValueError for options or batches that do not fit, or gradients missing or not finite."""
    if share not in ("role", "layer") or sides not in ("both", "narrow"):
        raise ValueError(f"share={share!r}: 'role', 'layer'; sides={sides!r}: 'both', 'narrow'")
    shapes = {name: weight_shape(m) for name, m in mlp_linears(model, target_modules).items()}
    room = max(map(min, shapes.values()))
    if rank is not None and not 1 <= rank <= room:
        raise ValueError(f"rank is {rank}, but these layers have room for 1 to {room}")
    groups = {n: (_role(n), shape) if share == "role" else n for n, shape in shapes.items()}
    here, world = (dist.get_rank(), dist.get_world_size()) if _joined() else (0, 1)
    sums = {}  # group -> scale (), and for U and V the Gram matrix of G / scale, or its diagonal
    for gradients in _gradients(model, batches, list(shapes), **options):
        for number, (name, G) in enumerate(gradients.items()):
            if groups[name] not in sums:
                out, in_ = G.shape
                rotated = (True, True) if sides == "both" else (in_ <= out, out < in_)
                grams = [G.new_zeros((d, d) if on else d) for d, on in zip((in_, out), rotated)]
                sums[groups[name]] = G.new_zeros(()), *grams
            _add_grams(*sums[groups[name]], G, number % world == here)
    _sum(*(gram for _, *grams in sums.values() for gram in grams))
    bases = {}
    for name, group in groups.items():
        if group not in bases:
            mine, grams = len(bases) % world == here, sums[group][1:]
            (U, columns), (V, rows) = (_spectrum(gram, rank, name, mine) for gram in grams)
            bases[group] = Basis(U, V, columns, rows)
    _sum(*(getattr(basis, part) for basis in bases.values() for part in BASIS))
    return {name: bases[group] for name, group in groups.items()}

def _add_grams(scale: Tensor, gram_in: Tensor, gram_out: Tensor, G: Tensor, mine: bool) -> None:
    """Add `Gᵀ G` and `G Gᵀ` of G (out, in), or the diagonals, in units of scale², which grows:
    the squares of tiny or huge gradients would leave fp32. Not `mine`: another process adds."""
    G = G.to(scale.device)  # layers of a role may lie on several
    largest = torch.maximum(scale, G.abs().amax()).clamp(min=torch.finfo(G.dtype).tiny)
    G = G / largest
    for gram, rows in ((gram_in, G.T), (gram_out, G)):
        gram.mul_((scale / largest) ** 2)
        if mine and gram.dim() == 1:
            gram.add_(rows.square().sum(1))
        elif mine:
            for i in range(0, len(rows), 512):  # up to the diagonal: eigh reads no more
                gram[i : i + 512, : i + 512].addmm_(rows[i : i + 512], rows[: i + 512].T)
    scale.copy_(largest)

def _spectrum(gram: Tensor, rank: int | None, name: str, mine: bool) -> tuple:
    """Of a Gram matrix (n, n) the eigenvectors (n, rank) and their shares of the energy (rank,),
    by falling share; of a diagonal (n,) None and its entries' shares (n,). Zeros if not `mine`."""
    energy = gram.sum() if gram.dim() == 1 else gram.trace()
    if not 0 < energy < math.inf:
        raise ValueError(f"the gradients of {name} are zero or not finite: no basis in them")
    if gram.dim() == 1:
        return None, gram / energy * mine
    found = torch.linalg.eigh(gram.double() / energy) if mine else (0 * gram[0], 0 * gram)
    values, vectors = (t.flip(-1)[..., :rank] for t in found)
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()  # else free
    return vectors.to(gram.dtype), values.clamp(min=0).to(gram.dtype)  # by fp64 orthogonal to 1e-7

# ------------------------------------------------------------------------ sparse gradients
def topk_coo(grad: Tensor, k: int) -> Tensor:
    """`grad` (rows, columns) cut to its `k` largest magnitudes: coalesced COO, no sync (§3.3)."""
    flat, columns = grad.flatten(), grad.shape[1]
    index = flat.abs().topk(k, sorted=False).indices.sort().values  # row-major: coalesced order
    # Strided so on purpose: autograd hands contiguous indices on without the mark "coalesced".
    indices = torch.stack((index // columns, index % columns), dim=1).T  # (2, k)
    return torch.ops.aten._sparse_coo_tensor_with_dims_and_tensors(  # the public one warns in 2.11
        2, 0, grad.shape, indices, flat[index], dtype=grad.dtype, layout=torch.sparse_coo,
        device=grad.device, is_coalesced=True)

def topk_energy(grad: Tensor, k: int) -> float:
    """Share, 0 to 1, of the squared norm of `grad` that its `k` largest entries hold."""
    squares = grad.double().square().flatten()
    return (squares.topk(k, sorted=False).values.sum() / squares.sum()).item()

def hyperbolic_cross(row_energy: Tensor, column_energy: Tensor, k: int) -> Tensor:
    """Flat indices (k,), ascending, of the entries (i, j) of a core with the largest
    `row_energy[i] * column_energy[j]`: where gradients of these spectra are expected large."""
    expected = torch.outer(row_energy, column_energy).flatten()
    return expected.topk(k, sorted=False).indices.sort().values

class SparseGradFunction(torch.autograd.Function):
    """The core as it is; its gradient, which autograd makes by Table 2, cut to k entries (§3.3)"""
    @staticmethod
    def forward(ctx, core, k):
        ctx.k = k
        return core.view_as(core)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return topk_coo(grad, ctx.k), None

# ------------------------------------------------------------------------------ the layer
class _NoValues(Tensor):
    """What a SparseGrad layer shows as `weight`: dtype, device and shape alone."""
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # fused paths decline
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("a SparseGrad layer's weight has no values: call it, or leave it out")

def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # FSDP2's, gathered

def _add_core(W: Tensor, C: Tensor, U: Tensor | None, V: Tensor | None) -> Tensor:
    """W + V C Uᵀ (out, in)."""
    C = C if V is None else V @ C  # (out, r_out) @ (r_out, r_in)
    return W + C if U is None else torch.addmm(W, C, U.T)  # (out, r_in) @ (r_in, in)

class SparseGradLinear(nn.Module):
    """A linear layer that trains through the k largest entries of its rotated gradient.
    `residual` (out, in) is the pretrained weight, frozen, in its own dtype, as are the bases.
    `core` (r_out, r_in), or (k,) with a fixed `support` (k,) of flat indices, trains in fp32 or
    better, else ValueError. A quantised linear is kept, as `base`, and the residual None."""
    @classmethod
    def from_linear(cls, linear: nn.Module, basis: Basis, k: float | int | None = 0.01, *,
                    support: str = "topk", cut: str = "backward") -> "SparseGradLinear":
        """Take over the weight of an nn.Linear or GPT-2 Conv1D, and `basis`, which moves to its
        device and dtype. k, support, cut, ValueError: as in `patch_model`."""
        layer, weight, shape = cls(), linear.weight, weight_shape(linear)
        layer.k, layer.cut = _entries("the layer", shape, basis, k, support, cut), cut
        layer.out_features, layer.in_features = shape
        layer.register_parameter("bias", linear.bias)
        if weight.is_floating_point():
            W = weight.detach() if isinstance(linear, nn.Linear) else weight.detach().T
            layer.base, layer.residual, dtype = None, nn.Parameter(W.contiguous(), False), W.dtype
            layer.emptied = (linear,)  # for to_linear; in a tuple, it is no submodule
            linear._parameters["weight"] = None
        else:
            layer.base, layer.residual, dtype = linear, None, torch.float32
        linear.bias = None
        layer.basis, index, shape = basis.to(weight.device, dtype), None, basis.core_shape(*shape)
        if support == "fixed" and layer.k is not None:
            index = hyperbolic_cross(basis.row_energy, basis.column_energy, layer.k)
            index, shape = index.to(weight.device), index.shape
        layer.register_buffer("support", index)
        dtype = torch.promote_types(dtype, torch.float32)
        layer.core = nn.Parameter(torch.zeros(shape, device=weight.device, dtype=dtype))
        return layer.train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A plain layer of the original class with weight `W + V C Uᵀ` and the same bias
        parameter; its weight trains if the core did. A quantised one is an nn.Linear in fp32."""
        empty = self.base and nn.Linear(self.in_features, self.out_features, device="meta")
        linear, weight = empty or copy.deepcopy(self.emptied[0]), self.merged_weight()
        weight = weight if isinstance(linear, nn.Linear) else weight.T.contiguous()
        linear.weight, linear.bias = nn.Parameter(weight, self.core.requires_grad), self.bias
        return linear.train(self.training)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """`W + V C Uᵀ` (out, in), summed in fp32 or better, in the dtype of W; fp32 if packed."""
        W = _whole(self.residual) if self.base is None else self.base(  # whatever its packing
            torch.eye(self.in_features, device=self.core.device)).T.float()
        dtype = torch.promote_types(W.dtype, torch.float32)
        return _add_core(W.to(dtype), *self._factors(dtype)).to(W.dtype)

    @property
    def weight(self) -> Tensor:
        """Dtype, device and shape of W, as T5 asks for, and an error for whatever asks for more."""
        W = self.base.weight if self.base else self.residual
        shape = self.out_features, self.in_features
        return Tensor._make_wrapper_subclass(_NoValues, shape, dtype=W.dtype, device=W.device)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # once, not for each product
        leading, x = x.shape[:-1], x.reshape(-1, x.shape[-1])  # (T, in)
        C, U, V = self._factors(x.dtype)
        written = self._writes_out(len(x))
        if self.base is None:
            W = _add_core(self.residual.detach(), C, U, V) if written else self.residual.detach()
            y = F.linear(x, W, self.bias)  # (T, in) @ (in, out)
        else:
            y = self.base(x).to(x.dtype)
            y = y if self.bias is None else y + self.bias.to(x.dtype)
        if not written:
            x = x if U is None else x @ U  # (T, in) @ (in, r_in)
            x = x if V is None else F.linear(x, C)  # (T, r_in) @ (r_in, r_out)
            y.addmm_(x, C.T if V is None else V.T)  # (T, r_out) @ (r_out, out)
        return y.reshape(*leading, self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, core={tuple(self.core.shape)}, k={self.k}"

    def _writes_out(self, tokens: int) -> bool:
        """Whether W + V C Uᵀ takes fewer multiply-adds a step than rotating so many tokens. Never
        with truncated bases, where `x U` is less to keep than x, nor with a quantised W."""
        m, n = self.out_features, self.in_features
        u, v = int(self.basis.U is not None), int(self.basis.V is not None)
        write, rotate = m * n * (u * n + v * m), tokens * (u * n**2 + v * m**2 + m * n)  # halved
        return self.base is None and self.basis.core_shape(m, n) == (m, n) and write < rotate

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """C (r_out, r_in), U, V in `dtype`. Whatever the flags say, of these C alone trains."""
        both, core = (self.basis.U, self.basis.V), _whole(self.core)
        U, V = (None if b is None else _whole(b).detach().to(dtype) for b in both)
        trains = torch.is_grad_enabled() and core.requires_grad
        if trains and core.dtype in (torch.float16, torch.bfloat16):
            raise ValueError("a core in half precision cannot train, steps vanish: keep it in fp32")
        if self.support is not None:
            shape = self.basis.core_shape(self.out_features, self.in_features)
            C = torch.zeros(math.prod(shape), dtype=dtype, device=core.device)
            return C.index_copy_(0, self.support, core.to(dtype)).view(shape), U, V
        alien = isinstance(core, nn.Parameter) or "core" not in self._parameters  # FSDP2's, FSDP1's
        if trains and self.k and alien and not hasattr(core, "cut_to"):
            raise RuntimeError("fully_shard's core is not cut: use support='fixed', or k=None")
        if (trains or self.training) and self.k and self.cut == "backward":
            core = self._cut_in_backward(core)
        return core.to(dtype), U, V

    @torch.compiler.disable  # a compiled graph breaks here: compilers take no COO
    def _cut_in_backward(self, core: Tensor) -> Tensor:
        if nn.parallel.DistributedDataParallel._active_ddp_module is not None:
            raise RuntimeError("DDP sends no COO gradients: patch with cut='step' instead")
        return SparseGradFunction.apply(core, self.k)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "core":  # it tells SparseGradAdamW to how many entries to cut its gradient
            param.cut_to = self.k if self.cut == "step" and self.support is None else None

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # of a copy or a file: parameters come without attributes
        self.core = self._parameters.pop("core")

    def _apply(self, fn, recurse=True):
        if "basis" not in self._modules:  # a borrowed one, see patch_model
            self.basis._apply(fn)
        return super()._apply(fn, recurse)

def _entries(name: str, shape: tuple[int, int], basis: Basis, k, support: str, cut: str):
    """Entries to train of a weight (out, in), None for the whole core. ValueError if none can."""
    if (support, cut) not in KINDS:
        raise ValueError(f"support={support!r}, cut={cut!r} is none of {KINDS}")
    for side, b, size in (("U", basis.U, shape[1]), ("V", basis.V, shape[0])):
        if b is not None and not (len(b) == size and 1 <= b.shape[-1] <= size):
            raise ValueError(f"{side} of {name} is {tuple(b.shape)}, not ({size}, 1 to {size})")
    core = basis.core_shape(*shape)
    if k is not None and not hasattr(k, "__index__"):  # a share
        if not 0 < k <= 1:
            raise ValueError(f"k is {k}: a share lies above 0 and up to 1.0, a count is an int")
        k = max(1, min(round(float(k) * math.prod(shape)), math.prod(core)))
    if k is not None and not 1 <= k <= math.prod(core):
        raise ValueError(f"k is {k}, but the core of {name} has 1 to {math.prod(core)} entries")
    energies = zip((basis.row_energy, basis.column_energy), core)
    if support == "fixed" and any(e is None or len(e) != n for e, n in energies):
        raise ValueError(f"support='fixed' needs a basis of {name} with spectra: use find_bases")
    return None if k == math.prod(core) else k  # nothing to cut: dense

# ------------------------------------------------------------------------ patching a model
class Summary(NamedTuple):
    """What a patched model trains; `print` it."""
    layers: int  # SparseGrad layers
    core: int  # entries of their cores that train
    touched: int  # of these, entries one step updates
    dense: int  # other trainable parameters
    frozen: int  # the rest but the bases, as stored (4-bit ones two to a byte)
    weights: int  # entries of the linears that the layers replace

    def __str__(self) -> str:
        share = f"{100 * self.touched / max(self.weights, 1):.3g} % of {self.weights:,} weights"
        return (f"{self.layers} SparseGrad layers: a step updates {self.touched:,} entries, "
                f"{share}; {self.dense:,} other parameters train, {self.frozen:,} are frozen")

def sparsegrad_layers(model: nn.Module) -> dict[str, SparseGradLinear]:
    """Name -> layer, of the SparseGrad layers of `model`."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseGradLinear)}

def summary(model: nn.Module) -> Summary:
    """Count what trains in a patched model."""
    layers = sparsegrad_layers(model).values()
    cores = {id(m.core): m.k or m.core.numel() for m in layers if m.core.requires_grad}
    bases = {id(p) for layer in layers for p in layer.basis.parameters()}
    params = {id(p): p for p in model.parameters() if id(p) not in bases}
    frozen = {id(m.residual) for m in layers} | {i for i in params if not params[i].requires_grad}
    core, still, total = (sum(params[i].numel() for i in ids if i in params)
                          for ids in (cores, frozen, params))
    weights = sum(m.out_features * m.in_features for m in layers)
    return Summary(len(layers), core, sum(cores.values()), total - still - core, still, weights)

def _fault(linear: nn.Module | None, parent: nn.Module, owners: Mapping[int, int]) -> str:
    """What keeps `linear` from being `y = x Wᵀ + b`, the same whoever calls it; "" if nothing."""
    if not _is_linear(linear):
        found = "not in the model" if linear is None else f"a {type(linear).__name__}"
        return f"should be a linear layer, but is {found}"
    weight, moved = linear._parameters.get("weight"), hasattr(linear, "_hf_hook")  # accelerate's
    if isinstance(parent, nn.MultiheadAttention):
        return "is read by nn.MultiheadAttention, and never called: leave it out"
    if weight is None:
        return "has a weight that is computed: remove its pruning or parametrization first"
    if owners[id(weight)] > 1:
        return "has a weight tied to another of the model; a patched layer would untie it"
    if not weight.is_floating_point():
        return ""  # quantised: kept, and called as it is
    if type(weight.data) is not Tensor or (weight.is_meta and moved):
        return f"has a {type(weight.data).__name__} on {weight.device} as weight: patch before that"
    if isinstance(linear, nn.Linear) and type(linear).forward is not nn.Linear.forward:
        return f"is a {type(linear).__name__}, which has a forward of its own"
    hooks = any(v for k, v in vars(linear).items() if re.fullmatch("_(for|back)ward.*hooks", k))
    if hooks or ("forward" in vars(linear) and not moved):
        return "has hooks or a replaced forward, which would be lost"
    return ""

def patch_model(model: nn.Module, bases: Mapping[str, Basis] | None,
                k: float | int | Mapping[str, int] | None = 0.01, target_modules: Targets = None,
                *, support: str = "topk", cut: str = "backward") -> Summary:
    """Replace the named linears by SparseGradLinear, in place; returns the `summary`.
    bases: from `find_bases`, and copied, so that no two models share one. None: no bases, the
        paper's MeProp, on `target_modules` (as in `mlp_linears`).
    k: entries to train of each layer: a count (int), a share of `out * in` (float; the paper keeps
        1 %, §5.1), or a dict of them by name. None: all of the core, by a dense gradient.
    support: "topk", the paper's: the k entries whose gradient is largest in a step. "fixed": the
        `hyperbolic_cross` of the bases' spectra, chosen once: a vector of k numbers trains.
    cut: for "topk". "backward", the paper's: gradients are COO after backward(). "step": they stay
        dense until SparseGradAdamW cuts them. Training is the same, the top k are those of all
        micro-batches, and DDP, torch.compile, clip_grad_norm_ and the Trainer take it.
    Other parameters stay as trainable as they were. Raises ValueError if the model is patched or
    wrapped, or a layer, a basis or k does not fit; it is untouched then."""
    if any(_unwrap(m) is not m for m in model.modules()):
        raise ValueError("the model is wrapped by DDP or torch.compile: patch it before that")
    if bases is None:
        bases = dict.fromkeys(mlp_linears(model, target_modules), Basis())
    elif target_modules is not None:
        raise ValueError("target_modules goes with bases=None; bases name their layers themselves")
    if not bases or sparsegrad_layers(model):
        raise ValueError(f"the model {'is patched already' if bases else 'gets no bases'}")
    modules, counts, copies = dict(model.named_modules()), {}, {}
    owners = collections.Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for name, basis in bases.items():
        linear = modules.get(name)
        if fault := _fault(linear, modules.get(name.rpartition(".")[0]), owners):
            raise ValueError(f"{name!r} {fault}")
        wanted = k.get(name, 0) if isinstance(k, Mapping) else k
        counts[name] = _entries(name, weight_shape(linear), basis, wanted, support, cut)
    for name, count in counts.items():
        linear, basis = modules[name], bases[name]
        place = id(basis), linear.weight.device, linear.weight.dtype
        borrows = place in copies  # all layers of a basis that are on one device share a copy
        basis = copies[place] = copies[place] if borrows else copy.deepcopy(basis)
        layer = SparseGradLinear.from_linear(linear, basis, count, support=support, cut=cut)
        if borrows:  # a state_dict holds it once: safetensors takes no tensors that share memory
            layer.__dict__["basis"] = layer._modules.pop("basis")
        model.set_submodule(name, layer)
    return summary(model)

def unpatch_model(model: nn.Module) -> None:
    """Turn SparseGradLinears back into plain layers, in place; ValueError if there are none."""
    if not (layers := sparsegrad_layers(model)):
        raise ValueError("the model has no SparseGrad layers")
    for name, linear in [(name, layer.to_linear()) for name, layer in layers.items()]:
        model.set_submodule(name, linear)

# -------------------------------------------------------------------------- the optimizer
def lazy_adam(g: Tensor, m: Tensor, v: Tensor, step: int, lr, betas, eps, adaptivity=1.0) -> Tensor:
    """One step of torch.optim.SparseAdam (§3.3) for entries with gradients g (n, k), n cores.
    Brings their moments m, v (n, k) up to date in place, and returns the change (n, k)."""
    m.lerp_(g, 1 - betas[0])
    v.lerp_(g * g, 1 - betas[1])
    if adaptivity < 1:
        v = v**adaptivity * v.mean(1, keepdim=True) ** (1 - adaptivity)
    size = lr * math.sqrt(1 - betas[1] ** step) / (1 - betas[0] ** step)
    return m / (v.sqrt() + eps) * -size

class SparseGradAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, and lazy Adam (§3.3) for COO gradients and for cores with cut="step".
    The lazy one is that of torch.optim.SparseAdam: only entries present in the gradient move,
    their moments with them; no weight decay; one step count for all entries; dense moments. Cores
    with cut="step" are first cut to the k largest entries of their gradients. AdamW's options
    hold for dense gradients, `fused` by default; lr, betas, eps and maximize for lazy Adam too.
    A parameter group may have `adaptivity` < 1 (Adam): all of it takes lazy Adam then, and divides
    by the root of v^adaptivity · s^(1 − adaptivity), s the mean of the v that move in a core."""
    def __init__(self, params, lr=1e-3, *args, **options):
        options.setdefault("fused", not options.get("foreach"))
        super().__init__(params, lr, *args, **options)
        self._step_supports_amp_scaling = False  # else GradScaler would leave all to `fused`

    def _init_group(self, group: dict, *lists):
        """Where AdamW.step asks for a group's parameters with a gradient. Those of lazy Adam take
        their step here, and AdamW sees the others."""
        dense, alike = [], collections.defaultdict(list)
        for p in group["params"]:
            keep, sparse = getattr(p, "cut_to", None), False
            if p.grad is not None and p.grad.is_sparse and p.grad.sparse_dim() == p.dim() == 2:
                p.grad, sparse = p.grad.coalesce(), True  # others go to AdamW: it refuses
            if p.grad is None or not (sparse or keep or group.get("adaptivity", 1.0) < 1):
                if group["fused"] and "step" in self.state.get(p, ()):  # lazy Adam's is on the host
                    self.state[p]["step"] = self.state[p]["step"].to(p.device)
                dense.append(p)
                continue
            keep, state = p.grad._nnz() if sparse else keep or p.numel(), self.state[p]
            if not state:
                state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            step = int(state.get("step", 0)) + 1
            state["step"] = torch.tensor(float(step))
            alike[p.shape, p.dtype, p.device, sparse, keep, step].append(p)
        for (shape, *_, keep, step), cores in alike.items():
            n = max(1, 2**26 // math.prod(shape))  # at once: 256 MiB of them, in fp32
            for i in range(0, len(cores), n):
                self._lazy_step(cores[i : i + n], keep, step, group)
        return super()._init_group({**group, "params": dense}, *lists)

    def _lazy_step(self, cores: list[Tensor], keep: int, step: int, group: dict) -> None:
        """A step of n cores of one shape, each by `keep` entries of its gradient."""
        if cores[0].grad.is_sparse:
            index = torch.stack([p.grad.indices() for p in cores])  # (n, 2, k)
            index = index[:, 0] * cores[0].shape[1] + index[:, 1]  # (n, k)
            g = torch.stack([p.grad.values() for p in cores])
        else:
            g = torch.stack([p.grad.flatten() for p in cores])  # (n, entries)
            index = g.abs().topk(keep, sorted=False).indices  # (n, k)
            g = g.gather(1, index)
        moments = [[self.state[p][key] for p in cores] for key in ("exp_avg", "exp_avg_sq")]
        all_m, all_v = (torch.stack([each.flatten() for each in kind]) for kind in moments)
        m, v = all_m.gather(1, index), all_v.gather(1, index)
        options = (group.get(key, 1.0) for key in ("lr", "betas", "eps", "adaptivity"))
        change = lazy_adam(-g if group["maximize"] else g, m, v, step, *options)
        for kind, rows, new in zip(moments, (all_m, all_v), (m, v)):
            rows = rows.scatter_(1, index, new).view(-1, *cores[0].shape)
            torch._foreach_copy_(kind, list(rows))
        change = all_m.zero_().scatter_(1, index, change).view(-1, *cores[0].shape)
        torch._foreach_add_(cores, list(change))

@register_optimizer_step_pre_hook
def _refuse_other_optimizers(optimizer, args, kwargs) -> None:
    params = (p for group in optimizer.param_groups for p in group["params"])
    if not isinstance(optimizer, SparseGradAdamW) and any(
            getattr(p, "cut_to", None) and p.grad is not None for p in params):
        raise RuntimeError("cut='step' needs SparseGradAdamW, another optimizer would train all of "
                           "a core: or patch with cut='backward', support='fixed' or k=None")

# --------------------------------------------------------------------------------- saving
KINDS = tuple((support, cut) for support in ("topk", "fixed") for cut in ("backward", "step"))
BASIS = ("U", "V", "column_energy", "row_energy")
@torch.no_grad()
def sparsegrad_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """What training changed, and the bases: flat, and fit for `safetensors.torch.save_file`.
    `NAME.core.values`, `.indices` (int32, into the flattened core) of its entries that are not
    zero, or of a fixed support; `NAME.core.meta` (int64): out, in, r_out, r_in (0: no basis),
    number of the basis, k (0: dense), place in KINDS; `sparsegrad.basis.NUMBER.` each of BASIS;
    other trainable parameters, persistent buffers. FSDP2's are gathered: all processes call it."""
    model, numbered = _unwrap(model), {}
    persistent = model.state_dict()
    if not (layers := sparsegrad_layers(model)):
        raise ValueError("the model has no SparseGrad layers")
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state |= {name: b for name, b in model.named_buffers() if name in persistent}
    parts = ("core", "support", "residual", "basis.", "base.")
    ours = tuple(f"{name}.{part}" for name in layers for part in parts)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(ours)}
    for name, layer in layers.items():
        basis, values, index = layer.basis, _whole(layer.core).flatten(), layer.support
        kind = KINDS.index(("topk" if index is None else "fixed", layer.cut))
        if index is None:
            index = values.nonzero().squeeze(1)
            values = values[index]
        number, ranks = numbered.setdefault(id(basis), len(numbered)), basis.core_shape(0, 0)
        meta = layer.out_features, layer.in_features, *ranks, number, layer.k or 0, kind
        core = {"values": values, "indices": index.int(), "meta": torch.tensor(meta)}
        state |= {f"{name}.core.{part}": tensor for part, tensor in core.items()}
        state |= {f"sparsegrad.basis.{number}.{part}": getattr(basis, part) for part in BASIS}
    state = {name.replace("_orig_mod.", ""): t for name, t in state.items() if t is not None}
    return {name: _whole(t).detach().clone().contiguous() for name, t in state.items()}

@torch.no_grad()
def load_sparsegrad_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Patch a fresh copy of the pretrained `model` and bring it to where `state`, of
    `sparsegrad_state_dict`, was saved: same outputs, ready to train on. Raises ValueError naming
    the first mismatch of name or shape, the model untouched."""
    metas = {k.removesuffix(".core.meta"): v for k, v in state.items() if k.endswith(".core.meta")}
    if not metas:
        raise ValueError("no SparseGrad layer in this state: sparsegrad_state_dict did not make it")
    modules, tensors = dict(model.named_modules()), model.state_dict(keep_vars=True)
    bases, counts, cores, numbered = {}, {}, {}, {}
    for name, meta in metas.items():
        *shape, r_out, r_in, number, k = meta.tolist()[:6]
        here = weight_shape(modules[name]) if _is_linear(modules.get(name)) else "none, or patched"
        if here != tuple(shape):
            raise ValueError(f"{name} is {tuple(shape)} in the file, but {here} in the model")
        found = (state.get(f"sparsegrad.basis.{number}.{part}") for part in BASIS)
        basis = bases[name] = numbered.setdefault(number, Basis(*found))
        index, values = (state.get(f"{name}.core.{part}", meta) for part in ("indices", "values"))
        fits = basis.core_shape(0, 0) == (r_out, r_in) and index.shape == values.shape
        if not fits or index is meta or (index >= math.prod(basis.core_shape(*shape))).any():
            raise ValueError(f"{name}.core is damaged: basis, indices and values do not fit")
        counts[name], cores[name] = k or None, (index, values)
    ours = ("sparsegrad.basis.", *(f"{name}.core." for name in metas))
    others = {name: value for name, value in state.items() if not name.startswith(ours)}
    for name, value in others.items():
        here = tuple(tensors[name].shape) if name in tensors else "missing"
        if here != tuple(value.shape):
            raise ValueError(f"{name} is {tuple(value.shape)} in the file, but {here} here")
    kind = max((*meta.tolist(), 0)[6] for meta in metas.values())  # whole cores have "topk"
    patch_model(model, bases, counts, support=KINDS[kind][0], cut=KINDS[kind][1])
    for name, layer in sparsegrad_layers(model).items():
        index, values = (tensor.to(layer.core.device) for tensor in cores[name])
        if layer.support is not None:
            layer.support.copy_(index)
        place = ... if layer.support is not None else index.long()
        layer.core.view(-1)[place] = values.to(layer.core)
    for name, value in others.items():
        tensors[name].copy_(value)
