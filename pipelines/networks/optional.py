"""Optional packages, imported when a node runs, and ONNX networks."""

from __future__ import annotations

from typing import Any

from ..shared.errors import IdentityEditError, first_line


def import_optional(module: str, package: str, what: str) -> Any:
    """Import a module of an optional package.

    Raises:
        IdentityEditError: when it cannot be imported.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise IdentityEditError(
            f"{what} needs the package {package.split()[-1]}, which cannot be imported ({first_line(error)}); run "
            f"`pip install {package}`, or choose another."
        ) from error


def onnx_session(path: str) -> Any:
    """An ONNX session on the CPU.

    Raises:
        IdentityEditError: when onnxruntime is missing, or cannot load the file.
    """
    onnxruntime = import_optional("onnxruntime", "onnxruntime", path)
    try:
        return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's exceptions have no common base
        raise IdentityEditError(f"{path} cannot be loaded ({first_line(error)}); download it again.") from error
