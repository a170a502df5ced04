"""Defaults of the kNN and linear evaluation of an encoder's features."""

KS, TEMPERATURE = (10, 20, 100, 200), 0.07  # neighbours, and temperature of their votes: 1805.01978, section 3.4
LRS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)  # learning rates of the linear classifier
