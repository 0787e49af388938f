"""Read and write the files of a run: checkpoints, logs, scores and images.

Logs, and arrays that are filled piece by piece, are not written atomically. All other writes are atomic.
"""
