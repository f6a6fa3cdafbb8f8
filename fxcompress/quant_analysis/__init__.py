"""What quantization does to a program, layer by layer: measured, explained, and written for people."""
