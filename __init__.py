"""Prune a trained CNN, export it, build engines and measure whether it really became faster."""

__version__ = "0.1.0"
