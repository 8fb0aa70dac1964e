"""The training module: loss, accuracy, what decays, the schedule, and checkpoints."""

from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer

from ttr import NLMS, Decay, Design, GradientDescent
from ttr.training import TokenPrediction


def tiny(**arguments) -> TokenPrediction:
    return TokenPrediction(vocab_size=12, d_model=8, num_layers=1, num_heads=1, **arguments)


def with_steps(module: TokenPrediction, steps: float) -> TokenPrediction:
    module.trainer = Mock(spec=Trainer, estimated_stepping_batches=steps)
    return module


def test_only_positions_with_a_target_count():
    module = tiny()
    module.log_dict = Mock()
    tokens = torch.randint(12, (3, 7))
    targets = torch.full((3, 7), -100)
    targets[:, 2], targets[:, 5] = 4, 9
    log_probabilities = F.log_softmax(module(tokens), dim=-1)
    loss = -(log_probabilities[:, 2, 4] + log_probabilities[:, 5, 9]).mean() / 2
    predicted = log_probabilities.argmax(-1)
    accuracy = ((predicted[:, 2] == 4).sum() + (predicted[:, 5] == 9).sum()) / 6

    torch.testing.assert_close(module.training_step((tokens, targets)), loss)
    metrics = module.log_dict.call_args.args[0]
    torch.testing.assert_close(metrics, {"train_loss": loss, "train_accuracy": accuracy})
    assert module.log_dict.call_args.kwargs["batch_size"] == 6


def test_every_parameter_is_trained_and_only_weight_matrices_decay():
    module = with_steps(tiny(weight_decay=0.3, design="kda"), 10)
    groups = module.configure_optimizers()["optimizer"].param_groups
    weight_decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    by_name = {name: weight_decay[id(p)] for name, p in module.named_parameters()}
    assert by_name["model.embedding.weight"] == 0.3
    assert by_name["model.backbone.norm.weight"] == 0.0
    (rates,) = (name for name in by_name if name.endswith("log_rate"))
    assert module.get_parameter(rates).ndim > 1
    assert by_name[rates] == 0.0


@pytest.mark.parametrize(("schedule", "middle", "end"), [("constant", 1.0, 1.0), ("cosine", 0.5, 0.0)])
def test_the_learning_rate_rises_then_follows_the_schedule(schedule, middle, end):
    module = with_steps(tiny(learning_rate=0.2, warmup_steps=3, schedule=schedule), 23)
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    rates = []
    for _ in range(24):
        rates.append(optimizer.param_groups[0]["lr"] / 0.2)
        optimizer.step()
        scheduler.step()
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[13] == pytest.approx(middle)
    assert rates[23] == pytest.approx(end)
    assert configured["lr_scheduler"]["interval"] == "step"


def test_a_composed_design_comes_back_from_a_checkpoint_that_runs_no_code(tmp_path):
    design = Design(Decay(per="channel"), optimizer=GradientDescent(gain=NLMS()))
    module = tiny(design=design)
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "composed.ckpt")
    restored = TokenPrediction.load_from_checkpoint(tmp_path / "composed.ckpt", weights_only=True)
    assert design.name is None
    assert restored.hparams["design"] == design
    torch.testing.assert_close(restored.state_dict(), module.state_dict())


def test_a_cosine_needs_an_end():
    with pytest.raises(ValueError, match="schedule: expected 'constant'"):
        with_steps(tiny(warmup_steps=0), float("inf")).configure_optimizers()
