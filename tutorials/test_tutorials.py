"""The notebooks as committed. That they still compute what is saved in them, `pytest --nbval` checks."""

import ast
import base64
import copy
import os
import pathlib
import re
import sys

import nbformat
import pytest
from nbclient import NotebookClient

HERE = pathlib.Path(__file__).parent
PATHS = sorted(HERE.glob("*.ipynb"))
PUBLIC = {
    node.name
    for node in ast.parse((HERE.parent / "sparsegrad.py").read_text(encoding="utf-8")).body
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")
}
ROOTS = "home|root|Users|tmp|work|mnt|opt|usr|var|srv|data|content|etc|private|Volumes"
# A path from the root of some machine's disk; neither a fraction nor a part of an address.
ABSOLUTE = re.compile(rf"(?<![\w.])/({ROOTS})\b|(?<![\w.:/)}}])(/[\w.-]+){{2,}}|\b[A-Za-z]:[\\/]\w|file://")


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parsed(cell):
    """The cell as Python; lines for IPython alone (`!pip`, `%cd`) count as `pass`."""
    return ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", cell.source, flags=re.M))


def shows(cell):
    """What running the cell must leave in its output: text if it prints or ends in a value, a picture for each `plt.show`."""
    body = parsed(cell).body
    outside = [node for node in body if not isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    calls = [ast.unparse(node.func) for part in outside for node in ast.walk(part) if isinstance(node, ast.Call)]
    value = bool(body) and isinstance(body[-1], ast.Expr) and not isinstance(body[-1].value, ast.Call)
    return "print" in calls or value, calls.count("plt.show")


def text_of(output):
    """All of an output but pictures."""
    kept = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/")}
    return output.get("text", "") + "".join(map(str, kept.values()))


def faults(notebook):
    """What is wrong with a notebook as it would be committed; empty if nothing is."""
    found, cells = [], code_cells(notebook)
    counts = [cell.execution_count for cell in cells]
    if counts != list(range(1, len(cells) + 1)):
        found.append(f"execution counts are {counts}, not 1 to {len(cells)}: run it top to bottom")
    for number, cell in enumerate(cells, 1):
        text, pictures = shows(cell)
        if text and not any(output.output_type != "display_data" and text_of(output).strip() for output in cell.outputs):
            found.append(f"cell {number} shows something when it runs, but its output is empty")
        if pictures != sum("image/png" in output.get("data", {}) for output in cell.outputs):
            found.append(f"cell {number} calls plt.show {pictures} times, but has another number of pictures")
        for output in cell.outputs:
            if output.output_type == "error" or output.get("name") == "stderr" or re.search(r"Warning|it/s|%\|", text_of(output)):
                found.append(f"cell {number} has an error, a warning or a progress bar in its output")
        if len(cell.source.splitlines()) > 12:
            found.append(f"cell {number} has {len(cell.source.splitlines())} lines, more than 12")
        if cell.metadata or "NBVAL" in cell.source:
            found.append(f"cell {number} has metadata or a comment that could keep nbval from comparing it")
    for cell in notebook.cells:
        prose = re.sub(r"\$\$.*?\$\$|\$[^$\n]*\$|https?://[^\s)]*", "", cell.source, flags=re.S)
        for text in (prose if cell.cell_type == "markdown" else cell.source, *map(text_of, cell.get("outputs", []))):
            if match := ABSOLUTE.search(text):
                found.append(f"there is an absolute path, {match[0]}")
    if match := ABSOLUTE.search(str(notebook.metadata)):
        found.append(f"there is an absolute path in the metadata, {match[0]}")
    return found


def test_five_notebooks():
    assert [path.name[:3] for path in PATHS] == ["01_", "02_", "03_", "04_", "05_"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
class TestCommitted:
    def test_no_faults(self, path):
        assert faults(read(path)) == []

    def test_teaches_by_guess_and_check(self, path):
        """Before a result that matters the reader guesses, after it the notebook asserts; about as much prose as code;
        the paper's sections are linked."""
        notebook, waiting, guesses = read(path), False, 0
        for cell in notebook.cells:
            if cell.cell_type == "markdown" and "**Guess" in cell.source:
                assert not waiting, f"no assert between a guess and this one: {cell.source}"
                waiting, guesses = True, guesses + 1
            elif cell.cell_type == "code":
                tests = [node.test for node in ast.walk(parsed(cell)) if isinstance(node, ast.Assert)]
                assert not any(isinstance(test, ast.Constant) for test in tests)
                waiting = waiting and not tests
        assert guesses >= 4 and not waiting
        prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
        code = "\n".join(cell.source for cell in code_cells(notebook))
        assert 0.7 < len(prose.split()) / len(code.split()) < 2
        assert "https://arxiv.org/html/2410.07383#S" in prose

    def test_pictures_are_labelled(self, path):
        for cell in code_cells(read(path)):
            if "plt.show()" in cell.source:
                assert re.search(r'xlabel=f?"[\w{]', cell.source)
                assert re.search(r'ylabel(=|\()f?"[\w{]|set_yticks\(', cell.source)
                assert re.search(r'title(=|\()f?"[\w{]', cell.source)

    def test_uses_the_public_names_and_redefines_none(self, path):
        nodes = [node for cell in code_cells(read(path)) for node in ast.walk(parsed(cell))]
        imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
        ours = {alias.name for node in imports if getattr(node, "module", "") == "sparsegrad" for alias in node.names}
        defined = {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        defined |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        defined |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        defined |= {a.asname or a.name for node in imports if getattr(node, "module", "") != "sparsegrad" for a in node.names}
        assert ours and ours <= PUBLIC
        assert defined & PUBLIC == set()

    def test_readme_shows_its_picture(self, path):
        """README.md has a picture of each notebook, and it is one that the notebook holds."""
        picture = HERE / "pictures" / f"{path.stem}.png"
        assert f"tutorials/pictures/{picture.name}" in (HERE.parent / "README.md").read_text(encoding="utf-8")
        outputs = [output for cell in code_cells(read(path)) for output in cell.outputs]
        held = [base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})]
        assert picture.read_bytes() in held, "`jupyter nbconvert --to markdown` writes a notebook's pictures; copy it from there"

    def test_begins_as_the_others_do(self, path):
        assert code_cells(read(path))[0].source == code_cells(read(PATHS[0]))[0].source

    def test_links_lead_somewhere(self, path):
        for cell in read(path).cells:
            for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", cell.source if cell.cell_type == "markdown" else ""):
                assert (HERE / target).exists(), target


def first(notebook, text):
    return next(cell for cell in code_cells(notebook) if text in cell.source and cell.outputs)


def break_output(notebook):
    first(notebook, "print(").outputs = []


def break_output_blank(notebook):
    first(notebook, "print(").outputs[0]["text"] = "\n"


def break_picture(notebook):
    first(notebook, "plt.show()").outputs = []


def break_counts(notebook):
    code_cells(notebook)[3].execution_count = 7


def break_order(notebook):
    notebook.cells.reverse()


def break_never_run(notebook):
    for cell in code_cells(notebook):
        cell.execution_count, cell.outputs = None, []


def break_path_in_output(notebook):
    first(notebook, "print(").outputs[0]["text"] = "saved in /home/someone/model"


def break_path_in_source(notebook):
    code_cells(notebook)[2].source += "\nfolder = '/tmp'"


def break_path_in_text(notebook):
    notebook.cells[0].source += "\nThe data lie in /srv/sst2."


def break_path_in_metadata(notebook):
    notebook.metadata["kernelspec"]["argv"] = ["/usr/bin/python3"]


def break_windows_path(notebook):
    code_cells(notebook)[2].source += "\nfolder = 'C:/data'"


def break_warning(notebook):
    code_cells(notebook)[1].outputs = [nbformat.v4.new_output("stream", name="stderr", text="...")]


def break_progress_bar(notebook):
    first(notebook, "print(").outputs[0]["text"] += "100%|######| 30/30 [00:03<00:00, 9.1it/s]"


def break_length(notebook):
    code_cells(notebook)[2].source += "\nx = 1" * 12


def break_comparison(notebook):
    code_cells(notebook)[2].source += "  # NBVAL_IGNORE_OUTPUT"


def break_comparison_by_tag(notebook):
    code_cells(notebook)[2].metadata["tags"] = ["nbval-skip"]


@pytest.mark.parametrize("damage", [f for name, f in sorted(globals().items()) if name.startswith("break_")])
def test_a_fault_is_found(damage):
    """The checks above find what they are there for."""
    notebook = copy.deepcopy(read(PATHS[0]))
    assert faults(notebook) == []
    damage(notebook)
    assert faults(notebook)


def test_first_cell_fetches_the_project_where_it_is_missing(tmp_path):
    """In a folder with nothing beside it, as in Colab, it asks for the repository, clones it and installs."""
    root = HERE.parent
    if not (root / ".git").exists():
        pytest.skip("not a git repository, so nothing to clone")
    answer = nbformat.v4.new_code_cell(f"input = lambda prompt: {root.as_uri()!r}")
    fetch = code_cells(read(PATHS[0]))[0]
    after = nbformat.v4.new_code_cell("import common, sparsegrad\nprint(common.__file__, sparsegrad.__file__)")
    notebook = nbformat.v4.new_notebook(cells=[answer, nbformat.v4.new_code_cell(fetch.source), after])
    environment = {**os.environ, "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])}
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}})
    client.execute(env=environment)
    shown = "".join(text_of(output) for output in notebook.cells[2].outputs)
    clone = tmp_path / "sparsegrad"
    assert shown.split() == [str(clone / "tutorials" / "common.py"), str(clone / "tutorials" / ".." / "sparsegrad.py")]
