"""Train a small CNN on scikit-learn's digits, compress it for two engines, and show what that cost and won.

    python examples/digits.py [--out demo_out] [--epochs 12]

The 8 x 8 images are enlarged to 32 x 32, so that the network has enough work for INT8 to be worth it.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxcompress as fxc

TARGETS = ("onnxruntime", "openvino")
BATCH = 64


def conv(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and BatchNorm, the pair that every block below is made of."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two convolutions and the way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = conv(channels, channels), conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(F.relu(self.first(x))))


class Separable(nn.Module):
    """A depthwise convolution that halves the image, then a pointwise one that widens it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.depthwise = conv(inputs, inputs, stride=2, groups=inputs)
        self.pointwise = conv(inputs, outputs, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pointwise(F.relu(self.depthwise(x))))


class DigitNet(nn.Module):
    """``float32[n, 1, 32, 32]`` in, ``float32[n, 10]`` logits out; 0.40 M parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 32, stride=2)
        self.body = nn.Sequential(Residual(32), Separable(32, 64), Residual(64), Separable(64, 128), Residual(128))
        self.classifier = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.body(F.relu(self.stem(x)))
        logits: Tensor = self.classifier(features.mean((2, 3)))
        return logits


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,347 images to train with and 450 to test with: ``float32[n, 1, 32, 32]`` in 0..1 and ``int64[n]`` labels."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().reshape(-1, 1, 8, 8) / 16
    images = F.interpolate(images, size=(32, 32), mode="bilinear")
    train, test = train_test_split(range(len(labels)), test_size=450, stratify=labels, random_state=0)
    classes = torch.from_numpy(labels)
    return TensorDataset(images[train], classes[train]), TensorDataset(images[test], classes[test])


def train(model: nn.Module, data: TensorDataset, epochs: int) -> None:
    """Adam with a one-cycle learning rate; the model is left in eval mode."""
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=epochs * len(loader))
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(loader):.4f}")
    model.eval()


def top1(model: Callable[[Tensor], Tensor], data: TensorDataset) -> float:
    """Share of ``data`` that ``model``, an ``nn.Module`` or an engine, puts in the right class."""
    images, labels = data.tensors
    with torch.no_grad():
        logits = torch.cat([model(batch) for batch in images.split(BATCH)])
    return (logits.argmax(1) == labels).double().mean().item()


def compress(model: nn.Module, target: str, data: TensorDataset, test: TensorDataset, folder: Path) -> fxc.Engine:
    """INT8 engine of ``model`` for ``target``, saved in ``folder`` and proved to load again as it was."""
    engine = fxc.compile(
        model,
        example_inputs=(data.tensors[0][:1],),
        target=target,
        calibration=DataLoader(data, batch_size=BATCH),
        evaluate=lambda candidate: top1(candidate, test),
        max_drop=0.01,
    )
    print(engine.report)
    engine.save(folder)
    batch = test.tensors[0][:BATCH]
    if not torch.equal(fxc.load(folder)(batch), engine(batch)):
        raise SystemExit(f"the engine in {folder} does not answer as the one that was saved")
    return engine


def before_and_after(engines: dict[str, fxc.Engine]) -> Table:
    """One line for each engine: FP32 on that same engine, then what ``compile`` made of it."""
    table = Table("engine", "accuracy", "size on disk (KB)", "latency, batch 1 (ms)", title="before -> after")
    for target, engine in engines.items():
        report = engine.report
        before, after = report.size
        table.add_row(
            target,
            f"{report.accuracy['before']:.4f} -> {report.accuracy['after']:.4f}",
            f"{before / 1000:.0f} -> {after / 1000:.0f}",
            f"{report.latency['before'].p50_ms:.3f} -> {report.latency['after'].p50_ms:.3f}",
        )
    return table


def main() -> None:
    """Train, compress for each engine, save, load again, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"), help="folder for the engines")
    parser.add_argument("--epochs", type=int, default=12, help="training epochs (about 1.5 s each on two cores)")
    options = parser.parse_args()

    torch.manual_seed(0)
    train_set, test_set = digits()
    model = DigitNet()
    train(model, train_set, options.epochs)
    engines = {target: compress(model, target, train_set, test_set, options.out / target) for target in TARGETS}
    Console().print(before_and_after(engines))


if __name__ == "__main__":
    main()
