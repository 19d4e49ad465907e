"""Messages and stubs of `proto/` for Python programs that talk to a server, or are one."""

import importlib
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc


def generate_stubs(proto: Path):
    """The modules of messages and of stubs, generated into a temporary folder."""
    folder = tempfile.mkdtemp(prefix="midemb-stubs-")
    arguments = ["protoc", f"-I{proto}", f"--python_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main([*arguments, "midemb/v1/midemb.proto"]) != 0:
        sys.exit("the stubs could not be generated")
    sys.path.insert(0, folder)
    return importlib.import_module("midemb.v1.midemb_pb2"), importlib.import_module("midemb.v1.midemb_pb2_grpc")
