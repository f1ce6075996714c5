"""Measurements that anyone can repeat: ``python -m benchmarks NAME``. Results are CSV files in ``results/``."""
