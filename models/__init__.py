"""The networks: ConvNeXt V1 and V2, the masked autoencoder, where tokens lie, and weight files."""
