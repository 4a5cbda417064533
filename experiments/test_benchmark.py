"""The benchmark: SPEED.md has the tables of the stored lines, and every method is built, stepped and counted."""

import collections
import json
import pathlib
import statistics
import sys

import pytest
import torch
import transformers

import sparsegrad
from experiments import benchmark, claim, processes

SMALL = ["--arch", "minilm", "--layers", "1", "--batch", "2", "--seq", "16", "--repeats", "2", "--warmup", "1", "--basis-steps"]
EVERY = ["frozen", "ft", "lora", "shira", "meprop", "sparsegrad:narrow:rank=8:k=all", "sparsegrad:rank=8"]
EVERY += ["sparsegrad:rank=128:fixed", "sparsegrad", "sparsegrad:cut=backward", "literal"]
FOLDER = pathlib.Path(__file__).parent
SPEED = (FOLDER / "SPEED.md").read_text(encoding="utf-8")


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(*options) -> what the script prints; its results are in tmp_path."""
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)

    def call(*options):
        monkeypatch.setattr(sys, "argv", ["benchmark", *options])
        benchmark.main()
        return capsys.readouterr().out

    return call


def test_the_tables_of_speed_md_are_those_of_the_stored_lines():
    lines, told = benchmark.stored(), SPEED.split("<!-- benchmark: ")[1:]
    assert len(told) > 5
    for part in told:
        what, text = part.split(" -->\n", 1)
        first, *names = what.split()
        made = benchmark.compare([lines[name] for name in names]) if first == "--compare" else benchmark.table(lines[first])
        assert text.startswith(made + "\n\n"), what


def test_the_tables_of_several_processes_are_those_of_the_stored_file():
    for name, table in processes.tables(json.loads(processes.FILE.read_text(encoding="utf-8"))).items():
        assert f"<!-- processes: {name} -->\n{table}\n\n" in SPEED, name


def test_what_is_sharded_is_all_but_the_buffers():
    config = transformers.LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1, vocab_size=10
    )
    model = transformers.LlamaForCausalLM(config).requires_grad_(False)
    block = 4 * (4 * 8 * 8 + 3 * 8 * 16 + 2 * 8)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)  # 128 numbers, their gradients and moments
    assert processes.sizes(model) == (2 * block + 4 * (2 * 80 + 8) + 3 * 4 * 128, sum(b.nbytes for b in model.buffers()), block)


def test_the_memory_of_whole_runs_is_that_of_the_claim():
    runs = collections.defaultdict(list)
    for result in map(json.loads, (FOLDER / "results" / "claim.jsonl").read_text(encoding="utf-8").splitlines()):
        if result["seed"] in claim.SEEDS and not result["held_out"] and "peak_memory_mib" in result:
            runs[result["task"], result["setting"], result["method"]].append(result)
    for task, setting in {key[:2] for key in runs if (*key[:2], "lora") in runs and (*key[:2], "own, rank 128") in runs}:
        ours = runs[task, setting, "own, rank 128"]
        peaks = [
            statistics.mean(result["peak_memory_mib"] for result in runs[task, setting, method])
            for method in ("lora", "ft", "meprop", "sparsegrad", "own, rank 128")
        ]
        search = statistics.mean(result["basis_seconds"] * result["steps_per_second"] / result["steps"] for result in ours)
        cells = [f"{task}, {setting}", *(f"{peak / peaks[0]:.2f}" for peak in peaks[1:]), f"{search:.2f}"]
        assert f"| {' | '.join(cells)} |\n" in SPEED


def test_every_method_counts_what_it_trains_saves_and_holds(run):
    printed = run(*SMALL, "1", "--methods", *EVERY, "--save", "x")
    run(*SMALL, "1", "--methods", "frozen", "--save", "y")
    assert list(benchmark.stored()) == ["x", "y"] and run("--table", "x").strip() in printed
    assert run("--table").count("minilm, 1 blocks") == run("--compare", "y", "x").count("minilm, 1 blocks") == 2
    line = benchmark.stored()["x"]
    assert list(line["methods"]) == EVERY and line["linears"] == 2 and line["options"]["layers"] == 1
    head, weight, sides = 2 * 384 + 2, 384 * 1536, 384 + 1536
    k, topk = round(0.01 * weight), ("meprop", "sparsegrad", "sparsegrad:cut=backward", "literal")
    trainable, touched, launches, peak, state, saved = (
        {name: m[key] for name, m in line["methods"].items()}
        for key in ("trainable", "touched", "launches", "peak_bytes", "optimizer_bytes", "saved_bytes")
    )
    expected = dict.fromkeys(("ft", *topk), 2 * weight) | dict.fromkeys(("lora", "shira"), 2 * 3 * sides)
    expected |= {"sparsegrad:narrow:rank=8:k=all": 2 * 8 * 1536, "sparsegrad:rank=8": 2 * 64, "sparsegrad:rank=128:fixed": 2 * k}
    assert trainable == {"frozen": 0} | {name: n + head for name, n in expected.items()}
    assert touched == trainable | dict.fromkeys(topk, 2 * k + head)
    assert saved["lora"] - saved["frozen"] >= 4 * 32 * sides > saved["sparsegrad:rank=8"] - saved["frozen"] >= 4 * 32 * 2 * 8
    assert state["frozen"] == 0 and 0 <= state["ft"] - 8 * (2 * weight + head) < 100
    assert peak["frozen"] < peak["sparsegrad:rank=8"] < peak["sparsegrad"]
    assert launches["frozen"] < launches["sparsegrad"] < launches["sparsegrad:cut=backward"]
    assert all(m["steps"] == 2 and 0 < m["quartiles"][0] <= m["seconds"] <= m["quartiles"][1] for m in line["methods"].values())


def test_every_search_is_timed(run):
    printed = run(*SMALL, "3", "--methods", "frozen", "--searches", "--save", "x")
    cost = benchmark.stored()["x"]["search"]
    assert list(cost["ways"]) == list(benchmark.SEARCHES) and cost["steps"] == 3 and cost["training"] > 0
    for label, way in cost["ways"].items():
        beyond = way["collecting"] + way["decomposing"] - cost["training"]
        assert f"| {label} | {way['collecting']:.1f} | {way['decomposing']:.1f} | {beyond:.1f} |" in printed
    complete, narrow, _ = (way["peak_bytes"] for way in cost["ways"].values())
    assert narrow < complete  # its matrices are smaller


def test_a_method_that_there_is_not_is_refused(run, capsys):
    for text in ("dora", "lora:narrow", "meprop:fixed", "sparsegrad:rank=many"):
        with pytest.raises(SystemExit, match="2"):
            run("--methods", text)
        assert text in capsys.readouterr().err


def test_launches_are_operators_that_are_no_views():
    x = torch.arange(6.0).view(2, 3).requires_grad_()
    with benchmark.Launches() as launches:
        y = x.detach().t().reshape(3, 2)[:, :1].expand(3, 4)  # views
        torch.empty_like(y).resize_(2), y.is_contiguous(), y.unbind(1), y.sum().item()  # but sum
        (x * 2).view(-1).sum().backward()  # mul, sum; ones_like, mul
        y.detach().view(3, 2, 2) @ x.detach()  # mm, and views around it
        torch.optim.SGD([x], lr=0.1).step()  # add_, if for each
    assert launches.count == 7


def test_a_step_has_fewer_launches_than_loras_whatever_the_sizes():
    bounds = {"sparsegrad:rank=16:k=all": 0.88, "sparsegrad:rank=16:fixed": 0.95, "sparsegrad": 1.0, "meprop": 0.88}
    counts = []
    for hidden, batch, seq in ((64, "2", "48"), (96, "3", "64")):
        sizes = dict(vocab_size=99, hidden_size=hidden, intermediate_size=4 * hidden, num_attention_heads=2)
        config = transformers.BertConfig(num_hidden_layers=6, **sizes)
        given = ["--batch", batch, "--seq", seq, "--dtype", "bf16", "--k", "0.001", "--repeats", "1", "--warmup", "1"]
        args = benchmark.parse([*given, "--basis-steps", "2", "--methods", "lora", *bounds])
        counts.append({name: m["launches"] for name, m in benchmark.measure(config, args)["methods"].items()})
    assert counts[0] == counts[1]
    for name, bound in bounds.items():
        assert counts[0][name] <= bound * counts[0]["lora"], counts[0]


def test_peaks_are_of_what_is_there_at_once():
    assert benchmark.peak_of(lambda: [torch.empty(10**6), torch.empty(10**6)], "cpu") == 8 * 10**6
    assert benchmark.peak_of(lambda: [torch.empty(10**6).sum() for _ in range(3)], "cpu") < 5 * 10**6


def test_table_2_as_written_is_the_layer():
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 20)
    basis = sparsegrad.Basis(*(torch.linalg.qr(torch.randn(n, n)).Q for n in (12, 20)))
    results = []
    for layer in (benchmark.LiteralLinear(linear, basis, 9), sparsegrad.SparseGradLinear.from_linear(linear, basis, 9)):
        x = torch.linspace(-1, 1, 72).view(2, 3, 12).requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.core.grad.indices(), layer.core.grad.values()))
    for literal, ours in zip(*results):
        torch.testing.assert_close(literal, ours, rtol=1e-4, atol=1e-4)


def test_the_figure_is_drawn(run, tmp_path):
    (tmp_path / "sweep.json").write_text((FOLDER / "results" / "sweep.json").read_text())
    run("--figure")
    assert (tmp_path / "scaling.png").stat().st_size > 10**4
