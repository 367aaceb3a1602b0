"""Optuna's studies: trials with leases, storage, samplers."""
