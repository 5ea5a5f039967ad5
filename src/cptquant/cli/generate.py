"""`cptquant generate`."""

from typing import Annotated

import typer

from cptquant.cli import options

_Prompt = Annotated[str, typer.Option("--prompt", help="Text to continue.", show_default=False)]
_Engine = Annotated[str, typer.Option("--engine", help="transformers, onnx, llamacpp or torch.")]
_Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Most tokens to add.")]


def generate(
    run_folder: options.RunFolder,
    prompt: _Prompt,
    engine: _Engine = "transformers",
    tokens: _Tokens = 64,
    threads: options.Threads = 1,
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt with a run's files in an engine, taking the most likely token each time."""
    import json

    from cptquant.stages.generate import generate_text

    text = generate_text(run_folder, prompt, engine, tokens=tokens, threads=threads)
    print(json.dumps({"prompt": prompt, "continuation": text}, ensure_ascii=False) if as_json else prompt + text)
