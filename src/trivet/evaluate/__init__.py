"""Evaluation: metrics, and base against tuned with paired bootstrap intervals."""
