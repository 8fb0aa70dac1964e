"""ttr.book.record: what it publishes in a notebook, and what it refuses."""

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

from ttr.book import record, table


@pytest.fixture
def shell():
    yield InteractiveShell.instance()
    InteractiveShell.clear_instance()


@pytest.mark.parametrize(
    ("value", "stored", "glued", "shown"),
    [
        (0.123456789, 0.123456789, "0.123456789", "x = 0.1235"),
        (7, 7, "7", "x = 7"),
        ("delta", "delta", "delta", "x = delta"),
        ([1.0, 2], [1.0, 2], "[1.0, 2]", "x = 1, 2"),
        (np.float64(0.5), 0.5, "0.5", "x = 0.5"),
        (torch.tensor([0.25, 0.5]), [0.25, 0.5], "[0.25, 0.5]", "x = 0.25, 0.5"),
    ],
)
def test_payload(shell, value, stored, glued, shown):
    with capture_output() as captured:
        record("x", value, rtol=0.1, atol=0.2, corpus="abc")
    (output,) = captured.outputs
    prefix = "application/papermill.record/"
    assert output.data == {f"{prefix}text/plain": glued}
    assert output.metadata["scrapbook"] == {"name": "x", "mime_prefix": prefix}
    assert output.metadata["golden"] == {"value": stored, "rtol": 0.1, "atol": 0.2, "corpus": "abc"}
    assert captured.stdout == shown + "\n"


def test_outside_a_notebook_it_only_prints(capsys):
    record("x", 1.0)
    assert capsys.readouterr().out == "x = 1\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1.0, [2.0]], {"a": 1}, None, [float("nan")]])
def test_refuses_what_cannot_be_compared(value):
    with pytest.raises(ValueError, match="record 'x': expected finite numbers, strings or a flat list"):
        record("x", value)


def test_a_table_escapes_what_it_shows_and_names_its_rows():
    shown = table("a < b", ("row", "x"), [("<first>", "1 & 2")]).data
    assert '<th scope="row">&lt;first&gt;</th><td>1 &amp; 2</td>' in shown
    assert "<caption>a &lt; b</caption>" in shown
