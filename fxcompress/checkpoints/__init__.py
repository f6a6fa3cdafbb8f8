"""Checkpoints of quantized language models that serving engines load: safetensors and ``config.json``, no pickle."""
