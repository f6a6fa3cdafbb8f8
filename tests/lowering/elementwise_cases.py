"""Elementwise operators in the engines equal torch eager."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.helpers.lowering_cases import bools, case, floats, ints, positive

X = floats(2, 3, 4) * 3
Y = floats(2, 3, 4, seed=1) * 3
P = positive(2, 3, 4)
I = ints(2, 3, 4)  # noqa: E741
J = ints(2, 3, 4, seed=1)
J = torch.where(J == 0, 3, J)
B = bools(2, 3)
C = bools(2, 3, seed=1)
SPECIAL = torch.tensor([[1.0, float("nan"), float("inf")], [-float("inf"), 0.0, -2.5]])
HALVES = torch.tensor([[-2.5, -1.5, -0.5], [0.5, 1.5, 2.5]])
UNIT = (floats(2, 3, 4) / 4).clamp(-0.9, 0.9)

ONE_INPUT = [
    *(
        case(n, getattr(torch, n), X)
        for n in ("abs", "neg", "ceil", "floor", "sign", "exp", "sin", "cos", "atan", "sinh")
    ),
    *(case(n, getattr(torch, n), X) for n in ("tanh", "sigmoid", "erf", "reciprocal", "relu", "square", "cosh")),
    *(case(n, getattr(torch, n), P) for n in ("sqrt", "log", "rsqrt", "log1p")),
    *(case(n, getattr(torch, n), UNIT) for n in ("asin", "acos", "tan")),
    *(case(f"{n} of integers", getattr(torch, n), I) for n in ("abs", "neg", "sign", "square", "relu")),
    *(case(f"{n} of integers gives floats", getattr(torch, n), I) for n in ("exp", "sigmoid", "tanh", "cos")),
    case("round to even", torch.round, HALVES),
    case("isnan", torch.isnan, SPECIAL),
    case("isinf", torch.isinf, SPECIAL),
    case("logical not of floats", torch.logical_not, SPECIAL, only="onnxruntime"),
    case("logical not of booleans", torch.logical_not, B),
    case("bitwise not of booleans", torch.bitwise_not, B),
    case("bitwise not of integers", torch.bitwise_not, I),
    case("positive", lambda x: +x, X),
    case("trunc", torch.trunc, X),
    case("log2", torch.log2, P),
    case("exp2", torch.exp2, X),
]

ACTIVATIONS = [
    case("relu6", F.relu6, X),
    case("relu6 of integers", F.relu6, I),
    case("hardtanh", lambda x: F.hardtanh(x, -0.5, 2.0), X),
    case("leaky_relu", lambda x: F.leaky_relu(x, 0.3), X),
    case("silu", F.silu, X),
    case("gelu erf", F.gelu, X),
    case("gelu tanh", lambda x: F.gelu(x, approximate="tanh"), X),
    case("hardsigmoid", F.hardsigmoid, X * 2),
    case("hardswish", F.hardswish, X * 2),
    case("elu", lambda x: F.elu(x, 0.7), X),
    case("selu", F.selu, X),
    case("celu", lambda x: F.celu(x, 0.7), X),
    case("mish", F.mish, X),
    case("softplus", F.softplus, X),
    case("softplus with beta", lambda x: F.softplus(x, beta=2.0), X),
    case("softplus of large numbers", F.softplus, X * 100),
    case("logsigmoid", F.logsigmoid, X),
    case("softsign", F.softsign, X),
    case("glu", lambda x: F.glu(x, dim=-1), X),
    case("glu of the middle", lambda x: F.glu(x, dim=1), floats(2, 6, 4)),
    case("prelu one", torch.nn.PReLU(), X),
    case("prelu per channel", torch.nn.PReLU(3), X),
    case("prelu of rows", torch.nn.PReLU(4), floats(2, 4)),
    case("threshold", lambda x: F.threshold(x, 0.1, 20.0), X),
    case("hardshrink", F.hardshrink, X, exporter=True),
    case("tanhshrink", F.tanhshrink, X),
]

CLAMPS = [
    case("clamp both", lambda x: x.clamp(-1, 0.5), X),
    case("clamp low", lambda x: x.clamp(min=-0.5), X),
    case("clamp high", lambda x: x.clamp(max=0.5), X),
    case("clamp crossed", lambda x: x.clamp(1.0, -1.0), X),
    case("clamp_min", lambda x: torch.clamp_min(x, 0.2), X),
    case("clamp_max", lambda x: torch.clamp_max(x, 0.2), X),
    case("clamp of integers", lambda x: x.clamp(-2, 3), I),
    case("clamp of integers by a float", lambda x: x.clamp(min=0.5), I),
    case("clamp by tensors", lambda x, y: x.clamp(y, y + 1), X, Y),
    case("clamp by one tensor", lambda x, y: x.clamp(max=y), X, Y),
    case("clamp keeps nan", lambda x: x.clamp(-1, 1), SPECIAL, only="onnxruntime"),
]

TWO_INPUTS = [
    case("add broadcast", lambda x, y: x + y, X, floats(2, 1, 4)),
    case("add of a lower rank", lambda x, y: x + y[0], X, floats(3, 4)),
    case("add with alpha", lambda x, y: torch.add(x, y, alpha=2), X, Y),
    case("sub with alpha", lambda x, y: torch.sub(x, y, alpha=0.5), X, Y),
    case("add of booleans", lambda x, y: x + y, B, C),
    case("add of integers and a float", lambda x: x + 1.5, I),
    case("add of integers and floats", lambda x, y: x + y, I, X),
    case("rsub", lambda x: 1.0 - x, X),
    case("rsub with alpha", lambda x: torch.rsub(x, 3, alpha=2), X),
    case("addcmul", lambda x, y, z: torch.addcmul(x, y, z, value=0.5), X, Y, P),
    case("addcdiv", lambda x, y, z: torch.addcdiv(x, y, z, value=0.5), X, Y, P),
    case("mul", lambda x, y: x * y, X, Y),
    case("mul of booleans", lambda x, y: x * y, B, C),
    case("mul of a mask and floats", lambda x, y: (x > 0) * y, X, Y),
    case("div", lambda x, y: x / y, X, P),
    case("div of integers", lambda x, y: x / y, I, J),
    case("div floor of floats", lambda x, y: torch.div(x, y, rounding_mode="floor"), X, P),
    case("div trunc of floats", lambda x, y: torch.div(x, y, rounding_mode="trunc"), X, P),
    case("div floor of integers", lambda x, y: torch.div(x, y, rounding_mode="floor"), I, J),
    case("div trunc of integers", lambda x, y: torch.div(x, y, rounding_mode="trunc"), I, J),
    case("floor division", lambda x: x // 4, I),
    case("floor division by a negative", lambda x: x // -4, I),
    case("floor division of floats", lambda x: x // 0.7, X),
    case("remainder", lambda x, y: x % y, X, Y),
    case("remainder of integers", lambda x, y: torch.remainder(x, y), I, J),
    case("remainder by a negative", lambda x: x % -4, I),
    case("remainder of floats by a number", lambda x: x % 0.75, X),
    case("fmod", lambda x, y: torch.fmod(x, y), X, Y),
    case("pow square", lambda x: x**2, X),
    case("pow cube", lambda x: x**3, X),
    case("pow root", lambda x: x**0.5, P),
    case("pow inverse", lambda x: x**-1, X),
    case("pow of tensors", lambda x, y: x**y, P, X),
    case("pow of a number", lambda x: 2.0**x, X),
    case("pow of integers", lambda x: x**3, I),
    case("pow of integers by a float", lambda x: x**2.0, I),
    case("maximum", torch.maximum, X, Y),
    case("minimum of mixed types", torch.minimum, I, X),
    case("max of two", lambda x, y: torch.max(x, y), I, J),
    case("atan2", torch.atan2, X, Y, exporter=True),
    case("lerp", lambda x, y: torch.lerp(x, y, 0.3), X, Y, exporter=True),
]

COMPARISONS = [
    *(
        case(f"{n} of {kind}", getattr(torch, n), x, y)
        for n in ("eq", "ne", "lt", "le", "gt", "ge")
        for kind, x, y in (
            ("floats", X.round(), Y.round()),
            ("integers", I, J),
            ("booleans", B, C),
            ("mixed", I, Y.round()),
        )
    ),
    case("integers against a float", lambda x: x > 1.5, I),
    case("floats against an integer", lambda x: x >= 1, X.round()),
    case("nan equals nothing", lambda x: x == x, SPECIAL),
    *(
        case(f"logical {n} of {kind}", getattr(torch, f"logical_{n}"), x, y)
        for n in ("and", "or", "xor")
        for kind, x, y in (("booleans", B, C), ("integers", I % 2, J % 2))
    ),
    *(
        case(f"bitwise {n} of {kind}", getattr(torch, f"bitwise_{n}"), x, y)
        for n in ("and", "or", "xor")
        for kind, x, y in (("booleans", B, C), ("integers", I, J))
    ),
    case("operators on masks", lambda x, y: (x & y) | ~x ^ y, B, C),
    case("bitwise and with a number", lambda x: x & 3, I),
    case("bitwise or with a number", lambda x: x | 4, I),
]

CHOICES = [
    case("where", lambda x, y: torch.where(x > 0, x, y), X, Y),
    case("where scalar other", lambda x: torch.where(x > 0, x, 0.5), X),
    case("where scalar self", lambda x: torch.where(x > 0, 0.5, x), X),
    case("where scalars", lambda x: torch.where(x > 0, 1.0, -1.0), X),
    case("where of mixed types", lambda x, y: torch.where(x > 0, x, y), I, Y),
    case("where of booleans", lambda x, y: torch.where(x[:, :1], x, y), B, C),
    case("where broadcast", lambda x, y: torch.where(x[:, :1] > 0, x, y), X, Y),
    case("masked_fill", lambda x, y: x.masked_fill(y > 0, -1e4), X, Y),
    case("masked_fill with infinity", lambda x, y: x.masked_fill(y > 0, float("-inf")), X, Y),
    case("masked_fill by a tensor", lambda x, y: x.masked_fill(y > 0, y.sum()), X, Y),
    case("masked_fill of integers", lambda x, y: x.masked_fill(y > 0, 7), I, Y),
    case("masked_fill of booleans", lambda x, y: x.masked_fill(y, True), B, C),
]

CASTS = [
    *(
        case(f"{str(a.dtype)[6:]} to {str(to)[6:]}", lambda x, to=to: x.to(to), a)
        for a in (X * 3, I, B)
        for to in (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
        if a.dtype != to and not (to == torch.uint8 and a.dtype != torch.bool)
    ),
    case("int8 arithmetic", lambda x: x.to(torch.int8) * 2, I),
    case("type_as", lambda x, y: x.type_as(y), I, X),
    case("float method", lambda x: x.float() + 1, I),
    case("clone, detach and contiguous", lambda x: x.clone().detach().transpose(1, 2).contiguous() + 0, X),
]


TABLES = {
    "one_input": ONE_INPUT,
    "activations": ACTIVATIONS,
    "clamps": CLAMPS,
    "two_inputs": TWO_INPUTS,
    "comparisons": COMPARISONS,
    "choices": CHOICES,
    "casts": CASTS,
}
