"""Unstructured and N:M sparsity: masks for the weights of any module or program, with or without calibration data."""
