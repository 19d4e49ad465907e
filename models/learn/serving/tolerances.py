"""How far ONNX Runtime and the server may be off PyTorch; the server checks golden vectors with the same bounds."""

# Of one value, and of the cosine of one vector.
ABSOLUTE = 1e-4
COSINE = 0.99999
