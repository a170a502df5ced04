"""Export of trained models: the exported graph, the file formats, and the comparison with the source."""

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "torchscript": ".pt", "safetensors": ".safetensors"}
