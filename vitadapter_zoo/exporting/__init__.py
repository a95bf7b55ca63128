"""Detectors as files for other runtimes: ONNX, OpenVINO, torch.export and AOTInductor."""
