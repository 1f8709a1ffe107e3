"""Configuration of a converted model: the source's config and the plan of its shared latents."""

from transformers import AutoConfig, PreTrainedConfig

from .spec_clla import CacheSpec

CLLA_SCHEMA_VERSION = 1


class CllaConfig(PreTrainedConfig):
    """Config of a Cross-Layer Latent Attention model (arXiv 2410.15252) converted from `text_config`.

    Args:
        text_config: the source model's config (object or dict with `model_type`).
        clla: schema version, plan (layer groups, tier bits, window, sinks, latent source), rope layout,
            storage dtype of exact keys and values, prefill chunk, and the codec's checksum.
        base_model: where the source weights are, for a codec-only checkpoint.
        use_cache: whether a forward pass returns its cache unless told otherwise.

    Raises:
        ValueError: the checkpoint was written by a newer version.
    """

    model_type = "clla"
    _auto_class = "AutoConfig"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 - as the base class has it
    has_no_defaults_at_init = True

    def __init__(self, text_config=None, clla=None, base_model=None, use_cache=True, **kwargs):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        version = (clla or {}).get("schema_version", CLLA_SCHEMA_VERSION)
        if not isinstance(version, int) or version > CLLA_SCHEMA_VERSION:
            raise ValueError(
                f"this checkpoint was written with clla schema {version}, this code reads up to "
                f"{CLLA_SCHEMA_VERSION}: upgrade with pip install -U clla, or pass trust_remote_code=True"
            )
        self.clla = clla
        self.base_model = base_model
        if text_config is not None:
            for name in ("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings"):
                kwargs.setdefault(name, getattr(text_config, name, None))
        super().__init__(**kwargs)
        self.use_cache = use_cache  # of its own: the source's may be a remainder of its training
        # Last, because the base class validates what `__getattr__` finds (see `validate`).
        self.text_config = text_config

    @property
    def spec(self) -> CacheSpec:
        """The `clla` block, typed."""
        return CacheSpec.of(self.clla)

    def validate(self):
        """Before saving: the base class would judge what `__getattr__` finds by rules that are not the family's."""

    def __getattr__(self, name):
        # Tools that know nothing of nested configs ask for num_hidden_layers and the like.
        text_config = self.__dict__.get("text_config")
        if text_config is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(text_config, name)
