"""Records of studies: whole or refused, with their provenance, and old when what made them has changed."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks/ is no part of the package

from benchmarks import record, studies
from ttr.commands import read_study

# Lightning 2.6 and older versions of jsonargparse have another name for a method than the newest.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

CONFIGURATIONS = sorted(path for path in (record.ROOT / "configs").glob("study*.yaml") if path.stem != "study_full")
SMALL = """
folder: {folder}
designs: [linear_attention]
tasks:
  recall: {{data: {{class_path: ttr.tasks.Recall}}}}
"""


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "study_small.yaml"
    path.write_text(SMALL.format(folder=tmp_path / "runs"))
    return path


def finish(path: Path, **changes) -> None:
    """Leave the result of the study's run, as `ttr sweep` does."""
    study = read_study(path)
    (run,) = study.runs()
    (study.folder / "runs").mkdir(parents=True)
    result = {name: getattr(run, name) for name in ("task", "design", "learning_rate", "seed", "hash")}
    result |= {"status": "finished", "metrics": {"test_loss": 0.5}, "steps": 7, "seconds": 2.0, "started": 100.0}
    (study.folder / "runs" / f"{run.hash}.json").write_text(json.dumps(result | changes))


def test_a_finished_study_becomes_a_record_that_is_old_when_its_file_changes(small, tmp_path):
    finish(small)
    made = studies.made(read_study(small), small.read_text())
    assert [row["test_loss"] for row in made["rows"]] == [0.5]
    assert made["seconds"] == 2.0
    record.write(made, tmp_path / "made.json")
    assert json.loads((tmp_path / "made.json").read_text()) == made
    assert not studies.stale(made, small)
    assert "Older" not in studies.sentence(made, small)
    small.write_text(small.read_text() + "seeds: [1]\n")
    assert studies.stale(made, small)
    assert "Older" in studies.sentence(made, small)


@pytest.mark.parametrize("status", [None, "failed"])
def test_an_unfinished_study_is_refused(small, status):
    if status:
        finish(small, status=status)
    with pytest.raises(ValueError, match="all 1 runs to be finished, 1 are not: linear_attention on recall"):
        studies.made(read_study(small), small.read_text())


def test_a_file_that_is_no_study_is_refused(tmp_path):
    path = tmp_path / "none.yaml"
    path.write_text("tasks: {}\nnonsense: 1\n")
    with pytest.raises(ValueError, match="nonsense"):
        read_study(path)


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda path: path.stem)
def test_the_record_that_is_committed_is_whole(configuration):
    made, runs = studies.load(configuration), read_study(configuration).runs()
    assert [(row["design"], row["task"], row["seed"]) for row in made["rows"]] == [
        (run.design, run.task, run.seed) for run in runs
    ]
    assert {"device", "cores", "versions", "sources", "commit", "date", "seconds"} <= set(made)
    assert made["configuration"] == studies.digest(configuration.read_text())
    assert all("test_loss" in row for row in made["rows"])


def test_a_mean_over_no_run_is_an_error():
    rows = [{"design": "a", "x": 1.0}, {"design": "a", "x": 2.0}]
    assert studies.mean(rows, "x", design="a") == 1.5
    with pytest.raises(ValueError, match="design"):
        studies.mean(rows, "x", design="b")
