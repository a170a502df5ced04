"""FCMAE pretraining."""
