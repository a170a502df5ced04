"""Models: ConvNeXt V1 and V2, the masked autoencoder, their layouts and kernels, and weight files."""
