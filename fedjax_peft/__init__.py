"""Personalized federated fine-tuning of language models, simulated at accelerator speed."""

__version__ = "0.1.0"
