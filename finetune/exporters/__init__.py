"""Export of trained models: the exported graph, file formats, and comparison with the source."""

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "safetensors": ".safetensors"}
