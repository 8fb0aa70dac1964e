"""Sweeps in real processes: nothing that was finished is lost, and what went wrong is on record."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

# Lightning 2.6 and older versions of jsonargparse have another name for a method than the newest.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

REPOSITORY = Path(__file__).parents[2]
STUDY = {
    "designs": ["linear_attention", "delta_net"],
    "learning_rates": [0.01],
    "seeds": [0, 1],
    "common": {
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
        "model": {"init_args": {"d_model": 8, "num_layers": 1, "num_heads": 1}},
    },
    "bases": {
        "recall": {
            "data": {
                "class_path": "ttr.tasks.Recall",
                "init_args": {"num_pairs": 2, "length": 8, "vocab_size": 8}
                | {"num_train": 2, "num_val": 1, "batch_size": 4},
            }
        }
    },
    "tasks": {
        "two": {"base": "recall"},
        "three": {"base": "recall", "data": {"init_args": {"num_pairs": 3, "length": 9}}},
    },
}
# A task that ends its process where its file says so, and one that raises: they stand in for what nobody foresaw.
UNFORESEEN = """
import os, signal, time
from ttr.tasks import Recall

class Raises(Recall):
    def draw(self, split, index):
        raise RuntimeError(f"no batch {index} today")

class Dies(Recall):
    def draw(self, split, index):
        os.kill(os.getpid(), signal.SIGKILL)

class Slow(Recall):
    def draw(self, split, index):
        time.sleep(0.2)
        return super().draw(split, index)
"""


def environment(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **variables}


def command(folder: Path, *arguments: str, **changes: object) -> list[str]:
    path = folder.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump({**STUDY, "folder": str(folder), **changes}))
    return [sys.executable, "-m", "ttr.cli", "sweep", "--config", str(path), "--jobs", "2", *arguments]


def sweep(folder: Path, *arguments: str, code: int = 0, **changes: object) -> str:
    """Run the command in a process of its own; what it says."""
    run = subprocess.run(
        command(folder, *arguments, **changes),
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=os.pathsep.join([str(folder.parent), *sys.path])),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == code, run.stderr
    return run.stdout if code == 0 else run.stderr


def table(folder: Path) -> list[dict]:
    return pq.read_table(folder / "results.parquet").to_pylist()


def records(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "runs").glob("*.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    return folder, sweep(folder)


def test_every_run_has_a_row(finished):
    folder, said = finished
    rows = table(folder)
    assert "8 finished, 0 failed" in said
    assert [(row["task"], row["design"], row["seed"]) for row in rows] == [
        (task, design, seed)
        for task in ("three", "two")
        for design in ("delta_net", "linear_attention")
        for seed in (0, 1)
    ]
    assert len({row["hash"] for row in rows}) == 8
    for row in rows:
        assert row["status"] == "finished"
        assert row["traceback"] is None
        assert row["steps"] == 2
        assert row["seconds"] > 0
        assert {"train_loss", "val_loss", "val_accuracy", "test_loss"} <= row.keys()
        assert json.loads(row["versions"]).keys() == {"ttr", "torch", "lightning", "python"}
        assert json.loads(row["config"])["model"]["init_args"]["design"] == row["design"]
    assert not list((folder / "runs").glob("*.started"))


def test_runs_are_those_of_ttr_fit(finished, tmp_path):
    row = next(
        row for row in table(finished[0]) if (row["task"], row["design"], row["seed"]) == ("two", "delta_net", 1)
    )
    (tmp_path / "run.yaml").write_text(row["config"])
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(tmp_path)]
    fit = [sys.executable, "-m", "ttr.cli", "fit", "--config", str(tmp_path / "run.yaml"), *quiet]
    subprocess.run(fit, cwd=REPOSITORY, env=environment(), check=True, capture_output=True, timeout=300)
    losses = [line.split(",") for line in (tmp_path / "csv/version_0/metrics.csv").read_text().splitlines()]
    fitted = dict(zip(losses[0], losses[-1], strict=True))
    assert float(fitted["val_loss"]) == pytest.approx(row["val_loss"], abs=0)


def test_finished_runs_are_skipped_and_new_ones_join_them(finished):
    folder, _ = finished
    before = records(folder)
    assert "8 finished" in sweep(folder)
    assert records(folder) == before
    assert "10 finished" in sweep(folder, seeds=[0, 1, 2], designs=["delta_net"])
    assert before.items() < records(folder).items()


def test_a_run_that_raises_is_recorded_and_can_be_retried(tmp_path):
    (tmp_path / "unforeseen.py").write_text(UNFORESEEN)
    broken = {"base": "recall", "data": {"class_path": "unforeseen.Raises"}}
    changes = {"tasks": {**STUDY["tasks"], "broken": broken}, "designs": ["delta_net"], "seeds": [0]}
    assert "2 finished, 1 failed" in sweep(tmp_path / "out", **changes)
    (failed,) = (row for row in table(tmp_path / "out") if row["status"] == "failed")
    assert failed["task"] == "broken"
    assert "RuntimeError: no batch 0 today" in failed["traceback"]
    assert failed["val_loss"] is None

    (tmp_path / "unforeseen.py").write_text("from ttr.tasks import Recall as Raises\n")
    assert "2 finished, 1 failed" in sweep(tmp_path / "out", **changes)
    assert "3 finished, 0 failed" in sweep(tmp_path / "out", "--retry_failed", "true", **changes)


def test_a_run_whose_process_dies_is_recorded_and_takes_no_other_with_it(tmp_path):
    (tmp_path / "unforeseen.py").write_text(UNFORESEEN)
    deadly = {"base": "recall", "data": {"class_path": "unforeseen.Dies"}}
    said = sweep(tmp_path / "out", tasks={"two": STUDY["tasks"]["two"], "deadly": deadly}, seeds=[0])
    assert "2 finished, 2 failed" in said
    rows = table(tmp_path / "out")
    assert {row["task"] for row in rows if row["status"] == "failed"} == {"deadly"}
    assert all("SIGKILL" in row["traceback"] for row in rows if row["status"] == "failed")


def test_a_killed_sweep_loses_nothing_and_goes_on(tmp_path):
    (tmp_path / "unforeseen.py").write_text(UNFORESEEN)
    folder = tmp_path / "out"
    slow = {"base": "recall", "data": {"class_path": "unforeseen.Slow"}}
    changes = {"tasks": {"slow": slow}, "seeds": [0, 1, 2, 3]}
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    process = subprocess.Popen(
        command(folder, **changes),
        cwd=REPOSITORY,
        env=environment(PYTHONPATH=paths),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while len(records(folder)) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the sweep and its workers: all that a crash of the machine would end
    process.wait()
    kept = records(folder)
    assert 2 <= len(kept) < 8
    assert all(json.loads(content)["status"] == "finished" for content in kept.values())
    assert not (folder / "results.parquet").exists() or table(folder)

    assert "8 finished, 0 failed" in sweep(folder, **changes)
    assert kept.items() <= records(folder).items()
    assert len(table(folder)) == 8


def test_what_a_killed_writer_left_is_never_read(finished):
    folder, _ = finished
    rows = len(table(folder))
    (folder / "runs" / ".0123456789abcdef.json.1.2.partial").write_text('{"hash": "0123')
    (folder / ".results.parquet.1.2.partial").write_bytes(b"PAR1")
    sweep(folder)
    assert len(table(folder)) == rows


def test_a_dask_cluster_of_two_processes(finished, tmp_path):
    from distributed import LocalCluster

    with LocalCluster(n_workers=2, threads_per_worker=2, processes=True, dashboard_address=None) as cluster:
        said = sweep(tmp_path / "out", "--scheduler", cluster.scheduler_address)
    assert "8 finished, 0 failed" in said
    measured = [
        {(row["task"], row["design"], row["seed"]): row["val_loss"] for row in table(folder) if row["seed"] < 2}
        for folder in (finished[0], tmp_path / "out")
    ]
    assert measured[0] == measured[1]


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "out", Path("/proc/out")):
        (tmp_path / "file").touch()
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**STUDY, "folder": str(folder)}))
        run = subprocess.run(
            [sys.executable, "-m", "ttr.cli", "sweep", "--config", str(path)],
            **{"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True, "timeout": 120},
        )
        assert run.returncode == 2
        assert run.stderr.startswith("error: ")
        assert str(folder)[:8] in run.stderr


def test_a_full_disk_is_an_error_and_keeps_what_was_finished(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system needs root, and the right to mount")
    try:
        (disk / "other").write_bytes(bytes(44 * 1024))  # room for a few records
        study = {"designs": ["delta_net"], "seeds": list(range(5))}
        error = sweep(disk, code=2, **study)
        kept = records(disk)
        assert "No space left on device" in error
        assert error.splitlines()[-1].startswith("error: ")
        assert 0 < len(kept) < 10
        assert all(json.loads(content)["status"] == "finished" for content in kept.values())
        assert not list(disk.rglob("*.partial"))
        (disk / "other").unlink()
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert "10 finished" in sweep(disk, **study)
        assert kept.items() <= records(disk).items()
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"designs": ["delta_ned"]}, "did you mean delta_net"),
        ({"designs": []}, "designs: expected at least one, none twice"),
        ({"seeds": [1, 1]}, "seeds: expected at least one, none twice"),
        ({"tasks": {"two": {"base": "recal"}}}, "tasks.two.base: expected one of ['recall'], got 'recal'"),
        ({"common": {"model": {"init_args": {"d_modle": 8}}}}, "'d_modle'"),
        ({"common": {"trainer": {"max_epoch": 8}}}, "'max_epoch'"),
        ({"tasks": {"two": {"base": "recall", "data": {"init_args": {"pairs": 2}}}}}, "'pairs' is not accepted"),
        ({"tasks": {"two": {"base": "recall", "data": {"init_args": {"num_pairs": 9}}}}}, "task 'two', design"),
        ({"overrides": [{"designs": ["retnet"], "config": {}}]}, "overrides.designs: expected those of the study"),
        ({"override": []}, "'override'"),
    ],
)
def test_a_mistake_in_the_study_is_an_error_before_anything_runs(tmp_path, capsys, monkeypatch, changes, message):
    from ttr.cli import main

    arguments = command(tmp_path / "out", **changes)[3:]
    monkeypatch.setattr(sys, "argv", ["ttr", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in error
    assert "Traceback" not in error
    assert not list((tmp_path / "out").rglob("*.json"))
