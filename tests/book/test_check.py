"""book/check.py sees each kind of fault in a small site, and none in a sound one."""

import pytest
from check import HEAVIEST_PAGE, faults, main, table_of_contents

SOUND = """\
<html><head>
<link rel="stylesheet" href="_static/style.css"><link rel="canonical" href="https://example.org/index.html">
<script src="_static/program.js"></script><style>body { background: url("_static/dot.png") }</style>
</head><body id="top">
<a href="https://example.org">elsewhere</a> <a href="mailto:a@example.org">write</a> <a href="#top">up</a>
<a href="chapter/one.html#first%20part">one</a> <a href="chapter/">folder</a> <a href="#memory=delta&amp;beta=1">set</a>
<img src="_static/dot.png" alt="a dot" srcset="_static/dot.png 1x, _static/dot.png 2x">
<img src="data:image/png;base64,AAAA" alt="another dot">
</body></html>
"""


@pytest.fixture
def site(tmp_path):
    def write(body="", extra=None):
        files = {
            "index.html": SOUND.replace("</body>", f"{body}</body>"),
            "chapter/one.html": '<h1 id="first part">One</h1> <a href="../index.html#top">back</a>',
            "chapter/index.html": '<meta http-equiv="Refresh" content="0; url=one.html">',
            "_static/style.css": "a { background: url(dot.png) }",
            "_static/program.js": "",
            "_static/dot.png": "",
        }
        for name, text in (files | (extra or {})).items():
            path = tmp_path / "site" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path / "site"

    return write


def test_a_sound_site_has_no_fault(site):
    assert list(faults(site(), ["index", "chapter/one"])) == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ('<a href="two.html">x</a>', "index.html: link to two.html, which does not exist"),
        (
            '<a href="chapter/one.html#last">x</a>',
            "index.html: link to chapter/one.html#last, but chapter/one.html has no such anchor",
        ),
        ('<a href="#nowhere">x</a>', "index.html: link to #nowhere, but index.html has no such anchor"),
        ('<img src="_static/dot.png">', "index.html: picture without alt text: _static/dot.png"),
        ('<img src="_static/dot.png" alt=" ">', "index.html: picture without alt text: _static/dot.png"),
        ('<script src="https://cdn.org/x.js"></script>', "index.html: loads https://cdn.org/x.js from elsewhere"),
        ('<script src="//cdn.org/x.js"></script>', "index.html: loads //cdn.org/x.js from elsewhere"),
        ('<img alt="x" src="http://cdn.org/x.png">', "index.html: loads http://cdn.org/x.png from elsewhere"),
        (
            '<img alt="x" src="_static/dot.png" srcset="https://cdn.org/x.png 2x">',
            "index.html: loads https://cdn.org/x.png from elsewhere",
        ),
        ('<link rel="preconnect" href="https://cdn.org">', "index.html: loads https://cdn.org from elsewhere"),
        (
            "<style>@font-face { src: url(https://cdn.org/x.woff) }</style>",
            "index.html: loads https://cdn.org/x.woff from elsewhere",
        ),
        ("<style>@import 'https://cdn.org/x.css'</style>", "index.html: loads https://cdn.org/x.css from elsewhere"),
        (
            '<p style="background: url(https://cdn.org/x.png)"></p>',
            "index.html: loads https://cdn.org/x.png from elsewhere",
        ),
        ('<img alt="x" src="_images/gone.svg">', "index.html: loads _images/gone.svg, which does not exist"),
    ],
)
def test_a_fault_is_named(site, body, fault):
    assert list(faults(site(body), ["index"])) == [fault]


def test_a_style_sheet_is_read_too(site):
    extra = {"_static/style.css": "@font-face { src: url('https://cdn.org/x.woff2') }"}
    found = "_static/style.css: loads https://cdn.org/x.woff2 from elsewhere"
    assert list(faults(site(extra=extra), [])) == [found]


def test_every_document_of_the_contents_needs_a_page(site):
    assert list(faults(site(), ["chapter/two"])) == ["chapter/two: in the table of contents, but it has no page"]


@pytest.mark.parametrize(("folder", "count"), [("_images", 1), ("_static", 0)])
def test_a_page_weighs_what_it_alone_loads(site, folder, count):
    extra = {f"{folder}/big.svg": "x" * HEAVIEST_PAGE}
    found = list(faults(site(f'<img alt="x" src="{folder}/big.svg">', extra), []))
    assert [fault.split(":")[0] for fault in found] == ["index.html"] * count


def test_exit_code_and_contents(site, tmp_path, capsys):
    contents = tmp_path / "_toc.yml"
    contents.write_text(
        "root: index\nparts:\n  - chapters:\n    - file: chapter/one\n      sections:\n        - file: two\n"
    )
    assert table_of_contents(contents) == ["index", "chapter/one", "two"]
    assert main([str(site()), "--contents", str(contents)]) == 1
    assert "check: two: in the table of contents, but it has no page" in capsys.readouterr().err
    site(extra={"two.html": ""})
    assert main([str(site()), "--contents", str(contents)]) == 0
