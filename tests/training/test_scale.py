"""More than one process, less memory, fewer bits: what Lightning brings, held to the numbers of a plain run."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import gradients
import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer, seed_everything
from sampling import relative_error

from ttr.cli import main
from ttr.tasks import Recall
from ttr.training import TokenPrediction, load_checkpoint

REPOSITORY = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_addr", "127.0.0.1"]
RECALL = {"vocab_size": 32, "length": 20, "num_pairs": 3, "num_val": 1}
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "limit_val_batches": 0,
}
# Lightning 2.6 asks torch's pytrees in a way that torch is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def distributed(program: list[str], port: int) -> str:
    """Run in two processes; what they wrote to standard error."""
    run = subprocess.run(
        [*TORCHRUN, "--master_port", str(port), *program],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stderr


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def joined(tmp_path_factory):
    path = tmp_path_factory.mktemp("joined") / "gradients.pt"
    subprocess.run([sys.executable, gradients.__file__, str(path), "1", "auto", "keep"], cwd=REPOSITORY, check=True)
    return torch.load(path)


@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
@pytest.mark.parametrize("activations", ["keep", "checkpoint"])
def test_two_processes_have_the_gradients_of_one_on_the_joined_batch(joined, tmp_path, strategy, activations):
    path = tmp_path / "gradients.pt"
    distributed([gradients.__file__, str(path), "2", strategy, activations], free_port())
    steps = torch.load(path)
    assert len(steps) == len(joined) == 2
    for step, expected in zip(steps, joined, strict=True):
        assert step.keys() == expected.keys()
        assert relative_error(*(torch.cat([x.flatten() for x in each.values()]) for each in (step, expected))) <= 1e-6
        for name, gradient in step.items():  # sums that nearly cancel have lost digits of their own
            assert gradient.norm() > 0
            assert relative_error(gradient, expected[name]) <= 1e-5, name


def test_a_sharded_run_resumes_and_becomes_one_file(tmp_path):
    options = {
        "--config": REPOSITORY / "configs" / "recall.yaml",
        "--data.num_train": 4,
        "--data.num_val": 2,
        "--data.batch_size": 4,
        "--trainer.default_root_dir": tmp_path,
        "--trainer.accelerator": "cpu",
        "--trainer.devices": 2,
        "--trainer.strategy": "ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size": 2,
        "--trainer.strategy.tensor_parallel_size": 1,
        "--trainer.enable_progress_bar": "false",
    }
    fit = ["-m", "ttr.cli", "fit", *(str(part) for option in options.items() for part in option)]
    distributed([*fit, "--trainer.max_epochs", "1"], free_port())
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert last.resolve().is_dir()
    whole = ("--trainer.strategy.save_distributed_checkpoint", "false")
    error = distributed([*fit, "--trainer.max_epochs", "2", "--ckpt_path", "last", *whole], free_port())
    assert "Restored all states" in error
    assert last.resolve().name == "epoch=1-step=4.ckpt"
    model = load_checkpoint(last)
    assert model(torch.zeros(1, 3, dtype=torch.long)).isfinite().all()


def commands() -> list[list[str]]:
    """The arguments of every `ttr fit` on the page of the book."""
    page = (REPOSITORY / "book" / "outgrowing.md").read_text().replace("\\\n", " ")
    lines = [line.replace("-m ttr.cli fit", "ttr fit") for line in page.splitlines() if " --config " in line]
    return [shlex.split(line.partition("ttr fit ")[2]) for line in lines]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_the_commands_of_the_book_are_understood(arguments, monkeypatch, capsys):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["ttr", "fit", *arguments, "--print_config"])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not stopped.value.code
    printed = yaml.safe_load(capsys.readouterr().out)
    assert len(arguments) >= 4
    assert printed["trainer"]["strategy"] != "auto" or len(printed["model"]["init_args"]["design"]) == 4


def losses(**options) -> list[float]:
    """Of every batch of a run of 24."""

    class Keep(Callback):
        def __init__(self):
            self.losses = []

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.losses.append(float(trainer.callback_metrics["train_loss"]))

    seed_everything(0, verbose=False)
    module = TokenPrediction(vocab_size=32, d_model=16, num_heads=2, warmup_steps=0)
    kept = Keep()
    Trainer(max_epochs=1, callbacks=[kept], **QUIET, **options).fit(
        module, Recall(**RECALL, num_train=24, batch_size=8)
    )
    assert all(parameter.dtype == torch.float32 for parameter in module.parameters())
    return kept.losses


def test_bf16_trains_as_float32_does(unchecked_types):
    plain, mixed = losses(), losses(precision="bf16-mixed")
    assert mixed != plain
    assert mixed == pytest.approx(plain, abs=0.05)
    assert sum(mixed[-4:]) < sum(mixed[:4])


@pytest.mark.parametrize("design", ["gated_delta_net", "mesa_net", "linear_attention", "kda"])
def test_under_bf16_states_are_float32(design):
    module = TokenPrediction(vocab_size=32, d_model=16, num_heads=2, design=design)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        logits, caches = module.model.extend(torch.zeros(1, 5, dtype=torch.long))
    assert logits.dtype == torch.bfloat16
    for cache in caches:
        dtypes = []
        cache.state.map(lambda x, dtypes=dtypes: (dtypes.append(x.dtype), x)[1])
        assert set(dtypes) == {torch.float32}


def test_accumulated_gradients_are_those_of_the_joined_batch(unchecked_types):
    def first_step(joined: int, accumulated: int) -> dict[str, torch.Tensor]:
        seed_everything(0, verbose=False)
        module = TokenPrediction(vocab_size=32, d_model=16, num_heads=2, schedule="constant")
        kept, data = gradients.Keep(), gradients.Joined(**RECALL, num_train=4, batch_size=4)
        data.joined = joined
        Trainer(max_steps=1, callbacks=[kept], accumulate_grad_batches=accumulated, **QUIET).fit(module, data)
        return kept.steps[0]

    expected, accumulated = first_step(2, 1), first_step(1, 2)
    for name, gradient in accumulated.items():
        assert relative_error(gradient, expected[name]) <= 1e-6, name


# In a process of its own: the type checker of the tests wraps every function, and the compiler does not trace it.
COMPILED = """
import sys, torch
from ttr.training import TokenPrediction

def trained(**options):
    torch.manual_seed(0)
    module = TokenPrediction(vocab_size=17, d_model=16, num_layers=2, num_heads=2, **options)
    loss = module.model(torch.arange(2 * 70).reshape(2, 70) % 17).logsumexp(-1).sum()
    loss.backward()
    return module, [loss.detach(), *(parameter.grad for parameter in module.parameters())]

for design in ("gated_delta_net", ["linear_attention", "kda"]):
    plain, expected = trained(design=design)
    for options in ({}, {"checkpoint_activations": True}):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        module, got = trained(design=design, compile="aot_eager", **options)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
        assert not torch._dynamo.utils.counters["graph_break"], torch._dynamo.utils.counters["graph_break"]
        assert module.state_dict().keys() == plain.state_dict().keys()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
"""


def test_compiled_blocks_have_the_numbers_of_plain_ones():
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
