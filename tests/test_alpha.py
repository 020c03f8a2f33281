"""Alpha is nothing to tune: it scales learning rate and bound, and B the other way."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ffa_kernels as ffa
from ffa_kernels.privacy import PrivacyEngine

pytestmark = pytest.mark.filterwarnings("ignore:PrivacyEngine")


def trained_products(alpha, lr, max_grad_norm, momentum):
    """s B of each layer after 24 private steps, the same noise words whatever alpha is."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3)
    )
    ffa.convert(model, r=4, alpha=alpha, target_modules=["0", "2"])
    data = TensorDataset(torch.randn(48, 12), torch.randint(3, (48,)))
    trained = [p for p in model.parameters() if p.requires_grad]
    _, optimizer, loader = PrivacyEngine(seed=4).make_private(
        module=model,
        optimizer=torch.optim.SGD(trained, lr=lr, momentum=momentum),
        data_loader=DataLoader(data, batch_size=8),
        noise_multiplier=0.5,
        max_grad_norm=max_grad_norm,
    )
    for _ in range(4):
        for x, y in loader:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return [layer.scaling * layer.lora_B.detach() for layer in (model[0], model[2])]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("factor", [4.0, 3.0])
def test_alpha_does_not_matter(momentum, factor):
    one = trained_products(8.0, 0.5, 0.3, momentum)
    other = trained_products(8.0 * factor, 0.5 / factor**2, 0.3 * factor, momentum)
    for a, b in zip(one, other, strict=True):
        assert float((a - b).norm() / a.norm()) < 1e-6
        assert float(a.norm()) > 0.1
    # The bound is what keeps them apart otherwise.
    apart = trained_products(8.0 * factor, 0.5 / factor**2, 0.3, momentum)
    assert float((one[0] - apart[0]).norm() / one[0].norm()) > 0.1
