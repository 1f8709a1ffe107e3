"""Pico models of the supported families, built locally, and a tokenizer of bytes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels on CPU tensors; read when a kernel is defined

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from clla.modeling import rotary_clla

torch.set_num_threads(1)  # pico models gain nothing from more, and two runs side by side would block each other

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 260,
    "max_position_embeddings": 1024,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"
HALF_SLIDING: dict[str, Any] = {"sliding_window": 24, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
FAMILY_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
    "llama-mha": ("llama", {"num_key_value_heads": 4, "attention_bias": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "mixtral": ("mixtral", {"sliding_window": None, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", {}),
    "qwen2-sliding": ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 32}),
    "gemma2": ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, **HALF_SLIDING}),
    "gemma3_text": ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, **HALF_SLIDING}),
    "phi3": ("phi3", {"sliding_window": None}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1, 0]}),
    "olmo2": ("olmo2", {}),
    "granite": ("granite", {"logits_scaling": 2.0, "attention_multiplier": 0.3}),
    "gpt_neox": ("gpt_neox", {"rotary_pct": 0.25}),
    "gpt2": ("gpt2", {"n_positions": 1024}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}),
    "falcon": ("falcon", {"multi_query": True, "parallel_attn": True}),
    "falcon-alibi": ("falcon", {"multi_query": False, "alibi": True, "bias": True}),
}  # fmt: skip
# Not in the table of `clla.source.families`: converted because their attention is of the standard form.
OTHER_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "apertus": ("apertus", {}),
    "bamba": ("bamba", {"attn_layer_indices": [1, 3], "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16,
                        "mamba_chunk_size": 16}),
    "bloom": ("bloom", {}),
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {**HALF_SLIDING}),
    "diffllama": ("diffllama", {}),
    "ernie4_5": ("ernie4_5", {"head_dim": 16}),
    "exaone4": ("exaone4", {**HALF_SLIDING}),
    "gemma": ("gemma", {"head_dim": 16}),
    "gemma3n_text": ("gemma3n_text", {"num_hidden_layers": 6, "sliding_window": 24, "layer_types": [SLIDING, FULL] * 3,
                                      "head_dim": 16, "hidden_size_per_layer_input": 16, "laurel_rank": 8,
                                      "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 2,
                                      "activation_sparsity_pattern": None}),
    "gemma4_text": ("gemma4_text", {"num_hidden_layers": 6, "sliding_window": 24, "layer_types": [SLIDING, FULL] * 3,
                                    "head_dim": 16, "global_head_dim": 32, "hidden_size_per_layer_input": 16,
                                    "vocab_size_per_layer_input": 260, "num_kv_shared_layers": 2}),
    "glm": ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "glm4_moe": ("glm4_moe", {"head_dim": 16, "moe_intermediate_size": 32, "n_routed_experts": 4,
                              "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}),
    "gpt_bigcode": ("gpt_bigcode", {}),
    "gpt_oss": ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, **HALF_SLIDING}),
    "granitemoehybrid": ("granitemoehybrid", {"layer_types": [LINEAR, FULL, LINEAR, FULL], "num_local_experts": 4,
                                              "num_experts_per_tok": 2, "mamba_n_heads": 8, "mamba_d_head": 16,
                                              "mamba_d_state": 16, "mamba_chunk_size": 16}),
    "helium": ("helium", {"head_dim": 16}),
    "lfm2": ("lfm2", {"layer_types": ["conv", FULL, "conv", FULL]}),
    "llama4_text": ("llama4_text", {"layer_types": ["chunked_attention", FULL] * 2, "attention_chunk_size": 24,
                                    "no_rope_layers": [1, 0, 1, 0], "head_dim": 16, "num_local_experts": 4,
                                    "intermediate_size_mlp": 96}),
    "ministral": ("ministral", {"head_dim": 16, **HALF_SLIDING}),
    "modernbert-decoder": ("modernbert-decoder", {"local_attention": 24, "layer_types": [SLIDING, FULL] * 2}),
    "mpt": ("mpt", {}),
    "nemotron": ("nemotron", {}),
    "nemotron_h": ("nemotron_h", {"layer_types": [LINEAR, FULL, "mlp", FULL], "head_dim": 16, "mamba_num_heads": 8,
                                  "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 1}),
    "olmo3": ("olmo3", {**HALF_SLIDING}),
    "olmo_hybrid": ("olmo_hybrid", {"layer_types": [LINEAR, FULL, LINEAR, FULL]}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "persimmon": ("persimmon", {}),
    "phi": ("phi", {"partial_rotary_factor": 0.5}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
                                "shared_expert_intermediate_size": 32}),
    "qwen3_next": ("qwen3_next", {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
                                  "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
                                  "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
                                  "linear_value_head_dim": 16, "layer_types": [LINEAR, FULL, LINEAR, FULL]}),
    "qwen3_5_text": ("qwen3_5_text", {"head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
                                      "linear_key_head_dim": 16, "linear_value_head_dim": 16,
                                      "layer_types": [LINEAR, FULL, LINEAR, FULL]}),
    "seed_oss": ("seed_oss", {"head_dim": 16}),
    "stablelm": ("stablelm", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "xglm": ("xglm", {"ffn_dim": 96}),
}  # fmt: skip
# No grouped heads.
OWN_HEADS = ("bloom", "falcon", "gpt2", "gpt_neox", "modernbert-decoder", "mpt", "opt", "persimmon", "xglm")


def pico_config(kind: str, *, without: Sequence[str] = (), **extra: Any) -> Any:
    """Config of a tiny model of some kind, without the sizes that it has no use for."""
    left_out = {*without, *(["num_key_value_heads"] if kind in OWN_HEADS else [])}
    sizes = {k: v for k, v in SIZES.items() if k not in left_out}
    return AutoConfig.for_model(kind, **{**sizes, **extra})


def pico(name: str = "llama", seed: int = 0) -> PreTrainedModel:
    """A tiny random model in fp32 whose attention is not uniform."""
    kind, extra = {**FAMILY_CONFIGS, **OTHER_CONFIGS}[name]
    return pico_of(pico_config(kind, **extra), seed)


def pico_of(config: Any, seed: int = 0) -> PreTrainedModel:
    """The same, of a config."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0 if "embed" in key else 3.0)
            elif "bias" in key:
                parameter.normal_(std=0.3)
    model.config.architectures = [type(model).__name__]
    return model.float().eval().requires_grad_(False)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(alphabet)}
    for token in ("<s>", "</s>", "<pad>"):
        vocab[token] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="left"
    )


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-models", action="store_true", help="write docs/models.md from what is found")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--write-models"):
        from model_table import TABLE

        TABLE.writing = True


USUAL_BUCKET = rotary_clla.LONGEST_BUCKET


@pytest.fixture(autouse=True)
def exact_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every old token is read with its own rotation, so that results can be compared to the last digit."""
    monkeypatch.setattr(rotary_clla, "LONGEST_BUCKET", 1)


@pytest.fixture
def usual_rotations(exact_rotations: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Old tokens are read as in processes that a test starts: as users have it."""
    monkeypatch.setattr(rotary_clla, "LONGEST_BUCKET", USUAL_BUCKET)


@pytest.fixture(scope="session")
def kernel_device() -> str:
    """Where kernels run: on the CPU by Triton's interpreter, on a GPU with TRITON_INTERPRET=0."""
    return "cuda" if os.environ["TRITON_INTERPRET"] == "0" else "cpu"


@pytest.fixture
def bf16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of kernels right in bf16, too: Triton's interpreter takes the bits of bf16 for integers."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def numbers(x: Any) -> np.ndarray:
        if x.dtype.scalar.is_bf16():
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data.astype(np.float32)

    def product(builder: Any, a: Any, b: Any, start: Any, *options: Any) -> Any:
        found = np.matmul(numbers(a), numbers(b)) + start.data
        return interpreter.TensorHandle(found, start.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", product)


@pytest.fixture(scope="session")
def pico_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama pico saved as an ordinary checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "pico-llama"
    pico().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 60,000 characters of varied lines."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    generator = torch.Generator().manual_seed(0)
    words = ["lake", "stone", "the", "a", "under", "runs", "cold", "light", "of", "mill", "seven", "Ada", "was"]
    lines = []
    for _ in range(1200):
        picks = torch.randint(len(words), (10,), generator=generator).tolist()
        lines.append(" ".join(words[i] for i in picks) + ".")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(pico_dir: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The llama pico, converted to a small budget, so that there is something to heal."""
    from helpers import clla

    folder = tmp_path_factory.mktemp("checkpoint") / "converted"
    options = ["--dataset", text_file, "--calibration-tokens", 2048, "--sequence-length", 128, "--exact-window", 8]
    done = clla("convert", pico_dir, "-o", folder, *options, "--kv-budget", "1.5%", "--budget-context", 0, "--no-eval")
    assert done.exit_code == 0, done.output + done.stderr
    return folder
