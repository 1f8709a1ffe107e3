"""A converted model: the source model of any supported family, running on a compressed cache.

The source's own modeling code does the computing. This wrapper cuts long inputs into chunks, tells the
cache which positions come, and hands it to the source, whose attention layers store and fetch their
keys and values there. Full logits of a forward pass are therefore those of inference.

Shape legend: B sequences, T tokens, n = 2·H_kv·d, h hidden size, r rank of a group, G its layers.
"""

import copy
import inspect
from functools import partial
from types import SimpleNamespace
from typing import Any, Optional

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

from .cache_clla import CllaCache
from .chunks_clla import Chunks, cut, joined
from .configuration_clla import CllaConfig
from .group_clla import reading_tokens
from .hooks_clla import CACHE, attention_modules, decoder_of, has_bias_table, position_slots, rope_of, skips_padding
from .observe_clla import LISTENER, PREFIX, is_observed, listening, observed
from .placement_clla import STRATEGIES, beside_layers, device_map_of, of_source
from .quantize_clla import tensor_digest

CODEC_FILE = "clla_codec.safetensors"
HUB_KEYWORDS = ("revision", "subfolder", "token", "cache_dir", "force_download", "local_files_only")
CACHES = (None, "dynamic", "static")  # of transformers' `cache_implementation`
OUTPUTS = ("output_hidden_states", "output_attentions")  # that a config may ask for
SETTINGS = ("use_cache", "return_dict", *OUTPUTS)  # of a config, that are given to `from_pretrained`
NO_CHECKPOINTING = (
    "a converted model cannot be trained with gradient checkpointing, which computes layers a second time when the "
    "cache has moved on: leave gradient_checkpointing out, call model.source.gradient_checkpointing_disable(), and "
    "save memory by shorter sequences, a smaller batch, or `clla heal --gradient-checkpointing`"
)
SAME_MODEL = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")  # of two configs


class GroupCodecModule(nn.Module):
    """Encoder [r, n·G or h] with its offset, decoder [G, n, r] with its mean, of one layer group.

    Where keys are decoupled also the encoder [p, h] and mean [p] of its rotary key, and how each key-value head's
    queries answer it, [G, H, p/2, 2].
    """

    def __init__(self, layers: int, inputs: int, values: int, rank: int, heads: int = 0, rotary: int = 0) -> None:
        super().__init__()
        self.encoder = nn.Parameter(torch.zeros(rank, inputs))
        self.offset = nn.Parameter(torch.zeros(inputs))
        self.decoder = nn.Parameter(torch.zeros(layers, values, rank))
        self.mean = nn.Parameter(torch.zeros(layers, values))
        if rotary:
            self.rope_encoder = nn.Parameter(torch.zeros(rotary, inputs))
            self.rope_mean = nn.Parameter(torch.zeros(rotary))
            self.rope_query = nn.Parameter(torch.zeros(layers, heads, rotary // 2, 2))

    def forward(self) -> SimpleNamespace:
        """The matrices. Where they are offloaded, hooks bring them for this call alone, so they are taken from it."""
        return SimpleNamespace(**dict(self.named_parameters()))


class CodecModule(nn.Module):
    """The codecs of all layer groups, in the plan's order."""

    def __init__(self, config: CllaConfig) -> None:
        super().__init__()
        spec, groups = config.spec, []
        values = 2 * spec.heads * spec.head_dim
        for group in spec.groups:
            layers = len(group.layers)
            inputs = config.text_config.hidden_size if spec.from_first else values * layers
            groups.append(GroupCodecModule(layers, inputs, values, group.rank, spec.heads, group.rotary_width))
        self.groups = nn.ModuleList(groups)


class CllaForCausalLM(PreTrainedModel, GenerationMixin):
    """Causal language model with Cross-Layer Latent Attention, converted from `config.text_config`."""

    config_class = CllaConfig
    base_model_prefix = "source"
    supports_gradient_checkpointing = False  # recomputation would see a cache that has moved on
    _auto_class = "AutoModelForCausalLM"
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: CllaConfig) -> None:
        super().__init__(config)
        self.source = _empty_source(config)
        self.codec = CodecModule(config)
        self._no_split_modules = [*(self.source._no_split_modules or ()), GroupCodecModule.__name__]
        self.loss_type = self.source.loss_type
        self.prefill_chunk = config.spec.prefill_chunk
        self.position_slots = position_slots(self.source)  # of learned positions; None where any number is computed
        self.skips_padding = skips_padding(self.source)
        self.padding_takes_positions = has_bias_table(self.source)
        self.rotation_bucket: Optional[int] = None  # old tokens that are read with one rotation (see `CllaCache`)
        self.attend_top_k: Optional[int] = None  # old tokens that new ones read in full (see `CllaCache`)
        self._hooks: "list[Any]" = []
        self.watch_source()
        self.post_init()

    def watch_source(self) -> None:
        """Show the cache what it needs: the attention over it, the inputs of the first layers (`first` source)."""
        own = self.source.config._attn_implementation
        if own in AttentionInterface() and not is_observed(own):
            self.source.set_attn_implementation(observed(own))
        elif not is_observed(own) and self.config.spec.decoupled:
            observed(own)  # says why it cannot
        self.watch_decoder()
        if self.config.spec.from_first:
            attention = attention_modules(self.source)
            self._hooks += [
                attention[group.layers[0]].register_forward_pre_hook(self._show_input_to_cache, with_kwargs=True)
                for group in self.config.spec.groups
            ]

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """As in transformers.

        Raises:
            ValueError: the implementation brings a cache of its own.
        """
        _refuse_paged(attn_implementation)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        self.watch_source()

    def watch_decoder(self) -> None:
        """Have the source's decoder cut long inputs into chunks."""
        self.release_source()
        decoder = decoder_of(self.source)
        self._hooks = [
            decoder.register_forward_pre_hook(cut, with_kwargs=True),
            decoder.register_forward_hook(joined, with_kwargs=True),
        ]

    def release_source(self) -> None:
        """Leave the source as it was, for a conversion that is not needed any longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _show_input_to_cache(self, module: Any, args: "tuple[Any, ...]", kwargs: "dict[str, Any]") -> None:
        # Families name the cache differently (`past_key_values`, `layer_past`). One source may carry several
        # conversions: only the cache made for this one listens, or for a replica of it (of DataParallel).
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, CllaCache)]
        for cache in (cache for cache in caches if cache.config is self.config):
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            cache.group_of_layer[module.layer_idx].observe(hidden)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As in transformers; a codec-only checkpoint takes its weights from `config.base_model`.

        Raises:
            ValueError: the codec does not have the checksum that the config names.
        """
        path = pretrained_model_name_or_path
        where = {k: v for k, v in kwargs.items() if k in HUB_KEYWORDS}
        if isinstance(config, CllaConfig):
            config = copy.deepcopy(config)
        else:  # a path, or an object of another copy of this code
            named = config is not None and not isinstance(config, PreTrainedConfig)
            config = CllaConfig.from_pretrained(config if named else path, **where)
        for name in (name for name in SETTINGS if name in kwargs):
            setattr(config, name, kwargs.pop(name))
        dtype = kwargs.pop("torch_dtype", None)  # an older name
        kwargs["dtype"] = dtype = kwargs.get("dtype") or dtype or config.dtype
        device_map = kwargs.get("device_map")
        if config.base_model is None:
            if isinstance(device_map, str) and device_map in STRATEGIES:
                dtype = config.dtype if dtype == "auto" else dtype
                dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
                with torch.device("meta"):
                    shape = cls(copy.deepcopy(config))
                kwargs["device_map"] = device_map_of(shape, device_map, kwargs.get("max_memory"), dtype)
            loaded: Any = super().from_pretrained(path, *model_args, config=config, **kwargs)
            whole = loaded[0] if isinstance(loaded, tuple) else loaded
            whole.generation_config = for_compressed_cache(whole.generation_config)
            return loaded
        codec = load_file(str(cached_file(path, CODEC_FILE, **where)))
        if tensor_digest(codec) != config.spec.codec_sha256:
            raise ValueError(f"{CODEC_FILE} in {path} is damaged: its checksum does not match; copy it again")
        unfit = (
            "revision",
            "subfolder",
            "code_revision",
            "_commit_hash",
            "state_dict",
        )  # they speak of the codec's files
        kwargs = {k: v for k, v in kwargs.items() if k not in unfit}
        if isinstance(device_map, dict):
            kwargs["device_map"] = of_source(device_map)
        gguf_file = config.base_model.get("gguf_file")
        if gguf_file:
            kwargs["gguf_file"] = gguf_file
            if hasattr(transformers, "GgufConfig"):
                kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if config.base_model.get("hub_revision"):
            kwargs["revision"] = config.base_model["hub_revision"]
        try:
            loaded = AutoModelForCausalLM.from_pretrained(config.base_model["path"], **kwargs)
        except OSError as error:
            raise ValueError(
                f"this checkpoint holds the codec alone and its base model {config.base_model['path']!r} cannot be "
                f"opened: put it there again, or set base_model.path in config.json to a directory or Hub id ({error})"
            ) from error
        source, *info = loaded if isinstance(loaded, tuple) else (loaded,)
        for name in SAME_MODEL:
            wanted, found = getattr(config.text_config, name), getattr(source.config, name)
            if wanted != found:
                raise ValueError(
                    f"the base model {config.base_model['path']!r} has {name} {found}, the codec was made for {wanted}"
                )
        with torch.device("meta"):
            model = cls(config)
        model.source = source
        model.codec.load_state_dict(codec, assign=True)
        model.codec.to(dtype=source.dtype)
        if hasattr(source, "hf_device_map"):
            homes: Any = beside_layers(model, source.hf_device_map)
            model.hf_device_map = homes
            for i, group in enumerate(model.codec.groups):
                group.to(homes[f"codec.groups.{i}"])
        else:
            model.codec.to(source.device)
        model.watch_source()
        model.generation_config = for_compressed_cache(GenerationConfig.from_pretrained(path, **where))
        return (model.eval(), *info) if info else model.eval()

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: Any,
        is_main_process: bool = True,
        state_dict: "Optional[dict[str, Tensor]]" = None,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the weights are written whole, also those of a codec-only checkpoint."""
        own = self.codec_tensors() if state_dict is None else state_dict
        codec = {name.removeprefix("codec."): v for name, v in own.items() if name.startswith("codec.")}
        self.config.clla["codec_sha256"] = tensor_digest(codec)
        self.config.base_model = None
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def codec_tensors(self) -> "dict[str, Tensor]":
        """The codec's tensors on the CPU, by their names in a state dict, wherever they are."""
        return {
            f"codec.groups.{i}.{name}": matrix.detach().cpu().contiguous()
            for i, group in enumerate(self.codec.groups)
            for name, matrix in vars(group()).items()
        }

    def new_cache(self, max_cache_len: Optional[int] = None) -> CllaCache:
        """An empty compressed cache for one batch of sequences.

        Args:
            max_cache_len: allocate for this number of tokens at once (see `CllaCache`); None to grow as tokens come.
        """
        own = self.source.config._attn_implementation
        if is_observed(own):  # in this process it is not registered yet, where another one pickled the model
            observed(own.removeprefix(PREFIX))
        rope = rope_of(self.source, self.config.spec.rope)
        return CllaCache(self.config, self.codec, rope, max_cache_len, self.attend_top_k, self.rotation_bucket)

    @property
    def reading_tokens(self) -> int:
        """So many tokens of one call, or fewer, read latents instead of decoded keys and values."""
        spec = self.config.spec
        return reading_tokens(spec.heads, spec.head_dim, self.config.text_config.num_attention_heads)

    def get_input_embeddings(self) -> nn.Module:
        return self.source.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.source.set_input_embeddings(value)

    def get_output_embeddings(self) -> Optional[nn.Module]:
        return self.source.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.source.set_output_embeddings(value)

    def set_decoder(self, decoder: nn.Module) -> None:
        self.source.set_decoder(decoder)
        self.watch_source()

    def resize_token_embeddings(
        self, new_num_tokens: Optional[int] = None, pad_to_multiple_of: Optional[int] = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers, by the source, which knows what is tied; a checkpoint saved afterwards is whole."""
        embeddings = self.source.resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self.config.text_config.vocab_size = self.source.config.get_text_config().vocab_size
        return embeddings

    # The source computes the loss. What Trainer asks a model about it is answered as the source would.

    @property
    def accepts_loss_kwargs(self) -> bool:
        """Whether `num_items_in_batch` and the like reach the loss."""
        parameters = inspect.signature(self.source.forward).parameters.values()
        return getattr(self.source, "accepts_loss_kwargs", any(p.kind == p.VAR_KEYWORD for p in parameters))

    @property
    def loss_function(self) -> Any:
        return self.source.loss_function

    @loss_function.setter
    def loss_function(self, value: Any) -> None:
        self.source.loss_function = value

    def _get_name(self) -> str:
        """The source's: by this name, and nothing else, Trainer knows that label smoothing has to shift labels."""
        return self.source._get_name() if hasattr(self, "source") else type(self).__name__

    # What is not for a compiler: cutting into chunks, bookkeeping, encoding what leaves the window. The source's own
    # forward pass is compiled by itself, and of a cache with a `max_cache_len` always the same.
    @torch.compiler.disable(recursive=False)
    def forward(
        self,
        input_ids: Optional[Tensor] = None,
        attention_mask: Optional[Tensor] = None,
        position_ids: Optional[Tensor] = None,
        past_key_values: Optional[CllaCache] = None,
        inputs_embeds: Optional[Tensor] = None,
        labels: Optional[Tensor] = None,
        use_cache: Optional[bool] = None,
        logits_to_keep: "int | Tensor" = 0,
        return_dict: Optional[bool] = None,
        cache: Optional[CllaCache] = None,
        **kwargs: Any,
    ) -> "CausalLMOutputWithPast | tuple[Any, ...]":
        """Run the source through the compressed cache, chunk by chunk.

        Args:
            input_ids: [B, T]; or `inputs_embeds` [B, T, h].
            attention_mask: [B, past + T], zeros at padding; None for no padding but that of earlier calls.
            position_ids: [B, T].
            past_key_values: what an earlier call returned; a new one when None. transformers from 5.24 on call it
                `cache`; both names are understood.
            labels: [B, T], for the loss.
            use_cache: False only means that the cache is not returned.
            logits_to_keep: number of last positions whose logits are wanted (0: all), or their indices.
            return_dict: False gives a tuple.
            cache: the other name of `past_key_values`.
            kwargs: whatever else the source takes: what its loss takes, `output_hidden_states`, `output_router_logits`,
                …; tensors [B, T, …] among them are cut into chunks, too.

        Returns:
            What the source returns, as of one forward pass: the loss, logits, the cache, and, where asked for, hidden
            states [B, T, h], attention weights [B, H, T, S] and the like.

        Raises:
            ValueError: two caches, or one of another class or model; an attention mask that is not two-dimensional;
                gradient checkpointing; an output that is asked for cannot be joined over chunks; more tokens than the
                source has positions for.
        """
        inputs = input_ids if input_ids is not None else inputs_embeds
        if inputs is None or (input_ids is not None and inputs_embeds is not None):
            raise ValueError("exactly one of input_ids and inputs_embeds is expected")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one thing; pass one of them")
        cache = cache if cache is not None else past_key_values
        cache = self.new_cache() if cache is None else cache
        self._check_cache(cache)
        self._refuse_recomputation(given=cache.get_seq_length() > 0)
        if not is_observed(self.source.config._attn_implementation):  # it may have changed since the last call
            cache.unsee()
        if attention_mask is not None and not (isinstance(attention_mask, Tensor) and attention_mask.dim() == 2):
            raise ValueError("attention_mask must be [batch, tokens]; other masks cannot be cut into chunks")
        past, count = cache.get_seq_length(), inputs.shape[1]
        cache.check(inputs.shape[0], count, position_ids, attention_mask)
        if attention_mask is None:
            attention_mask = cache.timeline.unpadded(count, inputs.device)
        if position_ids is None:
            position_ids = torch.arange(past, past + count, device=inputs.device)[None]
            if self.skips_padding and attention_mask is not None:
                position_ids = _without_padding(position_ids, attention_mask.to(inputs.device).bool())
        position_ids = position_ids.expand(inputs.shape[0], -1)
        if self.position_slots is not None and past + count > self.position_slots:
            self._check_length(past + count if self.padding_takes_positions else int(position_ids.max()) + 1)

        begin = partial(_begin, cache, position_ids, attention_mask, past)
        call = {
            "input_ids" if input_ids is not None else "inputs_embeds": inputs,
            CACHE: cache,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "labels": labels,
            "use_cache": True,
            "logits_to_keep": logits_to_keep,
            "return_dict": True,
            **{name: True for name in OUTPUTS if getattr(self.config, name)},
            **kwargs,
        }
        with cache.forward_pass(), listening(cache):
            if count <= self.prefill_chunk:
                output = self.source(**{**call, **begin(0, count)})
            else:
                spans = [(i, min(i + self.prefill_chunk, count)) for i in range(0, count, self.prefill_chunk)]
                cuts = labels is None and "logits_to_keep" in inspect.signature(self.source.forward).parameters
                keep = _kept_from(count, logits_to_keep) if cuts else 0
                with Chunks(cache, spans, begin, cache.end, keep).running():
                    output = self.source(**call)
        wanted = self.config.use_cache if use_cache is None else use_cache
        result = type(output)(**{**output, CACHE: cache if wanted else None})
        return result if (self.config.return_dict if return_dict is None else return_dict) else result.to_tuple()

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Not for converted models.

        Raises:
            ValueError: always.
        """
        raise ValueError(NO_CHECKPOINTING)

    @torch.compiler.disable
    def _refuse_recomputation(self, given: bool) -> None:
        """A layer that is computed again, in the backward pass, finds a cache that has moved on, or none."""
        checkpointing = (torch.is_grad_enabled() or self.training) and any(
            module.training and getattr(module, "gradient_checkpointing", False) for module in self.source.modules()
        )
        # No public function tells whether a backward pass is running; torch's own checkpointing asks this one.
        if checkpointing or (given and torch._C._current_graph_task_id() != -1):
            raise ValueError(NO_CHECKPOINTING)

    def _check_length(self, tokens: int) -> None:
        """Refuse more tokens than the source has positions for, which it would fail at with an index error.

        Raises:
            ValueError: there are more.
        """
        if self.position_slots is not None and tokens > self.position_slots:
            raise ValueError(
                f"{tokens} tokens, prompt and new ones together, are more than the {self.position_slots} that this "
                "model has positions for: shorten the prompt, or lower max_new_tokens"
            )

    @staticmethod
    def create_masks_for_generate(
        config: Any, inputs_embeds: Tensor, attention_mask: Optional[Tensor], **_: Any
    ) -> Any:
        """`generate` would make masks of static caches by itself: here the cache knows what is to be masked."""
        return attention_mask

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: "dict[str, Any]", *args: Any, **kwargs: Any
    ) -> None:
        """Give `generate` the compressed cache (versions differ in the parameters that follow).

        Raises:
            ValueError: another kind of cache is asked for, or was passed; layers are to be left out; there are more
                tokens than positions.
        """
        if getattr(generation_config, "assistant_early_exit", None) is not None:
            raise ValueError(
                "assistant_early_exit leaves out layers, whose keys and values the compressed cache needs: pass a "
                "small model as assistant_model, or prompt_lookup_num_tokens"
            )
        mask, length = model_kwargs.get("attention_mask"), generation_config.max_length
        if self.position_slots is not None and length is not None and length > self.position_slots:
            padding = 0 if mask is None or self.padding_takes_positions else int((mask == 0).sum(-1).min())
            self._check_length(length - padding)
        wanted, given = generation_config.cache_implementation, model_kwargs.get(CACHE)
        if wanted not in CACHES or generation_config.cache_config is not None:
            raise ValueError(
                f"cache_implementation={wanted!r} with cache_config={generation_config.cache_config} is not for "
                "converted models: leave them out, the compressed cache is used by itself, or pass 'static' to "
                "allocate it whole"
            )
        if given is not None:
            self._check_cache(given)
            if wanted is not None:
                raise ValueError("cache_implementation says how a cache is made, but one is passed: leave out either")
        elif generation_config.use_cache is not False:
            length = None
            if wanted == "static":
                length = max(generation_config.max_length, getattr(generation_config, "max_cache_len", None) or 0)
            model_kwargs[CACHE] = self.new_cache(length)

    def _check_cache(self, cache: Any) -> None:
        if not isinstance(cache, CllaCache):
            raise ValueError(f"the cache is a {type(cache).__name__}; pass None or model.new_cache()")
        if cache.codec is not self.codec:
            raise ValueError("the cache was made by another model; pass None or model.new_cache() of this one")

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Not for converted models: it brings a paged cache of keys and values.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "continuous batching brings a paged cache of its own, converted models have theirs: call generate() "
            "without cache_implementation='paged', or serve the checkpoint with vLLM (docs/serving.md)"
        )


def for_compressed_cache(generation_config: Any) -> Any:
    """A source's generation config without what it says about its cache, some of it a remainder of training."""
    own = copy.deepcopy(generation_config)
    own.use_cache = own.cache_config = own.prefill_chunk_size = None
    if own.cache_implementation not in CACHES:
        own.cache_implementation = None
    return own


def _without_padding(slots: Tensor, mask: Tensor) -> Tensor:
    """Positions [B, T] of the newest slots [1, T], tokens that the mask [B, S] hides not counted."""
    seen = mask.long().cumsum(-1)
    straight = (slots - (seen == 0).sum(-1, keepdim=True)).clamp(min=0)
    count = slots.shape[1]
    return torch.where(mask[:, -count:], seen[:, -count:] - 1, straight)


@torch.compiler.disable
def _begin(
    cache: CllaCache, position_ids: Tensor, attention_mask: Optional[Tensor], past: int, start: int, stop: int
) -> "dict[str, Any]":
    """Announce a chunk to the cache; the keywords that it needs."""
    mask = None if attention_mask is None else attention_mask[:, : past + stop]
    cache.begin(position_ids[:, start:stop], mask)
    # A compiler cannot follow the context; models that a static cache is for hand keywords to their attention.
    listener = {LISTENER: cache} if cache.is_compileable and cache.reading else {}
    return {"attention_mask": None if cache.maskless else mask, **listener}


def _empty_source(config: CllaConfig) -> Any:
    """The source model without its weights; sdpa is what transformers asks for where the user asked for nothing."""
    wanted = config._attn_implementation
    _refuse_paged(wanted)
    own = copy.deepcopy(config.text_config)  # it may be that of a loaded model, whose attention is not to change
    try:
        return AutoModelForCausalLM.from_config(own, attn_implementation=wanted)
    except ValueError:
        if wanted != "sdpa":
            raise
        return AutoModelForCausalLM.from_config(own, attn_implementation="eager")


def _refuse_paged(implementation: Any) -> None:
    if "paged" in str(implementation):
        raise ValueError(
            f"attn_implementation={implementation!r} reads a paged cache of its own, converted models have theirs: "
            "use 'sdpa' or 'eager', or serve the checkpoint with vLLM"
        )


def _kept_from(count: int, logits_to_keep: "int | Tensor") -> int:
    """First position whose logits are wanted."""
    if isinstance(logits_to_keep, Tensor) or logits_to_keep == 0:
        return 0
    return max(0, count - logits_to_keep)
