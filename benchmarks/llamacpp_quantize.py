"""llama.cpp's own quantization with an importance matrix; runs inside an interpreter that has llama-cpp-python.

    python llamacpp_quantize.py < request.json

Request: {"source": FILE, "output": FILE, "preset": "Q2_K", "importance": FILE.npz (tensor name -> mean squared input)}.
"""

import ctypes
import json
import sys

import llama_cpp
import numpy as np


def main() -> None:
    request = json.load(sys.stdin)
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = 1
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{request['preset']}")
    parameters.allow_requantize = True
    stored = np.load(request["importance"])
    arrays = {name: np.ascontiguousarray(stored[name], np.float32) for name in stored.files}
    entries = (llama_cpp.llama_model_imatrix_data * (len(arrays) + 1))()  # the last one, all zero, ends the list
    for entry, (name, values) in zip(entries, arrays.items(), strict=False):
        entry.name = name.encode()
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = values.size
    parameters.imatrix = entries
    failed = llama_cpp.llama_model_quantize(request["source"].encode(), request["output"].encode(), parameters)
    if failed:
        sys.exit(f"llama_model_quantize returned {failed}")


if __name__ == "__main__":
    main()
