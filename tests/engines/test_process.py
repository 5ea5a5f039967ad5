"""How an engine's process is found, and what is said when it fails; needs no engine."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cptquant.core.errors import EngineError, MissingEngineError
from cptquant.engines import llamacpp_python, worker
from cptquant.engines.llamacpp_python import PYTHON_VARIABLE, find_llamacpp
from cptquant.engines.process import _WORKER, run_engine


def script(path: Path, content: str) -> str:
    path.write_text(f"#!/bin/sh\n{content}\n")
    path.chmod(0o755)
    return str(path)


def test_no_engine_is_a_missing_one(monkeypatch):
    monkeypatch.delenv(PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(llamacpp_python, "find_spec", lambda name: None)
    with pytest.raises(MissingEngineError, match=r"^llama-cpp-python is not installed; pip install 'cptquant\[llama"):
        find_llamacpp()
    with pytest.raises(MissingEngineError, match="or point CPTQUANT_LLAMACPP_PYTHON at a Python that has"):
        run_engine("llamacpp", Path("model.gguf"), "fill")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"=.*python is no program that runs; name a Python that has llama-cpp-python, or unset it$"),
        (
            "exit 3",
            r"=.*python: llama-cpp-python cannot be imported there \(it ends with code 3 and no message\); name",
        ),
        ("echo 'ModuleNotFoundError: no numpy' >&2; exit 1", r"imported there \(ModuleNotFoundError: no numpy\); name"),
        ("echo False 0.3.36", r"imported there \(its Python is older than 3\.11\); name a Python of 3\.11 or newer"),
        ("echo True 0.2.90", r"=.*python has llama-cpp-python 0\.2\.90, 0\.3\.9 or newer is needed; upgrade it there$"),
    ],
)
def test_a_python_that_cannot_run_it_is_named_with_its_variable(content, message, monkeypatch, tmp_path):
    python = str(tmp_path / "python") if content is None else script(tmp_path / "python", content)
    monkeypatch.setenv(PYTHON_VARIABLE, python)
    with pytest.raises(EngineError, match=f"^{PYTHON_VARIABLE}.*{message}") as caught:
        run_engine("llamacpp", Path("model.gguf"), "fill")
    assert not isinstance(caught.value, MissingEngineError) and python in str(caught.value)
    assert caught.value.exit_code == 2


def test_this_interpreter_without_the_package_is_refused_where_the_variable_names_it(monkeypatch):
    if llamacpp_python.find_spec("llama_cpp") is not None:
        pytest.skip("llama-cpp-python is installed here")
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    with pytest.raises(EngineError, match=r"No module named 'llama_cpp'\); name a Python of 3\.11 or newer"):
        find_llamacpp()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "echo 'bad magic' >&2; exit 7",
            r"^the onnx engine ended with code 7 while loading m \(bad magic\); is the file whole\? Write it again",
        ),
        (
            'touch "${4%.json}.loaded"; echo "OSError: no" >&2; exit 1',
            r"^the onnx engine ended with code 1 after loading m, in its request 'speed' \(OSError: no\)$",
        ),
        (
            'touch "${4%.json}.loaded"; kill -SEGV $$',
            r"^the onnx engine was ended by SIGSEGV after loading m, in its request 'speed' \(no message\)$",
        ),
    ],
)
def test_an_end_without_an_answer_says_how_and_when(content, message, monkeypatch, tmp_path):
    monkeypatch.setattr("cptquant.engines.process.sys.executable", script(tmp_path / "python", content))
    with pytest.raises(EngineError, match=message):
        run_engine("onnx", Path("m"), "speed")


class Failing:
    task, context, version = "causal_lm", 8, "engine 1.2"

    def extend(self, ids, every=False):
        raise RuntimeError("decode returned -3")


def test_a_failure_while_running_carries_its_type_and_text(monkeypatch, tmp_path):
    monkeypatch.setattr(worker, "open_engine", lambda name, threads, **_: lambda file, context: Failing())
    request = {"engine": "x", "threads": 1, "do": "fill", "model": "m"}
    expected = r"^engine 1\.2 loaded m and failed in the request 'fill': RuntimeError: decode returned -3$"
    with pytest.raises(EngineError, match=expected):
        worker.run_request(request, tmp_path / "loaded")
    assert (tmp_path / "loaded").exists()
    with pytest.raises(EngineError, match=r"failed in the request 'nonsense': KeyError: 'nonsense'"):
        worker.run_request({**request, "do": "nonsense"}, tmp_path / "loaded")
    with pytest.raises(EngineError, match="the engine onnx has no tokenizer of its own"):
        worker.run_request({**request, "do": "tokenize", "engine": "onnx", "texts": []}, tmp_path / "loaded")


def test_a_missing_engine_stays_one_across_the_process(monkeypatch, tmp_path):
    answer = '{"error": "ONNX Runtime is not installed", "missing": true}'
    monkeypatch.setattr("cptquant.engines.process.sys.executable", script(tmp_path / "python", f"echo '{answer}' > $4"))
    with pytest.raises(MissingEngineError, match=r"^ONNX Runtime is not installed$"):
        run_engine("onnx", Path("m"), "fill")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, "glibc.malloc.hugetlb=1"),
        ("glibc.malloc.check=1", "glibc.malloc.check=1:glibc.malloc.hugetlb=1"),
        ("glibc.malloc.hugetlb=2", "glibc.malloc.hugetlb=2"),
    ],
)
def test_large_pages_leave_a_persons_choice_alone(given, expected, monkeypatch, tmp_path):
    if given is None:
        monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    else:
        monkeypatch.setenv("GLIBC_TUNABLES", given)
    told = script(tmp_path / "python", """printf '{"told": "%s"}' "$GLIBC_TUNABLES" > $4""")
    monkeypatch.setattr("cptquant.engines.process.sys.executable", told)
    assert run_engine("onnx", Path("m"), "fill")["told"] == expected


def test_another_interpreter_keeps_its_own_packages_first(monkeypatch, tmp_path):
    """A module of its own called like one of ours: its own is taken, and cptquant is found all the same."""
    (tmp_path / "numpy_like.py").write_text("WHERE = 'its own'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    package = tmp_path / "site"
    (package / "cptquant" / "engines").mkdir(parents=True)
    (package / "numpy_like.py").write_text("WHERE = 'ours'")
    for folder in (package / "cptquant", package / "cptquant" / "engines"):
        (folder / "__init__.py").touch()
    (package / "cptquant" / "engines" / "worker.py").write_text(
        "import json, numpy_like\n"
        "def main(asked, answer): open(answer, 'w').write(json.dumps({'at': numpy_like.WHERE}))"
    )
    answer = tmp_path / "answer.json"
    subprocess.run([sys.executable, "-S", "-c", _WORKER, str(package), "asked", str(answer)], check=True)
    assert json.loads(answer.read_text()) == {"at": "its own"}


def test_a_full_temporary_folder_is_named(monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    with pytest.raises(EngineError, match=r"^the temporary folder .* takes no files \(No space left on device\); free"):
        run_engine("onnx", Path("m"), "fill")
