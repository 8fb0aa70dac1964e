"""What a run survives: kills, full disks, folders without access, damaged checkpoints, losses that are no number.

Every test runs real processes.
"""

import csv
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
CONFIG = REPOSITORY / "configs" / "recall.yaml"
SMALL = {
    "--data.num_train": 8,
    "--data.num_val": 1,
    "--data.batch_size": 4,
    "--trainer.max_epochs": 3,
    "--trainer.log_every_n_steps": 1,
    "--trainer.enable_progress_bar": "false",
    "--trainer.enable_model_summary": "false",
    "--checkpoint.every_n_train_steps": 3,  # not a divisor of an epoch
}
# The process kills itself, and nothing of it runs after that.
KILLED = """
import os, signal
from ttr import cli, tasks

draw = tasks.Recall.draw
def killed(self, split, index):
    if (split, index) == ("train", int(os.environ["KILL_AT"])):
        os.kill(os.getpid(), signal.SIGKILL)
    return draw(self, split, index)
tasks.Recall.draw = killed
cli.main()
"""


def start(root: Path, *arguments: str, program: tuple[str, ...] = ("-m", "ttr.cli"), limit: int | None = None, **env):
    small = [str(part) for option in SMALL.items() for part in option]
    command = [sys.executable, *program, "fit", "--config", str(CONFIG), *small]
    return subprocess.Popen(
        [*command, "--trainer.default_root_dir", str(root), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limit and (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))),
    )


def finish(process: subprocess.Popen, returncode: int = 0) -> str:
    error = process.communicate(timeout=300)[1]
    assert process.returncode == returncode, error
    return error


def curve(root: Path) -> dict[tuple[str, str], str]:
    """Metrics by name and step, as they were written: digit for digit. What two processes wrote has to agree."""
    written: dict[tuple[str, str], str] = {}
    for path in sorted(root.glob("csv/version_*/metrics.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            for name, value in row.items():
                if name.endswith(("loss", "accuracy")) and value:
                    assert written.setdefault((name, row["step"]), value) == value
    return written


def weights(root: Path) -> dict[str, torch.Tensor]:
    return torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def one_line(error: str) -> str:
    """The message, which stands last and under no traceback."""
    assert "Traceback" not in error, error
    return error.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    finish(start(root))
    return root


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A run that was killed in its first epoch, behind its first checkpoint."""
    root = tmp_path_factory.mktemp("begun")
    finish(start(root, program=("-c", KILLED), KILL_AT="5"), -signal.SIGKILL)
    return root


def test_a_run_killed_twice_in_the_middle_of_epochs_has_the_curve_and_the_weights_of_the_whole_run(whole, tmp_path):
    finish(start(tmp_path, program=("-c", KILLED), KILL_AT="5"), -signal.SIGKILL)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch=0-step=3.ckpt", "last.ckpt"]
    finish(start(tmp_path, "--ckpt_path", "last", program=("-c", KILLED), KILL_AT="14"), -signal.SIGKILL)
    finish(start(tmp_path, "--ckpt_path", "last"))
    assert len(list(tmp_path.glob("csv/version_*"))) == 3
    assert curve(tmp_path) == curve(whole)
    for name, weight in weights(whole).items():
        assert torch.equal(weights(tmp_path)[name], weight), name


def test_a_run_killed_from_outside_at_any_moment_goes_on(whole, tmp_path):
    process = start(tmp_path, "--checkpoint.every_n_train_steps", "1")
    while not (tmp_path / "checkpoints" / "last.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.communicate()
    finish(start(tmp_path, "--ckpt_path", "last", "--checkpoint.every_n_train_steps", "1"))
    assert curve(tmp_path) == curve(whole)
    assert torch.equal(weights(tmp_path)["model.embedding.weight"], weights(whole)["model.embedding.weight"])


def test_last_is_the_newest_whole_checkpoint_where_its_link_dangles(whole, begun, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "epoch=0-step=3.ckpt").write_bytes((begun / "checkpoints" / "last.ckpt").read_bytes())
    (folder / "last.ckpt").symlink_to("epoch=0-step=0.ckpt")
    finish(start(tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", "1"))
    assert [step for name, step in curve(tmp_path) if name == "train_loss"] == ["3", "4", "5", "6", "7"]


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(begun, tmp_path):
    content = (begun / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(content)
    process = start(tmp_path, "--ckpt_path", "last", limit=len(content) - 1000)
    error = one_line(finish(process, 1))
    assert error.startswith("error: [Errno 27] File too large")
    assert "epoch=0-step=6.ckpt" in error
    assert "the last checkpoint is" in error
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == content


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    error = one_line(finish(start(tmp_path / "file" / "run"), 1))
    assert error.startswith("error: [Errno 20] Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_may_not_be_written_to_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    try:
        assert one_line(finish(start(tmp_path), 1)).startswith("error: [Errno 13] Permission denied")
    finally:
        tmp_path.chmod(0o700)


def test_a_damaged_checkpoint_is_one_line_that_names_a_whole_one(begun, tmp_path):
    content = (begun / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "epoch=0-step=3.ckpt").write_bytes(content)
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(content[: len(content) // 2])
    error = one_line(finish(start(tmp_path, "--ckpt_path", "last"), 2))
    assert "ckpt_path: expected a Lightning checkpoint" in error
    assert "the newest that is whole is" in error
    assert "epoch=0-step=3.ckpt" in error


def test_a_loss_that_is_no_number_is_one_line_and_never_saved(tmp_path):
    wild = ("--model.learning_rate", "1e30", "--trainer.gradient_clip_val", "null")
    error = one_line(finish(start(tmp_path, *wild, "--checkpoint.every_n_train_steps", "1"), 1))
    assert error.startswith("error: ")
    assert "expected a finite number" in error or "expected finite numbers" in error
    for path in (tmp_path / "checkpoints").glob("*.ckpt"):
        for weight in torch.load(path, weights_only=True)["state_dict"].values():
            assert weight.isfinite().all()
