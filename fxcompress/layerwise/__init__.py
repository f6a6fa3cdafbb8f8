"""Layer by layer through a program with calibration data: the walk, and what is known of each layer's inputs."""
