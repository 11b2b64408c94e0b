"""PyTorch layers for predicting sets."""

__version__ = "0.1.0"
