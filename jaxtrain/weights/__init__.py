"""Weights from files that other programs have written, and into such files: formats, names, shapes."""
