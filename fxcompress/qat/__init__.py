"""Quantization-aware training: fake-quantizers that train, layers that fold their norm, the program that holds them."""
