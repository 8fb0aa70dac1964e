"""When does a recorded number agree with its golden value?"""

import pytest
from golden import compare, recorded


def entry(value, rtol=0.1, atol=0.0, **corpus):
    return {"value": value, "rtol": rtol, "atol": atol, **corpus}


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict", "fault"),
    [
        (entry(1.09), entry(1.0), "agrees", False),
        (entry(1.11), entry(1.0), "differs", True),
        (entry(-1.0), entry(1.0), "differs", True),
        (entry(0.4, rtol=0.0, atol=0.5), entry(0.0, rtol=0.0, atol=0.5), "agrees", False),
        (entry("delta"), entry("delta"), "agrees", False),
        (entry("delta"), entry("linear"), "differs", True),
        (entry("1"), entry(1), "differs", True),
        (entry([1.0, 2.1]), entry([1.0, 2.0]), "agrees", False),
        (entry([1.0, 2.3]), entry([1.0, 2.0]), "differs", True),
        (entry([1.0]), entry([1.0, 2.0]), "differs", True),
        (entry(1.0), entry([1.0]), "differs", True),
        (entry([1.0]), entry(1.0), "differs", True),
        (entry(1.5, rtol=1.0), entry(1.0), "the tolerance differs", True),
        (entry(5.0, corpus="b"), entry(1.0, corpus="a"), "not compared: another corpus", False),
        (entry(5.0, corpus="a"), entry(1.0, corpus="a"), "differs", True),
        (None, entry(1.0), "no longer recorded", True),
        (entry(1.0), None, "not in the golden file", True),
    ],
)
def test_verdicts(ours, theirs, verdict, fault):
    (row,) = compare({"x": ours} if ours else {}, {"x": theirs} if theirs else {})
    assert (row.verdict, row.fault) == (verdict, fault)


def test_a_name_recorded_twice_is_an_error():
    output = {"metadata": {"scrapbook": {"name": "x"}, "golden": entry(1.0)}}
    assert recorded([[output], [{"output_type": "stream"}]]) == {"x": entry(1.0)}
    with pytest.raises(ValueError, match="'x' is recorded twice"):
        recorded([[output], [output]])
