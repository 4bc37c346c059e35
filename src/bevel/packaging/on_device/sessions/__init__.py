"""How `run.py` runs a file: one runtime each; the one that is needed is copied into it.

Each file has `PACKAGE`, what pip installs, and `Session(path, threads, precision)`, which takes
float32 (1, C, H, W) to the first output's values, and whose `version` is the runtime's.
"""
