"""Export of trained models: the exported graph, file formats, and comparison with the source."""

SUFFIXES = {
    "onnx": ".onnx", "openvino": ".xml", "torch-export": ".pt2", "torchscript": ".pt", "safetensors": ".safetensors",
}  # fmt: skip
SECOND_FILES = {"onnx": ".onnx.data", "openvino": ".bin"}  # ONNX weights of more than 2 GB, OpenVINO's weights
