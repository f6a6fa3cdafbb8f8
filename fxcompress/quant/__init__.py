"""What the quantization passes share: integer grids (`spec`) and their ranges from data (`observers`) and weights."""
