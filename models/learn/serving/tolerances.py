"""How far ONNX Runtime and the server may differ from PyTorch; the server checks golden vectors with these bounds."""

# The largest absolute difference per value, and the smallest cosine per vector.
ABSOLUTE = 1e-4
COSINE = 0.99999
