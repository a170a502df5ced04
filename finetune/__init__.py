"""Supervised fine-tuning of a pretrained encoder, as a dense model."""
