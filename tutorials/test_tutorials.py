"""The notebooks as committed. That they still compute what is saved in them, `pytest --nbval` checks."""

import ast
import base64
import os
import pathlib
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).parent
BOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted(HERE.glob("*.ipynb"))}
CODE = {name: [cell for cell in book.cells if cell.cell_type == "code"] for name, book in BOOKS.items()}
PROSE = {name: [cell.source for cell in book.cells if cell.cell_type == "markdown"] for name, book in BOOKS.items()}
DEFINED = ast.FunctionDef, ast.ClassDef
PUBLIC = {n.name for n in ast.parse((HERE.parent / "sparsegrad.py").read_text(encoding="utf-8")).body if isinstance(n, DEFINED)}
ROOTS = "home|root|Users|tmp|work|mnt|opt|usr|var|srv|data|content|etc|private|Volumes"
# A path from the root of some machine's disk; neither a fraction nor a part of an address.
ABSOLUTE = re.compile(rf"(?<![\w.])/({ROOTS})\b|(?<![\w.:/)}}])(/[\w.-]+){{2,}}|\b[A-Za-z]:[\\/]\w|file://")
each = pytest.mark.parametrize("name", BOOKS)


def parsed(cell):
    """The cell as Python; lines for IPython alone (`!pip`, `%cd`) count as `pass`."""
    return ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", cell.source, flags=re.M))


def text_of(output):
    """All of an output but pictures."""
    kept = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return output.get("text", "") + "".join(map(str, kept.values()))


def test_five_notebooks():
    assert [name[:3] for name in BOOKS] == ["01_", "02_", "03_", "04_", "05_"]
    assert re.search("to read and .* to run", next(iter(PROSE.values()))[0])  # how long the first takes
    assert {picture.stem for picture in (HERE / "pictures").iterdir()} <= BOOKS.keys()


@each
def test_was_run_from_top_to_bottom(name):
    """What a cell shows when it runs is there: text if it prints or ends in a value, a picture for each `plt.show`."""
    assert [cell.execution_count for cell in CODE[name]] == list(range(1, len(CODE[name]) + 1))
    assert CODE[name][0].source == next(iter(CODE.values()))[0].source  # they begin alike
    for cell in CODE[name]:
        body, texts = parsed(cell).body, [text_of(o) for o in cell.outputs if o.output_type != "display_data"]
        outside = [node for node in body if not isinstance(node, DEFINED)]
        calls = [ast.unparse(node.func) for part in outside for node in ast.walk(part) if isinstance(node, ast.Call)]
        if "print" in calls or (isinstance(body[-1], ast.Expr) and not isinstance(body[-1].value, ast.Call)):
            assert "".join(texts).strip(), cell.source
        assert sum("image/png" in o.get("data", {}) for o in cell.outputs) == calls.count("plt.show"), cell.source
        assert not any(o.output_type == "error" or o.get("name") == "stderr" for o in cell.outputs), cell.source
        assert not re.search(r"Warning|it/s|%\|", "".join(map(text_of, cell.outputs))), cell.source
        assert len(cell.source.splitlines()) <= 12, cell.source
        assert not cell.metadata and "NBVAL" not in cell.source, "nbval would not compare it"


@each
def test_paths_and_links(name):
    texts = [re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$|https?://[^\s)]*", "", text, flags=re.S) for text in PROSE[name]]
    for cell in CODE[name]:
        texts += [cell.source, *map(text_of, cell.outputs)]
    assert not [match[0] for text in [*texts, str(BOOKS[name].metadata)] for match in ABSOLUTE.finditer(text)]
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", "\n".join(PROSE[name])):
        assert (HERE / target).exists(), target


@each
def test_teaches_by_guess_and_check(name):
    """Before a result that matters the reader guesses, after it the notebook asserts; about as much prose as code."""
    waiting, guesses, prose = False, 0, "\n".join(PROSE[name])
    for cell in BOOKS[name].cells:
        if cell.cell_type == "markdown" and "**Guess" in cell.source:
            assert not waiting, f"no assert between a guess and this one: {cell.source}"
            waiting, guesses = True, guesses + 1
        elif cell.cell_type == "code":
            tests = [node.test for node in ast.walk(parsed(cell)) if isinstance(node, ast.Assert)]
            assert not any(isinstance(test, ast.Constant) for test in tests)
            waiting = waiting and not tests
    assert guesses >= 4 and not waiting
    assert 0.7 < len(prose.split()) / len("\n".join(cell.source for cell in CODE[name]).split()) < 2
    assert "https://arxiv.org/html/2410.07383#S" in prose  # the paper's sections are linked


@each
def test_uses_the_public_names_and_redefines_none(name):
    nodes = [node for cell in CODE[name] for node in ast.walk(parsed(cell))]
    imported = {a.name for n in nodes if isinstance(n, ast.ImportFrom) and n.module == "sparsegrad" for a in n.names}
    assert imported and all(a in PUBLIC and a[0] != "_" for a in imported)
    defined = {n.name for n in nodes if isinstance(n, DEFINED)} | {n.arg for n in nodes if isinstance(n, ast.arg)}
    defined |= {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    others = [n for n in nodes if isinstance(n, ast.Import | ast.ImportFrom) and getattr(n, "module", "") != "sparsegrad"]
    assert not PUBLIC & (defined | {a.asname or a.name for n in others for a in n.names})


@each
def test_pictures(name):
    for cell in (cell for cell in CODE[name] if "plt.show()" in cell.source):
        for label in (r'xlabel=f?"[\w{]', r'ylabel(=|\()f?"[\w{]|set_yticks\(', r'title(=|\()f?"[\w{]'):
            assert re.search(label, cell.source), cell.source
    shown = [output.data["image/png"] for cell in CODE[name] for output in cell.outputs if "image/png" in output.get("data", {})]
    for picture in (HERE / "pictures").glob(f"{name}.png"):  # `jupyter nbconvert --to markdown` writes them
        assert picture.read_bytes() in map(base64.b64decode, shown)


def test_the_first_cell_fetches_the_project_where_it_is_missing(tmp_path):
    """In a folder with nothing beside it, as in Colab, it asks for the repository, clones it and installs."""
    root, code = HERE.parent, nbformat.v4.new_code_cell
    if not (root / ".git").exists():
        pytest.skip("not a git repository, so nothing to clone")
    answer, fetch = code(f"input = lambda prompt: {root.as_uri()!r}"), code(next(iter(CODE.values()))[0].source)
    after = code("import common, sparsegrad\nprint(common.__file__, sparsegrad.__file__)")
    notebook = nbformat.v4.new_notebook(cells=[answer, fetch, after])
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env={**os.environ, "PATH": path, "PIP_NO_DEPS": "1"})  # all is there
    folder = tmp_path / "sparsegrad" / "tutorials"
    assert "".join(map(text_of, after.outputs)).split() == [str(folder / "common.py"), str(folder / ".." / "sparsegrad.py")]
