"""Scales for quantized key-value caches of decoders: found in the graph, observed, written for serving engines."""
