"""The tables of the reproducibility page."""

from book_status import report


def test_report_names_versions_chapters_and_verdicts():
    versions = {"python": "3.11.7", "torch": "2.13.0"}
    record = {"name": "error", "value": 0.123456, "golden": [0.5, 2], "verdict": "differs", "corpus": None}
    text = record | {"name": "loss", "value": 3, "golden": None, "corpus": "0123456789abcdef"}
    run = {"versions": versions, "scale": "smoke", "device": "cpu", "seconds": 4.2}
    report_of = report({"01_first": run | {"golden": [record, text]}, "02_second": run | {"golden": []}})
    assert [line for line in report_of if not line.startswith("| ---")] == [
        "| software | version |",
        "| python | 3.11.7 |",
        "| torch | 2.13.0 |",
        "",
        "| chapter | scale | device | seconds |",
        "| {doc}`/notebooks/01_first` | smoke | cpu | 4.2 |",
        "| {doc}`/notebooks/02_second` | smoke | cpu | 4.2 |",
        "",
        "{doc}`/notebooks/01_first`",
        "",
        "| number | here | golden | verdict |",
        "| `error` | 0.1235 | 0.5, 2 | differs |",
        "| `loss` | 3 | – | differs (corpus `0123456789ab`) |",
        "",
    ]
