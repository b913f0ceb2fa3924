"""Evaluation by torch-fidelity's extractors and formulas."""
