"""Layer inputs with strong correlations and features of different size."""

from __future__ import annotations

import torch
from torch import Tensor


def correlated(samples: int, features: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features // 3, features, generator=torch.Generator().manual_seed(17))
    noise = 0.3 * torch.randn(samples, features, generator=generator)
    scale = torch.rand(features, generator=torch.Generator().manual_seed(18)) * 2 + 0.1
    return (torch.randn(samples, features // 3, generator=generator) @ mixing + noise) * scale
