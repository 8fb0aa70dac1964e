"""The command line: both configurations train, resume exactly, and state a mistake in one line."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ttr.cli import main
from ttr.training import TokenPrediction, ValueRegression

# Lightning 2.6 calls a method of jsonargparse's parser that later versions of jsonargparse rename.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

REPOSITORY = Path(__file__).parents[2]
CONFIGS = REPOSITORY / "configs"
RECALL, TEXT, REGRESSION = (CONFIGS / f"{name}.yaml" for name in ("recall", "stdlib_text", "linear_regression"))
SMALL = {
    "--data.num_train": 3,
    "--data.num_val": 1,
    "--data.batch_size": 4,
    "--trainer.max_epochs": 4,
    "--trainer.log_every_n_steps": 1,
    "--trainer.enable_progress_bar": "false",
    "--trainer.enable_model_summary": "false",
}


def ttr(subcommand: str, config: Path, root: Path, *arguments: str) -> list[dict[str, str]]:
    """Run the command in a process of its own; the rows of the table of metrics that it leaves."""
    small = [str(part) for option in SMALL.items() for part in option]
    command = [sys.executable, "-m", "ttr.cli", subcommand, "--config", str(config), *small]
    run = subprocess.run(
        [*command, "--trainer.default_root_dir", str(root), *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return list(csv.DictReader((root / "csv" / "version_0" / "metrics.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run that keeps the checkpoint of every epoch."""
    root = tmp_path_factory.mktemp("whole")
    return root, ttr("fit", RECALL, root, "--checkpoint.save_top_k", "-1")


def test_fit_leaves_metrics_checkpoints_and_both_logs(whole):
    root, metrics = whole
    assert [int(row["step"]) for row in metrics if row["train_loss"]] == list(range(12))
    assert [int(row["step"]) for row in metrics if row["val_loss"]] == [2, 5, 8, 11]
    assert len(list((root / "checkpoints").glob("epoch=*.ckpt"))) == 4
    assert list((root / "tensorboard").rglob("events.out.tfevents.*"))


def test_a_killed_run_resumed_with_last_has_the_same_curve(whole, tmp_path):
    root, metrics = whole
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(root / "checkpoints" / "epoch=1-step=6.ckpt", tmp_path / "checkpoints" / "last.ckpt")
    resumed = ttr("fit", RECALL, tmp_path, "--ckpt_path", "last")
    assert resumed == [row for row in metrics if int(row["step"]) >= 6]


def test_validate_takes_the_model_from_the_checkpoint(whole, tmp_path):
    root, metrics = whole
    checkpoint = str(root / "checkpoints" / "last.ckpt")
    (row,) = ttr("validate", RECALL, tmp_path, "--model.d_model", "32", "--ckpt_path", checkpoint)
    assert row["val_loss"] == metrics[-1]["val_loss"]


def test_a_checkpoint_loads_without_running_code(whole):
    path = whole[0] / "checkpoints" / "last.ckpt"
    saved = torch.load(path, weights_only=True)
    module = TokenPrediction.load_from_checkpoint(path)
    assert module.hparams["design"] == saved["hyper_parameters"]["design"] == "delta_net"
    torch.testing.assert_close(dict(module.state_dict()), dict(saved["state_dict"]))


def test_text_is_learnt_from_a_uniform_start(tmp_path):
    metrics = ttr("fit", TEXT, tmp_path, "--data.length", "32")
    losses = [float(row["train_loss"]) for row in metrics if row["train_loss"]]
    assert losses[0] == pytest.approx(torch.tensor(256.0).log().item(), rel=0.2)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("config", "option", "value", "message"),
    [
        (
            RECALL,
            "--ckpt_path",
            "nowhere.ckpt",
            "ckpt_path: expected a Lightning checkpoint, got 'nowhere.ckpt', which does not exist",
        ),
        (RECALL, "--ckpt_path", __file__, "ckpt_path: expected a Lightning checkpoint, got"),
        (TEXT, "--ckpt_path", "last", "last.ckpt', which does not exist"),
        (TEXT, "--data.corpus", "nowhere", "corpus: expected a folder that exists, got 'nowhere'"),
        (RECALL, "--data.num_pairs", "99", "length: expected at least 3 * num_pairs = 297, got 32"),
        (RECALL, "--data.pairs", "4", "'pairs' is not accepted"),
        (RECALL, "--model.design", "nonsense", "design"),
        (RECALL, "--model.depth", "3", "'depth' is not accepted"),
        (RECALL, "--model.vocab_size", "3", "model.vocab_size: expected nothing, it is the task's, got 3"),
        (RECALL, "--data", "ttr.tasks.LinearRegression", "vocab_size: expected that of a task for TokenPrediction"),
        (REGRESSION, "--data", "ttr.tasks.Memorization", "input_size: expected that of a task for ValueRegression"),
    ],
)
def test_a_mistake_is_one_message_and_no_traceback(monkeypatch, capsys, config, option, value, message):
    monkeypatch.setattr(sys, "argv", ["ttr", "fit", "--config", str(config), option, value])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err.partition("error: ")[2]
    assert stopped.value.code == 2
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "config", [path for path in sorted(CONFIGS.glob("*.yaml")) if "study" not in path.stem], ids=lambda c: c.stem
)
def test_every_configuration_names_what_there_is(monkeypatch, capsys, config):
    monkeypatch.setattr(sys, "argv", ["ttr", "fit", "--config", str(config), "--model.design", "gla", "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    printed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(config.read_text())
    assert printed["model"]["class_path"] == written["model"].get("class_path", "ttr.training.TokenPrediction")
    assert printed["model"]["init_args"]["design"] == "gla"
    assert printed["data"]["init_args"].items() >= written["data"]["init_args"].items()


def test_a_hybrid_in_fewer_bits_and_less_memory_trains_and_cannot_go_on_as_another(tmp_path, capsys, monkeypatch):
    hybrid = ("--model.design", "[delta_net, softmax_attention]", "--model.num_layers", "4", "--model.mlp_ratio", "1")
    frugal = ("--model.checkpoint_activations", "true", "--trainer.precision", "bf16-mixed")
    accumulated = ("--trainer.accumulate_grad_batches", "2", "--trainer.max_epochs", "1")
    metrics = ttr("fit", RECALL, tmp_path, *hybrid, *frugal, *accumulated)
    assert [int(row["step"]) for row in metrics if row["val_loss"]] == [1]
    weights = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    other = ("--model.design", "[delta_net, longhorn]", "--model.num_layers", "4", "--model.mlp_ratio", "1")
    monkeypatch.setattr(sys, "argv", ["ttr"])
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(RECALL), *other, "--ckpt_path", str(tmp_path / "checkpoints" / "last.ckpt")])
    assert "model.design: expected ['delta_net', 'softmax_attention'], that of" in capsys.readouterr().err


def test_a_model_of_vectors_trains_resumes_and_is_read_back(tmp_path):
    small = ("--model.class_path", "ttr.training.ValueRegression", "--model.conv_on", "")
    metrics = ttr("fit", REGRESSION, tmp_path, *small, "--trainer.max_epochs", "1")
    assert [int(row["step"]) for row in metrics if row["train_loss"]] == [0, 1, 2]
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    module = ValueRegression.load_from_checkpoint(checkpoint, weights_only=True)
    assert (module.hparams["input_size"], module.hparams["output_size"]) == (9, 1)
    (row,) = ttr("validate", REGRESSION, tmp_path / "again", *small, "--ckpt_path", str(checkpoint))
    assert row["val_loss"] == metrics[-1]["val_loss"]


@pytest.mark.parametrize(("option", "value"), [("--model.design", "longhorn"), ("--model.d_model", "32")])
def test_another_model_does_not_go_on_from_a_checkpoint(whole, capsys, monkeypatch, option, value):
    monkeypatch.setattr(sys, "argv", ["ttr"])
    checkpoint = whole[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", str(RECALL), option, value, "--ckpt_path", str(checkpoint)])
    assert stopped.value.code == 2
    assert f"{option[2:]}: expected" in capsys.readouterr().err


def test_other_tensors_are_not_a_checkpoint(monkeypatch, capsys, tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "tensors.ckpt")
    monkeypatch.setattr(sys, "argv", ["ttr"])
    with pytest.raises(SystemExit):
        main(["test", "--config", str(RECALL), "--ckpt_path", str(tmp_path / "tensors.ckpt")])
    assert "ckpt_path: expected a Lightning checkpoint" in capsys.readouterr().err


def test_importing_the_package_does_not_import_the_trainer():
    check = "import sys, ttr; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=REPOSITORY).returncode == 0
