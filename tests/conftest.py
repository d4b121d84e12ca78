"""What the tests share: no network, the real model, and tiny random ones."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")  # what is compared to the bit is a CPU's
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two workers beside each other: threads would fight
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.append(str(Path(__file__).resolve().parent / "bench"))  # last: its sapo.py is not ours

import pytest
import torch
import transformers
from smollm2 import smollm2_folder

pytest.register_assert_rewrite("helpers")  # or a failure there would not say what differed
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
VARIANTS: dict[str, dict[str, Any]] = {  # what differs from TINY, by name; the family comes first
    "llama": {},
    "llama-gqa-untied": {"num_key_value_heads": 2},
    "llama-gqa-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "llama-head-dim": {"num_key_value_heads": 1, "head_dim": 16},
    "llama-biases": {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
    "llama-rope-llama3": {"num_key_value_heads": 2, "rope_parameters": LLAMA3},
    "llama-rope-linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.5}
    },
    "mistral-window": {"num_key_value_heads": 2, "sliding_window": 7},
    "mistral-no-window": {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 12},
    "qwen2": {"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "qwen2-window": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 1,
    },
    "qwen2-layer-types": {
        "num_key_value_heads": 2,
        "use_sliding_window": True,
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}


def tiny(kind: str, seed: int = 0, **changes: Any) -> Any:
    """transformers' model of a variant, with random weights large enough to matter."""
    config = transformers.AutoConfig.for_model(
        kind.split("-")[0], **TINY | VARIANTS[kind] | changes
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval()


@pytest.fixture
def tiny_checkpoint(tmp_path: Path) -> Callable[..., tuple[Path, Any]]:
    """`tiny_checkpoint(kind, **config)` writes a random checkpoint: (its folder, the HF model)."""

    def make(kind: str, seed: int = 0, **changes: Any) -> tuple[Path, Any]:
        model = tiny(kind, seed, **changes)
        folder = tmp_path / kind
        model.save_pretrained(folder)
        return folder, model

    return make


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as an ordinary Hugging Face folder."""
    return smollm2_folder()
