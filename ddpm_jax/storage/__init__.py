"""Files: a run's folder, checkpoints, logs and pictures, each of which appears whole or not at all."""
