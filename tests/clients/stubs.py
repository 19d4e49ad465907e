"""Generates messages and stubs from `proto/` for Python clients and servers."""

import importlib
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc


def generate_stubs(proto: Path):
    """Returns the module of messages and the module of stubs. Their files are gone once they are loaded."""
    with tempfile.TemporaryDirectory(prefix="midemb-stubs-") as folder:
        arguments = ["protoc", f"-I{proto}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
        if protoc.main([*arguments, "midemb/v1/midemb.proto"]) != 0:
            sys.exit("the stubs could not be generated")
        sys.path.insert(0, folder)
        try:
            return importlib.import_module("midemb.v1.midemb_pb2"), importlib.import_module("midemb.v1.midemb_pb2_grpc")
        finally:
            sys.path.remove(folder)
