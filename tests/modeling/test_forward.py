"""What a forward pass of a converted model returns: losses, gradients and outputs, over chunks as of one pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import pico
from conversions import TOLERANCE, full_rank, lossy, source_and_stats
from helpers import converted_of, plan_of, stats_of, tokens
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, Trainer, TrainingArguments

from clla.modeling.chunks_clla import Chunks
from clla.modeling.hooks_clla import CACHE
from clla.modeling.modeling_clla import CllaForCausalLM

MIXTURES = ("mixtral", "qwen2_moe", "olmoe", "gpt_oss")  # their losses come with one of their routers


def eager_pair() -> tuple[PreTrainedModel, CllaForCausalLM]:
    """A source that computes attention weights, with sliding layers, and its conversion at full rank."""
    model = pico("qwen2-sliding")
    model.set_attn_implementation("eager")
    stats = stats_of(model)
    converted = converted_of(model, plan_of(stats, model), stats)
    converted.set_attn_implementation("eager")
    return model, converted


def same(found: Any, expected: Any) -> None:
    """The same fields in the same order, but for the cache, with the same numbers."""
    assert list(found) == list(expected)
    for name in found:
        if name != CACHE:
            torch.testing.assert_close(
                found[name], expected[name], **TOLERANCE, msg=lambda text, n=name: f"{n}: {text}"
            )


LABELS = tokens(2, 60, seed=5)
LABELS[0, :11] = -100
LABELS[1, 30:37] = 7


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_items_in_batch": 31},
        {"num_items_in_batch": torch.tensor(31)},
        {"shift_labels": LABELS.roll(3, 1)},
        {"ignore_index": 7},
        {"logits_to_keep": 0, "return_dict": False},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_losses_are_the_sources(options: dict[str, Any]) -> None:
    """Over three chunks; whatever the source's loss takes reaches it."""
    model, _ = source_and_stats("llama")
    labels = LABELS.where(LABELS >= 0, 7) if "ignore_index" in options else LABELS
    call = {"input_ids": tokens(2, 60), "labels": labels, **options}
    with torch.no_grad():
        found, expected = full_rank()(**call), model(**call)
    if isinstance(expected, tuple):
        assert len(found) == len(expected)
        torch.testing.assert_close(found[:2], expected[:2], **TOLERANCE)
    else:
        same(found, expected)


@pytest.mark.parametrize("name", MIXTURES)
def test_losses_of_routers_are_the_sources(name: str) -> None:
    model, _ = source_and_stats(name)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[1, :9] = 0
    call: dict[str, Any] = {"input_ids": tokens(2, 60), "labels": LABELS, "attention_mask": mask}
    call |= {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "output_router_logits": True}
    with torch.no_grad():
        found, expected = full_rank(name)(**call), model(**call)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss, **TOLERANCE)
    torch.testing.assert_close(found.loss, expected.loss, **TOLERANCE)
    assert found.loss > full_rank(name)(**{**call, "output_router_logits": False}).loss
    assert [x.shape for x in found.router_logits] == [x.shape for x in expected.router_logits]


def test_gradients_are_the_sources() -> None:
    ids = tokens(2, 20)
    gradients = []
    for model in (
        pico(),
        converted_of(pico(), plan_of(source_and_stats("llama")[1], pico()), source_and_stats("llama")[1]),
    ):
        source = getattr(model, "source", model).requires_grad_(True)
        model(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in source.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, **TOLERANCE)


def trained_loss(model: Any, folder: Any, *, own_loss: bool = False, **options: Any) -> dict[str, float]:
    """Losses of one step, and of an evaluation, as Trainer reports them."""
    arguments = TrainingArguments(
        str(folder),
        max_steps=1,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        use_cpu=True,
        seed=0,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        learning_rate=0.0,
        **options,
    )
    rows = [{"input_ids": x, "labels": x} for x in tokens(8, 40)]

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        total = torch.nn.functional.cross_entropy(
            outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
        )
        return total / (num_items_in_batch or labels[:, 1:].numel())

    trainer = Trainer(
        model.requires_grad_(True),
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_loss_func=loss if own_loss else None,
    )
    trainer.train()
    found = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    return {"loss": found["loss"], "grad_norm": found["grad_norm"], **{"eval": trainer.evaluate()["eval_loss"]}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 4},
        {"gradient_accumulation_steps": 2, "label_smoothing_factor": 0.3},
        {"gradient_accumulation_steps": 2, "own_loss": True},
    ],
    ids=["accumulated", "smoothed", "own loss"],
)
def test_trainer_reports_the_sources_losses(options: dict[str, Any], tmp_path: Any) -> None:
    _, stats = source_and_stats("llama")
    model = pico()
    converted = converted_of(pico(), plan_of(stats, model, window=64), stats, prefill_chunk=64)
    expected, found = (trained_loss(x, tmp_path, **options) for x in (model, converted))
    assert found == pytest.approx(expected, rel=2e-3)


def test_whether_losses_take_keywords_is_the_sources_answer() -> None:
    converted = full_rank()
    assert converted.accepts_loss_kwargs is True
    converted.source.accepts_loss_kwargs = False
    try:
        assert converted.accepts_loss_kwargs is False
    finally:
        del converted.source.accepts_loss_kwargs


@pytest.mark.parametrize("source", ["group", "first"])
def test_replicas_compute_the_same(source: str) -> None:
    """Several GPUs without a launcher: `Trainer` then uses DataParallel, whose replicas hold tensors, no parameters."""
    converted, ids = full_rank(source=source), tokens(2, 60)
    replicas = {module: module._replicate_for_data_parallel() for module in converted.modules()}
    for module, replica in replicas.items():
        for name, child in module.named_children():
            setattr(replica, name, replicas[child])
        for name, tensor in {**module._parameters, **module._buffers}.items():
            replica.__dict__[name] = None if tensor is None else tensor.detach().clone()
    with torch.no_grad():
        assert torch.equal(replicas[converted](ids).logits, converted(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
def test_positions_that_a_source_counts_from_its_mask(side: str) -> None:
    """OPT leaves padding out where it is told no positions; other families do not."""
    ids = tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, slice(11) if side == "left" else slice(-11, None)] = 0
    model, converted = source_and_stats("opt")[0], full_rank("opt")
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits[mask.bool()]
        for kind in (torch.long, torch.bool, torch.float32):
            found = converted(ids, attention_mask=mask.to(kind)).logits[mask.bool()]
            torch.testing.assert_close(found, expected, **TOLERANCE)
        mask[:, 30] = 0
        with pytest.raises(ValueError, match="position_ids jump"):
            converted(ids, attention_mask=mask)


# Gradient checkpointing


@pytest.mark.parametrize("part", ["model", "source", "layer"])
def test_gradient_checkpointing_is_refused(part: str) -> None:
    _, stats = source_and_stats("llama")
    converted = converted_of(pico(), plan_of(stats, pico()), stats).train().requires_grad_(True)
    ids = tokens(1, 20)
    if part == "model":
        with pytest.raises(ValueError, match="cannot be trained with gradient checkpointing"):
            converted.gradient_checkpointing_enable()
        return
    if part == "source":
        converted.source.gradient_checkpointing_enable()
    else:
        converted.source.model.layers[1].gradient_checkpointing = True
    with pytest.raises(ValueError, match="gradient_checkpointing_disable"):
        converted(ids, labels=ids)
    assert converted.eval()(ids, labels=ids).loss.isfinite(), "it does nothing there"
    converted.train().source.gradient_checkpointing_disable()
    if part == "source":
        assert converted(ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_call_computed_again_is_right_or_refused(reentrant: bool) -> None:
    """A cache made within the call is made again; one that was passed has moved on."""
    converted = full_rank().requires_grad_(True)
    try:
        embeddings = converted.get_input_embeddings()(tokens(1, 50)).detach().requires_grad_(True)
        (expected,) = torch.autograd.grad(converted(inputs_embeds=embeddings).logits.square().mean(), embeddings)
        again = checkpoint(lambda x: converted(inputs_embeds=x).logits, embeddings, use_reentrant=reentrant)
        again.square().mean().backward()
        torch.testing.assert_close(embeddings.grad, expected)
        cache = converted.new_cache()
        converted(tokens(1, 9), past_key_values=cache)
        again = checkpoint(
            lambda x: converted(inputs_embeds=x, past_key_values=cache).logits, embeddings, use_reentrant=reentrant
        )
        with pytest.raises(ValueError, match="gradient checkpointing"):
            again.square().mean().backward()
    finally:
        converted.requires_grad_(False)


def test_a_layer_computed_again_is_refused() -> None:
    _, stats = source_and_stats("llama")
    converted = converted_of(pico(), plan_of(stats, pico()), stats).requires_grad_(True)
    layer = converted.source.model.layers[1]
    own = layer.forward
    layer.forward = lambda *args, **kwargs: checkpoint(own, *args, use_reentrant=False, **kwargs)
    loss = converted(tokens(1, 20), labels=tokens(1, 20)).loss
    with pytest.raises(ValueError, match="outside of a forward pass"):
        loss.backward()


# Outputs over chunks


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0, 1, 30, torch.tensor([0, 33, 59])], ids=str)
@pytest.mark.parametrize("by_config", [False, True], ids=["asked", "by config"])
def test_outputs_over_chunks_are_those_of_one_pass(keep: Any, by_config: bool) -> None:
    model, converted = eager_pair()
    call: dict[str, Any] = {"input_ids": tokens(2, 60), "logits_to_keep": keep}
    asked = {"output_hidden_states": True, "output_attentions": True}
    if by_config:
        converted.config.output_hidden_states = converted.config.output_attentions = True
    with torch.no_grad():
        same(converted(**call) if by_config else converted(**call, **asked), model(**call, **asked))
        if isinstance(keep, int):  # a second turn, over two more chunks
            call["input_ids"] = tokens(2, 40, seed=3)
            first = [x(tokens(2, 60), use_cache=True) for x in (converted, model)]
            caches = [{CACHE: output[CACHE]} for output in first]
            same(*(x(**call, **asked, **c) for x, c in zip((converted, model), caches, strict=True)))


def test_tuples_have_the_sources_order() -> None:
    model, converted = eager_pair()
    call: dict[str, Any] = {"input_ids": tokens(1, 60), "labels": tokens(1, 60), "output_attentions": True}
    with torch.no_grad():
        found, expected = (x(**call, output_hidden_states=True, return_dict=False) for x in (converted, model))
    assert [type(x) for x in found if type(x).__name__ != "CllaCache"] == [
        type(x) for x in expected if type(x).__name__ != "DynamicCache"
    ]
    assert [len(x) for x in found[3:]] == [len(x) for x in expected[3:]]
    with torch.no_grad():
        converted.config.return_dict = False
        assert isinstance(converted(tokens(1, 60)), tuple)


def test_generate_returns_the_states_of_the_whole_prompt() -> None:
    model, converted = eager_pair()
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}
    options |= {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
    found, expected = (x.generate(tokens(2, 60), **options, output_logits=True) for x in (converted, model))
    for name in ("hidden_states", "attentions", "logits"):
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE)


def test_what_cannot_be_joined_is_refused() -> None:
    chunks = Chunks(None, [(0, 3), (3, 5)], lambda *_: {}, lambda: None, 0)
    chunks._parts = [{"last_hidden_state": torch.zeros(2, size, 4), "odd": torch.zeros(7)} for size in (3, 2)]
    with pytest.raises(ValueError, match="odd of this model cannot be joined over chunks: pass at most 3"):
        chunks._joined("odd")


def test_tensors_along_the_tokens_are_cut() -> None:
    model, _ = source_and_stats("gpt2")
    call = {"input_ids": tokens(2, 60), "token_type_ids": tokens(2, 60, seed=8)}
    with torch.no_grad():
        torch.testing.assert_close(full_rank("gpt2")(**call).logits, model(**call).logits, **TOLERANCE)


def test_only_wanted_positions_of_the_last_states_are_kept() -> None:
    converted, seen = lossy(), []
    head = converted.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        converted(tokens(1, 70), logits_to_keep=1)
    hook.remove()
    assert seen == [1]
