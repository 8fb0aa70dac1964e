"""When book/build.py starts from clean, when it looks at the site again, and what it says without a browser."""

from subprocess import CompletedProcess

import build
import check
import pytest


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """An empty book whose Sphinx writes one page, and whose browser test passes."""
    site = tmp_path / "_build" / "html"
    page = site / "index.html"
    (tmp_path / "_toc.yml").write_text("root: index\n")
    for module, name, value in [
        (build, "ROOT", tmp_path),
        (build, "BUILD", tmp_path / "_build"),
        (build, "BUILT", tmp_path / "_build" / ".built"),
        (build, "CHECKED", tmp_path / "_build" / ".checked"),
        (build, "IN_CI", False),
        (check, "ROOT", tmp_path),
        (check, "SITE", site),
    ]:
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(build, "browser_is_there", lambda: True)

    class Tree:
        ran, status = [], 0
        root, kept = tmp_path, site / "kept.txt"

        def main(self):
            self.ran = []
            return build.main()

        def run(self, command, **_):
            program = "pytest" if "pytest" in command else "sphinx"
            self.ran.append(program)
            self.command = command
            if program == "sphinx":
                site.mkdir(parents=True, exist_ok=True)
                page.write_text(f"<p>{self.root.joinpath('_toc.yml').read_text()}</p>")
            return CompletedProcess(command, self.status if program == "sphinx" else 0)

    tree = Tree()
    monkeypatch.setattr(build.subprocess, "run", tree.run)
    return tree


def test_an_unchanged_site_is_built_on_and_not_looked_at_again(tree):
    assert tree.main() == 0
    assert tree.ran == ["sphinx", "pytest"]
    assert tree.main() == 0
    assert tree.ran == ["sphinx"]


def test_only_what_has_changed_is_looked_at_again(tree):
    suites = ["tests/browser/test_book.py", "tests/browser/test_explorer.py"]
    site = tree.root / "_build" / "html"
    assert tree.main() == 0
    (site / "other.html").write_text("<p>new</p>")
    assert tree.main() == 0
    assert [suite for suite in suites if suite in tree.command] == suites[:1]
    (site / "book").mkdir()
    (site / "book" / "explorer.html").write_text("<p>new</p>")
    assert tree.main() == 0
    assert [suite for suite in suites if suite in tree.command] == suites


@pytest.mark.parametrize("cause", ["contents", "extension", "static", "outputs", "failure", "CI"])
def test_it_starts_from_clean_where_sphinx_does_not_know(tree, monkeypatch, cause):
    assert tree.main() == 0
    tree.kept.write_text("from the last build")
    tree.main()
    assert tree.kept.exists()
    match cause:
        case "contents":
            (tree.root / "_toc.yml").write_text("root: index\noptions: {}\n")
        case "extension" | "static" | "outputs":
            places = {"extension": "book/_ext/draw.py", "static": "book/_static/page.css"}
            path = places.get(cause, "_build/.execute/chapter.json")
            (tree.root / path).parent.mkdir(parents=True, exist_ok=True)
            (tree.root / path).write_text("{}")
        case "failure":
            tree.status = 1
            assert tree.main() == 1
            assert tree.ran == ["sphinx"]
            tree.status = 0
        case "CI":
            monkeypatch.setattr(build, "IN_CI", True)
    assert tree.main() == 0
    assert not tree.kept.exists()


def test_a_fault_of_the_site_is_a_failure_until_it_is_mended(tree, capsys):
    contents = tree.root / "_toc.yml"
    contents.write_text("root: missing\n")
    for _ in range(2):
        assert tree.main() == 1
        assert "check: missing: in the table of contents, but it has no page" in capsys.readouterr().err
    contents.write_text("root: index\n")
    assert tree.main() == 0


@pytest.mark.parametrize("in_ci", [True, False])
def test_without_a_browser_it_says_so_and_fails_in_ci(tree, monkeypatch, capsys, in_ci):
    monkeypatch.setattr(build, "IN_CI", in_ci)
    monkeypatch.setattr(build, "browser_is_there", lambda: False)
    for _ in range(2):
        assert tree.main() == int(in_ci)
        assert tree.ran == ["sphinx"]
        assert "the browser test has NOT run" in capsys.readouterr().err
