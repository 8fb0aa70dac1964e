"""The commands that are not Lightning's, as a user types them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ttr import atlas
from ttr.cli import main
from ttr.models import RegressionLM

# Lightning 2.6 and older versions of jsonargparse have another name for a method than the newest.
pytestmark = pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")

REPOSITORY = Path(__file__).parents[2]
TINY = ["--model.d_model", "16", "--model.num_layers", "1", "--model.num_heads", "1"]
TEXT = ["--config", "configs/stdlib_text.yaml", "--data.length", "16", "--data.num_train", "2", "--data.num_val", "2"]


@pytest.fixture
def ttr(monkeypatch, capfdbinary):
    """Runs a command; its exit code, what it wrote and what it complained of."""
    monkeypatch.chdir(REPOSITORY)

    def run(*arguments: str) -> tuple[int, bytes, str]:
        monkeypatch.setattr(sys, "argv", ["ttr", *arguments])
        code = 0
        try:
            main()
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        written, error = capfdbinary.readouterr()
        return code, written, error.decode()

    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    size = ["--data.batch_size", "2", "--data.max_bytes", "2000000", "--trainer.max_epochs", "1"]
    fit = [sys.executable, "-m", "ttr.cli", "fit", *TEXT, *TINY, *size, "--trainer.default_root_dir", str(root)]
    subprocess.run(fit, cwd=REPOSITORY, check=True, capture_output=True, timeout=200)
    return root / "checkpoints" / "last.ckpt"


def test_help_lists_all_commands_and_every_command_has_examples(ttr):
    _, written, _ = ttr("--help")
    names = ("fit", "validate", "test", "predict", "sweep", "atlas", "cite", "generate", "export")
    assert all(f"    {name} " in written.decode() for name in names)
    for name in names:
        code, written, _ = ttr(name, "--help")
        assert code == 0
        assert f"\n  ttr {name}" in written.decode()


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_the_commands_and_their_options(ttr, shell):
    _, written, _ = ttr("--print_completion", f"shtab-{shell}")
    for word in ("generate", "--max_new_tokens", "--model.design", "--retry_failed"):
        assert word.encode() in written


def test_atlas_prints_all_rows_or_one(ttr):
    _, written, _ = ttr("atlas")
    assert all(f"\n{slug} " in written.decode() for slug in atlas)
    _, written, _ = ttr("atlas", "mesa_net")
    design = atlas["mesa_net"]
    for part in (design.update_rule(), design.citation(), "    ridge: heads key", design.cost().as_text()["flops"]):
        assert part in written.decode()


def test_cite_prints_each_work_once(ttr):
    _, written, _ = ttr("cite", "retnet", "mesa_net")
    keys = {*atlas["retnet"].cites(), *atlas["mesa_net"].cites()}
    assert written.count(b"\n@") + written.startswith(b"@") == len(keys)
    assert all(f"{{{key},".encode() in written for key in keys)


def test_generate_is_reproducible_and_the_exported_model_says_the_same(ttr, trained, tmp_path):
    generate = ["--prompt", "def ", "--max_new_tokens", "12", "--seed"]
    first, again, other = (ttr("generate", "--ckpt_path", str(trained), *generate, seed) for seed in "112")
    assert first == again != other
    assert first[1].startswith(b"def ")
    assert len(first[1]) == 4 + 12 + 1
    assert ttr("export", "--ckpt_path", str(trained), "--folder", str(tmp_path / "out"))[0] == 0
    assert ttr("generate", "--ckpt_path", str(tmp_path / "out"), *generate, "1") == first


def test_predict_writes_what_the_model_answers(ttr, trained, tmp_path):
    size = ["--data.batch_size", "2", "--data.max_bytes", "2000000", "--trainer.default_root_dir", str(tmp_path)]
    predict = [sys.executable, "-m", "ttr.cli", "predict", *TEXT, *size, "--ckpt_path", str(trained)]
    subprocess.run(predict, cwd=REPOSITORY, check=True, capture_output=True, timeout=200)
    arrays = np.load(tmp_path / "predictions.npz", allow_pickle=False)
    assert {name: array.shape for name, array in arrays.items()} == dict.fromkeys(
        ("inputs", "targets", "predictions"), (4, 16)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["atlas", "delta_ned"], "did you mean delta_net"),
        (["cite", "delta_net", "nobody"], "got 'nobody'"),
        (["generate", "--ckpt_path", "nowhere.ckpt", "--prompt", "x"], "'nowhere.ckpt', which does not exist"),
        (["generate", "--ckpt_path", "ttr", "--prompt", "x"], "'ttr' without model.json"),
        (["export", "--ckpt_path", __file__, "--folder", "/proc/out"], "ckpt_path: expected a checkpoint of ttr fit"),
    ],
)
def test_a_mistake_is_one_line(ttr, arguments, message):
    code, written, error = ttr(*arguments)
    assert (code, written) == (2, b"")
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("slug", [slug for slug in atlas if "T" not in map(str, atlas[slug].cost().state.free_symbols)])
def test_caches_do_not_grow(slug):
    model = RegressionLM(16, d_model=8, num_layers=1, num_heads=1, design=slug).eval()

    def held(cache) -> int:
        state = vars(cache.state) | cache.state.history | (cache.state.network or {}) if cache.state else {}
        tensors = [x for x in [*state.values(), *cache.past.values()] if isinstance(x, torch.Tensor)]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    sizes, caches = [], None
    with torch.no_grad():
        for _ in range(130):  # a window is full by then, and a mini-batch begun again
            _, caches = model.extend(torch.zeros(1, 1, dtype=torch.int64), caches)
            sizes.append(held(caches[0]))
    assert max(sizes[:66]) >= max(sizes[66:])
