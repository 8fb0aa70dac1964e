"""book/execute.py run as a reader runs it, on tiny chapters in an empty tree of its own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HEADER = """\
# %% [markdown]
# # A tiny chapter

# %% tags=["parameters"]
scale = "smoke"
device = "cpu"
size = 3

"""
RECORDING = """\
# %%
from ttr.book import record
record("square", size**2, rtol=0.0)
"""


class Book:
    """A tree with the two scripts, chapters of one's choice and something that they import."""

    def __init__(self, root: Path):
        self.root = root
        (root / "book").mkdir()
        for script in ("execute.py", "golden.py"):
            shutil.copy(ROOT / "book" / script, root / "book")
        self.imported = root / "ttr" / "source.py"
        self.imported.parent.mkdir()
        self.imported.write_text("answer = 42\n")
        self.golden = root / "tests" / "golden"

    def chapter(self, name: str, code: str, header: str = HEADER) -> Path:
        path = self.root / "notebooks" / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(header + code)
        return path

    def product(self, name: str) -> bytes:
        return (self.root / "notebooks" / f"{name}.ipynb").read_bytes()

    def outputs(self, name: str) -> str:
        cells = json.loads(self.product(name))["cells"]
        return "".join("".join(o.get("text", "")) for cell in cells for o in cell.get("outputs", []))

    def execute(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(self.root / "book" / "execute.py"), *arguments]
        environment = os.environ | environment
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture
def book(tmp_path):
    return Book(tmp_path)


def test_two_forced_executions_give_the_same_bytes(book):
    book.chapter(
        "figure",
        """\
# %%
import sys
import matplotlib.pyplot as plt
from ttr.book import record, use_style
use_style()
record("square", size**2)
for line in range(20):
    print(line, flush=True)
    print(line, file=sys.stderr, flush=True)

# %%
plt.plot([0, 1], [1, 0], label="a line")
plt.legend()
plt.show()
{"a", "b", "c"}
""",
    )
    products = []
    for _ in range(2):
        book.execute("--force", "--update-golden", MPLBACKEND="agg")
        products.append(book.product("figure"))
    assert products[0] == products[1]
    notebook = json.loads(products[0])
    assert "image/svg+xml" in json.dumps(notebook["cells"][-1]["outputs"])
    for part in [notebook, *notebook["cells"]]:
        assert "papermill" not in part["metadata"]
    assert b"injected" not in products[0]


def test_prose_is_merged_and_code_or_an_import_is_executed_again(book):
    chapter = book.chapter("prose", "# %%\nprint(size)\n")
    assert "1 executed, 0 unchanged" in book.execute().stdout

    chapter.write_text(chapter.read_text().replace("# # A tiny chapter", "# # A better title"))
    assert "0 executed, 1 unchanged" in book.execute().stdout
    assert b"A better title" in book.product("prose")
    assert book.outputs("prose") == "3\n"

    chapter.write_text(chapter.read_text().replace("print(size)", "print(size + 1)"))
    assert "1 executed, 0 unchanged" in book.execute().stdout
    assert book.outputs("prose") == "4\n"

    book.imported.write_text("answer = 43\n")
    assert "1 executed, 0 unchanged" in book.execute().stdout


def test_a_chapter_that_raises_shows_its_traceback_and_the_others_finish(book):
    book.chapter("bad", "# %%\ndef unlucky():\n    raise RuntimeError('no such luck')\nunlucky()\n")
    book.chapter("good", "# %%\nprint('finished')\n")
    run = book.execute()
    assert run.returncode == 1
    assert "bad: FAILED" in run.stderr
    assert "in unlucky()" in run.stderr
    assert "RuntimeError: no such luck" in run.stderr
    assert book.outputs("good") == "finished\n"

    run = book.execute()
    assert "0 executed, 1 unchanged, 1 failed" in run.stdout
    assert run.returncode == 1


def test_parameters_reach_the_chapter_and_are_shown_in_it(book):
    book.chapter("parameters", "# %%\nprint(scale, device, size)\n")
    run = book.execute("-p", "scale=full", "-p", "size=5")
    assert run.returncode == 0, run.stderr
    assert book.outputs("parameters") == "full cpu 5\n"
    assert json.loads((book.root / "_build" / ".execute" / "parameters.json").read_text())["scale"] == "full"
    assert b"size = 5" in book.product("parameters")


@pytest.mark.parametrize(
    ("header", "arguments", "message"),
    [
        (HEADER, ["-p", "sise=5"], "tiny has no parameter sise; its parameters are: scale, device, size"),
        ("", [], "tiny has no parameter device, scale; its parameters are: none"),
        (HEADER, ["-p", "size"], "-p size: expected name=value"),
        (HEADER, ["-p", "scale=huge"], "-p scale=huge: expected one of smoke, full"),
        (HEADER, ["--jobs", "0"], "--jobs: expected at least 1, got 0"),
        (HEADER, ["huge"], "unknown chapter: huge; the chapters are tiny"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(book, header, arguments, message):
    book.chapter("tiny", "# %%\nprint(1)\n", header)
    run = book.execute(*arguments)
    assert run.returncode == 2
    assert message in run.stderr
    assert not (book.root / "notebooks" / "tiny.ipynb").exists()


def test_golden_numbers_are_held_also_when_outputs_are_reused(book):
    book.chapter("numbers", RECORDING)
    run = book.execute()
    assert run.returncode == 1
    assert "numbers: square: not in the golden file: 9, golden None" in run.stderr

    assert book.execute("--update-golden").returncode == 0
    path = book.golden / "numbers.json"
    assert json.loads(path.read_text()) == {"square": {"value": 9, "rtol": 0.0, "atol": 0.0}}
    assert book.execute().returncode == 0

    path.write_text(path.read_text().replace("9", "8"))
    run = book.execute()
    assert run.returncode == 1
    assert "0 executed, 1 unchanged" in run.stdout
    assert "numbers: square: differs: 9, golden 8" in run.stderr

    run = book.execute("-p", "size=5")
    assert run.returncode == 0, "other parameters give other numbers: nothing to compare"
