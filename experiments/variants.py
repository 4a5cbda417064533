"""One of the scripts with a change to the method, for the ablations of `claim.py`.

    python -m experiments.variants CHANGE glue_run.py --task sst2 ...
    python -m experiments.variants CHANGE -m experiments.vit --model ...

random       orthonormal columns, seeded, instead of HOSVD's
mixed        HOSVD's directions with other axes in their span: rotated at random, seeded
transposed   U transposed, as in the released code; for complete bases
refreshed    bases found anew halfway through training, from the weights as they are then
k-shared-out the k of all layers of a role, with a fixed support, where λ_i μ_j times a layer's energy is largest
root-rows    a fixed support of the largest λ_i^½ μ_j
corner       a fixed support of the leading rows and columns, as many of each as should hold most
mean-gradient  bases and spectra of the mean of the steps' gradients, not of them all
core-rate=3  the cores' learning rate, in multiples of that of all else that trains
watched      nothing: but results.json has what the bases hold of gradients at the beginning, the middle and the end
dora, shira, vera, prefix    with `--method lora`: another method of PEFT, at the size nearest to 1 % of the linears, VeRA
             below it; prefix tuning of BERT needs transformers 4

Such a run is there to be measured. `--resume` goes on without the change. The adapter of a refreshed run fits the
weights as they were halfway; `--merge` has all that was learned. That of a corner has up to a side's entries less than k,
and does not load.
"""

import copy
import runpy
import statistics
import sys

import torch
import transformers

import finetune
import sparsegrad

found = sparsegrad.find_bases
OF_PEFT = ("dora", "shira", "vera", "prefix")
VERA_RANK = 1024  # as its paper at most; 1 % of the linears would take five times as many, and its products are slow


def with_other_bases(change: str) -> None:
    def find_bases(*args, **options):
        bases, other, generator = found(*args, **options), {}, torch.Generator().manual_seed(0)

        def orthonormal(rows, columns):
            return torch.linalg.qr(torch.randn(rows, columns, generator=generator)).Q

        def changed(vectors):  # (n, r)
            rank = vectors.shape[1]
            return vectors @ orthonormal(rank, rank) if change == "mixed" else orthonormal(*vectors.shape)

        for basis in dict.fromkeys(bases.values()):  # a shared one once
            if change == "transposed":
                U, V = basis.U.T, basis.V
            else:
                U, V = (None if vectors is None else changed(vectors) for vectors in (basis.U, basis.V))
            other[basis] = sparsegrad.Basis(U, V)
        return {name: other[basis] for name, basis in bases.items()}

    sparsegrad.find_bases = find_bases


def with_k_shared_out() -> None:
    energies, patch = {}, sparsegrad.patch_model

    def find_bases(model, batches, names, **options):
        bases, same = found(model, batches, names, **options), {key: options[key] for key in ("lr", "loss_fn")}
        with torch.random.fork_rng():
            for name, grads in sparsegrad.collect_gradients(model, batches, names, n_steps=5, **same).items():
                energies[name] = grads.square().sum()
        return bases

    def patch_model(model, bases, k, *args, **options):
        if options.get("support") != "fixed":  # the search's twin
            return patch(model, bases, k, *args, **options)
        roles = {}
        for name, basis in bases.items():
            expected = torch.outer(basis.row_energy, basis.column_energy).flatten() * energies[name]
            roles.setdefault(sparsegrad._role(name), {})[name] = expected
        counts = {}
        for layers in roles.values():
            shapes = [sparsegrad.weight_shape(model.get_submodule(name)) for name in layers]
            total = round(k * sum(m * n for m, n in shapes))
            least = torch.cat([*layers.values()]).topk(total).values[-1]
            counts |= {name: max(1, int((expected >= least).sum())) for name, expected in layers.items()}
        return patch(model, bases, counts, *args, **options)

    sparsegrad.find_bases, sparsegrad.patch_model = find_bases, patch_model


def with_root_rows() -> None:
    cross = sparsegrad.hyperbolic_cross
    sparsegrad.hyperbolic_cross = lambda rows, columns, k: cross(rows.sqrt(), columns, k)


def with_corner() -> None:
    from experiments.cross import best_sides, corner  # which imports claim.py, and that this file

    def support(rows, columns, k):
        mask = corner((len(rows), len(columns)), *best_sides(rows, columns, k))
        return mask.flatten().nonzero().flatten()

    sparsegrad.hyperbolic_cross = support


def with_mean_gradient() -> None:
    gradients = sparsegrad._gradients

    def summed(*args, **options):
        total = {}
        for step in gradients(*args, **options):
            for name, G in step.items():
                total[name] = total.get(name, 0) + G
        yield total

    sparsegrad._gradients = summed


def with_refreshed_bases() -> None:
    used = {}

    def find_bases(model, batches, *args, **options):
        used.update(batches=batches, args=args, options=options)
        return found(model, batches, *args, **options)

    def training_step(trainer, *args, **options):
        if trainer.state.global_step == trainer.state.max_steps // 2 and not used.get("refreshed"):
            used["refreshed"] = True
            refresh(trainer.model, trainer.optimizer.optimizer)
        return step(trainer, *args, **options)

    def refresh(model, optimizer):
        layers = sparsegrad.sparsegrad_layers(model)
        k = {name: layer.k for name, layer in layers.items()}
        support = "fixed" if any(layer.support is not None for layer in layers.values()) else "topk"
        sparsegrad.unpatch_model(model)
        bases = found(model, used["batches"], *used["args"], **used["options"])
        sparsegrad.patch_model(model, bases, k, support=support, cut="step")
        new = {layers[name].core: layer.core for name, layer in sparsegrad.sparsegrad_layers(model).items()}
        for group in optimizer.param_groups:
            group["params"] = [new.get(p, p) for p in group["params"]]
        for core in new:  # new coordinates, so the moments begin anew
            optimizer.state.pop(core, None)

    sparsegrad.find_bases = find_bases
    step, finetune.SparseGradTrainer.training_step = finetune.SparseGradTrainer.training_step, training_step


class Watch(transformers.TrainerCallback):
    """Of 12 gradients at the weights as they are before the first step, in the middle and after the last: the means over
    steps and layers of what the layer's own entries, and the best k of each step between its bases, hold of them."""

    def __init__(self):
        self.held = []

    @torch.random.fork_rng()
    def measure(self, model, batches):
        layers, plain = sparsegrad.sparsegrad_layers(model), copy.deepcopy(model)
        sparsegrad.unpatch_model(plain)
        stacks = sparsegrad.collect_gradients(plain, batches, list(layers), n_steps=12, lr=0, loss_fn=finetune.loss_of_part)
        fixed, best = [], []
        for name, layer in layers.items():
            for G in stacks[name]:
                core = layer.basis.V.T @ G @ layer.basis.U  # (r, out) @ (out, in) @ (in, r)
                fixed.append((core.flatten()[layer.support].norm() / G.norm()).item() ** 2)
                best.append(sparsegrad.topk_energy(core, layer.k) * (core.norm() / G.norm()).item() ** 2)
        self.held.append({"fixed": statistics.mean(fixed), "best": statistics.mean(best)})

    def on_step_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        if state.global_step in (0, state.max_steps // 2):
            self.measure(model, train_dataloader)

    def on_train_end(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        self.measure(model, train_dataloader)


def with_watch() -> None:
    make, finish, watch = finetune.make_trainer, finetune.finish, Watch()

    def make_trainer(model, *args, callbacks=(), **options):
        mine = [watch] * bool(sparsegrad.sparsegrad_layers(model))  # not while the head trains alone
        return make(model, *args, callbacks=[*callbacks, *mine], **options)

    finetune.make_trainer = make_trainer
    finetune.finish = lambda *args, **options: finish(*args, held=watch.held, **options)


def with_peer(change: str) -> None:
    """In place of LoRA's layers; what PEFT cannot put into a model is wrapped round it when the Trainer is made."""
    import peft

    add, make, wrapping = finetune.add_peft, finetune.make_trainer, []

    def add_peft(model, config, names):
        shapes = [sparsegrad.weight_shape(model.get_submodule(name)) for name in names]
        out, both, entries = sum(m for m, _ in shapes), sum(map(sum, shapes)), 0.01 * sum(m * n for m, n in shapes)
        if change == "dora":  # a number for each output, too
            rank = max(1, round((entries - out) / both))
            add(model, peft.LoraConfig(r=rank, lora_alpha=rank, use_dora=True), names)
        elif change == "shira":
            add(model, peft.ShiraConfig(r=max(1, round(entries / both)), random_seed=torch.initial_seed()), names)
        elif change == "vera":
            wrapping.append(peft.VeraConfig(r=VERA_RANK, target_modules=names))
        else:  # keys and values of every block
            of = model.config
            width = of.hidden_size // of.num_attention_heads * getattr(of, "num_key_value_heads", of.num_attention_heads)
            task = "SEQ_CLS" if finetune.head_parameters(model) else "CAUSAL_LM"
            tokens = round(entries / (2 * of.num_hidden_layers * width))
            wrapping.append(peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=tokens))

    def make_trainer(model, *args, **options):
        if wrapping:  # else it is the head that trains, alone
            flags = {p: p.requires_grad for p in model.parameters()}
            model = peft.get_peft_model(model, wrapping[0])
            for p, flag in flags.items():  # PEFT freezes all but its own
                p.requires_grad_(flag)
        return make(model, *args, **options)

    finetune.add_peft, finetune.make_trainer = add_peft, make_trainer


def with_core_rate(times: float) -> None:
    make = finetune.make_optimizer

    def make_optimizer(model, args):
        optimizer = make(model, args)
        optimizer.param_groups[0]["lr"] *= times  # the group of the cores
        return optimizer

    finetune.make_optimizer = make_optimizer


def main() -> None:
    (change, _, times), sys.argv = sys.argv[1].partition("="), sys.argv[2:]
    if change == "core-rate":
        with_core_rate(float(times))
    elif change == "refreshed":
        with_refreshed_bases()
    elif change == "k-shared-out":
        with_k_shared_out()
    elif change == "root-rows":
        with_root_rows()
    elif change == "corner":
        with_corner()
    elif change == "mean-gradient":
        with_mean_gradient()
    elif change == "watched":
        with_watch()
    elif change in OF_PEFT:
        with_peer(change)
    elif change in ("random", "mixed", "transposed"):
        with_other_bases(change)
    else:
        sys.exit(f"{change} is no change, which are:\n{__doc__}")
    if sys.argv[0] == "-m":
        runpy.run_module(sys.argv.pop(1), run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
