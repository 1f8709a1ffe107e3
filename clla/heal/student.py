"""Teacher and student on a whole sequence in parallel, the student differentiable through its quantizer.

With the `group` source a latent needs the keys and values of layers that lie above, so old tokens' latents are made
from the teacher's keys and values. With the `first` source they come from the student's own inputs. Rounding passes
the gradient straight through (Bengio et al., arXiv 1308.3432).

Shape legend: B sequences, T tokens, H key-value heads, d head dim, n = 2·H·d, h hidden size, G layers of a group.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from clla.errors import UnsupportedModelError
from clla.heal.attention import View, mixed_attention
from clla.heal.losses import chunked_kl, kl_of_logits
from clla.modeling.absorbed_clla import decoded_rows, rotary_key, split_query, with_unread
from clla.modeling.cache_clla import CllaCache
from clla.modeling.codec_clla import before_rope, decode, encode
from clla.modeling.hooks_clla import CACHE, attention_modules, logits_head, rope_of
from clla.modeling.modeling_clla import CllaForCausalLM, GroupCodecModule
from clla.modeling.observe_clla import is_observed, listen, listening, observed
from clla.modeling.quantize_clla import JoinedLayout, RowLayout, layout_of
from clla.modeling.rotary_clla import Rotation
from clla.source.placement import decoder_layers
from clla.source.recording import RecordingCache

T = TypeVar("T")


@dataclass(frozen=True)
class GroupOnSequence:
    """One layer group, for a whole sequence at once.

    Attributes:
        layers: model layer indices.
        codec: the group's, trained.
        layout: of its packed rows.
        heads: H.
        rope_pairs: of the rotary key; empty where keys are decoded whole.
    """

    layers: tuple[int, ...]
    codec: GroupCodecModule
    layout: RowLayout | JoinedLayout
    heads: int
    rope_pairs: tuple[int, ...] = ()

    def encode_kv(self, kv: dict[int, tuple[Tensor, Tensor]], rotation: Rotation | None) -> Tensor:
        """Latents of the group's keys after RoPE and values, by layer as `RecordingCache` notes them."""
        layers = {layer: torch.cat(kv[layer], dim=1) for layer in self.layers}
        return self.encode(before_rope(layers, rotation, self.heads), rotation)

    def encode(self, inputs: Tensor, rotation: Rotation | None) -> Tensor:
        """Latents [B, T, r] of inputs [B, T, n·G or h], rounded as the cache would hold them; rotary keys behind."""
        latents = encode(inputs, self.codec)
        if self.rope_pairs:
            assert rotation is not None
            latents = torch.cat((latents, rotary_key(inputs, self.codec, self.rope_pairs, rotation)), dim=-1)
        return latents + (self.layout.rounded(latents.detach()) - latents.detach())

    def decode(
        self, latents: Tensor, layer: int, rotation: Rotation | None, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys after RoPE and values [B, H, T, d] of one layer."""
        index = self.layers.index(layer)
        both = decode(latents, self.codec, index, rotation, self.heads, dtype, layer=layer)
        return both[:, : self.heads], both[:, self.heads :]

    def attend(
        self,
        latents: Tensor,
        layer: int,
        query: Tensor,
        exact: tuple[Tensor, Tensor],
        rotation: Rotation | None,
        view: View,
        scaling: float,
    ) -> Tensor:
        """Attention [B, T, H_q, d] of one layer.

        Args:
            latents: from `encode`.
            layer: of the model.
            query: [B, H_q, T, d], after RoPE.
            exact: keys after RoPE and values, [B, H, T, d] each; decoupled keys do without.
            rotation: to the positions.
            view: which tokens are seen exactly.
            scaling: of the logits.
        """
        if not self.rope_pairs:
            decoded = self.decode(latents, layer, rotation, exact[0].dtype)
            return mixed_attention(query, exact, decoded, view, scaling)
        assert rotation is not None
        index, rank = self.layers.index(layer), latents.shape[-1] - 2 * len(self.rope_pairs)
        turn = None if layer in rotation.plain_layers else rotation
        parts = split_query(query, self.codec, index, self.rope_pairs, turn, rotation)
        keys, values = decoded_rows(latents, self.codec, index, self.heads, rank, query.dtype)
        out = nn.functional.scaled_dot_product_attention(
            torch.cat(parts, dim=-1), keys, values, is_causal=True, scale=scaling,
            enable_gqa=keys.shape[1] != query.shape[1],
        )  # fmt: skip
        return with_unread(out[..., : query.shape[-1]].transpose(1, 2), *exact)


class SequenceCache(RecordingCache):
    """What the student's attention reads in one parallel forward pass. Keeps nothing.

    Args:
        config: the model's.
        groups: all layer groups.
        latents: by group number, as far as they are known before the pass.
        rotation: to the positions; None without.
        view: what each token sees exactly.
    """

    def __init__(
        self,
        config: Any,
        groups: list[GroupOnSequence],
        latents: dict[int, Tensor],
        rotation: Rotation | None,
        view: View,
    ) -> None:
        super().__init__(config, set())
        self.group_of = {layer: number for number, group in enumerate(groups) for layer in group.layers}
        self.groups, self.latents, self.rotation, self.view = groups, latents, rotation, view
        self.attended: set[int] = set()

    def observe(self, layer: int, hidden: Tensor) -> None:
        """Take the attention input [B, T, h] of a group's first layer (`first` source)."""
        number = self.group_of[layer]
        self.latents[number] = self.groups[number].encode(hidden, self.rotation)

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        if layer_idx not in self.group_of:
            return plain()
        self.attended.add(layer_idx)
        number = self.group_of[layer_idx]
        return self.groups[number].attend(
            self.latents[number], layer_idx, query, (key, value), self.rotation, self.view, scaling
        )


def trainable_copy(model: PreTrainedModel, train: str) -> PreTrainedModel:
    """A copy whose trained weights are its own, in fp32; it shares every other tensor with the model.

    Args:
        model: the source; not changed.
        train: `codec` (no weight), `attention` (those of the attention modules) or `all`.
    """
    if train == "all":
        trained = {id(p) for p in model.parameters()}
    else:
        modules = attention_modules(model).values() if train == "attention" else []
        trained = {id(p) for module in modules for p in module.parameters()}
    shared = {id(t): t for t in (*model.parameters(), *model.buffers()) if id(t) not in trained}
    twin = copy.deepcopy(model, dict(shared))
    for parameter in twin.parameters():
        if id(parameter) not in shared:
            parameter.data = parameter.data.float()  # a step of 1e-4 is lost in bf16
            parameter.requires_grad_(True)
    return twin


def make_student(converted: CllaForCausalLM, train: str) -> CllaForCausalLM:
    """A converted model to train: its codec, and what `train` names of its weights, are copies in fp32.

    Args:
        converted: where training starts; not changed.
        train: as in `trainable_copy`.
    """
    with torch.device("meta"):
        student = CllaForCausalLM(copy.deepcopy(converted.config))  # type: ignore[arg-type]
    converted.release_source()  # its hooks would be copied with the modules, and itself with them
    student.source = trainable_copy(converted.source, train)
    converted.watch_source()
    student.codec = copy.deepcopy(converted.codec).float().requires_grad_(True)
    student.prefill_chunk = converted.prefill_chunk
    student.watch_source()
    student.generation_config = converted.generation_config
    return student


class Distiller(nn.Module):
    """Teacher and student side by side; a forward pass gives the loss.

    Args:
        teacher: the source model, frozen.
        student: from `make_student`.
    """

    def __init__(self, teacher: PreTrainedModel, student: CllaForCausalLM) -> None:
        super().__init__()
        self.teacher, self.student = teacher, student
        spec = student.config.spec
        self.first = spec.from_first
        self.groups = [
            GroupOnSequence(
                group.layers,
                module,  # type: ignore[arg-type]
                layout_of(group),
                spec.heads,
                group.rope_pairs,
            )
            for group, module in zip(spec.groups, student.codec.groups, strict=True)
        ]
        self.layers = {layer for group in self.groups for layer in group.layers}
        self.rope = rope_of(student.source, spec.rope)
        source = student.source
        observe(source)
        self.attention = attention_modules(source)
        if self.first:
            for group in self.groups:
                self.attention[group.layers[0]].register_forward_pre_hook(_show_input, with_kwargs=True)
        self.teacher_head, self.student_head = logits_head(teacher), logits_head(source)

    def forward(
        self,
        input_ids: Tensor,
        view: View | None = None,
        cache: CllaCache | None = None,
        teacher_hidden: Tensor | None = None,
        start: int = 0,
    ) -> Tensor:
        """Mean KL to the teacher, nats per token.

        Args:
            input_ids: [B, T] whole sequences; with a cache the next tokens of them.
            view: what each token sees exactly; for whole sequences.
            cache: the student's own, in use.
            teacher_hidden: [B, T, h] of the tokens, with a cache.
            start: position of the first token, with a cache.
        """
        if cache is not None:
            assert teacher_hidden is not None
            return self._on_cache(input_ids, cache, teacher_hidden, start)
        assert view is not None
        hidden, kv = self.teach(input_ids, with_kv=not self.first)
        own = self.run_student(input_ids, kv, view)
        return chunked_kl(own.flatten(0, 1), hidden.flatten(0, 1), self.student_head, self.teacher_head)

    def gathered(self, compute: Callable[[], T]) -> T:
        """Run what reads teacher or student outside `forward`: of sharded ones the tensors are whole within it."""
        return compute()

    @torch.no_grad()
    def teach(self, input_ids: Tensor, *, with_kv: bool) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]]]:
        """The teacher's final hidden states [B, T, h], and its keys after RoPE and values by layer where wanted."""
        cache = RecordingCache(self.teacher.config, self.layers if with_kv else set())
        return hidden_states(self.teacher, input_ids, cache), cache.kv

    def run_student(self, input_ids: Tensor, kv: dict[int, tuple[Tensor, Tensor]], view: View) -> Tensor:
        """The student's final hidden states [B, T, h]."""
        rotation = self.rotation(input_ids)
        latents = {} if self.first else {i: g.encode_kv(kv, rotation) for i, g in enumerate(self.groups)}
        cache = SequenceCache(self.student.source.config, self.groups, latents, rotation, view)
        # On the modules rather than around the call, since checkpointed layers run once more in the backward pass.
        listen(self.attention.values(), cache)
        hidden = hidden_states(self.student.source, input_ids, cache)
        if cache.attended != cache.group_of.keys():
            raise _unobserved(self.student.source)
        return hidden

    def release(self) -> None:
        """After the backward pass of a whole sequence: the attention is the model's own again."""
        listen(self.attention.values(), None)

    def rotation(self, input_ids: Tensor) -> Rotation | None:
        """The rotation to the positions of whole sequences."""
        if self.rope is None:
            return None
        return self.rope(torch.arange(input_ids.shape[1], device=input_ids.device)[None])

    def _on_cache(self, input_ids: Tensor, cache: CllaCache, teacher_hidden: Tensor, start: int) -> Tensor:
        positions = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)[None]
        logits = self.student(input_ids, position_ids=positions, **{CACHE: cache}).logits
        loss = kl_of_logits(logits, self.teacher_head(teacher_hidden)) / input_ids.numel()
        # Encoders get no gradient here, and decoders none from the first tokens; data-parallel training waits for all.
        return loss + 0.0 * sum(p.sum() for p in self.student.codec.parameters())


class _AttendedLayers(RecordingCache):
    """Notes the layers whose attention can be replaced."""

    def __init__(self, config: Any) -> None:
        super().__init__(config, set())
        self.found: set[int] = set()

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, plain: Callable[[], Tensor]
    ) -> Tensor:
        self.found.add(layer_idx)
        return plain()


def observe(model: PreTrainedModel) -> None:
    """Switch a model to the observed twin of its attention.

    Raises:
        UnsupportedModelError: it has none.
    """
    own = model.config._attn_implementation
    if own == "eager":  # chosen where sdpa lacks something, such as a soft cap
        raise _unobserved(model)
    if not is_observed(own):
        model.set_attn_implementation(observed("sdpa"))


@torch.no_grad()
def check_attention(model: PreTrainedModel, layers: Iterable[int]) -> None:
    """Refuse a model that healing cannot train, by two tokens and before anything is measured.

    Args:
        model: the source.
        layers: that share latents.

    Raises:
        UnsupportedModelError: the attention of one of them cannot be replaced.
    """
    observe(model)
    cache = _AttendedLayers(model.config)
    with listening(cache):
        hidden_states(model, torch.zeros((1, 2), dtype=torch.long, device=model.device), cache)
    if not cache.found.issuperset(layers):
        raise _unobserved(model)


def _unobserved(model: PreTrainedModel) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} computes its attention in a way that healing cannot take part in",
        expected="a model whose attention goes through transformers' AttentionInterface and can be 'sdpa'",
        remedy="convert it without healing",
    )


def hidden_states(model: PreTrainedModel, input_ids: Tensor, cache: Cache) -> Tensor:
    """Final hidden states [B, T, h] of a model, through a cache that keeps nothing."""
    base: Any = model.base_model
    if base is model:  # it is known by the name that it has within a larger model, as with Llama 4
        base = model.get_submodule(decoder_layers(model)[0].rpartition(".")[0])
    return base(input_ids=input_ids, use_cache=True, **{CACHE: cache}).last_hidden_state


def _show_input(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    cache = getattr(module, "clla_listener", None)
    if cache is not None:
        cache.observe(module.layer_idx, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])
