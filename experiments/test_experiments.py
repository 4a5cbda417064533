"""The claim's search and tables, and a tiny run of each variant and each other model: `python -m pytest experiments`."""

import concurrent.futures
import json
import math
import pathlib
import re
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import finetune
import glue_run
import llama_run
import sparsegrad
from experiments import benchmark, claim, cross, energy, gpt2, rebuild, variants, vit

HERE = pathlib.Path(__file__).parent
LORA, OURS = ("sst2", "freeze", "lora"), ("sst2", "freeze", "sparsegrad")  # cells


@pytest.fixture
def study(tmp_path):
    return claim.Study(tmp_path / "claim.jsonl")


def store(study, cell, lr, loss, seed=0, held_out=True, accuracy=0.5):
    """A run by hand, one that diverged if `loss` is None."""
    result = {"diverged": "lower --lr"} if loss is None else {"metrics": {"eval_loss": loss, "eval_accuracy": accuracy}}
    study.add(claim.Run(*cell, lr, seed, held_out), {"arguments": {"bf16": False}} | result)


# --------------------------------------------------------------------------------- claim


def test_tables_are_those_of_the_stored_runs():
    told, tables = (HERE / "README.md").read_text(encoding="utf-8"), claim.tables(claim.Study())
    assert re.findall(r"<!-- claim: (.*) -->", told) == [*tables]
    assert [*tables] == [
        "The claim", "In short", "Leads", "Ablations", "Among them", "While training", "Head steps", "A trained head",
        "Which linears", "At 0.1 %", "Other models",
    ]  # fmt: skip
    for title, table in tables.items():
        after = told.partition(f"<!-- claim: {title} -->")[2].lstrip()
        assert after.startswith(table + "\n"), f"{title} is not what `python -m experiments.claim table` prints"
    assert claim.cost_table(claim.Study(claim.COSTS)) + "\n" in told


def test_the_readmes_tables_are_those_of_the_stored_runs():
    readme = (HERE.parent / "README.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in claim.tables(claim.Study())["In short"].splitlines()]
    heads, rows = rows[0], rows[2:]
    assert len(rows) == 9
    for ours, said, pairs in (("sparsegrad", "the paper's", 9), ("own, rank 128", "small", 9), ("cross", "exactly 1 %", 9)):
        columns = [heads.index(f"{ours}, beside {peer}") for peer in ("lora", "meprop", "ft")]
        counts = [[sum(r[c].startswith(verdict) for r in rows) for verdict in ("ahead", "equal", "behind")] for c in columns]
        assert {*map(sum, counts)} == {pairs} and f"| {said} | {' | '.join(', '.join(map(str, c)) for c in counts)} |\n" in readme
    line = benchmark.stored()["h200-bert-base-bf16"]
    for method, said in {
        "ft": "full fine-tuning", "meprop": "MeProp", "sparsegrad": "the paper's", "sparsegrad:rank=128": "small",
        "sparsegrad:rank=256:fixed": "exactly 1 %", "sparsegrad:narrow:rank=8:k=all": "one side",
    }.items():  # fmt: skip
        speed, peak = benchmark.ratio(line, "lora", method), benchmark.ratio(line, method, "lora", "peak_bytes")
        assert f"| {said} | {speed} | {peak} |\n" in readme


def test_the_lowest_held_out_loss_chooses_the_rate_and_the_grid_grows(study):
    lr, missing = study.rate(LORA)
    assert lr is None and missing == [claim.Run(*LORA, lr, 0, True) for lr in (3e-4, 1e-3, 3e-3, 1e-2)]
    for lr, loss in ((3e-4, 0.4), (1e-3, 0.5), (3e-3, 0.6), (1e-2, None)):
        store(study, LORA, lr, loss)
    assert study.missing(LORA) == [claim.Run(*LORA, 1e-4, 0, True)]  # the best is at the edge
    store(study, LORA, 1e-4, 0.7)
    assert study.rate(LORA) == (3e-4, [])
    assert study.missing(LORA) == [claim.Run(*LORA, 3e-4, seed, False) for seed in (3, 4, 5)]
    for seed, accuracy in zip(claim.SEEDS, (0.8, 0.9, 1.0)):
        assert study.outcome(LORA) == [] and claim.tables(study) == {}
        store(study, LORA, 3e-4, 0.3, seed, False, accuracy)
    table = claim.tables(claim.Study(study.path))["The claim"]  # read anew
    assert table == "|  | sst2, freeze (accuracy) |\n|---|---|\n| lora | 0.9000 ± 0.1000 (0.0003) |"
    store(study, LORA, 3e-4, None, 4, False)
    assert "| lora | undefined (0.0003) |" in claim.tables(study)["The claim"]


def test_a_lead_counts_if_it_is_larger_than_its_spread():
    assert claim.verdict([0.1, 0.1, 0.2]) == "ahead, 0.1333 ± 0.0577"
    assert claim.verdict([-0.1, -0.1, -0.2]) == "behind, 0.1333 ± 0.0577"
    assert claim.verdict([0.1, 0.0, 0.2]) == claim.verdict([0.0, 0.0, 0.2]) == "equal"  # 0.1 ± 0.1, 0.07 ± 0.12
    assert claim.verdict([0.1, math.nan, 0.2]) == "undefined" and claim.verdict([]) == ""


def test_all_that_is_missing_is_run_once(study, monkeypatch):
    made = []

    def make(run, paths, threads, bf16):
        made.append(run)
        return {"arguments": {"bf16": bf16}, "metrics": {"eval_loss": run.lr if run.method == "lora" else -run.lr}}

    monkeypatch.setattr(claim, "make", make)
    store(study, LORA, 3e-4, 3e-4)
    claim.run_all(study, [LORA, OURS], {}, lanes=2)
    assert len(made) == len({*made}) == 6 + 3 + 6 + 3  # down to the lowest rate, up to the highest
    assert [study.rate(cell)[0] for cell in (LORA, OURS)] == [1e-5, 1e-1] and not study.missing(LORA) + study.missing(OURS)
    assert claim.Study(study.path) == study and len(study) == 19
    claim.check_precision(study, [OURS], False)
    with pytest.raises(finetune.UserError, match="sst2, freeze that are stored are in fp32: leave --bf16 out"):
        claim.check_precision(study, [OURS], True)
    claim.check_precision(study, [("sst2", "paper", "lora")], True)


def test_costs_are_measured_in_turn_and_told_beside_loras(study, monkeypatch):
    def make(run, paths, threads, bf16, options):
        assert bf16 == (run.task == "oasst") and options == claim.SHORT
        mine = dict(
            steps_per_second=2.0 + run.seed if run.method == "cross" else 4.0, peak_memory_mib=100 if run.method == "ft" else 50
        )
        return mine | dict(trainable_parameters=1234, optimizer_bytes=2 * 10**6, file_bytes=0, basis_seconds=run.seed)

    monkeypatch.setattr(claim, "make", make)
    claim.measure_costs(study, {})
    claim.measure_costs(study, {})  # nothing twice
    assert len(study) == 2 * 3 * len(claim.COSTLY) and [run.method for run in study][:7] == [*claim.COSTLY, "ft"]
    table = claim.cost_table(study)
    assert "| sst2 | ft | 1,234 | 2.0 |  | 1.00 (1.00 to 1.00) | 2.00 (2.00 to 2.00) | 1 |" in table
    assert "| oasst | cross | 1,234 | 2.0 |  | 0.75 (0.50 to 1.00) | 1.00 (1.00 to 1.00) | 1 |" in table


def test_lanes_lose_no_line(study):
    runs = [claim.Run(*LORA, 1e-3, seed, False) for seed in range(200)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda run: study.add(run, {"text": "x" * 3000}), runs))
    assert claim.Study(study.path).keys() == {*runs}


def test_a_stored_run_has_no_paths_and_may_have_diverged(tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("""if True:
        import json, pathlib, sys
        given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
        folder = pathlib.Path(given["--output-dir"])
        folder.mkdir()
        arguments = {"output_dir": str(folder), "data": given["--data"], "lr": given["--lr"]}
        (folder / "arguments.json").write_text(json.dumps(arguments))
        (folder / "results.json").write_text(json.dumps({"arguments": arguments, "used": {"model": given["--data"]}}))
        print("loss is nan", file=sys.stderr)
        sys.exit({"0.001": 0, "0.01": 3}.get(given["--lr"], 2))""")
    monkeypatch.setitem(claim.TASKS, "vit", claim.TASKS["vit"]._replace(command=f"{tmp_path}/script.py --data {{images}}"))
    results, diverged, failing = (claim.Run("vit", "freeze", "lora", lr, 3, True) for lr in (1e-3, 1e-2, 1e-1))
    results, diverged = (claim.make(run, {"images": str(tmp_path / "images")}, 1) for run in (results, diverged))
    assert results == {"arguments": {"output_dir": None, "data": "images", "lr": "0.001"}, "used": {"model": "images"}}
    assert diverged == {"arguments": {"output_dir": None, "data": "images", "lr": "0.01"}, "diverged": "loss is nan"}
    with pytest.raises(finetune.UserError, match="seed=3.* failed: loss is nan"):
        claim.make(failing, {"images": "images"}, 1)


def test_every_command_is_one_its_script_takes(monkeypatch):
    scripts = {"glue_run.py": glue_run, "llama_run.py": llama_run, "experiments.vit": vit, "experiments.gpt2": gpt2}
    cells = [(*column, method) for column in claim.COLUMNS for method in claim.COMPARED]
    for task, setting, method in cells + [("mrpc", "freeze", method) for method in claim.STUDIED]:
        words = claim.Run(task, setting, method, 1e-3, 4, True).command(dict.fromkeys(claim.PATHS, "path"), "out", bf16=True)[1:]
        if words[:2] == ["-m", "experiments.variants"]:
            assert method.endswith(words[2].replace("=", " ").replace("-", " "))
            del words[:3]
        words.remove("-m") if words[0] == "-m" else None
        monkeypatch.setattr(sys, "argv", words)
        args, name = scripts[words[0]].parse(), method.partition(",")[0]
        named = "lora" if name in claim.OF_PEFT else name if name in finetune.METHODS else "sparsegrad"
        assert args.method == named and args.bf16 and args.held_out > 1
        assert (args.freeze, args.lr, args.seed) == (setting.startswith("freeze"), 1e-3, 4)
        assert args.target == next((target for target in ("attention", "all") if method.endswith(f", {target}")), "mlp")
        assert method == "ft" or args.k in (0.001, 0.01, 0.1, 1.0, 0.02, 0.02 / 3)
        assert bool(getattr(args, "head_steps", 0)) == ("head" in setting + method)


def test_the_figure_is_drawn(tmp_path):
    claim.figure(claim.Study(), tmp_path / "claim.png")
    assert (tmp_path / "claim.png").stat().st_size > 10**4


# -------------------------------------------------------------------------------- energy


def test_energy_kept_is_that_of_the_largest_entries_after_the_rotation():
    torch.manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, n)).Q for n in (10, 20))
    core = torch.zeros(20, 10)
    core[3, 2], core[15, 1], core[0, 9] = 3.0, 2.0, 1.0
    grad = V @ core @ U.T
    for method, share in (("", 13), (":rank=8:k=all", 9), (":narrow:rank=8:k=all", 13)):  # 1 %; no row 15, no column 9
        way = benchmark.Method(f"sparsegrad{method}")
        assert energy.kept(grad, sparsegrad.Basis(U, V), way) == pytest.approx(share / 14)
        assert energy.kept(grad.T, sparsegrad.Basis(V, U), way) == pytest.approx(share / 14)


def test_energys_table_is_that_of_its_file():
    table = energy.table(json.loads((HERE / "results" / "energy.json").read_text(encoding="utf-8"))["energies"]["None"])
    assert any(table in path.read_text(encoding="utf-8") for path in HERE.glob("*.md"))


def test_the_tables_of_the_cross_are_those_of_its_file():
    table = cross.tables(json.loads((HERE / "results" / "cross.json").read_text(encoding="utf-8"))["shares"])
    assert all(part in (HERE / "README.md").read_text(encoding="utf-8") for part in table.split("\n\n"))


def test_what_a_cross_holds():
    """Gradients of exactly separable spectra: a cross is the best that any fixed choice can be, and nothing moves on."""
    torch.manual_seed(0)
    V, U = (torch.linalg.qr(torch.randn(n, n)).Q for n in (300, 280))
    size = torch.outer(*(2.0 ** (-torch.arange(n) / 20) for n in (300, 280)))
    grads = V @ (size * torch.randn(150, 300, 280).sign()) @ U.T
    k, own = 840, cross.Bases(grads[:30])
    found = cross.choices(grads, k, own, own)
    ideal = sparsegrad.topk_energy(size, k)
    for name in ("cross", "cross, 120 steps", "cross, shared"):
        assert found[name] == pytest.approx([ideal] * 3, abs=0.03), name
    for name, shares in found.items():
        assert len(shares) == 3 and shares[0] == pytest.approx(shares[2], abs=0.03), name
        assert ("best k" in name and "no basis" not in name) == (shares[0] > ideal + 0.03), name
    assert found["corner, square"][0] < found["corner, a rank for each side"][0] + 0.01 < found["cross"][0]
    assert found["largest measured energy, no basis"][0] < 0.1
    assert cross.best_sides(torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.3, 0.2]), 3) == (1, 3)
    assert cross.best_sides(torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1]), 2) == (2, 1)
    small = grads[:, :, :140] / 100  # of a layer that gets few of the entries shared out
    layers = [grads, torch.cat((small, small), 2)]
    equal, shared_out = cross.pooled(layers, [own, cross.Bases(layers[1][:30])], k)
    assert equal < shared_out < 1


# ------------------------------------------------------------------------------ variants


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    """(a tiny BERT, sentences in GLUE's layout)."""
    model, data = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("glue")
    (model / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]))
    transformers.BertTokenizerFast(str(model / "vocab.txt")).save_pretrained(model)
    torch.manual_seed(0)
    sizes = dict(vocab_size=13, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    transformers.BertModel(transformers.BertConfig(**sizes)).save_pretrained(model)
    rows = [f"{one} {other}\t{int(one < other)}" for one in "abcdefgh" for other in "abcd"]
    for split in ("train", "dev"):
        (data / f"{split}.tsv").write_text("\n".join(["sentence\tlabel", *rows]))
    return model, data


@pytest.fixture
def variant(bert, tmp_path, monkeypatch):
    """variant(change, *options): what the adapter of glue_run.py holds after a few steps with that change."""
    for owner, names in (
        (finetune, ("make_optimizer", "add_peft", "make_trainer", "finish")),
        (sparsegrad, ("find_bases", "patch_model", "hyperbolic_cross", "_gradients")),
        (finetune.SparseGradTrainer, ("training_step",)),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards

    def run(change, *options):
        words = ["--task", "sst2", "--model", bert[0], "--data", bert[1], "--batch-size", 4, "--share", "layer", "--lr", 1e-3]
        words = [change, HERE.parent / "glue_run.py", *words, "--output-dir", tmp_path / change, *options]
        monkeypatch.setattr(sys, "argv", ["variants.py", *map(str, words)])
        variants.main()
        adapter = tmp_path / change / finetune.ADAPTER
        return load_file(adapter) if adapter.exists() else json.loads((tmp_path / change / "results.json").read_text())

    return run


def bases_in(adapter):
    return {name: vectors for name, vectors in adapter.items() if name.endswith((".U", ".V"))}


def test_the_rate_of_the_cores_is_scaled_alone(variant):
    plain, scaled = (variant(f"core-rate={times}", "--max-steps", 1) for times in (1, 3))
    core, head = "bert.encoder.layer.0.output.dense.core.values", "classifier.weight"
    assert plain[core].abs().max().item() == pytest.approx(1e-3, rel=1e-2)  # Adam's first step
    assert scaled[core].abs().max().item() == pytest.approx(3e-3, rel=1e-2)
    assert torch.equal(plain[head], scaled[head])
    with pytest.raises(SystemExit, match="core_rate is no change"):
        variant("core_rate=3")


@pytest.mark.parametrize("change, rank", [("random", 32), ("random", 8), ("mixed", 8), ("transposed", 32)])
def test_other_bases_take_the_place_of_those_found(change, rank, variant):
    options = ("--max-steps", 1, *(("--rank", rank) if rank < 32 else ()))
    found, other = bases_in(variant("core-rate=1", *options)), bases_in(variant(change, *options))
    assert len(found) == 8
    for name, vectors in found.items():
        assert torch.allclose(other[name].T @ other[name], torch.eye(other[name].shape[1]), atol=1e-5)
        inside = vectors.T @ other[name]  # (r, n) @ (n, r)
        if change == "transposed":
            assert torch.equal(other[name], vectors.T if name.endswith("U") else vectors)
        else:
            spans = torch.allclose(inside.T @ inside, torch.eye(len(inside)), atol=1e-4)  # the same directions
            assert spans == (change == "mixed" or rank == 32) and inside.diagonal().abs().max() < 0.99
        assert not any(torch.equal(other[name], other[another]) for another in found if another != name)  # a layer has its own


def test_bases_are_refreshed_halfway(variant, bert, tmp_path):
    options = ("--rank", 8, "--max-steps", 4, "--freeze")
    plain = variant("core-rate=1", *options, "--merge", tmp_path / "plain")
    refreshed = variant("refreshed", *options, "--merge", tmp_path / "refreshed")
    for name, vectors in bases_in(plain).items():
        assert not torch.allclose(refreshed[name], vectors, atol=1e-3)
        assert torch.allclose(refreshed[name].T @ refreshed[name], torch.eye(8), atol=1e-5)
    name, ranks = "encoder.layer.1.output.dense", []
    for folder in ("plain", "refreshed"):
        weight = load_file(tmp_path / folder / "model.safetensors")[f"bert.{name}.weight"]
        learned = weight - load_file(bert[0] / "model.safetensors")[f"{name}.weight"]
        ranks.append(torch.linalg.matrix_rank(learned, rtol=1e-2).item())
    assert ranks[0] <= 8 < ranks[1] <= 16  # what either half of the steps learned is in the merged model
    assert 1e-3 < refreshed[f"bert.{name}.core.values"].abs().max() < 3e-3  # two steps of new moments


def test_a_watched_run_tells_what_its_entries_hold_and_is_the_same_run(variant, tmp_path):
    options = ("--rank", 8, "--support", "fixed", "--max-steps", 6, "--freeze")
    plain, watched = variant("core-rate=1", *options), variant("watched", *options)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    held = json.loads((tmp_path / "watched" / "results.json").read_text())["held"]
    assert len(held) == 3 and all(0 < of["fixed"] < of["best"] < 1 for of in held)
    assert held[0]["fixed"] > 10 * 20 / 2048  # what as many entries of a random support would hold


@pytest.mark.parametrize("steps", [1, 3])
def test_bases_of_the_mean_gradient(steps, variant):
    """They are the usual ones if there is but one gradient."""
    options = ("--max-steps", 1, "--basis-steps", steps, "--rank", 8)
    plain, mean = (bases_in(variant(change, *options)) for change in ("core-rate=1", "mean-gradient"))
    assert all(torch.equal(plain[name], mean[name]) == (steps == 1) for name in plain)


@pytest.mark.parametrize("change", ["k-shared-out", "root-rows"])
def test_other_supports(change, variant):
    options = ("--rank", 16, "--support", "fixed", "--max-steps", 1, "--k", 0.02)
    plain, other = ({n: t for n, t in variant(c, *options).items() if n.endswith("core.indices")} for c in ("core-rate=1", change))
    sizes = [{name: len(index) for name, index in of.items()} for of in (plain, other)]
    assert {*sizes[0].values()} == {41} and any(not torch.equal(plain[name], other[name]) for name in plain)
    shared_out = any(sizes[1][name] != 41 for name in plain)
    assert shared_out == (change == "k-shared-out") and sum(sizes[1].values()) == pytest.approx(4 * 41, abs=2)


def test_a_corner_is_the_leading_rows_and_columns(variant):
    adapter = variant("corner", "--rank", 16, "--support", "fixed", "--max-steps", 1, "--k", 0.02)
    supports = [index for name, index in adapter.items() if name.endswith("core.indices")]
    assert len(supports) == 4
    for index in supports:
        r, c = index.max() // 16 + 1, (index % 16).max() + 1
        assert len(index) == r * c and 41 - max(r, c) < r * c <= 41


@pytest.mark.parametrize("change, linears", [("dora", 4 * 96 + 192), ("shira", 4 * 96), ("vera", 4 * 1024 + 192)])
@pytest.mark.parametrize("freeze", [True, False])
def test_peers_of_peft_train_beside_what_else_trains(change, linears, freeze, variant, bert):
    options = ("--method", "lora", "--share", "role", "--max-steps", 30, "--lr", 1e-2, *["--freeze"] * freeze)
    results, head = variant(change, *options), 2 * 32 + 2
    rest = 0 if freeze else transformers.AutoModel.from_pretrained(bert[0]).num_parameters() - 4 * 32 * 64
    assert results["trainable_parameters"] == linears + head + rest and results["metrics"]["eval_loss"] < 0.69


# -------------------------------------------------------------------------- other models


@pytest.mark.parametrize("method", finetune.METHODS)
def test_glue_run_takes_a_t5(method, bert, tmp_path, monkeypatch):
    transformers.AutoTokenizer.from_pretrained(bert[0]).save_pretrained(tmp_path)
    special = dict(pad_token_id=0, decoder_start_token_id=0, eos_token_id=3)  # BERT's [SEP] ends a sentence
    config = transformers.T5Config(vocab_size=13, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, **special)
    transformers.T5Model(config).save_pretrained(tmp_path)
    words = ("--task", "sst2", "--freeze", "--model", tmp_path, "--data", bert[1], "--lr", "1e-2", "--method", method)
    monkeypatch.setattr(sys, "argv", ["glue_run.py", *map(str, words), "--epochs", "1", "--output-dir", str(tmp_path / "run")])
    glue_run.main()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["linears"] == 4 and 0 < results["metrics"]["eval_loss"] < 2  # an encoder's block, a decoder's


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Options: a tiny DINOv2, and 60 images of 4 x 4, of class 1 where the upper half is the lighter one."""
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, patch_size=4, image_size=8)
    transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    pixels, classes = np.random.default_rng(0).integers(0, 100, (60, 16)), np.arange(60) % 2
    pixels[classes == 1, :8] += 150
    np.savetxt(folder / "images.csv.gz", np.column_stack((pixels, classes)), fmt="%d", delimiter=",")
    return "--model", folder, "--data", folder / "images.csv.gz", "--image-size", "8", "--batch-size", "8"


@pytest.mark.parametrize("method", finetune.METHODS)
def test_vit_learns_from_images(method, digits, tmp_path, monkeypatch):
    words = (*digits, "--method", method, "--lr", "3e-2", "--epochs", "6", "--held-out", "8", "--output-dir", tmp_path)
    monkeypatch.setattr(sys, "argv", ["vit.py", *map(str, words)])
    vit.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["used"]["train_rows"] == 40 and results["linears"] == 2 and results["steps"] == 30
    assert results["metrics"]["eval_accuracy"] >= 0.9 and results["metrics"]["eval_loss"] < 0.5


def test_a_change_goes_into_the_vit_too(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(sparsegrad, "find_bases", sparsegrad.find_bases)  # put back afterwards
    words = (*digits, "--max-steps", "1", "--rank", "4", "--lr", "1e-3", "--output-dir", tmp_path)
    monkeypatch.setattr(sys, "argv", ["variants.py", "random", "-m", "experiments.vit", *map(str, words)])
    monkeypatch.delitem(sys.modules, "experiments.vit")  # as when it is started
    variants.main()
    expected = torch.linalg.qr(torch.randn(16, 4, generator=torch.Generator().manual_seed(0))).Q
    assert torch.equal(load_file(tmp_path / finetune.ADAPTER)["sparsegrad.basis.0.U"], expected)


@pytest.fixture
def gut(tmp_path, monkeypatch):
    """gut(*options) sets the command line of gpt2.py: a tiny GPT-2 that knows genera A to L, and counts of 31 people, all but
    P0 twice. Person i has the genera from F on, and those before that the bits of i choose, fewer of each than of the last."""
    torch.manual_seed(0)
    package = tmp_path / "package"
    sizes = dict(vocab_size=16, n_positions=16, n_embd=16, n_layer=1, n_head=2, initializer_range=0.5)
    transformers.GPT2Config(**sizes).save_pretrained(package / "general_model")
    weights = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).state_dict()
    torch.save(weights, package / "general_model" / "pytorch_model.bin")
    usual = {"D": "0.1,0.01", "E": "0.49,0.1"}  # mean, standard deviation
    genera = [f"g__{genus},{usual.get(genus, '0.1,0.1')}" for genus in "ABCDEFGHIJKL"]
    (package / "phylogeny.csv").write_text("\n".join(["#SampleID,mean,std", *genera]))
    rebuild.gpt2(package, str(tmp_path / "model"))
    samples = {"P0": dict(C=30, D=20, E=50, X=900)}
    for i in range(1, 31):
        samples[f"P{i}"] = {genus: 10 ** (11 - n) for n, genus in enumerate("ABCDEFGHIJKL") if n > 4 or i >> n & 1}
        samples[f"P{i}.2"] = samples[f"P{i}"]
    lines = [",".join([genus, *(str(count.get(genus, 0)) for count in samples.values())]) for genus in "ABCDEFGHIJKLX"]
    (tmp_path / "counts.csv").write_text("\n".join([",".join(["Taxa", *samples]), *lines]))

    def give(*options):
        words = ("--model", tmp_path / "model", "--data", tmp_path / "counts.csv", "--lr", "5e-2", *options)
        monkeypatch.setattr(sys, "argv", ["gpt2.py", *map(str, words)])

    return give


def sentences():
    return {split: [*rows["input_ids"]] for split, rows in gpt2.load_sentences(gpt2.parse()).items()}


def test_samples_are_sentences_and_a_person_is_in_one_split(gut, tmp_path):
    splits = []
    for options in ([], ["--seed", "1"], ["--held-out", "5"]):
        gut(*options)
        found = sentences()
        splits.append({split: {*map(tuple, rows)} for split, rows in found.items()})
        assert splits[-1]["train"] and splits[-1]["dev"] and not splits[-1]["train"] & splits[-1]["dev"]
    assert splits[1]["dev"] == splits[0]["dev"] and splits[2]["train"] | splits[2]["dev"] == splits[0]["train"]
    gut()
    rows = sum(sentences().values(), [])
    # C, D, E are 0.3, 0.2, 0.5 of P0's reads of known genera: 2, 10 and 0.1 standard deviations above the mean.
    assert [row for row in rows if len(row) == 5] == [[2, 7, 6, 8, 3]] and len(rows) == 61
    batch = gpt2.to_batch([{"input_ids": [2, 7, 6, 3]}, {"input_ids": [2, 3]}])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]] and batch["labels"][1].tolist() == [2, 3, -100, -100]
    (tmp_path / "counts.csv").write_text("Taxa,P0,P1\nA,1,0\nX,1,1\n")
    with pytest.raises(finetune.UserError, match="a sample has no genus that the model knows, such as A"):
        sentences()


@pytest.mark.parametrize("method", finetune.METHODS)
def test_gpt2_learns_the_order_of_genera(method, gut, tmp_path):
    gut("--method", method, *(["--k", "0.1"] if method != "ft" else []), "--epochs", "3", "--output-dir", tmp_path / "run")
    gpt2.main()
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["linears"] == 2 and results["used"]["train_rows"] + results["used"]["dev_rows"] == 61
    assert results["metrics"]["eval_loss"] < results["metrics_before"]["eval_loss"] - 0.3
