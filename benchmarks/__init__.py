"""Benchmarks of fxcompress: one script per claim, the peers in the same run.

Run each with ``python -m benchmarks.<name> [--quick] [--peers-only]`` from the checkout; the numbers go to
``benchmarks/results/<claim>.json`` together with the environment they were measured in.
"""
