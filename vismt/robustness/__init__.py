"""Attacks, corruptions and the evaluation of any classifier under them. torchattacks is imported when an attack runs."""
