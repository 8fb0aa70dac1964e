"""Models of vectors: what one layer without norms can be exactly, and what an autoencoder may know."""

import pytest
import torch
from sampling import relative_error

from ttr.models import Backbone, RegressionAutoencoder, RegressionModel
from ttr.tasks import LinearRegression


def test_without_norms_one_layer_and_a_short_convolution_are_ridge_regression_in_context() -> None:
    dim, scale = 3, 20.0
    task = LinearRegression(dim=dim, num_pairs=8, num_queries=4, noise=0.1, batch_size=5)
    options = {
        "design": "intention",
        "num_layers": 1,
        "num_heads": 1,
        "mlp_ratio": 0.0,
        "conv_width": 2,
        "conv_on": "k",
    }
    sizes = {"d_model": dim + 1, "key_dim": dim, "value_dim": 1}
    model = RegressionModel(dim + 1, 1, **options, **sizes, unit=False, norm=False, conv_silu=False).double()
    layer = model.backbone.blocks[0].mixer
    with torch.no_grad():
        model.embedding.weight.copy_(torch.eye(dim + 1))
        model.embedding.bias.zero_()
        for name in "qk":
            layer.projections[name].weight.copy_(scale * torch.eye(dim + 1)[:dim])
        layer.projections["v"].weight.copy_(torch.eye(dim + 1)[dim:])
        taps = layer.convolutions["k"].filter.weight
        taps.copy_(torch.tensor([1.0, 0.0]).expand_as(taps))
        layer.output.weight.copy_(torch.eye(dim + 1)[:, dim:])
        model.head.weight.copy_(torch.eye(dim + 1)[dim:])
    tokens, _ = task.draw("train", 0)
    tokens = tokens.double()
    answers = model(tokens)[:, ::2]
    ridge = next(iter(layer.inputs.values()))(tokens).flatten() / scale**2
    x, y = tokens[:, ::2, :-1], tokens[:, 1::2, -1:]
    for t in range(8, 12):
        gram = x[:, :t].mT @ x[:, :t] + ridge.diag()
        expected = x[:, t, None] @ torch.linalg.solve(gram, x[:, :t].mT @ y[:, :t])
        assert relative_error(answers[:, t, None], expected) <= 1e-9


def test_a_backbone_without_norms_has_none_and_its_pieces_are_the_whole() -> None:
    torch.manual_seed(0)
    backbone = Backbone(8, num_heads=2, norm=False, mlp_ratio=1.0)
    assert not any(isinstance(module, torch.nn.RMSNorm) for module in backbone.modules())
    x = torch.randn(2, 7, 8)
    first, caches = backbone.extend(x[:, :4])
    assert relative_error(torch.cat([first, backbone.extend(x[:, 4:], caches)[0]], dim=1), backbone(x)) <= 1e-5


def test_an_autoencoder_answers_from_the_last_vector_alone() -> None:
    torch.manual_seed(0)
    model = RegressionAutoencoder(9, d_model=8, num_heads=2)
    tokens = torch.randint(9, (2, 6))
    seen = []
    model.backbone.register_forward_hook(lambda *call: seen.append(call[2]))
    logits = model(tokens)
    assert logits.shape == (2, 6, 9)
    (gradient,) = torch.autograd.grad(logits[:, 0].square().sum(), seen[0])
    assert not gradient[:, :-1].any()
    assert gradient[:, -1].any()
    with pytest.raises(ValueError, match="d_model: expected an even number for sines and cosines, got 7"):
        RegressionAutoencoder(9, d_model=7, num_heads=1)
