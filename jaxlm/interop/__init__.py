"""Weights of other libraries: Hugging Face directories in and out, safetensors only."""

from jaxlm.interop.hugging_face import export_run, import_run
from jaxlm.interop.read import load_params
from jaxlm.interop.write import save_params

__all__ = ["export_run", "import_run", "load_params", "save_params"]
