"""Read and write the files of a run: checkpoints, logs, scores and images.

All writes are atomic, except for those to logs and to arrays that are still being filled.
"""
