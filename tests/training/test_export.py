"""Exported models: the same numbers from files that run no code, and an error for files that are something else."""

import json

import pytest
import torch
from lightning.pytorch import Trainer

from ttr import Decay, Design, Hebbian, atlas
from ttr.training import TokenPrediction, ValueRegression, export, load_checkpoint, load_exported

COMPOSED = Design(Decay(per="channel"), optimizer=Hebbian(normalize=True, floor=0.5))


def checkpoint(module, path):
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def tiny(design, **arguments) -> TokenPrediction:
    sizes = {"d_model": 8, "num_layers": 2, "num_heads": 2, "conv_width": 2}
    return TokenPrediction(vocab_size=12, design=design, **sizes, **arguments)


@pytest.fixture
def exported(tmp_path):
    export(checkpoint(tiny("delta_net"), tmp_path / "tiny.ckpt"), tmp_path / "folder")
    return tmp_path / "folder"


@pytest.mark.parametrize("design", [*atlas, COMPOSED, ["retnet", COMPOSED]], ids=str)
def test_a_model_comes_back(tmp_path, design):
    path = checkpoint(tiny(design, learning_rate=0.1), tmp_path / "tiny.ckpt")
    export(path, tmp_path / "folder")
    before, after = load_checkpoint(path), load_exported(tmp_path / "folder")
    torch.testing.assert_close(after.state_dict(), before.state_dict(), rtol=0, atol=0)
    mixers = [[block.mixer for block in model.backbone.blocks] for model in (before, after)]
    for old, new in zip(*mixers, strict=True):
        assert (old.design, old.unit, old.projections.keys()) == (new.design, new.unit, new.projections.keys())
    assert after.head.weight is after.embedding.weight


def test_the_exported_model_gives_the_same_numbers(exported, tmp_path):
    tokens = torch.randint(12, (2, 9))
    torch.testing.assert_close(
        load_exported(exported)(tokens), load_checkpoint(tmp_path / "tiny.ckpt")(tokens), rtol=0, atol=0
    )


def test_transformers_reads_an_exported_model(tmp_path):
    transformers = pytest.importorskip("transformers")
    path = checkpoint(tiny(["retnet", COMPOSED]), tmp_path / "tiny.ckpt")
    export(path, tmp_path / "folder", transformers=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    tokens = torch.randint(12, (2, 9))
    torch.testing.assert_close(model(tokens).logits, load_checkpoint(path)(tokens), rtol=0, atol=0)


def test_models_of_values_are_exported_as_well(tmp_path):
    module = ValueRegression(input_size=3, output_size=2, d_model=8, num_heads=2)
    path = checkpoint(module, tmp_path / "values.ckpt")
    saved = torch.load(path, weights_only=True)
    saved["hyper_parameters"]["_class_path"] = "ttr.training.ValueRegression"  # as the command line saves it
    torch.save(saved, path)
    export(path, tmp_path / "folder")
    torch.testing.assert_close(load_exported(tmp_path / "folder").state_dict(), module.model.state_dict())


def test_nothing_is_unpickled(exported, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("unpickled")

    monkeypatch.setattr("pickle.load", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    monkeypatch.setattr("pickle.Unpickler", refuse)
    monkeypatch.setattr("torch.load", refuse)
    load_exported(exported)


class Malice:
    def __reduce__(self):
        return exec, ("raise SystemExit('run')",)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    torch.save({"hyper_parameters": Malice(), "state_dict": {}}, tmp_path / "malice.ckpt")
    with pytest.raises(ValueError, match="ckpt_path: expected a checkpoint of ttr fit"):
        load_checkpoint(tmp_path / "malice.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format: expected 1, got 2"),
        ({"class": "os.system"}, "class: expected one of RegressionLM"),
        ({"arguments": {"vocab_size": 12, "depth": 3}}, "arguments: expected those of RegressionLM"),
        ({"arguments": {"vocab_size": 12, "design": "delta_ned"}}, "did you mean delta_net"),
        ({"designs": []}, "is another one now"),
    ],
)
def test_a_changed_description_is_an_error(exported, change, message):
    path = exported / "model.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load_exported(exported)


def test_weights_that_do_not_fit_are_an_error(exported):
    (exported / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="expected the weights"):
        load_exported(exported)
    (exported / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"without model\.safetensors"):
        load_exported(exported)
