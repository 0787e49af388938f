"""Read and write the files of a run: checkpoints, logs, scores and images. All writes are atomic."""
